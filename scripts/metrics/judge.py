"""The model that judges BERTScore, the one metric that needs a model."""

import hashlib
from pathlib import Path
from typing import Any

from pydantic import Field

from ..base.errors import UserError, WorkFailed
from ..base.files import sha256
from ..base.hub import importing_axolotl
from .metric import Parameters

DEFAULT = "roberta-large"  # bert-score's own for English


class Judge(Parameters):
    """The model whose embeddings BERTScore compares.

    Attributes:
        model: its name on the hub, or its folder.
        layer: the layer that provides the embeddings; None is the one that bert-score's authors tuned.
    """

    model: str = DEFAULT
    layer: int | None = Field(default=None, ge=1)

    @property
    def stand_in(self) -> bool:
        """Whether it only stands in for the study's model, as in a rehearsal."""
        return False

    @property
    def is_local(self) -> bool:
        return Path(self.model).is_dir()

    @property
    def name(self) -> str:
        """Its name in scores, which names no folder of this machine."""
        return Path(self.model).name if self.is_local else self.model

    def local_revision(self) -> str:
        """The hash that distinguishes the weights in its folder from others of that name."""
        files = sorted([*Path(self.model).glob("*.safetensors"), *Path(self.model).glob("*.bin")])
        return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()

    def not_loaded(self, error: Exception) -> WorkFailed:
        return WorkFailed(
            f"BERTScore: {self.model} cannot be loaded: {str(error).splitlines()[0]}; `--bertscore none` leaves it "
            "out, `--bertscore DIR` takes a model's folder"
        )


def made_by(by: Judge | None, record: dict[str, Any] | None) -> bool:
    """Whether the record of a BERTScore is of this judge; None is no judge and no score."""
    if by is None or record is None:
        return by is None and record is None
    same_weights = not by.is_local or by.local_revision() == record["revision"]
    return by.name == record["model"] and by.layer in (None, record["layer"]) and same_weights


def config_of(by: Judge) -> Any:
    with importing_axolotl(offline=by.is_local):
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(by.model)
        except (OSError, ValueError) as error:
            raise by.not_loaded(error) from None


def layer_of(by: Judge) -> int:
    """The layer that provides a judge's embeddings.

    Raises:
        UserError: bert-score knows no best layer of the model, or the model has fewer layers.
        WorkFailed: the model cannot be loaded.
    """
    config = config_of(by)
    with importing_axolotl(offline=by.is_local):
        import bert_score
    try:
        layers = config.num_hidden_layers
    except AttributeError as error:
        raise by.not_loaded(error) from None
    layer = by.layer or bert_score.utils.model2layers.get(Path(by.model).name)
    if layer is None or not 0 < layer <= layers:
        raise UserError(f"bertscore_f1: name one of the {layers} layers of {by.model} with the parameter layer")
    return int(layer)
