from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Recipe

from qlora_recipes import compare, intervals, score
from qlora_recipes.errors import UserError


def rows(*predictions: str, **more: list[Any]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"row": i, "reference": f"rename variable number {i} please", "prediction": text}
        for i, text in enumerate(predictions)
    ]
    for name, values in more.items():
        made = [row | {name: value} for row, value in zip(made, values, strict=True)]
    return score.with_scores(made)


def test_a_comparison_is_of_the_same_rows() -> None:
    a = rows("rename variable", "why", "rename it please", "nit", idx=[7, 8, 9, 11])
    b = rows("nit", "x", "rename", "nit", idx=[7, 8, 9, 10])
    compared = compare.compare(a, list(reversed(b)))
    assert [row["score"] for row in compared] == ["bleu4", "rouge_l"]
    expected = intervals.paired([row["bleu4"] for row in a[:3]], [row["bleu4"] for row in b[:3]])
    assert compared[0] == {"score": "bleu4", "rows": 3, "a": pytest.approx(sum(r["bleu4"] for r in a[:3]) / 3),
                           "b": pytest.approx(sum(r["bleu4"] for r in b[:3]) / 3)} | expected  # fmt: skip


def test_a_row_that_stands_twice_counts_twice() -> None:
    a = rows("rename variable", "why")
    twice = [row | {"idx": 3, "reference": "same"} for row in a]
    assert len(compare.pair(twice, twice[:1])) == 2


def test_rows_without_a_position_are_told_by_their_order() -> None:
    assert len(compare.pair(rows("a", "b"), rows("c", "d"))) == 2
    with pytest.raises(UserError, match="2 rows and 1"):
        compare.pair(rows("a", "b"), rows("c"))


def test_other_rows_are_refused() -> None:
    other = [row | {"reference": "something else"} for row in rows("a", "b")]
    with pytest.raises(UserError, match="row 0 has another reference"):
        compare.pair(rows("a", "b"), other)
    with pytest.raises(UserError, match="no row is in both"):
        compare.pair(rows("a", idx=[1]), rows("a", idx=[2]))


def test_groups_by_language_and_length() -> None:
    found = compare.by_group(rows("rename", "why", "x", lang=["py", "go", "py"]), "lang")
    assert [(group["lang"], group["rows"]) for group in found] == [("go", 1), ("py", 2)]
    lengths = [
        row | {"reference": "word " * n} for row, n in zip(rows("a", "b", "c", "d"), (3, 10, 11, 60), strict=True)
    ]
    groups = compare.by_group(lengths, "length")
    assert [(g["length"], g["rows"]) for g in groups] == [
        ("0 to 10 tokens", 2),
        ("11 to 25 tokens", 1),
        ("more than 50 tokens", 1),
    ]
    with pytest.raises(UserError, match="do not tell their language"):
        compare.by_group(rows("a"), "lang")


def test_the_command_compares_files(recipe: Recipe, tmp_path: Path) -> None:
    for name, made in (("a.jsonl", rows("rename variable", "why")), ("b.jsonl", rows("x", "y"))):
        (tmp_path / name).write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in made))
    done = recipe("results", "--compare", "a.jsonl", "b.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    assert orjson.loads(done.stdout)[0]["better"] == 1
    assert recipe("results", "--compare", "a.jsonl", "nowhere.jsonl").returncode == 2
    assert "a: a.jsonl, b: b.jsonl" in recipe("results", "--compare", "a.jsonl", "b.jsonl").stdout
