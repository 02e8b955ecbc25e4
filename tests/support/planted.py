"""Errors in adapter scale, resume and 4-bit weights, for `make verify` to find: a plugin of pytest, and of Axolotl."""

from typing import Any

import pytest
from axolotl.integrations.base import BasePlugin
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback


def scaled(model: Any) -> Any:
    """A model whose adapters have another scale."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {name: 1.1 * scale for name, scale in module.scaling.items()}
    return model


class Planted(BasePlugin):
    """Adapters of another scale, and weights that a resumed training does not take from its checkpoint."""

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        """Change the scale."""
        scaled(model)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """The callback that changes a weight."""
        return [Forget()]


class Forget(TrainerCallback):
    """Changes a weight of a resumed training."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Change it."""
        if state.global_step:
            next(weight for weight in kwargs["model"].parameters() if weight.requires_grad).data += 0.01


def pytest_collection_finish(session: pytest.Session) -> None:
    """Plant the errors."""
    import trainings

    forward, load, settings = Linear4bit.forward, PeftModel.from_pretrained, trainings.settings
    Linear4bit.forward = lambda self, inputs: 1.01 * forward(self, inputs)
    PeftModel.from_pretrained = lambda *given, **options: scaled(load(*given, **options))
    plugins = [*settings(trainings.SUPPORT, trainings.SUPPORT, 0)["plugins"], "planted.Planted"]
    trainings.settings = lambda *given, **changes: settings(*given, plugins=plugins, **changes)
    trainings.FORCE += ("--force", "foreign-code:plugins.1")
