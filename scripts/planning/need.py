"""The memory that a config needs, planned now or earlier."""

from collections import Counter
from contextlib import suppress
from typing import Any

from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..configs import models
from ..configs.gpus import Gpu, engine_of
from ..configs.numerics import attention, precision
from . import lora, steps
from .planner import GIB, Planner

USABLE = 14.5 / 16
"""The share of a card's memory that is planned with. Of 16 GB, torch finds 14.56 GiB on a T4 (its ECC takes the rest)
and 15.56 GiB on a Quadro RTX 5000; a display, and what the allocator and the driver lose, need room too."""


def planner_of(
    config: Config, gpu: Gpu | None, download: bool = True, alone: bool = False
) -> tuple[Planner, list[str]]:
    """The planned step of a config, and what of it is not traced.

    Args:
        config: the config.
        gpu: the card; None takes the oldest that has what the config asks for.
        download: whether a model's config.json may be fetched from the hub.
        alone: see `Planner`.
    """
    capability = gpu.capability if gpu else _least_capability(config)
    step, notes = steps.step_of(config, models.architecture(config, download), capability)
    return Planner(step, steps.rows_of(config), steps.length_of(config), alone), notes


def needed_gib(config: Config, gpu: Gpu | None = None, anew: bool = False, gpus: int = 1) -> float | None:
    """GiB that a config needs on each GPU, as `planner_of` plans it; None where it was not planned before, without
    `anew`.

    Raises:
        UserError: it cannot be planned.
    """
    planner, _ = planner_of(config, gpu, download=anew, alone=True)
    if anew and not planner.planned:
        with suppress(UserError):  # for reports, which import no torch
            lora.total(models.architecture(config))
    if not planner.planned and not anew:
        return None
    return per_gpu(planner, gpus).get(engine_of(config), planner.need()) / GIB


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
    parts = planner.usage().parts
    held = held_at_peak(planner)
    optimizer = held["optimizer"]
    trained = totals(planner.trace.parameters)["trainable"]
    frozen = held["weights"] - parts.get("adapters", 0) if planner.step.adapter else 0
    rest = planner.need() - held["weights"] - held["gradients"] - optimizer
    largest_layer = max((frozen + 2 * trained) / planner.trace.sizes["layers"], parts.get("embeddings and head", 0))
    gathered = largest_layer * (1 - 1 / gpus)
    state = (optimizer + 4 * trained) / gpus
    return {
        "DDP": planner.need() + held["gradients"],
        "ZeRO-1": rest + frozen + 2 * trained + 2 * trained + state,
        "ZeRO-2": rest + frozen + 2 * trained + 2 * trained / gpus + state,
        "ZeRO-3": rest + (frozen + 4 * trained) / gpus + state + gathered,
        "FSDP": rest + (frozen + 8 * trained + optimizer) / gpus + gathered,
    }


def totals(parameters: dict[str, dict[str, int]]) -> dict[str, Any]:
    frozen = sum(count["frozen"] for count in parameters.values())
    trainable = sum(count["trainable"] for count in parameters.values())
    return {"frozen": frozen, "trainable": trainable, "trainable_share": trainable / (frozen + trainable)}


def held_at_peak(planner: Planner) -> dict[str, int]:
    """Bytes that a GPU holds at the peak, in four parts."""
    parts = Counter(planner.usage().parts)
    weights = ("base weights", "quantization constants", "embeddings and head", "adapters")
    return {
        "weights": sum(parts[kind] for kind in weights),
        "gradients": parts["gradients"],
        "optimizer": parts["optimizer"],
        "activations": parts["activations"] + parts["logits"],
    }
