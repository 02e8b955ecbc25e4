"""Tables and JSON of studies' results, and of comparisons of runs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from ..base import tables
from ..base.errors import recipe_command
from ..base.files import Row
from ..base.hardware import GIB
from ..base.tables import Table
from ..base.terminal import say
from ..data.studies import Study
from ..evaluate.scores_file import about_rows
from ..metrics.metric import Column
from . import repeats, score_records, verdict
from .listing import REHEARSALS
from .score_records import Status
from .verdict import MetricRow, StudyRow

RECORDS = "Published numbers: submitted records, and grid points with other settings"
COSTS = "Other scores, and costs of the runs"
CURVES = "Our training loss minus the published one: mean and largest gap, and its step"
_HEADINGS = {
    "trainable": "trainable",
    "peak_gpu_memory_gib": "peak GPU GiB",
    "tokens_per_second": "tokens/s",
    "train_seconds": "seconds",
}


def show_study(study: Study, rows: Sequence[StudyRow], rehearsal: bool, json: bool, tuned: Sequence[Row] = ()) -> None:
    """Print a study's results, and records of its published numbers; JSON also has the best trial of each sweep."""
    if not rows and not json:
        say("no recipe of the study has been rehearsed yet; run `recipe reproduce STUDY --rehearse`")
        return
    records = [record(row) for row in rows]
    numbers = []
    remarks: Iterable[str] = []
    if not rehearsal:
        numbers = score_records.statuses(study, score_records.records(study))
        remarks = notes(study, rows)
    for fields in records:
        fields["records"] = [asdict(number) for number in numbers if number.name == fields["recipe"]]
        fields["tuned"] = [best for best in tuned if best["recipe"] == fields["recipe"]]
    tables.show(json, records, [*tables_of(study, rows, rehearsal), _records_table(study, numbers)], remarks)


def record(row: StudyRow) -> Row:
    """Flat JSON record of a row; the keys of a metric begin with the metric's name."""
    fields: Row = {
        "recipe": row.recipe,
        "run": None,
        "state": None,
        "published_adapter": None,
        "runs": len(row.runs),
        "rehearsal": row.rehearsal,
        "rows": None,
    }
    for name, score in row.scores.items():
        fields |= score.as_json(name) | repeats.json_fields(name, score.interval)
        fields |= {f"{name}_spread": score.spread, f"{name}_verdict": score.verdict, f"{name}_model": score.model}
    fields |= {"eval_loss": row.summary.eval_loss_per_token, "incomparable_loss": row.incomparable_loss}
    for key, (ours, published) in _costs(row).items():
        fields |= {key: ours, f"{key}_published": published}
    for key in ("mean", "largest", "step"):
        fields[f"train_loss_gap_{key}"] = getattr(row.gap, key, None)
    fields |= {"train_loss_verdict": row.gap_verdict, "gpu_hours": row.gpu_hours}
    fields |= {"differs": row.differs, "unreported": row.unreported}
    if row.chosen:
        fields |= {
            "run": str(row.chosen.folder.path),
            "state": row.chosen.run.state,
            "published_adapter": row.chosen.run.published_adapter,
            "rows": row.chosen.rows_evaluated,
        }
    return fields


def _records_table(study: Study, numbers: Sequence[Status]) -> Table:
    """Table of the published numbers that are in no other table, and of those with records."""
    rows = []
    for number in numbers:
        if number.settings or number.status != score_records.NOT_RUN:
            rows.append(asdict(number) | {"settings": number.options, "metric": study.columns[number.metric].label})
    return Table(rows, RECORDS, below=["status"])


def tables_of(study: Study, rows: Sequence[StudyRow], rehearsal: bool) -> Iterator[Table]:
    """Tables of a study: scores, costs, curves and baselines."""
    title = REHEARSALS if rehearsal else study.cited
    if any(row.is_published for row in rows):
        title += f"; published scores are on {study.test_title}"
    yield from _score_tables(study, rows, title)
    if any(row.chosen for row in rows):
        yield Table([_cost_cells(study, row) for row in rows], COSTS)
    gaps = [{"recipe": row.recipe, **asdict(row.gap), "verdict": row.gap_verdict} for row in rows if row.gap]
    yield Table(gaps, CURVES)
    if not rehearsal:
        yield baselines(study)


def baselines(study: Study) -> Table:
    """Table of a study's baselines, which are published scores of other methods."""
    rows = []
    for baseline in study.baselines:
        if not baseline.compared:
            continue
        row: Row = {"baseline": baseline.name}
        for name, column in study.table.items():
            row[column.label] = baseline.scores.get(name)
        rows.append(row | {"on": baseline.test_set})
    return Table(rows, "To compare with")


def _score_tables(study: Study, rows: Sequence[StudyRow], title: str) -> Iterator[Table]:
    """Tables of scores, named after their metric; the first one also has the title."""
    before = f"{title}: "
    for column in study.table.values():
        if any(row.scores[column.name].is_known for row in rows):
            cells = [_metric_cells(row, column) for row in rows]
            keep = [column.label, "published", "verdict"]
            yield Table(cells, f"{before}{column.label}", below=["95 % covers", "scored"], keep=keep)
            before = ""


def _metric_cells(row: StudyRow, column: Column) -> Row:
    """Table cells of a study's row for one metric."""
    score = row.scores[column.name]
    decodings = {f"{column.label}, {name}": value for name, value in score.decodings.items()}
    return {
        "recipe": row.recipe,
        column.label: score.value,
        **repeats.table_cells(score.interval),
        **_with_published_digits(column.label, score),
        "published": score.published,
        "difference": score.difference,
        "verdict": score.verdict,
        "scored": about_rows(row.evaluation),
        **decodings,
        "by": score.model,
    }


def _with_published_digits(label: str, score: MetricRow) -> Row:
    """Table cells of a score and its interval with the decimals of the published score, at least two.

    Other numbers of 1 and more have two decimals, which hide the difference between two losses.
    """
    if score.value is None or score.value < 1 or score.published is None:
        return {}
    decimals = max(2, -int(score.published.value.as_tuple().exponent))
    cells = {label: f"{score.value:.{decimals}f}"}
    if score.interval:
        cells["95 %"] = f"{score.interval.low:.{decimals}f} to {score.interval.high:.{decimals}f}"
    return cells


def _cost_cells(study: Study, row: StudyRow) -> Row:
    """Table cells of a study's row: costs, and scores by metrics that are not in `Study.table`."""
    cells: Row = {"recipe": row.recipe}
    for name, column in study.columns.items():
        if name not in study.table:
            cells[column.label] = row.scores[name].value
    cells["eval loss"] = row.summary.eval_loss_per_token
    for key, (ours, published) in _costs(row).items():
        cells |= {_HEADINGS[key]: _rounded(ours), f"{_HEADINGS[key]}, published": _rounded(published)}
    return cells | {"GPU hours": row.gpu_hours}


def _rounded(value: float | None) -> str | float | None:
    """Format large numbers without decimals; return others unchanged."""
    if value is None or value < 100:
        return value
    return f"{value:,.0f}"


def _costs(row: StudyRow) -> dict[str, tuple[float | None, float | None]]:
    """Costs of the run, paired with the published costs."""
    ours, log = row.summary, row.log
    peak = ours.peak_memory if row.on_gpu else None
    seconds = ours.train_seconds if row.chosen else None
    published_peak = None
    if log.reserved_bytes:
        published_peak = log.reserved_bytes / GIB
    return {
        "trainable": (ours.trainable_parameters, log.trainable),
        "peak_gpu_memory_gib": (peak, published_peak),
        "tokens_per_second": (ours.tokens_per_second, log.tokens_per_second),
        "train_seconds": (seconds, log.train_seconds),
    }


def notes(study: Study, rows: Sequence[StudyRow]) -> Iterator[str]:
    """Notes under the tables: differences from the paper, limitations of intervals, unreported hyperparameters."""
    for difference in study.differences:
        yield f"All recipes: {difference}"
    yield from _interval_notes(study, rows)
    for row in rows:
        yield from _row_notes(study, row)


def _interval_notes(study: Study, rows: Sequence[StudyRow]) -> Iterator[str]:
    """Notes on limitations of the intervals behind verdicts, with remedies."""
    measured = [row for row in rows if row.summary.eval_loss_per_token is not None]
    differing = [row.recipe for row in measured if not repeats.cover_same_tokens(row.runs)]
    if differing:
        yield f"{', '.join(differing)}: the runs' eval losses cover different or unknown tokens, and have no mean."
    if any(row.lacks_seeds for row in rows):
        command = recipe_command("reproduce", study.folder.name, "--seeds", 3)
        yield f"Intervals of one run or one seed do not cover other seeds; {command} runs each recipe with three seeds."


def _row_notes(study: Study, row: StudyRow) -> Iterator[str]:
    """Notes on a recipe's run."""
    if row.chosen is None:
        return
    if row.chosen.run.published_adapter:
        yield f"{row.recipe}: scores of the adapter {row.chosen.run.published_adapter}, which was not trained here."
    if row.chosen.recipe_note:
        yield f"{row.recipe}: {row.chosen.recipe_note}."
    if row.incomparable_loss:
        yield f"{row.recipe} is not compared with the published eval loss: {row.incomparable_loss}."
    if row.differs:
        yield f"{row.recipe} differs from the paper: {'; '.join(row.differs)}"
    off = [study.columns[name].label for name, score in row.scores.items() if score.verdict == verdict.OFF]
    if row.gap_verdict == verdict.OFF:
        off.append("training loss")
    if off:
        note = f"{row.recipe} is off in {' and '.join(off)}."
        if row.unreported:
            note += f" Unreported hyperparameters: {'; '.join(row.unreported)}"
        yield note
