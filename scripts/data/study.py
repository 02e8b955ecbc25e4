"""A study: the paper behind a folder of recipes, its data, its metrics and its published scores."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..base import paths, yamlfiles
from ..base.errors import UserError, meant

SPLITS = ("train", "valid", "test")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SourceFile(_Strict):
    """A file of the data set: its size, and its checksum if it is known."""

    rows: int
    bytes: int | None = None
    sha256: str | None = None


class PreparedFormat(_Strict):
    """A format that the input of rows can have, the folder for them, and the reason to use it."""

    folder: str
    what: str
    why: str


class Subset(_Strict):
    """Rows of the test file: those that a file beside study.yaml lists, or a draw with a seed."""

    title: str
    rows: int
    positions: str | None = None
    seed: int | None = None


class Data(_Strict):
    """Where a study's data is published, and how it is prepared.

    Attributes:
        key: its name in `recipe data fetch`.
        url: the address of the archive that holds `files`.
        instruction: the instruction of every row.
        input_formats: by name, the study's own first.
        subsets: of the test file, by the name of the file that `recipe data prepare` writes.
        scored_on: the subset that the published scores are on.
    """

    key: str
    name: str
    source: str
    url: str
    archive: str
    archive_bytes: int
    licence: str
    paper: str
    instruction: str
    files: dict[str, SourceFile]
    input_formats: dict[str, PreparedFormat]
    subsets: dict[str, Subset]
    scored_on: str

    @property
    def raw(self) -> Path:
        """The folder for the files as they are published."""
        return Path("data", f"{self.key}-raw")


class Decoding(_Strict):
    """How predictions are generated, in transformers' terms; temperature, top_p and seed matter only when sampling."""

    max_new_tokens: int
    do_sample: bool = False
    num_beams: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 42


class Scores(_Strict):
    """Published scores of one recipe. BLEU-4 from 0 to 100, BERTScore F1 from 0 to 1, gains in percent."""

    trainer: str = "Axolotl"
    bleu4: float
    bleu4_gain: float
    bertscore_f1: float
    bertscore_f1_gain: float


class Beside(_Strict):
    """A recipe that is not among the study's own.

    Attributes:
        of: the study's recipe that it is a variant of.
        reproduces: whether its score is meant to be that recipe's published one.
    """

    of: str
    reproduces: bool


class Baseline(_Strict):
    """Scores to compare with, and the model and test set that they are of."""

    name: str
    bleu4: float
    bertscore_f1: float | None = None
    test_set: str


class Study(_Strict):
    """The content of a study.yaml, and its folder."""

    folder: Path
    title: str
    paper: dict[str, Any]
    data: Data
    decoding: Decoding
    metrics: dict[str, str]
    published: dict[str, Scores]
    beside: dict[str, Beside]
    open_settings: list[str]
    acceptable_bleu4_difference: float
    baselines: list[Baseline]

    def origin(self, recipe: str) -> str:
        """The study's own recipe that a recipe is a variant of, or is."""
        return self.beside[recipe].of if recipe in self.beside else recipe

    def aimed_at(self, recipe: str) -> Scores | None:
        """The published scores that a recipe aims at."""
        if recipe in self.beside and not self.beside[recipe].reproduces:
            return None
        return self.published.get(self.origin(recipe))


@cache
def load(folder: Path) -> Study:
    """The study of a folder of recipes.

    Raises:
        UserError: its study.yaml is malformed.
    """
    file = folder / "study.yaml"
    try:
        return Study.model_validate(yamlfiles.read_yaml(file) | {"folder": folder})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}:{yamlfiles.line_of(file, key)}: {key}: {first['msg']}") from None


def find(name: str) -> Study:
    """The study of a name or a part of that; its name is its folder's below recipes/.

    Raises:
        UserError: there is none, or several are meant.
    """
    folders = {folder.name: folder for folder in paths.studies()}
    return load(folders[meant(name, folders, "study")])


def with_data(key: str) -> Study:
    """The first study on a data set, given by its name or a part of that.

    Raises:
        UserError: there is none, or several are meant.
    """
    studies = {study.data.key: study for study in map(load, reversed(paths.studies()))}
    return studies[meant(key, studies, "data set")]


def input_format(path: str) -> str | None:
    """The format of the rows that `recipe data prepare` writes to a path; None for a file of another origin."""
    return next((name for _, name in _preparing(path)), None)


def preparation(path: str) -> str | None:
    """What the user runs to have a file of prepared rows written; None for one that this does not write."""
    for study, name in _preparing(path):
        if Path(path).name not in {f"{split}.jsonl" for split in (*SPLITS, *study.data.subsets)}:
            continue
        several = len(paths.studies()) > 1
        of_study = f" --study {study.folder.name}" if several else ""
        of_format = "" if name == next(iter(study.data.input_formats)) else f" --input-format {name}"
        fetched = all((study.data.raw / file).is_file() for file in study.data.files)
        first = "" if fetched else f"`recipe data fetch{f' {study.data.key}' if several else ''}` and "
        return f"{first}`recipe data prepare{of_study}{of_format}`"
    return None


def _preparing(path: str) -> Iterator[tuple[Study, str]]:
    """The studies, and the formats of their rows, that `recipe data prepare` writes to a path's folder."""
    for study in map(load, paths.studies()):
        for name, form in study.data.input_formats.items():
            if Path(form.folder) == Path(path).parent:
                yield study, name


def of(recipe: str) -> Study | None:
    """The study that a recipe belongs to by its name, or None."""
    folder = next((folder for folder in paths.studies() if recipe.startswith(f"{folder.name}/")), None)
    return load(folder) if folder else None


def entry(name: str, recipe: yamlfiles.Config) -> dict[str, Any]:
    """A recipe's model, epochs and optimizer, and its published scores."""
    of_study = of(name)
    published = of_study.published.get(name) if of_study else None
    return {
        "recipe": name,
        "base_model": recipe.get("base_model"),
        "epochs": recipe.get("num_epochs"),
        "optimizer": recipe.get("optimizer"),
        "published_bleu4": published.bleu4 if published else None,
        "published_bertscore_f1": published.bertscore_f1 if published else None,
    }
