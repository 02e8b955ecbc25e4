"""Packed 4-bit weights beside DeepSpeed's own cast of a model to fp16."""

from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from conftest import recipe_config
from deepspeed import DeepSpeedEngine

from qlora_recipes.base import paths

IN_FP16 = [
    name for name in paths.recipe_names() if recipe_config(name).get("fp16") and recipe_config(name).get("load_in_4bit")
]


def under_fp16(storage: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A layer, and the same in 4 bits as fp16 training with DeepSpeed leaves it."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(256, 128, bias=False)
    layer = bnb.nn.Linear4bit(
        256, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4", quant_storage=getattr(torch, storage)
    )
    layer.load_state_dict(plain.state_dict())
    model = torch.nn.Sequential(layer).to("cpu")
    DeepSpeedEngine._cast_module_mixed_precision(SimpleNamespace(module=model), torch.float16, None, False)
    return plain, model


@pytest.mark.parametrize("name", IN_FP16)
def test_a_recipe_in_fp16_keeps_its_weights_under_deepspeed(name):
    plain, model = under_fp16(recipe_config(name)["bnb_config_kwargs"]["bnb_4bit_quant_storage"])
    inputs = torch.randn(8, 256)
    error = (model(inputs) - plain(inputs)).norm() / plain(inputs).norm()
    assert error < 0.15
