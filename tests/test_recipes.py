"""Every recipe passes the installed Axolotl's own validation for the cards it is meant for."""

from typing import Any

import pytest
from conftest import recipe_config

from qlora_recipes import config, paths, schema

TARGETS = {
    # Axolotl's probe says that Turing has bf16, because torch emulates it there
    "sm_75": {"bf16": True, "fp8": False, "tf32": False, "compute_capability": "sm_75"},
    "sm_90": {"bf16": True, "fp8": True, "tf32": True, "compute_capability": "sm_90"},
}


def validated(cfg: config.Config, target: str, gpus: int = 1) -> dict[str, Any]:
    import torch
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    capabilities = TARGETS[target] | {"n_gpu": gpus, "n_node": 1}
    environment = {"torch_version": torch.__version__.partition("+")[0]}
    return validate_config(DictDefault(cfg), capabilities=capabilities, env_capabilities=environment)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", paths.recipe_names())
def test_axolotl_validates_the_recipe(name: str, target: str) -> None:
    recipe = recipe_config(name)
    passed = validated(recipe, target)
    for key, value in config.flatten(recipe):
        of_result: Any = passed
        for part in key.split("."):
            of_result = of_result[int(part) if part.isdigit() else part]
        assert of_result == value, f"{key} came out of Axolotl's validation changed"


@pytest.mark.parametrize("name", paths.recipe_names())
def test_axolotl_validates_the_recipe_under_zero2(name: str) -> None:
    zero2 = config.read_yaml(paths.PROFILES / "zero2.yaml")
    assert list(schema.unknown_keys(zero2)) == []
    assert validated(config.merge(recipe_config(name), zero2), "sm_75", gpus=2)["deepspeed"] == zero2["deepspeed"]


def test_axolotls_validation_does_refuse() -> None:
    with pytest.raises(ValueError, match="load_in_4bit"):
        validated(recipe_config("haider2024/llama-2-7b") | {"load_in_4bit": False}, "sm_75")
