"""A limit on the time that a command takes here, `--time-limit`: for machines that are taken away after some hours.

Shortly before it is over the command asks itself to stop, with the signal that SLURM sends to a job before its limit. A
training then ends at a checkpoint, an evaluation after its last whole batch, and nothing more is begun.
"""

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import orjson

from ..base.errors import UserError, WorkFailed
from ..runs import checkpoints
from ..runs.rundir import RunDir
from .slurm import GRACE

AGAIN = "run the same command again to continue"
_UNITS = (86400, 3600, 60, 1)
_FORMS = [  # timeout's and SLURM's; a number alone is seconds to the one and minutes to the other
    re.compile("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in "dhms")),
    re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)"),
]


def seconds_of(text: str) -> float:
    """A time in seconds.

    Raises:
        UserError: it is none, or takes no time.
    """
    match = next(filter(None, (form.fullmatch(text.lower()) for form in _FORMS)), None)
    parts = zip(match.groups(), _UNITS, strict=True) if match else ()
    if seconds := sum(float(number or 0) * unit for number, unit in parts):
        return seconds
    forms = "11h, 90m, 11h30m, or hours, minutes and seconds as 2:30:00"
    raise UserError(f"--time-limit {text}: not a time with its unit; write it as {forms}")


@dataclass
class _Limit:
    """The limit of this command.

    Attributes:
        text: as the user wrote it.
        seconds: how long it is.
        until: when it is over, on the monotonic clock.
        runs: those that are being trained or evaluated.
        near: whether the command has been asked to stop.
    """

    text: str
    seconds: float
    until: float
    runs: list[RunDir] = field(default_factory=list)
    near: bool = False

    def look(self, *_: object) -> None:
        """Ask this command to stop, once, if no more time is left than that takes."""
        needed = max((seconds_to_checkpoint(run.metrics) for run in self.runs), default=0.0)
        if not self.near and self.until - time.monotonic() <= min(GRACE, self.seconds / 10) + needed:
            self.near = True
            signal.raise_signal(signal.SIGUSR1)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """End this command where nothing waits for a request to stop, because nothing has to be saved."""
        raise SystemExit(f"ended before the limit of {self.text}; {AGAIN}")


_limit: _Limit | None = None


def begin(text: str) -> Callable[[], None]:
    """Limit the time of this command from now on.

    Returns:
        What lifts the limit.

    Raises:
        UserError: see `seconds_of`.
    """
    global _limit
    seconds = seconds_of(text)
    _limit = limit = _Limit(text, seconds, time.monotonic() + seconds)
    former = {
        signal.SIGALRM: signal.signal(signal.SIGALRM, limit.look),
        signal.SIGUSR1: signal.signal(signal.SIGUSR1, limit.stop),
    }
    signal.siginterrupt(signal.SIGALRM, False)
    every = min(seconds / 100, 10)
    signal.setitimer(signal.ITIMER_REAL, every, every)

    def lift() -> None:
        global _limit
        _limit = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in former.items():
            signal.signal(number, handler)

    return lift


def interrupted() -> str:
    """How a work ended that was asked to stop: by the limit, or by the user."""
    return f"ended before the limit of {_limit.text}" if _limit and _limit.near else "interrupted"


@contextmanager
def measuring(run: RunDir) -> Iterator[None]:
    """While a run is trained or evaluated, ask this command to stop in time for it to end at a checkpoint."""
    if limit := _limit:
        limit.runs.append(run)
    try:
        yield
    finally:
        if limit:
            limit.runs.remove(run)


@contextmanager
def training(run: RunDir) -> Iterator[None]:
    """As `measuring`, for a run that is trained by this process.

    Raises:
        WorkFailed: the limit has ended the training, and with which command it goes on.
    """
    with measuring(run):
        try:
            yield
        except WorkFailed:
            record = run.read()
            failed = record.state != "interrupted" or any(launch.problem for launch in record.launches[-1:])
            if failed or not (_limit and _limit.near):
                raise
            summary, last, again = run.summary(record), run.last_checkpoint(), f"recipe resume {run.path}"
            if last and checkpoints.step_of(last) == summary.step:
                how = f"ended at step {summary.step} of {summary.max_steps} with a checkpoint"
                goes_on = f"`{again} --time-limit {_limit.text}` continues it"
            else:
                how, goes_on = "ended without a new checkpoint", f"`{again}` with a longer --time-limit"
            raise WorkFailed(f"{run.path}: {how}, before the limit of {_limit.text}; {goes_on}") from None


def seconds_to_checkpoint(metrics: Path) -> float:
    """What a run needs at most to get from anywhere in its training to its end with a checkpoint, as far as that is
    measured: its longest evaluation and step, and twice its longest save, as the model is saved too.

    Args:
        metrics: its metrics.jsonl; damaged lines say nothing.
    """
    longest = {"first evaluation": 0.0, "evaluating": 0.0, "saving a checkpoint": 0.0}
    slowest, step, phase, since = 0.0, 0, "", 0.0
    with suppress(OSError):
        for line in metrics.read_bytes().splitlines():
            with suppress(ValueError, TypeError, AttributeError, KeyError):
                record = orjson.loads(line)
                if "step_seconds" in record:
                    slowest = max(slowest, record["step_seconds"] / max(record["step"] - step, 1))
                    step = record["step"]
                if begun := record.get("phase"):
                    if begun == "training" and phase in longest:  # anything else follows a process that was killed
                        longest[phase] = max(longest[phase], record["time"] - since)
                    phase, since = begun, record["time"]
    return max(longest["first evaluation"], longest["evaluating"]) + slowest + 2 * longest["saving a checkpoint"]
