"""The verb new."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..base import tables
from ..base.terminal import say
from .help import Verb, override_options, suggest
from .options import OldRelease, Overrides, complete_recipes, full_name, refuse_without

if TYPE_CHECKING:
    from ..config.merging import Override
    from ..writing.migrate import Migration, OldConfig

verbs = typer.Typer(rich_markup_mode=None)


@verbs.command(
    "new",
    cls=Verb,
    epilog="recipe new mine --data mine.csv\nrecipe new wide --from llama-3.2-3b --set lora_r=64",
)
def new_verb(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the variant, saved as variants/NAME.yaml.")],
    from_: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="BASE",
            callback=full_name,
            autocompletion=complete_recipes,
            help="Recipe, YAML file of any Axolotl, or model card to start from.",
        ),
    ] = "start/qlora",
    axolotl: OldRelease = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Another base model: owner/name on the hub, or a folder."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your rows: JSON lines, JSON, CSV, TSV or Parquet."),
    ] = None,
    fields: Annotated[
        str,
        typer.Option(
            metavar="FIELD=COLUMN", help="With --data: fields of columns, as in question=Frage,answer=Antwort."
        ),
    ] = "",
    type_: Annotated[
        Literal["chat", "plain"] | None,
        typer.Option("--type", help="With --data: the prompts; default: chat for an instruct model."),
    ] = None,
    set_: Overrides,
) -> None:
    """Write a variant of a recipe, with changed lines marked."""
    from ..writing import migrate

    refuse_without("--fields", fields, "--data", data)
    refuse_without("--type", type_, "--data", data)
    old = migrate.of_file(from_, axolotl)
    with old.as_yaml() as base:
        _write(name, old, base, axolotl, model, data, fields, type_, set_)


def _write(
    name: str,
    old: "OldConfig",
    base: str,
    release: str | None,
    model: str | None,
    data: Path | None,
    fields: str,
    type_: Literal["chat", "plain"] | None,
    set_: "list[Override]",
) -> None:
    """Write a variant of `base`, the file with `old`; see the options of `new_verb`."""
    from ..check import check
    from ..config import compose, merging
    from ..writing import migrate, new, own_rows

    file = new.free_file(name)
    replacement = new.SAME_MODEL
    if model:
        replacement = new.for_model(base, model)
    decided = [*replacement.overrides, *set_]
    if data:
        decided.append(merging.Override("datasets", []))
    migration = migrate.migrate(old, release, decided)
    migration.require_decided()
    changes = [*migration.overrides(), *replacement.overrides]
    other = migrate.as_changes(migration, replacement)
    composed = compose.compose(compose.Request(base, overrides=[*changes, *set_]))
    if data is None:
        migration.refuse_errors(check.check_config(composed), composed)
        print(new.write(name, base, set_, other, migration.origins(name)))
    else:
        rows = own_rows.recognize(data, own_rows.parse_fields(fields), file.with_suffix(".jsonl"))
        overridden = {merging.top_key(override.key) for override in set_}
        if "datasets" in overridden:
            type_ = type_ or "plain"
        why = own_rows.set_prompts(rows, type_, composed.config)
        with rows.copied():
            overrides = [*own_rows.overrides(rows, composed.config), *set_]
            composed = compose.compose(compose.Request(base, overrides=[*changes, *overrides]))
            report = check.check_config(composed, data=True)
            migration.refuse_errors(report, composed)
            print(new.write(name, base, overrides, other, migration.origins(name)))
        unread: list[str] = next((read["unread_fields"] for read in report.data), [])
        for reason in own_rows.reasons(rows, why, composed.config, overridden, unread):
            say(reason)
    if not old.is_current:
        report_migration(migration)
    for note in replacement.notes:
        say(note)
    if not model and "base_model" in [override.key for override in set_]:
        say("revision, special tokens, layers and comments are still those of the former model; --model replaces them")
    suggest("check", name, *override_options(migration.profiles, []))


def report_migration(migration: "Migration") -> None:
    """Print the changes of a migration, and log what they cannot undo."""
    tables.print_table([step.row() for step in migration.steps], below=["reason"])
    if migration.sign:
        guess = f"Axolotl {migration.release} is a guess, from {migration.sign}"
        say(f"{guess}; the split of the rows and other defaults depend on it: pass --axolotl VERSION if you know it")
    for meaning in migration.meanings():
        say(f"since {migration.release}: {meaning}")
