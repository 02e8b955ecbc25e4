"""A damaged record costs its own run a number, and no other run anything."""

import json
import os
import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from run_folders import ADAPTER, a_run, configure

from qlora_recipes.base.files import append_line, write_rows
from qlora_recipes.run.rundir import RunDir

NAME = "haider2024/code-llama-7b"
RECORD = {"time": 1.0, "step": 1, "max_steps": 4, "loss": 1.0, "step_seconds": 1.0, "tokens": 10}


@pytest.fixture
def bad(tmp_path: Path) -> RunDir:
    """A run to be damaged, beside one that is as it should be."""
    a_run(tmp_path / "runs", NAME, "good", 10.0)
    return a_run(tmp_path / "runs", NAME, "bad", 11.0)


def edit(file: Path, **change: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))  # orjson writes no integer beyond 64 bits


@pytest.mark.parametrize("change", [{"step": None}, {"loss": "text"}, {"eval_loss_per_token": [1]}])
def test_a_damaged_line_of_metrics_is_left_out_and_said(recipe, bad, change):
    edit(bad.path / "run.json", state="failed")
    bad.metrics.write_bytes(orjson.dumps(RECORD) + b"\n" + orjson.dumps(RECORD | {"step": 2} | change) + b"\n")
    listed = recipe.ok("results", "--json")
    assert {Path(row["run"]).name: row["step"] for row in orjson.loads(listed.stdout)} == {"good": 0, "bad": 1}
    assert listed.stderr.count("bad/metrics.jsonl") == 1


def test_zeros_at_the_end_of_metrics_cost_no_whole_line(recipe, bad):
    edit(bad.path / "run.json", state="failed")
    bad.metrics.write_bytes(orjson.dumps(RECORD) + b"\n" + b"\0" * 4096)
    append_line(bad.metrics, orjson.dumps(RECORD | {"step": 2}))  # of a resumed training
    assert {row["step"] for row in recipe.json("results")} == {0, 2}


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("jobs.json", [{"place": "slurm"}], "bad/jobs.json: "),
        ("run.json", {"created": "2026-01-01T00:00:00"}, "bad/run.json: "),
    ],
)
def test_a_damaged_run_is_named_and_the_others_are_listed(recipe, bad, file, content, says):
    edit(bad.path / "run.json", state="interrupted")
    if file == "run.json":
        content = orjson.loads((bad.path / file).read_bytes()) | content
    (bad.path / file).write_bytes(orjson.dumps(content))
    for words in (["results", "--json"], ["results", "haider2024"]):
        listed = recipe.ok(*words)
        assert says in listed.stderr
        assert "10.0" in listed.stdout
    recipe.fails("report", f"{NAME}/bad")


@pytest.mark.parametrize(
    ("provenance", "at"),
    [("T4", ""), ({"gpus": [{"name": 1}]}, ".gpus.0.name"), ({"git": {}}, ".git.revision"), ({"cpu": None}, ".cpu")],
)
def test_a_provenance_of_odd_types_is_named_with_its_place(recipe, bad, provenance, at):
    edit(bad.path / "run.json", provenance=provenance)
    says = re.compile(rf"bad/run\.json: .*provenance{re.escape(at)}; ")
    for words in (["report"], ["results", "--export"], ["results", f"{NAME}/good"]):
        done = recipe.fails(*words, f"{NAME}/bad")
        assert says.search(done.stderr), done.stderr


@pytest.mark.parametrize(
    "scores",
    [
        [],
        {"bleu4": 7},
        {"bleu4": {"value": "good", "declaration": {}}},
        {"bleu4": {"value": 5.0, "interval": 1, "declaration": {}}},
        {"accuracy": {"value": 5.0, "declaration": {"metric": "of the future"}}},
    ],
)
def test_damaged_scores_are_named_and_the_run_is_as_one_that_is_not_evaluated(recipe, bad, scores):
    edit(bad.path / "scores.json", scores=scores)
    for words in (["results", "--json"], ["report", f"{NAME}/bad"]):
        done = recipe.ok(*words)
        assert "bad/scores.json" in done.stderr
    assert {row["bleu4"] for row in recipe.json("results")} == {10.0, None}


def test_scores_in_the_form_of_another_version_are_named_as_such(recipe, bad):
    edit(bad.path / "scores.json", version=0, scores=None)
    problem = "written by another version of qlora-recipes; recreate it with `recipe evaluate`"
    assert recipe.ok("results", "--json").stderr == f"runs/{NAME}/bad/scores.json: {problem}\n"


@pytest.mark.parametrize("change", [{"row": None}, {"bleu4": "good"}, {"bleu4": 1e308}, {"prediction": 1}])
def test_predictions_that_are_none_are_named(recipe, bad, change):
    row = {"row": 1, "idx": 1, "lang": "go", "reference": "a", "prediction": "b", "bleu4": 1.0}
    write_rows(bad.path / "predictions.jsonl", [row, row | {"row": 2} | change])
    for words in (["results", "haider2024"], ["report", f"{NAME}/bad"]):
        recipe.ok(*words)
    assert "bad/predictions.jsonl: damaged" in recipe("report", f"{NAME}/bad").stderr


def test_a_truncated_adapter_is_neither_evaluated_nor_published(recipe, bad):
    bad.output.mkdir()
    (bad.output / ADAPTER).write_bytes(b"\x10\0\0\0")
    for command in ("evaluate", "publish"):
        done = recipe(command, f"{NAME}/bad")
        assert done.returncode == 2
        assert f"bad/output/{ADAPTER}: damaged" in done.stderr


def listed(text: str) -> set[str]:
    return {Path(row["run"]).name for row in json.loads(text)}


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", ".lock", "jobs.json", "scores.json"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_an_odd_file_is_named_and_the_other_runs_are_listed(recipe, bad, name, kind):
    edit(bad.path / "run.json", state="running")
    odd = bad.path / name
    odd.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(odd)
    else:
        odd.symlink_to("/dev/zero")
    done = recipe.ok("results", "--json")
    assert f"bad/{name}: " in done.stderr
    assert "good" in listed(done.stdout)


@pytest.mark.parametrize("kind", ["fifo", "device", "sparse"])
def test_a_report_ends_whatever_stands_for_the_evaluated_rows(recipe, bad, kind):
    """Rows that val_set_size held out are in the run's folder, once they are evaluated."""
    configure(bad, test_datasets=None, val_set_size=0.1, datasets=[{"path": "x", "type": "alpaca"}])
    row = {"row": 0, "reference": "a", "prediction": "b", "ended": True, "scores": {}}
    write_rows(bad.path / "predictions.jsonl", [row])
    odd = bad.path / "evaluation-rows.jsonl"
    if kind == "fifo":
        os.mkfifo(odd)
    elif kind == "device":
        odd.symlink_to("/dev/zero")
    else:
        with odd.open("wb") as stream:
            stream.truncate(1 << 40)
    recipe.ok("report", f"{NAME}/bad")


@pytest.mark.parametrize(
    "change",
    [
        {"summary": {"step": 10**30}},
        {"gpus_used": 10**30},
        {"variant_of": "x" * 5000},
        {"cwd": "\0"},
    ],
    ids=["step", "GPUs", "variant", "folder"],
)
def test_an_odd_value_of_a_record_is_named_with_its_field(recipe, bad, change):
    edit(bad.path / "run.json", **change)
    done = recipe.ok("results", "--json")
    assert listed(done.stdout) == {"good"}
    assert f"bad/run.json: missing or damaged at {next(iter(change))}" in done.stderr
    recipe.fails("resume", "--trust", f"{NAME}/bad")


def test_an_integer_beyond_64_bits_becomes_a_float(recipe, bad):
    difference = {"key": "lora_r", "run": 10**30, "source": {"kind": "override", "name": "lora_r", "detail": "1"}}
    edit(bad.path / "run.json", differences=[difference], provenance={"other": 10**30})
    assert listed(recipe.ok("results", "--json").stdout) == {"good", "bad"}


def test_a_step_of_no_time_has_no_speed(recipe, bad):
    edit(bad.path / "run.json", state="interrupted")
    bad.metrics.write_text(json.dumps({"step": 1, "loss": 1.0, "tokens": 10**18, "step_seconds": 1e-300}))
    done = recipe.ok("results", "--json")
    assert {row["tokens_per_second"] for row in json.loads(done.stdout)} == {812.0, None}


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ("output", ["publish"]),
        ("output/merged", ["publish", "--merge"]),
        ("evaluations", ["evaluate", "--adapter", "none"]),
        ("evaluations/0123456789ab", ["evaluate", "--adapter", "none"]),
        ("output/checkpoint-2", ["resume", "--trust"]),
    ],
)
def test_no_command_writes_through_a_link_to_another_folder(recipe, tmp_path, bad, link, words):
    edit(bad.path / "run.json", state="interrupted" if words[0] == "resume" else "finished")
    (victim := tmp_path / "victim").mkdir()
    (victim / ADAPTER).write_bytes(b"theirs")
    (bad.path / link).parent.mkdir(exist_ok=True)
    (bad.path / link).symlink_to(victim)
    done = recipe.fails(words[0], f"{NAME}/bad", *words[1:])
    assert f"bad/{link}: leads out of the run's folder; replace it with a file or folder" in done.stderr
    assert [path.name for path in victim.iterdir()] == [ADAPTER]
