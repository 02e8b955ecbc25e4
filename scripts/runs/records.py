"""What a run's records hold as far as it is read: a line of metrics.jsonl, provenance, a time, the state of a file."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Required, Self, TypedDict

from pydantic import AfterValidator, BaseModel, TypeAdapter, with_config

from ..base.files import sha256
from ..base.machine import Card

Ended = Literal["complete", "early stopping", "signal", "callback", "no batch"]
"""How a training ended: with its last step, or before it, stopped by what this says; callback is any other of Axolotl's
callbacks, such as its loss watchdog; no batch is rows that fill none."""


@with_config(strict=True, extra="allow")
class _Record(TypedDict, total=False):
    """What `plugin.RunCallback` writes of a step, as far as it is computed with."""

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
    """What `provenance.collect` found; older runs lack some of it."""

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
    """Content of a file by its hash; size and time of change show, without reading it, whether it may have another."""

    sha256: str
    bytes: int
    mtime: float

    @classmethod
    def of(cls, file: Path, digest: str | None = None) -> Self:
        """State of a file, whose hash may be known."""
        status = file.stat()
        return cls(sha256=digest or sha256(file), bytes=status.st_size, mtime=status.st_mtime)

    def may_differ(self, file: Path) -> bool:
        """True if a file's size or time of change is another, but for parts of a second, which not all copies keep."""
        if not file.is_file():
            return self.bytes < 0
        status = file.stat()
        return status.st_size != self.bytes or abs(status.st_mtime - self.mtime) >= 1


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"{text}: a time without its zone")
    return text


Moment = Annotated[str, AfterValidator(_moment)]
"""A time as `now` writes it, in a record."""
