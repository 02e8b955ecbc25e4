"""Reports on runs, a study or a sweep, each in one HTML file."""

import gzip
import hashlib
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import distribution, version
from itertools import chain
from pathlib import Path
from typing import Any

import orjson
from markupsafe import Markup, escape

from ...base import paths, tables
from ...base.errors import UserError
from ...base.paths import template_environment
from ...base.processes import now
from ...base.tables import Table
from ...data.studies import Study
from ...study.sweep import Sweep
from .. import listing, study_tables, sweep_results, verdict
from . import report_figures as draw
from . import report_runs
from .report_figures import Figure
from .report_runs import ReportedRun, reported_runs


@dataclass(frozen=True)
class Section:
    """Report section on a study or sweep, before the runs."""

    key: str
    name: str
    about: str
    tables: list[Table]
    notes: list[str]
    figures: list[Figure]


TEMPLATES = paths.TEMPLATES / "report"
SCRIPTS = ("page.js", "charts.js", "reader.js")
# Characters that are invisible or change the direction of text; reader.js has the same pattern
_MARKS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def of_runs(runs: Sequence[ReportedRun]) -> str:
    """Report on one run, or on several side by side."""
    if len(runs) == 1:
        return _page(runs[0].run.recipe, f"Run {runs[0].folder.path.name}", runs)
    return _page(f"{len(runs)} runs", "Runs side by side", runs)


def of_study(study: Study, rehearsal: bool, runs: Path) -> str:
    """Report on a study, with tables and one run of each recipe, selected by `verdict`.

    Raises:
        UserError: the study has no run.
    """
    rows = verdict.rows(study, runs, rehearsal)
    folders = [row.chosen.folder for row in rows if row.chosen]
    name = study.folder.name
    if not folders:
        if rehearsal:
            raise UserError(f"{name}: no rehearsals; start them with `recipe reproduce {name} --rehearse`")
        raise UserError(f"{name}: no runs; start them with `recipe reproduce {name}`, or show rehearsals: --rehearse")
    section = Section(
        key="study",
        name="Study",
        about=f"{study.cited}.",
        tables=[_without_empty(table) for table in study_tables.of_rows(study, rows, rehearsal) if table.rows],
        notes=[*study_tables.notes(study, rows)],
        figures=[figure for column in study.table.values() if (figure := draw.study(study, rows, column))],
    )
    return _page(study.title, f"Study {name}", reported_runs(folders), section)


def of_sweep(sweep: Sweep, runs: Path) -> str:
    """Report on a sweep: trade-offs of the members, and their runs.

    Raises:
        UserError: no member has a run.
    """
    rows = sweep_results.rows(sweep, runs)
    labels = {result.folder: row.member.name for row in rows for result in row.runs}
    if not labels:
        raise UserError(f"{sweep.name}: no member has a run yet; start them with `recipe sweep`")
    section = Section(
        key="sweep",
        name="Trade-offs",
        about=f"{len(rows)} variants of {sweep.recipe}, which differ in {', '.join(sweep.keys)}.",
        tables=[_without_empty(sweep_results.table_of(sweep, rows))],
        notes=[*sweep_results.notes(rows)],
        figures=[figure for figure in [draw.sweep(rows)] if figure],
    )
    return _page(sweep.name, f"Sweep of {sweep.recipe}", reported_runs([*labels], [*labels.values()]), section)


def _without_empty(table: Table) -> Table:
    """Table without columns that are empty in all rows."""
    columns = dict.fromkeys(chain(*table.rows))
    kept = [column for column in columns if any(row.get(column) not in (None, "") for row in table.rows)]
    return replace(table, rows=[{column: row.get(column) for column in kept} for row in table.rows])


def _page(title: str, kind: str, runs: Sequence[ReportedRun], section: Section | None = None) -> str:
    """HTML of a report, with an additional section for a study or sweep."""
    training = [figure for figure in draw.training({r.label: r.folder.read_metrics() for r in runs}) if figure.traces]
    reader = report_runs.reader(runs)
    figures = [*training, *(section.figures if section else [])]
    headings = report_runs.headings(runs)
    overview = [listing.cells(reported, headings, []) | {"run": reported.label} for reported in runs]
    contents = {
        "overview": "At a glance",
        **({section.key: section.name} if section else {}),
        "training": "Training",
        "scores": "Scores",
        **({"predictions": "Predictions"} if reader else {}),
        "settings": "Settings",
        "provenance": "Provenance",
    }
    jinja = template_environment(TEMPLATES, escape=True)
    jinja.filters |= {
        "text": visible,
        "note": _note,
        "numbers": lambda rows, column: any(isinstance(row[column], int | float) for row in rows),
    }
    script = "\n".join((TEMPLATES / name).read_text() for name in SCRIPTS)
    plotly = Path(str(distribution("plotly").locate_file("plotly/package_data/plotly.min.js"))).read_text()
    digests = [hashlib.sha256(code.encode()).digest() for code in (script, plotly)]
    return jinja.get_template("report.html.j2").render(
        title=title,
        kind=kind,
        runs=runs,
        section=section,
        contents=contents,
        made=now(),
        version=version("qlora-recipes"),
        overview=_without_empty(Table(overview)).rows,
        training=training,
        scores=report_runs.scores(runs, headings),
        scored_on="; ".join(dict.fromkeys(report_runs.scored_on(r) for r in runs if r.evaluation)),
        reader_data=_packed(orjson.dumps(reader)) if reader else None,
        figures_data=_packed(orjson.dumps({figure.key: figure.as_json() for figure in figures})),
        script=Markup(script),
        style=Markup((TEMPLATES / "report.css").read_text()),
        plotly_code=_packed(plotly.encode()),
        script_hashes=" ".join(f"'sha256-{b64encode(code).decode()}'" for code in digests),
    )


def _packed(content: bytes) -> str:
    """Compress bytes for the page's script, in an encoding safe within HTML."""
    return b64encode(gzip.compress(content, 9, mtime=0)).decode()


def visible(value: Any) -> str:
    """Value as text; invisible characters are shown as code points."""
    return _MARKS.sub(lambda mark: f"⟨U+{ord(mark[0]):04X}⟩", tables.text_of(value))


def _note(text: str) -> Markup:
    """Sentence as HTML; text between backticks becomes code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", escape(visible(text))))
