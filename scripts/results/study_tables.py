"""Print results of studies, and comparisons of runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from ..base import tables
from ..base.files import Row
from ..base.tables import Table
from ..base.terminal import say
from ..data.studies import Study
from ..evaluate.scores_file import about_rows
from ..metrics.metric import Column
from . import repeats, score_records, verdict
from .compare import Comparison, Divergence
from .listing import REHEARSALS, baselines
from .verdict import StudyRow

RECORDS = "Published numbers: submitted records, and cells with other settings"
COSTS = "Other scores, and costs of the runs"
CURVES = "Our training loss minus the published one: mean and largest gap, and its step"
_HEADINGS = {
    "trainable": "trainable",
    "peak_gpu_memory_gib": "peak GPU GiB",
    "tokens_per_second": "tokens/s",
    "train_seconds": "seconds",
}


def show_study(
    of_study: Study, rows: Sequence[StudyRow], rehearsal: bool, json: bool, tuned: Sequence[Row] = ()
) -> None:
    """Print a study's results, and records of its published numbers; JSON also has the best member of each sweep."""
    if not rows and not json:
        say("no recipe of the study has been rehearsed yet; run `recipe reproduce` with --rehearse")
        return
    records = [verdict.record(row) for row in rows]
    for one in records:
        one["tuned"] = [best for best in tuned if best["recipe"] == one["recipe"]]
    if rehearsal:
        tables.show(json, records, of_rows(of_study, rows, rehearsal))
        return
    numbers = score_records.statuses(of_study, score_records.records(of_study))
    for one in records:
        one["records"] = [asdict(number) for number in numbers if number.of == one["recipe"]]
    notable = [asdict(number) for number in numbers if number.cell or number.status != score_records.NOT_RUN]
    shown = [*of_rows(of_study, rows, rehearsal), Table(notable, RECORDS, below=["status"])]
    tables.show(json, records, shown, notes(of_study, rows))


def of_rows(of_study: Study, rows: Sequence[StudyRow], rehearsal: bool) -> Iterator[Table]:
    """Tables of a study: one per metric in `Study.table`, then costs, curves and baselines."""
    title = REHEARSALS if rehearsal else of_study.cited
    if any(score.published for row in rows for score in row.scores.values()):
        title += f"; published scores are on {of_study.test_title}"
    for column in of_study.table.values():
        scores = [row.scores[column.name] for row in rows]
        if any(score.value is not None or score.published for score in scores):
            yield Table([_of_metric(row, column) for row in rows], title, below=["scored"])
            title = column.label
    others = {name: column for name, column in of_study.columns.items() if name not in of_study.table}
    if any(row.chosen for row in rows):
        yield Table([_of_costs(row, others) for row in rows], COSTS)
    gaps = [{"recipe": row.recipe, **asdict(row.gap), "verdict": row.gap_verdict} for row in rows if row.gap]
    yield Table(gaps, CURVES)
    if not rehearsal:
        yield baselines(of_study)


def _of_metric(row: StudyRow, column: Column) -> Row:
    """Table cells of a study's row for one metric."""
    score, within = row.scores[column.name], row.scores[column.name].interval
    return {
        "recipe": row.recipe,
        column.label: score.value,
        "95 %": within and [within.low, within.high],
        "published": score.published,
        "difference": score.difference,
        "verdict": score.verdict,
        "95 % covers": within and within.method,
        "scored": row.chosen and about_rows(row.chosen.evaluation),
        **score.decodings,
        "by": score.model,
    }


def _of_costs(row: StudyRow, others: Mapping[str, Column]) -> Row:
    """Table cells of a study's row: costs, and scores by metrics that are not in `Study.table`."""
    cells: Row = {"recipe": row.recipe}
    cells |= {column.label: row.scores[name].value for name, column in others.items()}
    cells["eval loss"] = row.chosen and row.chosen.summary.eval_loss_per_token
    for key, (ours, published) in row.costs().items():
        cells |= {_HEADINGS[key]: _whole(ours), f"{_HEADINGS[key]}, published": _whole(published)}
    return cells | {"GPU hours": row.gpu_hours}


def _whole(value: float | None) -> str | float | None:
    """Format large numbers without decimals; return others unchanged."""
    return f"{value:,.0f}" if value is not None and value >= 100 else value


def notes(of_study: Study, rows: Sequence[StudyRow]) -> Iterator[str]:
    """Notes under the tables: differences from the paper, limitations of intervals, open settings."""
    for difference in of_study.differences:
        yield f"All recipes: {difference}"
    yield from _of_intervals(of_study, rows)
    for row in rows:
        if adapter := row.chosen and row.chosen.run.published_adapter:
            yield f"{row.recipe}: scores of the adapter {adapter}, which was not trained here."
        if row.chosen and row.chosen.other_tokens:
            yield f"{row.recipe} is not compared with the published eval loss: {row.chosen.other_tokens}."
        if row.differs:
            yield f"{row.recipe} differs from the paper: {'; '.join(row.differs)}"
        verdicts = {of_study.columns[name].label: score.verdict for name, score in row.scores.items()}
        verdicts["training loss"] = row.gap_verdict
        if off := [label for label, found in verdicts.items() if found == verdict.OFF]:
            of_which = "" if off == [of_study.first.label] else f" in {' and '.join(off)}"
            yield f"{row.recipe} is off{of_which}. The paper leaves these settings open: {'; '.join(row.open)}"


def _of_intervals(of_study: Study, rows: Sequence[StudyRow]) -> Iterator[str]:
    """Notes on limitations of the intervals behind verdicts, with remedies."""
    scores = [score for row in rows for score in row.scores.values() if score.verdict]
    if differing := [row.recipe for row in rows if len(set(map(repeats.tokens, row.runs))) > 1]:
        yield f"{', '.join(differing)}: {repeats.OTHER_ROWS}."
    if any(score.interval and not score.interval.covers_seeds for score in scores):
        command = f"`recipe reproduce {of_study.folder.name} --seeds 3`"
        yield f"Intervals of one run or one seed do not cover other seeds; {command} runs each recipe with three seeds."


def show_comparison(compared: Comparison, pair: tuple[str, str], json: bool) -> None:
    """Print a comparison of two runs or files of predictions."""
    if json:
        tables.print_json({"training": compared.training and asdict(compared.training), "scores": compared.scores})
        return
    title = f"a: {pair[0]}, b: {pair[1]}"
    if compared.training:
        for line in (f"Trainings, {title}", *_in_words(compared.training), ""):
            tables.print_text(line)
    if compared.scores is None:
        say(f"scores are not compared; first run `recipe evaluate` for {', '.join(compared.unscored)}")
    elif not compared.scores:
        say("scores are not compared: the two have no metric of rows in common; `--metric NAME` adds one to both")
    else:
        tables.print_table(compared.scores, title)
        if len(compared.scores) > 1:
            say(f"intervals and p values of {len(compared.scores)} metrics are not corrected for multiple comparisons")


def _in_words(training: Divergence) -> Iterator[str]:
    if training.step is None or training.losses is None:
        yield f"The recorded losses of steps {training.first} to {training.last} are equal."
    else:
        a, b = training.losses
        yield f"The losses differ from step {training.step} on: {a} in a, {b} in b."
    yield "Recorded differences between the runs:" if training.differences else "The runs' records are the same."
    for name, (old, new) in training.differences.items():
        yield f"{name}: {old} -> {new}"
