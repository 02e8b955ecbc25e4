"""The verb reproduce."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..base import paths, tables
from ..base.terminal import say
from .help import Verb, next_step
from .options import (
    Force,
    FromStage,
    Jobs,
    Json,
    Metrics,
    On,
    Overrides,
    PlannedGpu,
    Profiles,
    RehearseAll,
    Seeds,
    backend_of,
    complete_recipes,
    complete_studies,
    end,
    only_with,
)

if TYPE_CHECKING:
    from ..data.studies import Study

OnlyRecipes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        autocompletion=complete_recipes,
        help="Reproduce only this recipe, or a pattern such as 'llama-3*'. Repeatable.",
    ),
]
verbs = typer.Typer(rich_markup_mode=None)


@verbs.command(
    "reproduce",
    cls=Verb,
    epilog="recipe reproduce haider2024 --rehearse\nrecipe reproduce haider2024 --dry-run --gpu T4",
)
def reproduce_verb(
    study: Annotated[
        str, typer.Argument(metavar="STUDY", autocompletion=complete_studies, help="Study, e.g. haider2024.")
    ],
    from_: FromStage = "training",
    rehearse: RehearseAll = False,
    only: OnlyRecipes = None,
    seeds: Seeds = 1,
    jobs: Jobs = None,
    on: On = "local",
    profile: Profiles = None,
    set_: Overrides = None,
    metric: Metrics = None,
    force: Force = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the data and runs, with memory and hours; start nothing.")
    ] = False,
    gpu: PlannedGpu = None,
    json: Json = False,
) -> None:
    """Run a whole study, from data to comparison with published scores. Completed stages are skipped."""
    from ..config import gpus
    from ..config.compose import Request, is_rehearsal
    from ..data.studies import find
    from ..evaluate.evaluate import EvaluationRequest
    from ..results import study_tables, verdict
    from ..study import reproduce

    only_with("--gpu", gpu, "--dry-run", dry_run)
    of_study = find(study)
    request = Request(of_study.folder.name, profile or [], set_ or [], rehearse, force=force or [])
    request.rehearse = is_rehearsal(request)
    if from_ != "training":
        later: dict[str, object] = {f"--on {on}": on != "local", "--seeds": seeds > 1, "--dry-run": dry_run}
        if from_ == "predictions":
            later |= {"--rehearse": request.rehearse, "--set": set_, "--profile": profile, "--jobs": jobs}
        for option, given in later.items():
            only_with(option, given, f"a later stage than --from {from_}", False)
    evaluation = EvaluationRequest(metrics=metric or [])
    backend = backend_of(on, request.rehearse, jobs)
    if from_ == "predictions":
        _score_predictions(of_study, only or [], evaluation.judge, json)
        return
    if dry_run:
        target = gpus.find(gpu) if gpu else None
        outline = reproduce.outline(of_study, request, only or [], evaluation, backend, target, seeds)
        reproduce.show_outline(outline, json)
        if any(row["training"] == "refused" for row in outline["recipes"]):
            raise typer.Exit(2)
        if not json:
            say("next: the same command without --dry-run")
        return
    if from_ == "adapter":
        results = reproduce.evaluate_adapters(of_study, request, only or [], evaluation, backend)
    else:
        results = reproduce.reproduce(of_study, request, only or [], evaluation, backend, seeds)
    rows = verdict.rows(of_study, paths.runs(), request.rehearse, reproduce.representative_runs(results))
    records = [verdict.record(row) for row in rows]
    end(results, json, {}, records, lambda: study_tables.show_study(of_study, rows, request.rehearse, json))
    next_step("results", study, *["--rehearse"][: request.rehearse], json=json)


def _score_predictions(of_study: "Study", only: list[str], scorer: str | None, json: bool) -> None:
    """Score a study's published predictions, and print the scores.

    Raises:
        typer.Exit: code 1 if some predictions cannot be scored; the other scores are still printed.
    """
    from ..study import reproduce

    rows, problems = reproduce.score_predictions(of_study, only, scorer)
    if json:
        tables.print_json({"scores": rows, "problems": problems})
    elif rows:
        tables.print_table(rows)
    for name, problem in problems.items():
        say(f"{name}: {problem}")
    if problems:
        raise typer.Exit(1)
    next_step("reproduce", of_study.folder.name, json=json)
