"""ROUGE-L by the rouge-score library."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

from .metric import Metric, Pair, Parameters


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


def _library() -> tuple[Any, Any, Any]:
    """The function that stems, the one that finds tokens, and the class that scores."""
    from nltk.stem.porter import PorterStemmer
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenize import tokenize

    return PorterStemmer().stem, tokenize, RougeScorer


@cache
def _scorer(stemmed: bool) -> Any:
    from absl import logging

    # nltk imports these two where they are installed, for what is not used here, and that takes 2 s
    try:
        with _not_found("scipy", "sklearn"):
            stem, tokenize, scorer = _library()
    except ImportError:  # of a release that needs them
        stem, tokenize, scorer = _library()
    # absl, which comes with it, would close the stderr of this moment when Axolotl sets up its logging
    logging.get_absl_handler().python_handler.setStream(sys.__stderr__)
    # its own tokens, but each word's stem is computed once: that took two thirds of the time
    stemmer = SimpleNamespace(stem=cache(stem)) if stemmed else None
    return scorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=lambda text: tokenize(text, stemmer)))


def rouge_l(pairs: Sequence[Pair], parameters: RougeParameters) -> list[float]:
    """The F1 of each prediction against its one reference."""
    scorer = _scorer(parameters.stemmed)
    return [float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference, prediction in pairs]


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
