"""What is said of a training that failed, by what its log ends with."""

from pathlib import Path

import pytest
from run_folders import a_run, shell_for_axolotl

from qlora_recipes.base.errors import WorkFailed
from qlora_recipes.base.processes import package_version
from qlora_recipes.run import launch
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.training import run_record

FULL = "OSError: [Errno 28] No space left on device: '/data/x'\n"
TRITON = "triton cache not written: [Errno 28] No space left on device: '/scratch/triton/x'\n"
NO_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
STEPS = "step\n" * 20
TORCHRUN = "E1127 05:27:43 31670 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) ...\n" + (
    "Traceback\n" * 50
)


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    return a_run(tmp_path / "runs", "haider2024/code-llama-7b", "one", 5.0, state="failed")


def fails(folder: RunDir, monkeypatch: pytest.MonkeyPatch, does: str) -> Exception:
    """The error of a run whose training is a shell's line."""
    shell_for_axolotl(folder.path.parent, monkeypatch, does)
    with pytest.raises((WorkFailed, OSError)) as failed, folder.held() as lock:
        launch.train(folder, folder.read(), lock)
    return failed.value


def test_what_axolotl_refuses_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "said").write_text(
        f"{STEPS}pydantic_core._pydantic_core.ValidationError: 2 validation errors for AxolotlConfigWCapabilities\n"
        "num_epochs\n  Input should be a valid number [type=float_parsing, input_value='x', input_type=str]\n"
        "  Value error, not [so]. [type=value_error, input_value={'a': 1}, input_type=dict]\n"
        "    For further information visit https://errors.pydantic.dev/2.13/v/value_error\n"
    )
    error = fails(folder, monkeypatch, f"cat '{tmp_path}/said'; exit 1")
    assert "num_epochs: " in str(error) and "not [so]." in str(error)  # each of pydantic's own
    assert "step" not in str(error)


@pytest.mark.parametrize(("rehearsal", "disabled"), [(True, "1"), (False, "")])
def test_only_a_rehearsal_leaves_out_torchs_compiler(folder, tmp_path, monkeypatch, rehearsal, disabled):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    folder.write(folder.read().model_copy(update={"rehearsal": rehearsal}))
    fails(folder, monkeypatch, f"printf '%s' \"$TORCHDYNAMO_DISABLE\" > '{tmp_path}/disabled'; exit 1")
    assert (tmp_path / "disabled").read_text() == disabled


@pytest.mark.parametrize("before", ["0.0.1", None])
def test_another_version_than_in_the_first_launch_is_named(folder, monkeypatch, capsys, before):
    record = folder.read()
    record.provenance = run_record.collect()
    record.provenance["packages"] |= {"peft": before} if before else {}
    folder.write(record)
    fails(folder, monkeypatch, "exit 1")
    assert ("peft: 0.0.1 -> " in capsys.readouterr().err) == bool(before)
    assert folder.read().provenance["packages"]["peft"] == (before or package_version("peft"))


@pytest.mark.parametrize(
    ("said", "end", "full"),
    [
        (f"{STEPS}{FULL}", "exit 1", "/data/x"),
        (f"{STEPS}{FULL}{TORCHRUN}", "exit 1", "/data/x"),
        (f"{TRITON}{STEPS}KeyError: 1\n", "exit 1", None),
        (f"{TRITON}{NO_MEMORY}", "exit 1", None),
        (f"{TRITON}{STEPS}", "kill -KILL $$", None),
        (STEPS, "kill -SEGV $$", None),
    ],
)
def test_a_full_disk_is_blamed_only_for_what_it_ended_and_a_signal_is_named(folder, monkeypatch, said, end, full):
    file = folder.path.parent / "said"
    file.write_text(said)
    error = fails(folder, monkeypatch, f"cat '{file}'; {end}")
    assert isinstance(error, WorkFailed)
    assert ("recipe plan" in str(error)) == (NO_MEMORY in said) and ("num_workers" in str(error)) == ("KILL" in end)
    problem = folder.read().launches[-1].problem
    assert problem == (f"no space left in {full}" if full else launch.OUT_OF_MEMORY if NO_MEMORY in said else None)
    if end.startswith("kill"):
        sent = end.split()[1].removeprefix("-")
        assert f"(SIG{sent})" in str(error) and ("recipe resume" in str(error)) == (sent != "SEGV")
