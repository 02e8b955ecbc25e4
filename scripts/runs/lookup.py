"""None"""

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
        UserError: no run, or more than one, is meant.
    """
    if (Path(name) / "run.json").is_file():
        return RunDir(Path(name))
    known = all_runs(runs)
    if name == "latest" and known:
        return known[-1]
    end = name.rstrip("/")
    meant = [run for run in known if end and str(run.path).endswith(end)]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise UserError(f"{name}: several runs end so: {', '.join(str(run.path) for run in meant)}")
    raise UserError(f"{name}: no run of that name below {runs}/; `recipe results` lists the runs")


def readable(folders: Sequence[RunDir], read: Callable[[RunDir], Run] = RunDir.read) -> Iterator[tuple[RunDir, Run]]:
    """Runs whose run.json can be read, by `RunDir.read` or `places.read`; of the others that is said."""
    for folder in folders:
        try:
            yield folder, read(folder)
        except UserError as error:
            say(str(error))
