"""The command reproduce."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base import paths, tables
from ..base.terminal import say
from .help import RecipeCommand, rehearse_option, suggest
from .options import (
    Force,
    Jobs,
    Json,
    Metrics,
    On,
    Overrides,
    PlannedGpu,
    Profiles,
    RehearseAll,
    Seeds,
    Stage,
    StudyName,
    backend_of,
    complete_recipes,
    refuse_without,
    repeatable_option,
    report_problems,
    show_and_exit,
)

if TYPE_CHECKING:
    from ..data.studies import Study
    from ..run.backends import TaskResult

OnlyRecipes = Annotated[
    list[str],
    repeatable_option(
        metavar="NAME",
        autocompletion=complete_recipes,
        help="Reproduce only this recipe, or a pattern such as 'llama-3*'. Repeatable.",
    ),
]
commands = typer.Typer(rich_markup_mode=None)


@commands.command(
    "reproduce",
    cls=RecipeCommand,
    epilog="recipe reproduce haider2024 --rehearse\nrecipe reproduce haider2024 --dry-run --gpu T4",
)
def reproduce_command(
    *,
    name: StudyName,
    stage: Stage = "training",
    rehearse: RehearseAll = False,
    only: OnlyRecipes,
    seeds: Seeds = 1,
    jobs: Jobs = None,
    on: On = "local",
    profile: Profiles,
    set_: Overrides,
    metric: Metrics,
    force: Force,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the data and runs, with memory and hours; start nothing.")
    ] = False,
    gpu: PlannedGpu = None,
    json: Json = False,
) -> None:
    """Run a whole study, from data to comparison with published scores. Completed stages are skipped."""
    from ..config.compose import Request, is_rehearsal
    from ..data.studies import find
    from ..evaluate.evaluate import EvaluationRequest
    from ..study import reproduce

    refuse_without("--gpu", gpu, "--dry-run", dry_run)
    study = find(name)
    request = Request(study.folder.name, profile, set_, rehearse, force=force)
    request.rehearse = is_rehearsal(request)
    later_options: dict[str, object] = {}  # values of options that only stages after --stage have
    if stage != "training":
        later_options |= {f"--on {on}": on != "local", "--seeds": seeds > 1, "--dry-run": dry_run}
    if stage == "predictions":
        later_options |= {"--rehearse": request.rehearse, "--set": set_, "--profile": profile, "--jobs": jobs}
    for option, value in later_options.items():
        refuse_without(option, value, f"a later stage than --stage {stage}", False)
    evaluation = EvaluationRequest(metrics=metric)
    backend = backend_of(on, request.rehearse, jobs, submits=not dry_run)
    if stage == "predictions":
        _score_predictions(study, only, evaluation.scorer, json)
    elif dry_run:
        _show_outline(reproduce.outline(study, request, only, evaluation, backend, gpu, seeds), json)
    else:
        if stage == "adapter":
            results = reproduce.evaluate_adapters(study, request, only, evaluation, backend)
        else:
            results = reproduce.reproduce(study, request, only, evaluation, backend, seeds)
        _show_results(study, request.rehearse, results, json)
        suggest("results", name, *rehearse_option(request.rehearse), json=json)


def _show_outline(outline: dict[str, Any], json: bool) -> None:
    """Print an outline.

    Raises:
        typer.Exit: code 2 if a recipe would be refused.
    """
    from ..study import reproduce

    reproduce.show_outline(outline, json)
    if any(row["training"] == "refused" for row in outline["recipes"]):
        raise typer.Exit(2)
    if not json:
        say("next: the same command without --dry-run")


def _show_results(study: "Study", rehearse: bool, results: "list[TaskResult]", json: bool) -> None:
    """Print the steps, and compare the scores with the published ones; exit with the steps' code."""
    from ..results import study_tables, verdict
    from ..study import reproduce

    rows = verdict.rows(study, paths.runs(), rehearse, reproduce.representative_runs(results))
    records = [study_tables.record(row) for row in rows]
    show_and_exit(results, json, {}, records, lambda: study_tables.show_study(study, rows, rehearse, json))


def _score_predictions(study: "Study", only: list[str], scorer: str | None, json: bool) -> None:
    """Score a study's published predictions, and print the scores.

    Raises:
        typer.Exit: code 1 if some predictions cannot be scored; the other scores are still printed.
    """
    from ..study import reproduce

    rows, problems = reproduce.score_predictions(study, only, scorer)
    tables.show(json, {"scores": rows, "problems": problems}, [tables.Table(rows)])
    report_problems(problems)
    suggest("reproduce", study.folder.name, json=json)
