"""What is said of a training that failed, by what its log ends with."""

from pathlib import Path

import pytest
from run_folders import a_run

from qlora_recipes.base.errors import WorkFailed
from qlora_recipes.runs import launch
from qlora_recipes.runs.launch import OutOfMemory
from qlora_recipes.runs.rundir import RunDir

FULL = "OSError: [Errno 28] No space left on device: '/data/x'\n"
TRITON = "triton cache not written: [Errno 28] No space left on device: '/scratch/triton/x'\n"
NO_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
STEPS = "step\n" * 20
TORCHRUN = "E1127 05:27:43 31670 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) ...\n" + (
    "Traceback\n" * 50
)


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    """A run to train again."""
    return a_run(tmp_path / "runs", "haider2024/code-llama-7b", "one", 5.0, state="failed")


def fails(folder: RunDir, monkeypatch: pytest.MonkeyPatch, does: str) -> Exception:
    """The error of a run whose training is a shell's line."""
    (axolotl := folder.path.parent / "axolotl").write_text(f"#!/bin/sh\n{does}\n")
    axolotl.chmod(0o755)
    monkeypatch.setattr(launch, "AXOLOTL", axolotl)
    with pytest.raises((WorkFailed, OSError)) as failed, folder.held() as lock:
        launch.train(folder, folder.read(), lock)
    return failed.value


def test_what_axolotl_refuses_is_named(folder: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "said").write_text(
        f"{STEPS}pydantic_core._pydantic_core.ValidationError: 2 validation errors for AxolotlConfigWCapabilities\n"
        "num_epochs\n  Input should be a valid number [type=float_parsing, input_value='x', input_type=str]\n"
        "  Value error, not [so]. [type=value_error, input_value={'a': 1}, input_type=dict]\n"
        "    For further information visit https://errors.pydantic.dev/2.13/v/value_error\n"
    )
    error = fails(folder, monkeypatch, f"cat '{tmp_path}/said'; exit 1")
    assert "num_epochs: " in str(error) and "not [so]." in str(error)  # each of pydantic's own
    assert "step" not in str(error)


@pytest.mark.parametrize(
    ("said", "end", "full", "kind"),
    [
        (f"{STEPS}{FULL}", "exit 1", "/data/x", WorkFailed),
        (f"{STEPS}{FULL}{TORCHRUN}", "exit 1", "/data/x", WorkFailed),
        (f"{TRITON}{STEPS}KeyError: 1\n", "exit 1", None, WorkFailed),
        (f"{TRITON}{NO_MEMORY}", "exit 1", None, OutOfMemory),
        (f"{TRITON}{STEPS}", "kill -9 $$", None, OutOfMemory),
        (TRITON, "kill -15 $$", None, WorkFailed),
    ],
)
def test_a_full_disk_is_blamed_only_for_what_it_ended(
    folder: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    end: str,
    full: str | None,
    kind: type[WorkFailed],
) -> None:
    (tmp_path / "said").write_text(said)
    error = fails(folder, monkeypatch, f"cat '{tmp_path}/said'; {end}")
    assert type(error) is kind
    problem = folder.read().launches[-1].problem
    assert (problem or "").endswith(full or "") and bool(problem) == bool(full)


@pytest.mark.parametrize(("sent", "resumed"), [("KILL", True), ("SEGV", False)])
def test_the_signal_that_ended_a_training_is_named(
    folder: RunDir, monkeypatch: pytest.MonkeyPatch, sent: str, resumed: bool
) -> None:
    error = str(fails(folder, monkeypatch, f"kill -{sent} $$"))
    assert f"(SIG{sent})" in error and ("recipe resume" in error) == resumed


def test_a_run_whose_folder_is_deleted_while_it_trains_fails(folder: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(fails(folder, monkeypatch, f"rm -r '{folder.path.absolute()}'"), WorkFailed)
    assert not folder.path.exists()
