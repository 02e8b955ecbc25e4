"""Scores of predictions against references, whoever made them: each row's, and what they come to."""

import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import json_rows
from . import bertscore, bleu, intervals
from .evaluations import Row

VERSION = 1
"""Of what scores mean. To be raised with any change after which the same texts score otherwise; scores of another
version are made anew."""
PER_ROW = ("bleu4", "rouge_l", "bertscore_f1")  # those whose mean is the score


def read_rows(file: Path) -> list[Row]:
    """The rows of a JSONL file with the fields reference and prediction, whatever else they have.

    Raises:
        UserError: the file is missing or empty, or a row lacks one of them.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    with file.open("rb") as lines:
        rows = list(json_rows(lines, file, ("reference", "prediction")))
    if not rows:
        raise UserError(f"{file}: has no rows")
    return rows


def with_scores(rows: Sequence[Row]) -> list[Row]:
    """Rows with what needs no model: `bleu4` (see `bleu`; 0 to 100), `rouge_l`, and `exact`, and no older scores.

    ROUGE-L is the F1 of rouge-score, stemmed, 0 to 1; a row is exact where both texts are the same but for space
    around them.
    """
    from absl import logging
    from rouge_score.rouge_scorer import RougeScorer

    # absl, which comes with it, would close the stderr of this moment when Axolotl sets up its logging
    logging.get_absl_handler().python_handler.setStream(sys.__stderr__)
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    own = {*PER_ROW, "exact"}
    return [
        {key: value for key, value in row.items() if key not in own}
        | {
            "bleu4": 100 * bleu.sentence_bleu4(row["reference"], row["prediction"]),
            "rouge_l": float(rouge.score(row["reference"], row["prediction"])["rougeL"].fmeasure),
            "exact": row["reference"].strip() == row["prediction"].strip(),
        }
        for row in rows
    ]


def score(rows: Sequence[Row], judge: bertscore.Judge | None = None) -> tuple[dict[str, Any], list[Row]]:
    """What rows score together, and the rows with their own scores.

    Args:
        rows: each with `reference` and `prediction`.
        judge: whose BERTScore to give each row as `bertscore_f1`; None gives none.

    Returns:
        The means of bleu4, rouge_l and bertscore_f1 with their 95 % intervals; how BERTScore was made; sacrebleu's
        corpus BLEU and its signature; the shares of exact and empty predictions and of those that another row has
        too; and the tokens of all predictions over those of all references.
    """
    from sacrebleu.metrics.bleu import BLEU

    scored = with_scores(rows)
    pairs = [(row["reference"], row["prediction"]) for row in rows]
    made_by = None
    if judge:
        values, made_by = bertscore.f1(pairs, judge)
        scored = [row | {"bertscore_f1": value} for row, value in zip(scored, values, strict=True)]
    columns = {name: [row[name] for row in scored] for name in PER_ROW if name in scored[0]}
    sacrebleu = BLEU()
    corpus = sacrebleu.corpus_score([given for _, given in pairs], [[wanted for wanted, _ in pairs]])
    times = Counter(given.strip() for _, given in pairs)
    wanted_tokens, given_tokens = (sum(len(bleu.tokens(text)) for text in texts) for texts in zip(*pairs, strict=True))
    return {
        "rows": len(rows),
        **{name: sum(values) / len(rows) for name, values in columns.items()},
        "intervals": {name: intervals.interval(values) for name, values in columns.items()},
        "bertscore": made_by,
        "sacrebleu": corpus.score,
        "sacrebleu_signature": str(sacrebleu.get_signature()),
        "exact": sum(row["exact"] for row in scored) / len(rows),
        "empty": times[""] / len(rows),
        "repeated": sum(count for text, count in times.items() if text and count > 1) / len(rows),
        "length_ratio": given_tokens / wanted_tokens if wanted_tokens else None,
    }, scored


@cache
def code_sha256() -> str:
    """A hash of the code that scores, so that scores made by another can be told."""
    modules = (__file__, bleu.__file__, bertscore.__file__, intervals.__file__)
    return sha256(b"".join(Path(str(file)).read_bytes() for file in modules)).hexdigest()
