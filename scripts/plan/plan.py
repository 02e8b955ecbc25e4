"""`recipe plan`: parameters, memory and work of a config, and which GPUs suffice."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

from ..base import paths
from ..base.errors import UserError
from ..base.files import free_bytes
from ..base.hardware import GIB
from ..base.yamlfiles import Config
from ..check import check
from ..config import datafiles
from ..config.compose import Composed, Request, compose
from ..config.finding import Finding, Level, override_errors, refuse
from ..config.gpus import PARALLELISM_KEYS, Gpu, offloads, parallelism_of
from ..config.merging import merge
from ..config.training_settings import KEPT_CHECKPOINTS, TrainingSettings
from . import steps, work
from .allocator import Counts, Usage
from .step_plan import (
    CONTEXT,
    USABLE,
    Loading,
    Memory,
    StepPlan,
    bytes_by_parallelism,
    least_capability,
    loading,
    needed_per_gpu,
    plan_step,
)
from .work import Work

SIZES = (8, 12, 16, 24, 40, 48, 80)
"""GPU memory sizes in GB, for a plan without a requested GPU."""


@dataclass(frozen=True)
class MicroBatch:
    """A micro batch: number of rows, tokens per row, and required bytes."""

    rows: int
    tokens: int
    needed: float


@dataclass(frozen=True, kw_only=True)
class PeakMemory(Usage):
    """Bytes at the peak of a step.

    Attributes:
        paged: optimizer state that can leave the GPU; the other attributes exclude it.
        context: memory of the CUDA context.
        needed: sum of `context` and the larger of `reserved` and `evaluation`.
    """

    paged: int
    context: float
    needed: float


@dataclass(frozen=True)
class Fit:
    """A GPU, and whether a config can train on it.

    Attributes:
        usable: bytes usable by torch.
        fits: true if memory suffices and the GPU lacks nothing.
        free: bytes left free.
        lacks: keys of the settings for which `recipe check` says that the GPU lacks a feature.
    """

    gpu: str
    usable: float
    fits: bool
    free: float
    lacks: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """`fits` as text, with the keys in `lacks`."""
        if self.lacks:
            return f"no: {', '.join(self.lacks)}"
        return "yes" if self.fits else "no"


@dataclass(frozen=True)
class PlannedChange:
    """Settings to change in addition to all previous changes, and the bytes that each GPU then needs."""

    set: Config
    effect: str
    needed: float
    fits: bool


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a training.

    Attributes:
        size: bytes of one, without its small files; DeepSpeed's and FSDP's are larger.
        most: the largest number on the disk at a time.
        least: as `most`, but 1 if the number of saves is unknown.
    """

    size: int
    most: int
    least: int


@dataclass
class Plan:
    """Parameters, memory and work of a config.

    Attributes:
        adapter: qlora, lora, or None for full fine-tuning.
        parameters: parameter counts by kind of layer.
        gpus: the requested GPU, or one GPU for each of `SIZES`.
        changes: changes for a config that does not fit the requested GPU, mildest first.
        per_gpu: bytes on each of several GPUs, by parallelism.
        checkpoints: the training's checkpoints on the disk.
        loading: main memory for loading the model.
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
    gpus: list[Fit]
    per_gpu: dict[str, float]
    checkpoints: Checkpoints
    loading: Loading
    notes: list[str]
    changes: list[PlannedChange] = field(default_factory=list)
    work: Work | None = None


def plan_request(
    request: Request,
    gpu: Gpu | None = None,
    vram: float | None = None,
    data: bool = False,
    suggests: bool = True,
) -> Plan:
    """Plan a request: parameters, memory and work.

    Args:
        gpu: the GPU to plan for.
        vram: a memory size in GiB to plan for, instead of a GPU.
        data: tokenize all training data to count tokens.
        suggests: for a config that does not fit the GPU, also plan changes that help.

    Raises:
        UserError: the config has an error that prevents a plan, or planning does not support it.
    """
    composed = composed_for(request, gpu)
    lengths = work.counted(composed, request.force) if data else work.published(composed)
    planned, step_plan = plan(composed.config, gpu, vram, request.gpus, suggests)
    findings = check.check_config(composed, gpu).findings
    override_errors(findings, request.force)
    _add_findings(planned, findings)
    planned.notes += [finding.text for finding in _disk_findings(planned.checkpoints, starts=False)]
    planned.work = work.work(composed, step_plan, gpu, request.gpus, lengths)
    return planned


def _add_findings(planned: Plan, findings: list[Finding]) -> None:
    """Add notes on findings about GPU, code and files to a plan; a GPU that lacks a feature does not fit."""
    lacks = []
    for finding in findings:
        if finding.scope not in ("gpu", "code", "file"):
            continue
        planned.notes.append(f"{finding.name}: {finding.problem}; {finding.remedy}".rstrip("; "))
        if (finding.rule, finding.level) == ("gpu-lacks", "error"):
            lacks.append(finding.key)
    if lacks:
        planned.gpus = [replace(fit, fits=False, lacks=tuple(lacks)) for fit in planned.gpus]


def composed_for(request: Request, gpu: Gpu | None) -> Composed:
    """Config of a request, composed for a GPU if one is given.

    Raises:
        UserError: the config has an error that prevents a plan, names a missing file other than data, or has a secret
            that the output would reveal.
    """
    composed = compose(request, gpu)
    findings = check.check_config(composed, gpus=request.gpus).findings
    refuse([finding for finding in findings if finding.scope in ("step", "file") or finding.rule == "secret"])
    return composed


def plan(
    config: Config, gpu: Gpu | None = None, vram: float | None = None, gpus: int = 1, suggests: bool = True
) -> tuple[Plan, StepPlan]:
    """Plan a config: parameters, memory of a full micro batch, and sufficient GPUs; see `plan_request`.

    Raises:
        UserError: planning does not support the config.
    """
    step_plan, notes = plan_step(config, gpu)
    memory = step_plan.memory
    sizes = bytes_by_parallelism(step_plan, gpus)
    if gpus > 1:
        notes.append(f"fits: computed with the memory per GPU under {parallelism_of(config)}")
    if memory.paged:  # bitsandbytes allocates paged state in CUDA's unified memory (cudaMallocManaged)
        notes.append(
            f"{memory.paged / GIB:.2f} GiB of paged optimizer state moves to main memory when the GPU is full; the "
            "required memory excludes it"
        )
    needed = needed_per_gpu(step_plan, config, gpus)
    targets = _targets(config, gpu, vram)
    fits = [_fit(target, needed) for target in targets]
    frozen, trainable = memory.total("frozen"), memory.total("trainable")
    peak = PeakMemory(**asdict(memory.usage), paged=memory.paged, context=CONTEXT, needed=step_plan.required)
    planned = Plan(
        model=config["base_model"],
        adapter=step_plan.step.adapter,
        micro_batch=MicroBatch(step_plan.rows, step_plan.length, step_plan.required),
        parameters=memory.parameters,
        frozen=frozen,
        trainable=trainable,
        trainable_share=trainable / (frozen + trainable),
        memory=peak,
        gpus=fits,
        per_gpu=sizes,
        checkpoints=checkpoints(config, memory, gpus),
        loading=loading(step_plan, config, gpus),
        notes=notes,
    )
    if suggests and len(targets) == 1 and not fits[0].fits:
        planned.changes += _changes(config, step_plan, targets[0], gpus)
    return planned, step_plan


def _targets(config: Config, gpu: Gpu | None, vram: float | None) -> list[Gpu]:
    """The requested GPU, or the oldest GPUs for a config with the requested size or each of `SIZES`."""
    if gpu and gpu.memory:
        return [gpu]
    sizes = [vram] if vram else SIZES
    return [Gpu(f"{size:g} GB", least_capability(config), size) for size in sizes]


def _fit(gpu: Gpu, needed: float) -> Fit:
    usable = usable_gib(gpu) * GIB
    free = usable - needed
    return Fit(gpu.name, usable, free >= 0, free)


def _changes(config: Config, step_plan: StepPlan, gpu: Gpu, gpus: int) -> Iterator[PlannedChange]:
    """Cumulative changes until a step fits on each of the GPUs, mildest first."""
    usable = usable_gib(gpu) * GIB
    changed = config
    for changes, effect in _reductions(config, step_plan, gpu, gpus):
        changed = merge(changed, changes)
        needed = needed_per_gpu(plan_step(changed, gpu)[0], changed, gpus)
        fits = needed <= usable
        yield PlannedChange(changes, effect, needed, fits)
        if fits:
            break


def _reductions(config: Config, step_plan: StepPlan, gpu: Gpu, gpus: int) -> Iterator[tuple[Config, str]]:
    """Changes that reduce the memory of a step, mildest first, each with its effect."""
    settings, step = TrainingSettings.of(config), step_plan.step
    if step_plan.more_in_evaluation:
        limits = {"eval_batch_size": settings.micro_batch_size, "eval_sequence_len": step_plan.length}
        yield {key: limit for key, limit in limits.items() if config.get(key)}, "evaluation batches as in training"
    if not step.checkpointing:
        yield {"gradient_checkpointing": True}, "the same gradients, a third more time"
    has_other_loss = step_plan.pair_loss or any(map(config.get, steps.LOSSES))
    if gpu.capability >= (8, 0) and not has_other_loss:  # Triton requires capability 8.0
        yield {"chunked_cross_entropy": True}, "the same loss, computed on an eighth of the tokens at a time"
    if _can_page_optimizer(config):
        bits = "8bit" if "8bit" in settings.optimizer else "32bit"
        effect = "the same steps; optimizer state leaves the GPU when the GPU is full"
        yield {"optimizer": f"paged_adamw_{bits}"}, effect
    if settings.micro_batch_size > 1:
        # a run divides the number among the GPUs, as it divided the config's
        single_rows = {"micro_batch_size": 1, "gradient_accumulation_steps": settings.rows_per_step * gpus}
        yield single_rows, "the same rows per step, one at a time"
    if step.adapter != "qlora" and not config.get("peft_use_dora"):  # its weight norms are not in a traced 4-bit layer
        yield _with_qlora(config), "a base model in 4 bits"
    for part in (2, 4):
        yield {"sequence_len": step_plan.length // part}, "longer rows are lost"


def _can_page_optimizer(config: Config) -> bool:
    """True if a paged optimizer takes the same steps; FSDP works with none of them."""
    optimizer = TrainingSettings.of(config).optimizer
    return optimizer in steps.OPTIMIZERS and "paged" not in optimizer and not config.get("fsdp_config")


def _with_qlora(config: Config) -> Config:
    """Settings that switch a config to QLoRA, by default on all linear layers."""
    changes = {"adapter": "qlora", "load_in_4bit": True}
    if not TrainingSettings.of(config).targets:
        changes["lora_target_linear"] = True
    if not config.get("lora_r"):
        changes |= {"lora_r": 16, "lora_alpha": 32}
    return changes


def usable_gib(gpu: Gpu) -> float:
    """GiB of a GPU usable by torch; 0 for an unknown size."""
    return (gpu.memory or 0) * USABLE


def add_memory_finding(report: check.Report, gpu: Gpu | None, gpus: int | None = None, trace: bool = False) -> None:
    """Add a finding on GPU memory or disk space to a report, unless the report has an error.

    A rehearsal uses no GPU and gets no finding.

    Args:
        report: the report of the check.
        gpu: the GPU, or None.
        gpus: number of GPUs; None if unknown.
        trace: make a plan if none is cached, which takes seconds.
    """
    composed = report.composed
    if composed is None or composed.rehearsal or report.count("error"):
        return
    if gpu is None or not gpu.memory:
        return
    report.add(check.placed([*_space_findings(composed.config, gpu, gpus, trace)], composed))


def _space_findings(config: Config, gpu: Gpu, gpus: int | None, trace: bool) -> Iterator[Finding]:
    """Findings on GPU memory and disk space, or a note on why a config has no plan."""
    if note := _not_planned(config, gpus):
        yield note
        return
    try:
        step_plan, _ = plan_step(config, gpu, download=trace)
        memory = step_plan.memory if trace else step_plan.stored
    except UserError as error:
        yield _unknown(str(error), "base_model")
        return
    if memory is None:
        yield _unknown("run `recipe plan NAME`")
        return
    yield from _memory_findings(step_plan, config, gpu, gpus or 1)
    yield from _disk_findings(checkpoints(config, memory, gpus or 1), starts=trace)


def _not_planned(config: Config, gpus: int | None) -> Finding | None:
    """Note on a config that plans do not support, or only for a known number of GPUs."""
    if gpus is None and any(config.get(key) for key in PARALLELISM_KEYS):
        return _unknown(f"{parallelism_of(config)} needs the number of GPUs; run `recipe plan NAME --gpus N`")
    if offloads(config) or steps.split_keys(config):
        return _unknown("plans do not support offloading to main memory, nor this way of splitting the model")
    return None


def _unknown(reason: str, key: str = "micro_batch_size") -> Finding:
    return Finding("note", "not-checked", key, f"memory not planned: {reason}")


def checkpoints(config: Config, memory: Memory, gpus: int = 1) -> Checkpoints:
    """Checkpoints of a config, each with adapter and optimizer state; the oldest is deleted after a save.

    See `_save_checkpoint` in transformers/trainer.py, and `_configure_save_and_eval_strategy` in Axolotl's
    core/builders/base.py.
    """
    parts = memory.usage.parts
    size = parts.get("adapters", 0)
    if not config.get("save_only_model"):
        size += parts.get("optimizer", 0) + memory.paged
    limit = (config.get("save_total_limit") or KEPT_CHECKPOINTS) + 1
    saves = _saves(config, gpus)
    if saves is None:
        return Checkpoints(size, limit, 1)
    return Checkpoints(size, min(limit, saves), min(limit, saves))


def _saves(config: Config, gpus: int) -> int | None:
    """Number of checkpoints that a training saves; None if unknown."""
    settings = TrainingSettings.of(config)
    if config.get("save_steps"):
        share = config["save_steps"]
        if share >= 1:
            share /= datafiles.training_steps(config, gpus) or math.inf
        return math.ceil(1 / share) if share else None
    if config.get("saves_per_epoch"):
        return max(int(config["saves_per_epoch"] * settings.num_epochs), 1)
    if config.get("save_strategy") == "no":
        return 0
    if config.get("save_strategy") in (None, "epoch") and not settings.max_steps:
        return math.ceil(settings.num_epochs)
    return None


def _disk_findings(checkpoints: Checkpoints, starts: bool) -> Iterator[Finding]:
    """Finding on checkpoints that do not fit on the disk of the runs; an error if a run that starts surely fails."""
    size, free = checkpoints.size, free_bytes(paths.runs())
    if size * checkpoints.most <= free:
        return
    level: Level = "error" if starts and size * checkpoints.least > free else "warning"
    problem = (
        f"the training has up to {checkpoints.most} checkpoints of {size / GIB:.2f} GiB on the disk; "
        f"{free / GIB:.2f} GiB are free in {paths.runs()}"
    )
    remedy = "free some space, lower it, or name another folder with --runs"
    yield Finding(level, "full-disk", "save_total_limit", problem, remedy, rule_scope="machine")


def _memory_findings(step_plan: StepPlan, config: Config, gpu: Gpu, gpus: int) -> Iterator[Finding]:
    """Finding on a config that needs too much memory."""
    needed = needed_per_gpu(step_plan, config, gpus) / GIB
    usable = usable_gib(gpu)
    if needed <= usable:
        return
    place = f" on each of {gpus} GPUs under {parallelism_of(config)}" if gpus > 1 else ""
    size = f"needs {needed:.1f} GiB{place}; {usable:.1f} GiB of {gpu} are usable"
    remedy = "`recipe plan NAME` lists changes that help"
    if needed - step_plan.more_in_evaluation / GIB <= usable:  # rows of an evaluation may be few and short
        problem = f"training fits, but a full batch of evaluation {size}"
        yield Finding("warning", "too-big", "eval_batch_size", problem, remedy, rule_scope="gpu")
    else:
        yield Finding("error", "too-big", "micro_batch_size", f"a full batch {size}", remedy, rule_scope="gpu")
