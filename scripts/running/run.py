"""Runs of recipes, from the request to the trained adapter: `recipe run` and `recipe resume`.

On several nodes a scheduler starts `recipe resume` on each of them. The one on the first node holds the run and keeps
its record; the others only launch their share of the ranks.
"""

import hashlib
import os
import shutil
from collections.abc import Container, Sequence
from pathlib import Path

from .. import backends
from ..backends import Backend
from ..backends.slurm import Slurm
from ..base import machine, paths, yamlfiles
from ..base.errors import UserError
from ..base.files import sha256, write_atomically
from ..base.progress import Bar, say
from ..checks import check, trust
from ..checks.check import check_arguments
from ..configs import datafiles, gpus, substitution
from ..configs.compose import Composed, Request, compose, is_rehearsal
from ..configs.config import Difference
from ..configs.datafiles import DataFile
from ..planning import fit
from ..runs import launch, provenance
from ..runs.handover import launched
from ..runs.lookup import find_run
from ..runs.rundir import Run, RunDir, new_folder, this_job
from ..runs.tasks import Command, Outcome, Work
from ..scores import evaluation_rows
from . import shortage


def prepare(request: Request, backend: Backend, runs: Path) -> Composed:
    """The checked config of a run; what is worth knowing about it goes to stderr.

    Args:
        request: the run.
        backend: where it is to run.
        runs: the folder for the run's.

    Raises:
        UserError: the request or the config is wrong.
    """
    for option, value in (("--gpus", request.gpus), ("--nodes", request.nodes)):
        if value < 1:
            raise UserError(f"{option} {value}: at least 1")
    backend.check_size(1 if request.dry_run or is_rehearsal(request) else request.gpus, request.nodes)
    check_arguments(request.axolotl_arguments)
    gpu = backend.gpu()
    composed = compose(request, gpu)
    starts = not request.dry_run
    with Bar(f"checking {composed.recipe}", 1):
        report = check.examine(composed, gpu, request.ranks, launching=starts, data=starts, runs=runs)
        fit.add_to(report, gpu, request.ranks, anew=starts)
    found = report.findings
    for finding in found:
        if not starts and finding.scope == "data":
            finding.level = "note"  # a dry run only shows the config
    for finding in check.refuse(backends.relevant(backend, found), request.force):
        say(str(finding))
    # a job would wait in the queue only to be refused; on a CPU, and in a rehearsal, Axolotl says so at once
    if starts and (not backend.here or (gpu and not composed.rehearsal) or composed.config.get("sample_packing")):
        asked = check.Report(composed.recipe, composed, check.by_axolotl(composed, gpu))
        if not asked.count("error") and check.has_tokenizer(composed):
            check.tokenize(asked, composed, request.ranks, most=check.SOME)
        for finding in check.refuse(asked.findings):
            say(str(finding))
    if starts:
        composed.data = datafiles.record(composed.config)
    return composed


def start(request: Request, runs: Path, backend: Backend) -> RunDir:
    """Train a recipe in a new run folder, in this process or as a job.

    Raises:
        UserError: the request is wrong, or the backend refuses it; nothing was started.
        WorkFailed: Axolotl failed, or the run was interrupted.
    """
    composed = prepare(request, backend, runs)
    if isinstance(backend, Slurm):
        work = Work(
            Outcome(composed.recipe),
            lambda: [command(create(composed, request, runs), runs)],
            gpus=0 if composed.rehearsal else request.gpus,
            nodes=request.nodes,
        )
        return backend.carry_out(work, composed.recipe, runs)
    launch.require(Path.cwd())
    folder = create(composed, request, runs)
    with folder.held() as lock:
        shortage.train(folder, folder.read(), lock)
    return folder


def create(composed: Composed, request: Request, runs: Path, shared: Container[Difference] = ()) -> RunDir:
    """A new run folder with the config and the record of a run that is yet to be launched.

    Args:
        composed: the run's checked config.
        request: what it was composed from.
        runs: the folder for it.
        shared: differences from the recipe that have been shown already, for several runs together.
    """
    if composed.rehearsal and substitution.stands_in(composed.config):
        substitution.model_folder()
    folder = RunDir(new_folder(runs / composed.recipe, composed.digest[:7]))
    ours = launched(composed, folder)
    new = [difference for difference in composed.differences if difference not in shared]
    for difference in composed.differences:  # with a tracker's placeholders filled in
        difference.run = ours.get(difference.key, difference.run)
    record = model_record(composed, request)
    try:
        write_atomically(folder.config, yamlfiles.write_yaml(ours))
        record.seal = trust.seal(folder, record)
        folder.write(record)
    except OSError:
        shutil.rmtree(folder.path)  # without a record the folder is not a run
        raise
    say(f"run {folder.path}")
    if record.variant_of:
        say(f"  a variant of {record.variant_of}")
    for difference in new:
        say(f"  {difference}")
    return folder


def model_record(composed: Composed, request: Request) -> Run:
    """The record of a run that is yet to be launched, or of what is evaluated as one.

    Args:
        composed: its checked config.
        request: what it was composed from.
    """
    stands_in = composed.rehearsal and substitution.stands_in(composed.config)
    record = Run(
        recipe=composed.recipe,
        variant_of=composed.origin if composed.origin != composed.recipe else None,
        recipe_file=str(composed.recipe_file),
        recipe_sha256=sha256(composed.recipe_file),
        digest=composed.digest,
        template_sha256=_template_sha256(composed.recipe),
        rehearsal=composed.rehearsal,
        profiles=composed.profiles,
        overrides=request.overrides,
        forced=request.force,
        mirror=request.mirror,
        gpus_used=request.gpus,
        nodes=request.nodes,
        axolotl_arguments=request.axolotl_arguments,
        differences=composed.differences,
        of_variant=composed.of_variant,
        data=composed.data,
        test_data=datafiles.test_file(composed.config),
        stand_in_sha256=substitution.digest() if stands_in else None,
        cwd=str(Path.cwd()),
        provenance=provenance.collect(),
    )
    usual = evaluation_rows.usual(record, composed.config)
    if usual and usual.file:
        record.test_rows = DataFile(path=str(usual.file), sha256=sha256(usual.file), bytes=usual.file.stat().st_size)
    return record


def resume(
    name: str,
    runs: Path,
    backend: Backend,
    prepare_only: bool = False,
    force: Sequence[str] = (),
    trusted: bool = False,
) -> RunDir:
    """Resume an interrupted or failed run from its last whole checkpoint, in this process or as a job.

    A finished run is left as it is.

    Args:
        name: the run, see `find_run`.
        runs: the folder with the runs.
        backend: where it is to run.
        prepare_only: only have its rows tokenized and its base model fetched, in this process.
        force: the names of findings that are overridden, which the run's record then has.
        trusted: whether a run is resumed that is not this user's own.

    Raises:
        UserError: there is no such run, it is still running, it is another user's, or the backend cannot train it.
        WorkFailed: as in `start`.
    """
    folder = find_run(name, runs)
    record = folder.read()
    own = trust.is_own(folder, record)
    _agree(folder, record, force, own, trusted)
    if record.state == "finished":
        say(f"{folder.path}: the run is finished")
        return folder
    trust.restore(folder, record)
    if isinstance(backend, Slurm):  # here, what holds the run decides
        current = backends.read(folder)
        if reason := "the run is still running" if current.state == "running" else hindrance(folder, current):
            raise UserError(f"{folder.path}: {reason}")
        gpus_a_node = 0 if record.rehearsal else record.gpus_used
        work = Work(Outcome(record.recipe), lambda: [command(folder, runs)], gpus_a_node, record.nodes)
        return backend.carry_out(work, record.recipe, runs)
    return _resume_here(folder, prepare_only, own)


def _agree(folder: RunDir, record: Run, force: Sequence[str], own: bool, trusted: bool) -> None:
    """Refuse a run that is not this user's own, unless it is trusted; trust makes it the user's own."""
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
        shortage.train(folder, record, lock, checkpoint)
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
        return "ended before its config was written; run the recipe anew"
    output = Path(record.cwd, str(yamlfiles.read_yaml(folder.config).get("output_dir")))
    if output.resolve() != folder.output.resolve():
        return f"the run was moved; it writes to {output}, so move it back there first"
    for file in record.data:
        path = Path(record.cwd, file.path)
        if not path.is_file() or sha256(path) != file.sha256:
            return f"{path} is not the data that the run began with; a resumed run would mix the two"
    return None


def _check_here(folder: RunDir, record: Run) -> None:
    """Check a run that was created elsewhere, or a while ago, against the machine that is to train it.

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
        report = check.examine(composed, gpus.here(), record.ranks, launching=not record.rehearsal, runs=folder.path)
        fit.add_to(report, gpus.here(), record.ranks, anew=True)
        found = [finding for finding in report.findings if finding.scope != "code"]  # of a run that is trusted
        errors = {finding.name for finding in found if finding.level == "error"}
        forced = [name for name in record.forced if name in errors]  # not those of the rows, or of another GPU
        check.refuse(found, forced)
        if not record.rehearsal and record.gpus_used > max(visible := len(machine.visible_gpus()), 1):
            raise UserError(f"{folder.path}: a run on {record.gpus_used} GPUs, and there are {visible} here")
    except UserError:
        record.state = "failed"
        folder.write(record)
        raise


def _template_sha256(recipe: str) -> str | None:
    """A hash of everything that a recipe is rendered from; None where it has no template."""
    written = [templates / f"{recipe}.yaml.j2" for _, templates in paths.homes()]
    template = next(filter(Path.is_file, written), None)
    if not template:
        return None
    files = [template, *sorted(template.parent.glob("_*.j2")), paths.TEMPLATES / "models.yaml"]
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def command(folder: RunDir, runs: Path, rows: str = "") -> Command:
    """The command that trains or resumes a run that is trusted; see `Command` for `rows`."""
    return Command("run", folder, ["resume", str(folder.path), "--trust", "--runs", str(runs)], rows)
