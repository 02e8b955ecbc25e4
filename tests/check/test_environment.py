"""Broken environments, each found by `recipe doctor`, with a remedy."""

import shutil
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from conftest import Recipe

from qlora_recipes.base import hardware, paths
from qlora_recipes.check import environment

Patch = pytest.MonkeyPatch
Lines = dict[str, dict[str, str]]
TORCH = {"version": "2.14.1+cu130", "cuda": "13.0", "gpus": 1, "problem": ""}
T4 = {"name": "Tesla T4", "memory_gib": 15.0, "compute_capability": "7.5", "driver": "580.65.06"}
OLDER = "make setup CUDA=12.6"
USAGE = SimpleNamespace(free=10**9 // 2, total=10**9)


@pytest.fixture(autouse=True)
def healthy(monkeypatch: Patch) -> None:
    """A machine with a T4 whose torch sees it, and no network."""
    monkeypatch.setattr(hardware, "all_gpus", lambda: [T4])
    monkeypatch.setattr(environment, "ask_torch", lambda: TORCH)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def lines(recipe: Recipe, code: int) -> Lines:
    return {line["name"]: line for line in recipe.json("doctor", code=code)}


def wrong(lines_by_name: Lines) -> set[str]:
    """Names of the lines with a fault; each has a remedy."""
    faults = {name: line["remedy"] for name, line in lines_by_name.items() if line["state"] == "wrong"}
    assert [name for name, remedy in faults.items() if not remedy] == []
    return set(faults)


def test_each_check_of_a_whole_environment_is_one_line(recipe):
    by_name = lines(recipe, 0)
    assert list(by_name) == ["torch", "GPU", "lock", "runs", "cache", "models"]
    assert {by_name[name]["state"] for name in ("torch", "GPU", "lock", "runs", "cache")} == {"ok"}


@pytest.mark.parametrize(
    ("module", "name", "returns", "code", "states"),
    [
        (hardware, "all_gpus", lambda: [], 0, {"torch": "ok", "GPU": "note"}),
        (environment, "ask_torch", lambda: TORCH | {"gpus": 0}, 0, {"GPU": "note"}),
        (shutil, "disk_usage", lambda _: USAGE, 1, {"runs": "wrong", "cache": "wrong", "models": "note"}),
    ],
    ids=["no GPU", "hidden GPUs", "half a GB free"],
)
def test_what_a_machine_lacks_is_wrong_or_a_note_and_leaves_the_other_checks(
    recipe, monkeypatch, module, name, returns, code, states
):
    monkeypatch.setattr(module, name, returns)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    by_name = lines(recipe, code)
    assert {name: by_name.get(name, {}).get("state") for name in states} == states
    assert wrong(by_name) == {name for name, state in states.items() if state == "wrong"}


@pytest.mark.parametrize(
    ("torch", "problem"),
    [
        ({"cuda": None, "gpus": 0}, f"{TORCH['version']}, built without CUDA"),
        ({"gpus": 0, "problem": "Error 802"}, "Error 802"),
        ({"problem": "no kernel image"}, "no kernel image"),
    ],
)
def test_torch_has_to_compute_on_the_gpu(recipe, monkeypatch, torch, problem):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(environment, "ask_torch", lambda: TORCH | torch)
    by_name = lines(recipe, 1)
    assert wrong(by_name) == {"GPU"}
    assert by_name["GPU"]["command"] == OLDER
    assert by_name["GPU"]["found"].partition("; ")[2] == f"torch does not compute on it: {problem}"


@pytest.mark.parametrize(
    ("probe", "timeout", "error"),
    [
        ("raise ImportError('libcudart.so.13')", 60, "ImportError: libcudart.so.13"),
        ("import time; time.sleep(60)", 0.2, "no answer within 0.2 s"),
    ],
)
def test_torch_is_asked_in_a_process_that_may_crash(monkeypatch, probe, timeout, error):
    monkeypatch.undo()
    monkeypatch.setattr(environment, "_PROBE", probe)
    monkeypatch.setattr(environment, "TIMEOUT", timeout)
    (line,) = environment.check_torch()
    command = environment.reinstall_torch()
    assert line == environment.Line("torch", "wrong", f"cannot be imported: {error}", "reinstall it", command)


def test_torch_is_asked(monkeypatch):
    monkeypatch.undo()
    facts = environment.ask_torch()
    assert facts["version"].partition("+")[0] == version("torch").partition("+")[0]
    assert facts["gpus"] == 0


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            "orjson==0.0.1 ; sys_platform == 'linux' \\\n    --hash=sha256:00\n",
            f"1 differ, such as orjson==0.0.1 (installed: {version('orjson')})",
        ),
        (  # for another platform
            "# by uv\ngone==1.0 ; python_full_version < '3.0' \\\n    --hash=sha256:00\n",
            "the installed packages match requirements.lock",
        ),
        (  # torch for another CUDA requires other packages
            "torch==2.14.1\ntriton==3.0\nnvidia-nothing-cu13==13.0\n",
            "the installed packages match requirements.lock",
        ),
        ("gone==1.0\n", "1 differ, such as gone==1.0 (installed: none)"),
        ("torch==2.14.1\ntriton==3.1\n", "1 differ, such as triton==3.1 (installed: 3.0)"),
    ],
)
def test_packages_have_to_be_those_of_the_lock(tmp_path, monkeypatch, content, text):
    monkeypatch.setattr(paths, "LOCK", tmp_path / "requirements.lock")
    paths.LOCK.write_text(content)
    if "torch" in content:
        monkeypatch.setattr(environment, "package_version", {"torch": "2.14.1+cu126", "triton": "3.0"}.get)
    (line,) = environment.check_lock()
    assert line.found == text
    assert line.state == ("ok" if text.startswith("the ") else "wrong")
