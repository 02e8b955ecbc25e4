"""Compare two runs' losses and predictions, and a loss with a published curve."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from ..base import yamlfiles
from ..base.errors import UserError
from ..base.files import Row, read_rows
from ..base.terminal import say
from ..config import merging
from ..data.published import Published
from ..data.studies import Study
from ..evaluate import intervals
from ..evaluate.score import columns_of, declared_models, model_record, of_single_rows, with_scores
from ..evaluate.scores_file import about_file, about_rows, changed, current, read_predictions, read_scores
from ..metrics import registry
from ..metrics.metric import Column
from ..run.rundir import RunDir, find_run
from ..training.run_record import Run
from .run_result import trained_settings


@dataclass
class ScoredRows:
    """Rows with scores.

    Attributes:
        columns: metrics of the rows by name.
        models: record of the scorer model, by name of the metric that uses it.
    """

    rows: list[Row]
    columns: dict[str, Column]
    models: dict[str, dict[str, Any] | None] = field(default_factory=dict)


def several(names: Sequence[str], runs: Path, asked: Sequence[str] = ()) -> list[ScoredRows]:
    """Score the rows of runs and of JSONL files.

    The files have the fields reference and prediction. A run gets the metrics of its evaluation; a file gets the
    metrics of all compared runs. Requested metrics are added to both. Without runs and requested metrics, files get the
    default metrics.

    Raises:
        UserError: a run, file or metric does not exist, or a run was not evaluated.
    """
    named = registry.asked(asked)
    if registry.scorer_named(asked) or len(of_single_rows(named)) < len(named):
        raise UserError(
            f"--metric {' '.join(asked)}: to compare metrics of whole files or by a scorer model, run `recipe evaluate "
            "RUN --metric` for both runs"
        )
    found = {name: _of_run(name, runs, named) for name in names if not Path(name).is_file()}
    beside = {name: column for of_run in found.values() for name, column in of_run.columns.items()}
    for name in (name for name in names if name not in found):
        found[name] = _scored(read_rows(Path(name)), beside | named or columns_of())
        _note(name, about_file(Path(name)))
    return [found[name] for name in names]


def _of_run(name: str, runs: Path, named: dict[str, Column]) -> ScoredRows:
    folder = find_run(name, runs).path
    rows = read_predictions(folder)
    evaluation = read_scores(folder)
    if not evaluation or changed(folder, evaluation) or (not rows and evaluation.settings.rows):
        raise UserError(
            f"{folder}: {changed(folder, evaluation) or 'not evaluated'}; run `recipe evaluate {folder}` first"
        )
    scored = _scored(rows, columns := evaluation.columns | named)
    _note(name, about_rows(evaluation))
    for name in declared_models(columns):
        scored.columns[name] = columns[name]
        scored.models[name] = model_record(columns[name], evaluation.scores)
        for new, row in zip(scored.rows, rows, strict=True):
            new[name] = row.get(name)
    return scored


def _note(name: str, about: str | None) -> None:
    if about:
        say(f"{name}: {about}")


def _scored(rows: Sequence[Row], columns: dict[str, Column]) -> ScoredRows:
    """Score rows with the row-level metrics that need no scorer model."""
    of_rows = of_single_rows(columns)
    return ScoredRows(with_scores(rows, of_rows, {}), of_rows)


def pair(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pair the rows that two sets of predictions share, in order of the first set.

    Rows are matched by `idx`, their position in the test file, if every row has a unique `idx`. Otherwise they
    are matched by order, if the numbers of rows are equal.

    Raises:
        UserError: there are no common rows, rows cannot be matched, or the references of a pair differ.
    """
    by_idx, of_a = ({row.get("idx"): row for row in rows} for rows in (b, a))
    if None not in (*by_idx, *of_a) and (len(by_idx), len(of_a)) == (len(b), len(a)):
        pairs = [(row, by_idx[row["idx"]]) for row in a if row["idx"] in by_idx]
    elif len(a) == len(b):
        pairs = list(zip(a, b, strict=True))
    else:
        raise UserError(f"cannot match {len(a)} rows and {len(b)} rows: some lack a unique position in the field idx")
    for row, other in pairs:
        if row["reference"].split() != other["reference"].split():
            where = row.get("idx", row.get("row"))
            raise UserError(f"row {where} has different references; compare predictions for the same rows")
    if not pairs:
        raise UserError("no row in common; compare predictions for the same rows")
    return pairs


def compare(a: ScoredRows, b: ScoredRows) -> list[Row]:
    """Compare shared metrics on shared rows, see `intervals.paired`.

    Scores by a scorer model are compared only if both sides used the same model.

    Raises:
        UserError: the rows cannot be paired, see `pair`.
    """
    shared = [
        name
        for name, column in a.columns.items()
        if column.same_scores(b.columns.get(name))
        and (name not in a.models or (a.models[name] and a.models[name] == b.models.get(name)))
    ]
    pairs = pair(a.rows, b.rows) if shared else []
    compared = []
    for name in shared:
        left, right = ([rows[side][name] for rows in pairs] for side in (0, 1))
        means = {"a": sum(left) / len(pairs), "b": sum(right) / len(pairs)}
        compared.append({"score": name, "rows": len(pairs), **means, **intervals.paired(left, right)})
    return compared


@dataclass(frozen=True)
class Divergence:
    """Divergence of the losses in two training runs, a and b.

    Attributes:
        first, last: first and last step with a recorded loss in both runs.
        step: first step whose losses differ; None if all are identical.
        losses: the two losses at `step`.
        differences: settings that differ, with the values in a and b.
    """

    first: int
    last: int
    step: int | None
    losses: tuple[float | None, float | None] | None
    differences: dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Comparison:
    """Comparison of two runs, or of files of predictions.

    Attributes:
        training: divergence of the losses; None unless both are runs and have a common step.
        scores: see `compare`; None if a run is not evaluated.
        unscored: folders of runs that are not evaluated.
    """

    training: Divergence | None
    scores: list[Row] | None
    unscored: list[str]


def comparison(pair: tuple[str, str], runs: Path, metrics: Sequence[str] = ()) -> Comparison:
    """Compare two runs, or files of predictions.

    The losses of two runs are compared even if a run is not evaluated.

    Args:
        pair: runs, or files of predictions.
        runs: folder of the runs.
        metrics: values of --metric, added to the metrics of the runs.

    Raises:
        UserError: a run or file does not exist, or the two cannot be compared.
    """
    folders = {name: find_run(name, runs) for name in pair if not Path(name).is_file()}
    names = [str(folders[name].path) if name in folders else name for name in pair]
    training = _divergence([folders[name] for name in pair]) if len(folders) == len(set(pair)) else None
    if training and (unscored := [str(folder.path) for folder in folders.values() if not current(folder.path)]):
        return Comparison(training, None, unscored)
    return Comparison(training, compare(*several(names, runs, metrics)), [])


def _divergence(folders: Sequence[RunDir]) -> Divergence | None:
    """Divergence of two runs' losses, or None and a message if they have no common step.

    Raises:
        UserError: one run is a rehearsal, but the other is not.
    """
    a, b = (folder.read() for folder in folders)
    if a.rehearsal != b.rehearsal:
        raise UserError("one run is a rehearsal, but the other is not; compare two rehearsals or two real runs")
    of_a, of_b = (
        {record["step"]: record["loss"] for record in folder.read_metrics() if "loss" in record} for folder in folders
    )
    common = sorted(of_a.keys() & of_b.keys())
    if not common:
        say("losses are not compared: the runs have no step with a recorded loss in common")
        return None
    step = next((step for step in common if of_a[step] != of_b[step]), None)
    settings = [_settings(folder.config, run) for folder, run in zip(folders, (a, b), strict=True)]
    keys = [key for key in settings[0] | settings[1] if settings[0].get(key) != settings[1].get(key)]
    return Divergence(
        first=common[0],
        last=common[-1],
        step=step,
        losses=(of_a[step], of_b[step]) if step is not None else None,
        differences={key: (settings[0].get(key), settings[1].get(key)) for key in keys},
    )


def _settings(cfg: yamlfiles.Config, run: Run) -> yamlfiles.Config:
    """Settings, data, versions and machine of a run."""
    found = trained_settings(cfg) | dict(merging.flatten(run.provenance, "provenance"))
    for file in [*run.data, *run.named_files]:
        found[f"content of {file.path}"] = f"sha256 {file.sha256[:12]}"
    found["ranks"] = run.ranks
    found["resumed from"] = ", ".join(launch.resumed_from for launch in run.launches if launch.resumed_from)
    return found


Point = tuple[int, float]  # step, and mean loss since the previous point


def published_curve(of_study: Study, of_recipe: Published) -> list[Point]:
    """Read the published curve of a recipe; empty without one.

    Raises:
        UserError: the file cannot be read as CSV with numbers in the columns step and train_loss.
    """
    if not of_recipe.curve:
        return []
    file = of_study.folder / of_recipe.curve
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return [(int(row["step"]), float(row["train_loss"])) for row in csv.DictReader(stream)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: expected the columns step and train_loss with a number in each row ({error!r:.60})"
        ) from None


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
    """Gap between a run's training loss and a curve; None if the run did not reach the first point.

    The run's losses are averaged between consecutive steps of the curve. Intervals that the run did not complete are
    left out.

    Args:
        metrics: records of the run's steps.
        curve: published points.
    """
    losses = [(record["step"], record["loss"]) for record in metrics if record.get("loss") is not None]
    last = max((step for step, _ in losses), default=0)
    gaps: dict[int, float] = {}
    for (before, _), (step, published) in pairwise([(0, 0.0), *curve]):
        within = [loss for at, loss in losses if before < at <= step]
        if within and step <= last:
            gaps[step] = fmean(within) - published
    if not gaps:
        return None
    furthest = max(gaps, key=lambda step: abs(gaps[step]))
    return CurveGap(mean=fmean(gaps.values()), largest=abs(gaps[furthest]), step=furthest)
