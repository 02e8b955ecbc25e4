"""Contents of a run's files: run.json and the provenance in it, jobs.json, a line of metrics.jsonl."""

import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Required, Self, TypedDict

import psutil
from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, model_validator, with_config

from ..base import paths
from ..base.files import sha256
from ..base.machine import Card, cpu, now, package_version, torch_cuda, visible_gpus
from ..base.progress import say
from ..configs.config import Difference, chained
from ..configs.datafiles import DataFile

Ended = Literal["complete", "early stopping", "signal", "callback", "no batch"]
"""End of a training: its last step, or the reason before it; `callback` is another callback of Axolotl's, such as its
loss watchdog; `no batch` means rows that fill none."""


@with_config(strict=True, extra="allow")
class _Record(TypedDict, total=False):
    """The fields of a record of `plugin.RunCallback` that are computed with."""

    step: Required[int]
    max_steps: int | None
    epoch: float | None
    loss: float | None
    eval_loss: float | None
    eval_loss_per_token: float | None
    grad_norm: float | None
    learning_rate: float | None
    step_seconds: float | None
    tokens: int | None
    tokens_per_second: float | None
    memory_reserved_gib: float
    rss_peak_gib: float
    peak_gib_by_rank: list[float] | None
    engine: str
    gpus: list[Card]
    trainable_parameters: int
    parameters: int
    ended: Ended
    kept_step: int


RECORD = TypeAdapter(_Record)


class Git(TypedDict):
    """The checkout that a run's recipes are from."""

    revision: str
    dirty: bool


@with_config(extra="allow")
class Provenance(TypedDict, total=False):
    """The findings of `collect`; older runs lack some."""

    git: Git | None
    lock_sha256: str | None
    packages: dict[str, str | None]
    cuda: str | None
    python: str
    host: str
    os: str
    cpu: str
    cores: int
    memory_gib: float
    gpus: list[Card]


class FileState(BaseModel):
    """Content of a file by its hash, and by size and time to recognize it unread."""

    sha256: str
    bytes: int
    mtime: float

    @classmethod
    def of(cls, file: Path, digest: str | None = None) -> Self:
        """State of a file, whose hash may be known."""
        status = file.stat()
        return cls(sha256=digest or sha256(file), bytes=status.st_size, mtime=status.st_mtime)

    def differs(self, file: Path) -> bool:
        """True for a file with other content; reads it only if size or time differ."""
        if not file.is_file():
            return False
        status = file.stat()
        if status.st_size == self.bytes and abs(status.st_mtime - self.mtime) < 1:  # parts of seconds get lost
            return False
        if sha256(file) != self.sha256:
            return True
        with suppress(OSError):  # a copy; with the recorded time it is not read at the next call
            os.utime(file, (status.st_atime, self.mtime))
        return False


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"{text}: a time without its zone")
    return text


Moment = Annotated[str, AfterValidator(_moment)]
"""A time as `now` writes it, in a record."""

State = Literal["created", "queued", "running", "finished", "failed", "interrupted"]


class Job(BaseModel):
    """A command of a run that was submitted to SLURM."""

    place: str = "slurm"  # `sky` in runs of earlier versions
    id: str
    step: str
    user: str
    script: str  # an id alone can be another cluster's, or come again
    words: list[str] = Field(default_factory=list)  # the command line behind `recipe`
    submitted: Moment = Field(default_factory=now)


@dataclass(frozen=True)
class JobState:
    """State of a job in a queue.

    Attributes:
        kind: unknown where the queue does not answer.
        reason: why it waits, in the queue's own word, where that is informative.
        job: its id.
    """

    kind: Literal["queued", "running", "unknown"]
    reason: str = ""
    job: str = ""

    def __str__(self) -> str:
        if self.kind == "unknown":
            return "not known: its queue does not answer"
        return f"{self.kind}{f': {self.reason}' if self.reason else ''} (job {self.job})"


class Launch(BaseModel):
    """One start of the training process: a run's first, or to resume it."""

    command: list[str]
    host: str | None = None
    started: Moment
    ended: Moment | None = None
    exit_code: int | None = None
    resumed_from: str | None = None
    problem: str | None = None  # what ended it, where that is known and needs another remedy than its log


class Summary(BaseModel):
    """Summary of the training so far, in seconds and GiB; a loss of NaN is null.

    Attributes:
        eval_loss, eval_loss_first: Axolotl's own, a mean of the means of batches.
        eval_loss_per_token, eval_loss_per_token_first: see the module `eval_loss`; runs made before it have none.
        kept_step: step of the checkpoint with the least eval loss, where its weights were kept instead of the last
            ones; `eval_loss` and `eval_loss_per_token` are then of that step.
        trainable_parameters, parameters: as PEFT counts them; older runs, and those without an adapter, have none.
    """

    step: int = 0
    max_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    eval_loss_first: float | None = None
    eval_loss: float | None = None
    eval_loss_per_token_first: float | None = None
    eval_loss_per_token: float | None = None
    kept_step: int | None = None
    train_seconds: float = 0.0
    tokens_per_second: float | None = None
    peak_memory: float | None = None
    memory_kind: str | None = None
    engine: str | None = None  # what divided the training among ranks, as seen from Axolotl's own objects
    peak_memory_by_rank: list[float] | None = None
    trainable_parameters: int | None = None
    parameters: int | None = None
    trouble: str | None = None  # that its last losses are no numbers
    ended: Ended | None = None  # None also for a training that was killed, or that is older than this record

    @property
    def trainable_share(self) -> float | None:
        """The trainable share of all parameters, where both are recorded."""
        return self.trainable_parameters / self.parameters if self.trainable_parameters and self.parameters else None


class Run(BaseModel):
    """The content of run.json."""

    state: State = "created"
    recipe: str
    variant_of: str | None = None  # the shipped recipe
    recipe_file: str
    recipe_sha256: str
    digest: str | None = None  # of the config, before a run adds its own keys, and the data
    rehearsal: bool = False
    profiles: list[str] = Field(default_factory=list)
    overrides: list[str] = Field(default_factory=list)
    forced: list[str] = Field(default_factory=list)  # findings of the check that were overridden
    seal: str | None = None  # see `checks.trust`
    gpus_used: int = 1  # on each node
    nodes: int = 1
    axolotl_arguments: list[str] = Field(default_factory=list)  # of earlier versions
    differences: list[Difference] = Field(default_factory=list)  # from the file that was run
    of_variant: list[Difference] = Field(default_factory=list)  # of that file from the shipped recipe
    data: list[DataFile] = Field(default_factory=list)
    test_data: str | None = None
    test_rows: DataFile | None = None  # the file that it is evaluated on
    cwd: str
    created: Moment = Field(default_factory=now)
    launches: list[Launch] = Field(default_factory=list)
    adapter: FileState | None = None  # as the last launch left it
    published_adapter: str | None = None  # the name of one that was not trained here
    summary: Summary = Field(default_factory=Summary)  # as of the last launch's end; `RunDir.summary` is up to date
    provenance: Provenance = Field(default_factory=Provenance)

    @model_validator(mode="before")
    @classmethod
    def _brought_up_to_date(cls, content: Any) -> Any:
        """The record of an earlier version as this one writes it."""
        if isinstance(content, dict) and content.get("mirror"):  # was an option; now a profile
            return content | {"profiles": [*content.get("profiles", []), "mirror"]}
        return content

    @property
    def origin(self) -> str:
        """The recipe whose study it belongs to."""
        return self.variant_of or self.recipe

    @property
    def from_origin(self) -> list[Difference]:
        """Differences from the shipped recipe."""
        return chained(self.of_variant, self.differences)

    @property
    def ranks(self) -> int:
        """The processes that train, each with a GPU of its own."""
        return self.gpus_used * self.nodes


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
        "packages": {name: package_version(name) for name in PACKAGES},
        "cuda": torch_cuda(),
        "python": platform.python_version(),
        "host": platform.node(),
        "os": platform.platform(),
        "cpu": cpu(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [*visible_gpus().values()],
    }


def _git() -> Git | None:
    """Revision and state of the recipes' checkout; None outside of one, or with a message where git refuses to look."""
    if not paths.LOCK.is_file():
        return None  # installed from a wheel; a repository around it would be another's
    # GIT_DIR and its like would name another repository; without that lock, status leaves the checkout's index as it is
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(paths.RECIPES), "status", "--porcelain=v2", "--branch"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    except (OSError, subprocess.CalledProcessError) as error:
        problem = str(getattr(error, "stderr", None) or error).strip()
        if "not a git repository" not in problem:
            say(f"no git revision is recorded: {problem.partition('\n')[0]}")
        return None
    head, *others = done.stdout.splitlines()
    return {"revision": head.removeprefix("# branch.oid "), "dirty": not all(line[0] == "#" for line in others)}
