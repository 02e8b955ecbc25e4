"""A study from its data to its table, each step unless it was done before: `recipe reproduce`."""

import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import bertscore, check, compose, data, datafiles, evaluate, fetch, gpus, plan, provenance
from .compose import Composed, Request
from .errors import UserError, did_you_mean
from .files import read_json, sha256
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
        UserError: a name is that of no recipe of the study, or of several.
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


def reproduce(
    of_study: Study, only: list[str], request: Request, runs: Path, jobs: int = 1, judge: str | None = None
) -> list[Outcome]:
    """Bring every recipe of a study to its scores; what was done before with the same inputs is not done again.

    All recipes are checked and planned before the first starts. One that fails does not keep the others from going on.

    Args:
        of_study: the study.
        only: the recipes to take, by default those with published scores.
        request: what is laid over each of them; its name does not matter.
        runs: the folder for the runs.
        jobs: how many recipes to work on at a time, each on a GPU of its own.
        judge: BERTScore's model; by default the published scores', and the stand-in in a rehearsal.

    Raises:
        UserError: what was asked for is wrong, or the data cannot be had; nothing was started.
        WorkFailed: the data cannot be fetched.
    """
    recipes = chosen(of_study, only)
    devices = _devices(jobs, request.rehearse)
    judge = judge or (None if request.rehearse else bertscore.DEFAULT)
    runs.mkdir(parents=True, exist_ok=True)
    with held(runs / ".reproduce.lock", "another reproduction is going on there"):
        requests = [replace(request, name=name) for name in recipes]
        _have_data(of_study, requests)
        outcomes = [Outcome(name) for name in recipes]
        works = []
        for outcome, one in zip(outcomes, requests, strict=True):
            if composed := _checked(outcome, one, runs):
                works.append((outcome, _work(outcome, one, composed, runs, judge)))
        _work_off(works, devices, runs)
    return outcomes


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


def _have_data(of_study: Study, requests: list[Request]) -> None:
    """Fetch and prepare the study's data in the forms that some configs read, unless they are there."""
    needed = set()
    for request in requests:
        with suppress(UserError):  # which the check tells
            paths = [str(entry.get("path")) for _, entry in datafiles.datasets(compose.compose(request).config)]
            needed |= {Path(path).parent for path in paths}
    for name, form in of_study.data.input_formats.items():
        folder = Path(form.folder)
        if folder not in needed:
            continue
        if _prepared(folder, name):
            say(f"data: {folder} is there, as its manifest says")
            continue
        say(f"data: fetching and preparing {folder}")
        fetch.fetch(of_study.data, of_study.data.raw)
        data.prepare(data.fetched(of_study.data), folder, of_study, name)


def _prepared(folder: Path, input_format: str) -> bool:
    """Whether a folder holds all splits and subsets, in one form, that its manifest lists."""
    splits = read_json(folder / data.MANIFEST).get("splits", {})
    files = [*splits.values(), *splits.get("test", {}).get("subsets", {}).values()]
    return (
        set(splits) == set(data.SPLITS)
        and all(split["input_format"] == input_format for split in splits.values())
        and all((folder / f["file"]).is_file() and sha256(folder / f["file"]) == f["sha256"] for f in files)
    )


def _checked(outcome: Outcome, request: Request, runs: Path) -> Composed | None:
    """A recipe's config once it is checked and planned; None where it cannot run. Done before for a finished run."""
    try:
        composed = compose.compose(request)
        composed.data = datafiles.record(composed.config)
    except UserError as error:
        outcome.fail("check", str(error))
        return None
    begun = time.monotonic()
    while (former := _former(composed, runs)) and former[1].state in ("created", "running"):
        if time.monotonic() - begun > PATIENCE:
            outcome.fail("run", f"{former[0].path}: is going on; wait for its end, or stop it")
            return None
        time.sleep(0.2)
    if former and former[1].state == "finished":
        outcome.steps |= {"check": SKIPPED, "plan": SKIPPED}
        return composed
    report = check.check(request, gpus.here(), data=True)
    if report.count("error"):
        outcome.fail("check", "\n".join(str(finding) for finding in report.findings if finding.level == "error"))
        return None
    outcome.steps["check"] = DONE
    try:
        planned = plan.of_request(replace(request, rehearse=False), gpus.here(), runs=runs)
    except UserError as error:
        say(f"{outcome.recipe}: not planned: {error}")
        outcome.steps["plan"] = "not known"
        return composed
    card = planned["cards"][0]
    needed = f"{planned['memory']['needed'] / 2**30:.1f} GiB"
    if gpus.here() and not request.rehearse and not card["fits"]:
        outcome.fail("plan", f"needs {needed}, and {card['name']} has less; `recipe plan {outcome.recipe}` says more")
        return None
    outcome.steps["plan"] = f"{DONE}: {needed}"
    return composed


def _former(composed: Composed, runs: Path) -> tuple[RunDir, Run] | None:
    """The newest run of a config on the same data; a finished one before others."""
    same = []
    for folder in all_runs(runs / composed.recipe):
        with suppress(UserError):  # a folder that is no run
            run = folder.read()
            if (run.digest, run.recipe, run.axolotl_arguments) == (composed.digest, composed.recipe, []):
                same.append((folder, run))
    return max(same, key=lambda one: (one[1].state == "finished", one[0].path.name), default=None)


def _work(outcome: Outcome, request: Request, composed: Composed, runs: Path, judge: str | None) -> _Commands:
    """What has to be run for a recipe, and how it went."""
    former = _former(composed, runs)
    if former and former[1].state == "finished":
        outcome.steps["run"], folder = SKIPPED, former[0]
    else:
        code, shown = 2, ""
        if former and former[0].config.is_file():
            code, shown = yield ["resume", str(former[0].path), "--runs", str(runs)]
        if code == 2:  # nothing to resume, or not to be resumed
            code, shown = yield ["run", outcome.recipe, *_options(request), "--runs", str(runs)]
        if code:
            outcome.fail("run", "the training failed")
            return
        outcome.steps["run"], folder = DONE, RunDir(Path(shown.splitlines()[-1]))
    outcome.run = folder.path
    try:
        task = evaluate.Task(folder, evaluate.Request(judge=judge))
    except UserError as error:
        outcome.fail("evaluate", str(error))
        return
    if evaluate.complete(task, bertscore.judge(judge, None, task.run.rehearsal)):
        outcome.steps["evaluate"] = SKIPPED
        return
    by = ["--bertscore", judge] if judge else []
    code, _ = yield ["evaluate", str(folder.path), *by, "--runs", str(runs)]
    if code:
        outcome.fail("evaluate", "the evaluation failed")
    else:
        outcome.steps["evaluate"] = DONE


def _options(request: Request) -> Iterator[str]:
    """A request as options of `recipe run`."""
    for option, values in (("--profile", request.profiles), ("--set", request.overrides)):
        for value in values:
            yield from (option, value)
    if request.rehearse:
        yield "--rehearse"
    if request.mirror:
        yield "--mirror"


@dataclass
class _Child:
    """A command that is running for a recipe."""

    outcome: Outcome
    commands: _Commands
    device: str | None
    process: "subprocess.Popen[str]"


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
                device = free.pop(0)
                if child := _next(outcome, commands, device, runs, to_log=len(devices) > 1):
                    active.append(child)
                else:
                    free.append(device)
            for child in [child for child in active if child.process.poll() is not None]:
                active.remove(child)
                result = child.process.returncode, child.process.communicate()[0]
                after = None
                if stops:
                    child.outcome.problem = "interrupted; the same command goes on"
                else:
                    after = _next(child.outcome, child.commands, child.device, runs, len(devices) > 1, result)
                if after:
                    active.append(after)
                else:
                    free.append(child.device)
            for _ in stops[passed_on:]:
                passed_on += 1
                for child in active:
                    child.process.terminate()
            time.sleep(0.05)
    for outcome, _ in waiting:
        outcome.problem = "interrupted before it was begun; the same command goes on"


def _next(
    outcome: Outcome,
    commands: _Commands,
    device: str | None,
    runs: Path,
    to_log: bool,
    result: tuple[int, str] | None = None,
) -> _Child | None:
    """Start a recipe's next command, given what became of the one before; None where there is none."""
    try:
        command = commands.send(result) if result else next(commands)
    except StopIteration:
        return None
    say(f"{outcome.recipe}: recipe {shlex.join(command)}")
    with ExitStack() as stack:
        log = None
        if to_log:
            file = runs / outcome.recipe / "reproduce.log"
            file.parent.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(file.open("ab"))
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("recipe")), *command],
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the others in order
            preexec_fn=end_with_parent,
        )
    return _Child(outcome, commands, device, process)
