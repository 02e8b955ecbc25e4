"""Running all members of a sweep, each unless it was done before: `recipe sweep`."""

import itertools
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..base import yamlfiles
from ..base.errors import UserError
from ..base.locks import held
from ..base.paths import RUNS, find_recipe
from ..base.progress import say
from ..configs import config
from ..configs.compose import Request
from ..configs.gpus import Gpu
from ..places import Place
from ..runs.tasks import DONE, Outcome, Work
from ..scores.evaluate import EvaluationRequest
from . import pipeline, sweeps
from .pipeline import OF_ROWS, Pipeline
from .sweeps import Member, Sweep

AXOLOTL_SEED = 42  # where a config names none


@dataclass
class Options:
    """How a sweep is to be run.

    Attributes:
        request: what is laid over the recipe for every member.
        place: where they are carried out.
        seeds: how many seeds each member is run with, from the recipe's own on.
        max_runs: the most members that are begun; the others wait for the next time.
        gpu: what they are planned for, by default their place's GPU.
        evaluation: how each run is evaluated.
        runs: the folder for the runs.
        dry_run: check and plan only.
    """

    request: Request
    place: Place
    seeds: int = 1
    max_runs: int | None = None
    gpu: Gpu | None = None
    evaluation: EvaluationRequest = field(default_factory=EvaluationRequest)
    runs: Path = RUNS
    dry_run: bool = False


def sweep(name: str, members: list[Member], options: Options) -> tuple[Sweep, list[Outcome]]:
    """Bring every member of a sweep to its scores.

    All are checked and planned before the first starts. One that does not fit the GPU, or fails, does not keep the
    others from going on.

    Raises:
        UserError: a member is wrong, or two come to the same; nothing was started.
        WorkFailed: BERTScore's model cannot be loaded.
    """
    request, runs = options.request, options.runs
    recipe, file = find_recipe(request.name)
    members = _seeded(members, options.seeds, yamlfiles.read_yaml(file).get("seed", AXOLOTL_SEED))
    pipelines = []
    for member in members:
        overrides = [*request.overrides, *member.overrides]
        outcome = Outcome(recipe, re.sub(r"[/\0]", "-", member.label))
        asked = replace(request, overrides=overrides)
        pipelines.append(Pipeline(outcome, asked, options.evaluation, runs, options.place))
    _check(pipelines, starts=not options.dry_run)
    _refuse_twins(pipelines)
    for member, one in zip(members, pipelines, strict=True):
        member.digest = one.digest()
        one.plan(options.gpu)
        if one.outcome.problem and not options.dry_run:
            say(f"{member.label}: {one.outcome.problem}")
        member.planned_gib = one.needed_gib
    profiles = pipelines[0].composed.profiles if pipelines[0].composed else []
    made = Sweep(
        name=name,
        recipe=recipe,
        rehearsal=request.rehearse,
        keys=sweeps.varying(members),
        profiles=profiles,
        members=members,
    )
    if not options.dry_run:
        runs.mkdir(parents=True, exist_ok=True)
        made.file(runs).parent.mkdir(parents=True, exist_ok=True)
        with held(made.lock(runs), f"the sweep {made.label} is going on there"):
            made.write(runs)
            works = _works(pipelines, options)
            if any("run" in work.steps for work in works):
                _tell_shared_differences(pipelines)
            results = ["results", "--sweep", made.label, "--runs", str(runs)]
            options.place.submit(works, name, runs, results)
    return made, [one.outcome for one in pipelines]


def _seeded(members: list[Member], seeds: int, first: int) -> list[Member]:
    if seeds == 1:
        return members
    if any("seed" in member.values for member in members):
        raise UserError("--seeds: the sweep sets seed itself")
    return [member.model_copy(update={"seed": first + i}) for member in members for i in range(seeds)]


def _check(pipelines: list[Pipeline], starts: bool) -> None:
    """Check every member; then, if they are to start, the rows, those that several are trained on once.

    Raises:
        UserError: something is wrong with some, told once for all of them.
    """
    by_rows = {
        yamlfiles.write_yaml({key: one.composed.config.get(key) for key in OF_ROWS}): one
        for one in pipelines
        if one.composed
    }
    for some, rows in ((pipelines, False), (list(by_rows.values()) if starts else [], True)):
        wrong: dict[str, list[str]] = {}
        for one in some:
            if not one.check(with_data=rows, starts=starts):
                for problem in str(one.outcome.problem).splitlines():
                    wrong.setdefault(problem, []).append(one.outcome.label)
            one.outcome.steps["check"] = DONE
        if wrong:
            every = len(some)
            told = (f"{'every member' if len(n) == every else '; '.join(n)}: {problem}" for problem, n in wrong.items())
            raise UserError("\n".join(told))


def _refuse_twins(pipelines: list[Pipeline]) -> None:
    for one, other in itertools.combinations(pipelines, 2):
        if one.composed and other.composed and not config.differences(one.composed.config, other.composed.config):
            raise UserError(f"{one.outcome.label} and {other.outcome.label} come to the same config; leave one out")


def _tell_shared_differences(pipelines: list[Pipeline]) -> None:
    """Say once, instead of for each run, in what all members differ from the recipe."""
    first, *others = [one.composed.differences for one in pipelines if one.composed]
    shared = [difference for difference in first if all(difference in other for other in others)]
    for one in pipelines:
        one.told = [difference.model_copy() for difference in shared]  # a run's own are filled in
    if shared:
        say("\n  ".join(["every member:", *map(str, shared)]))


def _works(pipelines: list[Pipeline], options: Options) -> list[Work]:
    fitting = [one for one in pipelines if not one.outcome.problem]
    pipeline.need_judge(fitting)
    works = {one: one.work() for one in fitting}
    to_begin = [one for one in fitting if works[one].steps]
    to_begin.sort(key=lambda one: one.has_failed())  # one that fails each time does not keep others waiting
    for one in to_begin[options.max_runs or len(fitting) :]:
        one.outcome.steps["run"] = "left for later"
        del works[one]
    return list(works.values())
