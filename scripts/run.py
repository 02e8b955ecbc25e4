"""Launching Axolotl: `recipe run` and `recipe resume`.

On several nodes a scheduler starts `recipe resume` on each of them. The first one's holds the run and keeps its record,
the others' only launch their share of the ranks.
"""

import ctypes
import hashlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from . import check, config, datafiles, gpus, paths, places, provenance, standin
from .compose import Composed, Request, check_arguments, compose, is_rehearsal, launched
from .engines import CPU_RANKS
from .errors import UserError, WorkFailed
from .files import sha256, write_atomically
from .places import Command, Outcome, Place, Work
from .progress import TrainingProgress, say
from .rundir import UNKNOWN, Launch, Run, RunDir, claim, find_run, now, summarise, this_job

LAST_SECONDS = 15  # that ranks have to end by themselves once one of them has failed


def prepare(request: Request, place: Place | None = None) -> Composed:
    """The checked config of a run; what is worth knowing about it goes to stderr.

    Args:
        request: the run.
        place: where it is to run; None for this machine.

    Raises:
        UserError: the request or the config is wrong.
    """
    here = place is None or place.here
    for option, value in (("--gpus", request.gpus), ("--nodes", request.nodes)):
        if value < 1:
            raise UserError(f"{option} {value}: at least 1")
    if here and request.nodes > 1:
        raise UserError(f"--nodes {request.nodes}: goes with --on slurm, which starts the run on each of them")
    on_gpus = here and not request.dry_run and not is_rehearsal(request)
    if on_gpus and request.gpus > max(available := len(provenance.gpus()), 1):
        raise UserError(f"--gpus {request.gpus}: this machine has {available}")
    check_arguments(request.axolotl_arguments)
    composed = compose(request)
    starts = not request.dry_run
    gpu = place.gpu() if place else gpus.here()
    found = check.examine(composed, gpu, request.ranks, launching=starts, data=starts, plan=starts).findings
    for finding in found:
        if not starts and finding.rule == "missing-file" and finding.key.startswith(("datasets", "test_datasets")):
            finding.level = "note"  # a dry run only shows the config
    for finding in check.refuse(places.relevant(place, found) if place else found, request.force):
        say(str(finding))
    if starts:
        composed.data = datafiles.record(composed.config)
    return composed


def run(request: Request, runs: Path) -> RunDir:
    """Launch a recipe in a new run folder and wait for it.

    Raises:
        UserError: the request is wrong; nothing was started.
        WorkFailed: Axolotl failed, or the run was interrupted.
    """
    folder = create(prepare(request), request, runs)
    with folder.held() as lock:
        _train(folder, folder.read(), lock)
    return folder


def submit(request: Request, runs: Path, place: Place) -> RunDir:
    """Hand a recipe over to a place that trains it, in a new run folder.

    Raises:
        UserError: the request is wrong, or the place refuses it; nothing was started.
    """
    composed, made = prepare(request, place), list[RunDir]()

    def commands() -> Iterator[Command]:
        made.append(create(composed, request, runs))
        yield _resume_command(made[0], runs)

    gpus_a_node = 0 if composed.rehearsal else request.gpus
    place.submit([Work(Outcome(composed.recipe), commands(), gpus_a_node, request.nodes)], composed.recipe, runs, [])
    return made[0]


def resubmit(name: str, runs: Path, place: Place) -> RunDir:
    """Hand an interrupted or failed run over to a place that goes on with it; see `resume`.

    Raises:
        UserError: it cannot be gone on with, or the place refuses it; nothing was started.
    """
    folder = find_run(name, runs)
    record = folder.read()
    if reason := "the run is still going on" if record.state == "running" else hindrance(folder, record):
        raise UserError(f"{folder.path}: {reason}")
    work = Work(
        Outcome(record.recipe),
        iter([_resume_command(folder, runs)]),
        gpus=0 if record.rehearsal else record.gpus_used,
        nodes=record.nodes,
    )
    place.submit([work], record.recipe, runs, [])
    return folder


def _resume_command(folder: RunDir, runs: Path) -> Command:
    return Command("run", folder, ["resume", str(folder.path), "--runs", str(runs)])


def create(composed: Composed, request: Request, runs: Path) -> RunDir:
    """A new run folder with the config and the record of a run that has yet to be launched."""
    if composed.rehearsal:
        standin.model_folder()
    folder = claim(runs, composed.recipe, composed.digest)
    ours = launched(composed, folder)
    for difference in composed.differences:  # with a tracker's placeholders filled in
        difference.run = ours.get(difference.key, difference.run)
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
        data=composed.data,
        test_data=datafiles.test_file(composed.config),
        cwd=str(Path.cwd()),
        provenance=provenance.collect(),
    )
    write_atomically(folder.config, config.write_yaml(ours))
    folder.write(record)
    say(f"run {folder.path}")
    for difference in composed.differences:
        say(f"  {difference.key}: {difference.recipe} -> {difference.run}  ({difference.why})")
    return folder


def resume(name: str, runs: Path, prepare_only: bool = False) -> RunDir:
    """Go on with an interrupted or failed run from its last whole checkpoint, in its own folder.

    Args:
        name: the run, see `find_run`.
        runs: the folder with the runs.
        prepare_only: only have its rows tokenized and its base model fetched.

    Raises:
        UserError: there is no such run, it is finished or still going on, or this machine cannot train it.
        WorkFailed: as in `run`.
    """
    folder = find_run(name, runs)
    if folder.read().nodes > 1 and os.environ.get("SLURM_NODEID", "0") != "0":
        _follow(folder)
        return folder
    with folder.held() as lock:
        record = folder.read()
        in_a_job = this_job(os.environ) in {job.id for job in folder.jobs()}
        if record.state == "finished" and in_a_job:
            say(f"{folder.path}: the run is finished")  # of a job that was requeued after it
            return folder
        if reason := hindrance(folder, record, in_a_job):
            raise UserError(f"{folder.path}: {reason}")
        if prepare_only:
            _preprocess(folder, record)
            return folder
        if record.nodes > 1 and "SLURM_LAUNCH_NODE_IPADDR" not in os.environ:
            raise UserError(f"{folder.path}: a run on {record.nodes} machines; --on slurm starts it on each of them")
        if not record.launches:
            _check_here(folder, record)
        checkpoint = folder.last_checkpoint()
        if record.launches:
            begin = checkpoint.name if checkpoint else "the beginning: it has no checkpoint"
            say(f"resume {folder.path} from {begin}")
        _train(folder, record, lock, checkpoint)
    return folder


def hindrance(folder: RunDir, record: Run, in_a_job: bool = False) -> str | None:
    """Why a run cannot be gone on with; None where it can.

    Args:
        in_a_job: whether what asks is the job that is to go on with it, or one that comes before.
    """
    job = None if in_a_job else folder.job_state("run")
    if job not in (None, UNKNOWN):
        return f"the run is {job}; `recipe cancel {folder.path}` ends that"
    if record.state == "finished":
        return f"the run is finished; `recipe evaluate {folder.path}` comes next"
    if not folder.config.is_file():
        return "ended before its config was written; run the recipe anew"
    output = Path(record.cwd, str(config.read_yaml(folder.config).get("output_dir")))
    if output.resolve() != folder.output.resolve():
        return f"the run was moved; it writes to {output}, so move it back there first"
    for file in record.data:
        path = Path(record.cwd, file.path)
        if not path.is_file() or sha256(path) != file.sha256:
            return f"{path} is not the data that the run began with; a resumed run would mix two"
    return None


def _check_here(folder: RunDir, record: Run) -> None:
    """Check a run that was created elsewhere, or a while ago, against the machine that is to train it.

    Raises:
        UserError: it cannot train it; the run is a failed one then.
    """
    content, recipe = config.read_yaml(folder.config), Path(record.recipe_file)
    composed = Composed(record.recipe, recipe, record.variant_of, content, [], {}, record.profiles, record.rehearsal)
    found = check.examine(composed, gpus.here(), record.ranks, launching=not record.rehearsal, plan=True).findings
    visible = len([*filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))]) or len(provenance.gpus())
    try:
        check.refuse(found, record.forced)
        if not record.rehearsal and record.gpus_used > max(visible, 1):
            raise UserError(f"{folder.path}: a run on {record.gpus_used} GPUs, and there are {visible} here")
    except UserError:
        record.state = "failed"
        folder.write(record)
        raise


def _template_sha256(recipe: str) -> str | None:
    """A hash of all that a recipe is rendered from; None where it has no template."""
    template = paths.TEMPLATES / f"{recipe}.yaml.j2"
    if not template.is_file():
        return None
    files = [template, *sorted(template.parent.glob("_*.j2")), paths.TEMPLATES / "models.yaml"]
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def _command(folder: RunDir, record: Run, checkpoint: Path | None) -> list[str]:
    """The command line of this node's training process."""
    command = [_axolotl(), "train", str(folder.config.resolve()), *record.axolotl_arguments]
    if checkpoint:
        command += ["--resume-from-checkpoint", str(checkpoint.resolve())]
    if record.ranks == 1:
        return [*command, "--launcher", "python"]
    torchrun = [f"--nproc-per-node={record.gpus_used}", f"--shutdown-timeout={LAST_SECONDS}"]
    if record.nodes == 1:
        torchrun.append("--standalone")
    else:
        head, job, node = (os.environ[f"SLURM_{name}"] for name in ("LAUNCH_NODE_IPADDR", "JOB_ID", "NODEID"))
        port = 20000 + int(job) % 10000  # jobs that share a node do not share it
        torchrun += [f"--nnodes={record.nodes}", f"--node-rank={node}", f"--master-addr={head}"]
        torchrun += [f"--master-port={port}"]
    return [*command, "--launcher", "torchrun", "--", *torchrun]


def _axolotl() -> str:
    return str(Path(sys.executable).with_name("axolotl"))


def _environment(folder: RunDir, record: Run) -> dict[str, str]:
    """The environment of the training process; a rehearsal sees neither GPU nor network.

    Trackers write into the run's folder, or where they compare runs, beside all runs; Axolotl has no keys for that.
    """
    path = folder.path.absolute()
    trackers = {
        "TENSORBOARD_LOGGING_DIR": str(path / "tensorboard"),
        "TRACKIO_DIR": str(RunDir(path).runs(record.recipe) / "trackio"),
        "WANDB_DIR": str(path),
        "WANDB_DATA_DIR": str(path / "wandb"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    added = {"AXOLOTL_DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    added["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # has torchrun
    if record.rehearsal:
        added |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        if record.ranks > 1:
            share = (os.cpu_count() or 1) // record.gpus_used
            added |= {CPU_RANKS: "1", "OMP_NUM_THREADS": str(max(share, 1))}
    elif record.ranks == 1:  # with more in sight, transformers would use them all
        added["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    return trackers | os.environ | added


def _train(folder: RunDir, record: Run, lock: int, checkpoint: Path | None = None) -> None:
    """Run the training process of a held run to its end, and write how it ended."""
    if not record.launches:
        record.provenance = provenance.collect()  # of the machine that trains it
    command = _command(folder, record, checkpoint)
    resumed_from = checkpoint.name if checkpoint else None
    launch = Launch(command=command, host=platform.node(), started=now(), resumed_from=resumed_from)
    record.launches.append(launch)
    record.state = "running"
    folder.write(record)
    code, stopped = _launch(command, folder, record, folder.log, lock)
    metrics = folder.read_metrics()
    record.summary = summarise(metrics)
    launch.ended, launch.exit_code = now(), code
    complete = bool(metrics) and record.summary.step == record.summary.max_steps
    if code in (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT) or (stopped and not complete):
        record.state = "interrupted"
    elif code == 0 and (folder.output / "adapter_model.safetensors").is_file():
        record.state = "finished"
    else:
        record.state = "failed"
    folder.write(record)
    if record.state == "interrupted":
        again = f"recipe resume {folder.path}" + (" --on slurm" if this_job(os.environ) else "")
        raise WorkFailed(f"{folder.path}: interrupted; `{again}` goes on")
    if record.state == "failed":
        raise _failed(folder.path, folder.log)


def _follow(folder: RunDir) -> None:
    """Run this node's share of a run that another node holds.

    Raises:
        WorkFailed: it ended in another way than well.
    """
    record, log = folder.read(), folder.path / f"node-{os.environ['SLURM_NODEID']}.log"
    command = _command(folder, record, folder.last_checkpoint())
    code, stopped = _launch(command, folder, record, log)
    if code and not stopped:
        raise _failed(folder.path, log)


def _preprocess(folder: RunDir, record: Run) -> None:
    """Have Axolotl tokenize the rows of a run and fetch its base model, for which it needs no GPU.

    Raises:
        WorkFailed: Axolotl failed.
    """
    command = [_axolotl(), "preprocess", str(folder.config.resolve())]
    code, _ = _launch(command, folder, record, folder.log)
    if code:
        raise _failed(folder.path, folder.log)


def _failed(folder: Path, log: Path) -> WorkFailed:
    tail = log.read_text(errors="replace").splitlines()[-15:]
    return WorkFailed("\n".join([*tail, f"{folder}: Axolotl failed; the whole log is {log}"]))


def _launch(command: list[str], folder: RunDir, record: Run, log: Path, *locks: int) -> tuple[int, bool]:
    """Run a process of Axolotl's to its end: its exit code, and whether it was asked to stop.

    Args:
        locks: descriptors that it inherits.
    """
    with stop_requests() as stops, log.open("ab") as stream:
        child = subprocess.Popen(
            command,
            cwd=record.cwd,
            env=_environment(folder, record),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            pass_fds=locks,
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the child in order
            preexec_fn=_end_with_parent_and_ignore_warnings,
        )
        _wait(child, folder, stops)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # data loader workers outlive a killed parent by seconds
    return child.returncode, bool(stops)


def _end_with_parent_and_ignore_warnings() -> None:
    """What a training process does first: SLURM's warning of a time limit goes to all processes, and is for us."""
    end_with_parent()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def end_with_parent() -> None:
    """Have Linux send SIGTERM to this process when its parent is gone, however the parent ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """The signals to stop that arrive within the block, in a list that grows; SIGUSR1 is a scheduler's warning."""
    received: list[int] = []
    handlers: dict[signal.Signals, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        handlers[number] = signal.signal(number, lambda n, _: received.append(n))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _wait(child: "subprocess.Popen[bytes]", folder: RunDir, stops: list[int]) -> None:
    """Show the child's progress until it ends; pass a request to stop on, the second time by force."""
    asked = False
    with TrainingProgress(folder.metrics) as progress:
        while child.poll() is None:
            time.sleep(0.1)
            progress.read()
            if stops and not asked:
                asked = True
                progress.say("stopping after this step, with a checkpoint; once more to stop at once")
                for process in _training(child):  # not their groups: they need their data loaders for the step in hand
                    with suppress(psutil.NoSuchProcess):
                        process.terminate()
            if len(stops) > 1:
                with suppress(psutil.NoSuchProcess):
                    for process in [*psutil.Process(child.pid).children(recursive=True), child]:
                        process.kill()
        progress.read()


def _training(child: "subprocess.Popen[bytes]") -> "list[psutil.Process]":
    """The processes that train: the ranks that a launcher has started, else the child itself."""
    with suppress(psutil.Error):
        process = psutil.Process(child.pid)
        return [one for one in process.children() if "LOCAL_RANK" in one.environ()] or [process]
    return []
