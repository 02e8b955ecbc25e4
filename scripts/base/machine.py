"""This machine: its clock, processor and GPUs."""

import platform
import re
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict


class Card(TypedDict, total=False):
    """An NVIDIA GPU; `gpus` gives all of it."""

    name: str
    memory_gib: float
    compute_capability: str
    driver: str


def cpu() -> str:
    """The processor's name."""
    name = re.search(r"^model name\s*:\s*(.+)", _cpuinfo(), re.MULTILINE)
    return name[1].strip() if name else platform.machine()


def cpu_has_bf16() -> bool:
    """Whether the processor has instructions for bf16; without them it is slower than fp32."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_cpuinfo().split())


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def gpus() -> list[Card]:
    """The GPUs of this machine; empty if there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        cards: list[Card] = []
        for i in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            cards.append(
                {
                    "name": pynvml.nvmlDeviceGetName(handle),
                    "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
                    "compute_capability": f"{major}.{minor}",
                    "driver": pynvml.nvmlSystemGetDriverVersion(),
                }
            )
        return cards
    finally:
        pynvml.nvmlShutdown()


def torch_cuda() -> str | None:
    """The CUDA that the installed torch is built for, as its own file says: importing torch takes seconds."""
    spec = find_spec("torch")
    source = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    built_for = re.search(r"^cuda\b.*= '([\d.]+)'", source, re.MULTILINE)
    return built_for[1] if built_for else None


def now() -> str:
    """The time in UTC, in the form of run.json."""
    return datetime.now(UTC).isoformat(timespec="seconds")
