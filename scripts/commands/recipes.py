"""The verbs about recipes: list, show, diff and new."""

from typing import Annotated, Any

import typer

from .. import tables
from ..base import paths, yamlfiles
from ..base.progress import harmless
from . import completion
from .help import Verb, next_step
from .options import Json, Name, Overrides, whole_name

HEADING = "Recipes"
verbs = typer.Typer()


@verbs.command("list", cls=Verb, rich_help_panel=HEADING, epilog="recipe list")
def list_verb(
    json: Json = False,
) -> None:
    """The recipes and your variants, with model, epochs, optimizer and published scores."""
    from ..results import catalogue

    rows = catalogue.recipes()
    if json:
        tables.print_json(rows)
    else:
        for title, table in catalogue.tables_of(rows):
            shown = [column for column in table[0] if column not in ("recipe", "epochs", "optimizer", "variant of")]
            spare = ["base model", *shown[:0:-1]]  # all but the first score, the last one first
            tables.print_table(table, title, spare=spare, below=["variant of"])
    published = next(row["recipe"] for row in rows if any(row[key] for key in row if key.startswith("published_")))
    next_step("run", published, "--rehearse", json=json)


@verbs.command("show", cls=Verb, rich_help_panel=HEADING, epilog="recipe show llama-3.2-3b")
def show_verb(name: Name, json: Json = False) -> None:
    """A recipe's YAML, with the source of each setting."""
    recipe, file = paths.find_recipe(name)
    if json:
        from ..data import study

        of_study = study.of(recipe)
        published = of_study.published.get(recipe) if of_study else None
        scores = published.model_dump(exclude_none=True) if published else None
        tables.print_json({"recipe": recipe, "config": yamlfiles.read_yaml(file), "published": scores})
    else:
        print(harmless(yamlfiles.read_text(file)), end="")


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
            autocompletion=completion.recipes,
            help="A recipe's name or a YAML file, such as a run's config.yaml.",
        ),
    ],
    b: Annotated[
        str | None,
        typer.Argument(
            metavar="[B]",
            callback=whole_name,
            autocompletion=completion.recipes,
            help="Another; by default what A is a variant of.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """The keys in which two recipes or configs differ, except where they write to."""
    from ..configs import config

    rows = config.recipe_diff(a, b)
    if json:
        tables.print_json(rows)
    elif rows:
        texts = [{column: _setting(value) for column, value in row.items()} for row in rows]
        tables.print_table(texts, below=[*rows[0]][1:])


def _setting(value: Any) -> str | None:
    """A setting as a config writes it; None where there is none."""
    return value if value is None or isinstance(value, str) else yamlfiles.write_flow(value)


@verbs.command(
    "new",
    cls=Verb,
    rich_help_panel=HEADING,
    epilog="recipe new wide --from llama-3.2-3b --set lora_r=64\nrecipe new mine --from 3.2-3b --model Qwen/Qwen3-4B",
)
def new_verb(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name; it is written to variants/NAME.yaml.")],
    from_: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="BASE",
            callback=whole_name,
            autocompletion=completion.recipes,
            help="The recipe or YAML file to start from.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Another base model: owner/name on the hub, or a folder."),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Write a variant of a recipe: the whole file with its comments, changed lines marked."""
    from ..base.progress import say
    from ..checks import check
    from ..checks.finding import refuse
    from ..configs import compose
    from ..writing import new

    overrides = set_ or []
    other = new.for_model(from_, model) if model else None
    request = compose.Request(from_, overrides=[*(other.overrides if other else []), *overrides])
    found = check.examine(compose.compose(request)).findings
    refuse([finding for finding in found if finding.scope not in ("code", "data", "file")])
    print(new.write(name, from_, overrides, other))
    for line in other.not_known if other else []:
        say(line)
    if not model and any(override.startswith("base_model=") for override in overrides):
        say("revision, special tokens, layers and comments are still those of the model before; --model replaces them")
    has_data = all(finding.level != "error" for finding in found)
    next_step(*(("check", name, "--data") if has_data else ("run", name, "--rehearse")))
