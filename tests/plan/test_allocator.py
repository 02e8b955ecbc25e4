"""PyTorch's allocator, and traces replayed through it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_recipes.plan import allocator
from qlora_recipes.plan.allocator import MIB, Allocator, MemoryTrace


@pytest.mark.parametrize(
    ("sizes", "allocated", "reserved"),
    [
        ([1, 513], 512 + 1024, 2 * MIB),
        ([MIB], MIB, 2 * MIB),
        ([MIB + 1], MIB + 512, 20 * MIB),
        ([9 * MIB], 9 * MIB, 20 * MIB),
        ([11 * MIB], 12 * MIB, 12 * MIB),
    ],
)
def test_requests_are_rounded_and_a_segment_is_sized_by_them(sizes, allocated, reserved):
    allocator = Allocator(expandable=False)
    for size in sizes:
        allocator.allocate(size)
    assert allocator.allocated == allocated
    assert allocator.reserved == reserved


def test_free_neighbours_become_one_block_of_which_less_than_a_mebibyte_is_not_split_off():
    allocator = Allocator(expandable=False)
    blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
    for i in (0, 2, 1):
        allocator.release(blocks[i])
    allocator.allocate(14 * MIB + 512)
    assert allocator.allocated == 20 * MIB
    assert allocator.reserved == 20 * MIB


def test_an_expandable_segment_grows_by_pages_and_is_used_to_the_byte():
    allocator = Allocator(expandable=True)
    first = allocator.allocate(30 * MIB)
    assert allocator.reserved == 40 * MIB
    allocator.allocate(30 * MIB)  # ten of them are there
    assert allocator.reserved == 60 * MIB
    allocator.release(first)
    allocator.allocate(29 * MIB)
    assert allocator.allocated == 59 * MIB
    assert allocator.reserved == 60 * MIB


@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 50 * MIB) | st.integers(1, 2 * MIB), st.integers(0, 10)), max_size=60),
)
def test_any_sequence_keeps_the_books(expandable, requests):
    allocator = Allocator(expandable)
    blocks = []
    for size, order in requests:
        blocks.append(allocator.allocate(size))
        assert blocks[-1].size >= size
        if order > 5:
            allocator.release(blocks.pop(order % len(blocks)))
        if order == 5:
            allocator.empty_cache()
        spans = sorted((block.pool is allocator._small, block.address, block.size) for block in blocks)
        for (pool, address, length), (other_pool, after, _) in pairwise(spans):
            assert pool != other_pool or address + length <= after
        assert allocator.allocated == sum(block.size for block in blocks)
        assert allocator.allocated <= allocator.reserved <= allocator.peak_reserved
    for block in blocks:
        allocator.release(block)
    allocator.empty_cache()
    assert allocator.allocated == 0
    assert allocator.reserved == 0


def test_a_weight_that_the_first_step_replaces_is_freed_once():
    step = [(2, 2 * MIB), (1, -1), (3, 3 * MIB), (3, -1), (2, -1)]
    kinds = {1: "weights", 2: "activations", 3: "mask"}
    used = allocator.usage(MemoryTrace([(1, MIB)], step, [], kinds, {}, {}, 0, expandable=True))
    assert used.allocated == 5 * MIB


def test_usage_says_what_is_there_at_the_peak():
    step = [(2, 2 * MIB), (3, 3 * MIB), (3, -1), (2, -1)]
    kinds = {1: "weights", 2: "activations", 3: "mask"}
    trace = MemoryTrace([(1, 64 * MIB)], step, [], kinds, {}, {}, 0, expandable=True)
    used = allocator.usage(trace)
    assert used.parts == {"weights": 64 * MIB, "activations": 2 * MIB, "mask": 3 * MIB}
    assert used.allocated == 69 * MIB
    assert used.reserved == 80 * MIB
