"""Runs repeated with other seeds, and intervals of their scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..base.files import Row
from ..config.training_settings import TrainingSettings
from ..evaluate import intervals, scores_file
from ..evaluate.score import model_record
from ..metrics.metric import Column
from ..run import backends, rundir
from .run_result import RunResult, trained_settings

SEED = "seed"
_SAME_ROWS = {"data_sha256", "rows"}
# settings shared by evaluations whose scores are averaged
_ALIKE = _SAME_ROWS | {"decoding", "quantized", "dtype", "engine"}
OTHER_ROWS = "held-out rows differ by seed"


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
    settings: dict[str, Any]
    data: list[str]
    files: list[str]
    ranks: int

    @classmethod
    def of(cls, result: RunResult) -> "Setup":
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
        if rehearsal or not result.is_of_something_else:
            results.append(result)
    return results


def with_repeats(result: RunResult, candidates: Sequence[RunResult]) -> list[RunResult]:
    """Return a run and its repeats, which differ from it at most in the seed.

    Repeats are trained and evaluated alike. If there are several seeds, one run counts for each: the given run
    for its own seed, the newest run for each other seed. Further runs of a seed say nothing about the spread between
    seeds. If all runs have the same seed, all of them count. A run that is not finished and scored has no repeats.
    """
    if not result.is_scored or not _is_trained_here(result):
        return [result]
    repeats = [other for other in candidates if _is_repeat(other, result)]
    by_seed = {seed(run): run for run in [*repeats, result]}
    if len(by_seed) > 1:
        repeats = [run for run in by_seed.values() if run != result]
    return [result, *repeats]


def _is_repeat(other: RunResult, result: RunResult) -> bool:
    """True if another run is trained and evaluated as a run is, but for the seed."""
    if other.run.recipe != result.run.recipe or other.folder.path == result.folder.path:
        return False
    if not _is_trained_here(other) or not _evaluated_alike(other, result, _ALIKE):
        return False
    return Setup.of(other) == Setup.of(result)


def _is_trained_here(result: RunResult) -> bool:
    """True for a finished training of our own whose config exists."""
    return result.run.state == "finished" and not result.run.published_adapter and result.config != {}


def _evaluated_alike(a: RunResult, b: RunResult, settings: set[str]) -> bool:
    """True if some settings of two runs' evaluations are equal, or if both runs lack an evaluation."""
    if a.evaluation is None or b.evaluation is None:
        return a.evaluation is b.evaluation
    return a.evaluation.settings.model_dump(include=settings) == b.evaluation.settings.model_dump(include=settings)


def tokens(result: RunResult) -> str | None:
    """Hash of the tokens behind a run's eval loss; None if it is unknown."""
    eval_tokens = result.summary.eval_tokens
    return eval_tokens["sha256"] if eval_tokens else None


def seed(result: RunResult) -> int:
    return TrainingSettings.of(result.config).seed


def scores(column: Column, found: Sequence[RunResult]) -> list[tuple[RunResult, float]]:
    """Runs with their scores by a metric, all from the same scorer model.

    Runs with a scorer model other than the first run's are left out.
    """
    models = [model_record(column, result.evaluation.scores) if result.evaluation else None for result in found]
    scored = [(result, result.score(column)) for result in found]
    return [
        (result, score)
        for (result, score), model in zip(scored, models, strict=True)
        if score is not None and (result.evaluation is None or model == models[0])
    ]


class MeanScore(NamedTuple):
    """Mean score of repeated runs by one metric, with its 95 % interval."""

    value: float | None
    interval: intervals.Interval | None


def mean_score(name: str, scored: Sequence[tuple[RunResult, float]]) -> MeanScore:
    """Mean score of some runs of one recipe by a metric, with an interval from `interval`.

    Args:
        name: name of the metric.
        scored: runs with their scores.
    """
    if not scored:
        return MeanScore(None, None)
    first, _ = scored[0]
    published_repeats: Sequence[float] = []
    if first.study and not first.run.rehearsal:
        published_repeats = first.study.repeats(first.run.origin, name)
    return MeanScore(fmean(score for _, score in scored), interval(name, scored, published_repeats))


def interval(
    name: str, scored: Sequence[tuple[RunResult, float]], known: Sequence[float] = ()
) -> intervals.Interval | None:
    """95 % interval of the mean score, see `interval_of_mean`; None if a run has no interval over its rows.

    Args:
        name: name of the metric.
        scored: runs with their scores.
        known: scores of the authors' repeats, whose spread is used if there is only one run.
    """
    found, values = [result for result, _ in scored], [value for _, value in scored]
    evaluated = (result.evaluation.scores if result.evaluation else {} for result in found)
    over_rows = [scores[name].interval if name in scores else None for scores in evaluated]
    within = [interval for interval in over_rows if interval is not None]
    if len(within) < len(found):
        return None
    if len(found) == 1:
        return intervals.interval_of_mean(values, None, within, known)
    made = intervals.interval_of_mean(values, by_row(name, found), within)
    one_seed = len({seed(result) for result in found}) == 1
    return replace(made, one_seed=True) if made and one_seed else made


def bounds(interval: intervals.Interval | None) -> list[float] | None:
    """Table cell of an interval."""
    return [interval.low, interval.high] if interval else None


def interval_cells(name: str, within: intervals.Interval | None) -> Row:
    """Fields of a record for the interval of a metric."""
    return {
        f"{name}_low": within.low if within else None,
        f"{name}_high": within.high if within else None,
        f"{name}_interval_method": within.method if within else None,
    }


def by_row(name: str, found: Sequence[RunResult]) -> list[list[float]] | None:
    """Row scores of each run; None if rows lack scores or differ between runs."""
    first = found[0]
    if first.evaluation is None or not all(_evaluated_alike(first, result, _SAME_ROWS) for result in found):
        return None
    predicted = [scores_file.read_predictions(result.folder.path) for result in found]
    if len({tuple(row.get("row") for row in rows) for rows in predicted}) != 1 or not predicted[0]:
        return None
    table = [[row[name] for row in rows if row.get(name) is not None] for rows in predicted]
    return table if all(len(one) == len(predicted[0]) for one in table) else None
