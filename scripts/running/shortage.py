"""A training, and what is known where its memory did not suffice: planned, measured, and what would need less."""

from collections.abc import Iterator
from pathlib import Path

import psutil

from ..base import yamlfiles
from ..base.errors import UserError, WorkFailed
from ..configs import gpus
from ..runs import launch
from ..runs.launch import OutOfMemory
from ..runs.rundir import Run, RunDir

_GIB = 2**30
_LESS = 0.8  # of what was planned, the most that a change may need: by how much it was too much is not known
_CHANGES = 3  # the most that are named


def train(folder: RunDir, record: Run, lock: int, checkpoint: Path | None = None) -> None:
    """`launch.train`; where memory ran out it says how much there was and what to change.

    Raises:
        WorkFailed: as in `launch.train`.
    """
    try:
        launch.train(folder, record, lock, checkpoint)
    except OutOfMemory as error:
        lines = _of_gpu(folder, record) if error.gpu else _of_machine(folder, record)
        raise WorkFailed("\n".join([str(error), *lines])) from None


def _measured(folder: RunDir, record: Run) -> str:
    summary = folder.summary(record)
    if summary.peak_memory is None:
        return "nothing was measured before that"
    return f"measured until then: {summary.peak_memory:.1f} GiB ({summary.memory_kind})"


def _of_machine(folder: RunDir, record: Run) -> Iterator[str]:
    """What is known where the kernel killed a process for the machine's memory; what the process needs of that is not
    planned."""
    memory = psutil.virtual_memory()
    yield f"  {_measured(folder, record)}; of this machine's {memory.total / _GIB:.1f} GiB, "\
          f"{memory.available / _GIB:.1f} are free now, and a job has less"  # fmt: skip
    yield (
        "  what to change: end other processes, ask for more memory for a job, or run anew with --set "
        "dataloader_num_workers=0 --set dataset_num_proc=1; `dmesg` says whether the kernel killed it for memory"
    )


def _of_gpu(folder: RunDir, record: Run) -> Iterator[str]:
    """What is known where a GPU's memory did not suffice, from a plan of the config and of milder ones."""
    from ..planning import need, plan

    config = yamlfiles.read_yaml(folder.config)
    if (local := Path(record.cwd, str(config.get("base_model")))).is_dir():
        config["base_model"] = str(local)
    try:
        needed = need.planner_of(config, gpus.here(), alone=True)[0].need() / _GIB
        changes = plan.plan(config, gpus.here(), needed * _LESS / need.USABLE, record.ranks)[0]["changes"]
    except UserError as error:
        yield f"  {_measured(folder, record)}; memory is not planned: {error}"
        return
    yield f"  planned: {needed:.1f} GiB; {_measured(folder, record)}; `nvidia-smi` shows what else is on the GPU"
    less = [change for change in changes if change["needed"] / _GIB < needed][:_CHANGES]
    if less:
        yield f"  what to change, `recipe run {record.recipe}` with, each beside those above it:"
    for change in less:
        sets = " ".join(f"--set {key}={yamlfiles.write_flow(value)}" for key, value in change["set"].items())
        yield f"    {sets}: {change['needed'] / _GIB:.1f} GiB; {change['effect']}"
