"""Recipes rendered from templates, facts about base models, and new studies."""

import difflib
import os
import re
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from ..base import paths, yamlfiles
from ..base.errors import UserError, did_you_mean
from ..base.files import Row, read_json, write_atomically
from ..base.paths import template_environment
from ..base.yamlfiles import Config
from ..config import models
from ..data import studies
from ..data.studies import Study
from ..results import score_records

README = "README.md"
_SKELETON = ".txt"  # suffix of skeleton files, so that they do not count as templates or recipes
_REQUIRED = ("title", "licence")  # facts that every recipe states about its model
SPECIAL_TOKENS = "this project: the tokenizer names no padding token"
_NOT_KNOWN = "not known whether the tokenizer names a padding token; if not, Axolotl pads with EOS"

# Gemma 2 passes attn_logit_softcapping to its attention (transformers/models/gemma2/modeling_gemma2.py);
# transformers/integrations/sdpa_attention.py ignores it.
_SOFT_CAPS = "this project: sdpa omits the cap on attention scores, with which this model was trained"


@dataclass
class ModelFacts:
    """Facts that a recipe states about its base model.

    Attributes:
        title: the name of the model, in words.
        about: licence and access.
        revision: the commit to pin; None if unknown, with the reason in `revision_reason`.
        pad_token: the padding token to set, or None; the reason is in `pad_reason`.
        layers: the names of the linear layers; None if unknown.
        soft_caps: the reason for not using sdpa; empty if sdpa suits the model.
        unknown: the unknown facts, in words.
    """

    title: str
    about: str
    revision: str | None
    revision_reason: str
    pad_token: str | None
    pad_reason: str
    layers: tuple[str, ...] | None
    soft_caps: str
    unknown: list[str] = field(default_factory=list)

    def targets(self, wanted: list[str]) -> list[str]:
        """LoRA's target modules, by the names that they have in this model; see `models.renamed`."""
        return models.renamed(wanted, self.layers) if self.layers else wanted


def describe(entry: Config, name: str, folder: Path | None = None) -> ModelFacts:
    """Collect the facts that a recipe states about a base model.

    Args:
        entry: the model's entry in models.yaml, perhaps empty.
        name: the name on the hub, or the folder.
        folder: the folder with the model's files, which override the entry.
    """
    sizes = dict(entry.get("config") or {}) | (read_json(folder / "config.json") if folder else {})
    is_folder = Path(name).is_dir()
    pad_token, pad_reason = _padding(entry, folder)
    layers = models.LAYERS.get(str(sizes.get("model_type")))
    facts = {
        "licence": entry.get("licence"),
        "whether it is gated": is_folder or entry.get("gated") is not None,
        "revision": is_folder or entry.get("revision"),
        "padding token": pad_reason != _NOT_KNOWN,
        "special tokens": entry.get("special_tokens") or (folder and (folder / "tokenizer.json").is_file()),
        "type and sizes": all(size in sizes for size in models.NEEDED),
        "context": sizes.get("max_position_embeddings"),
        "linear layers": layers,
    }
    unpinned = "a folder has none" if is_folder else "models.yaml lists no commit, so a run uses the newest"
    return ModelFacts(
        title=str(entry.get("title", name)),
        about=f"licence {entry.get('licence', 'not known')}, {_access(entry, is_folder)}",
        revision=entry.get("revision"),
        revision_reason="this project: pinned" if entry.get("revision") else unpinned,
        pad_token=pad_token,
        pad_reason=pad_reason,
        layers=layers,
        soft_caps=_SOFT_CAPS if sizes.get("model_type") == "gemma2" else "",
        unknown=[fact for fact, is_known in facts.items() if not is_known],
    )


def _access(entry: Config, is_folder: bool) -> str:
    if is_folder:
        return "a folder on this machine"
    if entry.get("gated"):
        return f"gated: accept it on the hub and log in{', or use --profile mirror' if 'mirror' in entry else ''}"
    return "not gated" if "gated" in entry else "not known whether it is gated"


def _padding(entry: Config, folder: Path | None) -> tuple[str | None, str]:
    """Return the padding token for a recipe to set, or None, with the reason."""
    if folder and (folder / "tokenizer_config.json").is_file():
        own = models.token(folder, "pad_token")
    else:
        folder, own = None, entry.get("own_pad_token")
    if own:
        return None, f"the tokenizer has a padding token, {own}"
    if "pad_token" in entry:
        return str(entry["pad_token"]), str(entry.get("pad_reason", "the one in templates/models.yaml"))
    if not folder:
        return None, _NOT_KNOWN
    eos = models.token(folder, "eos_token")
    return (eos, "EOS, Axolotl's fallback; padding carries no label") if eos else (None, _NOT_KNOWN)


def rendered(templates: Path = paths.TEMPLATES) -> dict[str, str]:
    """Render a folder's templates: recipes, and their README.md if it has a template.

    Returns:
        Texts by file name below recipes/.

    Raises:
        UserError: a template is broken or uses an undefined variable, or a record is invalid.
    """
    jinja = template_environment(templates)

    def text_of(template: str, **variables: Any) -> str:
        try:
            return jinja.get_template(template).render(template=f"templates/{template}", **variables)
        except UserError:
            raise
        except Exception as error:  # expressions in templates can raise any exception
            raise UserError(f"{_where(error, templates, templates / template)}: {error}") from None

    listed = next(filter(Path.is_file, (templates / "models.yaml", paths.TEMPLATES / "models.yaml")))
    models = yamlfiles.read_yaml(listed)

    def facts(base_model: str) -> ModelFacts:
        """Facts about a model from models.yaml.

        Raises:
            UserError: the model has no entry, or the entry lacks a required fact.
        """
        entry = models.get(base_model) or {}
        if absent := [fact for fact in _REQUIRED if not entry.get(fact)]:
            near = did_you_mean(base_model, models.keys() - {base_model})
            raise UserError(f"{listed}: {base_model}: add its {' and '.join(absent)}{near}")
        return describe(entry, base_model)

    recipes = {}
    starts: list[Row] = []
    by_study: dict[str, tuple[Study, list[Row]]] = {}
    for file in sorted(templates.rglob("*.yaml.j2")):
        if not file.name.startswith("_"):
            template = file.relative_to(templates).as_posix()
            name = template.removesuffix(".yaml.j2")
            text = text_of(template, name=name, facts=facts)
            recipes[f"{name}.yaml"] = text
            recipe = yamlfiles.parse(text, f"recipes/{name}.yaml") | {"name": name}
            if of_study := studies.study_of(name):
                by_study.setdefault(of_study.title, (of_study, []))[1].append(recipe)
            elif name.startswith("start/"):
                starts.append(recipe)
    if (templates / f"{README}.j2").is_file():
        sections = []
        for of_study, rows in by_study.values():
            statuses = score_records.statuses(of_study, score_records.shipped_records(of_study))
            label = of_study.first.label
            numbers = {number.of: number for number in statuses if number.metric == label and not number.cell}
            sections.append((of_study, rows, numbers))
        recipes[README] = text_of(f"{README}.j2", studies=sections, starts=starts)
    return recipes


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
    others = {*map(paths.recipe_file, paths.recipe_names())} - {recipes / name for name in files}
    return [
        f"{paths.shown(file)}: no template renders this recipe; delete the file, or add its template"
        for file in sorted(others)
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
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name):
        raise UserError(f"{name}: not a name for a study; use a-z, digits, -, _ and ., as in first-author-2026")
    recipes, templates = Path("recipes", name), Path("templates", name)
    for there in (*(folder for folder in paths.studies() if folder.name == name), recipes, templates):
        if there.exists():
            raise UserError(f"{paths.shown(there)}: exists already; choose another name, or move it away")
    model = f"{base_model.rpartition('/')[2].lower()}-{name}"  # no shipped recipe has this short name
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
    for file, place in places.items():
        text = (paths.TEMPLATES / "skeleton" / f"{file}{_SKELETON}").read_text(encoding="utf-8")
        for placeholder, word in words.items():
            text = text.replace(placeholder, word)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, text)
    return [*places.values(), *write(rendered(templates.parent), recipes.parent)]
