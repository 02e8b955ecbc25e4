"""Comparisons of runs and of files of predictions, as tables and JSON."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from string import ascii_lowercase

from ..base import tables
from ..base.errors import UserError
from ..base.files import Row
from ..base.tables import Table
from ..base.terminal import say, warn
from ..base.yamlfiles import on_one_line
from ..run import backends
from ..run.rundir import RunDir
from . import compare, listing, repeats
from .compare import Divergence
from .reports import report_runs
from .reports.report_runs import ReportedRun
from .run_result import RunResult

LABELS = ascii_lowercase
"""Labels of the compared runs and files."""
_POINTS = 6  # of a curve, in its table


@dataclass(frozen=True)
class Comparison:
    """Runs and files of predictions, each compared with the first one.

    Attributes:
        sides: runs and files by label.
        runs: the runs among them by label.
        metrics: values of --metric, added to the metrics of the runs.
    """

    sides: Mapping[str, RunDir | Path]
    runs: Mapping[str, ReportedRun]
    metrics: Sequence[str]

    def trainings(self) -> dict[str, Divergence | None]:
        """Divergence of each run's losses from those of the first run; None without a loss over the same steps."""
        first, *further = self.runs.values()
        return {other.label: compare.divergence(first.folder, other.folder) for other in further}

    def tables(self) -> Iterator[Table]:
        """Tables of losses and scores, of settings that differ, and of curves."""
        runs = [*self.runs.values()]
        scores = report_runs.scores(runs, report_runs.headings(runs), details=False)
        rows = [{name: row[name] for name in ("score", *self.runs)} for row in scores]
        yield Table(rows, "Losses and scores", below=[*self.runs])
        rows = []
        for key, values in compare.differing_settings(self.runs).items():
            rows.append({"setting": key} | {label: on_one_line(value) for label, value in values.items()})
        yield Table(rows, "Settings that differ", below=[*self.runs])
        yield Table(self._curves(), "Eval loss by step")

    def _curves(self) -> list[Row]:
        """Eval losses of the runs at a few steps, with the first and the last one."""
        rows: dict[int, Row] = {}
        for label, reported in self.runs.items():
            for record in reported.folder.read_metrics():
                if record.get("eval_loss_per_token") is not None:
                    row = rows.setdefault(record["step"], {"step": record["step"]} | dict.fromkeys(self.runs))
                    row[label] = f"{record['eval_loss_per_token']:.4f}"
        ordered = [rows[step] for step in sorted(rows)]
        return ordered[:1] + [group[-1] for group in batched(ordered[1:], len(ordered) // _POINTS + 1)]

    def scores(self) -> list[Row] | None:
        """Differences of scores from the first evaluated side's; None without two evaluated sides.

        Raises:
            UserError: the only run is not evaluated, or rows cannot be compared.
        """
        evaluated = dict(self.sides)
        for label, reported in self.runs.items():
            if reported.evaluation is None:
                del evaluated[label]
                if reported.is_scored:  # preference pairs, whose scores are above
                    continue
                remedy = f"first run `recipe evaluate {reported.folder.quoted}`"
                error = UserError("its scores are missing or stale, and not compared", key=label, remedy=remedy)
                if len(self.runs) == 1:
                    raise error
                warn(str(error))
        if len(evaluated) < 2:
            return None
        (first, scored), *further = zip(
            evaluated, compare.score_sides([*evaluated.values()], self.metrics), strict=True
        )
        rows = []
        for label, other in further:
            try:
                compared = compare.compare(scored, other)
            except UserError as error:
                if len(self.runs) < 2:
                    raise
                compared = []
                warn(f"scores of {first} and {label} are not compared: {error}")
            for row in compared:
                means = {first: row.pop("a"), label: row.pop("b")}
                rows.append({"score": None, "rows": None} | dict.fromkeys(evaluated) | row | means)
        return rows


def of_sides(sides: Iterable[RunDir | Path], metrics: Sequence[str]) -> Comparison:
    """Comparison of runs and of files of predictions.

    Raises:
        UserError: some runs are rehearsals and some are not.
    """
    by_label = dict(zip(LABELS, sides, strict=False))
    folders = {label: side for label, side in by_label.items() if isinstance(side, RunDir)}
    results = [RunResult(folder, backends.read(folder)) for folder in folders.values()]
    runs = {reported.label: reported for reported in report_runs.labelled(results, [*folders])}
    return Comparison(by_label, runs, metrics)


def show(comparison: Comparison, json: bool) -> None:
    """Print a comparison.

    Raises:
        UserError: rows cannot be compared.
    """
    trainings = comparison.trainings() if comparison.runs else {}
    scores = comparison.scores()
    if json:
        runs, intervals = {}, {}
        for label, reported in comparison.runs.items():
            runs[label] = listing.record(reported)
            intervals[label] = {name: score.interval for name, score in reported.score_records.items()}
        settings = compare.differing_settings(comparison.runs)
        fields = {"runs": runs, "intervals": intervals, "settings": settings}
        tables.print_json(fields | {"trainings": trainings, "scores": scores})
        return
    for label, side in comparison.sides.items():
        tables.print_text(f"{label}: {getattr(side, 'path', side)}")
    tables.print_text("")
    if trainings:
        notes = [_in_words(*training) for training in trainings.items()]
        measured = [reported for reported in comparison.runs.values() if reported.summary.eval_loss is not None]
        if not repeats.cover_same_tokens(measured):
            notes.append("The eval losses cover different or unknown tokens, so they are not comparable.")
        tables.show(json, [], comparison.tables(), notes)
        tables.print_text("")
    tables.print_table(scores or [], "Differences between two, on the rows that both have")
    if scores and len(scores) > 1:
        say(f"intervals and p values of {len(scores)} comparisons are not corrected for multiple comparisons")


def _in_words(label: str, training: Divergence | None) -> str:
    if training is None:
        return f"Losses of the first run and {label} are not compared: the two runs recorded none over the same steps."
    if training.losses is None:
        return f"The losses of the first run and {label} in steps {training.first} to {training.last} are equal."
    a, other = training.losses
    return f"The losses of the first run and {label} differ from step {training.step} on: {a} and {other}."
