from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

from qlora_recipes.base import files, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.processes import held
from qlora_recipes.data import prepare, studies
from qlora_recipes.data.declaration import Data
from qlora_recipes.data.raw_rows import RawFile, RowMaker, tagged

STUDY = studies.find("haider2024")
DATA = yamlfiles.read_yaml(STUDY.folder / "study.yaml")["data"]
PATCH = "@@ -1,3 +1,3 @@ def f():\n     a = 1\n-    b = 2\n+    b = 3 \n \n"


def write(folder: Path, name: str, *rows: Any) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_bytes(b"".join((row if isinstance(row, bytes) else orjson.dumps(row)) + b"\n" for row in rows))
    return file


def row(msg: str = "Why?", patch: str = PATCH, **more: Any) -> dict[str, Any]:
    return {"patch": patch, "msg": msg, "oldf": "x" * 100, "id": 1, "y": 1} | more


def read(file: Path) -> list[dict[str, str]]:
    return [orjson.loads(line) for line in file.read_bytes().splitlines()]


def prepared(raw: list[Path], out: Path, study: studies.Study = STUDY, input_format: str = "diff") -> dict[str, Any]:
    return prepare.prepare(raw, out, study, input_format)


def test_the_tagged_form():
    assert tagged(PATCH) == "<keep>a = 1<del>b = 2<add>b = 3"
    assert tagged("@@ -1 +1 @@\n-\tx\n+\n+ y\n\\ No newline at end of file\n") == (
        "<del>x<add><add>y<keep>No newline at end of file"
    )


def test_the_manifest_accounts_for_every_row(tmp_path):
    rows = [row("a"), row(" \n"), row("b", patch=""), row("a"), row("c")]
    raw = write(tmp_path / "raw", "msg-train.jsonl", *rows)
    manifest = prepared([raw], tmp_path / "out")
    split = manifest["splits"]["train"]
    assert split["read"] == 5
    assert split["kept"] == 3
    assert split["rows"] == 3
    assert split["read"] == split["rows"] + sum(split["dropped"].values())
    assert split["dropped"] == {"empty msg": 1, "empty patch": 1}
    assert split["sources"] == {str(raw): files.sha256(raw)}
    assert split["sha256"] == files.sha256(tmp_path / "out" / "train.jsonl")
    assert split["is_the_study_file"] is False  # too few rows
    assert orjson.loads((tmp_path / "out" / "manifest.json").read_bytes()) == manifest


def small_study(raw: Path, **subsets: Any) -> studies.Study:
    changed = DATA | {"sources": {"msg-test.jsonl": {"url": "https://a.b/c", "sha256": files.sha256(raw)}}}
    declared = {name: {"title": name, "rows": 1} | subset for name, subset in subsets.items()}
    changed |= {"splits": {"test": {"from": raw.name, "subsets": declared}}, "test_set": "test"}
    return STUDY.model_copy(update={"data": Data.model_validate(changed), "folder": raw.parent})


def test_test_rows_have_their_position_and_language(tmp_path):
    raw = write(tmp_path / "raw", "msg-test.jsonl", row("a", lang="py"), row(" "), row("b"))
    prepared([raw], tmp_path / "out")
    assert [(r["idx"], r["lang"]) for r in read(tmp_path / "out" / "test.jsonl")] == [(0, "py"), (2, None)]


SPIDER = studies.find("dbgpt-spider")


def test_expressions_use_the_rows_of_lookups(tmp_path):
    sample = SPIDER.folder / "sample"
    split = prepared([sample], tmp_path / "out", SPIDER, "trained-prompt")["splits"]["test"]
    assert [*split["raw_files"]] == ["dev.json", "tables.json"]
    first = read(tmp_path / "out/test.jsonl")[0]
    assert first["user"].endswith(
        "\n##Instruction:\nsmall_library contains tables such as author, book, loan. "
        "Table author has columns such as author_id, name, country, born. author_id is the primary key.\n"
        "Table book has columns such as book_id, title, author_id, pages, year. book_id is the primary key.\n"
        "Table loan has columns such as loan_id, book_id, reader, days. loan_id is the primary key.\n"
        "The author_id of book is the foreign key of author_id of author.\n"
        "The book_id of loan is the foreign key of book_id of book.\n\n"
        "\n###Input:\nHow many books has each author written? Show the name, too.\n\n###Response:"
    )
    assert (first["group"], first["database"]) == ("medium", "small_library")
    with pytest.raises(UserError, match=r"^tables\.json: not given, but all rows need it; give its folder, too$"):
        prepared([sample / "dev.json"], tmp_path / "none", SPIDER, "trained-prompt")


def test_spiders_questions_have_as_many_of_each_level_as_its_authors_count():
    maker = RowMaker({}, {}, {"group": SPIDER.data.extra_fields["group"]}, "0")
    levels = Counter(maker.make({}, position=position)[2]["group"] for position in range(1034))
    assert levels == {"easy": 248, "medium": 446, "hard": 174, "extra": 166}


def test_a_listed_subset_has_its_rows_in_the_lists_order_and_goes_with_its_file(tmp_path):
    raw = write(tmp_path / "raw", "msg-test.jsonl", *(row(str(i)) for i in range(20)))
    (tmp_path / "raw" / "positions.json").write_text('{"rows": [7, 3, 7, 19]}')
    study = small_study(raw, listed={"positions": "positions.json"})
    split = prepared([raw], tmp_path / "out", study)["splits"]["test"]
    file = tmp_path / "out" / "listed.jsonl"
    assert [r["output"] for r in read(file)] == ["7", "3", "7", "19"]
    assert split["subsets"]["listed"]["rows"] == 4
    assert split["subsets"]["listed"]["sha256"] == files.sha256(file)
    write(tmp_path / "raw", "msg-test.jsonl", *(row(str(i)) for i in range(30)))
    split = prepared([raw], tmp_path / "out", study)["splits"]["test"]
    assert split["subsets"] == {}
    assert list(split["left_out"]) == ["listed"]
    assert not file.exists()


def test_drawn_subsets_have_a_seed_and_are_left_out_where_rows_are_too_few(tmp_path):
    raw = write(tmp_path / "raw", "msg-test.jsonl", *(row(str(i)) for i in range(20)))
    study = small_study(raw, few={"rows": 5, "seed": 1}, many={"rows": 50, "seed": 1})
    split = prepared([raw], tmp_path / "out", study)["splits"]["test"]
    assert {name: subset["rows"] for name, subset in split["subsets"].items()} == {"few": 5}
    assert split["subset_rows"]["few"] == {"rows": 5, "seed": 1}
    assert list(split["left_out"]) == ["many"]
    assert "20" in split["left_out"]["many"]
    assert len({r["idx"] for r in read(tmp_path / "out" / "few.jsonl")}) == 5


def test_the_studys_subset_lists_as_many_distinct_rows_as_the_paper_has():
    subset = STUDY.data.subsets["test-subset-1"]
    assert subset.positions
    positions = orjson.loads((STUDY.folder / subset.positions).read_bytes())["rows"]
    assert len(positions) == len(set(positions)) == subset.rows
    assert set(positions) <= set(range(10_169))


def test_csv_is_text_and_a_quotation_mark_that_stays_open_is_placed(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b'a,b\nNaN,"=1+""1"""\n"x\n\ny",\n')
    assert [*RawFile(file).rows()] == [{"a": "NaN", "b": '=1+"1"'}, {"a": "x\n\ny", "b": ""}]
    with file.open("ab") as stream:
        stream.write(b'"z,1\n2,3\n4,5\n')
    with pytest.raises(UserError, match=r"a\.csv:8: .*unexpected end of data; 2 complete rows precede$"):
        list(RawFile(file).rows())


def test_bad_input_leaves_nothing(tmp_path):
    good = write(tmp_path / "raw", "msg-test.jsonl", row())
    for name, content in (("msg-train.jsonl", b'{"msg": "a'), ("rows.jsonl", b"{}")):
        bad = write(tmp_path / "raw", name, content)
        with pytest.raises(UserError, match=name):
            prepared([good, bad], tmp_path / "out")
        assert list(tmp_path.glob("out/[!.]*")) == []


def test_a_second_preparation_in_a_folder_is_refused_and_parts_of_a_killed_one_go(tmp_path):
    raw = write(tmp_path / "raw", "msg-train.jsonl", row())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".train.jsonl.123.part").touch()
    with held(tmp_path / "out" / prepare.PREPARE_LOCK, ""), pytest.raises(UserError, match=f"^{tmp_path}/out: "):
        prepared([raw], tmp_path / "out")
    prepared([raw], tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*.part"))


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_after_a_kill_while_files_move_into_place_the_same_command_finishes(tmp_path, monkeypatch, moved):
    raw = write(tmp_path / "raw", "msg-train.jsonl", row("a")), write(tmp_path / "raw", "msg-valid.jsonl", row("b"))
    out, replace = tmp_path / "out", Path.replace
    names = iter(range(moved))

    def killed(part: Path, file: Path) -> Path:
        return replace(part, file) if next(names, None) is not None else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        prepared([*raw], out)
    assert len([*out.glob("[!.]*")]) == moved
    prepared([*raw], out)
    assert {file.name for file in out.iterdir()} == {"train.jsonl", "valid.jsonl", "manifest.json", ".prepare.lock"}


@pytest.mark.parametrize("name", ["train.jsonl", "manifest.json"])
def test_a_file_that_the_study_did_not_write_is_not_replaced(tmp_path, name):
    raw, out = write(tmp_path / "raw", "msg-train.jsonl", row("a")), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{out / name}: not replaced"):
        prepared([raw], out)
    assert {file.name: file.read_text() for file in out.glob("[!.]*")} == {name: "mine"}


def test_another_study_does_not_replace_prepared_rows(tmp_path):
    raw, out = write(tmp_path / "raw", "msg-train.jsonl", row("a")), tmp_path / "out"
    prepared([raw], out)
    before = (out / "train.jsonl").read_bytes()
    other = STUDY.model_copy(update={"folder": tmp_path / "stranger"})
    with pytest.raises(UserError, match=r"manifest\.json: not replaced, because stranger's"):
        prepared([write(tmp_path / "raw", "msg-train.jsonl", row("b"))], out, other)
    assert (out / "train.jsonl").read_bytes() == before
    prepared([raw], out)
    assert b'"b"' in (out / "train.jsonl").read_bytes()
