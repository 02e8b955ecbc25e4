"""This machine: folders with their room and locks, memory, caches, SLURM and containers."""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..backends.slurm_queue import ask
from ..backends.slurm_settings import settings_file, site_settings
from ..base import paths
from ..base.errors import UserError
from ..base.locks import held
from ..data.hub import within
from .line import Line, in_shell

PATIENCE = 10.0
"""How many seconds SLURM, and the counting of a cache, may take."""
REHEARSAL = 3.0
"""GiB of main memory that a rehearsal of a shipped recipe takes, rounded up."""
_WRITTEN = 1 << 20  # bytes: a quota that is used up shows only when something is written
_TOOLKIT = "https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/install-guide.html"
_GROUPS = (  # of cgroup 2 and 1: the line of /proc/self/cgroup; the folder, the limit's file and that of what is used;
    # and the prefix, in memory.stat, of the pages of files, which count as used but can be freed
    (r"^0::/(.*)", "", "memory.max", "memory.current", ""),
    (r"^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:/(.*)", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


@dataclass(frozen=True)
class Folder:
    """A folder that is written to.

    Attributes:
        name: what it is for.
        path: where it is, or will be.
        needs: GB that it takes at the least.
        remedy: how another is chosen.
        command: what to paste for that.
        locks: whether its files are locked.
        wants: GB below which there is something to know, and what that is.
    """

    name: str
    path: Path
    needs: float
    remedy: str
    command: str = ""
    locks: bool = True
    wants: tuple[float, str] = (0, "")


def folder_lines() -> list[Line]:
    """A line for each folder that runs, caches and temporary files go to."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    of_models = 20, "a 7B model takes 14 GB, an 8B one 16"
    room, of_home = "on a disk with room", "export {}=/path/with/room"
    # the hub's folder, with its token, would follow XDG_CACHE_HOME
    stays = "" if os.environ.get("HF_HOME") else f" HF_HOME={in_shell(Path(HF_HOME))}"
    folders = [
        Folder("runs", paths.RUNS, 1, f"work in a folder {room}, or name one with --runs", "cd /path/with/room"),
        Folder("cache", paths.cache(), 1, f"put it {room}", of_home.format("XDG_CACHE_HOME") + stays),
        Folder("hub's cache", Path(HF_HUB_CACHE), 1, f"put it {room}", of_home.format("HF_HUB_CACHE"), wants=of_models),
        Folder("temporary files", Path(tempfile.gettempdir()), 0.5, f"put them {room}", of_home.format("TMPDIR"),
               locks=False),
    ]  # fmt: skip
    return [*map(folder_line, folders)]


def folder_line(folder: Folder) -> Line:
    """Whether a folder has room, can be written to, and locks files."""
    there = next(place for place in (folder.path.absolute(), *folder.path.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        if there.is_symlink():
            text, mend = f"{there} is a link to what is not there", "mount the drive that it leads to"
        else:
            text, mend = f"{there} is no folder", "rename it"
        return Line(folder.name, "wrong", text, f"{mend}, or {folder.remedy}", folder.command)
    free = shutil.disk_usage(there).free / 1e9
    about = f"{there}: {free:.1f} GB free"

    def wrong(problem: str) -> Line:
        return Line(folder.name, "wrong", f"{about}, {problem}", folder.remedy, folder.command)

    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".recipe-doctor-") as file:
            file.write(bytes(_WRITTEN))
            file.flush()
            os.fsync(file.fileno())
            if folder.locks:
                with held(Path(f"{file.name}.lock"), "in use", remove=True):
                    pass
    except OSError as error:
        return wrong(f"but it cannot be written to: {error.strerror}")
    except UserError as error:
        return wrong("but its file system does not lock files" if "flock" in str(error) else str(error))
    if free < folder.needs:
        return wrong(f"less than the {folder.needs:g} GB that it takes at the least")
    if free < folder.wants[0]:
        return Line(folder.name, "note", f"{about}; {folder.wants[1]}", folder.remedy, folder.command)
    return Line(folder.name, "ok", f"{about}{', locks files' if folder.locks else ''}")


def memory(root: Path = Path("/")) -> Line:
    """Main memory, and the limits on it of a container or a job.

    Args:
        root: where /proc, /sys and /dev are.
    """
    whole = psutil.virtual_memory()
    free, text = whole.available / 2**30, f"{whole.total / 2**30:.1f} GiB, {whole.available / 2**30:.1f} free"
    left, limit = min(_limits(root), default=(0, whole.total))
    if limit < whole.total:
        free = min(free, left / 2**30)
        text += f", limited to {limit / 2**30:.1f} GiB here, {left / 2**30:.1f} of these free"
    if free < REHEARSAL:
        remedy = f"a rehearsal takes {REHEARSAL:g} GiB; end what else runs, or give the container or job more"
        return Line("memory", "wrong", text, remedy, "ps -eo pid,rss,comm --sort=-rss | head")
    shared = root / "dev" / "shm"
    if shared.is_dir() and (size := shutil.disk_usage(shared).total / 2**30) < 1:
        remedy = "several ranks, and workers that load data, exchange theirs there: docker run --shm-size=8g"
        return Line("memory", "note", f"{text}; only {size:.2f} GiB of it shared, in /dev/shm", remedy)
    return Line("memory", "ok", text)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Of each control group that this process is in: the bytes that are free, and its limit."""
    of_self = root / "proc" / "self" / "cgroup"
    groups = of_self.read_text() if of_self.is_file() else ""
    for line, folder, limit, used, prefix in _GROUPS:
        top = root / "sys" / "fs" / "cgroup" / folder
        place = re.search(line, groups, re.MULTILINE)
        group = top / place[1] if place else top
        for each in (group, *group.parents):
            if not each.is_relative_to(top):
                break
            number = _content(each / limit)
            if number.isdigit():
                cached = re.findall(rf"^{prefix}(?:in)?active_file (\d+)", _content(each / "memory.stat"), re.MULTILINE)
                yield max(int(number) - int(_content(each / used) or 0) + sum(map(int, cached)), 0), int(number)


def _content(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def caches() -> Line:
    """The caches and how much is in each."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    datasets = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")
    places = {"this project's": paths.cache(), "the hub's": Path(HF_HUB_CACHE), "data sets": datasets}
    sizes = (f"{name} {_size(place)} ({place})" for name, place in places.items())
    return Line("caches", "ok", ", ".join(sizes))


def _size(folder: Path) -> str:
    """The size of a folder in words; of one that takes long to go through, what it has at least."""
    deadline, size = time.monotonic() + PATIENCE / 3, 0
    for some in _sizes(folder):
        size += some
        if time.monotonic() > deadline:
            return f"at least {size / 1e9:.2f} GB"
    return f"{size / 1e9:.2f} GB" if folder.is_dir() else "empty"


def _sizes(folder: Path) -> Iterator[int]:
    for parent, _, names in folder.walk():  # links, which the hub's cache is full of, are not followed
        for name in names:
            try:
                yield (parent / name).lstat().st_size
            except OSError:  # it has gone meanwhile
                continue


def slurm() -> Line:
    """Whether SLURM answers here, and the settings for it are right."""
    if not shutil.which("sbatch"):
        return Line("SLURM", "ok", "none on this machine; `--on slurm` is for those of a cluster")
    try:
        partitions = within(PATIENCE, lambda: ask("sinfo", "--noheader", "--format=%R"))
    except (UserError, TimeoutError) as error:
        problem = str(error).removeprefix("--on slurm: ").strip().splitlines()[-1]
        remedy = "`--on slurm` does not work here; log in to a machine of the cluster, or ask those who run it"
        return Line("SLURM", "note", f"is installed, and does not answer: {problem}", remedy, "sinfo")
    try:
        site_settings([])
    except UserError as error:
        return Line("SLURM", "wrong", f"answers; its settings are wrong: {error}", "mend that file")
    settings = "has settings for it" if settings_file().is_file() else "is not there"
    named = ", ".join(dict.fromkeys(partitions.split())) or "none"
    return Line("SLURM", "ok", f"answers; partitions: {named}; {settings_file()} {settings}")


def container(root: Path = Path("/")) -> str | None:
    """What container this process is inside of; None outside of one."""
    if os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER"):
        return "Apptainer"
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "Kubernetes"
    marks = {".dockerenv": "Docker", "run/.containerenv": "Podman"}
    return next((name for mark, name in marks.items() if (root / mark).exists()), None)


def containers(gpus: int) -> Line:
    """Which programs for containers there are, and whether Docker can pass a GPU on.

    Args:
        gpus: how many the driver names.
    """
    if inside := container():
        return Line("containers", "ok", f"inside {'an' if inside == 'Apptainer' else 'a'} {inside} container")
    programs = [name for name in ("docker", "podman", "apptainer", "singularity") if shutil.which(name)]
    text = ", ".join(programs) or "none of docker, podman, apptainer"
    if "docker" in programs and gpus and not (shutil.which("nvidia-ctk") or shutil.which("nvidia-container-cli")):
        remedy = f"`docker run --gpus all` needs it: install it as {_TOOLKIT} says, then have Docker use it"
        return Line("containers", "note", f"{text}, without NVIDIA's container toolkit", remedy,
                    "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker")  # fmt: skip
    return Line("containers", "ok", text)
