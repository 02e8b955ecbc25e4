"""Scores of predictions against references, whoever made them: each row's, and their means."""

import inspect
from collections import Counter
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import Row, json_rows
from . import bertscore, bleu, intervals
from .metrics import METRICS, PER_ROW, Metric

VERSION = 1
"""Of what scores mean. To be raised with any change after which the same texts score otherwise; scores of another
version are computed again."""


def read_rows(file: Path, fields: Sequence[str] = ("reference", "prediction"), hint: str = "") -> list[Row]:
    """The rows of a JSONL file with some text fields, whatever else they have.

    Raises:
        UserError: the file is missing, which `hint` helps with, or empty, or a row lacks a field.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file{hint}")
    with file.open("rb") as lines:
        rows = list(json_rows(lines, file, fields))
    if not rows:
        raise UserError(f"{file}: has no rows")
    return rows


def with_scores(rows: Sequence[Row]) -> list[Row]:
    """Rows with the metrics that need no model and `exact`, and without older scores.

    A row is exact where both texts are the same but for space around them.
    """
    scored = []
    for row in rows:
        reference, prediction = row["reference"], row["prediction"]
        others = {key: value for key, value in row.items() if key not in PER_ROW and key != "exact"}
        scores = {name: metric.of_row(reference, prediction) for name, metric in METRICS.items() if metric.of_row}
        scored.append(others | scores | {"exact": reference.strip() == prediction.strip()})
    return scored


def score(rows: Sequence[Row], judge: bertscore.Judge | None = None) -> tuple[dict[str, Any], list[Row]]:
    """The scores of all rows together, and the rows with their own scores.

    Args:
        rows: each with `reference` and `prediction`.
        judge: whose BERTScore to give each row as `bertscore_f1`; None gives none.

    Returns:
        The means of the metrics per row with their 95 % intervals; how BERTScore was computed; sacrebleu's corpus BLEU
        and its signature; the shares of exact and empty predictions and of those that another row has too; and the
        tokens of all predictions over those of all references.
    """
    from sacrebleu.metrics.bleu import BLEU

    scored = with_scores(rows)
    references = [row["reference"] for row in rows]
    predictions = [row["prediction"] for row in rows]
    judged_by = None
    if judge:
        values, judged_by = bertscore.f1(list(zip(references, predictions, strict=True)), judge)
        scored = [row | {"bertscore_f1": value} for row, value in zip(scored, values, strict=True)]
    columns = {name: [row[name] for row in scored] for name in PER_ROW if name in scored[0]}
    sacrebleu = BLEU()
    corpus = sacrebleu.corpus_score(predictions, [references])
    times = Counter(map(str.strip, predictions))
    reference_tokens, prediction_tokens = (len(bleu.tokens("\n".join(texts))) for texts in (references, predictions))
    return {
        "rows": len(rows),
        **{name: sum(values) / len(rows) for name, values in columns.items()},
        "intervals": {name: intervals.interval(values) for name, values in columns.items()},
        "bertscore": judged_by,
        "sacrebleu": corpus.score,
        "sacrebleu_signature": str(sacrebleu.get_signature()),
        "exact": sum(row["exact"] for row in scored) / len(rows),
        "empty": times[""] / len(rows),
        "repeated": sum(count for text, count in times.items() if text and count > 1) / len(rows),
        "length_ratio": prediction_tokens / reference_tokens if reference_tokens else None,
    }, scored


@cache
def code_sha256() -> str:
    """A hash of the code that scores, which shows whether other code made a score."""
    of_rows = [inspect.getfile(metric.of_row) for metric in METRICS.values() if metric.of_row]
    files = map(Path, (__file__, inspect.getfile(Metric), bertscore.__file__, intervals.__file__, *of_rows))
    return sha256(b"".join(map(Path.read_bytes, files))).hexdigest()
