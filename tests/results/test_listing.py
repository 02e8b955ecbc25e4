"""Tables of runs."""

import re
from pathlib import Path

import pytest
from run_folders import a_gguf_file, a_run, fields

from qlora_recipes.base import tables
from qlora_recipes.evaluate.score import columns_of
from qlora_recipes.results import listing
from qlora_recipes.results.run_result import RunResult
from qlora_recipes.training.run_record import FileState, Summary

LLAMA_2 = "haider2024/llama-2-7b"


@pytest.mark.parametrize(
    ("summary", "step"),
    [
        ({"step": 3}, "3/?"),
        ({"step": 3, "max_steps": 9}, "3/9"),
        ({"step": 3, "max_steps": 9, "ended": "early stopping"}, "3/9, early stopping"),
        ({"step": 9, "max_steps": 9, "kept_step": 9}, "9/9"),
        ({"step": 9, "max_steps": 9, "kept_step": 6}, "9/9, step 6 kept"),
    ],
)
def test_the_step_says_how_the_training_ended(tmp_path, summary, step):
    assert cells(tmp_path, Summary(**summary), "step") == [step]


@pytest.mark.parametrize(
    ("summary", "losses"),
    [
        ({"eval_loss_per_token_first": 1.2, "eval_loss_per_token": 1.0, "eval_loss": 0.9}, [1.0, 1.2, None]),
        ({"eval_loss": 0.9}, [None, None, 0.9]),
    ],
)
def test_the_eval_loss_per_token_goes_before_axolotls(tmp_path, summary, losses):
    headings = ("eval loss", listing.FIRST_EVAL_LOSS, listing.AXOLOTL_EVAL_LOSS)
    assert cells(tmp_path, Summary(**summary), *headings) == losses


def cells(runs: Path, summary: Summary, *headings: str) -> list[object]:
    folder = a_run(runs, LLAMA_2, "a", 5.0, summary=summary)
    columns = {column.label: column for column in columns_of(LLAMA_2).values()}
    return fields(listing.cells(RunResult(folder, folder.read()), columns), *headings)


def test_runs_of_no_study_show_the_course_of_the_eval_loss_once(tmp_path, recipe):
    summary = Summary(eval_loss_per_token_first=1.2, eval_loss_per_token=1.0)
    scores = {"metrics": {name: {"metric": name} for name in ("eval_loss", "exact_match")}, "exact_match": 40.0}
    a_run(tmp_path / "runs", "start/qlora", "a", 0, summary=summary, scores=scores)
    _, head, *_ = recipe.ok("results").stdout.splitlines()
    assert [heading for heading in re.split("  +", head) if "loss" in heading or "exact" in heading] == [
        "exact match, %",
        "eval loss",
        listing.FIRST_EVAL_LOSS,
    ]


def test_rehearsals_of_no_study_share_a_table_of_the_columns_with_values(tmp_path, recipe):
    a_run(tmp_path / "runs", "start/qlora", "a", 5.0, rehearsal=True)
    scores = {"number": 40.0, "metrics": {"accuracy": {"metric": "number"}}, "accuracy": 40.0}
    a_run(tmp_path / "runs", "start/lora", "b", 0, rehearsal=True, scores=scores)
    title, head, *rows, end = recipe.ok("results").stdout.splitlines()
    assert title == f"{listing.REHEARSALS}: of no study"
    headings = ["run", "recipe", "state", "BLEU-4", "95 %", "step", "right numbers, %", "rows", "peak GiB"]
    assert re.split("  +", head) == [*headings, "tokens/s", "minutes"]
    assert [row.split()[:4] for row in rows] == [
        ["a", "start/qlora", "finished", "5.00"],
        ["b", "start/lora", "finished", "–"],
    ]
    assert end == ""


def test_stale_evaluations_are_counted(tmp_path, recipe):
    a_run(tmp_path / "runs", LLAMA_2, "a", 5.0)
    resumed = FileState(sha256="of a resumed training", bytes=1, mtime=0)
    a_run(tmp_path / "runs", LLAMA_2, "b", 5.0, adapter=resumed)
    command = f"`recipe evaluate runs/{LLAMA_2}/b`"
    assert recipe.ok("results").stderr == f"evaluations that are stale or edited: 1; for the last, run {command}\n"


def test_gguf_files_stand_below_their_adapter(tmp_path, recipe):
    run = a_run(tmp_path / "runs", LLAMA_2, "a", 5.0)
    a_gguf_file(run, 4.5)
    [file] = recipe.json("results", run.path)[0]["files"]
    assert fields(file, "name", "quantization", "kl", "bleu4") == ["m-q4_k_m.gguf", "Q4_K - Medium", 0.056, 4.5]
    shown = recipe.ok("results").stdout
    table = shown[shown.index("GGUF files") :].splitlines()
    title, head, adapter, file_row = table[:4]
    assert title == listing._FILES
    assert re.split("  +", head)[:3] == ["run", "file", "BLEU-4"]
    assert re.split("  +", adapter)[1:3] == ["adapter", "5.00"]
    assert re.split("  +", file_row)[1:3] == ["m-q4_k_m.gguf (Q4_K - Medium, 4.9 bits)", "4.50"]
    assert re.split("  +", file_row)[-2:] == ["0.772 → 0.773 → 0.821", "0.0560"]


@pytest.mark.parametrize(
    ("width", "left_out"),
    [
        (80, "published, difference, 95 %, first loss, step, rows, peak GiB, minutes"),
        (100, "95 %, first loss, step, rows, peak GiB, minutes"),
        (120, "95 %, rows, peak GiB, minutes"),
    ],
)
def test_a_terminal_shows_losses_and_scores_first(tmp_path, recipe, monkeypatch, width, left_out):
    for name, loss in (("20260101-120000-1a2b3c4", 2.499), ("20260101-130000-1a2b3c4", 2.496)):
        summary = Summary(step=8, max_steps=8, eval_loss_per_token_first=3.0, eval_loss_per_token=loss, peak_memory=2.0)
        a_run(tmp_path / "runs", LLAMA_2, name, 5.0, summary=summary)
    monkeypatch.setattr(tables, "_width", lambda: width)
    lines = recipe.ok("results").stdout.splitlines()
    assert max(map(len, lines)) <= width
    head = re.split("  +", lines[1])
    assert head[:3] == ["run", "recipe", "state"] and "eval loss" in head
    assert "2.499" in lines[2] and "2.496" in lines[3]
    listed = " ".join(line.strip() for line in lines[4:])
    assert listed.strip() == f"columns left out: {left_out}; `| less -S` shows all"


def test_a_terminal_shows_verdicts_before_intervals(tmp_path, recipe, monkeypatch):
    a_run(tmp_path / "runs", LLAMA_2, "1", 5.0)
    monkeypatch.setattr(tables, "_width", lambda: 80)
    lines = recipe.ok("results", "haider2024").stdout.splitlines()
    head = next(line for line in lines if line.startswith("recipe "))
    assert re.split("  +", head) == ["recipe", "BLEU-4", "95 %", "published", "verdict"]
