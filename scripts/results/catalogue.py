"""What there is: `recipe list`, `show` and `diff`."""

from contextlib import suppress
from typing import Any

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..configs import variants
from ..data.study import entry
from ..planning import plan


def recipes() -> list[dict[str, Any]]:
    """Every shipped recipe, as `entry` describes it, and the memory that it needs where that was planned before."""
    found = []
    for name in paths.recipe_names():
        recipe = yamlfiles.read_yaml(paths.RECIPES / f"{name}.yaml")
        with suppress(UserError):  # one that cannot be planned
            planned = None
            planned = plan.needed_gib(recipe)
        found.append(entry(name, recipe) | {"planned_gib": planned})
    return found


def variants_table(tree: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`variants.tree` as a table shows it."""
    return [
        {"recipe": "  " * row["depth"] + row["recipe"], "changed": ", ".join(row["changed"]) or None} for row in tree
    ]


def diff(a: str, b: str | None) -> list[dict[str, Any]]:
    """The keys in which two recipes or configs differ, with both values, but for where they write to.

    Args:
        a: a recipe's name or a file.
        b: another; by default what the first is a variant of.

    Raises:
        UserError: there is no such recipe, or the first is no variant.
    """
    if b is None:
        above = variants.parent(*paths.find_recipe(a))
        if above is None:
            raise UserError(f"{a}: no variant of another recipe; name two")
        a, b = above, a
    return [{"key": key, a: left, b: right} for key, (left, right) in variants.changed(a, b).items()]
