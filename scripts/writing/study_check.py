"""Contradictions between study.yaml and the study's recipes, data and sample."""

from collections.abc import Iterator
from pathlib import Path

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..check import check, schema
from ..config import datafiles
from ..config.compose import Request
from ..config.finding import Finding, Level
from ..data import prepare
from ..data.declaration import Key, Mistake, undeclared
from ..data.studies import Study
from . import render


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
