"""Runs of a report, with tables, and predictions for the reader."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...base import paths, tables, yamlfiles
from ...base.errors import UserError
from ...base.files import Row, json_rows, sha256
from ...base.secrets import without_secrets
from ...base.yamlfiles import on_one_line
from ...config import merging
from ...config.merging import Difference
from ...evaluate import scores_file
from ...evaluate.score import model_record
from ...evaluate.scores_file import Evaluation, EvaluationSettings, read_predictions
from ...metrics import registry
from ...metrics.metric import Column
from ...run import backends
from ...run.rundir import RunDir
from ..run_result import RunResult

_OTHERS = {
    "sacrebleu_signature": "sacreBLEU signature",
    "exact": "exact matches, share of rows",
    "empty": "empty predictions, share of rows",
    "repeated": "repeated predictions, share of rows",
}


@dataclass(frozen=True)
class ReportedRun(RunResult):
    """Run in a report.

    Attributes:
        label: unique name in the report.
    """

    label: str

    @cached_property
    def config(self) -> yamlfiles.Config:
        """Config that Axolotl received; empty if it cannot be read."""
        with suppress(UserError):
            return self.folder.config
        return {}

    def from_cwd(self, path: str) -> str:
        """Path relative to the run's working folder, if it is inside."""
        return str(Path(path).relative_to(self.run.cwd)) if Path(path).is_relative_to(self.run.cwd) else path

    @property
    def differs(self) -> list[Row]:
        """Differences from the recipe."""
        return [
            {
                "setting": d.key,
                "recipe": on_one_line(d.recipe),
                "this run": on_one_line(d.run),
                "why": d.why,
            }
            for d in map(Difference.without_secrets, self.run.differences)
        ]

    @cached_property
    def _recipe_file(self) -> Path:
        shipped = paths.recipe_file(self.run.recipe)
        return shipped if shipped.is_file() else Path(self.run.cwd, self.run.recipe_file)

    @property
    def settings(self) -> list[Row]:
        """Settings with their sources."""
        file = self._recipe_file
        of_recipe = (
            dict.fromkeys(yamlfiles.read_yaml(file), "the recipe") | yamlfiles.sources(file) if file.is_file() else {}
        )
        why = {f"{difference.key}.": difference.without_secrets().why for difference in self.run.differences}
        return [
            {
                "setting": key,
                "value": on_one_line(value),
                "source": next((why[changed] for changed in why if f"{key}.".startswith(changed)), None)
                or of_recipe.get(key.partition(".")[0], "set by the run"),
            }
            for key, value in merging.flatten(without_secrets(self.config))
        ]

    @property
    def note(self) -> str:
        """Warning if the recipe file is missing or has changed since the run; otherwise empty."""
        file = self._recipe_file
        if file.is_file() and sha256(file) == self.run.recipe_sha256:
            return ""
        return f"{self.run.recipe_file} is missing or has changed since the run; sources come from the present file."

    @property
    def records(self) -> dict[str, list[tuple[str, str | None]]]:
        """Keys and values in the run's files, except differences, which have a table."""
        files = {"run.json": self.run.model_dump(exclude={"differences", "of_variant"})}
        if self.evaluation:
            files["scores.json"] = self.evaluation.model_dump()
        return {
            name: [(key, on_one_line(value)) for key, value in merging.flatten(without_secrets(content))]
            for name, content in files.items()
        }


def reported_runs(folders: Sequence[RunDir], labels: Sequence[str] | None = None) -> list[ReportedRun]:
    """Read runs; label them by recipe, and by folder if several share a recipe.

    Raises:
        UserError: a folder holds no run, or rehearsals and real runs are mixed.
    """
    runs = [(folder, backends.read(folder)) for folder in folders]
    if len({run.rehearsal for _, run in runs}) > 1:
        raise UserError("rehearsals and real runs are not comparable; report on only one kind")
    names = labels or [run.recipe.rpartition("/")[2] for _, run in runs]
    times = Counter(names)
    return [
        ReportedRun(folder, run, name if times[name] == 1 else f"{name}, {folder.path.name}")
        for name, (folder, run) in zip(names, runs, strict=True)
    ]


def headings(runs: Sequence[ReportedRun]) -> dict[str, Column]:
    """Metrics of runs by heading; different metrics with the same name have different headings."""
    return registry.distinct(column for reported in runs for column in reported.columns.values())


def scores(runs: Sequence[ReportedRun], by_heading: Mapping[str, Column]) -> list[Row]:
    """Table of scores, with columns for runs, base models and published scores."""
    columns: dict[str, dict[str, str | None]] = {}
    for reported in runs:
        if not reported.evaluation:
            continue
        shown = {
            reported.label: reported.evaluation,
            **{f"{reported.label}: {name}": other for name, other in reported.decoded.items()},
            f"{reported.label}: base model alone": reported.base_evaluation,
        }
        columns |= {label: _column(evaluation, by_heading) for label, evaluation in shown.items() if evaluation}
        published: dict[str, str | None] = {
            str(registry.heading(reported.columns[name], by_heading)): str(aim)
            for name, score in reported.scores.items()
            if (aim := score.published) and score.difference is not None
        }
        if published:
            columns[f"{reported.label}: published"] = published
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return [{"score": name} | {label: column.get(name) for label, column in columns.items()} for name in names]


def _column(evaluation: Evaluation, by_heading: Mapping[str, Column]) -> dict[str, str | None]:
    """Scores of an evaluation as text, with intervals."""
    column: dict[str, str | None] = {}
    scores = evaluation.flat()
    titles = {name: registry.heading(scored, by_heading) for name, scored in evaluation.columns.items()}
    by_model = {c.recorded("bertscore"): c for c in evaluation.columns.values() if model_record(c, evaluation.scores)}
    for key, value in scores.items():
        title = titles.get(key) or _OTHERS.get(key, key)
        if key in by_model:
            column[f"{by_model[key].label} by"] = str(value.get("model"))
        elif isinstance(value, int | float | str):
            within = f" ({tables.text_of(interval)})" if (interval := scores["intervals"].get(key)) else ""
            column[title] = f"{tables.text_of(value)}{within}"
    return column


def scored_on(reported: ReportedRun) -> str:
    """Description of the rows that a run was evaluated on."""
    assert reported.evaluation
    settings = reported.evaluation.settings
    by = "" if settings.engine == scores_file.REFERENCE else f", predictions by {settings.engine}"
    return f"{settings.rows_in_words} of {reported.from_cwd(settings.data)}{by}"


def reader(runs: Sequence[ReportedRun]) -> list[Row]:
    """References, inputs and each model's predictions, for each file of test rows."""
    files: dict[str, Row] = {}
    for reported in runs:
        sources = [(reported.label, reported.evaluation, read_predictions(reported.folder.path))]
        if reported.of_base_model and len(runs) == 1:
            folder, base = reported.of_base_model
            sources.append(("the base model alone", base, read_predictions(folder)))
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
    """Rows of a file as columns, a compact form that is fast to search."""
    numbers = sorted(rows)
    diffs, why = _diffs(reported, settings)
    shown = []
    for label, by_number, columns in models:
        values = [by_number.get(number, {}) for number in numbers]
        scores = {
            heading: [None if row.get(column.name) is None else round(row[column.name], 4) for row in values]
            for heading, column in registry.distinct(columns.values()).items()
            if any(row.get(column.name) is not None for row in values)
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
    """Inputs of all rows in the evaluated file, such as diffs, or the reason for their absence."""
    file, name = Path(reported.run.cwd, settings.data), reported.from_cwd(settings.data)
    if not file.is_file() or sha256(file) != settings.data_sha256:
        return [], f"The inputs are not shown: {name} is missing or has changed since the evaluation."
    with file.open("rb") as lines:
        inputs = [str(row.get("input", "")) for row in json_rows(lines, file, ())]
    if not any(inputs):
        return [], "The rows have no field named input."
    return inputs, ""
