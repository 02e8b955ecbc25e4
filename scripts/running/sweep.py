"""Running all members of a sweep, except those done before: `recipe sweep`."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

from ..backends import Backend
from ..base.errors import UserError
from ..base.paths import find_recipe
from ..base.processes import held
from ..base.progress import Bar, say
from ..configs import config
from ..configs.compose import Request
from ..configs.gpus import Gpu
from ..runs.tasks import DONE, Outcome, Work
from ..scores.task import EvaluationRequest
from . import former, sweeps
from .pipeline import Pipeline, need_judges, seeds_of
from .sweeps import Sweep, SweepMember


def sweep(
    name: str,
    members: list[SweepMember],
    request: Request,
    evaluation: EvaluationRequest,
    runs: Path,
    backend: Backend,
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
        backend: where the members are carried out.
        seeds: how many seeds each member is run with, from the recipe's own on.
        max_runs: the most members that are begun; the others wait for the next time.
        gpu: what they are planned for, by default the backend's GPU.
        dry_run: check and plan only.

    Raises:
        UserError: a member is wrong, or two come to the same config; nothing was started.
        WorkFailed: BERTScore's model cannot be loaded.
    """
    recipe, _ = find_recipe(request.name)
    members = _seeded(members, recipe, seeds)
    pipelines = [
        Pipeline(
            Outcome(recipe, re.sub(r"[/\0]", "-", member.label)),
            replace(request, overrides=member.overrides),
            evaluation,
            runs,
            backend,
            gpu if dry_run else None,
        )
        for member in members
    ]
    _check(pipelines, starts=not dry_run)
    _refuse_twins(pipelines)
    _plan(members, pipelines, gpu, starts=not dry_run)
    record = Sweep(
        name=name,
        recipe=recipe,
        rehearsal=request.rehearse,
        keys=sweeps.varying(members),
        profiles=pipelines[0].composed.profiles if pipelines[0].composed else [],
        members=members,
    )
    if not dry_run:
        _carry_out(record, pipelines, evaluation, runs, backend, max_runs)
    return record, [pipeline.outcome for pipeline in pipelines]


def _plan(members: list[SweepMember], pipelines: list[Pipeline], gpu: Gpu | None, starts: bool) -> None:
    with Bar("planning", len(members)) as bar:
        for done, (member, pipeline) in enumerate(zip(members, pipelines, strict=True), start=1):
            bar.begin(f"planning {member.label}")
            member.digest = pipeline.digest()
            pipeline.plan(gpu)
            if pipeline.outcome.problem and starts:
                say(f"{member.label}: {pipeline.outcome.problem}")
            member.planned_gib = pipeline.needed_gib
            bar.update(done)


def _carry_out(
    record: Sweep,
    pipelines: list[Pipeline],
    evaluation: EvaluationRequest,
    runs: Path,
    backend: Backend,
    max_runs: int | None,
) -> None:
    with held(record.lock(runs), f"the sweep {record.label} is already running there"):
        record.write(runs)
        fitting = [pipeline for pipeline in pipelines if not pipeline.outcome.problem]
        former_runs = former.by_digest(runs, record.recipe)
        for pipeline in fitting:
            pipeline.former = former_runs.get(pipeline.digest() or "")
        works = _works(fitting, max_runs)
        need_judges(works, sweeps.of_recipe(record.recipe), evaluation, record.rehearsal)
        if any("run" in work.steps for work in works):
            _show_shared_differences(pipelines)
        backend.submit(works, record.name, runs, ["results", "--sweep", record.label, "--runs", str(runs)])


def _seeded(members: list[SweepMember], recipe: str, seeds: int) -> list[SweepMember]:
    if seeds == 1:
        return members
    if any("seed" in member.values for member in members):
        raise UserError("--seeds: the sweep sets seed itself")
    return [member.model_copy(update={"seed": seed}) for member in members for seed in seeds_of(recipe, seeds)]


def _check(pipelines: list[Pipeline], starts: bool) -> None:
    """Check every member; then, if they are to start, the rows, once for members trained on the same rows.

    Raises:
        UserError: some members are wrong; each problem is given once.
    """
    of_distinct_rows = list({pipeline.rows: pipeline for pipeline in pipelines}.values())
    for some, with_data in ((pipelines, False), (of_distinct_rows if starts else [], True)):
        wrong: dict[str, list[str]] = {}
        with Bar("reading the rows of members" if with_data else "checking members", len(some)) as bar:
            for done, pipeline in enumerate(some, start=1):
                if not pipeline.check(with_data, starts):
                    for problem in str(pipeline.outcome.problem).splitlines():
                        wrong.setdefault(problem, []).append(pipeline.outcome.label)
                pipeline.outcome.steps["check"] = DONE
                bar.update(done)
        if wrong:
            raise UserError(
                "\n".join(
                    f"{'every member' if len(labels) == len(some) else '; '.join(labels)}: {problem}"
                    for problem, labels in wrong.items()
                )
            )


def _refuse_twins(pipelines: list[Pipeline]) -> None:
    for a, b in itertools.combinations(pipelines, 2):
        if a.composed and b.composed and not config.differences(a.composed.config, b.composed.config):
            raise UserError(f"{a.outcome.label} and {b.outcome.label} come to the same config; leave one out")


def _show_shared_differences(pipelines: list[Pipeline]) -> None:
    """Show once, instead of for each run, how all members differ from the recipe."""
    first, *others = [pipeline.composed.differences for pipeline in pipelines if pipeline.composed]
    shared = [difference for difference in first if all(difference in other for other in others)]
    for pipeline in pipelines:
        pipeline.shared = [replace(difference) for difference in shared]  # a run fills in its own
    if shared:
        say("\n  ".join(["every member:", *map(str, shared)]))


def _works(fitting: list[Pipeline], max_runs: int | None) -> list[Work]:
    """What has to be carried out for members, of which at most `max_runs` are begun."""
    works = {pipeline: pipeline.work() for pipeline in fitting}
    to_begin = [pipeline for pipeline in fitting if works[pipeline].steps]
    to_begin.sort(key=lambda pipeline: pipeline.state == "failed")  # so that these do not keep others waiting
    for pipeline in to_begin[max_runs or len(fitting) :]:
        pipeline.outcome.steps["run"] = "left for later"
        del works[pipeline]
    return list(works.values())
