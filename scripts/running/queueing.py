"""Handing runs and evaluations over to a place that carries them out, for which nobody waits."""

from collections.abc import Iterator
from pathlib import Path

from .. import places
from ..base import yamlfiles
from ..base.errors import UserError
from ..configs.compose import Request
from ..places import Place
from ..runs.lookup import find_run
from ..runs.rundir import RunDir
from ..runs.tasks import Command, Outcome, Work
from ..scores import evaluate
from . import run


def submit(request: Request, runs: Path, place: Place) -> RunDir:
    """Hand a recipe over to a place that trains it, in a new run folder.

    Raises:
        UserError: the request is wrong, or the place refuses it; nothing was started.
    """
    composed, made = run.prepare(request, place), list[RunDir]()

    def commands() -> Iterator[Command]:
        made.append(run.create(composed, request, runs))
        yield run.command(made[0], runs)

    gpus_a_node = 0 if composed.rehearsal else request.gpus
    place.submit([Work(Outcome(composed.recipe), commands(), gpus_a_node, request.nodes)], composed.recipe, runs, [])
    return made[0]


def resubmit(name: str, runs: Path, place: Place) -> RunDir:
    """Hand an interrupted or failed run over to a place that resumes it; see `resume`.

    Raises:
        UserError: it cannot be resumed, or the place refuses it; nothing was started.
    """
    folder = find_run(name, runs)
    record = places.read(folder)
    if reason := "the run is still going on" if record.state == "running" else run.hindrance(folder, record):
        raise UserError(f"{folder.path}: {reason}")
    work = Work(
        Outcome(record.recipe),
        iter([run.command(folder, runs)]),
        gpus=0 if record.rehearsal else record.gpus_used,
        nodes=record.nodes,
    )
    place.submit([work], record.recipe, runs, [])
    return folder


def submit_evaluation(folder: RunDir, request: evaluate.EvaluationRequest, runs: Path, place: Place) -> None:
    """Hand an evaluation over to a place that does it, once the run is trained if it waits or goes on there.

    Raises:
        UserError: it is queued already, see `evaluate.EvaluationTask`, or the place refuses it; nothing was started.
    """
    record = folder.read()
    if not places.job_state(folder, "run"):
        evaluate.EvaluationTask(folder, request)
    elif request.data:
        evaluate.read_test_rows(
            request.data, yamlfiles.read_yaml(folder.config)
        )  # what else it asks for is not there yet
    evaluation = evaluate.command(folder, request, runs)
    if job := places.job_state(folder, "evaluate", evaluation.words):
        raise UserError(f"{folder.path}: that evaluation is {job}; `recipe cancel {folder.path}` ends that")
    gpus = 0 if record.rehearsal else 1
    work = Work(Outcome(record.recipe), iter([evaluation]), gpus, steps=["evaluate"])
    place.submit([work], record.recipe, runs, [])
