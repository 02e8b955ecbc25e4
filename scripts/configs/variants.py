"""Variants: recipes that differ from another in named keys, written by `recipe new` or edited by hand."""

import os
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.files import write_atomically
from ..data import study
from . import config
from .edit import edited

_NAMED = re.compile(r"# (?:\S+: a variant of (\S+)|(\S+): .*)")
_SCHEMA = re.compile(r"(# yaml-language-server: \$schema=)\S+")


def ancestors(file: Path) -> list[str]:
    """The recipes that the comments at the head of a file name as what it is a variant or a copy of, nearest first."""
    header = takewhile(lambda line: not line or line.startswith("#"), yamlfiles.read_text(file).splitlines())
    return [found[1] or found[2] for line in header if (found := _NAMED.fullmatch(line))]


def origin(name: str, file: Path) -> str | None:
    """The shipped recipe that a file is a variant or an edited copy of, or is; None where it does not tell."""
    shipped = paths.recipe_names()
    return next((known for known in (name, *ancestors(file)) if known in shipped), None)


def parent(name: str, file: Path) -> str | None:
    """The recipe that another differs from in named keys; None where there is none."""
    if name in paths.recipe_names():
        of_study = study.of(name)
        return of_study.beside[name].of if of_study and name in of_study.beside else None
    known = {*paths.recipe_names(), *paths.variant_names()}
    return next((one for one in ancestors(file) if one != name and (one in known or Path(one).is_file())), None)


def tree() -> list[dict[str, Any]]:
    """Every recipe, shipped or a variant, below the one that it is a variant of: `depth`, `of`, and `changed` keys."""
    of: dict[str, str | None] = {}
    for name in (*paths.recipe_names(), *paths.variant_names()):
        above = parent(name, paths.find_recipe(name)[1])
        of[name] = above if above in paths.recipe_names() or above in paths.variant_names() else None
    rows: list[dict[str, Any]] = []

    def add(name: str, depth: int) -> None:
        above = of[name]
        rows.append(
            {"recipe": name, "of": above, "depth": depth, "changed": list(changed(above, name)) if above else []}
        )
        for below in of:
            if of[below] == name and below not in (row["recipe"] for row in rows):
                add(below, depth + 1)

    for name in sorted(of, key=lambda name: of[name] is not None):  # a circle has no first one
        if name not in (row["recipe"] for row in rows):
            add(name, 0)
    return rows


def changed(a: str, b: str) -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two recipes or files differ, with both values, but for where they write to."""
    first, second = (yamlfiles.read_yaml(paths.find_recipe(name)[1]) for name in (a, b))
    found = config.differences(first, second)
    return {key: values for key, values in found.items() if key not in config.OF_THE_RUN}


def write(name: str, base: str, overrides: list[str]) -> Path:
    """Write a variant of a recipe or file to variants/<name>.yaml.

    Args:
        name: its name.
        base: what it is a variant of.
        overrides: as `key=value`, what is changed.

    Raises:
        UserError: the name is taken or cannot be one, or a key cannot be changed.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name) or name.endswith((".yaml", ".yml")):
        raise UserError(f"{name}: no name for a variant; take letters, digits, - and _, as in my-ideas/wide")
    file = paths.VARIANTS / f"{name}.yaml"
    if name in paths.recipe_names() or file.exists():
        raise UserError(f"{name}: there is a recipe of that name; choose another")
    base_name, base_file = paths.find_recipe(base)
    text, content = yamlfiles.read_text(base_file), yamlfiles.read_yaml(base_file)
    if base_name not in (*paths.recipe_names(), *paths.variant_names()):
        base_name = paths.shown(base_file)
    changes = dict(map(config.parse_override, overrides))
    for key, value in changes.items():
        text = edited(text, key, value, str(base_file))
    if "output_dir" in content:  # so that plain Axolotl leaves the other's alone
        text = edited(text, "output_dir", f"outputs/{name}", str(base_file))
    write_atomically(file, _with_header(name, base_name, file, text))
    return file


def _with_header(name: str, base: str, file: Path, text: str) -> str:
    """The text of a variant with its own comments at its head, and the editor's schema where it is from there."""
    schema = os.path.relpath(paths.RECIPES / "axolotl.schema.json", file.parent)
    first, _, rest = text.partition("\n")
    line = _SCHEMA.sub(lambda found: found[1] + schema, first)
    first, rest = (f"{line}\n", rest) if _SCHEMA.match(first) else ("", text)
    return (
        f"{first}# {name}: a variant of {base}\n"
        f"# `recipe diff {name}` lists what it changes, `recipe run {name}` trains it.\n"
        f"# Changed lines say what was there before; all else, from here on, is as it was.\n#\n{rest}"
    )


def diff(a: str, b: str | None) -> list[dict[str, Any]]:
    """The keys in which two recipes or configs differ, with both values, but for where they write to.

    Args:
        a: a recipe's name or a file.
        b: another; by default what the first is a variant of.

    Raises:
        UserError: there is no such recipe, or the first is no variant.
    """
    if b is None:
        above = parent(*paths.find_recipe(a))
        if above is None:
            raise UserError(f"{a}: no variant of another recipe; name two")
        a, b = above, a
    return [{"key": key, a: left, b: right} for key, (left, right) in changed(a, b).items()]
