"""Precision, beside what Axolotl's own code makes of the same settings; and settings of a training that repeats."""

import copy
import functools
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import config_with

from qlora_recipes.configs import numerics
from qlora_recipes.configs.numerics import Precision, precision

UNSET = object()
VALUES = {
    "bf16": (UNSET, True, False, "auto"),
    "fp16": (UNSET, True, False),
    "bfloat16": (UNSET, True),
    "float16": (UNSET, True),
    "load_in_8bit": (UNSET, True),
}
SETTINGS: list[dict[str, Any]] = [
    {key: value for key, value in zip(VALUES, values, strict=True) if value is not UNSET}
    for values in product(*VALUES.values())
]


@pytest.fixture(scope="module")
def validated() -> list[Any]:
    """The settings in a config, after Axolotl's validation, whose classes are made once, not for each."""
    from axolotl.utils import config
    from axolotl.utils.dict import DictDefault

    of_recipe = config_with({"fp16": None, "bf16": None, "adapter": "lora", "load_in_4bit": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "merge_input_args", functools.cache(config.merge_input_args))
        return [config.validate_config(DictDefault(of_recipe | settings)) for settings in SETTINGS]


def of_axolotl(validated: Any, on_gpu: bool) -> Precision | None:
    """What Axolotl's choice of dtypes and its arguments for transformers come to; None for arguments that transformers
    refuses."""
    from axolotl.core.builders.base import TrainerBuilderBase
    from axolotl.utils.config import resolve_dtype

    cfg = copy.deepcopy(validated)
    cfg.device = "cuda:0" if on_gpu else "cpu"
    resolve_dtype(cfg)
    arguments: dict[str, Any] = {}
    TrainerBuilderBase._configure_precision_settings(SimpleNamespace(cfg=cfg), arguments)
    if arguments["fp16"] and arguments["bf16"]:
        return None
    autocast = "bfloat16" if arguments["bf16"] else "float16" if arguments["fp16"] else None
    return Precision(str(cfg.torch_dtype).removeprefix("torch."), autocast)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_precision_is_what_axolotl_resolves(
    validated: list[Any], on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    supported = on_gpu  # torch reports bf16 as supported on every NVIDIA GPU, because it counts emulation
    monkeypatch.setattr("axolotl.utils.config.is_torch_bf16_gpu_available", lambda: supported)
    differ = {
        str(settings): (ours, theirs)
        for settings, cfg in zip(SETTINGS, validated, strict=True)
        if (theirs := of_axolotl(cfg, on_gpu)) and (ours := precision(settings, on_gpu)) != theirs
    }
    assert differ == {}


def test_the_environment_is_set_only_where_a_training_is_to_repeat() -> None:
    assert numerics.environment({numerics.DETERMINISM: True}) == {"PYTHONHASHSEED": "0"}
    assert numerics.environment({numerics.DETERMINISM: False}) == numerics.environment({}) == {}
