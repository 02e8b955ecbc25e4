"""Upkeep of the project's own files: render."""

from typing import Annotated

import typer

from ..base.errors import WorkFailed
from ..base.files import write_atomically
from ..base.paths import homes
from .help import Verb
from .study import verbs as study_verbs

HEADING = "Upkeep"
verbs = typer.Typer()
verbs.add_typer(study_verbs, name="study", rich_help_panel=HEADING)


@verbs.command("render", cls=Verb, rich_help_panel=HEADING, epilog="recipe render --check")
def render_verb(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail with a diff where a recipe has drifted.")
    ] = False,
    write_schema: Annotated[
        bool, typer.Option("--schema", help="Write the JSON Schemas of recipes and of study.yaml instead.")
    ] = False,
) -> None:
    """Write the recipes from their templates."""
    from ..checks import schema
    from ..writing import render

    if write_schema:
        from ..checks import installed
        from ..data import study

        for file, written in {schema.FILE: installed.generate_schema(), study.SCHEMA: study.generate_schema()}.items():
            write_atomically(file, written)
            print(file)
        return
    drifts = ""
    for recipes, templates in homes():
        rendered = render.rendered(templates)
        if check:
            drifts += render.drift(rendered, recipes)
        else:
            for file in render.write(rendered, recipes):
                print(file)
    if drifts:
        print(drifts)
        raise WorkFailed(
            "recipes differ from their templates: `recipe render` rewrites them; delete those without a template"
        )
