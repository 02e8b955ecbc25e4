"""The GPUs that CUDA shows, from a made-up driver (a T4, an A100, one in two parts); and processes that end."""

import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_recipes.base import hardware, processes
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.processes import bounded, start_child
from qlora_recipes.config import gpus
from qlora_recipes.run.backends.local import Local

A100 = "NVIDIA A100-SXM4-40GB"
PARTS = [{"name": f"{A100} MIG {size}g", "uuid": f"MIG-{size}", "gib": 5 * size, "whole": 2} for size in (1, 3)]
CARDS: list[dict[str, Any]] = [
    {"name": "Tesla T4", "uuid": "GPU-1a", "gib": 15, "capability": (7, 5)},
    {"name": A100, "uuid": "GPU-1b", "gib": 40, "capability": (8, 0)},
    {"name": A100, "uuid": "GPU-2c", "gib": 40, "capability": (8, 0), "parts": PARTS},
]


class _Error(Exception):
    """Error of NVML."""


def _by_uuid(uuid: str) -> dict[str, Any]:
    for card in (*CARDS, *PARTS):
        if card["uuid"] == uuid:
            return card
    raise _Error


def _whole(handle: dict[str, Any]) -> dict[str, Any]:
    if "whole" not in handle:
        raise _Error
    return CARDS[handle["whole"]]


@pytest.fixture(autouse=True)
def _driver(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = SimpleNamespace(
        NVMLError=_Error,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(CARDS),
        nvmlDeviceGetHandleByIndex=CARDS.__getitem__,
        nvmlDeviceGetHandleByUUID=_by_uuid,
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=_whole,
        nvmlDeviceGetMigMode=lambda handle: [int("parts" in handle), 0],
        nvmlDeviceGetMigDeviceHandleByIndex=lambda handle, i: handle["parts"][i],
        nvmlDeviceGetUUID=lambda handle: handle["uuid"],
        nvmlDeviceGetName=lambda handle: handle["name"],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=handle["gib"] * 2**30),
        nvmlDeviceGetCudaComputeCapability=lambda handle: handle["capability"],
        nvmlSystemGetDriverVersion=lambda: "580.0",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


@pytest.mark.parametrize(
    ("listed", "memory"),
    [
        (None, {"0": 15, "1": 40, "2": 5}),
        ("", {}),
        ("1,0", {"1": 40, "0": 15}),
        ("1, 0,7,0", {"1": 40, "0": 15}),
        ("GPU-1b", {"GPU-1b": 40}),
        ("GPU-1", {}),  # two begin like that
        ("GPU-2,GPU-1a", {"GPU-2": 5, "GPU-1a": 15}),
        ("MIG-3", {"MIG-3": 15}),
    ],
)
def test_gpus_are_those_that_cuda_shows(monkeypatch, listed, memory):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    visible = [(name, card["memory_gib"]) for name, card in hardware.visible_gpus().items()]
    assert visible == list(memory.items())
    assert len(hardware.all_gpus()) == 3


def test_checks_and_plans_are_for_the_first_that_is_shown(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    here = gpus.here()
    assert here
    assert (here.name, here.capability, here.memory) == (A100, (8, 0), 40)
    assert Local(rehearsal=False, jobs=2).devices == ["1", "0"]
    monkeypatch.setitem(CARDS[1], "gib", 24)  # a size that gpus.yaml does not list for this name
    other = gpus.here()
    assert other
    assert (other.memory, other.tflops) == (24, here.tflops)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    part = gpus.here()
    assert part
    assert (part.capability, part.memory) == ((8, 0), 5)


@pytest.mark.parametrize("options", [{}, {"env": {}}])
def test_no_python_below_a_child_imports_from_the_working_directory(tmp_path, options):
    (tmp_path / "colorsys.py").write_text("raise SystemExit(3)")
    command = [sys.executable, "-m", "colorsys"]
    script = f"import subprocess; raise SystemExit(subprocess.call({command}))"
    assert start_child(command, cwd=tmp_path, **options).wait() == 0
    assert start_child([sys.executable, "-c", script], cwd=tmp_path, **options).wait() == 0  # as of torchrun's ranks


@pytest.mark.parametrize(
    ("text", "work"),
    [
        ("(a+)+b", lambda: re.fullmatch("(a+)+b", "a" * 60)),
        ("a loop", lambda: [0 for _ in range(10**12) if False]),
        ("a power", lambda: 9**9**9),
        ("a text", lambda: "a" * 10**10),
    ],
)
def test_work_of_another_author_is_bounded(monkeypatch, text, work):
    monkeypatch.setattr(processes, "SECONDS", 0.2)
    monkeypatch.setattr(processes, "_exceeding", set())
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    for doing in (work, str):  # the second time, it is not tried
        with pytest.raises(UserError) as refused, bounded(text):
            doing()
        assert str(refused.value) == f"{text}: takes more than 0.2 s or 256 MiB"
    with bounded("an easy pattern"):
        assert re.fullmatch("a+", "a" * 60)
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_outside_the_main_thread_loops_and_memory_are_bounded(monkeypatch):
    monkeypatch.setattr(processes, "SECONDS", 0.2)
    monkeypatch.setattr(processes, "_exceeding", set())

    def refused(text: str, work: Callable[[], object]) -> str:
        try:
            with bounded(text):
                work()
        except UserError as error:
            return str(error)
        return ""

    works = {
        "a loop": lambda: [0 for _ in range(10**12) if False],
        "a text": lambda: "a" * 10**10,
        "easy": lambda: time.sleep(0.1),
    }
    with ThreadPoolExecutor(1) as thread:
        messages = [thread.submit(refused, *work).result() for work in works.items()]
        thread.submit(time.sleep, 0.2).result()  # no error comes later
    limits = "takes more than 0.2 s or 256 MiB"
    assert messages == [f"a loop: {limits}", f"a text: {limits}", ""]
