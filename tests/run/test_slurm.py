"""The command with `--on slurm`, on a real SLURM: arrays, dependencies, requeues, time limits, cancelling."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import orjson
import pytest
from conftest import RECIPE, config_with, finish, start

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.run import backends, rundir
from qlora_recipes.run.backends import Command, TaskResult, slurm_cluster
from qlora_recipes.run.backends import slurm as slurm_module
from qlora_recipes.run.rundir import RunDir

TOOLS = Path(sys.executable).parent
NAME = "haider2024/code-llama-7b"
MEMBERS = [{"name": f"rank {rank}", "lora_r": rank} for rank in (4, 8, 16)]


@pytest.fixture(autouse=True)
def no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "qlora-recipes" / "slurm.yaml"


def submitted(place: Path, *arguments: str | Path, command: Path = RECIPE, **env: str) -> str:
    return finish(start(place, *arguments, command=command, **env))


def wait_for(run: RunDir, holds: Callable[[rundir.Run], bool], seconds: float = 240) -> rundir.Run:
    def read() -> rundir.Run:
        record = backends.read(run)
        return record.model_copy(update={"summary": run.summary(record)})

    deadline = time.monotonic() + seconds
    while not holds(record := read()):
        slurm_module.forget_queue()
        said = [file.read_text(errors="replace")[-2000:] for file in run.path.glob("*.log")]
        assert time.monotonic() < deadline, (record.state, record.summary, *said)
        time.sleep(0.2)
    return record


@pytest.mark.long
def test_a_sweep_is_an_array_whose_trials_are_evaluated_as_they_end(tmp_path, tiny_profile, fake_axolotl, slurm):
    """An earlier command trains one trial, one is requeued, and all are held until there is no more to submit.

    A fake Axolotl trains, and waits within its fourth step for the requeue.
    """
    asked = partial(submitted, tmp_path, command=fake_axolotl, FAKE_HOLD="3", FAKE_GO=str(tmp_path / "go"))
    (tmp_path / "three.yaml").write_text(yamlfiles.write_yaml({"_": MEMBERS}))
    queue = ("--on", "slurm,gres=gpu:1")
    rehearsed = ("--profile", "rehearsal", "--profile", tiny_profile, "--set", "num_epochs=1")
    rehearsed += ("--on", "slurm,gres=gpu:1,run.hold=")
    alone = RunDir(tmp_path / asked("run", NAME, "--set", "lora_r=4", *rehearsed))
    of_base_model = ("evaluate", alone.path, "--adapter", "none", "--metric", "bertscore:none", *queue)
    assert asked(*of_base_model) == str(alone.path)
    (waiting,) = (job.id for job in alone.jobs() if job.step == "evaluate")
    assert f"(job {waiting})" in finish(start(tmp_path, *of_base_model), code=2)
    slurm.ask("scancel", waiting)
    command = ["sweep", NAME, "three.yaml", *rehearsed, "--metric", "bertscore:none", "--json"]
    first = orjson.loads(asked(*command))
    for step in first["steps"]:
        assert "job" in step["run"]
        assert step["evaluate"].startswith("queued (job")
    runs = rundir.all_runs(tmp_path / "runs")
    jobs = {run.path: {job.step: job.id for job in run.jobs()} for run in runs}
    for step, sizes in (("run", [1, 2]), ("evaluate", [1, 2])):
        arrays = Counter(of_run[step].partition("_")[0] for of_run in jobs.values())
        assert sorted(arrays.values()) == sizes, step
    assert sum("prepare" in of_run for of_run in jobs.values()) == 2  # by each command once, for all that it trains
    assert "afterok:" in slurm.ask("scontrol", "show", "job", jobs[alone.path]["evaluate"])
    again = orjson.loads(asked(*command))  # nothing is submitted twice
    for step in again["steps"]:
        assert "job" in step["run"]
        assert "job" in step["evaluate"]
    assert {run.path: {job.step: job.id for job in run.jobs()} for run in runs} == jobs
    slurm.ask("scontrol", "release", *{of_run["run"].partition("_")[0] for of_run in jobs.values()})
    first_two = [run for run in runs if jobs[run.path]["run"].endswith("_0")]  # there are two GPUs
    (requeued,) = (run for run in first_two if run.path != alone.path)
    wait_for(requeued, lambda record: record.summary.step == 3)
    slurm.ask("scontrol", "requeue", jobs[requeued.path]["run"])
    wait_for(requeued, lambda record: record.state == "queued" or len(record.launches) == 2)
    (tmp_path / "go").touch()
    slurm.wait_until_empty()
    slurm_module.forget_queue()
    for run in runs:
        record = run.read()
        assert record.state == "finished"
        assert len(record.launches) == (2 if run is requeued else 1)
        assert (run.path / "scores.json").is_file()
    last = orjson.loads(asked(*command))
    assert [(step["run"], step["evaluate"]) for step in last["steps"]] == [("skipped", "skipped")] * 3
    assert all(row["bleu4"] is not None for row in last["results"])


@pytest.mark.long
def test_it_goes_on_after_a_requeue_and_a_time_limit_until_it_is_cancelled(tmp_path, tiny_profile, fake_axolotl, slurm):
    """A fake Axolotl trains, for as long as the shortest time limit takes."""
    steps = ("--set", "num_epochs=800", "--set", "save_steps=10", "--set", "saves_per_epoch=null")
    queue = ("--on", "slurm,signal=B:USR1@119")
    words = ("run", NAME, "--profile", tiny_profile, *steps, *queue)
    run = RunDir(tmp_path / submitted(tmp_path, *words, command=fake_axolotl, FAKE_STEP="0.2"))
    (job,) = (one.id for one in run.jobs() if one.step == "run")
    assert "gres/gpu:1" in slurm.ask("scontrol", "show", "job", job)  # a run that is no rehearsal asks for a GPU
    wait_for(run, lambda record: record.summary.step >= 12)
    slurm.ask("scontrol", "requeue", job)
    wait_for(run, lambda record: record.state == "queued")
    wait_for(run, lambda record: len(record.launches) == 2 and record.summary.step >= 24)
    minutes = int(slurm.ask("squeue", "--noheader", "--format=%M", f"--job={job}").split(":")[-2])
    slurm.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")  # it has one or two left
    wait_for(run, lambda record: len(record.launches) == 3)
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    _, warned, last = run.read().launches
    assert warned.resumed_from
    assert warned.exit_code == 0  # it ended in order
    assert last.resumed_from
    reached = int(last.resumed_from.partition("-")[2])
    wait_for(run, lambda record: record.state == "running" and record.summary.step > reached)
    assert f"job {job} " in submitted(tmp_path, "cancel", "latest")
    slurm.wait_until_empty()
    wait_for(run, lambda record: record.state == "interrupted")
    assert run.last_checkpoint()
    finish(start(tmp_path, "cancel", "latest"), code=2)
    submitted(tmp_path, "resume", "latest", "--on", "slurm,begin=now+1hour", command=fake_axolotl)
    wait_for(run, lambda record: record.state == "queued")
    assert f"recipe cancel {run.path.relative_to(tmp_path)}" in finish(start(tmp_path, "resume", "latest"), code=2)
    submitted(tmp_path, "cancel", "latest")
    slurm.wait_until_empty(20)  # what prepares the rows is cancelled too


def test_only_their_submitter_takes_the_jobs_of_a_sweep_out_of_the_queue(recipe, tmp_path, tiny_profile, slurm):
    rehearsed = ("--profile", "rehearsal", "--profile", tiny_profile, "--metric", "bertscore:none")
    queue = ("--on", "slurm,begin=now+1hour")
    recipe.ok("sweep", NAME, "--set", "lora_r=4,8", *rehearsed, *queue)
    assert [row["state"] for row in recipe.json("results")] == ["queued"] * 2
    copies = ("--runs", shutil.copytree(tmp_path / "runs", tmp_path / "copies"))
    stranger = {"XDG_DATA_HOME": str(tmp_path / "stranger")}  # without the submitter's key
    for place, environment in ((copies, {}), (copies, stranger), ((), stranger)):
        listed = orjson.loads(submitted(tmp_path, *place, "results", "--json", **environment))
        assert [row["state"] for row in listed] == ["created"] * 2
        assert {text for row in listed for text in row["jobs"].split("; ")} == {
            f"{step}: state not asked: the job is not yours" for step in ("prepare", "run", "evaluate")
        }
        finish(start(tmp_path, *place, "cancel", listed[0]["run"], **environment), code=2)
    assert len(submitted(tmp_path, "cancel", "lora_r").splitlines()) == 5
    for run in rundir.all_runs(tmp_path / "runs"):
        assert wait_for(run, lambda record: record.state == "interrupted").launches == []
    slurm.wait_until_empty(20)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["slurm", "--gpus", "5", "--profile", "zero2"], "--gres=gpu:5"),
        (["slurm,partition=nowhere"], r"slurm\.yaml.*--partition=nowhere"),
        (["slurm,tyme=1:00:00"], "'--tyme"),  # in sbatch's own words
        (["slurm,array=1-5"], "--on slurm,array=1-5: "),
        (["slurm,gpu=T4", "--set", "micro_batch_size=4096"], r"T4.*\[too-big"),
    ],
)
def test_a_run_that_the_queue_would_refuse_leaves_nothing(recipe, tmp_path, prepared, tiny, slurm, options, says):
    (tmp_path / "data").symlink_to(prepared)
    slurm.wait_until_empty(60)
    (tmp_path / "model").symlink_to(tiny)
    model = ["--set", "base_model=model", "--set", "revision_of_model=null", "--set", "special_tokens=null"]
    rows = ["--set", "gradient_accumulation_steps=15", "--set", "warmup_steps=0"]
    done = recipe.fails("run", NAME, *model, *rows, "--on", *options)
    assert re.search(says, done.stderr), done.stderr
    assert not (tmp_path / "runs").exists()
    assert slurm.ask("squeue", "--noheader") == ""


def raise_(error: type[OSError], *_: object, **options: object) -> None:
    raise error


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_without_slurm_nothing_is_queued(recipe, tmp_path, monkeypatch, error):
    """A program is missing; and one of PATH's folders cannot be read, too."""
    monkeypatch.setattr(slurm_cluster.subprocess, "run", partial(raise_, error))
    done = recipe("run", NAME, "--rehearse", "--on", "slurm")
    assert done.returncode == 2
    assert done.stdout == ""
    missing = "not found on this machine; run this on a login node of the cluster"
    assert done.stderr == f"recipe: --on slurm: squeue: {missing}\n"


@pytest.mark.parametrize("words", [("run", "nosuch"), ("sweep", "nosuch", "--set", "lora_r=4,8")])
def test_a_wrong_name_is_reported_before_missing_slurm(recipe, tmp_path, monkeypatch, words):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = recipe.fails(*words, "--on", "slurm")
    assert done.stderr == "recipe: nosuch: no recipe of that name; `recipe list` shows them all\n"


def test_a_dry_run_prints_the_scripts_without_slurm(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = recipe.ok("run", NAME, "--gpus", "2", "--on", "slurm,partition=a100,run.time=8:00:00", "--dry-run")
    prepare, run = done.stdout.split("#!/bin/bash\n")[1:]
    assert prepare.startswith("# haider2024-code-llama-7b: prepare.")
    assert "#SBATCH --partition=a100\n#SBATCH --time=8:00:00\n#SBATCH --gres=gpu:2\n" in run
    (command,) = re.findall("set -- (.*) ;;", run)
    (preparing,) = re.findall("set -- (.*) ;;", prepare)
    assert re.fullmatch(rf"resume runs/{NAME}/[0-9-]+-dry-run --trust", command)
    assert preparing == f"{command} --prepare"
    (row,) = recipe.json("reproduce", "haider2024", "--only", "llama-3.2-3b", "--on", "slurm", "--dry-run")["recipes"]
    assert row["training"] == "new"
    steps = recipe.json("sweep", NAME, "--set", "lora_r=4,8", "--rehearse", "--on", "slurm", "--dry-run")["steps"]
    assert [step["trial"] for step in steps] == ["lora_r=4", "lora_r=8"]
    assert not (tmp_path / "runs").exists()


def test_settings_are_read_as_text(no_settings):
    no_settings.parent.mkdir(parents=True)
    no_settings.write_text(
        "partition: gpu\ntime: 12:00:00\ngpus-per-node: a100:{gpus}\nexclusive:\ngpu: A100\n"
        "prefix: apptainer exec --nv image.sif\nsetup:\n- module load cuda\nevaluate: {time: 1:00:00}\n"
    )
    cluster = slurm_cluster.cluster_settings(["partition=debug", "evaluate.qos=short"])
    assert cluster == slurm_cluster.Cluster(
        gpu="A100",
        prefix="apptainer exec --nv image.sif",
        setup=["module load cuda"],
        options={"partition": "debug", "time": "12:00:00", "gpus-per-node": "a100:{gpus}", "exclusive": ""},
        of_step={"evaluate": {"time": "1:00:00", "qos": "short"}},
    )
    script = batch(cluster, gpus=4).script("run", [], 2)
    for line in ("#SBATCH --gpus-per-node=a100:4", "#SBATCH --exclusive", "module load cuda"):
        assert line in script.splitlines()
    assert "--gres" not in script
    assert "\napptainer exec --nv image.sif recipe " in script


@pytest.mark.parametrize(
    ("step", "options"),
    [
        ("run", {"gres": "nvme:1,gpu:4", "mem-per-gpu": "40G"}),
        ("evaluate", {"gres": "nvme:1,gpu:1", "mem-per-gpu": "40G"}),
        ("prepare", {"gres": "nvme:1"}),
    ],
)
def test_gpus_are_requested_for_the_steps_that_use_them(step, options):
    requests = batch(slurm_cluster.cluster_settings(["gres=nvme:1", "mem-per-gpu=40G"]), gpus=4)
    assert slurm_module._cluster_options(requests.cluster.options, requests._gpus(step)) == options


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param("[gpu]", ": expected a mapping of sbatch's long options to values", id="no mapping"),
        pytest.param("partition: [a]", ": options partition: Input should be a valid string", id="list"),
        pytest.param("gpu: {", ": not valid YAML: did not find expected node content (column 1)", id="no YAML"),
    ],
)
def test_malformed_settings_are_refused(no_settings, text, problem):
    no_settings.parent.mkdir(parents=True)
    no_settings.write_text(text)
    with pytest.raises(UserError) as refused:
        slurm_cluster.cluster_settings([])
    assert str(refused.value) == f"{no_settings}{problem}"


def batch(cluster: slurm_cluster.Cluster, gpus: int = 1, nodes: int = 1) -> slurm_module.Batch:
    return slurm_module.Batch(cluster, None, "title", gpus, nodes)


def test_submissions_of_one_title_in_one_second_have_folders_of_their_own(no_settings):
    folders = {batch(slurm_cluster.cluster_settings([])).folder for _ in range(3)}
    assert len(folders) == 3


def command(folder: Path, *words: str) -> Command:
    return Command("run", RunDir(folder), list(words), TaskResult(NAME))


def program(file: Path, script: str) -> None:
    file.write_text(script)
    file.chmod(0o755)


JOBS = [
    "printf '12\\n'",
    "printf '12;east\\n'",
    "printf 'Billing: 7 hours are left\\n12\\n'",
    "printf '12\\nBilling: 7 hours are left\\n'",
    "printf 'note 5\\n12;east\\n\\n  see 9 jobs\\n'",
    "printf '12\\n12\\r\\n'",
]
NO_JOBS = ["", "echo 12 jobs", "exec sleep 60", "printf '12\\n13\\n'"]


@pytest.mark.parametrize("commands", [*JOBS, *NO_JOBS])
def test_the_id_of_a_job_is_the_only_line_of_this_form(place, monkeypatch, commands):
    program(place / "sbatch", f"#!/bin/sh\n{commands}\n")
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    monkeypatch.setattr(slurm_cluster, "TIMEOUT", 60 if commands in JOBS else 0.2)
    (place / "a").mkdir()
    with nullcontext() if commands in JOBS else pytest.raises(WorkFailed):
        assert batch(slurm_cluster.Cluster()).submit("run", [command(Path("a"))]) == "12"
    assert [job.id for job in RunDir(place / "a").jobs()] == (["12_0"] if commands in JOBS else [])


STUB = """#!/bin/bash
trap 'echo stopped; exit 1' USR1
trap : TERM
echo "$@, a part: $QLORA_RECIPES_PART"
{progress}
touch started
for _ in $(seq 100); do sleep 0.05; done
"""


@pytest.mark.parametrize(
    ("progress", "queued_again"),
    [
        ("mkdir -p a/checkpoint-9; sleep 0.01; echo {} > a/checkpoint-9/trainer_state.json", True),
        ("echo a row >> a/predictions.part.jsonl", True),
        ("", False),
    ],
)
def test_a_job_near_its_time_limit_is_queued_again_if_it_got_any_further(place, progress, queued_again):
    """The script alone; the test before has SLURM send the signals."""
    (place / "a").mkdir()
    program(place / "stub", STUB.replace("{progress}", progress))
    program(place / "scontrol", '#!/bin/bash\necho "$@" >> asked')
    settings = slurm_cluster.Cluster(prefix=f"{place}/stub")
    script = batch(settings).script("run", [command(Path("a"), "resume", "a b")], 1)
    env = {"PATH": f"{place}:/usr/bin:/bin", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"}
    process = subprocess.Popen(["bash", "-c", script], cwd=place, env=env)
    while not (place / "started").exists():
        time.sleep(0.01)
    process.terminate()  # which the script leaves to its command
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 1
    said = (place / "a" / "slurm-run.log").read_text()
    assert said.startswith("recipe resume a b, a part: 1\nstopped\n")
    assert (place / "asked").exists() == queued_again
    if queued_again:
        assert (place / "asked").read_text() == "requeue 12_0\n"  # not the whole array
    assert (len(said.splitlines()) == 3) != queued_again  # that it is not


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("prefix", [None, 'apptainer exec --nv --bind "$PWD" image.sif'])
def test_scripts_are_sound(tmp_path, nodes, prefix):
    settings = slurm_cluster.Cluster(prefix=prefix, setup=["module load cuda"], options={"comment": "it's a test"})
    tasks = [command(Path(folder), "resume", folder) for folder in ("runs/a b", "runs/c")]
    for step in slurm_cluster.STEPS:
        script = batch(settings, nodes=nodes).script(step, tasks, 2)
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        done = subprocess.run([TOOLS / "shellcheck", "-"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout


@pytest.fixture
def odd_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose name would be a line of shell code."""
    folder = tmp_path / "a\ntouch marker\nb"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_folder_with_a_line_end_is_refused(odd_folder, capsys):
    with pytest.raises(UserError) as refused:
        slurm_module.Slurm(True, None, [], submits=True)
    assert str(refused.value) == f"{str(odd_folder)!r}: a control character in this name; rename it"


@pytest.mark.parametrize("name", ["x\ntouch marker\n.yaml", "x\r.yaml", "x\x1b[2J.yaml"])
def test_a_recipe_with_a_control_character_in_its_name_is_refused(place, recipe, name):
    (place / name).write_text(yamlfiles.write_yaml(config_with({})))
    for words in (("check", name), ("run", name, "--rehearse"), ("run", name, "--on", "slurm"), ("sweep", NAME, name)):
        done = recipe.fails(*words)
        assert "a control character in this name; rename it" in done.stdout + done.stderr, words
    assert recipe.fails("new", "mine", "--from", name).stdout == ""
    assert {file.name for file in place.iterdir() if file.name != "config"} == {name}


def test_no_value_is_shell_code_in_the_script(place):
    """Values that could be code, and names that the command refuses before."""
    evil = "'; touch marker; $(touch marker) `touch marker`\ntouch marker\n"
    (place / "a").mkdir()
    program(place / "stub", "#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    jobs = batch(slurm_cluster.Cluster(prefix=f"{place}/stub", options={"comment": evil.replace("\n", " ")}))
    script = jobs.script("run", [command(place / "a", "resume", evil), command(place / evil, "resume", "b")], 2)
    env = {"PATH": "/usr/bin:/bin", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"}
    done = subprocess.run(["bash", "-c", script], cwd=place, env=env)
    assert done.returncode == 0
    assert (place / "a" / "slurm-run.log").read_text() == f"recipe\nresume\n{evil}\n"
    assert not list(place.rglob("marker"))


@pytest.mark.parametrize("option", ["a b", "x\ntouch", "--x", "X"])
def test_an_option_that_is_no_long_option_of_sbatch_is_refused(option):
    with pytest.raises(UserError) as refused:
        slurm_cluster.cluster_settings([f"{option}=1"])
    problem = f"options {option} [key]: Value error, {option!r} is not a long option of sbatch"
    assert str(refused.value) == f"--on slurm,{option}=1: {problem}"


@pytest.mark.parametrize("setting", ["setup=export HF_TOKEN=planted-word", "export=WANDB_API_KEY=planted-word"])
def test_a_secret_in_the_settings_of_a_cluster_is_refused(setting):
    with pytest.raises(UserError) as refused:
        slurm_cluster.cluster_settings([setting])
    key = setting.partition("=")[0]
    problem = "a secret, which would be stored in the job's script; export it instead"
    assert str(refused.value) == f"--on slurm,{setting}: {key}: {problem}"
    assert (
        slurm_cluster.cluster_settings(["setup=export HF_TOKEN=$(cat token)"]).setup == "export HF_TOKEN=$(cat token)"
    )
