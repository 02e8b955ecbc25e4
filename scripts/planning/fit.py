"""Whether a config fits a GPU's memory."""

from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..checks import check
from ..checks.finding import Finding
from ..configs.gpus import Gpu
from . import need


def add_to(report: check.Report, gpu: Gpu | None, gpus: int = 1, anew: bool = False) -> None:
    """Add to a check's report whether its config fits a GPU's memory, unless there is an error already.

    A rehearsal has no GPU.

    Args:
        report: the check's.
        gpu: the GPU; None where none is named, and this machine has none.
        gpus: how many of them.
        anew: also plan its memory, in 5 s, where no earlier plan is cached.
    """
    composed = report.composed
    if composed and gpu and not composed.rehearsal and not report.count("error"):
        report.add(check.placed(_findings(composed.config, gpu, gpus, anew), composed))


def _findings(content: Config, gpu: Gpu, gpus: int, anew: bool) -> list[Finding]:
    """A finding where a config needs more memory than a GPU has, or where that is not known."""
    if not gpu.memory or gpus > 1 or content.get("deepspeed") or content.get("fsdp_config"):
        return []  # what an engine saves depends on how many GPUs there will be
    try:
        needed = need.needed_gib(content, gpu, anew)
    except UserError as error:
        return [Finding("note", "not-checked", "base_model", f"memory is not planned: {error}")]
    if needed is None:
        problem = "memory is not planned: `recipe plan` and --full do that"
        return [Finding("note", "not-checked", "micro_batch_size", problem)]
    usable = usable_gib(gpu)
    if needed <= usable:
        return []
    aside = " beside its paged optimizer state" if "paged" in str(content.get("optimizer")) else ""
    problem = f"a full batch needs {needed:.1f} GiB{aside}, and {usable:.1f} of {gpu} can be used"
    return [Finding("error", "too-big", "micro_batch_size", problem, "`recipe plan` with --gpu says what to change")]


def usable_gib(gpu: Gpu) -> float:
    """The GiB of a GPU that torch can use; 0 where its size is not known."""
    return (gpu.memory or 0) * need.USABLE
