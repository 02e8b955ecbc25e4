"""Whether a prediction is its reference, to the letter."""

from collections.abc import Sequence

from .metric import Metric, Pair, Parameters


class ExactMatchParameters(Parameters):
    """What does not count: upper and lower case, and how much space is between words; around a text it never does."""

    ignore_case: bool = False
    ignore_space: bool = False


def exact_match(pairs: Sequence[Pair], parameters: ExactMatchParameters) -> list[float]:
    """100 for each prediction that is the same as its reference, otherwise 0."""

    def plain(text: str) -> str:
        text = " ".join(text.split()) if parameters.ignore_space else text.strip()
        return text.casefold() if parameters.ignore_case else text

    return [100.0 * (plain(reference) == plain(prediction)) for reference, prediction in pairs]


METRIC = Metric(
    name="exact_match",
    label="exact match",
    hub_type="exact_match",
    low=0,
    high=100,
    unit="%",
    source="this project",
    of_rows=exact_match,
    all_or_nothing=True,
    parameters=ExactMatchParameters,
)
