"""A run and what it reached as a row of a table, and what it may be compared with."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..base.files import read_json
from ..configs import models
from ..data import study
from ..data.codereviewer import MANIFEST
from ..runs.rundir import Run, RunDir
from ..scores.evaluations import BASE_MODEL, Evaluation, of_run, read_scores
from ..scores.metrics import METRICS

REHEARSED = ("profile rehearsal", "rehearsal: ")  # the reasons for what every rehearsal changes
_ALIKE = {"data_sha256", "rows", "decoding"}  # settings of two evaluations that may be compared


def row(folder: RunDir, run: Run, jobs: Iterable[str] = ()) -> dict[str, Any]:
    """A run and what it reached. Rehearsals are not compared with published scores.

    Args:
        folder: the run's folder.
        run: its record.
        jobs: its jobs that have not ended, in words.
    """
    own = of_run(folder.path, run)
    base = of_base_model(folder, own)
    published = aim(run)
    summary = folder.summary(run)
    scores: dict[str, Any] = own.scores if own else {}
    difference = None
    if published and own and "bleu4" in scores and comparable(own, run):
        difference = scores["bleu4"] - published.bleu4
    changed = [d.key for d in run.differences if not d.why.startswith(REHEARSED)] + run.axolotl_arguments
    return {
        "run": str(folder.path),
        "recipe": run.recipe,
        "variant_of": run.variant_of,
        "rehearsal": run.rehearsal,
        "state": run.state,
        "jobs": "; ".join(jobs) or None,
        "step": summary.step,
        "steps": summary.max_steps,
        "ended": summary.ended,
        "eval_loss_first": summary.eval_loss_per_token_first,
        "eval_loss": summary.eval_loss_per_token,
        "eval_loss_axolotl": summary.eval_loss,
        "rows_evaluated": scores.get("rows"),
        "test_set": own.settings.test_set if own else None,
        "bleu4": scores.get("bleu4"),
        "bleu4_base_model": base.scores["bleu4"] if base else None,
        "bleu4_published": published.bleu4 if published else None,
        "bleu4_difference": difference,
        **{name: scores.get(name) for name in sorted(METRICS)},
        "peak_memory_gib": summary.peak_memory,
        "memory_kind": summary.memory_kind,
        "other_base_model": None if run.rehearsal else other_model(run),
        "other_data": not run.rehearsal and other_data(run),
        "tokens_per_second": summary.tokens_per_second,
        "train_seconds": summary.train_seconds,
        "changed_keys": ", ".join(changed),
    }


def of_base_model(folder: RunDir, own: Evaluation | None) -> Evaluation | None:
    """The evaluation of a run's base model alone; None where it is of other rows, or decoded otherwise, than `own`."""
    base = read_scores(folder.path / "evaluations" / BASE_MODEL)
    alike = not (own and base) or own.settings.model_dump(include=_ALIKE) == base.settings.model_dump(include=_ALIKE)
    return base if alike else None


def aim(run: Run) -> study.Scores | None:
    """The published scores that a run tries for; a rehearsal, or a run of something else, tries for none."""
    of_study = study.of(run.origin)
    return of_study.aimed_at(run.origin) if of_study and not run.rehearsal and not of_something_else(run) else None


def other_model(run: Run) -> str | None:
    """The base model of a run that is neither its recipe's nor a copy of that on the hub."""
    changed = next((difference for difference in run.differences if difference.key == "base_model"), None)
    return str(changed.run) if changed and not models.is_copy(changed.run, changed.recipe) else None


def other_data(run: Run) -> bool:
    """Whether a run trains on other rows than its recipe: at another place, and not known there as the study's."""
    moved = any(d.key.startswith("datasets") and d.key.endswith("path") for d in run.differences)
    known = [entry for entry in manifest_entries(run) if entry.get("is_the_study_file")]
    return moved and not 0 < len(run.data) == len(known)


def manifest_entries(run: Run) -> list[dict[str, Any]]:
    """What the manifests of `recipe data prepare` say of a run's data files, which they identify by their hash."""
    return [
        entry
        for file in run.data
        for entry in read_json(Path(run.cwd, file.path).with_name(MANIFEST)).get("splits", {}).values()
        if entry.get("sha256") == file.sha256
    ]


def of_something_else(run: Run) -> bool:
    """Whether a run is on another base model or other data than its recipe, so that no published score concerns it."""
    return bool(other_model(run)) or other_data(run)


def comparable(scored: Evaluation, run: Run) -> bool:
    """Whether an evaluation is of a finished run, on exactly the rows and with the decoding of the published scores."""
    of_study = study.of(run.origin)
    settings = scored.settings
    return bool(
        of_study
        and run.state == "finished"
        and not run.rehearsal
        and not of_something_else(run)
        and settings.limit is None
        and settings.test_set == of_study.data.scored_on
        and settings.decoding == of_study.decoding
    )
