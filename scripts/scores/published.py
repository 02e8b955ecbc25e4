"""Predictions that authors published: read, matched with the study's test rows, and scored as those of a run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.files import Row, read_rows, sha256
from ..base.progress import Bar, say
from ..checks.rows import fields_of
from ..data import prepare
from ..data.published import PublishedPredictions, PublishedScore, Texts
from ..data.study import Study
from ..metrics.metric import Column
from . import evaluation_rows
from .score import ScorerModels, below, score


def scores(
    of_study: Study,
    recipe: str,
    predictions: PublishedPredictions,
    own: str,
    published: Mapping[str, PublishedScore],
    judged: ScorerModels,
) -> list[dict[str, Any]]:
    """Score published predictions on their test set and, where that is all test rows, on that of the published scores.

    Args:
        recipe: the recipe of the study whose prepared rows they are compared with.
        predictions: where they are.
        own: their test set.
        published: the scores that were published of them, by metric, on the study's test set for published scores.
        judged: the models of the metrics that need one.

    Returns:
        A row for each test set and metric: `test_set`, `rows`, `matched`, whether the references were compared with
        prepared rows, `metric`, `score`, its 95 % interval `low` and `high`, `published`, the `difference` from that,
        and `agrees`, whether that is within the last digit that is printed, and the ± beside it.

    Raises:
        UserError: a file is damaged, or the rows are not those of the test set.
        WorkFailed: a judge cannot be loaded.
    """
    rows, matched = read(of_study, recipe, predictions, own)
    by_set = {own: rows}
    on = of_study.data.test_set
    if own == "test" and on in of_study.data.subsets:
        placed = {row["idx"]: row for row in rows}
        drawn = prepare.choose(of_study.data.subsets[on], of_study.folder, [(idx, b"", 0) for idx in placed])
        by_set = {on: [placed[idx] for idx, *_ in drawn]} | by_set
    table = []
    for test_set, of_set in by_set.items():
        with Bar(f"scoring {len(of_set):,} published predictions", 1):
            made, _ = score(of_set, of_study.columns, judged)
        for name in filter(made.__contains__, of_study.columns):
            low, high = made["intervals"].get(name) or (None, None)
            row = {"test_set": test_set, "rows": len(of_set), "matched": matched, "metric": name, "score": made[name]}
            table.append(row | {"low": low, "high": high} | _beside(made[name], published.get(name), test_set == on))
    return table


def _beside(ours: float, theirs: PublishedScore | None, comparable: bool) -> dict[str, Any]:
    """Return a published score beside ours of the same texts, from which nothing but rounding may differ."""
    if theirs is None or not comparable:
        return {"published": None, "difference": None, "agrees": None}
    half_a_digit = 0.5 * 10.0 ** -len(f"{theirs.value!r}".partition(".")[2]) * (1 + 1e-9)
    difference = ours - theirs.value
    agrees = abs(difference) <= half_a_digit + (theirs.spread or 0)
    return {"published": theirs.value, "difference": difference, "agrees": agrees}


def read(of_study: Study, recipe: str, predictions: PublishedPredictions, own: str) -> tuple[list[Row], bool]:
    """Rows with `row`, `idx`, the position in the study's test file where that is known, `reference` and `prediction`;
    and whether the references were compared with those of prepared rows.

    Raises:
        UserError: see `scores`.
    """
    assert predictions.prediction and predictions.reference
    raw = of_study.data.raw
    written, references = (_texts(texts, raw) for texts in (predictions.prediction, predictions.reference))
    file = raw / predictions.prediction.file
    if len(written) != len(references):
        raise UserError(f"{file}: {len(written):,} predictions for {len(references):,} references; each needs one")
    prepared, field = _prepared(of_study, recipe, own)
    known = of_study.data.files[of_study.data.raw_file("test")].rows if own == "test" else None
    expected = len(prepared) or (of_study.data.subsets[own].rows if own != "test" else known)
    if expected not in (None, len(written)):
        title = of_study.data.title_of(own)
        raise UserError(f"{file}: {len(written):,} predictions, but {title} of the study has {expected:,} rows")
    ours = [reference for row in prepared if (reference := _reference(row, field)) is not None]
    matched = bool(prepared) and len(ours) == len(prepared)
    if matched and (others := list(_unlike(of_study.first, ours, references))):
        theirs, mine = (" ".join(side[others[0]].split())[:60] for side in (references, ours))
        raise UserError(
            f"{raw / predictions.reference.file}: {len(others):,} of {len(ours):,} references are not those of the "
            f"study's {own}.jsonl, the first in row {others[0] + 1}: {theirs!r} instead of {mine!r}; name the "
            "test_set whose rows, in their order, these are"
        )
    places: list[int] | range = [row["idx"] for row in prepared if "idx" in row]
    places = places or range(len(written) if own == "test" else 0)  # of a subset they are not known without its rows
    positions = [{"idx": idx} for idx in places] or [{}] * len(written)
    return [
        {"row": i, **position, "reference": reference, "prediction": text}
        for i, (position, reference, text) in enumerate(zip(positions, references, written, strict=True))
    ], matched


def _texts(texts: Texts, folder: Path) -> list[str]:
    """The texts of a file: its lines, the last of which need not end, or a field of its rows."""
    file = folder / texts.file
    if texts.field is None:
        try:
            lines = file.read_bytes().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"{file}: not text in UTF-8") from None
        return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    found = [below(row, texts.field) for row in read_rows(file, ())]
    if wrong := next((number for number, text in enumerate(found, start=1) if not isinstance(text, str)), None):
        raise UserError(f"{file}: row {wrong} has no text field {texts.field}; study.yaml names that field")
    return found


def _prepared(of_study: Study, recipe: str, test_set: str) -> tuple[list[Row], str]:
    """The rows of a test set, where they are prepared here as a recipe reads them, and the field of their answers."""
    entry = yamlfiles.read_yaml(paths.recipe_file(recipe))["datasets"][0]
    kind = fields_of(entry)
    field = (kind.reference if kind else None) or entry.get("field_messages") or "messages"
    file = Path(str(entry["path"])).with_name(f"{test_set}.jsonl")
    if not file.is_file() or evaluation_rows.test_set(file, sha256(file)) != test_set:
        say(f"{file}: not prepared here, so that the published references are compared with no rows of the study")
        return [], field
    return read_rows(file, ()), field


def _reference(row: Row, field: str) -> str | None:
    """The answer of a prepared row: a text field, or the last message of a chat."""
    value = row.get(field)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return value if isinstance(value, str) else None


def _unlike(column: Column, ours: list[str], theirs: list[str]) -> Iterator[int]:
    """The rows whose two references differ by more than white space, and which a metric tells apart.

    The second is for references in another form, such as another word in front of the same number.
    """
    for i, pair in enumerate(zip(ours, theirs, strict=True)):
        one, other = (" ".join(text.split()) for text in pair)
        if one == other:
            continue
        of_rows = None if column.metric.judged else column.metric.of_rows
        if of_rows is None or of_rows([pair], column.parameters) != [column.metric.high]:
            yield i
