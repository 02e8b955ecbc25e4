"""A record of the ledger: what one run of a study's recipe reached, on which machine, and how it was made.

It has no field for a folder, a host or a user. Whether it agrees with its study is for the module `ledger` to say.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..base import paths, yamlfiles
from .study import Decoding

MOST_POINTS = 50
NOT_SHOWN = "…"
"""In the place of a changed setting's value that may be private."""
_ROUNDED = 1.02  # how much more than its memory, as the driver reports it, a card may seem to hold

Sha = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Plain = Annotated[str, Field(pattern=r"^([\w+-][\w.+-]{0,59}|…)$")]
Value = bool | int | float | Plain | None | list[bool | int | float | Plain]
Name = Annotated[str, Field(pattern=r"^[\w.+-]{1,80}$")]
Hardware = Annotated[str, Field(pattern=r"^[\w ()@.,+/-]{1,100}$")]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Machine(_Strict):
    """What a run was trained on: how many GPUs, on how many nodes, and one of them; none of a rehearsal.

    Attributes:
        gpu_memory_gib: of one GPU, as its driver reports it.
        memory_gib: main memory; None where the run did not record it.
    """

    gpus: int = Field(ge=0)
    nodes: int = Field(ge=1)
    gpu: Hardware | None = None
    gpu_memory_gib: Positive | None = None
    compute_capability: str | None = Field(default=None, pattern=r"^\d{1,2}\.\d$")
    driver: str | None = Field(default=None, pattern=r"^[\d.]{1,20}$")
    cpu: Hardware
    cores: int | None = Field(ge=1)
    memory_gib: Positive | None = None

    def __str__(self) -> str:
        if not self.gpu:
            return self.cpu
        name = re.sub("^(NVIDIA )?(GeForce )?", "", self.gpu)
        return f"{self.gpus} x {name}" if self.gpus > 1 else name


class DataSet(_Strict):
    """A file that the run was trained on; its name is one of the study's."""

    name: Name
    sha256: Sha
    rows: int | None = Field(default=None, ge=0)


class Training(_Strict):
    """What a training took, and how its losses went: of the whole run, but `curve`, points of a step and the mean loss
    since the point before.

    Attributes:
        seconds: of the steps, without evaluation and saving.
        tokens_per_second: padding not counted, of all GPUs together.
        peak_gib, planned_gib: of one GPU; of a rehearsal the process's, for which there is no plan.
        eval_loss_first, eval_loss: in nats a token, before the first step and at the end.
    """

    steps: int = Field(ge=1)
    epochs: Positive | None
    seconds: Positive
    tokens_per_second: Positive | None
    peak_gib: Positive | None
    memory_kind: Literal["GPU, reserved", "resident"] | None
    planned_gib: Positive | None = None
    trainable_parameters: int | None = Field(default=None, ge=1)
    parameters: int | None = Field(default=None, ge=1)
    eval_loss_first: Amount | None
    eval_loss: Amount | None
    curve: list[tuple[int, Amount]] = Field(max_length=MOST_POINTS)


class Judge(_Strict):
    """The model that judged a score."""

    model: str = Field(pattern=r"^[\w.-]{1,80}(/[\w.-]{1,80})?$")
    layer: int | None
    revision: str | None = Field(pattern="^([0-9a-f]{40}|[0-9a-f]{64})$")
    stand_in: bool


class Score(_Strict):
    """A score, its 95 % interval over rows where it has one, and the metric as study.yaml declares it."""

    value: float
    interval: tuple[float, float] | None = None
    metric: dict[str, Any]
    judge: Judge | None = None


class Evaluation(_Strict):
    """How predictions were made and scored; see scripts/scores/evaluations.py for the names."""

    test_set: Name | None
    rows: int = Field(ge=1)
    data_sha256: Sha
    decoding: Decoding
    batch_size: int | None = Field(ge=1)
    batch_tokens: int | None = Field(default=None, ge=1)
    engine: Literal["transformers", "vllm", "server"] = "transformers"
    quantized: bool
    dtype: Name
    version: int = Field(ge=1)
    code_sha256: Sha
    adapter_sha256: Sha
    scores: dict[Name, Score]


class Record(_Strict):
    """What one run of a study's recipe reached.

    Attributes:
        made: the day of its evaluation, in UTC.
        recipe_sha256, settings_sha256: of the recipe's file, and of its settings alone, when the record was made.
        config_sha256: of the config that ran and of its data, as in run.json.
        changed: the settings of the run that are not the recipe's, with its values; None for one that it lacks, and
            `NOT_SHOWN` for a value that may be private. The seed, trackers and folders are not among them.
        revision: the project's commit, with a + where files had been changed; None outside of a checkout.
        lock_sha256: of requirements.lock.
        profiles: the shipped ones that were laid over the recipe.
        mirror: whether it was trained on an ungated copy of the base model.
    """

    version: Literal[1] = 1
    made: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    rehearsal: bool
    study: Name
    recipe: str = Field(pattern=r"^[\w./-]{1,120}$")
    recipe_sha256: Sha
    settings_sha256: Sha
    config_sha256: Sha
    changed: dict[Annotated[str, Field(pattern=r"^\w[\w.-]{0,99}$")], Value]
    seed: int
    profiles: list[Name]
    mirror: bool
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}\+?$")
    lock_sha256: Sha | None
    packages: dict[Name, Name | None]
    machine: Machine
    data: list[DataSet]
    training: Training
    evaluation: Evaluation

    @property
    def is_the_recipes(self) -> bool:
        """Whether it stands behind the recipe's numbers: nothing was changed, and the recipe is still the same."""
        return not self.changed and self.settings_sha256 == settings_sha256(self.recipe)

    @property
    def file_name(self) -> str:
        """The name of its file: the recipe, the machine, and a hash of the rest."""
        recipe = self.recipe.partition("/")[2].replace("/", "-")
        gpu = re.sub("[^a-z0-9]+", "-", str(self.machine).lower()).strip("-") if self.machine.gpu else "cpu"
        kind = "-rehearsal" if self.rehearsal else ""
        return f"{recipe}-{gpu}{kind}-{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:7]}.json"

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        """What it says is possible, and one part does not contradict another."""
        if problems := [*_of_training(self.training), *_of_machine(self)]:
            raise ValueError("; ".join(problems))
        return self


def settings_sha256(recipe: str) -> str:
    """A hash of a recipe's settings, whatever its comments say."""
    content = yamlfiles.read_yaml(paths.recipe_file(recipe))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _of_training(training: Training) -> Iterator[str]:
    steps = [step for step, _ in training.curve]
    if steps != sorted(set(steps)) or (steps and not 0 < steps[0] <= steps[-1] <= training.steps):
        yield "training.curve: its steps do not rise from the first step to the last at most"
    if training.trainable_parameters and (training.parameters or 0) < training.trainable_parameters:
        yield "training: more parameters are trained than there are"
    if (training.peak_gib is None) != (training.memory_kind is None):
        yield "training: peak_gib and memory_kind need each other"


def _of_machine(record: Record) -> Iterator[str]:
    machine, training = record.machine, record.training
    if (machine.gpus == 0) != (machine.gpu is None) or (machine.gpu is None) != (machine.gpu_memory_gib is None):
        yield "machine: gpus, gpu and gpu_memory_gib do not agree"
    if machine.gpus and machine.gpus < machine.nodes:
        yield "machine: more nodes than GPUs"
    if record.rehearsal and (machine.gpus or training.planned_gib):
        yield "rehearsal: a rehearsal uses no GPU, and has no plan"
    if training.memory_kind == "GPU, reserved" and not machine.gpus:
        yield "training.memory_kind: there was no GPU"
    elif training.memory_kind == "GPU, reserved" and (training.peak_gib or 0) > _ROUNDED * (
        machine.gpu_memory_gib or 0
    ):
        yield "training.peak_gib: more than the GPU has"
