"""Scores of predictions against references, whoever made them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from .bleu import corpus_bleu4
from .errors import UserError


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """The (reference, prediction) pairs of a JSONL file with fields of those names.

    Raises:
        UserError: the file is missing or empty, or a row is no such pair.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    pairs = []
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise UserError(f"{file}:{number}: not a JSON row: {error.msg}") from None
            for name in ("reference", "prediction"):
                if not isinstance(row, dict) or not isinstance(row.get(name), str):
                    raise UserError(f"{file}:{number}: a row needs the text field {name}")
            pairs.append((row["reference"], row["prediction"]))
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
