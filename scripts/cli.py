"""The command `recipe`: commands, in the order of `recipe --help`, and exit codes."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from click.exceptions import NoSuchCommand

from .base import paths
from .base.errors import UserError, WorkFailed
from .base.files import DISK_FULL
from .base.terminal import QUIET, prepare_environment, show_messages, warn
from .commands.help import RecipeGroup

FIRST_STEPS = """\
recipe list
recipe run code-llama-7b --rehearse    # on the CPU
recipe evaluate latest
recipe results"""


COMMANDS = {
    "Recipes": {"list": "list", "show": "list", "diff": "list", "new": "new"},
    "Before a run": {"data": "data", "check": "check", "plan": "plan"},
    "Running": {"run": "run", "resume": "run", "sweep": "sweep", "reproduce": "reproduce", "cancel": "run"},
    "After": {
        "evaluate": "evaluate",
        "score": "evaluate",
        "results": "results",
        "report": "results",
        "publish": "results",
    },
    "Upkeep": {"doctor": "upkeep", "remove": "upkeep", "render": "upkeep", "study": "upkeep"},
}
"""Commands by heading, in the order of use, each with its module in commands/."""


class _RecipeGroup(RecipeGroup):
    """All commands; a command's module is imported when it is used, or for help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for modules in COMMANDS.values() for name in modules]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for modules in COMMANDS.values():
            if cmd_name in modules:
                module = import_module(f".commands.{modules[cmd_name]}", __package__)
                return typer.main.get_group(module.commands).commands[cmd_name]
        return None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if not ctx.resilient_parsing and args[0] not in self.list_commands(
            ctx
        ):  # click would suggest imported commands
            raise NoSuchCommand(args[0], possibilities=self.list_commands(ctx), ctx=ctx)
        return super().resolve_command(ctx, args)

    def headings(self, ctx: click.Context) -> dict[str, list[str]]:
        return {heading: list(modules) for heading, modules in COMMANDS.items()}


app = typer.Typer(
    cls=_RecipeGroup,
    help="Axolotl recipes for QLoRA studies: list, run, evaluate and compare them.\n\n"
    "A recipe is an Axolotl config. A study is the recipes of a paper, or of other published runs, with their data and "
    "scores.",
    no_args_is_help=True,
    epilog=FIRST_STEPS,
    rich_markup_mode=None,
    suggest_commands=False,  # click suggests them already
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"qlora-recipes {version('qlora-recipes')}\naxolotl {version('axolotl')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the versions of recipe and Axolotl."
        ),
    ] = False,
    runs: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder of all runs; default: $QLORA_RUNS, or runs."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show only results and problems.")] = False,
) -> None:
    if quiet:
        os.environ[QUIET] = "1"  # also for child commands
        show_messages()
    if runs:
        os.environ[paths.RUNS] = runs  # also for child commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; by default the process's.

    Returns:
        The exit code: 0 done, 1 the work failed, 2 the request was wrong.
    """
    prepare_environment()
    # skip pydantic's search of all packages for plugins, which takes 0.1 s
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # a notebook's kernel sets its own backend, which breaks the import of matplotlib in this environment
    os.environ["MPLBACKEND"] = "agg"
    if argv is None:  # not called from Python: SIGTERM ends the process like Ctrl-C and removes temporary files
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 (open until the process ends)
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115 (as above; with None, print would use stdout)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # shows ? for characters that the terminal's encoding lacks
            stream.reconfigure(errors="replace")
    show_messages()
    return exit_code(partial(app, None if argv is None else list(argv), prog_name="recipe"))


def exit_code(command: Callable[[], object]) -> int:
    """Run a command and report its errors.

    Returns:
        The exit code: 0 done, 1 the work failed, 2 the request was wrong.
    """
    code: int | str | None = 0
    try:
        try:
            command()
        except SystemExit as end:
            code = end.code
        return _flushed(code)
    except UserError as error:
        return _refused(str(error), 2)
    except WorkFailed as error:
        return _refused(str(error), 1)
    except (MemoryError, ImportError) as error:
        # glibc's words for a library that does not fit below `ulimit -v`, as on login nodes of clusters
        if isinstance(error, ImportError) and "failed to map segment" not in str(error):
            raise
        return _refused("out of memory; free some, or raise the limit", 1)
    except OSError as error:
        return _report(error)


def _flushed(code: int | str | None) -> int:
    """Write out the rest of standard output; return a command's exit code."""
    sys.stdout.flush()
    if isinstance(code, str):  # a message instead of a code
        return _refused(code, 1)
    return int(code or 0)


def _report(error: OSError) -> int:
    """Report an error of the operating system, or raise it again if it does not concern a user's file."""
    if error.errno is None:  # from transformers, if the hub lacks a file or does not answer
        cause = error.__context__
        return _refused(str(cause if isinstance(cause, WorkFailed) else error), 1)
    is_disk_error = error.errno in (*DISK_FULL, errno.EIO)
    place = error.filename
    if place is None:
        if not is_disk_error:
            raise error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that a later flush succeeds
        place = "standard output, or a folder for temporary files"
    return _refused(f"{place}: {_in_words(error)}", 1 if is_disk_error else 2)


def _in_words(error: OSError) -> str:
    return "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror)


def _refused(problem: str, code: int) -> int:
    warn(f"recipe: {problem}")
    return code
