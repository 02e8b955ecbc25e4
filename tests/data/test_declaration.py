"""What is wrong with the data of a study.yaml is said with file, line, key and remedy."""

from pathlib import Path
from typing import Any

import pytest
from declared import sums

from qlora_recipes.base.errors import UserError
from qlora_recipes.data import prepare

URL = "https://example.org/x"

MISTAKES: list[tuple[str, Any, str, str]] = [  # a key, its value, the key that is named, and what is said
    ("keys", "sums", "keys", "no such key here; correct its name or delete it"),
    ("name", None, "name", "is missing; add it"),
    ("key", "a b", "key", "expected a name of letters, digits"),
    ("splits", None, "splits", "is missing; add it"),
    ("sources > train.jsonl > url", "ftp://example.org", "sources > train.jsonl > url", "an address that begins with"),
    ("sources > train.jsonl > rows", -1, "sources > train.jsonl > rows", "expected at least 1, not -1"),
    ("sources > train.jsonl > sha256", "123", "sources > train.jsonl > sha256", "expected 64 hexadecimal digits"),
    ("sources > train.jsonl > hub", "a/b", "sources > train.jsonl", "either url, the address of a file, or hub"),
    ("sources > train.jsonl > url", None, "sources > train.jsonl", "either url, the address of a file, or hub"),
    ("sources > train.jsonl > revision", "1", "sources > train.jsonl > revision", "is for a source with hub"),
    ("sources > more.jsonl", {"hub": "a/b"}, "sources > more.jsonl > hub", "give revision"),
    (
        "sources > m",
        {"hub": "a/b", "revision": "1", "kind": "model", "split": "x"},
        "sources > m > split",
        "not for kind",
    ),
    ("sources > a.zip", {"url": URL, "files": {}}, "sources > a.zip > files", "list the files in the zip"),
    ("sources > a.zip", {"url": URL, "files": {"test.csv": {}}}, "sources", "2 sources give a file test.csv"),
    ("sources > ../x.jsonl", {"url": URL}, "sources", "leads out of the folder"),
    ("input_formats > a", {"folder": "data/sums-raw"}, "input_formats > a > folder", "is that of the raw files"),
    (
        "input_formats",
        {"a": {"folder": "data/a"}, "b": {"folder": "data/a/"}},
        "input_formats > b > folder",
        "is that of a; give it another",
    ),
    (
        "input_formats > a",
        {"folder": "data/a", "row": {"inptu": "sum"}},
        "input_formats > a > row > inptu",
        "is no field of row; there are input, output",
    ),
    ("carry > output", "answer", "carry > output", "rename one"),
    ("row > idx", "answer", "row > idx", "rename one"),
    ("splits", {"training": {"from": "train.jsonl"}}, "splits > training", "the splits are train, valid, test"),
    ("splits > train > from", "trains.jsonl", "splits > train > from", "no source gives .*; did you mean train.jsonl"),
    ("splits > train > out_of", "test", "splits > train", "either from, the name of a raw file, or out_of"),
    ("splits > train > take", 3, "", ""),
    ("splits > train", {"draw": 1, "take": 3}, "splits > train > take", "draw or take, not both"),
    ("splits > train > seed", 3, "splits > train > seed", "is of a draw"),
    ("splits > valid > draw", None, "splits > valid > out_of", "how many rows to draw"),
    ("splits > valid > out_of", "valid", "splits > valid > out_of", "name another split, one with from"),
    ("splits > valid > drop", {}, "splits > valid > drop", "rows out of train are made as that split's"),
    ("splits > train > subsets > a", {"title": "a", "rows": 1, "seed": 0}, "splits > train > subsets", "of test only"),
    ("splits > test > subsets > a", {"title": "a", "rows": 1}, "splits > test > subsets > a", "either positions"),
    (
        "splits > test > subsets > a",
        {"title": "a", "rows": 1, "positions": "none.json"},
        "splits > test > subsets > a > positions",
        "no file none.json beside study.yaml",
    ),
    (
        "splits > test > subsets > valid",
        {"title": "a", "rows": 1, "seed": 0},
        "splits > test > subsets > valid",
        "is a split's name",
    ),
    ("scored_on", "tset", "scored_on", "no test set tset; did you mean test"),
    ("sample", "few", "sample", "no folder few with train.jsonl or test.csv beside study.yaml"),
]


@pytest.mark.parametrize(("key", "value", "at", "says"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_mistake_is_named_with_its_line(tmp_path: Path, key: str, value: Any, at: str, says: str) -> None:
    if not at:
        assert sums(tmp_path, {key: value}).data.splits["train"].take == value
        return
    with pytest.raises(UserError, match=says) as refused:
        sums(tmp_path, {key: value})
    place, named, _ = str(refused.value).split(": ", 2)
    assert named == "data." + at.replace(" > ", ".")
    file, line = place.rsplit(":", 1)
    last = at.split(" > ")[-1]
    there = (tmp_path / "study.yaml").read_text().splitlines()[int(line) - 1]
    assert file == str(tmp_path / "study.yaml")
    assert f"{last}:" in there or "data:" in there  # of what is missing, where it should be


@pytest.mark.parametrize(
    ("key", "expression", "at", "says"),
    [
        ("row > input", "question ~", "row > input", "'question ~' is not an expression: .*quotes of its own"),
        ("row > input", "Review this.", "row > input", "is not an expression"),
        ("row > input", "question | tagd", "row > input", "no filter 'tagd'; did you mean tagged"),
        (
            "row > input",
            "question | zzz",
            "row > input",
            "no filter .*; there are Jinja's, and the filters tagged",
        ),
        ("drop > no answer", "answer is nothing", "drop > no answer", "no test 'nothing'"),
        ("carry > kind", "'", "carry > kind", "is not an expression"),
        ("splits > test > row > input", "sum sum", "splits > test > row > input", "unexpected 'sum' behind it"),
        (
            "splits > train > order",
            {"buckets": 3, "longest_first": "question |"},
            "splits > train > order > longest_first",
            "is not an expression",
        ),
        (
            "input_formats > a",
            {"folder": "data/a", "row": {"input": ")"}},
            "input_formats > a > row > input",
            "is not an expression",
        ),
    ],
)
def test_a_wrong_expression_is_named_with_its_line(
    tmp_path: Path, key: str, expression: Any, at: str, says: str
) -> None:
    of_study = sums(tmp_path, {key: expression})
    with pytest.raises(UserError, match=says) as refused:
        prepare.check_expressions(of_study)
    place, named, _ = str(refused.value).split(": ", 2)
    assert named == "data." + at.replace(" > ", ".")
    line = (tmp_path / "study.yaml").read_text().splitlines()[int(place.rsplit(":", 1)[1]) - 1]
    assert f"{at.split(' > ')[-1]}:" in line


def test_how_many_rows_a_split_will_have_is_known_where_nothing_is_left_out(tmp_path: Path) -> None:
    rows = {"sources > train.jsonl > rows": 100}
    assert sums(tmp_path, rows).data.rows_of("train") is None  # some may have no answer
    known = sums(tmp_path, rows | {"drop": None}).data
    assert [known.rows_of(split) for split in ("train", "valid", "test")] == [96, 4, None]
    assert sums(tmp_path, rows | {"splits > train > take": 30}).data.rows_of("train") == 30
    assert sums(tmp_path, rows | {"splits > train > rows": 90}).data.rows_of("train") == 90


def test_the_only_format_needs_no_declaration(tmp_path: Path) -> None:
    of_study = sums(tmp_path)
    assert {name: form.folder for name, form in of_study.data.formats.items()} == {"default": "data/sums"}
