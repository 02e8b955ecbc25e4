"""A study's recipe with a tiny Llama, through the command, from data to its table."""

import io
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
from qlora_recipes.metrics import registry
from qlora_recipes.run import rundir
from qlora_recipes.run.backends import TaskResult
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
    evaluation = scores_file.read_scores(run.path)
    assert evaluation
    assert scored["recipe"] == ONE
    assert scored["bleu4"] == evaluation.scores["bleu4"].value
    assert len(scores_file.read_predictions(run.path)) == 12

    def files() -> dict[Path, int]:
        written = (file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock")
        return {file: file.stat().st_mtime_ns for file in written}

    before = files()
    again = reproduced(recipe, tiny_profile)
    (row,) = again["steps"]
    assert set(row.values()) == {ONE, "skipped", None}
    assert again["results"] == printed["results"]
    assert files() == before


@pytest.fixture
def dry_run(tmp_path: Path, tiny: Path) -> list[str]:
    """Words of a dry run for a tiny model."""
    small = {"base_model": str(tiny), "revision_of_model": None, "special_tokens": None}
    (tmp_path / "small.yaml").write_text(yamlfiles.write_yaml(small))
    return ["reproduce", "haider2024", "--dry-run", "--only", ONE, "--profile", "small.yaml", "--gpu", "T4"]


def test_a_dry_run_lists_data_and_errors(recipe, dry_run):
    outline = recipe.json(*dry_run, "--set", "lora_rr=1", code=2)
    assert outline["data"] == [
        "data/codereviewer-raw: to be fetched, 847 MB or more from https://zenodo.org/records/6900648",
        "data/codereviewer: to be prepared, in the format diff",
    ]
    (row,) = outline["recipes"]
    assert row["training"] == "refused"
    assert row["steps"] is None
    assert row["changes"] == "lora_rr: None -> 1  (--set lora_rr=1)"
    unknown = "lora_rr: unknown to Axolotl; did you mean lora_r or lora_dropout? [unknown-key:lora_rr]"
    assert row["problem"] == f"--set lora_rr=1: error: {unknown}"


def test_a_dry_run_plans_each_seed_and_writes_nothing(recipe, tmp_path, dry_run):
    outline = recipe.json(*dry_run, "--set", "num_epochs=5", "--seeds", "2")
    row, other = outline["recipes"]
    assert row["steps"] == 73587
    assert row["fits"] == "T4: yes"
    assert other["steps"] == 73587
    assert 0 < row["needs GiB"] < 1
    assert row["hours"] > 0
    assert [file.name for file in tmp_path.iterdir()] == ["small.yaml"]


def test_a_dry_run_rounds_hours_and_adds_up_downloads(capsys):
    row = {"recipe": "a", "training": "new", "hours": 288.93, "full_rows": True}
    other = {"recipe": "b", "training": "new", "hours": 1.02, "full_rows": False}
    quick = {"recipe": "c", "training": "new", "hours": 0.0083, "full_rows": False, "note": "9 hours without a GPU"}
    outline = {"data": ["data/raw: to be fetched"], "recipes": [row, other, quick]}
    reproduce.show_outline(outline | {"models": {"owner/seven": 13.48, "owner/eight": 16.06}}, json=False)
    assert capsys.readouterr().out.splitlines() == [
        "recipe  training  hours             note",
        "a       new       288.9, full rows  –",
        "b       new       1.0               –",
        "c       new       under 0.01        9 hours without a GPU",
        "data: data/raw: to be fetched",
        "models: owner/seven, owner/eight: to be fetched, about 30 GB in 16 bits",
        "runs: 3, each trained and evaluated unless finished; training takes about 290.0 hours in all",
    ]


def test_a_dry_run_prints_a_warning_of_several_recipes_once(recipe):
    done = recipe.ok("reproduce", "loftq-gsm8k", "--dry-run", "--only", "llama-2-7b-lora", "--only", "llama-3-8b-lora",
                     "--only", "llama-2-7b-qlora")  # fmt: skip
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert [line.partition(" is ")[0] for line in warnings] == [
        "loftq-gsm8k: warning: base_model: meta-llama/Llama-2-7b-hf",
        "loftq-gsm8k: warning: base_model: meta-llama/Meta-Llama-3-8B",
    ]


def test_a_dry_run_names_the_hours_without_a_gpu(recipe):
    words = ("reproduce", "axolotl-alpaca2k", "--dry-run", "--only", "tinyllama-qlora")
    (row,) = recipe.json(*words, "--force", "no-gpu")["recipes"]
    assert row["training"] == "new"
    assert row["note"] == (
        "without a GPU, add --force no-gpu; it then takes a night, about 5 hours on two cores (docs/first-gpu-run.md)"
    )
    (row,) = recipe.json(*words, "--rehearse")["recipes"]
    assert row["note"] is None


def test_a_dry_run_of_several_seeds_lists_each(recipe, tmp_path):
    words = ("reproduce", "haider2024", "--dry-run", "--rehearse", "--only", "3.2-3b", "--seeds", "3")
    rows = recipe.json(*words)["recipes"]
    assert [row["recipe"] for row in rows] == [f"haider2024/llama-3.2-3b, seed {seed}" for seed in (42, 43, 44)]
    epochs = recipe_config("haider2024/llama-3.2-3b")["num_epochs"]
    assert {row["steps"] for row in rows} == {4 * epochs}


@pytest.mark.parametrize("word", ["llama-3.*", "haider2024/llama-3.*"])
def test_a_pattern_chooses_several_recipes(word):
    several = ["haider2024/llama-3.1-8b", "haider2024/llama-3.2-3b"]
    assert reproduce.selected_recipes(STUDY, [word, "3.1"]) == several
    assert reproduce.selected_recipes(STUDY, ["llama-3-8b"]) == ["haider2024/llama-3-8b"]
    with pytest.raises(UserError) as refused:
        reproduce.selected_recipes(STUDY, ["llama-3"])
    names = ("as-released/llama-3-8b", "llama-3-8b", "llama-3.1-8b", "llama-3.2-3b")
    matches = ", ".join(f"haider2024/{name}" for name in names)
    assert str(refused.value) == f"--only llama-3: matches {matches}; give more of the name"


def test_the_finished_run_with_the_first_seed_represents_a_recipe():
    results = [TaskResult("a", seed=1), TaskResult("a", seed=2, run=Path("2")), TaskResult("a", seed=3, run=Path("3"))]
    assert reproduce.representative_runs([*results, TaskResult("b")]) == {"a": Path("2"), "b": None}


@pytest.mark.long
def test_what_a_recipe_starts_from_is_still_to_be_fetched_and_no_reason_to_refuse_it(recipe):
    outlined = recipe.json("reproduce", "loftq-gsm8k", "--only", "llama-2-7b-loftq", "--dry-run")
    assert "lora_model_dir" not in str(outlined["recipes"][0]["problem"])
    assert outlined["data"][0].startswith("data/gsm8k-raw: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["--set", "lora_rr=3"],
            "no recipe of the study has been rehearsed yet; run `recipe reproduce STUDY --rehearse`\n"
            f"{ONE}: --set lora_rr=3: error: lora_rr: unknown to Axolotl; did you mean lora_r or lora_dropout? "
            "[unknown-key:lora_rr]\n",
            id="unknown key",
        ),
        pytest.param(
            ["--dry-run", "--force", "tpyo"],
            f"planning {ONE}\n"
            "recipe: --force tpyo: this config has no such error; errors show their names in brackets\n",
            id="unknown error",
        ),
        pytest.param(
            ["--seeds", "2", "--set", "seed=7"],
            "recipe: --seeds: seed is already set; give only one of the two\n",
            id="seed twice",
        ),
    ],
)
def test_a_wrong_request_starts_nothing(recipe, tmp_path, words, message):
    done = recipe.fails("reproduce", "haider2024", "--rehearse", "--only", ONE, *words)
    assert done.stderr == message
    assert not (tmp_path / "data").exists()
    assert rundir.all_runs(tmp_path / "runs") == []


def test_without_a_gpu_no_recipe_is_started(recipe, tmp_path):
    done = recipe.fails("reproduce", "haider2024", "--only", ONE)
    assert done.stderr.endswith("error: no NVIDIA GPU found; a CPU is too slow; add --rehearse for a trial [no-gpu]\n")
    assert rundir.all_runs(tmp_path / "runs") == []


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
    reproduce.ensure_data(published_data, composed("llama-2-7b"))
    assert sorted(file.name for file in Path("data").iterdir()) == ["codereviewer", "codereviewer-raw"]
    both = composed("llama-2-7b", "as-released/llama-3-8b")
    reproduce.ensure_data(published_data, both)
    assert "<add>" in Path("data/codereviewer-tagged/train.jsonl").read_text()
    before = {file: file.stat().st_mtime_ns for file in Path("data").rglob("*.jsonl")}
    reproduce.ensure_data(published_data, both)
    assert before == {file: file.stat().st_mtime_ns for file in Path("data").rglob("*.jsonl")}


def test_an_adapter_that_a_recipe_starts_from_is_fetched_beside_its_rows(published_data, server):
    server.files["adapter_config.json"] = b"{}"
    url = server.url.replace("Comment_Generation.zip", "adapter_config.json")
    published_data.data.sources["init/adapter_config.json"] = DataSource(url=url)
    reproduce.ensure_data(published_data, composed("llama-2-7b"))
    assert not Path("data/codereviewer-raw/init").exists()
    start = composed("llama-2-7b", overrides=typed("lora_model_dir=data/codereviewer-raw/init"))
    assert reproduce._outlined_data(published_data, start) == [
        "data/codereviewer-raw: to be fetched, of unknown size, from https://zenodo.org/records/6900648"
    ]
    reproduce.ensure_data(published_data, start)
    assert Path("data/codereviewer-raw/init/adapter_config.json").read_text() == "{}"
    assert reproduce._outlined_data(published_data, start) == []
    published_data.data.sources["own/adapter_config.json"] = DataSource()
    start = composed("llama-2-7b", overrides=typed("lora_model_dir=data/codereviewer-raw/own"))
    assert reproduce._outlined_data(published_data, start) == [
        "data/codereviewer-raw: copy own/adapter_config.json there; study.yaml has no URL for it"
    ]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(
            lambda data: (data / "valid.jsonl").write_text(""),
            "valid.jsonl is missing or differs from its checksum in manifest.json",
            id="other rows",
        ),
        pytest.param(
            lambda data: (data / "manifest.json").unlink(), "manifest.json lists no train.jsonl", id="no manifest"
        ),
        pytest.param(
            lambda data: change(data, "train", fields={"input": "oldf"}),
            "train.jsonl was prepared with another input format, other raw files, expressions or settings",
            id="other fields",
        ),
        pytest.param(
            lambda data: change(data, "train", is_the_study_file=False),
            "train.jsonl was prepared from a file other than the study's",
            id="other raw file",
        ),
        pytest.param(
            lambda data: change(data, "test", subset_rows={}),
            "test.jsonl was prepared with another input format, other raw files, expressions or settings",
            id="other subset",
        ),
    ],
)
def test_data_that_is_not_the_studys_is_refused_and_left_as_it_is(published_data, spoil, reason):
    reproduce.ensure_data(published_data, composed("llama-2-7b"))
    folder = Path("data/codereviewer")
    spoil(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError) as refused:
        reproduce.ensure_data(published_data, composed("llama-2-7b"))
    assert str(refused.value) == (
        f"data/codereviewer: differs from the study's data: {reason}; move the folder away and run this command again, "
        "or run the recipes one by one with this data"
    )
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_data_whose_preparation_was_killed_is_prepared_again(published_data):
    reproduce.ensure_data(published_data, composed("llama-2-7b"))
    folder = Path("data/codereviewer")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "train.jsonl").rename(folder / ".train.jsonl.0123456789abcdef.part")
    reproduce.ensure_data(published_data, composed("llama-2-7b"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def change(folder: Path, split: str, **values: object) -> None:
    manifest = orjson.loads((folder / "manifest.json").read_bytes())
    manifest["splits"][split] |= values
    (folder / "manifest.json").write_bytes(orjson.dumps(manifest))


def test_a_mirror_is_taken_where_a_model_is_gated():
    shared = Request("", ["mirr", "fast"])
    mirrored = {name: reproduce.request_for(shared, name).profiles for name in STUDY.published}
    assert mirrored.pop("haider2024/code-llama-7b") == ["fast"]
    assert {tuple(profiles) for profiles in mirrored.values()} == {("mirr", "fast")}


@pytest.mark.parametrize(("models", "metrics"), [("aa", ["bertscore:a"]), ("ab", [])])
def test_a_study_with_one_scorer_model_uses_it(models, metrics):
    columns = {f"of_{i}": {"metric": "bertscore_f1", "model": model} for i, model in enumerate(models)}
    study = STUDY.model_copy(update={"columns": registry.columns(columns)})
    assert reproduce._declared_scorer(study) == metrics


def test_a_missing_scorer_model_is_reported_before_anything_starts(recipe, tmp_path, tiny_profile):
    words = ("--only", ONE, "--profile", tiny_profile, "--metric", "bertscore:some/nowhere")
    done = recipe("reproduce", "haider2024", *words)
    assert done.returncode == 1
    assert "recipe: BERTScore: some/nowhere cannot be loaded: " in done.stderr
    assert rundir.all_runs(tmp_path / "runs") == []
