"""Axolotl's training processes: start, stop, and the record of their end."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from ..base import paths, yamlfiles
from ..base.errors import UserError, WorkFailed
from ..base.files import Row, opened, reserved, where_full
from ..base.machine import now, start_child, stop_requests
from ..base.progress import TrainingProgress, say
from ..configs import numerics
from ..configs.gpus import CPU_RANKS
from .records import Ended, FileState, Launch, Run, State, collect
from .rundir import RunDir, summarise, this_job

AXOLOTL = Path(sys.executable).with_name("axolotl")
_NO_GPU_MEMORY = re.compile("CUDA out of memory|CUDA error: out of memory")
_RANK_KILLED = re.compile(r"exitcode\s*: -9\b")  # as torchrun says it
_OF_TORCHRUN = re.compile("^.*torch/distributed/elastic/multiprocessing/api.py", re.MULTILINE)  # 50 lines at the end
_REFUSED = re.compile(r"^(?:([\w.]+)\n)?  (?:Value error, )?(.+?) \[type=\w+, input_value=", re.MULTILINE)  # pydantic's
_KILLED = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT)
_LESS_MEMORY = (
    "end other processes, give a job more, or start a run with --set dataloader_num_workers=0 --set dataset_num_proc=1"
)
OUT_OF_MEMORY = "out of memory"
"""Problem of a launch, as `_problem` finds it."""
LAST_SECONDS = 15  # for ranks to end by themselves once one of them has failed


def require(cwd: Path) -> None:
    """Refuse to start where Axolotl, or the folder that a run is started in, is missing.

    Raises:
        UserError: one is.
    """
    if not AXOLOTL.is_file():
        raise UserError(f"{AXOLOTL}: not there, and trains all runs; install axolotl beside this command")
    if not cwd.is_dir():
        raise UserError(f"{cwd}: the folder that the run was started in is gone; put it back, with what it held")


def train(folder: RunDir, record: Run, lock: int, checkpoint: Path | None = None) -> None:
    """Run the training process of a held run, and record its end.

    Args:
        folder: the run's.
        record: the content of its run.json.
        lock: the descriptor that holds it, which the process inherits.
        checkpoint: where to resume; None for the beginning.

    Raises:
        UserError: see `require`; nothing was recorded.
        OSError: there is no room for the record of a launch; nothing was recorded.
        WorkFailed: Axolotl failed, or the run was interrupted.
    """
    require(Path(record.cwd))
    if not record.launches:
        here = collect()  # of the machine that trains it, which may have the sources without their history
        record.provenance = here | {"git": here["git"] or record.provenance.get("git")}
    _drop_half_prepared(folder, record)
    launch = Launch(
        command=_command(folder, record, checkpoint),
        host=platform.node(),
        started=now(),
        resumed_from=checkpoint.name if checkpoint else None,
    )
    written = folder.metrics.stat().st_size if folder.metrics.exists() else 0
    logged = folder.log.stat().st_size if folder.log.exists() else 0
    with reserved(folder.path):
        record.launches.append(launch)
        record.state = "running"
        folder.write(record)
        launch.exit_code, stopped = _launch(launch.command, folder, record, folder.log, lock)
        launch.problem = _problem(folder, logged) if launch.exit_code not in (0, *_KILLED) else None
    launch.ended = now()
    metrics = folder.read_metrics()
    if used := next((each["gpus"] for each in reversed(metrics) if each.get("gpus")), None):
        known = (record.provenance.get("gpus") or [{}])[0]  # with the driver, which torch does not know
        record.provenance["gpus"] = [known | gpu for gpu in used]
    record.summary = summarise(metrics)
    record.summary.ended = summarise(folder.read_metrics(since=written)).ended  # not of an earlier launch
    adapter = folder.output / "adapter_model.safetensors"
    record.adapter = FileState.of(adapter) if adapter.is_file() else None
    record.state = _state(launch.exit_code, stopped, record.summary.ended, record.adapter is not None)
    folder.write(record)
    _require_finished(folder, record, launch, stopped, logged)


def _require_finished(folder: RunDir, record: Run, launch: Launch, stopped: bool, logged: int) -> None:
    """Raise the error that ended a launch, unless the run is finished.

    Args:
        stopped: whether `recipe` was asked to stop it.
        logged: where the launch begins in the run's log, in bytes.
    """
    again = f"`recipe resume {folder.path}{' --on slurm' if this_job(os.environ) else ''}` continues it"
    if launch.problem and launch.problem != OUT_OF_MEMORY:
        raise WorkFailed(f"{folder.path}: {record.state}, {launch.problem}; free some, and {again}")
    if record.state == "interrupted":
        if launch.exit_code == -signal.SIGKILL and not stopped:
            how = "killed by signal 9 (SIGKILL), which this command did not send; probably memory ran out"
            raise WorkFailed(f"{folder.path}: {how}: {_LESS_MEMORY}; {again}")
        raise WorkFailed(f"{folder.path}: interrupted{_signal(launch.exit_code or 0, stopped)}; {again}")
    if record.state == "failed" and record.summary.ended == "callback":
        where = f"step {record.summary.step} of {record.summary.max_steps}"
        raise WorkFailed(f"{folder.path}: a callback stopped the training at {where}; {folder.log} says why")
    if record.state == "failed" and record.summary.ended == "no batch":
        few = "its rows fill no batch, so that no step was trained; more rows, or a smaller micro_batch_size"
        raise WorkFailed(f"{folder.path}: {few}")
    if record.state == "failed":
        raise _failed(folder.path, folder.log, launch.exit_code or 0, logged)


def _signal(code: int, stopped: bool) -> str:
    """The signal that ended a process, for a message; empty if it was asked to stop."""
    return f" by signal {-code} ({signal.Signals(-code).name})" if code < 0 and not stopped else ""


def _state(code: int, stopped: bool, ended: Ended | None, has_adapter: bool) -> State:
    """The state of a run whose training process has exited.

    On SIGINT, Axolotl saves the adapter as it is and exits with code 0, and the training has no recorded end.

    Args:
        code: the exit code of the process.
        stopped: whether `recipe` was asked to stop.
        ended: how the training ended, as the process recorded it.
        has_adapter: whether there is an adapter in the output folder.
    """
    trained = ended in ("complete", "early stopping")
    if code == 0 and trained and has_adapter:
        return "finished"
    left_off = not trained and (stopped or (code == 0 and ended is None and has_adapter))
    return "interrupted" if code in _KILLED or ended == "signal" or left_off else "failed"


def follow(folder: RunDir) -> None:
    """Run this node's share of a run that another node holds.

    Raises:
        WorkFailed: it failed, without having been asked to stop.
    """
    record = folder.read()
    log = folder.path / f"node-{os.environ['SLURM_NODEID']}.log"
    command = _command(folder, record, folder.last_checkpoint())
    code, stopped = _launch(command, folder, record, log)
    if code and not stopped:
        raise _failed(folder.path, log)


def preprocess(folder: RunDir, record: Run) -> None:
    """Have Axolotl tokenize the rows of a run and fetch its base model, for which it needs no GPU.

    Raises:
        UserError: see `require`.
        WorkFailed: Axolotl failed, or was interrupted.
    """
    require(Path(record.cwd))
    _drop_half_prepared(folder, record)
    code, stopped = _launch([str(AXOLOTL), "preprocess", str(folder.config.resolve())], folder, record, folder.log)
    if stopped:
        raise WorkFailed(f"{folder.path}: interrupted")
    if code:
        raise _failed(folder.path, folder.log)


def _command(folder: RunDir, record: Run, checkpoint: Path | None) -> list[str]:
    command = [str(AXOLOTL), "train", str(folder.config.resolve()), *record.axolotl_arguments]
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


def _environment(folder: RunDir, record: Run) -> dict[str, str]:
    """The environment of the training process; a rehearsal sees neither GPU nor network.

    Trackers write into the run's folder, or beside all runs where they compare them; Axolotl has no keys for that.
    """
    path = folder.path.absolute()
    trackers = {
        "TENSORBOARD_LOGGING_DIR": str(path / "tensorboard"),
        "TRACKIO_DIR": str(RunDir(path).runs(record.recipe) / "trackio"),
        "WANDB_DIR": str(path),
        "WANDB_DATA_DIR": str(path / "wandb"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    added = {
        "AXOLOTL_DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{AXOLOTL.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # has torchrun
    }
    if record.rehearsal:
        added |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        added["AXOLOTL_DATASET_NUM_PROC"] = "0"  # else a process for each of few rows, which imports torch
        if record.ranks > 1:
            threads = max((os.cpu_count() or 1) // record.gpus_used, 1)
            added |= {CPU_RANKS: "1", "OMP_NUM_THREADS": str(threads)}
    elif record.ranks == 1:  # with more in sight, transformers would use them all
        added["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    return trackers | os.environ | added | numerics.environment(yamlfiles.read_yaml(folder.config))


def _drop_half_prepared(folder: RunDir, record: Run) -> None:
    """Remove half-written prepared rows, which Axolotl would take for complete.

    Only in the cache or the run's own folder, as the config may be another user's.
    datasets writes dataset_info.json last. Whoever is writing holds Axolotl's lock (axolotl/utils/data/lock.py).
    """
    prepared = Path(record.cwd, str(yamlfiles.read_yaml(folder.config).get("dataset_prepared_path"))).resolve()
    if not (prepared.is_dir() and any(map(prepared.is_relative_to, (paths.cache().resolve(), folder.path.resolve())))):
        return
    with suppress(Timeout), FileLock(prepared / "datasets_prep.lock", timeout=0):
        for part in {shard.parent for shard in prepared.glob("*/data-*.arrow")}:
            if not ((part / "dataset_info.json").is_file() or part.is_symlink()):
                shutil.rmtree(part)


def _problem(folder: RunDir, since: int) -> str | None:
    """Return the cause of a failed launch that its log names: memory, or a full disk."""
    text, tail = _said(folder.log, since)
    if _NO_GPU_MEMORY.search(text) or _RANK_KILLED.search(text):
        return OUT_OF_MEMORY
    full = where_full("\n".join(tail), [folder.path, paths.cache(), Path(tempfile.gettempdir())])
    return f"no space left in {full}" if full else None


def _failed(folder: Path, log: Path, code: int = 1, since: int = 0) -> WorkFailed:
    """The error of a failed launch, whose log begins at a byte of its file."""
    text, tail = _said(log, since)
    if (gpu := bool(_NO_GPU_MEMORY.search(text))) or _RANK_KILLED.search(text):
        problem = f"a rank was killed by signal 9 (SIGKILL); probably memory ran out: {_LESS_MEMORY}"
        if gpu:
            changes = f"`recipe plan {folder / 'config.yaml'}` says what needs it, and what to change"
            problem = f"the GPU's memory did not suffice: {changes}; `nvidia-smi` shows what else is on it"
        return WorkFailed("\n".join([*tail, f"{folder}: {problem}; the whole log is {log}"]))
    if refused := [f"{key}: {why}" if key else why for key, why in _REFUSED.findall("\n".join(tail))]:
        return WorkFailed(f"{folder}: Axolotl refuses the config: {'; '.join(refused)}; the whole log is {log}")
    return WorkFailed("\n".join([*tail, f"{folder}: Axolotl failed{_signal(code, False)}; the whole log is {log}"]))


def _said(log: Path, since: int) -> tuple[str, list[str]]:
    """The output of a launch, from a byte of its log, and its last lines before torchrun's report."""
    text = log.read_bytes()[since:].decode(errors="replace")
    return text, _OF_TORCHRUN.split(text, maxsplit=1)[0].splitlines()[-15:]


def _launch(command: list[str], folder: RunDir, record: Run, log: Path, *locks: int) -> tuple[int, bool]:
    """Run a process of Axolotl; return its exit code, and True if it was asked to stop.

    Args:
        locks: descriptors that it inherits.

    Raises:
        WorkFailed: the run's folder is gone.
    """
    with stop_requests() as stops, opened(log, "ab") as stream:
        troubled: list[Row] = []

        def seen(record: Row) -> None:
            if "loss" in record and record["loss"] is None and not troubled:
                troubled.append(record)
                stop = f"`recipe cancel {folder.path}` stops it at a checkpoint"
                say(f"  the loss is no number (NaN) since step {record['step']}; {stop}")

        progress = TrainingProgress(folder.metrics, seen)  # before the process can write there
        child = start_child(
            command,
            cwd=record.cwd,
            env=_environment(folder, record),
            stdout=stream,
            stderr=subprocess.STDOUT,
            pass_fds=locks,
        )
        with progress:
            _wait(child, stops, progress)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # data loader workers outlive a killed parent by seconds
    if not log.exists():
        raise WorkFailed(f"{folder.path}: was deleted while Axolotl wrote to it; `recipe run` starts another")
    return child.returncode, bool(stops)


def _wait(child: "subprocess.Popen[bytes]", stops: list[int], progress: TrainingProgress) -> None:
    """Show the child's progress; forward a request to stop, and kill it at the second."""
    asked = False
    while child.poll() is None:
        time.sleep(0.1)
        progress.read()
        if stops and not asked:
            asked = True
            say("stopping after this step, with a checkpoint; once more to stop at once")
            for process in _training(child):  # not their groups: they need their data loaders for the current step
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
        return [rank for rank in process.children() if "LOCAL_RANK" in rank.environ()] or [process]
    return []
