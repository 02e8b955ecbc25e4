"""A study of the user's own, to begin with: `recipe study new`."""

import os
import re
from pathlib import Path

from ..base import paths
from ..base.errors import UserError
from ..base.files import write_atomically
from ..data import study
from . import render

_SKELETON = ".txt"  # so that no file of the skeleton is taken for a template or a recipe
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


def write(name: str, base_model: str) -> list[Path]:
    """Write a study that works as it is, below recipes/ and templates/ of the current folder, and render its recipe.

    Args:
        name: the study's; it becomes the folders' name.
        base_model: of its one recipe, which is named after it.

    Returns:
        The files.

    Raises:
        UserError: the name cannot be a folder's, or there is a study or a folder of that name.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{name}: a study is named in lower-case letters, digits, -, _ and ., as first-author-2026")
    recipes, templates = Path("recipes", name), Path("templates", name)
    for there in (*(folder for folder in paths.studies() if folder.name == name), recipes, templates):
        if there.exists():
            raise UserError(f"{paths.shown(there)}: there already; choose another name, or move it away")
    model = base_model.rpartition("/")[2].lower()
    words = {
        "{NAME}": name,
        "{MODEL}": model,
        "{BASE_MODEL}": base_model,
        "{STUDY_SCHEMA}": os.path.relpath(study.SCHEMA, recipes),
        "{SCHEMA}": os.path.relpath(paths.RECIPES / "axolotl.schema.json", recipes),
    }
    skeleton = paths.TEMPLATES / "skeleton"
    places = {
        "study.yaml": recipes / "study.yaml",
        "_base.yaml.j2": templates / "_base.yaml.j2",
        "recipe.yaml.j2": templates / f"{model}.yaml.j2",
        "sample/train.jsonl": recipes / "sample" / "train.jsonl",
        "sample/test.jsonl": recipes / "sample" / "test.jsonl",
    }
    for file, place in places.items():
        text = (skeleton / f"{file}{_SKELETON}").read_text(encoding="utf-8")
        for placeholder, word in words.items():
            text = text.replace(placeholder, word)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, text)
    return [*places.values(), *render.write(render.rendered(templates.parent), recipes.parent)]
