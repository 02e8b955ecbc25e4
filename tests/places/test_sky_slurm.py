"""`--on sky` with SkyPilot itself, on its SLURM backend: from a rehearsal to scores, what fails, and cancelling."""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import psutil
import pytest
import sky_backend
import sky_home
from conftest import RECIPE, finish, start
from sky_backend import Backend

from qlora_recipes.places import sky_client
from qlora_recipes.runs import lookup
from qlora_recipes.runs.rundir import RunDir

NAME = "haider2024/code-llama-7b"
SETTINGS = "shared: true\nresources: {infra: slurm/tests/main, cpus: 1}\nsecrets: [HF_TOKEN, JUDGE_KEY]\n"
SKY = sky_client.ENVIRONMENT / "bin" / "sky"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with sky_backend.running(tmp_path_factory.mktemp("sky")) as made:
        settings = tmp_path_factory.mktemp("config")
        (settings / "qlora-recipes").mkdir()
        (settings / "qlora-recipes" / "sky.yaml").write_text(SETTINGS)
        made.env |= {"XDG_CONFIG_HOME": str(settings)} | sky_home.SECRETS
        yield made


@pytest.fixture
def disk(tmp_path: Path, backend: Backend) -> Iterator[Path]:
    """A small one, for jobs as well."""
    (folder := tmp_path / "disk").mkdir()
    subprocess.run(["mount", "-o", "size=1m", "-t", "tmpfs", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def asked(place: Path, backend: Backend, *arguments: str | Path, code: int = 0, command: Path = RECIPE) -> str:
    return finish(start(place, *arguments, command=command, **backend.env), code)


def row(place: Path, backend: Backend, run: RunDir) -> dict[str, object]:
    rows = orjson.loads(asked(place, backend, "results", "--json"))
    (found,) = (one for one in rows if place / one["run"] == run.path)
    return found


def wait_for(holds: Callable[[], object], seconds: float = 500) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(1)


@pytest.mark.long
def test_a_rehearsal_goes_to_scores_and_one_that_is_taken_away_resumes_until_it_is_cancelled(
    tmp_path: Path, tiny_profile: Path, stand_in: Path, backend: Backend
) -> None:
    """At once: a member of a sweep is trained and evaluated, and a stand-in trains until its SLURM job is cancelled
    under it."""
    rehearsed = ("--profile", "rehearsal", "--profile", tiny_profile, "--on", "sky")
    short = ("--set", "num_epochs=1", "--bertscore", "none", "--json")
    swept = orjson.loads(asked(tmp_path, backend, "sweep", NAME, "--set", "lora_r=4", *rehearsed, *short))
    assert swept["steps"][0]["evaluate"].startswith("queued (job"), swept
    (scored,) = lookup.all_runs(tmp_path / "runs")
    steps = ("--set", "num_epochs=800", "--set", "save_steps=10", "--set", "saves_per_epoch=null")
    slowly = ("--sky", "envs.STAND_IN_STEP='0.2'")
    words = ("run", NAME, *rehearsed, *steps, *slowly)
    held = RunDir(tmp_path / asked(tmp_path, backend, *words, command=stand_in))
    wait_for(lambda: held.summary(held.read()).step >= 12)
    assert row(tmp_path, backend, held)["state"] == "running"
    (name,) = {job.id for job in held.jobs()}
    allocations = (line.split() for line in backend.slurm.ask("squeue", "--noheader", "--format=%i %j").splitlines())
    (allocation,) = (id_ for id_, of_job in allocations if of_job.startswith(f"{name}-"))
    backend.slurm.ask("scancel", allocation)
    wait_for(lambda: len(held.read().launches) == 2)
    last = held.read().launches[-1]
    assert last.resumed_from
    said = asked(tmp_path, backend, "cancel", held.path)
    assert f"job {name} is cancelled; SkyPilot confirms that nothing is left of it" in said
    assert row(tmp_path, backend, held)["state"] == "interrupted"
    assert "--on sky` continues it" in (held.path / "sky-run.log").read_text()
    wait_for(lambda: (scored.path / "scores.json").is_file())
    backend.slurm.wait_until_empty(120)
    assert row(tmp_path, backend, scored)["state"] == "finished"
    assert not commands_with(held.path.name)


@pytest.mark.long
@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("resources.acelerators=A100", "Instead of 'acelerators', did you mean 'accelerators'"),
        ("resources.cpus=999", "999"),
        ("resources.infra=slurm/tests/nowhere", "nowhere"),
    ],
)
def test_what_skypilot_would_not_take_is_told_and_leaves_nothing(
    tmp_path: Path, tiny_profile: Path, backend: Backend, option: str, says: str
) -> None:
    words = ("run", NAME, "--profile", "rehearsal", "--profile", tiny_profile, "--on", "sky", "--sky", option)
    assert says in asked(tmp_path, backend, *words, code=2)
    assert not (tmp_path / "runs").exists()


def commands_with(text: str) -> list[str]:
    """The commands of all processes that have a text in them."""
    commands = (" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"]))
    return [command for command in commands if text in command]


@pytest.mark.long
def test_what_fails_or_is_gone_is_told_with_a_remedy_and_leaves_nothing(
    tmp_path: Path, tiny_profile: Path, stand_in: Path, backend: Backend, disk: Path
) -> None:
    """Three jobs at once: in one the set-up fails, in one the disk fills as the stand-in trains, and one is cancelled
    with SkyPilot's own command. Only SkyPilot keeps the secrets that they get."""
    words = ("run", NAME, "--profile", "rehearsal", "--profile", tiny_profile, "--on", "sky")
    steps = ("--set", "save_steps=10", "--set", "saves_per_epoch=null")
    slowly = ("--set", "num_epochs=800", "--sky", "envs.STAND_IN_STEP='0.2'")
    failing = RunDir(tmp_path / asked(tmp_path, backend, *words, "--sky", "setup=echo no such tool; exit 7"))
    gone = RunDir(tmp_path / asked(tmp_path, backend, *words, *steps, *slowly, command=stand_in))
    much = ("--set", "num_epochs=50", "--set", "save_total_limit=9", "--runs", disk)
    full = RunDir(Path(asked(tmp_path, backend, *words, *steps, *much, command=stand_in)))
    wait_for(lambda: gone.summary(gone.read()).step >= 12)
    held = commands_with("planted")  # SkyPilot's backend hands what is to be in the environment from process to process
    assert not [command for command in held if not re.search(r"SKY_RUNTIME_DIR|sky\.skylet", command)]
    (name,) = {job.id for job in gone.jobs()}
    asked(tmp_path, backend, "jobs", "cancel", "--yes", "--name", name, command=SKY)
    wait_for(lambda: row(tmp_path, backend, gone)["state"] != "running")
    assert row(tmp_path, backend, gone)["state"] == "interrupted"
    assert f"{gone.path.name} --on sky` continues it" in (gone.path / "sky-run.log").read_text()
    wait_for(lambda: row(tmp_path, backend, failing)["state"] == "failed")
    trouble = str(row(tmp_path, backend, failing)["trouble"])
    logs = re.search(r"FAILED_SETUP.*`\S+/sky (jobs logs \d+)` shows what it printed", trouble)
    assert logs and "no such tool" in asked(tmp_path, backend, *logs[1].split(), "--no-follow", command=SKY)
    (of_full,) = orjson.loads(asked(tmp_path, backend, "results", "--runs", disk, "--json"))
    assert (of_full["state"], of_full["trouble"]) == ("failed", f"no space left in {full.path}")
    told = (full.path / "sky-run.log").read_text()
    assert f"no space left in {full.path}; free some, and `recipe resume {full.path} --on sky` continues it" in told
    backend.slurm.wait_until_empty(120)
    assert not commands_with(gone.path.name) + commands_with(failing.path.name) + commands_with(full.path.name)
    assert sky_home.with_secrets(tmp_path) == []
    kept = {str(file) for file in sky_home.with_secrets(Path(backend.env["HOME"]))}
    assert kept and [file for file in kept if not file.startswith(SKYPILOTS)] == []


SKYPILOTS = (".sky/api_server/requests.db", ".sky/spot_jobs.db", ".sky/managed_jobs/")
"""Where SkyPilot itself keeps a task's secrets, below the home of whoever runs its server."""
