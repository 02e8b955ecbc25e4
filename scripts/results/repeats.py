"""Runs repeated with other seeds, and intervals of their scores."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..base.files import Row
from ..config.training_settings import TrainingSettings
from ..evaluate import intervals, scores_file
from ..evaluate.score import model_record
from ..evaluate.scores_file import Evaluation
from ..metrics.metric import Column
from ..run import backends, rundir
from .run_result import RunResult, trained_settings

SEED = "seed"
_SAME_ROWS = {"data_sha256", "rows"}
# settings shared by evaluations whose scores are averaged
_ALIKE = _SAME_ROWS | {"decoding", "quantized", "dtype", "engine"}
ONE_SEED = " of one seed"
OTHER_ROWS = "held-out rows differ by seed"


def usable(runs: Path, rehearsal: bool) -> list[RunResult]:
    """Real runs that use their recipe's model and data; if `rehearsal` is True, all rehearsals instead."""
    found = (RunResult(folder, run) for folder, run in rundir.readable(rundir.all_runs(runs), backends.read))
    return [
        result
        for result in found
        if result.run.rehearsal == rehearsal and (rehearsal or not result.is_of_something_else)
    ]


def of(chosen: RunResult, candidates: Sequence[RunResult]) -> list[RunResult]:
    """Return a run and its repeats, which differ from it at most in the seed.

    Repeats are trained and evaluated alike. If there are several seeds, one run counts for each: the given run
    for its own seed, the newest run for each other seed. Further runs of a seed say nothing about the spread between
    seeds. If all runs have the same seed, all of them count. A run that is not finished and scored has no repeats.
    """
    trained = _training(chosen)
    if trained is None or not chosen.is_scored:
        return [chosen]
    found = []
    for other in candidates:
        if other.run.recipe != chosen.run.recipe or other.folder.path == chosen.folder.path:
            continue
        if _alike(chosen.evaluation, other.evaluation, _ALIKE) and _training(other) == trained:
            found.append(other)
    by_seed = {seed(result): result for result in [*found, chosen]}
    if len(by_seed) > 1:
        found = [result for result in by_seed.values() if result != chosen]
    return [chosen, *found]


def _training(result: RunResult) -> Any:
    """Inputs of a run's training except the seed; None if it is not finished, not our own, or lacks its config."""
    run = result.run
    if run.state != "finished" or run.published_adapter or not result.config:
        return None
    settings = trained_settings(result.config)
    settings.pop(SEED, None)
    return settings, [file.sha256 for file in [*run.data, *run.named_files]], run.ranks


def _alike(one: Evaluation | None, other: Evaluation | None, settings: set[str]) -> bool:
    if one is None or other is None:
        return one is other
    return one.settings.model_dump(include=settings) == other.settings.model_dump(include=settings)


def tokens(result: RunResult) -> str | None:
    """Hash of the tokens behind a run's eval loss; None if it is unknown."""
    return result.summary.eval_tokens["sha256"] if result.summary.eval_tokens else None


def seed(result: RunResult) -> str:
    """Seed of a run, as text."""
    return str(TrainingSettings.of(result.config).seed)


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


def interval(
    name: str, scored: Sequence[tuple[RunResult, float]], known: Sequence[float] = ()
) -> intervals.Interval | None:
    """95 % interval of the runs' mean score, see `intervals.of_runs`; None if a run has no interval over its rows.

    Args:
        name: name of the metric.
        scored: runs with their scores.
        known: scores of the authors' repeats, whose spread is used if there is only one run.
    """
    found, values = [result for result, _ in scored], [value for _, value in scored]
    evaluated = (result.evaluation.scores if result.evaluation else {} for result in found)
    over_rows = [(scores.get("intervals") or {}).get(name) for scores in evaluated]
    within = [interval for interval in over_rows if interval is not None]
    if len(within) < len(found):
        return None
    if len(found) == 1:
        return intervals.of_runs(values, None, within, known)
    made = intervals.of_runs(values, by_row(name, found), within)
    one_seed = len({seed(result) for result in found}) == 1
    return replace(made, method=made.method + ONE_SEED) if made and one_seed else made


def interval_cells(name: str, within: intervals.Interval | None) -> Row:
    """Fields of a record for the interval of a metric."""
    return {
        f"{name}_low": within.low if within else None,
        f"{name}_high": within.high if within else None,
        f"{name}_interval_method": within.method if within else None,
    }


def by_row(name: str, found: Sequence[RunResult]) -> list[list[float]] | None:
    """Row scores of each run; None if rows lack scores or differ between runs."""
    first = found[0].evaluation
    if first is None or not all(_alike(first, result.evaluation, _SAME_ROWS) for result in found):
        return None
    predicted = [scores_file.read_predictions(result.folder.path) for result in found]
    if len({tuple(row.get("row") for row in rows) for rows in predicted}) != 1 or not predicted[0]:
        return None
    table = [[row[name] for row in rows if row.get(name) is not None] for rows in predicted]
    return table if all(len(one) == len(predicted[0]) for one in table) else None
