"""Memory of a training step at any shape, traced once and cached, and of a config on each GPU.

A cached step needs no torch.
"""

import hashlib
import logging
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten

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
from .traces import Counts, MemoryTrace, Shape, Usage, rounded

VERSION = 1
"""Version of the code that computes cached memory; raise it when other figures come out."""
GIB = 2**30
CONTEXT = 0.14 * GIB
"""Memory of CUDA itself: 133 to 147 MiB, by fitcheck's published runs on a T4, process less allocator."""
ROUND = 64
"""Lengths are planned in multiples of so many tokens, Axolotl's default padding."""
USABLE = 14.5 / 16
"""Usable share of a GPU's memory. Of 16 GB, torch finds 14.56 GiB on a T4 (its ECC takes the rest)
and 15.56 GiB on a Quadro RTX 5000; a display, and what the allocator and the driver lose, need room too."""


@cache
def packages() -> dict[str, str]:
    """Versions of the packages that build models, tokenize rows and train."""
    names = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate", "axolotl")
    return {name: version(name) for name in names}


@dataclass(frozen=True)
class Memory:
    """Memory of a step, in bytes, and the counts of its trace.

    Attributes:
        usage: its peaks.
        paged: optimizer state that can leave the GPU.
        parameters, sizes: see `MemoryTrace`.
    """

    usage: Usage
    paged: int
    parameters: Counts
    sizes: dict[str, int]

    def total(self, kind: str) -> int:
        """Parameters that are `frozen` or `trainable`."""
        return sum(count[kind] for count in self.parameters.values())


@dataclass
class Planner:
    """Plan of one step's memory.

    Attributes:
        step: the step.
        rows: the rows of its micro batch.
        length: the tokens of each.
    """

    step: Step
    rows: int
    length: int

    @property
    def shape(self) -> Shape:
        """Shape of the model's input from Axolotl, its length rounded up."""
        if self.step.flat:
            return 1, rounded(self.rows * self.length, ROUND)
        return self.rows, rounded(self.length, ROUND)

    @property
    def file(self) -> Path:
        """Cache of its memory, by the step, the packages that train models, and the version of this code."""
        depends = [VERSION, packages(), asdict(self.step), self.shape]
        content = orjson.dumps(depends, default=str, option=orjson.OPT_SORT_KEYS)
        return paths.cache() / "plans" / f"{hashlib.sha256(content).hexdigest()[:24]}.json"

    @cached_property
    def cached(self) -> Memory | None:
        """Its memory from an earlier plan."""
        with suppress(KeyError, TypeError):  # not kept, or damaged
            content = read_json(self.file)
            return Memory(**content | {"usage": Usage(**content["usage"])})
        return None

    @cached_property
    def memory(self) -> Memory:
        """Its memory, planned now or earlier.

        Raises:
            UserError: the step cannot be traced.
        """
        if self.cached:
            return self.cached
        trace = self._traced()
        memory = Memory(traces.usage(trace), trace.paged, trace.parameters, trace.sizes)
        with suppress(OSError):
            write_atomically(self.file, orjson.dumps(asdict(memory)).decode())
        return memory

    @property
    def required(self) -> float:
        """Bytes of required memory: what is reserved at the peak, and CUDA's own."""
        return self.memory.usage.reserved + CONTEXT

    def _traced(self) -> MemoryTrace:
        from ..base.hub import importing_axolotl

        with importing_axolotl():
            from .memory import trace

            logging.disable(logging.CRITICAL)  # torch would print its own traceback
            try:
                return trace(self.step, self.shape)
            except Exception as error:  # any model's code runs in it
                problem = shorten(f"{type(error).__name__}: {error}", 200)
                raise UserError(f"this model and adapter cannot be planned: {problem}") from None


def planner_of(config: Config, gpu: Gpu | None, download: bool = True) -> tuple[Planner, list[str]]:
    """Planner of a config's step, and notes on its parts that are not traced.

    Args:
        config: the config.
        gpu: the GPU; None takes the oldest that supports the config.
        download: allow fetching a model's config.json from the hub.
    """
    capability = gpu.capability if gpu else _least_capability(config)
    step, notes = steps.step_of(config, models.architecture(config, download), capability)
    return Planner(step, steps.rows_of(config), steps.length_of(config)), notes


def required_gib(config: Config, gpu: Gpu | None = None, anew: bool = False, gpus: int = 1) -> float | None:
    """GiB that a config needs on each GPU; without `anew`, None where it was not planned before.

    Raises:
        UserError: it cannot be planned.
    """
    planner, _ = planner_of(config, gpu, download=anew)
    if not planner.cached and not anew:
        return None
    return per_gpu(planner, gpus).get(engine_of(config), planner.required) / GIB


def _least_capability(config: Config) -> tuple[int, int]:
    """Capability of the oldest GPUs that support a config: Turing, or Ampere for bf16 and FlashAttention."""
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
    held = Counter(planner.memory.usage.parts)
    optimizer = held["optimizer"]
    trained = planner.memory.total("trainable")
    weights = held["base weights"] + held["quantization constants"] + held["embeddings and head"]
    frozen = weights if planner.step.adapter else 0
    rest = planner.required - weights - held["adapters"] - held["gradients"] - optimizer
    largest_layer = max((frozen + 2 * trained) / planner.memory.sizes["layers"], held["embeddings and head"])
    gathered = largest_layer * (1 - 1 / gpus)
    state = (optimizer + 4 * trained) / gpus
    return {
        "DDP": planner.required + held["gradients"],
        "ZeRO-1": rest + frozen + 2 * trained + 2 * trained + state,
        "ZeRO-2": rest + frozen + 2 * trained + 2 * trained / gpus + state,
        "ZeRO-3": rest + (frozen + 4 * trained) / gpus + state + gathered,
        "FSDP": rest + (frozen + 8 * trained + optimizer) / gpus + gathered,
    }
