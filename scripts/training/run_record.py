"""Schemas of run.json (with provenance), jobs.json, and the lines of metrics.jsonl."""

import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Required, Self, TypedDict

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, with_config

from ..base import paths
from ..base.files import sha256
from ..base.hardware import GpuInfo, cpu_name, torch_cuda, visible_gpus
from ..base.processes import now, package_version
from ..config.datafiles import DataFile
from ..config.merging import Difference, Override, chained
from ..config.origin import Base
from ..data.declaration import Count, Sha256
from ..metrics.metric import EvalLosses, Rewards
from .trackers import TrackedRun

VERSION = 1
"""Version of run.json; increase it when a field is renamed, removed or has another meaning."""

Ended = Literal["complete", "early stopping", "signal", "callback", "no batch", "finding"]
"""Reason for the end of training.
`callback`: an Axolotl callback, such as the loss watchdog; `no batch`: the rows do not fill a batch; `finding`: see
`STOP_AT`."""


@with_config(extra="forbid", strict=True)
class EvalTokens(TypedDict):
    """Tokens behind an eval loss, or pairs behind rewards: their number and hash, see `losses.scored_tokens`."""

    count: Count
    sha256: Sha256


STOP_AT = "QLORA_RECIPES_STOP_AT"
"""Environment variable with the rules, separated by commas, whose findings stop a training."""
FORCED = "QLORA_RECIPES_FORCED"
"""Environment variable with the names of findings, separated by commas, at which a training continues."""


@with_config(extra="forbid", strict=True)
class TrainingFinding(TypedDict):
    """Finding of a training about itself; for the fields, see `finding.Finding`."""

    rule: str
    key: str
    problem: str
    remedy: str


@with_config(extra="forbid", strict=True)
class Piece(TypedDict):
    """Part of a row's text whose tokens are all trained on, or all not."""

    text: str
    learnt: bool


@with_config(strict=True, extra="allow")
class MetricsRecord(TypedDict, total=False):
    """Fields that this project reads from a line of metrics.jsonl, see `run_plugin.RunCallback`."""

    step: Required[int]
    max_steps: int | None
    epoch: float | None
    loss: float | None
    eval_loss: float | None
    eval_loss_per_token: float | None
    eval_tokens: EvalTokens
    eval_pairs: EvalTokens
    eval_reward_accuracy: float | None
    eval_reward_margin: float | None
    grad_norm: float | None
    learning_rate: float | None
    step_seconds: float | None
    tokens: int | None
    tokens_per_second: float | None
    memory_reserved_gib: float
    rss_peak_gib: float
    peak_gib_by_rank: list[float] | None
    training_rows: int
    first_row: list[Piece]
    trainable_parameters: int
    findings: list[TrainingFinding]
    tracked: list[TrackedRun]
    ended: Ended
    kept_step: int


METRICS_RECORD = TypeAdapter(MetricsRecord)


class Git(TypedDict):
    """Git state of the checkout with a run's recipe."""

    revision: str
    dirty: bool


@with_config(extra="allow")
class Provenance(TypedDict, total=False):
    """Provenance from `collect`."""

    git: Git | None
    lock_sha256: str | None
    packages: dict[str, str | None]
    cuda: str | None
    python: str
    host: str
    os: str
    cpu: str
    gpus: list[GpuInfo]


class FileState(BaseModel):
    """Hash of a file's content, with size and time for quick comparisons."""

    sha256: str
    bytes: int
    mtime: float

    @classmethod
    def of(cls, file: Path, digest: str | None = None) -> Self:
        """State of a file; a known hash saves reading the file."""
        status = file.stat()
        return cls(sha256=digest or sha256(file), bytes=status.st_size, mtime=status.st_mtime)

    def differs(self, file: Path) -> bool:
        """True if a file exists with different content; reads it only if size or time differ."""
        if not file.is_file():
            return False
        status = file.stat()
        # copying can lose fractions of a second
        if status.st_size == self.bytes and abs(status.st_mtime - self.mtime) < 1:
            return False
        return sha256(file) != self.sha256


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"{text}: a time without a time zone")
    return text


Moment = Annotated[str, AfterValidator(_moment)]
"""Time in a record, in the format of `now`."""

State = Literal["created", "queued", "running", "finished", "failed", "interrupted"]


Text = Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=4096)]
"""Name or path; a NUL or more characters would make Linux refuse it."""


class Job(BaseModel):
    """A job that carries out a command of a run."""

    backend: Text
    id: Text
    step: Text
    script: Text  # tells jobs with the same id apart: clusters reuse ids, and several clusters can share a disk
    words: list[Text] = []  # arguments of `recipe`
    hmac: Text | None = None  # see `RunDir.submitted`


@dataclass(frozen=True)
class JobState:
    """State of a job in a queue.

    Attributes:
        kind: `unknown` if the queue was not asked, or does not answer.
        reason: the queue's reason for waiting, if informative; why the state is unknown.
        job: the job's id.
        backend: name of the backend that has the queue.
    """

    kind: Literal["queued", "running", "unknown"]
    reason: str = ""
    job: str = ""
    backend: str = ""

    def __str__(self) -> str:
        if self.kind == "unknown":
            return self.reason
        return f"{self.kind}{f': {self.reason}' if self.reason else ''} (job {self.job})"


class Launch(BaseModel):
    """One start of the training process, first or resumed."""

    command: list[str]
    started: Moment
    ended: Moment | None = None
    exit_code: int | None = None
    resumed_from: str | None = None
    out_of_memory: bool = False  # whether the launch ended for lack of GPU or main memory
    full_disk: Text | None = None  # file or folder without space, if the launch ended for lack of disk space
    error: str | None = None  # why it did not finish, and what to do: the last lines of the message

    @property
    def seconds(self) -> float | None:
        """Time until its end; None if it has not ended, or was killed."""
        if self.ended is None:
            return None
        return (datetime.fromisoformat(self.ended) - datetime.fromisoformat(self.started)).total_seconds()

    @property
    def lacked_space(self) -> bool:
        """True if the launch ended for lack of memory or disk space."""
        return self.out_of_memory or self.full_disk is not None


GPU_MEMORY = "GPU, reserved"
"""Value of `Summary.memory_kind` for memory that was measured on a GPU."""


class Summary(BaseModel):
    """Summary of the training so far, in seconds and GiB; NaN becomes null.

    Attributes:
        eval_loss, eval_loss_first: Axolotl's eval loss, the mean of batch means.
        eval_loss_per_token, eval_loss_per_token_first: see the module `losses`.
        eval_tokens: tokens behind `eval_loss_per_token`; None without this loss.
        eval_reward_accuracy, eval_reward_margin: share of held-out pairs, and mean, see the module `rewards`.
        eval_pairs: pairs behind them; None without pairs.
        kept_step: step of the best checkpoint, if the trainer loaded its weights at the end; `eval_loss` and
            `eval_loss_per_token` then belong to this step.
        training_rows: number of rows after Axolotl held rows out and dropped long ones; None for streamed rows.
        trainable_parameters: PEFT's count; None without an adapter.
        findings: of the last launch, about the model and the training.
        tracked: the trackers' runs of the last launch.
    """

    step: int = 0
    max_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    eval_loss_first: float | None = None
    eval_loss: float | None = None
    eval_loss_per_token_first: float | None = None
    eval_loss_per_token: float | None = None
    eval_tokens: EvalTokens | None = None
    eval_reward_accuracy: float | None = None
    eval_reward_margin: float | None = None
    eval_pairs: EvalTokens | None = None
    kept_step: int | None = None
    train_seconds: float = 0.0
    tokens_per_second: float | None = None
    peak_memory: float | None = None
    memory_kind: str | None = None
    training_rows: int | None = None
    trainable_parameters: int | None = None
    findings: list[TrainingFinding] = []
    tracked: list[TrackedRun] = []
    trouble: str | None = None  # a training's findings, or a machine that refused to start the run
    ended: Ended | None = None  # None also after a kill

    @property
    def eval_losses(self) -> EvalLosses:
        """Eval losses for metrics."""
        pairs = self.eval_pairs["count"] if self.eval_pairs else 0
        rewards = Rewards(self.eval_reward_accuracy, self.eval_reward_margin, pairs)
        return EvalLosses(tokens=self.eval_loss_per_token, trainer=self.eval_loss, rewards=rewards)


class RecordVersion(BaseModel):
    """Version of a run.json; its other fields may be another version's."""

    version: int


class Run(RecordVersion):
    """Content of run.json."""

    version: int = VERSION
    state: State = "created"
    recipe: Text
    variant_of: Text | None = None  # the built-in recipe that the recipe file changes
    recipe_file: Text
    recipe_sha256: str
    digest: str | None = None  # hash of the data, and of the config without the keys that a run adds
    rehearsal: bool = False
    profiles: list[str] = []
    overrides: list[Override] = []
    forced: list[str] = []  # names of overridden findings
    hmac: str | None = None  # see `RunDir.hashed` in run/
    gpus_used: int = 1  # GPUs per node
    nodes: int = 1
    base: Base | None = None  # whose merged model was the base model
    differences: list[Difference] = []  # between the run's config and the recipe file
    of_variant: list[Difference] = []  # between the recipe file and the built-in recipe
    data: list[DataFile] = []
    named_files: list[DataFile] = []  # other files that the config names
    test_data: Text | None = None
    hub_commits: dict[str, str] = {}  # of base model and data sets on the hub, by key, after the last launch
    cwd: Text
    created: Moment = Field(default_factory=now)
    launches: list[Launch] = []
    adapter: FileState | None = None  # state after the last launch
    published_adapter: str | None = None  # name of an adapter that was not trained here
    summary: Summary = Summary()  # at the end of the last launch; `RunDir.summary` is current
    provenance: Provenance = Provenance()

    @property
    def changed_data(self) -> Path | None:
        """A file that the config names, and that is missing or has changed since training."""
        for file in [*self.data, *self.named_files]:
            path = Path(self.cwd, file.path)
            if not path.is_file() or sha256(path) != file.sha256:
                return path
        return None

    @property
    def present_recipe(self) -> Path:
        """File of the recipe as it is now; it may be missing."""
        built_in = paths.recipe_file(self.recipe)
        if built_in.is_file():
            return built_in
        return Path(self.cwd, self.recipe_file)

    @property
    def recipe_note(self) -> str | None:
        """Note on a recipe file that is missing or has changed since the run began; None if it is unchanged."""
        file = self.present_recipe
        if file.is_file() and sha256(file) == self.recipe_sha256:
            return None
        return f"{self.recipe_file} is missing or has changed since the run began; the run keeps its own config"

    @property
    def origin(self) -> str:
        """Built-in recipe that the run uses, or that its variant changes; determines the study."""
        return self.variant_of or self.recipe

    @property
    def from_origin(self) -> list[Difference]:
        """Differences from the built-in recipe."""
        return chained(self.of_variant, self.differences)

    @property
    def ranks(self) -> int:
        """Number of training processes, one per GPU."""
        return self.gpus_used * self.nodes


PACKAGES = [
    "qlora-recipes",
    "axolotl",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "datasets",
    "tokenizers",
]


def collect() -> Provenance:
    """Provenance for run.json: git state, lock file, versions and machine."""
    lock_sha256 = sha256(paths.LOCK) if paths.LOCK.is_file() else None
    packages = {name: package_version(name) for name in PACKAGES}
    return {
        "git": _git(),
        "lock_sha256": lock_sha256,
        "packages": packages,
        "cuda": torch_cuda(),
        "python": platform.python_version(),
        "host": platform.node(),
        "os": platform.platform(),
        "cpu": cpu_name(),
        "gpus": [*visible_gpus().values()],
    }


def _git() -> Git | None:
    """Git state of the recipes' checkout; None if there is no checkout, or git fails."""
    if not paths.LOCK.is_file():
        return None  # installed from a wheel; a repository around it is a different project
    # --no-optional-locks keeps the index unchanged
    command = ["git", "--no-optional-locks", "-C", str(paths.RECIPES), "status", "--porcelain=v2", "--branch", "-uno"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    head, *lines = done.stdout.splitlines()
    changes = [line for line in lines if not line.startswith("#")]
    return {"revision": head.removeprefix("# branch.oid "), "dirty": bool(changes)}
