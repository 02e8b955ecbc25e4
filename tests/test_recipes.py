"""Every recipe passes the installed Axolotl's own validation for its card, and comes out of it as it is."""

from typing import Any

import pytest
from conftest import recipe_config

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.configs import config, gpus


def validated(cfg: yamlfiles.Config, gpu: str) -> dict[str, Any]:
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    from qlora_recipes.checks.installed import capabilities

    return validate_config(DictDefault(cfg), *capabilities(gpus.find(gpu)))


@pytest.mark.parametrize("name", paths.recipe_names())
def test_axolotl_validates_the_recipe(name):
    recipe = recipe_config(name)
    passed = validated(recipe, "H100" if recipe.get("bf16") else "T4")
    for key, value in config.flatten(recipe):
        of_result: Any = passed
        for part in key.split("."):
            of_result = of_result[int(part) if part.isdigit() else part]
        assert of_result == value, f"{key} came out of Axolotl's validation changed"
