"""A study: the paper behind a folder of recipes, its data, its metrics and its published scores."""

import json
import re
from collections.abc import Collection, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.json_schema import SkipJsonSchema

from ..base import paths, yamlfiles
from ..base.errors import UserError, did_you_mean, meant
from ..base.progress import say_once
from ..metrics import registry
from ..metrics.metric import Column
from .declaration import FORMS, Data, Misdeclared, Strict, raise_all
from .published import TRAIN_LOSS, Baseline, Beside, Published, released, undeclared

SCHEMA = paths.RECIPES / "study.schema.json"
_Key = tuple[str, ...]  # in study.yaml
_OF_SCORES = (
    *("low", "high", "interval", "interval_method", "base_model", "published", "spread", "difference", "verdict"),
    "model",
)
"""What results say of a metric as METRIC_low and so on."""


class Decoding(Strict):
    """How predictions are generated, in transformers' terms; those behind do_sample and num_beams matter only when
    sampling. A top_k of 0 leaves all tokens to choose from."""

    max_new_tokens: int = Field(ge=1)
    do_sample: bool = False
    num_beams: int = Field(default=1, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    seed: int = 42


OF_NO_STUDY = Decoding(max_new_tokens=96)
"""How answers to rows of the user's own are generated."""


class Study(Strict):
    """The content of a study.yaml, and its folder.

    Attributes:
        tags: of the model cards of its runs.
        decodings: further ways to decode, each reported beside the first, by name.
        metrics: the declarations of the columns of scores, see `columns`.
        tolerances: by metric, the difference from a published score that is acceptable; for a curve as `train_loss`.
        stated_by: how the comment behind a recipe's setting begins where the authors state that.
        differences: what Axolotl does differently from the authors, in words.
        shown: the metrics that are columns of tables; by default all.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    folder: SkipJsonSchema[Path]
    title: str
    paper: dict[str, Any]
    tags: list[str] = Field(default=[])
    data: Data
    decoding: Decoding
    decodings: dict[str, Decoding] = Field(default={})
    metrics: dict[str, dict[str, Any] | None] = Field(min_length=1)
    published: dict[str, Published]
    beside: dict[str, Beside] = Field(default={})
    stated_by: list[str] = Field(default=["paper"])
    open_settings: list[str] = Field(default=[])
    tolerances: dict[str, float] = Field(default={})
    baselines: list[Baseline] = Field(default=[])
    differences: list[str] = Field(default=[])
    shown: list[str] = Field(default=[], alias="columns")

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The metrics that its runs are scored with, the first of which verdicts and sweeps take first."""
        return registry.columns(self.metrics)

    @property
    def first(self) -> Column:
        """The first of the metrics."""
        return next(iter(self.columns.values()))

    @property
    def table(self) -> dict[str, Column]:
        """The metrics that are columns of tables."""
        return {name: self.columns[name] for name in self.shown or self.columns}

    @property
    def cited(self) -> str:
        """Its paper in a few words, from what study.yaml gives."""
        paper = self.paper
        where = f"arXiv {paper['arxiv']}" if paper.get("arxiv") else paper.get("url")
        return ", ".join(str(part) for part in (paper.get("authors"), where) if part) or self.title

    @property
    def citation(self) -> str:
        """Its paper in Markdown, with title and link, from what study.yaml gives."""
        paper = self.paper
        arxiv = paper.get("arxiv")
        link = f"[arXiv {arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else paper.get("url")
        titled = ": ".join(str(part) for part in (paper.get("authors"), paper.get("title") or self.title) if part)
        return f"{titled}, {link}" if link else titled

    @property
    def test_title(self) -> str:
        """The rows that the published scores are on."""
        return self.data.title_of(self.data.scored_on)

    @model_validator(mode="after")
    def _has_its_files(self) -> Self:
        absent = [Misdeclared(str(mistake), "data", *mistake.at) for mistake in self.data.absent(self.folder)]
        raise_all([*absent, *undeclared(self.data, self.published, self.baselines)])
        return self

    @property
    def compared(self) -> list[Baseline]:
        """The baselines that runs are compared with."""
        return [baseline for baseline in self.baselines if baseline.compared]

    @property
    def fetched(self) -> list[str]:
        """The sources that `recipe data fetch` gets unless others are named: those that its recipes begin with, without
        what the authors published on the way."""
        extra = released(self.data, self.published, self.baselines)
        return [name for name in self.data.sources if name not in extra]

    def origin(self, recipe: str) -> str:
        """The study's own recipe that a recipe is a variant of, or is."""
        return self.beside[recipe].of if recipe in self.beside else recipe

    def repeats(self, recipe: str, metric: str) -> list[float]:
        """The published scores of repeats of a recipe, or of another one of the study where that has none; else empty,
        as where it is known of no recipe how far repeats lie apart."""
        recipes = [self.origin(recipe), *self.published]
        known = (self.published[name].repeats.get(metric) for name in recipes if name in self.published)
        return next(filter(None, known), [])

    def aimed_at(self, recipe: str) -> Published | None:
        """What was published of the recipe that a recipe aims at."""
        if recipe in self.beside and not self.beside[recipe].reproduces:
            return None
        return self.published.get(self.origin(recipe))


def generate_schema() -> str:
    """The JSON Schema of a study.yaml, for editors."""
    schema = Study.model_json_schema()
    schema["$defs"]["Score"] = {"anyOf": [{"type": "number"}, schema["$defs"]["Score"]]}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def load(folder: Path) -> Study:
    """The study of a folder of recipes.

    Raises:
        UserError: its study.yaml is malformed; it names every mistake, each with its line.
    """
    file = (folder / "study.yaml").absolute()
    return _load(file, file.stat().st_mtime_ns if file.exists() else 0)


@cache
def _load(file: Path, _: int) -> Study:
    folder, file = file.parent, Path(paths.shown(file))
    content = yamlfiles.read_yaml(file)
    problems: dict[_Key, str] = {}
    study = None
    try:
        study = Study.model_validate(content | {"folder": folder})
    except ValidationError as error:
        for found in error.errors():
            place = tuple(map(str, found["loc"]))
            if isinstance(cause := found.get("ctx", {}).get("error"), Misdeclared):
                problems |= {(*place, *mistake.at): str(mistake) for mistake in (cause, *cause.more)}
            else:
                problems[place] = yamlfiles.in_words(found, FORMS)
    problems |= dict(_of_metrics(content)) | dict(_contradictions(folder, content))
    if problems or study is None:
        lines = sorted((yamlfiles.line_of(file, key), ".".join(key), problem) for key, problem in problems.items())
        raise UserError("\n".join(f"{file}:{line}: {key}: {problem}" for line, key, problem in lines))
    return study


def _mapping(value: Any) -> dict[str, Any]:
    """A value if it is a mapping, otherwise an empty one; a malformed value is reported elsewhere."""
    return value if isinstance(value, dict) else {}


def _of_metrics(content: dict[str, Any]) -> Iterator[tuple[_Key, str]]:
    """What is wrong with the declarations of metrics."""
    for name, entry in _mapping(content.get("metrics")).items():
        try:
            registry.column(name, _mapping(entry))
        except registry.WrongMetric as error:
            for key, problem in error.problems.items():
                yield ("metrics", name, *filter(None, key.split("."))), problem


def _contradictions(folder: Path, content: dict[str, Any]) -> Iterator[tuple[_Key, str]]:
    """What a study names and does not declare."""
    published = {recipe: _mapping(of) for recipe, of in _mapping(content.get("published")).items()}
    lists = {key: content[key] if isinstance(content.get(key), list) else [] for key in ("columns", "baselines")}
    named: list[_Key] = [("tolerances", name) for name in _mapping(content.get("tolerances"))]
    named += [("columns", str(i), name) for i, name in enumerate(lists["columns"]) if isinstance(name, str)]
    for recipe, of in published.items():
        named += [("published", recipe, key, name) for key in ("scores", "repeats") for name in _mapping(of.get(key))]
        if isinstance(curve := of.get("curve"), str) and not (folder / curve).is_file():
            yield ("published", recipe, "curve"), f"no file {curve} lies beside study.yaml; add it"
    for i, baseline in enumerate(lists["baselines"]):
        scores = _mapping(_mapping(baseline).get("scores"))
        named += [("baselines", str(i), "scores", name) for name in scores]
    metrics = _mapping(content.get("metrics"))
    if any("curve" in of for of in published.values()):
        named = [key for key in named if key != ("tolerances", TRAIN_LOSS)]
    for *place, name in named:
        if name not in metrics:
            hint = did_you_mean(name, metrics) or f"; there are {', '.join(metrics)}"
            yield (*place, name), f"{name} is not one of the study's metrics{hint}"
    for recipe, beside in _mapping(content.get("beside")).items():
        if isinstance(origin := _mapping(beside).get("of"), str) and origin not in published:
            hint = did_you_mean(origin, published)
            yield ("beside", recipe, "of"), f"{origin} is not under published{hint}; add it there"
    for name in _mapping(content.get("decodings")):
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            yield ("decodings", name), "give it a name of letters, digits and _, which a folder and a column can have"
        elif name in _OF_SCORES:
            yield ("decodings", name), f"METRIC_{name} means something else in results; give it another name"


def find(name: str | None) -> Study:
    """The study of a name or a part of that; its name is its folder's below recipes/. None means the only one.

    Raises:
        UserError: there is none, or several are meant.
    """
    folders = {folder.name: folder for folder in paths.studies()}
    return load(folders[_only(name, folders, "study", "--study")])


def every() -> list[Study]:
    """All studies, in the order of their names, but malformed ones, which are reported."""
    return [study for folder in paths.studies() if (study := _loaded(folder))]


def _loaded(folder: Path) -> Study | None:
    try:
        return load(folder)
    except UserError as error:
        first = str(error).partition("\n")[0]
        say_once(f"warning: the study {folder.name} is left out: {first}; `recipe study check {folder.name}` lists all")
        return None


def option(study: Study) -> list[str]:
    """The option that names a study, where there are several."""
    return ["--study", study.folder.name] if len(paths.studies()) > 1 else []


def with_data(key: str | None) -> Study:
    """The first study on a data set, given by its name or a part of that, or by a study's. None means the only one.

    Raises:
        UserError: there is none, or several are meant.
    """
    if folder := next((folder for folder in paths.studies() if folder.name == key), None):
        return load(folder)
    studies: dict[str, Study] = {}
    for study in every():
        studies.setdefault(study.data.key, study)
    return studies[_only(key, studies, "data set")]


def _only(name: str | None, choices: Collection[str], what: str, option: str = "") -> str:
    if name is not None:
        return meant(name, choices, what)
    if len(choices) != 1:
        named = f"name the {what}{f' with {option}' if option else ''}"
        raise UserError(f"there are several: {', '.join(choices)}; {named}" if choices else f"there is no {what}")
    return next(iter(choices))


def input_format(path: str) -> str | None:
    """The format of the rows that `recipe data prepare` writes to a path; None for a file of another origin."""
    return next((name for _, name in preparing(path)), None)


def fetching(path: str) -> str | None:
    """What the user runs to have a file, or a folder with such, that a study's data set has beside its rows; None for
    any other path."""
    for study in every():
        raw = study.data.raw
        if Path(path).is_relative_to(raw) and any((raw / file).is_relative_to(path) for file in study.data.files):
            return f"`recipe data fetch {study.data.key}`"
    return None


def preparation(path: str) -> str | None:
    """What the user runs to have a file of prepared rows written; None for one that this does not write."""
    for study, name in preparing(path):
        if Path(path).name not in {f"{split}.jsonl" for split in (*study.data.splits, *study.data.subsets)}:
            continue
        of_study = "".join(f" {word}" for word in option(study))
        of_format = "" if name == next(iter(study.data.formats)) else f" --input-format {name}"
        fetched = all((study.data.raw / file).is_file() for file in study.data.raw_files)
        first = "" if fetched else f"`recipe data fetch{f' {study.data.key}' if of_study else ''}` and "
        return f"{first}`recipe data prepare{of_study}{of_format}`"
    return None


def preparing(path: str) -> Iterator[tuple[Study, str]]:
    """The studies, and the formats of their rows, that `recipe data prepare` writes to a path's folder."""
    for study in every():
        for name, form in study.data.formats.items():
            if Path(form.folder) == Path(path).parent:
                yield study, name


def of(recipe: str) -> Study | None:
    """The study that a recipe belongs to by its name, or None.

    Raises:
        UserError: it is malformed.
    """
    return load(folder) if (folder := _folder(recipe)) else None


def of_any(recipe: str) -> Study | None:
    """The study of one recipe among others, or None; also None where it is malformed, which is reported."""
    return _loaded(folder) if (folder := _folder(recipe)) else None


def _folder(recipe: str) -> Path | None:
    return next((folder for folder in paths.studies() if recipe.startswith(f"{folder.name}/")), None)


def entry(name: str, recipe: yamlfiles.Config, origin: str | None = None) -> dict[str, Any]:
    """A recipe's study, model, epochs and optimizer, and its published scores, each as `published_METRIC`.

    Args:
        name: the recipe's name.
        recipe: its settings.
        origin: the shipped recipe that it is a variant of.
    """
    of_study = of_any(origin or name)
    published = of_study.published.get(name) if of_study else None
    row = {
        "recipe": name,
        "study": of_study.folder.name if of_study else None,
        "base_model": recipe.get("base_model"),
        "epochs": recipe.get("num_epochs"),
        "optimizer": recipe.get("optimizer"),
    }
    for column in of_study.columns if of_study else ():
        score = published.scores.get(column) if published else None
        row[f"published_{column}"] = score.value if score else None
    return row
