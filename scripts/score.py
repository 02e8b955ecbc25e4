"""Scores of predictions against references, whoever made them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bleu import corpus_bleu4
from .errors import UserError
from .files import json_rows


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """The (reference, prediction) pairs of a JSONL file with fields of those names.

    Raises:
        UserError: the file is missing or empty, or a row is no such pair.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    with file.open("rb") as lines:
        rows = json_rows(lines, file, ("reference", "prediction"))
        pairs = [(row["reference"], row["prediction"]) for row in rows]
    if not pairs:
        raise UserError(f"{file}: has no rows")
    return pairs


def score(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """BLEU-4 of this line of work (see `bleu`), and sacrebleu's corpus BLEU with its signature."""
    from sacrebleu.metrics.bleu import BLEU

    sacrebleu = BLEU()
    corpus = sacrebleu.corpus_score([given for _, given in pairs], [[wanted for wanted, _ in pairs]])
    return {
        "rows": len(pairs),
        "bleu4": corpus_bleu4(pairs),
        "sacrebleu": corpus.score,
        "sacrebleu_signature": str(sacrebleu.get_signature()),
        "empty_predictions": sum(not given.strip() for _, given in pairs),
    }
