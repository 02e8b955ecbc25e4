"""The shipped recipes and the variants of them: `recipe list`."""

from contextlib import suppress
from typing import Any

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.progress import say
from ..configs import variants
from ..data import study
from ..data.published import Score
from ..planning import need
from ..terminal import tables


def recipes() -> list[dict[str, Any]]:
    """Every shipped recipe and every variant in the working folder, as `entry` describes it, with the memory that it
    needs if that was planned before, and the recipe that a variant is from.

    A variant that cannot be read is reported on stderr.
    """
    rows = []
    shipped = {name: paths.recipe_file(name) for name in paths.recipe_names()}
    own = {name: paths.VARIANTS / f"{name}.yaml" for name in paths.variant_names() if name not in shipped}
    for name, file in (shipped | own).items():
        try:
            recipe = yamlfiles.read_yaml(file)
            variant_of = variants.parent(name, file) if name in own else None
            origin = variants.origin(name, file)
        except UserError as error:
            say(str(error))
            continue
        rows.append(study.entry(name, recipe, origin) | {"planned_gib": None, "variant_of": variant_of})
        with suppress(UserError):  # some cannot be planned
            rows[-1]["planned_gib"] = need.needed_gib(recipe)
    return rows


def tables_of(rows: list[dict[str, Any]]) -> list[tuple[str | None, list[dict[str, Any]]]]:
    """The rows of `recipes` under the headings of a table for each study, and of one for what is of none; each with a
    title where there are several."""
    by_study: dict[str | None, list[dict[str, Any]]] = {}
    for row in rows:
        by_study.setdefault(row["study"], []).append(row)
    several = len(by_study) > 1
    return [
        (f"{name or 'Of no study'}" if several else None, _table(of_one, study.find(name) if name else None))
        for name, of_one in by_study.items()
    ]


def _table(rows: list[dict[str, Any]], of_study: study.Study | None) -> list[dict[str, Any]]:
    columns = {name: column.label for name, column in of_study.table.items()} if of_study else {}
    scores = {name: of_recipe.scores for name, of_recipe in of_study.published.items()} if of_study else {}
    return [
        {
            "recipe": row["recipe"],
            "epochs": row["epochs"],
            "optimizer": row["optimizer"],
            **{label: published(scores.get(row["recipe"], {}).get(name)) for name, label in columns.items()},
            "planned GiB": row["planned_gib"],
            "base model": row["base_model"],
            "variant of": row["variant_of"],
        }
        for row in rows
    ]


def published(score: Score | None) -> float | str | None:
    """A published score in a table: with its ± as text, otherwise as a number, which is aligned."""
    if score is None or score.spread is None:
        return score.value if score else None
    return tables.plus_minus(score.value, score.spread)


def variants_table(tree: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`variants.tree` as the rows of a table."""
    return [
        {"recipe": "  " * row["depth"] + row["recipe"], "changed": ", ".join(row["changed"]) or None} for row in tree
    ]
