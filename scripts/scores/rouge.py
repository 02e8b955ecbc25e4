"""ROUGE-L by the rouge-score library."""

import sys
from functools import cache
from typing import Any


@cache
def _scorer() -> Any:
    from absl import logging
    from rouge_score.rouge_scorer import RougeScorer

    # absl, which comes with it, would close the stderr of this moment when Axolotl sets up its logging
    logging.get_absl_handler().python_handler.setStream(sys.__stderr__)
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(reference: str, prediction: str) -> float:
    """The F1 of one prediction against its one reference, stemmed, from 0 to 1."""
    return float(_scorer().score(reference, prediction)["rougeL"].fmeasure)
