"""The verb new."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..base.terminal import say
from .help import Verb, suggest
from .options import Overrides, complete_recipes, full_name, refuse_without

if TYPE_CHECKING:
    from ..check.check import Report

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
            help="The recipe or YAML file to start from.",
        ),
    ] = "start/qlora",
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
    from ..check import check
    from ..config import compose, merging
    from ..writing import new, own_rows

    refuse_without("--fields", fields, "--data", data)
    refuse_without("--type", type_, "--data", data)
    file = new.free_file(name)
    replacement = new.SAME_MODEL
    if model:
        replacement = new.for_model(from_, model)
    composed = compose.compose(compose.Request(from_, overrides=[*replacement.overrides, *set_]))
    if data is None:
        _refuse_errors(check.check_config(composed))
        print(new.write(name, from_, set_, replacement))
    else:
        rows = own_rows.recognize(data, own_rows.parse_fields(fields), file.with_suffix(".jsonl"))
        overridden = {merging.top_key(override.key) for override in set_}
        if "datasets" in overridden:
            type_ = type_ or "plain"
        why = own_rows.set_prompts(rows, type_, composed.config)
        with rows.copied():
            overrides = [*own_rows.overrides(rows, composed.config), *set_]
            composed = compose.compose(compose.Request(from_, overrides=[*replacement.overrides, *overrides]))
            report = check.check_config(composed, data=True)
            _refuse_errors(report)
            print(new.write(name, from_, overrides, replacement))
        unread: list[str] = next((read["unread_fields"] for read in report.data), [])
        for reason in own_rows.reasons(rows, why, composed.config, overridden, unread):
            say(reason)
    for note in replacement.notes:
        say(note)
    if not model and "base_model" in [override.key for override in set_]:
        say("revision, special tokens, layers and comments are still those of the former model; --model replaces them")
    suggest("check", name)


def _refuse_errors(report: "Report") -> None:
    """Refuse a variant with errors; foreign code and data matter only to a run."""
    from ..config.finding import refuse

    refuse([finding for finding in report.findings if finding.scope != "code" and finding.rule != "not-prepared"])
