"""The verbs about recipes: list, show, diff and new."""

from typing import Annotated

import typer

from ..base import yamlfiles
from .options import Json, Name, Overrides

HEADING = "Recipes"
verbs = typer.Typer()


@verbs.command("list", rich_help_panel=HEADING)
def list_(
    variants: Annotated[
        bool, typer.Option("--variants", help="Which is a variant of which instead, yours in variants/ too.")
    ] = False,
    json: Json = False,
) -> None:
    """The recipes, with model, epochs, optimizer and published scores."""
    from ..base import tables
    from ..configs import variants as lineage
    from ..results import catalogue

    rows = lineage.tree() if variants else catalogue.recipes()
    if variants and not json:
        rows = catalogue.variants_table(rows)
    tables.print_json(rows) if json else tables.print_table(rows)


@verbs.command(rich_help_panel=HEADING)
def show(name: Name, json: Json = False) -> None:
    """A recipe's YAML, with the source of each setting."""
    from ..base import paths, tables
    from ..data import study

    found, file = paths.find_recipe(name)
    if json:
        of_study = study.of(found)
        published = of_study.published.get(found) if of_study else None
        scores = published.model_dump() if published else None
        tables.print_json({"recipe": found, "config": yamlfiles.read_yaml(file), "published": scores})
    else:
        print(yamlfiles.read_text(file), end="")


@verbs.command(rich_help_panel=HEADING)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A recipe's name or a YAML file, such as a run's config.yaml.")],
    b: Annotated[str | None, typer.Argument(metavar="[B]", help="Another; by default what A is a variant of.")] = None,
    json: Json = False,
) -> None:
    """The keys in which two recipes or configs differ, but for where they write to."""
    from ..base import tables
    from ..configs import variants

    rows = variants.diff(a, b)
    if json:
        tables.print_json(rows)
    elif rows:
        tables.print_table(rows)


@verbs.command(rich_help_panel=HEADING)
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name; it is written to variants/NAME.yaml.")],
    from_: Annotated[str, typer.Option("--from", metavar="BASE", help="The recipe or YAML file to start from.")],
    set_: Overrides = None,
) -> None:
    """Write a variant of a recipe: all of it, comments too, with what is changed marked."""
    from ..checks import check as checking
    from ..configs import compose, variants

    found = checking.examine(compose.compose(compose.Request(from_, overrides=set_ or []))).findings
    checking.refuse([finding for finding in found if finding.scope not in ("data", "file")])
    print(variants.write(name, from_, set_ or []))
