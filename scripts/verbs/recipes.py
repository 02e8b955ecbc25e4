"""The verbs list, show, diff, new, doctor, render and study."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base import paths, tables, yamlfiles
from ..base.errors import UserError, WorkFailed
from ..base.files import Row
from ..base.progress import harmless, say
from .help import Verb, Verbs, next_step
from .options import Force, Json, Name, Overrides, complete_recipes, complete_studies, whole_name

HEADING, UPKEEP = "Recipes", "Upkeep"
verbs = typer.Typer()
upkeep = typer.Typer()


@verbs.command("list", cls=Verb, rich_help_panel=HEADING, epilog="recipe list\nrecipe list haider2024")
def list_verb(
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
    rows = [row for row in _listed() if fnmatch(f"{row['study'] or ''}/{row['recipe']}".lower(), f"*{name.lower()}*")]
    if not rows:
        paths.find_recipe(name)  # suggests similar names
        raise UserError(f"{name}: a file, not a name; `recipe show {name}` prints its settings")
    if json:
        tables.print_json(rows)
    else:
        by_study: dict[str | None, list[Row]] = {}
        for row in rows:
            by_study.setdefault(row["study"], []).append(_shown(row))
        for study, table in by_study.items():
            tables.print_table(table, study or "Without a study", below=["variant of"])
    next_step("run", rows[0]["recipe"] if name else "start/qlora", "--rehearse", json=json)


def _listed() -> list[Row]:
    """All recipes and variants, with published scores as `published_METRIC`.

    study.yaml is read without validation, which would take longer than everything else together.
    Files that cannot be read are reported on stderr.
    """
    from ..config import merging

    rows = []
    studies = {folder.name: _declared(folder) for folder in paths.studies()}
    shipped = {name: paths.recipe_file(name) for name in paths.recipe_names()}
    own = {name: paths.VARIANTS / f"{name}.yaml" for name in paths.variant_names() if name not in shipped}
    for name, file in (shipped | own).items():
        try:
            recipe = yamlfiles.read_yaml(file)
            variant_of = merging.parent_of(name, file) if name in own else None
            study = str(name if name in shipped else merging.origin_of(name, file)).partition("/")[0]
        except UserError as error:
            say(str(error))
            continue
        row: Row = {
            "recipe": name,
            "study": study if study in studies else None,
            "base_model": recipe.get("base_model"),
            "epochs": recipe.get("num_epochs"),
            "optimizer": recipe.get("optimizer"),
            "variant_of": variant_of,
        }
        declared = studies.get(study, {})
        scores = _mapping(_mapping(_mapping(declared.get("published")).get(name)).get("scores"))
        for metric in _mapping(declared.get("metrics")):
            score = scores.get(metric)
            row[f"published_{metric}"] = score.get("value") if isinstance(score, dict) else score
        rows.append(row)
    return rows


def _declared(folder: Path) -> yamlfiles.Config:
    try:
        return yamlfiles.read_yaml(folder / "study.yaml")
    except UserError as error:
        say(str(error))
        return {}


def _mapping(value: Any) -> Row:
    """Return a mapping unchanged, and {} for other values, which `recipe study check` reports."""
    return value if isinstance(value, dict) else {}


def _shown(row: Row) -> Row:
    scores = {key.removeprefix("published_"): value for key, value in row.items() if key.startswith("published_")}
    return {
        "recipe": row["recipe"],
        "epochs": row["epochs"],
        "optimizer": row["optimizer"],
        **scores,
        "base model": row["base_model"],
        "variant of": row["variant_of"],
    }


@verbs.command("show", cls=Verb, rich_help_panel=HEADING, epilog="recipe show llama-3.2-3b")
def show_verb(name: Name, json: Json = False) -> None:
    """Print a recipe's YAML, with the source of each setting."""
    recipe, file = paths.find_recipe(name)
    if json:
        from ..data import studies

        of_study = studies.of(recipe)
        published = of_study.published.get(recipe) if of_study else None
        scores = published.model_dump(exclude_none=True) if published else None
        tables.print_json({"recipe": recipe, "config": yamlfiles.read_yaml(file), "published": scores})
    else:
        print(harmless(yamlfiles.masked_yaml(file)), end="")


@verbs.command(
    "diff",
    cls=Verb,
    rich_help_panel=HEADING,
    epilog="recipe diff llama-2-7b llama-3-8b\nrecipe diff runs/A/config.yaml runs/B/config.yaml",
)
def diff_verb(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            callback=whole_name,
            autocompletion=complete_recipes,
            help="Recipe name or YAML file, such as a run's config.yaml.",
        ),
    ],
    b: Annotated[
        str | None,
        typer.Argument(
            metavar="[B]",
            callback=whole_name,
            autocompletion=complete_recipes,
            help="Second recipe or file; default: the recipe that A is derived from.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compare two recipes or configs, key by key."""
    from ..config import merging

    rows = merging.recipe_diff(a, b)
    if json:
        tables.print_json(rows)
    elif rows:
        texts = [{column: yamlfiles.on_one_line(value) for column, value in row.items()} for row in rows]
        tables.print_table(texts, below=[*rows[0]][1:])


@verbs.command(
    "new",
    cls=Verb,
    rich_help_panel=HEADING,
    epilog="recipe new mine --data mine.jsonl\nrecipe new wide --from llama-3.2-3b --set lora_r=64",
)
def new_verb(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the variant, saved as variants/NAME.yaml.")],
    from_: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="BASE",
            callback=whole_name,
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
    set_: Overrides = None,
) -> None:
    """Write a variant of a recipe, with changed lines marked."""
    from ..check import check
    from ..config import compose
    from ..config.finding import refuse
    from ..writing import new

    sets = set_ or []
    overrides = sets
    if data:
        overrides = [*new.for_data(from_, data), *sets]
    changes = overrides
    notes: list[str] = []
    other = None
    if model:
        other = new.for_model(from_, model)
        changes = [*other.overrides, *overrides]
        notes = other.not_known
    composed = compose.compose(compose.Request(from_, overrides=changes))
    report = check.examine(composed, data=data is not None)
    refuse([finding for finding in report.findings if finding.scope != "code" and finding.rule != "not-prepared"])
    print(new.write(name, from_, overrides, other))
    if data:
        unread: list[str] = next((read["unread_fields"] for read in report.data), [])
        notes = [*notes, *new.reasons(composed.config, sets, unread)]
    for note in notes:
        say(note)
    if not model and any(override.startswith("base_model=") for override in overrides):
        say("revision, special tokens, layers and comments are still those of the former model; --model replaces them")
    next_step("check", name)


study_verbs = typer.Typer(
    cls=Verbs,
    help="Add a study of your own, and check it.",
    no_args_is_help=True,
    epilog="recipe study new mine\nrecipe study check mine",
)
upkeep.add_typer(study_verbs, name="study", rich_help_panel=UPKEEP)


@upkeep.command("doctor", cls=Verb, rich_help_panel=UPKEEP, epilog="recipe doctor\nrecipe doctor --json")
def doctor_verb(json: Json = False) -> None:
    """Find problems with this environment, GPU and disk, and suggest remedies."""
    from .doctor import examine

    lines = examine()
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


@upkeep.command("render", cls=Verb, rich_help_panel=UPKEEP, epilog="recipe render --check")
def render_verb(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; print differences from the templates, and fail on any.")
    ] = False,
) -> None:
    """Regenerate the recipes from their templates."""
    from ..writing import render

    drifts: list[str] = []
    for recipes, templates in paths.homes():
        rendered = render.rendered(templates)
        orphans = render.orphans(rendered, recipes)
        if check:
            drifts += [render.drift(rendered, recipes), *orphans]
        else:
            for file in render.write(rendered, recipes):
                print(file)
            for orphan in orphans:
                say(orphan)
    if any(drifts):
        print("\n".join(filter(None, drifts)))
        raise WorkFailed(
            "recipes differ from their templates; run `recipe render`, and delete recipes without a template"
        )


@study_verbs.command("new", cls=Verb, epilog="recipe study new smith2026")
def study_new_verb(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Study name, also used for its folders.")],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Base model of the study's first recipe.")
    ] = "meta-llama/Llama-3.2-3B",
) -> None:
    """Create a runnable starter study under recipes/ and templates/."""
    from ..writing import render

    for file in render.write_study(name, model):
        print(paths.shown(file))
    next_step("study", "check", name)


@study_verbs.command("check", cls=Verb, epilog="recipe study check haider2024")
def study_check_verb(
    name: Annotated[
        str,
        typer.Argument(metavar="STUDY", autocompletion=complete_studies, help="Study, or part of its name."),
    ],
    force: Force = None,
    json: Json = False,
) -> None:
    """Find mistakes in a study. Exit code 2 if there is an error."""
    from ..data import studies
    from ..evaluate import benchmarks
    from ..writing import study_check as checks

    of_study = studies.find(name)
    findings = checks.findings(of_study)
    tables.print_json([vars(finding) for finding in findings]) if json else [
        print(harmless(str(finding))) for finding in findings
    ]
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning")}
    if not counts["error"]:
        benchmarks.require(of_study.columns, force=force or [])
    say(f"{of_study.folder.name}: errors: {counts['error']}, warnings: {counts['warning']}")
    if counts["error"]:
        raise typer.Exit(2)
    next_step("reproduce", of_study.folder.name, "--rehearse", json=json)
