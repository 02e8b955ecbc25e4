"""Upkeep: doctor, of the environment; render, of the project's own files; studies of one's own."""

from typing import Annotated

import typer

from .. import tables
from ..base.errors import WorkFailed
from ..base.paths import homes, shown
from ..base.progress import say
from .help import Verb, Verbs, next_step
from .options import Json, complete_studies

HEADING = "Upkeep"
verbs = typer.Typer()
study_verbs = typer.Typer(
    cls=Verbs,
    help="Add a study of your own, and check it.",
    no_args_is_help=True,
    epilog="recipe study new mine\nrecipe study check mine",
)
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
) -> None:
    """Write the recipes from their templates."""
    from ..writing import render

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


@study_verbs.command("new", cls=Verb, epilog="recipe study new smith2026")
def study_new_verb(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it: a name for its folders.")],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="The base model of its first recipe.")
    ] = "meta-llama/Llama-3.2-3B",
) -> None:
    """Write a study that works as it is, with comments, below recipes/ and templates/ of this folder."""
    from ..writing import render

    for file in render.write_study(name, model):
        print(shown(file))
    next_step("study", "check", name)


@study_verbs.command("check", cls=Verb, epilog="recipe study check haider2024")
def study_check_verb(
    name: Annotated[
        str,
        typer.Argument(metavar="STUDY", autocompletion=complete_studies, help="The study, or a part of its name."),
    ],
    json: Json = False,
) -> None:
    """Say what a study lacks or contradicts. Exit code 2 if there is an error."""
    from ..base import paths
    from ..base.progress import harmless, say
    from ..checks import study as checks
    from ..data import study

    of_study = study.find(name)
    findings = checks.findings(of_study)
    tables.print_json([vars(finding) for finding in findings]) if json else [
        print(harmless(str(finding))) for finding in findings
    ]
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning")}
    say(f"{of_study.folder.name}: errors: {counts['error']}, warnings: {counts['warning']}")
    if counts["error"]:
        raise typer.Exit(2)
    recipe = next((recipe for recipe in of_study.published if paths.recipe_file(recipe).is_file()), None)
    if recipe:
        next_step("run", recipe, "--rehearse", json=json)
