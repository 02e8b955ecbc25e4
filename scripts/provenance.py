"""What a run was made of: source, packages, machine."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import paths
from .files import sha256

PACKAGES = [
    "qlora-recipes",
    "axolotl",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "tokenizers",
]


def collect() -> dict[str, Any]:
    """Git state, lock, package versions and machine, for run.json."""
    return {
        "git": _git(),
        "lock_sha256": sha256(paths.LOCK) if paths.LOCK.is_file() else None,
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "host": platform.node(),
        "os": platform.platform(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "gpus": gpus(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Revision of the checkout that the recipes are from, and whether it had changes; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(paths.RECIPES), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    if not paths.LOCK.is_file():
        return None  # installed from a wheel; a repository around it would be another's
    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


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
