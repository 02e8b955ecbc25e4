"""The verb reproduce: a study from its data to its table, or what its authors published on the way."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import tables
from ..base import paths
from ..base.progress import say
from . import completion
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
    form_of,
    only_with,
)
from .running import HEADING, end

if TYPE_CHECKING:
    from ..data import study as data_study

Study = Annotated[
    str, typer.Argument(metavar="STUDY", autocompletion=completion.studies, help="A study's name, as haider2024.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", autocompletion=completion.recipes, help="Only this recipe. Repeatable."),
]
Outlined = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be done, and how long it takes; start nothing.")
]
verbs = typer.Typer()


@verbs.command(
    "reproduce",
    cls=Verb,
    rich_help_panel=HEADING,
    epilog="recipe reproduce haider2024 --rehearse\nrecipe reproduce haider2024 --dry-run --gpu T4",
)
def reproduce_verb(
    study: Study,
    from_: FromStage = "training",
    rehearse: RehearseAll = False,
    only: Only = None,
    seeds: Seeds = 1,
    jobs: Jobs = None,
    on: On = "local",
    profile: Profiles = None,
    set_: Overrides = None,
    metric: Metrics = None,
    force: Force = None,
    dry_run: Outlined = False,
    gpu: PlannedGpu = None,
    json: Json = False,
) -> None:
    """Fetch, check, plan, train, evaluate and compare all of a study. What is done already is not done again."""
    from ..configs import gpus
    from ..configs.compose import Request, is_rehearsal
    from ..data.study import find
    from ..results import listing, verdict
    from ..running import reproduce, stages
    from ..scores.evaluate import EvaluationRequest

    only_with("--gpu", gpu, "--dry-run", dry_run)
    own = {f"--on {on}": on != "local", "--seeds": seeds > 1, "--dry-run": dry_run}
    for option, given in own.items():
        only_with(option, given, "--from training", from_ == "training")
    of_study = find(study)
    request = Request(of_study.folder.name, profile or [], set_ or [], rehearse, force=force or [])
    request.rehearse = is_rehearsal(request)
    of_model: dict[str, Any] = {
        "--rehearse": request.rehearse,
        "--set": set_,
        "--profile": profile,
        "--jobs": jobs,
    }
    for option, given in of_model.items():
        only_with(option, given, "--from adapter or training", from_ != "predictions", "predictions need no model")
    evaluation = EvaluationRequest(metrics=metric or [])
    backend = backend_of(on, request.rehearse, jobs)
    form = form_of(json)
    if from_ == "predictions":
        _score_predictions(of_study, only or [], evaluation.judge, form)
        return
    if dry_run:
        card = gpus.find(gpu) if gpu else None
        outline = reproduce.outline(of_study, request, only or [], evaluation, backend, card, seeds)
        reproduce.show_outline(outline, form)
        if not json:
            say("next: the same command without --dry-run")
        return
    if from_ == "adapter":
        results = stages.evaluate_adapters(of_study, request, only or [], evaluation, backend)
    else:
        results = reproduce.reproduce(of_study, request, only or [], evaluation, backend, seeds)
    rows = verdict.rows(of_study, paths.runs(), request.rehearse, reproduce.representative_runs(results))
    records = [verdict.record(row, of_study) for row in rows]
    end(results, form, {}, records, lambda: listing.show_study(of_study, rows, request.rehearse, form))
    rehearsed = ["--rehearse"] if request.rehearse else []
    next_step("report" if backend.here else "results", study, *rehearsed, json=json)


def _score_predictions(of_study: "data_study.Study", only: list[str], judge: str | None, form: tables.Form) -> None:
    """Score the predictions that were published with a study's scores, and print the scores.

    Raises:
        typer.Exit: with 1, where predictions cannot be scored; the others are printed.
    """
    from ..running import stages

    rows, problems = stages.score_predictions(of_study, only, judge)
    if form == "json":
        tables.print_json({"scores": rows, "problems": problems})
    elif rows:
        tables.write(rows, form, spare=["matched", "verified", "low", "high"])
    for name, problem in problems.items():
        say(f"{name}: {problem}")
    if problems:
        raise typer.Exit(1)
    next_step("reproduce", of_study.folder.name, json=form == "json")
