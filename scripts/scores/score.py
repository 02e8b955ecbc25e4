"""Scores of predictions against references, the metrics that make them, and the scorer models of BERTScore."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import Row, read_rows
from ..base.progress import say
from ..configs import substitution
from ..data import study
from ..metrics import registry
from ..metrics.bertscore import ScorerModel, layer_of, made_by
from ..metrics.metric import Column
from ..metrics.registry import Benchmark
from ..metrics.text import words
from . import intervals

# Scorer models by the names of the columns that need one; None where that column is left out.
ScorerModels = Mapping[str, ScorerModel | None]


class StandIn(ScorerModel):
    """The scorer model of a rehearsal."""

    @property
    def stand_in(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return substitution.SCORER

    def local_revision(self) -> str:
        return substitution.scorer_version()


def columns_of(recipe: str | None = None, asked: Iterable[str] = ()) -> dict[str, Column]:
    """Metrics of a recipe's study and of --metric; without both `registry.DEFAULT`.

    Args:
        recipe: name of the recipe, or of the one that it is a variant of; None for predictions of no recipe.
        asked: values of --metric.

    Raises:
        UserError: a value is malformed, or has the name of a metric that the study declares otherwise.
    """
    of_study = study.of(recipe) if recipe else None
    own = of_study.columns if of_study else {}
    named = registry.asked(asked)
    for name, column in named.items():
        if name in own and not column.same_scores(own[name]):
            raise UserError(
                f"--metric {name}: {recipe}'s study declares {name} otherwise, and its runs are scored with that; give "
                f"yours another name, as in 'other: {{metric: {column.metric.name}}}'"
            )
    texts = own or {name: column for name, column in named.items() if not column.metric.of_model}
    return named | (own if texts else registry.columns(registry.DEFAULT))


def declared_models(columns: Mapping[str, Column]) -> dict[str, ScorerModel]:
    """Scorer models that columns declare, by the names of the columns."""
    return {name: column.parameters for name, column in columns.items() if isinstance(column.parameters, ScorerModel)}


def scorer_model(asked: str | None, rehearsal: bool = False, declared: ScorerModel | None = None) -> ScorerModel | None:
    """Scorer model of --metric; None leaves BERTScore out.

    By default it is the stand-in in a rehearsal, otherwise the declared one if that is on this machine, as it is large.
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
    """Scorer model of each column that needs one, see `scorer_model`; `report` logs missing ones."""
    models = {name: scorer_model(asked, rehearsal, declared) for name, declared in declared_models(columns).items()}
    for name, declared in declared_models(columns).items():
        if report and models[name] is None and asked is None:
            problem = f"{columns[name].label}: left out, as {declared.model} is not on this machine"
            say(f"{problem}; fetch it with `--metric bertscore:{declared.model}`")
    return models


def require_models(models: Iterable[ScorerModel | None]) -> None:
    """Load scorer models, before hours of generation.

    Raises:
        UserError, WorkFailed: see `layer_of`.
    """
    for model in filter(None, dict.fromkeys(models)):
        layer_of(model)


def model_record(column: Column, scores: Mapping[str, Any]) -> dict[str, Any] | None:
    """Record of a column's scorer model in scores.json; None without one, or where the column was left out."""
    record = scores.get(column.recorded("bertscore")) if isinstance(column.parameters, ScorerModel) else None
    return record if isinstance(record, dict) else None


def same_models(models: ScorerModels, columns: Mapping[str, Column], scores: Mapping[str, Any]) -> bool:
    """True if these scorer models made scores."""
    return all(made_by(model, model_record(columns[name], scores)) for name, model in models.items())


# Version of the scores. A change that gives the same texts other scores raises it; older scores are computed again.
VERSION = 1


def read_pairs(file: Path, prediction: str = "prediction", reference: str = "reference") -> list[Row]:
    """Rows of a JSONL file with the fields reference and prediction, from the named fields.

    Args:
        file: the file.
        prediction: the field with the prediction; a dot reaches below, as in `answer.text`.
        reference: the field with the reference.

    Raises:
        UserError: see `read_rows`.
    """
    rows = read_rows(file, ())
    for number, row in enumerate(rows, start=1):
        found = {"reference": below(row, reference), "prediction": below(row, prediction)}
        for (side, text), field in zip(found.items(), (reference, prediction), strict=True):
            if not isinstance(text, str):
                problem = f"row {number} needs the text field {field}; it has {', '.join(row) or 'none'}"
                raise UserError(f"{file}: {problem}; name another with --{side}-field")
        row |= found
    return rows


def below(row: Any, field: str) -> Any:
    """Value of a field, or of a field below others, with dots between the names."""
    if not isinstance(row, dict) or field in row:
        return row.get(field) if isinstance(row, dict) else None
    first, dot, rest = field.partition(".")
    return below(row.get(first), rest) if dot else None


def of_predictions(columns: Mapping[str, Column]) -> Mapping[str, Column]:
    """Return the columns, all of which measure predictions.

    Raises:
        UserError: one measures a run.
    """
    for name, column in columns.items():
        if column.metric.of_loss or column.metric.of_model:
            raise UserError(
                f"--metric {name}: measures a run, not predictions; `recipe evaluate RUN --metric {name}` gives it"
            )
    return columns


def with_scores(rows: Sequence[Row], columns: Mapping[str, Column], models: ScorerModels | None = None) -> list[Row]:
    """Rows with `exact` and the scores of columns with a score of each row, without older scores.

    A row is exact where both texts are the same but for space around them.

    Args:
        rows: each with `reference` and `prediction`.
        columns: their metrics.
        models: the scorer models of those that need one; by default the declared ones.
    """
    judged = dict(models or {})
    pairs = [(row["reference"], row["prediction"]) for row in rows]
    old = {*columns, *registry.DEFAULT, "exact"}
    scored = [{key: value for key, value in row.items() if key not in old} for row in rows]
    for name, column in columns.items():
        parameters = judged.get(name, column.parameters)
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
) -> tuple[dict[str, Any], list[Row]]:
    """Scores of all rows together, and the rows with their own scores.

    Args:
        rows: each with `reference` and `prediction`; empty where no metric needs predictions.
        columns: their metrics.
        models: the scorer models of those that need one; by default the declared ones.
        loss: the eval loss of the predictions' run, for metrics of that.
        measured: scores of benchmarks by column.

    Returns:
        The means of the metrics per row with their 95 % intervals; metrics of all rows together, or of the run; the
        records of the metrics, and `metrics`, their declarations; the shares of exact and empty predictions and of
        those that another row has too; the tokens of all predictions over those of all references; and `notes` on the
        scores, if there are any.
    """
    judged = dict(models or declared_models(columns))
    kept = {name: column for name, column in columns.items() if judged.get(name, column.parameters)}
    scored = with_scores(rows, kept, judged)
    pairs = [(row["reference"], row["prediction"]) for row in rows]
    means: dict[str, list[float]] = {}
    others: dict[str, float | None] = {}
    records: dict[str, Any] = {}
    notes: list[str] = []
    of_groups: dict[str, list[float] | None] = {}
    for name, column in kept.items():
        metric, parameters = column.metric, judged.get(name) or column.parameters
        if metric.of_rows:
            means[name] = [row[name] for row in scored]
        elif metric.of_all:
            others[name] = metric.of_all(pairs, parameters)
        elif metric.of_groups:
            found = metric.of_groups(_by_group(scored, column), parameters)
            others[name], of_groups[name] = found or (None, None)
        elif metric.of_loss:
            others[name] = None if loss is None else metric.of_loss(loss)
        elif metric.of_model and (benchmark := (measured or {}).get(name)):
            others[name] = benchmark.value
            records |= {f"{name}_benchmark": benchmark.model_dump()}
        if metric.record:
            records |= {column.recorded(key): value for key, value in metric.record(parameters).items()}
        if metric.notes:
            notes += [f"{name}: {note}" for note in metric.notes(pairs, parameters)]
    of_benchmarks = {name: each.interval for name, each in (measured or {}).items() if each.interval}
    return {
        "rows": len(rows),
        **{name: sum(values) / len(rows) for name, values in means.items()},
        "intervals": intervals.each(means) | of_groups | of_benchmarks,
        **others,
        **records,
        **(_shares(scored) if rows else {}),
        "metrics": {name: column.entry for name, column in kept.items()},
        **({"notes": notes} if notes else {}),
    }, scored


def _by_group(rows: Sequence[Row], column: Column) -> dict[str, list[float]]:
    """The scores that a column averages, by the group of their rows.

    Raises:
        UserError: no other column of that name has a score for each row.
    """
    averaged, groups = column.entry["of"], dict[str, list[float]]()
    for row in rows:
        if averaged not in row:
            raise UserError(f"{column.name}: {averaged} has no score for each row; name another metric in `of`")
        groups.setdefault(row.get("group") or "", []).append(row[averaged])
    return groups


def _shares(rows: Sequence[Row]) -> dict[str, float | None]:
    """Shares of rows that are exact, empty, and equal to another; length of predictions over references."""
    references, predictions = ([row[key] for row in rows] for key in ("reference", "prediction"))
    times = Counter(map(str.strip, predictions))
    reference_words, prediction_words = (len(words("\n".join(texts))) for texts in (references, predictions))
    return {
        "exact": sum(row["exact"] for row in rows) / len(rows),
        "empty": times[""] / len(rows),
        "repeated": sum(count for text, count in times.items() if text and count > 1) / len(rows),
        "length_ratio": prediction_words / reference_words if reference_words else None,
    }
