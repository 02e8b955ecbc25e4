"""The corpus BLEU of the sacrebleu library: one score of all rows, not the mean of scores of rows."""

from collections.abc import Sequence
from typing import Any, Literal

from .metric import Metric, Pair, Parameters


class SacrebleuParameters(Parameters):
    """How texts are divided into tokens, and whether upper and lower case are the same; sacrebleu's defaults."""

    tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"
    lowercase: bool = False


def _scorer(parameters: SacrebleuParameters) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(**parameters.model_dump())


def sacrebleu(pairs: Sequence[Pair], parameters: SacrebleuParameters) -> float:
    """The BLEU of all predictions, each against its one reference."""
    references, predictions = ([pair[side] for pair in pairs] for side in (0, 1))
    return float(_scorer(parameters).corpus_score(predictions, [references]).score)


def _signature(parameters: SacrebleuParameters) -> dict[str, Any]:
    scorer = _scorer(parameters)
    scorer.corpus_score([""], [[""]])  # the signature tells how many references there are
    return {"sacrebleu_signature": str(scorer.get_signature())}


METRIC = Metric(
    name="sacrebleu",
    label="sacrebleu's corpus BLEU",
    hub_type="sacrebleu",
    low=0,
    high=100,
    source="corpus BLEU of sacrebleu, Post 2018, https://aclanthology.org/W18-6319",
    of_all=sacrebleu,
    parameters=SacrebleuParameters,
    record=_signature,
)
