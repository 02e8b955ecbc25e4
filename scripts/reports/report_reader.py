"""What the reader of a report shows: predictions beside their references and diffs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.files import json_rows, sha256
from ..base.tables import Row
from ..scores.evaluations import BASE_MODEL, EvaluationSettings, read_predictions, read_scores
from ..scores.metrics import PER_ROW
from .report_runs import ReportedRun, alike


def reader(found: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """What the reader shows: for each file of rows its references and diffs, and every model's predictions."""
    sets: dict[str, dict[str, Any]] = {}
    for one in found:
        base_folder = one.folder.path / "evaluations" / BASE_MODEL
        base = read_scores(base_folder)
        sources = [(one.label, one.evaluation, one.predictions)]
        if base and alike(one, base) and len(found) == 1:
            sources.append(("the base model alone", base, read_predictions(base_folder)))
        for label, made, rows in sources:
            if made is None or not rows:
                continue
            digest = made.settings.data_sha256
            of_file = sets.setdefault(digest, {"made": one, "settings": made.settings, "rows": {}, "models": []})
            by_number = {row["row"]: row for row in rows}
            of_file["rows"] |= {number: row for number, row in by_number.items() if number not in of_file["rows"]}
            of_file["models"].append((label, by_number))
    return [_columns(**of_file) for of_file in sets.values()]


def _columns(
    made: ReportedRun, settings: EvaluationSettings, rows: dict[int, Row], models: list[tuple[str, dict[int, Row]]]
) -> Row:
    """A file's rows as columns, which is small and quick to search."""
    numbers = sorted(rows)
    diffs, why = _diffs(made, settings)
    shown = []
    for label, by_number in models:
        values = [by_number.get(number, {}) for number in numbers]
        scores = {
            metric.label: [None if row.get(name) is None else round(row[name], 4) for row in values]
            for name, metric in PER_ROW.items()
            if any(row.get(name) is not None for row in values)
        }
        shown.append({"label": label, "predictions": [row.get("prediction") for row in values], "scores": scores})
    return {
        "data": made.from_cwd(settings.data),
        "row": numbers,
        "idx": [rows[number].get("idx") for number in numbers],
        "language": [rows[number].get("lang") for number in numbers],
        "reference": [rows[number]["reference"] for number in numbers],
        "diff": [diffs[number] if number < len(diffs) else "" for number in numbers] if diffs else None,
        "why": why,
        "models": shown,
    }


def _diffs(made: ReportedRun, settings: EvaluationSettings) -> tuple[list[str], str]:
    """The inputs of the rows that were evaluated, in their order, or why they cannot be shown."""
    file = Path(made.run.cwd, settings.data)
    name = made.from_cwd(settings.data)
    if not file.is_file():
        return [], f"The diffs are not shown: {name} is not there any more."
    if sha256(file) != settings.data_sha256:
        return [], f"The diffs are not shown: {name} is not what was evaluated (its SHA-256 is another)."
    with file.open("rb") as lines:
        return [str(row.get("input", "")) for row in json_rows(lines, file, ())], ""
