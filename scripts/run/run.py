"""Runs of recipes, from request to trained adapter.

With several nodes, a scheduler starts `recipe resume` on each node. The process on the first node locks the run and
writes the record; the other processes only start their node's ranks.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from ..base import hardware, paths, yamlfiles
from ..base.errors import UserError, recipe_command
from ..base.files import sha256, write_atomically
from ..base.processes import now
from ..base.signature import signature
from ..base.terminal import Bar, say, say_once, warn
from ..base.yamlfiles import Config
from ..check import check
from ..config import datafiles, gpus, keys, substitution
from ..config.compose import Composed, Request, compose, filled, is_rehearsal
from ..config.finding import DATED, Finding, override_errors, refuse, remaining_errors, unknown_force
from ..training.run_record import Run, collect
from . import backends, launch
from .backends import Backend, Command, Task, TaskResult
from .rundir import PLUGIN, RunDir, find_run, new_run, stamped, this_job


def compose_and_check(request: Request, backend: Backend) -> Composed:
    """Return the checked config of a run; print findings on stderr.

    A dry run only shows the config: findings about data become notes, and Axolotl is not asked.

    Args:
        request: the requested run.
        backend: backend of the run.

    Raises:
        UserError: the request or the config is wrong.
    """
    starts = not request.dry_run
    needs_gpus = starts and not is_rehearsal(request)
    backend.check_size(request.gpus if needs_gpus else 1, request.nodes)
    gpu = backend.gpu
    composed = compose(request, gpu)
    with Bar(f"checking {composed.recipe}", 1):
        report = check.check_config(composed, gpu, request.ranks, launching=starts, data=starts)
        if starts:
            check.add_validation([report], gpu, request.force)
        if gpu:  # plans need a GPU
            from ..plan import plan

            plan.add_memory_finding(report, gpu, request.ranks, trace=starts)
        if starts and not remaining_errors(report.findings, request.force):
            check.compare_rows(report, request)
    if not starts:
        for finding in report.findings:
            if finding.scope == "data":
                finding.level = "note"
    _print(refuse(backend.relevant(report.findings), request.force))
    if starts:
        composed.data = datafiles.record(composed.config)
    return composed


def _print(findings: Iterable[Finding]) -> None:
    for finding in findings:
        warn(str(finding))


def start(request: Request, backend: Backend) -> RunDir:
    """Train a recipe in a new run folder, here or as a job.

    Raises:
        UserError: the request is wrong, or the backend refuses it; nothing was started.
        WorkFailed: Axolotl failed, or the run was interrupted.
    """
    composed = compose_and_check(request, backend)

    def train_here() -> RunDir:
        folder = create(composed, request)
        with folder.held() as lock:
            launch.train(folder, folder.read(), lock)
        return folder

    task = _training(composed, request, composed.config, partial(create, composed, request))
    return backend.carry_out(task, train_here)


def _training(composed: Composed, request: Request, config: Config, folder: Callable[[], RunDir]) -> Task:
    """Task that trains a new run, in the folder that a function returns."""
    result = TaskResult(composed.recipe)
    gpus_a_node = 0 if composed.rehearsal else request.gpus
    return Task(result, lambda: [resume_command(folder(), result)], config, gpus_a_node, request.nodes)


def preview(request: Request, backend: Backend) -> str:
    """Return the config that `start` would train, or the scripts that it would submit; log the differences.

    Raises:
        UserError: the request is wrong.
    """
    composed = compose_and_check(request, backend)
    log_differences(composed)
    recipe = yamlfiles.read_recipe(composed.recipe_file)  # show the recipe's own output folders, for plain Axolotl
    config = composed.config | {key: recipe[key] for key in keys.affecting("run") if key in recipe}
    folder = RunDir(paths.runs() / composed.recipe / stamped("dry-run"))
    return backend.preview(_training(composed, request, config, lambda: folder))


def resume(
    name: str,
    backend: Backend,
    prepare_only: bool = False,
    force: Sequence[str] = (),
    trusted: bool = False,
) -> RunDir:
    """Resume an interrupted or failed run from its last valid checkpoint.

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
    if not folder.config_file.is_file():
        remedy = f"restore it, or start a new run with {recipe_command('run', record.recipe)}"
        raise UserError("missing", file=folder.config_file, remedy=remedy)
    is_own = folder.is_own(record)
    if not (is_own or trusted):
        raise UserError(
            f"{folder.path}: not created by you on this machine, or changed since; resuming it can run its author's "
            "code; if you trust the author, add --trust"
        )
    if record.recipe_note:
        warn(record.recipe_note)
    substitution.restore(folder.config)
    result = TaskResult(record.recipe)

    def resume_here() -> RunDir:
        if force:  # a job is checked on its own machine
            errors = {finding.name for finding in _findings(folder, record) if finding.level == "error"}
            unknown_force(force, errors.union(record.forced))
        _record_force(folder, force, is_own)
        _resume_here(folder, prepare_only, is_own)
        return folder

    def commands_of_job() -> list[Command]:
        _require_ended(folder)
        _record_force(folder, force, is_own)
        return [resume_command(folder, result)]

    gpus_a_node = 0 if record.rehearsal else record.gpus_used
    return backend.carry_out(Task(result, commands_of_job, folder.config, gpus_a_node, record.nodes), resume_here)


def _require_ended(run_dir: RunDir) -> None:
    """Raise UserError if a run is running, or cannot be resumed for another reason."""
    current = backends.read(run_dir)
    if current.state == "running":  # on this machine, the run's lock shows it
        raise UserError(f"{run_dir.path}: the run is still running")
    if reason := hindrance(run_dir, current):
        raise UserError(f"{run_dir.path}: {reason}")


def _record_force(run_dir: RunDir, force: Sequence[str], is_own: bool) -> None:
    """Record `force`, and sign the record with this user's key if it changed or belonged to another user."""
    if this_job():
        return  # a job may lack the user's key
    if force or not is_own:
        with run_dir.held():
            record = run_dir.read()  # a training may have just ended
            record.forced = [*record.forced, *force]
            record.hmac = signature(run_dir.hashed(record))
            run_dir.write(record)


def _resume_here(run_dir: RunDir, prepare_only: bool, is_own: bool) -> None:
    """Resume a run on this machine, which may be one of its nodes."""
    node = backends.this_node()
    if node and node.rank:
        launch.follow(run_dir, node)
        return
    with run_dir.held() as lock:
        record = run_dir.read()
        if reason := hindrance(run_dir, record):
            raise UserError(f"{run_dir.path}: {reason}")
        if prepare_only:
            launch.preprocess(run_dir, record)
            return
        if record.nodes > 1 and node is None:
            raise UserError(f"{run_dir.path}: the run needs {record.nodes} machines; resume it with --on slurm")
        if not record.launches or not is_own:
            _check_here(run_dir, record)
        checkpoint = run_dir.last_checkpoint()
        if record.launches:
            begin = checkpoint.name if checkpoint else "the beginning: it has no valid checkpoint"
            say(f"resume {run_dir.path} from {begin}")
        launch.train(run_dir, record, lock, checkpoint, node)


def hindrance(run_dir: RunDir, record: Run) -> str | None:
    """Reason why this process cannot resume a run, which may be its own job's; or None."""
    is_of_job = this_job() in {(job.backend, job.id) for job in run_dir.jobs()}
    if not is_of_job and (job := backends.unfinished_job(run_dir, "run")):
        return f"the run is {job}; cancel it first with `recipe cancel {run_dir.quoted}`"
    if record.state == "finished":
        return f"the run is finished; evaluate it with `recipe evaluate {run_dir.quoted}`"
    output = Path(record.cwd, str(run_dir.config.get("output_dir")))
    if output.resolve() != run_dir.output.resolve():
        return f"the run folder was moved, but its config still writes to {output}; move the folder back first"
    if path := record.changed_data:
        return f"{path} is missing or has changed since the run began; restore the file, or start a new run"
    return None


def _findings(run_dir: RunDir, record: Run) -> list[Finding]:
    """Findings of a run's config on this machine."""
    from ..plan import plan

    recipe_file = record.present_recipe
    composed = Composed(
        recipe=record.recipe,
        recipe_file=recipe_file if recipe_file.is_file() else run_dir.config_file,  # a run copied from another machine
        origin=record.origin,
        config=run_dir.config,
        differences=record.differences,
        profiles=record.profiles,
        rehearsal=record.rehearsal,
    )
    launching = not record.rehearsal
    report = check.check_config(composed, gpus.here(), record.ranks, launching, needs_data=True)
    plan.add_memory_finding(report, gpus.here(), record.ranks, trace=True)
    return report.findings


def _check_here(run_dir: RunDir, record: Run) -> None:
    """Check that this machine can train a run that was never launched here.

    Raises:
        UserError: this machine cannot train the run; the run's state becomes failed.
    """
    try:
        findings = [finding for finding in _findings(run_dir, record) if finding.scope != "code"]  # trusted by the user
        override_errors(findings, record.forced)
        refuse(findings)
        if not record.rehearsal:
            available = len(hardware.visible_gpus())
            if record.gpus_used > max(available, 1):
                raise UserError(f"{run_dir.path}: the run needs {record.gpus_used} GPUs; {available} available here")
    except UserError as error:
        record.state, record.summary.trouble = "failed", str(error)
        run_dir.write(record)
        raise


def resume_command(run_dir: RunDir, result: TaskResult) -> Command:
    """Command `recipe resume`, with which a job trains or resumes a run that this user trusts."""
    return Command("run", run_dir, ["resume", str(run_dir.path), "--trust"], result)


AUTO_RESUME = "auto_resume_from_checkpoints"


def create(composed: Composed, request: Request) -> RunDir:
    """Create a run folder with launch config and record.

    Args:
        composed: the run's checked config.
        request: request from which the config was composed.
    """
    substitution.restore(composed.config)
    with new_run(paths.runs() / composed.recipe, composed.digest[:7]) as (folder, part):
        config = launch_config(composed, folder)
        if f"{DATED}:chat_template" in request.force:  # prepared rows contain the day
            config["dataset_prepared_path"] += f"-{now()[:10]}"
        for difference in composed.differences:  # record tracker keys with placeholders filled in
            difference.run = config.get(difference.key, difference.run)
        record = record_of(composed, request)
        write_atomically(part.config_file, yamlfiles.write_yaml(config))
        record.hmac = signature(part.hashed(record))
        part.write(record)
    say(f"run {folder.path}")
    log_differences(composed)
    return folder


def log_differences(composed: Composed) -> None:
    """Log the origin of a variant, and the differences of a config from its recipe."""
    if composed.origin != composed.recipe:
        say(f"  a variant of {composed.origin}")
    for difference in composed.differences:
        say_once(f"  {difference}")  # only once if this command creates several runs


def record_of(composed: Composed, request: Request) -> Run:
    """Record of a new run, or of an adapter evaluated as a run.

    Args:
        composed: the run's checked config.
        request: request from which the config was composed.
    """
    record = Run(
        recipe=composed.recipe,
        recipe_file=str(composed.recipe_file),
        recipe_sha256=sha256(composed.recipe_file),
        digest=composed.digest,
        rehearsal=composed.rehearsal,
        profiles=composed.profiles,
        forced=request.force,
        gpus_used=request.gpus,
        nodes=request.nodes,
        base=composed.base,
        data=composed.data,
        named_files=datafiles.named_files(composed.config),
        test_data=datafiles.test_file(composed.config),
        cwd=str(Path.cwd()),
        provenance=collect(),
    )
    if composed.origin != composed.recipe:
        record.variant_of = composed.origin
    record.overrides = [override.without_secrets() for override in request.overrides]
    record.differences = [difference.without_secrets() for difference in composed.differences]
    record.of_variant = [difference.without_secrets() for difference in composed.of_variant]
    return record


def launch_config(composed: Composed, run_dir: RunDir) -> Config:
    """Config for Axolotl, with the run's folders, plugin and tracker names.

    Axolotl's own hash of prepared rows does not cover the data and some settings, so their folder's name has a hash
    that does. auto_resume_from_checkpoints is off, because Axolotl would also resume from a damaged checkpoint.
    """
    config = _with_tracker_names(composed, run_dir)
    config["output_dir"] = str(run_dir.output)
    config["dataset_prepared_path"] = str(paths.cache() / "prepared" / composed.rows_digest[:16])
    config["plugins"] = [*(config.get("plugins") or []), PLUGIN]
    if config.get(AUTO_RESUME):
        config[AUTO_RESUME] = False
    return config


def _with_tracker_names(composed: Composed, run_dir: RunDir) -> Config:
    """Fill in {placeholders} in the values of tracker keys.

    {project} is the name of the study, or of the recipe if it belongs to no study; rehearsals add a suffix. {run} is
    the path of the run folder below the project; `recipe` commands accept this path as a run's name. {runs} is the
    folder of all runs. Axolotl passes the value of each key to the tracker in the environment variable of the same
    name, unless the user has set this variable; a rehearsal ignores it, because it may name a server.
    """
    runs = run_dir.runs(composed.recipe)
    study = paths.study_name(composed.origin)
    project = f"{study}-rehearsal" if composed.rehearsal else study
    run_name = str(run_dir.path.relative_to(runs)).removeprefix(f"{study}/")
    values = {"project": project, "run": run_name, "runs": str(runs)}
    config = dict(composed.config)
    for key, value in composed.config.items():
        if re.match("(wandb|mlflow|trackio)_", key):
            text = filled(value, values)
            if text != value:
                config[key] = None if key.upper() in os.environ and not composed.rehearsal else text
    return config
