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

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..base import paths, yamlfiles
from ..base.errors import UserError, did_you_mean
from ..base.files import digest, read_bytes
from ..base.terminal import warn
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


class Invalidation(_Strict):
    """Commit that proves a record wrong, and the reason, in words."""

    commit: Annotated[str, Field(pattern="^[0-9a-f]{7,40}$")]
    reason: Annotated[str, Field(pattern="^[A-Za-z]{1,20}[,.]?( [A-Za-z]{1,20}[,.]?){0,39}$")]


class Record(_Strict):
    """Scores of published predictions, of a published adapter, or of a training run.

    Attributes:
        made: the day (UTC) of the scoring, or of a failed training run.
        name: the study's recipe or baseline.
        revision: the project's commit, with + for uncommitted changes; None outside a checkout.
        scores: scores by metric name in study.yaml, on the same test set as the published scores.
        invalidated: proof that the record is wrong. No other field may change later.
        texts_sha256: hash of references and published predictions as JSON lines; `rows` counts them.
        settings_sha256: hash of the recipe's settings, see `settings_sha256`; like all fields below, only of a run.
        config_sha256: hash of the run's config and data, as in run.json.
        profiles: profiles of `PROFILES` merged into the recipe.
        gpu: name in gpus.yaml, or a capability such as sm_86.
        settings: settings of the grid point in study.yaml that the run reproduces; empty for the recipe's own settings.
        seconds: time of the training steps, without evaluation and saving.
        peak_gib: measured memory of one GPU.
    """

    version: Literal[3] = 3
    made: Annotated[date, Field(strict=False)]
    name: Annotated[str, Field(max_length=300)]
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}\+?$")
    scores: Annotated[dict[str, Score], Field(max_length=100)]
    invalidated: Invalidation | None = None
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
    settings: Annotated[dict[str, float], Field(max_length=100)] = {}
    seed: int | None = None
    seconds: float | None = Field(default=None, ge=0)
    peak_gib: Positive | None = None

    @model_validator(mode="after")
    def _has_required_fields(self) -> Self:
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
        return self.settings_sha256 is not None and self.settings_sha256 != settings_sha256(self.name)

    @property
    def defect(self) -> str | None:
        """Reason not to count the record; None for a valid record of a finished run."""
        if self.invalidated:
            return f"a record is invalidated by {self.invalidated.commit}, because {self.invalidated.reason}"
        if self.is_outdated:
            return f"recipe changed since: {self.where}"
        if self.outcome != "finished":
            return f"{self.outcome} on {self.where}"
        return None

    @property
    def where(self) -> str:
        """The GPUs of a run, and the seed of a training run; empty for predictions."""
        if self.gpu is None:
            return ""
        hardware = self.gpu
        if self.gpus > 1:
            hardware = f"{self.gpus} x {self.gpu}"
        if self.seed is None:
            return hardware
        return f"{hardware}, seed {self.seed}"

    def text(self) -> str:
        """Content of the record's file."""
        return f"{self.model_dump_json(indent=1, exclude_unset=True)}\n"

    def file_name(self) -> str:
        """File name: recipe or baseline, hardware, and a hash of the content without `invalidated`."""
        name = re.findall("[a-z0-9.]+", f"{self.name.partition('/')[2] or self.name} {self.where}".lower())
        content = self.model_copy(update={"invalidated": None}).text()
        return f"{'-'.join([*name, hashlib.sha256(content.encode()).hexdigest()[:12]])}.json"


def settings_sha256(recipe: str) -> str:
    """Hash of a recipe's settings, without comments."""
    return digest(yamlfiles.read_yaml(paths.recipe_file(recipe)))


def read(file: Path, study: Study) -> Record:
    """Read a record of a study.

    Raises:
        UserError: the record is malformed or edited, or uses a name that study.yaml does not declare.
    """
    try:
        record = Record.model_validate_json(read_bytes(file))
    except ValidationError as error:
        problems = [": ".join([*map(str, mistake["loc"]), mistake["msg"]]) for mistake in error.errors()]
    except OSError as error:
        problems = [str(error.strerror)]
    else:
        problems = list(_undeclared(record, study))
        if file.name != record.file_name():
            problems.append(f"edited or renamed (from {record.file_name()}); restore it, or add only `invalidated`")
    if problems:
        first, *further = [UserError(problem, file=paths.shown(file)) for problem in problems]
        first.further = further
        raise first
    return record


def _undeclared(record: Record, study: Study) -> Iterator[str]:
    """Yield a problem if a record has a name that study.yaml does not declare."""
    names = study.recipes
    if record.stage == "predictions":
        names += [baseline.name for baseline in study.baselines]
    if record.name not in names:
        yield f"name: {record.name} does not belong to the study {study.folder.name}"
    elif unknown := record.scores.keys() - study.columns.keys():
        yield f"scores: {', '.join(unknown)} is not a metric of the study"
    elif record.settings and not study.grid_point(record.name, record.settings):
        yield f"settings: {record.settings} is not a published grid point of {record.name}"


def records(study: Study) -> list[Record]:
    """Read a study's records from the project and from recipes/ in the current folder.

    Broken records are reported and skipped.
    """
    valid = []
    for home, _ in paths.homes():
        for file in _files(home / study.folder.name):
            try:
                valid.append(read(file, study))
            except UserError as error:
                warn(str(error))
    return valid


def built_in_records(study: Study) -> list[Record]:
    """Read the records beside study.yaml.

    Raises:
        UserError: a record is broken.
    """
    return [read(file, study) for file in _files(study.folder)]


def _files(folder: Path) -> list[Path]:
    """Files of a study's records."""
    return sorted((folder / FOLDER).glob("*.json"))


@dataclass
class Status:
    """Status of a published number.

    Attributes:
        name: the recipe or baseline.
        settings: the settings of a grid point in study.yaml; empty for the recipe's own settings.
        metric: name of the metric.
        published: the number as text, with its ± if known; or the numbers of several runs.
        status: the furthest stage with a valid score, its GPUs and seeds, failed runs, and invalidated records.
        here: the mean score at that stage; or a single score with its 95 % interval.
    """

    name: str
    settings: Config
    metric: str
    published: str
    status: str = NOT_RUN
    here: str | None = None

    @property
    def options(self) -> str | None:
        """The settings as --set options; None for the recipe's own settings."""
        return " ".join(f"--set {key}={value}" for key, value in self.settings.items()) or None


def statuses(study: Study, records: Sequence[Record]) -> list[Status]:
    """Statuses of a study's published numbers."""
    numbers = list(_numbers(study))
    for number in numbers:
        _add_records(number, [record for record in records if study.reproduced(record.name) == number.name])
    return numbers


def _numbers(study: Study) -> Iterator[Status]:
    """Yield a study's published numbers, without records."""
    for name, published in study.published.items():
        for metric, score in published.scores.items():
            yield Status(name, {}, metric, str(score))
        settings = _settings(name)
        for point in published.grid:
            if point.settings.items() <= settings.items():
                continue
            for metric, scores in point.scores.items():
                yield Status(name, point.settings, metric, ", ".join(map(str, scores)))
    for baseline in study.baselines:
        for metric, score in baseline.scores.items():
            yield Status(baseline.name, {}, metric, str(score))


def _settings(recipe: str) -> Config:
    """Settings of a recipe; empty if it is not rendered yet."""
    file = paths.recipe_file(recipe)
    if not file.is_file():
        return {}
    return yamlfiles.read_yaml(file)


def _add_records(number: Status, records: Sequence[Record]) -> None:
    """Add the records of a published number's recipe to its status."""
    scored, defects = [], []
    for record in records:
        if record.settings != number.settings:
            continue
        defect = record.defect
        if defect:
            defects.append(defect)
        elif number.metric in record.scores:
            scored.append(record)
    if scored:
        scored = _furthest(scored)
        number.status = _progress(scored)
        number.here = _mean([record.scores[number.metric] for record in scored])
    number.status = "; ".join([number.status, *defects])


def _furthest(records: Sequence[Record]) -> list[Record]:
    """Records of the furthest stage."""
    furthest = max((record.stage for record in records), key=[*TITLES].index)
    return [record for record in records if record.stage == furthest]


def _progress(records: Sequence[Record]) -> str:
    """Stage of records as text, with their GPUs and seeds."""
    stage = records[0].stage
    if stage == "predictions":
        return TITLES[stage]
    return f"{TITLES[stage]} on {' and '.join(record.where for record in records)}"


def _mean(scores: Sequence[Score]) -> str:
    """Mean of scores as text; a single score includes its interval."""
    mean = f"{fmean(score.value for score in scores):.4g}"
    if len(scores) > 1 or scores[0].interval is None:
        return mean
    low, high = scores[0].interval
    return f"{mean} ({low:.4g} to {high:.4g})"
