"""The scores of a run, and what they may be compared with: its base model, and what was published."""

from pathlib import Path
from typing import Any

from ..configs import models
from ..data import manifest, study
from ..data.manifest import is_the_studys
from ..data.published import Published
from ..metrics.metric import Column
from ..runs.rundir import Run, RunDir
from ..scores import evaluations
from ..scores.columns import columns_of
from ..scores.evaluations import BASE_MODEL, Evaluation, current

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
