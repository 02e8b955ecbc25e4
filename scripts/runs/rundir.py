"""A run's folder: how it is claimed, what run.json and metrics.jsonl say, and how runs are found."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import BaseModel, Field

from ..base.errors import UserError
from ..base.files import write_atomically
from ..base.locks import held, is_held
from ..base.machine import now
from ..base.progress import say
from ..configs.config import Difference
from ..configs.datafiles import DataFile
from . import checkpoints

State = Literal["created", "queued", "running", "finished", "failed", "interrupted"]
Ended = Literal["complete", "early stopping", "signal", "callback"]
"""How a training ended: with its last step, or before it, stopped by what this says; callback is any other of Axolotl's
callbacks, such as its loss watchdog."""


class Job(BaseModel):
    """A command of a run that a place was given to carry out; see `places`."""

    place: str
    id: str
    step: str
    user: str
    script: str  # an id alone can be another cluster's, or come again
    words: list[str] = Field(default_factory=list)  # the command line behind `recipe`
    submitted: str = Field(default_factory=now)


@dataclass(frozen=True)
class JobState:
    """What a queue says of a job that is not at its end.

    Attributes:
        kind: unknown where the queue does not answer.
        reason: why it waits, in the queue's own word, where that says anything.
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
    """One start of the training process: of a run's first, or of a resumed one."""

    command: list[str]
    host: str | None = None
    started: str
    ended: str | None = None
    exit_code: int | None = None
    resumed_from: str | None = None


class Summary(BaseModel):
    """What the metrics say of the training so far. Seconds and GiB; a loss that is no number is null.

    Attributes:
        eval_loss, eval_loss_first: Axolotl's own, a mean of the means of batches.
        eval_loss_per_token, eval_loss_per_token_first: see the module `eval_loss`; runs made before it have none.
    """

    step: int = 0
    max_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    eval_loss_first: float | None = None
    eval_loss: float | None = None
    eval_loss_per_token_first: float | None = None
    eval_loss_per_token: float | None = None
    train_seconds: float = 0.0
    tokens_per_second: float | None = None
    peak_memory: float | None = None
    memory_kind: str | None = None
    engine: str | None = None  # what divided the training among ranks, told by Axolotl's own objects
    peak_memory_by_rank: list[float] | None = None
    ended: Ended | None = None  # None also of a training that was killed, or is from before this was recorded


class Run(BaseModel):
    """The content of run.json."""

    state: State = "created"
    recipe: str
    variant_of: str | None = None  # the shipped recipe
    recipe_file: str
    recipe_sha256: str
    template_sha256: str | None = None
    digest: str | None = None  # of the config, before a run adds its own keys, and of the data
    rehearsal: bool = False
    profiles: list[str] = Field(default_factory=list)
    overrides: list[str] = Field(default_factory=list)
    forced: list[str] = Field(default_factory=list)  # findings of the check that were overridden
    mirror: bool = False
    gpus_used: int = 1  # on each node
    nodes: int = 1
    axolotl_arguments: list[str] = Field(default_factory=list)
    differences: list[Difference] = Field(default_factory=list)
    data: list[DataFile] = Field(default_factory=list)
    test_data: str | None = None
    cwd: str
    created: str = Field(default_factory=now)
    launches: list[Launch] = Field(default_factory=list)
    summary: Summary = Field(default_factory=Summary)
    provenance: dict[str, Any] = Field(default_factory=dict)

    @property
    def origin(self) -> str:
        """The recipe whose study it belongs to."""
        return self.variant_of or self.recipe

    @property
    def ranks(self) -> int:
        """The processes that train, each with a GPU of its own."""
        return self.gpus_used * self.nodes


class RunDir:
    """The folder of one run; recipes/GUIDE.md says what the files in it are."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "train.log"
        self.output = path / "output"
        self._json = path / "run.json"
        self._jobs = path / "jobs.json"  # a file of its own: a job can begin, and write run.json, before it is noted

    def runs(self, recipe: str) -> Path:
        """The folder of all runs that this one, of a recipe, is in."""
        return self.path.parents[recipe.count("/") + 1]

    def write(self, run: Run) -> None:
        """Replace run.json."""
        write_atomically(self._json, run.model_dump_json(indent=1, exclude_none=True) + "\n")

    def read(self, job: JobState | None = None) -> Run:
        """run.json, with the state that holds now: what says running but has neither process nor job is interrupted.

        Args:
            job: the state of the job that is to train it; `places.read` asks for that, where it has one.

        Raises:
            UserError: run.json is missing or damaged.
        """
        run = self._written()
        if run.state != "finished":
            run.state = self._state(run, job)
            run.summary = summarise(self.read_metrics())
        return run

    def _written(self) -> Run:
        """run.json as it stands."""
        try:
            return Run.model_validate_json(self._json.read_bytes())
        except (OSError, ValueError):
            raise UserError(f"{self._json}: missing or damaged; the folder is no run") from None

    def _state(self, run: Run, job: JobState | None) -> State:
        held = is_held(self.path / ".lock")
        if run.state == "running" and held:  # what prepares the rows of a run that is queued holds it too
            return "running"
        if job:
            return run.state if job.kind == "unknown" else job.kind
        just_made = run.state == "created" and _is_recent(run.created)  # what takes it up may not have got to it yet
        gone = run.state in ("created", "running") and not held and not just_made
        return "interrupted" if gone else run.state

    def jobs(self) -> list[Job]:
        """The jobs that places were given for the run, oldest first."""
        try:
            return [Job.model_validate(job) for job in orjson.loads(self._jobs.read_bytes())]
        except (OSError, ValueError):
            return []

    def add_job(self, job: Job) -> None:
        """Note a job."""
        every = [one.model_dump() for one in [*self.jobs(), job]]
        write_atomically(self._jobs, orjson.dumps(every, option=orjson.OPT_INDENT_2).decode() + "\n")

    def held(self) -> AbstractContextManager[int]:
        """Hold the run for this process and whoever inherits the descriptor, so that its state can be trusted.

        Raises:
            UserError: another process holds it.
        """
        return held(self.path / ".lock", "the run is still going on")

    def read_metrics(self, since: int = 0) -> list[dict[str, Any]]:
        """The records of metrics.jsonl by step. Steps that a resumed run did again count once, the last time.

        Args:
            since: pass over so many bytes, which an earlier launch wrote.
        """
        try:
            lines = self.metrics.read_bytes()[since:].split(b"\n")
        except OSError:
            return []
        records: dict[tuple[int, int], dict[str, Any]] = {}
        for line in filter(None, lines):
            try:
                record = orjson.loads(line)
                kind = 0 if "loss" in record else 1 if is_evaluation(record) else 2  # in their order at a step
                records[record["step"], kind] = record
            except (orjson.JSONDecodeError, TypeError, KeyError):
                continue  # the last line of a killed process
        return [records[key] for key in sorted(records)]

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that training can be resumed from, or None; damaged ones are named on stderr.

        Raises:
            UserError: run.json is missing or damaged.
        """
        by_step = {checkpoints.step_of(folder): folder for folder in self.output.glob("checkpoint-*")}
        for step in sorted((step for step in by_step if step is not None), reverse=True):
            problem = checkpoints.damage(by_step[step], self._written().ranks)
            if problem is None:
                return by_step[step]
            say(f"{by_step[step].name} is damaged: {problem}; it is skipped")
        return None


def this_job(environment: Mapping[str, str]) -> str | None:
    """The id of the job that a process of such an environment belongs to, as SLURM writes that of an array's task."""
    array, task = (environment.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else None


def _is_recent(created: str) -> bool:
    return (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds() < 10


def claim(runs: Path, recipe: str, digest: str) -> RunDir:
    """A new folder runs/<recipe>/<time>-<digest>/ that no other launch has."""
    return RunDir(new_folder(runs / recipe, digest[:7]))


def new_folder(parent: Path, name: str) -> Path:
    """A new folder <time>-<name> that nobody else has."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = parent / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            time.sleep(0.2)


def is_evaluation(record: dict[str, Any]) -> bool:
    """Whether a metrics record is of an evaluation; of rows too few for a packed batch Axolotl logs no loss."""
    return "eval_loss" in record or "eval_loss_per_token" in record


def summarise(metrics: list[dict[str, Any]]) -> Summary:
    """The summary of a run's metrics."""
    summary = Summary()
    tokens = token_seconds = 0.0
    evaluations = 0
    for record in metrics:
        summary.step = record["step"]
        summary.max_steps = record.get("max_steps", summary.max_steps)
        summary.epoch = record.get("epoch", summary.epoch)
        summary.loss = record.get("loss", summary.loss)
        seconds = record.get("step_seconds") or 0.0
        summary.train_seconds += seconds
        if record.get("tokens"):
            tokens += record["tokens"]
            token_seconds += seconds
        if is_evaluation(record):
            summary.eval_loss, summary.eval_loss_per_token = map(record.get, ("eval_loss", "eval_loss_per_token"))
            if evaluations == 0:
                summary.eval_loss_first = summary.eval_loss
                summary.eval_loss_per_token_first = summary.eval_loss_per_token
            evaluations += 1
        for key, kind in (("memory_reserved_gib", "GPU, reserved"), ("rss_peak_gib", "resident")):
            if key in record and (summary.memory_kind in (None, kind)):
                summary.peak_memory, summary.memory_kind = max(record[key], summary.peak_memory or 0), kind
        if peaks := record.get("peak_gib_by_rank"):
            before = summary.peak_memory_by_rank or peaks  # a resumed run's processes count anew
            summary.peak_memory_by_rank = [max(both) for both in zip(peaks, before, strict=True)]
            summary.peak_memory = max(*peaks, summary.peak_memory or 0)
        summary.engine = record.get("engine", summary.engine)
        summary.ended = record.get("ended")  # of the last record
    if token_seconds:
        summary.tokens_per_second = tokens / token_seconds
    return summary
