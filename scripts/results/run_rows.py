"""A run and what it reached as a row of a table."""

from collections.abc import Iterable
from typing import Any

from ..data import study
from ..runs import health
from ..runs.rundir import Run, RunDir
from ..scores.evaluations import changed, of_run, read_scores
from . import comparable


def row(folder: RunDir, run: Run, jobs: Iterable[str] = ()) -> dict[str, Any]:
    """A run and what it reached. Rehearsals are not compared with published scores.

    Args:
        folder: the run's folder.
        run: its record.
        jobs: its jobs that have not ended, in words.
    """
    own = of_run(folder.path, run)
    of_study = study.of_any(run.origin)
    summary = folder.summary(run)
    ended_by = run.launches[-1].problem if run.launches else None
    differing = [d.key for d in run.differences if not d.why.startswith(comparable.REHEARSED)] + run.axolotl_arguments
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
        "trouble": summary.trouble or (health.stalled(folder.metrics) if run.state == "running" else ended_by),
        "eval_loss_first": summary.eval_loss_per_token_first,
        "eval_loss": summary.eval_loss_per_token,
        "eval_loss_axolotl": summary.eval_loss,
        "rows_evaluated": own.scores.get("rows") if own else None,
        "test_set": own.settings.test_set if own else None,
        "generated_by": own.settings.engine if own else None,
        "evaluation": changed(folder.path, read_scores(folder.path), run),
        **comparable.scores(folder, run, own),
        "peak_memory_gib": summary.peak_memory,
        "memory_kind": summary.memory_kind,
        "other_base_model": None if run.rehearsal else comparable.other_model(run),
        "other_data": not run.rehearsal and comparable.other_data(run),
        "tokens_per_second": summary.tokens_per_second,
        "train_seconds": summary.train_seconds,
        "changed_keys": ", ".join(differing),
    }
