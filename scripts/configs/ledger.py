"""A study's ledger: records in its folder results/, and the status of its published numbers.

Records cannot hold secrets, folders, or names of machines or users: their fields are numbers, hashes, version numbers,
dates, and names that the project defines. `recipe results --export` writes a record.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal, Self

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ..base import paths, yamlfiles
from ..base.errors import UserError, did_you_mean
from ..base.files import Row, read_bytes
from ..base.progress import say
from ..base.yamlfiles import Config
from ..data.declaration import Sha256
from ..data.study import Study
from .compose import MIRROR, TRACKERS
from .gpus import catalogue

FOLDER = "results"
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
Profile = Annotated[str, _known(lambda: [file.stem for file in paths.PROFILES.glob("*.yaml")])]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class Score(_Strict):
    """A score, with its 95 % interval over rows if known."""

    value: float
    interval: tuple[float, float] | None = None


class Record(_Strict):
    """Fields of every record.

    Attributes:
        made: the day (UTC) of the scoring, or of a failed training run.
        of: the study's recipe or baseline.
        revision: the project's commit, with + for uncommitted changes; None outside a checkout.
        scores: scores by metric name in study.yaml, on the same test set as the published scores.
        invalidated: the commit that proves the record wrong, and the reason. No other field may change later.
    """

    version: Literal[3] = 3
    made: Annotated[date, Field(strict=False)]
    of: str
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}\+?$")
    scores: dict[str, Score]
    invalidated: str | None = Field(default=None, pattern=r"^by [0-9a-f]{7,40}, because( [A-Za-z]{1,20}[,.]?){1,40}$")

    @property
    def where(self) -> str:
        """The hardware and seed of a run; empty for predictions."""
        return ""

    def text(self) -> str:
        """Content of the record's file."""
        return f"{self.model_dump_json(indent=1)}\n"

    def file_name(self) -> str:
        """File name: recipe or baseline, hardware, and a hash of the content without `invalidated`."""
        name = re.findall("[a-z0-9.]+", f"{self.of.partition('/')[2] or self.of} {self.where}".lower())
        content = self.model_copy(update={"invalidated": None}).text()
        return f"{'-'.join([*name, hashlib.sha256(content.encode()).hexdigest()[:12]])}.json"


class PredictionsRecord(Record):
    """Scores of published predictions; `texts_sha256` hashes references and predictions as JSON lines."""

    stage: Literal["predictions"] = "predictions"
    rows: int = Field(ge=1)
    texts_sha256: Sha256


_UNCHANGING = {MIRROR, *TRACKERS, "ddp", "zero1", "zero2", "zero3", "zero3-offload"}
"""Profiles that leave the recipe's settings."""


class RunRecord(Record):
    """Fields of every record of a run.

    Attributes:
        settings_sha256: the hash of the recipe's settings, see `settings_sha256`.
        config_sha256: the hash of the run's config and data, as in run.json.
        profiles: the shipped profiles merged into the recipe.
        gpu: the name in gpus.yaml, or a capability such as sm_86.
    """

    settings_sha256: Sha256
    config_sha256: Sha256
    adapter_sha256: Sha256 | None
    profiles: list[Profile]
    lock_sha256: Sha256 | None
    packages: dict[Package, Version]
    gpus: int = Field(ge=1)
    gpu: Annotated[str, _known(lambda: [*catalogue(), *(gpu.sm for gpu in catalogue().values())])]

    @property
    def departure(self) -> str | None:
        """Reason why the run does not count for today's recipe, or None."""
        if changing := set(self.profiles) - _UNCHANGING:
            return f"profile {', '.join(sorted(changing))}"
        return None if self.settings_sha256 == settings_sha256(self.of) else "recipe changed since"

    @property
    def hardware(self) -> str:
        """The GPUs of the run."""
        return self.gpu if self.gpus == 1 else f"{self.gpus} x {self.gpu}"

    @property
    def where(self) -> str:
        """The GPUs of the run, and the seed of a training run."""
        seed = getattr(self, "seed", None)
        return self.hardware if seed is None else f"{self.hardware}, seed {seed}"


class AdapterRecord(RunRecord):
    """An evaluation of a published adapter under its recipe."""

    stage: Literal["adapter"] = "adapter"


class TrainingRecord(RunRecord):
    """A training run and, if it finished, its evaluation.

    Attributes:
        values: the settings of the cell in study.yaml that the run reproduces; empty for the recipe's own settings.
        seconds: time of the training steps, without evaluation and saving.
        tokens_per_second: tokens without padding, on all GPUs together.
        peak_gib, planned_gib: measured and planned memory of one GPU.
        eval_loss: final eval loss, in nats per token.
    """

    stage: Literal["training"] = "training"
    outcome: Literal["finished", "failed", "out of memory"]
    values: dict[str, float] = Field(default={})
    seed: int
    steps: int = Field(ge=0)
    seconds: float = Field(ge=0)
    tokens_per_second: Positive | None
    peak_gib: Positive | None
    planned_gib: Positive | None
    eval_loss: float | None = Field(ge=0)

    @model_validator(mode="after")
    def _scored_if_finished(self) -> Self:
        if (bool(self.scores) and self.adapter_sha256 is not None) != (self.outcome == "finished"):
            raise ValueError("outcome: must be finished if the run has an adapter and scores, and only then")
        return self


AnyRecord = PredictionsRecord | AdapterRecord | TrainingRecord
_RECORD: TypeAdapter[AnyRecord] = TypeAdapter(Annotated[AnyRecord, Field(discriminator="stage")])


def settings_sha256(recipe: str) -> str:
    """Hash of a recipe's settings, without comments."""
    content = yamlfiles.read_yaml(paths.recipe_file(recipe))
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def read(file: Path, of_study: Study) -> AnyRecord:
    """Read a record of a study's ledger.

    Raises:
        UserError: the record is malformed or edited, or uses a name that study.yaml does not declare.
    """
    try:
        record = _RECORD.validate_json(read_bytes(file))
    except ValidationError as error:
        wrong = [": ".join([*map(str, found["loc"][1:]), found["msg"]]) for found in error.errors()]
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
    recipes = [*of_study.published, *of_study.variants]
    names = recipes if isinstance(record, RunRecord) else [*recipes, *(each.name for each in of_study.baselines)]
    if record.of not in names:
        yield f"of: {record.of} does not belong to the study {of_study.folder.name}"
    elif unknown := record.scores.keys() - of_study.columns.keys():
        yield f"scores: {', '.join(unknown)} is not a metric of the study"
    elif isinstance(record, TrainingRecord) and record.values and not of_study.cell(record.of, {}, record.values):
        yield f"values: {record.values} is not a published cell of {record.of}"


def records(of_study: Study, strict: bool = False) -> list[AnyRecord]:
    """Read a study's records from the project and from recipes/ in the current folder.

    Broken records are reported and skipped. With `strict`, read only the folder beside study.yaml, and raise UserError
    for a broken record."""
    folders = [of_study.folder] if strict else [home / of_study.folder.name for home, _ in paths.homes()]
    found = []
    for file in (file for folder in folders for file in sorted((folder / FOLDER).glob("*.json"))):
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
        published: the published number.
        status: the furthest stage with a valid score, its GPUs and seeds, failed runs, and invalidated records.
        here: the mean score at that stage; or a single score with its 95 % interval.
        command: the command that reproduces the number; None for a baseline without predictions.
    """

    of: str
    cell: str | None
    metric: str
    published: str
    status: str
    here: str | None
    command: str | None


def statuses(of_study: Study, found: list[AnyRecord]) -> list[Status]:
    """Statuses of a study's published numbers."""
    return [_status(of_study, found, *number) for number in _numbers(of_study)]


def _numbers(of_study: Study) -> Iterator[tuple[str, Config, str, str]]:
    """Recipe or baseline, cell, metric and text of each published number."""
    for name, published in of_study.published.items():
        file = paths.recipe_file(name)
        own = yamlfiles.read_yaml(file) if file.is_file() else {}  # the recipe is not rendered yet
        yield from ((name, {}, metric, str(score)) for metric, score in published.scores.items())
        for cell in published.cells:
            if not cell.values.items() <= own.items():
                texts = {metric: ", ".join(map(str, scores)) for metric, scores in cell.scores.items()}
                yield from ((name, cell.values, metric, text) for metric, text in texts.items())
    for baseline in of_study.baselines:
        yield from ((baseline.name, {}, metric, str(score)) for metric, score in baseline.scores.items())


def _status(of_study: Study, found: list[AnyRecord], of: str, values: Config, metric: str, published: str) -> Status:
    aims = {name: variant.of for name, variant in of_study.variants.items() if variant.reproduces}
    own = [record for record in found if of in (record.of, aims.get(record.of))]
    own = [record for record in own if getattr(record, "values", {}) == values]
    others = [record for record in own if isinstance(record, RunRecord) and record.departure]
    valid = [record for record in own if not record.invalidated and record not in others]
    scored = [record for record in valid if metric in record.scores]
    stage = max((record.stage for record in scored), key=[*TITLES].index, default=None)
    best = [record for record in scored if record.stage == stage]
    where = " and ".join(filter(None, (record.where for record in best)))
    reached = " on ".join(filter(None, (TITLES[stage] if stage else "not run", where)))
    notes = [f"{run.outcome} on {run.where}" for run in valid if isinstance(run, TrainingRecord) and not run.scores]
    notes += [f"{record.departure}: {record.where}" for record in others if not record.invalidated]
    notes += [f"a record is invalidated {record.invalidated}" for record in own if record.invalidated]
    cell = " ".join(f"--set {key}={value}" for key, value in values.items())
    return Status(
        of=of,
        cell=cell or None,
        metric=of_study.columns[metric].label,
        published=published,
        status="; ".join([reached, *notes]),
        here=_mean([record.scores[metric] for record in best]) if best else None,
        command=_command(of_study, of, stage, cell),
    )


def _mean(scores: list[Score]) -> str:
    """Mean of scores as text; a single score includes its interval."""
    interval = scores[0].interval if len(scores) == 1 else None
    mean = f"{fmean(score.value for score in scores):.4g}"
    return f"{mean} ({interval[0]:.4g} to {interval[1]:.4g})" if interval else mean


def _command(of_study: Study, of: str, stage: str | None, cell: str) -> str | None:
    """Command that repeats a number's furthest recorded stage; a training command if nothing is recorded."""
    reproduce, only = f"recipe reproduce {of_study.folder.name}", f" --only {of}" if of in of_study.published else ""
    if stage in ("predictions", "adapter"):
        return f"{reproduce} --from {stage}{only}"
    if cell:
        return f"recipe sweep {of} {cell}"
    return f"{reproduce}{only}" if only else None


def table(of_study: Study, some: list[AnyRecord]) -> list[Row]:
    """Table rows of recorded runs, in the order of the study's recipes."""
    order = [*of_study.published, *of_study.variants]
    rows = []
    runs = [record for record in some if isinstance(record, TrainingRecord)]
    for record in sorted(runs, key=lambda record: order.index(record.of)):
        aim = of_study.aimed_at(record.of)
        row: Row = {
            "recipe": record.of,
            "outcome": f"invalidated {record.invalidated}" if record.invalidated else record.outcome,
            "GPU": record.hardware,
            "profiles": ", ".join(record.profiles) or None,
            "seed": record.seed,
        }
        for name, column in of_study.table.items():
            score, published = record.scores.get(name), aim and aim.scores.get(name)
            row |= {
                column.label: score and score.value,
                f"{column.label}, 95 %": score and score.interval and list(score.interval),
                f"{column.label}, published": published and str(published),
            }
        changed = record.settings_sha256 != settings_sha256(record.of)
        rows.append(
            row
            | {
                "peak GiB": record.peak_gib,
                "planned GiB": record.planned_gib,
                "tokens/s": record.tokens_per_second and round(record.tokens_per_second),
                "hours": record.seconds / 3600,
                "Axolotl": record.packages.get("axolotl"),
                "recipe changed since": "yes" if changed else None,
            }
        )
    return rows
