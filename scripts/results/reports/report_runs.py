"""Runs of a report, with tables, and predictions for the reader."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from ...base import tables, yamlfiles
from ...base.errors import UserError
from ...base.files import Row
from ...base.run_files import RunFile
from ...base.secrets import without_secrets
from ...base.yamlfiles import Config, on_one_line
from ...config import merging
from ...config.merging import Difference
from ...evaluate import evaluation_rows
from ...evaluate.scores_file import TITLES, Evaluation, read_predictions
from ...evaluate.settings import REFERENCE
from ...metrics import registry
from ...metrics.metric import Column, LossMetric, ScoreRecord
from ...run import backends
from ...run.rundir import RunDir
from ...training.row_types import row_type
from ...training.run_record import Piece
from .. import repeats
from ..run_result import RunResult

_EVAL_LOSS = registry.column(registry.EVAL_LOSS.name, None).label


@dataclass(frozen=True)
class ReportedRun(RunResult):
    """Run in a report.

    Attributes:
        label: unique name in the report.
    """

    label: str

    def from_cwd(self, path: str) -> str:
        """Path relative to the run's working folder, if it is inside."""
        return str(Path(path).relative_to(self.run.cwd)) if Path(path).is_relative_to(self.run.cwd) else path

    @property
    def differs(self) -> list[Row]:
        """Differences from the recipe."""
        rows = []
        for difference in map(Difference.without_secrets, self.run.differences):
            row = {"setting": difference.key, "recipe": on_one_line(difference.recipe)}
            rows.append(row | {"this run": on_one_line(difference.run), "why": difference.source.text})
        return rows

    @property
    def first_row(self) -> list[Piece]:
        """Text of the first training row; empty if unknown."""
        return next((record["first_row"] for record in self.folder.read_metrics() if "first_row" in record), [])

    @cached_property
    def settings(self) -> list[Row]:
        """Settings with their sources."""
        rows = []
        for key, value in merging.flatten(without_secrets(self.config)):
            rows.append({"setting": key, "value": on_one_line(value), "source": self._source(key)})
        return rows

    def _source(self, key: str) -> str:
        """Source of a setting: a difference from the recipe, the recipe's comment, or the run."""
        for difference in self.run.differences:
            if f"{key}.".startswith(f"{difference.key}."):
                return difference.without_secrets().source.text
        return self._recipe_sources.get(merging.top_key(key), "set by the run")

    @cached_property
    def _recipe_sources(self) -> dict[str, str]:
        """Sources of the recipe's keys."""
        file = self.folder.recipe_file(self.run)
        if file is None:
            return {}
        return dict.fromkeys(yamlfiles.read_recipe(file), "the recipe") | yamlfiles.sources(file)

    @property
    def of_other_models(self) -> dict[str, Evaluation]:
        """Evaluations of the base model alone and of GGUF files of the adapter, by name of the model."""
        evaluations = {str(evaluation.settings.file): evaluation for evaluation in self.served}
        if self.base_evaluation:
            evaluations = {"base model alone": self.base_evaluation} | evaluations
        return evaluations

    @property
    def records(self) -> dict[str, list[tuple[str, str | None]]]:
        """Keys and values in the run's files, except differences, which have a table."""
        files: dict[str, Config] = {RunFile.RECORD: self.run.model_dump(exclude={"differences", "of_variant"})}
        if self.evaluation:
            files[RunFile.SCORES] = self.evaluation.model_dump()
        records = {}
        for name, content in files.items():
            records[name] = [(key, on_one_line(value)) for key, value in merging.flatten(without_secrets(content))]
        return records


def reported_runs(folders: Sequence[RunDir]) -> list[ReportedRun]:
    """Read runs, and label them by recipe.

    Raises:
        UserError: a folder holds no run, or rehearsals and real runs are mixed.
    """
    return labelled_by_recipe([RunResult(folder, backends.read(folder)) for folder in folders])


def labelled_by_recipe(results: Sequence[RunResult]) -> list[ReportedRun]:
    """Runs labelled by recipe, see `labelled`."""
    return labelled(results, [result.run.recipe.rpartition("/")[2] for result in results])


def labelled(results: Sequence[RunResult], names: Sequence[str]) -> list[ReportedRun]:
    """Runs with labels: their names, with their folders if several have the same, or only folders if all have it.

    Raises:
        UserError: rehearsals and real runs are mixed.
    """
    if len({result.run.rehearsal for result in results}) > 1:
        raise UserError("rehearsals and real runs are not comparable", remedy="name only one kind")
    times = Counter(names)
    runs = []
    for result, name in zip(results, names, strict=True):
        label = name
        if times[name] > 1:
            label = result.folder.path.name
            label = label if len(times) == 1 else f"{name}, {label}"
        runs.append(ReportedRun(result.folder, result.run, label))
    return runs


def headings(runs: Sequence[ReportedRun]) -> dict[str, Column]:
    """Metrics of runs by heading; different metrics with the same name have different headings."""
    return registry.distinct(column for reported in runs for column in reported.columns.values())


def scores(runs: Sequence[ReportedRun], by_heading: Mapping[str, Column], details: bool) -> list[Row]:
    """Table of scores, with columns for runs, base models and published scores.

    Args:
        runs: the runs.
        by_heading: metrics by heading.
        details: add rows with scorer models, signatures, and shares of odd predictions.
    """
    columns: dict[str, dict[str, str]] = {}
    for reported in runs:
        columns |= _score_columns(reported, by_heading, details)
    rows: list[Row] = []
    for name in dict.fromkeys(chain(*columns.values())):
        rows.append({"score": name} | {label: column.get(name) for label, column in columns.items()})
    return rows


def _score_columns(reported: ReportedRun, by_heading: Mapping[str, Column], details: bool) -> dict[str, dict[str, str]]:
    """Columns of a run by heading: its scores, those with other decodings, the base model's, and published scores."""
    label = reported.label
    evaluations = {label: reported.evaluation}
    for name, evaluation in (reported.decoded | reported.of_other_models).items():
        evaluations[f"{label}: {name}"] = evaluation
    columns = {label: _losses(reported, by_heading)}
    for name, evaluation in evaluations.items():
        if evaluation:
            columns[name] = columns.get(name, {}) | _scores(evaluation, by_heading, details)
    published = {}
    for name, score in reported.scores.items():
        if score.difference is not None:  # from the published score
            heading = registry.heading(reported.columns[name], by_heading)
            published[str(heading)] = str(score.published)
    if published and reported.evaluation:
        columns[f"{label}: published"] = published
    return columns


def _losses(reported: ReportedRun, by_heading: Mapping[str, Column]) -> dict[str, str]:
    """First and last eval loss per token, or losses and rewards of pairs, as text with digits that tell runs apart."""
    summary = reported.summary
    losses = {"first eval loss": summary.eval_loss_per_token_first, _EVAL_LOSS: summary.eval_loss_per_token}
    texts = {name: f"{loss:.4f}" for name, loss in losses.items() if loss is not None}
    if summary.eval_pairs:
        texts["pairs"] = f"{summary.eval_pairs['count']:,}"
        for name, column in reported.columns.items():
            value, interval = repeats.mean_score(column, [reported])
            if isinstance(column.metric, LossMetric) and value is not None:
                bounds = f" ({interval.low:.1f} to {interval.high:.1f})" if interval else ""
                texts[registry.heading(column, by_heading) or name] = f"{value:.4f}{bounds}"
    return texts


def _scores(evaluation: Evaluation, by_heading: Mapping[str, Column], details: bool) -> dict[str, str]:
    """Scores of an evaluation as text, with intervals and shares of rows, and with scorer models and signatures."""
    texts = {"rows": tables.text_of(evaluation.shares.rows)}
    detailed = {}
    for name, record in evaluation.scores.items():
        column = evaluation.columns[name]
        if record.value is not None:
            text = f"{record.value:.4f}" if isinstance(column.metric, LossMetric) else _with_interval(record)
            texts[registry.heading(column, by_heading) or name] = text
        if record.scorer:
            detailed[f"{column.label} by"] = record.scorer.model
        if record.signature:
            key = column.detail_key("sacrebleu_signature")
            detailed[TITLES.get(key, key)] = record.signature
    distance = evaluation.settings.distance
    if distance:
        texts["loss of adapter → merged → file"] = distance.losses
        texts["mean KL from the merged weights (without a bound if quantized)"] = f"{distance.kl:.4f}"
    shares = evaluation.shares.model_dump(exclude={"rows"}, exclude_none=True)
    if not details:
        return texts
    return texts | detailed | {TITLES[name]: tables.text_of(share) for name, share in shares.items()}


def _with_interval(record: ScoreRecord) -> str:
    """Score as text, with its interval if known."""
    if record.interval is None:
        return tables.text_of(record.value)
    return f"{tables.text_of(record.value)} ({tables.text_of([*record.interval])})"


def scored_on(reported: ReportedRun) -> str:
    """Description of the rows that a run was evaluated on."""
    assert reported.evaluation
    settings = reported.evaluation.settings
    rows = f"{settings.rows_in_words} of {reported.from_cwd(settings.data)}"
    if settings.engine == REFERENCE:
        return rows
    return f"{rows}, predictions by {settings.engine}"


@dataclass(frozen=True)
class ModelPredictions:
    """Predictions of a model for a file of test rows, by row number.

    Attributes:
        columns: metrics with scores of rows.
    """

    label: str
    rows: dict[int, Row]
    columns: Mapping[str, Column]

    def as_json(self, numbers: Sequence[int]) -> Row:
        """Predictions and scores of the numbered rows; None for a missing one."""
        rows = [self.rows.get(number, {}) for number in numbers]
        scores = {}
        for heading, column in registry.distinct(self.columns.values()).items():
            values = _values(rows, column.name)
            if any(value is not None for value in values):
                scores[heading] = [value if value is None else round(value, 4) for value in values]
        return {"label": self.label, "predictions": _values(rows, "prediction"), "scores": scores}


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    """Values of a field; None where it is missing."""
    return [row.get(name) for row in rows]


@dataclass(frozen=True)
class TestFile:
    """File of test rows, and predictions for them.

    Attributes:
        reported: the first run that was evaluated on the file.
        evaluation: that evaluation.
        models: predictions of this and other models.
    """

    reported: ReportedRun
    evaluation: Evaluation
    models: list[ModelPredictions] = field(default_factory=list)

    def as_json(self) -> Row:
        """Rows as columns, a compact form that is fast to search."""
        rows: dict[int, Row] = {}
        for model in reversed(self.models):
            rows |= model.rows
        numbers = sorted(rows)
        ordered = [rows[number] for number in numbers]
        by_number = self._prompts()
        prompts = None
        if by_number is not None:
            prompts = [by_number.get(number, []) for number in numbers]
        return {
            "data": self.reported.from_cwd(self.evaluation.settings.data),
            "row": numbers,
            "idx": _values(ordered, "idx"),
            "language": _values(ordered, "lang"),
            "reference": _values(ordered, "reference"),
            "prompt": prompts,
            "models": [model.as_json(numbers) for model in self.models],
        }

    def _prompts(self) -> dict[int, list[tuple[str, str]]] | None:
        """Names and texts before the answer, by row number; None if rows are missing or have changed since."""
        reported, settings = self.reported, self.evaluation.settings
        with suppress(OSError, UserError):
            source = evaluation_rows.default_source(reported.run, reported.config)
            if source is None or source.data != settings.data:
                file = Path(settings.data)
                source = evaluation_rows.source_of_file(file, reported.config, Path(reported.run.cwd))
            rows = evaluation_rows.read_source(source, reported.folder, reported.run, reported.config, loads=False)
            if rows.sha256 == settings.data_sha256:
                return {row.position: row_type(row.dataset.entry).prompt_of(row.content) for row in rows.rows}
        return None


def reader(runs: Sequence[ReportedRun]) -> list[Row]:
    """References, prompts and each model's predictions, for each file of test rows."""
    files: dict[str, TestFile] = {}
    for reported in runs:
        path = reported.folder.path
        evaluations = [(reported.label, path, reported.evaluation)]
        if len(runs) == 1:
            for name, other in reported.of_other_models.items():
                evaluations.append((name, other.settings.folder(path), other))
        for label, folder, evaluation in evaluations:
            rows = read_predictions(folder)
            if evaluation is None or not rows:
                continue
            file = files.setdefault(evaluation.settings.data_sha256, TestFile(reported, evaluation))
            file.models.append(ModelPredictions(label, {row["row"]: row for row in rows}, evaluation.columns))
    return [file.as_json() for file in files.values()]
