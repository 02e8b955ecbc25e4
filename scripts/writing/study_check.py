"""Contradictions between study.yaml and the study's recipes, data and sample."""

from collections.abc import Iterator
from pathlib import Path

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..check import check, schema
from ..config import datafiles, merging
from ..config.compose import Request
from ..config.finding import Finding, Level
from ..data import prepare, sample
from ..data.declaration import Mistake, undeclared
from ..data.studies import Study
from . import render


def findings(of_study: Study) -> list[Finding]:
    """The mistakes in a study, errors first.

    Loading study.yaml reports the mistakes within that file; see `studies.load`.
    """
    names = [name for name in paths.recipe_names() if name.startswith(f"{of_study.folder.name}/")]
    found = [_finding(of_study, "error", mistake) for mistake in _errors(of_study, names)]
    if not found:
        reports = [check.check_request(Request(name)) for name in names]
        check.add_validation(reports, None)
        for report in reports:
            found += (finding for finding in report.findings if finding.level == "error")
    found += (_finding(of_study, "warning", mistake) for mistake in _warnings(of_study, names))
    report = check.Report(of_study.folder.name)
    report.add(found)
    return report.findings


def _finding(of_study: Study, level: Level, mistake: Mistake) -> Finding:
    key, problem = mistake
    file = of_study.folder / "study.yaml"
    return Finding(level, "", ".".join(key), problem, where=paths.shown(file), line=yamlfiles.line_of(file, key))


def _errors(of_study: Study, names: list[str]) -> Iterator[Mistake]:
    """Unknown recipes or settings, recipes that differ from templates, and rows that cannot be prepared."""
    recipes, templates = next(home for home in paths.homes() if home[0].absolute() == of_study.folder.parent)
    try:
        rendered = render.rendered(templates)
        yield from (((), orphan) for orphan in render.orphans(rendered, recipes))
        if render.drift(rendered, recipes):
            yield (), "recipes differ from their templates; see `recipe render --check`, then run `recipe render`"
        names = [file.removesuffix(".yaml") for file in rendered if file.startswith(f"{of_study.folder.name}/")]
    except UserError as error:
        yield (), f"templates cannot be rendered: {error}"
    for section in ("published", "variants"):
        for name in getattr(of_study, section):
            yield from undeclared((section, name), name, names)
    for i, key in enumerate(of_study.open_settings):
        yield from undeclared(
            ("open_settings", str(i)), merging.top_key(key), [*schema.load()["properties"], "decoding"]
        )
    try:
        prepare.check_expressions(of_study)
        for input_format in of_study.data.formats if of_study.data.sample else ():
            sample.rehearsal_data(of_study, input_format)
    except UserError as error:
        yield ("data", "sample" if of_study.data.sample else "fields"), f"rows cannot be prepared: {error}"


def _warnings(of_study: Study, names: list[str]) -> Iterator[Mistake]:
    """Recipes missing in study.yaml, recipes that read files outside its splits, and a missing sample."""
    data = of_study.data
    made = {Path(form.folder, f"{split}.jsonl") for form in data.formats.values() for split in data.splits}
    for name in names:
        if name not in of_study.published and name not in of_study.variants:
            yield ("published",), f"{name} is missing; add `{name}: {{}}` here or under variants"
        for dataset in datafiles.datasets(yamlfiles.read_yaml(paths.recipe_file(name))):
            path = dataset.entry.get("path")
            if Path(str(path)) not in made:
                there = ", ".join(map(str, sorted(made)))
                yield ("data", "splits"), f"{name} reads {path} ({dataset.key}.path); the splits write {there}"
    if not data.sample:
        yield ("data",), "no sample: rehearsals use another study's rows; set sample to a folder with a few rows"
