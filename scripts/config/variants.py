"""Variants: the recipe that a config derives from."""

import re
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.secrets import without_secrets
from .merging import OF_THE_RUN, differences, top_key


def check_not_of_the_run(key: str, where: str) -> None:
    """Raise UserError for a key of `OF_THE_RUN`; `where` begins the message."""
    if top_key(key) in OF_THE_RUN:
        raise UserError(
            f"{where}: `recipe run` sets {key}; --runs selects the folder of runs, and `recipe resume` continues a run"
        )


_NAMED = re.compile(r"# (?:\S+: a variant of (\S+)|(\S+): .*)")


def ancestors(file: Path) -> list[str]:
    """Originals of a variant or copy, nearest first, as listed in its header comments."""
    header = takewhile(lambda line: not line or line.startswith("#"), yamlfiles.read_text(file).splitlines())
    return [named[1] or named[2] for line in header if (named := _NAMED.fullmatch(line))]


def origin_of(name: str, file: Path) -> str | None:
    """Shipped recipe from which a file, variant or edited copy derives; None if unknown."""
    shipped = paths.recipe_names()
    return next((recipe for recipe in (name, *ancestors(file)) if recipe in shipped), None)


def parent_of(name: str, file: Path) -> str | None:
    """The recipe from which a variant derives directly; None if it has no parent."""
    if name in paths.recipe_names():
        from ..data import studies

        of_study = studies.usable_study_of(name)
        return of_study.variants[name].of if of_study and name in of_study.variants else None
    existing = {*paths.recipe_names(), *paths.variant_names()}
    return next((of for of in ancestors(file) if of != name and (of in existing or Path(of).is_file())), None)


def recipe_diff(a: str, b: str | None) -> list[dict[str, Any]]:
    """Table rows of keys in which two recipes differ; `OF_THE_RUN` is ignored.

    Args:
        a: a recipe's name or file.
        b: another recipe; by default the parent of the first.

    Raises:
        UserError: a recipe does not exist, or the second is omitted and the first has no parent.
    """
    if b is None:
        above = parent_of(*paths.find_recipe(a))
        if above is None:
            raise UserError(f"{a}: not a variant of another recipe; give a second recipe")
        return recipe_diff(above, a)
    first, second = (yamlfiles.read_yaml(paths.find_recipe(name)[1]) for name in (a, b))
    differing = differences(first, second).items()
    return [
        {"key": key, a: without_secrets(left, key), b: without_secrets(right, key)}
        for key, (left, right) in differing
        if key not in OF_THE_RUN
    ]
