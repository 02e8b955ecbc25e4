"""Measure a run's model with lm-evaluation-harness; load the model as for predictions."""

import hashlib
import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from ..base import paths, yamlfiles
from ..base.errors import UserError, WorkFailed
from ..base.hub import importing_axolotl
from ..base.progress import Bar, say
from ..base.yamlfiles import Config
from ..configs import datafiles
from ..metrics.metric import Column
from ..metrics.registry import Benchmark, BenchmarkParameters
from .evaluations import Evaluation, EvaluationSettings

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from .prompter import Prompter

ROWS = 8
"""Default number of rows in a batch."""


def require(columns: Mapping[str, Column]) -> None:
    """Raise UserError if the harness lacks a benchmark's task."""
    for column in columns.values():
        if column.metric.of_model:
            _located(column)


def of_evaluation(evaluation: Evaluation | None) -> dict[str, Column]:
    """Benchmark columns of an evaluation."""
    columns = evaluation.columns if evaluation else {}
    return {name: column for name, column in columns.items() if column.metric.of_model}


def kept(asked: Mapping[str, Column], former: Evaluation, limit: int | None) -> dict[str, Benchmark]:
    """Return the benchmark results of an earlier evaluation that are still valid.

    A result is dropped if its column is now requested with different parameters or a different limit, or if it has no
    record of the tokens that ended answers: in earlier versions, answers went on after their end.
    """
    found = {}
    for name, column in of_evaluation(former).items():
        if column.same_scores(asked.get(name, column)) and f"{name}_benchmark" in former.scores:
            benchmark = Benchmark.model_validate(former.scores[f"{name}_benchmark"])
            if benchmark.ends is not None and (name not in asked or benchmark.limit == limit):
                found[name] = benchmark
    return found


def measured(
    columns: Mapping[str, Column],
    former: Evaluation | None,
    settings: EvaluationSettings,
    cfg: Config,
    tokenizer: Path,
    limit: int | None = None,
    rehearsal: bool = False,
) -> dict[str, Benchmark]:
    """Return benchmark results; measure those that an earlier evaluation lacks.

    Answers are cached by model and adapter, so a repeated call continues an interrupted measurement.

    Args:
        columns: metrics, including benchmarks.
        former: earlier evaluation of the same model, if any.
        settings: model and adapter.
        cfg: the run's config.
        tokenizer: folder of the training tokenizer.
        limit: maximum number of rows per task.
        rehearsal: True to use no GPU, and to leave out tasks whose rows are not on this machine.

    Raises:
        UserError: the harness lacks a task.
        WorkFailed: a task does not report the requested result, or its rows cannot be loaded.
    """
    found = kept(columns, former, limit) if former else {}
    missing = {name: column for name, column in columns.items() if column.metric.of_model and name not in found}
    if missing:
        if rehearsal:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        with importing_axolotl(offline=rehearsal), Bar(f"benchmarks: {', '.join(missing)}"):
            from .prompter import Prompter

            found |= _measure(missing, Prompter(settings, cfg, tokenizer), limit, rehearsal)
    return found


def _measure(
    missing: Mapping[str, Column], prompter: "Prompter", limit: int | None, rehearsal: bool
) -> dict[str, Benchmark]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from .reference import Reference, base_weights

    tasks = {name: _located(column) for name, column in missing.items()}
    settings = prompter.settings
    model = HFLM(
        pretrained=Reference(prompter).model, tokenizer=prompter.tokenizer, batch_size=settings.batch_size or ROWS
    )
    ends = sorted(prompter.ends)
    of_model = base_weights(prompter) | {"adapter": settings.adapter_sha256, "ends": ends}
    digest = hashlib.sha256(orjson.dumps(of_model, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
    entries = [entry for _, entry in datafiles.datasets(prompter.cfg, "datasets")]
    found = {}
    for name, (task, manager) in tasks.items():
        parameters = missing[name].parameters
        assert isinstance(parameters, BenchmarkParameters)
        try:
            done = simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=manager,
                num_fewshot=parameters.shots,
                limit=limit,
                use_cache=str(paths.cache() / "benchmarks" / f"{digest}-{name}"),
                apply_chat_template=any(entry.get("type") == "chat_template" for entry in entries),
                log_samples=False,
            )
        except OSError as error:  # includes the hub's errors
            problem = f"{missing[name].label}: the rows of the task {task} cannot be loaded: {error}"
            if not rehearsal:
                raise WorkFailed(f"{problem}; predictions are kept; repeat the command to continue") from None
            say(f"{problem}; the rehearsal leaves this task out")
            continue
        found[name] = summarise(done, parameters).model_copy(update={"limit": limit, "ends": ends})
    return found


def _located(column: Column) -> "tuple[str, TaskManager]":
    """Return a column's task name, and a task manager that has the task.

    Raises:
        UserError: the harness lacks the task.
    """
    assert isinstance(column.parameters, BenchmarkParameters)
    task, folder = column.parameters.task, None
    if task.endswith(".yaml") and Path(task).is_file():
        task, folder = yamlfiles.read_yaml(Path(task)).get("task", task), str(Path(task).parent.resolve())
    manager = _tasks(folder)
    if task not in manager.all_tasks:
        raise UserError(f"{column.name}: lm-evaluation-harness has no task {task}; `lm_eval ls tasks` lists its tasks")
    return task, manager


@cache
def _tasks(folder: str | None) -> "TaskManager":
    """Task manager for the harness's tasks and those of a folder; slow, therefore cached."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def summarise(done: Mapping[str, Any], parameters: BenchmarkParameters) -> Benchmark:
    """Extract a task's score from the harness's report.

    Raises:
        WorkFailed: the report lacks the requested result.
    """
    from importlib.metadata import version

    results, leaves = done["results"], list(done["configs"])
    name = parameters.task if parameters.task in results else leaves[0]
    counted = leaves if parameters.mean_of_tasks else [name]
    reported = [
        key
        for key, value in results[counted[0]].items()
        if "," in key and "_stderr," not in key and isinstance(value, float | int)
    ]
    wanted = parameters.result or (reported[0] if reported else "")
    result = next((key for key in reported if wanted in (key, key.partition(",")[0])), None)
    if result is None:
        raise WorkFailed(
            f"{parameters.task}: reports no {wanted or 'number'}; its results: {', '.join(reported) or 'none'}"
        )
    metric, _, filtered = result.partition(",")
    values = [results[each][result] for each in counted]
    errors = [results[each].get(f"{metric}_stderr,{filtered}") for each in counted]
    known = all(isinstance(error, float | int) for error in errors)
    shots = {done["n-shot"].get(each) for each in leaves}
    return Benchmark(
        value=100 * sum(values) / len(values),
        stderr=100 * math.sqrt(sum(error**2 for error in errors)) / len(errors) if known else None,
        task=parameters.task,
        result=metric,
        version=str(done["versions"].get(name)),
        shots=shots.pop() if len(shots) == 1 else None,
        filter=filtered,
        rows=sum(done["n-samples"][each]["effective"] for each in leaves),
        harness=version("lm_eval"),
    )
