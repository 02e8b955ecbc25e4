"""What a study lacks, or contradicts: its study.yaml, its recipes, its data and its sample, against each other."""

from collections.abc import Iterator
from pathlib import Path

from ..base import paths, yamlfiles
from ..base.errors import UserError, did_you_mean
from ..configs import datafiles
from ..configs.compose import Request
from ..data import prepare, sample
from ..data.study import Study
from ..writing import render
from . import check, schema
from .finding import Finding, Level


def findings(of_study: Study) -> list[Finding]:
    """All that is to be mended or added in a study, errors first.

    Mistakes within study.yaml itself are reported when it is loaded, see `study.load`.
    """
    names = [name for name in paths.recipe_names() if name.startswith(f"{of_study.folder.name}/")]
    found = [*_recipes(of_study, names), *_settings(of_study), *_data(of_study, names)]
    if not any(finding.level == "error" for finding in found):
        for name in names:
            report = check.check(Request(name, rehearse=True))
            found += (finding for finding in report.findings if finding.level == "error")
    report = check.Report(of_study.folder.name)
    report.add(found)
    return report.findings


def _finding(of_study: Study, level: Level, key: tuple[str, ...], problem: str, remedy: str) -> Finding:
    file = of_study.folder / "study.yaml"
    line = yamlfiles.line_of(file, key)
    return Finding(level, "", ".".join(key), problem, remedy, where=paths.shown(file), line=line)


def _recipes(of_study: Study, names: list[str]) -> Iterator[Finding]:
    """Whether what study.yaml names, what is rendered and what templates there are is one and the same."""
    for section in ("published", "variants"):
        for name in getattr(of_study, section):
            if name not in names:
                hint = did_you_mean(name, names) or f"; add templates/{name}.yaml.j2, and `recipe render`"
                yield _finding(of_study, "error", (section, name), f"no recipe of that name{hint}", "")
    for name in names:
        if name not in of_study.published and name not in of_study.variants:
            remedy = "add its scores there, or it to variants"
            yield _finding(of_study, "warning", ("published",), f"says nothing of {name}", remedy)
    recipes, templates = next(home for home in paths.homes() if home[0].absolute() == of_study.folder.parent)
    try:
        if render.drift(render.rendered(templates), recipes):
            problem = "its recipes differ from their templates"
            yield _finding(
                of_study, "error", (), problem, "`recipe render --check` shows how, `recipe render` mends it"
            )
    except UserError as error:
        yield _finding(of_study, "error", (), f"its templates cannot be rendered: {error}", "")


def _settings(of_study: Study) -> Iterator[Finding]:
    known = [*schema.load()["properties"], "decoding"]
    for i, key in enumerate(of_study.open_settings):
        if key.partition(".")[0] not in known:
            hint = did_you_mean(key, known) or ""
            yield _finding(of_study, "error", ("open_settings", str(i)), f"{key} is not a key of Axolotl{hint}", "")
    if not any(published.scores for published in of_study.published.values()):
        yield _finding(of_study, "note", ("published",), "no score is published", "results then have no verdict")


def _data(of_study: Study, names: list[str]) -> Iterator[Finding]:
    """Whether its rows can be made, and whether its recipes train on them."""
    data = of_study.data
    for name, known in data.files.items():
        if known.sha256 is None:
            remedy = "`recipe data fetch` prints the checksum of what it got: add it"
            problem = "it has no sha256, so that a download is not verified"
            yield _finding(of_study, "note", ("data", "sources", name), problem, remedy)
    made = {Path(form.folder, f"{split}.jsonl") for form in data.formats.values() for split in data.splits}
    for name in names:
        for key, entry in datafiles.datasets(yamlfiles.read_yaml(paths.recipe_file(name))):
            if Path(str(entry.get("path"))) not in made:
                there = ", ".join(map(str, sorted(made)))
                problem = f"{name} has {entry.get('path')} as {key}.path, which none of them makes"
                yield _finding(of_study, "warning", ("data", "splits"), problem, f"they make {there}")
    try:
        prepare.check_expressions(of_study)
        if data.sample:
            for input_format in data.formats:
                sample.rehearsal_data(of_study, input_format)
    except UserError as error:
        what = "sample" if data.sample else "fields"
        yield _finding(of_study, "error", ("data", what), f"no rows can be made: {error}", "")
    if not data.sample:
        remedy = "put a few rows of your own into a folder, and name it as sample"
        yield _finding(of_study, "warning", ("data",), "no sample: rehearsals use another study's rows", remedy)
