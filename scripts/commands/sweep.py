"""The command sweep."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..base import paths
from ..base.files import Row
from .help import RecipeCommand, rehearse_option, suggest
from .options import (
    Force,
    Jobs,
    Json,
    Limit,
    Metrics,
    NameOrStudy,
    On,
    PlannedGpu,
    Profiles,
    RehearseAll,
    Seeds,
    SweepFile,
    backend_of,
    complete_keys,
    refuse_without,
    repeatable_option,
    show_and_exit,
)

if TYPE_CHECKING:
    from ..data.studies import Study
    from ..run.backends import TaskResult
    from ..study.sweep import Sweep

Tried = Annotated[
    list[str],
    repeatable_option(
        "--set",
        metavar="KEY=V,V,V",
        autocompletion=complete_keys,
        help="Values to try for KEY. Repeatable; then all combinations are tried.",
    ),
]
commands = typer.Typer(rich_markup_mode=None)


@commands.command(
    "sweep",
    cls=RecipeCommand,
    epilog="recipe sweep code-llama-7b lora-tradeoffs --rehearse\nrecipe sweep llama-3.2-3b --set lora_r=16,32,64"
    "\nrecipe sweep haider2024 --set learning_rate=1e-4,2e-4,5e-4",
)
def sweep_command(
    *,
    name: NameOrStudy,
    file: SweepFile = None,
    set_: Tried,
    rehearse: RehearseAll = False,
    profile: Profiles,
    seeds: Seeds = 1,
    jobs: Jobs = None,
    on: On = "local",
    gpu: PlannedGpu = None,
    limit: Limit = None,
    metric: Metrics,
    force: Force,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan every run, but start none.")] = False,
    json: Json = False,
) -> None:
    """Train and score a recipe or study with each combination of values. Finished runs and evaluations are skipped."""
    from ..config.compose import Request, is_rehearsal
    from ..data import studies
    from ..evaluate.evaluate import EvaluationRequest
    from ..study import reproduce, sweep

    refuse_without("--gpu", gpu, "--dry-run", dry_run)
    grid = sweep.Grid.from_overrides(set_)
    if file:
        grid = sweep.Grid.from_file(paths.find_sweep_file(file)).merged(grid)
    request = Request(name, profiles=profile, rehearse=rehearse, force=force)
    request.rehearse = is_rehearsal(request)
    requests, study = [request], None
    if paths.is_study(name):
        study = studies.find(name)
        requests = [reproduce.request_for(request, recipe) for recipe in study.published]
    records, results = sweep.sweep(
        grid,
        requests,
        EvaluationRequest(limit=limit, metrics=metric),
        backend_of(on, request.rehearse, jobs, submits=not dry_run),
        seeds=seeds,
        gpu=gpu,
        dry_run=dry_run,
    )
    _show_results(study, records, results, json)
    words = [records[0].label]
    if study:
        words = [name, *rehearse_option(request.rehearse)]
    suggest("results", *words, json=json or dry_run)


def _show_results(study: "Study | None", records: "list[Sweep]", results: "list[TaskResult]", json: bool) -> None:
    """Print the steps, the trials' scores and a study's best trials; exit with the steps' code."""
    from ..results import sweep_results

    best = sweep_results.best_rows(study, records, paths.runs()) if study else []
    rows: list[Row] = []
    for record in records:
        rows += map(sweep_results.record, sweep_results.rows(record, paths.runs()))

    def show() -> None:
        for record in records:
            sweep_results.show(record, json)
        sweep_results.show_best(best)

    head = {"sweep": records[0].label, "tuned": [*map(sweep_results.best_record, best)]}
    show_and_exit(results, json, head, rows, show)
