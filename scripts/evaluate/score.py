"""Score predictions against references; choose metrics and BERTScore's scorer model."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import Row, read_rows
from ..base.terminal import Bar, warn_once
from ..base.yamlfiles import Config
from ..config import substitution
from ..data import studies
from ..metrics import registry
from ..metrics.answers import GroupParameters
from ..metrics.bertscore import ScorerMetric, ScorerModel, is_recorded, layer_of
from ..metrics.metric import (
    FEWEST,
    METRICS,
    BenchmarkMetric,
    Column,
    LossMetric,
    RowMetric,
    ScoreRecord,
    ScorerRecord,
    ScoringInput,
)
from .scores_file import RowShares, Scores

# Scorer model by column name; None leaves the column out.
ScorerModels = Mapping[str, ScorerModel | None]


class StandIn(ScorerModel):
    """Small scorer model in rehearsals."""

    @property
    def name(self) -> str:
        return substitution.SCORER


def columns_of(recipe: str, requested: Iterable[str] = (), references: Sequence[str] = ()) -> dict[str, Column]:
    """Columns (metrics with their parameters) of the recipe's study and of --metric, by name.

    The default metrics apply if the study has no metrics, and --metric is absent or names only benchmarks; without a
    recipe, they lack the eval loss.

    Args:
        recipe: name of the recipe, or of a variant's base recipe; empty for predictions without a recipe.
        requested: values of --metric.
        references: expected answers, which decide the default metrics, see `registry.default_columns`.

    Raises:
        UserError: a value is malformed or redefines a metric of the study, a mean is of an unsuitable metric, or a
            metric of another package has a name that is taken.
    """
    METRICS.require_distinct()
    study = studies.study_of(recipe)
    declared = study.columns if study else {}
    additional = registry.requested(requested)
    for name, column in additional.items():
        if name in declared and not column.same_scores(declared[name]):
            raise UserError(
                f"--metric {name}: {recipe}'s study declares {name} with other parameters; give your metric another "
                f"name, as in 'other: {{metric: {column.metric.name}}}'"
            )
    columns = declared | additional
    if not declared and all(isinstance(column.metric, BenchmarkMetric) for column in additional.values()):
        columns = registry.default_columns(references) | additional
        if not recipe:
            del columns[registry.EVAL_LOSS.name]
    _require_averaged(columns)
    return columns


def columns_of_training(config: Config, recipe: str, requested: Sequence[str] = ()) -> dict[str, Column]:
    """Columns of a training; raises as `columns_of` does.

    Args:
        config: the config, which has other default metrics if it trains preferences.
        recipe: see `columns_of`.
        requested: see `columns_of`.
    """
    if config.get("rl") and not requested and studies.study_of(recipe) is None:
        return registry.columns(registry.FOR_PREFERENCES)
    return columns_of(recipe, requested)


def _require_averaged(columns: Mapping[str, Column]) -> None:
    """Raise UserError if a mean of groups names a metric that does not score single rows."""
    by_row = row_columns(columns)
    for column in columns.values():
        parameters = column.parameters
        if isinstance(parameters, GroupParameters) and parameters.of not in by_row:
            raise UserError(f"mean_of_groups: {parameters.of} does not score single rows; name another metric in `of`")


def row_columns(columns: Mapping[str, Column]) -> dict[str, Column]:
    """Columns that score single rows without a scorer model."""
    by_row = {}
    for name, column in columns.items():
        if isinstance(column.metric, RowMetric) and not isinstance(column.metric, ScorerMetric):
            by_row[name] = column
    return by_row


def computable(columns: Mapping[str, Column], models: ScorerModels) -> dict[str, Column]:
    """Columns without those whose scorer model is missing."""
    computed = {}
    for name, column in columns.items():
        if models.get(name) or not isinstance(column.metric, ScorerMetric):
            computed[name] = column
    return computed


def refuse_run_metrics(columns: Mapping[str, Column]) -> None:
    """Raise UserError if a metric, such as the eval loss or a benchmark, needs a run."""
    for name, column in columns.items():
        if isinstance(column.metric, LossMetric | BenchmarkMetric):
            raise UserError(
                f"--metric {name}: needs a run, not only predictions; `recipe evaluate RUN --metric {name}` computes it"
            )


def declared_models(columns: Mapping[str, Column]) -> dict[str, ScorerModel]:
    """Declared scorer models by column name."""
    return {name: column.parameters for name, column in columns.items() if isinstance(column.parameters, ScorerModel)}


def scorer_model(declared: ScorerModel, requested: str | None, rehearsal: bool) -> ScorerModel | None:
    """Scorer model for BERTScore; None leaves BERTScore out.

    --metric (`requested`) has priority. Otherwise a rehearsal takes the small model. Any other run takes the declared
    model, but only if this machine has a copy, because the model is too large to download unasked.
    """
    if requested == "none":
        return None
    if requested == declared.model:
        return declared
    if requested:
        return ScorerModel(model=requested)
    if rehearsal:
        return StandIn(model=str(substitution.scorer_folder()), layer=substitution.SCORER_LAYERS)
    if declared.is_local:
        return declared
    from huggingface_hub import try_to_load_from_cache

    is_cached = isinstance(try_to_load_from_cache(declared.model, "config.json"), str)
    return declared if is_cached else None


def scorer_models(columns: Mapping[str, Column], requested: str | None, rehearsal: bool = False) -> ScorerModels:
    """Scorer model for each column that declares one; missing models are logged."""
    models = {}
    for name, declared in declared_models(columns).items():
        models[name] = scorer_model(declared, requested, rehearsal)
        if models[name] is None and requested is None:
            warn_once(
                f"{columns[name].label}: not computed, because {declared.model} is not on this machine; fetch it with "
                f"`--metric bertscore:{declared.model}`"
            )
    return models


def require_models(models: Iterable[ScorerModel | None]) -> None:
    """Check that scorer models can be loaded, before hours of generation.

    Raises:
        UserError, WorkFailed: see `layer_of`.
    """
    for model in filter(None, dict.fromkeys(models)):
        with Bar("looking for the scorer model", 1):
            layer_of(model)


def model_record(column: Column, scores: Mapping[str, ScoreRecord]) -> ScorerRecord | None:
    """Scorer model recorded for a column; None without a record."""
    record = scores.get(column.name)
    return record.scorer if record else None


def by_declared_model(column: Column, scores: Mapping[str, ScoreRecord]) -> bool:
    """True unless another scorer model, or another layer, than the declared one computed the scores."""
    declared, scorer = column.parameters, model_record(column, scores)
    return scorer is None or not isinstance(declared, ScorerModel) or is_recorded(declared, scorer)


def read_pairs(file: Path, prediction: str = "prediction", reference: str = "reference") -> list[Row]:
    """Read rows; copy the named fields to `reference` and `prediction`.

    Args:
        file: JSONL file.
        prediction: field with the prediction; dots lead to nested fields, as in `answer.text`.
        reference: field with the reference, as for `prediction`.

    Raises:
        UserError: see `read_rows`.
    """
    rows = read_rows(file)
    for number, row in enumerate(rows, start=1):
        pair = {"reference": nested_value(row, reference), "prediction": nested_value(row, prediction)}
        for side, field in (("reference", reference), ("prediction", prediction)):
            if not isinstance(pair[side], str):
                raise UserError(
                    f"{file}: row {number} lacks the text field {field}; its fields: {', '.join(row)}; name "
                    f"another field with --{side}-field"
                )
        row.update(pair)
    return rows


def nested_value(row: Any, field: str) -> Any:
    """Value of a field, or None; dots in the name lead to nested fields."""
    if not isinstance(row, dict):
        return None
    if field in row:
        return row[field]
    first, _, rest = field.partition(".")
    return nested_value(row.get(first), rest)


def with_scores(rows: Sequence[Row], columns: Mapping[str, Column], scorers: Mapping[str, ScorerModel]) -> list[Row]:
    """Add new row-level scores to rows; remove older scores.

    Args:
        rows: each with `reference` and `prediction`.
        columns: metrics by name.
        scorers: scorer models by column name.
    """
    old = {*columns, *registry.OF_TEXT_ROWS}
    scored = [{key: value for key, value in row.items() if key not in old} for row in rows]
    for name, column in columns.items():
        if isinstance(column.metric, RowMetric):
            values = column.metric.scores_of(rows, scorers.get(name, column.parameters))
            for row, value in zip(scored, values, strict=True):
                row[name] = value
    return scored


NO_RUN = ScoringInput()


def score(
    rows: Sequence[Row], columns: Mapping[str, Column], models: ScorerModels, run: ScoringInput = NO_RUN
) -> tuple[Scores, list[Row]]:
    """Score predictions, as a whole and row by row.

    Args:
        rows: each with `reference` and `prediction`; empty if no metric needs predictions.
        columns: metrics by name.
        models: scorer models by column name, without which a column is left out.
        run: eval loss, benchmarks and groups of the run; its other fields are replaced.

    Returns:
        The scores, and the rows with their scores.

    Raises:
        UserError, WorkFailed: a scorer model cannot be loaded.
    """
    scorers = {name: model for name, model in models.items() if model}
    computed = computable(columns, models)
    scored = with_scores(rows, computed, scorers)
    data = replace(run, rows=scored, columns=computed, scorers=scorers)
    records = {name: column.metric.measure(column, data) for name, column in computed.items()}
    scores = Scores(scores=records, shares=_shares(scored))
    if 0 < len(rows) < FEWEST:
        scores.notes.append(f"rows: {len(rows)} are too few to compare scores")
    return scores, scored


def keep_scorer_scores(scores: Scores, rows: Sequence[Row], former: Scores, former_rows: Sequence[Row]) -> None:
    """Add scores by scorer models from an earlier evaluation of the same predictions.

    Args:
        scores, rows: new scores, see `score`; their own columns are kept.
        former: earlier scores.
        former_rows: rows of the earlier evaluation.
    """
    for name, column in former.columns.items():
        if isinstance(column.metric, ScorerMetric) and name not in scores.scores:
            scores.scores[name] = former.scores[name]
            for row, former_row in zip(rows, former_rows, strict=True):
                row[name] = former_row[name]


def _shares(rows: Sequence[Row]) -> RowShares:
    """Shares of empty and repeated predictions."""
    if not rows:
        return RowShares(rows=0)
    times = Counter(row["prediction"].strip() for row in rows)
    empty = times.pop("", 0)
    repeated = sum(count for count in times.values() if count > 1)
    return RowShares(rows=len(rows), empty=empty / len(rows), repeated=repeated / len(rows))
