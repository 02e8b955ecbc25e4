"""chrF by the sacrebleu library, a score for each row."""

from collections.abc import Sequence

from pydantic import Field

from .metric import Metric, Pair, Parameters


class ChrfParameters(Parameters):
    """The longest n-grams of characters and of words (2 is chrF++), and the weight of recall; sacrebleu's defaults."""

    char_order: int = Field(6, ge=1, le=20)
    word_order: int = Field(0, ge=0, le=20)
    beta: int = 2


def chrf(pairs: Sequence[Pair], parameters: ChrfParameters) -> list[float]:
    """The sentence-level score of each prediction against its one reference."""
    from sacrebleu.metrics.chrf import CHRF

    scorer = CHRF(**parameters.model_dump())
    return [float(scorer.sentence_score(prediction, [reference]).score) for reference, prediction in pairs]


METRIC = Metric(
    name="chrf",
    label="chrF",
    hub_type="chrf",
    low=0,
    high=100,
    source="sentence chrF of sacrebleu, Popović 2015, https://aclanthology.org/W15-3049",
    of_rows=chrf,
    parameters=ChrfParameters,
)
