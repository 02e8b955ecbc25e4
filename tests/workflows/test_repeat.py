"""Real trainings by Axolotl, made to repeat bit for bit."""

import pytest
from conftest import finish, start

from qlora_recipes.base.files import sha256
from qlora_recipes.runs.rundir import RunDir

SETTINGS = ["datasets.0.split=train[:16]", "gradient_accumulation_steps=2", "num_epochs=2", "evals_per_epoch=1"]
NAME = "haider2024/llama-2-7b"


def losses(run: RunDir) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in run.read_metrics() if "loss" in record]


@pytest.mark.long
def test_two_trainings_are_equal_to_the_last_bit(recipe, tmp_path, tiny):
    sets = [word for text in (*SETTINGS, f"base_model={tiny}") for word in ("--set", text)]
    words = ("run", NAME, "--rehearse", "--profile", "deterministic", *sets)
    one, again = (RunDir(tmp_path / finish(start(tmp_path, *words))) for _ in range(2))
    assert len(losses(one)) == 8
    assert losses(one) == losses(again)
    for file in ("adapter_model.safetensors", "adapter_config.json", "checkpoint-8/optimizer.pt"):
        assert sha256(one.output / file) == sha256(again.output / file), file
    made = recipe.json("results", one.path, again.path)["training"]
    assert (made["step"], made["last"], made["differences"]) == (None, 8, {})
