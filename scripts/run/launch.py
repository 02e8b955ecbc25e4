"""Starts and stops Axolotl's processes, and records how training ended."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from ..base import paths
from ..base.errors import UserError, WorkFailed
from ..base.files import Row, opened, reading, reserved, where_full
from ..base.processes import now, start_child, stop_requests
from ..base.run_files import RunFile
from ..base.terminal import TrainingProgress, say, warn_once
from ..base.yamlfiles import Config
from ..config import datafiles, merging
from ..config.finding import FIRST_LOSS, MODEL, SIGNALS, Finding
from ..config.gpus import CPU_RANKS
from ..training.run_record import FORCED, STOP_AT, Ended, FileState, Launch, Provenance, Run, State, collect
from ..training.summary import summarise
from .rundir import Node, RunDir, this_job

AXOLOTL = Path(sys.executable).with_name("axolotl")
_KILLED = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT)
_MOST_BYTES = 1 << 20  # that are read of a log, from its end
_LESS_MEMORY = (
    "end other processes, request more memory for the job, or start a run with --set dataloader_num_workers=0 "
    "--set dataset_num_proc=1"
)
_NO_SERVER = "http://127.0.0.1:9"  # nothing listens there
LAST_SECONDS = 15  # time for the other ranks to exit after one has failed
TMPDIR_BYTES = 107 - len("/pymp-12345678/listener-12345678")  # Linux allows 107 bytes for the name of a socket


def _require_cwd(record: Run) -> None:
    """Check that the working directory of a run exists.

    Raises:
        UserError: it is missing.
    """
    if not Path(record.cwd).is_dir():
        problem = "not found, but the run was started in this folder; restore it with its contents"
        raise UserError(f"{record.cwd}: {problem}")


def _require_short_tmpdir(config: Config) -> None:
    """Check that a worker of the data loader can open its socket in the temporary folder.

    A worker that cannot open it sends no batch and no error, and the training waits for ever.

    Raises:
        UserError: the folder's path is too long.
    """
    folder = tempfile.gettempdir()
    size = len(os.fsencode(folder))
    if size > TMPDIR_BYTES and config.get("dataloader_num_workers") != 0:
        problem = f"a path of {size} bytes, too long for the sockets of data loader workers"
        raise UserError(f"{folder}: {problem}; set TMPDIR to a folder with at most {TMPDIR_BYTES} bytes")


def train(run_dir: RunDir, record: Run, lock: int, checkpoint: Path | None = None, node: Node | None = None) -> None:
    """Run the training process of a locked run, and record how it ended.

    Args:
        run_dir: the run folder.
        record: content of run.json.
        lock: file descriptor of the run's lock; the training process inherits it.
        checkpoint: checkpoint to resume from; None to start from the beginning.
        node: this node, if several train the run.

    Raises:
        UserError: see `_require_cwd` and `_require_short_tmpdir`; nothing was recorded.
        OSError: no disk space for the record of a launch; nothing was recorded.
        WorkFailed: Axolotl failed, or the run was interrupted.
    """
    _require_cwd(record)
    _require_short_tmpdir(run_dir.config)
    _record_machine(record)
    _drop_half_prepared(run_dir, record)
    launch = Launch(command=_axolotl_command(run_dir, record, checkpoint, node), started=now())
    if checkpoint:
        launch.resumed_from = checkpoint.name
    written, logged = _size(run_dir.metrics), _size(run_dir.log)
    with reserved(run_dir.path):
        record.launches.append(launch)
        record.state = "running"
        run_dir.write(record)
        launch.exit_code, stopped = _launch(launch.command, run_dir, record, run_dir.log, lock)
        log = LaunchLog(run_dir.log, logged)
        if launch.exit_code not in (0, *_KILLED):
            launch.out_of_memory = log.out_of_gpu_memory or log.lost_rank
            if not launch.out_of_memory:
                launch.full_disk = _full_disk(run_dir, log)
    launch.ended = now()
    record.summary = summarise(run_dir.read_metrics())
    record.summary.ended = summarise(run_dir.read_metrics(since=written)).ended  # ignores earlier launches
    record.adapter = FileState.of(run_dir.adapter) if run_dir.adapter.is_file() else None
    record.hub_commits = {source.key: source.commit for source in datafiles.hub_commits(run_dir.config)}
    record.state = _state(launch.exit_code, stopped, record.summary.ended, record.adapter is not None)
    if record.state == "finished":
        run_dir.write(record)
        return
    if reason := _reason(run_dir, record, launch.exit_code, stopped):
        error = WorkFailed(f"{run_dir.path}: {reason}")
    else:
        error = _failed(run_dir, log, launch.exit_code)
    launch.error = "\n".join(str(error).splitlines()[-3:])
    run_dir.write(record)
    raise error


def _size(file: Path) -> int:
    """Size of a file in bytes; 0 if it is missing."""
    return file.stat().st_size if file.exists() else 0


def _record_machine(record: Run) -> None:
    """Record the provenance of the training machine; report later launches' differences from the first launch."""
    here = collect()
    here["gpus"] = here["gpus"][: record.gpus_used]
    if not record.launches:
        here["git"] = here["git"] or record.provenance.get("git")  # this machine's checkout may lack the history
        record.provenance = here
        return
    if changed := merging.differences(_versions(record.provenance), _versions(here)):
        values = "; ".join(f"{name}: {first} -> {new}" for name, (first, new) in changed.items())
        say(f"  versions or GPU differ from the first launch; run.json keeps the first launch's: {values}")


def _versions(provenance: Provenance) -> Config:
    """Versions and GPUs that a resumed run should share with its first launch."""
    return {key: provenance.get(key) for key in ("packages", "cuda", "gpus")}


def _reason(run_dir: RunDir, record: Run, code: int, stopped: bool) -> str | None:
    """Reason for the end of an unfinished run's last launch, and what to do; None if Axolotl failed.

    Args:
        code: exit code of the process.
        stopped: whether `recipe` received a request to stop.
    """
    launch = record.launches[-1]
    job = this_job()
    resume = f"`recipe resume {run_dir.quoted}{f' --on {job.backend}' if job else ''}` continues it"
    if launch.full_disk:
        return f"{record.state}, no space left in {launch.full_disk}; free some space, then {resume}"
    if record.state == "interrupted":
        if code == -signal.SIGKILL and not stopped:
            return f"killed by signal 9 (SIGKILL) from outside; memory probably ran out: {_LESS_MEMORY}; {resume}"
        return f"interrupted{_signal(code)}; {resume}"
    if record.summary.ended == "callback":
        step = f"step {record.summary.step} of {record.summary.max_steps}"
        return f"a callback stopped the training at {step}; see {run_dir.log} for the reason"
    if record.summary.ended == "finding":
        remedy = f"`recipe resume {run_dir.quoted} --force NAME` accepts a name in brackets"
        return f"{record.summary.trouble}\nstopped: correct the config in a new run; or {remedy}"
    if record.summary.ended == "no batch":
        return "no step was trained, because the rows do not fill a batch; add rows or lower micro_batch_size"
    return None


def _signal(code: int) -> str:
    """Message part with the signal that ended a process; empty if it exited."""
    return f" by signal {-code} ({signal.Signals(-code).name})" if code < 0 else ""


def _state(code: int, stopped: bool, ended: Ended | None, has_adapter: bool) -> State:
    """State of a run whose training process has exited.

    On SIGINT, Axolotl saves the current adapter and exits with code 0, but no end of training is recorded.

    Args:
        code: exit code of the process.
        stopped: whether `recipe` received a request to stop.
        ended: reason for the end of training, if the process recorded one.
        has_adapter: whether the output folder has an adapter.
    """
    is_complete = ended in ("complete", "early stopping")
    if code in _KILLED:
        return "interrupted"
    if code == 0 and has_adapter:
        if is_complete:
            return "finished"
        if ended is None:  # see above
            return "interrupted"
    if is_complete:
        return "failed"
    return "interrupted" if stopped or ended == "signal" else "failed"


def follow(run_dir: RunDir, node: Node) -> None:
    """Run this node's ranks of a run that another node has locked.

    Raises:
        UserError: see `_require_short_tmpdir`.
        WorkFailed: the ranks failed without a request to stop.
    """
    _require_short_tmpdir(run_dir.config)
    record = run_dir.read()
    log = run_dir.path / RunFile.NODE_LOG.format(node.rank)
    command = _axolotl_command(run_dir, record, run_dir.last_checkpoint(), node)
    code, stopped = _launch(command, run_dir, record, log)
    if code and not stopped:
        raise _failed(run_dir, LaunchLog(log), code)


def preprocess(run_dir: RunDir, record: Run) -> None:
    """Tokenize the rows of a run and fetch its base model, without a GPU.

    Raises:
        UserError: see `_require_cwd`.
        WorkFailed: Axolotl failed, or was interrupted.
    """
    _require_cwd(record)
    _drop_half_prepared(run_dir, record)
    code, stopped = _launch(
        [str(AXOLOTL), "preprocess", str(run_dir.config_file.resolve())], run_dir, record, run_dir.log
    )
    if stopped:
        raise WorkFailed(f"{run_dir.path}: interrupted")
    if code:
        raise _failed(run_dir, LaunchLog(run_dir.log), code)


def _axolotl_command(run_dir: RunDir, record: Run, checkpoint: Path | None, node: Node | None) -> list[str]:
    command = [str(AXOLOTL), "train", str(run_dir.config_file.resolve())]
    if checkpoint:
        command += ["--resume-from-checkpoint", str(checkpoint.resolve())]
    if record.ranks == 1:
        return [*command, "--launcher", "python"]
    torchrun = [f"--nproc-per-node={record.gpus_used}", f"--shutdown-timeout={LAST_SECONDS}"]
    if node is None:
        torchrun.append("--standalone")
    else:
        torchrun += [f"--nnodes={record.nodes}", f"--node-rank={node.rank}"]
        torchrun += [f"--master-addr={node.head}", f"--master-port={node.port}"]
    return [*command, "--launcher", "torchrun", "--", *torchrun]


def _environment(run_dir: RunDir, record: Run) -> dict[str, str]:
    """Environment of the training process; a rehearsal has no GPU and no network.

    Trackers write into the run folder, except trackio, which compares runs and therefore writes next to their folders.
    Axolotl has no config keys for the folders of trackers.
    """
    path = run_dir.path.absolute()
    trackers = {
        "TENSORBOARD_LOGGING_DIR": str(path / RunFile.TENSORBOARD),
        "TRACKIO_DIR": str(RunDir(path).runs(record.recipe) / "trackio"),
        "WANDB_DIR": str(path),
        "WANDB_DATA_DIR": str(path / RunFile.WANDB),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    added = {
        "AXOLOTL_DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{AXOLOTL.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # has torchrun
    }
    added[FORCED] = ",".join(record.forced)
    added[STOP_AT] = ",".join([FIRST_LOSS, os.environ.get(STOP_AT, "")])
    if record.rehearsal:
        added |= {
            STOP_AT: f"{MODEL},{SIGNALS}",  # the first loss of another model means little
            "HF_HUB_OFFLINE": "1",
            "http_proxy": _NO_SERVER,
            "https_proxy": _NO_SERVER,
            "no_proxy": "-",  # for no host
            "CUDA_VISIBLE_DEVICES": "",
            "TORCHDYNAMO_DISABLE": "1",  # bitsandbytes would import torch's compiler, which a CPU does not need
            # for few rows, importing torch in more processes takes longer than they save
            "AXOLOTL_DATASET_NUM_PROC": "0",
        }
        if record.ranks > 1:
            threads = max((os.cpu_count() or 1) // record.gpus_used, 1)
            added |= {CPU_RANKS: "1", "OMP_NUM_THREADS": str(threads)}
    elif record.ranks == 1:  # transformers would use all visible GPUs
        added["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    if run_dir.config.get("full_determinism"):
        added["PYTHONHASHSEED"] = "0"  # for code that iterates over sets of texts
    return trackers | os.environ | added


def _drop_half_prepared(run_dir: RunDir, record: Run) -> None:
    """Remove half-written prepared rows; Axolotl would treat them as complete.

    The config may name another user's folder, so only rows in the cache or the run folder are removed. The datasets
    library writes dataset_info.json last. Axolotl holds a lock while writing (axolotl/utils/data/lock.py).
    """
    prepared = Path(record.cwd, run_dir.prepared).resolve()
    if not (prepared.is_dir() and any(map(prepared.is_relative_to, (paths.cache().resolve(), run_dir.path.resolve())))):
        return
    with suppress(Timeout), FileLock(prepared / "datasets_prep.lock", timeout=0):
        for part in {shard.parent for shard in prepared.glob("*/data-*.arrow")}:
            if not ((part / "dataset_info.json").is_file() or part.is_symlink()):
                shutil.rmtree(part)


class LaunchLog:
    """Log of one launch: what torch and torchrun report in it, in their wording.

    Args:
        file: file of the log.
        since: offset in bytes at which the launch begins.
    """

    def __init__(self, file: Path, since: int = 0):
        self.file = file
        self.since = since

    @cached_property
    def _text(self) -> str:
        with reading(self.file) as stream:
            stream.seek(max(self.since, _size(self.file) - _MOST_BYTES))
            return stream.read(_MOST_BYTES).decode(errors="replace")

    @cached_property
    def tail(self) -> list[str]:
        """Last lines before torchrun's report."""
        torchrun = re.compile("^.*torch/distributed/elastic/multiprocessing/api.py", re.MULTILINE)
        return torchrun.split(self._text, maxsplit=1)[0].splitlines()[-15:]

    @property
    def out_of_gpu_memory(self) -> bool:
        """True if torch or CUDA ran out of GPU memory."""
        return "CUDA out of memory" in self._text or "CUDA error: out of memory" in self._text

    @property
    def lost_rank(self) -> bool:
        """True if torchrun lost a rank to SIGKILL."""
        return re.search(r"exitcode\s*: -9\b", self._text) is not None


def _full_disk(run_dir: RunDir, log: LaunchLog) -> str | None:
    """File or folder without space that ended a launch, or None."""
    full = where_full("\n".join(log.tail), [run_dir.path, paths.cache(), Path(tempfile.gettempdir())])
    return str(full) if full else None


def _failed(run_dir: RunDir, log: LaunchLog, code: int) -> WorkFailed:
    """Error for a failed launch, with the last lines of its log."""
    if log.out_of_gpu_memory:
        changes = f"`recipe plan {run_dir.quoted}/{RunFile.CONFIG}` shows what needs memory, and which changes help"
        problem = f"out of GPU memory: {changes}; `nvidia-smi` lists other processes on the GPU"
    elif log.lost_rank:
        problem = f"a rank was killed by signal 9 (SIGKILL); memory probably ran out: {_LESS_MEMORY}"
    else:
        problem = f"Axolotl failed{_signal(code)}"
    return WorkFailed("\n".join([*log.tail, f"{run_dir.path}: {problem}; the full log is {log.file}"]))


def _launch(command: list[str], run_dir: RunDir, record: Run, log: Path, *locks: int) -> tuple[int, bool]:
    """Run an Axolotl process; return its exit code, and whether a stop was requested.

    Args:
        locks: file descriptors that the process inherits.

    Raises:
        WorkFailed: the run folder was deleted.
    """
    with stop_requests() as stops, opened(log, "ab") as stream:

        def report_trouble(record: Row) -> None:
            for finding in record.get("findings", ()):
                warn_once(f"  {Finding('warning', **finding).text}")

        progress = TrainingProgress(run_dir.metrics, report_trouble)  # created before the process writes metrics
        child = start_child(
            command,
            cwd=record.cwd,
            env=_environment(run_dir, record),
            stdout=stream,
            stderr=subprocess.STDOUT,
            pass_fds=locks,
        )
        with progress:
            _wait(child, stops, progress)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # data loader workers outlive a killed parent by seconds
    if not log.exists():
        raise WorkFailed(f"{run_dir.path}: deleted while Axolotl was writing to it; `recipe run` starts a new run")
    return child.returncode, bool(stops)


def _wait(child: "subprocess.Popen[bytes]", stops: list[int], progress: TrainingProgress) -> None:
    """Show the child's progress; forward a first stop request, kill on the next one."""
    is_stopping = False
    while child.poll() is None:
        time.sleep(0.1)
        progress.read()
        if stops and not is_stopping:
            is_stopping = True
            say("stopping after this step, with a checkpoint; a second request stops at once")
            for process in _training(child):  # their data loaders stay alive, because the current step needs them
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
        if len(stops) > 1:
            with suppress(psutil.NoSuchProcess):
                for process in [*psutil.Process(child.pid).children(recursive=True), child]:
                    process.kill()
    progress.read()


def _training(child: "subprocess.Popen[bytes]") -> "list[psutil.Process]":
    """Training processes: the ranks started by a launcher, or else the child itself."""
    with suppress(psutil.Error):
        process = psutil.Process(child.pid)
        return [rank for rank in process.children() if "LOCAL_RANK" in rank.environ()] or [process]
    return []
