"""A model of PyTorch's CUDA caching allocator: what a sequence of allocations occupies, and reserves, on a GPU."""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

MIB = 2**20
_ROUND = 512  # block sizes are multiples of it
_SMALL = MIB  # the largest block of the pool for small ones
_SMALL_SEGMENT, _LARGE_SEGMENT = 2 * MIB, 20 * MIB
_OWN_SEGMENT = 10 * MIB  # from this size on a segment is made to measure


@dataclass(slots=True)
class Block:
    """A piece of a segment; `before` and `after` are its neighbours there."""

    address: int
    size: int
    pool: list["Block"] = field(repr=False)
    free: bool = False
    before: "Block | None" = field(default=None, repr=False)
    after: "Block | None" = field(default=None, repr=False)

    def __lt__(self, other: "Block") -> bool:
        return (self.size, self.address) < (other.size, other.address)


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
        self._small: list[Block] = []
        self._large: list[Block] = []
        self._last: dict[int, Block] = {}  # the block at the end of each pool's growing segment
        self._address = 0

    def allocate(self, size: int) -> Block:
        """A block of at least some bytes."""
        size = max(_ROUND, -(-size // _ROUND) * _ROUND)
        pool = self._small if size <= _SMALL else self._large
        position = bisect_left(pool, size, key=lambda block: block.size)
        if position < len(pool):
            block = pool.pop(position)
        else:
            block = self._grow(pool, size) if self.expandable else self._segment(pool, size)
        self._split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak = max(self.peak, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Give a block back."""
        self.allocated -= block.size
        for neighbour in (block.before, block.after):
            if neighbour and neighbour.free:
                _take(neighbour)
                block = self._joined(neighbour, block) if neighbour is block.before else self._joined(block, neighbour)
        block.free = True
        insort(block.pool, block)

    def empty_cache(self) -> None:
        """Give segments without a block in use back to the device, and the pages below free blocks of growing ones."""
        for pool in (self._small, self._large):
            if self.expandable:
                page = _SMALL_SEGMENT if pool is self._small else _LARGE_SEGMENT
                # a hole in a growing segment is filled again page by page: nothing is lost by forgetting where it was
                for block in [block for block in pool if block.size >= page and not block.after]:
                    self._shorten(block, page)
            else:
                for block in [block for block in pool if not (block.before or block.after)]:
                    _take(block)
                    self.reserved -= block.size

    def reset_peaks(self) -> None:
        """Measure peaks from here on."""
        self.peak, self.peak_reserved = self.allocated, self.reserved

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _segment(self, pool: list[Block], size: int) -> Block:
        """A segment of its own for a block that fits nowhere."""
        if size <= _SMALL:
            length = _SMALL_SEGMENT
        elif size < _OWN_SEGMENT:
            length = _LARGE_SEGMENT
        else:
            length = -(-size // _SMALL_SEGMENT) * _SMALL_SEGMENT
        self._reserve(length)
        self._address += length
        return Block(self._address - length, length, pool)

    def _grow(self, pool: list[Block], size: int) -> Block:
        """The free end of the pool's growing segment, made long enough."""
        page = _SMALL_SEGMENT if pool is self._small else _LARGE_SEGMENT
        last = self._last.get(id(pool))
        at_end = last if last and last.free else None
        if at_end:
            _take(at_end)
        added = -(-(size - (at_end.size if at_end else 0)) // page) * page
        self._reserve(added)
        if at_end:
            at_end.size += added
            return at_end
        address = last.address + last.size if last else 0
        block = Block(address, added, pool, before=last)
        if last:
            last.after = block
        self._last[id(pool)] = block
        return block

    def _split(self, block: Block, size: int) -> None:
        """Cut off what a block has more than asked for, where that is worth while."""
        left = block.size - size
        least = _ROUND if self.expandable or block.pool is self._small else _SMALL + 1
        if left < least:
            return
        rest = Block(block.address + size, left, block.pool, True, block, block.after)
        if block.after:
            block.after.before = rest
        elif self.expandable:
            self._last[id(block.pool)] = rest
        block.size, block.after = size, rest
        insort(block.pool, rest)

    def _joined(self, first: Block, second: Block) -> Block:
        first.size += second.size
        first.after = second.after
        if second.after:
            second.after.before = first
        elif self.expandable:
            self._last[id(first.pool)] = first
        return first

    def _shorten(self, block: Block, page: int) -> None:
        """Give back the whole pages at the end of a growing segment."""
        _take(block)
        end = block.address + block.size
        kept = -(-block.address // page) * page - block.address
        given_back = end - block.address - kept
        self.reserved -= given_back
        block.size -= given_back
        if block.size:
            insort(block.pool, block)
        elif block.before:
            block.before.after = None
            self._last[id(block.pool)] = block.before
        else:
            self._last.pop(id(block.pool), None)


def _take(block: Block) -> None:
    """Take a free block out of its pool."""
    block.pool.pop(bisect_left(block.pool, block))
