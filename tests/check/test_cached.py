"""Rehearsals whose model is deleted from the cache: it is converted again to the same, or they are refused."""

import shutil
from pathlib import Path

import pytest
from conftest import Recipe
from run_folders import planned

from qlora_recipes.base import paths
from qlora_recipes.base.files import sha256
from qlora_recipes.config import substitution
from qlora_recipes.run.rundir import RunDir, all_runs

NAME = "haider2024/llama-3.2-3b"


@pytest.fixture
def own_cache(tmp_path: Path, tiny: Path, with_fake_axolotl: Recipe, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which the tiny Llama is what the small model is converted to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(substitution, "_convert", lambda target: shutil.copytree(tiny, target))
    return paths.cache()


def rehearsal(recipe: Recipe, place: Path, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> RunDir:
    with monkeypatch.context() as patch:
        if fails:
            patch.setenv("FAKE_NO_MEMORY", "6")
        done = recipe("run", NAME, "--rehearse", "--set", "saves_per_epoch=4")
    assert done.returncode == fails, done.stderr
    return all_runs(place / "runs")[-1]


def forget_model(cache: Path) -> Path:
    (model,) = cache.glob(f"{substitution.NAME}*")
    shutil.rmtree(model)
    return model


def adapter(run: RunDir) -> str:
    return sha256(run.output / "adapter_model.safetensors")


def test_it_goes_on_to_the_same_adapter_and_is_evaluated(own_cache, recipe, tmp_path, monkeypatch):
    undisturbed = rehearsal(recipe, tmp_path, monkeypatch)
    run = rehearsal(recipe, tmp_path, monkeypatch, fails=True)
    assert run.read().state == "failed" and run.last_checkpoint()
    forget_model(own_cache)
    recipe.ok("resume", run.path)
    assert run.read().launches[-1].resumed_from
    assert adapter(run) == adapter(undisturbed)
    before, rows = planned(undisturbed, adapter=None)
    forget_model(own_cache)
    after, rows_after = planned(undisturbed, adapter=None)
    assert after.settings == before.settings
    assert rows_after == rows
    assert Path(after.settings.base_model).is_dir()


@pytest.mark.long
def test_the_small_model_is_converted_to_the_same_bytes(tmp_path):
    folder = substitution.model_folder()
    substitution._convert(tmp_path / "again")
    again = {file.name: sha256(file) for file in (tmp_path / "again").iterdir()}
    assert again == {file.name: sha256(file) for file in folder.iterdir()}
