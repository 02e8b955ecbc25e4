"""The verb new."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..base import tables
from ..base.errors import UserError
from ..base.terminal import say
from .help import Verb, override_options, suggest
from .options import OldRelease, Overrides, complete_recipes, full_name, refuse_without, settings_of

if TYPE_CHECKING:
    from ..writing.migrate import Migration

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
    from ..writing import new
    from ..writing.own_rows import RowsRequest

    refuse_without("--fields", fields, "--data", data)
    refuse_without("--type", type_, "--data", data)
    rows = RowsRequest(data, columns_by_field(fields), type_) if data else None
    variant = new.create(new.VariantRequest(name, from_, axolotl, model, rows, set_))
    print(variant.file)
    report_migration(variant.migration)
    for note in variant.notes:
        say(note)
    if not model and "base_model" in [override.key for override in set_]:
        say("revision, special tokens, layers and comments are still those of the former model; --model replaces them")
    suggest("check", name, *override_options(variant.migration.profiles, []))


def columns_by_field(text: str) -> dict[str, str]:
    """Columns by field, from --fields, such as `question=Frage,answer=Antwort`.

    Raises:
        UserError: the text is malformed.
    """
    columns = {}
    for setting in filter(None, settings_of(text)):
        name, _, column = setting.partition("=")
        if not column:
            raise UserError(f"--fields {text}: expected FIELD=COLUMN, as in question=Frage,answer=Antwort")
        columns[name] = column
    return columns


def report_migration(migration: "Migration") -> None:
    """Print the changes of a migration, and log what they cannot undo."""
    tables.print_table([step.row() for step in migration.steps], below=["reason"])
    if migration.sign:
        guess = f"Axolotl {migration.release} is a guess, from {migration.sign}"
        say(f"{guess}; the split of the rows and other defaults depend on it: pass --axolotl VERSION if you know it")
    for meaning in migration.meanings():
        say(f"since {migration.release}: {meaning}")
