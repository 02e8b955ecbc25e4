"""The evaluation of a run, in this process or as a job: `recipe evaluate`."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from .. import backends
from ..backends import Backend
from ..backends.slurm import Slurm
from ..base import yamlfiles
from ..base.errors import UserError
from ..base.paths import find_recipe
from ..runs.lookup import find_run
from ..runs.rundir import RunDir
from ..runs.tasks import Outcome, Work
from ..scores import checkpoint_selection, evaluate, evaluation_rows
from ..scores.evaluations import SERVER, Evaluation
from ..scores.predict import require
from ..scores.task import BASE, EvaluationRequest, EvaluationTask
from . import adapters

Evaluated = Evaluation | checkpoint_selection.Choice | RunDir


def of_name(name: str, request: EvaluationRequest, runs: Path, backend: Backend) -> tuple[RunDir, Evaluated]:
    """Evaluate a run, see `start`, or an adapter under a recipe, in a run folder that is marked as not trained here.

    Args:
        name: a run, see `find_run`; with an adapter also a recipe.
        request: how it is evaluated.
        runs: the folder with the runs.
        backend: where it is evaluated.
    """
    if request.adapter in (None, BASE) or not _is_recipe(name):
        folder = find_run(name, runs)
        return folder, start(folder, request, runs, backend)
    adapter, label = adapters.located(str(request.adapter))
    asked = adapters.request_for(name, adapter, request.force)
    composed = adapters.checked(asked, runs, backend)
    with adapters.run_of(composed, asked, adapter, label, runs) as folder:
        return folder, start(folder, replace(request, adapter=None), runs, backend)


def _is_recipe(name: str) -> bool:
    with suppress(UserError):
        return bool(find_recipe(name))
    return False


def start(folder: RunDir, request: EvaluationRequest, runs: Path, backend: Backend) -> Evaluated:
    """Evaluate a run, or queue that behind its training if the run is queued or running there.

    Returns:
        The evaluation, of several checkpoints what it comes to, or the run's folder once the evaluation is queued.

    Raises:
        UserError: it is already queued, see `EvaluationTask`, or the backend refuses it; nothing was started.
        WorkFailed: see `evaluate.evaluate`.
    """
    record = folder.read()
    evaluation = evaluate.command(folder, request, runs)
    if isinstance(backend, Slurm):
        if not backends.job_state(folder, "run"):
            task = EvaluationTask(folder, request)
            if task.settings.engine != SERVER:  # a node may reach it, and this machine not
                require(task.settings, None, on_gpu=not record.rehearsal)
        elif request.data:  # all else is not there yet
            cfg = yamlfiles.read_yaml(folder.config)
            evaluation_rows.read(evaluation_rows.named(request.data, cfg, Path(record.cwd)), folder, record, cfg)
        if job := backends.job_state(folder, "evaluate", evaluation.words):
            remedy = f"`recipe cancel {folder.path}` cancels all jobs of the run"
            raise UserError(f"{folder.path}: this evaluation is already {job}; {remedy}")
        gpus = 0 if record.rehearsal else 1
        work = Work(Outcome(record.recipe), lambda: [evaluation], gpus, steps=["evaluate"])
        return backend.carry_out(work, record.recipe, runs)
    return checkpoint_selection.choose(folder, request) if request.checkpoints else evaluate.evaluate(folder, request)
