"""Print the results of runs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..base import tables
from ..base.files import Row
from ..base.tables import Table
from ..base.terminal import say
from ..data.studies import Study
from ..evaluate.scores_file import about_rows
from ..metrics import registry
from ..metrics.metric import Column
from ..run import backends
from ..run.rundir import RunDir, readable
from . import run_result
from .run_result import RunResult

AXOLOTL_EVAL_LOSS = "Axolotl's eval loss"  # shown without a loss per token
REHEARSALS = "Rehearsals (small stand-in model, few rows; not comparable with any published score)"
_BELOW = ("scored", "trouble", "changed", "variant of", "jobs", "predictions", "adapter", "not compared")


def show(folders: Sequence[RunDir], json: bool) -> None:
    """Print the results of runs."""
    found = [RunResult(folder, run) for folder, run in readable(folders, backends.read)]
    jobs = {result.folder.path: [*_jobs(result)] for result in found}
    if changed := [result.folder.path for result in found if result.changed]:
        say(f"evaluations that are stale or edited: {len(changed)}; for the last, run `recipe evaluate {changed[-1]}`")
    records = (run_result.record(result, jobs[result.folder.path]) for result in found)
    tables.show(json, records, _of_runs(found, jobs))


def _jobs(result: RunResult) -> Iterator[str]:
    """Yield a text like `evaluate: queued` for each unfinished job of a run."""
    trained = result.run.state == "finished"
    for step, done in {"prepare": trained, "run": trained, "evaluate": result.evaluation}.items():
        if not done and (state := backends.job_state(result.folder, step)):
            yield f"{step}: {state}"


def _of_runs(found: Sequence[RunResult], jobs: Mapping[Path, list[str]]) -> Iterator[Table]:
    """Tables of runs: one per study and, for runs of no study, one per set of metrics.

    Rehearsals have separate tables. After a study's real runs comes a table of its baselines: published scores of other
    methods.
    """
    for rehearsal in (False, True):
        groups: dict[str, list[RunResult]] = {}
        for result in (result for result in found if result.run.rehearsal == rehearsal):
            of_none = str({name: column.entry for name, column in result.columns.items()})
            groups.setdefault(result.study.folder.name if result.study else of_none, []).append(result)
        for group in groups.values():
            of_study = group[0].study
            declared = of_study.columns if of_study else {}
            shown = [*(of_study.table if of_study else group[0].columns).values()]
            for result in group:
                shown += [c for name, c in result.columns.items() if c.metric.of_model or name not in declared]
            columns = registry.distinct(shown)
            title = REHEARSALS if rehearsal else "Runs"
            if len(groups) > 1:
                title += f": {of_study.folder.name}" if of_study else ": of no study"
            yield Table([cells(result, columns, jobs[result.folder.path]) for result in group], title, below=_BELOW)
            if of_study and not rehearsal and not all(result.is_of_something_else for result in group):
                yield baselines(of_study)


def cells(result: RunResult, columns: Mapping[str, Column], jobs: Sequence[str]) -> Row:
    """Table cells of a run; only the first metric has a published score and a difference.

    Args:
        result: the run.
        columns: metrics by heading.
        jobs: descriptions of jobs that have not ended.
    """
    run, summary = result.run, result.summary
    scores = {
        heading: result.scores[column.name]
        for heading, column in columns.items()
        if column.same_scores(result.columns.get(column.name))
    }
    early = ", early stopping" if summary.ended == "early stopping" else ""
    kept = "" if summary.kept_step in (None, summary.step) else f", step {summary.kept_step} kept"
    losses = None
    if summary.eval_loss_per_token is not None:
        losses = f"{tables.text_of(summary.eval_loss_per_token_first)} → {tables.text_of(summary.eval_loss_per_token)}"
    first, *others = columns
    of_first = scores.get(first)
    row: Row = {
        "run": result.folder.path.name,
        "recipe": run.recipe,
        "state": run.state,
        "jobs": "; ".join(jobs) or None,
    }
    if of_first:
        row |= {
            first: of_first.value,
            **{f"{first}, {name}": value for name, value in of_first.decodings.items()},
            "base model": of_first.base_model,
        }
        if not run.rehearsal:
            row |= {"published": of_first.published and of_first.published.value, "difference": of_first.difference}
    row |= {
        "step": f"{summary.step}/{summary.max_steps or '?'}{early}{kept}",
        "eval loss": losses,
        AXOLOTL_EVAL_LOSS: None if losses else summary.eval_loss,
    }
    row |= {heading: scores[heading].value if heading in scores else None for heading in others}
    for heading, score in scores.items():
        if columns[heading].metric.of_model and score.gain is not None:
            row[f"{heading}, gained"] = score.gain
    return row | {
        "rows": result.rows_evaluated,
        "scored": about_rows(result.evaluation),
        "peak GiB": summary.peak_memory,
        "tokens/s": round(summary.tokens_per_second) if summary.tokens_per_second else None,
        "minutes": f"{summary.train_seconds / 60:.1f}",
        "predictions": result.changed,
        "adapter": run.published_adapter,
        "trouble": result.trouble,
        "not compared": result.other_tokens,
        "variant of": run.variant_of,
        "changed": ", ".join(result.changed_keys) or None,
    }


def baselines(of_study: Study) -> Table:
    """Table of a study's baselines, which are published scores of other methods."""
    rows = [
        {
            "baseline": baseline.name,
            **{column.label: baseline.scores.get(name) for name, column in of_study.table.items()},
            "on": baseline.test_set,
        }
        for baseline in of_study.compared
    ]
    return Table(rows, "To compare with")
