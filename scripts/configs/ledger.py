"""A study's ledger: records of finished runs in the folder results/ beside its recipes.

No field of a record can hold a secret, a folder, or the name of a machine or user: fields are numbers, hashes, version
numbers, dates, and names that the project defines. `recipe results --export` writes a record.
"""

import hashlib
from collections.abc import Callable, Collection
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..base import paths, yamlfiles
from ..base.errors import UserError, did_you_mean
from ..base.files import Row
from ..base.progress import say
from ..data.study import Study
from .gpus import catalogue

FOLDER = "results"
TITLE = "Measured by those who ran them"


def _known(names: Callable[[], Collection[str]]) -> AfterValidator:
    """Accept a name only if the project defines it."""

    def check(name: str) -> str:
        if name not in names():
            raise ValueError(f"unknown{did_you_mean(name, names())}")
        return name

    return AfterValidator(check)


Sha = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0)]
Version = Annotated[str, Field(pattern=r"^\d{1,4}(\.\d{1,4}){1,3}((a|b|rc|\.post|\.dev)\d{1,3})?(\+[a-z]{2}\d{0,3})?$")]
Package = Literal["axolotl", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "deepspeed"]
Profile = Annotated[str, _known(lambda: [file.stem for file in paths.PROFILES.glob("*.yaml")])]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class Score(_Strict):
    """A score of the study's metric, with its 95 % interval over rows where it has one."""

    value: float
    interval: tuple[float, float] | None = None


class Record(_Strict):
    """The result of one run of a study's recipe.

    Attributes:
        made: the day of its evaluation, in UTC.
        settings_sha256: of the recipe's settings, see `settings_sha256`.
        config_sha256: of the config that ran and of its data, as in run.json.
        profiles: the shipped profiles that were merged into the recipe.
        revision: the project's commit, with a + where files had been changed; None outside of a checkout.
        gpu: its name in gpus.yaml, or as sm_86 for another GPU.
        seconds: of the training steps, without evaluation and saving.
        tokens_per_second: padding not counted, of all GPUs together.
        peak_gib, planned_gib: measured and planned memory of one GPU.
        eval_loss: in nats a token, at the end.
        scores: by the study's names of metrics.
    """

    version: Literal[2] = 2
    made: Annotated[date, Field(strict=False)]
    recipe: Annotated[str, _known(paths.recipe_names)]
    settings_sha256: Sha
    config_sha256: Sha
    adapter_sha256: Sha
    profiles: list[Profile]
    seed: int
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}\+?$")
    lock_sha256: Sha | None
    packages: dict[Package, Version]
    gpus: int = Field(ge=1)
    gpu: Annotated[str, _known(lambda: [*catalogue(), *(gpu.sm for gpu in catalogue().values())])]
    steps: int = Field(ge=1)
    seconds: Positive
    tokens_per_second: Positive | None
    peak_gib: Positive | None
    planned_gib: Positive | None
    eval_loss: float | None = Field(ge=0)
    scores: dict[str, Score]

    def text(self) -> str:
        """The content of its file."""
        return f"{self.model_dump_json(indent=1)}\n"

    def file_name(self) -> str:
        """The recipe, the GPU, and a hash of the content."""
        name = f"{self.recipe.partition('/')[2]}-{self.gpu}".lower().replace(" ", "-")
        return f"{name}-{hashlib.sha256(self.text().encode()).hexdigest()[:7]}.json"


def settings_sha256(recipe: str) -> str:
    """The hash of a recipe's settings, without its comments."""
    content = yamlfiles.read_yaml(paths.recipe_file(recipe))
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def read(file: Path, of_study: Study) -> Record:
    """Read a record of a study's ledger.

    Raises:
        UserError: it is malformed, or names a recipe or a metric that the study lacks.
    """
    try:
        record = Record.model_validate_json(file.read_bytes())
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()]
    except OSError as error:
        wrong = [str(error.strerror)]
    else:
        of_another = record.recipe not in {*of_study.published, *of_study.variants}
        wrong = [f"recipe: {record.recipe} is not of the study {of_study.folder.name}"] if of_another else []
        unknown = record.scores.keys() - of_study.columns.keys()
        wrong += [f"scores: {', '.join(unknown)} is not a metric of the study"] if unknown else []
    if wrong:
        raise UserError("\n".join(f"{paths.shown(file)}: {problem}" for problem in wrong))
    return record


def records(of_study: Study, strict: bool = False) -> list[Record]:
    """Read the records beside a study's recipes, and those in the same place below recipes/ of the current folder.

    Args:
        strict: read only those beside the recipes, and raise the error of a broken one, which otherwise is reported
            on stderr and left out.
    """
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


def table(of_study: Study, some: list[Record]) -> list[Row]:
    """A row for each record, in the order of the study's recipes."""
    order = [*of_study.published, *of_study.variants]
    rows = []
    for record in sorted(some, key=lambda record: order.index(record.recipe)):
        aim = of_study.aimed_at(record.recipe)
        row: Row = {
            "recipe": record.recipe,
            "GPU": record.gpu if record.gpus == 1 else f"{record.gpus} x {record.gpu}",
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
        changed = record.settings_sha256 != settings_sha256(record.recipe)
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
