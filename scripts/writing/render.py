"""Recipes rendered from templates, the facts that they state of base models, and a new study."""

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
from ..configs import ledger, models
from ..data import study
from ..data.study import Study

README = "README.md"
_SKELETON = ".txt"  # so that no file of the skeleton is taken for a template or a recipe
_STUDY = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_REQUIRED = ("title", "licence")  # facts that a recipe states of every model
SPECIAL_TOKENS = "this project: the tokenizer names no padding token"
_EOS = "EOS, as Axolotl falls back to; padding carries no label"
_NOT_KNOWN = "not known whether the tokenizer names a padding token; Axolotl pads with EOS where it names none"

# Gemma 2 passes attn_logit_softcapping to its attention (transformers/models/gemma2/modeling_gemma2.py); the one in
# transformers/integrations/sdpa_attention.py does not take it.
_SOFT_CAPS = "this project: sdpa leaves out the cap on attention scores that this model was trained with"


@dataclass
class BaseModel:
    """Facts that a recipe states of its base model.

    Attributes:
        title: its name in words.
        about: its licence, and whether it is gated.
        revision: the commit to pin; None where none is known, for the reason that `revision_reason` gives.
        pad_token: the padding token to set; None where none is to be set. `pad_reason` says why.
        layers: the names of its linear layers; None where they are not known.
        soft_caps: why sdpa is not for it; empty where it is.
        unknown: the facts that are not known, in words.
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
        """Layers for LoRA under the names that they have in this model, as `models.renamed` gives them."""
        return models.renamed(wanted, self.layers) if self.layers else wanted


def describe(entry: Config, name: str, folder: Path | None = None) -> BaseModel:
    """Facts that a recipe states of a base model.

    Args:
        entry: the facts of models.yaml, none where it has none.
        name: its name on the hub, or its folder.
        folder: the folder with its files, which are believed before the entry.
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
    unpinned = "a folder has none" if is_folder else "no commit of this model is listed, so that a run takes the newest"
    return BaseModel(
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
        return "a folder of this machine"
    if entry.get("gated"):
        return f"gated: accept it on the hub and log in{', or use --profile mirror' if 'mirror' in entry else ''}"
    return "not gated" if "gated" in entry else "not known whether it is gated"


def _padding(entry: Config, folder: Path | None) -> tuple[str | None, str]:
    """The padding token that a recipe sets, or None; and the reason."""
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
    return (eos, _EOS) if eos else (None, _NOT_KNOWN)


def rendered(templates: Path = paths.TEMPLATES) -> dict[str, str]:
    """The text of every recipe by file name below recipes/, from the templates of one folder; and of their table, if it
    has a template for that.

    Raises:
        UserError: a template is broken or uses a variable that nothing sets, or a record of a run
            is wrong.
    """
    jinja = template_environment(templates)

    def text_of(template: str, **variables: Any) -> str:
        try:
            return jinja.get_template(template).render(template=f"templates/{template}", **variables)
        except UserError:
            raise
        except Exception as error:  # an expression in a template can raise anything
            raise UserError(f"{_where(error, templates, templates / template)}: {error}") from None

    listed = next(filter(Path.is_file, (templates / "models.yaml", paths.TEMPLATES / "models.yaml")))
    models = yamlfiles.read_yaml(listed)

    def facts(base_model: str) -> BaseModel:
        """Facts of a model in the templates' models.yaml.

        Raises:
            UserError: it has no entry, or the entry lacks what every recipe states.
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
            if of_study := study.of(name):
                by_study.setdefault(of_study.title, (of_study, []))[1].append(recipe)
            elif name.startswith("start/"):
                starts.append(recipe)
    if (templates / f"{README}.j2").is_file():
        studies = []
        for of_study, rows in by_study.values():
            records = ledger.records(of_study, strict=True)
            studies.append((of_study, rows, ledger.statuses(of_study, records), ledger.table(of_study, records)))
        recipes[README] = text_of(f"{README}.j2", studies=studies, starts=starts)
    return recipes


def _where(error: Exception, templates: Path, file: Path) -> str:
    """The template and line in which an error arose, which may be a base that `file` extends."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename}:{frame.lineno}" for frame in frames if frame.filename.startswith(str(templates))]
    return places[-1] if places else str(file)


def drift(files: dict[str, str], recipes: Path = paths.RECIPES) -> str:
    """Unified diff from the files on disk to the rendered ones; empty without drift."""
    there = {
        file.relative_to(recipes).as_posix()
        for file in map(paths.recipe_file, paths.recipe_names())
        if file.is_relative_to(recipes)
    }
    lines: list[str] = []
    for name in sorted(there | files.keys()):
        lines += difflib.unified_diff(
            _on_disk(recipes / name).splitlines(),
            files.get(name, "").splitlines(),
            f"recipes/{name} (on disk)",
            f"recipes/{name} (from its template)",
            lineterm="",
        )
    return "\n".join(lines)


def write(files: dict[str, str], recipes: Path = paths.RECIPES) -> list[Path]:
    """Write each file that differs from the rendered one; return the written files."""
    changed = {recipes / name: text for name, text in files.items() if _on_disk(recipes / name) != text}
    for file, text in changed.items():
        write_atomically(file, text)
    return list(changed)


def _on_disk(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def write_study(name: str, base_model: str) -> list[Path]:
    """Write a working study below recipes/ and templates/, and render its recipe.

    Args:
        name: the study's; it becomes the folders' name.
        base_model: of its one recipe, which is named after it.

    Returns:
        The files.

    Raises:
        UserError: the name cannot be a folder's, or there is a study or a folder of that name.
    """
    if not _STUDY.fullmatch(name):
        raise UserError(f"{name}: a study is named in lower-case letters, digits, -, _ and ., as first-author-2026")
    recipes, templates = Path("recipes", name), Path("templates", name)
    for there in (*(folder for folder in paths.studies() if folder.name == name), recipes, templates):
        if there.exists():
            raise UserError(f"{paths.shown(there)}: there already; choose another name, or move it away")
    model = f"{base_model.rpartition('/')[2].lower()}-{name}"  # no shipped recipe's short name
    words = {
        "{NAME}": name,
        "{MODEL}": model,
        "{BASE_MODEL}": base_model,
        "{STUDY_SCHEMA}": os.path.relpath(study.SCHEMA, recipes),
        "{SCHEMA}": os.path.relpath(paths.RECIPES / "axolotl.schema.json", recipes),
    }
    skeleton = paths.TEMPLATES / "skeleton"
    places = {
        "study.yaml": recipes / "study.yaml",
        "_base.yaml.j2": templates / "_base.yaml.j2",
        "recipe.yaml.j2": templates / f"{model}.yaml.j2",
        "sample/train.jsonl": recipes / "sample" / "train.jsonl",
        "sample/test.jsonl": recipes / "sample" / "test.jsonl",
    }
    for file, place in places.items():
        text = (skeleton / f"{file}{_SKELETON}").read_text(encoding="utf-8")
        for placeholder, word in words.items():
            text = text.replace(placeholder, word)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, text)
    return [*places.values(), *write(rendered(templates.parent), recipes.parent)]
