"""Data sets with no rows left are reported before Axolotl starts."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Recipe

from qlora_recipes.base.files import write_rows
from qlora_recipes.checks import too_long

CHATS = {"type": "chat_template", "field_messages": "turns", "message_property_mappings": {"content": "value"}}


def config(tiny: Path, words: list[int], **change: Any) -> dict[str, Any]:
    """A config for a data set with answers of so many words."""
    texts = [" ".join(["return"] * count) for count in words]
    chats = "turns" in str(change)
    write_rows(Path("r.jsonl"), ({"turns": [{"from": "gpt", "value": text}]} if chats else
                                 {"instruction": "Say it.", "output": text} for text in texts))  # fmt: skip
    entry = {"path": "r.jsonl", "type": "alpaca"} | change.pop("entry", {})
    return {"base_model": str(tiny), "sequence_len": 100, "datasets": [entry]} | change


@pytest.mark.parametrize("entry", [{}, CHATS, {"type": {"field_output": "output"}}], ids=str)
def test_where_no_row_fits_that_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path, entry: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (only,) = too_long.findings(config(tiny, [400, 500, 300], entry=entry))
    assert (only.level, only.name) == ("error", "too-long:datasets.0.path")
    assert "no row fits sequence_len, 100, so that Axolotl would drop all 3" in only.problem
    least, most = (int(word) for word in only.remedy.split() if word.isdecimal())
    assert 290 <= least < most and most < 4 * 510
    assert [*too_long.findings(config(tiny, [400, 500, 10], entry=entry))] == []


@pytest.mark.parametrize(
    "change",
    [
        {"excess_length_strategy": "truncate"},
        {"entry": {"type": "completion"}},
        {"entry": {"type": "somebody.elses"}},
        {"sequence_len": 4000},
        {"base_model": "some/model"},
    ],
    ids=str,
)
def test_where_rows_are_left_or_it_is_not_known_there_is_no_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path, change: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert [*too_long.findings(config(tiny, [400, 500], **change))] == []


def test_a_row_that_fits_behind_many_that_do_not_is_found_and_patience_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [400] * 300
    long = config(tiny, words)
    monkeypatch.setattr(too_long, "_PATIENCE", 60.0)  # of a busy machine
    (only,) = too_long.findings(long)
    assert "all 300" in only.problem
    with Path("r.jsonl").open("a") as rows:  # more bytes than all others, and fewer tokens
        rows.write('{"instruction": "", "output": "x", "note": "' + "y" * 9000 + '"}\n')
    assert [*too_long.findings(long)] == []
    monkeypatch.setattr(too_long, "_PATIENCE", -1.0)
    config(tiny, words)
    (only,) = too_long.findings(long)
    assert only.level == "warning" and "none of the 200 shortest rows fits sequence_len" in only.problem


def test_each_section_has_a_limit_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.chdir(tmp_path)
    both = config(tiny, [400, 500])
    both |= {"test_datasets": both["datasets"]}
    assert [found.name for found in too_long.findings(both | {"eval_sequence_len": 4000})] == [
        "too-long:datasets.0.path"
    ]
    (only,) = too_long.findings(both | {"sequence_len": 4000, "eval_sequence_len": 100})
    assert only.name == "too-long:test_datasets.0.path" and "no row fits eval_sequence_len, 100" in only.problem


def test_a_set_beside_one_that_is_left_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    long = config(tiny, [400, 500])
    (one,) = long["datasets"]

    def levels(*others: dict[str, Any]) -> list[tuple[str, str]]:
        return [(found.level, found.key) for found in too_long.findings(long | {"datasets": [one, *others]})]

    assert levels(one) == [("error", "datasets.0.path"), ("error", "datasets.1.path")]
    write_rows(Path("short.jsonl"), [{"instruction": "Say it.", "output": "x"}])
    assert levels(one | {"path": "short.jsonl"}) == [("warning", "datasets.0.path")]
    assert levels({"path": "some/set", "type": "alpaca"}) == [("warning", "datasets.0.path")]


def test_what_axolotl_does_not_read_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert [*too_long.findings(config(tiny, [400], entry={"split": "train[:0]"}))] == []
    chats = config(tiny, [400], entry=CHATS)
    turns = [
        {"from": "system", "value": "return " * 400},
        {"from": "human", "value": "Say."},
        {"from": "gpt", "value": "x"},
    ]
    write_rows(Path("r.jsonl"), [{"turns": turns}])
    (only,) = too_long.findings(chats)
    assert only.level == "error"
    chats["datasets"][0]["drop_system_message"] = True
    assert [*too_long.findings(chats)] == []


def test_run_refuses_before_axolotl_starts(recipe: Recipe, tmp_path: Path, tiny: Path, tiny_profile: Path) -> None:
    done = recipe("run", "haider2024/code-llama-7b", "--profile", tiny_profile, "--set", "sequence_len=8")
    assert done.returncode == 2, done.stderr
    assert "no row fits sequence_len, 8, so that Axolotl would drop all 64" in done.stderr
    assert "[too-long:datasets.0.path]" in done.stderr and "[too-long:test_datasets.0.path]" in done.stderr
    assert not (tmp_path / "runs").exists()
