"""The command new."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..base.errors import UserError
from ..base.terminal import say
from ..config.merging import Override
from .help import RecipeCommand, suggest
from .options import Force, Overrides, columns_by_field, complete_recipes, full_name, refuse_without

commands = typer.Typer(rich_markup_mode=None)


@commands.command(
    "new",
    cls=RecipeCommand,
    epilog="recipe new mine --data mine.csv\nrecipe new wide --from llama-3.2-3b --set lora_r=64",
)
def new_command(
    context: typer.Context,
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the variant, saved as variants/NAME.yaml.")],
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="BASE",
            autocompletion=complete_recipes,
            help="Recipe, config, model card, SWEEP/TRIAL or SWEEP/best; default: start/qlora or start/dpo-qlora.",
        ),
    ] = None,
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
    force: Force,
) -> None:
    """Write a variant of a recipe, with changed lines marked."""
    from ..config.compose import Request
    from ..writing import migrate, new, own_rows
    from ..writing.own_rows import RowsRequest

    refuse_without("--fields", fields, "--data", data)
    refuse_without("--type", type_, "--data", data)
    rows = RowsRequest(data, fields or {}, type_) if data else None
    base, settings = _base(context, from_ or own_rows.starting_point(rows))
    variant = new.create(new.VariantRequest(name, base, axolotl, model, rows, [*settings, *set_], force))
    print(variant.file)
    migrate.report(variant.migration)
    for note in variant.notes:
        say(note)
    if not model and "base_model" in [override.key for override in set_]:
        say("revision, special tokens, layers and comments are still those of the former model; --model replaces them")
    forced = [word for finding in force for word in ("--force", finding)]
    suggest("check", name, *Request(name, variant.migration.profiles).options, *forced)


def _base(context: typer.Context, name: str) -> tuple[str, list[Override]]:
    """Recipe or file to start from, and the settings of a trial."""
    try:
        return full_name(context, name), []
    except UserError:
        from ..results import sweep_results

        trial = sweep_results.find_trial(name)
        if trial is None:
            raise
        return trial
