from pathlib import Path
from typing import Any
from unittest.mock import Mock

import orjson
import pytest
from conftest import SMALL, Recipe
from families import SHIPPED

from qlora_recipes.base.errors import UserError
from qlora_recipes.configs import models
from qlora_recipes.planning import lora

ATTENTION = {"Phi-3-mini-128k-instruct": ["qkv_proj", "o_proj"], "gemma-3-4b-it": [*models.ATTENTION, "out_proj"]}
FIRST = {"Phi-3-mini-128k-instruct": "qkv_proj"}


def here(architecture: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A config of a model in a folder that holds no more than its config.json."""
    (folder / "config.json").write_bytes(orjson.dumps(architecture))
    return {"base_model": str(folder)}


def with_peft(architecture: dict[str, Any], targets: Any, rank: int) -> tuple[int, int]:
    """Trainable and all parameters, as PEFT counts them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
        counted: tuple[int, int] = get_peft_model(
            model, LoraConfig(r=rank, target_modules=targets)
        ).get_nb_trainable_parameters()
    return counted


@pytest.mark.parametrize("name", SHIPPED)
def test_counts_are_those_of_peft_and_of_the_published_weights(name: str, tmp_path: Path) -> None:
    architecture, published = SHIPPED[name]
    assert lora.total(architecture) == published
    counted = {(row["layers"], row["rank"]): row for row in lora.rows({"m": here(architecture, tmp_path)})}
    assert {layers for layers, _ in counted} == {FIRST.get(name, "q, v"), "attention", "all linear"}
    for label, targets in (("attention", ATTENTION.get(name, models.ATTENTION)), ("all linear", "all-linear")):
        trainable, every = with_peft(architecture, targets, 32)
        assert counted[label, 32]["trainable"] == trainable
        assert every == published + trainable
        assert counted[label, 32]["share"] == trainable / every


def test_the_recipes_models_have_their_published_sizes() -> None:
    """As the safetensors on the hub have them; trained, as shared/paper.md and the notebook count them."""
    for name, every, trained in (
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616, 79_953_920),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248, 83_886_080),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, 48_627_712),  # with tied embeddings
    ):
        recipe = {"base_model": name, "lora_r": 32, "lora_target_linear": True}
        assert lora.total(models.architecture(recipe)) == every
        assert lora.share(recipe) == trained / (every + trained)


def test_counting_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = here(SMALL | {"hidden_size": 128}, tmp_path)
    with pytest.raises(UserError, match="analyze"):
        lora.rows({"m": config}, anew=False)
    counted = lora.rows({"m": config})
    monkeypatch.setattr(lora, "_count", Mock(side_effect=AssertionError))
    assert lora.rows({"m": config}, anew=False) == counted
    assert lora.total(SMALL | {"hidden_size": 128}) > 0


def test_the_share_is_that_of_the_configs_own_targets(tmp_path: Path) -> None:
    config = here(SMALL, tmp_path) | {"lora_r": 8}
    for targets in (["q_proj", "v_proj"], ["self_attn.q_proj", "mlp.down_proj"]):
        trainable, every = with_peft(SMALL, targets, 8)
        assert lora.share(config | {"lora_target_modules": targets}) == trainable / every
    for change in (
        {"lora_target_modules": ["c_attn"]},
        {"lora_target_modules": ".*q_proj"},
        {"lora_target_linear": True, "lora_modules_to_save": ["lm_head"]},
        {"lora_target_linear": True, "lora_r": None},
    ):
        assert lora.share(config | change) is None


def test_a_model_that_transformers_cannot_build_is_refused() -> None:
    with pytest.raises(UserError, match="nobody_knows"):
        lora.total({"model_type": "nobody_knows"})


def test_the_command(recipe: Recipe, tmp_path: Path) -> None:
    done = recipe("analyze", "lora", "haider2024/llama-2-7b", "--json", "--figure", "l.svg")
    assert done.returncode == 0, done.stderr
    found = orjson.loads(done.stdout)
    (row,) = [row for row in found["parameters"] if (row["layers"], row["rank"]) == ("all linear", 32)]
    assert row["trainable"] == 79_953_920
    assert "<svg" in (tmp_path / "l.svg").read_text()
