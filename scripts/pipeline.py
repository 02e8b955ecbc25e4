"""From a config to its scores, each step unless it was done before: what `recipe reproduce` and `recipe sweep` do."""

import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import bertscore, check, compose, datafiles, evaluate, gpus, plan, provenance
from .compose import Composed, Request
from .errors import UserError
from .gpus import Gpu
from .progress import say
from .run import end_with_parent, stop_requests
from .rundir import Run, RunDir, all_runs

DONE, SKIPPED, FAILED = "done", "skipped", "failed"
PATIENCE = 120  # seconds for a run to end that an earlier command had begun when it was killed

_Commands = Generator[list[str], tuple[int, str], None]
"""The commands of one pipeline, each asked for when the one before has ended with an exit code and an output."""


@dataclass
class Outcome:
    """What became of a recipe: each step done, skipped because its inputs are as they were, or failed, and why.

    Attributes:
        member: which of a sweep over the recipe it is.
    """

    recipe: str
    member: str | None = None
    steps: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    run: Path | None = None

    def fail(self, step: str, problem: str) -> None:
        """Note that a step failed, which is the last then."""
        self.steps[step], self.problem = FAILED, problem

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.member or self.recipe

    def as_row(self) -> dict[str, Any]:
        """The row of a summary."""
        name = {"member" if self.member else "recipe": self.label}
        return name | {step: self.steps.get(step) for step in ("check", "plan", "run", "evaluate")}


def exit_code(outcomes: list[Outcome]) -> int:
    """0 where all is done, 2 where nothing was started because no recipe could be, otherwise 1."""
    problems = [outcome for outcome in outcomes if outcome.problem]
    refused = all(
        outcome.problem and FAILED in (outcome.steps.get("check"), outcome.steps.get("plan")) for outcome in outcomes
    )
    return 2 if refused else 1 if problems else 0


def devices_for(jobs: int, rehearsal: bool) -> list[str | None]:
    """For each job the GPU that it sees; None leaves it to the run.

    Raises:
        UserError: there are fewer GPUs than jobs.
    """
    if jobs == 1 or rehearsal:
        return [None] * jobs
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = named.split(",") if named else [str(i) for i in range(len(provenance.gpus()))]
    if jobs > len(seen):
        raise UserError(f"--jobs {jobs}: one GPU a job, and this machine has {len(seen)}")
    return [*seen[:jobs]]


class Pipeline:
    """A recipe, or a member of a sweep, on its way.

    Args:
        outcome: where what became of it is noted.
        request: the run that is asked for.
        evaluation: how that is evaluated; BERTScore's model is the stand-in in a rehearsal, unless named.
        runs: the folder for the runs.
    """

    def __init__(self, outcome: Outcome, request: Request, evaluation: evaluate.Request, runs: Path):
        self.outcome, self.request, self.asked, self.runs = outcome, request, evaluation, runs
        self.composed: Composed | None = None
        self.planned: dict[str, Any] | None = None
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
            starts: whether it is about to start here.
        """
        if self.composed is None:
            return False
        here = starts and not self.request.rehearse
        found = check.check(self.request, gpus.here(), data=with_data, launching=here).findings
        if not with_data:
            found = [finding for finding in found if finding.rule != "missing-file" or "datasets" not in finding.key]
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
        """Whether it fits a GPU, by default this machine's, as far as that can be told.

        Of a rehearsal the recipe itself is planned, and what it rehearses need not fit.
        """
        gpu = gpu or gpus.here()
        try:
            self.planned = plan.of_request(replace(self.request, rehearse=False), gpu, runs=self.runs)
        except UserError as error:
            say(f"{self.outcome.label}: not planned: {error}")
            self.outcome.steps["plan"] = "not known"
            return True
        needed, card = f"{self.planned['memory']['needed'] / 2**30:.1f} GiB", self.planned["cards"][0]
        if gpu and not card["fits"] and not self.request.rehearse:
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
            return evaluate.complete(evaluate.Task(former[0], self.asked), self.judge()) is not None
        return False

    def judge(self) -> bertscore.Judge | None:
        """Whose BERTScore its evaluation has."""
        return bertscore.judge(self.asked.judge, self.asked.judge_layer, self.request.rehearse)

    def _former(self) -> tuple[RunDir, Run] | None:
        """The newest run of this config on the same data; a finished one before others."""
        digest, same = self.digest(), []
        for folder in all_runs(self.runs / self.outcome.recipe) if digest else ():
            with suppress(UserError):  # a folder that is no run
                run = folder.read()
                if (run.digest, run.recipe) == (digest, self.outcome.recipe) and _is_plain(run):
                    same.append((folder, run))
        return max(same, key=lambda one: (one[1].state == "finished", one[0].path.name), default=None)

    def digest(self) -> str | None:
        """The hash of its config and data; None where they are not there."""
        if self.composed and not self.composed.data:
            with suppress(UserError):
                self.composed.data = datafiles.record(self.composed.config)
        return self.composed.digest if self.composed and self.composed.data else None

    def _settled(self) -> tuple[RunDir, Run] | None:
        """`_former`, once it is not going on: the training of a killed reproduction ends by itself, at a checkpoint."""
        begun = time.monotonic()
        while (former := self._former()) and former[1].state in ("created", "running"):
            if time.monotonic() - begun > PATIENCE:
                raise UserError(f"{former[0].path}: is going on; wait for its end, or stop it")
            time.sleep(0.5)
        return former

    def work(self) -> _Commands:
        """What has to be run for it; what became of that is noted in its outcome."""
        runs = ["--runs", str(self.runs)]
        with self._failing("run"):
            former = self._settled()
            if former and former[1].state == "finished":
                self.outcome.steps["run"], self.outcome.run = SKIPPED, former[0].path
            else:
                code, shown = 2, ""
                if former and former[0].config.is_file():
                    code, shown = yield ["resume", str(former[0].path), *runs]
                if code == 2 or (code and former and former[1].state == "failed"):  # it cannot go on, or failed again
                    code, shown = yield ["run", self.outcome.recipe, *_options(self.request), *runs]
                if code:
                    raise UserError("the training was refused" if code == 2 else "the training failed")
                self.outcome.steps["run"], self.outcome.run = DONE, Path(shown.splitlines()[-1])
        if self.outcome.run is None:
            return
        with self._failing("evaluate"):
            folder = RunDir(self.outcome.run)
            if evaluate.complete(evaluate.Task(folder, self.asked), self.judge()):
                self.outcome.steps["evaluate"] = SKIPPED
                return
            code, _ = yield ["evaluate", str(folder.path), *_options_of_evaluation(self.asked), *runs]
            if code:
                raise UserError("the evaluation was refused" if code == 2 else "the evaluation failed")
            self.outcome.steps["evaluate"] = DONE


def need_judge(pipelines: Sequence[Pipeline]) -> None:
    """Have the model there that is to score what several pipelines generate, before GPU hours are spent on that.

    Raises:
        UserError, WorkFailed: see `bertscore.layer_of`.
    """
    judge = pipelines[0].judge() if pipelines else None
    if judge and not all(one.is_evaluated() for one in pipelines):
        bertscore.layer_of(judge)


def _is_plain(run: Run) -> bool:
    """Whether a run was started with nothing that its digest does not tell."""
    return run.gpus_used == 1 and not run.axolotl_arguments


def _options(request: Request) -> Iterator[str]:
    """A request as options of `recipe run`."""
    for option, values in (("--profile", request.profiles), ("--set", request.overrides)):
        for value in values:
            yield from (option, value)
    if request.rehearse:
        yield "--rehearse"
    if request.mirror:
        yield "--mirror"


def _options_of_evaluation(asked: evaluate.Request) -> Iterator[str]:
    """A request as options of `recipe evaluate`."""
    yield from ("--batch-size", str(asked.batch_size))
    for option, value in (
        ("--bertscore", asked.judge),
        ("--bertscore-layer", asked.judge_layer),
        ("--limit", asked.limit),
    ):
        if value is not None:
            yield from (option, str(value))


def work_off(works: list[tuple[Outcome, _Commands]], devices: list[str | None], runs: Path) -> None:
    """Run the commands of several pipelines, those of as many at a time as there are devices.

    A request to stop is passed on to what is running, which ends in order, and nothing more is begun.
    """
    waiting, free, active = deque(works), list(devices), list[_Child]()
    with stop_requests() as stops:
        passed_on = 0
        while active or (waiting and not stops):
            while waiting and free and not stops:
                outcome, commands = waiting.popleft()
                log = runs / outcome.recipe / f"{outcome.member or 'reproduce'}.log" if len(devices) > 1 else None
                active.append(_Child(outcome, commands, free.pop(0), log))
            for child in list(active):
                if not child.goes_on(may_begin=not stops):
                    active.remove(child)
                    free.append(child.device)
            for _ in stops[passed_on:]:
                passed_on += 1
                for child in active:
                    child.terminate()
            time.sleep(0.05)
    for outcome, _ in waiting:
        outcome.problem = "interrupted before it was begun; the same command goes on"


class _Child:
    """The commands of one pipeline, of which one is running at a time.

    Args:
        outcome: where an interruption is noted.
        commands: the commands.
        device: the GPU that they see; None leaves it to them.
        log: the file for what they say; None for this process's own stderr.
    """

    def __init__(self, outcome: Outcome, commands: _Commands, device: str | None, log: Path | None):
        self.outcome, self.device = outcome, device
        self._commands, self._log = commands, log
        self._process: subprocess.Popen[str] | None = None

    def goes_on(self, may_begin: bool) -> bool:
        """Begin the next command once the one before has ended; False where there is none, or may be none, any more."""
        result = None
        if self._process:
            if self._process.poll() is None:
                return True
            result = self._process.returncode, self._process.communicate()[0]
        if not may_begin:
            self.outcome.problem = "interrupted; the same command goes on"
            return False
        try:
            command = self._commands.send(result) if result else next(self._commands)
        except StopIteration:
            if self._log and self.outcome.problem and self._log.is_file():
                self.outcome.problem += f"; {self._log} has what was said"
            return False
        say(f"{self.outcome.label}: recipe {shlex.join(command)}")
        self._start(command)
        return True

    def _start(self, command: list[str]) -> None:
        with ExitStack() as stack:
            log = None
            if self._log:
                self._log.parent.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(self._log.open("ab"))
            self._process = subprocess.Popen(
                [str(Path(sys.executable).with_name("recipe")), *command],
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": self.device} if self.device else {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops the others in order
                preexec_fn=end_with_parent,
            )

    def terminate(self) -> None:
        """Pass a request to stop on."""
        if self._process:
            self._process.terminate()
