import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_recipes.planning import traces
from qlora_recipes.planning.allocator import MIB
from qlora_recipes.planning.traces import MemoryTrace


def made_up(shapes: list[traces.Shape]) -> MemoryTrace:
    """A trace of a weight, and of a step with an activation linear in rows and tokens beside a square mask."""
    steps = {
        (rows, tokens): [(2, rows * tokens * 1024), (3, rows * tokens**2 + MIB), (3, -1), (2, -1)]
        for rows, tokens in shapes
    }
    kinds = {1: "weights", 2: "activations", 3: "mask"}
    return MemoryTrace([(1, 64 * MIB)], steps, kinds, {}, {}, 0, expandable=True)


def test_usage_says_what_is_there_at_the_peak() -> None:
    used = traces.usage(made_up([(2, 1024)]), (2, 1024))
    assert used.parts == {"weights": 64 * MIB, "activations": 2 * MIB, "mask": 3 * MIB}
    assert (used.allocated, used.reserved) == (69 * MIB, 80 * MIB)


@given(st.integers(1, 50), st.integers(1, 100))
def test_other_shapes_follow_from_the_traced_ones(rows: int, units: int) -> None:
    known = made_up([(2, 1024), (3, 1024), (2, 512), (2, 256)])
    for shape in ((rows, 1024), (2, units * 64)):
        assert traces.usage(known, shape) == traces.usage(made_up([shape]), shape)


def test_a_trace_goes_through_json() -> None:
    trace = made_up([(2, 1024), (3, 1024)])
    assert MemoryTrace.of_json(trace.as_json()) == trace


def test_what_is_freed_together_is_put_in_order() -> None:
    assert traces.ordered([(5, 1), (6, 1), (6, -1), (5, -1), (7, 1)]) == [(5, 1), (6, 1), (5, -1), (6, -1), (7, 1)]


def test_what_comes_and_goes_does_not_last() -> None:
    assert traces.lasting([(5, 1), (6, 7), (2, -1), (5, -1)]) == [(6, 7), (2, -1)]


def test_steps_that_differ_are_not_mixed() -> None:
    trace = made_up([(2, 1024), (3, 1024)])
    trace.steps[3, 1024] = [(3, 1), (2, 1), (2, -1), (3, -1)]
    with pytest.raises(traces.NotAlike):
        traces.usage(trace, (4, 1024))
