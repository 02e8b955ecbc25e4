"""What one usually does when a verb is done: a line on stderr, with a command that can be run as it is."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import UserError
from ..base.paths import RUNS
from ..base.progress import PART, say

if TYPE_CHECKING:
    from ..runs.rundir import RunDir


def next_step(*words: str | Path, runs: Path = RUNS, json: bool = False) -> None:
    """Say which command of `recipe` comes next.

    Args:
        words: its arguments.
        runs: the folder with the runs, which is added where it is not the usual one.
        json: whether the verb prints JSON; nothing is said then, nor in a command that is a part of another.
    """
    if not json and PART not in os.environ:
        where = [] if runs == RUNS else ["--runs", runs]
        say(f"next: recipe {shlex.join(map(str, [*words, *where]))}")


def over(profiles: list[str] | None, sets: list[str] | None) -> list[str]:
    """The options that lay profiles and values over a recipe."""
    laid = [("--profile", profiles), ("--set", sets)]
    return [word for option, values in laid for value in values or [] for word in (option, value)]


def name_of(folder: "RunDir", runs: Path) -> str:
    """How a run is named beside --runs: by the end of its path, if it is there."""
    return folder.path.name if folder.path.is_relative_to(runs) else str(folder.path)


def after_training(folder: "RunDir", runs: Path, on: str) -> None:
    """Say what follows a run: its evaluation, or a report where its rows have no answers to compare with."""
    from ..base import yamlfiles
    from ..scores import evaluation_rows

    run, cfg = folder.read(), yamlfiles.read_yaml(folder.config)
    try:
        evaluation_rows.require_reference(folder, run, cfg, evaluation_rows.usual(run, cfg))
    except UserError:
        next_step("report", name_of(folder, runs), runs=runs)
    else:
        next_step("evaluate", name_of(folder, runs), *([] if on == "local" else ["--on", on]), runs=runs)
