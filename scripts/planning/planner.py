"""The memory of a training step at any shape, cached once it was traced.

torch is imported only where a step was not traced before.
"""

import logging
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from textwrap import shorten

from ..base.errors import UserError
from ..base.files import read_json
from . import cache, traces
from .allocator import rounded
from .traces import MemoryTrace, Shape, Step, Usage

GIB = 2**30
CONTEXT = 0.14 * GIB
"""What CUDA itself takes: 133 to 147 MiB, by fitcheck's published runs on a T4, process less allocator."""
ROUND = 64
"""Lengths are planned in multiples of so many tokens, to which Axolotl pads unless told otherwise."""


@dataclass
class Planner:
    """The memory of one step.

    Attributes:
        step: the step.
        rows: the rows of its micro batch.
        length: the tokens of each.
        alone: whether to trace no other shapes, which take most of the time, before they are asked for.
        planned: whether the step was planned before.
    """

    step: Step
    rows: int
    length: int
    alone: bool = False

    def __post_init__(self) -> None:
        self._usage_file = cache.file("plans", asdict(self.step), self.rows, self.length)
        self._trace_file = self._usage_file.with_suffix(".trace.json")
        self._usages = read_json(self._usage_file)
        self.planned = bool(self._usages)
        self._trace: MemoryTrace | None = None

    @property
    def trace(self) -> MemoryTrace:
        """The trace of the step at its own shape."""
        return self._traced(self._shapes()[0])

    def usage(self, rows: int | None = None, length: int | None = None) -> Usage:
        """Peaks at a number of rows and tokens, by default the step's own.

        Raises:
            traces.NotAlike: they do not follow from the shapes that were traced.
            UserError: the step cannot be traced.
        """
        rows = rows or self.rows
        length = length or self.length
        if rows > 1 and self._several:
            return self._several.usage(rows, length)
        shape = self._shape(rows, length)
        name = "x".join(map(str, shape))
        with suppress(KeyError, TypeError):  # not kept, or damaged
            return Usage(**self._usages[name])
        usage = traces.usage(self._traced(shape), shape)
        self._usages[name] = asdict(usage)
        cache.keep(self._usage_file, self._usages)
        return usage

    def need(self, rows: int | None = None, length: int | None = None) -> float:
        """Bytes that a GPU needs: what is reserved at the peak, as `usage` gives it, and CUDA's own."""
        return self.usage(rows, length).reserved + CONTEXT

    @cached_property
    def _several(self) -> "Planner | None":
        """The same step with more rows, where a single one needs no mask and several do."""
        masks = self.step.attention != "flash_attention_2" and not (self.step.padded or self.step.packed)
        return Planner(replace(self.step, padded=True), 2, self.length) if self.rows == 1 and masks else None

    def _traced(self, shape: Shape) -> MemoryTrace:
        """The trace from which the memory at a shape follows."""
        shapes = self._shapes()
        if self.alone and shape == shapes[0]:
            shapes = shapes[:1]
        if self._trace is None:
            with suppress(KeyError, TypeError, ValueError):  # not kept, or damaged
                self._trace = MemoryTrace.of_json(read_json(self._trace_file))
        if self._trace is None or not self._trace.steps.keys() >= set(shapes):
            self._trace = self._trace_anew(shapes)
            cache.keep(self._trace_file, self._trace.as_json())
        return self._trace

    def _trace_anew(self, shapes: list[Shape]) -> MemoryTrace:
        from ..base.hub import importing_axolotl

        with importing_axolotl():
            from .layers import trace

            logging.disable(logging.CRITICAL)  # torch would print its own traceback
            try:
                return trace(self.step, shapes)
            except Exception as error:  # any model's code runs in it
                problem = shorten(f"{type(error).__name__}: {error}", 200)
                raise UserError(f"this model and adapter cannot be planned: {problem}") from None

    def _shape(self, rows: int, length: int) -> Shape:
        """The shape that Axolotl gives the model, its length rounded up."""
        return (1, rounded(rows * length, ROUND)) if self.step.flat else (rows, rounded(length, ROUND))

    def _shapes(self) -> list[Shape]:
        """The step's own shape, and the others to trace so that any number of rows, or of tokens, follows from them."""
        rows, length = self._shape(self.rows, self.length)
        others = [(rows, length + ROUND), (rows, length + 2 * ROUND)]
        if self.step.flat or self._several:
            return [(rows, length), *others]
        more = [(rows + 1, length)] if rows > 1 else [(2, length), (3, length)]
        return [(rows, length), *more, *others]
