"""Every recipe passes the installed Axolotl's own validation for its card, and comes out of it as it is."""

import math
from typing import Any

import pytest
from conftest import recipe_config

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.config import gpus, merging
from qlora_recipes.config.training_settings import TrainingSettings


def validated(cfg: yamlfiles.Config, gpu: str) -> dict[str, Any]:
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    from qlora_recipes.training.validation import capabilities

    return validate_config(DictDefault(cfg), *capabilities(gpus.find_gpu(gpu)))


@pytest.mark.parametrize("name", paths.recipe_names())
def test_axolotl_validates_the_recipe(name):
    config = recipe_config(name)
    passed = validated(config, "H100" if config.get("bf16") else "T4")
    for key, value in merging.flatten(config):
        of_result: Any = passed
        for part in key.split("."):
            of_result = of_result[int(part) if part.isdigit() else part]
        assert of_result == value, f"{key} came out of Axolotl's validation changed"


@pytest.mark.parametrize(
    ("study", "rows", "steps"),
    [
        ("pissa-metamathqa", 100_000, {781: 24}),
        ("loraga-metamathqa", 100_000, {3125: 94}),
        ("loftq-gsm8k", 7_473, {701: 22, 351: 11}),
    ],
)
def test_a_warm_up_of_3_percent_is_rounded_up_as_by_the_authors_transformers(study, rows, steps):
    names = [name for name in paths.recipe_names() if name.startswith(f"{study}/")]
    stated = {TrainingSettings.of(cfg).steps(rows): cfg.get("warmup_steps") for cfg in map(recipe_config, names)}
    assert stated == steps == {count: math.ceil(0.03 * count) for count in steps}


def test_no_other_recipe_has_a_ratio_that_rounding_changes():
    configs = {name: recipe_config(name) for name in paths.recipe_names()}
    ratios = {name: config for name, config in configs.items() if config.get("warmup_ratio")}
    assert {name.partition("/")[0] for name in ratios} == {"peft-metamathqa", "zephyr"}
    steps = {cfg["warmup_ratio"] * (TrainingSettings.of(cfg).steps(20_000) or 0) for cfg in ratios.values()}
    assert steps == {500, 125, 0}  # zephyr's own are not known: packs, and pairs that are dropped
