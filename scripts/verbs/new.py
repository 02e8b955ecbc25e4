"""The verb new."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.terminal import say
from .help import Verb, suggest
from .options import Overrides, complete_recipes, full_name

if TYPE_CHECKING:
    from ..check.check import Report

verbs = typer.Typer(rich_markup_mode=None)


@verbs.command(
    "new",
    cls=Verb,
    epilog="recipe new mine --data mine.jsonl\nrecipe new wide --from llama-3.2-3b --set lora_r=64",
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
        typer.Option(metavar="FILE", help="Your rows (JSONL); their fields determine the dataset type."),
    ] = None,
    set_: Overrides,
) -> None:
    """Write a variant of a recipe, with changed lines marked."""
    from ..check import check
    from ..config import compose
    from ..writing import new

    overrides = set_
    if data:
        overrides = [*new.for_data(from_, data), *set_]
    replacement = new.SAME_MODEL
    if model:
        replacement = new.for_model(from_, model)
    composed = compose.compose(compose.Request(from_, overrides=[*replacement.overrides, *overrides]))
    report = check.check_config(composed, data=data is not None)
    _refuse_errors(report)
    print(new.write(name, from_, overrides, replacement))
    for note in replacement.notes:
        say(note)
    if data:
        unread: list[str] = next((read["unread_fields"] for read in report.data), [])
        for reason in new.reasons(composed.config, set_, unread):
            say(reason)
    if not model and "base_model" in [override.key for override in overrides]:
        say("revision, special tokens, layers and comments are still those of the former model; --model replaces them")
    suggest("check", name)


def _refuse_errors(report: "Report") -> None:
    """Refuse a variant with errors; foreign code and data matter only to a run."""
    from ..config.finding import refuse

    refuse([finding for finding in report.findings if finding.scope != "code" and finding.rule != "not-prepared"])
