"""`recipe verify` without its measurements: what it begins, keeps, judges and shows, and how it is stopped."""

import getpass
import os
import platform
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson
import psutil
import pytest
from conftest import Recipe

from qlora_recipes.base import paths
from qlora_recipes.configs import gpus
from qlora_recipes.data.verified import Record
from qlora_recipes.verifying import bench, jobs, verify
from qlora_recipes.verifying.bench import Bench, CannotBeShown, Figure, Figures, Found
from qlora_recipes.verifying.lines import GPU, Line, all_lines
from qlora_recipes.verifying.trainings import ENGINES, SHAPES

HERE = Bench(Path(), bf16=True)
ON_GPU = replace(HERE, gpu=gpus.find("T4"), gpus=2, free=15 * 2**30)
SHOWN = [line for line in all_lines(HERE) if not line.lacks]

Jobs = dict[str, list[Found | None]]


def within(line: Line, share: float = 0.5) -> Figure:
    """A figure at a share of a line's bound; beyond it where that is more than 1."""
    off = share * line.bound if line.bound or share <= 1 else 1
    return Figure(100 * (1 + off), 100) if line.bound else Figure(off)


def good(job: str) -> Figures:
    """Figures that pass on a CPU."""
    return {line.name: within(line) for line in SHOWN if line.job == job}


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The jobs that are carried out, each of which finds what is good."""
    carried_out: list[str] = []

    def carry_out(at: Bench, job: str) -> Found:
        carried_out.append(job)
        at.keep(job, good(job))
        found = at.found(job)
        assert found
        return found

    monkeypatch.setattr(verify, "_carry_out", carry_out)
    monkeypatch.setattr(bench.machine, "cpu_has_bf16", lambda: True)
    return carried_out


def test_every_line_has_a_name_of_its_own_and_says_what_its_failure_means() -> None:
    for at in (HERE, ON_GPU, replace(ON_GPU, quick=True), replace(HERE, bf16=False)):
        lines = all_lines(at)
        assert len({line.name for line in lines}) == len(lines)
        assert all(line.what and line.means and line.bound >= 0 for line in lines)
        assert {line.job.partition(":")[0] for line in lines} <= jobs.JOBS


def test_a_cpu_names_what_needs_a_gpu_and_two_gpus_lack_nothing() -> None:
    on_cpu = {line.name: line.lacks for line in all_lines(HERE)}
    assert {line.name for line in all_lines(ON_GPU)} - on_cpu.keys() == {"bf16 losses"} - on_cpu.keys()
    assert on_cpu["llama-3-8b: reserved"] == on_cpu["fp16 losses"] == on_cpu["NF4 on GPU and CPU, loss"] == GPU
    assert on_cpu["zero3 losses"] == "needs two GPUs"
    assert not [line.name for line in all_lines(replace(ON_GPU, gpu=gpus.find("A100"))) if line.lacks]
    alone = [line.name for line in all_lines(replace(ON_GPU, gpus=1)) if line.lacks]
    assert alone == [f"{engine} losses" for engine in ENGINES]
    assert "llama-3.2-3b: allocated" not in {line.name for line in all_lines(replace(ON_GPU, quick=True))}


def test_the_shapes_are_those_of_all_models_of_the_study() -> None:
    from conftest import recipe_config

    from qlora_recipes.configs import models

    def shape(recipe: str) -> tuple[object, ...]:
        sizes = models.architecture(recipe_config(recipe))
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads")
        return (*(sizes[name] for name in names), round(sizes["vocab_size"], -3))

    of_study = [name for name in paths.recipe_names() if name.startswith("haider2024/")]
    assert {shape(recipe) for recipe in SHAPES} == {shape(recipe) for recipe in of_study}


def test_all_passes_and_the_record_validates(recipe: Recipe, done: list[str], tmp_path: Path) -> None:
    shown = recipe("verify", "--work", tmp_path / "w", "--json")
    assert shown.returncode == 0
    record = Record.model_validate_json(shown.stdout)
    assert record.count("failed") == 0
    assert record.count("passed") == len(SHOWN)
    assert {line.note for line in record.lines if line.verdict == "unverified"} == {GPU, "needs two GPUs"}
    assert done == list(dict.fromkeys(line.job for line in SHOWN))
    (file,) = (tmp_path / "w").rglob("record.json")
    assert orjson.loads(file.read_bytes()) == orjson.loads(shown.stdout)
    assert "passed: " in shown.stderr and "w/" in shown.stderr


def test_a_record_names_no_host_user_or_folder(recipe: Recipe, done: list[str], tmp_path: Path) -> None:
    text = recipe("verify", "--work", tmp_path / "w", "--json").stdout
    held = " ".join(str(value) for value in _values(orjson.loads(text)))
    for name in (platform.node(), getpass.getuser(), str(Path.home()), str(tmp_path), str(paths.RECIPES.parent)):
        assert f" {name}" not in f" {held}"
    assert "/" not in held.replace("tokens/s", "").replace("lora_alpha / lora_r", "").replace("alpha / r", "")


def _values(content: object) -> list[object]:
    if isinstance(content, dict):
        return [value for below in content.values() for value in _values(below)]
    if isinstance(content, list):
        return [value for below in content for value in _values(below)]
    return [content]


@pytest.mark.parametrize("line", SHOWN, ids=[line.name for line in SHOWN])
def test_a_figure_beyond_its_bound_fails_its_line_and_says_what_that_means(
    recipe: Recipe, done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: Line
) -> None:
    carry_out = verify._carry_out

    def planted(at: Bench, job: str) -> Found:
        found = carry_out(at, job)
        return replace(found, figures={**found.figures, line.name: within(line, 1.1)}) if job == line.job else found

    monkeypatch.setattr(verify, "_carry_out", planted)
    shown = recipe("verify", "--work", tmp_path / "w")
    assert shown.returncode == 1
    (row,) = [row for row in shown.stdout.splitlines() if " failed " in row]
    assert row.startswith(f"{line.name}  ") and line.means in row
    assert "unverified, needs a GPU: NF4 on GPU and CPU, loss; " in shown.stdout
    assert "unverified, needs two GPUs: ddp losses; zero1 losses" in shown.stdout
    assert f"failed: {line.name}; the messages" in shown.stderr


def test_what_passed_is_not_measured_again_and_what_failed_is(
    recipe: Recipe, done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("verify", "--work", tmp_path / "w", "--json")
    carry_out = verify._carry_out

    def failing(at: Bench, job: str) -> Found:
        if job == "resume":
            done.append(job)
            at.keep(job, {}, problem="RuntimeError: broken")
            return Found({}, problem="RuntimeError: broken")
        return carry_out(at, job)

    with monkeypatch.context() as patch:
        patch.setattr(verify, "_carry_out", failing)
        first = recipe(*words)
    assert first.returncode == 1
    failed = [line for line in Record.model_validate_json(first.stdout).lines if line.verdict == "failed"]
    assert {line.line for line in failed} == {line.name for line in SHOWN if line.job == "resume"}
    assert {line.note for line in failed} == {"RuntimeError: broken"}
    every = list(done)
    done.clear()
    assert recipe(*words).returncode == 0
    assert done == ["resume"]
    done.clear()
    assert recipe(*words).returncode == 0
    assert done == []
    assert recipe(*words, "--fresh").returncode == 0
    assert done == every


def test_what_this_machine_cannot_do_is_unverified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(job: str, at: Bench) -> Figures:
        raise CannotBeShown("needs 13.8 GiB, and 9.0 of the GPU's free memory may be used")

    monkeypatch.setattr(jobs, "measure", measure)
    at = replace(ON_GPU, folder=tmp_path)
    assert jobs.carry_out("shape:haider2024/llama-3-8b", at) == 0
    found = at.found("shape:haider2024/llama-3-8b")
    lines = [line for line in all_lines(at) if line.name.startswith("llama-3-8b")]
    assert {verify._outcome(line, found).verdict for line in lines} == {"unverified"}
    assert not verify._is_settled(lines, found or Found({}))  # there may be more memory next time


def test_an_error_of_a_job_fails_its_lines_and_is_told_without_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "measure", lambda job, at: (tmp_path / "gone").read_text())
    at = replace(HERE, folder=tmp_path)
    assert jobs.carry_out("numerics", at) == 1
    found = at.found("numerics")
    assert found and found.problem == "FileNotFoundError: [Errno 2] No such file or directory: '…'"
    lines = [line for line in SHOWN if line.job == "numerics"]
    assert {verify._outcome(line, found).verdict for line in lines} == {"failed"}


def process_that(folder: Path, does: str, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Have a script take the place of the process of each job."""
    (script := folder / "process").write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    monkeypatch.setattr(verify.sys, "executable", str(script))
    return replace(HERE, folder=folder)


def test_a_process_that_is_killed_fails_the_lines_of_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = process_that(tmp_path, "kill -SEGV $$", monkeypatch)
    found = verify._carry_out(at, "numerics")
    assert found.problem == "its process ended with signal SIGSEGV"
    assert verify._outcome(SHOWN[0], found).verdict == "failed"


def test_a_job_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = process_that(tmp_path, "trap '' TERM\nsleep 61.7", monkeypatch)
    monkeypatch.setattr(verify, "LIMIT", 0.3)
    assert "and was ended" in verify._carry_out(at, "numerics").problem
    assert not left_over()


def left_over() -> list[psutil.Process]:
    """What is left of the scripts that wait, once a kill has had its effect."""
    waiting = [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", "61.7"]]
    return psutil.wait_procs(waiting, timeout=5)[1]


def in_a_moment(*act: Callable[[], object]) -> None:
    """Do things one after the other while something else is waited for."""

    def run() -> None:
        for each in act:
            time.sleep(0.4)
            each()

    threading.Thread(target=run, daemon=True).start()


@pytest.mark.parametrize(("does", "times"), [("sleep 61.7", 1), ("trap '' TERM\nsleep 61.7", 2)], ids=["once", "twice"])
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_ends_the_whole_tree_and_keeps_what_was_done(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: signal.Signals, does: str, times: int
) -> None:
    real = verify._carry_out
    process_that(tmp_path, does, monkeypatch)

    def carry_out(at: Bench, job: str) -> Found:
        if job == "training":
            at.keep(job, good(job))
            return Found(good(job))
        in_a_moment(*[lambda: os.kill(os.getpid(), by)] * times)
        return real(at, job)

    monkeypatch.setattr(verify, "_carry_out", carry_out)
    stopped = recipe("verify", "--work", tmp_path / "w")
    assert (stopped.returncode, stopped.stdout) == (1, "")
    assert "interrupted; the same command goes on" in stopped.stderr
    assert not left_over()
    (kept,) = (tmp_path / "w").rglob("training.json")
    assert kept.is_file() and not list((tmp_path / "w").rglob("resume.json"))


def test_a_folder_that_cannot_be_used_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = recipe("verify", "--work", tmp_path / "file" / "w")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "cannot be made" in refused.stderr and "--work" in refused.stderr
