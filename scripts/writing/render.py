"""Recipes rendered from templates, facts about base models, and new studies."""

import difflib
import os
import re
import traceback
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from ..base import paths, yamlfiles
from ..base.errors import UserError, did_you_mean
from ..base.files import Row, read_json, write_atomically
from ..base.paths import template_environment
from ..base.processes import bounded
from ..base.yamlfiles import Config
from ..config import models
from ..data import studies
from ..data.studies import Study
from ..results import score_records

README = "README.md"
_SKELETON = ".txt"  # suffix of skeleton files, so that they do not count as templates or recipes
_REQUIRED = ("title", "licence")  # facts that every recipe states about its model
SPECIAL_TOKENS = "this project: the tokenizer names no padding token"

# Gemma 2 passes attn_logit_softcapping to its attention (transformers/models/gemma2/modeling_gemma2.py);
# transformers/integrations/sdpa_attention.py ignores it.
_SOFT_CAPS = {"gemma2": "this project: sdpa omits the cap on attention scores, with which this model was trained"}
"""Reasons for not using sdpa, by model type."""


@dataclass
class ModelFacts:
    """Facts that a recipe states about its base model.

    Attributes:
        title: the name of the model, in words.
        about: licence and access.
        revision: the commit to pin; None if unknown, with the reason in `revision_reason`.
        pad_token: the padding token to set, or None; the reason is in `pad_reason`.
        layers: the names of the linear layers; empty if unknown.
        soft_caps: the reason for not using sdpa; empty if sdpa suits the model.
        unknown: the unknown facts, in words.
    """

    title: str
    about: str
    revision: str | None
    revision_reason: str
    pad_token: str | None
    pad_reason: str
    layers: tuple[str, ...]
    soft_caps: str
    unknown: list[str] = field(default_factory=list)

    def targets(self, wanted: list[str]) -> list[str]:
        """LoRA's target modules, by the names that they have in this model; see `models.renamed`."""
        return models.renamed(wanted, self.layers)


def describe(entry: Config, name: str, folder: Path) -> ModelFacts:
    """Collect the facts that a recipe states about a base model.

    Args:
        entry: the model's entry in models.yaml, perhaps empty.
        name: the name on the hub, or the folder.
        folder: the folder with the model's files, existing or not; they override the entry.
    """
    sizes = entry.get("config", {}) | read_json(folder / "config.json")
    kind = str(sizes.get("model_type"))
    pad_token, pad_reason = padding = _padding(entry, folder)
    facts = ModelFacts(
        title=str(entry.get("title", name)),
        about=f"licence {entry.get('licence', 'not known')}, {_access(entry, name)}",
        revision=entry.get("revision"),
        revision_reason=_revision_reason(entry, name),
        pad_token=pad_token,
        pad_reason=pad_reason,
        layers=models.LAYERS.get(kind, ()),
        soft_caps=_SOFT_CAPS.get(kind, ""),
    )
    is_known = {
        "licence": entry.get("licence"),
        "whether it is gated": "gated" in entry,
        "revision": facts.revision,
        "padding token": padding != _UNKNOWN_PADDING,
        "special tokens": entry.get("special_tokens"),
        "type and sizes": sizes.keys() >= models.NEEDED,
        "context": sizes.get("max_position_embeddings"),
        "linear layers": facts.layers,
    }
    if Path(name).is_dir():
        is_known |= {"whether it is gated": True, "revision": True}
    if (folder / "tokenizer.json").is_file():
        is_known["special tokens"] = True
    facts.unknown = [fact for fact in is_known if not is_known[fact]]
    return facts


def _access(entry: Config, name: str) -> str:
    """Access to a model's weights, in words."""
    if Path(name).is_dir():
        return "a folder on this machine"
    if "gated" not in entry:
        return "not known whether it is gated"
    if not entry["gated"]:
        return "not gated"
    if "mirror" in entry:
        return "gated: accept it on the hub and log in, or use --profile mirror"
    return "gated: accept it on the hub and log in"


def _revision_reason(entry: Config, name: str) -> str:
    if entry.get("revision"):
        return "this project: pinned"
    if Path(name).is_dir():
        return "a folder has none"
    return "models.yaml lists no commit, so a run uses the newest"


_UNKNOWN_PADDING = None, "not known whether the tokenizer names a padding token; if not, Axolotl pads with EOS"


def _padding(entry: Config, folder: Path) -> tuple[str | None, str]:
    """Padding token for a recipe to set, or None, with the reason; from the tokenizer or the entry in models.yaml."""
    token, eos = entry.get("own_pad_token"), None
    if (folder / "tokenizer_config.json").is_file():
        token, eos = models.token(folder, "pad_token"), models.token(folder, "eos_token")
    if token:
        return None, f"the tokenizer has a padding token, {token}"
    if "pad_token" in entry:
        return str(entry["pad_token"]), str(entry.get("pad_reason", "the one in templates/models.yaml"))
    if eos:
        return eos, "EOS, Axolotl's fallback; padding carries no label"
    return _UNKNOWN_PADDING


def rendered(templates: Path = paths.TEMPLATES, only: Collection[str] = ()) -> dict[str, str]:
    """Render a folder's templates: recipes, and their README.md if it has a template.

    Args:
        templates: the folder.
        only: studies whose recipes to render, without README.md; by default all.

    Returns:
        Texts by file name below recipes/.

    Raises:
        UserError: a template is broken, uses an undefined variable, or takes too long, or a record is invalid.
    """
    renderer = _Renderer(templates)
    recipes = renderer.recipes()
    files = {f"{recipe.name}.yaml": recipe.text for recipe in recipes}
    if only:
        return {name: text for name, text in files.items() if paths.study_name(name) in only}
    if (templates / f"{README}.j2").is_file():
        files[README] = renderer.readme(recipes)
    return files


@dataclass(frozen=True)
class _Recipe:
    """A rendered recipe."""

    name: str
    text: str
    content: Config


@dataclass
class _Renderer:
    """Renders the templates of a folder."""

    folder: Path

    @cached_property
    def _jinja(self) -> jinja2.Environment:
        return template_environment(self.folder)

    def recipes(self) -> list[_Recipe]:
        recipes = []
        for file in sorted(self.folder.rglob("*.yaml.j2")):
            if not file.name.startswith("_"):
                template = file.relative_to(self.folder).as_posix()
                name = template.removesuffix(".yaml.j2")
                text = self._text(template, name=name, facts=self._facts, axolotl=version("axolotl"))
                recipes.append(_Recipe(name, text, yamlfiles.parse(text, f"recipes/{name}.yaml")))
        return recipes

    def readme(self, recipes: list[_Recipe]) -> str:
        """Text of README.md, with a table of recipes for each study."""
        starts = []
        by_study: dict[str, tuple[Study, list[Row]]] = {}
        built_in = read_json(paths.HOURS)
        for recipe in recipes:
            row = recipe.content | {"name": recipe.name, "hours": built_in["recipes"].get(recipe.name)}
            study = studies.study_of(recipe.name)
            if study:
                by_study.setdefault(study.title, (study, []))[1].append(row)
            elif recipe.name.startswith("start/"):
                starts.append(row)
        sections = [(study, rows, _statuses(study)) for study, rows in by_study.values()]
        return self._text(f"{README}.j2", studies=sections, starts=starts, built_in=built_in)

    def _text(self, template: str, **variables: Any) -> str:
        try:
            with bounded(paths.shown(self.folder / template)):
                return self._jinja.get_template(template).render(template=f"templates/{template}", **variables)
        except UserError:
            raise
        except Exception as error:  # expressions in templates can raise any exception
            raise UserError(f"{_where(error, self.folder, self.folder / template)}: {error}") from None

    @cached_property
    def _models_file(self) -> Path:
        """Facts about models: the folder's, or else this project's."""
        file = self.folder / "models.yaml"
        return file if file.is_file() else paths.TEMPLATES / "models.yaml"

    @cached_property
    def _models(self) -> Config:
        return yamlfiles.read_yaml(self._models_file)

    def _facts(self, base_model: str) -> ModelFacts:
        """Facts about a model, for templates.

        Raises:
            UserError: the model has no entry, or the entry lacks a required fact.
        """
        entry = self._models.get(base_model) or {}
        absent = [fact for fact in _REQUIRED if not entry.get(fact)]
        if absent:
            near = did_you_mean(base_model, self._models.keys() - {base_model})
            raise UserError(f"{self._models_file}: {base_model}: add its {' and '.join(absent)}{near}")
        return describe(entry, base_model, models.NO_FOLDER)  # a recipe is the same on every machine


def _statuses(study: Study) -> dict[str, score_records.Status]:
    """Status of a study's first metric, by recipe."""
    statuses = score_records.statuses(study, score_records.built_in_records(study))
    return {status.name: status for status in statuses if status.metric == study.first.name and not status.settings}


def _where(error: Exception, templates: Path, file: Path) -> str:
    """Return the template and line of an error, or `file` if the line is unknown."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename}:{frame.lineno}" for frame in frames if frame.filename.startswith(str(templates))]
    return places[-1] if places else str(file)


def drift(files: dict[str, str], recipes: Path = paths.RECIPES) -> str:
    """Unified diff from files on disk to rendered files; empty if they are equal."""
    lines: list[str] = []
    for name in sorted(files):
        lines += difflib.unified_diff(
            _on_disk(recipes / name).splitlines(),
            files[name].splitlines(),
            f"recipes/{name} (on disk)",
            f"recipes/{name} (from its template)",
            lineterm="",
        )
    return "\n".join(lines)


def orphans(files: dict[str, str], recipes: Path = paths.RECIPES) -> list[str]:
    """Messages about recipes on disk that no template renders."""
    unrendered = {*map(paths.recipe_file, paths.recipe_names())} - {recipes / name for name in files}
    return [
        f"{paths.shown(file)}: no template renders this recipe; delete the file, or add its template"
        for file in sorted(unrendered)
        if file.is_relative_to(recipes)
    ]


def write(files: dict[str, str], recipes: Path = paths.RECIPES) -> list[Path]:
    """Write rendered files that differ from those on disk; return the written files."""
    changed = {recipes / name: text for name, text in files.items() if _on_disk(recipes / name) != text}
    for file, text in changed.items():
        write_atomically(file, text)
    return list(changed)


def _on_disk(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def write_study(name: str, base_model: str) -> list[Path]:
    """Write a working study below recipes/ and templates/, and render its recipe.

    Args:
        name: the name of the study and its folders.
        base_model: the base model of the only recipe, which is named after the model.

    Returns:
        The files.

    Raises:
        UserError: the name is invalid, or belongs to an existing study or folder.
    """
    recipes, templates = free_folders(name)
    model = f"{base_model.rpartition('/')[2].lower()}-{name}"  # no built-in recipe has this short name
    words = {
        "{NAME}": name,
        "{MODEL}": model,
        "{BASE_MODEL}": base_model,
        "{STUDY_SCHEMA}": os.path.relpath(studies.SCHEMA, recipes),
        "{SCHEMA}": os.path.relpath(paths.RECIPES / "axolotl.schema.json", recipes),
    }
    places = {
        "study.yaml": recipes / "study.yaml",
        "_base.yaml.j2": templates / "_base.yaml.j2",
        "recipe.yaml.j2": templates / f"{model}.yaml.j2",
        "sample/train.jsonl": recipes / "sample" / "train.jsonl",
        "sample/test.jsonl": recipes / "sample" / "test.jsonl",
    }
    files = {}
    for file, place in places.items():
        text = (paths.TEMPLATES / "skeleton" / f"{file}{_SKELETON}").read_text(encoding="utf-8")
        for placeholder, word in words.items():
            text = text.replace(placeholder, word)
        files[place] = text
    return write_files(name, files)


def write_files(study: str, files: dict[Path, str]) -> list[Path]:
    """Write the files of a study below recipes/ and templates/, and render its recipes; return all files."""
    for file, text in files.items():
        write_atomically(file, text)
    return [*files, *write(rendered(Path("templates"), [study]), Path("recipes"))]


def free_folders(name: str) -> tuple[Path, Path]:
    """Folders of a new study, below recipes/ and templates/.

    Raises:
        UserError: the name is invalid, or belongs to an existing study or folder.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name):
        raise UserError(f"{name}: not a name for a study; use a-z, digits, -, _ and ., as in first-author-2026")
    recipes, templates = Path("recipes", name), Path("templates", name)
    for folder in (paths.RECIPES / name, recipes, templates):
        if folder.exists():
            raise UserError(f"{paths.shown(folder)}: exists already; choose another name, or move it away")
    return recipes, templates
