"""Print results of runs and studies, comparisons, and the power of a study."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from .. import backends, tables
from ..base.files import Row
from ..base.progress import say
from ..data.published import PublishedScore
from ..data.study import Study
from ..metrics.metric import Column
from ..runs.rundir import RunDir, readable
from ..scores import intervals
from ..tables import Table
from . import repeats, run_rows, verdict
from .compare import Comparison, Divergence
from .repeats import Outlook
from .run_rows import RunResult
from .verdict import StudyRow

AXOLOTL_EVAL_LOSS = "Axolotl's eval loss"  # shown for old runs without a loss per token
COSTS = "Other scores, and costs of the runs"
CURVES = "Our training loss minus the published one, over the same steps"
REHEARSALS = "Rehearsals (small stand-in model, few rows; not comparable with any published score)"
_SPARE = (
    *("minutes", "tokens/s", "rows", "peak GiB", "base model"),
    *("step", AXOLOTL_EVAL_LOSS, "eval loss", "published", "difference"),
)
_BELOW = ("trouble", "changed", "variant of", "jobs", "predictions", "adapter")
_HEADINGS = {
    "trainable": "trainable",
    "peak_gpu_memory_gib": "peak GPU GiB",
    "tokens_per_second": "tokens/s",
    "train_seconds": "seconds",
}


def show(folders: Sequence[RunDir], json: bool) -> None:
    """Print the results of runs."""
    found = [RunResult(folder, run) for folder, run in readable(folders, backends.read)]
    jobs = {result.folder.path: [*_jobs(result)] for result in found}
    if changed := [result.folder.path for result in found if result.changed]:
        say(f"evaluations that are stale or edited: {len(changed)}; for the last, run `recipe evaluate {changed[-1]}`")
    records = (run_rows.record(result, jobs[result.folder.path]) for result in found)
    tables.show(json, records, _of_runs(found, jobs))


def _jobs(result: RunResult) -> Iterator[str]:
    """Descriptions of unfinished jobs for the next steps of a run."""
    trained = result.run.state == "finished"
    for step, done in {"prepare": trained, "run": trained, "evaluate": result.evaluation}.items():
        if not done and (state := backends.job_state(result.folder, step)):
            yield f"{step}: {state}"


def _of_runs(found: Sequence[RunResult], jobs: Mapping[Path, list[str]]) -> Iterator[Table]:
    """Tables of runs, by study or metrics; rehearsals have separate tables."""
    for rehearsal in (False, True):
        groups: dict[str, list[RunResult]] = {}
        for result in (result for result in found if result.run.rehearsal == rehearsal):
            of_none = str({name: column.entry for name, column in result.columns.items()})
            groups.setdefault(result.study.folder.name if result.study else of_none, []).append(result)
        for group in groups.values():
            of_study = group[0].study
            columns = dict(of_study.table if of_study else group[0].columns)
            for result in group:
                columns |= {name: column for name, column in result.columns.items() if column.metric.of_model}
            title = REHEARSALS if rehearsal else "Runs"
            if len(groups) > 1:
                title += f": {of_study.folder.name}" if of_study else ": of no study"
            spare = [*[column.label for column in columns.values()][:0:-1], *_SPARE]  # all except the first
            rows = [_cells(result, columns, jobs[result.folder.path]) for result in group]
            yield Table(rows, title, spare=spare, below=_BELOW)
            if of_study and not rehearsal and not all(result.is_of_something_else for result in group):
                yield baselines(of_study)


def _cells(result: RunResult, columns: Mapping[str, Column], jobs: Sequence[str]) -> Row:
    """Table cells of a run, with comparisons for the first score."""
    run, summary, scores = result.run, result.summary, result.scores
    early = ", early stopping" if summary.ended == "early stopping" else ""
    kept = "" if summary.kept_step in (None, summary.step) else f", step {summary.kept_step} kept"
    losses = None
    if summary.eval_loss_per_token is not None:
        first_and_last = (summary.eval_loss_per_token_first, summary.eval_loss_per_token)
        losses = " → ".join(map(tables.text_of, first_and_last))
    first, *others = columns
    of_first = scores.get(first)
    cells: Row = {
        "run": result.folder.path.name,
        "recipe": run.recipe,
        "state": run.state,
        "jobs": "; ".join(jobs) or None,
        "step": f"{summary.step}/{summary.max_steps or '?'}{early}{kept}",
        "eval loss": losses,
        AXOLOTL_EVAL_LOSS: None if losses else summary.eval_loss,
    }
    if of_first:
        label = columns[first].label
        cells |= {label: of_first.value} | {f"{label}, {name}": value for name, value in of_first.decodings.items()}
        cells |= {"base model": of_first.base_model}
        if not run.rehearsal:
            cells |= {"published": of_first.published and of_first.published.value, "difference": of_first.difference}
    for name in others:
        cells[columns[name].label] = scores[name].value if name in scores else None
    for name, score in scores.items():
        if name in columns and columns[name].metric.of_model and score.gain is not None:
            cells[f"{columns[name].label}, gained"] = score.gain
    return cells | {
        "rows": result.rows_evaluated,
        "peak GiB": summary.peak_memory,
        "tokens/s": round(summary.tokens_per_second) if summary.tokens_per_second else None,
        "minutes": f"{summary.train_seconds / 60:.1f}",
        "predictions": result.changed,
        "adapter": run.published_adapter,
        "trouble": result.trouble,
        "variant of": run.variant_of,
        "changed": ", ".join(result.changed_keys) or None,
    }


def show_study(
    of_study: Study, rows: Sequence[StudyRow], rehearsal: bool, json: bool, tuned: Sequence[Row] = ()
) -> None:
    """Print the rows of a study; JSON also has the best members of sweeps."""
    if not rows and not json:
        say("no recipe of the study has been rehearsed yet; run `recipe reproduce` with --rehearse")
        return
    records = [verdict.record(row, of_study) for row in rows]
    if tuned:
        records = [one | {"tuned": [best for best in tuned if best["recipe"] == one["recipe"]]} for one in records]
    tables.show(json, records, of_rows(of_study, rows, rehearsal), [] if rehearsal else notes(of_study, rows))


def of_rows(of_study: Study, rows: Sequence[StudyRow], rehearsal: bool) -> Iterator[Table]:
    """Tables of a study: one per metric, costs, curves and baselines."""
    about = REHEARSALS if rehearsal else f"{of_study.cited}; published scores are on {of_study.test_title}"
    for column in of_study.table.values():
        title = about if column == of_study.first else column.label
        cells = [_of_metric(row, column) for row in rows]
        yield Table(cells, title, empty=True, spare=["95 % covers", "by", "rows", "difference"])
    others = {name: column for name, column in of_study.columns.items() if name not in of_study.table}
    beside = {key: any(row.costs()[key][1] is not None for row in rows) for key in _HEADINGS}
    costs = [_of_costs(row, others, beside) for row in rows]
    yield Table(costs, COSTS, empty=True, spare=["seconds", "trainable", "tokens/s", "peak GPU GiB", "eval loss"])
    gaps = [{"recipe": row.recipe, "mean gap": row.gap.mean, "largest gap": row.gap.largest, "at step": row.gap.step,
             "verdict": row.gap_verdict} for row in rows if row.gap]  # fmt: skip
    yield Table(gaps, CURVES)
    if not rehearsal:
        yield baselines(of_study)


def _of_metric(row: StudyRow, column: Column) -> Row:
    """Table cells of a study's row for one metric."""
    score, within = row.scores[column.name], row.scores[column.name].interval
    return {
        "recipe": row.recipe,
        "rows": row.chosen and row.chosen.rows_evaluated,
        column.label: score.value,
        "95 %": within and [within.low, within.high],
        "published": _published(score.published),
        "difference": score.difference,
        "verdict": score.verdict,
        "95 % covers": within and within.method,
        **score.decodings,
        **({"by": score.model} if column.metric.judged else {}),
    }


def _of_costs(row: StudyRow, others: Mapping[str, Column], beside: Mapping[str, bool]) -> Row:
    """Table cells of a study's row for other metrics and for costs."""
    cells: Row = {"recipe": row.recipe}
    cells |= {column.label: row.scores[name].value for name, column in others.items()}
    cells["eval loss"] = row.chosen and row.chosen.summary.eval_loss_per_token
    for key, (ours, published) in row.costs().items():
        if beside[key] or key in ("peak_gpu_memory_gib", "tokens_per_second"):
            cells[_HEADINGS[key]] = _whole(ours)
        if beside[key]:
            cells[f"{_HEADINGS[key]}, published"] = _whole(published)
    return cells | {"GPU hours": row.gpu_hours}


def _whole(value: float | None) -> str | float | None:
    """Format large numbers without decimals; return others unchanged."""
    return f"{value:,.0f}" if value is not None and value >= 100 else value


def _published(score: PublishedScore | None) -> float | str | None:
    """Published score for a table: a text if it has a ±, else a number."""
    if score is None or score.spread is None:
        return score.value if score else None
    return tables.plus_minus(score.value, score.spread)


def baselines(of_study: Study) -> Table:
    """Table of a study's baselines."""
    rows = [
        {
            "baseline": baseline.name,
            **{column.label: _published(baseline.scores.get(name)) for name, column in of_study.table.items()},
            "on": baseline.test_set,
        }
        for baseline in of_study.compared
    ]
    return Table(rows, "To compare with")


def notes(of_study: Study, rows: Sequence[StudyRow]) -> Iterator[str]:
    """Notes under the tables: differences, limits of intervals, and open settings."""
    for difference in of_study.differences:
        yield f"All recipes: {difference}"
    yield from _of_intervals(of_study, rows)
    for row in rows:
        if adapter := row.chosen and row.chosen.run.published_adapter:
            yield f"{row.recipe}: scores of the adapter {adapter}, which was not trained here."
        if row.differs:
            yield f"{row.recipe} differs from the paper: {'; '.join(row.differs)}"
        verdicts = {of_study.columns[name].label: score.verdict for name, score in row.scores.items()}
        verdicts["training loss"] = row.gap_verdict
        if off := [label for label, found in verdicts.items() if found == verdict.OFF]:
            of_which = "" if off == [of_study.first.label] else f" in {' and '.join(off)}"
            yield f"{row.recipe} is off{of_which}. The paper leaves these settings open: {'; '.join(row.open)}"


def _of_intervals(of_study: Study, rows: Sequence[StudyRow]) -> Iterator[str]:
    """Notes on limits of the intervals behind verdicts, with remedies."""
    scores = [score for row in rows for score in row.scores.values() if score.verdict]
    methods = [score.interval.method for score in scores if score.interval]
    if several := [row.recipe for row in rows if len(row.runs) > 1]:
        yield f"For these recipes, scores are means over runs that differ at most in their seed: {', '.join(several)}."
    seeds = f"`recipe reproduce {of_study.folder.name} --seeds 3` runs each recipe with three seeds"
    if any(method == intervals.ROWS_ONLY or method.endswith(repeats.ONE_SEED) for method in methods):
        yield f"An interval that covers {intervals.ROWS_ONLY}, or one seed, does not cover other seeds; {seeds}."
    if any(intervals.BORROWED in method for method in methods):
        yield f"A borrowed spread comes from published repeats, not from our runs; {seeds}."


def show_comparison(compared: Comparison, pair: tuple[str, str], json: bool) -> None:
    """Print a comparison of two runs."""
    if json:
        training = compared.training and asdict(compared.training)
        tables.print_json({"training": training, "scores": compared.scores})
        return
    title = f"a: {pair[0]}, b: {pair[1]}"
    if compared.training:
        for line in (f"Trainings, {title}", *_in_words(compared.training), ""):
            tables.print_text(line)
    if compared.scores is None:
        say(f"scores are not compared; first run `recipe evaluate` for {', '.join(compared.unscored)}")
    else:
        tables.print_table(compared.scores, title, spare=["equal", "rows", "p_wilcoxon", "better", "worse"])
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


def show_power(found: Outlook, of_study: Study, json: bool) -> None:
    """Print the chance to see a difference from a published score."""
    difference = tables.text_of(found.difference)
    rows = [
        {
            "seeds": chance.seeds,
            "rows": chance.rows,
            f"sees {difference}": f"{chance.sees:.0%}",
            f"smallest seen, {repeats.CHANCE:.0%}": chance.smallest,
            "false alarms": f"{chance.false_alarms:.0%}",
        }
        for chance in found.rows
    ]
    title = f"{of_study.first.label}: differences from a published score that runs of {found.study} can show"
    by_run, by_row, rest = map(
        tables.text_of, (found.deviation_of_runs, found.deviation_of_rows, found.deviation_of_a_row_in_a_run)
    )
    lines = [
        f"{difference} is {found.difference_from}. It is seen if the 95 % interval excludes a value at this distance.",
        f"Based on {found.rests_on}.",
        f"Standard deviations: {by_run} between runs, {by_row} between rows, {rest} of a row between runs.",
        f"The interval of one run covers {found.one_run}.",
        "A false alarm is a difference that is seen but does not exist; 5 % are normal.",
    ]
    tables.show(json, asdict(found), [Table(rows, title)], lines)
