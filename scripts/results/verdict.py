"""Verdicts on a study's runs, in comparison with published results."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from ..base import paths, yamlfiles
from ..base.files import Row
from ..config import merging
from ..config.compose import REHEARSAL, TRACKERS
from ..config.numerics import departures
from ..data.published import ROUNDING, TRAIN_LOSS, Measured, Published, PublishedScore, rounding
from ..data.studies import Study
from ..evaluate.intervals import Interval
from ..evaluate.score import model_record
from ..metrics.metric import Column
from ..training.run_record import Summary
from . import compare, repeats
from .compare import CurveGap
from .run_result import RunResult, RunScore

GIB = 1 << 30
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


@dataclass(frozen=True, slots=True)
class StudyRow:
    """Runs of a recipe beside its published results.

    Attributes:
        runs: the representative run, then its repeats; empty without a run.
        scores: results by metric.
        measured: other published figures, such as memory and speed.
        gap: gap between the training loss and the published curve.
        gap_verdict: verdict on the gap.
        differs: settings that the paper states and the run changed.
        open: settings that the paper leaves open, with the run's values.
    """

    recipe: str
    rehearsal: bool
    runs: list[RunResult]
    scores: dict[str, MetricRow]
    measured: Measured
    gap: CurveGap | None
    gap_verdict: str | None
    differs: list[str]
    open: list[str]

    @property
    def chosen(self) -> RunResult | None:
        """Representative run."""
        return self.runs[0] if self.runs else None

    @property
    def on_gpu(self) -> bool:
        return bool(self.chosen and str(self.chosen.summary.memory_kind).startswith("GPU"))

    @property
    def gpu_hours(self) -> float | None:
        run = self.chosen
        return run.summary.train_seconds * run.run.ranks / 3600 if run and self.on_gpu else None

    def costs(self) -> dict[str, tuple[float | None, float | None]]:
        """Costs of the run, paired with the published costs."""
        published, ours = self.measured, self.chosen.summary if self.chosen else Summary()
        return {
            "trainable": (ours.trainable_parameters, published.trainable),
            "peak_gpu_memory_gib": (
                ours.peak_memory if self.on_gpu else None,
                published.reserved_bytes / GIB if published.reserved_bytes else None,
            ),
            "tokens_per_second": (ours.tokens_per_second, published.tokens_per_second),
            "train_seconds": (ours.train_seconds if self.chosen else None, published.train_seconds),
        }


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
    value, bounded = float(published.value), interval is not None or published.spread is not None
    if not bounded and tolerance is None:
        return None
    nearest = min(max(value, interval.low), interval.high) if interval else ours
    if bounded and abs(nearest - value) <= published.margin:
        return WITHIN
    if tolerance is not None and abs(ours - value) <= tolerance + rounding(published.value):
        return ACCEPTABLE
    return OFF


def rows(
    of_study: Study, runs: Path, rehearsal: bool, representatives: Mapping[str, Path | None] | None = None
) -> list[StudyRow]:
    """Return a row for each recipe: representative run and verdicts.

    A run with another base model or other data represents no recipe. Rehearsals are neither mixed with real runs nor
    compared with published results. In a table of rehearsals, a recipe without a rehearsal has no row.

    Args:
        of_study: the study.
        runs: folder with the runs.
        rehearsal: True for a table of rehearsals.
        representatives: folder of the representative run, by recipe. A recipe whose value is None gets a row without
            a run; for a recipe without an entry, `_preference` chooses the run.
    """
    all_runs = repeats.usable_runs(runs, rehearsal)
    candidates = [
        each for each in all_runs if (representatives or {}).get(each.run.recipe, each.folder.path) == each.folder.path
    ]
    table = []
    for recipe in [*of_study.published, *of_study.variants]:
        of_recipe = [candidate for candidate in candidates if candidate.run.recipe == recipe]
        if of_recipe or (recipe in of_study.published and not rehearsal):
            chosen = max(of_recipe, key=partial(_preference, of_study), default=None)
            found = repeats.with_repeats(chosen, all_runs) if chosen else []
            table.append(_row(of_study, recipe, found, rehearsal))
    return table


def _preference(of_study: Study, result: RunResult) -> tuple[bool, bool, bool, bool, bool, bool, str]:
    """Sort key of a recipe's runs; the representative run has the largest.

    Preferences, most important first: trained here; finished and evaluated, else evaluated but not finished; comparable
    with the published score; without changes and in one process; with the recipe's seed; newest.
    """
    run, evaluated = result.run, result.is_scored
    # an override that repeats the recipe's value, as in a sweep, is not among the differences
    changed = [one.key for one in run.differences if one.source.kind == "override" and one.key != repeats.SEED]
    plain = not changed and not set(run.profiles) - {REHEARSAL, *TRACKERS} and run.ranks == 1
    own_seed = all(difference.key != repeats.SEED for difference in run.differences)
    done = run.state == "finished" and evaluated
    comparable = result.is_comparable(of_study.first)
    return not run.published_adapter, done, evaluated, comparable, plain, own_seed, result.folder.path.name


def _row(of_study: Study, recipe: str, found: list[RunResult], rehearsal: bool) -> StudyRow:
    """Row for a recipe's representative run and its repeats."""
    chosen = found[0] if found else None
    aim = None if rehearsal else of_study.aimed_at(recipe)
    curve = compare.published_curve(of_study, aim) if aim else []
    gap = compare.curve_gap(chosen.folder.read_metrics(), curve) if chosen and curve else None
    gap_verdict = None
    if gap and chosen and chosen.run.state == "finished" and TRAIN_LOSS in of_study.tolerances:
        gap_verdict = ACCEPTABLE if gap.largest <= of_study.tolerances[TRAIN_LOSS] * (1 + ROUNDING) else OFF
    differs, left_open = _settings(of_study, recipe, chosen) if chosen and not rehearsal else ([], [])
    return StudyRow(
        recipe=recipe,
        rehearsal=rehearsal,
        runs=found,
        scores={name: _by_metric(of_study, column, found, aim) for name, column in of_study.columns.items()},
        measured=aim.measured if aim else Measured(),
        gap=gap,
        gap_verdict=gap_verdict,
        differs=differs,
        open=left_open,
    )


def _by_metric(of_study: Study, column: Column, found: Sequence[RunResult], aim: Published | None) -> MetricRow:
    """Results of a representative run and its repeats by one metric."""
    name, chosen = column.name, found[0] if found else None
    published, of_chosen = aim.scores.get(name) if aim else None, chosen.scores[name] if chosen else None
    reached = repeats.scores(column, found)
    known = of_study.repeats(chosen.run.origin, name) if chosen and not chosen.run.rehearsal else []
    within = repeats.interval(name, reached, known) if reached else None
    mean = _mean(value for _, value in reached)
    difference = found_verdict = None
    if published and mean is not None and of_chosen and of_chosen.difference is not None:  # the scores are comparable
        difference = mean - float(published.value)
        found_verdict = verdict(mean, within, published, of_study.tolerances.get(name))
    model = model_record(column, chosen.evaluation.scores) if chosen and chosen.evaluation else None
    return MetricRow(
        value=mean,
        interval=within,
        base_model=of_chosen.base_model if of_chosen else None,
        published=published,
        difference=difference,
        verdict=found_verdict,
        model=model.model if model else None,
        decodings={
            decoding: _mean(result.scores[name].decodings.get(decoding) for result in found)
            for decoding in of_study.decodings
        },
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None without values."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def record(row: StudyRow) -> Row:
    """Flat JSON record of a row; the keys of a metric begin with the metric's name."""
    chosen = row.chosen
    scores: Row = {}
    for name, score in row.scores.items():
        spread = score.published.spread if score.published else None
        scores |= score.record(name) | repeats.interval_cells(name, score.interval)
        scores |= {
            f"{name}_spread": None if spread is None else float(spread),
            f"{name}_verdict": score.verdict,
            f"{name}_model": score.model,
        }
    costs: Row = {}
    for key, (ours, published) in row.costs().items():
        costs |= {key: ours, f"{key}_published": published}
    return {
        "recipe": row.recipe,
        "run": chosen and str(chosen.folder.path),
        "state": chosen and chosen.run.state,
        "published_adapter": chosen and chosen.run.published_adapter,
        "runs": len(row.runs),
        "rehearsal": row.rehearsal,
        "rows": chosen and chosen.rows_evaluated,
        **scores,
        "eval_loss": chosen and chosen.summary.eval_loss_per_token,
        "other_tokens": chosen and chosen.other_tokens,
        **costs,
        **{f"train_loss_gap_{key}": getattr(row.gap, key, None) for key in ("mean", "largest", "step")},
        "train_loss_verdict": row.gap_verdict,
        "gpu_hours": row.gpu_hours,
        "differs": row.differs,
        "open": row.open,
    }


def _settings(of_study: Study, recipe: str, chosen: RunResult) -> tuple[list[str], list[str]]:
    """Stated settings that a run changed, and settings that the paper leaves open.

    For stated settings, see `Study.stated_settings`. A setting is open if study.yaml lists it as open and the paper
    does not state it. Each open setting is listed with the source of the run's value: the comment in the run's recipe
    or, if the run changed the setting, the source of the change.
    """
    run = chosen.run
    origin = of_study.origin(recipe)
    file = paths.recipe_file(origin)
    stated = of_study.stated_settings(origin)
    paper = yamlfiles.read_yaml(file)
    sources = yamlfiles.sources(paths.recipe_file(recipe))
    sources |= {merging.top_key(difference.key): difference.source.text for difference in run.differences}
    ours = chosen.config
    differs = [
        f"{key}: {_in_words(after)} instead of {_in_words(before)}"
        for key, (before, after) in merging.differences(paper, ours).items()
        if merging.top_key(key) in stated
    ]
    differs += departures(paper, ours)
    if run.ranks > 1:
        differs.append(f"GPUs: {run.ranks} instead of 1")
    left_open = [
        f"{key}: {_in_words(ours[key])} ({sources.get(key, 'Axolotl')})"
        for key in of_study.open_settings
        if key in ours and key not in stated
    ]
    published = of_study.published[origin]
    if published.trainer != "Axolotl":
        left_open.append(f"trainer: Axolotl (the paper used {published.trainer})")
    if "decoding" in of_study.open_settings:
        decoding = (chosen.evaluation.settings.decoding if chosen.evaluation else of_study.decoding).model_dump(
            exclude_defaults=True
        )
        left_open.append(f"decoding: {_in_words(decoding)} (the paper does not state it)")
    return differs, left_open


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(item)}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
