import json
from pathlib import Path

import orjson
import pytest
from conftest import Recipe

from qlora_recipes.base.errors import UserError
from qlora_recipes.configs import models
from qlora_recipes.planning import lora
from qlora_recipes.planning.memory import trace
from qlora_recipes.planning.traces import Step


@pytest.mark.parametrize("name", [name for name in models.catalogue()])
def test_counts_are_those_of_peft(name: str) -> None:
    architecture = models.architecture({"base_model": name})
    small = architecture | {"num_hidden_layers": 2}
    for targets in lora.TARGETS.values():
        counts = trace(Step(model=json.dumps(small), rank=16, targets=targets), []).parameters
        assert sum(count["trainable"] for count in counts.values()) == lora.trainable(small, targets, 16)
        assert sum(count["frozen"] for count in counts.values()) == lora.total(small)


@pytest.mark.parametrize("key", ["revision_of_model", "model_revision"])
def test_sizes_are_those_of_the_configs_revision(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "a" * 40
    folder = tmp_path / "models--codellama--CodeLlama-7b-hf" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    config = {"base_model": "codellama/CodeLlama-7b-hf"}
    assert models.architecture(config | {key: commit})["num_hidden_layers"] == 3
    assert models.architecture(config)["num_hidden_layers"] == 32


def test_the_update_is_what_the_paper_says() -> None:
    for rank, alpha in ((32, 16), (4, 64)):
        assert max(lora.update_error(rank, alpha, 128).values()) < 1e-12


@pytest.mark.parametrize(
    ("architecture", "says"),
    [({"model_type": "gpt2"}, "model type gpt2"), ({"model_type": "llama"}, "lacks hidden_size")],
)
def test_other_models_are_refused(architecture: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        lora.linear_layers(architecture)


def test_the_command(recipe: Recipe, tmp_path: Path) -> None:
    done = recipe("analyze", "lora", "haider2024/llama-2-7b", "--json", "--figure", "l.svg")
    assert done.returncode == 0, done.stderr
    found = orjson.loads(done.stdout)
    (row,) = [row for row in found["parameters"] if (row["layers"], row["rank"]) == ("all linear", 32)]
    assert row["trainable"] == 79_953_920
    assert "<svg" in (tmp_path / "l.svg").read_text()
