"""Run folders: all below a folder, and the one that a user means."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..base.errors import UserError, meant
from ..base.paths import RUNS
from ..base.progress import say
from .rundir import Run, RunDir


def all_runs(runs: Path = RUNS) -> list[RunDir]:
    """Every run folder below `runs`, oldest first."""
    return sorted((RunDir(file.parent) for file in runs.rglob("run.json")), key=lambda run: run.path.name)


def find_run(name: str, runs: Path = RUNS) -> RunDir:
    """The run given as its folder, by its name, as `latest`, or by a recipe, whose newest run it is.

    Of names a part is enough, see `meant`; which run is meant is then said.

    Raises:
        UserError: no run, or more than one, matches.
    """
    if (Path(name) / "run.json").is_file():
        return RunDir(Path(name))
    folders = all_runs(runs)
    named = {run.path.relative_to(runs).as_posix(): run for run in folders}
    named |= {path.rpartition("/")[0]: run for path, run in named.items() if "/" in path}  # the last is the newest
    hint = f" below {runs}/; " + ("`recipe results` lists the runs" if named else "`recipe run` makes one")
    choices = ({"latest": folders[-1]} if folders else {}) | named
    found = choices[meant(name.removeprefix(f"{runs}/"), choices, "run", hint)]
    if name != "latest" and found.path != runs / name:
        say(f"run {found.path}")
    return found


def readable(folders: Sequence[RunDir], read: Callable[[RunDir], Run] = RunDir.read) -> Iterator[tuple[RunDir, Run]]:
    """Runs whose run.json can be read, by `RunDir.read` or `places.read`; the others are reported on stderr."""
    for folder in folders:
        try:
            yield folder, read(folder)
        except UserError as error:
            say(str(error))
