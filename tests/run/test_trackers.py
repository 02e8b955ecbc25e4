"""One real run that four trackers follow, read back from what each of them keeps."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import RECIPE, typed

from qlora_recipes.base import yamlfiles
from qlora_recipes.config import compose
from qlora_recipes.config.compose import Request
from qlora_recipes.config.merging import Source
from qlora_recipes.evaluate.scores_file import read_scores
from qlora_recipes.run.run import launch_config
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.writing import new

NAME = "haider2024/code-llama-7b"
TRACKERS = ("tensorboard", "trackio", "mlflow", "wandb")

Curve = list[tuple[int, float]]
TAGS = {"loss": "train/loss", "eval_loss": "eval/loss"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_profile: Path) -> RunDir:
    """A finished run, with all trackers laid over it and none of the user's own settings for them."""
    place = tmp_path_factory.mktemp("place")
    profiles = [word for profile in (tiny_profile, *TRACKERS) for word in ("--profile", str(profile))]
    command = [str(RECIPE), "run", NAME, *profiles, "--set", "num_epochs=1"]
    settings = tuple(map(str.upper, TRACKERS))
    env = {key: value for key, value in os.environ.items() if not key.startswith(settings)} | {"HOME": str(place)}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run_dir = RunDir(place / done.stdout.strip())
    evaluate = [str(RECIPE), "evaluate", done.stdout.strip(), "--limit", "2", "--max-new-tokens", "4", "--json"]
    scored = subprocess.run(evaluate, cwd=place, env=env, capture_output=True, text=True)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["bleu4"] == read_scores(run_dir.path).scores["bleu4"].value
    return run_dir


def of_tensorboard(run: RunDir, key: str) -> Curve:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(TAGS[key])]


def printed(command: list[str | Path], **env: str) -> str:
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def trackio_metric(run: RunDir, metric: str) -> Curve:
    words = ("get", "metric", "--project", "haider2024", "--run", f"code-llama-7b/{run.path.name}", "--json")
    command = [RECIPE.with_name("trackio"), *words, "--metric", metric]
    values = json.loads(printed(command, TRACKIO_DIR=str(run.runs(NAME) / "trackio")))["values"]
    return [(value["step"], value["value"]) for value in values]


def of_trackio(run: RunDir, key: str) -> Curve:
    # trackio counts what it is given; the trainer's steps are a metric of their own
    step_of = dict(trackio_metric(run, "train/global_step"))
    return [(int(step_of[entry]), value) for entry, value in trackio_metric(run, TAGS[key])]


def of_mlflow(run: RunDir, key: str) -> Curve:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.runs(NAME)}/mlflow.db")
    (tracked,) = client.search_runs([client.get_experiment_by_name("haider2024").experiment_id])
    assert tracked.info.run_name == f"code-llama-7b/{run.path.name}"
    assert tracked.info.status == "FINISHED"
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(tracked.info.run_id, key))


def wandb_folders(run: RunDir) -> list[Path]:
    """Folders of the training and of its scores; without a server, each part of a run has its own."""
    return sorted((run.path / "wandb").glob("offline-run-*"))


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, printed([RECIPE.with_name("wandb"), "leet", "inspect", "--json", folder]).splitlines()))


def of_wandb(run: RunDir, key: str) -> Curve:
    records = wandb_records(wandb_folders(run)[0])
    started = next(record["run"] for record in records if record["type"] == "run")
    assert started["project"] == "haider2024"
    assert started["display_name"] == f"code-llama-7b/{run.path.name}"
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [(row["train/global_step"], row[TAGS[key]]) for row in rows if TAGS[key] in row]


@pytest.mark.long
@pytest.mark.parametrize("read", [of_tensorboard, of_trackio, of_mlflow, of_wandb])
def test_each_tracker_reads_the_curves_of_the_metrics(run, read):
    for key in TAGS:
        expected = [(record["step"], record[key]) for record in run.read_metrics() if key in record]
        rel = 1e-6 if read is of_tensorboard else 0  # kept as float32
        assert len(expected) >= 2
        assert read(run, key) == [(step, pytest.approx(value, rel=rel, abs=0)) for step, value in expected]


@pytest.mark.long
def test_trackers_leave_nothing_elsewhere(run):
    place = run.runs(NAME).parent
    assert {file.name for file in place.iterdir()} <= {"runs", ".cache"}  # the home folder too; wandb logs to its cache
    assert {file.name for file in run.runs(NAME).iterdir()} == {"haider2024", "trackio", "mlflow.db", ".mlflow.db.lock"}


@pytest.mark.long
def test_tensorboard_and_wandb_have_the_scores_of_an_evaluation(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = read_scores(run.path).scores["bleu4"].value
    tracked = {entry["tracker"]: entry for entry in run.summary(run.read()).tracked}
    assert tracked.keys() == {"tensorboard", "wandb"}
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("test/bleu4")] == [pytest.approx(expected, rel=1e-6)]
    training, scored = wandb_folders(run)
    assert training.name.endswith(tracked["wandb"]["run"]) and scored.name.endswith(tracked["wandb"]["run"])
    records = wandb_records(scored)
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [row["test/bleu4"] for row in rows] == [expected]


def launched(*profiles: str, name: str = NAME, overrides: Sequence[str] = (), **more: bool) -> yamlfiles.Config:
    request = Request(name, profiles=[*profiles], overrides=typed(*overrides), **more)
    return launch_config(compose.compose(request), RunDir(Path("runs", name, "now")))


def test_what_the_user_says_of_a_tracker_holds(place, monkeypatch):
    new.write("wide", NAME, typed("lora_r=64"))
    variant = launched("wandb", name="wide")
    assert variant["wandb_project"] == "haider2024"
    assert variant["wandb_name"] == "wide/now"
    assert launched("mlflow")["mlflow_tracking_uri"] == "sqlite:///runs/mlflow.db"
    assert launched("trackio", rehearse=True)["trackio_project_name"] == "haider2024-rehearsal"
    assert launched("wandb", overrides=["wandb_mode=online"])["wandb_mode"] == "online"
    assert launched("wandb", overrides=["wandb_name=a {b} {run}"])["wandb_name"] == "a {b} code-llama-7b/now"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://someone:password@example.org")
    assert launched("mlflow")["mlflow_tracking_uri"] is None
    assert launched("mlflow", rehearse=True)["mlflow_tracking_uri"] == "sqlite:///runs/mlflow.db"
    of_override = launched("mlflow", overrides=["mlflow_tracking_uri=https://example.org"])
    assert of_override["mlflow_tracking_uri"] == "https://example.org"


REMOTE = {
    "wandb_project": "mine",
    "comet_project_name": "mine",
    "swanlab_project": "mine",
    "mlflow_experiment_name": "mine",
    "trackio_project_name": "mine",
}


def test_a_rehearsal_turns_trackers_off_but_for_those_of_this_machine(place, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    servers = ["mlflow_tracking_uri=https://example.org", "trackio_space_id=mine/space"]
    changes = [f"{key}={value}" for key, value in REMOTE.items()]
    composed = compose.compose(Request(NAME, overrides=typed(*changes, *servers), rehearse=True))
    assert {key: composed.config.get(key) for key in REMOTE} == dict.fromkeys(REMOTE)
    differences = {difference.key: difference for difference in composed.differences}
    for name in ("wandb", "comet", "swanlab", "mlflow", "trackio"):
        difference = differences[f"use_{name}"]
        assert difference.run is False
        assert difference.source == Source("rehearsal", detail=f"a rehearsal sends nothing to {name}")
    local = compose.compose(Request(NAME, profiles=list(TRACKERS), rehearse=True)).config
    assert [local.get(f"use_{name}") for name in TRACKERS] == [True] * 4
    assert compose.compose(Request(NAME, overrides=typed(*changes))).config["wandb_project"] == "mine"


def test_where_a_run_is_tracked_makes_it_no_other_run():
    plain, tracked = (compose.compose(Request(NAME, profiles=profiles)) for profiles in ([], list(TRACKERS)))
    assert plain.digest == tracked.digest
    assert plain.digest != compose.compose(Request(NAME, overrides=typed("lora_r=8"))).digest
