"""Errors in adapter scale and 4-bit weights, for `make verify` to find: a plugin of pytest, and of Axolotl."""

from typing import Any

import pytest
from axolotl.integrations.base import BasePlugin
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer


def scaled(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {name: 1.1 * scale for name, scale in module.scaling.items()}
    return model


class Planted(BasePlugin):
    """Adapters of another scale."""

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        scaled(model)


def pytest_collection_finish(session: pytest.Session) -> None:
    import trainings

    forward, load, settings = Linear4bit.forward, PeftModel.from_pretrained, trainings.settings
    Linear4bit.forward = lambda self, inputs: 1.01 * forward(self, inputs)
    PeftModel.from_pretrained = lambda *arguments, **options: scaled(load(*arguments, **options))
    plugins = [*settings(trainings.SUPPORT, trainings.SUPPORT, 0)["plugins"], "planted.Planted"]
    trainings.settings = lambda *arguments, **changes: settings(*arguments, plugins=plugins, **changes)
    trainings.FORCE += ("--force", "foreign-code:plugins.1")
