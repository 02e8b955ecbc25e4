"""The kept checkpoints of a run by their scores, and the best of them: `recipe evaluate --checkpoints`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..base import yamlfiles
from ..base.errors import UserError
from ..base.files import Row, sha256, tensor_shapes
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
    """A checkpoint's score on validation rows.

    Attributes:
        eval_loss: a token.
        interval: of 95 %, of the score.
        best: whether it is the selected one.
    """

    checkpoint: str
    step: int | None
    epoch: float | None
    eval_loss: float | None
    score: float
    interval: list[float] | None
    best: bool = False


@dataclass
class CheckpointSelection:
    """Checkpoints by their scores.

    Attributes:
        column: the metric that the best is selected by.
        rows: the rows that they were scored on, in words.
        checkpoints: oldest first.
        test_rows: the rows beside these that the best was tested on, in words; None where there are not any.
        test_score, test_interval: of the best on the test rows.
    """

    column: Column
    rows: str
    checkpoints: list[CheckpointScore]
    test_rows: str | None = None
    test_score: float | None = None
    test_interval: list[float] | None = None

    @property
    def best(self) -> CheckpointScore:
        """The selected checkpoint: of equals the oldest."""
        return next(checkpoint for checkpoint in self.checkpoints if checkpoint.best)


def select(folder: RunDir, request: EvaluationRequest) -> CheckpointSelection:
    """Score every kept checkpoint on the rows that the run validates on, then the best of them on the test rows.

    The best is that by the first metric; of equals the oldest. Until it is selected no test row is read. Each
    evaluation is kept as one of another adapter or of other rows, and is not repeated.

    Args:
        folder: the run's folder.
        request: how they are evaluated; its data are the test rows.

    Raises:
        UserError: the run validates on no rows, or on the test rows; no checkpoint was kept; no metric can be scored;
            or see `evaluate`.
        WorkFailed: see `evaluate`.
    """
    run = folder.read()
    cfg = yamlfiles.read_yaml(folder.config)
    column = _column(run, request)
    adapters = _adapters(folder)
    own = sha256(folder.output / ADAPTER) if (folder.output / ADAPTER).is_file() else None
    validation = evaluation_rows.validation(run, cfg)
    if validation is None:
        problem = "the run validates on no rows but the test rows, which must not select a checkpoint"
        raise UserError(f"{folder.path}: {problem}; `recipe evaluate {folder.path} --adapter DIR` scores one")

    def evaluated(name: str, of_validation: bool) -> Evaluation:
        path, digest = adapters[name]
        adapter = None if digest == own else str(path)  # the run's own evaluation
        data = None if of_validation else request.data
        return evaluate(folder, replace(request, adapter=adapter, data=data, validation=of_validation))

    records = folder.read_metrics()
    kept_step = folder.summary(run).kept_step
    rows = []
    for number, (name, (path, _)) in enumerate(adapters.items(), start=1):
        say(f"{name}, {number} of {len(adapters)}")
        result = evaluated(name, True)
        step = checkpoints.step_of(path) or kept_step
        recorded = [record for record in records if step is None or record["step"] == step]
        at, epoch, loss = (_last(recorded, key) for key in ("step", "epoch", "eval_loss_per_token"))
        rows.append(CheckpointScore(name, at, epoch, loss, *_score(result, column)))
    selection = CheckpointSelection(column, _in_words(result), rows)
    best = column.better(rows, key=lambda row: row.score)
    best.best = True
    if request.data or evaluation_rows.usual(run, cfg) not in (None, validation):
        say(f"{best.checkpoint} is the best on {selection.rows}; now its test score")
        result = evaluated(best.checkpoint, False)
        selection.test_rows = _in_words(result)
        selection.test_score, selection.test_interval = _score(result, column)
    return selection


def _in_words(result: Evaluation) -> str:
    return f"{result.settings.data_name}, {result.settings.rows_in_words}"


def _column(run: Run, request: EvaluationRequest) -> Column:
    """The first metric of predictions that can be scored here."""
    columns = columns_of(run.origin, request.metrics)
    judged = scorer_models(columns, request.judge, run.rehearsal)
    usable = (column for name, column in columns.items() if not column.metric.of_loss and judged.get(name, True))
    if column := next(usable, None):
        return column
    raise UserError(
        f"--checkpoints: none of {', '.join(columns)} scores predictions here; --metric names one to choose by"
    )


def _adapters(folder: RunDir) -> dict[str, tuple[Path, str]]:
    """The adapters of a run's checkpoints, oldest first, and the final one where it is another: by name, the folder and
    the hash of each. A truncated one is left out, which is said."""
    by_step = {checkpoints.step_of(path): path for path in folder.output.glob("checkpoint-*")}
    found = [(path.name, path) for step, path in sorted((s, p) for s, p in by_step.items() if s is not None)]
    kept: dict[str, tuple[Path, str]] = {}
    for name, path in [*found, ("final", folder.output)]:
        if not tensor_shapes(path / ADAPTER):
            say(f"{path}: no whole {ADAPTER} there; it is left out")
        elif (digest := sha256(path / ADAPTER)) not in [other for _, other in kept.values()]:
            kept[name] = path, digest
    if not kept:
        raise UserError(
            f"{folder.output}: no checkpoint of an adapter was kept; saves_per_epoch or save_steps, and "
            "save_total_limit, say which ones the next run keeps"
        )
    return kept


def _last(records: Sequence[Row], key: str) -> Any:
    """What the training recorded last under a key."""
    return next((record[key] for record in reversed(records) if record.get(key) is not None), None)


def _score(result: Evaluation, column: Column) -> tuple[float, list[float] | None]:
    return result.scores[column.name], result.scores["intervals"].get(column.name)
