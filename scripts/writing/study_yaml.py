"""study.yaml: written from a model card, or checked against the study's recipes, data and sample.

A card's config becomes the recipe, and its last eval loss the published number.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..base import hub, paths, yamlfiles
from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..check import check, schema
from ..config import datafiles
from ..config.compose import Request
from ..config.finding import Finding, Level
from ..config.training_settings import TrainingSettings
from ..data import prepare, studies
from ..data.declaration import Key, Mistake, undeclared
from ..data.studies import Study
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


def findings(study: Study) -> list[Finding]:
    """The mistakes in a study, errors first.

    Loading study.yaml reports the mistakes within that file; see `studies.load`.
    """
    names = [name for name in paths.recipe_names() if name.startswith(f"{study.folder.name}/")]
    findings = [_finding(study, "error", mistake) for mistake in _errors(study, names)]
    if not findings:
        findings = _recipe_errors(names)
    findings += [_finding(study, "warning", mistake) for mistake in _warnings(study, names)]
    report = check.Report(study.folder.name)
    report.add(findings)
    return report.findings


def _recipe_errors(names: list[str]) -> list[Finding]:
    """Errors in recipes."""
    reports = [check.check_request(Request(name)) for name in names]
    check.add_validation(reports, None)
    errors = []
    for report in reports:
        errors += [finding for finding in report.findings if finding.level == "error"]
    return errors


def _finding(study: Study, level: Level, mistake: Mistake) -> Finding:
    key, problem = mistake
    file = study.folder / "study.yaml"
    return Finding(level, "", ".".join(key), problem, where=paths.shown(file), line=yamlfiles.line_of(file, key))


def _errors(study: Study, names: list[str]) -> Iterator[Mistake]:
    """Unknown recipes or settings, recipes that differ from templates, and rows that cannot be prepared."""
    recipes, templates = next(home for home in paths.homes() if home[0].absolute() == study.folder.parent)
    try:
        rendered = render.rendered(templates)
        names = [file.removesuffix(".yaml") for file in rendered if file.startswith(f"{study.folder.name}/")]
        yield from _drift(rendered, recipes)
    except UserError as error:
        yield (), f"templates cannot be rendered: {error}"
    yield from _undeclared(study, names)
    yield from _unprepared(study)


def _drift(rendered: dict[str, str], recipes: Path) -> Iterator[Mistake]:
    """Recipes that differ from their templates."""
    for orphan in render.orphans(rendered, recipes):
        yield (), orphan
    if render.drift(rendered, recipes):
        yield (), "recipes differ from their templates; see `recipe render --check`, then run `recipe render`"


def _undeclared(study: Study, names: list[str]) -> Iterator[Mistake]:
    """Recipes and settings in study.yaml that do not exist."""
    for name in study.published:
        yield from undeclared(("published", name), name, names)
    for name in study.ablations:
        yield from undeclared(("ablations", name), name, names)
    settings = [*schema.load()["properties"], "decoding"]
    lists: dict[Key, list[str]] = {("reported",): study.reported, ("unreported",): study.unreported}
    lists |= {("published", name, "unreported"): results.unreported for name, results in study.published.items()}
    for place, keys in lists.items():
        for i, key in enumerate(keys):
            yield from undeclared((*place, str(i)), key, settings)


def _unprepared(study: Study) -> Iterator[Mistake]:
    """An expression that cannot be read, or rows of the sample that cannot be prepared."""
    try:
        prepare.check_expressions(study)
        if study.data.sample:
            for input_format in study.data.formats:
                prepare.rehearsal_data(study, input_format)
    except UserError as error:
        key = "sample" if study.data.sample else "fields"
        yield ("data", key), f"rows cannot be prepared: {error}"


def _warnings(study: Study, names: list[str]) -> Iterator[Mistake]:
    """Recipes missing in study.yaml, recipes that read files outside its splits, and a missing sample."""
    for name in names:
        if name not in study.recipes:
            yield ("published",), f"{name} is missing; add `{name}: {{}}` here or under ablations"
    data = study.data
    if not data.fields:
        return  # as in the study of a model card, the recipes load rows by themselves, which no sample replaces
    files = {Path(form.folder, f"{split}.jsonl") for form in data.formats.values() for split in data.splits}
    for name in names:
        for dataset in datafiles.datasets(yamlfiles.read_yaml(paths.recipe_file(name))):
            if Path(dataset.path) not in files:
                written = ", ".join(map(str, sorted(files)))
                yield (
                    ("data", "splits"),
                    f"{name} reads {dataset.path} ({dataset.key}.path); the splits write {written}",
                )
    if not data.sample:
        yield ("data",), "no sample: rehearsals use another study's rows; set sample to a folder with a few rows"
