"""The memory and the speed of a recipe's own step, planned and measured."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..base.yamlfiles import Config
from ..configs import models
from ..planning import steps, work
from ..planning.need import planner_of
from ..planning.planner import CONTEXT, GIB, Planner
from ..planning.traces import at_peak
from .bench import SHARE, Bench, CannotBeShown, Figure

MIB = 2**20
_AS_MEASURED = {"logits": "activations", "kernels' own": "activations"}  # no tensor of a model shows these apart
_SAME = 0.001
"""Parts that differ by less, as a share of all, are not worth a word."""
REASONS = {
    "base weights": "other layers are in 4 bits than planned, or what is not is in another type",
    "quantization constants": "double quantization, or the blocks of NF4, are not the planned ones",
    "embeddings and head": "they are in another type than planned",
    "adapters": "LoRA is on other layers than planned, or has another rank or type",
    "gradients": "they are kept in another type, or none are kept from micro batch to micro batch",
    "optimizer": "its state is in another type, or is paged where that was not planned, or the other way round",
    "activations": "another attention kernel, another checkpointing, or kernels that need more room inside",
}
"""What a difference in a part of the memory comes from, as a rule."""


@dataclass(frozen=True)
class Planned:
    """A plan's figures, in bytes; `reserved` and `needed` are None on a CPU."""

    loaded: int
    allocated: int
    parts: Mapping[str, int]
    parameters: int
    reserved: int | None = None
    needed: float | None = None


def planned(config: Config, bench: Bench) -> Planned:
    """The plan of a config's step: on a GPU as `recipe plan` has it, on a CPU byte by byte. Imports torch.

    Raises:
        UserError: it cannot be planned.
    """
    if bench.gpu:
        planner, _ = planner_of(config, bench.gpu, download=False, alone=True)
        usage, trace = planner.usage(), planner.trace
        parts: Counter[str] = Counter(usage.parts)
        allocated, reserved, needed = usage.allocated, usage.reserved, planner.need() + trace.paged
    else:
        trace, parts = _on_cpu(config)
        allocated, reserved, needed = parts.total(), None, None
    left = {storage: size for storage, size in dict(trace.loaded).items() if size > 0}
    return Planned(
        loaded=sum(size for storage, size in left.items() if trace.kinds[storage] not in ("optimizer", "kernels' own")),
        allocated=allocated,
        parts=parts,
        parameters=sum(count["trainable"] for count in trace.parameters.values()),
        reserved=reserved,
        needed=needed,
    )


def _on_cpu(config: Config) -> tuple[Any, Counter[str]]:
    """The trace of a config's step on a CPU, and what is there at its peak."""
    from ..planning.memory import trace

    step, _ = steps.step_of(config, models.architecture(config, download=False), (8, 0))
    shape = steps.rows_of(config), steps.length_of(config)
    traced = trace(replace(step, capability=None), [shape])
    return traced, at_peak(traced.loaded + traced.steps[shape], traced.kinds)


def allocated(plan: Planned, found: Mapping[str, Any]) -> Figure:
    """The peak of a step, planned and measured, with the part that differs most."""
    return Figure(found["allocated"] / MIB, plan.allocated / MIB, _largest_difference(plan.parts, found["parts"]))


def _largest_difference(planned: Mapping[str, int], measured: Mapping[str, int]) -> str:
    """The part of the memory that differs most from its plan, and what that comes from; empty where none does."""
    expected: Counter[str] = Counter()
    for kind, size in planned.items():
        expected[_AS_MEASURED.get(kind, kind)] += size
    kinds = {*expected, *measured}
    kind = max(sorted(kinds), key=lambda kind: abs(measured.get(kind, 0) - expected[kind]))
    if abs(measured.get(kind, 0) - expected[kind]) <= _SAME * expected.total():
        return ""
    sizes = f"{expected[kind] / MIB:,.2f} planned, {measured.get(kind, 0) / MIB:,.2f} MiB measured"
    return f"differs most: {kind}, {sizes}: {REASONS.get(kind, 'not known')}"


def on_gpu(plan: Planned, found: Mapping[str, Any], free_before: int) -> tuple[Figure, Figure]:
    """What the allocator has reserved, and what the driver says is in use, planned and measured.

    Args:
        plan: of a GPU.
        found: as the plugin wrote it.
        free_before: bytes that were free before the training began.
    """
    assert plan.reserved is not None and plan.needed is not None
    in_use = (free_before - found["free"]) / MIB
    note = f"planned: {plan.reserved / MIB:,.0f} reserved, {CONTEXT / MIB:,.0f} for CUDA itself, the rest paged"
    return Figure(found["reserved"] / MIB, plan.reserved / MIB), Figure(in_use, plan.needed / MIB, note)


def speed(config: Config, bench: Bench, measured: float | None) -> Figure:
    """Tokens a second, as `recipe plan` assumes them where nothing was measured, and measured."""
    assert bench.gpu
    if not bench.gpu.tflops:
        return Figure(measured, None, "the card's peak rate is not known")
    planner, _ = planner_of(config, bench.gpu, download=False, alone=True)
    assumed = bench.gpu.tflops * 1e12 * work.UTILIZATION / work.flops_of_token(planner, planner.length)
    return Figure(measured, assumed, f"planned: {work.UTILIZATION:.0%} of the card's peak rate")


def require_room(config: Config, architecture: Config, bench: Bench) -> None:
    """Refuse a config whose step needs more than a verification may take of the GPU's memory.

    Args:
        config: the config.
        architecture: the content of its model's config.json.

    Raises:
        CannotBeShown: it does.
    """
    assert bench.gpu
    step, _ = steps.step_of(config, architecture, bench.gpu.capability)
    needed = Planner(step, steps.rows_of(config), steps.length_of(config), alone=True).need()
    if needed > (most := SHARE * bench.free):
        raise CannotBeShown(f"needs {needed / GIB:.1f} GiB, and {most / GIB:.1f} of the GPU's free memory may be used")
