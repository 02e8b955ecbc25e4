"""Select the best of a run's kept checkpoints: `recipe evaluate --checkpoints`."""

from dataclasses import dataclass, replace
from pathlib import Path

from ..base import yamlfiles
from ..base.errors import UserError
from ..base.files import sha256, tensor_shapes
from ..base.progress import say
from ..metrics.metric import Column
from ..runs import checkpoints
from ..runs.records import Run
from ..runs.rundir import RunDir
from . import evaluation_rows
from .evaluate import EvaluationRequest, evaluate
from .evaluations import ADAPTER, Evaluation
from .score import columns_of, scorer_models


@dataclass
class CheckpointScore:
    """Score of a checkpoint on validation rows.

    Attributes:
        interval: 95 % interval of the score.
        best: True for the selected checkpoint.
    """

    checkpoint: str
    score: float
    interval: list[float] | None
    best: bool = False


@dataclass
class CheckpointSelection:
    """Scores of checkpoints, and the test score of the best checkpoint.

    Attributes:
        column: metric of the selection.
        rows: description of the validation rows.
        checkpoints: oldest first.
        test_rows: description of the test rows; None if there are only validation rows.
        test_score, test_interval: test score of the best checkpoint, and its 95 % interval.
    """

    column: Column
    rows: str
    checkpoints: list[CheckpointScore]
    test_rows: str | None = None
    test_score: float | None = None
    test_interval: list[float] | None = None

    @property
    def best(self) -> CheckpointScore:
        """Selected checkpoint."""
        return next(checkpoint for checkpoint in self.checkpoints if checkpoint.best)


def select(folder: RunDir, request: EvaluationRequest) -> CheckpointSelection:
    """Score checkpoints on validation rows, then the best one on test rows.

    The first metric decides; among equally good checkpoints the oldest is selected. Test rows are read only after the
    selection. Finished evaluations are kept and not repeated.

    Args:
        folder: run folder.
        request: settings of each evaluation; `data` are the test rows.

    Raises:
        UserError: the run has no validation rows other than its test rows, no checkpoint was kept, or no metric can be
            computed; see also `evaluate`.
        WorkFailed: see `evaluate`.
    """
    run = folder.read()
    cfg = yamlfiles.read_yaml(folder.config)
    column = _column(run, request)
    adapters = _adapters(folder)
    own = sha256(folder.output / ADAPTER) if (folder.output / ADAPTER).is_file() else None
    validation = evaluation_rows.validation(run, cfg)
    if validation is None:
        raise UserError(
            f"{folder.path}: the run has no validation rows other than test rows, which must not be used to select a "
            f"checkpoint; `recipe evaluate {folder.path} --adapter DIR` scores one adapter"
        )

    def evaluated(name: str, of_validation: bool) -> Evaluation:
        path, digest = adapters[name]
        adapter = None if digest == own else str(path)  # None: evaluate the run's adapter, in the run folder
        data = None if of_validation else request.data
        return evaluate(folder, replace(request, adapter=adapter, data=data, validation=of_validation))

    rows = []
    for number, name in enumerate(adapters, start=1):
        say(f"{name}, {number} of {len(adapters)}")
        result = evaluated(name, True)
        rows.append(CheckpointScore(name, *_score(result, column)))
    selection = CheckpointSelection(column, _in_words(result), rows)
    best = column.better(rows, key=lambda row: row.score)
    best.best = True
    if request.data or evaluation_rows.usual(run, cfg) not in (None, validation):
        say(f"{best.checkpoint} is the best on {selection.rows}; computing its test score")
        result = evaluated(best.checkpoint, False)
        selection.test_rows = _in_words(result)
        selection.test_score, selection.test_interval = _score(result, column)
    return selection


def _in_words(result: Evaluation) -> str:
    return f"{result.settings.data_name}, {result.settings.rows_in_words}"


def _column(run: Run, request: EvaluationRequest) -> Column:
    """First metric of predictions that can be computed on this machine."""
    columns = columns_of(run.origin, request.metrics)
    judged = scorer_models(columns, request.judge, run.rehearsal)
    for name, column in columns.items():
        if not (column.metric.of_loss or column.metric.of_model) and judged.get(name, True):
            return column
    raise UserError(
        f"--checkpoints: cannot compute {', '.join(columns)} from predictions here; name another metric with --metric"
    )


def _adapters(folder: RunDir) -> dict[str, tuple[Path, str]]:
    """Folder and hash of each distinct adapter, by name.

    Checkpoints come first, from oldest to newest, then the final adapter. Incomplete adapters are left out and logged.
    """
    by_step = {checkpoints.step_of(path): path for path in folder.output.glob("checkpoint-*")}
    found = [(path.name, path) for step, path in sorted((s, p) for s, p in by_step.items() if s is not None)]
    kept: dict[str, tuple[Path, str]] = {}
    for name, path in [*found, ("final", folder.output)]:
        if not tensor_shapes(path / ADAPTER):
            say(f"{path}: no complete {ADAPTER}; left out")
        elif (digest := sha256(path / ADAPTER)) not in [other for _, other in kept.values()]:
            kept[name] = path, digest
    if not kept:
        raise UserError(
            f"{folder.output}: no checkpoint was kept; set saves_per_epoch or save_steps, and save_total_limit, for "
            "the next run"
        )
    return kept


def _score(result: Evaluation, column: Column) -> tuple[float, list[float] | None]:
    """Score and interval.

    Raises:
        UserError: the rows have no score.
    """
    if result.scores.get(column.name) is None:
        raise UserError(f"--checkpoints: {column.label} has no score on {_in_words(result)}; raise --limit")
    return result.scores[column.name], result.scores["intervals"].get(column.name)
