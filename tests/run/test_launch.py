"""Messages and records of a failed training, by the end of its log."""

import sys
from pathlib import Path

import pytest
from file_server import serving
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
    return a_run(tmp_path / "my runs", "haider2024/code-llama-7b", "one", 5.0, state="failed")


def fails(folder: RunDir, monkeypatch: pytest.MonkeyPatch, does: str) -> Exception:
    """The error of a run whose training is a shell's line."""
    shell_for_axolotl(folder.path.parent, monkeypatch, does)
    with pytest.raises((WorkFailed, OSError)) as failed, folder.held() as lock:
        launch.train(folder, folder.read(), lock)
    return failed.value


@pytest.mark.parametrize(("rehearsal", "disabled"), [(True, "1"), (False, "")])
def test_only_a_rehearsal_leaves_out_torchs_compiler(folder, tmp_path, monkeypatch, rehearsal, disabled):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    folder.write(folder.read().model_copy(update={"rehearsal": rehearsal}))
    fails(folder, monkeypatch, f"printf '%s' \"$TORCHDYNAMO_DISABLE\" > '{tmp_path}/disabled'; exit 1")
    assert (tmp_path / "disabled").read_text() == disabled


@pytest.mark.parametrize(("rehearsal", "requests"), [(True, 0), (False, 1)])
def test_a_rehearsal_reaches_no_server(folder, monkeypatch, rehearsal, requests):
    folder.write(folder.read().model_copy(update={"rehearsal": rehearsal}))
    with serving(monkeypatch) as server:
        fails(
            folder,
            monkeypatch,
            f"'{sys.executable}' -c 'import urllib.request as r; r.urlopen(\"{server.url}\")'; exit 1",
        )
    assert len(server.paths) == requests


def test_the_commits_that_a_launch_fetched_are_recorded(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = str(folder.config["revision_of_model"])
    fetched = tmp_path / "models--codellama--CodeLlama-7b-hf" / "snapshots" / commit
    fails(folder, monkeypatch, f"mkdir -p '{fetched}'; exit 1")
    assert folder.read().hub_commits == {"base_model": commit}


@pytest.mark.parametrize("before", ["0.0.1", None])
def test_another_version_than_in_the_first_launch_is_named(folder, monkeypatch, capsys, before):
    record = folder.read()
    record.provenance = run_record.collect()
    record.provenance["packages"] |= {"peft": before} if before else {}
    folder.write(record)
    fails(folder, monkeypatch, "exit 1")
    assert ("peft: 0.0.1 -> " in capsys.readouterr().err) == bool(before)
    assert folder.read().provenance["packages"]["peft"] == (before or package_version("peft"))


AGAIN = "`recipe resume '{run}'` continues it"
MEMORY = (
    "memory probably ran out: end other processes, request more memory for the job, or start a run with --set "
    "dataloader_num_workers=0 --set dataset_num_proc=1"
)
LOG = "; the full log is {run}/train.log"
LAST = "step\n" * 14


@pytest.mark.parametrize(
    ("log", "end", "full_disk", "out_of_memory", "message"),
    [
        pytest.param(
            f"{STEPS}{FULL}",
            "exit 1",
            "/data/x",
            False,
            "{run}: failed, no space left in /data/x; free some space, then " + AGAIN,
            id="full disk",
        ),
        pytest.param(
            f"{STEPS}{FULL}{TORCHRUN}",
            "exit 1",
            "/data/x",
            False,
            "{run}: failed, no space left in /data/x; free some space, then " + AGAIN,
            id="full disk of a rank",
        ),
        pytest.param(
            f"{TRITON}{STEPS}KeyError: 1\n",
            "exit 1",
            None,
            False,
            f"{LAST}KeyError: 1\n{{run}}: Axolotl failed{LOG}",
            id="survived a full disk",
        ),
        pytest.param(
            f"{TRITON}{NO_MEMORY}",
            "exit 1",
            None,
            True,
            f"{TRITON}{NO_MEMORY}{{run}}: out of GPU memory: `recipe plan '{{run}}'/config.yaml` shows what needs "
            f"memory, and which changes help; `nvidia-smi` lists other processes on the GPU{LOG}",
            id="out of GPU memory",
        ),
        pytest.param(
            f"{STEPS}{TORCHRUN}exitcode  : -9 (pid: 7)\n",
            "exit 1",
            None,
            True,
            f"step\n{LAST}{{run}}: a rank was killed by signal 9 (SIGKILL); {MEMORY}{LOG}",
            id="killed rank",
        ),
        pytest.param(
            f"{TRITON}{STEPS}",
            "kill -KILL $$",
            None,
            False,
            f"{{run}}: killed by signal 9 (SIGKILL) from outside; {MEMORY}; {AGAIN}",
            id="killed",
        ),
        pytest.param(
            STEPS,
            "kill -SEGV $$",
            None,
            False,
            f"step\n{LAST}{{run}}: Axolotl failed by signal 11 (SIGSEGV){LOG}",
            id="crashed",
        ),
    ],
)
def test_a_failed_launch_records_and_reports_its_cause(
    folder, monkeypatch, log, end, full_disk, out_of_memory, message
):
    file = folder.path.parent / "log"
    file.write_text(log)
    error = fails(folder, monkeypatch, f"cat '{file}'; {end}")
    assert str(error) == message.format(run=folder.path)
    launched = folder.read().launches[-1]
    assert launched.full_disk == full_disk
    assert launched.out_of_memory is out_of_memory
    assert launched.error == "\n".join(str(error).splitlines()[-3:])
