"""Results of a sweep: rows and tables."""

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import methodcaller
from pathlib import Path
from statistics import fmean

from ..base import paths, tables
from ..base.errors import UserError, did_you_mean, meant
from ..base.files import Row
from ..base.tables import Table
from ..base.yamlfiles import on_one_line
from ..config.keys import affecting
from ..config.merging import Override
from ..data.studies import Study
from ..evaluate import evaluation_rows
from ..evaluate.scores_file import about_rows
from ..metrics import registry
from ..metrics.metric import Column, LossMetric, RewardMetric
from ..study.pipeline import existing_runs
from ..study.sweep import Sweep, Trial, default_columns, recorded_sweeps
from ..training.run_record import Summary
from . import repeats
from .listing import REHEARSALS
from .repeats import MeanScore
from .run_result import RunResult

LOSS = registry.EVAL_LOSS.name
_LEGEND = {
    "front": f"front: on the Pareto front over peak memory and {LOSS}",
    "planned GiB": "Planned memory is that of the recipe on a GPU, also in a rehearsal, whose measured memory is the "
    "CPU's.",
}

_OF_PREFERENCES = re.compile("(rl|dpo|cpo|orpo|rpo|simpo|kto)_")
"""Beginnings of the keys of preference trainings."""
_BATCHES = ("eval_batch_size", "micro_batch_size")
Costs = tuple[float, float]  # peak memory in GiB, and eval loss


@dataclass
class SweepRow:
    """Results of the trials of a sweep that differ only in seed.

    Attributes:
        trial: the first trial.
        runs: existing runs of the trials.
        columns: metrics of the sweep's runs; without runs, the recipe's metrics.
        compared_loss: mean eval loss over the tokens that all trials share; None if they share none.
        term: a setting of a preference loss that differs between trials; their losses are then not comparable.
        pareto: whether the row is on the Pareto front over peak memory and eval loss.
    """

    trial: Trial
    seeds: list[int]
    runs: list[RunResult]
    columns: dict[str, Column]
    compared_loss: float | None = None
    term: str | None = None
    pareto: bool = False

    @property
    def headline(self) -> Column:
        """First metric of the tables; the eval loss, which has a column of its own, only without another one."""
        columns = [*self.columns.values()]
        return next((column for column in columns if column.name != LOSS), columns[0])

    @cached_property
    def finished(self) -> list[RunResult]:
        """Finished runs."""
        return [result for result in self.runs if result.run.state == "finished"]

    @property
    def states(self) -> list[str]:
        """States of the runs."""
        return [result.run.state for result in self.runs]

    @property
    def state(self) -> str:
        """Different states, and `not started` if some trials have no run."""
        states = self.states
        if len(states) < max(len(self.seeds), 1):
            states.append("not started")
        return ", ".join(dict.fromkeys(states))

    @property
    def summary(self) -> Summary:
        """Training summary of the first finished run, for what hardly depends on the seed; empty without one."""
        return self.finished[0].summary if self.finished else Summary()

    @cached_property
    def scores(self) -> dict[str, MeanScore]:
        """Mean over finished runs and 95 % interval by metric, including the eval loss."""
        columns = registry.columns({LOSS: None}) | self.columns
        return {name: repeats.mean_score(column, self.finished) for name, column in columns.items()}

    @cached_property
    def losses(self) -> dict[str, list[float]]:
        """Eval losses of the finished runs, by the tokens behind them, see `repeats.tokens`."""
        losses: dict[str, list[float]] = {}
        for result in self.finished:
            loss = result.summary.eval_loss_per_token
            if result.summary.eval_pairs:
                loss = result.summary.eval_loss
            if loss is not None:
                losses.setdefault(repeats.tokens(result), []).append(loss)
        return losses

    @cached_property
    def published(self) -> dict[str, float]:
        """Published scores for the settings of the runs, by metric; empty without runs or published grid points."""
        point = self.runs[0].grid_point if self.runs else None
        if point is None:
            return {}
        return {name: fmean(scores) for name, scores in point.scores.items()}

    @property
    def peak_memory_gib(self) -> float | None:
        """Largest peak memory of the finished runs."""
        return max((r.summary.peak_memory for r in self.finished if r.summary.peak_memory), default=None)

    @property
    def train_seconds(self) -> float | None:
        """Mean time of the finished runs."""
        if not self.finished:
            return None
        return fmean(result.summary.train_seconds for result in self.finished)

    @cached_property
    def validated(self) -> bool:
        """True if the rows of the eval loss are not the test rows, so that it may select a trial."""
        return all(evaluation_rows.validation(result.run, result.folder.config) for result in self.finished)

    @property
    def costs(self) -> Costs | None:
        """Peak memory and eval loss; None unless both are known, and the loss is comparable."""
        if self.peak_memory_gib is None or self.compared_loss is None:
            return None
        return self.peak_memory_gib, self.compared_loss

    def comparable(self, by: str) -> float | None:
        """Score that ranks the trial by a metric; None if it is missing, or an eval loss that may not rank trials.

        An eval loss, by whatever name, ranks trials if it covers the same tokens, and if these are not of test rows.
        """
        metric = self.columns[by].metric if by in self.columns else registry.EVAL_LOSS
        if isinstance(metric, LossMetric) and not isinstance(metric, RewardMetric):
            loss = self.compared_loss if self.validated else None
            return None if loss is None else metric.score_loss(loss)
        return self.scores[by].value

    @property
    def other_tokens(self) -> str | None:
        """Beginnings of the keys of `losses`, if the eval losses are not comparable."""
        if self.compared_loss is not None or self.term:
            return None
        return ", ".join(tokens[:8].strip() for tokens in self.losses) or None

    @property
    def minutes(self) -> str | None:
        return None if self.train_seconds is None else f"{self.train_seconds / 60:.1f}"


def rows(sweep: Sweep, runs: Path) -> list[SweepRow]:
    """Return one row per trial name, with measurements of finished runs.

    Rows without separate validation data are not on the Pareto front: a loss on test rows must not select trials.
    """
    table = _measured_rows(sweep, runs)
    _compare_losses(table)
    front = _pareto_front({row.costs for row in table if row.costs})
    for row in table:
        row.pareto = row.costs in front and row.validated
    return table


def _measured_rows(sweep: Sweep, runs: Path) -> list[SweepRow]:
    """Rows that are not yet compared with each other."""
    existing = existing_runs(runs, sweep.recipe)
    columns: dict[str, Column] = {}  # shared by all rows
    table = []
    for _, group in itertools.groupby(sweep.trials, key=lambda trial: trial.name):
        trials = list(group)
        seeds = [trial.seed for trial in trials if trial.seed is not None]
        row = SweepRow(trials[0], seeds, [], columns)
        for trial in trials:
            if trial.digest in existing:
                row.runs.append(RunResult(*existing[trial.digest]))
                columns |= row.runs[-1].columns
        table.append(row)
    if not columns:
        columns |= default_columns(sweep.recipe)
    return table


def _compare_losses(table: Sequence[SweepRow]) -> None:
    """Compute each row's eval loss over the tokens that all rows share.

    If the seed decides which rows are held out, losses are thus compared seed by seed.
    """
    measured = [row for row in table if row.losses]
    if not measured:
        return
    if term := _varied_term(table):
        for row in table:
            row.term = term
        return
    shared = set.intersection(*(set(row.losses) for row in measured))
    if not shared:
        return
    for row in measured:
        row.compared_loss = fmean(fmean(row.losses[tokens]) for tokens in shared)


def _varied_term(table: Sequence[SweepRow]) -> str | None:
    """First setting of a preference loss that differs between trials.

    The means of SimPO's and ORPO's losses depend on the batches of the evaluation.
    """
    terms = ["rl", "trl.beta", *filter(_OF_PREFERENCES.match, affecting("evaluated"))]
    if any(result.config.get("rl") in ("simpo", "orpo") for row in table for result in row.finished):
        terms += _BATCHES
    for key in terms:
        if len({str(row.trial.settings.get(key)) for row in table}) > 1:
            return key
    return None


def _pareto_front(costs: Collection[Costs]) -> list[Costs]:
    """Pareto front: costs that no other costs undercut or equal in both values."""
    front: list[Costs] = []
    for memory, loss in sorted(costs):
        if not front or loss < front[-1][1]:  # sorted by memory, so the loss must be lower than all before
            front.append((memory, loss))
    return front


def record(row: SweepRow) -> Row:
    """Row in the JSON output."""
    trial, summary = row.trial, row.summary
    fields: Row = {
        "trial": trial.name,
        "settings": trial.settings,
        "seeds": row.seeds,
        "runs": [str(result.folder.path) for result in row.runs],
        "states": row.states,
    }
    for name, score in row.scores.items():
        fields |= {name: score.value, f"{name}_published": row.published.get(name)}
        fields |= repeats.json_fields(name, score.interval)
    fields |= {
        "eval_tokens": [*row.losses],
        "planned_gib": trial.planned_gib,
        "peak_memory_gib": row.peak_memory_gib,
        "memory_kind": summary.memory_kind,
        "trainable": summary.trainable_parameters,
        "train_seconds": row.train_seconds,
        "tokens_per_second": summary.tokens_per_second,
        "pareto": row.pareto,
    }
    return fields


def show(sweep: Sweep, json: bool, by: str = LOSS) -> bool:
    """Print the rows of a sweep, and the best one by a metric; return True if there is one.

    Raises:
        UserError: the sweep has no metric of this name.
    """
    table = rows(sweep, paths.runs())
    best = ranking(table, by)[:2]
    records = [record(row) | {"best": row in best[:1]} for row in table]
    tables.show(json, records, [table_of(sweep, table)], [*notes(table), *_about_best(best, by)])
    return bool(best)


def ranking(rows: Sequence[SweepRow], by: str = LOSS) -> list[SweepRow]:
    """Rows with a score by a metric, the best first.

    Eval losses rank trials only if they cover the same tokens, of rows that are not the test rows.

    Raises:
        UserError: the sweep has no metric of this name.
    """
    columns = rows[0].columns
    if by != LOSS and by not in columns:
        raise UserError(f"no metric of the sweep{did_you_mean(by, columns)}", key=f"--by {by}")
    scored = [row for row in rows if row.comparable(by) is not None]
    reverse = by != LOSS and columns[by].metric.higher_is_better
    return sorted(scored, key=methodcaller("comparable", by), reverse=reverse)


def _about_best(best: Sequence[SweepRow], by: str) -> Iterator[str]:
    """Note on the best of several trials: its distance from the next one, and how sure it is."""
    if len(best) < 2:
        return
    score, following = (row.comparable(by) or 0.0 for row in best)
    interval = best[0].scores[by].interval
    note = f"best by {by}: {best[0].trial.name}, {score:.5g}; next: {best[1].trial.name}, {following:.5g}"
    if interval is None:
        yield f"{note}. There is no interval, so the difference can be chance; `recipe sweep --seeds 3` gives one."
    else:
        place = "inside" if interval.low <= following <= interval.high else "outside"
        yield f"{note}, which is {place} the best one's 95 % interval, {interval.low:.5g} to {interval.high:.5g}."
    if by == LOSS:
        return
    if isinstance(best[0].columns[by].metric, LossMetric) and best[0].validated:  # of the held-out rows
        return
    yield "The best of several scores on test rows is too high; select by eval loss."


def find_trial(name: str) -> tuple[str, list[Override]] | None:
    """Recipe and settings of a trial that is named SWEEP/TRIAL, or SWEEP/best; None without a sweep of that name.

    Raises:
        UserError: several sweeps match, or the sweep has no such trial, or no best one.
    """
    label, _, trial_name = name.rpartition("/")
    sweeps = recorded_sweeps()
    if not any(f"/{label}/" in f"/{other}/" for other in sweeps):
        return None
    sweep = sweeps[meant(label, sweeps, "sweep")]
    trials = {trial.name: trial for trial in sweep.trials}
    if trial_name == "best":
        best = ranking(rows(sweep, paths.runs()))
        if not best:
            raise UserError("no trial is the best by eval loss", key=name, remedy="name one: SWEEP/TRIAL")
        trial = best[0].trial
    else:
        trial = trials[meant(trial_name, trials, f"trial of {sweep.label}")]
    return sweep.recipe, [Override(key, value) for key, value in trial.settings.items()]


def notes(rows: Sequence[SweepRow]) -> Iterator[str]:
    """Notes below the table."""
    if any(row.other_tokens for row in rows):
        yield "Trials with other or unknown tokens are not comparable, so there is neither a front nor a best trial."
    if rows[0].term:
        yield f"{rows[0].term} defines the loss: neither loss nor margin ranks trials; `--by reward_accuracy` does."
    if any(len(row.losses) > 1 for row in rows):
        yield "Held-out rows differ by seed; trials are compared seed by seed."


def table_of(sweep: Sweep, rows: Sequence[SweepRow]) -> Table:
    """Table of the trials."""
    title = f"{sweep.name}: {sweep.recipe}"
    if sweep.rehearsal:
        title += f". {REHEARSALS}"
    keys = [key for key in sweep.keys if not all(f"{key}=" in trial.name for trial in sweep.trials)]
    table = [_cells(row, keys) for row in rows]
    legend = {name: text for name, text in _LEGEND.items() if any(cells[name] is not None for cells in table)}
    keep = ["eval loss", rows[0].headline.label, *keys, "front"]
    return Table(table, title, below=["scored"], keep=keep, legend=legend)


def _cells(row: SweepRow, keys: Sequence[str]) -> Row:
    """Table cells of a row: varying values, scores, the first score's interval, and costs."""
    first = row.headline
    further = [column for column in row.columns.values() if column.name not in (LOSS, first.name)]
    trial, score = row.trial, row.scores[first.name]
    front = "*" if row.pareto else None
    scored = about_rows(row.runs[0].evaluation) if row.runs else None
    cells: Row = {"trial": trial.name}
    for key in keys:
        cells[key] = on_one_line(trial.settings.get(key))
    cells |= {
        "state": row.state,
        "eval loss": row.scores[LOSS].value,
        "tokens": row.other_tokens,
    }
    if first.name != LOSS:
        cells[first.label] = score.value
    cells |= {
        "published": row.published.get(first.name),
        "planned GiB": trial.planned_gib,
        "measured GiB": row.peak_memory_gib,
        "front": front,
        **repeats.table_cells(score.interval),
        "scored": scored,
        "minutes": row.minutes,
    }
    for column in further:
        cells[column.label] = row.scores[column.name].value
    return cells


@dataclass(frozen=True)
class BestRow:
    """Best trial of a sweep.

    Attributes:
        finished: number of finished runs in the sweep.
        best: the trial with the lowest eval loss; None if no eval loss may select a trial.
    """

    sweep: Sweep
    finished: int
    best: SweepRow | None


def best_rows(study: Study, sweeps: Iterable[Sweep], runs: Path) -> list[BestRow]:
    """Return the best trial by eval loss of each sweep over a study's recipe.

    Test scores never select a trial. Sweeps without a finished run are left out. Unless it is a rehearsal, a sweep is
    also left out if its base model or data differ from the study's.

    Args:
        study: the study.
        sweeps: sweeps over any recipes. Either all of them are rehearsals, or none.
        runs: folder of all runs.
    """
    best = []
    for sweep in sweeps:
        if sweep.recipe in study.recipes:
            row = _best_row(sweep, rows(sweep, runs))
            if row:
                best.append(row)
    return sorted(best, key=lambda row: (row.sweep.name, study.recipes.index(row.sweep.recipe)))


def _best_row(sweep: Sweep, rows: Sequence[SweepRow]) -> BestRow | None:
    """Best trial of a sweep by eval loss; None if the sweep is left out, see `best_rows`."""
    finished = [*itertools.chain.from_iterable(row.finished for row in rows)]
    if not finished or any(result.is_of_something_else for result in finished):
        return None
    best = ranking(rows)
    return BestRow(sweep, len(finished), best[0] if best else None)


def best_record(row: BestRow) -> Row:
    """Row in the JSON output for the best trial of a sweep."""
    return {
        "recipe": row.sweep.recipe,
        "sweep": row.sweep.label,
        "finished": row.finished,
        "trials": len(row.sweep.trials),
        "best": record(row.best) if row.best else None,
    }


def show_best(rows: Sequence[BestRow]) -> None:
    """Print the best trials with notes, in one table per sweep name."""
    for name, group in itertools.groupby(rows, key=lambda row: row.sweep.name):
        cells = [_best_cells(row) for row in group]
        title = f"{name}: best trial of each recipe by eval loss"
        tables.print_table(cells, title, below=["trial", "scored"])
    without = [row.sweep.label for row in rows if row.best is None]
    if without:
        tables.print_text(
            "no eval loss on validation rows separate from the test rows, or eval losses over different or unknown "
            f"tokens: {', '.join(without)}; add `--set val_set_size=0.05`, or test_datasets with other rows"
        )


def _best_cells(row: BestRow) -> Row:
    """Table cells of the best trial of a sweep over a recipe."""
    cells = {"recipe": row.sweep.recipe, "finished": f"{row.finished} of {len(row.sweep.trials)}"}
    if row.best:
        cells |= _cells(row.best, [])
    return cells
