"""Whether a config fits a GPU's memory."""

from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..checks import check
from ..checks.finding import Finding
from ..configs.gpus import ENGINE_KEYS, Gpu, engine_of, offloads
from . import need, steps


def add_to(report: check.Report, gpu: Gpu | None, gpus: int | None = None, anew: bool = False) -> None:
    """Add to a check's report whether its config fits a GPU's memory, unless there is an error already.

    A rehearsal has no GPU.

    Args:
        report: the check's.
        gpu: the GPU; None where none is named, and this machine has none.
        gpus: how many of them; None where that is not known.
        anew: also plan its memory, in 5 s, where no earlier plan is cached.
    """
    composed = report.composed
    if composed and gpu and not composed.rehearsal and not report.count("error"):
        report.add(check.placed(_findings(composed.config, gpu, gpus, anew), composed))


def _findings(content: Config, gpu: Gpu, gpus: int | None, anew: bool) -> list[Finding]:
    """A finding where a config needs more memory than a GPU has, or where that is not known."""
    if not gpu.memory:
        return []
    if gpus is None and any(content.get(key) for key in ENGINE_KEYS):
        problem = f"memory is not planned: under {engine_of(content)} it depends on how many GPUs there are"
        return [Finding("note", "not-checked", "micro_batch_size", problem, "`recipe plan` with --gpus plans it")]
    if offloads(content) or any((content.get(key) or 1) > 1 for key in steps.SPLIT):
        problem = "memory is not planned: some of it is in main memory, or divided as no plan knows"
        return [Finding("note", "not-checked", "micro_batch_size", problem)]
    try:
        needed = need.needed_gib(content, gpu, anew, gpus or 1)
    except UserError as error:
        return [Finding("note", "not-checked", "base_model", f"memory is not planned: {error}")]
    if needed is None:
        problem = "memory is not planned: `recipe plan` and --full do that"
        return [Finding("note", "not-checked", "micro_batch_size", problem)]
    usable = usable_gib(gpu)
    if needed <= usable:
        return []
    aside = " beside its paged optimizer state" if "paged" in str(content.get("optimizer")) else ""
    each = f" on each of {gpus} GPUs under {engine_of(content)}" if (gpus or 1) > 1 else ""
    problem = f"a full batch needs {needed:.1f} GiB{each}{aside}, and {usable:.1f} of {gpu} can be used"
    return [Finding("error", "too-big", "micro_batch_size", problem, "`recipe plan` with --gpu says what to change")]


def usable_gib(gpu: Gpu) -> float:
    """The GiB of a GPU that torch can use; 0 where its size is not known."""
    return (gpu.memory or 0) * need.USABLE
