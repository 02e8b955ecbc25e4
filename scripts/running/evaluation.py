"""The evaluation of a run, in this process or as a job: `recipe evaluate`."""

from pathlib import Path

from .. import backends
from ..backends import Backend
from ..backends.slurm import Slurm
from ..base import yamlfiles
from ..base.errors import UserError
from ..runs.rundir import RunDir
from ..runs.tasks import Outcome, Work
from ..scores import choice, evaluate, evaluation_rows
from ..scores.engines.start import require
from ..scores.evaluations import SERVER, Evaluation
from ..scores.task import EvaluationRequest, EvaluationTask


def start(
    folder: RunDir, request: EvaluationRequest, runs: Path, backend: Backend
) -> Evaluation | choice.Choice | RunDir:
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
    return choice.choose(folder, request) if request.checkpoints else evaluate.evaluate(folder, request)
