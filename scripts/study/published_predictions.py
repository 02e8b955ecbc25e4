"""Read and score published predictions."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import Row, read_rows
from ..base.terminal import Bar
from ..data import prepare
from ..data.published import PublishedPredictions, PublishedScore, Texts
from ..data.studies import Study
from ..evaluate.score import ScorerModels, nested_value, score


def scores(
    of_study: Study,
    predictions: PublishedPredictions,
    test_set: str,
    published: Mapping[str, PublishedScore],
    judged: ScorerModels,
) -> list[dict[str, Any]]:
    """Score published predictions on the test set of the published scores.

    Args:
        predictions: files of the predictions.
        test_set: name of the test set.
        published: published scores by metric.
        judged: scorer models by column name.

    Returns:
        A row for each metric: `test_set`, `rows`, `metric`, `score`, the 95 % interval `low` and `high`, `published`,
        the `difference`, and `agrees`: True if the difference is at most `margin` of the published score.

    Raises:
        UserError: a file is damaged, or its rows are not those of the test set.
        WorkFailed: a scorer model cannot be loaded.
    """
    rows = read(of_study, predictions, test_set)
    with Bar(f"scoring {len(rows):,} published predictions", 1):
        made, _ = score(rows, of_study.columns, judged)
    table = []
    for name in of_study.columns:
        record, theirs = made.scores.get(name), published.get(name)
        if record is None or record.value is None:
            continue
        ours = record.value
        low, high = record.interval or (None, None)
        difference = ours - float(theirs.value) if theirs else None
        table.append(
            {
                "test_set": test_set,
                "rows": len(rows),
                "metric": name,
                "score": ours,
                "low": low,
                "high": high,
                "published": float(theirs.value) if theirs else None,
                "difference": difference,
                "agrees": abs(difference) <= theirs.margin if theirs and difference is not None else None,
            }
        )
    return table


def read(of_study: Study, predictions: PublishedPredictions, test_set: str) -> list[Row]:
    """Read rows of a test set with `reference` and `prediction`; choose them if the files have the complete test set.

    Raises:
        UserError: see `scores`.
    """
    data, own = of_study.data, predictions.test_set or test_set
    written, references = (_texts(texts, data.raw) for texts in (predictions.prediction, predictions.reference))
    file = data.raw / predictions.prediction.file
    if len(written) != len(references):
        raise UserError(
            f"{file}: {len(written):,} predictions for {len(references):,} references; the two numbers must be equal"
        )
    expected = data.raw_rows_of("test") if own == "test" else data.subsets[own].rows
    if expected not in (None, len(written)):
        title = data.title_of(own)
        raise UserError(f"{file}: {len(written):,} predictions, but {title} of the study has {expected:,} rows")
    positions: Iterable[int] = range(len(written))
    if own != test_set:
        positions = prepare.choose(data.subsets[test_set], of_study.folder, range(len(written)))
    return [{"reference": references[position], "prediction": written[position]} for position in positions]


def _texts(texts: Texts, folder: Path) -> list[str]:
    """Read texts from a file: its lines, or a field of its rows."""
    file = folder / texts.file
    if texts.field is None:
        try:
            with file.open(encoding="utf-8-sig", newline="\n") as lines:
                return [line.removesuffix("\n").removesuffix("\r") for line in lines]
        except UnicodeDecodeError:
            raise UserError(f"{file}: not UTF-8 text") from None
    found = [nested_value(row, texts.field) for row in read_rows(file, ())]
    if wrong := next((number for number, text in enumerate(found, start=1) if not isinstance(text, str)), None):
        raise UserError(f"{file}: row {wrong} has no text field {texts.field}; correct the field in study.yaml")
    return found
