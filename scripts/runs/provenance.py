"""Provenance of a run: source, packages, machine."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from ..base import paths
from ..base.files import sha256
from ..base.machine import cpu, torch_cuda, visible_gpus
from ..base.progress import say
from .records import Git, Provenance

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


def collect() -> Provenance:
    """Git state, lock, package versions, the CUDA of torch, and machine, for run.json."""
    return {
        "git": _git(),
        "lock_sha256": sha256(paths.LOCK) if paths.LOCK.is_file() else None,
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch_cuda(),
        "python": platform.python_version(),
        "host": platform.node(),
        "os": platform.platform(),
        "cpu": cpu(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [*visible_gpus().values()],
    }


def other_axolotl(made_with: Any) -> str:
    """What is to be said of something that another Axolotl made than is installed; empty where none did, or it is not
    recorded.

    Args:
        made_with: the versions of packages that its record has, by name.
    """
    theirs = made_with.get("axolotl") if isinstance(made_with, dict) else None
    ours = _version("axolotl")
    return f"made with Axolotl {theirs}, and {ours} is installed" if theirs and ours not in (None, theirs) else ""


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> Git | None:
    """Revision of the checkout that the recipes are from, and whether it had changes; None outside of one, and where
    git refuses to look, as into one of another owner, which is said."""
    if not paths.LOCK.is_file():
        return None  # installed from a wheel; a repository around it would be another's

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(paths.RECIPES), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return done.stdout.strip()

    # GIT_DIR and its like would name another repository; without that lock, status leaves the checkout's index as it is
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except OSError as error:
        problem = str(error)
    except subprocess.CalledProcessError as error:
        problem = error.stderr.strip()
    if "not a git repository" not in problem:
        say(f"no git revision is recorded: {problem.partition('\n')[0]}")
    return None
