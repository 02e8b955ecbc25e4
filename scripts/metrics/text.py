"""Metrics that compare texts: BLEU-4, ROUGE-L, corpus BLEU, chrF and exact match."""

import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from .metric import METRICS, CorpusMetric, Pair, Parameters, RowMetric

_WORD = re.compile(r"[^\W_]+|_|[^\w\s]")
_TINY = sys.float_info.min  # replaces 0 in logarithms: an empty prediction scores 100 exp(-len(reference))


def words(text: str) -> list[str]:
    """Lower-case words; each underscore, punctuation mark or symbol is a separate item."""
    return _WORD.findall(text.lower())


def _ngrams(text: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(text[i:] for i in range(n)), strict=False))


def bleu4(reference: str, prediction: str) -> float:
    """BLEU-4 of one prediction, 0 to 100, as in papers on CodeReviewer's data.

    This is a smoothed sentence score, to be averaged over rows. Its tokenization and brevity penalty are unusual, so no
    setting of BLEU in sacrebleu or nltk gives the same score. It follows the script smooth_bleu of CodeBERT and
    CodeReviewer (arXiv 2203.09095), but keeps stop words.
    """
    expected_words, predicted_words = words(reference), words(prediction)
    log_precisions = 0.0
    for n in range(1, 5):
        matches = (_ngrams(expected_words, n) & _ngrams(predicted_words, n)).total()
        total = max(len(predicted_words) - n + 1, 0)
        smoothing = 0 if n == 1 else 1
        log_precisions += math.log(matches + smoothing or _TINY) - math.log(total + smoothing or _TINY)
    brevity = min(0.0, 1 - (len(expected_words) + 1) / (len(predicted_words) + 1))
    return 100 * math.exp(log_precisions / 4 + brevity)


def _bleu4_by_row(pairs: Sequence[Pair], _: Parameters) -> list[float]:
    return [bleu4(reference, prediction) for reference, prediction in pairs]


class RougeParameters(Parameters):
    """Parameters of ROUGE-L.

    Attributes:
        stemmed: True to compare word stems, as most papers on English text do.
    """

    stemmed: bool = True


def _common(reference: Sequence[str], prediction: Sequence[str]) -> int:
    """Number of words in the longest common subsequence.

    This is a bit-parallel algorithm (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"). It is faster than
    the table in rouge-score, which takes a Python step for each pair of words.
    """
    places: dict[str, int] = {}  # for each word, a bit for each of its places in the reference
    for place, word in enumerate(reference):
        places[word] = places.get(word, 0) | (1 << place)
    # a bit for each place in the reference: 0 if the common subsequence with the words so far grows there
    all_places = (1 << len(reference)) - 1
    flat = all_places
    for word in prediction:
        matches = flat & places.get(word, 0)
        # in the gap below each 0, the lowest match becomes 0 and that 0 becomes 1; above all zeros, it adds a 0
        flat = ((flat + matches) | (flat - matches)) & all_places
    return len(reference) - flat.bit_count()


def rouge_l(pairs: Sequence[Pair], parameters: RougeParameters) -> list[float]:
    """F1 of each prediction against one reference, with rouge-score's tokens and stems."""
    from rouge_score.scoring import fmeasure
    from rouge_score.tokenizers import DefaultTokenizer

    tokens = DefaultTokenizer(parameters.stemmed).tokenize
    scores = []
    for pair in pairs:
        reference, prediction = map(tokens, pair)
        common = _common(reference, prediction)
        scores.append(float(fmeasure(common / max(len(prediction), 1), common / max(len(reference), 1))))
    return scores


class SacrebleuParameters(Parameters):
    """Parameters of sacrebleu, with the library's defaults."""

    tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"
    lowercase: bool = False


def _corpus_bleu(parameters: SacrebleuParameters) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(**parameters.model_dump())


def sacrebleu(pairs: Sequence[Pair], parameters: SacrebleuParameters) -> float:
    """Corpus BLEU over all pairs; it differs from the mean of BLEU over rows."""
    references = [reference for reference, _ in pairs]
    predictions = [prediction for _, prediction in pairs]
    return float(_corpus_bleu(parameters).corpus_score(predictions, [references]).score)


def signature(parameters: SacrebleuParameters) -> str:
    """sacrebleu's description of its settings and version."""
    scorer = _corpus_bleu(parameters)
    scorer.corpus_score([""], [[""]])  # the signature includes the number of references
    return str(scorer.get_signature())


class ChrfParameters(Parameters):
    """Parameters of chrF, with sacrebleu's defaults; word_order 2 is chrF++.

    `char_order` and `word_order` are maximum n-gram lengths; `beta` weights recall.
    """

    char_order: int = Field(6, ge=1, le=20)
    word_order: int = Field(0, ge=0, le=20)
    beta: int = 2


def chrf(pairs: Sequence[Pair], parameters: ChrfParameters) -> list[float]:
    """Sentence chrF of each prediction against one reference, by sacrebleu."""
    from sacrebleu.metrics.chrf import CHRF

    scorer = CHRF(**parameters.model_dump())
    return [float(scorer.sentence_score(prediction, [reference]).score) for reference, prediction in pairs]


class ExactMatchParameters(Parameters):
    """Ignored differences: case, and space between words. Surrounding space is always ignored."""

    ignore_case: bool = False
    ignore_space: bool = False


def exact_match(pairs: Sequence[Pair], parameters: ExactMatchParameters) -> list[float]:
    """Score 100 for each prediction that equals its reference, otherwise 0."""

    def plain(text: str) -> str:
        text = " ".join(text.split()) if parameters.ignore_space else text.strip()
        return text.casefold() if parameters.ignore_case else text

    return [100.0 if plain(reference) == plain(prediction) else 0.0 for reference, prediction in pairs]


METRICS.include(
    RowMetric(
        name="bleu4",
        label="BLEU-4",
        hub_type="bleu",
        source="smoothed sentence BLEU-4 as CodeReviewer computes it, arXiv 2203.09095",
        score_rows=_bleu4_by_row,
    )
)
METRICS.include(
    RowMetric(
        name="rouge_l",
        label="ROUGE-L",
        hub_type="rouge",
        high=1,
        source="the F1 of rouge-score, Lin 2004, https://aclanthology.org/W04-1013",
        score_rows=rouge_l,
        parameters=RougeParameters,
    )
)
METRICS.include(
    CorpusMetric(
        name="sacrebleu",
        label="sacrebleu's corpus BLEU",
        hub_type="sacrebleu",
        source="corpus BLEU of sacrebleu, Post 2018, https://aclanthology.org/W18-6319",
        score_corpus=sacrebleu,
        parameters=SacrebleuParameters,
        signature=signature,
    )
)
METRICS.include(
    RowMetric(
        name="chrf",
        label="chrF",
        hub_type="chrf",
        source="sentence chrF of sacrebleu, Popović 2015, https://aclanthology.org/W15-3049",
        score_rows=chrf,
        parameters=ChrfParameters,
    )
)
METRICS.include(
    RowMetric(
        name="exact_match",
        label="exact match",
        hub_type="exact_match",
        unit="%",
        source="this project",
        score_rows=exact_match,
        all_or_nothing=True,
        parameters=ExactMatchParameters,
    )
)
