"""This machine: its clock, processor and GPUs."""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict


class Card(TypedDict, total=False):
    """An NVIDIA GPU, or a part of one (MIG)."""

    name: str
    memory_gib: float
    compute_capability: str
    driver: str


def cpu() -> str:
    """The processor's name."""
    name = re.search(r"^model name\s*:\s*(.+)", _cpuinfo(), re.MULTILINE)
    return name[1].strip() if name else platform.machine()


def cpu_has_bf16() -> bool:
    """True if the processor has instructions for bf16, which without them is slower than fp32."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_cpuinfo().split())


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def gpus() -> list[Card]:
    """All GPUs of this machine, whatever CUDA_VISIBLE_DEVICES says."""
    with _driver() as handles:
        return [_card(handle) for handle in handles]


def visible_gpus() -> dict[str, Card]:
    """The GPUs that CUDA shows to this process, in its order, each by its name in CUDA_VISIBLE_DEVICES.

    As CUDA does (CUDA C++ Programming Guide, "CUDA Environment Variables"): the list ends at the first name that is no
    GPU's, a list that names one twice is empty, and a GPU that is divided (MIG) is its first instance.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None and not listed.strip():
        return {}
    found: dict[str, Card] = {}
    with _driver() as handles:
        if os.environ.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST") == "FASTEST_FIRST":
            handles.sort(key=_speed, reverse=True)
        every = map(str, range(len(handles)))
        for name in every if listed is None else map(str.strip, listed.split(",")):
            handle = _handle(name, handles)
            if handle is None:
                break
            if name in found:
                return {}
            found[name] = _card(handle)
    return found


@contextmanager
def _driver() -> Iterator[list[Any]]:
    """NVML's handles of this machine's GPUs, in their order on the bus; empty without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield []
        return
    try:
        yield [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _handle(name: str, handles: list[Any]) -> Any:
    """NVML's handle of the GPU, or the part of one, that a name in CUDA_VISIBLE_DEVICES means; None for no GPU."""
    import pynvml

    if name.startswith("MIG-"):
        with suppress(pynvml.NVMLError):
            return pynvml.nvmlDeviceGetHandleByUUID(name)
        return None
    if name.isdecimal():
        named = handles[int(name) : int(name) + 1]
    else:
        named = [handle for handle in handles if name and pynvml.nvmlDeviceGetUUID(handle).startswith(name)]
    if len(named) != 1:
        return None
    with suppress(pynvml.NVMLError):  # most cannot be divided
        if pynvml.nvmlDeviceGetMigMode(named[0])[0]:
            return pynvml.nvmlDeviceGetMigDeviceHandleByIndex(named[0], 0)
    return named[0]


def _speed(handle: Any) -> int:
    """The figure by which CUDA probably orders GPUs as FASTEST_FIRST, whose rule is not published."""
    import pynvml

    with suppress(pynvml.NVMLError):  # a part of a GPU does not tell
        clock = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
        return int(pynvml.nvmlDeviceGetNumGpuCores(handle) * clock)
    return 0


def _card(handle: Any) -> Card:
    import pynvml

    whole = handle
    with suppress(pynvml.NVMLError):  # it is no part of one
        whole = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(whole)
    return {
        "name": pynvml.nvmlDeviceGetName(handle),
        "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
        "compute_capability": f"{major}.{minor}",
        "driver": pynvml.nvmlSystemGetDriverVersion(),
    }


def torch_cuda() -> str | None:
    """The CUDA that the installed torch is built for, as its own file says: importing torch takes seconds."""
    spec = find_spec("torch")
    source = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    built_for = re.search(r"^cuda\b.*= '([\d.]+)'", source, re.MULTILINE)
    return built_for[1] if built_for else None


def now() -> str:
    """The time in UTC, in the form of run.json."""
    return datetime.now(UTC).isoformat(timespec="seconds")
