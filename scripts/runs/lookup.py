"""Run folders: all below a folder, and the one that a user means."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..base.errors import UserError
from ..base.paths import RUNS
from ..base.progress import say
from .rundir import Run, RunDir


def all_runs(runs: Path = RUNS) -> list[RunDir]:
    """Every run folder below `runs`, oldest first."""
    return sorted((RunDir(file.parent) for file in runs.rglob("run.json")), key=lambda run: run.path.name)


def find_run(name: str, runs: Path = RUNS) -> RunDir:
    """The run given as its folder, as an end of its path that no other run has, or as `latest`.

    Raises:
        UserError: no run, or more than one, matches.
    """
    if (Path(name) / "run.json").is_file():
        return RunDir(Path(name))
    folders = all_runs(runs)
    end = name.rstrip("/")
    matches = folders[-1:] if name == "latest" else [run for run in folders if end and str(run.path).endswith(end)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"{name}: several runs end like that: {', '.join(str(run.path) for run in matches)}")
    raise UserError(f"{name}: no run of that name below {runs}/; `recipe results` lists the runs")


def readable(folders: Sequence[RunDir], read: Callable[[RunDir], Run] = RunDir.read) -> Iterator[tuple[RunDir, Run]]:
    """Runs whose run.json can be read, by `RunDir.read` or `places.read`; the others are reported on stderr."""
    for folder in folders:
        try:
            yield folder, read(folder)
        except UserError as error:
            say(str(error))
