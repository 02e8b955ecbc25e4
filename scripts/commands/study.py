"""The verbs of studies: new and check."""

from typing import Annotated

import typer

from .. import tables
from ..base.paths import shown
from . import completion
from .help import Verb, Verbs
from .next_step import next_step
from .options import Json

verbs = typer.Typer(
    cls=Verbs,
    help="Add a study of your own, and check it.",
    no_args_is_help=True,
    epilog="recipe study new mine\nrecipe study check mine",
)


@verbs.command("new", cls=Verb, epilog="recipe study new smith2026")
def new_verb(
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


@verbs.command("check", cls=Verb, epilog="recipe study check haider2024")
def check_verb(
    name: Annotated[
        str,
        typer.Argument(metavar="STUDY", autocompletion=completion.studies, help="The study, or a part of its name."),
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
