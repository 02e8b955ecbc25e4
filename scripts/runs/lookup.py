"""Run folders: all below a folder, and the one that a user means."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ..base.errors import UserError, meant
from ..base.paths import RUNS
from ..base.progress import say, say_once
from .provenance import other_axolotl
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
        return _noted(RunDir(Path(name)))
    folders = all_runs(runs)
    named = {run.path.relative_to(runs).as_posix(): run for run in folders}
    named |= {path.rpartition("/")[0]: run for path, run in named.items() if "/" in path}  # the last is the newest
    hint = f" below {runs}/; " + ("`recipe results` lists the runs" if named else "`recipe run` makes one")
    choices = ({"latest": folders[-1]} if folders else {}) | named
    found = choices[meant(name.removeprefix(f"{runs}/"), choices, "run", hint)]
    if name != "latest" and found.path != runs / name:
        say(f"run {found.path}")
    return _noted(found)


def _noted(folder: RunDir) -> RunDir:
    """A run, once it is said whether another Axolotl made it."""
    with suppress(UserError):  # which whoever reads it reports
        note_versions([(folder, folder.read())])
    return folder


def note_versions(found: Iterable[tuple[RunDir, Run]]) -> None:
    """Say which runs were made with another Axolotl than is installed."""
    by_note: dict[str, list[RunDir]] = {}
    for folder, run in found:
        by_note.setdefault(other_axolotl(run.provenance.get("packages")), []).append(folder)
    for note, folders in by_note.items():
        which = f"{len(folders)} runs, {folders[-1].path} the last, were" if folders[1:] else f"{folders[0].path} was"
        if note:
            say_once(f"{which} {note}")


def readable(folders: Sequence[RunDir], read: Callable[[RunDir], Run] = RunDir.read) -> Iterator[tuple[RunDir, Run]]:
    """Runs whose run.json can be read, by `RunDir.read` or `backends.read`; the others are reported on stderr.

    So are those of another Axolotl.
    """
    found = []
    for folder in folders:
        try:
            found.append((folder, read(folder)))
        except UserError as error:
            say(str(error))
            continue
        yield found[-1]
    note_versions(found)
