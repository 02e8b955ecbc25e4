"""Pipeline from config to scores for reproductions and sweeps; finished steps are skipped."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.paths import find_recipe
from ..base.terminal import say, say_once
from ..check import check
from ..config import compose, datafiles
from ..config.compose import Composed, Request
from ..config.finding import unknown_force
from ..config.gpus import Gpu
from ..config.merging import last_key
from ..config.training_settings import TrainingSettings
from ..evaluate import benchmarks, evaluate
from ..evaluate.evaluate import EvaluationRequest, EvaluationTask
from ..evaluate.score import columns_of, require_models, scorer_models
from ..metrics.metric import Column, LossMetric
from ..plan import plan, step_plan
from ..run import backends, run, trust
from ..run.backends import DONE, FAILED, SKIPPED, Backend, Command, Step, Task, TaskResult
from ..run.rundir import RunDir, all_runs
from ..training import validation
from ..training.run_record import Run

TOO_BIG = "too-big:micro_batch_size"  # name of the finding of `plan.add_memory_finding`


def evaluation_command(folder: RunDir, request: EvaluationRequest) -> Command:
    """Command line of a requested evaluation."""
    return Command("evaluate", folder, ["evaluate", str(folder.path), *request.options()])


def existing_runs(runs: Path, recipe: str) -> dict[str, tuple[RunDir, Run]]:
    """Newest run of a recipe for each digest of config and data.

    A finished run takes precedence over newer unfinished runs. Runs with several ranks or with arguments for Axolotl
    are left out, because a digest does not cover these settings.
    """
    found: dict[str, tuple[RunDir, Run]] = {}
    for folder in all_runs(runs / recipe):
        try:
            run = backends.read(folder)
        except UserError:  # damaged; `recipe results` reports it
            continue
        if run.digest is None or run.recipe != recipe or run.ranks > 1:
            continue
        if run.digest not in found or run.state == "finished" or found[run.digest][1].state != "finished":
            found[run.digest] = (folder, run)
    return found


def seeds_of(recipe: str, count: int) -> list[int] | list[None]:
    """Consecutive seeds for a recipe, beginning with the recipe's seed; None for one run, which keeps that seed."""
    if count == 1:
        return [None]
    first = TrainingSettings.of(yamlfiles.read_yaml(find_recipe(recipe)[1])).seed
    return [first + i for i in range(count)]


def exit_code(results: list[TaskResult]) -> int:
    """Exit code: 0 without problems, 2 if every task failed its check or plan, otherwise 1."""
    problems = [result for result in results if result.problem]
    refused = all(
        result.problem and FAILED in (result.steps.get("check"), result.steps.get("plan")) for result in results
    )
    return 2 if refused else 1 if problems else 0


def validate_all(pipelines: Sequence["Pipeline"]) -> None:
    """Validate all configs without plugins in one process; `Pipeline.check` finds the results in the cache."""
    composed = [pipeline.composed for pipeline in pipelines if pipeline.composed]
    safe = [each for each in composed if not each.config.get("plugins")]
    if safe:
        validation.validate(safe, pipelines[0].gpu)


class Pipeline:
    """Steps from a recipe or sweep member to its scores.

    Args:
        result: result in which the steps are recorded.
        request: the requested run.
        evaluation: settings of the evaluation. In a rehearsal, BERTScore uses a stand-in model by default.
        backend: backend that carries out the commands.
        gpu: GPU for which the config is composed, checked and planned; by default the backend's.

    Attributes:
        composed: the config; None if it is invalid.
        existing: newest run with this config and data; a finished run takes precedence. See `look_up`.
        needed_gib: required memory; None before the plan.
        found: names that `--force` accepts: those of this pipeline's findings, and those that the existing run has
            overridden.
    """

    def __init__(
        self,
        result: TaskResult,
        request: Request,
        evaluation: EvaluationRequest,
        backend: Backend,
        gpu: Gpu | None = None,
    ):
        self.result = result
        self.request = request
        self.evaluation = replace(evaluation, force=request.force)
        self.backend = backend
        self.gpu = gpu or backend.gpu()
        self.composed: Composed | None = None
        self.existing: tuple[RunDir, Run] | None = None
        self.needed_gib: float | None = None
        self.found = {TOO_BIG}
        try:
            self.composed = compose.compose(request, self.gpu)
        except UserError as error:
            result.fail("check", str(error))

    @property
    def state(self) -> str | None:
        """State of the existing run, or None."""
        return self.existing[1].state if self.existing else None

    @property
    def rows(self) -> str:
        """Key shared by pipelines whose tokenized rows are the same, apart from effects of the seed."""
        composed = self.composed
        return replace(composed, config=composed.config | {"seed": None}).rows_digest if composed else ""

    def look_up(self) -> None:
        """Find the existing run in the run folders."""
        if digest := self.digest():
            self.existing = existing_runs(paths.runs(), self.result.recipe).get(digest)
        if self.existing:
            self.found.update(self.existing[1].forced)

    def is_finished(self) -> bool:
        """True if a finished run with this config and data exists."""
        if self.state != "finished":
            return False
        self.result.steps |= {"check": SKIPPED, "plan": SKIPPED}
        return True

    def check(self, with_data: bool, starts: bool = True) -> bool:
        """Check the config, and print warnings; return True if there are no errors.

        Args:
            with_data: also check the data.
            starts: whether the run is about to start. If so, the check without data, which comes first, also lets
                Axolotl validate the config, and checks the benchmarks.
        """
        if self.composed is None:
            return False
        launching = starts and not self.request.rehearse
        report = check.check_request(self.request, self.gpu, with_data, launching, self.composed)
        if with_data:
            check.tokenize_all(report, self.request.ranks)
        elif starts:
            check.add_validation([report], self.gpu, self.request.force)
        self.found.update(finding.name for finding in report.findings)
        found = backends.relevant(self.backend, report.findings)
        if not with_data:
            found = [finding for finding in found if finding.scope != "data"]
        errors = [str(finding) for finding in found if finding.level == "error"]
        if starts and not with_data and not errors:
            try:
                columns = columns_of(self.composed.origin, self.evaluation.metrics)
                benchmarks.require(columns, self.request.rehearse, self.evaluation.force)
            except UserError as error:
                errors.append(str(error))
        if errors:
            self.result.fail("check", "\n".join(errors))
            return False
        self.result.steps["check"] = DONE
        for finding in found:
            if finding.level == "warning":
                say_once(str(finding))  # printed only once if other pipelines or a check without data have found it
        return True

    def plan(self) -> bool:
        """Plan the required memory; return False if it exceeds the GPU's memory.

        For a rehearsal, this plans the recipe itself, and returns True even if the recipe exceeds the GPU's memory.
        """
        gpu, rehearsal = self.gpu, self.request.rehearse
        try:
            planned = plan.composed_for(replace(self.request, rehearse=False), gpu) if rehearsal else self.composed
            assert planned
            self.needed_gib = step_plan.required_gib(planned.config, gpu, trace=True)
        except UserError as error:
            say(f"{self.result.label}: not planned: {error}")
            self.result.steps["plan"] = "not known"
            return True
        needed = f"{self.needed_gib:.1f} GiB"
        too_big = gpu and gpu.memory and (self.needed_gib or 0) > plan.usable_gib(gpu) and not rehearsal
        if too_big and TOO_BIG not in self.request.force:
            self.result.fail("plan", f"needs {needed}, more than {gpu} has; `recipe plan` lists changes that help")
            return False
        self.result.steps["plan"] = f"{DONE}: {needed}"
        return True

    def digest(self) -> str | None:
        """Hash of config and data; None if the data is missing."""
        with suppress(UserError):
            if self.composed:
                self.composed.data = self.composed.data or datafiles.record(self.composed.config)
                return self.composed.digest
        return None

    def task(self) -> Task:
        """Task with the steps that are neither done nor running nor queued."""
        steps: list[Step] = ["evaluate"]
        if self.state not in ("queued", "running", "finished"):
            steps = ["prepare", "run", "evaluate"] if self._generates() else ["prepare", "run"]
        else:
            with suppress(UserError):
                steps = [] if self._evaluation() else ["evaluate"]
        gpus = 0 if self.request.rehearse else 1
        return Task(self.result, self._claim, gpus, steps=steps)

    def _claim(self) -> list[Command]:
        """Return the remaining commands; record finished and queued steps in the result."""
        assert self.composed
        self.look_up()
        # a run that was just created is soon running, or was left by a killed process
        while self.existing and self.state == "created" and not self.existing[0].jobs():
            time.sleep(0.2)
            self.look_up()
        if self.existing and self.state == "running" and not self.existing[0].jobs():
            where = self.existing[0].path
            raise UserError(f"{where}: still running; `recipe cancel {where}` stops it at a checkpoint")
        job = backends.job_state(self.existing[0], "run") if self.existing and self.state != "finished" else None
        unknown = job is not None and job.kind == "unknown"
        if self.existing is None or not (unknown or self.state in ("created", "queued", "running", "finished")):
            folder = (
                self.existing[0]
                if self.existing and _is_resumable(*self.existing)
                else run.create(self.composed, self.request)
            )
            training = run.resume_command(folder)
            return [training, evaluation_command(folder, self.evaluation)] if self._generates() else [training]
        folder = self.existing[0]
        if self.state == "finished":
            self.result.run = folder.path
        self.result.steps["run"] = SKIPPED if self.state == "finished" else str(job or self.state)
        try:
            evaluation = self._evaluation()
        except UserError as error:
            self.result.fail("evaluate", str(error))
            return []
        waits = not self.backend.here and job is not None and job.kind != "unknown"
        if not evaluation and self.state != "finished" and not waits:
            evaluation = "not queued; run the same command again after the training"
        if evaluation:
            self.result.steps["evaluate"] = evaluation
            return []
        return [evaluation_command(folder, self.evaluation)]

    def _generates(self) -> bool:
        """True if any metric needs predictions; eval loss metrics do not."""
        assert self.composed
        columns = columns_of(self.composed.origin, self.evaluation.metrics)
        return any(not isinstance(column.metric, LossMetric) for column in columns.values())

    def _evaluation(self) -> str | None:
        """State of the existing run's evaluation; None if it still has to start.

        SKIPPED if the evaluation is complete or not needed; otherwise the state of its job.

        Raises:
            UserError: see `EvaluationTask`.
        """
        assert self.existing
        if not self._generates():
            return SKIPPED
        folder = self.existing[0]
        if self.state == "finished":
            task = EvaluationTask(folder, self.evaluation)
            models = scorer_models(task.columns, self.evaluation.judge, self.request.rehearse)
            if evaluate.complete(task, models):
                return SKIPPED
        job = backends.job_state(folder, "evaluate", evaluation_command(folder, self.evaluation).words)
        return str(job) if job and (job.kind != "unknown" or not self.backend.here) else None


def require_known(force: Sequence[str], pipelines: Sequence[Pipeline], dry_run: bool = False) -> None:
    """Raise UserError if --force names a finding that no pipeline has.

    A dry run does not read the rows. It therefore accepts the names of all findings about data files.
    """
    names = [name for name in force if not (dry_run and last_key(name) == "path")]
    unknown_force(names, set[str]().union(*(pipeline.found for pipeline in pipelines)))


def require_scorer_models(
    tasks: Sequence[Task], columns: Mapping[str, Column], evaluation: EvaluationRequest, rehearsal: bool
) -> None:
    """Load the tasks' scorer models, to find errors before spending GPU hours.

    Raises:
        UserError, WorkFailed: see `score.require_models`.
    """
    if any("evaluate" in task.steps for task in tasks):
        require_models(scorer_models(columns, evaluation.judge, rehearsal).values())


def _is_resumable(folder: RunDir, former_run: Run) -> bool:
    """True if the run belongs to the current user and can be resumed.

    False if the run failed after a resume, unless it ran out of memory or disk space.
    """
    launches = former_run.launches
    failed_again = former_run.state == "failed" and len(launches) > 1 and not launches[-1].problem
    return not failed_again and trust.is_own(folder, former_run) and run.hindrance(folder, former_run) is None
