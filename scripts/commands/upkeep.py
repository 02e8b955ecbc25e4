"""Upkeep: doctor, of the environment, and render, of the project's own files."""

from typing import Annotated

import typer

from .. import tables
from ..base.errors import WorkFailed
from ..base.files import write_atomically
from ..base.paths import homes
from ..base.progress import say
from .help import Verb
from .options import Json
from .study import verbs as study_verbs

HEADING = "Upkeep"
verbs = typer.Typer()
verbs.add_typer(study_verbs, name="study", rich_help_panel=HEADING)


@verbs.command("doctor", cls=Verb, rich_help_panel=HEADING, epilog="recipe doctor\nrecipe doctor --json")
def doctor_verb(json: Json = False) -> None:
    """Find what is wrong with this environment, GPU and disk, and how to repair it."""
    from dataclasses import asdict

    from .doctor import examine

    lines = examine()
    if json:
        tables.print_json([asdict(line) for line in lines])
    else:
        for line in lines:
            tables.print_text(f"{line.state:5}  {line.name}: {line.found}")
            if line.remedy:
                tables.print_text(f"       to do: {line.remedy}")
            if line.command:
                print(f"         {line.command}")  # in one piece, to paste
    counts = {state: sum(line.state == state for line in lines) for state in ("ok", "note", "wrong")}
    say(", ".join(f"{state}: {count}" for state, count in counts.items()))
    if counts["wrong"]:
        raise typer.Exit(1)


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
