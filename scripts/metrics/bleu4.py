"""BLEU-4 as the papers on CodeReviewer's data compute it.

It is not sacrebleu's or nltk's BLEU under any of their settings: a smoothed sentence score with its own
tokens and brevity penalty, averaged over rows. Its form is that of the smooth_bleu script which came with
CodeBERT and CodeReviewer (arXiv 2203.09095), with stop words kept.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence

from .metric import Metric, Pair, Parameters
from .words import words

_TINY = sys.float_info.min  # stands in for 0 in logarithms: an empty prediction scores 100 exp(-len(reference))


def _ngrams(text: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(text[i:] for i in range(n)), strict=False))


def bleu4(reference: str, prediction: str) -> float:
    """The score of one prediction against its one reference, from 0 to 100."""
    wanted = words(reference)
    given = words(prediction)
    log_precisions = 0.0
    matches = 1
    for n in range(1, 5):
        # without a match of n words there is none of n + 1
        matches = matches and (_ngrams(wanted, n) & _ngrams(given, n)).total()
        total = max(len(given) - n + 1, 0)
        smooth = n > 1
        log_precisions += math.log(matches + smooth or _TINY) - math.log(total + smooth or _TINY)
    brevity = min(0.0, 1 - (len(wanted) + 1) / (len(given) + 1))
    return 100 * math.exp(log_precisions / 4 + brevity)


def _of_rows(pairs: Sequence[Pair], _: Parameters) -> list[float]:
    return [bleu4(reference, prediction) for reference, prediction in pairs]


METRIC = Metric(
    name="bleu4",
    label="BLEU-4",
    hub_type="bleu",
    low=0,
    high=100,
    source="smoothed sentence BLEU-4 as CodeReviewer computes it, arXiv 2203.09095",
    of_rows=_of_rows,
)
