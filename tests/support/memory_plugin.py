"""Axolotl plugin that measures the memory of a training, and stops it after a step.

The environment variable `STOP` names the step to stop after. Figures go to `MEMORY` beside the output folder.
"""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback

from qlora_recipes.base.files import write_json
from qlora_recipes.plan.allocator import Events
from qlora_recipes.plan.cuda import Recorder

SHARE = 0.9
"""Most of the GPU's free memory that a training takes, so that other programs on it go on."""
MEMORY, BEGUN = "memory.json", "begun.json"
"""The files of what was measured, and of the step that the last launch began after."""
STOP = "STOP_AFTER_STEP"
MEASURED = 1  # the step that is measured, from 0: it has the optimizer's state, which the first one makes


class MemoryPlugin(BasePlugin):
    def pre_model_load(self, cfg: Any) -> None:
        cap_memory()

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """The callback that measures; not where several ranks divide the training."""
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        return [Measure(trainer, Path(cfg.output_dir).parent / MEMORY)] if alone else []


def cap_memory() -> None:
    """Let this process's allocator take at most `SHARE` of what is free on its GPU."""
    if torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", "0"))
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(SHARE * free / total, device)


class Measure(TrainerCallback):
    """Writes the memory of the second step of a training and of its evaluations, and the scale of its adapters.

    On a CPU storages are recorded by the means of a plan's, so that both can be compared byte by byte.
    """

    def __init__(self, trainer: Any, file: Path):
        self.trainer, self.file = trainer, file
        self.stop = int(os.environ.get(STOP, "0"))
        self.recorder: Recorder | None = None
        self.loaded = 0
        self.figures: dict[str, Any] = {}
        evaluate = trainer.evaluation_loop

        def measured(*arguments: Any, **options: Any) -> Any:
            self._begin()
            result = evaluate(*arguments, **options)
            write_json(self.file, self.figures | {"evaluation": self._end()})
            return result

        trainer.evaluation_loop = measured

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_json(self.file.with_name(BEGUN), {"step": state.global_step})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to measure, and ask for the stop, as a scheduler or Ctrl-C does, while the step goes on."""
        if self.stop == state.global_step + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if state.global_step == MEASURED:
            self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == MEASURED + 1:
            self.figures = self._end()
            write_json(self.file, self.figures)

    def _begin(self) -> None:
        tensors = list(_of_module(self.trainer.model))
        if getattr(self.trainer, "ref_model", None):
            tensors += _of_module(self.trainer.ref_model)
        storages = [tensor.untyped_storage() for tensor in tensors]
        self.loaded = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        optimizer = self.trainer.optimizer
        self.recorder = Recorder()
        for tensor in (*tensors, *_tensors(dict(getattr(optimizer, "optimizer", optimizer).state))):
            self.recorder.add(tensor, "held")
        gc.disable()  # so that what is in a cycle is freed at the same place as in a plan
        self.recorder.__enter__()

    def _end(self) -> dict[str, Any]:
        if self.recorder:
            self.recorder.__exit__(None, None, None)
            gc.enable()
            memory = {"allocated": peak(self.recorder.events)}
        else:
            memory = {
                "allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
                "free": torch.cuda.mem_get_info()[0],
            }
        model = self.trainer.model
        trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        scales = sorted({float(scale) for layer in layers for scale in layer.scaling.values()})
        return memory | {"loaded": self.loaded, "trainable": trainable, "scales": scales}


def peak(events: Events) -> int:
    """The most bytes of storages that are there at one time, not rounded to any allocator's blocks."""
    live: dict[int, int] = {}
    total = most = 0
    for storage, size in events:
        total += size if size >= 0 else -live.pop(storage, 0)
        if size >= 0:
            live[storage] = size
        most = max(most, total)
    return most


def _of_module(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    for tensor in (*module.parameters(), *module.buffers()):
        yield tensor
        yield from _tensors(getattr(tensor, "quant_state", None))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an optimizer's state, or in 4-bit weights' constants."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for below in value.values():
            yield from _tensors(below)
    elif type(value).__name__ == "QuantState":
        yield from _tensors(vars(value))
