"""`recipe plan`: parameters, memory and work of a config before it runs, and whether it fits a GPU's memory."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..checks import check
from ..checks.finding import Finding, refuse
from ..configs import datafiles
from ..configs.compose import Composed, Request, compose
from ..configs.gpus import ENGINE_KEYS, Gpu, engine_of, offloads
from . import steps, work
from .planner import CONTEXT, GIB, USABLE, Planner, per_gpu, planner_of, required_gib
from .traces import Counts, Usage
from .work import Work

SIZES = (8, 12, 16, 24, 40, 48, 80)
"""Cards by their memory in GB, for a plan that names none."""


@dataclass(frozen=True)
class MicroBatch:
    """A micro batch: its rows, the tokens of each, and the bytes that it needs."""

    rows: int
    tokens: int
    needed: float


@dataclass(frozen=True)
class PeakMemory(Usage):
    """Bytes at the peak of a step.

    Attributes:
        paged: optimizer state that can leave the GPU, not part of the others.
        context: CUDA's own.
        needed: reserved and context.
    """

    paged: int
    context: float
    needed: float


@dataclass(frozen=True)
class Fit:
    """A card, and the bytes of it that torch can use and that a step leaves free."""

    card: str
    usable: float
    fits: bool
    free: float


@dataclass(frozen=True)
class PlannedChange:
    """Settings to change, beside those of the changes before, and the bytes that a step then needs."""

    set: Config
    effect: str
    needed: float
    fits: bool


@dataclass
class Plan:
    """Parameters, memory and work of a config.

    Attributes:
        adapter: qlora, lora, or None where all weights are trained.
        parameters: by the kind of layer.
        cards: the card that was asked for, or one of each of `SIZES`.
        changes: the mildest first, where the one card does not hold a step.
        per_gpu: bytes on each of several GPUs, by engine.
        notes: what the figures leave out.
    """

    model: str
    adapter: str | None
    micro_batch: MicroBatch
    parameters: Counts
    frozen: int
    trainable: int
    trainable_share: float
    memory: PeakMemory
    cards: list[Fit]
    per_gpu: dict[str, float]
    notes: list[str]
    changes: list[PlannedChange] = field(default_factory=list)
    longest_batch: MicroBatch | None = None
    work: Work | None = None


def of_request(
    request: Request,
    gpu: Gpu | None = None,
    vram: float | None = None,
    data: bool = False,
) -> Plan:
    """Parameters, memory and work of a request.

    Args:
        gpu: the card that it is meant for.
        vram: its memory in GiB, if different from the card's, or if nothing else is known.
        data: tokenize all training data, to count its tokens and to plan for its longest row.

    Raises:
        UserError: it has an error that leaves nothing to plan, or it cannot be planned.
    """
    composed = composed_for(request, gpu)
    found = work.counted(composed, request.force) if data else work.published(composed)
    planned, planner = plan(composed.config, gpu, vram, request.gpus)
    findings = [finding for finding in check.examine(composed, gpu).findings if finding.scope in ("gpu", "code")]
    planned.notes += [f"{finding.name}: {finding.problem}; {finding.remedy}".rstrip("; ") for finding in findings]
    if found and found.longest and not composed.config.get("sample_packing"):  # packed batches are always full
        size = Planner(planner.step, planner.rows, found.longest).required
        planned.longest_batch = MicroBatch(planner.rows, found.longest, size)
    planned.work = work.work(composed, planner, gpu, request.gpus, found)
    return planned


def composed_for(request: Request, gpu: Gpu | None = None) -> Composed:
    """A request's config, for a card where that is known.

    Raises:
        UserError: it has an error that leaves nothing to plan, or a secret, which what is printed would repeat.
    """
    composed = compose(request, gpu)
    findings = check.examine(composed, gpus=request.gpus).findings
    refuse([finding for finding in findings if finding.scope == "step" or finding.rule == "secret"])
    return composed


def plan(config: Config, gpu: Gpu | None = None, vram: float | None = None, gpus: int = 1) -> tuple[Plan, Planner]:
    """What a config needs: parameters, bytes of memory at a full micro batch, and the cards that hold it.

    Raises:
        UserError: it cannot be planned.
    """
    planner, notes = planner_of(config, gpu)
    memory = planner.memory
    engines = per_gpu(planner, gpus)
    if gpus > 1:
        notes.append(f"cards are judged under {engine_of(config)}")
    if memory.paged:  # bitsandbytes allocates it in CUDA's unified memory (cudaMallocManaged)
        notes.append(
            f"{memory.paged / GIB:.2f} GiB of paged optimizer state moves to main memory when the GPU is full, and is "
            "not part of what a GPU needs"
        )
    saved = planner.required - engines[engine_of(config)] if engines else 0
    size = vram or (gpu and gpu.memory)
    cards = [
        Gpu(gpu.name if gpu and size else f"{gib:g} GB", planner.step.capability or (0, 0), gib)
        for gib in ([size] if size else SIZES)
    ]
    fits = []
    for card in cards:
        usable = usable_gib(card) * GIB
        free = usable + saved - planner.required
        fits.append(Fit(card.name, usable, free >= 0, free))
    frozen, trainable = memory.total("frozen"), memory.total("trainable")
    planned = Plan(
        model=config["base_model"],
        adapter=planner.step.adapter,
        micro_batch=MicroBatch(planner.rows, planner.length, planner.required),
        parameters=memory.parameters,
        frozen=frozen,
        trainable=trainable,
        trainable_share=trainable / (frozen + trainable),
        memory=PeakMemory(**asdict(memory.usage), paged=memory.paged, context=CONTEXT, needed=planner.required),
        cards=fits,
        per_gpu=engines,
        notes=notes,
    )
    if size and not fits[0].fits:
        planned.changes += _changes(config, planner, cards[0], fits[0].usable + saved)
    return planned, planner


def _changes(config: Config, planner: Planner, card: Gpu, usable: float) -> Iterator[PlannedChange]:
    """What to change where a step does not fit: the mildest first, each on top of those before, until it fits.

    Args:
        usable: bytes, with those that an engine saves on each of several cards.
    """
    step = planner.step
    optimizer = str(config.get("optimizer") or steps.OPTIMIZER)
    paged = "paged_adamw_8bit" if "8bit" in optimizer else "paged_adamw_32bit"
    candidates: list[tuple[Config, str, bool]] = [
        ({"gradient_checkpointing": True}, "the same gradients, a third more time", not step.checkpointing),
        (
            {"chunked_cross_entropy": True},
            "the same loss, of an eighth of the tokens at a time",
            card.capability >= (8, 0) and not step.chunked_loss,  # compiled with Triton, which asks for 8.0
        ),
        (
            {"optimizer": paged},
            "the same steps; its state leaves the GPU when that is full",
            optimizer in steps.OPTIMIZERS and "paged" not in optimizer,
        ),
        (
            {
                "micro_batch_size": 1,
                "gradient_accumulation_steps": max(int(datafiles.effective_batch(config)), planner.rows),
                "batch_size": None,
            },
            "the same rows a step, one at a time",
            planner.rows > 1,
        ),
        (_with_qlora(config), "a base in 4 bits", step.adapter != "qlora"),
        *(({"sequence_len": planner.length // part}, "longer rows are lost", True) for part in (2, 4)),
    ]
    changed = config
    for settings, effect, applies in candidates:
        if not applies:
            continue
        settings = {key: value for key, value in settings.items() if value is not None or key in config}
        changed = {key: value for key, value in (changed | settings).items() if value is not None}
        needed = planner_of(changed, card)[0].required
        yield PlannedChange(settings, effect, needed, needed <= usable)
        if needed <= usable:
            break


def _with_qlora(config: Config) -> Config:
    """The settings that give a config QLoRA, on all linear layers where it names none."""
    settings: Config = {"adapter": "qlora", "load_in_4bit": True}
    if not (config.get("lora_target_modules") or config.get("lora_target_linear")):
        settings["lora_target_linear"] = True
    return settings | ({} if config.get("lora_r") else {"lora_r": 16, "lora_alpha": 32})


def usable_gib(gpu: Gpu) -> float:
    """The GiB of a GPU that torch can use; 0 where its size is not known."""
    return (gpu.memory or 0) * USABLE


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
    needed, key, unplanned = None, "micro_batch_size", "`recipe plan` and --full do that"
    if gpus is None and any(content.get(key) for key in ENGINE_KEYS):
        unplanned = f"under {engine_of(content)} it depends on how many GPUs there are; `recipe plan --gpus N` plans it"
    elif offloads(content) or any((content.get(key) or 1) > 1 for key in steps.SPLIT):
        unplanned = "some of it is in main memory, or divided as no plan knows"
    else:
        try:
            needed = required_gib(content, gpu, anew, gpus or 1)
        except UserError as error:
            key, unplanned = "base_model", str(error)
    if needed is None:
        return [Finding("note", "not-checked", key, f"memory is not planned: {unplanned}")]
    usable = usable_gib(gpu)
    if needed <= usable:
        return []
    aside = " beside its paged optimizer state" if "paged" in str(content.get("optimizer")) else ""
    each = f" on each of {gpus} GPUs under {engine_of(content)}" if (gpus or 1) > 1 else ""
    problem = f"a full batch needs {needed:.1f} GiB{each}{aside}, and {usable:.1f} of {gpu} can be used"
    return [Finding("error", "too-big", "micro_batch_size", problem, "`recipe plan` with --gpu says what to change")]
