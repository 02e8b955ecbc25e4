"""The verb reproduce: a study from its data to its table, or what its authors published on the way."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.paths import RUNS
from ..base.progress import say
from ..terminal import tables
from . import completion
from .help import Verb
from .next_step import next_step
from .options import (
    BatchSize,
    FetchedJudge,
    Force,
    FromRung,
    Jobs,
    Json,
    JudgeLayer,
    Mirror,
    On,
    Overrides,
    PlannedGpu,
    Profiles,
    RehearseAll,
    Runs,
    Seeds,
    SlurmOptions,
    backend_of,
    form_of,
    only_with,
)
from .running import HEADING, end

if TYPE_CHECKING:
    from ..backends import Backend
    from ..configs.compose import Request
    from ..data import study as data_study
    from ..running.ladder import From
    from ..runs.tasks import Outcome
    from ..scores.task import EvaluationRequest

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
    from_: FromRung = "training",
    rehearse: RehearseAll = False,
    only: Only = None,
    seeds: Seeds = 1,
    jobs: Jobs = None,
    on: On = "local",
    slurm: SlurmOptions = None,
    profile: Profiles = None,
    set_: Overrides = None,
    mirror: Mirror = False,
    bertscore: FetchedJudge = None,
    bertscore_layer: JudgeLayer = None,
    batch_size: BatchSize = None,
    force: Force = None,
    dry_run: Outlined = False,
    gpu: PlannedGpu = None,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Fetch, check, plan, train, evaluate and compare all of a study. What is done already is not done again."""
    from ..configs import gpus
    from ..configs.compose import Request, is_rehearsal
    from ..data.study import find
    from ..running import reproduce
    from ..scores.task import EvaluationRequest

    only_with("--gpu", gpu, "--dry-run", dry_run)
    for option, given in ((f"--on {on}", on != "local"), ("--seeds", seeds > 1), ("--gpu", gpu)):
        only_with(option, given, "--from training", from_ == "training")
    of_study = find(study)
    request = Request(of_study.folder.name, profile or [], set_ or [], rehearse, mirror, force=force or [])
    request.rehearse = is_rehearsal(request)
    only_with("--rehearse", request.rehearse, "--from adapter or training", from_ != "predictions", "it needs no model")
    evaluation = EvaluationRequest(judge=bertscore, judge_layer=bertscore_layer, batch_size=batch_size)
    backend = backend_of(on, slurm, request.rehearse, jobs)
    form = form_of(json)
    if from_ != "training":
        _climb(of_study, request, only or [], evaluation, runs, backend, from_, dry_run, form)
        return
    if dry_run:
        card = gpus.find(gpu) if gpu else None
        outline = reproduce.outline(of_study, request, only or [], evaluation, runs, backend, card, seeds)
        reproduce.show_outline(outline, form)
        if not json:
            say("next: the same command without --dry-run")
        return
    outcomes = reproduce.reproduce(of_study, request, only or [], evaluation, runs, backend, seeds)
    _show_reproduced(of_study, outcomes, request.rehearse, bool(only), runs, form)
    rehearsed = ["--rehearse"] if request.rehearse else []
    next_step("report" if backend.here else "results", "--study", study, *rehearsed, runs=runs, json=json)


def _show_reproduced(
    of_study: "data_study.Study", outcomes: "list[Outcome]", rehearsal: bool, only: bool, runs: Path, form: tables.Form
) -> None:
    from ..results import ladder, study_tables, verdict
    from ..running import reproduce

    rows = verdict.rows(of_study, runs, rehearsal, reproduce.speakers(outcomes))
    rungs = ladder.begun(of_study, runs, rehearsal, rows, [outcome.recipe for outcome in outcomes] if only else [])

    head = {"ladder": rungs} if rungs else {}
    end(outcomes, form, head, rows, lambda: study_tables.show(of_study, rows, rehearsal, form, rungs))


def _climb(
    of_study: "data_study.Study",
    request: "Request",
    only: list[str],
    evaluation: "EvaluationRequest",
    runs: Path,
    backend: "Backend",
    from_: "From",
    dry_run: bool,
    form: tables.Form,
) -> None:
    """Evaluate what was published below a study's scores, and print its ladder.

    Raises:
        typer.Exit: with 1, where a rung cannot be had; the others are printed.
    """
    from ..results import ladder as results
    from ..results import verdict
    from ..running import ladder

    if dry_run:
        tables.write(ladder.outline(of_study, only, from_, request.rehearse), form, below=["fetch", "then"])
        if form != "json":
            say("next: the same command without --dry-run")
        return
    problems = ladder.climb(of_study, request, only, evaluation, runs, backend, from_)
    trained = verdict.rows(of_study, runs, request.rehearse)
    chosen = [one.name for one in ladder.owners(of_study, only, from_, request.rehearse)] if only else []
    rows = results.rows(of_study, runs, request.rehearse, trained, problems, from_, chosen)
    if form == "json":
        tables.print_json(rows)
    else:
        results.show(of_study, rows, form)
    if problems:
        raise typer.Exit(1)
    rehearsed = ["--rehearse"] if request.rehearse else []
    next_step("reproduce", of_study.folder.name, *rehearsed, json=form == "json", runs=runs)
