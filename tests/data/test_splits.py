"""Raw files of every kind, and what splits are made of them."""

import codecs
from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from datasets import Dataset
from declared import sums

from qlora_recipes.base import files
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import write_rows
from qlora_recipes.data import manifest
from qlora_recipes.data.prepare import prepare
from qlora_recipes.data.studies import Study
from qlora_recipes.evaluate import evaluation_rows

ROWS = [{"question": f"{i} + 1", "answer": str(i + 1), "kind": "plus"} for i in range(20)]


def prepared(study: Study) -> dict[str, Any]:
    """The manifest's splits of what is made of the raw files in a study's folder."""
    folder = study.folder
    raw = [folder / name for name in study.data.raw_files if (folder / name).is_file()]
    return prepare(raw, folder / "out", study, "default")["splits"]


def read(study: Study, split: str) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in (study.folder / "out" / f"{split}.jsonl").read_bytes().splitlines()]


def numbers(study: Study, split: str) -> list[int]:
    return answered(read(study, split), "output")


def answered(rows: Iterable[dict[str, Any]], field: str = "answer") -> list[int]:
    return [int(row[field]) - 1 for row in rows]


def test_rows_drawn_out_of_a_split_are_not_in_it(tmp_path):
    write_rows(tmp_path / "train.jsonl", [*ROWS, {"question": "no", "answer": ""}])
    study = sums(tmp_path)
    splits = prepared(study)
    valid, train = numbers(study, "valid"), numbers(study, "train")
    assert len(valid) == 4
    assert sorted([*valid, *train]) == list(range(20))
    assert splits["train"]["kept"] == 20
    assert splits["train"]["rows"] == 16
    assert splits["train"]["moved"] == {"valid": 4}
    assert [splits["valid"][key] for key in ("sample", "seed", "sample_from")] == [4, 1, "train"]
    left_out = {row["file"]: row["left out"] for row in manifest.table({"splits": splits})}
    assert left_out == {
        "train.jsonl": "1 (no answer), 4 (in valid.jsonl)",
        "valid.jsonl": "1 (no answer), 16 (not chosen)",
    }
    again = numbers(study, "valid")
    prepared(sums(tmp_path, {"data > splits > valid > seed": 2}))
    assert numbers(study, "valid") != again


def test_splits_sampled_from_one_share_no_row(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS)
    drawn_too = {"from": None, "fields": None, "filters": None, "sample_from": "train", "sample": 12, "seed": 2}
    study = sums(tmp_path, {"data > splits > test": drawn_too})
    prepared(study)
    drawn = [numbers(study, split) for split in ("train", "valid")]
    drawn.append(answered(read(study, "test"), "output"))
    assert [len(rows) for rows in drawn] == [4, 4, 12]
    assert sorted(row for rows in drawn for row in rows) == list(range(20))


def test_the_first_rows_can_be_taken_and_all_are_accounted_for(tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"question": "no", "answer": ""}, *ROWS])
    study = sums(tmp_path, {"data > splits > train > first": 6, "data > splits > valid": None})
    [(name, split)] = prepared(study).items()
    assert numbers(study, "train") == list(range(6))
    assert name == "train"
    assert split["read"] == 21
    assert split["kept"] == 20
    assert split["rows"] == 6
    assert split["first"] == 6
    assert manifest.table({"splits": {name: split}})[0]["left out"].startswith("1 (no answer), 14 (")


def test_rows_are_shuffled_as_the_library_datasets_does_it(tmp_path):
    write_rows(tmp_path / "train.jsonl", [*ROWS[:7], {"question": "no", "answer": ""}, *ROWS[7:]])
    drawn = {"data > splits > valid": {"seed": None, "shuffle": 0}, "data > splits > train > shuffle": 1}
    study = sums(tmp_path, drawn | {"data > splits > train > first": 9})
    splits = prepared(study)
    shuffled = Dataset.from_list(ROWS).shuffle(seed=0)
    rest = shuffled.skip(4)
    for split, theirs in (("valid", shuffled.take(4)), ("train", rest.shuffle(seed=1).take(9))):
        assert numbers(study, split) == answered(theirs)
    assert splits["train"]["kept"] == 20
    assert splits["train"]["moved"] == {"valid": 4}
    assert splits["train"]["shuffle"] == 1
    study = sums(tmp_path, drawn | {"data > splits > train > shuffle": None})
    prepared(study)
    assert numbers(study, "train") == answered(rest)
    study = sums(tmp_path, {"data > splits": {"valid": None, "train": {"shuffle": 2, "sample": 5}}})
    prepared(study)
    assert numbers(study, "train") == answered(Dataset.from_list(ROWS).shuffle(2).take(5))


def test_runs_of_rows_can_be_sorted_by_length(tmp_path):
    rows = [{"question": "q" * n, "answer": str(i + 1)} for i, n in enumerate([1, 3, 3, 2, 9, 1, 2, 4])]
    write_rows(tmp_path / "train.jsonl", rows)
    order = {"buckets": 3, "longest_first": "(question ~ output) | length"}
    study = sums(tmp_path, {"data > splits": {"valid": None, "train": {"order": order}}})
    prepared(study)
    assert numbers(study, "train") == [1, 2, 0, 4, 3, 5, 7, 6]


def test_a_split_of_another_data_set_has_expressions_of_its_own(tmp_path):
    (tmp_path / "test.csv").write_text("\ufeffsum,result,kind\n1+1,2,\n\n" + '"2\n+2",4,"a, b"\n', encoding="utf-8")
    study = sums(tmp_path)
    split = prepared(study)["test"]
    assert read(study, "test") == [
        {"input": "1+1", "output": "2", "idx": 0, "kind": ""},
        {"input": "2\n+2", "output": "4", "idx": 1, "kind": "a, b"},
    ]
    assert [*split["sources"].values()] == [files.sha256(tmp_path / "test.csv")]


def test_a_split_of_several_files_has_their_rows_in_order_and_their_names(tmp_path):
    for name, part in (("b.json", ROWS[:2]), ("a.json", ROWS[2:5])):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + orjson.dumps(part))
    sources = {"b.json": {"url": "https://example.org/b", "rows": 2, "sha256": files.sha256(tmp_path / "b.json")}}
    sources |= {"a.json": {"url": "https://example.org/a", "rows": 3}}
    test = {"from": ["b.json", "a.json"], "fields": {"input": "question", "output": "input ~ '!'"}}
    changes = {"data > sources": sources, "data > splits > test": test, "data > extra_fields": {"group": "file[0]"}}
    study = sums(tmp_path, changes)
    split = prepared(study)["test"]
    rows = read(study, "test")
    assert [(row["output"], row["idx"], row["group"]) for row in rows] == [
        (f"{row['question']}!", i, "b" if i < 2 else "a") for i, row in enumerate(ROWS[:5])
    ]
    assert split["read"] == 5
    assert study.data.rows_of("test") == 5
    assert split["is_the_study_file"] is None
    (tmp_path / "a.json").write_bytes(orjson.dumps([*ROWS[2:4], {"answer": "2"}]))
    with pytest.raises(UserError, match=r"a\.json: row 3: "):
        prepared(study)
    (tmp_path / "b.json").write_bytes(orjson.dumps(ROWS[:1]))
    (tmp_path / "a.json").write_bytes(orjson.dumps(ROWS[2:5]))
    assert prepared(study)["test"]["is_the_study_file"] is False


CSV = "\n".join(["question,answer,kind", *(",".join(row.values()) for row in ROWS)]).encode()


@pytest.mark.parametrize(("name", "content"), [("a.json", orjson.dumps(ROWS)), ("a.csv", CSV)])
def test_rows_are_the_same_from_every_kind_of_file(tmp_path, name, content):
    sources = {name: {"url": "https://example.org/a"}, "train.jsonl": None}
    study = sums(tmp_path, {"data > sources": sources, "data > splits": {"train": {"from": name}, "valid": None}})
    (tmp_path / name).write_bytes(content)
    assert prepared(study)["train"]["read"] == 20
    assert numbers(study, "train") == list(range(20))


def test_messages_and_fields_with_spaces_can_be_made_of_a_row(tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"the question": "<a> & b", "answer": "c"}])
    expression = "[{'role': 'user', 'content': row['the question']}, {'role': 'assistant', 'content': answer}]"
    fields = {"input": expression, "output": "row | tojson"}
    study = sums(tmp_path, {"data > fields": fields, "data > splits > valid": None})
    prepared(study)
    [row] = read(study, "train")
    assert row["input"] == [{"role": "user", "content": "<a> & b"}, {"role": "assistant", "content": "c"}]
    assert row["output"] == '{"the question":"<a> & b","answer":"c"}'


def test_a_test_set_is_the_studys_if_its_raw_file_and_its_expressions_are(tmp_path):
    (tmp_path / "test.csv").write_text("sum,result\n" + "".join(f"{i},{i}\n" for i in range(9)))
    checksum = {"data > sources > test.csv > sha256": files.sha256(tmp_path / "test.csv")}
    subset = {"data > splits > test > subsets > few": {"title": "few", "rows": 3, "seed": 1}}
    study = sums(tmp_path, checksum | subset)

    def names(study: Study) -> list[str | None]:
        prepared(study)
        sets = [tmp_path / "out" / f"{name}.jsonl" for name in ("test", "few")]
        return [evaluation_rows.test_set(file, files.sha256(file)) for file in sets]

    assert names(study) == ["test", "few"]
    assert names(sums(tmp_path, subset)) == [None, None]  # no checksum is known


SHUFFLED = {"data > splits > train > shuffle": 1}
SOURCES = {"data > sources > other.jsonl": {"url": "https://example.org/other"}}


@pytest.mark.parametrize(
    "change",
    [
        {"data > splits > train > first": 7},
        {"data > splits > valid > sample": 5},
        {"data > splits > valid > seed": 2},
        {"data > splits > train > shuffle": None},
        SOURCES | {"data > splits > train > from": "other.jsonl"},
        SOURCES | {"data > splits > train > from": ["train.jsonl", "other.jsonl"]},
        {"data > sources > train.jsonl > sha256": "0" * 64},
    ],
    ids=str,
)
def test_rows_prepared_for_another_declaration_are_not_the_studys(tmp_path, change):
    write_rows(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "test.csv").write_text("sum,result\n1+1,2\n")
    study = sums(tmp_path, SHUFFLED)
    prepared(study)
    assert manifest.is_not_prepared(study, tmp_path / "out", "default") is None
    assert manifest.is_not_prepared(sums(tmp_path, SHUFFLED | change), tmp_path / "out", "default")
