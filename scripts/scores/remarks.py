"""Notes on evaluations."""

from collections.abc import Sequence
from pathlib import Path

from ..base.files import Row
from .evaluations import PREDICTIONS, Evaluation, read_scores


def about_rows(evaluation: Evaluation | None) -> str | None:
    """Scored part of the rows, and scored rows that are also training rows; None if there is nothing to note."""
    if evaluation is None:
        return None
    settings = evaluation.settings
    notes = [settings.rows_in_words] if 0 < settings.rows < settings.total_rows else []
    for column in evaluation.columns.values():
        benchmark = evaluation.benchmark(column)
        if benchmark and benchmark.rows < benchmark.total_rows:
            notes.append(f"{column.name}: {benchmark.rows:,} of {benchmark.total_rows:,} rows")
    if evaluation.also_trained:
        notes.append(f"{len(evaluation.also_trained):,} also in the training data")
    return "; ".join(notes) or None


def about_file(file: Path) -> str | None:
    """Notes of `about_rows` on a run's file of predictions; None for other files."""
    return about_rows(read_scores(file.parent)) if file.name == PREDICTIONS else None


def of_predictions(evaluation: Evaluation, predictions: Sequence[Row]) -> list[str]:
    """Notes on the engine, on the scored rows, and on answers that were cut."""
    notes = [note for note in (evaluation.settings.note, about_rows(evaluation)) if note]
    if cut := sum(bool(row.get("cut")) for row in predictions):
        most = evaluation.settings.decoding.max_new_tokens
        notes.append(f"{cut} of {len(predictions)} answers were cut at {most} new tokens; raise --max-new-tokens")
    return notes
