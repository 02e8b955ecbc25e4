"""The commands list, show and diff."""

from fnmatch import fnmatch
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base import paths, tables, yamlfiles
from ..base.errors import UserError, recipe_command
from ..base.files import Row, read_json
from ..base.terminal import harmless, warn
from .help import RecipeCommand, suggest
from .options import Json, Name, complete_recipes, recipe_argument, recipe_or_run

commands = typer.Typer(rich_markup_mode=None)


@commands.command("list", cls=RecipeCommand, epilog="recipe list\nrecipe list haider2024")
def list_command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            show_default=False,
            autocompletion=complete_recipes,
            help="Name of a recipe or study, part of one, or a pattern.",
        ),
    ] = "",
    json: Json = False,
) -> None:
    """List recipes and variants, with model, epochs, optimizer and published scores."""
    rows = [row for row in _listed() if _matches(row, name)]
    if not rows:
        paths.find_recipe(name)  # refuses other words than files, and suggests similar names
        raise UserError(f"{name}: a file, not a name; {recipe_command('show', name)} prints its settings")
    by_study: dict[str, list[Row]] = {}
    for row in rows:
        by_study.setdefault(row["study"] or "Without a study", []).append(_shown(row))
    studies = [tables.Table(table, study, ["variant of"]) for study, table in by_study.items()]
    built_in = read_json(paths.HOURS)
    note = f"cheapest run with a verdict: {built_in['cheapest']}; estimated hours are for one {built_in['gpu']}"
    tables.show(json, rows, studies, [] if name else [note])
    suggest("run", rows[0]["recipe"] if name else "start/qlora", "--rehearse", json=json)


def _matches(row: Row, name: str) -> bool:
    """True if a recipe's study and name contain a word; a pattern has to match its name or the part after a slash."""
    text = f"{row['study'] or ''}/{row['recipe']}".lower()
    if has_magic(name):
        return fnmatch(text, f"*/{name.lower()}")
    return name.lower() in text


def _listed() -> list[Row]:
    """All recipes and variants, with published scores as `published_METRIC`.

    study.yaml is read without validation, which would take longer than everything else together.
    Files that cannot be read are reported on stderr.
    """
    studies = {folder.name: _declared(folder) for folder in paths.studies()}
    hours = read_json(paths.HOURS)["recipes"]
    unknown = {"hours": None, "hours_are": None}
    files = {name: paths.recipe_file(name) for name in paths.recipe_names()}
    for name in paths.variant_names():
        files.setdefault(name, paths.VARIANTS / f"{name}.yaml")
    rows = []
    for name, file in files.items():
        try:
            rows.append(_row(name, file, studies) | hours.get(name, unknown))
        except UserError as error:
            warn(str(error))
    return rows


def _row(name: str, file: Path, studies: dict[str, yamlfiles.Config]) -> Row:
    from ..config.origin import origin_of, parent_of

    recipe = yamlfiles.read_yaml(file)
    origin, variant_of = name, None
    if paths.VARIANTS in file.parents:
        origin, variant_of = str(origin_of(name, file)), parent_of(name, file)
    study = paths.study_name(origin)
    row = {
        "recipe": name,
        "study": study if study in studies else None,
        "base_model": recipe.get("base_model"),
        "epochs": recipe.get("num_epochs"),
        "optimizer": recipe.get("optimizer"),
        "variant_of": variant_of,
    }
    return row | _published(name, studies.get(study, {}))


def _published(recipe: str, study: yamlfiles.Config) -> Row:
    """A recipe's published score for each metric that the study declares."""
    published = _mapping(_mapping(study.get("published")).get(recipe))
    scores = _mapping(published.get("scores"))
    row = {}
    for metric in _mapping(study.get("metrics")):
        score = scores.get(metric)
        row[f"published_{metric}"] = score.get("value") if isinstance(score, dict) else score
    return row


def _declared(folder: Path) -> yamlfiles.Config:
    try:
        return yamlfiles.read_yaml(folder / "study.yaml", yamlfiles.WrittenLoader)
    except UserError as error:
        warn(str(error))
        return {}


def _mapping(value: Any) -> Row:
    """Return a mapping unchanged, and {} for other values, which `recipe study check` reports."""
    return value if isinstance(value, dict) else {}


def _shown(row: Row) -> Row:
    scores = {}
    for key, value in row.items():
        if key.startswith("published_"):
            scores[key.removeprefix("published_")] = None if value is None else str(value)  # with all its digits
    return {
        "recipe": row["recipe"],
        "epochs": row["epochs"],
        "optimizer": row["optimizer"],
        "hours, one GPU": f"{row['hours']}, {row['hours_are']}" if row["hours"] else None,
        **scores,
        "base model": row["base_model"],
        "variant of": row["variant_of"],
    }


@commands.command("show", cls=RecipeCommand, epilog="recipe show llama-3.2-3b")
def show_command(name: Name, json: Json = False) -> None:
    """Print a recipe's YAML, with the source of each setting."""
    recipe, file = paths.find_recipe(name)
    if json:
        tables.print_json({"recipe": recipe, "config": yamlfiles.read_recipe(file)})
    else:
        print(harmless(yamlfiles.masked_yaml(file)).lstrip("\n"), end="")


@commands.command(
    "diff",
    cls=RecipeCommand,
    epilog="recipe diff code-llama-7b llama-3.2-3b\nrecipe diff RUN_A RUN_B",
)
def diff_command(
    a: Annotated[
        str,
        recipe_argument(metavar="A", callback=recipe_or_run, help="Recipe name, YAML file, or run."),
    ],
    b: Annotated[
        str,
        recipe_argument(
            metavar="[B]",
            callback=recipe_or_run,
            show_default=False,
            help="The other; default: the recipe that A is derived from.",
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Compare two recipes, configs or runs, key by key."""
    from ..config.origin import recipe_diff

    rows = recipe_diff(a, b)
    if json:
        tables.print_json(rows)
    elif rows:
        texts = [{column: yamlfiles.on_one_line(value) for column, value in row.items()} for row in rows]
        tables.print_table(texts, below=[*rows[0]][1:])
