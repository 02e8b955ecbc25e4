"""Print the results of runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from ..base import tables
from ..base.files import Row
from ..base.tables import Table
from ..base.terminal import warn
from ..base.yamlfiles import Config, write_flow
from ..config.merging import Override
from ..config.training_settings import TrainingSettings
from ..evaluate.intervals import Interval
from ..evaluate.scores_file import Evaluation, about_rows
from ..metrics import registry
from ..metrics.metric import Column
from ..metrics.registry import EVAL_LOSS
from ..run import backends
from ..run.rundir import RunDir, readable
from ..training.run_record import GPU_MEMORY, Summary
from . import repeats, verdict
from .run_result import RunResult, RunScore

FIRST_EVAL_LOSS = "first loss"
AXOLOTL_EVAL_LOSS = "Axolotl's eval loss"  # shown without a loss per token
REHEARSALS = "Rehearsals (small model, few rows; not comparable with any published score)"
_FILES = "GGUF files, each below the adapter that it was made of; a quantized file is not refused for its KL"
_KEPT = ("state", "eval loss", "recipe", "published", "difference", FIRST_EVAL_LOSS, AXOLOTL_EVAL_LOSS)
_BELOW = (
    *("scored", "trouble", "changed", "variant of", "jobs", "predictions", "adapter", "not compared", "recipe file"),
    "trackers",
)


def show(folders: Sequence[RunDir], json: bool) -> None:
    """Print the results of runs."""
    results = [RunResult(folder, run) for folder, run in readable(folders, backends.read)]
    changed = [result.folder.quoted for result in results if result.changed]
    if changed:
        warn(f"evaluations that are stale or edited: {len(changed)}; for the last, run `recipe evaluate {changed[-1]}`")
    records = (record(result) for result in results)
    tables.show(json, records, _tables(results))


def _jobs(result: RunResult) -> str | None:
    """Unfinished jobs of a run, such as `evaluate: queued`."""
    is_trained = result.run.state == "finished"
    jobs = []
    for step, is_done in {"prepare": is_trained, "run": is_trained, "evaluate": result.evaluation}.items():
        state = None if is_done else backends.job_state(result.folder, step)
        if state:
            jobs.append(f"{step}: {state}")
    return "; ".join(jobs) or None


def _study(result: RunResult) -> str | None:
    """Name of a run's study."""
    return result.study.folder.name if result.study else None


def _verdict(result: RunResult) -> str | None:
    """Verdict on a run alone, by its study's first metric; see `verdict.verdict`."""
    if result.study is None or result.run.rehearsal:
        return None
    return verdict.of_run(result.study.first, result)


def _seed(result: RunResult) -> int:
    """Seed of a run, from its recipe and changes."""
    return TrainingSettings.of({"seed": result.setting("seed")}).seed


def _gpu(result: RunResult) -> str | None:
    """Name of a run's GPU, with the number of GPUs if there are several; None on a CPU."""
    gpus = result.run.provenance.get("gpus")
    if not gpus or result.summary.memory_kind != GPU_MEMORY:
        return None
    name = gpus[0].get("name")
    return name if result.run.ranks == 1 else f"{result.run.ranks} x {name}"


def _duration(result: RunResult) -> float | None:
    """Seconds of all launches that ended, with loading and evaluation; None without one."""
    seconds = [launch.seconds for launch in result.run.launches if launch.seconds is not None]
    return sum(seconds) if seconds else None


FIELDS: dict[str, Callable[[RunResult], Any]] = {
    "run": lambda result: str(result.folder.path),
    "recipe": attrgetter("run.recipe"),
    "variant_of": attrgetter("run.variant_of"),
    "study": _study,
    "rehearsal": attrgetter("run.rehearsal"),
    "state": attrgetter("run.state"),
    "verdict": _verdict,
    "published_adapter": attrgetter("run.published_adapter"),
    "jobs": _jobs,
    "seed": _seed,
    "start": lambda result: result.run.launches[0].started if result.run.launches else None,
    "end": lambda result: result.run.launches[-1].ended if result.run.launches else None,
    "duration_seconds": _duration,
    "gpu": _gpu,
    "machine": lambda result: result.run.provenance.get("host"),
    "step": attrgetter("summary.step"),
    "steps": attrgetter("summary.max_steps"),
    "ended": attrgetter("summary.ended"),
    "kept_step": attrgetter("summary.kept_step"),
    "trouble": attrgetter("trouble"),
    "eval_loss_first": attrgetter("summary.eval_loss_per_token_first"),
    "eval_loss": attrgetter("summary.eval_loss_per_token"),
    "eval_loss_axolotl": attrgetter("summary.eval_loss"),
    "eval_tokens": attrgetter("summary.eval_tokens"),
    "eval_reward_accuracy": attrgetter("summary.eval_reward_accuracy"),
    "eval_reward_margin": attrgetter("summary.eval_reward_margin"),
    "eval_pairs": attrgetter("summary.eval_pairs"),
    "incomparable_loss": attrgetter("incomparable_loss"),
    "rows_evaluated": attrgetter("rows_evaluated"),
    "evaluation": attrgetter("changed"),
    "peak_memory_gib": attrgetter("summary.peak_memory"),
    "memory_kind": attrgetter("summary.memory_kind"),
    "other_base_model": attrgetter("other_model"),
    "other_data": attrgetter("other_data"),
    "tokens_per_second": attrgetter("summary.tokens_per_second"),
    "train_seconds": attrgetter("summary.train_seconds"),
    "changed": attrgetter("changes"),
    "recipe_note": attrgetter("recipe_note"),
    "tracked": attrgetter("summary.tracked"),
}
"""Fields of a run in JSON, which queries take as columns."""


def record(result: RunResult) -> Row:
    """JSON fields of a run and its results."""
    row = {name: field(result) for name, field in FIELDS.items()}
    row |= _evaluation_fields(result)
    for name, score in result.scores.items():
        row |= score.as_json(name) | repeats.json_fields(name, interval_of(result, name))
    return row | {"settings": result.config_values}


def interval_of(result: RunResult, name: str) -> Interval | None:
    """95 % interval of a run's score by a metric."""
    return repeats.mean_score(result.columns[name], [result]).interval


def _evaluation_fields(result: RunResult) -> Row:
    """JSON fields of the evaluation, without scores."""
    total = also_trained = test_set = None
    if result.evaluation:
        total = result.evaluation.settings.total_rows
        also_trained = result.evaluation.also_trained
        test_set = result.evaluation.settings.test_set
    return {
        "rows_total": total,
        "rows_also_trained": also_trained,
        "test_set": test_set,
        "files": [_file_fields(result, evaluation) for evaluation in result.served],
    }


def _file_fields(result: RunResult, evaluation: Evaluation) -> Row:
    """JSON fields of the evaluation of a GGUF file."""
    settings = evaluation.settings
    row = {"rows_evaluated": settings.rows}
    for part in (settings.file, settings.distance):
        row |= part.model_dump() if part else {}
    return row | result.scores_in(evaluation)


def _tables(results: Sequence[RunResult]) -> Iterator[Table]:
    """Tables of the runs of each study, and of runs of no study; rehearsals have separate tables."""
    for title, group in _groups(results).items():
        columns = _columns(group)
        first = next(iter(columns), "")
        yield Table([cells(result, columns) for result in group], title, below=_BELOW, keep=(first, *_KEPT))
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
    if columns[first].same_scores(result.columns.get(columns[first].name)):
        row["95 %"] = repeats.table_cells(interval_of(result, columns[first].name))["95 %"]
    row |= _eval_losses(summary) | _rewards(summary)
    row["step"] = _progress(summary)
    for heading in further:
        row |= {heading: scores[heading].value, f"{heading}, base model": scores[heading].base_model}
    row |= {"rows": result.rows_evaluated, "scored": about_rows(result.evaluation)}
    row |= _costs(summary)
    return row | {
        "predictions": result.changed,
        "adapter": run.published_adapter,
        "trouble": result.trouble,
        "not compared": result.incomparable_loss,
        "recipe file": result.recipe_note,
        "variant of": run.variant_of,
        "changed": settings_text(result.changes),
        "trackers": ", ".join(f"{run['tracker']}: {run.get('page', run['place'])}" for run in summary.tracked) or None,
    }


def texts(row: Row) -> Row:
    """Fields of a run with truth values, lists and mappings as texts."""
    cells = dict(row)
    for name, value in row.items():
        if name == "changed":
            cells[name] = settings_text(value)
        elif isinstance(value, bool | list | dict):
            cells[name] = write_flow(value)
    return cells


def settings_text(settings: Config) -> str | None:
    """Settings as `key=value, key=value`; None without any."""
    return ", ".join(Override(key, value).text for key, value in settings.items()) or None


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
    """Cells of the last and first eval loss per token, or else of Axolotl's eval loss."""
    if summary.eval_loss_per_token is None:
        return {"eval loss": None, FIRST_EVAL_LOSS: None, AXOLOTL_EVAL_LOSS: summary.eval_loss}
    first, last = summary.eval_loss_per_token_first, summary.eval_loss_per_token
    return {"eval loss": last, FIRST_EVAL_LOSS: first, AXOLOTL_EVAL_LOSS: None}


def _rewards(summary: Summary) -> Row:
    """Cells of the rewards of held-out pairs, with the interval of their accuracy."""
    rewards = summary.eval_losses.rewards
    bounds = registry.REWARD_ACCURACY.interval(summary.eval_losses)
    accuracy: float | str | None = None
    if rewards.accuracy is not None:
        accuracy = 100 * rewards.accuracy
    interval = "{:.1f} to {:.1f}".format(*bounds) if bounds else None
    return {"reward accuracy, %": accuracy, "95 % interval of the accuracy": interval, "reward margin": rewards.margin}


def _costs(summary: Summary) -> Row:
    """Cells of memory and speed."""
    return {
        "peak GiB": summary.peak_memory,
        "tokens/s": round(summary.tokens_per_second) if summary.tokens_per_second else None,
        "minutes": f"{summary.train_seconds / 60:.1f}",
    }
