"""What there is: `recipe list`, `show` and `diff`."""

from contextlib import suppress
from typing import Any

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..data.study import entry
from ..planning import need


def recipes() -> list[dict[str, Any]]:
    """Every shipped recipe, as `entry` describes it, and the memory that it needs where that was planned before."""
    found = []
    for name in paths.recipe_names():
        recipe = yamlfiles.read_yaml(paths.RECIPES / f"{name}.yaml")
        with suppress(UserError):  # one that cannot be planned
            planned = None
            planned = need.needed_gib(recipe)
        found.append(entry(name, recipe) | {"planned_gib": planned})
    return found


def variants_table(tree: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`variants.tree` as a table shows it."""
    return [
        {"recipe": "  " * row["depth"] + row["recipe"], "changed": ", ".join(row["changed"]) or None} for row in tree
    ]
