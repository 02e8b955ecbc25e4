"""Storages that a training step makes and frees, and their memory on a GPU.

`memory.trace` makes a trace, `usage` replays it through a model of PyTorch's CUDA caching allocator. Needs no torch.
"""

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby

MIB = 2**20
_ROUND = 512  # block sizes are multiples of it
_SMALL = MIB  # the largest block of the pool for small ones
_SMALL_SEGMENT = 2 * MIB
_LARGE_SEGMENT = 20 * MIB
_OWN_SEGMENT = 10 * MIB  # from this size on a segment is made to measure


@dataclass(slots=True, eq=False)
class Block:
    """Piece of a segment; `before` and `after` are its neighbours there."""

    size: int
    address: int
    pool: "Pool" = field(repr=False)
    free: bool = False
    before: "Block | None" = field(default=None, repr=False)
    after: "Block | None" = field(default=None, repr=False)


@dataclass
class Pool:
    """Free blocks.

    Attributes:
        segment: bytes of a new segment, or by which a segment grows.
        least: bytes that have to be left over for a block to be split.
        order: their sizes and addresses, the smallest first; numbers are found in it much sooner than blocks are.
        at: the blocks by address.
        last: the block at the end of a growing segment.
    """

    segment: int
    least: int
    order: list[tuple[int, int]] = field(default_factory=list)
    at: dict[int, Block] = field(default_factory=dict)
    last: Block | None = None

    def put(self, block: Block) -> None:
        """Put a free block in."""
        self.at[block.address] = block
        insort(self.order, (block.size, block.address))

    def take(self, block: Block) -> None:
        """Take a free block out."""
        self.order.pop(bisect_left(self.order, (block.size, block.address)))
        del self.at[block.address]

    def fitting(self, size: int) -> Block | None:
        """Take the smallest free block of at least some bytes out; None if no block is that large."""
        position = bisect_left(self.order, (size,))
        return self.at.pop(self.order.pop(position)[1]) if position < len(self.order) else None


class Allocator:
    """The allocator on one stream, by the rules of c10/cuda/CUDACachingAllocator.cpp in torch 2.14.

    Requests are rounded up to 512 bytes and served from the smallest free block that holds them, of two pools (up to
    1 MiB, and above). A block is split where enough is left; neighbours that are free become one again. Where none
    fits, a new segment is reserved; with expandable segments, which Axolotl switches on, one segment a pool grows
    instead, and every block is split.

    Attributes:
        allocated, peak: bytes in blocks that are in use, as torch.cuda.max_memory_allocated counts them.
        reserved, peak_reserved: bytes in segments.
    """

    def __init__(self, expandable: bool):
        self.expandable = expandable
        self.allocated = self.peak = self.reserved = self.peak_reserved = 0
        self._small = Pool(_SMALL_SEGMENT, _ROUND)
        self._large = Pool(_LARGE_SEGMENT, _ROUND if expandable else _SMALL + 1)
        self._address = 0

    def allocate(self, size: int) -> Block:
        """Allocate a block of at least some bytes."""
        size = max(_ROUND, rounded(size, _ROUND))
        pool = self._small if size <= _SMALL else self._large
        block = pool.fitting(size) or (self._grow(pool, size) if self.expandable else self._segment(pool, size))
        _split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak = max(self.peak, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Give a block back."""
        self.allocated -= block.size
        for neighbour in (block.before, block.after):
            if neighbour and neighbour.free:
                block.pool.take(neighbour)
                block = _joined(neighbour, block) if neighbour is block.before else _joined(block, neighbour)
        block.free = True
        block.pool.put(block)

    def empty_cache(self) -> None:
        """Give segments without a block in use back to the device, and the pages at the end of growing ones."""
        for pool in (self._small, self._large):
            if not self.expandable:
                for block in [block for block in pool.at.values() if not (block.before or block.after)]:
                    pool.take(block)
                    self.reserved -= block.size
            elif pool.last and pool.last.free and pool.last.size >= pool.segment:
                # a hole in a growing segment is filled again page by page: nothing is lost by forgetting where it was
                self._shorten(pool, pool.last)

    def reset_peaks(self) -> None:
        """Measure peaks from here on."""
        self.peak = self.allocated
        self.peak_reserved = self.reserved

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _segment(self, pool: Pool, size: int) -> Block:
        """New segment for a block that fits nowhere."""
        length = pool.segment if size < _OWN_SEGMENT else rounded(size, _SMALL_SEGMENT)
        self._reserve(length)
        self._address += length
        return Block(length, self._address - length, pool)

    def _grow(self, pool: Pool, size: int) -> Block:
        """Free end of the pool's growing segment, made long enough."""
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

    def _shorten(self, pool: Pool, block: Block) -> None:
        """Give back the whole pages of the free block at the end of a growing segment."""
        pool.take(block)
        kept = -block.address % pool.segment
        self.reserved -= block.size - kept
        block.size = kept
        if kept:
            pool.put(block)
        else:
            pool.last = block.before
            if block.before:
                block.before.after = None


def rounded(size: int, unit: int) -> int:
    """Number rounded up to a multiple of a unit."""
    return -(-size // unit) * unit


def _split(block: Block, size: int) -> None:
    """Cut the excess off a block, where that is worth while."""
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


Shape = tuple[int, int]  # the rows of a micro batch, and the tokens of each
Events = list[tuple[int, int]]
"""Storages being made (their id and size in bytes) and freed (their id and -1), in order."""
Counts = dict[str, dict[str, int]]
"""Frozen and trainable parameters by the kind of layer."""


def lasting(events: Events) -> Events:
    """Events without storages that are both made and freed."""
    passing = {storage for storage, size in events if size < 0} & {storage for storage, size in events if size >= 0}
    return [event for event in events if event[0] not in passing]


def ordered(events: Events) -> Events:
    """Events, those of one time of freeing in the order of ids; Python's, in a set, is by chance."""
    groups = groupby(events, key=lambda event: event[1] >= 0)
    return [event for made, group in groups for event in (group if made else sorted(group))]


@dataclass
class MemoryTrace:
    """Storages of a step.

    Attributes:
        loaded: the events before the first step: weights, adapters, optimizer state.
        step: the events of a step.
        kinds: kind of the content of each storage.
        sizes: the model's: its layers, width, attention_width (heads times their size) and vocabulary.
        paged: bytes of optimizer state that can leave the GPU.
        expandable: the allocator's segments are expandable, as Axolotl sets it.
    """

    loaded: Events
    step: Events
    kinds: dict[int, str]
    parameters: Counts
    sizes: dict[str, int]
    paged: int
    expandable: bool


@dataclass(frozen=True)
class Usage:
    """Peaks of a step, in bytes.

    Attributes:
        allocated: as torch.cuda.max_memory_allocated counts.
        reserved: as torch.cuda.max_memory_reserved counts.
        parts: allocated bytes at their peak, by kind.
    """

    allocated: int
    reserved: int
    parts: dict[str, int]


def usage(trace: MemoryTrace) -> Usage:
    """Peaks of a step that follows one like it, from a model of CUDA's allocator."""
    allocator = Allocator(trace.expandable)
    blocks: dict[int, Block] = {}
    held: Counter[str] = Counter()
    parts: dict[str, int] = {}
    for events in (trace.loaded, trace.step, trace.step):
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
