"""The metrics of predictions: the one list that scoring, tables, model cards and reports read."""

from collections.abc import Callable
from dataclasses import dataclass

from . import bleu, rouge


@dataclass(frozen=True)
class Metric:
    """A score of predictions.

    Attributes:
        label: its name in tables and figures.
        title: its name on a model card.
        hub_type: its kind as https://huggingface.co/metrics names it.
        of_row: computes it for one row from reference and prediction; None where that takes a model or all rows.
        per_row: whether each row has it; then the score is the mean, with an interval.
        higher_is_better: which of two values is the better one.
    """

    label: str
    title: str
    hub_type: str
    of_row: Callable[[str, str], float] | None = None
    per_row: bool = True
    higher_is_better: bool = True


METRICS = {
    "bleu4": Metric("BLEU-4", "BLEU-4, mean over rows", "bleu", bleu.bleu4),
    "rouge_l": Metric("ROUGE-L", "ROUGE-L F1, mean over rows", "rouge", rouge.rouge_l),
    "bertscore_f1": Metric("BERTScore F1", "BERTScore F1, mean over rows", "bertscore"),
    "sacrebleu": Metric("sacrebleu's corpus BLEU", "sacrebleu's corpus BLEU", "sacrebleu", per_row=False),
}
PER_ROW = {name: metric for name, metric in METRICS.items() if metric.per_row}
