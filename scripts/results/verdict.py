"""A study's runs beside its published scores: the rows of `recipe results STUDY`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..base import paths, yamlfiles
from ..configs import config, datafiles
from ..configs.compose import REHEARSAL, TRACKERS
from ..configs.numerics import departures
from ..data.published import TRAIN_LOSS, Measured, Published, PublishedScore
from ..data.study import Study
from ..metrics.metric import Column
from ..scores import intervals
from ..scores.score import model_record
from . import repeats, run_rows
from .run_rows import RunResult

GIB = 1 << 30
WITHIN, ACCEPTABLE, OFF = "within the interval", "acceptable", "off"


def verdict(
    ours: float, interval: Sequence[float] | None, published: PublishedScore, tolerance: float | None = None
) -> str | None:
    """How a score of ours compares with a published one.

    It is within the interval where our 95 % interval and the published value, with its ± if it has one, have a value in
    common; without an interval of ours, where that is within the ±. Else it is acceptable if it is nearer than the
    study's tolerance. None where there is neither an interval nor a ± nor a tolerance, so that nothing says how near
    is near enough.
    """
    spread = published.spread
    if interval is None and spread is None and tolerance is None:
        return None
    low, high = interval or (ours, ours)
    least, most = published.value - (spread or 0), published.value + (spread or 0)
    if (interval or spread is not None) and low <= most and least <= high:
        return WITHIN
    return ACCEPTABLE if tolerance is not None and abs(ours - published.value) <= tolerance else OFF


def rows(
    of_study: Study, runs: Path, rehearsal: bool, representatives: Mapping[str, Path | None] | None = None
) -> list[dict[str, Any]]:
    """For each of a study's recipes its representative run, or none, and how its score compares.

    The run is the newest that was evaluated; a finished one, and one without overrides, is preferred. A run on another
    base model or on other data represents no recipe. Rehearsals are never mixed with real runs, and compared with
    nothing; a recipe without a rehearsal has no row among them.

    Args:
        of_study: the study.
        runs: the folder with the runs.
        rehearsal: whether it is about rehearsals.
        representatives: for some recipes, the folder of the representative run, or None for none.
    """
    all_runs = repeats.usable(runs, rehearsal)
    candidates = [
        each for each in all_runs if (representatives or {}).get(each.run.recipe, each.folder.path) == each.folder.path
    ]
    table = []
    for recipe in [*of_study.published, *of_study.variants]:
        of_recipe = [candidate for candidate in candidates if candidate.run.recipe == recipe]
        if of_recipe or (recipe in of_study.published and not rehearsal):
            chosen = max(of_recipe, key=_preference, default=None)
            found = repeats.of(chosen, all_runs) if chosen else []
            table.append(study_row(of_study, recipe, found, rehearsal))
    return table


def _preference(result: RunResult) -> tuple[bool, bool, bool, bool, bool, str]:
    """Order of preference among a recipe's runs: trained here, finished and evaluated, plain, of its seed, new
    ones last."""
    run, evaluated = result.run, result.is_scored
    changed = [text for text in run.overrides if not text.startswith(f"{repeats.SEED}=")]
    plain = not changed and not set(run.profiles) - {REHEARSAL, *TRACKERS} and not run.axolotl_arguments
    own_seed = all(difference.key != repeats.SEED for difference in run.differences)
    done = run.state == "finished" and evaluated
    return not run.published_adapter, done, evaluated, plain and run.ranks == 1, own_seed, result.folder.path.name


def study_row(of_study: Study, recipe: str, found: Sequence[RunResult], rehearsal: bool) -> dict[str, Any]:
    """A run's results beside what was published; its scores are means over it and those that repeat it.

    Args:
        of_study: the study.
        recipe: one of its recipes.
        found: its representative run, and repeats of that; none where it was not run.
        rehearsal: whether these are rehearsals.

    Returns:
        `runs`, how many the means are over; for each metric NAME, NAME_low and NAME_high, its interval, and
        NAME_interval_method, what that knows; NAME_base_model, NAME_published, with NAME_spread as its ±,
        NAME_difference and NAME_verdict, see `verdict`; NAME_DECODING by a further decoding; `verdict`, that of the
        study's first metric; the gain over each baseline in percent; of the run itself costs, and the loss of the last
        stretch of steps that the published curve has, each with _published, how far it lies from that curve, see
        `run_rows.gap`, and `train_loss_verdict`; `differs`, the settings that the paper states and the run changed; and
        `open`, those that the paper leaves open, with the run's values.
    """
    chosen = found[0] if found else None
    ours = run_rows.row(chosen) if chosen else {}
    aim = None if rehearsal else of_study.aimed_at(recipe)
    first = of_study.first
    compared = bool(chosen and ours[first.name] is not None and chosen.is_comparable(first))
    by_metric: dict[str, Any] = {}
    for column in of_study.columns.values():
        by_metric |= _scores(of_study, column, found, ours, aim)
    differs, left_open = _settings(of_study, recipe, chosen) if chosen and not rehearsal else ([], [])
    return {
        "recipe": recipe,
        "run": ours.get("run"),
        "state": ours.get("state"),
        "published_adapter": ours.get("published_adapter"),
        "runs": len(found),
        "rehearsal": rehearsal,
        "rows": ours.get("rows_evaluated"),
        "test_set": ours.get("test_set"),
        "generated_by": ours.get("generated_by"),
        **by_metric,
        "verdict": by_metric[f"{first.name}_verdict"],
        "gains_percent": _gains(of_study, by_metric, compared),
        "eval_loss": ours.get("eval_loss"),
        **_costs(of_study, chosen, ours, aim),
        "differs": differs,
        "open": left_open,
    }


def _costs(of_study: Study, chosen: RunResult | None, ours: Mapping[str, Any], aim: Published | None) -> dict[str, Any]:
    """What a run took and how its loss ended, beside what was published of that."""
    measured = aim.measured if aim else Measured()
    on_gpu = str(ours.get("memory_kind")).startswith("GPU")
    curve = run_rows.published_curve(of_study, aim) if aim else []
    own = run_rows.over_the_same_steps(chosen.folder.read_metrics(), curve) if chosen and curve else []
    gap = run_rows.gap(own, curve)
    tolerance, furthest = of_study.tolerances.get(TRAIN_LOSS, math.inf), gap["largest"] or 0
    judged = ours.get("state") == "finished" and gap["step"] is not None and TRAIN_LOSS in of_study.tolerances
    gib = measured.reserved_bytes / GIB if measured.reserved_bytes else None
    return {
        "train_loss": own[-1][1] if own and own[-1][0] == curve[-1][0] else None,
        "train_loss_published": curve[-1][1] if curve else None,
        **{f"train_loss_gap_{key}": value for key, value in gap.items()},
        "train_loss_verdict": (ACCEPTABLE if furthest <= tolerance else OFF) if judged else None,
        "trainable": chosen.summary.trainable_parameters if chosen else None,
        "trainable_published": measured.trainable,
        "peak_gpu_memory_gib": ours.get("peak_memory_gib") if on_gpu else None,
        "peak_gpu_memory_gib_published": gib,
        "tokens_per_second": ours.get("tokens_per_second"),
        "tokens_per_second_published": measured.tokens_per_second,
        "train_seconds": ours.get("train_seconds"),
        "train_seconds_published": measured.train_seconds,
        "gpu_hours": chosen.summary.train_seconds * chosen.run.ranks / 3600 if chosen and on_gpu else None,
    }


def _scores(
    of_study: Study, column: Column, found: Sequence[RunResult], ours: Mapping[str, Any], aim: Published | None
) -> dict[str, Any]:
    """What a row of the study says of one metric."""
    name = column.name
    reached = repeats.scores(column, found)
    values = [value for _, value in reached]
    known = [] if ours.get("rehearsal") or not found else of_study.repeats(found[0].run.origin, name)
    mean = fmean(values) if reached else None
    within = repeats.interval(name, [result for result, _ in reached], values, known) if reached else None
    published = aim.scores.get(name) if aim else None
    compared = published is not None and mean is not None and ours.get(f"{name}_difference") is not None
    others = [result.scores() for result in found] if of_study.decodings else []
    model = model_record(column, found[0].evaluation.scores) if found and found[0].evaluation else None
    return {
        name: mean,
        f"{name}_low": within.low if within else None,
        f"{name}_high": within.high if within else None,
        f"{name}_interval_method": within.method if within else None,
        f"{name}_base_model": ours.get(f"{name}_base_model"),
        f"{name}_published": published.value if published else None,
        f"{name}_spread": published.spread if published else None,
        f"{name}_difference": mean - published.value if published and mean is not None and compared else None,
        f"{name}_verdict": verdict(
            mean, [within.low, within.high] if within else None, published, of_study.tolerances.get(name)
        )
        if published and mean is not None and compared
        else None,
        **({f"{name}_model": model and model.get("model")} if column.metric.judged else {}),
        **{f"{name}_{decoding}": _mean(others, f"{name}_{decoding}") for decoding in of_study.decodings},
    }


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The mean of what some rows have; None where none has it."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return fmean(values) if values else None


def _gains(of_study: Study, ours: Mapping[str, Any], compared: bool) -> dict[str, float | None]:
    """How much higher than each baseline a score by the study's first metric is, in percent of that."""
    name = of_study.first.name
    baselines = {
        baseline.name: baseline.scores[name].value for baseline in of_study.compared if name in baseline.scores
    }
    return {label: 100 * (ours[name] / value - 1) if compared else None for label, value in baselines.items()}


def _settings(of_study: Study, recipe: str, chosen: RunResult) -> tuple[list[str], list[str]]:
    """The settings that the paper states and a run changed, and those that it leaves open, with the run's values.

    The comment behind a setting in the study's own recipe says which of the two it is; the source of the run's value is
    the comment in its recipe, or the reason for the difference from that.
    """
    run = chosen.run
    origin = of_study.origin(recipe)
    file = paths.recipe_file(origin)
    of_paper, comment_prefixes = yamlfiles.sources(file), tuple(of_study.comment_prefixes)
    paper = yamlfiles.read_yaml(file)
    sources = yamlfiles.sources(paths.recipe_file(recipe))
    sources |= {difference.key.partition(".")[0]: difference.why for difference in run.differences}
    ours = yamlfiles.read_yaml(chosen.folder.config)
    differs = [
        f"{key}: {_in_words(after)} instead of {_in_words(before)}"
        for key, (before, after) in config.differences(paper, ours).items()
        if of_paper.get(key.partition(".")[0], "").startswith(comment_prefixes)
    ]
    differs += departures(paper, ours)
    if run.ranks > 1:
        rows = run.ranks * datafiles.effective_batch(ours)
        of_paper_rows = datafiles.effective_batch(paper)
        steps = "" if rows == of_paper_rows else f", with steps of {rows:g} rows instead of {of_paper_rows:g}"
        differs.append(f"GPUs: {run.ranks} instead of 1{steps}")
    left_open = [
        f"{key}: {_in_words(ours[key])} ({sources.get(key, 'Axolotl')})"
        for key in of_study.open_settings
        if key in ours and not of_paper.get(key, "").startswith(comment_prefixes)
    ]
    published = of_study.published[origin]
    if published.trainer != "Axolotl":
        left_open.append(f"trainer: Axolotl (the paper used {published.trainer})")
    if "decoding" in of_study.open_settings:
        decoding = (chosen.evaluation.settings.decoding if chosen.evaluation else of_study.decoding).model_dump(
            exclude_defaults=True
        )
        left_open.append(f"decoding: {_in_words(decoding)} (the paper gives none)")
    return differs, left_open


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(item)}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def notes(of_study: Study, rows: list[dict[str, Any]]) -> Iterator[str]:
    """The lines under the tables: what Axolotl does otherwise than the authors, how to read the verdicts, where a run
    departs from the paper, and what may explain a score that is off."""
    for difference in of_study.differences:
        yield f"All recipes: {difference}"
    yield from _of_intervals(of_study, rows)
    for full in rows:
        if full["published_adapter"]:
            yield f"{full['recipe']}: scores of the adapter {full['published_adapter']}, which was not trained here."
    for full in rows:
        if full["differs"]:
            yield f"{full['recipe']} differs from the paper: {'; '.join(full['differs'])}"
        judged_by = {c.label: full[f"{name}_verdict"] for name, c in of_study.columns.items()}
        judged_by["training loss"] = full["train_loss_verdict"]
        if off := [label for label, found in judged_by.items() if found == OFF]:
            of_which = "" if off == [of_study.first.label] else f" in {' and '.join(off)}"
            yield f"{full['recipe']} is off{of_which}, and the paper leaves open: {'; '.join(full['open'])}"


def _of_intervals(of_study: Study, rows: list[dict[str, Any]]) -> Iterator[str]:
    """What the intervals behind the verdicts do not know, and how to have it known."""
    methods = [
        method
        for full in rows
        for name in of_study.columns
        if full[f"{name}_verdict"] and (method := full[f"{name}_interval_method"])
    ]
    if several := [full["recipe"] for full in rows if full["runs"] > 1]:
        yield f"Scores are means of runs that differ at most in their seed: of {', '.join(several)}."
    seeds = f"`recipe reproduce {of_study.folder.name} --seeds 3` runs each recipe with three seeds"
    if any(method == intervals.ROWS_ONLY or method.endswith(repeats.ONE_SEED) for method in methods):
        yield f"An interval of {intervals.ROWS_ONLY}, or of one seed, knows nothing of other seeds: {seeds}."
    if any(intervals.BORROWED in method for method in methods):
        yield f"A borrowed spread is that of repeats which the authors published, not of our runs: {seeds}."
