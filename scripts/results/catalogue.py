"""The shipped recipes and the variants of them: `recipe list`."""

from contextlib import suppress
from typing import Any

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..data.study import entry
from ..planning import need


def recipes() -> list[dict[str, Any]]:
    """Every shipped recipe, as `entry` describes it, with the memory that it needs if that was planned before."""
    rows = []
    for name in paths.recipe_names():
        recipe = yamlfiles.read_yaml(paths.RECIPES / f"{name}.yaml")
        rows.append(entry(name, recipe) | {"planned_gib": None})
        with suppress(UserError):  # some cannot be planned
            rows[-1]["planned_gib"] = need.needed_gib(recipe)
    return rows


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `recipes` under the headings of a table."""
    return [
        {
            "recipe": row["recipe"],
            "epochs": row["epochs"],
            "optimizer": row["optimizer"],
            "BLEU-4": row["published_bleu4"],
            "BERTScore": row["published_bertscore_f1"],
            "planned GiB": row["planned_gib"],
            "base model": row["base_model"],
        }
        for row in rows
    ]


def variants_table(tree: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`variants.tree` as the rows of a table."""
    return [
        {"recipe": "  " * row["depth"] + row["recipe"], "changed": ", ".join(row["changed"]) or None} for row in tree
    ]
