"""The storages that a training step makes and frees, and what they take on a GPU. Needs no torch.

`memory.trace` makes a trace; `usage` replays it through a model of CUDA's allocator.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod, sumprod
from typing import Any

from .allocator import Allocator, Block

Shape = tuple[int, int]  # the rows of a micro batch, and the tokens of each
Events = list[tuple[int, int]]
"""Storages being made (their id and size in bytes) and freed (their id and -1), in order."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the memory of a training step depends on.

    Attributes:
        model: the content of the model's config.json, as JSON.
        adapter: qlora, lora, or None where all weights are trained.
        weights: the dtype of what is not quantized, as torch names it.
        autocast: the dtype of the forward pass under autocast; None where there is no autocast.
        targets: the linear layers with LoRA, or a regular expression or all-linear, as in PEFT.
        saved_modules: what is trained whole beside LoRA.
        dora: whether LoRA trains the magnitude of each output as well (arXiv 2402.09353).
        double_quantization: whether the quantization constants are quantized too.
        checkpointing: whether a layer's activations are computed anew in the backward pass, and how: None, reentrant
            or non-reentrant.
        attention: sdpa, eager or flash_attention_2.
        padded: whether rows of unequal length make a batch, so that attention needs a mask.
        packed: whether documents share a row, so that sdpa and eager need a mask.
        flat: whether the rows of a micro batch are laid end to end, as they are where FlashAttention keeps packed
            documents apart (axolotl/core/trainers/base.py, multipack_real_batches).
        accumulates: whether there are gradients of an earlier micro batch.
        optimizer: its name, as in Axolotl.
        chunked_loss: whether the loss is computed on an eighth of the tokens at a time.
        axolotl: whether transformers' Trainer runs it, as Axolotl sets it up; else a plain loop, which keeps the
            outputs until the next step, has no autocast, and leaves in fp32 what PEFT has put there.
        capability: the GPU's compute capability; None for the CPU, where what kernels allocate inside is not counted.
    """

    model: str
    adapter: str | None = "qlora"
    weights: str = "float16"
    autocast: str | None = None
    rank: int = 32
    targets: tuple[str, ...] | str = ("q_proj", "k_proj", "v_proj", "o_proj")
    saved_modules: tuple[str, ...] = ()
    dora: bool = False
    dropout: float = 0.0
    quantization: str = "nf4"
    double_quantization: bool = True
    checkpointing: str | None = "non-reentrant"
    attention: str = "sdpa"
    padded: bool = False
    packed: bool = False
    flat: bool = False
    accumulates: bool = False
    optimizer: str = "adamw_torch_fused"
    chunked_loss: bool = False
    axolotl: bool = True
    capability: tuple[int, int] | None = (7, 5)


def lasting(events: Events) -> Events:
    """Events without storages that are both made and freed."""
    passing = {storage for storage, size in events if size < 0} & {storage for storage, size in events if size >= 0}
    return [event for event in events if event[0] not in passing]


def ordered(events: Events) -> Events:
    """Events with what is freed at one time in the order of ids; Python's, in a set, is by chance."""
    groups = groupby(events, key=lambda event: event[1] >= 0)
    return [event for made, group in groups for event in (group if made else sorted(group))]


def at_peak(events: Events, kinds: Mapping[int, str]) -> Counter[str]:
    """The bytes of the storages that are there when these have most, by what they hold; not rounded to any allocator's
    blocks.

    Args:
        kinds: what each storage holds, by its id.
    """
    live: dict[int, int] = {}
    held: Counter[str] = Counter()
    total = most = 0
    peak: Counter[str] = Counter()
    for storage, size in events:
        change = size if size >= 0 else -live.pop(storage, 0)
        if size >= 0:
            live[storage] = size
        held[kinds[storage]] += change
        total += change
        if total > most:
            most, peak = total, held.copy()
    return peak


class NotAlike(Exception):
    """Steps of different shapes allocate so differently that none follows from the others."""


@dataclass
class MemoryTrace:
    """What a step allocates.

    Attributes:
        loaded: the events before the first step: weights, adapters, optimizer state.
        steps: the events of a step for each traced shape, alike but for the sizes.
        kinds: what each storage holds.
        parameters: frozen and trainable parameters by the kind of layer.
        sizes: the model's: its layers, width, attention_width (heads times their size), vocabulary and context.
        paged: bytes of optimizer state that can leave the GPU.
        expandable: whether the allocator's segments are expandable, as Axolotl sets it.
    """

    loaded: Events
    steps: dict[Shape, Events]
    kinds: dict[int, str]
    parameters: dict[str, dict[str, int]]
    sizes: dict[str, int]
    paged: int
    expandable: bool

    def as_json(self) -> dict[str, Any]:
        """The trace in types that JSON has."""
        return vars(self) | {"steps": list(self.steps.items()), "kinds": list(self.kinds.items())}

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> "MemoryTrace":
        """The trace that `as_json` was called on."""
        steps = {(rows, length): events for (rows, length), events in content["steps"]}
        return cls(**content | {"steps": steps, "kinds": dict(content["kinds"])})


@dataclass(frozen=True)
class Usage:
    """Peaks of a step, in bytes.

    Attributes:
        allocated: as torch.cuda.max_memory_allocated counts.
        reserved: as torch.cuda.max_memory_reserved counts.
        parts: what the allocated bytes hold at their peak.
    """

    allocated: int
    reserved: int
    parts: dict[str, int]


def usage(trace: MemoryTrace, shape: Shape) -> Usage:
    """The peaks of a step that follows one like it, from a model of CUDA's allocator.

    Raises:
        NotAlike: the shape was not traced, and does not follow from those that were.
    """
    step = _at(trace, shape)
    allocator = Allocator(trace.expandable)
    blocks: dict[int, Block] = {}
    held: Counter[str] = Counter()
    parts: dict[str, int] = {}
    for events in (trace.loaded, step, step):
        allocator.reset_peaks()
        for storage, size in events:
            if size < 0:
                block = blocks.pop(storage)
                held[trace.kinds[storage]] -= block.size
                allocator.release(block)
                continue
            peak = allocator.peak
            block = blocks[storage] = allocator.allocate(size)
            held[trace.kinds[storage]] += block.size
            if allocator.peak > peak:
                parts = dict(held)
        if events is trace.loaded:
            allocator.empty_cache()  # axolotl/loaders/model.py does so once the model is loaded, PEFT before
    return Usage(allocator.peak, allocator.peak_reserved, parts)


def _at(trace: MemoryTrace, shape: Shape) -> Events:
    """A step's events at a shape: as traced, or with each size extrapolated from traced ones.

    Sizes are linear in the rows, and at most quadratic in the length (masks and scores), so that two and three traced
    shapes give them exactly; what kernels round to multiples of up to 64 tokens is exact for such lengths.
    """
    if shape in trace.steps:
        return trace.steps[shape]
    rows, length = shape
    # a single row needs no copies where several do, so that it is no point on their line
    among = [traced for traced in trace.steps if traced[1] == length and traced[0] > 1]
    axis = 0
    if not among or rows in {traced[0] for traced in trace.steps if traced[1] != length}:
        among = [traced for traced in trace.steps if traced[0] == rows]
        axis = 1
    columns = [tuple(zip(*trace.steps[traced], strict=True)) for traced in among]
    if len({storages for storages, _ in columns}) != 1:
        raise NotAlike(f"steps of the shapes {among} do not allocate alike")
    weights = _lagrange([traced[axis] for traced in among], shape[axis])
    storages = columns[0][0]
    return [
        (storage, -1 if sizes[0] < 0 else round(sumprod(weights, sizes)))
        for storage, *sizes in zip(storages, *(sizes for _, sizes in columns), strict=True)
    ]


def _lagrange(points: list[int], at: int) -> list[float]:
    """The weight of each of some points in the polynomial through all of them."""
    return [prod((at - other) / (point - other) for other in points if other != point) for point in points]
