"""Backend for jobs of the Hugging Face hub, which rents machines by the minute: `--on hf`.

Each run has a folder in the user's private bucket: the wheel and the lock of this checkout, the files that the run's
record names, and the run folder. The job works on its own disk, at the paths of this machine, and copies the run folder
into the bucket: each complete checkpoint within a minute, and everything at its end, see templates/hf.sh.j2. Nothing
depends on a signal at the time limit, because the hub documents none.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import BaseModel, Field, ValidationError

from ...base import paths
from ...base.errors import UserError, one_line
from ...base.files import write_atomically
from ...base.run_files import RunFile
from ...base.secrets import is_secret, masked
from ...base.terminal import say, say_once
from ...config.gpus import Gpu, catalogue, named
from ...training.run_record import Job, JobState, Run
from ..rundir import JOB, RunDir
from . import BACKENDS, Backend, Command, Task, claimed

if TYPE_CHECKING:
    from huggingface_hub import HfApi, JobHardwareInfo

    from ...config.compose import Request

NAME = "hf"
BUCKET = "qlora-recipes"
MOUNT = "/qlora-recipes"
EVERY = 60  # seconds after which new checkpoints are copied into the bucket
IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
_STAYS = [RunFile.JOBS.value, "*.lock"]  # files of a run folder that only this machine reads
_CHANGES = ["output/*", "*.part.jsonl"]  # brought when the job has ended
_HOURS = {"minute": 1 / 60, "hour": 1.0}
_REMEDIES = {
    401: "log in with `hf auth login`, or set HF_TOKEN",
    402: "add credits at https://huggingface.co/settings/billing",
    403: "give a token that may run jobs and write to buckets",
}
_BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
_Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]


class Options(BaseModel, extra="forbid"):
    """Options after `--on hf`.

    Attributes:
        flavor: the hub's name of a machine; by default the cheapest whose GPU fits the plan.
        hours: time limit of the job; by default from the plan.
        namespace: user or organization that pays; by default the token's user.
        image: image of the job, with uv, Python and gcc.
        ask: whether to ask before a job is submitted.
    """

    flavor: _Name | None = None
    hours: float | None = Field(None, gt=0, allow_inf_nan=False)
    namespace: _Name | None = None
    image: str = IMAGE
    ask: Literal["yes", "no"] = "yes"


@BACKENDS.register(NAME)
class Hf(Backend):
    """A machine of the Hugging Face hub.

    Args:
        rehearsal: whether the run is a rehearsal, which needs no GPU.
        jobs: without effect.
        options: fields of `Options`, as KEY=VALUE.
        submits: without effect.

    Raises:
        UserError: an option is wrong, or the hub does not answer.
    """

    def __init__(self, rehearsal: bool, jobs: int | None, options: Sequence[str], submits: bool):
        self.options = _options(options)
        self._rehearsal = rehearsal
        self._flavors = _flavors(self.options.flavor)
        self._is_chosen = self.options.flavor is not None
        self._hours = 0.0 if rehearsal else None

    @property
    def flavor(self) -> "JobHardwareInfo":
        """The user's flavor, or the cheapest one that fits all requests so far."""
        return self._flavors[0]

    def gpu(self, request: "Request") -> Gpu | None:
        """GPU of the flavor; the request's planned hours determine the time limit.

        Raises:
            UserError: no flavor fits the request.
        """
        from ...plan.plan import plan_request

        if self._rehearsal:
            return None
        if not self.options.flavor:
            self._leave_out_too_small(request)
        gpu = _gpu_of(self.flavor)
        if gpu and not self.options.hours:
            with suppress(UserError):  # the command reports it when it checks the config
                work = plan_request(request, gpu, suggests=False).work
                if work and work.hours:
                    self._hours = max(self._hours or 0, work.hours)
        return gpu

    def _leave_out_too_small(self, request: "Request") -> None:
        """Leave out the flavors that are cheaper than the first that fits a request."""
        from ...plan.plan import plan_request

        for i, flavor in enumerate(self._flavors):
            if _gpus(flavor) < request.gpus:
                continue
            gpu = _gpu_of(flavor)
            if gpu and plan_request(request, gpu, suggests=False).gpus[0].fits:
                self._flavors = self._flavors[i:]
                self._is_chosen = True
                return
        problem = f"{request.name} fits no flavor of the hub"
        raise UserError(problem, key="--on hf", remedy="`recipe plan NAME` lists changes that help")

    def check_size(self, gpus: int, nodes: int) -> None:
        """Refuse several nodes; `submit` also refuses too many GPUs."""
        if nodes > 1:
            raise UserError(f"--nodes {nodes}: a job of the hub has one machine; leave --nodes out")

    def preview(self, task: Task) -> str:
        """Script of the job that would train a run; its price goes to stderr."""
        self._say_price(self._limit(), 1)
        return _script(task.claim(), [Path.cwd()])

    def submit(self, tasks: Sequence[Task], title: str) -> list[RunDir]:
        """Submit each task as a job, after the user has agreed to the price of all.

        The first job that the hub refuses is the last one that is submitted.

        Raises:
            UserError: the user disagrees, or a run does not suit the flavor.
        """
        unfinished = [task for task in tasks if task.steps]
        if not unfinished:
            claimed(tasks)  # records that they are finished
            return []
        hours = self._limit()
        self._require_gpus(max(task.gpus for task in unfinished))
        self._say_price(hours, len(unfinished))
        self._require_consent()
        folders = []
        for task in tasks:
            for commands in claimed([task]):
                try:
                    folders.append(self._submit(commands, hours))
                except UserError as error:
                    task.result.fail(commands[0].step, str(error))
                    return folders
        return folders

    def can_wait_for(self, job: JobState | None) -> bool:
        """False: jobs of the hub do not wait for each other."""
        return False

    @classmethod
    def state(cls, folder: RunDir, job: Job) -> JobState | None:
        """State of a job; the files of all the run's jobs are brought into its folder, at most once a minute."""
        minute = int(time.monotonic() / 60)
        jobs = {one.id: one for one in folder.jobs() if one.backend == NAME}
        return {id_: _state(folder.path, one.script, one.user, id_, minute) for id_, one in jobs.items()}[job.id]

    @classmethod
    def cancel(cls, folder: RunDir, job: Job) -> list[str]:
        """Stop a job; the bucket has its last complete checkpoint."""
        state = cls.state(folder, job)
        if state is None or not state.job:
            return []
        with _asking() as hub:
            hub.cancel_job(job_id=job.id, namespace=job.user)
        _state.cache_clear()
        return [f"job {job.id} is cancelled"]

    def _require_gpus(self, needed: int) -> None:
        """Refuse a flavor with too few GPUs, or one that neither the user nor a plan chose."""
        if needed and not self._is_chosen:
            remedy = "name one, as in --on hf,flavor=l4x1,hours=3"
            raise UserError("no plan chooses a flavor for this command", key="--on hf", remedy=remedy)
        available = _gpus(self.flavor)
        if needed > available:
            problem = f"flavor {self.flavor.name} has {available} GPUs, and the run needs {needed}"
            raise UserError(problem, key="--on hf", remedy="choose another flavor")

    def _limit(self) -> float:
        """Time limit in hours: twice the planned time, and an hour to install packages and fetch the model."""
        if self.options.hours:
            return self.options.hours
        if self._hours is None:
            remedy = "add a time limit, as in --on hf,flavor=l4x1,hours=3"
            raise UserError(f"no plan says how long the job takes on {self.flavor.name}", key="--on hf", remedy=remedy)
        return math.ceil(2 * self._hours) + 1

    def _say_price(self, hours: float, jobs: int) -> None:
        price = _price(self.flavor)
        planned = f"about {math.ceil(self._hours * 60)} minutes of training by plan; " if self._hours else ""
        limit = f"at most {hours:g} hours, ${price * hours:.2f}"
        if jobs > 1:
            limit = f"{jobs} jobs, each {limit}; at most ${jobs * price * hours:.2f} in total"
        say(f"{self.flavor.name}: ${price:.2f} an hour; {planned}{limit}")

    def _require_consent(self) -> None:
        if self.options.ask == "no" or (sys.stdin.isatty() and typer.confirm("Submit?", err=True)):
            return
        remedy = "agree, or add ask=no, as in --on hf,flavor=l4x1,ask=no"
        raise UserError("a job costs money and was not agreed to; nothing was started", key="--on hf", remedy=remedy)

    def _submit(self, commands: Sequence[Command], hours: float) -> RunDir:
        """Submit a run's commands as one job."""
        folder = commands[0].folder
        if any(job.backend == NAME and self.state(folder, job) for job in folder.jobs()):
            raise UserError(f"{folder.path}: another job of the run has not ended", remedy="wait, or cancel the run")
        options = f"hf,flavor={self.flavor.name},hours={hours:g}"
        try:
            with _asking() as hub:
                user = self.options.namespace or hub.whoami()["name"]
                bucket = f"{user}/{BUCKET}"
                address = f"hf://buckets/{bucket}/{_key(folder)}"
                self._upload(hub, bucket, address, commands)
                name = re.sub(r"[^\w-]", "-", commands[0].result.recipe)
                job = hub.run_job(
                    image=self.options.image,
                    command=["bash", f"{MOUNT}/input/job.sh"],
                    secrets=_secrets(folder),
                    flavor=self.flavor.name,
                    timeout=int(hours * 3600),
                    name=name,
                    volumes=[_volume(bucket, folder)],
                    namespace=user,
                )
        except UserError as error:
            remedy = f"then `recipe resume {folder.quoted} --on {options}` submits it"
            raise UserError(f"{folder.path}: {error}; {remedy}") from None
        say(f"job {job.id}: {job.url}")
        for command in commands:
            words = command.words
            folder.add_job(Job(backend=NAME, id=job.id, step=command.step, user=user, script=address, words=words))
            command.result.steps[command.step] = f"queued (job {job.id})"
        _state.cache_clear()
        return folder

    def _upload(self, hub: "HfApi", bucket: str, address: str, commands: Sequence[Command]) -> None:
        """Copy the code, the lock, a run's files and its folder into the bucket."""
        folder = commands[0].folder
        record = folder.read()
        hub.create_bucket(bucket, private=True, exist_ok=True)
        if not hub.bucket_info(bucket).private:
            raise UserError(f"bucket {bucket} is public", key="--on hf", remedy="make it private on the hub first")
        with tempfile.TemporaryDirectory() as name:
            inputs = Path(name)
            _build_wheel(inputs)
            shutil.copy(paths.LOCK, inputs)
            for file in _files(record):
                copy = inputs / "files" / file.relative_to("/")
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)
            write_atomically(inputs / "job.sh", _script(commands, [Path.cwd(), Path(record.cwd)]))
            hub.sync_bucket(name, f"{address}/input", delete=True, quiet=True)
            hub.sync_bucket(str(folder.path), f"{address}/run", exclude=_STAYS, quiet=True)


def _options(texts: Sequence[str]) -> Options:
    content = {}
    for text in texts:
        key, _, value = text.partition("=")
        if is_secret(key, value):
            raise UserError("a secret; log in with `hf auth login` instead", key=f"--on hf,{key}=***")
        content[key] = value
    try:
        return Options.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{name}: {first['msg']}", key="--on hf", remedy="give options as in --on hf,flavor=l4x1,hours=3"
        ) from None


@contextmanager
def _asking() -> Iterator["HfApi"]:
    """Turn an error of the hub, the network or the token into a UserError."""
    from huggingface_hub import HfApi

    try:
        yield HfApi()
    except UserError:
        raise
    except Exception as error:  # from the hub, the network or the token
        code = getattr(getattr(error, "response", None), "status_code", 0)
        raise UserError(one_line(error), key="--on hf", remedy=_REMEDIES.get(code, "")) from None


def _flavors(name: str | None) -> "list[JobHardwareInfo]":
    """The hub's flavors, the cheapest first, or only the one with a name."""
    with _asking() as hub:
        flavors = sorted(hub.list_jobs_hardware(), key=_price)
    if name is None:
        return flavors
    with_name = [flavor for flavor in flavors if flavor.name == name]
    if not with_name:
        names = ", ".join(flavor.name for flavor in flavors)
        raise UserError(f"the hub has no flavor {name}", key="--on hf", remedy=f"choose {names}")
    return with_name


def _price(flavor: "JobHardwareInfo") -> float:
    """Dollars an hour."""
    return flavor.unit_cost_usd / _HOURS[flavor.unit_label]


def _gpus(flavor: "JobHardwareInfo") -> int:
    return int(flavor.accelerator.quantity) if flavor.accelerator else 0


def _gpu_of(flavor: "JobHardwareInfo") -> Gpu | None:
    """GPU of a flavor; None if it has none, or one that gpus.yaml lacks. The hub states the memory of all its GPUs."""
    accelerator = flavor.accelerator
    if accelerator is None:
        return None
    memory = int(re.sub(r"\D", "", accelerator.vram)) / int(accelerator.quantity)
    for gpu in catalogue().values():
        if gpu.memory == memory and gpu.name.split()[0] == accelerator.model:
            return gpu
    return named(accelerator.model)


def _key(folder: RunDir) -> str:
    """Folder of a run in the bucket."""
    return f"{folder.path.parent.name}/{folder.path.name}"


def _volume(bucket: str, folder: RunDir) -> Any:
    from huggingface_hub import Volume

    return Volume(type="bucket", source=bucket, mount_path=MOUNT, path=_key(folder), read_only=False)


def _secrets(folder: RunDir) -> dict[str, str]:
    """Secrets that a job needs: the hub's token for gated models, and a tracker's key."""
    from huggingface_hub import get_token

    secrets = {"HF_TOKEN": get_token() or ""}
    if folder.config.get("wandb_project") and "WANDB_API_KEY" in os.environ:
        secrets["WANDB_API_KEY"] = os.environ["WANDB_API_KEY"]
    return secrets


def _files(record: Run) -> set[Path]:
    """Files that a run's record names, and that are on this machine."""
    names = [file.path for file in (*record.data, *record.named_files)]
    names += filter(None, [record.recipe_file, record.test_data])
    return {path for name in names if (path := Path(record.cwd, name)).is_file()}


def _script(commands: Sequence[Command], folders: Sequence[Path]) -> str:
    """Script of a job.

    Args:
        commands: the commands, carried out in this order.
        folders: folders that must exist; the first is the working folder.
    """
    jinja = paths.template_environment(paths.TEMPLATES)
    jinja.filters["quote"] = lambda value: shlex.quote(str(value))
    run = commands[0].folder.path.absolute()
    return jinja.get_template("hf.sh.j2").render(
        commands=commands, folders=folders, run=run, job=f"{JOB}={NAME}:", seconds=EVERY
    )


def _build_wheel(folder: Path) -> None:
    """Build this checkout's wheel in a folder.

    Raises:
        UserError: the command is not installed from a checkout, or setuptools fails.
    """
    if not paths.LOCK.is_file():
        raise UserError("the job gets the code of a checkout", key="--on hf", remedy="run `make setup` in a clone")
    with tempfile.TemporaryDirectory() as source:
        for name in ("scripts", "recipes", "templates"):
            shutil.copytree(paths.LOCK.parent / name, Path(source, name), ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(paths.LOCK.parent / name, source)
        command = [sys.executable, "-c", _BUILD, str(folder)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the wheel was not built: {done.stderr.strip()[-300:]}", key="--on hf")


@lru_cache(maxsize=256)
def _state(folder: Path, address: str, user: str, job: str, minute: int) -> JobState | None:
    """State of a job, after its files were brought; see `Hf.state`."""
    log = folder / RunFile.HUB_JOB_LOG.format(job)  # written after all other files have arrived
    if log.exists():
        return None
    try:
        with _asking() as hub:
            info = hub.inspect_job(job_id=job, namespace=user)
            status = info.status
            if status.stage == "SCHEDULING":
                return JobState("queued", status.message or "", job, NAME)
            runs = status.stage == "RUNNING"
            left_out = [*_STAYS, *_CHANGES] if runs else _STAYS
            hub.sync_bucket(f"{address}/run", str(folder), exclude=left_out, quiet=True)
            if runs:
                return JobState("running", "", job, NAME)
            write_atomically(log, masked("\n".join(hub.fetch_job_logs(job_id=job, namespace=user))) + "\n")
    except UserError as error:
        say_once(str(error))
        return JobState("unknown")
    if status.stage != "COMPLETED":
        say(f"{folder}: job {job} ended as {status.stage}: {status.message or 'no reason given'}; see {log}")
        say(f"`recipe resume {RunDir(folder).quoted} --on hf,flavor={info.flavor},hours=N` continues a training")
    return None
