"""What is known of this machine: its clock, processor and GPUs."""

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def cpu_has_bf16() -> bool:
    """Whether the processor has instructions for bf16; without them it is slower than fp32."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def gpus() -> list[dict[str, Any]]:
    """Name, memory in GiB, compute capability and driver of each NVIDIA GPU; empty where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = []
        for i in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            found.append(
                {
                    "name": pynvml.nvmlDeviceGetName(handle),
                    "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
                    "compute_capability": f"{major}.{minor}",
                    "driver": pynvml.nvmlSystemGetDriverVersion(),
                }
            )
        return found
    finally:
        pynvml.nvmlShutdown()


def now() -> str:
    """The time in UTC, as run.json writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
