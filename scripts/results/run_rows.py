"""A run and its results as a row, and the scores and the curve that it may be compared with."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..configs import models
from ..data import manifest, study
from ..data.manifest import is_the_studys
from ..data.published import Published
from ..data.study import Study
from ..metrics.metric import Column
from ..runs.records import Run
from ..runs.rundir import RunDir
from ..scores import evaluations
from ..scores.columns import columns_of
from ..scores.evaluations import BASE_MODEL, Evaluation, changed, current, read_scores


def row(folder: RunDir, run: Run, jobs: Iterable[str] = ()) -> dict[str, Any]:
    """A run and what it reached. Rehearsals are not compared with published scores.

    Args:
        folder: the run's folder.
        run: its record.
        jobs: its jobs that have not ended, in words.
    """
    own = current(folder.path, run)
    of_study = study.of_any(run.origin)
    summary = folder.summary(run)
    ended_by = run.launches[-1].problem if run.launches else None
    differing = [d.key for d in run.differences if not d.why.startswith(REHEARSED)] + run.axolotl_arguments
    return {
        "run": str(folder.path),
        "recipe": run.recipe,
        "variant_of": run.variant_of,
        "study": of_study.folder.name if of_study else None,
        "rehearsal": run.rehearsal,
        "state": run.state,
        "published_adapter": run.published_adapter,
        "jobs": "; ".join(jobs) or None,
        "step": summary.step,
        "steps": summary.max_steps,
        "ended": summary.ended,
        "kept_step": summary.kept_step,
        "trouble": summary.trouble or ended_by,
        "eval_loss_first": summary.eval_loss_per_token_first,
        "eval_loss": summary.eval_loss_per_token,
        "eval_loss_axolotl": summary.eval_loss,
        "rows_evaluated": own.scores.get("rows") if own else None,
        "test_set": own.settings.test_set if own else None,
        "generated_by": own.settings.engine if own else None,
        "evaluation": changed(folder.path, read_scores(folder.path), run),
        **scores(folder, run, own),
        "peak_memory_gib": summary.peak_memory,
        "memory_kind": summary.memory_kind,
        "other_base_model": None if run.rehearsal else other_model(run),
        "other_data": not run.rehearsal and other_data(run),
        "tokens_per_second": summary.tokens_per_second,
        "train_seconds": summary.train_seconds,
        "changed_keys": ", ".join(differing),
    }


REHEARSED = ("profile rehearsal", "rehearsal: ")  # the reasons for what every rehearsal changes
_ALIKE = {"data_sha256", "rows", "decoding"}  # settings of two evaluations that may be compared


def columns(run: Run, own: Evaluation | None) -> dict[str, Column]:
    """What a run is scored with: its study's metrics, and those that it was evaluated with beside them."""
    recorded = own.columns if own else {}
    of_study = study.of_any(run.origin)
    declared = of_study.columns if of_study else {}
    return declared | {name: recorded[name] for name in recorded if name not in declared} or columns_of()


def value(column: Column, own: Evaluation | None, loss: float | None) -> float | None:
    """A run's score by an evaluation, or by its eval loss where the metric is of that; None also where it was scored
    before the metric was declared as it is now."""
    if column.metric.of_loss:
        return None if loss is None else column.metric.of_loss(loss)
    return own.scores.get(column.name) if own and column.same_scores(own.columns.get(column.name)) else None


def scores(folder: RunDir, run: Run, own: Evaluation | None) -> dict[str, Any]:
    """A run's scores, NAME each, and what they compare with: NAME_base_model, the base model's without adapter;
    NAME_published; and NAME_difference from that, where the two compare. NAME_DECODING is that by one of the study's
    further decodings.

    Args:
        folder: the run's folder.
        run: its record.
        own: the evaluation of its adapter.
    """
    base = of_base_model(folder, own)
    aimed = aim(run)
    loss = folder.summary(run).eval_loss_per_token
    others = decoded(folder, run, own)
    row: dict[str, Any] = {}
    for name, column in columns(run, own).items():
        ours = value(column, own, loss)
        published = aimed.scores.get(name) if aimed else None
        compared = published and ours is not None and comparable(own, run, column)
        row |= {
            name: ours,
            f"{name}_base_model": value(column, base, None),
            f"{name}_published": published.value if published else None,
            f"{name}_difference": ours - published.value if compared and published and ours is not None else None,
        }
        if not column.metric.of_loss:
            row |= {f"{name}_{decoding}": value(column, other, None) for decoding, other in others.items()}
    return row


def decoded(folder: RunDir, run: Run, own: Evaluation | None) -> dict[str, Evaluation | None]:
    """The evaluations of a run's adapter by its study's further decodings, by name; None where there is none."""
    of_study = study.of_any(run.origin)
    declared = of_study.decodings if of_study else {}
    return {name: evaluations.decoded(folder.path, name, decoding, own) for name, decoding in declared.items()}


def of_base_model(folder: RunDir, own: Evaluation | None) -> Evaluation | None:
    """The evaluation of a run's base model alone; None where it is of other rows, or decoded otherwise, than `own`."""
    base = current(folder.path / "evaluations" / BASE_MODEL)
    alike = not (own and base) or own.settings.model_dump(include=_ALIKE) == base.settings.model_dump(include=_ALIKE)
    return base if alike else None


def aim(run: Run) -> Published | None:
    """What was published of that which a run tries for; a rehearsal, or a run of something else, tries for none."""
    of_study = study.of_any(run.origin)
    return of_study.aimed_at(run.origin) if of_study and not run.rehearsal and not of_something_else(run) else None


def other_model(run: Run) -> str | None:
    """The base model of a run that is neither its recipe's nor a copy of that on the hub."""
    changed = next((difference for difference in run.from_origin if difference.key == "base_model"), None)
    return str(changed.run) if changed and not models.is_copy(changed.run, changed.recipe) else None


def other_data(run: Run) -> bool:
    """Whether a run trains on other rows than its recipe: at another place, and not known there as the study's."""
    moved = any(d.key.startswith("datasets") and d.key.endswith("path") for d in run.from_origin)
    known = [entry for entry in manifest_entries(run) if is_the_studys(entry)]
    return moved and not 0 < len(run.data) == len(known)


def manifest_entries(run: Run) -> list[dict[str, Any]]:
    """What the manifests of `recipe data prepare` say of a run's data files, which they identify by their hash."""
    return [
        entry
        for file in run.data
        for entry in manifest.entries(Path(run.cwd, file.path).parent).values()
        if entry.get("sha256") == file.sha256
    ]


def of_something_else(run: Run) -> bool:
    """Whether a run is on another base model or other data than its recipe, so that no published score concerns it."""
    return bool(other_model(run)) or other_data(run)


def comparable(own: Evaluation | None, run: Run, column: Column) -> bool:
    """Whether a run's score compares with a published one: it is finished, and evaluated on exactly the rows, with the
    decoding and with the metric of that; its eval loss needs no evaluation."""
    of_study = study.of_any(run.origin)
    if not of_study or run.state != "finished" or run.rehearsal or of_something_else(run):
        return False
    return column.metric.of_loss is not None or bool(
        own
        and column.same_scores(own.columns.get(column.name))
        and own.settings.limit is None
        and own.settings.test_set == of_study.data.test_set
        and own.settings.decoding == of_study.decoding
    )


Point = tuple[int, float]  # a step, and the mean loss of the steps since the point before


def published_curve(of_study: Study, of_recipe: Published) -> list[Point]:
    """The published curve of a recipe; none where it has none.

    Raises:
        UserError: its file is not a CSV file with numbers in the columns step and train_loss.
    """
    if not of_recipe.curve:
        return []
    file = of_study.folder / of_recipe.curve
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return [(int(row["step"]), float(row["train_loss"])) for row in csv.DictReader(stream)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        problem = f"expected the columns step and train_loss with a number in each row ({error!r:.60})"
        raise UserError(f"{file}: {problem}") from None


def gap(ours: Sequence[Point], curve: Sequence[Point]) -> dict[str, float | int | None]:
    """How far a run's points lie from those of a curve at the same steps: `mean`, ours less theirs; `largest`, of the
    absolute values, and the `step` with that. None where there is no point."""
    theirs = dict(curve)
    gaps = {step: loss - theirs[step] for step, loss in ours}
    furthest = max(gaps, key=lambda step: abs(gaps[step]), default=None)
    return {
        "mean": sum(gaps.values()) / len(gaps) if gaps else None,
        "largest": None if furthest is None else abs(gaps[furthest]),
        "step": furthest,
    }


def over_the_same_steps(metrics: Iterable[Mapping[str, Any]], curve: Sequence[Point]) -> list[Point]:
    """A run's training loss at the steps of a curve: the mean since the step before; without those it has not reached.

    Args:
        metrics: the run's records by step.
        curve: the published points.
    """
    losses = [(record["step"], record["loss"]) for record in metrics if record.get("loss") is not None]
    last = max((step for step, _ in losses), default=0)
    points = []
    for before, step in pairwise([0, *(step for step, _ in curve)]):
        within = [loss for at, loss in losses if before < at <= step]
        if within and step <= last:
            points.append((step, sum(within) / len(within)))
    return points
