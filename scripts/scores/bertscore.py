"""BERTScore by the bert-score library, with what transformers 5 broke in it put right."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import UserError, WorkFailed
from ..base.files import sha256
from ..base.quiet import importing_axolotl
from ..configs import standin

DEFAULT = "roberta-large"  # bert-score's own for English, and the published scores'
NONE = "none"
BATCH = 64


@dataclass(frozen=True)
class Judge:
    """The model whose embeddings BERTScore compares.

    Attributes:
        model: its name on the hub, or its folder.
        layer: the layer that the embeddings are of; None is the one that bert-score's authors tuned.
        stand_in: whether it only stands in for the study's model, as in a rehearsal.
    """

    model: str
    layer: int | None = None
    stand_in: bool = False


def judge(asked: str | None, layer: int | None, rehearsal: bool = False) -> Judge | None:
    """The judge that a user asked for; None where there is to be no BERTScore.

    Unless one is asked for, it is the default where that is on this machine, as it is large, and the stand-in in a
    rehearsal.
    """
    if asked == NONE:
        return None
    if asked:
        return Judge(asked, layer)
    if rehearsal:
        return Judge(str(standin.judge_folder()), standin.JUDGE_LAYERS, stand_in=True)
    from huggingface_hub import try_to_load_from_cache

    return Judge(DEFAULT, layer) if isinstance(try_to_load_from_cache(DEFAULT, "config.json"), str) else None


def made_by(by: Judge | None, record: dict[str, Any] | None) -> bool:
    """Whether a record of `f1` is of this judge."""
    if by is None or record is None:
        return by is None and record is None
    same_weights = not Path(by.model).is_dir() or _revision(by) == record["revision"]
    return _name(by) == record["model"] and by.layer in (None, record["layer"]) and same_weights


def layer_of(by: Judge) -> int:
    """The layer that a judge's embeddings are of.

    Raises:
        UserError: bert-score knows no best layer of the model, or it has not so many.
        WorkFailed: the model cannot be loaded.
    """
    with importing_axolotl(offline=_offline(by)):
        import bert_score
        from transformers import AutoConfig

        try:
            layers = AutoConfig.from_pretrained(by.model).num_hidden_layers
        except (OSError, ValueError, AttributeError) as error:
            raise _not_loaded(by, error) from None
    layer = by.layer or bert_score.utils.model2layers.get(Path(by.model).name)
    if layer is None or not 0 < layer <= layers:
        raise UserError(f"--bertscore-layer: name one of the {layers} layers of {by.model}")
    return int(layer)


def _offline(by: Judge) -> bool:
    return Path(by.model).is_dir() or os.environ.get("HF_HUB_OFFLINE") == "1"


def _not_loaded(by: Judge, error: Exception) -> WorkFailed:
    return WorkFailed(
        f"BERTScore: {by.model} cannot be loaded: {str(error).splitlines()[0]}; `--bertscore none` leaves it out, "
        "`--bertscore DIR --bertscore-layer N` takes a model's folder"
    )


def _name(by: Judge) -> str:
    return standin.JUDGE if by.stand_in else Path(by.model).name if Path(by.model).is_dir() else by.model


def _revision(by: Judge) -> str | None:
    """What tells the weights of a folder from others of that name."""
    if by.stand_in:
        return standin.judge_version()
    files = sorted([*Path(by.model).glob("*.safetensors"), *Path(by.model).glob("*.bin")])
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def f1(pairs: Sequence[tuple[str, str]], by: Judge) -> tuple[list[float], dict[str, Any]]:
    """The F1 of each (reference, prediction), without rescaling, 0 where one of them is empty; and how it was made.

    The library asks a RoBERTa tokenizer for a space before the first word, which transformers 5 ignores in silence,
    and breaks on empty texts: both are done here, so that scores are those of the library as it was published.

    Raises:
        UserError, WorkFailed: see `layer_of`.
    """
    layer = layer_of(by)
    with importing_axolotl(offline=_offline(by)):
        import bert_score
        from transformers import AutoTokenizer
        from transformers.models.roberta import RobertaTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            scorer = bert_score.BERTScorer(model_type=by.model, num_layers=layer, batch_size=BATCH)
            tokenizer, config = scorer._tokenizer, scorer._model.config
            spaced = isinstance(tokenizer, RobertaTokenizer)
            if spaced:
                scorer._tokenizer = tokenizer = AutoTokenizer.from_pretrained(by.model, add_prefix_space=True)
        except (OSError, ValueError) as error:
            raise _not_loaded(by, error) from None
        longest = config.max_position_embeddings - (2 if spaced else 0)  # RoBERTa numbers positions from 2
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
        told = [(reference, given) for reference, given in pairs if reference.strip() and given.strip()]
        scores: Any = iter(())
        if told:
            references, given = zip(*told, strict=True)
            scores = iter(scorer.score(list(given), list(references), batch_size=BATCH)[2].tolist())
    values = [next(scores) if reference.strip() and given.strip() else 0.0 for reference, given in pairs]
    return values, {
        "model": _name(by),
        "stand_in": by.stand_in,
        "layer": layer,
        "revision": _revision(by) if Path(by.model).is_dir() else getattr(config, "_commit_hash", None),
        "hash": scorer.hash.replace(by.model, _name(by)),
    }
