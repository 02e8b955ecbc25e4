"""Runs repeated with other seeds: intervals of scores, and power of a study."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import variance
from typing import Any

from .. import backends
from ..base import yamlfiles
from ..base.errors import UserError
from ..base.files import Row
from ..configs import config
from ..data.study import Study
from ..metrics.metric import Column
from ..runs import rundir
from ..runs.rundir import RunDir
from ..scores import evaluations, intervals
from ..scores.evaluations import Evaluation
from ..scores.intervals import Variances
from ..scores.score import model_record
from .run_rows import RunResult

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
    own, trained, named = chosen.evaluation, _training(chosen), [file.sha256 for file in chosen.run.named_files]
    if chosen.run.state != "finished" or not chosen.is_scored or chosen.run.published_adapter or trained is None:
        return [chosen]
    found = [
        other
        for other in candidates
        if other.folder.path != chosen.folder.path
        and other.run.recipe == chosen.run.recipe
        and other.run.state == "finished"
        and not other.run.published_adapter
        and other.run.rehearsal == chosen.run.rehearsal
        and _alike(own, other.evaluation, _ALIKE)
        and _training(other) == trained
        and [file.sha256 for file in other.run.named_files] == named
    ]
    by_seed = {seed(result.folder): result for result in [*found, chosen]}
    return [chosen] + [one for one in (by_seed.values() if len(by_seed) > 1 else found) if one != chosen]


def _training(result: RunResult) -> Any:
    """Inputs of a run's training except the seed; None if the config is missing."""
    run = result.run
    if not result.folder.config.is_file():
        return None
    leaves = config.flatten(yamlfiles.read_yaml(result.folder.config))
    of_run = {SEED, *config.OF_THE_RUN}
    settings = {
        key: repr(value)
        for key, value in leaves
        if key.partition(".")[0] not in of_run and not config.TRACKING.match(key)
    }
    return settings, [file.sha256 for file in run.data], run.ranks


def _alike(one: Evaluation | None, other: Evaluation | None, settings: set[str]) -> bool:
    if one is None or other is None:
        return one is other
    return one.settings.model_dump(include=settings) == other.settings.model_dump(include=settings)


def tokens(result: RunResult) -> str | None:
    """Hash of the tokens behind a run's eval loss; None if it is unknown."""
    return result.summary.eval_tokens["sha256"] if result.summary.eval_tokens else None


def seed(folder: RunDir) -> str:
    """Seed of a run, as text."""
    cfg = yamlfiles.read_yaml(folder.config) if folder.config.is_file() else {}
    return str(cfg.get(SEED, config.AXOLOTL_SEED))


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
    one_seed = len({seed(result.folder) for result in found}) == 1
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
    predicted = [evaluations.read_predictions(result.folder.path) for result in found]
    if len({tuple(row.get("row") for row in rows) for rows in predicted}) != 1 or not predicted[0]:
        return None
    table = [[row[name] for row in rows if row.get(name) is not None] for rows in predicted]
    return table if all(len(one) == len(predicted[0]) for one in table) else None


SEEDS = (1, 2, 3, 5, 10)
PARTS = (1, 2, 4)  # the size of the test set is divided by these numbers
CHANCE = 0.8
_FEWEST = 10  # minimum number of rows for estimating a chance of detection


@dataclass(frozen=True)
class Chance:
    """Power for a number of seeds and rows.

    Attributes:
        sees: chance of detecting the difference.
        smallest: smallest difference that is detected with chance `CHANCE`.
        false_alarms: chance of detecting a difference that does not exist.
    """

    seeds: int
    rows: int
    sees: float
    smallest: float
    false_alarms: float


@dataclass(frozen=True)
class Outlook:
    """Chances of detecting a difference from published scores, by seeds and rows.

    Attributes:
        difference_from: where the difference comes from, `--power` or the study's tolerance.
        rests_on: origin of the standard deviations.
        one_run: how the interval is computed if there is only one run.
    """

    study: str
    metric: str
    difference: float
    difference_from: str
    rests_on: str
    one_run: str
    deviation_of_runs: float
    deviation_of_rows: float
    deviation_of_a_row_in_a_run: float
    rows: list[Chance]


def outlook(of_study: Study, runs: Path, difference: float | None = None) -> Outlook:
    """Compute the chances of detecting a difference in a study's first metric.

    A difference d is detected if the 95 % interval of our mean score excludes a published score that is d away from our
    true mean.

    Args:
        of_study: the study.
        runs: folder with the runs.
        difference: difference in the metric's unit; by default the study's tolerance.

    Raises:
        UserError: the noise of rows or seeds is unknown, or there is neither a difference nor a tolerance.
    """
    column = of_study.first
    difference, why = _difference(of_study, column, difference)
    spread, most, words = _basis(of_study, column, runs)
    if not spread.deviation(1, 1) or most < _FEWEST:
        raise UserError(
            f"{of_study.folder.name}: {most} rows of {words} are too few or too similar to plan with; score more rows"
        )
    known = next(filter(None, (of_study.repeats(recipe, column.name) for recipe in of_study.published)), [])
    rows = []
    for count in (most // part for part in PARTS if most // part >= _FEWEST):
        for seeds in SEEDS:
            planned = intervals.power(spread, seeds, count, known)
            rows.append(Chance(seeds, count, planned.sees(difference), planned.smallest(CHANCE), planned.sees(0)))
    return Outlook(
        study=of_study.folder.name,
        metric=column.name,
        difference=difference,
        difference_from=why,
        rests_on=words,
        one_run=f"rows, and {intervals.BORROWED}" if known else intervals.ROWS_ONLY,
        deviation_of_runs=spread.of_runs**0.5,
        deviation_of_rows=spread.of_rows**0.5,
        deviation_of_a_row_in_a_run=spread.rest**0.5,
        rows=rows,
    )


def _difference(of_study: Study, column: Column, given: float | None) -> tuple[float, str]:
    if given is not None:
        return given, "--power"
    if column.name not in of_study.tolerances:
        raise UserError(f"{of_study.folder.name}: give a difference, as in --power 1, in the unit of {column.label}")
    return of_study.tolerances[column.name], "the study's tolerance"


def _basis(of_study: Study, column: Column, runs: Path) -> tuple[Variances, int, str]:
    """Variances, number of rows and origin, from runs with several seeds, or else from published repeats."""
    name = of_study.folder.name
    if column.metric.of_rows is None:
        raise UserError(f"{name}: --power: {column.label} has no row scores to estimate noise from")
    known = {r: values for r, of in of_study.published.items() if (values := of.repeats.get(column.name))}
    several = [group for group in _groups(of_study, runs) if len({seed(result.folder) for result in group}) > 1]
    scored = [(group, table) for group in several if (table := by_row(column.name, group))]
    most = max((len(table[0]) for _, table in scored), default=0)
    if most > 1:
        scored = [(group, table) for group, table in scored if len(table[0]) == most]
        words = " and ".join(f"{len(group)} runs of {group[0].run.recipe}" for group, _ in scored)
        return intervals.estimated([intervals.mean_squares(table) for _, table in scored]), most, words
    if not known:
        raise UserError(
            f"{name}: --power: the spread between seeds is unknown; run `recipe reproduce {name} --seeds 3`"
        )
    recipe, values = next(iter(known.items()))
    metric, published = column.metric, of_study.published[recipe].scores.get(column.name)
    if metric.all_or_nothing and published and of_study.data.scored_rows:
        of_rows = float(published.value * (100 - published.value))
        if of_rows >= 0:  # the published score is within the metric's range
            words = (
                f"{len(values)} published repeats of {recipe}, and rows that are either right or wrong, "
                f"{published.value} % of them right as published"
            )
            return Variances(variance(values), of_rows, 0.0), of_study.data.scored_rows, words
    raise UserError(
        f"{name}: --power: the spread between rows is unknown; run `recipe reproduce {name} --only {recipe}`"
    )


def _groups(of_study: Study, runs: Path) -> list[list[RunResult]]:
    """Groups of repeats among a study's runs that are comparable with published scores."""
    recipes = {*of_study.published, *of_study.variants}
    comparable = [
        result
        for result in usable(runs, rehearsal=False)
        if result.run.origin in recipes and result.is_comparable(of_study.first)
    ]
    groups: list[list[RunResult]] = []
    for result in comparable:
        if all(result not in group for group in groups):
            groups.append(of(result, comparable))
    return groups
