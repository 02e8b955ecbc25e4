"""Records of a study's published numbers, in its folder results/, and the status of each number.

Records cannot hold secrets, folders, or names of machines or users: their fields are numbers, hashes, version numbers,
dates, and names that the project defines. `recipe results --export` writes a record.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal, Self

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..base import paths, yamlfiles
from ..base.errors import UserError, did_you_mean
from ..base.files import read_bytes
from ..base.terminal import say
from ..base.yamlfiles import Config
from ..config.compose import MIRROR, TRACKERS
from ..config.gpus import catalogue
from ..data.declaration import Sha256
from ..data.studies import Study

FOLDER = "results"
NOT_RUN = "not run"
TITLES = {
    "predictions": "scored from the authors' predictions",
    "adapter": "evaluated from the authors' adapter",
    "training": "retrained",
}
"""Status texts by the stage of a record, the furthest stage last."""


def _known(names: Callable[[], Collection[str]]) -> AfterValidator:
    """Accept a name only if the project defines it."""

    def check(name: str) -> str:
        if name not in names():
            raise ValueError(f"unknown{did_you_mean(name, names())}")
        return name

    return AfterValidator(check)


Positive = Annotated[float, Field(gt=0)]
Version = Annotated[str, Field(pattern=r"^\d{1,4}(\.\d{1,4}){1,3}((a|b|rc|\.post|\.dev)\d{1,3})?(\+[a-z]{2}\d{0,3})?$")]
Package = Literal["axolotl", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "deepspeed"]
PROFILES = {MIRROR, *TRACKERS, "ddp", "zero1", "zero2", "zero3", "zero3-offload"}
"""Profiles of recorded runs, which leave the recipe's settings."""
Profile = Annotated[str, _known(lambda: PROFILES)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class Score(_Strict):
    """A score, with its 95 % interval over rows if known."""

    value: float
    interval: tuple[float, float] | None = None


class Record(_Strict):
    """Scores of published predictions, of a published adapter, or of a training run.

    Attributes:
        made: the day (UTC) of the scoring, or of a failed training run.
        of: the study's recipe or baseline.
        revision: the project's commit, with + for uncommitted changes; None outside a checkout.
        scores: scores by metric name in study.yaml, on the same test set as the published scores.
        invalidated: the commit that proves the record wrong, and the reason. No other field may change later.
        texts_sha256: hash of references and published predictions as JSON lines; `rows` counts them.
        settings_sha256: hash of the recipe's settings, see `settings_sha256`; like all fields below, only of a run.
        config_sha256: hash of the run's config and data, as in run.json.
        profiles: profiles of `PROFILES` merged into the recipe.
        gpu: name in gpus.yaml, or a capability such as sm_86.
        values: settings of the cell in study.yaml that the run reproduces; empty for the recipe's own settings.
        seconds: time of the training steps, without evaluation and saving.
        peak_gib: measured memory of one GPU.
    """

    version: Literal[3] = 3
    made: Annotated[date, Field(strict=False)]
    of: str
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}\+?$")
    scores: dict[str, Score]
    invalidated: str | None = Field(default=None, pattern=r"^by [0-9a-f]{7,40}, because( [A-Za-z]{1,20}[,.]?){1,40}$")
    stage: Literal["predictions", "adapter", "training"]
    rows: int | None = Field(default=None, ge=1)
    texts_sha256: Sha256 | None = None
    settings_sha256: Sha256 | None = None
    config_sha256: Sha256 | None = None
    adapter_sha256: Sha256 | None = None
    outcome: Literal["finished", "failed", "out of memory"] = "finished"
    profiles: list[Profile] = []
    packages: dict[Package, Version] = {}
    gpus: int = Field(default=1, ge=1)
    gpu: Annotated[str, _known(lambda: [*catalogue(), *(gpu.sm for gpu in catalogue().values())])] | None = None
    values: dict[str, float] = {}
    seed: int | None = None
    seconds: float | None = Field(default=None, ge=0)
    peak_gib: Positive | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.stage == "predictions":
            required = ["scores", "texts_sha256", "rows"]
        elif self.outcome == "finished":
            required = ["scores", "adapter_sha256", "settings_sha256", "config_sha256", "gpu"]
        else:
            required = ["settings_sha256", "config_sha256", "gpu"]
        if absent := [name for name in required if not getattr(self, name)]:
            raise ValueError(f"missing: {', '.join(absent)}")
        if self.outcome != "finished" and self.scores:
            raise ValueError("outcome: a run with scores is finished")
        return self

    @property
    def is_outdated(self) -> bool:
        """True if the recipe's settings have changed since the run."""
        return self.settings_sha256 is not None and self.settings_sha256 != settings_sha256(self.of)

    @property
    def where(self) -> str:
        """The GPUs of a run, and the seed of a training run; empty for predictions."""
        if self.gpu is None:
            return ""
        hardware = self.gpu if self.gpus == 1 else f"{self.gpus} x {self.gpu}"
        return hardware if self.seed is None else f"{hardware}, seed {self.seed}"

    def text(self) -> str:
        """Content of the record's file."""
        return f"{self.model_dump_json(indent=1, exclude_unset=True)}\n"

    def file_name(self) -> str:
        """File name: recipe or baseline, hardware, and a hash of the content without `invalidated`."""
        name = re.findall("[a-z0-9.]+", f"{self.of.partition('/')[2] or self.of} {self.where}".lower())
        content = self.model_copy(update={"invalidated": None}).text()
        return f"{'-'.join([*name, hashlib.sha256(content.encode()).hexdigest()[:12]])}.json"


def settings_sha256(recipe: str) -> str:
    """Hash of a recipe's settings, without comments."""
    content = yamlfiles.read_yaml(paths.recipe_file(recipe))
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def read(file: Path, of_study: Study) -> Record:
    """Read a record of a study.

    Raises:
        UserError: the record is malformed or edited, or uses a name that study.yaml does not declare.
    """
    try:
        record = Record.model_validate_json(read_bytes(file))
    except ValidationError as error:
        wrong = [": ".join([*map(str, found["loc"]), found["msg"]]) for found in error.errors()]
    except OSError as error:
        wrong = [str(error.strerror)]
    else:
        wrong = list(_undeclared(record, of_study))
        if file.name != record.file_name():
            wrong.append(f"edited or renamed (from {record.file_name()}); restore it, or add only `invalidated`")
    if wrong:
        raise UserError("\n".join(f"{paths.shown(file)}: {problem}" for problem in wrong))
    return record


def _undeclared(record: Record, of_study: Study) -> Iterator[str]:
    """Yield a problem if a record has a name that study.yaml does not declare."""
    names = [*of_study.published, *of_study.variants]
    if record.stage == "predictions":
        names += [baseline.name for baseline in of_study.baselines]
    if record.of not in names:
        yield f"of: {record.of} does not belong to the study {of_study.folder.name}"
    elif unknown := record.scores.keys() - of_study.columns.keys():
        yield f"scores: {', '.join(unknown)} is not a metric of the study"
    elif record.values and not of_study.cell(record.of, {}, record.values):
        yield f"values: {record.values} is not a published cell of {record.of}"


def records(of_study: Study, strict: bool = False) -> list[Record]:
    """Read a study's records from the project and from recipes/ in the current folder.

    Broken records are reported and skipped. With `strict`, read only the folder beside study.yaml, and raise UserError
    for a broken record."""
    folders = [of_study.folder] if strict else [home / of_study.folder.name for home, _ in paths.homes()]
    found = []
    for folder in folders:
        for file in sorted((folder / FOLDER).glob("*.json")):
            try:
                found.append(read(file, of_study))
            except UserError as error:
                if strict:
                    raise
                say(str(error))
    return found


@dataclass
class Status:
    """Status of a published number.

    Attributes:
        of: the recipe or baseline.
        cell: the settings of a cell in study.yaml, as --set options; None for the recipe's own settings.
        metric: the metric's label.
        published: the published number.
        status: the furthest stage with a valid score, its GPUs and seeds, failed runs, and invalidated records.
        here: the mean score at that stage; or a single score with its 95 % interval.
    """

    of: str
    cell: str | None
    metric: str
    published: str
    status: str
    here: str | None


def statuses(of_study: Study, found: Sequence[Record]) -> list[Status]:
    """Statuses of a study's published numbers."""
    numbers = []
    for name, published in of_study.published.items():
        file = paths.recipe_file(name)
        own = yamlfiles.read_yaml(file) if file.is_file() else {}  # the recipe is not rendered yet
        for metric, score in published.scores.items():
            numbers.append(_status(of_study, found, name, {}, metric, str(score)))
        for cell in published.cells:
            if cell.values.items() <= own.items():
                continue
            for metric, scores in cell.scores.items():
                numbers.append(_status(of_study, found, name, cell.values, metric, ", ".join(map(str, scores))))
    for baseline in of_study.baselines:
        for metric, score in baseline.scores.items():
            numbers.append(_status(of_study, found, baseline.name, {}, metric, str(score)))
    return numbers


def _status(of_study: Study, found: Sequence[Record], of: str, values: Config, metric: str, published: str) -> Status:
    recipes = {of} | {name for name, variant in of_study.variants.items() if variant.reproduces and variant.of == of}
    scored, notes = [], []
    for record in found:
        if record.of not in recipes or record.values != values:
            continue
        if record.invalidated:
            notes.append(f"a record is invalidated {record.invalidated}")
        elif record.is_outdated:
            notes.append(f"recipe changed since: {record.where}")
        elif record.outcome != "finished":
            notes.append(f"{record.outcome} on {record.where}")
        elif metric in record.scores:
            scored.append(record)
    reached, here = NOT_RUN, None
    if scored:
        stage = max((record.stage for record in scored), key=[*TITLES].index)
        best = [record for record in scored if record.stage == stage]
        where = " and ".join(record.where for record in best if record.where)
        reached = f"{TITLES[stage]} on {where}" if where else TITLES[stage]
        here = _mean([record.scores[metric] for record in best])
    return Status(
        of=of,
        cell=" ".join(f"--set {key}={value}" for key, value in values.items()) or None,
        metric=of_study.columns[metric].label,
        published=published,
        status="; ".join([reached, *notes]),
        here=here,
    )


def _mean(scores: list[Score]) -> str:
    """Mean of scores as text; a single score includes its interval."""
    interval = scores[0].interval if len(scores) == 1 else None
    mean = f"{fmean(score.value for score in scores):.4g}"
    return f"{mean} ({interval[0]:.4g} to {interval[1]:.4g})" if interval else mean
