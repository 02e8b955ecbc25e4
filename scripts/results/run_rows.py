"""A run and its results as a row, and the scores and the curve that it may be compared with."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from ..runs.records import Run, Summary
from ..runs.rundir import RunDir
from ..scores import evaluations
from ..scores.evaluations import BASE_MODEL, Evaluation, changed, current, read_scores
from ..scores.score import columns_of

REHEARSED = ("profile rehearsal", "rehearsal: ")  # the reasons for what every rehearsal changes
_ALIKE = {"data_sha256", "rows", "decoding"}  # settings of two evaluations that may be compared


@dataclass(frozen=True)
class RunResult:
    """A run, and the evaluations of it that are current."""

    folder: RunDir
    run: Run

    @cached_property
    def study(self) -> Study | None:
        return study.of_any(self.run.origin)

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """The evaluation of its adapter."""
        return current(self.folder.path, self.run)

    @property
    def is_scored(self) -> bool:
        """Whether its scores are there: it is evaluated, or all of them are of the eval loss."""
        return self.evaluation is not None or (self.study is not None and not self.study.generates)

    @cached_property
    def base_evaluation(self) -> Evaluation | None:
        """The evaluation of its base model alone; None where that is of other rows, or decoded otherwise."""
        base, own = current(self.folder.path / "evaluations" / BASE_MODEL), self.evaluation
        if own and base and own.settings.model_dump(include=_ALIKE) != base.settings.model_dump(include=_ALIKE):
            return None
        return base

    @cached_property
    def decoded(self) -> dict[str, Evaluation | None]:
        """The evaluations of its adapter by further decodings of its study, by name; None where there is none."""
        declared = self.study.decodings if self.study else {}
        return {name: evaluations.decoded(self.folder.path, name, d, self.evaluation) for name, d in declared.items()}

    @cached_property
    def columns(self) -> dict[str, Column]:
        """What it is scored with: its study's metrics, and those that it was evaluated with beside them."""
        recorded = self.evaluation.columns if self.evaluation else {}
        declared = self.study.columns if self.study else {}
        return declared | {name: recorded[name] for name in recorded if name not in declared} or columns_of()

    @cached_property
    def summary(self) -> Summary:
        return self.folder.summary(self.run)

    def score(self, column: Column) -> float | None:
        """Its score by a metric; None also where it was scored before the metric was declared as it is now."""
        return value(column, self.evaluation, self.summary.eval_loss_per_token)

    def is_comparable(self, column: Column) -> bool:
        """True if a score compares with a published one: the run is finished, and evaluated on exactly the rows, with
        the decoding and with the metric of that; its eval loss needs no evaluation."""
        run, own = self.run, self.evaluation
        if not self.study or run.state != "finished" or run.rehearsal or of_something_else(run):
            return False
        return column.metric.of_loss is not None or bool(
            own
            and column.same_scores(own.columns.get(column.name))
            and own.settings.limit is None
            and own.settings.test_set == self.study.data.test_set
            and own.settings.decoding == self.study.decoding
        )

    def scores(self) -> dict[str, Any]:
        """Its scores, NAME each, and what they compare with: NAME_base_model, the base model's without adapter;
        NAME_published; and NAME_difference from that, where the two compare. NAME_DECODING is that by one of the
        study's further decodings."""
        aimed = aim(self.run)
        scores: dict[str, Any] = {}
        for name, column in self.columns.items():
            ours, published = self.score(column), aimed.scores.get(name) if aimed else None
            difference = ours - published.value if published and ours is not None else None
            scores |= {
                name: ours,
                f"{name}_base_model": value(column, self.base_evaluation, None),
                f"{name}_published": published.value if published else None,
                f"{name}_difference": difference if self.is_comparable(column) else None,
            }
            if not column.metric.of_loss:
                scores |= {f"{name}_{decoding}": value(column, other, None) for decoding, other in self.decoded.items()}
        return scores


def row(result: RunResult, jobs: Iterable[str] = ()) -> dict[str, Any]:
    """A run and what it reached, with its `jobs` that have not ended, in words. Rehearsals are not compared with
    published scores."""
    folder, run, own, summary = result.folder, result.run, result.evaluation, result.summary
    ended_by = run.launches[-1].problem if run.launches else None
    differing = [d.key for d in run.differences if not d.why.startswith(REHEARSED)] + run.axolotl_arguments
    return {
        "run": str(folder.path),
        "recipe": run.recipe,
        "variant_of": run.variant_of,
        "study": result.study.folder.name if result.study else None,
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
        **result.scores(),
        "peak_memory_gib": summary.peak_memory,
        "memory_kind": summary.memory_kind,
        "other_base_model": None if run.rehearsal else other_model(run),
        "other_data": not run.rehearsal and other_data(run),
        "tokens_per_second": summary.tokens_per_second,
        "train_seconds": summary.train_seconds,
        "changed_keys": ", ".join(differing),
    }


def value(column: Column, own: Evaluation | None, loss: float | None) -> float | None:
    """A run's score by an evaluation, or by its eval loss where the metric is of that; None also where it was scored
    before the metric was declared as it is now."""
    if column.metric.of_loss:
        return None if loss is None else column.metric.of_loss(loss)
    return own.scores.get(column.name) if own and column.same_scores(own.columns.get(column.name)) else None


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
