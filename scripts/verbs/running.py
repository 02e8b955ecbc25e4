"""The verbs run, resume, sweep, reproduce and cancel."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base import paths, tables, yamlfiles
from ..base.errors import UserError
from ..base.files import Row
from ..base.progress import say
from ..base.secrets import public
from .help import Verb, after_training, next_step
from .options import (
    WHERE,
    Force,
    FromStage,
    Jobs,
    Json,
    Metrics,
    Name,
    NameOrStudy,
    On,
    Overrides,
    PlannedGpu,
    Profiles,
    RehearseAll,
    RunName,
    Seeds,
    SweepFile,
    Things,
    backend_of,
    complete_keys,
    complete_recipes,
    complete_studies,
    only_with,
)

if TYPE_CHECKING:
    from ..data.studies import Study
    from ..run.backends import TaskResult
    from ..run.rundir import RunDir
    from ..study.sweep import Sweep

HEADING = "Running"
Tried = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=V,V,V",
        autocompletion=complete_keys,
        help="Values to try for KEY. Repeatable; then all combinations are tried.",
    ),
]
OnlyRecipes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        autocompletion=complete_recipes,
        help="Reproduce only this recipe, or a pattern such as 'llama-3*'. Repeatable.",
    ),
]
verbs = typer.Typer()


@verbs.command(
    "run",
    cls=Verb,
    rich_help_panel=HEADING,
    epilog="recipe run code-llama-7b --rehearse\nrecipe run llama-3.2-3b --set num_epochs=3 --set lora_r=64",
)
def run_verb(
    name: Name,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Try it on the CPU: small model, few rows, no network.")
    ] = False,
    profile: Profiles = None,
    set_: Overrides = None,
    gpu_count: Annotated[
        int,
        typer.Option(
            "--gpus", rich_help_panel=WHERE, metavar="N", min=1, help="GPUs to train on; with --nodes, GPUs per node."
        ),
    ] = 1,
    nodes: Annotated[
        int, typer.Option(rich_help_panel=WHERE, metavar="N", min=1, help="Machines to train on, with --on slurm.")
    ] = 1,
    on: On = "local",
    force: Force = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the config and start nothing.")] = False,
) -> None:
    """Train a recipe with Axolotl, in a new run folder."""
    from ..config.compose import Request, is_rehearsal
    from ..config.merging import OF_THE_RUN
    from ..run import run

    request = Request(
        name,
        profiles=profile or [],
        overrides=set_ or [],
        rehearse=rehearse,
        gpus=gpu_count,
        nodes=nodes,
        dry_run=dry_run,
        force=force or [],
    )
    backend = backend_of(on, is_rehearsal(request))
    if dry_run:
        composed = run.prepare(request, backend)
        own = yamlfiles.read_yaml(composed.recipe_file)  # print the recipe's own output folders, for plain Axolotl
        shown = composed.config | {key: own[key] for key in OF_THE_RUN if key in own}
        print(yamlfiles.write_yaml(public(shown)), end="")
    else:
        folder = run.start(request, backend)
        print(folder.path)
        after_training(folder, on)


@verbs.command("resume", cls=Verb, rich_help_panel=HEADING, epilog="recipe resume latest")
def resume_verb(
    run: RunName,
    prepare: Annotated[
        bool,
        typer.Option("--prepare", hidden=True, help="Only tokenize rows and fetch the base model; needs no GPU."),
    ] = False,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Trust a run folder from elsewhere; its author's code may execute."),
    ] = False,
    force: Force = None,
    on: On = "local",
) -> None:
    """Resume an interrupted run from its last complete checkpoint."""
    from ..run.run import resume

    backend = backend_of(on)
    folder = resume(run, backend, prepare, force or [], trust)
    print(folder.path)
    if not prepare:  # after --prepare, there is nothing to evaluate
        after_training(folder, on)


@verbs.command(
    "sweep",
    cls=Verb,
    rich_help_panel=HEADING,
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


def end(
    results: "list[TaskResult]",
    json: bool,
    head: dict[str, Any],
    rows: list[Row],
    show: Callable[[], None],
) -> None:
    """Print steps and results, and exit with the steps' code."""
    from ..study import pipeline

    steps = [result.as_row() for result in results]
    if json:
        steps = [step | {"problem": result.problem} for step, result in zip(steps, results, strict=True)]
        tables.print_json(head | {"steps": steps, "results": rows})
    else:
        tables.print_table(steps, below=["run"])
        print()
        show()
    for result in results:
        if result.problem:
            say(f"{result.label}: {result.problem}")
    if code := pipeline.exit_code(results):
        raise typer.Exit(code)


@verbs.command(
    "reproduce",
    cls=Verb,
    rich_help_panel=HEADING,
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


@verbs.command("cancel", cls=Verb, rich_help_panel=HEADING, epilog="recipe cancel latest\nrecipe cancel lora-tradeoffs")
def cancel_verb(names: Things) -> None:
    """Save a checkpoint and stop active jobs; remove queued ones."""
    from ..study.sweep import find_any

    messages = [message for name in names or [] for message in _cancelled(find_any(name))]
    if not messages:
        raise UserError(f"{', '.join(names or [])}: nothing is running or queued")
    for message in messages:
        print(message)


def _cancelled(thing: "RunDir | Sweep | Study") -> list[str]:
    """Ask a run, or the runs of a sweep or study, to stop; return a message per process or job."""
    from ..run.backends import slurm_site, stop_holders

    locks, folders = _locks_and_runs(thing, paths.runs())
    if messages := stop_holders(locks):  # first stop the commands that would start the next run
        return messages
    for folder in folders:
        # ask each run only once: a second request would stop training without a checkpoint
        asked = slurm_site.cancel(folder.jobs()) or stop_holders(folder.path.rglob("*lock"))
        messages += [f"{folder.path}: {message}" for message in asked]
    return messages


def _locks_and_runs(thing: "RunDir | Sweep | Study", runs: Path) -> "tuple[list[Path], Iterable[RunDir]]":
    """Return the locks of the commands that start a sweep's or study's runs, and these runs."""
    from ..run.rundir import RunDir, all_runs, readable
    from ..study import reproduce
    from ..study.sweep import Sweep, recorded_sweeps

    if isinstance(thing, RunDir):
        return [], [thing]
    if isinstance(thing, Sweep):
        digests = {member.digest for member in thing.members}
        members = (folder for folder, run in readable(all_runs(runs / thing.recipe)) if run.digest in digests)
        return [thing.lock(runs)], members
    study = f"{thing.folder.name}/"
    sweeps = [sweep for sweep in recorded_sweeps().values() if sweep.recipe.startswith(study)]
    of_study = (folder for folder, run in readable(all_runs(runs)) if run.origin.startswith(study))
    return [reproduce.lock(thing.folder.name), *(sweep.lock(runs) for sweep in sweeps)], of_study
