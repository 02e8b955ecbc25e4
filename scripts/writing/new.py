"""Variants written by `recipe new`: a recipe's whole text with some keys changed, also for another base model."""

import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..base import paths, yamlfiles
from ..base.errors import UserError, did_you_mean
from ..base.files import write_atomically
from ..base.yamlfiles import Config
from ..configs import config, datafiles, models
from ..data import study
from .edit import edited
from .render import SPECIAL_TOKENS, BaseModel, describe

HELD_OUT = 0.05
"""Share of the rows for the eval loss, where a recipe states none."""
_SCHEMA = re.compile(r"(# yaml-language-server: \$schema=)\S+(.*\n)")
_ABSENT = re.compile(r"(?m)^# (variant, removed: )?(revision_of_model|special_tokens)( is not set:|;) .*\n")
"""Comments on keys of the base model that a recipe lacks."""
# Keys whose values are about one model, beside those that are set anew for another
_OF_ONE_MODEL = (
    *("tokenizer_config", "tokenizer_type", "model_type", "base_model_config", "processor_type"),
    *("added_tokens_overrides", "overrides_of_model_config", "model_config", "model_revision"),
    *("is_falcon_derived_model", "is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model"),
)


@dataclass
class Change:
    """Change of a key: value (None deletes it) and comment (None keeps the old one)."""

    value: Any
    source: str | None = None


@dataclass
class OtherModel:
    """A base model that takes the place of a recipe's.

    Attributes:
        about: what the recipe says of it.
        changes: by top-level key.
        not_known: lines about missing facts and foreign templates.
    """

    about: BaseModel
    changes: dict[str, Change]
    not_known: list[str]

    @property
    def overrides(self) -> list[str]:
        """The changes, as --set takes them."""
        return [f"{key}={yamlfiles.write_flow(change.value)}" for key, change in self.changes.items()]


def for_model(base: str, name: str) -> OtherModel:
    """Changes of a recipe or file for another base model.

    Args:
        base: the recipe or file.
        name: the model, as owner/name on the hub or a folder.

    Raises:
        UserError: there is no such folder, or it is the recipe's own model.
    """
    recipe = yamlfiles.read_yaml(paths.find_recipe(base)[1])
    if models.is_path(name) and not Path(name).is_dir():
        raise UserError(f"--model {name}: no such folder; give a folder or a model of the hub as owner/name")
    if name == recipe.get("base_model"):
        raise UserError(f"--model {name}: it is the model of {base}")
    entry = models.entry_of(name)
    folder = models.folder_of({"base_model": name, "revision_of_model": entry.get("revision")})
    about = describe(entry, name, folder)
    changes = {
        "base_model": Change(name, "chosen by --model"),
        "revision_of_model": Change(about.revision, about.revision_reason),
        "special_tokens": Change(None, about.pad_reason),
    }
    if about.pad_token:
        changes["special_tokens"] = Change({"pad_token": about.pad_token}, f"{SPECIAL_TOKENS}; {about.pad_reason}")
    changes |= {key: Change(None, "it is about one model") for key in _OF_ONE_MODEL if key in recipe}
    targets = recipe.get("lora_target_modules")
    if isinstance(targets, list) and (renamed := about.targets(targets)) != targets:
        changes["lora_target_modules"] = Change(renamed)
    before = str(recipe.get("base_model"))
    attention = recipe.get("attn_implementation")
    if about.soft_caps and attention == "sdpa":
        changes["attn_implementation"] = Change("eager", about.soft_caps)
    elif not about.soft_caps and attention == "eager" and describe(models.entry_of(before), before).soft_caps:
        changes["attn_implementation"] = Change("sdpa", "as for models that put no cap on attention scores")
    lines = _chat_templates(recipe, folder, entry, changes)
    if about.unknown:
        pinned = f" --revision {about.revision}" if about.revision else ""
        fetch = f"; `hf download {name}{pinned} --include '*.json'` fetches what says more, for a second try"
        in_files = not folder and {"padding token", "special tokens", "type and sizes"} & set(about.unknown)
        hint = "" if entry or folder else did_you_mean(name, models.catalogue())
        lines.insert(0, f"not known of {name}: {', '.join(about.unknown)}{fetch if in_files else ''}{hint}")
    return OtherModel(about, changes, lines)


def for_data(base: str, file: Path) -> list[str]:
    """The overrides that train a recipe or file on a file of rows, with a held-out share.

    Raises:
        UserError: see `datafiles.entry_for`.
    """
    recipe = yamlfiles.read_yaml(paths.find_recipe(base)[1])
    entry = datafiles.entry_for(file)
    changes: Config = {"datasets": [entry]}
    if entry["type"] != "chat_template":
        changes |= {key: None for key in ("chat_template", "chat_template_jinja") if key in recipe}
    elif not recipe.get("chat_template"):
        changes["chat_template"] = "tokenizer_default"
    if not recipe.get("val_set_size"):
        changes |= {"test_datasets": None} if recipe.get("test_datasets") else {}
        changes["val_set_size"] = HELD_OUT
    return [f"{key}={yamlfiles.write_flow(value)}" for key, value in changes.items()]


def reasons(base: str, composed: Config) -> list[str]:
    """Lines that say what a variant for other rows has chosen, and why."""
    entry = {key: value for key, value in composed["datasets"][0].items() if key != "path"}
    template = composed.get("chat_template")
    return [
        f"settings: those of {base}; each line names its source",
        f"model: {composed['base_model']}; --model names another",
        f"rows: {yamlfiles.write_flow(entry)[1:-1]}, by the fields of the first row",
        *([f"chat template: {template}, as the model was trained to chat"] if template else []),
        f"held out: {composed['val_set_size']} of the rows, for the eval loss and `recipe evaluate`",
    ]


def of_hardware(base: str) -> Iterator[str]:
    """A line with the settings of a base that its study chose for its own GPU, where study.yaml lists them."""
    name, file = paths.find_recipe(base)
    of_study, recipe = study.of(config.origin_of(name, file) or name), yamlfiles.read_yaml(file)
    keys = of_study.paper.get("hardware_settings", []) if of_study else []
    if of_study and (chosen := {key: recipe[key] for key in keys if key in recipe}):
        settings = yamlfiles.write_flow(chosen)[1:-1]
        yield f"chosen for the paper's {of_study.paper['hardware']}: {settings}; start/qlora has those of a current GPU"


def _chat_templates(recipe: Config, folder: Path | None, entry: Config, changes: dict[str, Change]) -> list[str]:
    """Replace another model's chat template by the tokenizer's own; a line for each that stays."""
    named = {"chat_template": recipe.get("chat_template")}
    for key, dataset in datafiles.datasets(recipe):
        named[f"{key}.chat_template"] = dataset.get("chat_template")
    foreign = {
        key: name for key, name in named.items() if name and not str(name).startswith(("tokenizer_default", "jinja"))
    }
    if "chat_template" in foreign and (entry.get("chat") or models.chat_template(folder)):
        changes["chat_template"] = Change("tokenizer_default", "the one that comes with the model")
        del foreign["chat_template"]
    return [f"{key} stays {name}: see whether it is the model's" for key, name in foreign.items()]


def write(name: str, base: str, overrides: list[str], other: OtherModel | None = None) -> Path:
    """Write a variant of a recipe or file to variants/<name>.yaml.

    Args:
        name: its name.
        base: what it is a variant of.
        overrides: as `key=value`, what is changed.
        other: the base model that takes the place of its own.

    Raises:
        UserError: the name is taken or cannot be one, or a key cannot be changed.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name) or name.endswith((".yaml", ".yml")):
        raise UserError(f"{name}: no name for a variant; take letters, digits, - and _, as in my-ideas/wide")
    file = paths.VARIANTS / f"{name}.yaml"
    if name in paths.recipe_names() or file.exists():
        raise UserError(f"{name}: there is a recipe of that name; choose another")
    base_name, base_file = paths.find_recipe(base)
    if base_name not in (*paths.recipe_names(), *paths.variant_names()):
        base_name = paths.shown(base_file)
    text = yamlfiles.read_text(base_file)
    recipe = yamlfiles.parse(text, str(base_file))
    changes = dict(other.changes) if other else {}
    for key, value in map(config.parse_override, overrides):
        top = key.partition(".")[0]
        if other and top == "base_model":
            raise UserError("--set base_model: --model names it already")
        if other and top in other.changes:
            below = config.override({top: changes[top].value}, key, value).get(top)
            changes[top] = Change(below, "chosen by --set")
        else:
            changes[key] = Change(value)
    if "output_dir" in recipe:  # so that plain Axolotl leaves the other's alone
        changes["output_dir"] = Change(f"outputs/{name}")
    if other:
        text = _ABSENT.sub("", text)
    for key, change in changes.items():
        text = edited(text, key, change.value, str(base_file), change.source)
    editor = _SCHEMA.match(text)
    text = text[editor.end() :] if editor else text
    schema = os.path.relpath(paths.RECIPES / "axolotl.schema.json", file.parent)  # where it is from there
    head = f"{editor[1]}{schema}{editor[2]}" if editor else ""
    head += f"# {name}: a variant of {base_name}\n"
    head += f"# `recipe diff {name}` lists what it changes, `recipe run {name}` trains it.\n"
    if other:
        rest = "the other settings are as they were"
        text = _for_other_model(text, base, base_name, other.about, str(recipe.get("base_model")))
    else:
        rest = "all else, from here on, is as it was"
    write_atomically(file, f"{head}# Changed lines say what was there before; {rest}.\n#\n{text}")
    return file


# As in templates/*/_base.yaml.j2
_LABEL = re.compile(r"# ((Study|Run|Rehearse|Change|Data|Model|Note|Differs) {2,}|Not known )\S")
_VARIANT = re.compile(r"# (\S+): a variant of (\S+)")


def _for_other_model(text: str, base: str, base_name: str, about: BaseModel, before: str) -> str:
    """The text of a variant with comments at its head that are true of another base model.

    Paragraphs of the base's own head that name its model or say what it is are left out.

    Args:
        text: the text, without the line for editors.
        base: the recipe or file that it is a variant of, as given.
        base_name: its name.
        about: what to say of the new model.
        before: the base model before.
    """
    head = "".join(takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    own = {before, str(models.entry_of(before).get("title", before)), *(f"# {name}:" for name in paths.recipe_names())}
    paragraphs = [paragraph.strip("\n") for paragraph in re.split(r"(?m)^#?\s*\n", head)]
    kept = [
        paragraph
        for paragraph in paragraphs
        if paragraph and not any(word in paragraph for word in own)
        and not any(_LABEL.match(line) or _VARIANT.fullmatch(line) for line in paragraph.splitlines())
    ]  # fmt: skip
    lines = [line for line in head.splitlines() if _VARIANT.fullmatch(line)]
    origin = config.origin_of(*paths.find_recipe(base))
    if origin and origin != base_name and not any(line.endswith(f" {origin}") for line in lines):
        lines.append(f"# {base_name}: a variant of {origin}")
    lines += [*_labelled("Model", f"{about.title}: {about.about}")]
    data = [str(dataset.get("path")) for _, dataset in datafiles.datasets(yamlfiles.parse(text, base), "datasets")]
    lines += [line for line in head.splitlines() if line.startswith("# Data  ") and any(path in line for path in data)]
    if about.unknown:
        lines += _labelled("Not known", ", ".join(about.unknown))
    if of_study := study.of(origin) if origin else None:
        note = f"its settings are from arXiv {of_study.paper['arxiv']}, which has them for other models"
        lines += _labelled("Note", f"{note}: no score published there is for this one")
    return "\n#\n".join(["\n".join(lines), *kept]) + "\n" + text[len(head) :]


def _labelled(label: str, text: str) -> list[str]:
    """Lines of a comment with a label, as at the head of a shipped recipe."""
    return textwrap.wrap(text, 118, initial_indent=f"# {label:10}", subsequent_indent=f"#{'':11}")
