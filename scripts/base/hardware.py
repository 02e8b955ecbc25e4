"""GPUs and the CPU of this machine."""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, TypedDict

GIB = 2**30


class GpuInfo(TypedDict, total=False):
    """An NVIDIA GPU, or a MIG instance of one."""

    name: str
    memory_gib: float
    compute_capability: str
    driver: str


def cpu_name() -> str:
    """The processor's name."""
    name = re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return name[1].strip() if name else platform.machine()


def cpu_has_bf16() -> bool:
    """True if the processor has bf16 instructions; otherwise fp32 is faster than bf16."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(Path("/proc/cpuinfo").read_text().split())


def all_gpus() -> list[GpuInfo]:
    """All GPUs of this machine, regardless of CUDA_VISIBLE_DEVICES."""
    with _driver() as handles:
        return [_gpu_info(handle) for handle in handles]


def visible_gpus() -> dict[str, GpuInfo]:
    """GPUs visible to CUDA in this process.

    The keys are the names in CUDA_VISIBLE_DEVICES; if it is not set, the numbers of all GPUs. The rules are CUDA's
    (CUDA C++ Programming Guide, "CUDA Environment Variables"). The list ends at the first unknown name, and a GPU split
    by MIG stands for its first instance. Numbers follow CUDA_DEVICE_ORDER=PCI_BUS_ID, because CUDA's default order puts
    the fastest GPU first by an unpublished rule.
    """
    visible = {}
    with _driver() as handles:
        numbers = ",".join(map(str, range(len(handles))))
        listed = os.environ.get("CUDA_VISIBLE_DEVICES", numbers)
        for name in map(str.strip, listed.split(",")):
            handle = _handle(name, handles)
            if handle is None:
                break
            visible[name] = _gpu_info(handle)
    return visible


@contextmanager
def _driver() -> Iterator[list[Any]]:
    """NVML handles of this machine's GPUs, in bus order; empty without a driver."""
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
    """NVML handle of a GPU or MIG instance, by its name in CUDA_VISIBLE_DEVICES."""
    import pynvml

    if name.startswith("MIG-"):
        with suppress(pynvml.NVMLError):
            return pynvml.nvmlDeviceGetHandleByUUID(name)
        return None
    if not name:  # an empty list, or no GPU
        return None
    if name.isdecimal():
        gpus = handles[int(name) : int(name) + 1]
    else:
        gpus = [handle for handle in handles if pynvml.nvmlDeviceGetUUID(handle).startswith(name)]
    if len(gpus) != 1:
        return None
    with suppress(pynvml.NVMLError):  # most GPUs lack MIG
        if pynvml.nvmlDeviceGetMigMode(gpus[0])[0]:
            return pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpus[0], 0)
    return gpus[0]


def _gpu_info(handle: Any) -> GpuInfo:
    import pynvml

    gpu = handle
    with suppress(pynvml.NVMLError):  # not a MIG instance
        gpu = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(gpu)
    return {
        "name": pynvml.nvmlDeviceGetName(handle),
        "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / GIB, 1),
        "compute_capability": f"{major}.{minor}",
        "driver": pynvml.nvmlSystemGetDriverVersion(),
    }


def torch_cuda() -> str | None:
    """CUDA version of the installed torch, found without the slow import of torch."""
    source = Path(str(distribution("torch").locate_file("torch/version.py"))).read_text()
    built_for = re.search(r"^cuda\b.*= '([\d.]+)'", source, re.MULTILINE)
    return built_for[1] if built_for else None
