"""Checks of torch, GPUs, installed packages, and disks."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
from packaging.requirements import Requirement

from ..base import hardware, paths
from ..base.errors import with_type
from ..base.files import free_bytes
from ..base.processes import package_version

OLDER_CUDA = "12.6"
"""CUDA of `make setup CUDA=` for older drivers and GPUs."""
TIMEOUT = 180
"""Seconds to wait for the import of torch, which is slow on a network disk."""
_PROBE = """
import json, torch
facts = {"version": torch.__version__, "cuda": torch.version.cuda, "problem": ""}
try:
    for i in range(torch.cuda.device_count()):
        torch.ones(1, device=f"cuda:{i}").add(1).item()
    torch.cuda.init()
except Exception as error:
    facts["problem"] = str(error).strip().partition("\\n")[0]
print(json.dumps(facts | {"gpus": torch.cuda.device_count()}))
"""
_LOCKED = re.compile(r"^(?!nvidia-|cuda-)\w[^\\\n]+", re.MULTILINE)
"""Requirements of the lock, without the CUDA libraries, which depend on the build of torch."""
_SHOWN = 5  # maximum number of different packages to list
_MODEL_GB = 20  # required free space; an 8B model takes 16

Facts = dict[str, Any]
State = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Line:
    """Result of one check.

    Attributes:
        name: the subject.
        state: `ok`; `note` for a limit that is not an error; or `wrong`.
        found: the finding.
        remedy: the advice to the user.
        command: shell command of the remedy, or empty.
    """

    name: str
    state: State
    found: str
    remedy: str = ""
    command: str = ""


def check_environment() -> list[Line]:
    """Run every check; if a check fails, its line says so."""
    lines: list[Line] = []
    for name, check in {"torch": check_torch, "lock": check_lock, "disk": check_disks}.items():
        try:
            lines += check()
        except Exception as error:  # a broken environment can raise anything
            text = f"the check failed: {with_type(error)}"
            lines.append(Line(name, "wrong", text, "if the other lines do not explain it, report this output"))
    return lines


def ask_torch() -> Facts:
    """Facts about torch; only the key `error` if it cannot be imported.

    A separate process imports torch, because the import can crash or hang.
    """
    command = [sys.executable, "-P", "-c", _PROBE]  # -P: import no modules from the current folder
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {TIMEOUT} s"}
    if done.returncode:
        return {"error": ([f"exit code {done.returncode}", *done.stderr.strip().splitlines()])[-1]}
    return dict(orjson.loads(done.stdout.splitlines()[-1]))


def check_torch() -> Iterator[Line]:
    """Check that torch can be imported, and that it computes on each GPU."""
    gpus, facts, visible = hardware.all_gpus(), ask_torch(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if "error" in facts:
        yield Line("torch", "wrong", f"cannot be imported: {facts['error']}", "reinstall it", reinstall_torch())
        return
    cuda = f"for CUDA {facts['cuda']}" if facts["cuda"] else "without CUDA"
    built = f"{facts['version']}, built {cuda}"
    yield Line("torch", "ok", built)
    if not gpus:
        yield Line(
            "GPU",
            "note",
            "no NVIDIA GPU found; training needs one, but rehearsals, checks, plans and reports do not",
            remedy="if this machine has a GPU, `nvidia-smi` shows why it is not found",
        )
        return
    names = [f"{gpu['name']} ({gpu['compute_capability']}), driver {gpu['driver']}" for gpu in gpus]
    listed = "; ".join(dict.fromkeys(names))
    if not facts["gpus"] and visible is not None:
        yield Line(
            "GPU",
            "note",
            f"{listed}; CUDA_VISIBLE_DEVICES={visible} hides it",
            remedy="unset it to use the GPU",
            command="unset CUDA_VISIBLE_DEVICES",
        )
    elif facts["problem"] or not facts["gpus"]:
        yield Line(
            "GPU",
            "wrong",
            f"{listed}; torch does not compute on it: {facts['problem'] or built}",
            remedy=f"install a newer driver, or torch's build for CUDA {OLDER_CUDA}, which has kernels for older GPUs",
            command=install_older_torch(),
        )
    else:
        yield Line("GPU", "ok", listed)


def reinstall_torch() -> str:
    """Command that installs torch again; in a checkout it must be run there."""
    if paths.LOCK.is_file():
        return "rm -r .venv && make setup"
    return "uv pip install --reinstall-package torch --torch-backend auto torch"


def install_older_torch() -> str:
    """Command that installs torch's build for `OLDER_CUDA`; in a checkout it must be run there."""
    if paths.LOCK.is_file():
        return f"make setup CUDA={OLDER_CUDA}"
    return f"uv pip install --reinstall-package torch --torch-backend cu{OLDER_CUDA.replace('.', '')} torch"


def check_lock() -> Iterator[Line]:
    """Compare the versions of the installed packages with requirements.lock, which only a checkout has."""
    if not paths.LOCK.is_file():
        return
    different = []
    for requirement in map(Requirement, _LOCKED.findall(paths.LOCK.read_text(encoding="utf-8"))):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        installed = package_version(requirement.name)
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            different.append(f"{requirement.name}{requirement.specifier} (installed: {installed or 'none'})")
    if different:
        differences = f"{len(different)} differ, such as {', '.join(different[:_SHOWN])}"
        command = "touch requirements.lock && make setup"
        yield Line("lock", "wrong", differences, "install the required versions", command)
    else:
        yield Line("lock", "ok", "the installed packages match requirements.lock")


def check_disks() -> Iterator[Line]:
    """Check the free space for runs, cache and models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = {
        "runs": (paths.runs(), 1, "use --runs with a folder on a disk with more space"),
        "cache": (paths.cache(), 1, "set XDG_CACHE_HOME to a folder with more space"),
        "models": (Path(HF_HUB_CACHE), _MODEL_GB, "set HF_HUB_CACHE to a folder with more space"),
    }
    for name, (folder, needed, remedy) in folders.items():
        free = free_bytes(folder) / 1e9
        text = f"{free:.1f} GB free for {folder.absolute()}"
        if free >= needed:
            yield Line(name, "ok", text)
        else:
            state: State = "note" if name == "models" else "wrong"
            yield Line(name, state, f"{text}; at least {needed} GB are needed", remedy)
