"""Rehearsals whose cache is deleted: what they read from it is made again, the very same, or they are refused."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Recipe

from qlora_recipes.base import paths
from qlora_recipes.base.files import sha256
from qlora_recipes.configs import substitution
from qlora_recipes.running import run
from qlora_recipes.runs import launch
from qlora_recipes.runs.rundir import RunDir, all_runs
from qlora_recipes.scores.task import EvaluationRequest, EvaluationTask

NAME = "haider2024/llama-3.2-3b"


@pytest.fixture
def own_cache(tmp_path: Path, tiny: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, in which the tiny Llama is what the stand-in is converted to; and an Axolotl that trains
    nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(substitution, "_convert", lambda target: shutil.copytree(tiny, target))
    monkeypatch.setattr(launch, "AXOLOTL", stand_in.with_name("axolotl"))
    yield paths.cache()


def rehearsal(recipe: Recipe, place: Path, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> RunDir:
    with monkeypatch.context() as patch:
        if fails:
            patch.setenv("STAND_IN_NO_MEMORY", "6")
            patch.setattr(run, "_of_gpu", lambda *_: ())  # plans for seconds
        done = recipe("run", NAME, "--rehearse", "--set", "saves_per_epoch=4")
    assert done.returncode == fails, done.stderr
    return all_runs(place / "runs")[-1]


def adapter(run: RunDir) -> str:
    return sha256(run.output / "adapter_model.safetensors")


def test_it_goes_on_to_the_same_adapter_and_is_evaluated(
    own_cache: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rehearsal(recipe, tmp_path, monkeypatch)
    run = rehearsal(recipe, tmp_path, monkeypatch, fails=True)
    assert run.read().state == "failed" and run.last_checkpoint()
    shutil.rmtree(own_cache)
    resumed = recipe("resume", run.path)
    assert resumed.returncode == 0, resumed.stderr
    assert run.read().launches[-1].resumed_from
    assert adapter(run) == adapter(whole)
    before = EvaluationTask(whole, EvaluationRequest())
    shutil.rmtree(own_cache)
    after = EvaluationTask(whole, EvaluationRequest())
    assert (after.settings, after.rows) == (before.settings, before.rows)
    assert Path(after.settings.base_model).is_dir()


def test_a_run_whose_folder_was_moved_is_evaluated_too(
    own_cache: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = rehearsal(recipe, tmp_path, monkeypatch)
    before = EvaluationTask(run, EvaluationRequest())
    record = run.read()
    record.cwd = str(tmp_path / "former")
    run.write(record)
    shutil.rmtree(own_cache)
    after = EvaluationTask(run, EvaluationRequest())
    assert (after.settings, after.rows) == (before.settings, before.rows)
    shutil.rmtree(own_cache)
    record.data[0].path = record.data[0].path.replace("haider2024", "other")
    run.write(record)
    assert recipe("evaluate", run.path).returncode == 2


def test_what_comes_out_another_way_is_refused(
    own_cache: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = rehearsal(recipe, tmp_path, monkeypatch)
    (model,) = own_cache.glob(f"{substitution.NAME}*")
    (rows,) = own_cache.glob("sample-*")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    said = recipe("evaluate", run.path)
    assert (said.returncode, str(model) in said.stderr) == (2, True)
    shutil.rmtree(own_cache)
    record = run.read()
    record.data[0].sha256 = "0" * 64
    record.state = "interrupted"
    run.write(record)
    said = recipe("resume", run.path)
    assert (said.returncode, str(rows) in said.stderr, rows.exists()) == (2, True, False)
    record.data = []
    run.write(record)
    monkeypatch.setattr(substitution, "folder", lambda: own_cache / f"{substitution.NAME}-0.2")
    said = recipe("resume", run.path)
    assert (said.returncode, str(model) in said.stderr) == (2, True)


@pytest.mark.long
def test_the_stand_in_is_converted_to_the_same_bytes(tmp_path: Path) -> None:
    made = substitution.model_folder()
    substitution._convert(tmp_path / "again")
    again = {file.name: sha256(file) for file in (tmp_path / "again").iterdir()}
    assert again == {file.name: sha256(file) for file in made.iterdir()}
