"""Launching Axolotl: `recipe run` and `recipe resume`."""

import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from . import check, config, datafiles, gpus, paths, provenance, standin
from .compose import Composed, Request, check_arguments, compose, is_rehearsal, launched
from .engines import CPU_RANKS
from .errors import UserError, WorkFailed
from .files import sha256, write_atomically
from .progress import TrainingProgress, say
from .rundir import Launch, Run, RunDir, claim, find_run, now, summarise

LAST_SECONDS = 15  # that ranks have to end by themselves once one of them has failed


def prepare(request: Request) -> Composed:
    """The checked config of a run; what is worth knowing about it goes to stderr.

    Raises:
        UserError: the request or the config is wrong.
    """
    if request.gpus < 1:
        raise UserError(f"--gpus {request.gpus}: at least 1")
    on_gpus = not request.dry_run and not is_rehearsal(request)
    if on_gpus and request.gpus > max(available := len(provenance.gpus()), 1):
        raise UserError(f"--gpus {request.gpus}: this machine has {available}")
    check_arguments(request.axolotl_arguments)
    composed = compose(request)
    starts = not request.dry_run
    report = check.examine(composed, gpus.here(), request.gpus, launching=starts, data=starts, plan=starts)
    for finding in report.findings:
        if not starts and finding.rule == "missing-file" and finding.key.startswith(("datasets", "test_datasets")):
            finding.level = "note"  # a dry run only shows the config
    for finding in check.refuse(report.findings, request.force):
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
    composed = prepare(request)
    if composed.rehearsal:
        standin.model_folder()
    folder = claim(runs, composed.recipe, composed.digest)
    with folder.held() as lock:
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
            axolotl_arguments=request.axolotl_arguments,
            differences=composed.differences,
            data=composed.data,
            test_data=datafiles.test_file(composed.config),
            cwd=str(Path.cwd()),
            provenance=provenance.collect(),
        )
        folder.write(record)
        write_atomically(folder.config, config.write_yaml(ours))
        say(f"run {folder.path}")
        for difference in composed.differences:
            say(f"  {difference.key}: {difference.recipe} -> {difference.run}  ({difference.why})")
        _train(folder, record, lock)
    return folder


def resume(name: str, runs: Path) -> RunDir:
    """Go on with an interrupted or failed run from its last whole checkpoint, in its own folder.

    Raises:
        UserError: there is no such run, or it is finished or still going on.
        WorkFailed: as in `run`.
    """
    folder = find_run(name, runs)
    with folder.held() as lock:
        record = folder.read()
        if record.state == "finished":
            raise UserError(f"{folder.path}: the run is finished; `recipe evaluate {folder.path}` comes next")
        if not folder.config.is_file():
            raise UserError(f"{folder.path}: ended before its config was written; run the recipe anew")
        output = Path(record.cwd, str(config.read_yaml(folder.config).get("output_dir")))
        if output.resolve() != folder.output.resolve():
            raise UserError(f"{folder.path}: the run was moved; it writes to {output}, so move it back there first")
        for file in record.data:
            path = Path(record.cwd, file.path)
            if not path.is_file() or sha256(path) != file.sha256:
                raise UserError(f"{path}: not the data that the run began with; a resumed run would mix two")
        checkpoint = folder.last_checkpoint()
        say(f"resume {folder.path} from {checkpoint.name if checkpoint else 'the beginning: it has no checkpoint'}")
        _train(folder, record, lock, checkpoint)
    return folder


def _template_sha256(recipe: str) -> str | None:
    """A hash of all that a recipe is rendered from; None where it has no template."""
    template = paths.TEMPLATES / f"{recipe}.yaml.j2"
    if not template.is_file():
        return None
    files = [template, *sorted(template.parent.glob("_*.j2")), paths.TEMPLATES / "models.yaml"]
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def _command(folder: RunDir, record: Run, checkpoint: Path | None) -> list[str]:
    """The command line of the training process."""
    axolotl = Path(sys.executable).with_name("axolotl")
    command = [str(axolotl), "train", str(folder.config.resolve()), *record.axolotl_arguments]
    if checkpoint:
        command += ["--resume-from-checkpoint", str(checkpoint.resolve())]
    if record.gpus_used == 1:
        return [*command, "--launcher", "python"]
    torchrun = ["--standalone", f"--nproc-per-node={record.gpus_used}", f"--shutdown-timeout={LAST_SECONDS}"]
    return [*command, "--launcher", "torchrun", "--", *torchrun]


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
        if record.gpus_used > 1:
            share = (os.cpu_count() or 1) // record.gpus_used
            added |= {CPU_RANKS: "1", "OMP_NUM_THREADS": str(max(share, 1))}
    elif record.gpus_used == 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        added["CUDA_VISIBLE_DEVICES"] = "0"  # with more in sight, transformers would use them all
    return trackers | os.environ | added


def _train(folder: RunDir, record: Run, lock: int, checkpoint: Path | None = None) -> None:
    """Run the training process of a held run to its end, and write how it ended."""
    command = _command(folder, record, checkpoint)
    launch = Launch(command=command, started=now(), resumed_from=checkpoint.name if checkpoint else None)
    record.launches.append(launch)
    record.state = "running"
    folder.write(record)
    with stop_requests() as stops, folder.log.open("ab") as log:
        child = subprocess.Popen(
            command,
            cwd=record.cwd,
            env=_environment(folder, record),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the child in order
            preexec_fn=end_with_parent,
        )
        _wait(child, folder, stops)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # data loader workers outlive a killed parent by seconds
    metrics = folder.read_metrics()
    record.summary = summarise(metrics)
    launch.ended, launch.exit_code = now(), child.returncode
    complete = bool(metrics) and record.summary.step == record.summary.max_steps
    if child.returncode in (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT) or (stops and not complete):
        record.state = "interrupted"
    elif child.returncode == 0 and (folder.output / "adapter_model.safetensors").is_file():
        record.state = "finished"
    else:
        record.state = "failed"
    folder.write(record)
    if record.state == "interrupted":
        raise WorkFailed(f"{folder.path}: interrupted; `recipe resume {folder.path}` goes on")
    if record.state == "failed":
        tail = folder.log.read_text(errors="replace").splitlines()[-15:]
        raise WorkFailed("\n".join([*tail, f"{folder.path}: Axolotl failed; the whole log is {folder.log}"]))


def end_with_parent() -> None:
    """Have Linux send SIGTERM to this process when its parent is gone, however the parent ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """The signals to stop (SIGINT, SIGTERM) that arrive within the block, in a list that grows."""
    received: list[int] = []
    handlers: dict[signal.Signals, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
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
