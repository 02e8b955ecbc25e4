"""Run folders: record, state, jobs, metrics, checkpoints, and lookup by name."""

import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from pydantic import TypeAdapter, ValidationError

from ..base import paths
from ..base.errors import UserError, meant
from ..base.files import Row, parse_json, read_bytes, write_atomically
from ..base.processes import LOCK_TIMEOUT, held, is_held
from ..base.run_files import RunFile
from ..base.signature import is_signed, signature
from ..base.terminal import say, warn, warn_once
from ..base.yamlfiles import Config, read_text, read_yaml
from ..training.checkpoints import damage, step_of
from ..training.run_record import METRICS_RECORD, VERSION, Job, JobState, RecordVersion, Run, State, Summary
from ..training.summary import is_evaluation, summarise

PLUGIN = "qlora_recipes.plugin.RunPlugin"
"""Name of the plugin in the config of every run."""


class RunDir:
    """Folder of one run; `RunFile` has the names of its files."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / RunFile.CONFIG
        self.metrics = path / RunFile.METRICS
        self.log = path / RunFile.LOG
        self.output = path / RunFile.OUTPUT
        self.adapter = self.output / RunFile.ADAPTER
        self._json = path / RunFile.RECORD
        self.jobs_file = path / RunFile.JOBS
        self._lock = path / RunFile.LOCK

    def runs(self, recipe: str) -> Path:
        """Folder of all runs, derived from this run's path and recipe."""
        return self.path.parents[recipe.count("/") + 1]

    @cached_property
    def config(self) -> Config:
        """Config that Axolotl receives. Only `run.create` writes the file, so it is read once.

        Raises:
            UserError: the file is missing or damaged.
        """
        return read_yaml(self.config_file)

    @property
    def prepared(self) -> str:
        """Folder of the run's prepared rows, from its config."""
        return str(self.config.get("dataset_prepared_path"))

    @property
    def quoted(self) -> str:
        """Path as a word of a shell command, for messages."""
        return shlex.quote(str(self.path))

    def write(self, run: Run) -> None:
        """Replace run.json."""
        write_atomically(self._json, run.model_dump_json(indent=1, exclude_none=True) + "\n")

    def read(self, job: JobState | None = None) -> Run:
        """Read run.json with the current state.

        A run that is recorded as created or running, but has no process or job, counts as interrupted. A new run has
        ten seconds to start.

        Args:
            job: state of the training job, if the run has one; `backends.read` passes it.

        Raises:
            UserError: run.json is missing, damaged, or of another version.
        """
        run = self._recorded()
        if run.state != "finished":
            run.state = self._state(run, job)
        return run

    def _recorded(self) -> Run:
        """Content of run.json, with the state that was last written."""
        try:
            content = parse_json(read_bytes(self._json))
            version = RecordVersion.model_validate(content).version
            if version != VERSION:
                raise UserError(
                    f"version {version}, but this version of qlora-recipes reads version {VERSION}",
                    file=self._json,
                    remedy="read it with the version that wrote it, or start a new run with `recipe run`",
                )
            return Run.model_validate(content)
        except (OSError, ValueError) as error:
            problem = "missing or damaged"
            if isinstance(error, ValidationError) and (field := error.errors()[0]["loc"]):
                problem += f" at {'.'.join(map(str, field))}"
            raise UserError(problem, file=self._json, remedy="the folder has no usable run") from None

    def _state(self, run: Run, job: JobState | None) -> State:
        """State of a run, from its recorded state, its lock and its job; see `read`."""
        is_in_use = is_held(self._lock)
        if run.state == "running" and is_in_use:  # preparing rows also locks a queued run
            return "running"
        if job:
            return run.state if job.kind == "unknown" else job.kind
        if is_in_use or run.state not in ("created", "running"):
            return run.state
        age = datetime.now(UTC) - datetime.fromisoformat(run.created)
        if run.state == "running" or abs(age.total_seconds()) >= 10:
            return "interrupted"
        return "created"

    def summary(self, run: Run) -> Summary:
        """Summary of the run's metrics so far; for a finished run, from run.json.

        Args:
            run: content of run.json.
        """
        return run.summary if run.state == "finished" else summarise(self.read_metrics())

    def jobs(self) -> list[Job]:
        """Jobs of the run, oldest first.

        Raises:
            UserError: jobs.json is damaged.
        """
        try:
            return _JOBS.validate_python(parse_json(read_bytes(self.jobs_file)))
        except FileNotFoundError:
            return []
        except (OSError, ValueError):
            raise UserError(f"{self.jobs_file}: damaged; move it away once no job of the run is in the queue") from None

    def add_job(self, job: Job) -> None:
        """Record a job that this user has submitted."""
        job = job.model_copy(update={"hmac": signature(self._signed(job))})
        with held(self.path / RunFile.JOBS_LOCK, "another process is recording a job", LOCK_TIMEOUT):
            write_atomically(self.jobs_file, _JOBS.dump_json([*self.jobs(), job], indent=2).decode() + "\n")

    def submitted(self, job: Job) -> bool:
        """True if this user has submitted a job of this folder; jobs.json may be another user's."""
        return is_signed(self._signed(job), job.hmac)

    def _signed(self, job: Job) -> list[Any]:
        return [str(self.path.resolve()), job.model_dump(exclude={"hmac"})]

    def is_own(self, run: Run) -> bool:
        """True if this user created a run, or trusted it with --trust, and its hashed content has not changed since."""
        with suppress(UserError):  # no readable config
            return is_signed(self.hashed(run), run.hmac)
        return False

    def hashed(self, run: Run) -> list[Any]:
        """Values that a run's hmac covers: config, working directory and overridden findings.

        Raises:
            UserError: the config is missing or damaged.
        """
        return [read_text(self.config_file), run.cwd, run.forced]

    def recipe_file(self, run: Run) -> Path | None:
        """Present file of a run's recipe, to show its text; None if another user's run.json could name any file."""
        file = run.present_recipe
        folders = [recipes for recipes, _ in paths.homes()] + [paths.VARIANTS]
        if self.is_own(run):
            folders.append(Path(run.cwd))
        within = any(file.resolve().is_relative_to(folder.resolve()) for folder in folders)
        return file if within and file.is_file() else None

    def refuse_links(self) -> None:
        """Refuse links of the run's own files and folders that lead out of its folder; commands write through them.

        Links of trackers to files are let through, such as that of W&B to its log.

        Raises:
            UserError: there is such a link.
        """
        root = self.path.resolve()
        for path in self.path.rglob("*"):
            if not path.is_symlink() or path.resolve().is_relative_to(root):
                continue
            if path.is_dir() or path.parent == self.path:
                raise UserError("leads out of the run's folder", file=path, remedy="replace it with a file or folder")

    @contextmanager
    def held(self) -> Iterator[int]:
        """Lock the run; child processes can inherit the lock.

        Raises:
            UserError: another process has the lock, or a link leads to a folder outside the run.
        """
        self.refuse_links()
        busy = f"the run is still running; `recipe cancel {self.quoted}` stops it at a checkpoint"
        with held(self._lock, busy) as lock:
            yield lock

    def read_metrics(self, since: int = 0) -> list[Row]:
        """Records of metrics.jsonl, sorted by step: per step one with a loss, one with an eval loss, and one other.

        A resumed run starts again at an earlier step: its records replace those of the same and later steps. Damaged
        lines are skipped with a warning, except lines that a kill cut off: these are skipped silently.

        Args:
            since: number of bytes to skip, written by earlier launches.
        """
        records: dict[tuple[int, int], Row] = {}
        previous = 0
        for record in self._metrics_lines(since):
            step = record["step"]
            if step < previous:
                records = {key: earlier for key, earlier in records.items() if key[0] <= step}
            previous = step
            merged = records.setdefault((step, _order(record)), {})
            merged.pop("ended", None)  # the launch that ended at this step was resumed
            merged.pop("kept_step", None)
            merged.update(record)
        return [records[key] for key in sorted(records)]

    def _metrics_lines(self, since: int) -> Iterator[Row]:
        """Yield the valid records of steps from metrics.jsonl, in the order of the file."""
        try:
            content = read_bytes(self.metrics)[since:]
        except FileNotFoundError:
            return
        except OSError as error:
            warn_once(f"{self.metrics}: {error.strerror}; skipped")
            return
        for line in content.split(b"\n"):
            try:
                record = parse_json(line)
                if "phase" not in record:
                    METRICS_RECORD.validate_python(record)
                    yield record
            except orjson.JSONDecodeError:
                continue  # last line of a killed process, or an empty line
            except (TypeError, ValidationError):
                warn_once(f"{self.metrics}: damaged lines skipped")

    def last_checkpoint(self) -> Path | None:
        """Newest valid checkpoint, or None; reports damaged checkpoints on stderr.

        Raises:
            UserError: run.json is missing or damaged.
        """
        by_step = {step_of(folder): folder for folder in self.output.glob(RunFile.CHECKPOINT.format("*"))}
        for step in sorted((step for step in by_step if step is not None), reverse=True):
            problem = damage(by_step[step], self.read().ranks)
            if problem is None:
                return by_step[step]
            warn(f"{by_step[step].name} is damaged and skipped: {problem}")
        return None


_JOBS = TypeAdapter(list[Job])


JOB = "QLORA_RECIPES_JOB"
"""Environment variable of the processes of a job: backend and id, as in slurm:12_0."""


class ThisJob(NamedTuple):
    """The job in which this process runs."""

    backend: str
    id: str


def this_job() -> ThisJob | None:
    """The job in which this process runs, from the environment, or None."""
    backend, colon, number = os.environ.get(JOB, "").partition(":")
    return ThisJob(backend, number) if colon else None


@dataclass(frozen=True)
class Node:
    """One of several nodes that train a run.

    Attributes:
        rank: number of the node; 0 holds the run's lock.
        head: address of the node with rank 0.
        port: port on which the nodes meet there.
    """

    rank: int
    head: str
    port: int


def stamped(name: str) -> str:
    """Name of a folder that is created now: <time>-<name>."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}"


@contextmanager
def new_run(parent: Path, name: str) -> Iterator[tuple[RunDir, RunDir]]:
    """Create a unique run folder <time>-<name>, complete or not at all.

    Yields:
        The run folder, which appears at the end of the block; and a hidden folder, in which the block writes its files.
    """
    part = RunDir(parent / paths.NEW_RUN)
    with held(parent / f"{paths.NEW_RUN}.lock", "another process is creating a run", LOCK_TIMEOUT):
        while (folder := parent / stamped(name)).exists():
            time.sleep(0.2)
        shutil.rmtree(part.path, ignore_errors=True)  # left by a killed process
        part.path.mkdir()
        try:
            yield RunDir(folder), part
            part.path.rename(folder)
        finally:
            shutil.rmtree(part.path, ignore_errors=True)


def _order(record: Row) -> int:
    """Order of a record among those of its step: loss, eval loss, others."""
    if "loss" in record:
        return 0
    return 1 if is_evaluation(record) else 2


def all_runs(runs: Path) -> list[RunDir]:
    """All run folders below `runs`, oldest first."""
    return sorted(map(RunDir, paths.run_folders(runs)), key=lambda run: run.path.name)


def is_run(folder: Path) -> bool:
    """True for a run folder."""
    return (folder / RunFile.RECORD).is_file()


def run_names(runs: Path) -> dict[str, RunDir]:
    """Runs by name: the path below `runs`, a recipe's name (its newest run), or `latest`."""
    folders = all_runs(runs)
    if not folders:
        return {}
    by_path = {run.path.relative_to(runs).as_posix(): run for run in folders}
    newest = {path.rpartition("/")[0]: run for path, run in by_path.items() if "/" in path}  # the last replaces others
    return {"latest": folders[-1]} | by_path | newest


def find_run(name: str, runs: Path) -> RunDir:
    """Find a run by folder, or by a full or partial name of `run_names`; print its path.

    Raises:
        UserError: no run, or more than one, matches.
    """
    if is_run(Path(name)):
        return RunDir(Path(name))
    choices = run_names(runs)
    hint = f" below {runs}/; " + ("`recipe results` lists the runs" if choices else "`recipe run` starts one")
    folder = choices[meant(name.removeprefix(f"{runs}/"), choices, "run", hint)]
    if name != "latest" and folder.path != runs / name:
        say(f"run {folder.path}")
    return folder


def readable(folders: Sequence[RunDir], read: Callable[[RunDir], Run] = RunDir.read) -> Iterator[tuple[RunDir, Run]]:
    """Runs with a readable run.json; reports the others on stderr."""
    for folder in folders:
        try:
            yield folder, read(folder)
        except UserError as error:
            warn(str(error))
