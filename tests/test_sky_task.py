"""The task for SkyPilot: its parser takes it, and its commands train, go on where they were killed, and evaluate."""

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import wait_until

from qlora_recipes.base import yamlfiles
from qlora_recipes.run import rundir
from qlora_recipes.run.rundir import RunDir

ROOT = Path(__file__).parents[1]
TASK = ROOT / "docker" / "sky.yaml"
NAME = "haider2024/code-llama-7b"
SKY = ROOT / ".sky" / "bin" / "python"
PARSE = """
import sys, sky, yaml
for text, envs in eval(sys.stdin.read()):
    try:
        task = sky.Task.from_yaml_config(yaml.safe_load(text), envs, [("HF_TOKEN", "a token"), ("HMAC_KEY", "a key")])
    except ValueError as error:
        print(str(error).replace(chr(10), " "))
    else:
        ((path, storage),) = task.storage_mounts.items()
        print(path, storage.name, storage.mode.value, *task.secrets, *task.envs)
"""


def test_skypilot_takes_the_task(tmp_path):
    if not SKY.is_file():
        pytest.skip("needs SkyPilot: `make sky`")
    text, envs = TASK.read_text(), [("RECIPE", NAME), ("BUCKET", "my-runs")]
    cases = [(text, envs), (text.replace("use_spot", "use_spott"), envs), (text, envs[1:])]
    env = os.environ | {"HOME": str(tmp_path)}
    command = [SKY, "-I", "-c", PARSE]
    shown = subprocess.run(command, input=repr(cases), env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    taken, misspelt, lacking = shown.splitlines()[-3:]
    assert taken.split() == [
        "/runs",
        "my-runs",
        "MOUNT_CACHED",
        "HF_TOKEN",
        "HMAC_KEY",
        *yamlfiles.parse(text, "")["envs"],
    ]
    assert "use_spott" in misspelt
    assert "RECIPE" in lacking


@pytest.fixture
def checkout(tmp_path: Path, fake_axolotl: Path) -> Path:
    """A clean folder in which `make setup` has nothing left to do, and `axolotl` trains nothing."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy2(ROOT / name, folder)
    environment = fake_axolotl.parents[1]
    (folder / ".venv").symlink_to(environment)
    (folder / ".uv").symlink_to(ROOT / ".uv")
    for stamp in (".locked", ".complete"):
        (environment / stamp).touch()
    subprocess.run(["make", "--question", "setup"], cwd=folder, check=True)  # it would change the tests' environment
    programs = folder / "programs"
    programs.mkdir()
    for name in ("gcc", "sudo"):  # as if gcc were installed, so that the task installs nothing
        (programs / name).write_text(f"#!/bin/sh\necho {name} $@ >> {folder / 'installed'}\n")
        (programs / name).chmod(0o755)
    return folder


def begun(checkout: Path, section: str, **envs: str) -> "subprocess.Popen[bytes]":
    """Begin a section of the task, as SkyPilot does on a machine."""
    task = yamlfiles.read_yaml(TASK)
    of_task = {name: value or "" for name, value in (task["envs"] | task["secrets"]).items()}
    job = {"SKYPILOT_TASK_ID": "sky-managed-1", "RUNS": str(checkout.parent / "storage"), "HMAC_KEY": "the job's"}
    path = f"{checkout / 'programs'}:{os.environ['PATH']}"
    env = os.environ | of_task | job | {"MAKEFLAGS": "", "PATH": path} | envs
    return subprocess.Popen(["bash", "-c", task[section]], cwd=checkout, env=env, stderr=subprocess.PIPE)


def done(checkout: Path, section: str, **envs: str) -> tuple[int, str]:
    process = begun(checkout, section, **envs)
    _, said = process.communicate(timeout=900)
    return process.returncode, said.decode()


def kill(process: "subprocess.Popen[bytes]") -> None:
    parent = psutil.Process(process.pid)
    for member in [parent, *parent.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # it ended with its parent
            member.kill()
    process.communicate()


@pytest.mark.long
def test_a_job_that_is_taken_away_goes_on_to_an_evaluated_run(checkout, tmp_path, tiny_profile):
    """Each machine has only the stored files, and the job's key."""
    saves = "--set save_steps=2 --set saves_per_epoch=null --set num_epochs=1"
    envs = {"RECIPE": NAME, "ARGS": f"--profile rehearsal --profile {tiny_profile} {saves}"}
    holds = envs | {"FAKE_HOLD": "3"}

    def runs(job: str = "sky-managed-1") -> list[RunDir]:
        return rundir.all_runs(tmp_path / "storage" / job)

    def evaluates() -> bool:
        job = psutil.Process(process.pid)
        for member in [job, *job.children(recursive=True)]:  # the shell becomes its last command
            with suppress(psutil.Error):  # it has just ended
                if "evaluate" in member.cmdline():
                    return True
        return False

    assert done(checkout, "setup") == (0, "")
    process = begun(checkout, "run", **holds)
    wait_until(lambda: any(run.last_checkpoint() for run in runs()), process)
    other = begun(checkout, "run", **holds, SKYPILOT_TASK_ID="sky-managed-2")  # has nothing to do with that run
    wait_until(lambda: runs("sky-managed-2"), other)
    kill(other)
    kill(process)
    code, said = done(checkout, "run", **envs, HMAC_KEY="another's", XDG_DATA_HOME=str(tmp_path / "other"))
    assert code == 2
    assert "not created by you on this machine, or changed since" in said
    process = begun(checkout, "run", **envs, XDG_DATA_HOME=str(tmp_path / "second"))
    wait_until(evaluates, process)
    kill(process)
    assert done(checkout, "run", **envs, XDG_DATA_HOME=str(tmp_path / "third"))[0] == 0
    (folder,) = rundir.all_runs(tmp_path / "storage" / "sky-managed-1")
    record, scores = folder.read(), (folder.path / "scores.json").read_bytes()
    assert record.state == "finished"
    assert record.launches[1].resumed_from
    assert done(checkout, "run", **envs, XDG_DATA_HOME=str(tmp_path / "third"))[0] == 0
    assert folder.read() == record
    assert (folder.path / "scores.json").read_bytes() == scores


def test_mistakes_end_a_job_before_it_trains(checkout, tmp_path):
    code, said = done(checkout, "run", RECIPE="haider2024/code-lama-7b", ARGS="--rehearse")
    assert code == 2
    assert NAME in said
    assert not (tmp_path / "storage").exists()
    code, said = done(checkout, "setup", STUDY="haider2023")
    assert code == 2
    assert "haider2023" in said
    assert not (checkout / "installed").exists()
