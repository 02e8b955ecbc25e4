"""The command with `--on hf`, against a local hub: submit, watch, kill, resume, cancel, results, and refusals."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Recipe
from fake_hub import TOKEN, Hub, content, serving

from qlora_recipes.base.errors import UserError
from qlora_recipes.config.compose import Request
from qlora_recipes.config.merging import Override
from qlora_recipes.run.backends import Command, Task, TaskResult, hf
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


def test_a_killed_job_resumes_at_its_last_checkpoint(recipe, place, tiny_profile, fake_axolotl, hub, monkeypatch):
    monkeypatch.setattr(hf, "EVERY", 0.1)
    steps = ("--set", "num_epochs=2", "--set", "saves_per_epoch=2")
    words = ("run", NAME, "--rehearse", "--profile", tiny_profile, *steps, *ON)
    run = RunDir(place / recipe.ok(*words).stdout.strip())

    def has_checkpoint(volume: Path) -> bool:
        return any(volume.glob("run/output/checkpoint-*/manifest.json"))

    assert hub.work(place, fake_axolotl, has_checkpoint, FAKE_HOLD="3") == -9
    assert shown(recipe)["state"] == "interrupted"
    (checkpoint,) = run.output.iterdir()
    assert run.last_checkpoint() == checkpoint
    assert "hours=3" in recipe.fails("resume", run.path, *ON).stderr
    recipe.ok("resume", run.path, "--on", "hf,flavor=cpu-basic,ask=no,hours=0.5")
    assert hub.job["timeoutSeconds"] == 1800
    assert hub.work(place, fake_axolotl) == 0, hub.logs
    assert shown(recipe)["state"] == "finished"
    assert [launch.resumed_from for launch in run.read().launches] == [None, checkpoint.name]


def test_a_job_that_ran_out_of_its_time_is_told_once_and_can_be_resumed(recipe, queued, hub):
    hub.set("ERROR", "Job timeout")
    hub.logs[hub.job["id"]] = "step 7"
    hf._state.cache_clear()
    done = recipe.ok("results", queued.path)
    log = queued.path / f"hf-{hub.job['id']}.log"
    assert done.stderr.splitlines()[:2] == [
        f"{queued.path}: job {hub.job['id']} ended as ERROR: Job timeout; see {log}",
        f"`recipe resume {queued.quoted} --on hf,flavor=cpu-basic,hours=N` continues a training",
    ]
    assert log.read_text() == "step 7\n"
    assert "ended" not in recipe("results").stderr
    recipe.ok("resume", queued.path, "--on", "hf,flavor=cpu-basic,hours=2,ask=no")
    assert [job["timeoutSeconds"] for job in hub.jobs.values()] == [3600, 7200]


@pytest.mark.long
def test_an_evaluation_is_a_job_too(recipe, queued, tmp_path, fake_axolotl, hub):
    assert hub.work(tmp_path, fake_axolotl) == 0, hub.logs
    recipe.ok("evaluate", queued.path, "--on", "hf,flavor=cpu-basic,ask=no,hours=0.5")
    assert hub.work(tmp_path, fake_axolotl) == 0, hub.logs
    assert shown(recipe)["rows_total"] == 26
    assert not [*queued.path.glob("*.part.jsonl")]


def test_a_cancelled_job_is_asked_to_end(recipe, queued, hub):
    assert recipe.ok("cancel", queued.path).stdout == f"{queued.path}: job {hub.job['id']} is cancelled\n"
    hub.logs[hub.job["id"]] = "no results"
    hf._state.cache_clear()
    done = recipe("results")
    log = queued.path / f"hf-{hub.job['id']}.log"
    assert f": job {hub.job['id']} ended as CANCELED: no reason given; see " in done.stderr
    assert log.read_text() == "no results\n"
    assert recipe.fails("cancel", queued.path).stderr.endswith("nothing is running or queued\n")


BILLING = "add credits at https://huggingface.co/settings/billing"
TOKENS = "give a token that may run jobs and write to buckets"


@pytest.mark.parametrize(("change", "says"), [({"credits": 0}, BILLING), ({"allows": False}, TOKENS)])
def test_a_run_that_the_hub_refuses_can_be_submitted_later(recipe, tmp_path, tiny_profile, hub, change, says):
    for name, value in change.items():
        setattr(hub, name, value)
    refused = recipe.fails("run", NAME, "--rehearse", "--profile", tiny_profile, *ON).stderr
    (run,) = (file.parent for file in tmp_path.glob("runs/*/*/*/run.json"))
    then = f"{says}; then `recipe resume {run.relative_to(tmp_path)} --on hf,flavor=cpu-basic,hours=1` submits it\n"
    assert refused.endswith(then)
    hub.credits, hub.allows = 1, True
    recipe.ok("resume", run, "--on", "hf,flavor=cpu-basic,hours=1,ask=no")
    assert len(hub.jobs) == 1


@pytest.mark.parametrize(
    ("on", "says"),
    [
        (
            "hf,flavour=l4x1",
            "--on hf: flavour: Extra inputs are not permitted; give options as in --on hf,flavor=l4x1,hours=3",
        ),
        (f"hf,flavor={TOKEN}", "--on hf,flavor=***: a secret; log in with `hf auth login` instead"),
        (
            "hf,flavor=l4x2",
            "--on hf: the hub has no flavor l4x2; "
            "choose cpu-basic, t4-small, l4x1, a10g-small, a100-large, a10g-largex2",
        ),
        (
            "hf,flavor=cpu-basic",
            "--on hf: a job costs money and was not agreed to; nothing was started; "
            "agree, or add ask=no, as in --on hf,flavor=l4x1,ask=no",
        ),
    ],
)
def test_what_is_refused_starts_nothing(recipe, tmp_path, tiny_profile, hub, on, says):
    done = recipe.fails("run", NAME, "--rehearse", "--profile", tiny_profile, "--on", on)
    assert done.stderr.splitlines()[-1] == f"recipe: {says}"
    assert not [*tmp_path.glob("runs/*/*/*")]
    assert not hub.jobs


def test_a_run_has_one_job_at_a_time_because_they_share_a_folder(queued, hub):
    command = Command("evaluate", queued, ["evaluate", str(queued.path)], TaskResult(NAME))
    task = Task(command.result, lambda: [command], {}, 0)
    with pytest.raises(UserError) as refusal:
        hf.Hf(True, None, ["flavor=cpu-basic", "ask=no"], True).carry_out(task, list)
    assert str(refusal.value) == f"{queued.path}: another job of the run has not ended; wait, or cancel the run"
    assert len(hub.jobs) == 1


@pytest.mark.parametrize("ends", ["COMPLETED", "ERROR"])
def test_a_job_that_ended_without_results_can_be_resumed(recipe, queued, hub, ends):
    hub.set(ends, "Job failed with exit code: 1")
    assert shown(recipe)["state"] in ("created", "interrupted")  # a new run has ten seconds to start
    recipe.ok("resume", queued.path, "--on", "hf,hours=1,ask=no")  # a rehearsal suits the cheapest flavor
    assert (shown(recipe)["state"], hub.job["flavor"]) == ("queued", "cpu-basic")
    assert [job.id for job in queued.jobs()] == list(hub.jobs)


def test_a_refused_token_is_told_and_the_run_stays_as_it_is(recipe, queued, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another1another1")
    hf._state.cache_clear()
    done = recipe("results")
    assert "log in with `hf auth login`, or set HF_TOKEN" in done.stderr
    assert not [*queued.path.glob("hf-*.log")]


TINY = "axolotl-alpaca2k/tinyllama-qlora"  # needs bf16, which a T4 lacks
PRICE = "l4x1: $0.80 an hour; about 2 minutes of training by plan; at most 2 hours, $1.60\n"


@pytest.mark.parametrize("on", ["hf,flavor=l4x1", "hf"])
def test_the_plan_sets_the_flavor_the_time_limit_and_the_price(recipe, hub, on):
    done = recipe.ok("run", TINY, "--dry-run", "--on", on)
    assert PRICE in done.stderr
    assert '"$recipe/bin/recipe" resume runs/axolotl-alpaca2k/tinyllama-qlora/' in done.stdout


FP16 = {"bf16": False, "fp16": True, "sdpa_varlen": False}


@pytest.mark.parametrize(
    ("settings", "gpus", "flavor"),
    [
        ({}, 1, "l4x1"),
        (FP16, 1, "t4-small"),
        ({}, 2, "a10g-largex2"),
        ({"micro_batch_size": 16, "sequence_len": 4096}, 1, "a100-large"),
    ],
)
def test_the_cheapest_flavor_that_fits_the_plan_is_chosen(hub, settings, gpus, flavor):
    backend = hf.Hf(False, None, ["hours=1"], True)
    chosen = backend.gpu(Request(TINY, overrides=[Override(*item) for item in settings.items()], gpus=gpus))
    assert (backend.flavor.name, chosen) == (flavor, hf._gpu_of(backend.flavor))


def test_a_flavor_fits_all_requests(hub):
    backend = hf.Hf(False, None, ["hours=1"], True)
    for settings in (FP16, {}, FP16):
        backend.gpu(Request(TINY, overrides=[Override(*item) for item in settings.items()]))
    assert backend.flavor.name == "l4x1"


def test_a_request_that_fits_no_flavor_is_refused(hub):
    backend = hf.Hf(False, None, [], True)
    with pytest.raises(UserError) as refusal:
        backend.gpu(Request(TINY, gpus=16))
    problem = f"--on hf: {TINY} fits no flavor of the hub"
    assert str(refusal.value) == f"{problem}; `recipe plan NAME` lists changes that help"


def test_a_rehearsal_takes_the_cheapest_flavor(recipe, tiny_profile, hub):
    done = recipe.ok("run", NAME, "--rehearse", "--profile", tiny_profile, "--on", "hf,ask=no")
    assert "cpu-basic: $0.01 an hour; at most 1 hours, $0.01\n" in done.stderr
    assert hub.job["flavor"] == "cpu-basic"


@pytest.mark.parametrize(
    ("options", "counts", "says"),
    [
        (["flavor=l4x1", "hours=1"], [2], "flavor l4x1 has 1 GPUs, and the run needs 2; choose another flavor"),
        (
            ["flavor=cpu-basic", "hours=1"],
            [1],
            "flavor cpu-basic has 0 GPUs, and the run needs 1; choose another flavor",
        ),
        (
            ["flavor=a10g-small"],
            [1],
            "no plan says how long the job takes on a10g-small; add a time limit, as in --on hf,flavor=l4x1,hours=3",
        ),
        (["hours=1"], [1], "no plan chooses a flavor for this command; name one, as in --on hf,flavor=l4x1,hours=3"),
        (["flavor=l4x1", "hours=1"], [1, 2], "flavor l4x1 has 1 GPUs, and the run needs 2; choose another flavor"),
    ],
)
def test_a_task_that_does_not_suit_a_flavor_is_refused(hub, options, counts, says):
    tasks = [Task(TaskResult(NAME), list, {}, count) for count in counts]
    with pytest.raises(UserError) as refusal:
        hf.Hf(False, None, options, True).submit(tasks, NAME)
    assert str(refusal.value) == f"--on hf: {says}"


@pytest.mark.parametrize(("name", "gpu"), [("a100-large", "A100 80GB"), ("a10g-largex2", "A10G"), ("cpu-basic", None)])
def test_the_gpu_of_a_flavor_is_one_of_the_catalogue(hub, name, gpu):
    chosen = hf.Hf(False, None, [f"flavor={name}", "hours=1"], True).gpu(Request(NAME))
    assert (chosen and chosen.name) == gpu


@pytest.mark.long
def test_a_study_of_one_run_comes_to_its_verdict_in_one_command(recipe, tmp_path, fake_axolotl, hub):
    words = ("reproduce", "axolotl-alpaca2k", "--only", "tinyllama-qlora", "--rehearse", *ON)
    assert recipe.json(*words)["steps"][0]["run"] == f"queued (job {hub.job['id']})"
    assert hub.work(tmp_path, fake_axolotl) == 0, hub.logs
    hf._state.cache_clear()
    done = recipe.json(*words)
    assert [step["run"] for step in done["steps"]] == ["skipped"]
    assert len(hub.jobs) == 1


SWEEP = ("sweep", NAME, "--set", "lora_r=4,8,12", "--rehearse", "--metric", "bertscore:none")


def test_each_trial_of_a_sweep_is_a_job(recipe, tiny_profile, hub):
    words = (*SWEEP, "--profile", tiny_profile, "--json", *ON)
    done = recipe.ok(*words)
    price = "cpu-basic: $0.01 an hour; 3 jobs, each at most 1 hours, $0.01; at most $0.03 in total"
    assert price in done.stderr.splitlines()
    steps = [step["run"] for step in orjson.loads(done.stdout)["steps"]]
    assert steps == [f"queued (job {id_})" for id_ in hub.jobs]
    folders = {job["volumes"][0]["path"] for job in hub.jobs.values()}
    assert len(folders) == 3
    recipe.ok(*words)
    assert len(hub.jobs) == 3  # they are queued


def test_a_sweep_stops_at_the_first_job_that_the_hub_refuses(recipe, tiny_profile, hub):
    hub.credits = 0
    done = recipe(*SWEEP, "--profile", tiny_profile, "--json", *ON)
    steps = orjson.loads(done.stdout)["steps"]
    assert (done.returncode, [step["run"] for step in steps]) == (1, ["failed", None, None])
    assert BILLING in steps[0]["problem"]
    hub.credits = 1
    recipe.ok(*SWEEP, "--profile", tiny_profile, *ON)
    assert len(hub.jobs) == 3
