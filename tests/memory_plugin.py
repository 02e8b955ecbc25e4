"""An Axolotl plugin that records the storages of a real training's second step, as a plan does those of a fake one."""

import gc
import json
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

from qlora_recipes.planning.memory import Recorder


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in a module's parameters, 4-bit constants and buffers, or in an optimizer's state."""
    if isinstance(value, torch.nn.Module):
        parameters = list(value.parameters())
        states = [parameter.quant_state for parameter in parameters if getattr(parameter, "quant_state", None)]
        constants = [tensor for state in states for tensor in tensors_of(vars(state))]
        return [*parameters, *value.buffers(), *constants]
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for below in value.values() for tensor in tensors_of(below)]
    return tensors_of(vars(value)) if type(value).__name__ == "QuantState" else []


class _Count(TrainerCallback):
    def __init__(self, trainer: Any, file: Path):
        self.trainer, self.file, self.recorder = trainer, file, Recorder()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 1:
            return
        for tensor in tensors_of(self.trainer.model):
            self.recorder.add(tensor, "model")
        self.loaded = list(self.recorder.events)
        optimizer = self.trainer.optimizer
        for tensor in tensors_of(dict(getattr(optimizer, "optimizer", optimizer).state)):
            self.recorder.add(tensor, "optimizer")
        gc.collect()
        gc.disable()
        self.recorder.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 2:
            return
        self.recorder.__exit__(None, None, None)
        gc.enable()
        self.file.write_text(json.dumps({"loaded": self.loaded, "all": self.recorder.events}))


class MemoryPlugin(BasePlugin):
    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        return [_Count(trainer, Path(cfg.output_dir) / "memory.json")]
