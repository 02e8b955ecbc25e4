"""Upkeep: doctor, of the environment, render, of the project's own files, and verify, of what it claims."""

from pathlib import Path
from typing import Annotated

import typer

from ..base.errors import WorkFailed
from ..base.files import write_atomically
from ..base.paths import homes, shown
from ..base.progress import say
from ..terminal import tables
from .help import Verb
from .options import Json
from .study import verbs as study_verbs

HEADING = "Upkeep"
verbs = typer.Typer()
verbs.add_typer(study_verbs, name="study", rich_help_panel=HEADING)


@verbs.command("doctor", cls=Verb, rich_help_panel=HEADING, epilog="recipe doctor\nrecipe doctor --json")
def doctor_verb(json: Json = False) -> None:
    """Say what of this machine and environment is wrong, and how to mend it."""
    from dataclasses import asdict

    try:
        from ..doctor.examination import examine
    except ImportError as error:
        from ..doctor.line import repair

        remedy = repair("", anew=True) or "install the project in another"
        raise WorkFailed(f"a package that this needs itself cannot be imported: {error}; {remedy}") from None
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


@verbs.command(
    "verify",
    cls=Verb,
    rich_help_panel=HEADING,
    epilog="recipe verify --quick\nrecipe verify --json",
)
def verify_verb(
    quick: Annotated[bool, typer.Option("--quick", help="On a GPU: one model's shape, of few layers.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what has passed before.")] = False,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to keep models and runs; up to 17 GB on a GPU. By default the cache."),
    ] = None,
    json: Json = False,
) -> None:
    """Measure what this project claims, on this machine's GPU or as far as a CPU shows it."""
    from ..verifying import bench, verify

    record, file = verify.verify(work or bench.default_folder(), quick, fresh)
    if json:
        tables.print_json(record.model_dump())
    else:
        tables.print_table(verify.rows(record), spare=["unit", "off by"], below=["why"])
        for text in verify.unverified(record):
            tables.print_text(text)
    counts = {verdict: record.count(verdict) for verdict in ("passed", "failed", "unverified")}
    say(f"{len(record.lines)} lines; {', '.join(f'{verdict}: {count}' for verdict, count in counts.items())}")
    say(f"the record is in {shown(file)}; recipes/verified/README.md says how to hand it in")
    if counts["failed"]:
        raise typer.Exit(1)
