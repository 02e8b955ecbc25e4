"""The commands doctor, remove, render and study."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from ..base import paths, tables
from ..base.errors import UserError, WorkFailed, meant
from ..base.terminal import Bar, require_consent, say, warn
from .help import RecipeCommand, RecipeGroup, suggest
from .options import Force, Json, RunNames, StudyName, complete_studies, refuse_together, several_arguments

_STARTER_MODEL = "meta-llama/Llama-3.2-3B"

study_commands = typer.Typer(
    cls=RecipeGroup,
    help="Add a study of your own, and check it.",
    no_args_is_help=True,
    epilog="recipe study new mine\nrecipe study check mine",
)
commands = typer.Typer(rich_markup_mode=None, suggest_commands=False)  # click suggests commands already
commands.add_typer(study_commands, name="study")


@commands.command(
    "remove", cls=RecipeCommand, epilog="recipe remove latest\nrecipe remove RUN_A RUN_B --checkpoints --yes"
)
def remove_command(
    *,
    names: RunNames,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Remove only checkpoints; unfinished runs then start again.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """List the sizes of run folders, or of their checkpoints, and remove them once confirmed."""
    from ..base.hardware import GIB
    from ..results import export_records
    from ..run import remove

    folders = {folder.path.resolve(): folder for folder in map(remove.find, names)}
    places, total = {}, 0
    for folder in folders.values():
        if not checkpoints:
            export_records.refuse_recorded(folder)
        places[folder] = remove.removable(folder, checkpoints)
        size = sum(map(remove.size, places[folder]))
        total += size
        print(f"{folder.path}: {size / GIB:.2f} GiB")
        foreign = sorted({*folder.path.iterdir()} - {*places[folder]})
        if foreign and not checkpoints:
            say(f"{folder.path}: not of the run, so kept: {', '.join(file.name for file in foreign)}")
    if not total:
        raise UserError("there is nothing to remove", key=" ".join(names))
    require_consent("Remove?", yes)
    for folder, removed in places.items():
        remove.remove(folder, removed)
    say(f"freed: {total / GIB:.2f} GiB")


@commands.command("render", cls=RecipeCommand, epilog="recipe render --check\nrecipe render mine")
def render_command(
    studies: Annotated[
        list[str],
        several_arguments(
            metavar="[STUDY]...",
            autocompletion=complete_studies,
            help="Only the recipes of these studies; default: all recipes, and recipes/README.md.",
        ),
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; print differences from the templates, and fail on any.")
    ] = False,
) -> None:
    """Regenerate the recipes from their templates."""
    from ..writing import render

    drifts = []
    for study in studies:
        meant(study, [folder.name for folder in paths.studies()], "study")
    for recipes, templates in paths.homes():
        with Bar(f"rendering {paths.shown(templates)}"):
            rendered = render.rendered(templates, studies)
        orphans = [] if studies else render.orphans(rendered, recipes)
        if check:
            drifts += [render.drift(rendered, recipes), *orphans]
        else:
            for file in render.write(rendered, recipes):
                print(file)
            for orphan in orphans:
                warn(orphan)
    if any(drifts):
        print("\n".join(filter(None, drifts)))
        raise WorkFailed(
            "recipes differ from their templates; run `recipe render`, and delete recipes without a template"
        )


@study_commands.command(
    "new", cls=RecipeCommand, epilog="recipe study new smith2026\nrecipe study new their-run --from README.md"
)
def study_new_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Study name, also used for its folders.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help=f"Base model of the study's first recipe; default: {_STARTER_MODEL}."),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="CARD",
            help="Model card with an Axolotl config; the study reproduces its eval loss.",
        ),
    ] = None,
) -> None:
    """Write a new study into recipes/ and templates/, from a skeleton or a model card."""
    from ..writing import render

    refuse_together({"--model": model, "--from": from_})
    if from_ is None:
        for file in render.write_study(name, model or _STARTER_MODEL):
            print(paths.shown(file))
        suggest("study", "check", name)
        return
    from ..writing import migrate, study_yaml

    migration = migrate.migrate(migrate.read(from_))
    for file in study_yaml.write(name, migration):
        print(paths.shown(file))
    migrate.report(migration)
    suggest("study", "check", name)


@study_commands.command("check", cls=RecipeCommand, epilog="recipe study check haider2024")
def study_check_command(
    *,
    name: StudyName,
    force: Force,
    json: Json = False,
) -> None:
    """Find mistakes in a study. Exit code 2 if there is an error."""
    from ..data import studies
    from ..evaluate import benchmarks
    from ..writing import study_yaml

    study = studies.find(name)
    with Bar(f"checking {study.folder.name}: recipes, data, and Axolotl's validation"):
        findings = study_yaml.findings(study)
    tables.show(json, [finding.as_json() for finding in findings], [], map(str, findings))
    counts = Counter(finding.level for finding in findings)
    if not counts["error"]:
        benchmarks.require(study.columns, force=force)
    say(f"{study.folder.name}: errors: {counts['error']}, warnings: {counts['warning']}")
    if counts["error"]:
        raise typer.Exit(2)
    suggest("reproduce", study.folder.name, "--rehearse", json=json)


@commands.command("doctor", cls=RecipeCommand, epilog="recipe doctor\nrecipe doctor --json")
def doctor_command(json: Json = False) -> None:
    """Find problems with this environment, GPU and disk, and suggest remedies."""
    from ..check.environment import check_environment

    lines = check_environment()
    if json:
        tables.print_json([vars(line) for line in lines])
    else:
        for line in lines:
            tables.print_text(f"{line.state:5}  {line.name}: {line.found}")
            if line.remedy:
                tables.print_text(f"       to do: {line.remedy}")
            if line.command:
                print(f"         {line.command}")  # not wrapped, for copying
    if any(line.state == "wrong" for line in lines):
        raise typer.Exit(1)
