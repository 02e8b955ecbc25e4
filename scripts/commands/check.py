"""The command check."""

import shlex
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from ..base import tables
from ..base.errors import UserError
from ..base.paths import selected
from ..base.terminal import Bar, say
from .help import RecipeCommand, run_arguments, suggest
from .options import Force, Json, Names, Overrides, Profiles

if TYPE_CHECKING:
    from ..check.check import Report
    from ..config.compose import Request

commands = typer.Typer(rich_markup_mode=None)


@commands.command(
    "check",
    cls=RecipeCommand,
    epilog="recipe check code-llama-7b --gpu T4 --all-rows\nrecipe check mine.yaml --show-tokens 2",
)
def check_command(
    *,
    names: Names,
    profile: Profiles,
    set_: Overrides,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Check the reduced CPU config that `run --rehearse` would use.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="GPU to check against, e.g. T4 or sm_75; default: this machine's.",
        ),
    ] = None,
    data: Annotated[
        bool,
        typer.Option("--all-rows", help="Also read and tokenize every row; fetches a missing tokenizer."),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out Axolotl's own validation; it takes 3 s.")] = False,
    show_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Show N tokenized rows; mark the tokens trained on."),
    ] = None,
    force: Force,
    json: Json = False,
) -> None:
    """Find mistakes in a config. Exit code 2 if there is an error."""
    from .. import api
    from ..config import gpus
    from ..config.compose import Request
    from ..config.finding import unknown_force

    target = gpus.here() if gpu is None else gpus.find_gpu(gpu)
    requests = [Request(name, profile, set_, rehearse, force=force) for name in selected(names)]
    if show_tokens:
        _show_tokens(requests, show_tokens, json)
        return
    _suggest_migration(names)
    reports = api.reports(requests, target, data, quick)
    unknown_force(force, {finding.name for report in reports for finding in report.findings})
    if json:
        tables.print_json([report.as_json() for report in reports])
    else:
        _print(reports)
    _say_counts(reports, _skipped(reports, data, quick))
    if all(report.validated for report in reports):  # an incomplete check recommends no next step
        _suggest_next(names, gpu, requests, json)


def _suggest_migration(names: list[str]) -> None:
    """Suggest to migrate files that were written for an older release of Axolotl."""
    from ..writing import migrate

    for name in names:
        with suppress(UserError):  # the check reports it
            old = migrate.of_file(name, None)
            if not old.is_current and old.release != str(migrate.supported()):
                say(f"{name}: written for an older Axolotl; `recipe new NAME --from {shlex.quote(name)}` migrates it")


def _suggest_next(names: list[str], gpu: str | None, requests: "list[Request]", json: bool) -> None:
    """Suggest a plan of the same configs; for one rehearsal, which has no plan, suggest its run."""
    first = requests[0]
    if not first.rehearse:
        gpu_option = ["--gpu", gpu] if gpu else []
        suggest("plan", *names, *first.options, *gpu_option, json=json)
    elif len(requests) == 1:
        suggest("run", *run_arguments(first), json=json)


def _show_tokens(requests: "list[Request]", count: int, json: bool) -> None:
    from ..check import check

    if len(requests) > 1:
        raise UserError("--show-tokens: give one recipe")
    with Bar("tokenizing", 1):
        rows = check.tokens_of(requests[0], count)
    if json:
        tables.print_json(rows)
    else:
        tables.print_tokens(rows)


def _print(reports: "list[Report]") -> None:
    """Print all findings, then the sizes of the data."""
    for report in reports:
        for finding in report.findings:
            tables.print_text(str(finding))
    for report in reports:
        tables.print_table(report.data_table(), report.name)


def _say_counts(reports: "list[Report]", skipped: str) -> None:
    """Log the numbers of errors and warnings.

    Raises:
        typer.Exit: code 2 if there is an error.
    """
    errors = sum(report.count("error") for report in reports)
    warnings = sum(report.count("warning") for report in reports)
    say(f"{len(reports)} checked{skipped}; errors: {errors}, warnings: {warnings}")
    if errors:
        raise typer.Exit(2)


def _skipped(reports: "list[Report]", data: bool, quick: bool) -> str:
    """Parts of the check that were left out."""
    from ..check.check import SAMPLE

    text = ""
    if all(report.compared for report in reports):
        text += f", at most {SAMPLE} rows read (--all-rows)"
    elif not data:
        text += ", rows not tokenized (--all-rows)"
    if quick:
        text += ", not validated by Axolotl (--quick)"
    return text
