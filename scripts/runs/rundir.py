"""Run folders: record, state, jobs, metrics, checkpoints, and their lookup by name."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from ..base.errors import UserError, meant
from ..base.files import Row, clear_parts, write_atomically
from ..base.machine import LOCK_TIMEOUT, held, is_held
from ..base.progress import say, say_once
from . import checkpoints
from .records import RECORD, Job, JobState, Run, State, Summary

PLUGIN = "qlora_recipes.plugin.RunPlugin"
"""The name of the plugin in the config of every run."""


class RunDir:
    """The folder of one run; docs/files.md describes its files."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "train.log"
        self.output = path / "output"
        self._json = path / "run.json"
        self._jobs = path / "jobs.json"  # a file of its own: a job can start, and write run.json, before it is noted

    def runs(self, recipe: str) -> Path:
        """The folder of all runs that this one, of a recipe, is in."""
        return self.path.parents[recipe.count("/") + 1]

    def write(self, run: Run) -> None:
        """Replace run.json."""
        write_atomically(self._json, run.model_dump_json(indent=1, exclude_none=True) + "\n")

    def read(self, job: JobState | None = None) -> Run:
        """run.json, with the current state: a run that says running but has neither process nor job is interrupted.

        Args:
            job: the state of the job that is to train it; `backends.read` asks for that, where it has one.

        Raises:
            UserError: run.json is missing or damaged.
        """
        try:
            run = Run.model_validate_json(self._json.read_bytes())
        except (OSError, ValueError) as error:
            at = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, ValidationError) else ""
            where = f"{self._json}: missing or damaged{at and f' at {at}'}"
            raise UserError(f"{where}; the folder does not hold a run") from None
        if run.state != "finished":
            run.state = self._state(run, job)
        return run

    def _state(self, run: Run, job: JobState | None) -> State:
        is_in_use = is_held(self.path / ".lock")
        if run.state == "running" and is_in_use:  # what prepares the rows of a run that is queued holds it too
            return "running"
        if job:
            return run.state if job.kind == "unknown" else job.kind
        age = datetime.now(UTC) - datetime.fromisoformat(run.created)
        is_starting = run.state == "created" and abs(age.total_seconds()) < 10
        is_gone = run.state in ("created", "running") and not is_in_use and not is_starting
        return "interrupted" if is_gone else run.state

    def summary(self, run: Run) -> Summary:
        """The summary of the run's metrics so far, which run.json has for a finished run.

        Args:
            run: the content of its run.json.
        """
        return run.summary if run.state == "finished" else summarise(self.read_metrics())

    def jobs(self) -> list[Job]:
        """The jobs that SLURM was given for the run, oldest first.

        Raises:
            UserError: jobs.json is damaged.
        """
        try:
            return [job for job in _JOBS.validate_json(self._jobs.read_bytes()) if job.place == "slurm"]
        except FileNotFoundError:
            return []
        except (OSError, ValueError):
            raise UserError(f"{self._jobs}: damaged; move it away once no job of the run is queued") from None

    def add_job(self, job: Job) -> None:
        """Note a job."""
        with held(self.path / ".jobs.lock", "another process is noting a job", LOCK_TIMEOUT):
            write_atomically(self._jobs, _JOBS.dump_json([*self.jobs(), job], indent=2).decode() + "\n")

    @contextmanager
    def held(self) -> Iterator[int]:
        """Hold the run for this process and heirs of the descriptor; remove half-written records.

        Raises:
            UserError: another process holds it.
        """
        busy = f"the run is still running; `recipe cancel {self.path}` stops it at a checkpoint"
        with held(self.path / ".lock", busy) as lock:
            clear_parts(self._json)
            yield lock

    def read_metrics(self, since: int = 0) -> list[Row]:
        """The records of metrics.jsonl by step, without repeated steps of a resumed run.

        Damaged lines are left out, with a warning.

        Args:
            since: skip this many bytes, which an earlier launch wrote.
        """
        try:
            lines = self.metrics.read_bytes()[since:].split(b"\n")
        except OSError:
            return []
        records: dict[tuple[int, int], Row] = {}
        previous = 0
        for line in filter(None, lines):
            try:
                record = orjson.loads(line)
                if "phase" in record:
                    continue
                step = RECORD.validate_python(record)["step"]
            except orjson.JSONDecodeError:
                continue  # the last line of a killed process
            except (TypeError, ValidationError):
                say_once(f"{self.metrics}: has damaged lines; they are left out")
                continue
            if step < previous:
                records = {key: kept for key, kept in records.items() if key[0] <= step}
            previous = step
            kind = 0 if "loss" in record else 1 if is_evaluation(record) else 2  # in their order at a step
            records[step, kind] = record
        return [records[key] for key in sorted(records)]

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that training can be resumed from, or None; damaged ones are reported on stderr.

        Raises:
            UserError: run.json is missing or damaged.
        """
        by_step = {checkpoints.step_of(folder): folder for folder in self.output.glob("checkpoint-*")}
        for step in sorted((step for step in by_step if step is not None), reverse=True):
            problem = checkpoints.damage(by_step[step], self.read().ranks)
            if problem is None:
                return by_step[step]
            say(f"{by_step[step].name} is damaged: {problem}; it is skipped")
        return None


_JOBS = TypeAdapter(list[Job])


def this_job(environment: Mapping[str, str]) -> str | None:
    """The id of a process's SLURM job, a task of an array, from its environment."""
    array, task = (environment.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else None


def new_folder(parent: Path, name: str) -> Path:
    """Make a folder <time>-<name> that no other process has."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = parent / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            time.sleep(0.2)


def is_evaluation(record: Row) -> bool:
    """True for the record of an evaluation; rows too few for a packed batch have no loss."""
    return "eval_loss" in record or "eval_loss_per_token" in record


_MEMORY = {"memory_reserved_gib": "GPU, reserved", "rss_peak_gib": "resident"}


def summarise(metrics: list[Row]) -> Summary:
    """The summary of a run's metrics."""

    def last(key: str) -> Any:
        return next((record[key] for record in reversed(metrics) if key in record), None)

    newest = metrics[-1] if metrics else {}
    evaluations = [record for record in metrics if is_evaluation(record)] or [{}]
    kept_step = newest.get("kept_step")
    kept = next((record for record in evaluations if record.get("step") == kept_step), evaluations[-1])
    counted = [record for record in metrics if record.get("tokens")]
    counted_seconds = sum(record.get("step_seconds") or 0.0 for record in counted)
    memory = next((key for record in metrics for key in _MEMORY if key in record), "")
    of_ranks = [record["peak_gib_by_rank"] for record in metrics if record.get("peak_gib_by_rank")]
    by_rank = [max(of_rank) for of_rank in zip(*of_ranks, strict=False)]  # a resumed run's processes start over
    return Summary(
        step=newest.get("step", 0),
        max_steps=last("max_steps"),
        epoch=last("epoch"),
        loss=last("loss"),
        eval_loss_first=evaluations[0].get("eval_loss"),
        eval_loss=kept.get("eval_loss"),
        eval_loss_per_token_first=evaluations[0].get("eval_loss_per_token"),
        eval_loss_per_token=kept.get("eval_loss_per_token"),
        kept_step=kept_step,
        train_seconds=sum(record.get("step_seconds") or 0.0 for record in metrics),
        tokens_per_second=sum(record["tokens"] for record in counted) / counted_seconds if counted_seconds else None,
        peak_memory=max([record[memory] for record in metrics if memory in record] + by_rank, default=None),
        memory_kind=_MEMORY.get(memory),
        engine=last("engine"),
        peak_memory_by_rank=by_rank or None,
        trainable_parameters=last("trainable_parameters"),
        parameters=last("parameters"),
        trouble=_trouble(metrics),
        ended=newest.get("ended"),
    )


def _trouble(metrics: Sequence[Row]) -> str | None:
    """Message if the last losses are NaN, which JSON has as null."""
    losses = [record for record in metrics if "loss" in record]
    steps = [record["step"] for record in itertools.takewhile(lambda each: each["loss"] is None, reversed(losses))]
    return f"the loss is no number (NaN) since step {steps[-1]}" if steps else None


def all_runs(runs: Path) -> list[RunDir]:
    """Every run folder below `runs`, oldest first."""
    return sorted((RunDir(file.parent) for file in runs.rglob("run.json")), key=lambda run: run.path.name)


def is_run(folder: Path) -> bool:
    """True for a run's folder."""
    return (folder / "run.json").is_file()


def run_names(runs: Path) -> dict[str, RunDir]:
    """Runs by path below a folder, the newest also by recipe, and of all as `latest`."""
    folders = all_runs(runs)
    named = {run.path.relative_to(runs).as_posix(): run for run in folders}
    named |= {path.rpartition("/")[0]: run for path, run in named.items() if "/" in path}  # the last is the newest
    return ({"latest": folders[-1]} if folders else {}) | named


def find_run(name: str, runs: Path) -> RunDir:
    """Find a run by its folder, or by one of `run_names` or a part of it, with a message.

    Raises:
        UserError: no run, or more than one, matches.
    """
    if is_run(Path(name)):
        return RunDir(Path(name))
    choices = run_names(runs)
    hint = f" below {runs}/; " + ("`recipe results` lists the runs" if choices else "`recipe run` makes one")
    found = choices[meant(name.removeprefix(f"{runs}/"), choices, "run", hint)]
    if name != "latest" and found.path != runs / name:
        say(f"run {found.path}")
    return found


def readable(folders: Sequence[RunDir], read: Callable[[RunDir], Run] = RunDir.read) -> Iterator[tuple[RunDir, Run]]:
    """Runs with a readable run.json; the others are reported on stderr."""
    for folder in folders:
        try:
            yield folder, read(folder)
        except UserError as error:
            say(str(error))
