"""Axolotl plugin that measures what the first of several ranks keeps: weights, gradients and optimizer state."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

from qlora_recipes.base.files import write_json

SHARDS = "shards.json"


class ShardPlugin(BasePlugin):
    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        return [Measure(trainer, Path(cfg.output_dir).parent / SHARDS)]


class Measure(TrainerCallback):
    """Writes the bytes by kind after the first step; gradients are measured before the optimizer frees them."""

    def __init__(self, trainer: Any, file: Path):
        self.trainer, self.file = trainer, file
        self.sizes: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """DeepSpeed's optimizer steps within the backward pass, so its step is wrapped."""
        zero = self._zero()
        if zero:
            step = zero.step

            def measured(*arguments: Any, **options: Any) -> Any:
                self.sizes["gradients"] = size(tensors(zero.averaged_gradients))
                return step(*arguments, **options)

            zero.step = measured

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._zero():
            self.sizes["gradients"] = size(weight.grad for weight in self.trainer.model.parameters())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        zero, model, optimizer = self._zero(), self.trainer.model, self.trainer.optimizer
        weights = [getattr(weight, "ds_tensor", weight) for weight in model.parameters()]
        copies: list[torch.Tensor] = []
        if zero:
            sharded = hasattr(zero, "fp32_partitioned_groups_flat")
            copies = zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups
            optimizer = zero
        state_of = getattr(optimizer, "optimizer", optimizer).state
        self.sizes |= {"weights": size(weights), "copies": size(copies), "state": size(tensors(dict(state_of)))}
        if state.is_world_process_zero:
            write_json(self.file, self.sizes)

    def _zero(self) -> Any:
        """DeepSpeed's optimizer, or None."""
        optimizer = getattr(self.trainer.model_wrapped, "optimizer", None)
        return optimizer if "Zero" in type(optimizer).__name__ else None


def size(values: Iterable[torch.Tensor | None]) -> int:
    """Bytes of this rank's part of tensors, each storage once."""
    parts = [getattr(value, "_local_tensor", value) for value in values if value is not None]
    storages = {part.untyped_storage()._cdata: part.untyped_storage().nbytes() for part in parts}
    return sum(storages.values())


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from tensors(below)
