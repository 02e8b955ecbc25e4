"""A study from its data to its table, each step unless it was done before: `recipe reproduce`."""

import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import bertscore, check, compose, config, data, datafiles, evaluate, fetch, gpus, models, plan, provenance
from .compose import Composed, Request
from .errors import UserError, did_you_mean
from .paths import RUNS, find_recipe
from .progress import say
from .run import end_with_parent, stop_requests
from .rundir import Run, RunDir, all_runs, held
from .study import Study

DONE, SKIPPED, FAILED = "done", "skipped", "failed"
PATIENCE = 120  # seconds for a run to end that an earlier reproduction had begun when it was killed

_Commands = Generator[list[str], tuple[int, str], None]
"""The commands of one recipe, each asked for when the one before has ended with an exit code and an output."""


@dataclass
class Outcome:
    """What became of a recipe: each step done, skipped because its inputs are as they were, or failed, and why."""

    recipe: str
    steps: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    run: Path | None = None

    def fail(self, step: str, problem: str) -> None:
        """Note that a step failed, which is the recipe's last."""
        self.steps[step], self.problem = FAILED, problem

    def as_row(self) -> dict[str, Any]:
        """The row of a summary."""
        return {"recipe": self.recipe} | {step: self.steps.get(step) for step in ("check", "plan", "run", "evaluate")}


def chosen(of_study: Study, only: list[str]) -> list[str]:
    """The recipes of a study to run: those that it published scores of, or those of its recipes that are named.

    Raises:
        UserError: a name is that of no recipe of the study.
    """
    known = [*of_study.published, *of_study.beside]
    recipes = []
    for name in only:
        meant = [recipe for recipe in known if name in (recipe, recipe.partition("/")[2])]
        if not meant:
            short = [recipe.partition("/")[2] for recipe in known]
            raise UserError(
                f"--only {name}: no recipe of the study{did_you_mean(name, short)}; it has {', '.join(short)}"
            )
        recipes += meant
    return list(dict.fromkeys(recipes)) or list(of_study.published)


@dataclass
class Options:
    """How a study is to be reproduced.

    Attributes:
        request: what is laid over each recipe; its name does not matter. A mirror is taken where a model is gated.
        only: the recipes to take, by default those with published scores.
        jobs: how many recipes to work on at a time, each on a GPU of its own.
        evaluation: how each run is evaluated; BERTScore's model is by default that of the published scores, and the
            stand-in in a rehearsal.
        runs: the folder for the runs.
    """

    request: Request
    only: list[str] = field(default_factory=list)
    jobs: int = 1
    evaluation: evaluate.Request = field(default_factory=evaluate.Request)
    runs: Path = RUNS


def reproduce(of_study: Study, options: Options) -> list[Outcome]:
    """Bring every recipe of a study to its scores; what was done before with the same inputs is not done again.

    All recipes are checked and planned before the first starts. One that fails does not keep the others from going on.

    Raises:
        UserError: what was asked for is wrong, or the data there is not the study's; nothing was started.
        WorkFailed: the data cannot be fetched, or BERTScore's model not be loaded.
    """
    recipes, runs = chosen(of_study, options.only), options.runs
    rehearsal = options.request.rehearse
    devices = _devices(options.jobs, rehearsal)
    if not rehearsal and options.evaluation.judge is None:
        options.evaluation.judge = bertscore.DEFAULT
    runs.mkdir(parents=True, exist_ok=True)
    with held(runs / ".reproduce.lock", "another reproduction is going on there"):
        outcomes = [Outcome(name) for name in recipes]
        tasks = [_Recipe(outcome, _request(options.request, outcome.recipe), options) for outcome in outcomes]
        begun = [task for task in tasks if task.is_finished() or task.check(with_data=False)]
        _have_data(of_study, [task.composed for task in begun if task.composed])
        ready = [task for task in begun if task.is_finished() or (task.check(with_data=True) and task.plan())]
        judge = bertscore.judge(options.evaluation.judge, options.evaluation.judge_layer, rehearsal)
        if judge and not all(task.is_evaluated(judge) for task in ready):
            bertscore.layer_of(judge)  # before GPU hours are spent on what it is to score
        _work_off([(task.outcome, task.work()) for task in ready], devices, runs)
    return outcomes


def _request(shared: Request, recipe: str) -> Request:
    """What is laid over all recipes, for one; a mirror only where the model is gated."""
    base_model = str(config.read_yaml(find_recipe(recipe)[1]).get("base_model"))
    return replace(shared, name=recipe, mirror=shared.mirror and bool(models.catalogue()[base_model]["gated"]))


def exit_code(outcomes: list[Outcome]) -> int:
    """0 where all is done, 2 where nothing was started because no recipe could be, otherwise 1."""
    problems = [outcome for outcome in outcomes if outcome.problem]
    refused = all(
        outcome.problem and FAILED in (outcome.steps.get("check"), outcome.steps.get("plan")) for outcome in outcomes
    )
    return 2 if refused else 1 if problems else 0


def _devices(jobs: int, rehearsal: bool) -> list[str | None]:
    """For each job the GPU that it sees; None leaves it to the run."""
    if jobs == 1 or rehearsal:
        return [None] * jobs
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = named.split(",") if named else [str(i) for i in range(len(provenance.gpus()))]
    if jobs > len(seen):
        raise UserError(f"--jobs {jobs}: one GPU a job, and this machine has {len(seen)}")
    return [*seen[:jobs]]


def _have_data(of_study: Study, configs: list[Composed]) -> None:
    """Fetch and prepare the study's data in the forms that some configs read, where they are not there.

    Raises:
        UserError: what is there is not the study's data.
    """
    entries = [entry for composed in configs for _, entry in datafiles.datasets(composed.config)]
    needed = {Path(str(entry.get("path"))).parent for entry in entries}
    for name, form in of_study.data.input_formats.items():
        folder = Path(form.folder)
        if folder not in needed:
            continue
        if not folder.exists():
            say(f"data: fetching and preparing {folder}")
            if not all((of_study.data.raw / file).is_file() for file in of_study.data.files):
                fetch.fetch(of_study.data, of_study.data.raw)
            data.prepare(data.fetched(of_study.data), folder, of_study, name)
        if reason := data.is_not_prepared(of_study, folder, name):
            raise UserError(
                f"{folder}: not the study's data: {reason}; move it away to have it prepared, or run the recipes on it "
                "one by one"
            )
        say(f"data: {folder} is the study's")


class _Recipe:
    """A recipe of the study on its way."""

    def __init__(self, outcome: Outcome, request: Request, options: Options):
        self.outcome, self.request, self.options = outcome, request, options
        self.composed: Composed | None = None
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

    def check(self, with_data: bool) -> bool:
        """Whether nothing is wrong with it, as far as that can be told with or without its data."""
        if self.composed is None:
            return False
        starts = not self.options.request.rehearse
        found = check.check(self.request, gpus.here(), data=with_data, launching=starts).findings
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

    def plan(self) -> bool:
        """Whether it fits this machine's GPU, as far as that can be told."""
        on_gpu = gpus.here() if not self.options.request.rehearse else None
        try:
            planned = plan.of_request(replace(self.request, rehearse=False), on_gpu, runs=self.options.runs)
        except UserError as error:
            say(f"{self.outcome.recipe}: not planned: {error}")
            self.outcome.steps["plan"] = "not known"
            return True
        needed, card = f"{planned['memory']['needed'] / 2**30:.1f} GiB", planned["cards"][0]
        if on_gpu and not card["fits"]:
            self.outcome.fail("plan", f"needs {needed}, more than {on_gpu} has; `recipe plan` says what to change")
            return False
        self.outcome.steps["plan"] = f"{DONE}: {needed}"
        return True

    def is_evaluated(self, judge: bertscore.Judge | None) -> bool:
        """Whether its training and its evaluation were done before."""
        former = self._former()
        if not former or former[1].state != "finished":
            return False
        with suppress(UserError):
            return evaluate.complete(evaluate.Task(former[0], self.options.evaluation), judge) is not None
        return False

    def _former(self) -> tuple[RunDir, Run] | None:
        """The newest run of this config on the same data; a finished one before others."""
        digest, same = self._digest(), []
        for folder in all_runs(self.options.runs / self.outcome.recipe) if digest else ():
            with suppress(UserError):  # a folder that is no run
                run = folder.read()
                if (run.digest, run.recipe) == (digest, self.outcome.recipe) and _is_plain(run):
                    same.append((folder, run))
        return max(same, key=lambda one: (one[1].state == "finished", one[0].path.name), default=None)

    def _digest(self) -> str | None:
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
        runs = ["--runs", str(self.options.runs)]
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
            asked, folder = self.options.evaluation, RunDir(self.outcome.run)
            judge = bertscore.judge(asked.judge, asked.judge_layer, self.options.request.rehearse)
            if evaluate.complete(evaluate.Task(folder, asked), judge):
                self.outcome.steps["evaluate"] = SKIPPED
                return
            by = ["--bertscore", asked.judge] if asked.judge else []
            by += ["--bertscore-layer", str(asked.judge_layer)] if asked.judge_layer else []
            size = ["--batch-size", str(asked.batch_size)]
            code, _ = yield ["evaluate", str(folder.path), *by, *size, *runs]
            if code:
                raise UserError("the evaluation was refused" if code == 2 else "the evaluation failed")
            self.outcome.steps["evaluate"] = DONE


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


def _work_off(works: list[tuple[Outcome, _Commands]], devices: list[str | None], runs: Path) -> None:
    """Run the commands of several recipes, those of as many at a time as there are devices.

    A request to stop is passed on to what is running, which ends in order, and nothing more is begun.
    """
    waiting, free, active = deque(works), list(devices), list[_Child]()
    with stop_requests() as stops:
        passed_on = 0
        while active or (waiting and not stops):
            while waiting and free and not stops:
                outcome, commands = waiting.popleft()
                log = runs / outcome.recipe / "reproduce.log" if len(devices) > 1 else None
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
    """The commands of one recipe, of which one is running at a time.

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
        say(f"{self.outcome.recipe}: recipe {shlex.join(command)}")
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
