"""Python interface: the functions that the commands call, for notebooks and scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import paths
from .base.terminal import prepare_environment
from .config.merging import Override

if TYPE_CHECKING:
    from pandas import DataFrame

    from .check.check import Report
    from .config.compose import Request
    from .config.finding import Finding
    from .config.gpus import Gpu
    from .evaluate.scores_file import Evaluation
    from .plan.plan import Plan
    from .run.rundir import RunDir
    from .training.run_record import State

prepare_environment()  # before torch is imported
Settings = Mapping[str, Any]
"""Values of config keys; a key in an inner map is written with dots, and None deletes a key."""
NONE: Settings = {}


@dataclass(frozen=True)
class Run:
    """A training run, with its files and results as they are now.

    Attributes:
        path: the run's folder; docs/files.md describes its files.
    """

    path: Path

    @property
    def _folder(self) -> "RunDir":
        from .run.rundir import RunDir

        return RunDir(self.path)

    @property
    def state(self) -> "State":
        """State of the run, such as `finished`."""
        from .run import backends

        return backends.read(self._folder).state

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config that Axolotl received."""
        return self._folder.config

    @property
    def metrics(self) -> "DataFrame":
        """Losses, rates, times and memory by step; a row for each entry of the training's log."""
        from pandas import DataFrame

        rows = [row for row in self._folder.read_metrics() if "loss" in row or "eval_loss" in row]
        return DataFrame(rows).dropna(axis="columns", how="all")

    @property
    def evaluation(self) -> "Evaluation | None":
        """The evaluation with the default settings, with scores and intervals; None before `evaluate`."""
        from .evaluate.scores_file import read_scores

        return read_scores(self.path)

    @property
    def scores(self) -> dict[str, float | None]:
        """Scores by metric; empty before `evaluate`."""
        return {name: score.value for name, score in self.evaluation.scores.items()} if self.evaluation else {}

    @property
    def predictions(self) -> "DataFrame":
        """Scored predictions, a row for each test row."""
        from pandas import DataFrame

        from .evaluate.scores_file import read_predictions

        return DataFrame(read_predictions(self.path))


def recipes(pattern: str = "*") -> list[str]:
    """Names of recipes and variants that match a pattern, such as `start/*`."""
    return [name for name in [*paths.recipe_names(), *paths.variant_names()] if fnmatch(name, pattern)]


def check(
    name: str,
    settings: Settings = NONE,
    *,
    profiles: Sequence[str] = (),
    rehearse: bool = False,
    gpu: str | None = None,
    all_rows: bool = False,
    force: Sequence[str] = (),
) -> "list[Finding]":
    """Findings about a recipe or a file; see `recipe check`.

    Args:
        name: recipe, part of its name, or file.
        settings: changed settings.
        profiles: profiles to apply, in this order.
        rehearse: check the config of a rehearsal.
        gpu: name of the GPU to check against; by default this machine's.
        all_rows: read and tokenize all rows.
        force: names of errors to accept.

    Raises:
        UserError: the GPU is unknown.
    """
    from .config import gpus

    target = gpus.find_gpu(gpu) if gpu else gpus.here()
    request = _request(name, settings, profiles=[*profiles], rehearse=rehearse, force=[*force])
    return reports([request], target, all_rows)[0].findings


def reports(requests: "Sequence[Request]", gpu: "Gpu | None", all_rows: bool, quick: bool = False) -> "list[Report]":
    """Reports of checks, with progress on stderr.

    Args:
        requests: recipes or files, with their changes.
        gpu: the GPU to check against.
        all_rows: read and tokenize all rows.
        quick: leave out Axolotl's validation, and rows beside tokens.
    """
    from .base.terminal import Bar
    from .check import check
    from .config.finding import override_errors
    from .plan import plan

    checked = []
    with Bar("checking", len(requests)) as bar:
        for request in requests:
            checked.append(check.check_request(request, gpu, all_rows))
            bar.update(len(checked))
    if not quick:
        with Bar("validating with Axolotl", 1):
            check.add_validation(checked, gpu)
    for request, report in zip(requests, checked, strict=True):
        with Bar(f"tokenizing {report.name}", 1):
            if all_rows:
                check.tokenize_all(report, request)
            elif not quick:
                check.compare_rows(report, request)
        plan.add_memory_finding(report, gpu)
        override_errors(report.findings, request.force)
    return checked


def plan(
    name: str,
    settings: Settings = NONE,
    *,
    profiles: Sequence[str] = (),
    gpu: str | None = None,
    gpus: int = 1,
    all_rows: bool = False,
    force: Sequence[str] = (),
) -> "Plan":
    """Parameters, memory, steps and hours of a training; see `recipe plan`.

    Args:
        name: recipe, part of its name, or file.
        settings: changed settings.
        profiles: profiles to apply, in this order.
        gpu: name of the GPU to plan for; by default all sizes.
        gpus: number of GPUs.
        all_rows: tokenize all rows, to count their tokens.
        force: names of errors to accept.

    Raises:
        UserError: the config has an error that prevents a plan.
    """
    from .config.gpus import find_gpu
    from .plan.plan import plan_request

    request = _request(name, settings, profiles=[*profiles], gpus=gpus, force=[*force])
    return plan_request(request, find_gpu(gpu) if gpu else None, data=all_rows)


def run(
    name: str,
    settings: Settings = NONE,
    *,
    profiles: Sequence[str] = (),
    rehearse: bool = False,
    gpus: int = 1,
    force: Sequence[str] = (),
) -> Run:
    """Train a recipe in a new run folder on this machine; see `recipe run`.

    Args:
        name: recipe, part of its name, or file.
        settings: changed settings.
        profiles: profiles to apply, in this order.
        rehearse: train a small model on a few rows, on the CPU.
        gpus: number of GPUs.
        force: names of errors to accept.

    Raises:
        UserError: the request is wrong; nothing was started.
        WorkFailed: the training failed, or was interrupted.
    """
    from .run.backends import BACKENDS
    from .run.run import start

    request = _request(name, settings, profiles=[*profiles], rehearse=rehearse, gpus=gpus, force=[*force])
    backend = BACKENDS.find("local", "on")(rehearse, None, [], False)
    return Run(start(request, backend).path)


def find_run(name: str = "latest") -> Run:
    """Run of a folder, part of its name, or a recipe (its newest run).

    Raises:
        UserError: no run, or several, have this name.
    """
    from .run import rundir

    return Run(rundir.find_run(name, paths.runs()).path)


def evaluate(
    run: Run,
    *,
    data: Path | None = None,
    limit: int | None = None,
    metrics: Sequence[str] = (),
    decoding: str | None = None,
    base: bool = False,
) -> "Evaluation":
    """Generate predictions for test rows on this machine, and score them; see `recipe evaluate`.

    Args:
        run: the run.
        data: JSON lines file with test rows; by default the recipe's.
        limit: number of rows.
        metrics: further metrics.
        decoding: decoding configuration of the study.
        base: evaluate the base model without its adapter.

    Raises:
        UserError: the request is wrong; nothing was started.
        WorkFailed: memory does not suffice, or a model cannot be loaded.
    """
    from .evaluate.evaluate import EvaluationRequest, evaluate_run
    from .evaluate.settings import BASE
    from .run.rundir import RunDir

    request = EvaluationRequest(data, limit, BASE if base else None, metrics=metrics, decoding=decoding)
    return evaluate_run(RunDir(run.path), request)


def results(
    *names: str,
    where: str = "",
    sort: Sequence[str] = (),
    columns: Sequence[str] = (),
    limit: int = -1,
) -> "DataFrame":
    """Table of runs; see `recipe results`.

    Args:
        names: runs, recipes, studies, sweeps or patterns; by default all runs.
        where: condition, such as `state == "finished" and lora_r >= 16`.
        sort: columns to sort by, with `-` in front for descending order.
        columns: fields, metrics and settings to show.
        limit: maximum number of runs; -1 for all.

    Raises:
        UserError: a name matches no run, or a column is unknown.
    """
    from pandas import DataFrame

    from .results.query import Query, table

    return DataFrame(table(names, Query(where, sort, columns, limit)))


def _request(name: str, settings: Settings, **options: Any) -> "Request":
    from .config.compose import Request

    overrides = [Override(key, value) for key, value in settings.items()]
    return Request(name, overrides=overrides, **options)
