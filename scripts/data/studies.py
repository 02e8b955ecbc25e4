"""Study behind a folder of recipes: paper, data, metrics and published scores."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic.json_schema import SkipJsonSchema

from ..base import paths, yamlfiles
from ..base.errors import UserError, meant, recipe_command, require_plain
from ..base.terminal import warn_once
from ..base.yamlfiles import Config
from ..metrics import registry
from ..metrics.answers import GroupParameters
from ..metrics.metric import BenchmarkMetric, Column
from .declaration import Data, Mistake, Name, Strict, undeclared
from .published import TRAIN_LOSS, Ablation, Baseline, GridPoint, Log, Published, released

SCHEMA = paths.RECIPES / "study.schema.json"


class Decoding(Strict):
    """Decoding configuration, with the keys of transformers.

    Only sampling uses temperature, top_p, top_k and seed. A top_k of 0 allows all tokens.
    """

    max_new_tokens: int = Field(ge=1)
    do_sample: bool = False
    num_beams: int = Field(default=1, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    seed: int = 42


OF_NO_STUDY = Decoding(max_new_tokens=96)
"""Decoding for runs without a study."""


class Study(Strict):
    """Content of study.yaml, and its folder.

    Attributes:
        tags: tags for model cards.
        decodings: further decoding configurations by name; their scores appear beside the default's.
        metrics: declarations of the metrics by name, see `columns`.
        ablations: recipes that the authors did not publish.
        reported: settings that the authors report, at least for one recipe; top-level keys of Axolotl.
        unreported: settings that they leave open in some or all recipes; the likeliest cause of another score first.
        tolerances: acceptable differences from published scores by metric; `train_loss` for a curve.
        differences: descriptions of differences between Axolotl and the authors' code.
        shown: metrics with a column in tables; by default all.
    """

    folder: SkipJsonSchema[Path]
    title: str
    paper: Config = Field(default={})
    tags: list[str] = Field(default=[])
    data: Data
    decoding: Decoding = OF_NO_STUDY
    decodings: dict[Name, Decoding] = Field(default={})
    metrics: dict[str, Config | None] = Field(min_length=1)
    published: dict[str, Published] = Field(min_length=1)
    ablations: dict[str, Ablation] = Field(default={})
    reported: list[str] = Field(default=[])
    unreported: list[str] = Field(default=[])
    tolerances: dict[str, float] = Field(default={})
    baselines: list[Baseline] = Field(default=[])
    differences: list[str] = Field(default=[])
    shown: list[str] = Field(default=[])

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Metrics by name; the first decides verdicts and sweeps."""
        return registry.columns(self.metrics)

    @property
    def first(self) -> Column:
        """First metric."""
        return next(iter(self.columns.values()))

    @property
    def table(self) -> dict[str, Column]:
        """Metrics with a column in tables."""
        return {name: self.columns[name] for name in self.shown or self.columns}

    @property
    def recipes(self) -> list[str]:
        """Names of the published recipes, then of their ablations."""
        return [*self.published, *self.ablations]

    @property
    def cited(self) -> str:
        """Short citation of the paper."""
        paper = self.paper
        where = f"arXiv {paper['arxiv']}" if paper.get("arxiv") else paper.get("url")
        return ", ".join(str(part) for part in (paper.get("authors"), where) if part) or self.title

    @property
    def test_title(self) -> str:
        """Description of the rows behind the published scores."""
        if isinstance(self.first.metric, BenchmarkMetric):
            return "the benchmark's own rows"
        return self.data.title_of(self.data.test_set)

    @property
    def default_sources(self) -> list[str]:
        """Default sources of `recipe data fetch`: all except published predictions and adapters."""
        extra = released(self.data, self.published, self.baselines)
        return [name for name in self.data.sources if name not in extra]

    def origin(self, recipe: str) -> str:
        """Published recipe that an ablation is based on; other recipes are returned unchanged."""
        return self.ablations[recipe].parent if recipe in self.ablations else recipe

    def log(self, recipe: str) -> Log | None:
        """Published figures of a recipe's training; None without any."""
        part = self.ablations.get(recipe) or self.published.get(recipe)
        return part.log if part else None

    def repeats(self, recipe: str, metric: str) -> list[float]:
        """Published scores of a recipe's repeated runs; if it has none, those of the first recipe that has some."""
        recipes = [self.origin(recipe), *self.published]
        for name in recipes:
            if name in self.published and self.published[name].repeats.get(metric):
                return self.published[name].repeats[metric]
        return []

    def grid_point(self, recipe: str, changes: Mapping[str, Any]) -> GridPoint | None:
        """Published grid point for a recipe with changed settings.

        Its settings must be those of the changed recipe, and cover every change.
        """
        published = self.published.get(self.origin(recipe))
        if published is None or not published.grid:
            return None
        changed = {**yamlfiles.read_yaml(paths.recipe_file(recipe)), **changes}
        for grid_point in published.grid:
            if grid_point.settings.items() <= changed.items() and changes.keys() <= grid_point.settings.keys():
                return grid_point
        return None

    def reported_settings(self, recipe: str) -> set[str]:
        """Settings that the authors report for a published recipe."""
        return {*self.reported} - {*self.published[recipe].unreported}

    def reproduced(self, recipe: str) -> str:
        """Published recipe that an ablation reproduces; other recipes are returned unchanged."""
        ablation = self.ablations.get(recipe)
        return ablation.parent if ablation and ablation.reproduces else recipe

    def aimed_at(self, recipe: str) -> Published:
        """Published results that a recipe should reach; empty for other recipes."""
        return self.published.get(self.reproduced(recipe), Published())

    def mistakes(self) -> Iterator[Mistake]:
        """Yield invalid metrics, undeclared names and missing files."""
        yield from self._mistakes_in_metrics()
        yield from self.data.mistakes(self.folder)
        metrics = list(self.metrics)
        for name in self.tolerances:
            yield from undeclared(("tolerances", name), name, [*metrics, TRAIN_LOSS])
        for i, name in enumerate(self.shown):
            yield from undeclared(("shown", str(i)), name, metrics)
        for name, published in self.published.items():
            yield from published.mistakes(("published", name), metrics, self.data, self.folder)
        for name, ablation in self.ablations.items():
            yield from undeclared(("ablations", name, "parent"), ablation.parent, self.published)
            if ablation.log:
                yield from ablation.log.mistakes(("ablations", name, "log"), self.folder)
        for i, baseline in enumerate(self.baselines):
            yield from baseline.mistakes(("baselines", str(i)), metrics, self.data)

    def _mistakes_in_metrics(self) -> Iterator[Mistake]:
        """Invalid metrics, and two metrics with the same label."""
        labels: dict[str, str] = {}
        for name, entry in self.metrics.items():
            try:
                column = registry.column(name, entry)
            except registry.WrongMetric as error:
                yield ("metrics", name, *filter(None, error.key.split("."))), error.problem
                continue
            if isinstance(column.parameters, GroupParameters):
                yield from undeclared(("metrics", name, "of"), column.parameters.of, self.metrics)
            if labels.setdefault(column.label, name) != name:
                yield ("metrics", name), f"expected a label other than that of {labels[column.label]}"


def load(folder: Path) -> Study:
    """Load the study in a folder of recipes.

    Raises:
        UserError: study.yaml is malformed; the error lists every mistake with its line.
    """
    file = (folder / "study.yaml").absolute()
    return _load(file, file.stat().st_mtime_ns)


@cache
def _load(file: Path, _: int) -> Study:
    require_plain(file.parent.name)
    folder, file = file.parent, Path(paths.shown(file))
    content = yamlfiles.read_yaml(file, yamlfiles.WrittenLoader) | {"folder": folder}
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        raise refusal(file, map(_mistake, error.errors())) from None
    if mistakes := list(study.mistakes()):
        raise refusal(file, mistakes)
    return study


def _mistake(error: Any) -> Mistake:
    """Convert a pydantic error; leave pydantic's marker `[key]` out of the path of keys."""
    place = tuple(str(part) for part in error["loc"] if part != "[key]")
    if error["type"] == "extra_forbidden":
        return place, "unknown key; correct or delete it"
    if error["type"] == "missing":
        return place, "missing; add this key"
    return place, yamlfiles.in_words(error)


def refusal(file: Path, mistakes: Iterable[Mistake]) -> UserError:
    """Error that lists mistakes in study.yaml by line."""
    lines = sorted((yamlfiles.line_of(file, key), ".".join(key), problem) for key, problem in mistakes)
    first, *further = [UserError(problem, file=file, line=line, key=key) for line, key, problem in lines]
    first.further = further
    return first


def find(name: str) -> Study:
    """Find a study by its folder's name or part of it.

    Raises:
        UserError: no study or several studies match.
    """
    folders = {folder.name: folder for folder in paths.studies()}
    return load(folders[meant(name, folders, "study")])


def load_all() -> list[Study]:
    """All studies; malformed ones are reported and left out."""
    return [study for study in map(_loaded, paths.studies()) if study]


def _loaded(folder: Path) -> Study | None:
    try:
        return load(folder)
    except UserError as error:
        hint = f"see {recipe_command('study', 'check', folder.name)}"
        warn_once(f"warning: the study {folder.name} is left out: {error.summary}; {hint}")
        return None


def find_by_data(key: str) -> Study:
    """Find the first study that uses a data set.

    `key` is the data set's name, a part of it, or a study's name.

    Raises:
        UserError: no data set or several data sets match.
    """
    for folder in paths.studies():
        if folder.name == key:
            return load(folder)
    studies: dict[str, Study] = {}
    for study in load_all():
        studies.setdefault(study.data.key, study)
    return studies[meant(key, studies, "data set")]


def fetch_command(path: str) -> str | None:
    """Command that fetches a study's raw file or folder; None for other paths."""
    for study in load_all():
        raw = study.data.raw
        files = [file for file in study.data.files if (raw / file).is_relative_to(path)]
        if files and Path(path).is_relative_to(raw):
            return study.data.fetch_command(study.data.sources_of(files))
    return None


def prepare_commands(path: str) -> str | None:
    """Commands that write a file of prepared rows; None for other files."""
    for study, _ in prepared_formats(path):
        if Path(path).name in {f"{split}.jsonl" for split in (*study.data.splits, *study.data.subsets)}:
            fetch = recipe_command("data", "fetch", study.data.key)
            return f"{fetch} and {recipe_command('data', 'prepare', '--study', study.folder.name)}"
    return None


def prepared_formats(path: str) -> Iterator[tuple[Study, str]]:
    """Yield studies that prepare rows in a path's folder, each with the format of those rows."""
    for study in load_all():
        for name, form in study.data.formats.items():
            if Path(form.folder) == Path(path).parent:
                yield study, name


def study_of(recipe: str) -> Study | None:
    """Study of a recipe, by the recipe's name; None without a study.

    Raises:
        UserError: the study is malformed.
    """
    folder = _folder(recipe)
    return load(folder) if folder else None


def decoding_of(study: Study | None, name: str | None) -> Decoding:
    """Return the named decoding configuration; without a name, the study's default.

    Raises:
        UserError: the study declares no decoding of that name.
    """
    if name is None:
        return study.decoding if study else OF_NO_STUDY
    declared = study.decodings if study else {}
    if name not in declared:
        names = ", ".join(declared) or "none"
        raise UserError(f"not declared under decodings in study.yaml, which has {names}", key=f"--decoding {name}")
    return declared[name]


def usable_study_of(recipe: str) -> Study | None:
    """Study of a recipe; None if it has none, or if the study is malformed, which is logged."""
    folder = _folder(recipe)
    return _loaded(folder) if folder else None


def _folder(recipe: str) -> Path | None:
    """Folder of a recipe's study, found without a listing of all recipes, which is slow."""
    name, slash, _ = recipe.partition("/")
    if slash:
        for recipes, _ in paths.homes():
            if (recipes / name / "study.yaml").is_file():
                return recipes / name
    return None
