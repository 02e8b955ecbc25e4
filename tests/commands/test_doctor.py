"""Broken environments, each found by `recipe doctor`, with a remedy."""

import json
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import Recipe
from file_server import serving
from huggingface_hub import close_session, constants

from qlora_recipes.base import hub, machine, paths
from qlora_recipes.commands import doctor

Patch = pytest.MonkeyPatch
Lines = dict[str, dict[str, str]]
TORCH = {
    "version": "2.14.1+cu130",
    "cuda": "13.0",
    "arch": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_120"],
    "gpus": 1,
    "problem": "",
}
T4 = {"name": "Tesla T4", "memory_gib": 15.0, "compute_capability": "7.5", "driver": "580.65.06"}
V100 = T4 | {"name": "Tesla V100", "compute_capability": "7.0"}
BLACKWELL = T4 | {"name": "NVIDIA GeForce RTX 5090", "compute_capability": "12.0"}
OLDER = "make setup CUDA=12.6"


@pytest.fixture(autouse=True)
def healthy(monkeypatch: Patch) -> None:
    """A machine with a T4 whose torch sees it, and no network."""
    monkeypatch.setattr(machine, "gpus", lambda: [T4])
    monkeypatch.setattr(doctor, "ask_torch", lambda: TORCH)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def lines(recipe: Recipe, code: int) -> Lines:
    done = recipe("doctor", "--json")
    assert done.returncode == code, done.stdout
    return {line["name"]: line for line in json.loads(done.stdout)}


def wrong(found: Lines) -> set[str]:
    assert all(line["remedy"] for line in found.values() if line["state"] == "wrong")
    return {name for name, line in found.items() if line["state"] == "wrong"}


def test_each_check_of_a_whole_environment_is_one_line(recipe: Recipe) -> None:
    found = lines(recipe, 0)
    assert list(found) == ["torch", "driver", "GPU", "lock", "hub", "runs", "cache", "models"]
    assert {found[name]["state"] for name in ("torch", "driver", "GPU", "lock", "runs", "cache")} == {"ok"}
    assert found["hub"]["state"] == "note" and "HF_HUB_OFFLINE" in found["hub"]["found"]


def test_a_machine_without_a_gpu_can_do_all_but_train(recipe: Recipe, monkeypatch: Patch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [])
    found = lines(recipe, 0)
    assert found["driver"]["state"] == "note" and "GPU" not in found


@pytest.mark.parametrize(
    ("card", "driver", "torch", "broken", "values", "command"),
    [
        (T4, "575.57.08", {}, "driver", ["575.57.08", "13.0", "580"], OLDER),
        (T4, "470.256.02", {}, "driver", ["470.256.02"], ""),  # CUDA 12 needs a newer one too
        (BLACKWELL, "575.57.08", {}, "driver", ["575.57.08"], ""),  # the older build has no kernels for it
        (V100, "580.65.06", {}, "GPU", ["Tesla V100", "7.0", "sm_75"], OLDER),
        (BLACKWELL, "580.65.06", {"cuda": "12.6", "arch": ["sm_50", "sm_90"]}, "GPU", ["12.0"], "make setup"),
        (T4, "580.65.06", {"cuda": None}, "torch", ["CUDA"], "make setup"),
        (T4, "580.65.06", {"gpus": 0, "problem": "Error 802"}, "torch", ["Error 802"], ""),
    ],
)
def test_torch_driver_and_gpu_have_to_fit_each_other(
    recipe: Recipe,
    monkeypatch: Patch,
    card: dict[str, Any],
    driver: str,
    torch: dict[str, Any],
    broken: str,
    values: list[str],
    command: str,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "gpus", lambda: [card | {"driver": driver}])
    monkeypatch.setattr(doctor, "ask_torch", lambda: TORCH | torch)
    found = lines(recipe, 1)
    assert wrong(found) == {broken}
    assert [value for value in values if value not in found[broken]["found"]] == []
    assert found[broken]["command"].endswith(command) and bool(found[broken]["command"]) == bool(command)


def test_hidden_gpus_are_a_note(recipe: Recipe, monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor, "ask_torch", lambda: TORCH | {"gpus": 0})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert lines(recipe, 0)["torch"]["state"] == "note"


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 5), ["sm_75", "sm_80"], True),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), [], True),
    ],
)
def test_torchs_code_runs_on_its_own_generation(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert doctor.has_kernels(capability, built) == runs


def test_torch_is_asked_in_a_process_that_may_crash(monkeypatch: Patch) -> None:
    monkeypatch.undo()
    facts = doctor.ask_torch()
    assert facts["version"].startswith(version("torch")) and facts["gpus"] == 0
    monkeypatch.setattr(doctor, "_PROBE", "raise ImportError('libcudart.so.13')")
    assert "libcudart.so.13" in doctor.ask_torch()["error"]
    monkeypatch.setattr(doctor, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "TIMEOUT", 0.2)
    facts = doctor.ask_torch()
    assert facts.keys() == {"error"}
    (line,) = doctor.check_torch([], facts, None)
    assert line.state == "wrong" and line.command


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A lock in the place of the project's."""
    monkeypatch.setattr(paths, "LOCK", tmp_path / "requirements.lock")
    return tmp_path / "requirements.lock"


@pytest.mark.parametrize(
    ("content", "state", "values"),
    [
        ("orjson==0.0.1 ; sys_platform == 'linux' \\\n    --hash=sha256:00\n", "wrong", ["orjson==0.0.1"]),
        ("# by uv\ngone==1.0 ; python_full_version < '3.0' \\\n    --hash=sha256:00\n", "ok", []),
        ("".join(f"gone{number}==1\n" for number in range(8)), "wrong", ["gone4==1", "3 more"]),
        ("<<<<<<< ours\n", "wrong", ["requirements.lock"]),
    ],
)
def test_packages_have_to_be_those_of_the_lock(
    recipe: Recipe, lock: Path, content: str, state: str, values: list[str]
) -> None:
    lock.write_text(content)
    found = lines(recipe, 0 if state == "ok" else 1)["lock"]
    assert found["state"] == state
    assert [value for value in values if value not in found["found"]] == []


def test_torch_for_another_cuda_brings_its_own_libraries(lock: Path, monkeypatch: Patch) -> None:
    versions = {"torch": "2.14.1+cu126", "triton": "3.0"}
    monkeypatch.setattr(doctor, "_installed", versions.get)
    lock.write_text("torch==2.14.1\ntriton==3.0\nnvidia-nothing-cu13==13.0\n")
    (line,) = doctor.check_lock()
    assert line.state == "ok"
    lock.write_text("torch==2.14.1\ntriton==3.1\n")
    (line,) = doctor.check_lock()
    assert line.state == "wrong" and "triton==3.1" in line.found


def test_a_wheel_is_checked_against_its_requirements(lock: Path, monkeypatch: Patch) -> None:
    assert [line.state for line in doctor.check_lock()] == ["note"]
    monkeypatch.setattr(doctor, "requires", lambda _: ["typer<0.1", "pytest<0.1; extra == 'dev'"])
    (line,) = doctor.check_lock()
    assert line.state == "wrong" and "typer<0.1" in line.found and "pytest" not in line.found


@pytest.mark.parametrize(
    ("answers", "state", "value"),
    [([], "ok", "2"), ([403], "note", "a/closed"), ([401, 401], "wrong", ""), ([500] * 12, "note", "500")],
)
def test_the_hub_is_asked_for_the_recipes_models(
    monkeypatch: Patch, answers: list[int], state: str, value: str
) -> None:
    with serving(monkeypatch) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url.partition("/files")[0])
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "_answers", {})
        monkeypatch.setattr(doctor, "base_models", lambda: ["a/closed", "b/open"])
        monkeypatch.setenv("HF_TOKEN", "hf_QxW3vBn7mKzLp0aSdFgH")
        server.content, server.answers, server.error_code = b"{}", answers, "GatedRepo" if 403 in answers else ""
        close_session()
        (line,) = doctor.check_hub()
        close_session()
    assert (line.state, value in line.found) == (state, True)


def test_a_full_disk_is_wrong_and_little_space_for_models_a_note(recipe: Recipe, monkeypatch: Patch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(10**9 // 2))
    found = lines(recipe, 1)
    assert wrong(found) == {"runs", "cache"} and found["models"]["state"] == "note"


def test_a_check_that_fails_leaves_the_others(recipe: Recipe, monkeypatch: Patch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: 1 / 0)
    found = lines(recipe, 1)
    assert wrong(found) == {"GPU"} and "ZeroDivisionError" in found["GPU"]["found"]
    assert found["lock"]["state"] == "ok"


def test_a_command_stands_in_a_line_of_its_own_to_paste(recipe: Recipe, monkeypatch: Patch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [T4 | {"driver": "550.54.14"}])
    done = recipe("doctor")
    assert done.returncode == 1 and OLDER in map(str.strip, done.stdout.splitlines())
