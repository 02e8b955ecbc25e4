"""Pipeline from config to scores for reproductions and sweeps; finished steps are skipped."""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..base import paths
from ..base.errors import UserError
from ..base.files import read_rows
from ..base.terminal import warn, warn_once
from ..check import check
from ..config import compose, datafiles
from ..config.compose import Request
from ..config.finding import NO_BASE, Finding, unknown_force
from ..config.gpus import Gpu
from ..config.merging import recipe_content
from ..config.origin import Base
from ..config.training_settings import TrainingSettings
from ..evaluate import benchmarks
from ..evaluate.evaluate import EvaluationRequest, is_complete, resolve
from ..evaluate.score import columns_of_training, require_models, scorer_models
from ..metrics import registry
from ..metrics.metric import Column
from ..metrics.registry import need_evaluation
from ..plan import plan, step_plan
from ..run import backends, run
from ..run.backends import DONE, FAILED, SKIPPED, Backend, Command, Step, Task, TaskResult
from ..run.backends.local import Local
from ..run.rundir import RunDir, all_runs
from ..training import validation
from ..training.run_record import Run

TOO_BIG = "too-big:micro_batch_size"  # name of the finding of `plan.add_memory_finding`


def evaluation_command(run_dir: RunDir, request: EvaluationRequest, result: TaskResult) -> Command:
    """Command line of a requested evaluation."""
    return Command("evaluate", run_dir, ["evaluate", str(run_dir.path), *request.options()], result)


def existing_runs(runs: Path, recipe: str) -> dict[str, tuple[RunDir, Run]]:
    """Newest run of a recipe for each digest of config and data.

    A finished run takes precedence over newer unfinished runs. Runs with several ranks are left out, because a digest
    does not cover their number.
    """
    candidates = []
    for folder in all_runs(runs / recipe):
        try:
            run = backends.read(folder)
        except UserError:  # damaged; `recipe results` reports it
            continue
        if run.digest and run.recipe == recipe and run.ranks == 1:
            candidates.append((run.digest, folder, run))
    candidates.sort(key=lambda candidate: candidate[2].state == "finished")  # later ones replace others below
    return {digest: (folder, run) for digest, folder, run in candidates}


def seeds_of(recipe: str, count: int, overridden_keys: Collection[str]) -> list[int] | list[None]:
    """Consecutive seeds for a recipe, beginning with the recipe's seed; None for one run, which keeps that seed.

    Raises:
        UserError: several seeds are requested, and the seed is overridden.
    """
    if count == 1:
        return [None]
    if "seed" in overridden_keys:
        raise UserError("--seeds: seed is already set; give only one of the two")
    first = TrainingSettings.of(recipe_content(recipe)).seed
    return [first + i for i in range(count)]


def exit_code(results: list[TaskResult]) -> int:
    """Exit code: 0 without problems, 2 if every task failed its check or plan, otherwise 1."""
    if all(map(_is_refused, results)):
        return 2
    return 1 if any(result.problem for result in results) else 0


def _is_refused(result: TaskResult) -> bool:
    """True if a task failed its check or plan."""
    return FAILED in (result.steps.get("check"), result.steps.get("plan"))


def validate_all(pipelines: Sequence["Pipeline"]) -> None:
    """Validate all configs without plugins in one process; `Pipeline.check_config` finds the results in the cache."""
    configs = [pipeline.composed for pipeline in pipelines if not pipeline.composed.config.get("plugins")]
    if configs:
        validation.validate(configs, pipelines[0].gpu)


def _errors(findings: Iterable[Finding]) -> list[str]:
    """Texts of the errors among findings."""
    return [str(finding) for finding in findings if finding.level == "error"]


class Pipeline:
    """Steps from a recipe or sweep trial to its scores.

    Args:
        result: result in which the steps are recorded.
        request: the requested run.
        evaluation: settings of the evaluation. In a rehearsal, BERTScore uses a small model by default.
        backend: backend that carries out the commands.
        gpu: GPU for which the config is composed, checked and planned; by default the backend's.

    Attributes:
        composed: the config.
        existing: newest run with this config and data; a finished run takes precedence. See `look_up`.
        needed_gib: required memory; None before the plan.
        forceable: names that `--force` accepts: those of this pipeline's findings, and those that the existing run
            has overridden.
        base: pipeline whose run is the base of this one; see `link`.
        merges: True to merge the trained adapter, for pipelines with this base.

    Raises:
        UserError: the config is invalid.
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
        self.gpu = gpu or backend.gpu
        self.composed = compose.compose(request, self.gpu)
        self.existing: tuple[RunDir, Run] | None = None
        self.needed_gib: float | None = None
        self.forceable: set[str] = set()
        self.base: Pipeline | None = None
        self.merges = False

    @property
    def state(self) -> str | None:
        """State of the existing run, or None."""
        return self.existing[1].state if self.existing else None

    @property
    def columns(self) -> dict[str, Column]:
        """Metrics of the evaluation.

        Raises:
            UserError: see `columns_of_training`.
        """
        return columns_of_training(self.composed.config, self.composed.origin, self.evaluation.metrics)

    @property
    def rows_digest(self) -> str:
        """Key shared by pipelines whose tokenized rows are the same, apart from effects of the seed."""
        return replace(self.composed, config=self.composed.config | {"seed": None}).rows_digest

    def look_up(self) -> None:
        """Find the existing run in the run folders."""
        if digest := self.digest():
            self.existing = existing_runs(paths.runs(), self.result.recipe).get(digest)
        if self.existing:
            self.forceable.update(self.existing[1].forced)

    def is_finished(self) -> bool:
        """True if a finished run with this config and data exists."""
        if self.state != "finished":
            return False
        self.result.steps |= {"check": SKIPPED, "plan": SKIPPED}
        return True

    def check_config(self, starts: bool = True) -> bool:
        """Check the config, and print warnings; return True if there are no errors.

        Args:
            starts: whether the run is about to start. If so, Axolotl validates the config, too, and the benchmarks are
                checked.
        """
        launching = starts and not self.request.rehearse
        report = check.check_request(self.request, self.gpu, data=False, launching=launching, composed=self.composed)
        if starts:
            check.add_validation([report], self.gpu, self.request.force)
        findings = [finding for finding in self._relevant(report) if finding.scope != "data"]
        if self.base:
            findings = [finding for finding in findings if finding.rule != NO_BASE]
        errors = _errors(findings)
        if starts and not errors:
            errors = self._benchmark_errors()
        return self._record_check(findings, errors)

    def check_rows(self) -> bool:
        """Check the rows of a checked config that is about to start, and print warnings; True without errors."""
        launching = not self.request.rehearse
        report = check.check_request(self.request, self.gpu, data=True, launching=launching, composed=self.composed)
        check.tokenize_all(report, self.request)
        findings = self._relevant(report)
        return self._record_check(findings, [*_errors(findings), *self._metric_errors()])

    def _metric_errors(self) -> list[str]:
        """Errors of metrics that cannot score the test rows; a rehearsal scores a sample, whose rows suffice."""
        test = datafiles.test_file(self.composed.config)
        if test is None or self.request.rehearse:
            return []
        try:
            registry.require(self.columns.values(), read_rows(Path(test)))
        except UserError as error:
            return [str(error)]
        return []

    def _relevant(self, report: check.Report) -> list[Finding]:
        """Findings that apply to the backend; `--force` accepts the names of all findings."""
        self.forceable.update(finding.name for finding in report.findings)
        return self.backend.relevant(report.findings)

    def _benchmark_errors(self) -> list[str]:
        """Errors of the benchmarks that the evaluation needs."""
        try:
            benchmarks.require(self.columns, self.request.rehearse, self.evaluation.force)
        except UserError as error:
            return [str(error)]
        return []

    def _record_check(self, findings: Sequence[Finding], errors: list[str]) -> bool:
        """Record the result of a check, and print its warnings; return True if there are no errors."""
        if errors:
            self.result.fail("check", *errors)
            return False
        self.result.steps["check"] = DONE
        for finding in findings:
            if finding.level == "warning":
                warn_once(self._text_of(finding))  # only once if other pipelines or another check have found it
        return True

    def _text_of(self, warning: Finding) -> str:
        """Text of a warning; without its line, if other recipes of the study can have it in other lines."""
        if warning.line and not self.result.trial:
            warning = replace(warning, where=paths.study_name(self.result.recipe), line=None)
        return str(warning)

    def plan(self) -> bool:
        """Plan the required memory; return False if it exceeds the GPU's memory.

        For a rehearsal, this plans the recipe itself, and returns True even if the recipe exceeds the GPU's memory.
        """
        try:
            required = self.needed_gib = self._required_gib()
        except UserError as error:
            warn(f"{self.result.label}: not planned: {error}")
            self.result.steps["plan"] = "not known"
            return True
        if self._exceeds_memory(required) and TOO_BIG not in self.request.force:
            problem = f"needs {required:.1f} GiB, more than {self.gpu} has; `recipe plan NAME` lists changes that help"
            self.result.fail("plan", problem)
            return False
        self.result.steps["plan"] = f"{DONE}: {required:.1f} GiB"
        return True

    def _required_gib(self) -> float:
        """Memory that the recipe requires, even if the request is a rehearsal."""
        composed = self.composed
        if self.request.rehearse:
            composed = plan.composed_for(replace(self.request, rehearse=False), self.gpu)
        required = step_plan.required_gib(composed.config, self.gpu, trace=True)
        assert required is not None
        return required

    def _exceeds_memory(self, required: float) -> bool:
        """True if a run, other than a rehearsal, needs more memory than its GPU has."""
        if self.request.rehearse or not self.gpu or not self.gpu.memory:
            return False
        return required > plan.usable_gib(self.gpu)

    def digest(self) -> str | None:
        """Hash of config and data; None if the data is missing."""
        with suppress(UserError):
            self.composed.data = self.composed.data or datafiles.record(self.composed.config)
            return self.composed.digest
        return None

    def task(self) -> Task:
        """Task with the steps that are neither done nor running nor queued."""
        gpus = 0 if self.request.rehearse else 1
        return Task(self.result, self._claim, self.composed.config, gpus, steps=self._remaining_steps())

    def _remaining_steps(self) -> list[Step]:
        if self.state not in ("queued", "running", "finished"):
            return ["prepare", "run", "evaluate"] if need_evaluation(self.columns.values()) else ["prepare", "run"]
        with suppress(UserError):
            if self._evaluation():
                return []
        return ["evaluate"]

    def _claim(self) -> list[Command]:
        """Return the commands that are still to be carried out, and record the steps that are finished or queued.

        An interrupted or failed run is resumed if possible, and otherwise replaced. A queued run is left to its job.

        Raises:
            UserError: the run is running on this machine.
        """
        self._start_from_base()
        self._wait_for_start()
        if self.existing is None:
            return self._training(run.create(self.composed, self.request))
        folder, record = self.existing
        if record.state == "finished":
            self.result.run = folder.path
            self.result.steps["run"] = SKIPPED
            return [*self._merge(folder), *self._evaluation_of(folder, trained=True)]
        if record.state == "running" and not folder.jobs():
            raise UserError(f"{folder.path}: still running; `recipe cancel {folder.quoted}` stops it at a checkpoint")
        job = backends.job_state(folder, "run")
        if record.state in ("failed", "interrupted") and job is None:
            if _is_resumable(folder, record):
                return self._training(folder)
            return self._training(run.create(self.composed, self.request))
        self.result.steps["run"] = str(job or record.state)
        return self._evaluation_of(folder, trained=self.backend.can_wait_for(job))

    def _start_from_base(self) -> None:
        """Compose the config again with the run of the base, which has been trained since.

        Raises:
            UserError: the base has no merged run.
        """
        if self.base:
            trained = self.base.result.run
            if trained is None or self.base.result.problem:
                raise UserError(f"{self.base.result.label}, its base, is not finished; run the same command again then")
            self.request = replace(self.request, base=trained)
            self.composed = compose.compose(self.request, self.gpu)
        base = self.composed.base
        if base and not base.adapter:
            raise UserError(f"the merged model of {base.recipe} does not exist yet", remedy=base.remedy)

    def _wait_for_start(self) -> None:
        """Look up the existing run; wait while it was just created, until it runs or turns out to be interrupted."""
        self.look_up()
        while self.existing and self.state == "created" and not self.existing[0].jobs():
            time.sleep(0.2)
            self.look_up()

    def _training(self, run_dir: RunDir) -> list[Command]:
        """Commands that train a run and evaluate it, if its metrics need that."""
        commands = [run.resume_command(run_dir, self.result), *self._merge(run_dir)]
        if need_evaluation(self.columns.values()):
            commands.append(self._evaluation_command(run_dir))
        return commands

    def _merge(self, run_dir: RunDir) -> list[Command]:
        """Command that merges a run's adapter, if other pipelines need it and it is not merged yet."""
        if not self.merges or Base.of_run(self.result.recipe, run_dir.path).adapter:
            return []
        return [Command("merge", run_dir, ["publish", str(run_dir.path), "--merge"], self.result)]

    def _evaluation_command(self, run_dir: RunDir) -> Command:
        return evaluation_command(run_dir, self.evaluation, self.result)

    def _evaluation_of(self, run_dir: RunDir, trained: bool) -> list[Command]:
        """Command of the evaluation that is still to start, if any; otherwise record the evaluation's state.

        Args:
            trained: whether the run is finished, or in a queue in which the evaluation can wait for it.
        """
        try:
            state = self._evaluation()
        except UserError as error:
            self.result.fail("evaluate", str(error))
            return []
        if not state and not trained:
            state = "not queued; run the same command again after the training"
        if state:
            self.result.steps["evaluate"] = state
            return []
        return [self._evaluation_command(run_dir)]

    def _evaluation(self) -> str | None:
        """State of the existing run's evaluation; None if it still has to start.

        SKIPPED if the evaluation is complete or not needed; otherwise the state of its job.

        Raises:
            UserError: see `evaluate.resolve` and `reusable_evaluation`.
        """
        assert self.existing
        if not need_evaluation(self.columns.values()):
            return SKIPPED
        folder = self.existing[0]
        if self.state == "finished" and is_complete(resolve(folder, self.evaluation)):
            return SKIPPED
        job = backends.unfinished_job(folder, "evaluate", self._evaluation_command(folder).words)
        return str(job) if job else None


def pipelines_of(
    requests: Iterable[tuple[TaskResult, Request]],
    evaluation: EvaluationRequest,
    backend: Backend,
    gpu: Gpu | None = None,
) -> list[Pipeline]:
    """Pipelines of the requests with a valid config; the results of the others record the error."""
    pipelines = []
    for result, request in requests:
        try:
            pipelines.append(Pipeline(result, request, evaluation, backend, gpu))
        except UserError as error:
            result.fail("check", error.summary, *map(str, error.further))
    return pipelines


def link(pipelines: Sequence[Pipeline]) -> None:
    """Connect each pipeline whose recipe begins with the run of another one to that one, with the same seed if any."""
    for pipeline in pipelines:
        for other in pipelines:
            base = pipeline.composed.base
            if base and base.recipe == other.result.recipe and pipeline.result.seed == other.result.seed:
                pipeline.base, other.merges = other, isinstance(other.backend, Local)


def require_known(force: Sequence[str], pipelines: Sequence[Pipeline], dry_run: bool = False) -> None:
    """Raise UserError if --force names a finding that no pipeline has.

    A dry run reads no rows and needs no GPU. It therefore accepts the names of all findings about data files and this
    machine.
    """
    names = [name for name in force if not check.is_found_at_start(name)] if dry_run else force
    unknown_force(names, {TOO_BIG}.union(*(pipeline.forceable for pipeline in pipelines)))


def require_scorer_models(
    tasks: Sequence[Task], columns: Mapping[str, Column], evaluation: EvaluationRequest, rehearsal: bool
) -> None:
    """Load the tasks' scorer models, to find errors before spending GPU hours.

    Raises:
        UserError, WorkFailed: see `score.require_models`.
    """
    if any("evaluate" in task.steps for task in tasks):
        require_models(scorer_models(columns, evaluation.scorer, rehearsal).values())


def _is_resumable(run_dir: RunDir, former_run: Run) -> bool:
    """True if the run belongs to the current user and can be resumed.

    False if the run failed after a resume, unless it ran out of memory or disk space.
    """
    launches = former_run.launches
    failed_again = former_run.state == "failed" and len(launches) > 1 and not launches[-1].lacked_space
    return not failed_again and run_dir.is_own(former_run) and run.hindrance(run_dir, former_run) is None
