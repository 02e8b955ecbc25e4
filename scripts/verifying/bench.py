"""What the measurements of a verification share: the machine, a folder, and the figures that were found there."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten

from ..base import machine, paths
from ..base.errors import WorkFailed
from ..base.files import read_json, write_json
from ..base.private import names_here
from ..configs import gpus
from ..configs.gpus import Gpu

SHARE = 0.9
"""Of the GPU's free memory: the most that a verification takes, so that what else runs there goes on."""
RECIPE = "haider2024/code-llama-7b"
"""The recipe whose settings the stand-in is trained with."""
MEMORY = "verify.json"
"""The file in a run's folder that the plugin writes."""
STOP = "QLORA_RECIPES_VERIFY_STOP"
"""The environment variable that names the step for a training to stop after."""


class CannotBeShown(Exception):
    """This machine cannot do what a job measures; the message says what is missing."""


@dataclass(frozen=True)
class Figure:
    """A measured number, what was expected, and what else was seen; see `verified.Outcome`."""

    measured: float | None
    expected: float | None = None
    note: str = ""


Figures = Mapping[str, Figure]
"""The figures of one job, by line."""


@dataclass(frozen=True)
class Found:
    """What a job found: figures, or what this machine lacks for it, or what went wrong."""

    figures: Figures
    lacks: str = ""
    problem: str = ""


def anonymous(text: str) -> str:
    """A message in one line without folders, and without the names of this machine and its user."""
    text = re.sub(r"[\w.~-]*(/[^\s/:;,'\"()<>\[\]]+)+/?", "…", text)
    names = "|".join(rf"\b{re.escape(name)}\b" for name in names_here())
    return shorten(re.sub(names, "…", text), 300)


@dataclass(frozen=True)
class Bench:
    """Where a verification measures.

    Attributes:
        folder: for figures, runs and models.
        quick: whether to measure one shape, of few layers, in the place of three whole ones.
        gpu: the GPU that is measured; None for the CPU.
        gpus: how many of them can be used.
        free: bytes of its memory that nobody uses.
        bf16: whether the processor, or the GPU, has instructions for it.
    """

    folder: Path
    quick: bool = False
    gpu: Gpu | None = None
    gpus: int = 0
    free: int = 0
    bf16: bool = False

    @property
    def runs(self) -> Path:
        """The folder of its runs."""
        return self.folder / "runs"

    def found(self, job: str) -> Found | None:
        """What a job found; None where it was not done."""
        kept = read_json(self._file(job))
        if not kept:
            return None
        return Found({line: Figure(**figure) for line, figure in kept.pop("figures").items()}, **kept)

    def keep(self, job: str, figures: Figures, lacks: str = "", problem: str = "") -> None:
        """Keep what a job found; see `Found`."""
        of_lines = {line: asdict(figure) for line, figure in figures.items()}
        write_json(self._file(job), {"figures": of_lines, "lacks": anonymous(lacks), "problem": anonymous(problem)})

    def log(self, job: str) -> Path:
        """The file for a job's messages."""
        return self._file(job).with_suffix(".log")

    def forget(self, job: str) -> None:
        """Forget what a job found."""
        self._file(job).unlink(missing_ok=True)

    def _file(self, job: str) -> Path:
        return self.folder / f"{re.sub(r'[^a-z0-9.-]+', '-', job)}.json"

    def result(self, job: str) -> Path:
        """The folder that a job leaves for later ones.

        Raises:
            WorkFailed: there is none.
        """
        noted = str(read_json(self.folder / "results" / f"{job}.json").get("folder"))
        if not (self.folder / noted / "run.json").is_file():
            raise WorkFailed(f"the {job} that this would look at did not come to its end")
        return self.folder / noted

    def note_result(self, job: str, folder: Path) -> None:
        """Note the folder that a job leaves."""
        write_json(self.folder / "results" / f"{job}.json", {"folder": str(folder.relative_to(self.folder))})


def here(folder: Path, quick: bool = False) -> Bench:
    """The bench of this machine; CUDA_VISIBLE_DEVICES chooses its GPU, or none where it is empty."""
    gpu = gpus.here()
    if gpu is None:
        return Bench(folder, quick, bf16=machine.cpu_has_bf16())
    return Bench(folder, quick, gpu, len(machine.visible_gpus()), free_memory(), bf16=gpu.capability >= (8, 0))


def free_memory() -> int:
    """Bytes of the chosen GPU's memory that nobody uses, as its driver says."""
    import pynvml

    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    pynvml.nvmlInit()
    try:
        by = pynvml.nvmlDeviceGetHandleByIndex if first.isdigit() else pynvml.nvmlDeviceGetHandleByUUID
        return int(pynvml.nvmlDeviceGetMemoryInfo(by(int(first) if first.isdigit() else first)).free)
    finally:
        pynvml.nvmlShutdown()


def default_folder() -> Path:
    """Where a verification is kept unless the user names a folder."""
    return paths.cache() / "verify"
