"""Disk space of the checkpoints of a training."""

import math
from dataclasses import dataclass

from ..base.yamlfiles import Config
from ..config import datafiles
from ..config.training_settings import KEPT_CHECKPOINTS, TrainingSettings
from .step_plan import Memory


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a training.

    Attributes:
        size: bytes of one, without its small files; DeepSpeed's and FSDP's are larger.
        most: the largest number on the disk at a time.
        least: as `most`, but 1 if the number of saves is unknown.
    """

    size: int
    most: int
    least: int


def checkpoints(config: Config, memory: Memory, gpus: int = 1) -> Checkpoints:
    """Checkpoints of a config, each with adapter and optimizer state; the oldest is deleted after a save.

    See `_save_checkpoint` in transformers/trainer.py, and `_configure_save_and_eval_strategy` in Axolotl's
    core/builders/base.py.
    """
    parts = memory.usage.parts
    size = parts.get("adapters", 0)
    if not config.get("save_only_model"):
        size += parts.get("optimizer", 0) + memory.paged
    limit = (config.get("save_total_limit") or KEPT_CHECKPOINTS) + 1
    saves = _saves(config, gpus)
    if saves is None:
        return Checkpoints(size, limit, 1)
    return Checkpoints(size, min(limit, saves), min(limit, saves))


def _saves(config: Config, gpus: int) -> int | None:
    """Number of checkpoints that a training saves; None if unknown."""
    settings = TrainingSettings.of(config)
    if config.get("save_steps"):
        share = config["save_steps"]
        if share >= 1:
            share /= datafiles.training_steps(config, gpus) or math.inf
        return math.ceil(1 / share) if share else None
    if config.get("saves_per_epoch"):
        return max(int(config["saves_per_epoch"] * settings.num_epochs), 1)
    if config.get("save_strategy") == "no":
        return 0
    if config.get("save_strategy") in (None, "epoch") and not settings.max_steps:
        return math.ceil(settings.num_epochs)
    return None
