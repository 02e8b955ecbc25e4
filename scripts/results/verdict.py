"""Verdicts on a study's runs, in comparison with published results."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from types import MappingProxyType

from ..base import paths, yamlfiles
from ..base.yamlfiles import on_one_line
from ..config import merging
from ..config.numerics import departures
from ..data.published import ROUNDING, TRAIN_LOSS, Log, Published, PublishedScore, read_points, rounding
from ..data.studies import Study
from ..evaluate.intervals import Interval
from ..evaluate.score import model_record
from ..evaluate.scores_file import Evaluation
from ..metrics.metric import Column, LossMetric
from ..training.run_record import GPU_MEMORY, State, Summary
from . import compare, repeats
from .compare import CurveGap
from .run_result import RunResult, RunScore

WITHIN, ACCEPTABLE, OFF = "within the interval", "acceptable", "off"


@dataclass(frozen=True, slots=True)
class MetricRow(RunScore):
    """Results of a recipe's runs by one metric.

    Attributes:
        value, decodings: means over the runs.
        base_model: score of the representative run's base model.
        interval: 95 % interval of the mean.
        verdict: see `verdict`.
        model: name of the scorer model, for metrics that have one.
    """

    interval: Interval | None
    verdict: str | None
    model: str | None

    @property
    def is_known(self) -> bool:
        """True if there is a score, ours or a published one."""
        return self.value is not None or self.published is not None

    @property
    def spread(self) -> float | None:
        """Spread of the published score."""
        if self.published is None or self.published.spread is None:
            return None
        return float(self.published.spread)


@dataclass(slots=True)
class StudyRow:
    """Runs of a recipe beside its published results.

    Attributes:
        runs: the representative run, then its repeats; empty without a run.
        scores: results by metric.
        log: other published figures, such as memory and speed.
        gap: gap between the training loss and the published curve.
        gap_verdict: verdict on the gap.
        differs: settings that the paper states and the run changed.
        unreported: settings that the authors do not report, with the run's values.
    """

    recipe: str
    rehearsal: bool
    runs: list[RunResult]
    scores: dict[str, MetricRow]
    log: Log
    gap: CurveGap | None = None
    gap_verdict: str | None = None
    differs: list[str] = field(default_factory=list)
    unreported: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> RunResult | None:
        """Representative run."""
        return self.runs[0] if self.runs else None

    @property
    def summary(self) -> Summary:
        """Summary of the representative run; an empty one without a run."""
        return self.chosen.summary if self.chosen else Summary()

    @property
    def evaluation(self) -> Evaluation | None:
        """Evaluation of the representative run."""
        return self.chosen.evaluation if self.chosen else None

    @property
    def incomparable_loss(self) -> str | None:
        """Reason not to compare the eval losses with the published one, see `RunResult.incomparable_loss`."""
        return next(filter(None, (result.incomparable_loss for result in self.runs)), None)

    @property
    def is_published(self) -> bool:
        """True if there is a published score."""
        return any(score.published for score in self.scores.values())

    @property
    def lacks_seeds(self) -> bool:
        """True if the interval behind a verdict does not cover other seeds."""
        judged = [score.interval for score in self.scores.values() if score.verdict and score.interval]
        return not all(interval.covers_seeds for interval in judged)

    @property
    def on_gpu(self) -> bool:
        """True if the memory of a GPU was measured."""
        return self.summary.memory_kind == GPU_MEMORY

    @property
    def gpu_hours(self) -> float | None:
        if not self.on_gpu:
            return None
        return self.summary.train_seconds * self.runs[0].run.ranks / 3600


def verdict(
    ours: float, interval: Interval | None, published: PublishedScore, tolerance: float | None = None
) -> str | None:
    """Compare our score with a published score.

    Each printed number stands for half a unit of its last digit to each side.

    `WITHIN`: our 95 % interval overlaps the range of the published value ± its spread. Without an interval, our score
    must be in that range; without a spread, our interval must contain the published value. `ACCEPTABLE`: not `WITHIN`,
    but the difference is at most the study's tolerance. `OFF`: neither. None: interval, spread and
    tolerance are all missing.
    """
    value = float(published.value)
    has_range = interval is not None or published.spread is not None
    if not has_range and tolerance is None:
        return None
    nearest = ours
    if interval:
        nearest = min(max(value, interval.low), interval.high)
    if has_range and abs(nearest - value) <= published.margin:
        return WITHIN
    if tolerance is not None and abs(ours - value) <= tolerance + rounding(published.value):
        return ACCEPTABLE
    return OFF


def of_run(column: Column, result: RunResult) -> str | None:
    """Verdict on a single run of a study by one metric; None without one."""
    assert result.study
    return _metric_row(result.study, column, [result], result.aim.scores.get(column.name)).verdict


def rows(
    study: Study, runs: Path, rehearsal: bool, representatives: Mapping[str, Path | None] = MappingProxyType({})
) -> list[StudyRow]:
    """Return a row for each recipe: representative run and verdicts.

    A run with another base model or other data represents no recipe. Rehearsals are neither mixed with real runs nor
    compared with published results. In a table of rehearsals, a recipe without a rehearsal has no row.

    Args:
        study: the study.
        runs: folder with the runs.
        rehearsal: True for a table of rehearsals.
        representatives: folder of the representative run, by recipe. A recipe whose value is None gets a row without
            a run; for a recipe without an entry, `_preference` chooses the run.
    """
    usable = repeats.usable_runs(runs, rehearsal)
    table = []
    for recipe in study.recipes:
        recipe_runs = [result for result in usable if result.run.recipe == recipe]
        candidates = recipe_runs
        if recipe in representatives:
            candidates = [result for result in recipe_runs if result.folder.path == representatives[recipe]]
        if candidates:
            chosen = max(candidates, key=partial(_preference, study))
            table.append(_row(study, recipe, rehearsal, repeats.with_repeats(chosen, recipe_runs)))
        elif recipe in study.published and not rehearsal:
            table.append(_row(study, recipe, rehearsal, []))
    return table


def _preference(study: Study, result: RunResult) -> tuple[bool, bool, bool, bool, bool, bool, str]:
    """Sort key of a recipe's runs; the representative run has the largest.

    Preferences, most important first: trained here; finished and evaluated, else evaluated but not finished; comparable
    with the published score; without changes and in one process; with the recipe's seed; newest.
    """
    run = result.run
    is_done = run.state == "finished" and result.is_scored
    changed_keys = set(result.changes)
    is_plain = not changed_keys - {repeats.SEED} and run.ranks == 1
    has_recipe_seed = repeats.SEED not in changed_keys
    is_comparable = result.is_comparable(study.first)
    name = result.folder.path.name
    return not run.published_adapter, is_done, result.is_scored, is_comparable, is_plain, has_recipe_seed, name


def _row(study: Study, recipe: str, rehearsal: bool, results: list[RunResult]) -> StudyRow:
    """Row for a recipe's representative run and its repeats, if there are any."""
    published = Published() if rehearsal else study.aimed_at(recipe)
    scores = {}
    for name, column in study.columns.items():
        scores[name] = _metric_row(study, column, results, published.scores.get(name))
    row = StudyRow(recipe, rehearsal, results, scores, _log_of_recipe(published))
    if rehearsal or not results:
        return row
    chosen = results[0]
    reported = study.reported_settings(study.origin(recipe))
    row.differs = _changed_settings(study, chosen, reported)
    row.unreported = _unreported_settings(study, chosen, reported)
    if published.curve:
        curve = read_points(study.folder / published.curve, TRAIN_LOSS)
        row.gap = compare.curve_gap(chosen.folder.read_metrics(), curve)
        row.gap_verdict = _gap_verdict(study, row.gap, chosen.run.state)
    return row


def _log_of_recipe(published: Published) -> Log:
    """Published figures of a training with the recipe's settings and rows; an empty log without any."""
    log = published.log
    return log if log and log.is_of_recipe else Log(source="none")


def _gap_verdict(study: Study, gap: CurveGap | None, state: State) -> str | None:
    """Verdict on the gap of a finished run; None without a gap, or if the study gives no tolerance."""
    if gap is None or state != "finished" or TRAIN_LOSS not in study.tolerances:
        return None
    if gap.largest <= study.tolerances[TRAIN_LOSS] * (1 + ROUNDING):
        return ACCEPTABLE
    return OFF


def _metric_row(
    study: Study, column: Column, results: Sequence[RunResult], published: PublishedScore | None
) -> MetricRow:
    """Results of a representative run and its repeats by one metric; without a run, the published score.

    Eval losses of runs have a mean only if they cover the same tokens, and a verdict only if each of them is
    comparable. For other metrics, repeats are comparable if the representative run is.
    """
    name, decodings = column.name, dict.fromkeys(study.decodings)
    if not results:
        return MetricRow(None, None, published, None, decodings, None, None, None)
    chosen = results[0]
    mean, interval = repeats.mean_score(column, results)
    difference = metric_verdict = None
    compared = results[:1]
    if isinstance(column.metric, LossMetric):
        compared = results
        if not repeats.cover_same_tokens(results):
            mean = interval = None
    is_comparable = all(result.scores[name].difference is not None for result in compared)
    if published and is_comparable and mean is not None:
        difference = mean - float(published.value)
        metric_verdict = verdict(mean, interval, published, study.tolerances.get(name))
    for decoding in decodings:
        decodings[decoding] = _mean(result.scores[name].decodings.get(decoding) for result in results)
    scorer = model_record(column, chosen.score_records)
    return MetricRow(
        value=mean,
        base_model=chosen.scores[name].base_model,
        published=published,
        difference=difference,
        decodings=decodings,
        interval=interval,
        verdict=metric_verdict,
        model=scorer.model if scorer else None,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None without values."""
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else None


def _changed_settings(study: Study, chosen: RunResult, reported: set[str]) -> list[str]:
    """Stated settings that a run changed, and other differences from the published training."""
    paper = yamlfiles.read_yaml(paths.recipe_file(study.origin(chosen.run.recipe)))
    differs = []
    for key, (before, after) in merging.differences(paper, chosen.config).items():
        if merging.top_key(key) in reported:
            differs.append(f"{key}: {on_one_line(after)} instead of {on_one_line(before)}")
    differs += departures(paper, chosen.config)
    if chosen.run.ranks > 1:
        differs.append(f"GPUs: {chosen.run.ranks} instead of 1")
    return differs


def _unreported_settings(study: Study, chosen: RunResult, reported: set[str]) -> list[str]:
    """Settings that study.yaml lists as unreported, but for those that the authors report for this recipe.

    Each is listed with the source of the run's value: the comment in the run's recipe or, if the run changed the
    setting, the source of the change.
    """
    run, config = chosen.run, chosen.config
    sources = yamlfiles.sources(paths.recipe_file(run.recipe))
    for difference in run.differences:
        sources[merging.top_key(difference.key)] = difference.source.text
    unreported = []
    for key in study.unreported:
        if key in config and key not in reported:
            unreported.append(f"{key}: {on_one_line(config[key])} ({sources.get(key, 'Axolotl')})")
    trainer = study.published[study.origin(run.recipe)].trainer
    if trainer != "Axolotl":
        unreported.append(f"trainer: Axolotl (the paper used {trainer})")
    if "decoding" in study.unreported:
        decoding = chosen.evaluation.settings.decoding if chosen.evaluation else study.decoding
        settings = on_one_line(decoding.model_dump(exclude_defaults=True))
        unreported.append(f"decoding: {settings} (the paper does not state it)")
    return unreported
