"""Print the results of runs."""

from collections.abc import Iterator, Mapping, Sequence

from ..base import tables
from ..base.files import Row
from ..base.tables import Table
from ..base.terminal import say
from ..evaluate.scores_file import Evaluation, about_rows
from ..metrics import registry
from ..metrics.metric import Column
from ..metrics.registry import EVAL_LOSS
from ..run import backends
from ..run.rundir import RunDir, readable
from ..training.run_record import Summary
from .run_result import RunResult, RunScore

AXOLOTL_EVAL_LOSS = "Axolotl's eval loss"  # shown without a loss per token
REHEARSALS = "Rehearsals (small model, few rows; not comparable with any published score)"
_FILES = "GGUF files, each below the adapter that it was made of; a quantized file is not refused for its KL"
_BELOW = (
    *("scored", "trouble", "changed", "variant of", "jobs", "predictions", "adapter", "not compared", "recipe file"),
    "trackers",
)


def show(folders: Sequence[RunDir], json: bool) -> None:
    """Print the results of runs."""
    results = [RunResult(folder, run) for folder, run in readable(folders, backends.read)]
    changed = [result.folder.quoted for result in results if result.changed]
    if changed:
        say(f"evaluations that are stale or edited: {len(changed)}; for the last, run `recipe evaluate {changed[-1]}`")
    records = (record(result) for result in results)
    tables.show(json, records, _tables(results))


def record(result: RunResult) -> Row:
    """JSON fields of a run and its results."""
    run, summary = result.run, result.summary
    row: Row = {
        "run": str(result.folder.path),
        "recipe": run.recipe,
        "variant_of": run.variant_of,
        "study": result.study and result.study.folder.name,
        "rehearsal": run.rehearsal,
        "state": run.state,
        "published_adapter": run.published_adapter,
        "jobs": _jobs(result),
    }
    row |= {
        "step": summary.step,
        "steps": summary.max_steps,
        "ended": summary.ended,
        "kept_step": summary.kept_step,
        "trouble": result.trouble,
        "eval_loss_first": summary.eval_loss_per_token_first,
        "eval_loss": summary.eval_loss_per_token,
        "eval_loss_axolotl": summary.eval_loss,
        "eval_tokens": summary.eval_tokens,
        "incomparable_loss": result.incomparable_loss,
    }
    row |= _evaluation_fields(result)
    for name, score in result.scores.items():
        row |= score.as_json(name)
    return row | {
        "peak_memory_gib": summary.peak_memory,
        "memory_kind": summary.memory_kind,
        "other_base_model": result.other_model,
        "other_data": result.other_data,
        "tokens_per_second": summary.tokens_per_second,
        "train_seconds": summary.train_seconds,
        "changed": result.changes,
        "recipe_note": run.recipe_note,
        "tracked": summary.tracked,
    }


def _evaluation_fields(result: RunResult) -> Row:
    """JSON fields of the evaluation, without scores."""
    total = also_trained = test_set = None
    if result.evaluation:
        total = result.evaluation.settings.total_rows
        also_trained = result.evaluation.also_trained
        test_set = result.evaluation.settings.test_set
    return {
        "rows_evaluated": result.rows_evaluated,
        "rows_total": total,
        "rows_also_trained": also_trained,
        "test_set": test_set,
        "evaluation": result.changed,
        "files": [_file_fields(result, evaluation) for evaluation in result.served],
    }


def _file_fields(result: RunResult, evaluation: Evaluation) -> Row:
    """JSON fields of the evaluation of a GGUF file."""
    settings = evaluation.settings
    row = {"rows_evaluated": settings.rows}
    for part in (settings.file, settings.distance):
        row |= part.model_dump() if part else {}
    return row | result.scores_in(evaluation)


def _jobs(result: RunResult) -> str | None:
    """Unfinished jobs of a run, such as `evaluate: queued`."""
    is_trained = result.run.state == "finished"
    jobs = []
    for step, is_done in {"prepare": is_trained, "run": is_trained, "evaluate": result.evaluation}.items():
        state = None if is_done else backends.job_state(result.folder, step)
        if state:
            jobs.append(f"{step}: {state}")
    return "; ".join(jobs) or None


def _tables(results: Sequence[RunResult]) -> Iterator[Table]:
    """Tables of the runs of each study, and of runs of no study; rehearsals have separate tables."""
    for title, group in _groups(results).items():
        columns = _columns(group)
        yield Table([cells(result, columns) for result in group], title, below=_BELOW)
        yield Table([*_files(group, columns)], _FILES)


def _groups(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Runs by the title of their table, the rehearsals last."""
    groups: dict[str, list[RunResult]] = {}
    for result in sorted(results, key=lambda result: result.run.rehearsal):
        kind = REHEARSALS if result.run.rehearsal else "Runs"
        name = result.study.folder.name if result.study else "of no study"
        groups.setdefault(f"{kind}: {name}", []).append(result)
    return groups


def _columns(group: Sequence[RunResult]) -> dict[str, Column]:
    """Metrics of a group's table, by heading: those of the study's tables, and additional metrics."""
    study = group[0].study
    declared = {}
    shown: list[Column] = []
    if study:
        declared = study.columns
        shown += study.table.values()
    for result in group:
        shown += [column for name, column in result.columns.items() if name not in declared]
    return registry.distinct(shown)


def cells(result: RunResult, columns: Mapping[str, Column]) -> Row:
    """Table cells of a run; only the first metric has a published score and a difference.

    Args:
        result: the run.
        columns: metrics by heading.
    """
    run, summary = result.run, result.summary
    if result.study is None:  # the course of the eval loss has a cell of its own
        columns = {heading: column for heading, column in columns.items() if column.metric != EVAL_LOSS} or columns
    scores = {heading: _score(result, column) for heading, column in columns.items()}
    first, *further = columns
    row: Row = {
        "run": result.folder.path.name,
        "recipe": run.recipe,
        "state": run.state,
        "jobs": _jobs(result),
    }
    row |= _first_cells(first, scores[first])
    row["step"] = _progress(summary)
    row |= _eval_losses(summary)
    for heading in further:
        row |= {heading: scores[heading].value, f"{heading}, base model": scores[heading].base_model}
    row |= {"rows": result.rows_evaluated, "scored": about_rows(result.evaluation)}
    row |= _costs(summary)
    return row | {
        "predictions": result.changed,
        "adapter": run.published_adapter,
        "trouble": result.trouble,
        "not compared": result.incomparable_loss,
        "recipe file": run.recipe_note,
        "variant of": run.variant_of,
        "changed": ", ".join(result.changes) or None,
        "trackers": ", ".join(f"{run['tracker']}: {run.get('page', run['place'])}" for run in summary.tracked) or None,
    }


def _score(result: RunResult, column: Column) -> RunScore:
    """Score of a run by a metric; an empty one if the run has no metric with these parameters."""
    if column.same_scores(result.columns.get(column.name)):
        return result.scores[column.name]
    return RunScore(None, None, None, None, {})


def _files(group: Sequence[RunResult], columns: Mapping[str, Column]) -> Iterator[Row]:
    """Rows of runs with GGUF files: the adapter's scores, and below it those of each file."""
    for result in group:
        evaluations = result.served
        if evaluations and result.evaluation:
            evaluations = [result.evaluation, *evaluations]
        for evaluation in evaluations:
            settings, scores = evaluation.settings, result.scores_in(evaluation)
            row: Row = {"run": result.folder.path.name, "file": str(settings.file or "adapter")}
            row |= {heading: scores.get(column.name) for heading, column in columns.items()}
            row["rows"] = settings.rows
            if settings.distance:
                row |= {"loss": settings.distance.losses, "mean KL": f"{settings.distance.kl:.4f}"}
            yield row


def _first_cells(heading: str, score: RunScore) -> Row:
    """Cells of the first metric."""
    row: Row = {heading: score.value}
    for decoding, value in score.decodings.items():
        row[f"{heading}, {decoding}"] = value
    row["base model"] = score.base_model
    row["published"] = score.published and score.published.value
    row["difference"] = score.difference
    return row


def _progress(summary: Summary) -> str:
    """Steps of a training, an early end, and the step whose weights were kept."""
    text = f"{summary.step}/{summary.max_steps or '?'}"
    if summary.ended == "early stopping":
        text += ", early stopping"
    if summary.kept_step not in (None, summary.step):
        text += f", step {summary.kept_step} kept"
    return text


def _eval_losses(summary: Summary) -> Row:
    """Cells of the first and last eval loss per token, or else of Axolotl's eval loss."""
    if summary.eval_loss_per_token is None:
        return {"eval loss": None, AXOLOTL_EVAL_LOSS: summary.eval_loss}
    first, last = map(tables.text_of, (summary.eval_loss_per_token_first, summary.eval_loss_per_token))
    return {"eval loss": f"{first} → {last}", AXOLOTL_EVAL_LOSS: None}


def _costs(summary: Summary) -> Row:
    """Cells of memory and speed."""
    return {
        "peak GiB": summary.peak_memory,
        "tokens/s": round(summary.tokens_per_second) if summary.tokens_per_second else None,
        "minutes": f"{summary.train_seconds / 60:.1f}",
    }
