"""One real run that four trackers follow, read back from what each of them keeps."""

import json
import multiprocessing
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import RECIPE, Recipe

from qlora_recipes.base import yamlfiles
from qlora_recipes.configs import compose
from qlora_recipes.configs.compose import Request
from qlora_recipes.running import create
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.writing import new

NAME = "haider2024/code-llama-7b"
TRACKERS = ("tensorboard", "trackio", "mlflow", "wandb")

Curve = list[tuple[int, float]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_profile: Path) -> RunDir:
    """A finished run, with all trackers laid over it and none of the user's own settings for them."""
    place = tmp_path_factory.mktemp("place")
    profiles = [word for profile in (tiny_profile, *TRACKERS) for word in ("--profile", str(profile))]
    command = [str(RECIPE), "run", NAME, *profiles, "--set", "num_epochs=1"]
    own = {key: value for key, value in os.environ.items() if not key.startswith(tuple(map(str.upper, TRACKERS)))}
    done = subprocess.run(command, cwd=place, env=own | {"HOME": str(place)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return RunDir(place / done.stdout.strip())


def curve(run: RunDir, key: str = "loss") -> Curve:
    """What metrics.jsonl has of a figure."""
    found = [(record["step"], record[key]) for record in run.read_metrics() if key in record]
    assert len(found) >= 2
    return found


@pytest.mark.long
def test_tensorboard_reads_the_curves_from_the_runs_folder(run: RunDir) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    for key, tag in (("loss", "train/loss"), ("eval_loss", "eval/loss")):
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in curve(run, key)]  # kept as float32


@pytest.mark.long
def test_trackio_reads_the_curves_from_a_store_beside_all_runs(run: RunDir) -> None:
    def read(metric: str) -> Curve:
        words = ("get", "metric", "--project", "haider2024", "--run", f"code-llama-7b/{run.path.name}", "--json")
        command = [RECIPE.with_name("trackio"), *words, "--metric", metric]
        environment = os.environ | {"TRACKIO_DIR": str(run.runs(NAME) / "trackio")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [(value["step"], value["value"]) for value in json.loads(done.stdout)["values"]]

    # trackio counts what it is given; the trainer's steps are a metric of their own
    step_of = dict(read("train/global_step"))
    for key, metric in (("loss", "train/loss"), ("eval_loss", "eval/loss")):
        assert [(step_of[entry], value) for entry, value in read(metric)] == curve(run, key)


@pytest.mark.long
def test_mlflow_reads_the_curves_from_a_store_beside_all_runs(run: RunDir) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.runs(NAME)}/mlflow.db")
    experiment = client.get_experiment_by_name("haider2024")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert (tracked.info.run_name, tracked.info.status) == (f"code-llama-7b/{run.path.name}", "FINISHED")
    for key in ("loss", "eval_loss"):
        found = client.get_metric_history(tracked.info.run_id, key)
        assert sorted((metric.step, metric.value) for metric in found) == curve(run, key)


@pytest.mark.long
def test_wandb_keeps_the_curves_in_the_runs_folder(run: RunDir) -> None:
    command = [RECIPE.with_name("wandb"), "leet", "inspect", "--json", run.path / "wandb"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = list(map(json.loads, done.stdout.splitlines()))
    started = next(record["run"] for record in records if record["type"] == "run")
    assert (started["project"], started["display_name"]) == ("haider2024", f"code-llama-7b/{run.path.name}")
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    for key, metric in (("loss", "train/loss"), ("eval_loss", "eval/loss")):
        found = [(row["train/global_step"], row[metric]) for row in rows if metric in row]
        assert found == curve(run, key)


@pytest.mark.long
def test_trackers_leave_nothing_elsewhere(run: RunDir) -> None:
    place = run.runs(NAME).parent
    assert {file.name for file in place.iterdir()} <= {"runs", ".cache"}  # the home folder too; wandb logs to its cache
    assert {file.name for file in run.runs(NAME).iterdir()} == {"haider2024", "trackio", "mlflow.db", ".mlflow.db.lock"}


@pytest.mark.long
def test_runs_that_begin_at_once_share_a_new_mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    from qlora_recipes.runs.plugin import RunPlugin

    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    context = multiprocessing.get_context("fork")
    cfg = SimpleNamespace(use_mlflow=True, output_dir=f"{tmp_path}/output")
    processes = [context.Process(target=RunPlugin().pre_model_load, args=(cfg,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert MlflowClient(uri).search_experiments()


def launched(*profiles: str, overrides: list[str] | None = None, rehearse: bool = False) -> yamlfiles.Config:
    request = Request(NAME, profiles=list(profiles), overrides=overrides or [], rehearse=rehearse)
    return create.launch_config(compose.compose(request), RunDir(Path("runs", NAME, "now")))


def test_what_the_user_says_of_a_tracker_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched("mlflow")["mlflow_tracking_uri"] == "sqlite:///runs/mlflow.db"
    assert launched("trackio", rehearse=True)["trackio_project_name"] == "haider2024-rehearsal"
    assert launched("wandb", overrides=["wandb_mode=online"])["wandb_mode"] == "online"
    assert launched("wandb", overrides=["wandb_name=a {b} {run}"])["wandb_name"] == "a {b} code-llama-7b/now"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://someone:password@example.org")
    assert launched("mlflow")["mlflow_tracking_uri"] is None
    of_override = launched("mlflow", overrides=["mlflow_tracking_uri=https://example.org"])
    assert of_override["mlflow_tracking_uri"] == "https://example.org"


def test_a_run_with_a_tracker_that_is_not_installed_does_not_start(recipe: Recipe, tmp_path: Path) -> None:
    done = recipe("run", NAME, "--rehearse", "--set", "comet_project_name=x")
    assert done.returncode == 2
    assert "[missing-package:comet_project_name]" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_variant_is_of_the_project_of_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    new.write("wide", NAME, ["lora_r=64"])
    composed = compose.compose(Request("wide", profiles=["wandb"]))
    filled = create.launch_config(composed, RunDir(Path("runs", "wide", "now")))
    assert (filled["wandb_project"], filled["wandb_name"]) == ("haider2024", "wide/now")


def test_where_a_run_is_tracked_makes_it_no_other_run() -> None:
    plain, tracked = (compose.compose(Request(NAME, profiles=profiles)) for profiles in ([], list(TRACKERS)))
    assert plain.digest == tracked.digest
    assert plain.digest != compose.compose(Request(NAME, overrides=["lora_r=8"])).digest
