"""Places of recipes, templates and caches, and the file that a NAME, FILE or profile stands for."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, did_you_mean, meant

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

_PACKAGE = Path(__file__).resolve().parents[1]


def _shipped(folder: str) -> Path:
    """A folder of the project: inside the installed package, or beside scripts/ in a checkout."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


RECIPES = _shipped("recipes")
TEMPLATES = _shipped("templates")
PROFILES = RECIPES / "profiles"
RUNS = "QLORA_RUNS"
VARIANTS = Path("variants")
LOCK = _PACKAGE.parent / "requirements.lock"


def runs() -> Path:
    """The folder that holds the runs: that of --runs, or of the environment variable."""
    return Path(os.environ.get(RUNS) or "runs")


def cache() -> Path:
    """Cache directory: stand-in model, prepared data, plans; each is made again where it is missing."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-recipes"


def kept() -> Path:
    """Per-user data directory."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "qlora-recipes"


def shown(file: Path) -> str:
    """A file's path in messages: relative if it is below the current folder."""
    absolute = file.absolute()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else file)


def homes() -> list[tuple[Path, Path]]:
    """The folders of recipes and of their templates: the project's, then recipes/ and templates/ of the current folder,
    where there may be studies of the user's own."""
    own = Path("recipes"), Path("templates")
    return [(RECIPES, TEMPLATES)] + [own] * (own[0].is_dir() and not own[0].samefile(RECIPES))


def studies() -> list[Path]:
    """The folders of recipes that belong to a study, the project's first."""
    return [file.parent for recipes, _ in homes() for file in sorted(recipes.glob("*/study.yaml"))]


def recipe_names() -> list[str]:
    """The starting points and every study's recipes by name: their paths under recipes/ without suffix."""
    folders = [*studies(), RECIPES / "start"]
    files = [(folder, file) for folder in folders for file in folder.rglob("*.yaml") if file.name != "study.yaml"]
    return sorted({file.relative_to(folder.parent).with_suffix("").as_posix() for folder, file in files})


def recipe_file(name: str) -> Path:
    """The file of a recipe of that name, whether or not there is one."""
    files = [recipes / f"{name}.yaml" for recipes, _ in homes()]
    return next(filter(Path.is_file, files), files[-1])


def variant_names() -> list[str]:
    """Every variant's name: its path under variants/ without suffix."""
    return sorted(file.relative_to(VARIANTS).with_suffix("").as_posix() for file in VARIANTS.rglob("*.yaml"))


def find_recipe(name: str) -> tuple[str, Path]:
    """The name and file of a recipe or variant given as NAME, a part of it (see `meant`) or FILE; a file that is
    neither is named by its stem.

    Raises:
        UserError: no recipe, variant or file has that name, or the name fits several.
    """
    variants = {variant: VARIANTS / f"{variant}.yaml" for variant in variant_names()}
    files = variants | {recipe: recipe_file(recipe) for recipe in recipe_names()}
    if name in files:
        return name, files[name]
    given = Path(name)
    if given.suffix in (".yaml", ".yml"):
        if not given.is_file():
            beside = did_you_mean(name, map(str, given.parent.glob("*.y*ml")))
            hint = beside or did_you_mean(str(given.with_suffix("")), files)
            raise UserError(f"{given}: no such file{hint}")
        return next((name for name, file in files.items() if file.samefile(given)), given.stem), given
    found = meant(name, files, "recipe", "; `recipe list` shows them all")
    return found, files[found]


def find_profile(name: str) -> tuple[str, Path]:
    """The name and file of a profile: a shipped one's name, FILE, which is its own name, or a part of a shipped one's.

    Raises:
        UserError: there is none, or several are meant.
    """
    shipped = {file.stem: file for file in sorted(PROFILES.glob("*.yaml"))}
    if name in shipped:
        return name, shipped[name]
    if Path(name).is_file():
        return next((profile for profile in shipped.items() if profile[1].samefile(name)), (name, Path(name)))
    found = meant(name, shipped, "profile", f"; there are {', '.join(shipped)}, or any YAML file")
    return found, shipped[found]


def template_environment(folder: Path, escape: bool = False) -> "SandboxedEnvironment":
    """The environment for the templates of a folder, which can extend the project's.

    Args:
        folder: the folder.
        escape: whether they are HTML, in which variables are text.
    """
    import jinja2
    from jinja2.sandbox import SandboxedEnvironment

    return SandboxedEnvironment(
        loader=jinja2.FileSystemLoader([folder, TEMPLATES]),
        undefined=jinja2.StrictUndefined,
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
