"""The verb results."""

from typing import Annotated

import typer

from ..base import paths
from ..base.errors import UserError
from ..base.terminal import say
from .help import Verb, next_step
from .options import Json, Metrics, RehearsalsOfStudy, Things, complete_runs, exclusive, only_with

verbs = typer.Typer(rich_markup_mode=None)


@verbs.command(
    "results",
    cls=Verb,
    epilog="recipe results haider2024\nrecipe results lora-tradeoffs\nrecipe results RUN RUN",
)
def results_verb(
    names: Things = None,
    rehearse: RehearsalsOfStudy = False,
    metric: Metrics = None,
    export: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|STUDY",
            autocompletion=complete_runs,
            help="Record the scores of a run, or of a study's published predictions.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show losses and scores of runs, a study or a sweep, or compare two runs."""
    names = names or []
    exclusive({"--export": export, "--rehearse": rehearse, "--metric": metric})
    exclusive({" ".join(names): names, "--export": export})
    only_with("--metric", metric, "two runs", len(names) == 2)
    only_with("--rehearse", rehearse, "a study", len(names) == 1)
    if export:
        _export(export)
    elif len(names) == 1:
        _show_one(names[0], rehearse, json)
    elif len(names) > 2:
        raise UserError(f"{' '.join(names)}: give two runs to compare, or a run and a file of predictions")
    elif names:
        from ..results import compare, study_tables

        pair = (names[0], names[1])
        study_tables.show_comparison(compare.comparison(pair, paths.runs(), metric or []), pair, json)
    elif json or any(paths.runs().rglob("run.json")):
        from ..results import listing
        from ..run.rundir import all_runs

        listing.show(all_runs(paths.runs()), json)
    else:
        say(f"no runs below {paths.runs()}/; `recipe run NAME --rehearse` makes one")


def _export(name: str) -> None:
    """Write the records of a run, or of a study's published predictions.

    Raises:
        typer.Exit: code 1 if some predictions cannot be scored; the other records are still written.
    """
    from ..data import studies
    from ..results import export
    from ..run.rundir import find_run
    from ..study import reproduce

    if name not in {folder.name for folder in paths.studies()}:
        print(export.export(find_run(name, paths.runs())))
        return
    of_study = studies.find(name)
    rows, problems = reproduce.score_predictions(of_study, [], None)
    for file in export.export_predictions(of_study, rows):
        print(file)
    for owner, problem in problems.items():
        say(f"{owner}: {problem}")
    if problems:
        raise typer.Exit(1)


def _show_one(name: str, rehearse: bool, json: bool) -> None:
    from ..data.studies import Study
    from ..results import listing, study_tables, sweep_results, verdict
    from ..study.sweep import Sweep, find_any, recorded_sweeps

    thing = find_any(name)
    only_with("--rehearse", rehearse, "a study", isinstance(thing, Study))
    if isinstance(thing, Study):
        rows = verdict.rows(thing, paths.runs(), rehearse)
        sweeps = [sweep for sweep in recorded_sweeps().values() if sweep.rehearsal == rehearse]
        best = sweep_results.best_rows(thing, sweeps, paths.runs())
        study_tables.show_study(thing, rows, rehearse, json, [*map(sweep_results.best_record, best)])
        if not json:
            sweep_results.show_best(best)
    elif isinstance(thing, Sweep):
        sweep_results.show(thing, json)
    else:
        listing.show([thing], json)
    next_step("report", name, *["--rehearse"][:rehearse], json=json)
