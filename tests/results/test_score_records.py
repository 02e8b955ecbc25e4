"""Records of published numbers: made of runs, read back, refused, and shown."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import small_study
from conftest import Recipe
from pydantic import ValidationError
from recorded_runs import HOST, a_run, recorded

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.config.merging import Source
from qlora_recipes.data import studies
from qlora_recipes.results import export_records, score_records
from qlora_recipes.results.score_records import Record
from qlora_recipes.training.run_record import Job

PLAIN, WIDE = small_study.PLAIN, small_study.WIDE
RESULTS = Path("recipes", "sums2030", "results")
pytestmark = pytest.mark.usefixtures("runs")


def exported(recipe: Recipe, run: str) -> tuple[Path, dict[str, Any]]:
    done = recipe.ok("results", "--export", run)
    file = Path(done.stdout.strip())
    return file, orjson.loads(file.read_bytes())


def scores_read() -> list[float]:
    return [record.scores["accuracy"].value for record in score_records.records(small_study.read())]


def status_of(name: str, metric: str = "accuracy") -> score_records.Status:
    study = small_study.read()
    rows = score_records.statuses(study, score_records.records(study))
    (row,) = [row for row in rows if f"{row.name} {row.options or ''}".strip() == name and row.metric == metric]
    return row


def test_a_record_is_exported_added_and_shown(recipe):
    a_run("one", 67.0)
    file, content = exported(recipe, "latest")
    assert re.fullmatch(r"plain-rtx-4090-seed-42-[0-9a-f]{12}\.json", str(file))
    assert content | {"name": PLAIN, "gpu": "RTX 4090", "gpus": 1, "seed": 42, "profiles": []} == content
    assert content["scores"]["accuracy"] == {"value": 67.0, "interval": [66.5, 67.5]}
    assert content["scores"].keys() == {"accuracy", "perplexity", "chrf"}
    assert scores_read() == []
    RESULTS.mkdir()
    file.rename(RESULTS / file.name)
    recorded(a_run("two", 70.0, recipe_name=WIDE))
    assert scores_read() == [67.0, 70.0]
    shown = recipe("results", "sums2030").stdout
    assert "retrained on RTX 4090, seed 42  67 (66.5 to 67.5)\n" in shown
    plain, _ = recipe.json("results", "sums2030")
    (number,) = [number for number in plain["records"] if number["metric"] == "accuracy"]
    assert number["published"] == "67.4 ± 1.0"
    assert number["here"] == "67 (66.5 to 67.5)"


def test_the_status_of_a_published_number_is_the_furthest_stage_with_a_valid_record():
    assert status_of(PLAIN).status == "not run"
    assert status_of(PLAIN).here is None
    recorded(a_run("evaluated", 66.0, published_adapter="authors"))
    assert status_of(PLAIN).status == "evaluated from the authors' adapter on RTX 4090"
    failed = recorded(a_run("failed", state="failed"))
    assert status_of(PLAIN).status == "evaluated from the authors' adapter on RTX 4090; failed on RTX 4090, seed 42"
    first = recorded(a_run("one", 67.0))
    recorded(a_run("two", 68.0), seed=43)
    assert status_of(PLAIN).status == (
        "retrained on RTX 4090, seed 42 and RTX 4090, seed 43; failed on RTX 4090, seed 42"
    )
    assert status_of(PLAIN).published == "67.4 ± 1.0"
    assert status_of(PLAIN).here == "67.5"
    assert status_of(WIDE).status == "not run"
    invalidated = {"commit": "abcdef1", "reason": "wrong"}
    for file in (failed, first):
        file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | {"invalidated": invalidated}))
    assert status_of(PLAIN).here == "68 (67.5 to 68.5)"
    assert status_of(PLAIN).status.split("; ")[1:] == ["a record is invalidated by abcdef1, because wrong"] * 2
    assert len(score_records.built_in_records(small_study.read())) == 4


def test_only_records_of_todays_recipe_count():
    recorded(a_run("one", 67.0))
    recorded(a_run("two", 69.0), profiles=["mlflow", "zero2"])
    recorded(a_run("old", 11.0), settings_sha256="a" * 64)
    status = status_of(PLAIN)
    assert status.here == "68"
    assert status.status.split("; ")[1:] == ["recipe changed since: RTX 4090, seed 42"]


def test_predictions_need_their_number_of_rows_and_a_hash():
    record = {"made": "2026-11-28", "name": PLAIN, "revision": None, "stage": "predictions", "rows": 4}
    record |= {"scores": {"accuracy": {"value": 67.0}}, "texts_sha256": "a" * 64}
    assert score_records.Record.model_validate(record).where == ""
    for absent in ("rows", "texts_sha256"):
        with pytest.raises(ValidationError, match=f"missing: {absent}"):
            score_records.Record.model_validate(record | {absent: None})


def test_a_run_that_ran_out_of_memory_is_recorded(recipe):
    run = a_run("one", state="failed")
    record = run.read()
    record.launches[-1].out_of_memory = True
    run.write(record)
    _, content = exported(recipe, "one")
    assert content["outcome"] == "out of memory"
    assert content["scores"] == {}
    assert content["adapter_sha256"] is None
    recorded(run)
    assert status_of(PLAIN).status == "not run; out of memory on RTX 4090, seed 42"


def test_a_run_that_failed_before_its_launch_is_recorded(recipe):
    run = a_run("one", state="failed")
    (run.path / "scores.json").unlink()
    run.write(run.read().model_copy(update={"launches": [], "created": "2026-01-02T00:00:00+00:00"}))
    _, content = exported(recipe, "one")
    assert (content["outcome"], content["made"]) == ("failed", "2026-01-02")


def test_a_grid_point_has_a_status_of_its_own():
    points = [{"settings": {"lora_r": r}, "scores": {"accuracy": [60 + r]}} for r in (4, 8)]
    published = yamlfiles.read_yaml(Path("recipes", "sums2030", "study.yaml"))["published"]
    published[PLAIN]["grid"] = points
    small_study.write(Path(), published=published)
    recorded(a_run("one", 64.5, set={"lora_r": 4}))
    assert status_of(f"{PLAIN} --set lora_r=4").status.startswith("retrained")
    untouched = status_of(f"{PLAIN} --set lora_r=8")
    assert untouched.status == "not run"
    assert untouched.published == "68"
    assert status_of(PLAIN).status == "not run"


def test_a_record_names_no_folder_host_or_user(recipe, tmp_path):
    planted = {"hub_token": "hf_abcdefghijklmnopqrstuvwx12", "wandb_entity": "mmuster", "seed": 43}
    folder = a_run("one", 67.0, set=planted, settings={"adapter": "/home/mmuster/a", "data": "/home/mmuster/t.jsonl"})
    run = folder.read()
    of_profile = Source("profile", "zero2")
    run.differences = [replace(d, source=of_profile) if d.key == "hub_token" else d for d in run.differences]
    run.profiles = ["zero2", "/home/mmuster/mine.yaml"]
    run.cwd, run.recipe_file = "/home/mmuster/work", "/home/mmuster/r.yaml"
    run.launches[0].command = [f"/home/mmuster/{HOST}/axolotl"]
    run.provenance["cpu"] = "mmuster's"
    folder.write(run)
    folder.add_job(Job(backend="slurm", id="1", step="run", script="/home/mmuster/s.sh"))
    file, content = exported(recipe, "one")
    for word in ("mmuster", "home", "hf_", HOST, "hub_", "wandb", str(tmp_path)):
        assert word not in file.read_text(), word
    assert content["profiles"] == ["zero2"]
    assert content["seed"] == 43


MISTAKES = [
    ({"gpu": "gpu7.example.com"}, "gpu: Value error, unknown"),
    ({"host": "box"}, "host: Extra inputs are not permitted"),
    ({"name": "sums2030/plane"}, "name: sums2030/plane does not belong to the study sums2030"),
    ({"settings": {"lora_r": 8}}, f"settings: {{'lora_r': 8.0}} is not a published grid point of {PLAIN}"),
    ({"outcome": "failed"}, "Value error, outcome: a run with scores is finished"),
    ({"gpu": None}, "Value error, missing: gpu"),
    ({"settings_sha256": None}, "Value error, missing: settings_sha256"),
    ({"profiles": ["/home/me/mine.yaml"]}, "profiles: 0: Value error, unknown"),
    ({"profiles": ["packed"]}, "profiles: 0: Value error, unknown"),
    ({"scores": {"bleu4": {"value": 1.0}}}, "scores: bleu4 is not a metric of the study"),
    ({"config_sha256": "hf_abc"}, "config_sha256: String should match pattern '^[0-9a-f]{64}$'"),
    (
        {"invalidated": {"commit": "abcdef1", "reason": "hf_abcdefghijklmnopqrstuvwx12"}},
        "invalidated: reason: String should match pattern '^[A-Za-z]{1,20}[,.]?( [A-Za-z]{1,20}[,.]?){0,39}$'",
    ),
    (
        {"packages": {"torch": "2+0123456789abcdef0123456789abcdef01234567"}},
        "packages: torch: String should match pattern "
        r"'^\d{1,4}(\.\d{1,4}){1,3}((a|b|rc|\.post|\.dev)\d{1,3})?(\+[a-z]{2}\d{0,3})?$'",
    ),
    ({"made": "yesterday"}, "made: Input should be a valid date or datetime, input is too short"),
    ({"seconds": -1}, "seconds: Input should be greater than or equal to 0"),
    ({"version": 2}, "version: Input should be 3"),
]


@pytest.mark.parametrize(("change", "problem"), MISTAKES)
def test_a_record_with_a_mistake_is_reported_and_left_out(recipe, change, problem):
    recorded(a_run("good", 67.0))
    file = recorded(a_run("edited", 68.0), **change)
    assert recipe.ok("results", "sums2030", "--json").stderr == f"{file}: {problem}\n"
    assert scores_read() == [67.0]
    with pytest.raises(UserError) as raised:
        score_records.built_in_records(small_study.read())
    assert str(raised.value) == f"{file}: {problem}"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "Invalid JSON: EOF while parsing a value at line 1 column 0"),
        ("[]", "Input should be an object"),
        ("[" * 100_000, "Invalid JSON: recursion limit exceeded at line 1 column 202"),
        ("\xff", "Invalid JSON: expected value at line 1 column 1"),
        (
            '{"\x1b[31m": 1}',
            r"Invalid JSON: control character (\u0000-\u001F) found while parsing a string at line 1 column 3",
        ),
    ],
)
def test_a_file_that_is_not_a_record_is_reported(recipe, content, problem):
    file = recorded(a_run("one"))
    file.write_text(content, encoding="latin-1")
    assert recipe.ok("results", "sums2030", "--json").stderr == f"{file}: {problem}\n"


def test_an_edited_record_is_refused():
    file = recorded(a_run("one", 67.0))
    content = file.read_text().replace("67.0", "67.4")
    file.write_text(content)
    with pytest.raises(UserError) as raised:
        score_records.read(file, small_study.read())
    name = Record.model_validate_json(content).file_name()
    problem = f"edited or renamed (from {name}); restore it, or add only `invalidated`"
    assert str(raised.value) == f"{file}: {problem}"


def test_a_comment_in_the_recipe_changes_no_status():
    recorded(a_run("one", 67.0))
    file = Path("recipes", f"{PLAIN}.yaml")
    file.write_text(f"# another comment\n{file.read_text()}")
    assert status_of(PLAIN).status == "retrained on RTX 4090, seed 42"
    file.write_text(file.read_text().replace("lora_r: 32", "lora_r: 16"))
    assert status_of(PLAIN).status == "not run; recipe changed since: RTX 4090, seed 42"


UNFIT = (
    "it needs the recipe's model and data, and a current evaluation of its adapter on Test Subset 1, decoded as in "
    "study.yaml; run `recipe evaluate runs/sums2030/plain/one`"
)
STATE = "a record needs a finished or failed run that is not a rehearsal; this one is "
REFUSALS = [
    ({"state": "interrupted"}, f"{STATE}interrupted"),
    ({"rehearsal": True}, f"{STATE}finished"),
    ({"settings": {"limit": 100}}, UNFIT),
    ({"decoding": small_study.GREEDY}, UNFIT),
    ({"set": {"base_model": "me/other"}}, UNFIT),
    ({"set": {"datasets.0.path": "mine.jsonl"}}, UNFIT),
    ({"settings": {"engine": "vllm"}}, "its predictions were generated by vllm: not compared with the reference"),
    ({"set": {"lora_r": 4}}, "it differs from the recipe in lora_r"),
    ({"gpus": []}, "the run's record of gpu is missing or invalid"),
    ({"ran": "mine"}, "mine has no published scores"),
]


@pytest.mark.parametrize(("more", "reason"), REFUSALS)
def test_a_run_that_does_not_stand_for_its_recipe_has_no_record(more, reason):
    folder = a_run("one", **more)
    with pytest.raises(UserError) as raised:
        export_records.export_run(folder)
    assert str(raised.value) == f"{folder.path}: not exported: {reason}"
    assert [*Path().glob("*.json")] == []


def test_a_profile_that_changes_settings_has_no_record():
    folder = a_run("one", 67.0, set={"sample_packing": True})
    run = folder.read()
    run.differences = [replace(difference, source=Source("profile", "packed")) for difference in run.differences]
    folder.write(run)
    with pytest.raises(UserError) as raised:
        export_records.export_run(folder)
    assert str(raised.value) == f"{folder.path}: not exported: it differs from the recipe in sample_packing"


def test_a_study_without_a_published_number_has_no_status(recipe):
    small_study.write(Path(), published={PLAIN: {}})
    assert recipe.json("results", "sums2030")[0]["records"] == []


def test_export_takes_no_other_name(recipe):
    done = recipe.fails("results", "sums2030", "--export", "latest")
    assert done.stderr == "recipe: sums2030 and --export: give only one of them\n"


def test_every_built_in_record_is_valid():
    for file in paths.RECIPES.glob("*/study.yaml"):
        study = studies.load(file.parent)
        assert all(isinstance(record, Record) for record in score_records.built_in_records(study))
