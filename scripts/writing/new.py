"""Variants written by `recipe new`: recipes with changed keys, another model or a user's rows, and migrated configs."""

import os
import re
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import dropwhile
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from ..base import hub, paths, yamlfiles
from ..base.errors import UserError
from ..base.files import sha256, write_atomically
from ..base.secrets import without_secrets
from ..base.yamlfiles import Config
from ..check import check
from ..check.check import Report
from ..config import compose, datafiles, keys, merging, models
from ..config.finding import Finding, override_errors, refuse, unknown_force
from ..config.merging import Override
from ..config.origin import Header, header_of, origin_of
from . import migrate, own_rows
from .migrate import Migration, OldConfig
from .own_rows import RowsRequest
from .render import SPECIAL_TOKENS, ModelFacts, describe

_ABSENT = re.compile(r"(?m)^# (variant, removed: )?(revision_of_model|special_tokens)( is not set)?: .*\n")
"""Comments about keys of the base model that are not set."""


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
class Changes:
    """Changes for a new base model, or of a migration.

    Attributes:
        changes: the changes by top-level key.
        header: lines for the variant's header.
        notes: lines about unknown facts, and about chat templates that stay those of the recipe.
    """

    changes: dict[str, Change] = field(default_factory=dict)
    header: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def overrides(self) -> list[Override]:
        """The changes as overrides."""
        return [Override(key, change.value) for key, change in self.changes.items()]


NO_CHANGES = Changes()


@dataclass(frozen=True)
class VariantRequest:
    """Request for a variant, from `recipe new`.

    Attributes:
        name: the name of the variant.
        base: the recipe, file or model card to change.
        release: the release of Axolotl that `base` was written for; None if unknown.
        model: another base model; None to keep it.
        rows: rows to train on instead of the recipe's.
        overrides: the user's changes.
        force: names of findings to override.
    """

    name: str
    base: str
    release: str | None
    model: str | None
    rows: RowsRequest | None
    overrides: list[Override]
    force: list[str]


@dataclass
class WrittenVariant:
    """A written variant.

    Attributes:
        file: the variant.
        migration: the migration of an old config; without steps for a recipe of this release.
        notes: lines about the rows and the model.
    """

    file: Path
    migration: Migration
    notes: list[str]


def create(request: VariantRequest) -> WrittenVariant:
    """Check and write a variant; a refused one leaves no file.

    Raises:
        UserError: the name is taken, the user has to decide settings, or the variant or its rows have errors.
    """
    old = migrate.of_file(request.base, request.release)
    file = free_file(request.name)
    rows = None
    with ExitStack() as while_checked:
        model = for_model(request.base, request.model) if request.model else NO_CHANGES
        overrides = request.overrides
        if request.rows:
            rows = own_rows.recognize(request.rows, file.with_suffix(".jsonl"))
            config = merging.apply(old.config, [Override("test_datasets"), *model.overrides, *overrides])
            own_rows.set_prompts(rows, request.rows.type, config, overrides)
            while_checked.enter_context(rows.copied())
            overrides = [*own_rows.overrides(rows, config), *overrides]
        decided = [*model.overrides, *overrides]
        if rows:
            decided.append(Override("datasets", []))  # new rows need no migration
        migration = migrate.migrate(old, decided)
        migration.require_decided()
        changes = [*migration.overrides(), *model.overrides, *overrides]
        composed = compose.compose(compose.Request(request.base, overrides=changes))
        report = check.check_config(composed, data=rows is not None, ask_hub=request.model is not None)
        _refuse_errors(report, old, request.force)
        write(request.name, request.base, overrides, of_migration(migration, model))
    notes = [*map(str, _about_files(report)), *model.notes]
    if rows:
        unread: list[str] = next((read["unread_fields"] for read in report.data), [])
        notes = [*own_rows.explanations(rows, composed.config, unread), *notes]
    return WrittenVariant(file, migration, notes)


def of_migration(migration: Migration, model: Changes = NO_CHANGES) -> Changes:
    """Changes of a migration together with those for another base model, which win."""
    migrated = {key: Change(migration.config.get(key), reasons) for key, reasons in migration.reasons().items()}
    header = list(model.header)
    if migration.release != migrate.supported():
        guess = " or earlier" if migration.sign else ""
        releases = f"{migration.release}{guess}, migrated to {migrate.supported()}"
        header.insert(0, f"# Axolotl   written for {releases} by `recipe new --from`")
    return Changes({**migrated, **model.changes}, header, model.notes)


def for_model(base: str, name: str) -> Changes:
    """Changes that adapt a recipe or file to another base model.

    Args:
        base: the recipe or file.
        name: the model, as owner/name on the hub or a folder.

    Raises:
        UserError: the folder does not exist, or the recipe has this model already.
    """
    recipe = merging.recipe_content(base)
    if not Path(name).is_dir() and (models.is_path(name) or not hub.NAME.fullmatch(name)):
        hint = f"give a folder, or a model on the hub as owner/name{models.similar(name)}"
        raise UserError(f"--model {name}: no such folder; {hint}")
    if name == recipe.get("base_model"):
        raise UserError(f"--model {name}: {base} has this model already; name another model")
    entry = models.entry_of(name)
    folder = models.folder_of({"base_model": name, "revision_of_model": entry.get("revision")})
    facts = describe(entry, name, folder)
    other = Changes(_model_changes(recipe, name, facts), [f"# Model     {facts.title}: {facts.about}"])
    foreign = _foreign_templates(recipe)
    if "chat_template" in foreign and (entry.get("chat") or models.chat_template(folder)):
        other.changes["chat_template"] = Change("tokenizer_default", "the model's template")
        del foreign["chat_template"]
    unknown = ", ".join(facts.unknown)
    if unknown:
        other.header.append(f"# Not known {unknown}")
        other.notes.append(f"not known about {name}: {unknown}{_fetch_hint(name, facts, folder)}")
    for key, template in foreign.items():
        other.notes.append(f"{key} stays {template}: check that it suits the model")
    return other


def _fetch_hint(name: str, facts: ModelFacts, folder: Path) -> str:
    """Hint with the command that fetches a model's files; empty if they are on this machine."""
    if folder.is_dir():
        return ""
    words = f"hf download {name}"
    if facts.revision:
        words += f" --revision {facts.revision}"
    return f"; for more facts run `{words} --include '*.json'` and try again"


def _model_changes(recipe: Config, name: str, facts: ModelFacts) -> dict[str, Change]:
    """Changes of a recipe's keys for another base model, except for chat templates."""
    changes = {
        "base_model": Change(name, "chosen by --model"),
        "revision_of_model": Change(facts.revision, facts.revision_reason),
        "special_tokens": Change(None, facts.pad_reason),
    }
    if facts.pad_token:
        changes["special_tokens"] = Change({"pad_token": facts.pad_token}, f"{SPECIAL_TOKENS}; {facts.pad_reason}")
    for key in keys.of_one_model():
        if key in recipe and key not in changes:
            changes[key] = Change(None, "valid only for the former model")
    targets = merging.listed(recipe, "lora_target_modules")
    if facts.targets(targets) != targets:
        changes["lora_target_modules"] = Change(facts.targets(targets))
    if facts.soft_caps and recipe.get("attn_implementation") == "sdpa":
        changes["attn_implementation"] = Change("eager", facts.soft_caps)
    return changes


def _foreign_templates(recipe: Config) -> dict[str, str]:
    """Chat templates of a recipe, by dotted key, that may not suit another model."""
    templates = {"chat_template": recipe.get("chat_template")}
    for dataset in datafiles.datasets(recipe):
        templates[f"{dataset.key}.chat_template"] = dataset.entry.get("chat_template")
    texts = {key: str(template) for key, template in templates.items() if template}
    return {key: text for key, text in texts.items() if not text.startswith(("tokenizer_default", "jinja"))}


def _refuse_errors(report: Report, old: OldConfig, force: list[str]) -> None:
    """Refuse a variant with errors; foreign code matters only to a run.

    Of a migrated config, the errors that Axolotl finds count, too. The names of findings in `force` are overridden.

    Raises:
        UserError: there are errors, each with its place in the old file.
    """
    if not old.is_current:
        check.add_validation([report], None)
    unknown_force(force, {finding.name for finding in report.findings})
    override_errors(report.findings, force)
    refuse([finding for finding in report.findings if finding.scope != "code"])


def _about_files(report: Report) -> list[Finding]:
    """Warnings about a config's file and the files that it names."""
    return [finding for finding in report.findings if (finding.scope, finding.level) == ("file", "warning")]


def write(name: str, base: str, overrides: list[Override], changes: Changes = NO_CHANGES) -> Path:
    """Write a variant of a recipe or file to variants/<name>.yaml.

    Args:
        name: the name of the variant.
        base: the recipe or file to change.
        overrides: the user's changes.
        changes: changes for another base model, or of a migration.

    Raises:
        UserError: the name is taken or invalid, or a key cannot be changed.
    """
    file = free_file(name)
    write_atomically(file, variant_text(name, file.parent, base, overrides, changes))
    return file


def variant_text(name: str, folder: Path, base: str, overrides: list[Override], other: Changes) -> str:
    """Text of a variant in a folder; for the other arguments, see `write`."""
    base_name, base_file = paths.find_recipe(base)
    if base_name not in (*paths.recipe_names(), *paths.variant_names()):
        base_name = paths.shown(base_file)
    text = re.sub(r"(?m)^ +\n", "", yamlfiles.recipe_text(base_file))  # places of duplicate keys
    config, sources = yamlfiles.parse(text, str(base_file)), _sources(overrides, other)
    if "output_dir" in config:  # plain Axolotl keeps the base recipe's output
        overrides, sources["output_dir"] = [*overrides, Override("output_dir", f"outputs/{name}")], None
    config = merging.apply(config, [*other.overrides, *overrides])
    text = "".join(dropwhile(lambda line: line.startswith("#"), f"{text.strip()}\n".splitlines(keepends=True)))
    if other.changes:
        text = _ABSENT.sub("", text)
    for key, source in sources.items():
        text = edited(text, key, Change(config.get(key), source), str(base_file))
    header = Header(name=name, parent=base_name, parent_sha256=sha256(base_file), axolotl=version("axolotl"))
    if "base_model" not in sources:
        header.base = header_of(base_file).base
    origin = origin_of(base_name, base_file)
    if origin and origin != base_name:
        header.origin = origin
    schema = os.path.relpath(paths.RECIPES / "axolotl.schema.json", folder)
    lines = [f"# yaml-language-server: $schema={schema}", *header.lines(), "#"]
    lines += [f"# Changes   recipe diff {name} lists them; changed lines state the former value", *other.header]
    return "\n".join(lines) + "\n" + text


def free_file(name: str) -> Path:
    """File for a new variant.

    Raises:
        UserError: the name is taken or invalid.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name) or name.endswith((".yaml", ".yml")):
        raise UserError(f"{name}: not a name for a variant; use letters, digits, -, _ and folders, as in my-ideas/wide")
    file = paths.VARIANTS / f"{name}.yaml"
    if file.exists():
        raise UserError(f"{name}: a recipe has this name; choose another, or delete {paths.shown(file)}")
    if name in paths.recipe_names():
        raise UserError(f"{name}: a recipe has this name; choose another")
    return file


def _sources(overrides: list[Override], other: Changes) -> dict[str, str | None]:
    """New comments on the changed top-level keys; None keeps a comment.

    Raises:
        UserError: --set changes the base model that --model sets.
    """
    sources = {key: change.source for key, change in other.changes.items()}
    for override in overrides:
        key = merging.top_key(override.key)
        if key == "base_model" and key in other.changes:
            raise UserError("--set base_model: --model sets the model already; give only one")
        if sources.get(key):  # one comment for both changes
            sources[key] = "chosen by --set"
        else:
            sources[key] = "your rows" if override.key == "datasets" else None
    return sources


def edited(text: str, key: str, change: Change, where: str) -> str:
    """Set or delete a top-level key in a config's text, and note the change in a comment.

    The comment on the key's first line gives the former value. Comments inside a value go.

    Args:
        text: the text.
        key: the key.
        change: the change.
        where: the name of the text in messages.

    Raises:
        UserError: the key's lines cannot be edited.
    """
    before = yamlfiles.parse(text, where)
    after, source = merging.override(before, key, change.value), change.source
    if not merging.differences(before, after) and (source is None or key not in before):
        return text
    document = yaml.compose(text, Loader=yaml.CSafeLoader)
    lines = text.split("\n")
    first = end = _end(lines, len(lines))
    was = "not set"
    entry = yamlfiles.inside(document, key)
    if entry:
        name, node = entry
        first = name.start_mark.line
        end = _end(lines, _next_key(document, lines, first))
        behind = node.end_mark if node.end_mark.line == first else name.end_mark
        was = shorten(yamlfiles.write_flow(without_secrets(before[key], key)), 100, placeholder=" …")
        source = source or lines[first][behind.column :].partition(" #")[2].strip()
    reason = f"; {source}" if source else ""
    if key in after:
        head, *rest = yamlfiles.write_setting(key, after[key])
        lines[first:end] = [f"{head}  # variant, was {was}{reason}", *rest]
    elif before[key] is None:
        del lines[first:end]  # an empty key was as good as absent
    else:
        lines[first:end] = [f"# variant, removed: {key}: {was}{reason}"]
    changed = "\n".join(lines)
    with suppress(UserError):
        if not merging.differences(yamlfiles.parse(changed, where), after):
            return changed
    raise UserError(f"--set {key}: cannot edit the lines of this key in {where}; edit a copy by hand")


def _next_key(document: Any, lines: list[str], first: int) -> int:
    """Index of the line of the first key after a line, or the number of lines."""
    later = [name.start_mark.line for name, _ in document.value if name.start_mark.line > first]
    return min(later, default=len(lines))


def _end(lines: list[str], stop: int) -> int:
    """Index after the last line before `stop` that is neither empty nor a comment at the margin."""
    while not lines[stop - 1].strip() or lines[stop - 1].startswith("#"):
        stop -= 1
    return stop
