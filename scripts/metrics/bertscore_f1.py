"""BERTScore by the bert-score library, with what transformers 5 broke in it repaired."""

from collections.abc import Sequence
from typing import Any

from ..base.hub import importing_axolotl
from .judge import Judge, config_of, layer_of
from .metric import Metric, Pair


def f1(pairs: Sequence[Pair], by: Judge) -> list[float]:
    """The F1 of each (reference, prediction), without rescaling, 0 where one of them is empty.

    The library asks a RoBERTa tokenizer for a space before the first word, which transformers 5 silently ignores,
    and fails on empty texts: both are handled here, so that scores are those of the library as it was published.

    Raises:
        UserError, WorkFailed: see `layer_of`.
    """
    layer = layer_of(by)
    with importing_axolotl(offline=by.is_local):
        import bert_score
        from transformers import AutoTokenizer
        from transformers.models.roberta import RobertaTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            scorer = bert_score.BERTScorer(model_type=by.model, num_layers=layer)
            is_roberta = isinstance(scorer._tokenizer, RobertaTokenizer)
            if is_roberta:
                scorer._tokenizer = AutoTokenizer.from_pretrained(by.model, add_prefix_space=True)
        except (OSError, ValueError) as error:
            raise by.not_loaded(error) from None
        config = scorer._model.config
        positions = config.max_position_embeddings - (2 if is_roberta else 0)  # RoBERTa numbers positions from 2
        scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, positions)
        values = [0.0] * len(pairs)
        with_text = [i for i, pair in enumerate(pairs) if all(map(str.strip, pair))]
        if with_text:
            references, predictions = zip(*(pairs[i] for i in with_text), strict=True)
            scores = scorer.score(predictions, references)[2].tolist()
            for i, value in zip(with_text, scores, strict=True):
                values[i] = value
    return values


def record(by: Judge) -> dict[str, Any]:
    """What identifies the judge of scores, and bert-score's own hash of its settings."""
    config, layer = config_of(by), layer_of(by)
    with importing_axolotl(offline=by.is_local):
        from bert_score.utils import get_hash
    return {
        "bertscore": {
            "model": by.name,
            "stand_in": by.stand_in,
            "layer": layer,
            "revision": by.local_revision() if by.is_local else getattr(config, "_commit_hash", None),
            # neither weights by idf, nor rescaling, nor a fast tokenizer where the model has another
            "hash": get_hash(by.name, layer, False, False, False, False),
        }
    }


METRIC = Metric(
    name="bertscore_f1",
    label="BERTScore F1",
    hub_type="bertscore",
    low=-1,
    high=1,
    source="bert-score, arXiv 1904.09675",
    of_rows=f1,
    parameters=Judge,
    record=record,
    judged=True,
)
