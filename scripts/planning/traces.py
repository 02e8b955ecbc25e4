"""The storages that a training step makes and frees, and what they come to on a GPU. Needs no torch.

`memory.trace` makes a trace; `usage` replays it through a model of CUDA's allocator.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from .allocator import Allocator, Block

Shape = tuple[int, int]  # the rows of a micro batch, and the tokens of each


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step, as far as its memory depends on it.

    Attributes:
        model: the content of the model's config.json, as JSON.
        adapter: qlora, lora, or None where all weights are trained.
        weights: the dtype of what is not quantized, as torch names it.
        autocast: the dtype of the forward pass, where it is another or mixed precision.
        targets: the linear layers with LoRA, or a regular expression or all-linear, as in PEFT.
        saved_modules: what is trained whole beside LoRA.
        double_quantization: whether the quantization constants are quantized too.
        checkpointing: whether a layer's activations are computed anew in the backward pass, and how: None, reentrant
            or non-reentrant.
        attention: sdpa, eager or flash_attention_2.
        padded: whether rows of unequal length make a batch, so that attention needs a mask.
        packed: whether documents share a row, so that sdpa and eager need a mask.
        accumulates: whether gradients of an earlier micro batch are there already.
        optimizer: its name, as in Axolotl.
        chunked_loss: whether the loss is computed on an eighth of the tokens at a time.
        axolotl: whether transformers' Trainer runs it, as Axolotl sets it up; else a plain loop, which keeps the
            outputs until the next step, knows no autocast, and leaves in fp32 what PEFT has put there.
        capability: the GPU's compute capability; None for the CPU, where what kernels allocate inside is not counted.
    """

    model: str
    adapter: str | None = "qlora"
    weights: str = "float16"
    autocast: str | None = None
    rank: int = 32
    targets: tuple[str, ...] | str = ("q_proj", "k_proj", "v_proj", "o_proj")
    saved_modules: tuple[str, ...] = ()
    dropout: float = 0.0
    quantization: str = "nf4"
    double_quantization: bool = True
    checkpointing: str | None = "non-reentrant"
    attention: str = "sdpa"
    padded: bool = False
    packed: bool = False
    accumulates: bool = False
    optimizer: str = "adamw_torch_fused"
    chunked_loss: bool = False
    axolotl: bool = True
    capability: tuple[int, int] | None = (7, 5)


@dataclass
class Events:
    """Storages being made (their id and size in bytes) and freed (their id and -1), in order."""

    ids: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, storage: int, size: int) -> None:
        """Note that a storage was made, or with a size of -1 that it was freed."""
        self.ids.append(storage)
        self.sizes.append(size)

    def extend(self, more: "Events") -> None:
        """Note what comes after."""
        self.ids += more.ids
        self.sizes += more.sizes

    def lasting(self) -> "Events":
        """The same without storages that are both made and freed."""
        freed = {storage for storage, size in zip(self.ids, self.sizes, strict=True) if size < 0}
        passing = freed & {storage for storage, size in zip(self.ids, self.sizes, strict=True) if size >= 0}
        kept = [(i, size) for i, size in zip(self.ids, self.sizes, strict=True) if i not in passing]
        return Events([storage for storage, _ in kept], [size for _, size in kept])

    def ordered(self) -> "Events":
        """The same with what is freed at one time in the order of ids; Python's, in a set, is by chance."""
        ids: list[int] = []
        for made, group in groupby(zip(self.ids, self.sizes, strict=True), key=lambda event: event[1] >= 0):
            together = [event[0] for event in group]
            ids += together if made else sorted(together)
        return Events(ids, self.sizes)


class NotAlike(Exception):
    """Steps of different shapes allocate so differently that none can be told from the others."""


@dataclass
class Trace:
    """What a step allocates.

    Attributes:
        loaded: until the first step begins: weights, adapters, optimizer state.
        steps: a step for each traced shape, alike but for the sizes.
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
        """The trace as JSON can hold it."""
        return {
            "loaded": [self.loaded.ids, self.loaded.sizes],
            "steps": [[shape, step.ids, step.sizes] for shape, step in self.steps.items()],
            "kinds": list(self.kinds.items()),
            "parameters": self.parameters,
            "sizes": self.sizes,
            "paged": self.paged,
            "expandable": self.expandable,
        }

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> "Trace":
        """A trace from what `as_json` made of it."""
        steps = {(shape[0], shape[1]): Events(ids, sizes) for shape, ids, sizes in content["steps"]}
        rest = {name: content[name] for name in ("parameters", "sizes", "paged", "expandable")}
        return cls(Events(*content["loaded"]), steps, dict(content["kinds"]), **rest)


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


def usage(trace: Trace, shape: Shape) -> Usage:
    """The peaks of a step that follows one like it, from a model of CUDA's allocator.

    Raises:
        NotAlike: the shape was not traced, and does not follow from those that were.
    """
    step = _at(trace, shape)
    allocator = Allocator(trace.expandable)
    blocks: dict[int, Block] = {}
    held: Counter[str] = Counter()
    _replay(trace.loaded, allocator, blocks, held, trace.kinds)
    allocator.empty_cache()  # axolotl/loaders/model.py does so once the model is loaded, PEFT before
    _replay(step, allocator, blocks, held, trace.kinds)
    allocator.reset_peaks()
    parts = _replay(step, allocator, blocks, held, trace.kinds)
    return Usage(allocator.peak, allocator.peak_reserved, parts)


def _at(trace: Trace, shape: Shape) -> Events:
    """A step's events at a shape: as traced, or with each size extrapolated from traced ones.

    Sizes are linear in the rows, and at most quadratic in the length (masks and scores), so that two and three traced
    shapes give them exactly; what kernels round to multiples of up to 64 tokens is exact for such lengths.
    """
    if shape in trace.steps:
        return trace.steps[shape]
    rows, length = shape
    # a single row needs no copies where several do, so that it is no point on their line
    among = [known for known in trace.steps if length == known[1] and known[0] > 1]
    axis = 0
    if not among or rows in {known[0] for known in trace.steps if length != known[1]}:
        among, axis = [known for known in trace.steps if rows == known[0]], 1
    points, wanted = [known[axis] for known in among], shape[axis]
    if not among or len({tuple(trace.steps[known].ids) for known in among}) > 1:
        raise NotAlike(f"steps of the shapes {among} do not allocate alike")
    weights = [_lagrange(points, i, wanted) for i in range(len(points))]
    events = [trace.steps[known] for known in among]
    sizes = [
        -1 if one[0] < 0 else round(sum(weight * size for weight, size in zip(weights, one, strict=True)))
        for one in zip(*(step.sizes for step in events), strict=True)
    ]
    return Events(events[0].ids, sizes)


def _lagrange(points: list[int], i: int, at: int) -> float:
    """The weight of the i-th of some points in the polynomial through all of them."""
    weight = 1.0
    for j, point in enumerate(points):
        if j != i:
            weight *= (at - point) / (points[i] - point)
    return weight


def _replay(
    events: Events, allocator: Allocator, blocks: dict[int, Block], held: Counter[str], kinds: dict[int, str]
) -> dict[str, int]:
    """Give events to an allocator; returns what its blocks hold when most is allocated."""
    most, parts = 0, dict(held)
    for storage, size in zip(events.ids, events.sizes, strict=True):
        if size < 0:
            block = blocks.pop(storage)
            held[kinds[storage]] -= block.size
            allocator.release(block)
        else:
            block = blocks[storage] = allocator.allocate(size)
            held[kinds[storage]] += block.size
            if allocator.allocated > most:
                most, parts = allocator.allocated, dict(held)
    return parts


def bytes_at_peak(*events: Events) -> int:
    """The most bytes that storages have at once, not rounded to any allocator's blocks."""
    live: dict[int, int] = {}
    most = now = 0
    for part in events:
        for storage, size in zip(part.ids, part.sizes, strict=True):
            if size < 0:
                now -= live.pop(storage, 0)
            else:
                live[storage] = size
                now += size
                most = max(most, now)
    return most
