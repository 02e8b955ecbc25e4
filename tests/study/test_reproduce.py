"""A study's recipe with a tiny Llama, through the command, from data to its table."""

import io
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import SAMPLE, Recipe, recipe_config, typed
from file_server import Server, serving

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.config import compose, datafiles
from qlora_recipes.config.compose import Composed, Request
from qlora_recipes.data import studies
from qlora_recipes.data.declaration import DataSource, SourceFile
from qlora_recipes.evaluate import scores_file
from qlora_recipes.evaluate.evaluate import EvaluationRequest
from qlora_recipes.metrics import registry
from qlora_recipes.run import rundir
from qlora_recipes.run.backends import Local, TaskResult
from qlora_recipes.study import reproduce

STUDY = studies.find("haider2024")
ONE = "haider2024/llama-3.2-3b"


def reproduced(recipe: Recipe, profile: Path) -> dict[str, Any]:
    profiles = ("--profile", "rehearsal", "--profile", profile)  # of another model, only rehearsals are in the table
    return recipe.json("reproduce", "haider2024", "--only", ONE, "--metric", "bertscore:none", *profiles)


def test_all_steps_are_done_and_the_table_is_there_and_again_it_does_nothing(
    recipe, tmp_path, tiny_profile, fake_axolotl, monkeypatch
):
    monkeypatch.setattr(sys, "executable", str(fake_axolotl.with_name("python")))  # of the commands that it starts
    printed = reproduced(recipe, tiny_profile)
    (row,) = printed["steps"]
    assert row["check"] == "done"
    assert row["run"] == "done"
    assert row["evaluate"] == "done"
    assert row["problem"] is None
    assert row["plan"].endswith("GiB")
    (scored,) = [row for row in printed["results"] if row["bleu4"] is not None]
    (run,) = rundir.all_runs(tmp_path / "runs")
    own = scores_file.read_scores(run.path)
    assert own and (scored["recipe"], scored["bleu4"]) == (ONE, own.scores["bleu4"].value)
    assert len(scores_file.read_predictions(run.path)) == 12

    def files() -> dict[Path, int]:
        every = (file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock")
        return {file: file.stat().st_mtime_ns for file in every}

    before = files()
    again = reproduced(recipe, tiny_profile)
    assert all(set(row.values()) == {row["recipe"], "skipped", None} for row in again["steps"])
    assert again["results"] == printed["results"]
    assert files() == before


def test_a_dry_run_says_what_would_be_done_and_for_how_long_and_writes_nothing(recipe, tmp_path, tiny):
    small = {"base_model": str(tiny), "revision_of_model": None, "special_tokens": None}
    (tmp_path / "small.yaml").write_text(yamlfiles.write_yaml(small))
    words = ("reproduce", "haider2024", "--dry-run", "--only", "llama-3.2-3b", "--profile", "small.yaml")
    words += ("--set", "num_epochs=5", "--gpu", "T4")
    outline = recipe.json(*words, "--set", "lora_rr=1", "--set", "bf16=true", code=2)
    fetched, prepared = outline["data"]
    assert re.search("data/codereviewer-raw: .* 847 MB .* https://zenodo.org/", fetched)
    assert re.search("data/codereviewer: .* diff", prepared)
    (row,) = outline["recipes"]
    assert row["training"] == "refused"
    assert row["steps"] is None
    assert "lora_rr: None -> 1 " in row["changes"]
    assert "--set lora_rr=1: error" in row["problem"] and ": bf16: T4 (sm_75) " in row["problem"]
    row, other = recipe.json(*words, "--seeds", "2")["recipes"]
    assert row["steps"] == 73587
    assert row["fits"] == "T4: yes"
    assert other["steps"] == 73587
    assert 0 < row["needs GiB"] < 1 and row["hours"] > 0
    assert [file.name for file in tmp_path.iterdir()] == ["small.yaml"]


def test_a_dry_run_of_several_seeds_lists_each(recipe, tmp_path):
    words = ("reproduce", "haider2024", "--dry-run", "--rehearse", "--only", "3.2-3b", "--seeds", "3")
    rows = recipe.json(*words)["recipes"]
    assert [row["recipe"] for row in rows] == [f"haider2024/llama-3.2-3b, seed {seed}" for seed in (42, 43, 44)]
    epochs = recipe_config("haider2024/llama-3.2-3b")["num_epochs"]
    assert {row["steps"] for row in rows} == {4 * epochs}
    twice = recipe(*words, "--set", "seed=7")
    assert twice.returncode == 2
    assert "--seeds: " in twice.stderr
    recipe.fails(*words[:-1], "0")


@pytest.mark.parametrize("word", ["llama-3.*", "haider2024/llama-3.*"])
def test_a_pattern_chooses_several_recipes(word):
    several = ["haider2024/llama-3.1-8b", "haider2024/llama-3.2-3b"]
    assert reproduce.selected_recipes(STUDY, [word, "3.1"]) == several
    assert reproduce.selected_recipes(STUDY, ["llama-3-8b"]) == ["haider2024/llama-3-8b"]
    with pytest.raises(UserError, match=r"--only llama-3: matches .*; give more of the name"):
        reproduce.selected_recipes(STUDY, ["llama-3"])


def test_of_several_seeds_the_first_that_ended_speaks():
    results = [TaskResult("a", seed=1), TaskResult("a", seed=2, run=Path("2")), TaskResult("a", seed=3, run=Path("3"))]
    assert reproduce.representative_runs([*results, TaskResult("b")]) == {"a": Path("2"), "b": None}


@pytest.mark.long
def test_what_a_recipe_starts_from_is_still_to_be_fetched_and_no_reason_to_refuse_it(recipe):
    outlined = recipe.json("reproduce", "loftq-gsm8k", "--only", "llama-2-7b-loftq", "--dry-run")
    assert "lora_model_dir" not in str(outlined["recipes"][0]["problem"])
    assert outlined["data"][0].startswith("data/gsm8k-raw: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no-gpu"),
        (["--rehearse", "--set", "lora_rr=3"], "lora_rr: "),
        (["--rehearse", "--dry-run", "--only", ONE, "--force", "tpyo"], "--force tpyo: "),
    ],
)
def test_a_wrong_request_starts_nothing(recipe, tmp_path, words, says):
    done = recipe("reproduce", "haider2024", *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert rundir.all_runs(tmp_path / "runs") == [] and not (tmp_path / "data").exists()


@pytest.fixture
def server(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as stream:
        for file in SAMPLE.glob("msg-*.jsonl"):
            stream.write(file, f"Comment_Generation/{file.name}")
    with serving(monkeypatch) as orders:
        orders.content = content.getvalue()
        yield orders


@pytest.fixture
def published_data(server: Server) -> studies.Study:
    files = {file.name: SourceFile(rows=datafiles.count_rows(file)) for file in SAMPLE.glob("msg-*.jsonl")}
    sources = {"Comment_Generation.zip": DataSource(url=server.url, files=files)}
    return STUDY.model_copy(update={"data": STUDY.data.model_copy(update={"sources": sources})})


def composed(*recipes: str, **more: Any) -> list[Composed]:
    return [compose.compose(Request(f"haider2024/{name}", **more)) for name in recipes]


def test_data_is_fetched_and_prepared_in_the_forms_that_recipes_read_and_only_once(published_data):
    reproduce.have_data(published_data, composed("llama-2-7b"))
    assert sorted(file.name for file in Path("data").iterdir()) == ["codereviewer", "codereviewer-raw"]
    both = composed("llama-2-7b", "as-released/llama-3-8b")
    reproduce.have_data(published_data, both)
    assert "<add>" in Path("data/codereviewer-tagged/train.jsonl").read_text()
    before = {file: file.stat().st_mtime_ns for file in Path("data").rglob("*.jsonl")}
    reproduce.have_data(published_data, both)
    assert before == {file: file.stat().st_mtime_ns for file in Path("data").rglob("*.jsonl")}


def test_an_adapter_that_a_recipe_starts_from_is_fetched_beside_its_rows(published_data, server):
    server.files["adapter_config.json"] = b"{}"
    url = server.url.replace("Comment_Generation.zip", "adapter_config.json")
    published_data.data.sources["init/adapter_config.json"] = DataSource(url=url)
    reproduce.have_data(published_data, composed("llama-2-7b"))
    assert not Path("data/codereviewer-raw/init").exists()
    start = composed("llama-2-7b", overrides=typed("lora_model_dir=data/codereviewer-raw/init"))
    (line,) = reproduce._outlined_data(published_data, start)
    assert line.startswith("data/codereviewer-raw: ") and line.endswith(" https://zenodo.org/records/6900648")
    reproduce.have_data(published_data, start)
    assert Path("data/codereviewer-raw/init/adapter_config.json").read_text() == "{}"
    assert reproduce._outlined_data(published_data, start) == []
    published_data.data.sources["own/adapter_config.json"] = DataSource()
    start = composed("llama-2-7b", overrides=typed("lora_model_dir=data/codereviewer-raw/own"))
    (line,) = reproduce._outlined_data(published_data, start)
    assert "own/adapter_config.json" in line and "https" not in line


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: (data / "valid.jsonl").write_text(""), "valid.jsonl .*manifest.json"),
        (lambda data: (data / "manifest.json").unlink(), "manifest.json .*train.jsonl"),
        (lambda data: change(data, "train", fields={"input": "oldf"}), r"train\.jsonl .*format"),
        (lambda data: change(data, "train", is_the_study_file=False), r"train\.jsonl .*file"),
        (lambda data: change(data, "test", left_out={}), "test-subset-1.jsonl"),
    ],
)
def test_data_that_is_not_the_studys_is_refused_and_left_as_it_is(published_data, spoil, says):
    reproduce.have_data(published_data, composed("llama-2-7b"))
    folder = Path("data/codereviewer")
    spoil(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match=says):
        reproduce.have_data(published_data, composed("llama-2-7b"))
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_data_whose_preparation_was_killed_is_prepared_again(published_data):
    reproduce.have_data(published_data, composed("llama-2-7b"))
    folder = Path("data/codereviewer")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "train.jsonl").rename(folder / ".train.jsonl.0123456789abcdef.part")
    reproduce.have_data(published_data, composed("llama-2-7b"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def change(folder: Path, split: str, **values: object) -> None:
    manifest = orjson.loads((folder / "manifest.json").read_bytes())
    manifest["splits"][split] |= values
    (folder / "manifest.json").write_bytes(orjson.dumps(manifest))


def test_a_mirror_is_taken_where_a_model_is_gated():
    shared = Request("", ["mirr", "fast"])
    mirrored = {name: reproduce.request_for(shared, name).profiles for name in STUDY.published}
    assert mirrored.pop("haider2024/code-llama-7b") == ["fast"]
    assert all(profiles == ["mirr", "fast"] for profiles in mirrored.values())


def test_several_scorer_models_are_not_replaced_by_one(monkeypatch):
    monkeypatch.setattr(reproduce, "selected_recipes", lambda *_: [])
    for models, metrics in (("aa", ["bertscore:a"]), ("ab", [])):
        columns = {f"of_{i}": {"metric": "bertscore_f1", "model": model} for i, model in enumerate(models)}
        of_study, asked = STUDY.model_copy(update={"columns": registry.columns(columns)}), EvaluationRequest()
        reproduce.reproduce(of_study, Request("x"), [], asked, Local(False))
        assert list(asked.metrics) == metrics


def test_a_judge_that_is_not_there_is_told_before_anything_starts(recipe, tmp_path, tiny_profile):
    done = recipe(
        "reproduce", "haider2024", "--only", ONE, "--profile", tiny_profile, "--metric", "bertscore:some/nowhere"
    )
    assert done.returncode == 1
    assert "some/nowhere" in done.stderr
    assert rundir.all_runs(tmp_path / "runs") == []
