"""Compare runs' settings, losses and predictions, and a loss with a published curve."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from ..base.errors import UserError
from ..base.files import Row, read_rows
from ..base.secrets import without_secrets
from ..base.terminal import say_once
from ..base.yamlfiles import Config
from ..config import merging
from ..data.published import Point
from ..evaluate import intervals
from ..evaluate.score import columns_of, model_record, row_columns, with_scores
from ..evaluate.scores_file import about_file, about_rows, read_predictions, read_scores
from ..metrics import registry
from ..metrics.metric import Column, RowMetric, ScorerRecord
from ..run.rundir import RunDir
from .run_result import RunResult, trained_settings


@dataclass
class ScoredRows:
    """Rows with scores.

    Attributes:
        columns: metrics of the rows by name.
        models: record of the scorer model by name of the metric; None for a metric without one.
    """

    rows: list[Row]
    columns: dict[str, Column]
    models: dict[str, ScorerRecord | None] = field(default_factory=dict)


def score_sides(sides: Sequence[RunDir | Path], metrics: Sequence[str] = ()) -> list[ScoredRows]:
    """Score the rows of runs and of JSONL files.

    The files have the fields reference and prediction. A run gets the metrics of its evaluation; a file gets the
    metrics of all compared runs. Requested metrics are added to both. Without runs and requested metrics, files get the
    default metrics.

    Args:
        sides: folders of evaluated runs, and JSONL files.
        metrics: requested metrics, the values of --metric.

    Raises:
        UserError: a file or metric does not exist.
    """
    requested = registry.requested(metrics)
    if registry.requested_scorer(metrics) or len(row_columns(requested)) < len(requested):
        raise UserError(
            f"--metric {' '.join(metrics)}: to compare metrics of whole files or by a scorer model, run `recipe "
            "evaluate RUN --metric` for both runs"
        )
    scored: dict[RunDir | Path, ScoredRows] = {}
    run_columns: dict[str, Column] = {}
    for side in sides:
        if isinstance(side, RunDir):
            scored[side] = _score_run(side, requested)
            run_columns |= scored[side].columns
    for side in sides:
        if isinstance(side, Path):
            rows = read_rows(side, ("reference", "prediction"))
            references = [row["reference"] for row in rows]
            columns = row_columns(run_columns or columns_of("", metrics, references))
            scored[side] = ScoredRows(with_scores(rows, columns, {}), columns)
            _report(side, about_file(side))
    return [scored[side] for side in sides]


def _score_run(run: RunDir, requested: dict[str, Column]) -> ScoredRows:
    """Rows of a run with the scores of its evaluation, and with those of requested metrics."""
    folder = run.path
    evaluation = read_scores(folder)
    assert evaluation
    _report(folder, about_rows(evaluation))
    rows = read_predictions(folder)
    columns, models = {}, {}
    for name, column in evaluation.columns.items():
        if isinstance(column.metric, RowMetric):
            columns[name], models[name] = column, model_record(column, evaluation.scores)
    scored = [row | scores for row, scores in zip(rows, with_scores(rows, requested, {}), strict=True)]
    return ScoredRows(scored, columns | requested, models)


def _report(side: Path, note: str | None) -> None:
    """Log a note on the scored rows of a run or file, if there is one; only once for a run compared with itself."""
    if note:
        say_once(f"{side}: {note}")


def pair(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pair the rows that two sets of predictions share, in order of the first set.

    Rows are matched by `idx`, their position in the test file, if every row has a unique `idx`. Otherwise they
    are matched by order, if the numbers of rows are equal.

    Raises:
        UserError: there are no common rows, rows cannot be matched, or the references of a pair differ.
    """
    if _have_unique_idx(a) and _have_unique_idx(b):
        by_idx = {row["idx"]: row for row in b}
        pairs = [(row, by_idx[row["idx"]]) for row in a if row["idx"] in by_idx]
    elif len(a) == len(b):
        pairs = list(zip(a, b, strict=True))
    else:
        raise UserError(f"cannot match {len(a)} rows and {len(b)} rows: some lack a unique position in the field idx")
    for left, right in pairs:
        if left["reference"].split() != right["reference"].split():
            where = left.get("idx", left.get("row"))
            raise UserError(f"row {where} has different references; compare predictions for the same rows")
    if not pairs:
        raise UserError("no row in common; compare predictions for the same rows")
    return pairs


def _have_unique_idx(rows: Sequence[Row]) -> bool:
    positions = {row.get("idx") for row in rows}
    return None not in positions and len(positions) == len(rows)


def compare(a: ScoredRows, b: ScoredRows) -> list[Row]:
    """Compare shared metrics on shared rows, see `intervals.paired`.

    Raises:
        UserError: there is no shared metric, or the rows cannot be paired, see `pair`.
    """
    shared = [name for name in a.columns if _is_comparable(name, a, b)]
    if not shared:
        raise UserError("no metric of rows in common", remedy="`--metric NAME` adds one to all")
    pairs = pair(a.rows, b.rows)
    compared = []
    for name in shared:
        left = [row[name] for row, _ in pairs]
        right = [row[name] for _, row in pairs]
        means = {"a": sum(left) / len(pairs), "b": sum(right) / len(pairs)}
        compared.append({"score": name, "rows": len(pairs), **means, **intervals.paired(left, right)})
    return compared


def _is_comparable(name: str, a: ScoredRows, b: ScoredRows) -> bool:
    """True if both sides have a metric, and the same scorer model computed its scores, if it needs one."""
    return a.columns[name].same_scores(b.columns.get(name)) and a.models.get(name) == b.models.get(name)


@dataclass(frozen=True)
class Divergence:
    """Divergence of the losses in two training runs, a and b.

    Attributes:
        first, last: first and last step with a recorded loss over the same steps in both runs.
        step: first step whose losses differ; None if all are identical.
        losses: the two losses at `step`.
    """

    first: int
    last: int
    step: int | None
    losses: tuple[float | None, float | None] | None


def divergence(a: RunDir, b: RunDir) -> Divergence | None:
    """Divergence of two runs' losses; None if they have no loss over the same steps."""
    losses_a, losses_b = _losses(a), _losses(b)
    spans = sorted(losses_a.keys() & losses_b.keys())
    if not spans:
        return None
    first, last = spans[0][1], spans[-1][1]
    for span in spans:
        if losses_a[span] != losses_b[span]:
            return Divergence(first, last, span[1], (losses_a[span], losses_b[span]))
    return Divergence(first, last, None, None)


def _losses(run_dir: RunDir) -> dict[tuple[int, int], float | None]:
    """Training losses of a run, each a mean over the steps after one step and up to another."""
    losses = {record["step"]: record["loss"] for record in run_dir.read_metrics() if "loss" in record}
    return {(previous, step): losses[step] for previous, step in pairwise([0, *losses])}


def differing_settings(runs: Mapping[str, RunResult]) -> dict[str, Row]:
    """Settings, data, versions and machine in which runs differ, with the value of each run by its label."""
    settings = {label: _settings(result) for label, result in runs.items()}
    keys: Config = {}
    for one, other in pairwise(settings.values()):
        keys |= merging.differences(one, other)
    differing = {}
    for key in keys:
        differing[key] = {label: without_secrets(values.get(key), key) for label, values in settings.items()}
    return differing


def _settings(result: RunResult) -> Config:
    """Settings, data, versions and machine of a run."""
    run = result.run
    settings = trained_settings(result.config)
    settings |= merging.flatten(run.provenance, "provenance")
    for file in [*run.data, *run.named_files]:
        settings[f"content of {file.path}"] = f"sha256 {file.sha256[:12]}"
    settings["ranks"] = run.ranks
    settings["resumed from"] = ", ".join(launch.resumed_from for launch in run.launches if launch.resumed_from)
    return settings


@dataclass(frozen=True)
class CurveGap:
    """Gap between a run's training loss and a published curve.

    Attributes:
        mean: mean of our loss minus the published loss.
        largest: largest absolute gap.
        step: step with the largest gap.
    """

    mean: float
    largest: float
    step: int


def curve_gap(metrics: Iterable[Row], curve: Sequence[Point]) -> CurveGap | None:
    """Gap between a run's training loss and a curve; None without points, or if the run did not reach the first one.

    The run's losses are averaged between consecutive steps of the curve. Intervals that the run did not complete are
    left out.

    Args:
        metrics: records of the run's steps.
        curve: published points, each with the mean loss since the previous point.
    """
    losses = [(record["step"], record["loss"]) for record in metrics if record.get("loss") is not None]
    last = max((step for step, _ in losses), default=0)
    gaps = {}
    for (previous, _), (step, published) in pairwise([(0, 0.0), *curve]):
        averaged = [loss for loss_step, loss in losses if previous < loss_step <= step]
        if averaged and step <= last:
            gaps[step] = fmean(averaged) - published
    if not gaps:
        return None
    furthest = max(gaps, key=lambda step: abs(gaps[step]))
    return CurveGap(mean=fmean(gaps.values()), largest=abs(gaps[furthest]), step=furthest)
