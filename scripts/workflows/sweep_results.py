"""Results of a sweep: rows and tables."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import tables
from ..base import paths, yamlfiles
from ..base.files import Row
from ..base.yamlfiles import on_one_line
from ..configs import config
from ..data import study
from ..data.study import Study
from ..metrics.metric import Column
from ..results import departures, repeats
from ..results.listing import REHEARSALS
from ..results.run_rows import RunResult
from ..results.verdict import StudyRow
from ..runs.records import Summary
from ..scores import evaluation_rows
from ..scores.evaluations import about_rows
from ..scores.intervals import Interval
from ..tables import Table
from .pipeline import existing_runs
from .sweep import Sweep, SweepMember, file_of, of_recipe, settings

LOSS = "eval_loss"
Columns = Mapping[str, Column]


@dataclass
class SweepRow:
    """Results of the members of a sweep that differ only in seed.

    Attributes:
        member: the first member.
        runs: existing runs of the members.
        summary: summary of the first finished run, for values that do not depend on the seed.
        scores: mean over finished runs and 95 % interval by metric, including the eval loss.
        losses: eval losses of the finished runs, by hash of the tokens behind them.
        compared_loss: mean eval loss over the tokens that all members share; None if they share none.
        published: published scores for the member's settings, by metric; empty if the study has no scores for sweeps.
        validated: whether the eval loss may select a member: it is known, and comes from rows other than the test rows.
        pareto: whether the row is on the Pareto front over peak memory and eval loss.
    """

    member: SweepMember
    seeds: list[int]
    runs: list[RunResult]
    summary: Summary
    scores: dict[str, tuple[float | None, Interval | None]]
    losses: dict[str | None, list[float]]
    published: dict[str, float | None]
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


def columns(sweep: Sweep, runs: Path) -> dict[str, Column]:
    """Metrics of a sweep's runs; without runs, the recipe's metrics."""
    found: dict[str, Column] = {}
    for result in _results(sweep, runs).values():
        found |= result.columns
    return found or of_recipe(sweep.recipe)


def _results(sweep: Sweep, runs: Path) -> dict[str, RunResult]:
    """Results of a sweep's runs by member digest."""
    of_digest = existing_runs(runs, sweep.recipe)
    return {m.digest: RunResult(*of_digest[m.digest]) for m in sweep.members if m.digest in of_digest}


def rows(sweep: Sweep, runs: Path) -> list[SweepRow]:
    """Return one row per member name, with measurements of finished runs.

    Rows without separate validation data are not on the Pareto front: a loss on test rows must not select members.
    Losses are compared within the same tokens, thus seed by seed if the seed decides which rows are held out.
    """
    scored = columns(sweep, runs)
    results = _results(sweep, runs)
    by_name = [list(of_name) for _, of_name in itertools.groupby(sweep.members, key=lambda member: member.name)]
    compared = [
        _row(sweep, of_name, [results[m.digest] for m in of_name if m.digest in results], scored) for of_name in by_name
    ]
    of_members = [set(row.losses) for row in compared if row.losses]
    shared = set.intersection(*of_members) if of_members else set()
    for row in compared:
        if row.losses and shared:
            row.compared_loss = fmean(fmean(row.losses[tokens]) for tokens in shared)
    for row in compared:
        row.pareto = row.validated and on_front(row.costs, [other.costs for other in compared])
    return compared


def _published(sweep: Sweep, member: SweepMember, results: Sequence[RunResult]) -> dict[str, float | None]:
    """Published scores for a member's settings; empty if the study has no scores for sweeps."""
    file = file_of(sweep.recipe)
    if sweep.rehearsal or not file:
        return {}
    origin = config.origin_of(sweep.recipe, file) or ""
    of_study = study.of_any(origin)
    if not of_study or not any(published.cells for published in of_study.published.values()):
        return {}
    recipe = yamlfiles.read_yaml(paths.recipe_file(origin))
    if results:  # their settings include profiles
        changes = departures.other_settings(results[0].run)
    else:
        differing = config.differences(recipe, yamlfiles.read_yaml(file) | member.values)
        changes = {key: value for key, (_, value) in differing.items() if not config.TRACKING.match(key)}
    changes.pop(repeats.SEED, None)
    cell = of_study.cell(origin, recipe, changes)
    scores = cell.scores if cell else {}
    return {key: fmean(scores[key]) if key in scores else None for key in of_study.columns}


def on_front(own: tuple[float, float] | None, all_costs: Sequence[tuple[float, float] | None]) -> bool:
    """True if `own` is on the Pareto front of all costs."""
    rivals = [other for other in all_costs if other not in (None, own)]
    return own is not None and not any(rival[0] <= own[0] and rival[1] <= own[1] for rival in rivals if rival)


def _row(sweep: Sweep, members: Sequence[SweepMember], results: list[RunResult], scored: Columns) -> SweepRow:
    """Row for members with the same name."""
    done = [result for result in results if result.run.state == "finished"]
    of_study = done[0].study if done and not sweep.rehearsal else None
    scores: dict[str, tuple[float | None, Interval | None]] = {}
    for name in (LOSS, *scored):
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
        scores=scores,
        losses=losses,
        published=_published(sweep, members[0], results),
        peak_memory_gib=max((r.summary.peak_memory for r in done if r.summary.peak_memory), default=None),
        train_seconds=fmean(result.summary.train_seconds for result in done) if done else None,
        validated=scores[LOSS][0] is not None
        and all(evaluation_rows.validation(each.run, yamlfiles.read_yaml(each.folder.config)) for each in done),
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
        **{f"{name}_published": value for name, value in row.published.items()},
        "pareto": row.pareto,
    }


def show(sweep: Sweep, json: bool) -> None:
    """Print the rows of a sweep, with its first metric in the table."""
    found, scored = rows(sweep, paths.runs()), columns(sweep, paths.runs())
    first = dict(itertools.islice(scored.items(), 1))
    tables.show(json, map(record, found), [table_of(sweep, first, found)], notes(sweep, scored, found))


def notes(sweep: Sweep, scored: Columns, rows: Sequence[SweepRow]) -> Iterator[str]:
    """Notes below the table."""
    if any(row.pareto for row in rows):
        yield f"front: on the Pareto front over peak memory and {LOSS}"
    if any(row.losses and row.compared_loss is None for row in rows):
        yield "Members with other tokens are not comparable, so there is no Pareto front and no best member."
    if any(len(row.losses) > 1 for row in rows):
        yield f"{repeats.OTHER_ROWS.capitalize()}; members are compared seed by seed."
    if any(row.member.planned_gib is not None for row in rows):
        measured = "; measured memory is that of the rehearsal's process on the CPU" if sweep.rehearsal else ""
        yield f"Planned memory is that of the recipe on a GPU{measured}."
    methods = dict.fromkeys(within.method for row in rows for name in scored if (within := row.scores[name][1]))
    if methods:
        yield f"Intervals: {'; '.join(methods)}."


def table_of(sweep: Sweep, scored: Columns, rows: Sequence[SweepRow]) -> Table:
    """Table of the members with the given metrics."""
    title = f"{sweep.name}: {sweep.recipe}{f'. {REHEARSALS}' if sweep.rehearsal else ''}"
    return Table([_cells(sweep, scored, row) for row in rows], title, below=["scored"])


def _cells(sweep: Sweep, scored: Columns, row: SweepRow) -> Row:
    """Table cells of a row: varying values, scores, the first score's interval, and costs."""
    first, *others = scored.values()
    member = row.member
    values = {
        key: on_one_line(member.values.get(key))
        for key in sweep.keys
        if not all(each.name.startswith(f"{key}=") for each in sweep.members)  # the names show these values
    }
    missing = max(len(row.seeds), 1) - len(row.runs)
    states = Counter([*(result.run.state for result in row.runs), *["not started"] * missing])
    within = row.scores[first.name][1]
    return {
        "member": member.name,
        **values,
        "state": ", ".join(f"{n} {state}" if len(row.seeds) > 1 else state for state, n in states.items()),
        "eval loss": row.scores[LOSS][0],
        "tokens": None if row.compared_loss else ", ".join(str(tokens)[:8] for tokens in row.losses) or None,
        first.label: row.scores[first.name][0],
        "published": row.published.get(first.name),
        "planned GiB": member.planned_gib,
        "measured GiB": row.peak_memory_gib,
        "front": "*" if row.pareto else None,
        "95 %": [within.low, within.high] if within else None,
        "scored": about_rows(row.runs[0].evaluation) if row.runs else None,
        **{column.label: row.scores[column.name][0] for column in others},
        "minutes": None if row.train_seconds is None else f"{row.train_seconds / 60:.1f}",
    }


@dataclass(frozen=True)
class BestRow:
    """Best member of a sweep, and the unchanged recipe for comparison.

    Attributes:
        column: the metric of the scores.
        finished: number of finished runs in the sweep.
        best: the member with the lowest eval loss; None if no eval loss may select a member.
        own: score and interval of the unchanged recipe, from a member or from the run in the study's table.
        own_values: the unchanged recipe's values of the keys in which members differ.
    """

    sweep: Sweep
    column: Column
    finished: int
    best: SweepRow | None
    own: tuple[float | None, Interval | None]
    own_values: dict[str, Any]


def best_rows(of_study: Study, sweeps: Iterable[Sweep], studied: Sequence[StudyRow], runs: Path) -> list[BestRow]:
    """Return the best member by eval loss of each sweep over a study's recipe.

    Test scores never select a member. Sweeps without a finished run are left out. Unless it is a rehearsal, a sweep is
    also left out if its base model or data differ from the study's.

    Args:
        of_study: the study.
        sweeps: sweeps over any recipes. Either all of them are rehearsals, or none.
        studied: rows of the study's recipes; if the sweeps are rehearsals, rows of rehearsals.
        runs: folder of all runs.
    """
    name, order = of_study.first.name, [*of_study.published, *of_study.variants]
    own_runs = {row.recipe: row for row in studied if row.chosen}
    found = []
    for sweep in sweeps:
        compared = rows(sweep, runs) if sweep.recipe in order else []
        done = [result for row in compared for result in row.runs if result.run.state == "finished"]
        if not done or (not sweep.rehearsal and any(result.is_of_something_else for result in done)):
            continue
        selectable = [row for row in compared if row.validated and row.compared_loss is not None]
        best = min(selectable, key=lambda row: row.compared_loss or 0.0, default=None)
        recipe = dict(config.flatten(yamlfiles.read_yaml(paths.recipe_file(sweep.recipe))))
        own_values = {key: recipe.get(key) for key in sweep.keys}
        own = [
            row.scores[name]
            for row in compared
            if all(row.member.values.get(key) == value for key, value in own_values.items())
        ]
        studied_run = own_runs.get(sweep.recipe)
        if studied_run and not any(key.startswith(tuple(sweep.keys)) for key in studied_run.runs[0].changed_keys):
            own.append((studied_run.scores[name].value, studied_run.scores[name].interval))
        found.append(BestRow(sweep, of_study.first, len(done), best, own[0] if own else (None, None), own_values))
    return sorted(found, key=lambda row: (row.sweep.name, order.index(row.sweep.recipe)))


def best_record(row: BestRow) -> Row:
    """Row in the JSON output for the best member of a sweep."""
    name, (value, within) = row.column.name, row.own
    return {
        "recipe": row.sweep.recipe,
        "sweep": row.sweep.label,
        "finished": row.finished,
        "members": len(row.sweep.members),
        "best": record(row.best) if row.best else None,
        "own_values": row.own_values,
        f"{name}_own": value,
        **repeats.interval_cells(f"{name}_own", within),
    }


def show_best(found: Sequence[BestRow]) -> None:
    """Print the best members with notes, in one table per sweep name."""
    for name, of_name in itertools.groupby(found, key=lambda row: row.sweep.name):
        cells = [_best_cells(row) for row in of_name]
        title = f"{name}: best member of each recipe by eval loss, and the recipe with its own values"
        tables.print_table(cells, title, empty=True, below=["best", "own", "scored"])
    if without := [row.sweep.label for row in found if not row.best]:
        tables.print_text(
            "no eval loss on validation rows separate from the test rows, or eval losses over different tokens: "
            f"{', '.join(without)}; add `--set val_set_size=0.05`, or test_datasets with other rows"
        )


def _best_cells(row: BestRow) -> Row:
    best, (own, own_within) = row.best, row.own
    value, within = best.scores[row.column.name] if best else (None, None)
    return {
        "recipe": row.sweep.recipe,
        "best": ", ".join(settings({key: best.member.values.get(key) for key in row.own_values})) if best else None,
        "eval loss": best and best.scores[LOSS][0],
        row.column.label: value,
        "95 %": within and [within.low, within.high],
        "own": ", ".join(settings(row.own_values)),
        f"{row.column.label}, own": own,
        "95 %, own": own_within and [own_within.low, own_within.high],
        "scored": best and about_rows(best.runs[0].evaluation),
        "finished": f"{row.finished} of {len(row.sweep.members)}",
    }
