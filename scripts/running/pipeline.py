"""From a config to its scores, each step unless it was done before: what `recipe reproduce` and `recipe sweep` do."""

import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from .. import places
from ..base import yamlfiles
from ..base.errors import UserError
from ..base.progress import say
from ..checks import check
from ..configs import compose, datafiles
from ..configs.compose import Composed, Request
from ..configs.config import Difference
from ..configs.gpus import Gpu
from ..places import Place
from ..planning import fit, need, plan
from ..runs.lookup import all_runs
from ..runs.rundir import JobState, Run, RunDir
from ..runs.tasks import DONE, FAILED, SKIPPED, Command, Outcome, Step, Work
from ..scores import bertscore, evaluate
from . import run

PATIENCE = 120  # seconds for a run to end that an earlier command had begun when it was killed
OF_ROWS = ("datasets", "test_datasets", "base_model", "special_tokens", "sequence_len")  # what decides on rows


def exit_code(outcomes: list[Outcome]) -> int:
    """0 where all is done or queued, 2 where nothing was started because no recipe could be, otherwise 1."""
    problems = [outcome for outcome in outcomes if outcome.problem]
    refused = all(
        outcome.problem and FAILED in (outcome.steps.get("check"), outcome.steps.get("plan")) for outcome in outcomes
    )
    return 2 if refused else 1 if problems else 0


class Pipeline:
    """A recipe, or a member of a sweep, on its way.

    Args:
        outcome: where what became of it is noted.
        request: the run that is asked for.
        evaluation: how that is evaluated; BERTScore's model is the stand-in in a rehearsal, unless named.
        runs: the folder for the runs.
        place: where it is carried out.
    """

    def __init__(
        self, outcome: Outcome, request: Request, evaluation: evaluate.EvaluationRequest, runs: Path, place: Place
    ):
        self.outcome, self.request, self.asked, self.runs, self.place = outcome, request, evaluation, runs, place
        self.composed: Composed | None = None
        self.needed_gib: float | None = None
        self.told: Container[Difference] = ()  # differences from the recipe that are told for several together
        with self._failing("check"):
            self.composed = compose.compose(request)

    @contextmanager
    def _failing(self, step: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.outcome.fail(step, str(error))

    def is_finished(self) -> bool:
        """Whether it was trained before on the data that is there."""
        former = self._former()
        if not former or former[1].state != "finished":
            return False
        self.outcome.steps |= {"check": SKIPPED, "plan": SKIPPED}
        return True

    def check(self, with_data: bool, starts: bool = True) -> bool:
        """Whether nothing is wrong with it, as far as that can be told with or without its data.

        Args:
            with_data: whether to read its rows.
            starts: whether it is about to start.
        """
        if self.composed is None:
            return False
        launching = starts and not self.request.rehearse
        found = check.check(self.request, self.place.gpu(), data=with_data, launching=launching).findings
        found = places.relevant(self.place, found)
        if not with_data:
            found = [finding for finding in found if finding.scope != "data"]
        errors = [str(finding) for finding in found if finding.level == "error"]
        if errors:
            self.outcome.fail("check", "\n".join(errors))
        elif with_data:
            self.outcome.steps["check"] = DONE
            for finding in found:
                if finding.level == "warning":
                    say(str(finding))
        return not errors

    def plan(self, gpu: Gpu | None = None) -> bool:
        """Whether it fits a GPU, by default its place's, as far as that can be told.

        Of a rehearsal the recipe itself is planned, and what it rehearses need not fit.
        """
        gpu = gpu or self.place.gpu()
        try:
            planned = plan.composed_for(replace(self.request, rehearse=False)).config
            self.needed_gib = need.needed_gib(planned, gpu, anew=True)
        except UserError as error:
            say(f"{self.outcome.label}: not planned: {error}")
            self.outcome.steps["plan"] = "not known"
            return True
        needed = f"{self.needed_gib:.1f} GiB"
        if gpu and gpu.memory and (self.needed_gib or 0) > fit.usable_gib(gpu) and not self.request.rehearse:
            self.outcome.fail("plan", f"needs {needed}, more than {gpu} has; `recipe plan` says what to change")
            return False
        self.outcome.steps["plan"] = f"{DONE}: {needed}"
        return True

    def is_evaluated(self) -> bool:
        """Whether its training and its evaluation were done before."""
        former = self._former()
        if not former or former[1].state != "finished":
            return False
        with suppress(UserError):
            return evaluate.complete(evaluate.EvaluationTask(former[0], self.asked), self.judge()) is not None
        return False

    def has_failed(self) -> bool:
        """Whether its training was tried before in vain."""
        former = self._former()
        return former is not None and former[1].state == "failed"

    def judge(self) -> bertscore.Judge | None:
        """Whose BERTScore its evaluation has."""
        return bertscore.judge(self.asked.judge, self.asked.judge_layer, self.request.rehearse)

    def _former(self) -> tuple[RunDir, Run] | None:
        """The newest run of this config on the same data; a finished one before others."""
        digest, same = self.digest(), []
        for folder in all_runs(self.runs / self.outcome.recipe) if digest else ():
            with suppress(UserError):  # a folder that is no run
                record = places.read(folder)
                if (record.digest, record.recipe) == (digest, self.outcome.recipe) and _is_plain(record):
                    same.append((folder, record))
        return max(same, key=lambda one: (one[1].state == "finished", one[0].path.name), default=None)

    def digest(self) -> str | None:
        """The hash of its config and data; None where they are not there."""
        if self.composed and not self.composed.data:
            with suppress(UserError):
                self.composed.data = datafiles.record(self.composed.config)
        return self.composed.digest if self.composed and self.composed.data else None

    def _settled(self) -> tuple[RunDir, Run] | None:
        """`_former`, once no killed command's training goes on here: that ends by itself, at a checkpoint."""
        begun = time.monotonic()
        while (former := self._former()) and former[1].state in ("created", "running") and not former[0].jobs():
            if time.monotonic() - begun > PATIENCE:
                raise UserError(f"{former[0].path}: is going on; wait for its end, or stop it")
            time.sleep(0.5)
        return former

    def work(self) -> Work:
        """What has to be carried out for it."""
        former = self._former()
        steps: list[Step] = ["evaluate"]
        if not former or former[1].state not in ("queued", "running", "finished"):
            steps = ["prepare", "run", "evaluate"]
        elif self.is_evaluated() or self._evaluation_job(former[0]):
            steps = []
        return Work(self.outcome, self._commands(), gpus=0 if self.request.rehearse else 1, steps=steps)

    def _commands(self) -> Iterator[Command]:
        """Its commands from where it is; steps that were done before, or wait in a queue, are noted in its outcome."""
        assert self.composed
        former = self._settled()
        job = places.job_state(former[0], "run") if former and former[1].state != "finished" else None
        unknown = job is not None and job.kind == "unknown"
        if former and (unknown or former[1].state in ("created", "queued", "running")):
            folder = former[0]
            self.outcome.steps["run"] = str(job or former[1].state)
            later = "not queued; the same command does it once this is trained"
            evaluation = self._evaluation_job(folder)
            if evaluation or unknown or self.place.here or not job:
                self.outcome.steps["evaluate"] = str(evaluation or later)
                return
        elif former and former[1].state == "finished":
            folder = former[0]
            self.outcome.steps["run"], self.outcome.run = SKIPPED, folder.path
            with self._failing("evaluate"):
                if state := self._state_of_evaluation(folder):
                    self.outcome.steps["evaluate"] = state
            if "evaluate" in self.outcome.steps:
                return
        else:
            goes_on = former and _goes_on(*former)
            folder = former[0] if former and goes_on else run.create(self.composed, self.request, self.runs, self.told)
            rows = yamlfiles.write_yaml({key: self.composed.config.get(key) for key in OF_ROWS})
            yield run.command(folder, self.runs, rows)
        yield evaluate.command(folder, self.asked, self.runs)

    def _evaluation_job(self, folder: RunDir) -> JobState | None:
        return places.job_state(folder, "evaluate", evaluate.command(folder, self.asked, self.runs).words)

    def _state_of_evaluation(self, folder: RunDir) -> str | None:
        if evaluate.complete(evaluate.EvaluationTask(folder, self.asked), self.judge()):
            return SKIPPED
        state = self._evaluation_job(folder)
        return None if state is None or (state.kind == "unknown" and self.place.here) else str(state)


def need_judge(pipelines: Sequence[Pipeline]) -> None:
    """Have the model there that is to score what several pipelines generate, before GPU hours are spent on that.

    Raises:
        UserError, WorkFailed: see `bertscore.layer_of`.
    """
    judge = pipelines[0].judge() if pipelines else None
    if judge and not all(one.is_evaluated() for one in pipelines):
        bertscore.layer_of(judge)


def _is_plain(former: Run) -> bool:
    """Whether a run was started with nothing that its digest does not tell."""
    return former.ranks == 1 and not former.axolotl_arguments


def _goes_on(folder: RunDir, former: Run) -> bool:
    """Whether an unfinished run is worth going on with: one that failed twice is begun anew."""
    failed_again = former.state == "failed" and len(former.launches) > 1
    return not failed_again and run.hindrance(folder, former) is None
