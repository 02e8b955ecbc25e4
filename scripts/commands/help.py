"""Help texts with headings and examples, and suggestions of the next command."""

import os
import shlex
from collections.abc import Iterable
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click
from typer.core import TyperCommand, TyperGroup

from ..base import paths
from ..base.errors import UserError
from ..base.progress import PART, say

if TYPE_CHECKING:
    from ..runs.rundir import RunDir

GUIDE = {
    verb: f"docs/{page}.md"
    for page, verbs in {
        "launch": ("list", "show", "run", "resume", "cancel"),
        "variants": ("diff", "new"),
        "check": ("check",),
        "plan": ("plan",),
        "data": ("data fetch", "data prepare"),
        "sweep": ("sweep",),
        "reproduce": ("reproduce",),
        "evaluate": ("evaluate", "score"),
        "results": ("results",),
        "report": ("report", "publish"),
        "troubleshooting": ("doctor",),
    }.items()
    for verb in verbs
} | dict.fromkeys(("render", "study new", "study check"), "templates/README.md")
_NO_BREAK = "\N{NON-BREAKING HYPHEN}"


class _Formatter(click.HelpFormatter):
    """Help formatter that never breaks lines at hyphens, and writes click's `INTEGER` as `N`."""

    def write(self, string: str) -> None:
        super().write(string.replace(_NO_BREAK, "-"))

    def write_heading(self, heading: str) -> None:
        super().write_heading(click.style(heading, bold=True))

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        super().write_usage(prog, _unbroken(args), prefix)

    def write_text(self, text: str) -> None:
        super().write_text(_unbroken(text))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 24, col_spacing: int = 2) -> None:
        plain = [
            (written.replace("INTEGER RANGE", "N").replace("INTEGER", "N"), explained.replace("x>=", "at least "))
            for written, explained in rows
        ]
        super().write_dl([(written, _unbroken(explained)) for written, explained in plain], col_max, col_spacing)


def _unbroken(text: str) -> str:
    return text.replace("-", _NO_BREAK)


class _Context(click.Context):
    formatter_class = _Formatter


def _write_examples(epilog: str | None, formatter: click.HelpFormatter, heading: str = "Examples") -> None:
    with formatter.section(heading):
        for line in (epilog or "").splitlines():
            formatter.write(f"  {line}\n")


class Verb(TyperCommand):
    """A verb; its epilog consists of examples, one per line."""

    context_class = _Context

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write arguments, then options under their headings."""
        headings: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            kind = "Arguments" if isinstance(param, click.Argument) else "Options"
            if record := param.get_help_record(ctx):
                headings.setdefault(getattr(param, "rich_help_panel", None) or kind, []).append(record)
        for heading, records in headings.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(self.epilog, formatter)
        if page := GUIDE.get(ctx.command_path.partition(" ")[2]):
            formatter.write(f"\nGuide: {page}\n")


class Verbs(TyperGroup):
    """A group of verbs under headings; its epilog consists of examples, one per line."""

    context_class = _Context
    EXAMPLES = "Examples"

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        verbs = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        width = max(len(name) for name, _ in verbs)
        for heading, below in groupby(verbs, key=lambda verb: getattr(verb[1], "rich_help_panel", None) or "Commands"):
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), verb.get_short_help_str(limit=1000)) for name, verb in below])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(self.epilog, formatter, self.EXAMPLES)


def next_step(*words: str | Path, json: bool = False) -> None:
    """Suggest the next command, unless another `recipe` started this one.

    Args:
        words: arguments of the next command.
        json: True if the verb prints JSON; then nothing is suggested.
    """
    if not json and PART not in os.environ:
        where = [] if paths.runs() == Path("runs") else ["--runs", paths.runs()]
        say(f"next: recipe {shlex.join(map(str, [*where, *words]))}")


def over(profiles: list[str] | None, sets: list[str] | None) -> list[str]:
    """Arguments --profile and --set for a command."""
    laid = [("--profile", profiles), ("--set", sets)]
    return [word for option, values in laid for value in values or [] for word in (option, value)]


def name_of(folder: "RunDir") -> str:
    """Name of a run in a command: the folder's name, or its path if outside --runs."""
    return folder.path.name if folder.path.is_relative_to(paths.runs()) else str(folder.path)


def after_training(folder: "RunDir", on: str) -> None:
    """Suggest the next command after training: the run's evaluation or a report.

    It is a report if the run already has scores, or if its rows have no reference answers.
    """
    from ..base import yamlfiles
    from ..scores import evaluation_rows, evaluations

    run, cfg = folder.read(), yamlfiles.read_yaml(folder.config)
    words: list[str | Path] = ["report", name_of(folder)]
    if not evaluations.current(folder.path, run):
        with suppress(UserError):
            evaluation_rows.require_reference(folder, cfg, evaluation_rows.usual(run, cfg))
            words = ["evaluate", name_of(folder), *([] if on == "local" else ["--on", on])]
    next_step(*words)
