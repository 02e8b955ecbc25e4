"""The memory of a training step at any shape, cached once it was traced, and what a config needs of it.

torch is imported only where a step was not traced before.
"""

import hashlib
import logging
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

import orjson

from ..base import paths
from ..base.errors import UserError
from ..base.files import read_json, write_atomically
from ..base.yamlfiles import Config
from ..configs import models
from ..configs.gpus import Gpu, engine_of
from ..configs.numerics import attention, precision
from . import steps, traces
from .steps import Step
from .traces import MemoryTrace, Shape, Usage, rounded

VERSION = 1
"""Of the code that computes what is cached; to be raised when it computes something else."""
GIB = 2**30
CONTEXT = 0.14 * GIB
"""What CUDA itself takes: 133 to 147 MiB, by fitcheck's published runs on a T4, process less allocator."""
ROUND = 64
"""Lengths are planned in multiples of so many tokens, to which Axolotl pads unless told otherwise."""
USABLE = 14.5 / 16
"""The share of a GPU's memory that is planned with. Of 16 GB, torch finds 14.56 GiB on a T4 (its ECC takes the rest)
and 15.56 GiB on a Quadro RTX 5000; a display, and what the allocator and the driver lose, need room too."""


def cache_file(kind: str, *depends: Any) -> Path:
    """The file for a result that depends on some values, on the packages that train models, and on this code."""
    content = orjson.dumps([VERSION, packages(), *depends], default=str, option=orjson.OPT_SORT_KEYS)
    return paths.cache() / kind / f"{hashlib.sha256(content).hexdigest()[:24]}.json"


def keep(file: Path, content: dict[str, Any]) -> None:
    """Cache something, where the cache can be written."""
    with suppress(OSError):
        write_atomically(file, orjson.dumps(content).decode())


@cache
def packages() -> dict[str, str]:
    """The versions of what builds models, tokenizes rows and trains."""
    names = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate", "axolotl")
    return {name: version(name) for name in names}


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
        self._usage_file = cache_file("plans", asdict(self.step), self.rows, self.length)
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
        keep(self._usage_file, self._usages)
        return usage

    def required(self, rows: int | None = None, length: int | None = None) -> float:
        """Bytes of required memory: what is reserved at the peak, as `usage` gives it, and CUDA's own."""
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
            keep(self._trace_file, self._trace.as_json())
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


def planner_of(
    config: Config, gpu: Gpu | None, download: bool = True, alone: bool = False
) -> tuple[Planner, list[str]]:
    """The planned step of a config, and what of it is not traced.

    Args:
        config: the config.
        gpu: the GPU; None takes the oldest that has what the config asks for.
        download: whether a model's config.json may be fetched from the hub.
        alone: see `Planner`.
    """
    capability = gpu.capability if gpu else _least_capability(config)
    step, notes = steps.step_of(config, models.architecture(config, download), capability)
    return Planner(step, steps.rows_of(config), steps.length_of(config), alone), notes


def required_gib(config: Config, gpu: Gpu | None = None, anew: bool = False, gpus: int = 1) -> float | None:
    """GiB that a config needs on each GPU, as `planner_of` plans it; None where it was not planned before, without
    `anew`.

    Raises:
        UserError: it cannot be planned.
    """
    planner, _ = planner_of(config, gpu, download=anew, alone=True)
    if not planner.planned and not anew:
        return None
    return per_gpu(planner, gpus).get(engine_of(config), planner.required()) / GIB


def _least_capability(config: Config) -> tuple[int, int]:
    """The capability of the oldest GPUs that have what a config asks for: Turing's, or Ampere's for bf16 and
    FlashAttention."""
    newer = precision(config, on_gpu=True).weights == "bfloat16" or attention(config) == "flash_attention_2"
    return (8, 0) if newer else (7, 5)


def per_gpu(planner: Planner, gpus: int) -> dict[str, float]:
    """Bytes that each of several GPUs needs, by engine, from the parts of the peak on one GPU.

    Data parallelism keeps a second copy of the gradients in its buckets. ZeRO (arXiv 1910.02054) holds trained
    weights and gradients in 16 bits, and a copy of the weights in fp32 beside the optimizer's state; it divides these
    two (stage 1), the gradients too (2), and the weights, frozen ones too (3). FSDP trains in fp32 (accelerate) and
    divides all of it. Stage 3 and FSDP gather a layer, or an embedding, at a time. Activations and logits stay. Other
    buffers are not counted, nor that stage 3 leaves norms in 16 bits.
    """
    if gpus == 1:
        return {}
    held = Counter(planner.usage().parts)
    optimizer = held["optimizer"]
    trained = totals(planner.trace.parameters)["trainable"]
    weights = held["base weights"] + held["quantization constants"] + held["embeddings and head"]
    frozen = weights if planner.step.adapter else 0
    rest = planner.required() - weights - held["adapters"] - held["gradients"] - optimizer
    largest_layer = max((frozen + 2 * trained) / planner.trace.sizes["layers"], held["embeddings and head"])
    gathered = largest_layer * (1 - 1 / gpus)
    state = (optimizer + 4 * trained) / gpus
    return {
        "DDP": planner.required() + held["gradients"],
        "ZeRO-1": rest + frozen + 2 * trained + 2 * trained + state,
        "ZeRO-2": rest + frozen + 2 * trained + 2 * trained / gpus + state,
        "ZeRO-3": rest + (frozen + 4 * trained) / gpus + state + gathered,
        "FSDP": rest + (frozen + 8 * trained + optimizer) / gpus + gathered,
    }


def totals(parameters: dict[str, dict[str, int]]) -> dict[str, Any]:
    frozen = sum(count["frozen"] for count in parameters.values())
    trainable = sum(count["trainable"] for count in parameters.values())
    return {"frozen": frozen, "trainable": trainable, "trainable_share": trainable / (frozen + trainable)}
