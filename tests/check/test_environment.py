"""Broken environments, each found by `recipe doctor`, with a remedy."""

import shutil
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from conftest import Recipe
from file_server import serving
from huggingface_hub import close_session, constants

from qlora_recipes.base import hardware, hub, paths
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


def wrong(found: Lines) -> set[str]:
    assert all(line["remedy"] for line in found.values() if line["state"] == "wrong")
    return {name for name, line in found.items() if line["state"] == "wrong"}


def test_each_check_of_a_whole_environment_is_one_line(recipe):
    found = lines(recipe, 0)
    assert list(found) == ["torch", "GPU", "lock", "hub", "runs", "cache", "models"]
    assert {found[name]["state"] for name in ("torch", "GPU", "lock", "runs", "cache")} == {"ok"}
    assert found["hub"]["state"] == "note" and "HF_HUB_OFFLINE" in found["hub"]["found"]


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
    found = lines(recipe, code)
    assert {name: found.get(name, {}).get("state") for name in states} == states
    assert wrong(found) == {name for name, state in states.items() if state == "wrong"}


@pytest.mark.parametrize(
    "torch", [{"cuda": None, "gpus": 0}, {"gpus": 0, "problem": "Error 802"}, {"problem": "no kernel image"}]
)
def test_torch_has_to_compute_on_the_gpu(recipe, monkeypatch, torch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(environment, "ask_torch", lambda: TORCH | torch)
    found = lines(recipe, 1)
    assert wrong(found) == {"GPU"} and found["GPU"]["command"] == OLDER
    assert torch.get("problem", "without CUDA") in found["GPU"]["found"]


@pytest.mark.parametrize(
    ("probe", "error"),
    [("raise ImportError('libcudart.so.13')", "libcudart.so.13"), ("import time; time.sleep(60)", "")],
)
def test_torch_is_asked_in_a_process_that_may_crash(monkeypatch, probe, error):
    monkeypatch.undo()
    monkeypatch.setattr(environment, "_PROBE", probe)
    monkeypatch.setattr(environment, "TIMEOUT", 60 if error else 0.2)
    facts = environment.ask_torch()
    assert facts.keys() == {"error"} and error in facts["error"]
    monkeypatch.setattr(environment, "ask_torch", lambda: facts)
    (line,) = environment.check_torch()
    assert line.state == "wrong" and line.command


def test_torch_is_asked(monkeypatch):
    monkeypatch.undo()
    facts = environment.ask_torch()
    assert facts["version"].startswith(version("torch")) and facts["gpus"] == 0


@pytest.mark.parametrize(
    ("content", "state", "found"),
    [
        ("orjson==0.0.1 ; sys_platform == 'linux' \\\n    --hash=sha256:00\n", "wrong", "orjson==0.0.1"),
        ("# by uv\ngone==1.0 ; python_full_version < '3.0' \\\n    --hash=sha256:00\n", "ok", ""),
        ("torch==2.14.1\ntriton==3.0\nnvidia-nothing-cu13==13.0\n", "ok", ""),  # torch for another CUDA has its own
        ("torch==2.14.1\ntriton==3.1\n", "wrong", "triton==3.1"),
    ],
)
def test_packages_have_to_be_those_of_the_lock(recipe, tmp_path, monkeypatch, content, state, found):
    monkeypatch.setattr(paths, "LOCK", tmp_path / "requirements.lock")
    paths.LOCK.write_text(content)
    if "torch" in content:
        monkeypatch.setattr(environment, "package_version", {"torch": "2.14.1+cu126", "triton": "3.0"}.get)
    line = lines(recipe, 0 if state == "ok" else 1)["lock"]
    assert line["state"] == state
    assert found in line["found"]


@pytest.mark.parametrize(
    ("answers", "state", "value"),
    [([], "ok", "2"), ([403], "note", "a/closed"), ([401, 401], "wrong", ""), ([500] * 12, "note", "500")],
)
def test_the_hub_is_asked_for_the_recipes_models(monkeypatch, answers, state, value):
    with serving(monkeypatch) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url.partition("/files")[0])
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "_answers", {})
        monkeypatch.setattr(environment, "base_models", lambda: ["a/closed", "b/open"])
        monkeypatch.setenv("HF_TOKEN", "hf_QxW3vBn7mKzLp0aSdFgH")
        server.content, server.answers, server.error_code = b"{}", answers, "GatedRepo" if 403 in answers else ""
        close_session()
        (line,) = environment.check_hub()
        close_session()
    assert line.state == state
    assert value in line.found
