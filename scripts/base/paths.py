"""Where recipes, templates and caches are, and what a NAME, FILE or profile stands for."""

import os
from pathlib import Path

from .errors import UserError, did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]


def _shipped(folder: str) -> Path:
    """A folder of the project: inside the installed package, or beside scripts/ in a checkout."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


RECIPES = _shipped("recipes")
TEMPLATES = _shipped("templates")
PROFILES = RECIPES / "profiles"
SAMPLE = RECIPES / "sample"
RUNS = Path("runs")
VARIANTS = Path("variants")
LOCK = _PACKAGE.parent / "requirements.lock"


def cache() -> Path:
    """The folder for what can be made again: the stand-in model and prepared data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-recipes"


def shown(file: Path) -> str:
    """A file as messages name it: from here, where it is below."""
    absolute = file.absolute()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else file)


def studies() -> list[Path]:
    """The folders of recipes that belong to a study."""
    return sorted(file.parent for file in RECIPES.glob("*/study.yaml"))


def recipe_names() -> list[str]:
    """Every shipped recipe's name: its path under recipes/ without suffix."""
    files = (file for study in studies() for file in study.rglob("*.yaml") if file.name != "study.yaml")
    return sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in files)


def variant_names() -> list[str]:
    """Every variant's name: its path under variants/ without suffix."""
    return sorted(file.relative_to(VARIANTS).with_suffix("").as_posix() for file in VARIANTS.rglob("*.yaml"))


def find_recipe(name: str) -> tuple[str, Path]:
    """The name and file of a recipe or variant given as NAME or FILE.

    Raises:
        UserError: there is neither a recipe nor a file of that name.
    """
    if name in recipe_names():
        return name, RECIPES / f"{name}.yaml"
    if name in variant_names():
        return name, VARIANTS / f"{name}.yaml"
    file = Path(name)
    if file.suffix in (".yaml", ".yml"):
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        resolved = file.resolve()
        if resolved.is_relative_to(RECIPES):
            inside = str(resolved.relative_to(RECIPES).with_suffix(""))
            if inside in recipe_names():
                return inside, file
        if resolved.is_relative_to(VARIANTS.resolve()):
            return resolved.relative_to(VARIANTS.resolve()).with_suffix("").as_posix(), file
        return file.stem, file
    hint = did_you_mean(name, [*recipe_names(), *variant_names()]) or "; `recipe list` shows them all"
    raise UserError(f"{name}: no recipe of that name{hint}")


def find_profile(name: str) -> tuple[str, Path]:
    """The name and file of a profile: a shipped one's name, or FILE, which is its own name.

    Raises:
        UserError: there is neither.
    """
    shipped = {file.stem: file for file in sorted(PROFILES.glob("*.yaml"))}
    if name in shipped:
        return name, shipped[name]
    if Path(name).is_file():
        return next(((s, f) for s, f in shipped.items() if f == Path(name).resolve()), (name, Path(name)))
    hint = did_you_mean(name, shipped)
    raise UserError(f"{name}: no profile of that name{hint}; there are {', '.join(shipped)}, or any YAML file")
