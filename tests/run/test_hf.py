"""The command with `--on hf`, against a local hub: submit, watch, kill, resume, cancel, results, and refusals."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Recipe
from fake_hub import TOKEN, Hub, content, serving

from qlora_recipes.run.backends import hf
from qlora_recipes.run.rundir import RunDir

NAME = "haider2024/code-llama-7b"
ON = ("--on", "hf,flavor=cpu-basic,ask=no")


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub"), monkeypatch) as started:
        yield started


@pytest.fixture
def queued(recipe: Recipe, tmp_path: Path, tiny_profile: Path, hub: Hub) -> RunDir:
    """A rehearsal that was submitted."""
    done = recipe.ok("run", NAME, "--rehearse", "--profile", tiny_profile, *ON)
    return RunDir(tmp_path / done.stdout.strip())


def shown(recipe: Recipe) -> Any:
    """The only run in `recipe results`, a minute later."""
    hf._state.cache_clear()
    (row,) = recipe.json("results")
    return row


def test_a_job_trains_and_its_results_come_back(recipe, queued, tmp_path, fake_axolotl, hub):
    assert shown(recipe)["state"] == "queued"
    submitted = {key: hub.job[key] for key in ("flavor", "timeoutSeconds", "labels", "command")}
    assert submitted == {
        "flavor": "cpu-basic",
        "timeoutSeconds": 3600,
        "labels": {"name": "haider2024-code-llama-7b"},
        "command": ["bash", "/qlora-recipes/input/job.sh"],
    }
    before = queued.jobs_file.read_bytes()
    assert hub.work(tmp_path, fake_axolotl) == 0, hub.logs
    assert shown(recipe)["state"] == "finished"
    record = queued.read()
    assert (record.launches[0].exit_code, record.adapter.differs(queued.adapter)) == (0, False)
    assert queued.jobs_file.read_bytes() == before
    asked = len(hub.asked)
    shown(recipe)
    assert len(hub.asked) == asked  # a job that has ended is not asked for again


def test_the_token_is_in_the_secrets_only(queued, hub, tmp_path):
    assert hub.job["secrets"] == {"HF_TOKEN": TOKEN}
    spec = {key: value for key, value in hub.job.items() if key != "secrets"}
    assert TOKEN.encode() not in orjson.dumps([spec, hub.asked])
    assert sum(TOKEN in body for body in hub.bodies) == 1
    assert not any(TOKEN.encode() in content(hub, name) for name in hub.files)
    assert not any(TOKEN.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
