"""The verb sweep."""

from typing import Annotated

import typer

from ..base import paths
from .help import Verb, next_step
from .options import (
    Force,
    Jobs,
    Json,
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
    end,
    only_with,
)

Tried = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=V,V,V",
        autocompletion=complete_keys,
        help="Values to try for KEY. Repeatable; then all combinations are tried.",
    ),
]
verbs = typer.Typer(rich_markup_mode=None)


@verbs.command(
    "sweep",
    cls=Verb,
    epilog="recipe sweep code-llama-7b lora-tradeoffs --rehearse\nrecipe sweep llama-3.2-3b --set lora_r=16,32,64"
    "\nrecipe sweep haider2024 --set learning_rate=1e-4,2e-4,5e-4",
)
def sweep_verb(
    name: NameOrStudy,
    file: SweepFile = None,
    set_: Tried = None,
    rehearse: RehearseAll = False,
    profile: Profiles = None,
    seeds: Seeds = 1,
    jobs: Jobs = None,
    on: On = "local",
    gpu: PlannedGpu = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Evaluate only N rows, chosen pseudo-randomly; default: all (rehearsal: 12)."
        ),
    ] = None,
    metric: Metrics = None,
    force: Force = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan every run, but start none.")] = False,
    json: Json = False,
) -> None:
    """Train and score a recipe or study with each combination of values. Completed steps are skipped."""
    from ..config import gpus
    from ..config.compose import Request, is_rehearsal
    from ..data import studies
    from ..evaluate.evaluate import EvaluationRequest
    from ..results import sweep_results
    from ..study import reproduce, sweep

    only_with("--gpu", gpu, "--dry-run", dry_run)
    sweep_name, members = sweep.read_members(sweep.find_sweep_file(file) if file else None, set_ or [])
    request = Request(name, profiles=profile or [], rehearse=rehearse, force=force or [])
    request.rehearse = is_rehearsal(request)
    evaluation = EvaluationRequest(limit=limit, metrics=metric or [])
    backend = backend_of(on, request.rehearse, jobs)
    of_study = studies.find(name) if name in {folder.name for folder in paths.studies()} else None
    records, results = sweep.sweep(
        sweep_name,
        members,
        [reproduce.request_for(request, recipe) for recipe in of_study.published] if of_study else [request],
        evaluation,
        backend,
        seeds=seeds,
        gpu=gpus.find(gpu) if gpu else None,
        dry_run=dry_run,
    )
    runs, best = paths.runs(), []
    if of_study:
        best = sweep_results.best_rows(of_study, records, runs)
    rows = [sweep_results.record(row) for record in records for row in sweep_results.rows(record, runs)]

    def show() -> None:
        for record in records:
            sweep_results.show(record, json)
        sweep_results.show_best(best)

    head = {"sweep": records[0].label, "tuned": [*map(sweep_results.best_record, best)]}
    end(results, json, head, rows, show)
    if of_study:
        next_step("results", name, *["--rehearse"][: request.rehearse], json=json or dry_run)
    else:
        next_step("results", records[0].label, json=json or dry_run)
