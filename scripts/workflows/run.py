"""Runs of recipes, from the request to the trained adapter.

On several nodes a scheduler starts `recipe resume` on each of them. The one on the first node holds the run and keeps
its record; the others only launch their share of the ranks.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from .. import backends
from ..backends import Backend
from ..base import machine, paths, yamlfiles
from ..base.errors import UserError
from ..base.files import sha256
from ..base.progress import Bar, say
from ..checks import check, trust
from ..checks.finding import refuse
from ..configs import datafiles, gpus
from ..configs.compose import Composed, Request, compose, is_rehearsal
from ..configs.gpus import Gpu
from ..runs import launch
from ..runs.records import Run
from ..runs.rundir import RunDir, find_run, this_job
from ..runs.tasks import Command, Task, TaskResult
from .create import create


def prepare(request: Request, backend: Backend) -> Composed:
    """Return the checked config of a run; findings go to stderr.

    Args:
        request: the run.
        backend: where it is to run.

    Raises:
        UserError: the request or the config is wrong.
    """
    backend.check_size(1 if request.dry_run or is_rehearsal(request) else request.gpus, request.nodes)
    gpu = backend.gpu()
    composed = compose(request, gpu)
    starts = not request.dry_run
    with Bar(f"checking {composed.recipe}", 1):
        report = check.examine(composed, gpu, request.ranks, launching=starts, data=starts)
        _add_plan(report, gpu, request.ranks, anew=starts)
    found = report.findings
    for finding in found:
        if not starts and finding.scope == "data":
            finding.level = "note"  # a dry run only shows the config
    for finding in refuse(backends.relevant(backend, found), request.force):
        say(str(finding))
    # a job would wait in the queue only to be refused; on a CPU, and in a rehearsal, Axolotl says so at once
    if starts and (not backend.here or (gpu and not composed.rehearsal) or composed.config.get("sample_packing")):
        asked = check.Report(composed.recipe, composed, check.by_axolotl(composed, gpu))
        if not asked.count("error") and check.has_tokenizer(composed):
            check.tokenize(asked, composed, request.ranks, most=check.SOME)
        for finding in refuse(asked.findings):
            say(str(finding))
    if starts:
        composed.data = datafiles.record(composed.config)
    return composed


def _add_plan(report: check.Report, gpu: Gpu | None, ranks: int, anew: bool) -> None:
    if gpu:  # without one nothing is planned
        from ..planning import plan

        plan.add_to(report, gpu, ranks, anew)


def start(request: Request, backend: Backend) -> RunDir:
    """Train a recipe in a new run folder, in this process or as a job.

    Raises:
        UserError: the request is wrong, or the backend refuses it; nothing was started.
        WorkFailed: Axolotl failed, or the run was interrupted.
    """
    composed = prepare(request, backend)
    if not backend.here:
        task = Task(
            TaskResult(composed.recipe),
            lambda: [command(create(composed, request))],
            gpus=0 if composed.rehearsal else request.gpus,
            nodes=request.nodes,
        )
        return backend.carry_out(task, composed.recipe)
    launch.require(Path.cwd())
    folder = create(composed, request)
    with folder.held() as lock:
        launch.train(folder, folder.read(), lock)
    return folder


def resume(
    name: str,
    backend: Backend,
    prepare_only: bool = False,
    force: Sequence[str] = (),
    trusted: bool = False,
) -> RunDir:
    """Resume an interrupted or failed run from its last whole checkpoint, in this process or as a job.

    A finished run is left as it is.

    Args:
        name: the run, see `find_run`.
        backend: where it is to run.
        prepare_only: only have its rows tokenized and its base model fetched, in this process.
        force: the names of findings that are overridden, which the run's record then has.
        trusted: whether a run is resumed that is not this user's own.

    Raises:
        UserError: there is no such run, it is still running, it is another user's, or the backend cannot train it.
        WorkFailed: as in `start`.
    """
    folder = find_run(name, paths.runs())
    record = folder.read()
    own = trust.is_own(folder, record)
    _agree(folder, record, force, own, trusted)
    if record.state == "finished":
        say(f"{folder.path}: the run is finished")
        return folder
    trust.restore_stand_in(folder, record)
    if not backend.here:  # here, what holds the run decides
        current = backends.read(folder)
        if reason := "the run is still running" if current.state == "running" else hindrance(folder, current):
            raise UserError(f"{folder.path}: {reason}")
        gpus_a_node = 0 if record.rehearsal else record.gpus_used
        task = Task(TaskResult(record.recipe), lambda: [command(folder)], gpus_a_node, record.nodes)
        return backend.carry_out(task, record.recipe)
    return _resume_here(folder, prepare_only, own)


def _agree(folder: RunDir, record: Run, force: Sequence[str], own: bool, trusted: bool) -> None:
    """Refuse another user's run unless it is trusted; trust makes it this user's own."""
    if not folder.config.is_file():
        return  # see `hindrance`
    if not (own or trusted):
        raise UserError(
            f"{folder.path}: not created by you on this machine, or changed since; resuming it is like running its "
            "author's program; --trust does so"
        )
    if (force or not own) and not this_job(os.environ):  # a job may not have its user's key
        with folder.held():
            record.forced = [*record.forced, *force]
            record.seal = trust.seal(folder, record)
            folder.write(record)


def _resume_here(folder: RunDir, prepare_only: bool, own: bool) -> RunDir:
    if (record := folder.read()).nodes > 1 and os.environ.get("SLURM_NODEID", "0") != "0":
        launch.follow(folder)
        return folder
    with folder.held() as lock:
        record = folder.read()
        in_a_job = this_job(os.environ) in {job.id for job in folder.jobs()}
        if reason := hindrance(folder, record, in_a_job):
            raise UserError(f"{folder.path}: {reason}")
        if prepare_only:
            launch.preprocess(folder, record)
            return folder
        if record.nodes > 1 and "SLURM_LAUNCH_NODE_IPADDR" not in os.environ:
            raise UserError(f"{folder.path}: a run on {record.nodes} machines; --on slurm starts it on each of them")
        if not record.launches or not own:
            _check_here(folder, record)
        checkpoint = folder.last_checkpoint()
        if record.launches:
            begin = checkpoint.name if checkpoint else "the beginning: it has no whole checkpoint"
            say(f"resume {folder.path} from {begin}")
        launch.train(folder, record, lock, checkpoint)
    return folder


def hindrance(folder: RunDir, record: Run, in_a_job: bool = False) -> str | None:
    """Why a run cannot be resumed; None where it can.

    Args:
        in_a_job: whether this process belongs to the job that is to resume it, or to one that prepares for that.
    """
    job = None if in_a_job else backends.job_state(folder, "run")
    if job and job.kind != "unknown":
        return f"the run is {job}; `recipe cancel {folder.path}` ends that"
    if record.state == "finished":
        return f"the run is finished; `recipe evaluate {folder.path}` comes next"
    if not folder.config.is_file():
        return "ended before its config was written; `recipe run` starts another"
    output = Path(record.cwd, str(yamlfiles.read_yaml(folder.config).get("output_dir")))
    if output.resolve() != folder.output.resolve():
        return f"the run was moved; it writes to {output}, so move it back there first"
    for file in record.data:
        path = Path(record.cwd, file.path)
        if not path.is_file() or sha256(path) != file.sha256:
            return f"{path} is not the data that the run began with; a resumed run would mix the two"
    return None


def _check_here(folder: RunDir, record: Run) -> None:
    """Check an older or moved run against the machine that will train it.

    Raises:
        UserError: this machine cannot train it; the run's state is then failed.
    """
    recipe_file = Path(record.recipe_file)
    composed = Composed(
        recipe=record.recipe,
        recipe_file=recipe_file if recipe_file.is_file() else folder.config,  # a run copied from another machine
        origin=record.variant_of,
        config=yamlfiles.read_yaml(folder.config),
        differences=[],
        files={},
        profiles=record.profiles,
        rehearsal=record.rehearsal,
    )
    try:
        report = check.examine(composed, gpus.here(), record.ranks, launching=not record.rehearsal)
        _add_plan(report, gpus.here(), record.ranks, anew=True)
        found = [finding for finding in report.findings if finding.scope != "code"]  # of a run that is trusted
        errors = {finding.name for finding in found if finding.level == "error"}
        forced = [name for name in record.forced if name in errors]  # not those of the rows, or of another GPU
        refuse(found, forced)
        if not record.rehearsal and record.gpus_used > max(visible := len(machine.visible_gpus()), 1):
            raise UserError(f"{folder.path}: a run on {record.gpus_used} GPUs, and there are {visible} here")
    except UserError:
        record.state = "failed"
        folder.write(record)
        raise


def command(folder: RunDir, rows: str = "") -> Command:
    """The command that trains or resumes a trusted run; see `Command` for `rows`."""
    return Command("run", folder, ["resume", str(folder.path), "--trust"], rows)
