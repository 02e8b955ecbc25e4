"""A study: the paper behind a folder of recipes, its data, its metrics and its published scores."""

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from . import config, paths
from .errors import UserError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SourceFile(_Strict):
    """A file of the data set: its size, and its checksum where one is known."""

    rows: int
    bytes: int | None = None
    sha256: str | None = None


class Data(_Strict):
    """Where a study's data is from, and the instruction that its rows carry."""

    name: str
    source: str
    archive: str
    licence: str
    paper: str
    instruction: str
    files: dict[str, SourceFile]
    test_subsets: dict[str, int]


class Decoding(_Strict):
    """How predictions are generated."""

    max_new_tokens: int
    do_sample: bool


class Scores(_Strict):
    """Published scores of one recipe. BLEU-4 from 0 to 100, BERTScore F1 from 0 to 1, gains in percent."""

    bleu4: float
    bleu4_gain: float
    bertscore_f1: float
    bertscore_f1_gain: float


class Baseline(_Strict):
    """Scores to compare with, and what they are scores of."""

    name: str
    bleu4: float
    bertscore_f1: float | None = None
    test_set: str


class Study(_Strict):
    """The content of a study.yaml."""

    title: str
    paper: dict[str, Any]
    data: Data
    decoding: Decoding
    metrics: dict[str, str]
    published: dict[str, Scores]
    baselines: list[Baseline]


@cache
def load(folder: Path) -> Study:
    """The study of a folder of recipes.

    Raises:
        UserError: its study.yaml is malformed.
    """
    file = folder / "study.yaml"
    try:
        return Study.model_validate(config.read_yaml(file))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}:{config.line_of(file, key)}: {key}: {first['msg']}") from None


def of(recipe: str) -> Study | None:
    """The study that a recipe belongs to by its name, or None."""
    for folder in paths.studies():
        if recipe.startswith(f"{folder.relative_to(paths.RECIPES)}/"):
            return load(folder)
    return None
