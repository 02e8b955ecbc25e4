"""Upkeep of the project's own files: render."""

from typing import Annotated

import typer

from ..base.errors import WorkFailed

HEADING = "Upkeep"
verbs = typer.Typer()


@verbs.command(rich_help_panel=HEADING)
def render(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail with a diff where a recipe has drifted.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Write the JSON Schema of Axolotl's configuration instead.")
    ] = False,
) -> None:
    """Write the recipes from their templates."""
    from ..base.files import write_atomically
    from ..checks.schema import FILE
    from ..configs import render as rendering

    if schema:
        from ..checks import installed

        write_atomically(FILE, installed.generate_schema())
        print(FILE)
        return
    recipes = rendering.rendered()
    if not check:
        for file in rendering.write(recipes):
            print(file)
    elif drift := rendering.drift(recipes):
        print(drift)
        raise WorkFailed("recipes differ from their templates: `recipe render` writes them anew; one without has to go")
