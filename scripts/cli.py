"""The command `recipe`; its verbs are in commands/, by the headings of `recipe --help`."""

import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .commands import after, before, ending, recipes, reproducing, running, scoring, upkeep
from .commands.help import Verbs

FIRST_STEPS = """\
recipe list
recipe run code-llama-7b --rehearse    # on the CPU
recipe evaluate latest
recipe results"""


class _Verbs(Verbs):
    """The verbs in the order of use; Typer would put groups of verbs last."""

    EXAMPLES = "First steps"
    ORDER = (
        *("list", "show", "diff", "new"),
        *("data", "check", "plan", "analyze"),
        *("run", "resume", "sweep", "reproduce", "cancel"),
        *("evaluate", "score", "results", "report", "publish"),
        *("doctor", "render", "study"),
    )

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=self.ORDER.index)


app = typer.Typer(
    cls=_Verbs,
    help="Axolotl recipes for QLoRA studies: list, run, evaluate and compare them.",
    no_args_is_help=True,
    epilog=FIRST_STEPS,
    rich_markup_mode=None,
    suggest_commands=False,  # click does, and both would
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _heading in (recipes, before, running, reproducing, scoring, after, upkeep):
    app.add_typer(_heading.verbs)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"qlora-recipes {version('qlora-recipes')}\naxolotl {version('axolotl')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show its version and Axolotl's.")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments; by default those of the process.

    Returns:
        The exit code: 0 done, 1 the work failed, 2 the request was wrong.
    """
    # torch's threads wait for each other in busy loops, which beside any other work makes training many times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # pydantic would search all installed packages for plugins, which takes a tenth of a second
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # CUDA then numbers GPUs as the driver does, for this process and for what it starts
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    # a notebook's kernel names its own backend, with which matplotlib cannot even be imported in this environment
    os.environ["MPLBACKEND"] = "agg"
    if argv is None:  # the process is this command's own: SIGTERM ends it as Ctrl-C does, half-written files removed
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 until the end; it is closed
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115 as above; None would be stdout
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding shows ? for what that lacks
            stream.reconfigure(errors="replace")
    return ending.ended(lambda: app(None if argv is None else list(argv), prog_name="recipe"))
