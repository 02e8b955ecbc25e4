"""Paths of recipes, templates and caches; lookup of recipes and profiles by name."""

import fnmatch
import glob
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, did_you_mean, meant, require_plain
from .run_files import RunFile

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

_PACKAGE = Path(__file__).resolve().parents[1]


def _built_in(folder: str) -> Path:
    """Path of a folder that the project ships, inside the installed package or beside scripts/."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


RECIPES = _built_in("recipes")
TEMPLATES = _built_in("templates")
PROFILES = RECIPES / "profiles"
SWEEPS = RECIPES / "sweeps"
HOURS = RECIPES / "hours.json"
"""Hours of the built-in recipes on one GPU, and equal figures of plans and published logs; tools/plans.py writes it."""
RUNS = "QLORA_RUNS"
VARIANTS = Path("variants")
LOCK = _PACKAGE.parent / "requirements.lock"


def runs() -> Path:
    """Folder for runs, from --runs or QLORA_RUNS; by default runs/."""
    return Path(os.environ.get(RUNS) or "runs")


NEW_RUN = ".new"
"""Name of a run folder that a process is creating."""


def run_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders of all runs below a folder, in no order."""
    return (file.parent for file in folder.rglob(RunFile.RECORD) if file.parent.name != NEW_RUN)


def cache() -> Path:
    """Cache directory; missing parts of its content are recreated."""
    return _of_user("XDG_CACHE_HOME", ".cache")


def user_data() -> Path:
    """Per-user data directory."""
    return _of_user("XDG_DATA_HOME", ".local/share")


def user_config() -> Path:
    """Per-user folder of settings."""
    return _of_user("XDG_CONFIG_HOME", ".config")


def _of_user(variable: str, default: str) -> Path:
    """This project's folder in one of the user's, which a variable or else a path below the home folder names."""
    return Path(os.environ.get(variable) or Path.home() / default) / "qlora-recipes"


def shown(file: Path) -> str:
    """Path of a file in messages, relative if it is below the current folder."""
    absolute = file.absolute()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else file)


def absence(missing: Path, hint: str = "") -> str:
    """Problem with a path of the wrong kind, or that does not exist; with a hint, by default to a similar name."""
    if missing.exists():
        return "is a folder" if missing.is_dir() else "is not a regular file"
    names = {}
    with suppress(OSError):  # no folder, or not readable
        names = {path.name.lower(): path for path in missing.absolute().parent.iterdir() if path.exists()}
    near = get_close_matches(missing.name.lower(), names, 1, 0.75)
    if near:
        hint = hint or f"; did you mean {shown(names[near[0]])}?"
    return f"does not exist{hint}"


def homes() -> list[tuple[Path, Path]]:
    """Folders of recipes and their templates: the project's, then the user's.

    The user's folders are recipes/ and templates/ in the current folder.
    """
    recipes = Path("recipes")
    if not recipes.is_dir() or recipes.samefile(RECIPES):
        return [(RECIPES, TEMPLATES)]
    return [(RECIPES, TEMPLATES), (recipes, Path("templates"))]


def studies() -> list[Path]:
    """Folders of all studies' recipes; the studies of the project come first."""
    return [file.parent for recipes, _ in homes() for file in sorted(recipes.glob("*/study.yaml"))]


def is_study(name: str) -> bool:
    """True for the name of a study."""
    return name in {folder.name for folder in studies()}


def recipe_names() -> list[str]:
    """Names of the recipes of studies and in start/: paths under recipes/ without suffix."""
    names = set()
    for folder in (*studies(), RECIPES / "start"):
        above = f"{folder.parent}/"
        files = {str(file) for file in folder.rglob("*.yaml") if file.name != "study.yaml"}
        names |= {file.removeprefix(above).removesuffix(".yaml") for file in files}
    return sorted(names)


def recipe_file(name: str) -> Path:
    """File of the named recipe; it need not exist."""
    files = [recipes / f"{name}.yaml" for recipes, _ in homes()]
    return next(filter(Path.is_file, files), files[-1])


def variant_names() -> list[str]:
    """Names of all variants: paths under variants/ without suffix."""
    return sorted(file.relative_to(VARIANTS).with_suffix("").as_posix() for file in VARIANTS.rglob("*.yaml"))


def matching(word: str, names: Collection[str]) -> list[str]:
    """Names that a word selects.

    A pattern selects the names that match it. If there are none, it selects the names whose part after a slash matches.
    Any other word selects the name that equals it. If there is none, it selects the names in the folder of that name.
    """
    patterns = (word, f"*/{word}") if glob.has_magic(word) else (word, f"{word}/*")
    return next(filter(None, (fnmatch.filter(names, pattern) for pattern in patterns)), [])


def selected(words: Collection[str] | None) -> list[str]:
    """Names of the recipes and variants that words select; by default, all recipes.

    A word is a name, a pattern or a study. Any other word is returned unchanged, for `find_recipe`.
    """
    if not words:
        return recipe_names()
    names = [*recipe_names(), *variant_names()]
    selection = []
    for word in words:
        selection += matching(word, names) or [word]
    return selection


def study_name(recipe: str) -> str:
    """Name of a recipe's study; of the recipe, if it belongs to no study."""
    return recipe.partition("/")[0]


def find_recipe(name: str) -> tuple[str, Path]:
    """Find a recipe or variant; return its name and file.

    It is found by name, by part of its name (see `meant`), or by file: YAML, or a model card with a config. A file
    elsewhere is named by its stem.

    Raises:
        UserError: the name matches no recipe, variant or file, or several, or has a control character.
    """
    files = {variant: VARIANTS / f"{variant}.yaml" for variant in variant_names()}
    files |= {recipe: recipe_file(recipe) for recipe in recipe_names()}
    file = Path(name)
    if file.suffix not in (".yaml", ".yml", ".md"):
        recipe = meant(name, files, "recipe", "; `recipe list` shows them all")
        file = files[recipe]
    elif file.is_file():
        recipe = _name_of(file, files) or file.stem
    else:
        raise UserError(absence(file, did_you_mean(str(file.with_suffix("")), files)), file=file)
    require_plain(recipe, file)
    return recipe, file


def _name_of(path: Path, files: Mapping[str, Path]) -> str | None:
    """Name of a path among named files."""
    return next((name for name, file in files.items() if file.samefile(path)), None)


def find_profile(name: str) -> tuple[str, Path]:
    """Find a profile by name, part of its name, or file; return name and file.

    Raises:
        UserError: the name matches no profile, or several, or has a control character.
    """
    return _find_yaml(name, PROFILES, "profile")


def find_sweep_file(name: str) -> Path:
    """Find a sweep file by path, or a built-in sweep file by partial name; errors as for `find_profile`."""
    return _find_yaml(name, SWEEPS, "sweep")[1]


def _find_yaml(name: str, folder: Path, kind: str) -> tuple[str, Path]:
    """Name and path of a user's file, or of a file in a folder of this project, see `find_profile`."""
    require_plain(name)
    built_in = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    file = Path(name)
    if name in built_in or not file.is_file():
        name = meant(name, built_in, kind, f"; there are {', '.join(built_in)}, or any YAML file")
        return name, built_in[name]
    return _name_of(file, built_in) or name, file


def template_environment(folder: Path, escape: bool = False) -> "SandboxedEnvironment":
    """Jinja environment for a folder's templates, which can extend the project's.

    Args:
        folder: the folder.
        escape: True to escape variables, for HTML templates.
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
