"""BERTScore by the bert-score library, with what transformers 5 broke in it repaired."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import UserError, WorkFailed
from ..base.files import sha256
from ..base.quiet import importing_axolotl
from ..configs import standin

DEFAULT = "roberta-large"  # bert-score's own for English, and the published scores'


@dataclass(frozen=True)
class Judge:
    """The model whose embeddings BERTScore compares.

    Attributes:
        model: its name on the hub, or its folder.
        layer: the layer that provides the embeddings; None is the one that bert-score's authors tuned.
        stand_in: whether it only stands in for the study's model, as in a rehearsal.
    """

    model: str
    layer: int | None = None
    stand_in: bool = False

    @property
    def is_local(self) -> bool:
        return Path(self.model).is_dir()

    @property
    def name(self) -> str:
        """Its name in scores, which names no folder of this machine."""
        return standin.JUDGE if self.stand_in else Path(self.model).name if self.is_local else self.model

    def local_revision(self) -> str:
        """The hash that distinguishes the weights in its folder from others of that name."""
        if self.stand_in:
            return standin.judge_version()
        files = sorted([*Path(self.model).glob("*.safetensors"), *Path(self.model).glob("*.bin")])
        return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()

    def not_loaded(self, error: Exception) -> WorkFailed:
        return WorkFailed(
            f"BERTScore: {self.model} cannot be loaded: {str(error).splitlines()[0]}; `--bertscore none` leaves it "
            "out, `--bertscore DIR --bertscore-layer N` takes a model's folder"
        )


def judge(asked: str | None, layer: int | None, rehearsal: bool = False) -> Judge | None:
    """The judge that a user asked for; None where there is to be no BERTScore.

    By default it is the stand-in in a rehearsal, otherwise `DEFAULT` if that is on this machine, as it is large.
    """
    if asked == "none":
        return None
    if asked:
        return Judge(asked, layer)
    if rehearsal:
        return Judge(str(standin.judge_folder()), standin.JUDGE_LAYERS, stand_in=True)
    from huggingface_hub import try_to_load_from_cache

    return Judge(DEFAULT, layer) if isinstance(try_to_load_from_cache(DEFAULT, "config.json"), str) else None


def made_by(by: Judge | None, record: dict[str, Any] | None) -> bool:
    """Whether the record of a BERTScore is of this judge; None is no judge and no score."""
    if by is None or record is None:
        return by is None and record is None
    same_weights = not by.is_local or by.local_revision() == record["revision"]
    return by.name == record["model"] and by.layer in (None, record["layer"]) and same_weights


def layer_of(by: Judge) -> int:
    """The layer that provides a judge's embeddings.

    Raises:
        UserError: bert-score knows no best layer of the model, or the model has fewer layers.
        WorkFailed: the model cannot be loaded.
    """
    with importing_axolotl(offline=by.is_local):
        import bert_score
        from transformers import AutoConfig

        try:
            layers = AutoConfig.from_pretrained(by.model).num_hidden_layers
        except (OSError, ValueError, AttributeError) as error:
            raise by.not_loaded(error) from None
    layer = by.layer or bert_score.utils.model2layers.get(Path(by.model).name)
    if layer is None or not 0 < layer <= layers:
        raise UserError(f"--bertscore-layer: name one of the {layers} layers of {by.model}")
    return int(layer)


def f1(pairs: Sequence[tuple[str, str]], by: Judge) -> tuple[list[float], dict[str, Any]]:
    """The F1 of each (reference, prediction), without rescaling, 0 where one of them is empty; and its record.

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
    return values, {
        "model": by.name,
        "stand_in": by.stand_in,
        "layer": layer,
        "revision": by.local_revision() if by.is_local else getattr(config, "_commit_hash", None),
        "hash": scorer.hash.replace(by.model, by.name),
    }
