"""Read and score published predictions."""

from collections.abc import Iterable
from pathlib import Path

from ..base.errors import UserError
from ..base.files import Row, read_rows
from ..base.terminal import Bar
from ..data import prepare
from ..data.published import Baseline, PublishedPredictions, PublishedScore, Texts
from ..data.studies import Study
from ..evaluate.score import ScorerModels, nested_value, score


def scores(study: Study, published: Baseline, models: ScorerModels) -> list[Row]:
    """Score published predictions on the test set of the published scores.

    Args:
        published: published scores and their predictions.
        models: scorer models by column name.

    Returns:
        A row for each metric, with `low` and `high` of the 95 % interval. `agrees` is True if the `difference` is at
        most the `margin` of the published score.

    Raises:
        UserError: a file is damaged, or its rows are not those of the test set.
        WorkFailed: a scorer model cannot be loaded.
    """
    assert published.predictions
    rows = read(study, published.predictions, published.test_set)
    with Bar(f"scoring {len(rows):,} published predictions", 1):
        records, _ = score(rows, study.columns, models)
    table = []
    for name in study.columns:
        record = records.scores.get(name)
        if record and record.value is not None:
            row: Row = {"metric": name} | _comparison(record.value, record.interval, published.scores.get(name))
            table.append(row | {"rows": len(rows), "test_set": published.test_set})
    return table


def _comparison(score: float, interval: tuple[float, float] | None, published: PublishedScore | None) -> Row:
    """Score, its interval, and its difference from the published score, see `scores`."""
    low, high = interval or (None, None)
    row: Row = {"score": score, "published": None, "agrees": None, "low": low, "high": high, "difference": None}
    if published:
        row["published"] = float(published.value)
        row["difference"] = score - float(published.value)
        row["agrees"] = abs(row["difference"]) <= published.margin
    return row


def read(study: Study, predictions: PublishedPredictions, test_set: str) -> list[Row]:
    """Read rows of a test set with `reference` and `prediction`; choose them if the files have the complete test set.

    Raises:
        UserError: see `scores`.
    """
    data, rows_of = study.data, predictions.test_set or test_set
    written, references = _texts(predictions.prediction, data.raw), _texts(predictions.reference, data.raw)
    file = data.raw / predictions.prediction.file
    if len(written) != len(references):
        raise UserError(
            f"{file}: {len(written):,} predictions for {len(references):,} references; the two numbers must be equal"
        )
    expected = data.raw_rows_of("test") if rows_of == "test" else data.subsets[rows_of].rows
    if expected not in (None, len(written)):
        title = data.title_of(rows_of)
        raise UserError(f"{file}: {len(written):,} predictions, but {title} of the study has {expected:,} rows")
    positions: Iterable[int] = range(len(written))
    if rows_of != test_set:
        positions = prepare.choose(data.subsets[test_set], study.folder, range(len(written)))
    return [{"reference": references[position], "prediction": written[position]} for position in positions]


def _texts(declared: Texts, folder: Path) -> list[str]:
    """Read texts from a file: its lines, or a field of its rows."""
    file, field = folder / declared.file, declared.field
    if field is None:
        try:
            with file.open(encoding="utf-8-sig", newline="\n") as lines:
                return [line.removesuffix("\n").removesuffix("\r") for line in lines]
        except UnicodeDecodeError:
            raise UserError(f"{file}: not UTF-8 text") from None
    texts = [nested_value(row, field) for row in read_rows(file)]
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise UserError(f"{file}: row {number} has no text field {field}; correct the field in study.yaml")
    return texts
