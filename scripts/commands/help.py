"""Help texts with headings and examples, and suggestions of the next command."""

import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click
from typer.core import TyperCommand, TyperGroup

from ..base import paths
from ..base.errors import UserError
from ..base.terminal import PART, say

if TYPE_CHECKING:
    from ..config.compose import Request
    from ..run.rundir import RunDir


def _write_sections(sections: dict[str, list[tuple[str, str]]], formatter: click.HelpFormatter) -> None:
    for heading, records in sections.items():
        with formatter.section(heading):
            formatter.write_dl(records)


def _write_examples(epilog: str | None, formatter: click.HelpFormatter) -> None:
    assert epilog
    with formatter.section("Examples"):
        for line in epilog.splitlines():
            formatter.write(f"  {line}\n")


class RecipeCommand(TyperCommand):
    """A command; its epilog consists of examples, one per line."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write arguments, then options under their headings."""
        headings: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            heading = getattr(param, "rich_help_panel", None) or f"{param.param_type_name}s".capitalize()
            if record := param.get_help_record(ctx):
                headings.setdefault(heading, []).append(record)
        _write_sections(headings, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(self.epilog, formatter)


class RecipeGroup(TyperGroup):
    """A group of commands under headings; its epilog consists of examples, one per line."""

    def headings(self, ctx: click.Context) -> dict[str, list[str]]:
        """Names of the commands by heading."""
        return {"Commands": self.list_commands(ctx)}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.list_commands(ctx)))
        for heading, names in self.headings(ctx).items():
            records = []
            for name in names:
                command = self.get_command(ctx, name)
                assert command
                records.append((name.ljust(width), command.get_short_help_str(limit=1000)))
            _write_sections({heading: records}, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(self.epilog, formatter)


def suggest(*words: str | Path, json: bool = False) -> None:
    """Suggest the next command, unless another `recipe` started this one.

    Args:
        words: arguments of the next command.
        json: True if the command prints JSON; then nothing is suggested.
    """
    if not json and PART not in os.environ:
        where = [] if paths.runs() == Path("runs") else ["--runs", paths.runs()]
        say(f"next: recipe {shlex.join(map(str, [*where, *words]))}")


def name_of(run_dir: "RunDir") -> str:
    """Name of a run in a command: the folder's name, or its path if outside --runs."""
    return run_dir.path.name if run_dir.path.is_relative_to(paths.runs()) else str(run_dir.path)


def suggest_evaluation(run_dir: "RunDir", on: str) -> None:
    """Suggest the next command after training: the run's evaluation, or a report if its rows have no answers."""
    from ..evaluate import evaluation_rows

    run, cfg = run_dir.read(), run_dir.config
    words = ["report", name_of(run_dir)]
    with suppress(UserError):
        evaluation_rows.require_reference(run_dir, cfg, evaluation_rows.default_source(run, cfg))
        words = ["evaluate", name_of(run_dir), *([] if on == "local" else ["--on", on])]
    suggest(*words)


def run_arguments(request: "Request") -> list[str]:
    """Arguments of `recipe run`; with --rehearse if there is no GPU."""
    from ..config import gpus

    several = ["--gpus", str(request.gpus)] if request.gpus > 1 else []
    rehearsed = rehearse_option(request.rehearse or gpus.here() is None)
    return [request.name, *request.options, *several, *rehearsed]


def rehearse_option(rehearse: bool) -> list[str]:
    """The option --rehearse, or nothing."""
    return ["--rehearse"] if rehearse else []
