"""BERTScore, computed by the bert-score library with repairs for transformers 5."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from ..base.errors import UserError, WorkFailed, first_line
from ..base.files import sha256
from ..base.hub import importing_axolotl
from .metric import METRICS, Column, Pair, Parameters, RowMetric, ScoreRecord, ScorerRecord, ScoringInput

DEFAULT = "roberta-large"  # bert-score's default for English


class ScorerModel(Parameters):
    """Model whose embeddings BERTScore compares.

    Attributes:
        model: name on the hub, or a folder.
        layer: layer that provides the embeddings; None for the layer that bert-score's authors chose.
    """

    model: str = DEFAULT
    layer: int | None = Field(default=None, ge=1)

    @property
    def is_local(self) -> bool:
        return Path(self.model).is_dir()

    @property
    def name(self) -> str:
        """Name in scores; for a local folder, without the path to it."""
        return Path(self.model).name if self.is_local else self.model

    def local_revision(self) -> str:
        """Hash of the weights in a local folder."""
        files = sorted([*Path(self.model).glob("*.safetensors"), *Path(self.model).glob("*.bin")])
        return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()

    def not_loaded(self, error: Exception) -> WorkFailed:
        return WorkFailed(
            f"BERTScore: {self.model} cannot be loaded: {first_line(error)}; leave BERTScore out with "
            "`--metric bertscore:none`, or name a model folder with `--metric bertscore:DIR`"
        )


def is_recorded(by: ScorerModel, record: ScorerRecord) -> bool:
    """True if the record describes this scorer model or a local copy of it."""
    same_weights = not by.is_local or by.local_revision() == record.revision
    same_name = record.model in (by.name, by.model.rpartition("/")[2])
    return same_name and by.layer in (None, record.layer) and same_weights


def _config_of(by: ScorerModel) -> Any:
    with importing_axolotl(offline=by.is_local):
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(by.model)
        except (OSError, ValueError) as error:
            raise by.not_loaded(error) from None


def layer_of(by: ScorerModel) -> int:
    """Layer that provides a model's embeddings.

    Raises:
        UserError: bert-score has no default layer for the model, or the model has fewer layers.
        WorkFailed: the model cannot be loaded.
    """
    config = _config_of(by)
    with importing_axolotl(offline=by.is_local):
        import bert_score
    layers = getattr(config, "num_hidden_layers", 0)
    layer = by.layer or bert_score.utils.model2layers.get(Path(by.model).name)
    if layer is None or not 0 < layer <= layers:
        raise UserError(f"bertscore_f1: {by.model} has {layers} layers; set the parameter layer to one of them")
    return int(layer)


def f1(pairs: Sequence[Pair], by: ScorerModel) -> list[float]:
    """F1 of each (reference, prediction), without rescaling; 0 if either text is empty.

    The library asks RoBERTa tokenizers for a space before the first word, which transformers 5 silently ignores. It
    also fails on empty texts. This function handles both, so that scores equal those of the published library.

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
        longest = getattr(scorer._model.config, "max_position_embeddings", -1)  # in tokens
        if longest < 0:  # T5 and XLNet have no limit
            longest = 10**6
        if is_roberta:  # its positions count from 2
            longest -= 2
        scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, longest)
        values = [0.0] * len(pairs)
        with_text = [i for i, pair in enumerate(pairs) if all(map(str.strip, pair))]
        if with_text:
            references, predictions = zip(*(pairs[i] for i in with_text), strict=True)
            scores = scorer.score(predictions, references)[2].tolist()
            for i, value in zip(with_text, scores, strict=True):
                values[i] = value
    return values


def record(by: ScorerModel) -> ScorerRecord:
    """Identity of the scorer model, and bert-score's hash of the settings."""
    config, layer = _config_of(by), layer_of(by)
    with importing_axolotl(offline=by.is_local):
        from bert_score.utils import get_hash
    return ScorerRecord(
        model=by.name,
        layer=layer,
        revision=by.local_revision() if by.is_local else getattr(config, "_commit_hash", None),
        # no idf weights, no rescaling, no custom baseline, no fast tokenizer
        hash=get_hash(by.name, layer, False, False, False, False),
    )


@dataclass(frozen=True, kw_only=True)
class ScorerMetric(RowMetric):
    """Metric of rows that a scorer model computes; its parameters are a `ScorerModel`."""

    def measure(self, column: Column, data: ScoringInput) -> ScoreRecord:
        scorer = data.scorers[column.name]
        assert isinstance(scorer, ScorerModel)
        return super().measure(column, data).model_copy(update={"scorer": record(scorer)})


METRICS.include(
    ScorerMetric(
        name="bertscore_f1",
        label="BERTScore F1",
        hub_type="bertscore",
        low=-1,
        high=1,
        source="bert-score, arXiv 1904.09675",
        score_rows=f1,
        parameters=ScorerModel,
    )
)
