"""Reports on runs, a study or a sweep, each in one HTML file."""

import gzip
import hashlib
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import distribution, version
from itertools import chain
from pathlib import Path
from typing import Any

import orjson
from markupsafe import Markup, escape

from ...base import paths, tables
from ...base.errors import UserError, recipe_command
from ...base.files import Row
from ...base.paths import template_environment
from ...base.processes import now
from ...base.tables import Table
from ...data.studies import Study
from ...metrics.metric import Column
from ...study.sweep import Sweep
from .. import listing, study_tables, sweep_results, verdict
from . import report_runs
from .report_figures import Figure, study_figures, sweep_figure, training_figures
from .report_runs import ReportedRun, labelled, labelled_by_recipe


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


@dataclass(frozen=True)
class Page:
    """Content of a report; the template asks for its parts.

    Attributes:
        kind: subject of the report.
        section: additional section for a study or sweep.
    """

    title: str
    kind: str
    runs: Sequence[ReportedRun]
    section: Section | None = None

    @property
    def contents(self) -> dict[str, str]:
        """Headings of the sections by their ids."""
        contents = {"overview": "At a glance"}
        if self.section:
            contents[self.section.key] = self.section.name
        contents |= {"training": "Training", "scores": "Scores"}
        if self._predictions:
            contents["predictions"] = "Predictions"
        return contents | {"settings": "Settings", "provenance": "Provenance"}

    @property
    def created(self) -> str:
        """Current time."""
        return now()

    @property
    def version(self) -> str:
        return version("qlora-recipes")

    @cached_property
    def overview(self) -> Sequence[Row]:
        rows = [listing.cells(reported, self._headings) | {"run": reported.label} for reported in self.runs]
        return _without_empty(Table(rows)).rows

    @cached_property
    def training(self) -> list[Figure]:
        """Figures of the training that have points."""
        return _drawn(training_figures({reported.label: reported.folder.read_metrics() for reported in self.runs}))

    @cached_property
    def scores(self) -> list[Row]:
        return report_runs.scores(self.runs, self._headings, details=True)

    @property
    def is_scored(self) -> bool:
        """True if a run is evaluated, or needs no evaluation."""
        return any(reported.is_scored for reported in self.runs)

    @property
    def scored_on(self) -> str:
        """Descriptions of the scored rows."""
        return "; ".join(
            dict.fromkeys(report_runs.scored_on(reported) for reported in self.runs if reported.evaluation)
        )

    @property
    def figures_data(self) -> str:
        """Figures for the page's script."""
        figures = [*self.training]
        if self.section:
            figures += self.section.figures
        return _packed(orjson.dumps({figure.key: figure.as_json() for figure in figures}))

    @cached_property
    def reader_data(self) -> str:
        """Predictions for the page's script; empty without predictions."""
        if not self._predictions:
            return ""
        return _packed(orjson.dumps(self._predictions))

    @property
    def style(self) -> Markup:
        return Markup((TEMPLATES / "report.css").read_text())

    @cached_property
    def script(self) -> Markup:
        return Markup("\n".join((TEMPLATES / name).read_text() for name in SCRIPTS))

    @property
    def plotly_code(self) -> str:
        """Plotly, for the page's script."""
        return _packed(self._plotly.encode())

    @property
    def script_hashes(self) -> str:
        """Hashes of the scripts that a browser may run."""
        digests = [hashlib.sha256(code.encode()).digest() for code in (self.script, self._plotly)]
        return " ".join(f"'sha256-{b64encode(digest).decode()}'" for digest in digests)

    @cached_property
    def _headings(self) -> dict[str, Column]:
        return report_runs.headings(self.runs)

    @cached_property
    def _predictions(self) -> list[Row]:
        return report_runs.reader(self.runs)

    @cached_property
    def _plotly(self) -> str:
        return Path(str(distribution("plotly").locate_file("plotly/package_data/plotly.min.js"))).read_text()

    def html(self) -> str:
        jinja = template_environment(TEMPLATES, escape=True)
        jinja.filters |= {"text": visible, "note": _note, "numbers": _has_numbers}
        return jinja.get_template("report.html.j2").render(page=self)


def runs_page(runs: Sequence[ReportedRun]) -> Page:
    """Report on one run, or on several side by side."""
    if len(runs) == 1:
        return Page(runs[0].run.recipe, f"Run {runs[0].folder.path.name}", runs)
    return Page(f"{len(runs)} runs", "Runs side by side", runs)


def study_page(study: Study, rehearsal: bool, runs: Path) -> Page:
    """Report on a study, with tables and one run of each recipe, selected by `verdict`.

    Raises:
        UserError: the study has no run.
    """
    rows = verdict.rows(study, runs, rehearsal)
    results = [row.chosen for row in rows if row.chosen]
    name = study.folder.name
    if not results:
        if rehearsal:
            remedy = f"start them with {recipe_command('reproduce', name, '--rehearse')}"
            raise UserError("no rehearsals", key=name, remedy=remedy)
        remedy = f"start them with {recipe_command('reproduce', name)}, or show rehearsals: --rehearse"
        raise UserError("no runs", key=name, remedy=remedy)
    shown = [_without_empty(table) for table in study_tables.tables_of(study, rows, rehearsal) if table.rows]
    section = Section(
        key="study",
        name="Study",
        about=f"{study.cited}.",
        tables=shown,
        notes=[*study_tables.notes(study, rows)],
        figures=[*study_figures(study, rows)],
    )
    return Page(study.title, f"Study {name}", labelled_by_recipe(results), section)


def sweep_page(sweep: Sweep, runs: Path) -> Page:
    """Report on a sweep: trade-offs of the trials, and their runs.

    Raises:
        UserError: no trial has a run.
    """
    rows = sweep_results.rows(sweep, runs)
    results, names = [], []
    for row in rows:
        results += row.runs
        names += [row.trial.name] * len(row.runs)
    if not results:
        raise UserError("no trial has a run yet", key=sweep.name, remedy="start them with `recipe sweep`")
    about = f"{len(rows)} variants of {sweep.recipe}, which differ in {', '.join(sweep.keys)}."
    table = sweep_results.table_of(sweep, rows)
    section = Section(
        key="sweep",
        name="Trade-offs",
        about=about,
        tables=[_without_empty(table)],
        notes=[*table.legend.values(), *sweep_results.notes(rows)],
        figures=_drawn([sweep_figure(rows)]),
    )
    return Page(sweep.name, f"Sweep of {sweep.recipe}", labelled(results, names), section)


def _drawn(figures: Iterable[Figure]) -> list[Figure]:
    """Figures with points."""
    return [figure for figure in figures if figure.traces]


def _without_empty(table: Table) -> Table:
    """Table without columns that are empty in all rows."""
    columns = dict.fromkeys(chain(*table.rows))
    filled = [column for column in columns if any(row.get(column) not in (None, "") for row in table.rows)]
    return replace(table, rows=[{column: row.get(column) for column in filled} for row in table.rows])


def _has_numbers(rows: Sequence[Row], column: str) -> bool:
    """True if a table's column has a number."""
    return any(isinstance(row[column], int | float) for row in rows)


def _packed(content: bytes) -> str:
    """Compress bytes for the page's script, in an encoding safe within HTML."""
    return b64encode(gzip.compress(content, 9, mtime=0)).decode()


def visible(value: Any) -> str:
    """Value as text; invisible characters are shown as code points."""
    return _MARKS.sub(lambda mark: f"⟨U+{ord(mark[0]):04X}⟩", tables.text_of(value))


def _note(text: str) -> Markup:
    """Sentence as HTML; text between backticks becomes code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", escape(visible(text))))
