"""Variants written by `recipe new`: recipes with changed keys or another model."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

import yaml

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.files import write_atomically
from ..base.yamlfiles import Config
from ..config import datafiles, merging, models, variants
from ..config.merging import Override
from .render import SPECIAL_TOKENS, ModelFacts, describe

HELD_OUT = 0.05
"""Share of rows held out for the eval loss, if the recipe holds out none."""
_ABSENT = re.compile(r"(?m)^# (variant, removed: )?(revision_of_model|special_tokens)( is not set)?: .*\n")
"""Comments about keys of the base model that are not set."""
# Keys that suit only one model; `for_model` drops them
_OF_ONE_MODEL = (
    *("tokenizer_config", "tokenizer_type", "model_type", "base_model_config", "processor_type"),
    *("added_tokens_overrides", "overrides_of_model_config", "model_config", "model_revision", "lora_model_dir"),
    *("is_falcon_derived_model", "is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model"),
)


@dataclass
class Change:
    """Change of a key.

    Attributes:
        value: the new value; None deletes the key.
        source: the new comment; None keeps the old comment.
    """

    value: Any
    source: str | None = None


@dataclass
class OtherModel:
    """A new base model for a recipe.

    Attributes:
        about: facts about the model.
        changes: the changes by top-level key.
        not_known: lines about unknown facts, and about chat templates kept from the recipe.
    """

    about: ModelFacts
    changes: dict[str, Change]
    not_known: list[str]

    @property
    def overrides(self) -> list[Override]:
        """The changes as overrides."""
        return [Override(key, change.value) for key, change in self.changes.items()]


def for_model(base: str, name: str) -> OtherModel:
    """Changes that adapt a recipe or file to another base model.

    Args:
        base: the recipe or file.
        name: the model, as owner/name on the hub or a folder.

    Raises:
        UserError: the folder does not exist, or the recipe has this model already.
    """
    recipe = yamlfiles.read_yaml(paths.find_recipe(base)[1])
    if not Path(name).is_dir() and (models.is_path(name) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        hint = f"give a folder, or a model on the hub as owner/name{models.similar(name)}"
        raise UserError(f"--model {name}: no such folder; {hint}")
    if name == recipe.get("base_model"):
        raise UserError(f"--model {name}: {base} has this model already; name another model")
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
    changes |= {key: Change(None, "valid only for the former model") for key in _OF_ONE_MODEL if key in recipe}
    targets = recipe.get("lora_target_modules")
    if isinstance(targets, list) and (renamed := about.targets(targets)) != targets:
        changes["lora_target_modules"] = Change(renamed)
    if about.soft_caps and recipe.get("attn_implementation") == "sdpa":
        changes["attn_implementation"] = Change("eager", about.soft_caps)
    lines = _chat_templates(recipe, folder, entry, changes)
    if about.unknown:
        pinned = f" --revision {about.revision}" if about.revision else ""
        fetch = f"for more facts run `hf download {name}{pinned} --include '*.json'` and try again"
        hint = "" if folder else f"; {fetch}{models.similar(name)}"
        lines.insert(0, f"not known about {name}: {', '.join(about.unknown)}{hint}")
    return OtherModel(about, changes, lines)


def for_data(base: str, file: Path) -> list[Override]:
    """Overrides for training a recipe on a file of rows, with a held-out share.

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
    return [Override(key, value) for key, value in changes.items()]


def reasons(composed: Config, overrides: Iterable[Override], unread: list[str]) -> list[str]:
    """Give the reasons for those settings of a variant that the user's rows require, one per line.

    Settings named in `overrides` are not explained. The last line lists text fields that are not read.
    """
    entry = {key: value for key, value in composed["datasets"][0].items() if key != "path"}
    lines = {
        "datasets": f"rows: {yamlfiles.write_flow(entry)[1:-1]}, because of their fields; --set changes it",
        "val_set_size": f"held out: val_set_size {composed['val_set_size']}, for the eval loss and `recipe evaluate`; "
        "--set val_set_size=20 holds out 20 rows",
    }
    overridden = {merging.top_key(override.key) for override in overrides}
    if unread:
        lines["unread"] = f"not used: {' and '.join(unread)}; add the text to a field that is used, or --set the fields"
    return [line for key, line in lines.items() if key not in overridden]


def _chat_templates(recipe: Config, folder: Path | None, entry: Config, changes: dict[str, Change]) -> list[str]:
    """Use the tokenizer's chat template if it has one; return lines about kept templates."""
    named = {"chat_template": recipe.get("chat_template")}
    for dataset in datafiles.datasets(recipe):
        named[f"{dataset.key}.chat_template"] = dataset.entry.get("chat_template")
    foreign = {
        key: name for key, name in named.items() if name and not str(name).startswith(("tokenizer_default", "jinja"))
    }
    if "chat_template" in foreign and (entry.get("chat") or models.chat_template(folder)):
        changes["chat_template"] = Change("tokenizer_default", "the model's template")
        del foreign["chat_template"]
    return [f"{key} stays {name}: check that it suits the model" for key, name in foreign.items()]


def write(name: str, base: str, overrides: list[Override], other: OtherModel | None = None) -> Path:
    """Write a variant of a recipe or file to variants/<name>.yaml.

    Args:
        name: the name of the variant.
        base: the recipe or file to change.
        overrides: the changes.
        other: the base model that replaces the recipe's.

    Raises:
        UserError: the name is taken or invalid, or a key cannot be changed.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name) or name.endswith((".yaml", ".yml")):
        raise UserError(f"{name}: not a name for a variant; use letters, digits, -, _ and folders, as in my-ideas/wide")
    file = paths.VARIANTS / f"{name}.yaml"
    if name in paths.recipe_names() or file.exists():
        hint = f", or delete {paths.shown(file)}" if file.exists() else ""
        raise UserError(f"{name}: a recipe has this name; choose another{hint}")
    base_name, base_file = paths.find_recipe(base)
    if base_name not in (*paths.recipe_names(), *paths.variant_names()):
        base_name = paths.shown(base_file)
    text = yamlfiles.read_text(base_file)
    recipe = yamlfiles.parse(text, str(base_file))
    changes = dict(other.changes) if other else {}
    for override in overrides:
        key, value = override.key, override.value
        top = merging.top_key(key)
        if other and top == "base_model":
            raise UserError("--set base_model: --model sets the model already; give only one")
        if top in changes and changes[top].source:
            below = merging.override({top: changes[top].value}, key, value).get(top)
            changes[top] = Change(below, "chosen by --set")
        else:
            changes[key] = Change(value, "your rows" if key == "datasets" else None)
    if "output_dir" in recipe:  # so that plain Axolotl does not overwrite the base recipe's output
        changes["output_dir"] = Change(f"outputs/{name}")
    text = "".join(dropwhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    if other:
        text = _ABSENT.sub("", text)
    for key, change in changes.items():
        text = edited(text, key, change.value, str(base_file), change.source)
    origin = variants.origin_of(base_name, base_file) or base_name
    schema = os.path.relpath(paths.RECIPES / "axolotl.schema.json", file.parent)
    write_atomically(file, "\n".join(_header(name, base_name, origin, schema, other)) + "\n" + text)
    return file


def _header(name: str, base: str, origin: str, schema: str, other: OtherModel | None) -> list[str]:
    """Header lines of a variant, from which `variants.ancestors` reads its originals.

    Args:
        name: the name of the variant.
        base: the complete name of the original.
        origin: the shipped recipe behind the original, or the original.
        schema: path of the schema for code editors, relative to the variant.
        other: the base model that replaces the original's.
    """
    lines = [f"# yaml-language-server: $schema={schema}", f"# {name}: a variant of {base}"]
    if origin != base:
        lines.append(f"# {base}: a variant of {origin}")
    lines += ["#", f"# Changes   recipe diff {name} lists them; changed lines state the former value"]
    if other:
        lines.append(f"# Model     {other.about.title}: {other.about.about}")
        if other.about.unknown:
            lines.append(f"# Not known {', '.join(other.about.unknown)}")
    return lines


def edited(text: str, key: str, value: Any, where: str, source: str | None = None) -> str:
    """Set or delete a dotted key in a config's text, and note the change in a comment.

    The lines of the top-level key become one line, whose comment gives the former value. Comments between them go.

    Args:
        text: the text.
        key: the key.
        value: the new value; None deletes the key.
        where: the name of the text in messages.
        source: source of the new value, or the reason for deleting the key; by default the former comment.

    Raises:
        UserError: `merging.override` cannot set the key, or the key's lines cannot be edited.
    """
    before = yamlfiles.parse(text, where)
    after = merging.override(before, key, value)
    if _is_same(before, after) and (source is None or key not in before):
        return text
    top = merging.top_key(key)
    document = yaml.compose(text, Loader=yaml.CSafeLoader)
    lines = text.split("\n")
    first = end = _last_line(document, lines) + 1
    was = "not set"
    if entry := yamlfiles.inside(document, top):
        name, node = entry
        first = name.start_mark.line
        end = max(_last_line(node, lines), first) + 1  # an alias has the lines of its anchor, which come earlier
        behind = node.end_mark if node.end_mark.line == first else name.end_mark
        was = yamlfiles.write_flow(before[top])
        source = source or lines[first][behind.column :].partition(" #")[2].strip()
    reason = f"; {source}" if source else ""
    if top in after:
        lines[first:end] = [f"{top}: {yamlfiles.write_flow(after[top])}  # variant, was {was}{reason}"]
    else:
        lines[first:end] = [f"# variant, removed: {top}: {was}{reason}"]
    changed = "\n".join(lines)
    with suppress(UserError):
        if _is_same(yamlfiles.parse(changed, where), after):
            return changed
    raise UserError(f"--set {key}: cannot edit the lines of this key in {where}; edit a copy by hand")


def _is_same(a: Any, b: Any) -> bool:
    return a == b and not merging.differences({"": a}, {"": b})  # in Python, True equals 1


def _last_line(node: Any, lines: list[str]) -> int:
    """Index of a node's last line.

    Trailing comments, which come before the parser's end mark, are left out.
    """
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _last_line(last[1] if isinstance(last, tuple) else last, lines)
    line: int = node.end_mark.line
    if node.end_mark.column == 0:  # a block scalar ends at the start of the next line
        line -= 1
    while line > node.start_mark.line and not lines[line].strip():
        line -= 1
    return line
