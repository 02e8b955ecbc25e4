"""`recipe plan`: parameters, memory and work of a config before it runs, and the GPUs that hold it."""

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
"""Cards by their memory in GB, for a plan without a GPU."""


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
        adapter: qlora, lora, or None for a training of all weights.
        parameters: by the kind of layer.
        cards: the requested card, or one of each of `SIZES`.
        changes: changes to a config that does not fit the requested card, the mildest first.
        per_gpu: bytes on each of several GPUs, by engine.
        notes: limits of the figures.
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
    work: Work | None = None


def of_request(
    request: Request,
    gpu: Gpu | None = None,
    vram: float | None = None,
    data: bool = False,
) -> Plan:
    """Plan a request: parameters, memory and work.

    Args:
        gpu: the card.
        vram: its memory in GiB, if different from the card's, or without a card.
        data: tokenize all training data, to count its tokens.

    Raises:
        UserError: it has an error that leaves nothing to plan, or it cannot be planned.
    """
    composed = composed_for(request, gpu)
    found = work.counted(composed, request.force) if data else work.published(composed)
    planned, planner = plan(composed.config, gpu, vram, request.gpus)
    findings = [finding for finding in check.examine(composed, gpu).findings if finding.scope in ("gpu", "code")]
    planned.notes += [f"{finding.name}: {finding.problem}; {finding.remedy}".rstrip("; ") for finding in findings]
    planned.work = work.work(composed, planner, gpu, request.gpus, found)
    return planned


def composed_for(request: Request, gpu: Gpu | None = None) -> Composed:
    """Config of a request, for a card where that is known.

    Raises:
        UserError: it has an error that leaves nothing to plan, or a secret, which the output would repeat.
    """
    composed = compose(request, gpu)
    findings = check.examine(composed, gpus=request.gpus).findings
    refuse([finding for finding in findings if finding.scope == "step" or finding.rule == "secret"])
    return composed


def plan(config: Config, gpu: Gpu | None = None, vram: float | None = None, gpus: int = 1) -> tuple[Plan, Planner]:
    """Plan a config: parameters, bytes of memory at a full micro batch, and the cards that hold it.

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
    """Changes until a step fits: the mildest first, each on top of those before.

    Args:
        usable: bytes, with those saved by an engine on each of several cards.
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
        # DoRA needs the weights' norms, which a traced layer in 4 bits does not have
        (_with_qlora(config), "a base in 4 bits", step.adapter != "qlora" and not config.get("peft_use_dora")),
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
    """Settings that give a config QLoRA, by default on all linear layers."""
    settings: Config = {"adapter": "qlora", "load_in_4bit": True}
    if not (config.get("lora_target_modules") or config.get("lora_target_linear")):
        settings["lora_target_linear"] = True
    return settings | ({} if config.get("lora_r") else {"lora_r": 16, "lora_alpha": 32})


def usable_gib(gpu: Gpu) -> float:
    """GiB of a GPU for torch; 0 for an unknown size."""
    return (gpu.memory or 0) * USABLE


def add_to(report: check.Report, gpu: Gpu | None, gpus: int | None = None, anew: bool = False) -> None:
    """Add a finding on a GPU's memory to a check's report, unless there is an error already.

    A rehearsal has no GPU.

    Args:
        report: the check's.
        gpu: the GPU; None without one.
        gpus: their number; None where that is not known.
        anew: plan its memory, in 5 s, where no earlier plan is cached.
    """
    composed = report.composed
    if composed and gpu and not composed.rehearsal and not report.count("error"):
        report.add(check.placed(_findings(composed.config, gpu, gpus, anew), composed))


def _findings(content: Config, gpu: Gpu, gpus: int | None, anew: bool) -> list[Finding]:
    """Finding on a config that needs more memory than a GPU has, or is not planned."""
    if not gpu.memory:
        return []
    needed, key, unplanned = None, "micro_batch_size", "`recipe plan` and --full do that"
    if gpus is None and any(content.get(key) for key in ENGINE_KEYS):
        unplanned = f"under {engine_of(content)} it depends on the number of GPUs; `recipe plan --gpus N` plans it"
    elif offloads(content) or any((content.get(key) or 1) > 1 for key in steps.SPLIT):
        unplanned = "some of it is in main memory, or divided in an unknown way"
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
    each = f" on each of {gpus} GPUs under {engine_of(content)}" if (gpus or 1) > 1 else ""
    problem = f"a full batch needs {needed:.1f} GiB{each}, and {usable:.1f} of {gpu} can be used"
    return [Finding("error", "too-big", "micro_batch_size", problem, "`recipe plan` with --gpu says what to change")]
