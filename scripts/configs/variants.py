"""Variants: recipes that differ from another in named keys, written by `recipe new` or edited by hand."""

import re
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..base import paths, yamlfiles
from ..base.errors import UserError
from . import config

STAMP = re.compile(r"(?m)^# Written for Axolotl (\S+)\.\n")
"""What the head of a variant says of the Axolotl that its text is for."""
_NAMED = re.compile(r"# (?:\S+: a variant of (\S+)|(\S+): .*)")


def ancestors(file: Path) -> list[str]:
    """The recipes that the comments at the head of a file name as what it is a variant or a copy of, nearest first."""
    header = takewhile(lambda line: not line or line.startswith("#"), yamlfiles.read_text(file).splitlines())
    return [named[1] or named[2] for line in header if (named := _NAMED.fullmatch(line))]


def origin(name: str, file: Path) -> str | None:
    """The shipped recipe that a file is, or is a variant or an edited copy of; None where it does not say."""
    shipped = paths.recipe_names()
    return next((recipe for recipe in (name, *ancestors(file)) if recipe in shipped), None)


def parent(name: str, file: Path) -> str | None:
    """The recipe that another differs from in named keys; None where there is none."""
    if name in paths.recipe_names():
        from ..data import study

        of_study = study.of_any(name)
        return of_study.variants[name].of if of_study and name in of_study.variants else None
    existing = {*paths.recipe_names(), *paths.variant_names()}
    return next((of for of in ancestors(file) if of != name and (of in existing or Path(of).is_file())), None)


def tree() -> list[dict[str, Any]]:
    """Every recipe, shipped or a variant, below the one that it is a variant of: `depth`, `of`, and `changed` keys."""
    names = [*paths.recipe_names(), *paths.variant_names()]
    parents = {name: parent(name, paths.find_recipe(name)[1]) for name in names}
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, depth: int) -> None:
        if name in rows:
            return
        of = parents[name] if parents[name] in names else None
        rows[name] = {"recipe": name, "of": of, "depth": depth, "changed": list(changed(of, name)) if of else []}
        for variant in names:
            if parents[variant] == name:
                add(variant, depth + 1)

    for name in sorted(names, key=lambda name: parents[name] in names):  # a circle has no first one
        add(name, 0)
    return list(rows.values())


def changed(a: str, b: str) -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two recipes or files differ, with both values, except for where they write to."""
    first, second = (yamlfiles.read_yaml(paths.find_recipe(name)[1]) for name in (a, b))
    differing = config.differences(first, second).items()
    return {key: values for key, values in differing if key not in config.OF_THE_RUN}


def diff(a: str, b: str | None) -> list[dict[str, Any]]:
    """The keys in which two recipes or configs differ, with both values, except for where they write to.

    Args:
        a: a recipe's name or a file.
        b: another; by default what the first is a variant of.

    Raises:
        UserError: there is no such recipe, or the first is not a variant.
    """
    if b is None:
        above = parent(*paths.find_recipe(a))
        if above is None:
            raise UserError(f"{a}: not a variant of another recipe; name two")
        return diff(above, a)
    return [{"key": key, a: left, b: right} for key, (left, right) in changed(a, b).items()]
