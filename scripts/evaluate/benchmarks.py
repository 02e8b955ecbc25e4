"""Measure a run's model with lm-evaluation-harness; load the model as for predictions."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..base import paths
from ..base.errors import UserError, WorkFailed, with_type
from ..base.files import Row, digest
from ..base.hub import importing_axolotl
from ..base.processes import bounded
from ..base.terminal import Bar, warn
from ..base.yamlfiles import Config
from ..check.code_rules import READ_IT, leaves
from ..config import datafiles, keys
from ..config.finding import TASK_CODE, Finding
from ..metrics.metric import Benchmark, BenchmarkMetric, Column
from ..metrics.registry import BenchmarkParameters
from .evaluation_rows import sample_positions
from .scores_file import Scores
from .settings import EvaluationSettings

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from .prompter import Prompter

ROWS = 8
"""Default number of rows in a batch."""


def require(columns: Mapping[str, Column], offline: bool = False, force: Sequence[str] = ()) -> None:
    """Raise UserError if the harness cannot measure a benchmark's task, or if the task runs code.

    Args:
        columns: metrics, including benchmarks.
        offline: see `importing_axolotl`.
        force: names of findings about code to override.
    """
    with importing_axolotl(offline):
        for column in columns.values():
            if isinstance(column.metric, BenchmarkMetric):
                _locate(column, force)


def valid_benchmarks(requested: Mapping[str, Column], former: Scores, limit: int | None) -> dict[str, Benchmark]:
    """Return the benchmark results among earlier scores that are still valid.

    A result is dropped if its parameters or its limit differ from those requested now. Results of a task in a YAML file
    are always dropped, because the file can have changed.
    """
    valid = {}
    for name, column in former.columns.items():
        benchmark = former.scores[name].benchmark
        if benchmark is None:
            continue
        if name not in requested:
            valid[name] = benchmark
            continue
        is_cached = benchmark.limit == limit and not benchmark.task.endswith(".yaml")
        if is_cached and column.same_scores(requested[name]):
            valid[name] = benchmark
    return valid


def missing_benchmarks(columns: Mapping[str, Column], valid: Mapping[str, Benchmark]) -> dict[str, Column]:
    """Columns of benchmarks without a valid result."""
    missing = {}
    for name, column in columns.items():
        if isinstance(column.metric, BenchmarkMetric) and name not in valid:
            missing[name] = column
    return missing


@dataclass(frozen=True)
class MeasurementOptions:
    """Options of a measurement.

    Attributes:
        limit: maximum number of rows per task; None for all rows.
        rehearsal: True to leave out tasks whose rows are not on this machine.
        force: names of findings about code to override.
    """

    limit: int | None
    rehearsal: bool
    force: Sequence[str]


def measure(
    columns: Mapping[str, Column],
    settings: EvaluationSettings,
    cfg: Config,
    tokenizer: Path,
    options: MeasurementOptions,
) -> dict[str, Benchmark]:
    """Measure benchmarks.

    Answers are cached by model and adapter, so a repeated call continues an interrupted measurement.

    Args:
        columns: benchmarks by name, at least one.
        settings: model and adapter.
        cfg: the run's config.
        tokenizer: folder of the training tokenizer.
        options: rows and code.

    Raises:
        UserError: see `require`.
        WorkFailed: a task fails, for example because its rows cannot be loaded, or does not report the result.
    """
    with importing_axolotl(offline=options.rehearsal), Bar(f"benchmarks: {', '.join(columns)}"):
        from .prompter import Prompter

        return _measure(columns, Prompter(settings, cfg, tokenizer), options)


def _measure(columns: Mapping[str, Column], prompter: "Prompter", options: MeasurementOptions) -> dict[str, Benchmark]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from .transformers_engine import TransformersEngine, base_weights

    tasks = {name: _locate(column, options.force) for name, column in columns.items()}
    settings = prompter.settings
    model = HFLM(
        pretrained=TransformersEngine(prompter).model,
        tokenizer=prompter.tokenizer,
        batch_size=settings.batch_size or ROWS,
    )
    model_hash = digest(base_weights(prompter) | {"adapter": settings.adapter_sha256, "ends": prompter.ends})
    cache = paths.cache() / "benchmarks" / model_hash[:16]
    types = [dataset.entry.get("type") for dataset in datafiles.training_sets(prompter.cfg)]
    benchmarks = {}
    for name, (task, manager) in tasks.items():
        parameters = columns[name].parameters
        assert isinstance(parameters, BenchmarkParameters)
        try:
            samples = None if options.limit is None else _samples(task, manager, options.limit)
            report = simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=manager,
                num_fewshot=parameters.shots,
                samples=samples,
                use_cache=f"{cache}-{name}",
                apply_chat_template="chat_template" in types,
                log_samples=False,
            )
        except Exception as error:  # tasks run code of their own
            problem = f"{columns[name].label}: the task {task} fails: {with_type(error)}"
            if options.rehearsal and isinstance(error, OSError):  # includes the hub's errors
                warn(f"{problem}; the rehearsal leaves this task out")
                continue
            remedy = "repeat the command to continue, with a smaller --batch-size if memory is short"
            raise WorkFailed(f"{problem}; predictions are kept; {remedy}") from error
        benchmarks[name] = summarise(report, parameters, prompter.ends, options.limit, samples)
    return benchmarks


def _samples(task: str, manager: "TaskManager", limit: int) -> dict[str, list[int]]:
    """Positions of the rows that a limit takes from each task of a task or group."""
    from lm_eval.evaluator_utils import get_task_list
    from lm_eval.tasks import get_task_dict

    leaves = get_task_list(get_task_dict([task], manager))
    return {leaf.task_name: sample_positions(len(leaf.task.eval_docs), limit) for leaf in leaves}


def _locate(column: Column, force: Sequence[str]) -> "tuple[str, TaskManager]":
    """Return a column's task name, and a task manager that has the task.

    Raises:
        UserError: see `_require_task`; also if the task is a tag or a file's group, whose score is not known.
    """
    from lm_eval.utils import load_yaml_config

    secure_harness()
    assert isinstance(column.parameters, BenchmarkParameters)
    task, folder = column.parameters.task, None
    try:
        if task.endswith(".yaml") and Path(task).is_file():
            file, folder = Path(task).resolve(), str(Path(task).parent.resolve())
            task = load_yaml_config(file, mode="simple").get("task", task)
        manager = _tasks(folder)
    except Exception as error:  # a damaged file in the folder
        raise UserError(f"{column.name}: cannot read the tasks beside {column.parameters.task}: {error}") from None
    if not isinstance(task, str):
        raise UserError(f"{column.name}: {column.parameters.task} is a group; name one of its tasks")
    _require_task(column.name, task, manager, force)
    entry = manager.task_index[task]
    if entry["type"] == "tag" and not column.parameters.mean_of_tasks:
        raise UserError(f"{column.name}: {task} is a tag; name one of its tasks, such as {entry['task'][0]}")
    return task, manager


def _require_task(name: str, task: str, manager: "TaskManager", force: Sequence[str]) -> None:
    """Check a task, and the tasks of a group or tag.

    Raises:
        UserError: the harness lacks a task or cannot load it, the task runs generated code, or code that `force` does
            not name.
    """
    from lm_eval.utils import load_yaml_config

    if task not in manager.all_tasks:
        raise UserError(f"{name}: lm-evaluation-harness has no task {task}; `lm_eval ls tasks` lists its tasks")
    entry = manager.task_index[task]
    config = entry
    if entry["type"] != "tag":  # a tag has no file
        config = load_yaml_config(entry["yaml_path"], mode="simple")
        if config.get("unsafe_code"):
            raise UserError(f"{name}: the task {task} runs generated code; leave it out")
        refuse(name, entry["yaml_path"], config, force)
    if entry["type"] in ("tag", "group"):
        for member in members(config["task"]):
            if member in manager.all_tasks or member in config["task"]:  # a group can also define a task
                _require_task(name, member, manager, force)
        return
    try:
        load_yaml_config(entry["yaml_path"], mode="full")
    except Exception as error:  # imports the task's modules
        raise UserError(f"{name}: cannot load the task {task}; leave it out: {error!r}") from None


@cache
def _tasks(folder: str | None) -> "TaskManager":
    """Task manager for the harness's tasks and those of a folder; slow, therefore cached."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def summarise(
    report: Mapping[str, Any],
    parameters: BenchmarkParameters,
    ends: list[int],
    limit: int | None = None,
    samples: Mapping[str, list[int]] | None = None,
) -> Benchmark:
    """Extract a task's score from the harness's report.

    Args:
        report: counts all rows even if `samples` leaves some out.
        parameters: the task, and the result that counts.
        ends, limit: see `Benchmark`.
        samples: positions of the scored rows by task; None for all rows.

    Raises:
        WorkFailed: the report lacks the requested result, or the result is not a share from 0 to 1.
    """
    from importlib.metadata import version

    results, leaves = report["results"], list(report["configs"])
    name = parameters.task if parameters.task in results else leaves[0]
    counted = leaves if parameters.mean_of_tasks else [name]
    result = _chosen_result(parameters, results[counted[0]])
    metric, _, extraction = result.partition(",")
    values = [results[task][result] for task in counted]
    higher_is_better = report["higher_is_better"].get(counted[0], {}).get(metric)
    if higher_is_better is False or not all(0 <= value <= 1 for value in values):
        raise WorkFailed(
            f"{parameters.task}: {metric} is not a share from 0 to 1 that is better if higher; set the parameter "
            f"result to another of its results: {', '.join(_numbers(results[counted[0]]))}"
        )
    errors = [results[task].get(f"{metric}_stderr,{extraction}") for task in counted]
    total_rows = sum(report["n-samples"][task]["original"] for task in leaves)
    rows = total_rows if samples is None else sum(map(len, samples.values()))
    shots = {report["n-shot"].get(task) for task in leaves}
    return Benchmark(
        value=100 * sum(values) / len(values),
        stderr=_standard_error(errors),
        task=parameters.task,
        result=metric,
        version=str(report["versions"].get(name)),
        shots=shots.pop() if len(shots) == 1 else None,
        filter=extraction,
        rows=rows,
        total_rows=total_rows,
        limit=limit,
        ends=ends,
        harness=version("lm_eval"),
    )


def _numbers(results: Mapping[str, Any]) -> list[str]:
    """Keys of a task's results that are numbers, as `metric,filter`."""
    keys = []
    for key, value in results.items():
        if "," in key and "_stderr," not in key and isinstance(value, float | int):
            keys.append(key)
    return keys


def _chosen_result(parameters: BenchmarkParameters, results: Mapping[str, Any]) -> str:
    """Key of the result that counts; by default the first number."""
    reported = _numbers(results)
    for key in reported:
        if parameters.result in (None, key, key.partition(",")[0]):
            return key
    raise WorkFailed(
        f"{parameters.task}: reports no {parameters.result or 'number'}; its results: {', '.join(reported)}"
    )


def _standard_error(errors: Sequence[Any]) -> float | None:
    """Standard error in percent of a mean over tasks; None if that of a task is missing."""
    if not all(isinstance(error, float | int) for error in errors):
        return None
    return 100 * math.sqrt(sum(error**2 for error in errors)) / len(errors)


@cache
def secure_harness() -> None:
    """Make the harness read task files as plain YAML, in a sandbox with bounds.

    By itself, it creates any Python object that a task file names, also in files that it only lists. Its templates can
    call any function of Python. So templates run in a sandbox, and templates and patterns have bounds.
    """
    import yaml
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils
    from lm_eval.api import metrics
    from lm_eval.filters import extraction

    class Loader(yaml.CSafeLoader):
        """Loader to which the harness adds its constructor of functions."""

    utils.yaml = SimpleNamespace(**vars(yaml) | {"CLoader": Loader, "FullLoader": Loader})
    sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters |= utils.env.filters
    utils.env = sandbox

    def apply_template(template: str, row: Row) -> str:
        with bounded(template):
            return sandbox.from_string(template).render(**row)

    utils.apply_template = apply_template
    findall, sub = _bounded(re.findall), _bounded(re.sub)
    changes = {"compile": lambda pattern: SimpleNamespace(findall=partial(findall, pattern)), "findall": findall}
    extraction.re = metrics.re = SimpleNamespace(**vars(re) | changes | {"sub": sub})


def _bounded[T](use: Callable[..., T]) -> Callable[..., T]:
    """Function of a pattern, with bounds."""

    def bounded_use(pattern: str, *texts: str) -> T:
        with bounded(pattern):
            return use(pattern, *texts)

    return bounded_use


def members(tasks: list[Any]) -> Iterator[str]:
    """Names of a group's tasks, also of those in groups inside it."""
    for member in tasks:
        task = member.get("task") if isinstance(member, dict) else member
        if isinstance(task, list):
            yield from members(task)
        elif isinstance(task, str):
            yield task


def refuse(column: str, file: str | Path, task: Mapping[str, Any], force: Sequence[str]) -> None:
    """Refuse a task file outside the harness that can run code, unless the user overrides the finding.

    Args:
        column: the benchmark's column.
        file: the task file.
        task: its content, read without importing what it names.
        force: names of findings to override.

    Raises:
        UserError: the file can run code.
    """
    from lm_eval import tasks

    if Path(file).resolve().is_relative_to(Path(tasks.__file__).parent):
        return
    for key, value in leaves(task):
        name = re.sub(r"^(task\.\d+\.)+", "", key)  # a group's own version of a task
        is_plain = isinstance(value, str | int | float | None)
        if not (is_plain and keys.find(f"task_file.{name}").is_harmless(value)):
            shown = value if is_plain else f"!function {getattr(value, 'value', value)}"
            problem = f"may run foreign code: {key}: {shown} is not on the list of what is harmless"
            finding = Finding("error", TASK_CODE, column, problem, READ_IT, paths.shown(Path(file)))
            if finding.name not in force:
                raise UserError(str(finding))
