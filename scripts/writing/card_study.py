"""Studies from model cards: the card's config as the recipe, its last eval loss as the published number."""

import os
import re
from pathlib import Path

from ..base import hub, paths, yamlfiles
from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..config import datafiles
from ..config.training_settings import TrainingSettings
from ..data import studies
from . import new, render
from .migrate import Migration

_LOSS, _STEP = "Validation Loss", "Step"
"""Columns of the table of training results that transformers writes into a model card."""
_COMPARED = {"Loss": "the table ends with", "total_train_batch_size": "config and num_devices give"}
"""Figures of a model card, and the words for the same figure elsewhere in it."""


def last_result(card: Path) -> tuple[str, str]:
    """Last eval loss of a model card, as printed, and its step.

    Raises:
        UserError: the card has no table of training results with an eval loss, or the last one is not a number.
    """
    head: list[str] = []
    row: dict[str, str] = {}
    for line in yamlfiles.read_text(card).splitlines():
        cells = [cell.strip() for cell in line.strip(" |").split("|")]
        if _LOSS in cells and _STEP in cells:
            head = cells
        elif len(cells) != len(head):
            head = []  # the table's end
        elif line.strip(" |:-"):  # not the line below the head
            row = dict(zip(head, cells, strict=True))
    remedy = "`recipe new NAME --from CARD` takes its config alone"
    if not row:
        problem = f"no table of training results with the columns {_STEP} and {_LOSS}"
        raise UserError(problem, file=card, remedy=remedy)
    loss, step = row[_LOSS], row[_STEP]
    if not re.fullmatch(r"(?a)\d{1,9}(\.\d{1,9})? \d{1,12}", f"{loss} {step}"):
        problem = f"no number to reproduce: the last {_LOSS} is {loss:.20}, at step {step:.20}"
        raise UserError(problem, file=card, remedy=remedy)
    return loss, step


def _compare(migration: Migration, loss: str) -> None:
    """Compare the figures of a card with its last eval loss, and with the rows per step of its config.

    Raises:
        UserError: they differ.
    """
    card = migration.old.file
    figures = yamlfiles.card_figures(card)
    rows = str(TrainingSettings.of(migration.config).rows_per_step)
    for name, value in (("Loss", loss), ("total_train_batch_size", rows)):
        if figures.get(name, value) != value:
            problem = f"{name} is {figures[name]}, but {_COMPARED[name]} {value}"
            raise UserError(problem, file=card, remedy="find out which is right, and correct the other in the card")


def write(name: str, migration: Migration) -> list[Path]:
    """Write the study of a model card below recipes/ and templates/, and render its recipe.

    Args:
        name: the name of the study and its folders.
        migration: the card's config, migrated.

    Returns:
        The files.

    Raises:
        UserError: the name is invalid or taken, the card has no eval loss or contradicts itself, or the user has to
            decide settings. `recipe study check` lists other mistakes in the card's config.
    """
    migration.require_decided()
    loss, step = last_result(migration.old.file)
    _compare(migration, loss)
    recipes, templates = render.free_folders(name)
    recipe = f"{name}/as-published"
    text = new.variant_text(recipe, recipes, str(migration.old.file), [], new.of_migration(migration))
    declaration = paths.template_environment(paths.TEMPLATES / "skeleton").get_template("card-study.yaml.txt")
    study = declaration.render(
        schema=os.path.relpath(studies.SCHEMA, recipes),
        name=name,
        recipe=recipe,
        migration=migration,
        data=_data(migration),
        loss=loss,
        step=step,
    )
    template = re.sub(r"\{[{%#]", r"{{ '\g<0>' }}", text)  # a card can contain chat templates in Jinja
    return render.write_files(name, {recipes / "study.yaml": study, templates / "as-published.yaml.j2": template})


def _data(migration: Migration) -> Config:
    """Path of the first data set, and its declaration as a source in study.yaml.

    Raises:
        UserError: the config has no data set.
    """
    datasets = datafiles.training_sets(migration.config)
    if not datasets:
        raise UserError("no data set", file=migration.old.file, key="datasets", remedy="add it to the card's config")
    entry = datasets[0].entry
    path = str(entry.get("path"))
    source = "{}"
    if hub.NAME.fullmatch(path) and not Path(path).exists():
        source = yamlfiles.write_flow({"hub": path, "revision": entry.get("revision", "main")})
        source += "  # write a commit here, and below datasets in the template"
    return {"path": yamlfiles.write_flow(path), "source": source}
