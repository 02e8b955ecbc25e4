"""The verbs that start and stop runs: run, resume, sweep, reproduce and cancel."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base import yamlfiles
from ..base.errors import UserError
from ..base.paths import RUNS
from .options import (
    BatchSize,
    Best,
    Json,
    Judge,
    JudgeLayer,
    Mirror,
    Name,
    On,
    Overrides,
    Profiles,
    RunName,
    Runs,
    SlurmOptions,
    SweepFile,
)

if TYPE_CHECKING:
    from ..runs.tasks import Outcome

HEADING = "Running"
verbs = typer.Typer()


@verbs.command(rich_help_panel=HEADING)
def run(
    name: Name,
    axolotl_arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- AXOLOTL ARGUMENTS]", help="Passed on to `axolotl train`."),
    ] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Try it on the CPU: small model, shipped sample, no network.")
    ] = False,
    profile: Profiles = None,
    set_: Overrides = None,
    mirror: Mirror = False,
    gpus: Annotated[int, typer.Option(help="How many GPUs to train on; with --nodes on each of them.")] = 1,
    nodes: Annotated[int, typer.Option(help="How many machines to train on, with --on slurm.")] = 1,
    on: On = "local",
    slurm: SlurmOptions = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="FINDING", help="Start in spite of an error that `recipe check` names so. Repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the config and start nothing.")] = False,
    runs: Runs = RUNS,
) -> None:
    """Train a recipe with Axolotl, in a run folder of its own."""
    from .. import places
    from ..configs.compose import Request, is_rehearsal
    from ..running import queueing
    from ..running import run as launcher

    if axolotl_arguments and not axolotl_arguments[0].startswith("-"):
        raise UserError(f"{axolotl_arguments[0]}: one recipe at a time; Axolotl's own options go behind --")
    request = Request(
        name,
        profiles=profile or [],
        overrides=set_ or [],
        rehearse=rehearse,
        mirror=mirror,
        gpus=gpus,
        nodes=nodes,
        dry_run=dry_run,
        axolotl_arguments=axolotl_arguments or [],
        force=force or [],
    )
    place = places.kinds()[on](is_rehearsal(request), None, slurm or [])
    if dry_run:
        print(yamlfiles.write_yaml(launcher.prepare(request, place).config), end="")
    elif place.here:
        print(launcher.run(request, runs).path)
    else:
        print(queueing.submit(request, runs, place).path)


@verbs.command(rich_help_panel=HEADING)
def resume(
    run: RunName,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Only tokenize its rows and fetch its base model; needs no GPU.")
    ] = False,
    on: On = "local",
    slurm: SlurmOptions = None,
    runs: Runs = RUNS,
) -> None:
    """Go on with an interrupted run from its last whole checkpoint."""
    from .. import places
    from ..running import queueing
    from ..running import run as launcher

    if prepare and on != "local":
        raise UserError("--prepare: is done here; jobs prepare by themselves")
    place = places.kinds()[on](rehearsal=False, jobs=None, options=slurm or [])
    if place.here:
        print(launcher.resume(run, runs, prepare).path)
    else:
        print(queueing.resubmit(run, runs, place).path)


@verbs.command(rich_help_panel=HEADING)
def sweep(
    name: Name,
    file: SweepFile = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=V,V,V", help="Try each value of a key, with each of the others. Repeatable."
        ),
    ] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Try all of it on the CPU: small model, shipped sample, no network.")
    ] = False,
    profile: Profiles = None,
    mirror: Mirror = False,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Run each member with N seeds.")] = 1,
    max_runs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Begin N members at most; the next time takes the others.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Members to work on at a time, each on a GPU of its own; by default 1 here, all on SLURM."
        ),
    ] = None,
    on: On = "local",
    slurm: SlurmOptions = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="The GPU to plan for; by default this machine's.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Evaluate on the first so many test rows only; 12 in a rehearsal.")
    ] = None,
    bertscore: Judge = None,
    bertscore_layer: JudgeLayer = None,
    batch_size: BatchSize = 16,
    best: Best = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan all members, and start none.")] = False,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Run a recipe with each of several settings, and compare them. What is done already is not done again."""
    from .. import places
    from ..configs import gpus
    from ..configs.compose import Request, is_rehearsal
    from ..running import sweep as sweeping
    from ..running import sweep_tables, sweeps
    from ..scores import evaluate as evaluation

    called, members = sweeps.read(sweeps.find_file(file) if file else None, set_ or [])
    request = Request(name, profiles=profile or [], rehearse=rehearse, mirror=mirror)
    request.rehearse = is_rehearsal(request)
    judged = evaluation.EvaluationRequest(
        limit=limit, judge=bertscore, judge_layer=bertscore_layer, batch_size=batch_size
    )
    target = gpus.find(gpu) if gpu else None
    place = places.kinds()[on](request.rehearse, jobs, slurm or [])
    options = sweeping.Options(request, place, seeds, max_runs, target, judged, runs, dry_run)
    made, outcomes = sweeping.sweep(called, members, options)
    rows = sweeps.rows(made, runs, best)
    _end(outcomes, json, {"sweep": made.label}, rows, lambda: sweep_tables.show(made, rows, best, "table"))


def _end(
    outcomes: "list[Outcome]", json: bool, head: dict[str, Any], rows: list[dict[str, Any]], show: Callable[[], None]
) -> None:
    """Print what became of recipes or members and what they came to, and exit as their problems ask for."""
    from ..base import tables
    from ..running import pipeline

    if json:
        steps = [outcome.as_row() | {"problem": outcome.problem} for outcome in outcomes]
        tables.print_json(head | {"steps": steps, "results": rows})
    else:
        tables.print_table([outcome.as_row() for outcome in outcomes], empty=True)
        print()
        show()
    for outcome in outcomes:
        if outcome.problem:
            print(f"{outcome.label}: {outcome.problem}", file=sys.stderr)
    if code := pipeline.exit_code(outcomes):
        raise typer.Exit(code)


@verbs.command(rich_help_panel=HEADING)
def reproduce(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A folder of recipes/ with a study.yaml.")],
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Try all of it on the CPU: small model, shipped sample, no network.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this recipe of it, which may be one beside the study's. Repeatable."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Recipes to work on at a time, each on a GPU of its own; by default 1 here, all on SLURM."
        ),
    ] = None,
    on: On = "local",
    slurm: SlurmOptions = None,
    profile: Profiles = None,
    set_: Overrides = None,
    mirror: Mirror = False,
    bertscore: Annotated[
        str | None,
        typer.Option(metavar="MODEL|none", help="BERTScore's model; by default roberta-large, which is fetched."),
    ] = None,
    bertscore_layer: JudgeLayer = None,
    batch_size: BatchSize = 16,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Fetch, check, plan, train, evaluate and compare all of a study. What is done already is not done again."""
    from .. import places
    from ..configs.compose import Request, is_rehearsal
    from ..data import study as studies
    from ..results import verdict
    from ..running import reproduce as reproducing
    from ..scores import evaluate as evaluation

    of_study = studies.find(study)
    request = Request(study, profiles=profile or [], overrides=set_ or [], rehearse=rehearse, mirror=mirror)
    request.rehearse = is_rehearsal(request)
    judged = evaluation.EvaluationRequest(judge=bertscore, judge_layer=bertscore_layer, batch_size=batch_size)
    place = places.kinds()[on](request.rehearse, jobs, slurm or [])
    outcomes = reproducing.reproduce(of_study, reproducing.Options(request, place, only or [], judged, runs))
    rows = verdict.rows(of_study, runs, request.rehearse, {outcome.recipe: outcome.run for outcome in outcomes})
    _end(outcomes, json, {}, rows, lambda: verdict.show_study(of_study, rows, request.rehearse, "table"))


@verbs.command(rich_help_panel=HEADING)
def cancel(
    run: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Runs: folders, unambiguous ends of their names, or latest."),
    ] = None,
    sweep: Annotated[str | None, typer.Option(metavar="NAME", help="Every run of a sweep instead.")] = None,
    study: Annotated[str | None, typer.Option(metavar="S", help="Every run of a study's recipes instead.")] = None,
    runs: Runs = RUNS,
) -> None:
    """Stop runs that are going on, at a checkpoint, and take those that are queued out of the queue."""
    from ..running import cancel as cancelling

    for line in cancelling.cancel(run or [], sweep, study, runs):
        print(line)
