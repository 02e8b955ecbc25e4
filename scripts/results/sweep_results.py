"""Results of a sweep: rows and tables."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from ..base import paths, tables, yamlfiles
from ..base.files import Row
from ..base.tables import Table
from ..base.yamlfiles import on_one_line
from ..data.studies import Study
from ..evaluate import evaluation_rows
from ..evaluate.intervals import Interval
from ..evaluate.scores_file import about_rows
from ..metrics.metric import Column
from ..study.pipeline import existing_runs
from ..study.sweep import Sweep, SweepMember, of_recipe
from ..training.run_record import Summary
from . import repeats, run_result
from .listing import REHEARSALS
from .run_result import RunResult

LOSS = "eval_loss"


@dataclass
class SweepRow:
    """Results of the members of a sweep that differ only in seed.

    Attributes:
        member: the first member.
        runs: existing runs of the members.
        summary: summary of the first finished run, for values that do not depend on the seed.
        columns: metrics of the sweep's runs; without runs, the recipe's metrics.
        scores: mean over finished runs and 95 % interval by metric, including the eval loss.
        losses: eval losses of the finished runs, by hash of the tokens behind them.
        compared_loss: mean eval loss over the tokens that all members share; None if they share none.
        published: published scores for the member's settings, by metric.
        validated: whether the eval loss may select a member: it is known, and comes from rows other than the test rows.
        pareto: whether the row is on the Pareto front over peak memory and eval loss.
    """

    member: SweepMember
    seeds: list[int]
    runs: list[RunResult]
    summary: Summary
    columns: dict[str, Column]
    scores: dict[str, tuple[float | None, Interval | None]]
    losses: dict[str | None, list[float]]
    published: dict[str, float]
    peak_memory_gib: float | None
    train_seconds: float | None
    validated: bool
    compared_loss: float | None = None
    pareto: bool = False

    @property
    def costs(self) -> tuple[float, float] | None:
        """Peak memory and eval loss; None unless both are known, and the loss is comparable."""
        loss = self.compared_loss
        return None if loss is None or self.peak_memory_gib is None else (self.peak_memory_gib, loss)


def rows(sweep: Sweep, runs: Path) -> list[SweepRow]:
    """Return one row per member name, with measurements of finished runs.

    Rows without separate validation data are not on the Pareto front: a loss on test rows must not select members.
    Losses are compared within the same tokens, thus seed by seed if the seed decides which rows are held out.
    """
    existing = existing_runs(runs, sweep.recipe)
    results = {m.digest: RunResult(*existing[m.digest]) for m in sweep.members if m.digest in existing}
    columns: dict[str, Column] = {}
    for result in results.values():
        columns |= result.columns
    columns = columns or of_recipe(sweep.recipe)
    compared = []
    for _, of_name in itertools.groupby(sweep.members, key=lambda member: member.name):
        members = list(of_name)
        compared.append(_row(sweep, members, [results[m.digest] for m in members if m.digest in results], columns))
    of_members = [set(row.losses) for row in compared if row.losses]
    shared = set.intersection(*of_members) if of_members else set()
    for row in compared:
        if row.losses and shared:
            row.compared_loss = fmean(fmean(row.losses[tokens]) for tokens in shared)
    for row in compared:
        row.pareto = row.validated and on_front(row.costs, [other.costs for other in compared])
    return compared


def _published(sweep: Sweep, results: Sequence[RunResult]) -> dict[str, float]:
    """Published scores for the settings of a member's runs; empty without runs or published cells."""
    of_study = results[0].study if results else None
    if sweep.rehearsal or not of_study:
        return {}
    run = results[0].run
    changes = run_result.other_settings(run)
    changes.pop(repeats.SEED, None)
    cell = of_study.cell(run.origin, yamlfiles.read_yaml(paths.recipe_file(run.origin)), changes)
    if cell is None:
        return {}
    return {name: fmean(scores) for name, scores in cell.scores.items()}


def on_front(own: tuple[float, float] | None, all_costs: Sequence[tuple[float, float] | None]) -> bool:
    """True if `own` is on the Pareto front of all costs."""
    rivals = [other for other in all_costs if other not in (None, own)]
    return own is not None and not any(rival[0] <= own[0] and rival[1] <= own[1] for rival in rivals if rival)


def _row(
    sweep: Sweep, members: Sequence[SweepMember], results: list[RunResult], columns: dict[str, Column]
) -> SweepRow:
    """Row for members with the same name."""
    done = [result for result in results if result.run.state == "finished"]
    of_study = done[0].study if done and not sweep.rehearsal else None
    scores: dict[str, tuple[float | None, Interval | None]] = {}
    for name in (LOSS, *columns):
        found = [(result, value) for result in done if (value := _score(result, name)) is not None]
        known = of_study.repeats(done[0].run.origin, name) if of_study else []
        mean = fmean(value for _, value in found) if found else None
        scores[name] = (mean, repeats.interval(name, found, known) if found else None)
    losses: dict[str | None, list[float]] = {}
    for result in done:
        if result.summary.eval_loss_per_token is not None:
            losses.setdefault(repeats.tokens(result), []).append(result.summary.eval_loss_per_token)
    return SweepRow(
        member=members[0],
        seeds=[member.seed for member in members if member.seed is not None],
        runs=results,
        summary=done[0].summary if done else Summary(),
        columns=columns,
        scores=scores,
        losses=losses,
        published=_published(sweep, results),
        peak_memory_gib=max((r.summary.peak_memory for r in done if r.summary.peak_memory), default=None),
        train_seconds=fmean(result.summary.train_seconds for result in done) if done else None,
        validated=scores[LOSS][0] is not None
        and all(evaluation_rows.validation(each.run, each.folder.config) for each in done),
    )


def _score(result: RunResult, name: str) -> float | None:
    if name == LOSS:
        return result.summary.eval_loss_per_token
    return result.scores[name].value if name in result.scores else None


def record(row: SweepRow) -> Row:
    """Row in the JSON output."""
    scores: Row = {}
    for name, (value, within) in row.scores.items():
        scores |= {name: value} | repeats.interval_cells(name, within)
    return {
        "member": row.member.name,
        "values": row.member.values,
        "seeds": row.seeds,
        "runs": [str(result.folder.path) for result in row.runs],
        "states": [result.run.state for result in row.runs],
        **scores,
        "eval_tokens": [*row.losses],
        "planned_gib": row.member.planned_gib,
        "peak_memory_gib": row.peak_memory_gib,
        "memory_kind": row.summary.memory_kind,
        "trainable": row.summary.trainable_parameters,
        "train_seconds": row.train_seconds,
        "tokens_per_second": row.summary.tokens_per_second,
        **{f"{name}_published": row.published.get(name) for name in row.scores},
        "pareto": row.pareto,
    }


def show(sweep: Sweep, json: bool) -> None:
    """Print the rows of a sweep."""
    found = rows(sweep, paths.runs())
    tables.show(json, map(record, found), [table_of(sweep, found)], notes(found))


def notes(rows: Sequence[SweepRow]) -> Iterator[str]:
    """Notes below the table."""
    if any(row.pareto for row in rows):
        yield f"front: on the Pareto front over peak memory and {LOSS}"
    if any(row.losses and row.compared_loss is None for row in rows):
        yield "Members with other tokens are not comparable, so there is no Pareto front and no best member."
    if any(len(row.losses) > 1 for row in rows):
        yield f"{repeats.OTHER_ROWS.capitalize()}; members are compared seed by seed."
    if any(row.member.planned_gib is not None for row in rows):
        yield "Planned memory is that of the recipe on a GPU, also in a rehearsal, whose measured memory is the CPU's."
    methods = dict.fromkeys(within.method for row in rows for _, within in row.scores.values() if within)
    if methods:
        yield f"Intervals: {'; '.join(methods)}."


def table_of(sweep: Sweep, rows: Sequence[SweepRow]) -> Table:
    """Table of the members."""
    title = f"{sweep.name}: {sweep.recipe}{f'. {REHEARSALS}' if sweep.rehearsal else ''}"
    return Table([_cells(sweep, row) for row in rows], title, below=["scored"])


def _cells(sweep: Sweep, row: SweepRow) -> Row:
    """Table cells of a row: varying values, scores, the first score's interval, and costs."""
    first, *others = row.columns.values()
    member = row.member
    values = {
        key: on_one_line(member.values.get(key))
        for key in sweep.keys
        if not all(each.name.startswith(f"{key}=") for each in sweep.members)  # the names show these values
    }
    states: list[str] = [result.run.state for result in row.runs]
    if len(states) < max(len(row.seeds), 1):
        states.append("not started")
    within = row.scores[first.name][1]
    return {
        "member": member.name,
        **values,
        "state": ", ".join(dict.fromkeys(states)),
        "eval loss": row.scores[LOSS][0],
        "tokens": None if row.compared_loss else ", ".join(str(tokens)[:8] for tokens in row.losses) or None,
        first.label: row.scores[first.name][0],
        "published": row.published.get(first.name),
        "planned GiB": member.planned_gib,
        "measured GiB": row.peak_memory_gib,
        "front": "*" if row.pareto else None,
        "95 %": [within.low, within.high] if within else None,
        "scored": about_rows(row.runs[0].evaluation) if row.runs else None,
        "minutes": None if row.train_seconds is None else f"{row.train_seconds / 60:.1f}",
        **{column.label: row.scores[column.name][0] for column in others},
    }


@dataclass(frozen=True)
class BestRow:
    """Best member of a sweep.

    Attributes:
        column: the study's first metric.
        finished: number of finished runs in the sweep.
        best: the member with the lowest eval loss; None if no eval loss may select a member.
    """

    sweep: Sweep
    column: Column
    finished: int
    best: SweepRow | None


def best_rows(of_study: Study, sweeps: Iterable[Sweep], runs: Path) -> list[BestRow]:
    """Return the best member by eval loss of each sweep over a study's recipe.

    Test scores never select a member. Sweeps without a finished run are left out. Unless it is a rehearsal, a sweep is
    also left out if its base model or data differ from the study's.

    Args:
        of_study: the study.
        sweeps: sweeps over any recipes. Either all of them are rehearsals, or none.
        runs: folder of all runs.
    """
    order = [*of_study.published, *of_study.variants]
    found = []
    for sweep in sweeps:
        if sweep.recipe not in order:
            continue
        compared = rows(sweep, runs)
        done = [result for row in compared for result in row.runs if result.run.state == "finished"]
        if not done or (not sweep.rehearsal and any(result.is_of_something_else for result in done)):
            continue
        selectable = {}
        for row in compared:
            if row.validated and row.compared_loss is not None:
                selectable[row.compared_loss] = row
        best = selectable[min(selectable)] if selectable else None
        found.append(BestRow(sweep, of_study.first, len(done), best))
    return sorted(found, key=lambda row: (row.sweep.name, order.index(row.sweep.recipe)))


def best_record(row: BestRow) -> Row:
    """Row in the JSON output for the best member of a sweep."""
    return {
        "recipe": row.sweep.recipe,
        "sweep": row.sweep.label,
        "finished": row.finished,
        "members": len(row.sweep.members),
        "best": record(row.best) if row.best else None,
    }


def show_best(found: Sequence[BestRow]) -> None:
    """Print the best members with notes, in one table per sweep name."""
    for name, of_name in itertools.groupby(found, key=lambda row: row.sweep.name):
        cells = [_best_cells(row) for row in of_name]
        title = f"{name}: best member of each recipe by eval loss"
        tables.print_table(cells, title, below=["best", "scored"])
    if without := [row.sweep.label for row in found if not row.best]:
        tables.print_text(
            "no eval loss on validation rows separate from the test rows, or eval losses over different tokens: "
            f"{', '.join(without)}; add `--set val_set_size=0.05`, or test_datasets with other rows"
        )


def _best_cells(row: BestRow) -> Row:
    cells: Row = {"recipe": row.sweep.recipe}
    if row.best:
        value, within = row.best.scores[row.column.name]
        cells |= {
            "best": row.best.member.name,
            "eval loss": row.best.scores[LOSS][0],
            row.column.label: value,
            "95 %": within and [within.low, within.high],
            "scored": about_rows(row.best.runs[0].evaluation),
        }
    return cells | {"finished": f"{row.finished} of {len(row.sweep.members)}"}
