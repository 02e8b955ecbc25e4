"""The memory that a config needs, planned now or earlier."""

from contextlib import suppress

from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..configs import models
from ..configs.attention import attention
from ..configs.gpus import Gpu
from ..configs.precision import precision
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


def needed_gib(config: Config, gpu: Gpu | None = None, anew: bool = False) -> float | None:
    """GiB that a config needs, as `planner_of` plans it; None where it was not planned before, without `anew`.

    Raises:
        UserError: it cannot be planned.
    """
    planner, _ = planner_of(config, gpu, download=anew, alone=True)
    if anew and not planner.planned:
        with suppress(UserError):  # for reports, which import no torch
            lora.total(models.architecture(config))
    return planner.need() / GIB if planner.planned or anew else None


def _least_capability(config: Config) -> tuple[int, int]:
    """The capability of the oldest GPUs that have what a config asks for: Turing's, or Ampere's for bf16 and
    FlashAttention."""
    newer = precision(config, on_gpu=True).weights == "bfloat16" or attention(config) == "flash_attention_2"
    return (8, 0) if newer else (7, 5)
