"""The memory of a training step at any shape, kept in the cache once it was traced.

torch is imported only where a step was not traced before. What a trace says is kept under a hash of all that it
depends on.
"""

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten

import orjson

from ..base import paths
from ..base.errors import UserError
from ..base.files import read_json, write_atomically
from . import traces
from .traces import MemoryTrace, Shape, Step, Usage

GIB = 2**30
CONTEXT = 0.14 * GIB
"""What CUDA itself takes: 133 to 147 MiB, as fitcheck's published runs on a T4 tell process and allocator apart."""
ROUND = 64
"""Lengths are planned in multiples of so many tokens, to which Axolotl pads unless told otherwise."""


class Planner:
    """The memory of one step.

    Args:
        step: the step.
        rows: the rows of its micro batch.
        length: the tokens of each.
        flat: whether the rows are laid end to end.
        alone: trace no others until they are asked for, which take most of the time.
    """

    def __init__(self, step: Step, rows: int, length: int, flat: bool = False, alone: bool = False):
        self.step, self.rows, self.length, self.flat, self.alone = step, rows, length, flat, alone
        self._file = paths.cache() / "plans" / f"{self._key()}.json"
        self._kept = read_json(self._file)
        self._trace: MemoryTrace | None = None
        self._changed = False

    @property
    def planned(self) -> bool:
        """Whether the step was planned before."""
        return bool(self._kept)

    @property
    def parameters(self) -> dict[str, dict[str, int]]:
        """Frozen and trainable parameters by kind of layer."""
        return self._traced().parameters

    @property
    def sizes(self) -> dict[str, int]:
        """The model's sizes, as `MemoryTrace` has them."""
        return self._traced().sizes

    @property
    def paged(self) -> int:
        """Bytes of optimizer state that can leave the GPU."""
        return self._traced().paged

    def usage(self, rows: int | None = None, length: int | None = None) -> Usage:
        """Peaks at a number of rows and tokens, by default the step's own.

        Raises:
            traces.NotAlike: they cannot be told from those that were traced.
            UserError: the step cannot be traced.
        """
        rows, length = rows or self.rows, length or self.length
        if rows > 1 and self._several:
            return self._several.usage(rows, length)
        shape = self._shape(rows, length)
        name = "x".join(map(str, shape))
        with suppress(KeyError, TypeError):  # not kept, or something else
            return Usage(**self._kept["usage"][name])
        found = traces.usage(self._traced(shape), shape)
        self._kept.setdefault("usage", {})[name], self._changed = asdict(found), True
        return found

    def need(self, rows: int | None = None, length: int | None = None) -> float:
        """Bytes that a GPU needs, as `usage`: what is reserved at the peak, and CUDA's own."""
        return self.usage(rows, length).reserved + CONTEXT

    def save(self) -> None:
        """Keep what was found for the next time, where that can be written."""
        if self._changed:
            with suppress(OSError):
                write_atomically(self._file, orjson.dumps(self._kept).decode())
            self._changed = False
        if "_several" in self.__dict__ and self._several:
            self._several.save()

    @cached_property
    def _several(self) -> "Planner | None":
        """The same step with more rows, where a single one needs no mask and several do."""
        masks = self.step.attention != "flash_attention_2" and not (self.step.padded or self.step.packed)
        return Planner(replace(self.step, padded=True), 2, self.length) if self.rows == 1 and masks else None

    def _traced(self, shape: Shape | None = None) -> MemoryTrace:
        """The trace from which the memory at a shape is told, by default the step's own."""
        shapes = self._shapes()
        if self.alone and shape in (None, shapes[0]):
            shapes = shapes[:1]
        if self._trace is None:
            with suppress(KeyError, TypeError, ValueError):  # not kept, or something else
                self._trace = MemoryTrace.of_json(self._kept["trace"])
        if self._trace is None or not self._trace.steps.keys() >= set(shapes):
            self._trace = self._trace_anew(shapes)
            self._kept, self._changed = {"trace": self._trace.as_json(), "usage": {}}, True
        return self._trace

    def _trace_anew(self, shapes: list[Shape]) -> MemoryTrace:
        from ..base.quiet import importing_axolotl

        with importing_axolotl():
            from .memory import trace

            logging.disable(logging.CRITICAL)  # torch would print its own traceback
            try:
                return trace(self.step, shapes)
            except Exception as error:  # any model's code runs in it
                problem = shorten(f"{type(error).__name__}: {error}", 200)
                raise UserError(f"this model and adapter cannot be planned: {problem}") from None

    def _shape(self, rows: int, length: int) -> Shape:
        """What Axolotl gives the model, its length rounded up."""
        if self.flat:
            rows, length = 1, rows * length
        return rows, -(-length // ROUND) * ROUND

    def _shapes(self) -> list[Shape]:
        """The step's own shape, and what else has to be traced to know any other number of rows, or of tokens."""
        rows, length = self._shape(self.rows, self.length)
        longer = [(rows, length + ROUND), (rows, length + 2 * ROUND)]
        if self.flat or self._several:
            return [(rows, length), *longer]
        more = [(rows + 1, length)] if rows > 1 else [(2, length), (3, length)]
        return [(rows, length), *more, *longer]

    def _key(self) -> str:
        """A hash of all that a trace depends on: the step, the shapes, the packages that run it, and this code."""
        names = ("allocator", "cuda", "memory", "planner", "traces")
        sources = [Path(__file__).with_name(f"{name}.py").read_text() for name in names]
        content = [asdict(self.step), self.rows, self.length, self.flat, _packages(), sources]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


@cache
def _packages() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "axolotl")
    return {name: version(name) for name in names}
