"""Read and score published predictions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import Row, read_rows
from ..base.progress import Bar
from ..data import prepare
from ..data.published import PublishedPredictions, PublishedScore, Texts
from ..data.study import Study
from .score import ScorerModels, below, score


def scores(
    of_study: Study,
    predictions: PublishedPredictions,
    own: str,
    published: Mapping[str, PublishedScore],
    judged: ScorerModels,
) -> list[dict[str, Any]]:
    """Score published predictions.

    Predictions of the complete test set are also scored on the subset to which the published scores refer, if any.

    Args:
        predictions: files of the predictions.
        own: name of the predictions' test set.
        published: published scores by metric, on the study's `test_set`.
        judged: scorer models by column name.

    Returns:
        A row for each test set and metric: `test_set`, `rows`, `metric`, `score`, the 95 % interval `low` and `high`,
        `published`, the `difference`, and `agrees`: True if the difference is at most `margin` of the
        published score.

    Raises:
        UserError: a file is damaged, or its rows are not those of the test set.
        WorkFailed: a scorer model cannot be loaded.
    """
    by_set = {own: read(of_study, predictions, own)}
    on = of_study.data.test_set
    if own == "test" and on in of_study.data.subsets:
        places = [(place, b"", 0) for place in range(len(by_set[own]))]
        drawn = prepare.choose(of_study.data.subsets[on], of_study.folder, places)
        by_set = {on: [by_set[own][place] for place, *_ in drawn]} | by_set
    table = []
    for test_set, of_set in by_set.items():
        with Bar(f"scoring {len(of_set):,} published predictions", 1):
            made, _ = score(of_set, of_study.columns, judged)
        for name in (name for name in of_study.columns if made.get(name) is not None):
            low, high = made["intervals"].get(name) or (None, None)
            row = {"test_set": test_set, "rows": len(of_set), "metric": name, "score": made[name]}
            table.append(row | {"low": low, "high": high} | _beside(made[name], published.get(name), test_set == on))
    return table


def _beside(ours: float, theirs: PublishedScore | None, comparable: bool) -> dict[str, Any]:
    """Compare our score with the published, rounded score of the same texts."""
    if theirs is None or not comparable:
        return {"published": None, "difference": None, "agrees": None}
    difference = ours - float(theirs.value)
    return {"published": float(theirs.value), "difference": difference, "agrees": abs(difference) <= theirs.margin}


def read(of_study: Study, predictions: PublishedPredictions, own: str) -> list[Row]:
    """Read rows with `reference` and `prediction`.

    Raises:
        UserError: see `scores`.
    """
    data = of_study.data
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
    return [{"reference": pair[0], "prediction": pair[1]} for pair in zip(references, written, strict=True)]


def _texts(texts: Texts, folder: Path) -> list[str]:
    """Read texts from a file: its lines, or a field of its rows."""
    file = folder / texts.file
    if texts.field is None:
        try:
            lines = file.read_bytes().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"{file}: not UTF-8 text") from None
        return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    found = [below(row, texts.field) for row in read_rows(file, ())]
    if wrong := next((number for number, text in enumerate(found, start=1) if not isinstance(text, str)), None):
        raise UserError(f"{file}: row {wrong} has no text field {texts.field}; correct the field in study.yaml")
    return found
