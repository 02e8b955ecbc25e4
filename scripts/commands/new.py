"""The command new."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..base.terminal import say
from .help import RecipeCommand, suggest
from .options import Overrides, columns_by_field, complete_recipes, full_name, refuse_without

commands = typer.Typer(rich_markup_mode=None)


@commands.command(
    "new",
    cls=RecipeCommand,
    epilog="recipe new mine --data mine.csv\nrecipe new wide --from llama-3.2-3b --set lora_r=64",
)
def new_command(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the variant, saved as variants/NAME.yaml.")],
    from_: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="BASE",
            callback=full_name,
            autocompletion=complete_recipes,
            help="Start from a recipe, Axolotl config of any release, or model card.",
        ),
    ] = "start/qlora",
    axolotl: Annotated[
        str | None,
        typer.Option(metavar="VERSION", help="Axolotl release of BASE; default: as a model card states, or guessed."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Another base model: owner/name on Hugging Face, or a folder."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your rows: JSON lines, JSON, CSV, TSV or Parquet."),
    ] = None,
    fields: Annotated[
        dict[str, str] | None,
        typer.Option(
            parser=columns_by_field,
            metavar="FIELD=COLUMN",
            help="With --data: your column for each field, as in question=Frage,answer=Antwort.",
        ),
    ] = None,
    type_: Annotated[
        Literal["chat", "plain"] | None,
        typer.Option("--type", help="With --data: train on chats or plain prompts; default: by the model."),
    ] = None,
    set_: Overrides,
) -> None:
    """Write a variant of a recipe, with changed lines marked."""
    from ..config.compose import Request
    from ..writing import migrate, new
    from ..writing.own_rows import RowsRequest

    refuse_without("--fields", fields, "--data", data)
    refuse_without("--type", type_, "--data", data)
    rows = RowsRequest(data, fields or {}, type_) if data else None
    variant = new.create(new.VariantRequest(name, from_, axolotl, model, rows, set_))
    print(variant.file)
    migrate.report(variant.migration)
    for note in variant.notes:
        say(note)
    if not model and "base_model" in [override.key for override in set_]:
        say("revision, special tokens, layers and comments are still those of the former model; --model replaces them")
    suggest("check", name, *Request(name, variant.migration.profiles).options)
