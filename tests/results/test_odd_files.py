"""Odd files in one run folder, and odd values in its records, neither stop a command nor hide other runs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from run_folders import ADAPTER, a_run

from qlora_recipes.runs.rundir import RunDir

NAME = "haider2024/code-llama-7b"


@pytest.fixture
def bad(tmp_path: Path) -> RunDir:
    """A run to be damaged, in the same folder as an intact one."""
    a_run(tmp_path / "runs", NAME, "good", 10.0)
    return a_run(tmp_path / "runs", NAME, "bad", 11.0)


def edit(file: Path, **change: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


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
    difference = {"key": "lora_r", "run": 10**30, "why": "--set lora_r"}
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
    assert f"bad/{link}: leads to a folder outside the run" in done.stderr
    assert [path.name for path in victim.iterdir()] == [ADAPTER]
