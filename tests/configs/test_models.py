from pathlib import Path

import orjson
import pytest

from qlora_recipes.base.errors import UserError
from qlora_recipes.configs import models

NAME = "meta-llama/Llama-2-7b-hf"
PINNED = models.catalogue()[NAME]["revision"]
OTHER = "0" * 40


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one revision of a model, which has one layer there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / f"models--{NAME.replace('/', '--')}" / "snapshots" / OTHER
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(orjson.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    return folder


@pytest.mark.parametrize("key", ["revision_of_model", "model_revision"])
def test_facts_are_those_of_the_revision_that_a_config_names(snapshot: Path, key: str) -> None:
    for revision, layers in ((OTHER, 1), (PINNED, 32), (None, 32)):
        config = {"base_model": NAME, key: revision}
        assert models.architecture(config, download=False)["num_hidden_layers"] == layers
        assert models.find(config).layers == layers


def test_the_listed_facts_stand_in_for_a_revision_that_is_not_there(snapshot: Path) -> None:
    config = {"base_model": NAME, "revision_of_model": "1" * 40}
    assert models.architecture(config, download=False)["num_hidden_layers"] == 32
    with pytest.raises(UserError, match=r"the config.json of nobody/nothing is not available"):
        models.architecture({"base_model": "nobody/nothing"}, download=False)
