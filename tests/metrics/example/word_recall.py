"""Word recall: the share of the expected answer's words that a prediction has."""

from collections.abc import Sequence

from qlora_recipes.metrics.metric import Pair, Parameters, RowMetric


class WordRecallParameters(Parameters):
    """Ignored differences."""

    ignore_case: bool = False


def word_recall(pairs: Sequence[Pair], parameters: WordRecallParameters) -> list[float]:
    """Score of each (reference, prediction), 0 to 100; 100 for a reference without words."""
    scores = []
    for reference, prediction in pairs:
        expected = _words(reference, parameters.ignore_case)
        missing = expected - _words(prediction, parameters.ignore_case)
        scores.append(100 - 100 * len(missing) / max(len(expected), 1))
    return scores


def _words(text: str, ignore_case: bool) -> set[str]:
    if ignore_case:
        text = text.casefold()
    return set(text.split())


METRIC = RowMetric(
    name="word_recall",
    label="word recall",
    hub_type="recall",
    unit="%",
    source="an example",
    score_rows=word_recall,
    parameters=WordRecallParameters,
)
