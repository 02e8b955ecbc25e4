"""Origin of a recipe, variant or copy, as the block at its head states."""

import json
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Self

from ..base import paths, yamlfiles
from ..base.errors import UserError, did_you_mean, recipe_command
from ..base.files import Row, read_bytes, read_json, sha256
from ..base.run_files import MADE_FROM, RunFile
from ..base.secrets import without_secrets
from ..base.terminal import say
from ..base.yamlfiles import Config
from . import keys, merging
from .finding import NO_BASE, Finding, Level
from .merging import Difference, Source

_BLOCK = re.compile(r"^# /// recipe\n((?:#(?: .*)?\n)*?)# ///$", re.MULTILINE)


@dataclass
class Header:
    """Block of facts at the head of a recipe, in the form of Python's inline metadata (PEP 723).

    It is written in comments, so that the file stays a plain config of Axolotl. No other comment decides anything.

    Attributes:
        name: name of the recipe or variant; a copy keeps it.
        parent: recipe or file of which a variant was written.
        parent_sha256: hash of the parent's file at that time.
        origin: recipe of a study behind the parent, if the parent is another recipe or file.
        axolotl: release of Axolotl for which the file was written.
        base: recipe whose merged run is the base model.
    """

    name: str = ""
    parent: str = ""
    parent_sha256: str = ""
    origin: str = ""
    axolotl: str = ""
    base: str = ""

    def lines(self) -> list[str]:
        """The block's lines, without empty fields."""
        fields = asdict(self).items()
        lines = [f"# {field} = {json.dumps(value, ensure_ascii=False)}" for field, value in fields if value]
        return ["# /// recipe", *lines, "# ///"]


@dataclass(frozen=True)
class Base:
    """Run of a recipe, whose merged model is another recipe's base model.

    Attributes:
        recipe: name of the recipe.
        run: folder of the run; empty without one.
        adapter: hash of the merged adapter; empty until the run's adapter is merged.
    """

    recipe: str
    run: str = ""
    adapter: str = ""

    @classmethod
    def of_run(cls, recipe: str, folder: Path) -> Self:
        """Base in a finished run's folder."""
        base = cls(recipe, str(folder))
        merged = Path(base.model, MADE_FROM)
        trained = (read_json(folder / RunFile.RECORD).get("adapter") or {}).get("sha256")
        if merged.is_file() and read_bytes(merged).decode(errors="replace") == trained:
            return replace(base, adapter=trained)
        return base

    @classmethod
    def newest(cls, recipe: str, rehearsal: bool) -> Self:
        """Base in the newest finished run of a recipe, a rehearsal or a real one."""
        base = cls(recipe)
        for folder in sorted(paths.run_folders(paths.runs() / recipe)):
            record = read_json(folder / RunFile.RECORD)
            is_trained = record.get("state") == "finished" and not record.get("published_adapter")
            if is_trained and record.get("rehearsal") == rehearsal:
                base = cls.of_run(recipe, folder)
        return base

    @property
    def model(self) -> str:
        """Folder of the merged model."""
        return str(Path(self.run, RunFile.OUTPUT, RunFile.MERGED))

    @property
    def changes(self) -> Config:
        """Base model of a recipe with this base: until the merged one exists, that of the base."""
        if self.adapter:
            return {"base_model": self.model}
        content = merging.recipe_content(self.recipe)
        return {key: content.get(key) for key in ("base_model", "revision_of_model")}

    @property
    def source(self) -> Source:
        """Source of these changes."""
        if self.adapter:
            return Source("base", detail=f"merged model of {self.recipe}")
        return Source("base", detail=f"base model of {self.recipe}, which has no merged run")

    def findings(self, changes: Iterable[Difference], launching: bool) -> Iterator[Finding]:
        """A missing merged model, which only a run needs, and changes that put another model in its place."""
        if not self.adapter:
            level: Level = "error" if launching else "note"
            problem = f"the merged model of {self.recipe} does not exist yet"
            yield Finding(level, NO_BASE, "base_model", problem, self.remedy, rule_scope="file")
        for change in changes:
            if change.key == "base_model" and change.source != self.source:
                problem = f"{change.run} instead of the merged model of {self.recipe}, which the header names as base"
                remedy = "leave base_model out, or delete base in the header of a copy"
                yield Finding("error", "other-base", "base_model", problem, remedy)

    @property
    def remedy(self) -> str:
        """Commands that make the merged model."""
        merge = recipe_command("publish", self.run or self.recipe, "--merge")
        return f"run {merge}" if self.run else f"run {recipe_command('run', self.recipe)}, then {merge}"


def header_of(file: Path) -> Header:
    """Header of a recipe or card; empty if the file has none before its first key.

    Raises:
        UserError: the file cannot be read, or its header is malformed.
    """
    lines = yamlfiles.recipe_text(file).splitlines(keepends=True)
    head = "".join(takewhile(lambda line: line.startswith("#") or not line.strip(), lines))
    block = _BLOCK.search(head)
    if block is None:
        return Header()
    problem, fields = _parsed(block[1])
    if problem:
        line = head.count("\n", 0, block.start()) + 1
        remedy = "correct the lines between # /// recipe and # ///"
        raise UserError(f"header: {problem}", file=file, line=line, remedy=remedy)
    return Header(**fields)


def _parsed(lines: str) -> tuple[str, dict[str, str]]:
    """Problem with the lines of a header, if any, and their fields."""
    try:
        fields = tomllib.loads(re.sub("(?m)^# ?", "", lines))
    except tomllib.TOMLDecodeError as error:
        return f"not TOML: {error}", {}
    defaults = asdict(Header())
    for field, value in fields.items():
        if field not in defaults:
            return f"{field} is unknown{did_you_mean(field, defaults)}", {}
        if not isinstance(value, str):
            return f"{field}: not text", {}
    return "", fields


def origin_of(name: str, file: Path) -> str | None:
    """Built-in recipe from which a file, variant or edited copy derives; None if unknown."""
    header, recipes = header_of(file), paths.recipe_names()
    return next((recipe for recipe in (name, header.name, header.parent, header.origin) if recipe in recipes), None)


def parent_of(name: str, file: Path) -> str | None:
    """Recipe or file from which a variant or copy derives directly; None if it has no parent."""
    from ..data import studies

    if name in paths.recipe_names():
        study = studies.usable_study_of(name)
        parent = study.origin(name) if study else name
        if parent != name:
            return parent
    header = header_of(file)
    existing = {*paths.recipe_names(), *paths.variant_names()}
    for parent in filter(None, (header.name, header.parent)):
        if parent != name and (parent in existing or Path(parent).is_file()):
            return parent
    return None


def recipe_diff(a: str, b: str) -> list[Row]:
    """Table rows of keys in which two recipes or files differ, but for keys that a run sets.

    Args:
        a: a recipe or file.
        b: another; empty for the parent of `a`, which then comes first.

    Raises:
        UserError: a recipe does not exist, or `a` has no parent.
    """
    if not b:
        a, b = _parent(a), a
    first, second = map(merging.recipe_content, (a, b))
    rows = []
    for key, (left, right) in merging.differences(first, second).items():
        if keys.affects(key) != "run":
            rows.append({"key": key, a: without_secrets(left, key), b: without_secrets(right, key)})
    return rows


def _parent(name: str) -> str:
    recipe, file = paths.find_recipe(name)
    parent = parent_of(recipe, file)
    if parent is None:
        raise UserError(f"{name}: not a variant of another recipe; give a second recipe")
    header = header_of(file)
    if parent == header.parent and sha256(paths.find_recipe(parent)[1]) != header.parent_sha256:
        say(f"{parent} has changed since {recipe} was written; the differences include these changes")
    return parent
