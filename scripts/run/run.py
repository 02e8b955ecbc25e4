"""Runs of recipes, from request to trained adapter.

With several nodes, a scheduler starts `recipe resume` on each node. The process on the first node locks the run and
writes the record; the other processes only start their node's ranks.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..base import hardware, paths, yamlfiles
from ..base.errors import UserError
from ..base.files import sha256, write_atomically
from ..base.terminal import Bar, say, say_once
from ..base.yamlfiles import Config
from ..check import check
from ..config import datafiles, gpus, substitution
from ..config.compose import Composed, Request, compose, filled, is_rehearsal
from ..config.finding import Finding, refuse, unknown_force
from ..training.run_record import Run, collect
from . import backends, launch, trust
from .backends import Backend, Command, Task, TaskResult
from .rundir import PLUGIN, RunDir, find_run, new_run, this_job


def prepare(request: Request, backend: Backend) -> Composed:
    """Return the checked config of a run; print findings on stderr.

    Args:
        request: the requested run.
        backend: backend of the run.

    Raises:
        UserError: the request or the config is wrong.
    """
    backend.check_size(1 if request.dry_run or is_rehearsal(request) else request.gpus, request.nodes)
    gpu = backend.gpu()
    composed = compose(request, gpu)
    starts = not request.dry_run
    with Bar(f"checking {composed.recipe}", 1):
        report = check.check_config(composed, gpu, request.ranks, launching=starts, data=starts)
        if starts:
            check.add_validation([report], gpu, request.force)
        if gpu:  # plans need a GPU
            from ..plan import plan

            plan.add_memory_finding(report, gpu, request.ranks, trace=starts)
    found = report.findings
    for finding in found:
        if not starts and finding.scope == "data":
            finding.level = "note"  # a dry run only shows the config
    for finding in refuse(backends.relevant(backend, found), request.force):
        say(str(finding))
    # Axolotl tokenizes rows now, rather than after a wait in the queue or after loading the model. On this machine,
    # rehearsals and CPU training soon report the same errors, so they skip this unless they pack rows.
    soon = backend.here and (composed.rehearsal or not gpu) and not composed.config.get("sample_packing")
    if starts and not soon and check.has_tokenizer(composed):
        rows = check.Report(composed.recipe, composed)
        check.tokenize(rows, composed, request.ranks, most=check.SOME)
        for finding in refuse(rows.findings):
            say(str(finding))
    if starts:
        composed.data = datafiles.record(composed.config)
    return composed


def start(request: Request, backend: Backend) -> RunDir:
    """Train a recipe in a new run folder, here or as a job.

    Raises:
        UserError: the request is wrong, or the backend refuses it; nothing was started.
        WorkFailed: Axolotl failed, or the run was interrupted.
    """
    composed = prepare(request, backend)
    if not backend.here:
        task = Task(
            TaskResult(composed.recipe),
            lambda: [resume_command(create(composed, request))],
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
    """Resume an interrupted or failed run from its last complete checkpoint.

    A finished run is not changed.

    Args:
        name: name of the run, see `find_run`.
        backend: backend of the run.
        prepare_only: only tokenize rows and fetch the base model, in this process.
        force: names of findings to override; the run's record lists them.
        trusted: also resume another user's run.

    Raises:
        UserError: the run does not exist, is running, or belongs to another user; or the backend cannot train it.
        WorkFailed: as in `start`.
    """
    folder = find_run(name, paths.runs())
    record = folder.read()
    if record.state == "finished":
        say(f"{folder.path}: the run is finished")
        return folder
    own = trust.is_own(folder, record)
    _authorize(folder, record, force, own, trusted, backend.here)
    if record.rehearsal and folder.config_file.is_file():
        substitution.restore(folder.config)
    if not backend.here:  # on this machine, the run's lock shows whether it is running
        current = backends.read(folder)
        if reason := "the run is still running" if current.state == "running" else hindrance(folder, current):
            raise UserError(f"{folder.path}: {reason}")
        gpus_a_node = 0 if record.rehearsal else record.gpus_used
        task = Task(TaskResult(record.recipe), lambda: [resume_command(folder)], gpus_a_node, record.nodes)
        return backend.carry_out(task, record.recipe)
    return _resume_here(folder, prepare_only, own)


def _authorize(folder: RunDir, record: Run, force: Sequence[str], own: bool, trusted: bool, here: bool) -> None:
    """Raise UserError for an untrusted run of another user, or for a name in `force` that is no error on this machine.

    Record `force`. Sign the record with this user's key if it changed or belonged to another user.
    """
    if not folder.config_file.is_file():
        return  # `hindrance` gives the reason
    if not (own or trusted):
        raise UserError(
            f"{folder.path}: not created by you on this machine, or changed since; resuming it can run its author's "
            "code; if you trust the author, add --trust"
        )
    if force and here:  # a job is checked on its own machine
        errors = {finding.name for finding in _findings(folder, record) if finding.level == "error"}
        unknown_force(force, errors.union(record.forced))
    if (force or not own) and not this_job(os.environ):  # a job may lack the user's key
        with folder.held():
            record = folder.read()  # a training may have just ended
            record.forced = [*record.forced, *force]
            record.seal = trust.seal(folder, record)
            folder.write(record)


def _resume_here(folder: RunDir, prepare_only: bool, own: bool) -> RunDir:
    if (record := folder.read()).nodes > 1 and os.environ.get("SLURM_NODEID", "0") != "0":
        launch.follow(folder)
        return folder
    with folder.held() as lock:
        record = folder.read()
        jobs = {job.id for job in folder.jobs()}
        if reason := hindrance(folder, record, alone=not jobs or this_job(os.environ) in jobs):
            raise UserError(f"{folder.path}: {reason}")
        if prepare_only:
            launch.preprocess(folder, record)
            return folder
        if record.nodes > 1 and "SLURM_LAUNCH_NODE_IPADDR" not in os.environ:
            raise UserError(f"{folder.path}: the run needs {record.nodes} machines; resume it with --on slurm")
        if not record.launches or not own:
            _check_here(folder, record)
        checkpoint = folder.last_checkpoint()
        if record.launches:
            begin = checkpoint.name if checkpoint else "the beginning: it has no complete checkpoint"
            say(f"resume {folder.path} from {begin}")
        launch.train(folder, record, lock, checkpoint)
    return folder


def hindrance(folder: RunDir, record: Run, alone: bool = False) -> str | None:
    """Reason why a run cannot be resumed, or None.

    Args:
        alone: whether the run has no jobs, or this process is one of them.
    """
    job = None if alone else backends.job_state(folder, "run")
    if job and job.kind != "unknown":
        return f"the run is {job}; cancel it first with `recipe cancel {folder.path}`"
    if record.state == "finished":
        return f"the run is finished; evaluate it with `recipe evaluate {folder.path}`"
    if not folder.config_file.is_file():
        return "the run ended before its config was written; start a new run with `recipe run`"
    output = Path(record.cwd, str(folder.config.get("output_dir")))
    if output.resolve() != folder.output.resolve():
        return f"the run folder was moved, but its config still writes to {output}; move the folder back first"
    if path := record.changed_data:
        return f"{path} is missing or has changed since the run began; restore the file, or start a new run"
    return None


def _findings(folder: RunDir, record: Run) -> list[Finding]:
    """Findings of a run's config on this machine."""
    from ..plan import plan

    recipe_file = Path(record.recipe_file)
    composed = Composed(
        recipe=record.recipe,
        recipe_file=recipe_file if recipe_file.is_file() else folder.config_file,  # a run copied from another machine
        origin=record.variant_of,
        config=folder.config,
        differences=[],
        files={},
        profiles=record.profiles,
        rehearsal=record.rehearsal,
    )
    report = check.check_config(composed, gpus.here(), record.ranks, launching=not record.rehearsal)
    plan.add_memory_finding(report, gpus.here(), record.ranks, trace=True)
    return report.findings


def _check_here(folder: RunDir, record: Run) -> None:
    """Check that this machine can train a run that was never launched here.

    Raises:
        UserError: this machine cannot train the run; the run's state becomes failed.
    """
    try:
        found = [each for each in _findings(folder, record) if each.scope != "code"]  # the user trusts the run's code
        errors = {finding.name for finding in found if finding.level == "error"}
        # the other names overrode errors that this check does not report: about rows, code or another GPU
        forced = [name for name in record.forced if name in errors]
        refuse(found, forced)
        if not record.rehearsal and record.gpus_used > max(visible := len(hardware.visible_gpus()), 1):
            raise UserError(f"{folder.path}: the run needs {record.gpus_used} GPUs; {visible} available here")
    except UserError:
        record.state = "failed"
        folder.write(record)
        raise


def resume_command(folder: RunDir) -> Command:
    """Command `recipe resume`, with which a job trains or resumes a run that this user trusts."""
    return Command("run", folder, ["resume", str(folder.path), "--trust"])


AUTO_RESUME = "auto_resume_from_checkpoints"


def create(composed: Composed, request: Request) -> RunDir:
    """Create a run folder with launch config and record.

    Args:
        composed: the run's checked config.
        request: request from which the config was composed.
    """
    if composed.rehearsal and substitution.stands_in(composed.config):
        substitution.model_folder()
    with new_run(paths.runs() / composed.recipe, composed.digest[:7]) as (folder, part):
        config = launch_config(composed, folder)
        for difference in composed.differences:  # record tracker keys with placeholders filled in
            difference.run = config.get(difference.key, difference.run)
        record = record_of(composed, request)
        write_atomically(part.config_file, yamlfiles.write_yaml(config))
        record.seal = trust.seal(part, record)
        part.write(record)
    say(f"run {folder.path}")
    if record.variant_of:
        say(f"  a variant of {record.variant_of}")
    for difference in composed.differences:
        say_once(f"  {difference}")  # printed only once if this command creates several runs
    return folder


def record_of(composed: Composed, request: Request) -> Run:
    """Record of a new run, or of an adapter evaluated as a run.

    Args:
        composed: the run's checked config.
        request: request from which the config was composed.
    """
    return Run(
        recipe=composed.recipe,
        variant_of=composed.origin if composed.origin != composed.recipe else None,
        recipe_file=str(composed.recipe_file),
        recipe_sha256=sha256(composed.recipe_file),
        digest=composed.digest,
        rehearsal=composed.rehearsal,
        profiles=composed.profiles,
        overrides=[override.without_secrets() for override in request.overrides],
        forced=request.force,
        gpus_used=request.gpus,
        nodes=request.nodes,
        differences=[difference.without_secrets() for difference in composed.differences],
        of_variant=[difference.without_secrets() for difference in composed.of_variant],
        data=composed.data,
        named_files=datafiles.named_files(composed.config),
        test_data=datafiles.test_file(composed.config),
        cwd=str(Path.cwd()),
        provenance=collect(),
    )


def launch_config(composed: Composed, folder: RunDir) -> Config:
    """Config for Axolotl, with the run's folders, plugin and tracker names.

    Axolotl's own hash of prepared rows does not cover the data and some settings, so their folder's name has a hash
    that does. auto_resume_from_checkpoints is off, because Axolotl would also resume from a damaged checkpoint.
    """
    return _with_tracker_names(composed, folder) | {
        "output_dir": str(folder.output),
        "dataset_prepared_path": str(paths.cache() / "prepared" / composed.rows_digest[:16]),
        "plugins": [*(composed.config.get("plugins") or []), PLUGIN],
        **({AUTO_RESUME: False} if composed.config.get(AUTO_RESUME) else {}),
    }


def _with_tracker_names(composed: Composed, folder: RunDir) -> Config:
    """Fill in {placeholders} in the values of tracker keys.

    {project} is the name of the study, or of the recipe if it belongs to no study; rehearsals add a suffix. {run} is
    the path of the run folder below the project; `recipe` commands accept this path as a run's name. {runs} is the
    folder of all runs. Axolotl passes the value of each key to the tracker in the environment variable of the same
    name, unless the user has set this variable.
    """
    runs = folder.runs(composed.recipe)
    study = (composed.origin or composed.recipe).partition("/")[0]
    values = {
        "project": f"{study}-rehearsal" if composed.rehearsal else study,
        "run": str(folder.path.relative_to(runs)).removeprefix(f"{study}/"),
        "runs": str(runs),
    }
    trackers = {key: value for key, value in composed.config.items() if re.match("(wandb|mlflow|trackio)_", key)}
    named = {key: text for key, value in trackers.items() if (text := filled(value, values)) != value}
    return composed.config | {key: None if key.upper() in os.environ else text for key, text in named.items()}
