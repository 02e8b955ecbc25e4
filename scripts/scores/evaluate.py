"""Predictions of a run's model on test rows, and their scores: `recipe evaluate`."""

import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import orjson

from ..base.errors import UserError
from ..base.files import clear_parts, replacing
from ..base.hub import importing_axolotl
from ..base.machine import held, now
from ..base.progress import Bar, say
from ..metrics.metric import Column
from ..metrics.registry import Benchmark
from ..runs.records import FileState
from ..runs.rundir import RunDir
from ..runs.tasks import Command
from . import benchmarks, evaluation_rows
from .evaluations import (
    LOCK,
    ORIGIN,
    PREDICTIONS,
    REFERENCE,
    SCORES,
    Evaluation,
    Prediction,
    changed,
    read_predictions,
    read_scores,
    states,
)
from .predict import predict
from .score import VERSION, ScorerModels, require_models, same_models, score, scorer_models
from .task import REHEARSED, EvaluationRequest, EvaluationTask, data_label

Columns = Mapping[str, Column]


def complete(task: EvaluationTask, judged: ScorerModels) -> Evaluation | None:
    """The evaluation that a task asks for, if it is there: of the same rows, by the same model and code."""
    former = _same_work(task)
    scored = former.columns if former else {}
    current = (
        former
        and former.version == VERSION
        and same_models(judged, task.columns, former.scores)
        and all(column.same_scores(scored.get(name)) for name, column in task.columns.items() if name not in judged)
        and (
            task.run.rehearsal  # which may have left some out
            or {name for name, column in task.columns.items() if column.metric.of_model}
            <= kept_benchmarks(task, former).keys()
        )
        and former.settings.limit == task.settings.limit
        and former.settings.test_set == task.settings.test_set
    )
    return former if current else None


def _same_work(task: EvaluationTask) -> Evaluation | None:
    """The evaluation in a task's folder, where its predictions are those that the task asks for."""
    former = read_scores(task.where)
    if not former or former.settings.same_work() != task.settings.same_work():
        return None
    if not former.settings.stands_for(task.settings) or len(read_predictions(task.where)) != task.settings.rows:
        return None
    if changed(task.where, former) == "edited":
        raise UserError(
            f"{task.where / PREDICTIONS}: edited since it was scored; put it back as it was, or move it and {SCORES} "
            "away to generate it anew"
        )
    return former


def evaluate(folder: RunDir, request: EvaluationRequest) -> Evaluation:
    """Generate a prediction for each test row and score them all.

    predictions.jsonl and scores.json go to the run's folder; those of the base model, of another adapter, decoding or
    rows than the usual, to a folder below evaluations/. An interrupted evaluation continues where it
    stopped, a complete one is not repeated.

    Raises:
        UserError: see `EvaluationTask`, `score.require_models` and `benchmarks.require`.
        WorkFailed: BERTScore's model cannot be loaded, or memory does not suffice.
    """
    task = EvaluationTask(folder, request)
    judged = scorer_models(task.columns, request.judge, task.run.rehearsal, report=True)
    summary = folder.summary(task.run)
    if task.run.state != "finished":
        say(f"{folder.path}: the run is {task.run.state} at step {summary.step} of {summary.max_steps}")
    task.where.mkdir(parents=True, exist_ok=True)
    with held(task.where / LOCK, "another evaluation is running"):
        predictions = task.where / PREDICTIONS
        settings = task.settings
        part = task.where / f"predictions.{'' if settings.engine == REFERENCE else f'{settings.engine}.'}part.jsonl"
        if former := complete(task, judged):
            how = f"made by {former.settings.engine} and scored with the same settings"
            say(f"{predictions}: complete, {how}")
            return former
        if any(judged.values()):
            with Bar("looking for BERTScore's model", 1):
                require_models(judged.values())
        if any(column.metric.of_model for column in task.columns.values()):
            with importing_axolotl(offline=task.run.rehearsal):
                benchmarks.require(task.columns)
        if former := _same_work(task):
            say(f"{predictions}: complete, made with the same settings; scoring it anew")
            rows = [
                {key: value for key, value in row.items() if key in Prediction.model_fields}
                for row in read_predictions(task.where)
            ]
            kept = {"batch_size", *ORIGIN}
            settings = settings.model_copy(update={key: getattr(former.settings, key) for key in kept})
        else:
            _make_way(task)
            with importing_axolotl(offline=task.run.rehearsal):
                rows, settings = predict(task, folder.output, part)
        columns = _with_benchmarks(task.columns, former)
        measured = _measured(task, columns, former, folder.output)
        files = states(task.where, settings)
        with Bar("scoring", 1):
            own = request.adapter is None  # the eval loss is not that of another adapter
            loss = summary.eval_loss_per_token if own else None
            scores, rows = score(rows, columns, judged, loss, measured)
        if note := settings.note:
            scores["notes"] = [note, *scores.get("notes", [])]
        if evaluation_rows.changed_since(task.run, task.rows):
            note = "the rows that it is evaluated on have changed since the run was created"
            say(f"{task.rows.data}: {note}")
            scores["notes"] = [note, *scores.get("notes", [])]
        with ExitStack() as stack:  # no predictions without their scores
            clear_parts(predictions)
            stream = stack.enter_context(replacing(predictions))
            content = b"".join(orjson.dumps(row) + b"\n" for row in rows)
            stream.write(content)
            stream.flush()
            mtime = os.fstat(stream.fileno()).st_mtime
            digest = hashlib.sha256(content).hexdigest()
            files["predictions"] = FileState(sha256=digest, bytes=len(content), mtime=mtime)
            result = Evaluation(
                made=now(),
                rehearsal=task.run.rehearsal,
                scores=scores,
                version=VERSION,
                settings=settings,
                files=files,
            )
            stack.enter_context(replacing(task.where / SCORES)).write(result.model_dump_json(indent=1).encode() + b"\n")
        part.unlink(missing_ok=True)
    return result


def _with_benchmarks(columns: Columns, former: Evaluation | None) -> Columns:
    """Columns with the benchmarks that an evaluation of the same model has already."""
    there = former.columns.items() if former else ()
    return {name: column for name, column in there if column.metric.of_model} | dict(columns)


def _measured(
    task: EvaluationTask, columns: Columns, former: Evaluation | None, tokenizer: Path
) -> dict[str, Benchmark]:
    """The benchmarks of some columns, measured unless an evaluation of the same model has them.

    Raises:
        UserError, WorkFailed: see `benchmarks.measure`.
    """
    wanted = {name: column for name, column in columns.items() if column.metric.of_model}
    found = kept_benchmarks(task, former) if former else {}
    if missing := {name: column for name, column in wanted.items() if name not in found}:
        with importing_axolotl(offline=task.run.rehearsal), Bar(f"benchmarks: {', '.join(missing)}"):
            from .prompter import Prompter

            if task.run.rehearsal:
                os.environ["CUDA_VISIBLE_DEVICES"] = ""
            prompter = Prompter(task.settings, task.cfg, tokenizer)
            found |= benchmarks.measure(prompter, missing, _limit(task), task.run.rehearsal)
    return found


def kept_benchmarks(task: EvaluationTask, former: Evaluation) -> dict[str, Benchmark]:
    """Benchmarks of an evaluation of the same model, but for those that are asked for otherwise."""
    found = {}
    for name, column in former.columns.items():
        asked = task.columns.get(name, column)
        if column.metric.of_model and column.same_scores(asked) and f"{name}_benchmark" in former.scores:
            benchmark = Benchmark.model_validate(former.scores[f"{name}_benchmark"])
            if name not in task.columns or benchmark.limit == _limit(task):
                found[name] = benchmark
    return found


def _limit(task: EvaluationTask) -> int | None:
    """The most rows of a benchmark's task."""
    return REHEARSED if task.run.rehearsal else task.request.limit


def command(folder: RunDir, request: EvaluationRequest) -> Command:
    """The command that evaluates a run as requested."""
    return Command("evaluate", folder, ["evaluate", str(folder.path), *request.options()])


def _make_way(task: EvaluationTask) -> None:
    """Move an evaluation of the same adapter on other rows aside, as they may have been the usual ones; refuse to lose
    rows of the same data."""
    former = read_scores(task.where)
    if former is None or former.settings.adapter_sha256 != task.settings.adapter_sha256:
        return
    if former.settings.data_sha256 != task.settings.data_sha256:
        aside = task.where / "evaluations" / data_label(former.settings)
        aside.mkdir(parents=True, exist_ok=True)
        for file in filter(Path.is_file, (task.where / PREDICTIONS, task.where / SCORES)):
            file.replace(aside / file.name)
        say(f"{task.where / SCORES}: of other rows; it is now in {aside}")
    elif former.settings.rows > task.settings.rows:
        raise UserError(
            f"{task.where / SCORES}: of {former.settings.rows} rows, more than the {task.settings.rows} asked for; "
            f"move it and {PREDICTIONS} away to evaluate fewer"
        )
    elif not former.settings.stands_for(task.settings):
        raise UserError(
            f"{task.where / SCORES}: {former.settings.note}; move it and {PREDICTIONS} away to generate by "
            f"{task.settings.engine}"
        )
