"""Runs repeated with other seeds, and intervals of their scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..base.files import Row
from ..base.yamlfiles import Config
from ..config.training_settings import TrainingSettings
from ..evaluate import intervals, scores_file
from ..evaluate.intervals import Interval
from ..evaluate.score import model_record
from ..metrics.metric import Bounds, Column, LossMetric
from ..run import backends, rundir
from .run_result import RunResult, trained_settings

SEED = "seed"
_SAME_ROWS = {"data_sha256", "rows"}
# settings shared by evaluations whose scores are averaged
_ALIKE = _SAME_ROWS | {"decoding", "quantized", "dtype", "engine"}


class MeanScore(NamedTuple):
    """Mean score of repeated runs by one metric, with its 95 % interval."""

    value: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Setup:
    """Inputs of a training except the seed; repeats of a run have the same.

    Attributes:
        settings: settings by dotted key, see `trained_settings`.
        data: hashes of the data files.
        files: hashes of other files that the config names.
        ranks: number of training processes.
    """

    recipe: str
    settings: Config
    data: list[str]
    files: list[str]
    ranks: int

    @classmethod
    def of_run(cls, result: RunResult) -> "Setup":
        run = result.run
        settings = trained_settings(result.config)
        settings.pop(SEED, None)
        data = [file.sha256 for file in run.data]
        files = [file.sha256 for file in run.named_files]
        return cls(run.recipe, settings, data, files, run.ranks)


def usable_runs(runs: Path, rehearsal: bool) -> list[RunResult]:
    """Real runs that use their recipe's model and data; if `rehearsal` is True, all rehearsals instead."""
    results = []
    for folder, run in rundir.readable(rundir.all_runs(runs), backends.read):
        if run.rehearsal != rehearsal:
            continue
        result = RunResult(folder, run)
        if not result.is_of_something_else:
            results.append(result)
    return results


def with_repeats(result: RunResult, candidates: Sequence[RunResult]) -> list[RunResult]:
    """Return a run and its repeats, which differ from it at most in the seed.

    Repeats are trained and evaluated alike. If there are several seeds, one run counts for each: the given run
    for its own seed, the newest run for each other seed. Further runs of a seed say nothing about the spread between
    seeds. If all runs have the same seed, all of them count. A run that is not finished and scored has no repeats.

    Args:
        result: the run.
        candidates: possible repeats, from the oldest to the newest.
    """
    if not result.is_scored or not _is_trained_here(result):
        return [result]
    setup = Setup.of_run(result)
    repeats = [other for other in candidates if _is_repeat(other, result) and Setup.of_run(other) == setup]
    by_seed = {seed(run): run for run in [*repeats, result]}  # the last run of a seed replaces the others
    if len(by_seed) > 1:
        repeats = [run for run in by_seed.values() if run != result]
    return [result, *repeats]


def _is_repeat(other: RunResult, result: RunResult) -> bool:
    """True if another finished run of the recipe is evaluated as a run is."""
    if other.run.recipe != result.run.recipe or other.folder.path == result.folder.path:
        return False
    return _is_trained_here(other) and _evaluated_alike(other, result, _ALIKE)


def _is_trained_here(result: RunResult) -> bool:
    """True for a finished training of our own whose config exists."""
    return result.run.state == "finished" and not result.run.published_adapter and result.config != {}


def _evaluated_alike(a: RunResult, b: RunResult, settings: set[str]) -> bool:
    """True if some settings of two runs' evaluations are equal, or if both runs lack an evaluation."""
    if a.evaluation is None or b.evaluation is None:
        return a.evaluation is b.evaluation
    return a.evaluation.settings.model_dump(include=settings) == b.evaluation.settings.model_dump(include=settings)


def tokens(result: RunResult) -> str:
    """Hash of the tokens behind a run's eval loss or rewards; if unknown, a text that no other run has."""
    scored = result.summary.eval_tokens or result.summary.eval_pairs
    return scored["sha256"] if scored else f"unknown in {result.folder.path}"


def cover_same_tokens(results: Sequence[RunResult]) -> bool:
    """True if the eval losses of some runs are known to cover the same tokens; always for less than two runs."""
    return len(set(map(tokens, results))) < 2


def seed(result: RunResult) -> int:
    return TrainingSettings.of(result.config).seed


def mean_score(column: Column, results: Sequence[RunResult]) -> MeanScore:
    """Mean score of some runs of one recipe by a metric, with an interval.

    Runs without a score, or with another scorer model than the first run's, are left out. The interval of an eval loss
    covers the noise between runs only, because all were scored on the same tokens. That of other metrics needs each
    run's interval over its rows. A single run borrows the spread of published repeats.
    """
    scored = []
    scores = []
    for result in results:
        score, scorer = result.score(column), model_record(column, result.score_records)
        if score is not None and scorer == model_record(column, results[0].score_records):
            scored.append(result)
            scores.append(score)
    if not scores:
        return MeanScore(None, None)
    interval = _interval(column, scored, scores)
    if interval and len(scores) > 1 and len(set(map(seed, scored))) == 1:
        interval = replace(interval, one_seed=True)
    return MeanScore(fmean(scores), interval)


def _interval(column: Column, results: list[RunResult], scores: list[float]) -> Interval | None:
    """Interval of the mean score of some runs."""
    name = column.name
    published = _published_repeats(name, results[0])
    if isinstance(column.metric, LossMetric):
        if not cover_same_tokens(results):
            return None
        bounds = column.metric.interval(results[0].summary.eval_losses)
        if len(results) == 1 and bounds:
            return intervals.Interval(*bounds)
        return intervals.interval_on_fixed_rows(scores, published)
    over_rows = _intervals_over_rows(name, results)
    if over_rows is None:
        return None
    by_row = scores_by_row(name, results) if len(scores) > 1 else None
    return intervals.interval_of_mean(scores, by_row, over_rows, published)


def _intervals_over_rows(name: str, results: Sequence[RunResult]) -> list[Bounds] | None:
    """Interval of each run over its rows; None if a run has none."""
    over_rows = []
    for result in results:
        record = result.score_records.get(name)
        if record is None or record.interval is None:
            return None
        over_rows.append(record.interval)
    return over_rows


def _published_repeats(name: str, result: RunResult) -> Sequence[float]:
    """Published scores of a recipe's repeated runs; empty for a rehearsal, or without a study."""
    if result.study is None or result.run.rehearsal:
        return ()
    return result.study.repeats(result.run.origin, name)


def scores_by_row(name: str, results: Sequence[RunResult]) -> list[list[float]] | None:
    """Scores of single rows, for each run; None if a row lacks a score, or if the runs were scored on other rows."""
    if not all(_evaluated_alike(results[0], result, _SAME_ROWS) for result in results):
        return None
    table: list[list[float]] = []
    for result in results:
        scores: list[Any] = [row.get(name) for row in scores_file.read_predictions(result.folder.path)]
        if not scores or None in scores:
            return None
        table.append(scores)
    return table


def table_cells(interval: Interval | None) -> Row:
    """Table cells of an interval."""
    if interval is None:
        return {"95 %": None, "95 % covers": None}
    return {"95 %": [interval.low, interval.high], "95 % covers": interval.method}


def json_fields(name: str, interval: Interval | None) -> Row:
    """Fields of a record for the interval of a metric."""
    low = high = method = None
    if interval:
        low, high, method = interval.low, interval.high, interval.method
    return {f"{name}_low": low, f"{name}_high": high, f"{name}_interval_method": method}
