"""Score predictions against references; choose metrics and BERTScore's scorer model."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import Row, read_rows
from ..base.terminal import say
from ..config import substitution
from ..data import studies
from ..metrics import registry
from ..metrics.bertscore import ScorerModel, layer_of
from ..metrics.metric import FEWEST, Benchmark, Column, ScoreRecord, ScorerRecord
from .scores_file import RowShares, Scores

# Scorer model by column name; None leaves the column out.
ScorerModels = Mapping[str, ScorerModel | None]


class StandIn(ScorerModel):
    """Stand-in for the scorer model in rehearsals."""

    @property
    def name(self) -> str:
        return substitution.SCORER


def columns_of(recipe: str | None = None, asked: Iterable[str] = ()) -> dict[str, Column]:
    """Columns (metrics with their parameters) of the recipe's study and of --metric, by name.

    The default metrics (`registry.DEFAULT`) apply if the study has no metrics, and --metric is
    absent or names only benchmarks.

    Args:
        recipe: name of the recipe, or of a variant's base recipe; None for predictions without a recipe.
        asked: values of --metric.

    Raises:
        UserError: a value is malformed or redefines a metric of the study, or a mean is of an unsuitable metric.
    """
    of_study = studies.study_of(recipe) if recipe else None
    own = of_study.columns if of_study else {}
    named = registry.asked(asked)
    for name, column in named.items():
        if name in own and not column.same_scores(own[name]):
            raise UserError(
                f"--metric {name}: {recipe}'s study declares {name} with other parameters; give your metric another "
                f"name, as in 'other: {{metric: {column.metric.name}}}'"
            )
    texts = own or {name: column for name, column in named.items() if not column.metric.of_model}
    columns = (own if texts else registry.columns(dict.fromkeys(registry.DEFAULT))) | named
    averaged = {column.entry["of"] for column in columns.values() if column.metric.of_groups}
    if wrong := averaged - of_single_rows(columns).keys():
        raise UserError(f"mean_of_groups: {min(wrong)} does not score single rows; name another metric in `of`")
    return columns


def of_single_rows(columns: Mapping[str, Column]) -> dict[str, Column]:
    """Columns that score single rows without a scorer model."""
    return {name: column for name, column in columns.items() if column.metric.of_rows and not column.metric.judged}


def declared_models(columns: Mapping[str, Column]) -> dict[str, ScorerModel]:
    """Declared scorer models by column name."""
    return {name: column.parameters for name, column in columns.items() if isinstance(column.parameters, ScorerModel)}


def scorer_model(asked: str | None, rehearsal: bool = False, declared: ScorerModel | None = None) -> ScorerModel | None:
    """Scorer model for BERTScore; None leaves BERTScore out.

    --metric (`asked`) has priority. Otherwise a rehearsal takes the stand-in. Any other run takes the declared model,
    but only if this machine has a copy, because the model is too large to download unasked.
    """
    declared = declared or ScorerModel()
    if asked:
        own = declared if asked == declared.model else ScorerModel(model=asked)
        return None if asked == "none" else own
    if rehearsal:
        return StandIn(model=str(substitution.scorer_folder()), layer=substitution.SCORER_LAYERS)
    from huggingface_hub import try_to_load_from_cache

    here = declared.is_local or isinstance(try_to_load_from_cache(declared.model, "config.json"), str)
    return declared if here else None


def scorer_models(
    columns: Mapping[str, Column], asked: str | None, rehearsal: bool = False, report: bool = False
) -> ScorerModels:
    """Scorer model for each column that declares one; if `report` is True, log missing models."""
    models = {name: scorer_model(asked, rehearsal, declared) for name, declared in declared_models(columns).items()}
    for name, declared in declared_models(columns).items():
        if report and models[name] is None and asked is None:
            say(
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
        layer_of(model)


def model_record(column: Column, scores: Mapping[str, ScoreRecord]) -> ScorerRecord | None:
    """Scorer model recorded for a column; None without a record."""
    record = scores.get(column.name)
    return record.scorer if record else None


def by_declared_model(column: Column, scores: Mapping[str, ScoreRecord]) -> bool:
    """True unless another scorer model, or another layer, than the declared one computed the scores."""
    declared, by = column.parameters, model_record(column, scores)
    if by is None or not isinstance(declared, ScorerModel):
        return True
    same_model = by.model in (declared.model, declared.model.rpartition("/")[2])
    return same_model and declared.layer in (None, by.layer)


# Version of the scoring code. Increase it when a change gives the same texts different scores. Scores of older versions
# are then computed again.
VERSION = 3


def read_pairs(file: Path, prediction: str = "prediction", reference: str = "reference") -> list[Row]:
    """Read rows; copy the named fields to `reference` and `prediction`.

    Args:
        file: JSONL file.
        prediction: field with the prediction; dots lead to nested fields, as in `answer.text`.
        reference: field with the reference, as for `prediction`.

    Raises:
        UserError: see `read_rows`.
    """
    rows = read_rows(file, ())
    for number, row in enumerate(rows, start=1):
        found = {"reference": below(row, reference), "prediction": below(row, prediction)}
        for (side, text), field in zip(found.items(), (reference, prediction), strict=True):
            if not isinstance(text, str):
                raise UserError(
                    f"{file}: row {number} lacks the text field {field}; its fields: {', '.join(row) or 'none'}; name "
                    f"another field with --{side}-field"
                )
        row |= found
    return rows


def below(row: Any, field: str) -> Any:
    """Value of a field; dots in the name lead to nested fields."""
    if not isinstance(row, dict) or field in row:
        return row.get(field) if isinstance(row, dict) else None
    first, dot, rest = field.partition(".")
    return below(row.get(first), rest) if dot else None


def of_predictions(columns: Mapping[str, Column]) -> Mapping[str, Column]:
    """Return the columns if all their metrics are computed from predictions.

    Raises:
        UserError: a metric, such as the eval loss or a benchmark, needs a run.
    """
    for name, column in columns.items():
        if column.metric.of_loss or column.metric.of_model:
            raise UserError(
                f"--metric {name}: needs a run, not only predictions; `recipe evaluate RUN --metric {name}` computes it"
            )
    return columns


def with_scores(rows: Sequence[Row], columns: Mapping[str, Column], models: ScorerModels) -> list[Row]:
    """Add new row-level scores and `exact` to rows; remove older scores.

    `exact` is True if prediction and reference are equal apart from surrounding space.

    Args:
        rows: each with `reference` and `prediction`.
        columns: metrics by name.
        models: scorer models by column name.
    """
    pairs = [(row["reference"], row["prediction"]) for row in rows]
    old = {*columns, *registry.DEFAULT, "exact"}
    scored = [{key: value for key, value in row.items() if key not in old} for row in rows]
    for name, column in columns.items():
        parameters = models.get(name, column.parameters)
        if column.metric.of_rows and parameters:
            for row, value in zip(scored, column.metric.of_rows(pairs, parameters), strict=True):
                row[name] = value
    for row, (reference, prediction) in zip(scored, pairs, strict=True):
        row["exact"] = reference.strip() == prediction.strip()
    return scored


def score(
    rows: Sequence[Row],
    columns: Mapping[str, Column],
    models: ScorerModels | None = None,
    loss: float | None = None,
    measured: Mapping[str, Benchmark] | None = None,
    groups: Iterable[str] = (),
) -> tuple[Scores, list[Row]]:
    """Score predictions, as a whole and row by row.

    Args:
        rows: each with `reference` and `prediction`; empty if no metric needs predictions.
        columns: metrics by name.
        models: scorer models by column name, without which a column is left out; by default the declared models.
        loss, measured: eval loss of the run, and benchmark scores by column name.
        groups: groups of the data, of which `rows` can be a part.

    Returns:
        The scores, and the rows with their scores.
    """
    from . import intervals  # imports NumPy, which `recipe results` does not need

    declared = declared_models(columns)
    judged = declared if models is None else {name: models.get(name) for name in declared}
    kept = {name: column for name, column in columns.items() if judged.get(name, column.parameters)}
    scored = with_scores(rows, kept, judged)
    pairs = [(row["reference"], row["prediction"]) for row in rows]
    records: dict[str, ScoreRecord] = {}
    notes = [f"rows: {len(rows)} are too few to compare scores"] if 0 < len(rows) < FEWEST else []
    for name, column in kept.items():
        value = within = benchmark = None
        of_column: list[str] = []
        metric, parameters = column.metric, judged.get(name) or column.parameters
        if metric.of_rows:
            values = [row[name] for row in scored]
            value, within = sum(values) / len(rows), intervals.over_rows(values, metric)
        elif metric.of_all:
            value = metric.of_all(pairs, parameters)
        elif metric.of_groups:
            value, within, of_column = _mean_of_groups(scored, column, columns, groups)
        elif metric.of_loss:
            value = None if loss is None else metric.of_loss(loss)
        elif metric.of_model and (benchmark := (measured or {}).get(name)):
            value, within = benchmark.value, benchmark.interval
        if metric.notes:
            of_column = [*metric.notes(pairs, parameters)]
        records[name] = ScoreRecord(
            value=value,
            interval=(within[0], within[1]) if within else None,
            declaration=column.entry,
            benchmark=benchmark,
            notes=of_column,
            **(metric.record(parameters) if metric.record else {}),
        )
    return Scores(scores=records, shares=_shares(scored), notes=notes), scored


def keep_judged(scores: Scores, rows: Sequence[Row], former: Scores, former_rows: Sequence[Row]) -> None:
    """Add scores by scorer models from an earlier evaluation of the same predictions.

    Args:
        scores, rows: new scores, see `score`; their own columns are kept.
        former: earlier scores.
        former_rows: rows of the earlier evaluation.
    """
    for name, column in former.columns.items():
        if column.metric.judged and name not in scores.scores:
            scores.scores[name] = former.scores[name]
            for row, former_row in zip(rows, former_rows, strict=True):
                row[name] = former_row[name]


def _groups_of(column: Column, columns: Mapping[str, Column], groups: Iterable[str]) -> set[str]:
    """Groups that a mean over all groups needs: those of the data, and those that other columns name."""
    if "group" in column.entry:
        return set()
    needed = {*groups}
    for other in columns.values():
        if other.entry.get("of") == column.entry["of"] and "group" in other.entry:
            needed.add(other.entry["group"])
    return needed


def _mean_of_groups(
    rows: Sequence[Row], column: Column, columns: Mapping[str, Column], groups: Iterable[str]
) -> tuple[float | None, list[float] | None, list[str]]:
    """Score over groups of rows, its interval, and a note if a group has no row."""
    by_group: dict[str, list[float]] = {}
    for row in rows:
        by_group.setdefault(str(row.get("group")), []).append(row[column.entry["of"]])
    if missing := sorted(_groups_of(column, columns, groups) - by_group.keys()):
        return None, None, [f"no mean, because no row of {', '.join(missing)} was scored"]
    assert column.metric.of_groups
    found = column.metric.of_groups(by_group, column.parameters, columns[column.entry["of"]].metric)
    return *(found or (None, None)), []


def _shares(rows: Sequence[Row]) -> RowShares:
    """Shares of exact, empty and repeated predictions."""
    if not rows:
        return RowShares(rows=0)
    times = Counter(row["prediction"].strip() for row in rows)
    return RowShares(
        rows=len(rows),
        exact=sum(row["exact"] for row in rows) / len(rows),
        empty=times[""] / len(rows),
        repeated=sum(count for text, count in times.items() if text and count > 1) / len(rows),
    )
