"""The command with `--on sky`, against a stand-in that answers as SkyPilot does: tests/stand_in/sky.py."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
from conftest import RECIPE, Recipe, finish, start

from qlora_recipes import places
from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.configs import gpus
from qlora_recipes.configs.compose import Request, compose
from qlora_recipes.places import sky, sky_cards, sky_client, sky_settings
from qlora_recipes.planning import need
from qlora_recipes.runs import lookup
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.runs.tasks import Command, Outcome, Work

NAME = "haider2024/code-llama-7b"
STAND_IN = Path(__file__).parents[1] / "support" / "stand_in" / "sky.py"


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with what the stand-in answers, beside one with what it was asked; the user's file says `shared`."""
    environment = tmp_path / ".sky"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "sky").touch()
    (environment / "bin" / "python").write_text(f"#!{sys.executable}\n{STAND_IN.read_text()}")
    (environment / "bin" / "python").chmod(0o755)
    monkeypatch.setattr(sky_client, "ENVIRONMENT", environment)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    settings = sky_settings.settings_file()
    settings.parent.mkdir(parents=True)
    settings.write_text("shared: true\nresources: {infra: slurm/c/p}\n")
    file = environment / "answers.json"
    answer(
        file, check={"infra": "Slurm (c)", "instance": "", "gpus": "", "hourly": 0.0}, launch={"ids": [1]}, states={}
    )
    sky_client.forget()
    return file


def answer(file: Path, **answers: dict[str, object]) -> None:
    """Set what some questions are answered."""
    former = orjson.loads(file.read_bytes()) if file.exists() else {}
    file.write_bytes(orjson.dumps(former | answers))
    sky_client.forget()


def asked(file: Path) -> list[dict[str, object]]:
    """What the stand-in was asked so far."""
    log = file.with_name("asked.jsonl")
    return [orjson.loads(line) for line in log.read_bytes().splitlines()] if log.exists() else []


def work(folder: Path, *words: str, step: str = "run", gpus: int = 0) -> Work:
    """A work of one command; its run is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    command = Command(step, RunDir(folder), [*words])  # type: ignore[arg-type]
    return Work(Outcome(NAME), lambda: [command], gpus)


def test_a_run_is_handed_over_followed_and_cancelled(
    recipe: Recipe, tmp_path: Path, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    done = recipe("run", NAME, "--rehearse", "--on", "sky", "--sky", "secrets=[HF_TOKEN]")
    assert done.returncode == 0, done.stderr
    assert "costs nothing" in done.stderr and "--on sky" in done.stderr
    run = RunDir(tmp_path / done.stdout.strip())
    (job,) = run.jobs()
    assert [request["do"] for request in asked(answers)] == ["check", "launch"]
    task = yamlfiles.read_yaml(Path(job.script))
    assert (task["secrets"], task["envs"]["QLORA_RECIPES_JOB"]) == (["HF_TOKEN"], job.id)
    assert task["resources"] == {"infra": "slurm/c/p"}
    checked = subprocess.run(
        [RECIPE.with_name("shellcheck"), "-s", "bash", "-"], input=task["run"], text=True, capture_output=True
    )
    assert checked.returncode == 0, checked.stdout
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        assert b"hf_planted" not in file.read_bytes(), file
    monkeypatch.chdir(tmp_path)
    for status, kind, words in (
        ("PENDING", "queued", ""),
        ("STARTING", "queued", "starting"),
        ("RUNNING", "running", ""),
        ("RECOVERING", "queued", "recovering"),
    ):
        answer(answers, states={job.id: {"id": 1, "status": status, "ended": False, "reason": ""}})
        assert places.read(run).state == kind
        (shown,) = orjson.loads(recipe("results", "--json").stdout)
        assert shown["state"] == kind and words in shown["jobs"]
    answer(answers, cancel={"left": {job.id: "CANCELLING"}})
    assert "does not confirm: CANCELLING" in recipe("cancel", "latest").stdout
    answer(answers, cancel={"left": {}})
    assert f"job {job.id} is cancelled; SkyPilot confirms" in recipe("cancel", "latest").stdout
    assert "nothing is running or queued" in recipe("cancel", "latest").stderr


@pytest.mark.parametrize(
    ("status", "reason", "says"),
    [
        ("FAILED_NO_RESOURCE", "no A100 anywhere", "no A100 anywhere; name another card or place"),
        ("FAILED_SETUP", "", "FAILED_SETUP: no reason given; `.*sky jobs logs 7` shows"),
        ("FAILED", "", "FAILED: no reason given; `.*sky jobs logs 7`"),
    ],
)
def test_a_job_that_could_not_be_carried_out_is_told_in_its_run(
    recipe: Recipe, tmp_path: Path, answers: Path, monkeypatch: pytest.MonkeyPatch, status: str, reason: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDir(Path(recipe("run", NAME, "--rehearse", "--on", "sky").stdout.strip()))
    (job,) = run.jobs()
    answer(answers, states={job.id: {"id": 7, "status": status, "ended": True, "reason": reason}})
    assert places.read(run).state == "failed"
    (shown,) = orjson.loads(recipe("results", "--json").stdout)
    assert re.search(says, shown["trouble"]), shown
    count = len(asked(answers))
    assert places.read(run).state == "failed"
    assert len(asked(answers)) == count  # SkyPilot is not asked about it again
    assert "nothing is running or queued" in recipe("cancel", "latest").stderr


def test_a_job_that_skypilot_never_got_leaves_an_interrupted_run(
    recipe: Recipe, tmp_path: Path, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer(answers, launch={"ids": [], "problem": "the server is gone"})
    done = recipe("run", NAME, "--rehearse", "--on", "sky")
    assert done.returncode == 1
    assert "took 0 of 1 jobs: the server is gone; run the same command again" in done.stderr
    (run,) = lookup.all_runs(Path("runs"))
    record = run.read()
    record.created = "2024-01-01T00:00:00+00:00"  # one that is just created counts as starting
    run.write(record)
    assert places.read(run).state == "interrupted"


def test_a_job_that_skypilot_does_not_have_yet_is_being_handed_over(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = sky.Sky(True, None, [])
    place.carry_out(work(Path("runs/a"), "resume", "runs/a", "--runs", "runs"), "a", Path("runs"), lambda: None)
    (job,) = RunDir(Path("runs/a")).jobs()
    states = sky.Sky.active([job])
    assert states and "is being handed over" in str(states[job.id])
    monkeypatch.setattr(sky, "HANDING_OVER", 0)
    assert sky.Sky.active([job]) == {}


def test_a_price_is_agreed_to_before_anything_starts(recipe: Recipe, tmp_path: Path, answers: Path) -> None:
    answer(answers, check={"infra": "AWS (us-east-1)", "instance": "g6", "gpus": "L4:1", "hourly": 0.805})
    done = recipe("run", NAME, "--rehearse", "--on", "sky")
    assert done.returncode == 2
    assert "AWS (us-east-1), g6, L4:1: 0.8" in done.stderr and "--yes" in done.stderr
    assert not (tmp_path / "runs").exists()
    agreed = recipe("run", NAME, "--rehearse", "--on", "sky", "--yes")
    (job,) = RunDir(tmp_path / agreed.stdout.strip()).jobs()
    assert yamlfiles.read_yaml(Path(job.script))["resources"]["max_hourly_cost"] == pytest.approx(0.815)


def test_the_card_is_the_one_of_the_settings(answers: Path, tmp_path: Path) -> None:
    place = sky.Sky(False, None, ["resources.accelerators=A100-80GB"])
    gpu = place.gpu()
    assert gpu and gpu.name == "A100 80GB"
    assert place._task("x", [], 2)["resources"]["accelerators"] == "A100-80GB:2"
    assert "accelerators" not in place._task("x", [], 0)["resources"]
    either = sky.Sky(False, None, ["resources.any_of=[{accelerators: [A100, L4]}, {accelerators: 'H100:2'}]"])
    asked_for = [one["accelerators"] for one in either._task("x", [], 4)["resources"]["any_of"]]
    assert asked_for == [["A100:4", "L4:4"], "H100:2"]
    assert either._task("x", [], 0)["resources"]["any_of"] == [{}, {}]
    for options in ([], ["resources.any_of=[{infra: aws}, {infra: gcp}]"]):
        with pytest.raises(UserError, match="name a card"):
            sky.Sky(False, None, options).carry_out(work(tmp_path / "a", gpus=1), "x", tmp_path, lambda: None)


@pytest.mark.long
def test_without_a_card_skypilot_chooses_among_those_that_hold_the_config_and_the_sum_is_told(
    answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cheapest of them is SkyPilot's business; how much memory it takes, and for how long, this project's."""
    answer(answers, check={"infra": "AWS (us-east-1)", "instance": "g6", "gpus": "A100:1", "hourly": 2.5})
    place = sky.Sky(False, None, ["yes"])
    to_train = work(tmp_path / "runs" / "a", "resume", "a", gpus=1)
    to_train.composed = compose(Request(NAME, overrides=["micro_batch_size=16"]))
    needed = need.needed_gib(to_train.composed.config, gpus.find("A100"), anew=True)
    assert needed
    place.carry_out(to_train, NAME, tmp_path / "runs", lambda: None)
    asked_for = asked(answers)[0]["task"]["resources"]["accelerators"]  # type: ignore[index]
    assert ("T4" in asked_for, asked_for["A100-80GB"], asked_for["L40S"]) == (needed < 14.5, 1, 1)
    said = capsys.readouterr().err
    hours, price = re.search(r"by plan ([\d.,]+) hours of training, ([\d.,]+) USD", said).groups()  # type: ignore[union-attr]
    assert float(price) == pytest.approx(float(hours) * 2.5, rel=0.05)


def test_the_disk_of_a_machine_of_its_own_holds_the_base_model_and_checkpoints(tmp_path: Path) -> None:
    works = [work(tmp_path / "a", gpus=1), work(tmp_path / "b", gpus=1)]
    works[0].composed = compose(Request(NAME))
    assert sky_cards.disk_gb(works) is None  # SkyPilot's own suffices
    works[1].composed = compose(Request(NAME, overrides=["num_epochs=20", "save_total_limit=400"]))
    works[1].composed.config |= {"adapter": None, "saves_per_epoch": 1}
    parameters, saved = 6.74e9, 20  # 2 bytes each: the download, the model, in a checkpoint with two of its optimizer's
    assert sky_cards.disk_gb(works) == pytest.approx(100 + (2 + 2 + 6 * saved) * parameters / 1e9, rel=0.02)


def test_works_are_jobs_of_their_own_and_an_evaluation_waits_for_no_training(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    works = [work(Path("runs") / name, "resume", f"runs/{name}") for name in ("a", "b")]
    answer(answers, launch={"ids": [1, 2]})
    sky.Sky(True, None, []).submit(works, "two", Path("runs"), [])
    names = {job.id for name in ("a", "b") for job in RunDir(Path("runs") / name).jobs()}
    assert len(names) == 2
    assert all(one.outcome.steps["run"].startswith("queued (job two-") for one in works)
    with pytest.raises(UserError, match="--jobs"):
        sky.Sky(True, 2, [])


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ("{}", [], r"sky\.yaml, or --sky key=value, has to say how its machines get"),
        ("shared: true\nbucket: s3://a", [], "either, not both"),
        ("bucket: mine", [], "mine is no URL"),
        ("[a]", [], r"sky\.yaml"),
        ("shared: {", [], r"sky\.yaml"),
        ("shared: true\nrun: echo", [], "run cannot be set"),
        ("shared: true\nsecrets: {HF_TOKEN: hf_x}", [], "give a list of names"),
        ("shared: true\nsecrets: [NOT_THERE]", [], "NOT_THERE: not set in this environment"),
        ("shared: true", ["resources"], "expected key=value"),
        ("shared: true\nresources: A100", [], "resources: expected a mapping"),
        ("shared: true", ["shared.a=1"], "--sky shared.a"),
    ],
)
def test_settings_that_are_wrong_are_refused(answers: Path, content: str, options: list[str], says: str) -> None:
    sky_settings.settings_file().write_text(content)
    with pytest.raises(UserError, match=says):
        sky_settings.task_settings(options)


def test_without_skypilot_and_with_options_of_other_places_that_is_told(
    recipe: Recipe, answers: Path, tmp_path: Path
) -> None:
    words = ("run", NAME, "--rehearse", "--on", "sky")
    said = finish(start(tmp_path, *words, QLORA_RECIPES_SKY=str(tmp_path / "nowhere")), code=2)
    assert f"there is no SkyPilot in {tmp_path / 'nowhere'}" in said and "make sky" in said
    done = recipe("run", NAME, "--rehearse", "--sky", "cpus=1")
    assert "--sky cpus=1: works only with --on sky" in done.stderr
    assert "--yes: works only with --on sky" in recipe("run", NAME, "--rehearse", "--yes").stderr


@pytest.mark.parametrize(
    ("words", "known"),
    [(("resume",), True), (("evaluate",), True), (("evaluate", "--on", "sky"), True), (("resume",), False)],
)
def test_of_a_run_whose_bucket_cannot_be_read_nothing_is_started(
    recipe: Recipe, tmp_path: Path, answers: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], known: bool
) -> None:
    """Its job has ended, and nobody knows in what state: the machine, or the way to the bucket, was lost."""
    there = tmp_path / "bucket"
    sky_settings.settings_file().write_text(f"bucket: file://{there}\n")
    done = recipe("run", NAME, "--rehearse", "--on", "sky")
    run = RunDir(tmp_path / done.stdout.strip())
    (job,) = run.jobs()
    monkeypatch.setattr(sky, "HANDING_OVER", 0)
    state = {job.id: {"id": 1, "status": "SUCCEEDED", "ended": True, "reason": ""}}
    answer(answers, states=state if known else {})
    shutil.rmtree(there)
    kept = {file: file.read_bytes() for file in run.path.iterdir() if file.is_file()}
    refused = recipe(words[0], "latest", *words[1:])
    assert refused.returncode == 2
    assert "its bucket has of it cannot be fetched" in refused.stderr and "it has nothing of it" in refused.stderr
    assert f"{run.path.relative_to(tmp_path)}: a job of it has ended, and what it left cannot be f" in refused.stderr
    assert "try again once its bucket can be read" in refused.stderr
    assert kept == {file: file.read_bytes() for file in run.path.iterdir() if file.is_file()}
    assert [request["do"] for request in asked(answers)].count("launch") == 1


@pytest.mark.long
def test_a_job_trains_where_there_is_nothing_goes_on_elsewhere_and_is_gathered(
    tmp_path: Path,
    tiny_profile: Path,
    stand_in: Path,
    answers: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The task's own script, where the laptop's files are out of sight; its machine is lost after the first copy."""
    laptop, cache, away = tmp_path / "laptop", tmp_path / "cache", tmp_path / "away"
    laptop.mkdir()
    away.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("QLORA_RECIPES_SKY", str(answers.parent))
    there = tmp_path / "bucket"
    sky_settings.settings_file().write_text(f"bucket: file://{there}\n")
    steps = ("--set", "num_epochs=14", "--set", "save_steps=10", "--set", "saves_per_epoch=null")
    words = ("run", NAME, "--profile", "rehearsal", "--profile", tiny_profile, *steps, "--on", "sky")
    run = RunDir(laptop / finish(start(laptop, *words, command=stand_in)))
    (job,) = run.jobs()
    task = yamlfiles.read_yaml(Path(job.script))
    assert task["workdir"] == str(paths.LOCK.parent)
    script = task["run"].replace(str(paths.LOCK.parent / ".venv" / "bin"), str(stand_in.parent))

    def begin(machine: str) -> "subprocess.Popen[bytes]":
        (tmp_path / machine).mkdir()
        laptop.symlink_to(tmp_path / machine)  # as the checkout, with this folder in it, is a link there
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "STAND_IN_STEP": "0.5"} | task["envs"]
        return subprocess.Popen(["bash", "-c", script], cwd=task["workdir"], env=env, start_new_session=True)

    for folder in (laptop, cache):
        folder.rename(away / folder.name)
    machine = begin("first")
    kept = there / run.output.relative_to("/")
    deadline = time.monotonic() + 300
    while not list(kept.glob("checkpoint-*")):
        assert machine.poll() is None and time.monotonic() < deadline
        time.sleep(1)
    os.killpg(machine.pid, signal.SIGKILL)
    machine.wait()
    for name in ("second", "third"):  # which has nothing left to do
        laptop.unlink()
        shutil.rmtree(cache)
        assert begin(name).wait() == 0
    laptop.unlink()
    shutil.rmtree(cache)
    for folder in (laptop, cache):
        (away / folder.name).rename(folder)
    answer(answers, states={job.id: {"id": 1, "status": "SUCCEEDED", "ended": True, "reason": ""}})
    (shown,) = orjson.loads(finish(start(laptop, "results", "--json", command=stand_in)))
    assert shown["state"] == "finished"
    record = run.read()
    assert len(record.launches) == 2 and record.launches[1].resumed_from
    assert (run.output / "adapter_model.safetensors").is_file() and not list(run.output.glob("checkpoint-*"))
    assert "resume" in (run.path / "sky-run.log").read_text()
