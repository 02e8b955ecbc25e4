"""Memory traces of a training step, and a model of PyTorch's CUDA caching allocator.

`fake_step.trace` makes a trace; `usage` replays it through the allocator model. This module does not import torch.
"""

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import attrgetter

MIB = 2**20
_ROUND = 512  # block sizes are multiples of this
_SMALL = MIB  # largest block in the pool for small blocks
_SMALL_SEGMENT = 2 * MIB
_LARGE_SEGMENT = 20 * MIB
_OWN_SEGMENT = 10 * MIB  # a block of this size or more gets a segment of about the same size


@dataclass(slots=True, eq=False)
class Block:
    """Piece of a segment; `before` and `after` are the neighbours in the segment."""

    size: int
    address: int
    pool: "Pool" = field(repr=False)
    free: bool = False
    before: "Block | None" = field(default=None, repr=False)
    after: "Block | None" = field(default=None, repr=False)


_PLACE = attrgetter("size", "address")


@dataclass
class Pool:
    """Pool of free blocks.

    Attributes:
        segment: size of a new segment, or increment of a growing segment, in bytes.
        least: split a block only if at least this number of bytes is left over.
        blocks: the blocks, smallest first; of one size, by address.
        last: the block at the end of a growing segment, free or not.
    """

    segment: int
    least: int
    blocks: list[Block] = field(default_factory=list)
    last: Block | None = None

    def put(self, block: Block) -> None:
        """Add a free block."""
        insort(self.blocks, block, key=_PLACE)

    def take(self, block: Block) -> None:
        """Remove a free block."""
        del self.blocks[bisect_left(self.blocks, _PLACE(block), key=_PLACE)]

    def fitting(self, size: int) -> Block | None:
        """Remove and return the smallest free block of at least `size` bytes, or None."""
        position = bisect_left(self.blocks, (size, 0), key=_PLACE)
        return self.blocks.pop(position) if position < len(self.blocks) else None


class Allocator:
    """Caching allocator for one stream, after c10/cuda/CUDACachingAllocator.cpp in torch 2.14.

    Sizes are rounded up to 512 bytes. There are two pools: blocks up to 1 MiB, and larger blocks. A request gets the
    smallest free block that is large enough. If enough is left over, the block is split; adjacent free blocks merge.
    If no block fits, a new segment is reserved. With expandable segments, which Axolotl switches on, each pool has one
    growing segment instead, and blocks are split however little is left over.

    Attributes:
        allocated, peak: bytes in used blocks, as torch.cuda.max_memory_allocated counts.
        reserved, peak_reserved: bytes in segments.
    """

    def __init__(self, expandable: bool):
        self.expandable = expandable
        self.allocated = self.peak = self.reserved = self.peak_reserved = 0
        self._small = Pool(_SMALL_SEGMENT, _ROUND)
        self._large = Pool(_LARGE_SEGMENT, _ROUND if expandable else _SMALL + 1)
        self._address = 0

    def allocate(self, size: int) -> Block:
        """Allocate a block of at least `size` bytes."""
        size = max(_ROUND, rounded(size, _ROUND))
        pool = self._small if size <= _SMALL else self._large
        block = pool.fitting(size) or self._extend(pool, size)
        _split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak = max(self.peak, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Free a block, and merge it with free neighbours."""
        self.allocated -= block.size
        before, after = block.before, block.after
        if before and before.free:
            block.pool.take(before)
            block = _joined(before, block)
        if after and after.free:
            block.pool.take(after)
            block = _joined(block, after)
        block.free = True
        block.pool.put(block)

    def empty_cache(self) -> None:
        """Return unused segments, and unused end pages of growing segments, to the device."""
        for pool in (self._small, self._large):
            if self.expandable:
                self._shorten(pool)
                continue
            segments = [block for block in pool.blocks if block.before is None and block.after is None]
            for segment in segments:
                pool.take(segment)
                self.reserved -= segment.size

    def reset_peaks(self) -> None:
        """Start measuring new peaks."""
        self.peak = self.allocated
        self.peak_reserved = self.reserved

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _extend(self, pool: Pool, size: int) -> Block:
        """Reserve memory, and return a block of at least `size` bytes."""
        if self.expandable:
            return self._grow(pool, size)
        length = pool.segment if size < _OWN_SEGMENT else rounded(size, _SMALL_SEGMENT)
        self._reserve(length)
        self._address += length
        return Block(length, self._address - length, pool)

    def _grow(self, pool: Pool, size: int) -> Block:
        """Extend the pool's growing segment; return a large enough block at its end."""
        block = pool.last
        if block and block.free:
            pool.take(block)
        else:
            block = Block(0, block.address + block.size if block else 0, pool, before=block)
            if block.before:
                block.before.after = block
            pool.last = block
        added = rounded(size - block.size, pool.segment)
        self._reserve(added)
        block.size += added
        return block

    def _shorten(self, pool: Pool) -> None:
        """Unmap whole pages if the block at a growing segment's end is free.

        The real allocator keeps the unmapped range and maps it again page by page; the totals are the same.
        """
        block = pool.last
        if block is None or not block.free or block.size < pool.segment:
            return
        pool.take(block)
        block_size = -block.address % pool.segment  # up to the next page
        self.reserved -= block.size - block_size
        block.size = block_size
        if block_size:
            pool.put(block)
        else:
            pool.last = block.before
            if block.before:
                block.before.after = None


def rounded(size: int, unit: int) -> int:
    """Size rounded up to a multiple of a unit."""
    return -(-size // unit) * unit


def _split(block: Block, size: int) -> None:
    """Split the excess off a block if it is at least `Pool.least` bytes."""
    left = block.size - size
    if left < block.pool.least:
        return
    rest = Block(left, block.address + size, block.pool, True, block, block.after)
    if block.after:
        block.after.before = rest
    else:
        block.pool.last = rest
    block.size = size
    block.after = rest
    block.pool.put(rest)


def _joined(first: Block, second: Block) -> Block:
    first.size += second.size
    first.after = second.after
    if second.after:
        second.after.before = first
    else:
        first.pool.last = first
    return first


Shape = tuple[int, int]  # rows per micro batch, tokens per row
Events = list[tuple[int, int]]
"""Events in order: (id, bytes) for a new storage, (id, -1) for a freed one."""
Counts = dict[str, dict[str, int]]
"""Counts of frozen and trainable parameters by kind of layer."""


def lasting(events: Events) -> Events:
    """Events, except those of storages that are both allocated and freed within the list."""
    occurrences = Counter(storage for storage, _ in events)
    return [event for event in events if occurrences[event[0]] == 1]


def ordered(events: Events) -> Events:
    """Events with consecutive frees sorted by id; Python frees set members in random order."""
    result: Events = []
    for allocates, group in groupby(events, key=lambda event: event[1] >= 0):
        if allocates:
            result += group
        else:
            result += sorted(group)
    return result


@dataclass
class MemoryTrace:
    """Memory trace of a step.

    Attributes:
        loaded: events before the first step: weights, adapters, optimizer state.
        step: events of one step.
        evaluation: events of the evaluation of one batch after a step; none if it was not traced.
        kinds: kind of content by storage id.
        sizes: model sizes: layers, width, attention_width (number of heads * head size) and vocabulary.
        paged: bytes of optimizer state that can leave the GPU.
        expandable: use expandable segments, as Axolotl does.
    """

    loaded: Events
    step: Events
    evaluation: Events
    kinds: dict[int, str]
    parameters: Counts
    sizes: dict[str, int]
    paged: int
    expandable: bool


@dataclass(frozen=True)
class Usage:
    """Peaks of a step, in bytes.

    Attributes:
        allocated: torch.cuda.max_memory_allocated.
        reserved: torch.cuda.max_memory_reserved.
        parts: allocated bytes by kind at the peak of `allocated`.
        evaluation: reserved bytes during an evaluation after the step; 0 if it was not traced.
    """

    allocated: int
    reserved: int
    parts: dict[str, int]
    evaluation: int = 0


def usage(trace: MemoryTrace) -> Usage:
    """Peaks of the second of two identical steps, and of an evaluation after it, by the allocator model."""
    allocator = Allocator(trace.expandable)
    blocks: dict[int, Block] = {}
    held: Counter[str] = Counter()
    parts: dict[str, int] = {}
    peaks = Usage(0, 0, parts)
    for events in (trace.loaded, trace.step, trace.step, trace.evaluation):
        allocator.reset_peaks()
        for storage, size in events:
            if size < 0:
                block = blocks.pop(storage, None)
                if block is None:  # only the first step frees it, as a bias that bitsandbytes casts in Linear4bit
                    continue
                held[trace.kinds[storage]] -= block.size
                allocator.release(block)
                continue
            peak = allocator.peak
            block = blocks[storage] = allocator.allocate(size)
            held[trace.kinds[storage]] += block.size
            if allocator.peak > peak:
                parts = dict(held)
        if events is trace.loaded:
            allocator.empty_cache()  # axolotl/loaders/model.py does this after loading the model
        if events is trace.step:
            peaks = Usage(allocator.peak, allocator.peak_reserved, parts)
    if trace.evaluation:
        return replace(peaks, evaluation=allocator.peak_reserved)
    return peaks
