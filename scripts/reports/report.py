"""`recipe report`: runs, a study or a sweep in one HTML file that needs no network."""

import gzip
import hashlib
import re
from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import orjson
from markupsafe import Markup, escape

from .. import tables
from ..base import paths
from ..base.errors import UserError
from ..base.files import Row
from ..base.machine import now
from ..base.paths import template_environment
from ..configs import gpus
from ..data.study import Study
from ..planning import planner
from ..results import listing, verdict
from ..running import sweep_results
from ..running.sweep import Sweep
from ..runs.rundir import RunDir, all_runs
from ..scores import evaluations
from . import report_figures as draw
from . import report_runs
from .report_runs import ReportedRun, reported_runs

TEMPLATES = paths.TEMPLATES / "report"
SCRIPTS = ("page.js", "charts.js", "reader.js")
# Characters that are invisible, or change the direction of the text behind them; reader.js has the same
_MARKS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def of_runs(runs: Sequence[ReportedRun]) -> str:
    """The report of one run, or of several side by side."""
    if len(runs) == 1:
        return _page(runs[0].run.recipe, f"Run {runs[0].folder.path.name}", runs)
    title = " and ".join(reported.label for reported in runs) if len(runs) == 2 else f"{len(runs)} runs"
    return _page(title, "Runs side by side", runs)


def of_study(study: Study, rehearsal: bool, runs: Path) -> str:
    """The report of a study: its table, and the representative runs of its recipes.

    Raises:
        UserError: it has no run.
    """
    for folder in all_runs(runs):
        evaluations.check_again(folder.path)
    rows = verdict.rows(study, runs, rehearsal)
    folders = [RunDir(Path(row["run"])) for row in rows if row["run"]]
    name = study.folder.name
    if not folders:
        kind, other = ("rehearsals", "") if rehearsal else ("runs", "; --rehearse takes its rehearsals")
        raise UserError(f"{name}: no {kind} of it below {runs}/{other}; `recipe reproduce {name}` makes them")
    about = "Published scores are left out: rehearsals compare with none." if rehearsal else (
        f"Published scores are on {study.test_title}."
    )  # fmt: skip
    by_metric = {c.label: _without_empty(listing.of_metric(rows, study, c)) for c in study.table.values()}
    measured, gaps = listing.of_measured(rows), listing.of_curves(rows)
    section = {
        "about": f"{study.cited}: {study.paper.get('title', study.title)}. {about}",
        "tables": by_metric
        | {listing.COSTS: _without_empty(listing.of_costs(rows, study))}
        | ({listing.MEASURED: measured} if measured else {})
        | ({listing.CURVES: _without_empty(gaps)} if gaps else {}),
        "baselines": [] if rehearsal else listing.baselines(study),
        "notes": [] if rehearsal else verdict.notes(study, rows),
        "figures": _existing(*(draw.study(study, rows, column) for column in study.table.values())),
    }
    return _page(study.title, f"Study {name}", reported_runs(folders), study=section)


def of_sweep(sweep: Sweep, runs: Path, best: str | None) -> str:
    """The report of a sweep: the trade-offs of its members, and their runs.

    Args:
        sweep: the sweep.
        runs: the folder with its runs.
        best: one of `sweep_results.criteria`, by which a member is the best.

    Raises:
        UserError: no member has a run, or see `sweep_results.check_best`.
    """
    for folder in all_runs(runs):
        evaluations.check_again(folder.path)
    rows, scored = sweep_results.rows(sweep, runs, best), sweep_results.columns(sweep, runs)
    folders = [RunDir(Path(run)) for row in rows for run in row["runs"]]
    if not folders:
        raise UserError(f"{sweep.name}: no member has a run yet; `recipe sweep` makes them")
    section = {
        "about": f"{len(rows)} variants of {sweep.recipe}, which differ in {', '.join(sweep.keys)}.",
        "notes": sweep_results.notes(sweep, scored, rows, best),
        "table": _without_empty([sweep_results.cells(sweep, scored, row) for row in rows]),
        "figures": _existing(draw.sweep(rows), draw.memory(rows)),
    }
    labels = [row["member"] for row in rows for _ in row["runs"]]
    return _page(sweep.name, f"Sweep of {sweep.recipe}", reported_runs(folders, labels), sweep=section)


def _existing(*figures: draw.Figure | None) -> list[draw.Figure]:
    return [figure for figure in figures if figure]


def _without_empty(rows: list[Row]) -> list[Row]:
    """Rows without the columns that are empty in all of them."""
    kept = [column for column in rows[0] if any(row[column] not in (None, "") for row in rows)]
    return [{column: row[column] for column in kept} for row in rows]


def check_file(file: Path) -> None:
    """Refuse a file that a report cannot be written to, before anything is read.

    Raises:
        UserError: its name is not that of an HTML file, or its folder is missing.
    """
    if file.suffix not in (".html", ".htm"):
        raise UserError(f"-o {file}: name an .html file")
    if not file.parent.is_dir():
        raise UserError(f"-o {file}: there is no folder {file.parent}")


def _page(title: str, kind: str, runs: Sequence[ReportedRun], **more: Any) -> str:
    """The HTML of what all reports have in common, and of what this one has besides."""
    alone = len(runs) == 1
    training = [figure for figure in draw.training({r.label: r.folder.read_metrics() for r in runs}) if figure.traces]
    if "sweep" not in more:
        training += _existing(draw.memory([_memory(reported) for reported in runs]))
    reader = report_runs.reader(runs)
    figures = [*training, *(figure for part in more.values() for figure in part["figures"])]
    facts: dict[str, Any] = {"study": None, "sweep": None} | more
    sections = {
        "overview": ("At a glance", True),
        "study": ("Study", facts["study"]),
        "sweep": ("Trade-offs", facts["sweep"]),
        "training": ("Training", True),
        "scores": ("Scores", True),
        "predictions": ("Predictions", reader),
        "settings": ("Settings", True),
        "provenance": ("Provenance", True),
    }
    facts |= {
        "title": title,
        "kind": kind,
        "rehearsal": runs[0].run.rehearsal,
        "made": now(),
        "version": version("qlora-recipes"),
        "overview": _without_empty([report_runs.overview(reported, report_runs.headings(runs)) for reported in runs]),
        "training": training,
        "scores": report_runs.scores(runs),
        "scored_on": "; ".join(dict.fromkeys(report_runs.scored_on(r) for r in runs if r.evaluation)),
        "reader": bool(reader),
        "reader_data": _packed(orjson.dumps(reader)),
        "settings": [report_runs.settings(r) | {"of": "" if alone else f" of {r.label}"} for r in runs],
        "provenance": [report_runs.provenance(r) | {"of": "" if alone else f" of {r.label}"} for r in runs],
        "figures_data": _packed(orjson.dumps({figure.key: figure.as_json() for figure in figures})),
        "contents": [(key, name) for key, (name, there) in sections.items() if there],
    }
    return _render(facts)


def _render(facts: dict[str, Any]) -> str:
    jinja = template_environment(TEMPLATES, escape=True)
    jinja.filters |= {
        "text": visible,
        "note": _note,
        "numbers": lambda rows, column: any(isinstance(row[column], int | float) for row in rows),
    }
    script = "\n".join((TEMPLATES / name).read_text() for name in SCRIPTS)
    plotly = Path(str(distribution("plotly").locate_file("plotly/package_data/plotly.min.js"))).read_text()
    digests = [hashlib.sha256(code.encode()).digest() for code in (script, plotly)]
    ours = {
        "script": Markup(script),
        "style": Markup((TEMPLATES / "report.css").read_text()),
        "plotly_code": _packed(plotly.encode()),
        "script_hashes": " ".join(f"'sha256-{b64encode(code).decode()}'" for code in digests),
    }
    return jinja.get_template("report.html.j2").render(facts | ours)


def _packed(content: bytes) -> str:
    """Bytes for the page's script to unpack; in this form no text in them can end the element that holds it."""
    return b64encode(gzip.compress(content, 9, mtime=0)).decode()


def visible(value: Any) -> str:
    """A value as text, with the code points of its invisible characters."""
    return _MARKS.sub(lambda mark: f"⟨U+{ord(mark[0]):04X}⟩", tables.text_of(value))


def _note(text: str) -> Markup:
    """A sentence as HTML, with code between backticks."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", escape(visible(text))))


def _memory(reported: ReportedRun) -> Row:
    """A run's measured memory, and the planned memory where a plan is kept."""
    planned = None
    cards = reported.run.provenance.get("gpus") or [{}]
    capability = cards[0].get("compute_capability")
    with suppress(UserError):  # some configs cannot be planned
        planned = planner.required_gib(reported.config, gpus.find(capability) if capability else None)
    measured = reported.run.summary
    return {
        "member": reported.label,
        "planned_gib": planned,
        "peak_memory_gib": measured.peak_memory,
        "memory_kind": measured.memory_kind,
    }
