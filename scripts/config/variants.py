"""Variants: the recipe that a config derives from."""

import re
from pathlib import Path

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.files import Row
from ..base.secrets import without_secrets
from .merging import OF_THE_RUN, differences, top_key


def check_not_of_the_run(key: str, where: str) -> None:
    """Raise UserError for a key of `OF_THE_RUN`; `where` begins the message."""
    if top_key(key) in OF_THE_RUN:
        raise UserError(
            f"{where}: `recipe run` sets {key}; --runs selects the folder of runs, and `recipe resume` continues a run"
        )


_ORIGINAL = re.compile(r"# (?:\S+: a variant of (\S+)|(\S+): .*)")


def ancestors(file: Path) -> list[str]:
    """Originals of a variant or copy, nearest first, as listed in its header comments."""
    originals = []
    for line in yamlfiles.read_text(file).splitlines():
        if line and not line.startswith("#"):
            break
        match = _ORIGINAL.fullmatch(line)
        if match:
            originals.append(match[1] or match[2])
    return originals


def origin_of(name: str, file: Path) -> str | None:
    """Shipped recipe from which a file, variant or edited copy derives; None if unknown."""
    shipped = paths.recipe_names()
    return next((recipe for recipe in (name, *ancestors(file)) if recipe in shipped), None)


def parent_of(name: str, file: Path) -> str | None:
    """The recipe from which a variant derives directly; None if it has no parent."""
    if name in paths.recipe_names():
        return _declared_parent(name)
    existing = {*paths.recipe_names(), *paths.variant_names()}
    for original in ancestors(file):
        if original != name and (original in existing or Path(original).is_file()):
            return original
    return None


def _declared_parent(recipe: str) -> str | None:
    """The recipe of which a shipped recipe is a variant, in its study.yaml; None if it is not a variant."""
    from ..data import studies

    study = studies.usable_study_of(recipe)
    if study is None or recipe not in study.variants:
        return None
    return study.variants[recipe].of


def diff_from_parent(name: str) -> list[Row]:
    """Table rows of keys in which a variant differs from its parent, see `recipe_diff`.

    Raises:
        UserError: the recipe does not exist, or has no parent.
    """
    parent = parent_of(*paths.find_recipe(name))
    if parent is None:
        raise UserError(f"{name}: not a variant of another recipe; give a second recipe")
    return recipe_diff(parent, name)


def recipe_diff(a: str, b: str) -> list[Row]:
    """Table rows of keys in which two recipes or files differ; `OF_THE_RUN` is ignored.

    Raises:
        UserError: a recipe does not exist.
    """
    first, second = (yamlfiles.read_yaml(paths.find_recipe(name)[1]) for name in (a, b))
    rows = []
    for key, (left, right) in differences(first, second).items():
        if key not in OF_THE_RUN:
            rows.append({"key": key, a: without_secrets(left, key), b: without_secrets(right, key)})
    return rows
