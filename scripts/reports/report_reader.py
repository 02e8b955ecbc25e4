"""What the reader of a report shows: predictions beside their references and diffs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.files import Row, json_rows, sha256
from ..metrics.metric import Column
from ..scores.evaluations import BASE_MODEL, EvaluationSettings, read_predictions
from .report_runs import ReportedRun


def reader(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """For each file of test rows its references and diffs, and every model's predictions."""
    files: dict[str, dict[str, Any]] = {}
    for reported in runs:
        sources = [(reported.label, reported.evaluation, reported.predictions)]
        if reported.base_evaluation and len(runs) == 1:
            base = read_predictions(reported.folder.path / "evaluations" / BASE_MODEL)
            sources.append(("the base model alone", reported.base_evaluation, base))
        for label, evaluation, rows in sources:
            if evaluation and rows:
                settings = evaluation.settings
                new = {"reported": reported, "settings": settings, "rows": {}, "models": []}
                of_file = files.setdefault(settings.data_sha256, new)
                by_number = {row["row"]: row for row in rows}
                of_file["rows"] = by_number | of_file["rows"]
                of_file["models"].append((label, by_number, evaluation.columns))
    return [_columns(**of_file) for of_file in files.values()]


def _columns(
    reported: ReportedRun,
    settings: EvaluationSettings,
    rows: dict[int, Row],
    models: list[tuple[str, dict[int, Row], dict[str, Column]]],
) -> Row:
    """A file's rows as columns, which are small and quick to search."""
    numbers = sorted(rows)
    diffs, why = _diffs(reported, settings)
    shown = []
    for label, by_number, columns in models:
        values = [by_number.get(number, {}) for number in numbers]
        scores = {
            column.label: [None if row.get(name) is None else round(row[name], 4) for row in values]
            for name, column in columns.items()
            if any(row.get(name) is not None for row in values)
        }
        shown.append({"label": label, "predictions": [row.get("prediction") for row in values], "scores": scores})
    return {
        "data": reported.from_cwd(settings.data),
        "row": numbers,
        "idx": [rows[number].get("idx") for number in numbers],
        "language": [rows[number].get("lang") for number in numbers],
        "reference": [rows[number]["reference"] for number in numbers],
        "diff": [diffs[number] if number < len(diffs) else "" for number in numbers] if diffs else None,
        "why": why,
        "models": shown,
    }


def _diffs(reported: ReportedRun, settings: EvaluationSettings) -> tuple[list[str], str]:
    """The inputs of the rows that were evaluated, in their order, or the reason why they cannot be shown."""
    file = Path(reported.run.cwd, settings.data)
    name = reported.from_cwd(settings.data)
    if not Path(settings.data).is_absolute() and not file.is_file():
        return [], f"Inputs are shown of rows in one JSONL file; these are {name}."
    if not file.is_file():
        return [], f"The diffs are not shown: {name} is no longer there."
    if sha256(file) != settings.data_sha256:
        return [], f"The diffs are not shown: {name} has changed since the evaluation (its SHA-256 differs)."
    with file.open("rb") as lines:
        inputs = [str(row.get("input", "")) for row in json_rows(lines, file, ())]
    return (inputs, "") if any(inputs) else ([], "These rows have no field input.")
