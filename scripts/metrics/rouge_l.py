"""ROUGE-L as the rouge-score library computes it, with its tokens, stems and F1."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

from ..base.errors import UserError
from .metric import Metric, Pair, Parameters

MOST = 300_000
"""The most characters of a text: time and memory grow with the square, to 2 s and 300 MB here."""


class RougeParameters(Parameters):
    """Whether words are compared by their stems, as papers on English text mostly do."""

    stemmed: bool = True


@contextmanager
def _not_found(*packages: str) -> Iterator[None]:
    """Have imports in the block take packages for not installed, unless they are imported already."""
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # which has an import raise ModuleNotFoundError
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


@cache
def _tokenizer(stemmed: bool) -> Callable[[str], list[str]]:
    """rouge-score's tokens of a text, where each word's stem is computed once: that took two thirds of the time."""
    from rouge_score.tokenize import tokenize

    if not stemmed:
        return lambda text: list(tokenize(text, None))
    # nltk imports these two where they are installed, for what is not used here, and that takes 2 s
    try:
        with _not_found("scipy", "sklearn"):
            stemmer = _stemmer()
    except ImportError:  # of a release that needs them
        stemmer = _stemmer()
    once = SimpleNamespace(stem=cache(stemmer.stem))
    return lambda text: list(tokenize(text, once))


def _common(reference: Sequence[str], prediction: Sequence[str]) -> int:
    """How many words the longest common subsequence has.

    By bits (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"), since rouge-score's table takes a step of
    Python for each pair of words.
    """
    places: dict[str, int] = {}  # of each word, a bit for each place in the reference
    for place, word in enumerate(reference):
        places[word] = places.get(word, 0) | (1 << place)
    # a row of that table: a 0 at each place where the subsequence with the words so far becomes longer by one
    flat = every = (1 << len(reference)) - 1
    for word in prediction:
        found = flat & places.get(word, 0)
        flat = ((flat + found) | (flat - found)) & every  # the next 0 above a place of the word moves down to it
    return len(reference) - flat.bit_count()


def rouge_l(pairs: Sequence[Pair], parameters: RougeParameters) -> list[float]:
    """The F1 of each prediction against its one reference.

    Raises:
        UserError: a text is too long.
    """
    from rouge_score.scoring import fmeasure

    tokens = _tokenizer(parameters.stemmed)
    scores = []
    for number, pair in enumerate(pairs, start=1):
        if (longest := max(map(len, pair))) > MOST:
            where = f"rouge_l: row {number} has a text of {longest:,} characters"
            raise UserError(f"{where}; shorten it to {MOST:,}, or name other metrics")
        reference, prediction = map(tokens, pair)
        common = _common(reference, prediction)
        scores.append(float(fmeasure(common / max(len(prediction), 1), common / max(len(reference), 1))))
    return scores


METRIC = Metric(
    name="rouge_l",
    label="ROUGE-L",
    hub_type="rouge",
    low=0,
    high=1,
    source="the F1 of rouge-score, Lin 2004, https://aclanthology.org/W04-1013",
    of_rows=rouge_l,
    parameters=RougeParameters,
)
