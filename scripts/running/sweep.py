"""Running all members of a sweep, except those done before: `recipe sweep`."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

from ..base import yamlfiles
from ..base.errors import UserError
from ..base.locks import held
from ..base.paths import find_recipe
from ..base.progress import say
from ..configs import config
from ..configs.compose import Request
from ..configs.gpus import Gpu
from ..places import Place
from ..runs.tasks import DONE, Outcome, Work
from ..scores import evaluate
from . import former, pipeline, sweeps
from .pipeline import Pipeline
from .sweeps import Member, Sweep

AXOLOTL_SEED = 42  # where a config names none


def sweep(
    name: str,
    members: list[Member],
    request: Request,
    evaluation: evaluate.Request,
    runs: Path,
    place: Place,
    *,
    seeds: int = 1,
    max_runs: int | None = None,
    gpu: Gpu | None = None,
    dry_run: bool = False,
) -> tuple[Sweep, list[Outcome]]:
    """Bring every member of a sweep to its scores.

    All are checked and planned before the first starts. A member that does not fit the GPU, or fails, does not stop the
    others.

    Args:
        name: the sweep's.
        members: see `sweeps.read`.
        request: what is laid over the recipe for every member.
        evaluation: how each run is evaluated.
        runs: the folder for the runs.
        place: where the members are carried out.
        seeds: how many seeds each member is run with, from the recipe's own on.
        max_runs: the most members that are begun; the others wait for the next time.
        gpu: what they are planned for, by default the place's GPU.
        dry_run: check and plan only.

    Raises:
        UserError: a member is wrong, or two come to the same config; nothing was started.
        WorkFailed: BERTScore's model cannot be loaded.
    """
    recipe, file = find_recipe(request.name)
    members = _seeded(members, seeds, yamlfiles.read_yaml(file).get("seed", AXOLOTL_SEED))
    pipelines = [
        Pipeline(
            Outcome(recipe, re.sub(r"[/\0]", "-", member.label)),
            replace(request, overrides=member.overrides),
            evaluation,
            runs,
            place,
        )
        for member in members
    ]
    _check(pipelines, starts=not dry_run)
    _refuse_twins(pipelines)
    for member, one in zip(members, pipelines, strict=True):
        member.digest = one.digest()
        one.plan(gpu)
        if one.outcome.problem and not dry_run:
            say(f"{member.label}: {one.outcome.problem}")
        member.planned_gib = one.needed_gib
    made = Sweep(
        name=name,
        recipe=recipe,
        rehearsal=request.rehearse,
        keys=sweeps.varying(members),
        profiles=pipelines[0].composed.profiles if pipelines[0].composed else [],
        members=members,
    )
    if not dry_run:
        made.file(runs).parent.mkdir(parents=True, exist_ok=True)
        with held(made.lock(runs), f"the sweep {made.label} is already running there"):
            made.write(runs)
            fitting = [one for one in pipelines if not one.outcome.problem]
            former_runs = former.by_digest(runs, recipe)
            for one in fitting:
                one.former = former_runs.get(one.digest() or "")
            works = _works(fitting, max_runs)
            pipeline.need_judge(works, evaluation, request.rehearse)
            if any("run" in work.steps for work in works):
                _show_shared_differences(pipelines)
            place.submit(works, name, runs, ["results", "--sweep", made.label, "--runs", str(runs)])
    return made, [one.outcome for one in pipelines]


def _seeded(members: list[Member], seeds: int, first: int) -> list[Member]:
    if seeds == 1:
        return members
    if any("seed" in member.values for member in members):
        raise UserError("--seeds: the sweep sets seed itself")
    return [member.model_copy(update={"seed": first + i}) for member in members for i in range(seeds)]


def _check(pipelines: list[Pipeline], starts: bool) -> None:
    """Check every member; then, if they are to start, the rows, once for members trained on the same rows.

    Raises:
        UserError: some members are wrong; each problem is given once.
    """
    one_for_each_rows = list({one.rows: one for one in pipelines}.values())
    for some, with_data in ((pipelines, False), (one_for_each_rows if starts else [], True)):
        wrong: dict[str, list[str]] = {}
        for one in some:
            if not one.check(with_data, starts):
                for problem in str(one.outcome.problem).splitlines():
                    wrong.setdefault(problem, []).append(one.outcome.label)
            one.outcome.steps["check"] = DONE
        if wrong:
            raise UserError(
                "\n".join(
                    f"{'every member' if len(labels) == len(some) else '; '.join(labels)}: {problem}"
                    for problem, labels in wrong.items()
                )
            )


def _refuse_twins(pipelines: list[Pipeline]) -> None:
    for one, other in itertools.combinations(pipelines, 2):
        if one.composed and other.composed and not config.differences(one.composed.config, other.composed.config):
            raise UserError(f"{one.outcome.label} and {other.outcome.label} come to the same config; leave one out")


def _show_shared_differences(pipelines: list[Pipeline]) -> None:
    """Show once, instead of for each run, how all members differ from the recipe."""
    first, *others = [one.composed.differences for one in pipelines if one.composed]
    shared = [difference for difference in first if all(difference in other for other in others)]
    for one in pipelines:
        one.shared = [difference.model_copy() for difference in shared]  # a run's own get trackers' names filled in
    if shared:
        say("\n  ".join(["every member:", *map(str, shared)]))


def _works(fitting: list[Pipeline], max_runs: int | None) -> list[Work]:
    """What has to be carried out for members, of which at most `max_runs` are begun."""
    works = {one: one.work() for one in fitting}
    to_begin = [one for one in fitting if works[one].steps]
    to_begin.sort(key=lambda one: one.state == "failed")  # one that fails each time does not keep others waiting
    for one in to_begin[max_runs or len(fitting) :]:
        one.outcome.steps["run"] = "left for later"
        del works[one]
    return list(works.values())
