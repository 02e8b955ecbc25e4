"""Compares a merged model with the adapter on its base model, by their logits.

The bound is that of rounding: PEFT's own merge of the same weights, rounded to the dtype of the merged model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from transformers import AutoConfig, AutoModelForCausalLM

from ..base.errors import WorkFailed
from ..base.files import embedding_rows, read_json
from ..base.terminal import warn
from ..base.yamlfiles import Config
from ..config import models
from .scores_file import ADAPTER
from .transformers_engine import with_adapter

_REMEDY = "publish the adapter, without --merge and --gguf"
_TIMES = 2
_COPIES = 2.5  # memory of a model in float32, in sizes of its weights in 16 bits, with a layer's copies
_SMALLEST = 1e-4  # logits; for a merge in float32, which rounds nothing


def require_equal(config: Config, adapter: Path, merged: Path) -> None:
    """Raise WorkFailed if the logits of a merged model differ from the trained model's by more than rounding.

    If memory does not suffice for a model in float32, nothing is compared; only modules that a merge is known to lose
    raise an error.

    More is twice the distance by rounding. Seen with random models in bf16: 1.0 to 1.13 times that distance for intact
    merges, also of saved modules, DoRA and rsLoRA; 800 and 4,000 times for merges that lose a trained module.

    Args:
        config: config of the run.
        adapter: folder of the adapter.
        merged: folder of the merged model.
    """
    needed, free = _COPIES * models.weights_bytes(merged), psutil.virtual_memory().available
    if needed > free:
        gigabytes = f"{needed / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} are free"
        warn(f"{merged}: not compared with the trained model: this needs {gigabytes}")
        if lost := models.lost_in_merge(config, read_json(merged / "config.json")):  # the base model's
            raise WorkFailed(f"{adapter}: Axolotl's merge loses the trained {', '.join(lost)}; {_REMEDY}")
        return
    by_merge, by_rounding = distances(config, adapter, merged)
    if by_merge > max(_TIMES * by_rounding, _SMALLEST):
        problem = (
            f"its logits differ by {by_merge:.2g} from the trained model's, of which rounding is {by_rounding:.2g}"
        )
        raise WorkFailed(f"{adapter}: Axolotl's merge of this adapter is wrong: {problem}; {_REMEDY}")


@torch.inference_mode()
def distances(config: Config, adapter: Path, merged: Path) -> tuple[float, float]:
    """Root mean square difference of logits from the trained model's: of the merged model, and of a rounded one.

    All are computed in float32, one model at a time, on four rows of 64 random tokens. A base in 4 bits is rounded as
    in training.
    """
    code = bool(config.get("trust_remote_code"))
    settings = AutoConfig.from_pretrained(merged, trust_remote_code=code).get_text_config()
    base = _load(config["base_model"], config, revision=models.revision(config))
    if config.get("adapter") == "qlora":
        _round_to_4_bits(base, config.get("bnb_config_kwargs") or {})
    rows = embedding_rows(adapter / ADAPTER) or settings.vocab_size
    if rows > len(base.get_input_embeddings().weight):
        base.resize_token_embeddings(rows)
    ids = torch.randint(rows, (4, 64), generator=torch.Generator().manual_seed(0))
    trained = with_adapter(base, str(adapter)).eval()
    expected = trained(ids).logits
    rounded = trained.merge_and_unload()
    for weight in rounded.parameters():
        weight.copy_(weight.to(settings.dtype or torch.float32))
    by_rounding = _distance(rounded(ids).logits, expected)
    del base, trained, rounded
    return _distance(_load(str(merged), config)(ids).logits, expected), by_rounding


def _load(name: str, config: Config, **options: Any) -> Any:
    code = bool(config.get("trust_remote_code"))
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=code, **options)


def _distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).square().mean().sqrt())


def _round_to_4_bits(model: Any, settings: Mapping[str, Any]) -> None:
    """Round the linear layers of a model as bitsandbytes does, except the head."""
    kind, doubly = settings.get("bnb_4bit_quant_type", "nf4"), settings.get("bnb_4bit_use_double_quant", True)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            codes = quantize_4bit(module.weight.bfloat16(), compress_statistics=doubly, quant_type=kind)
            module.weight.copy_(dequantize_4bit(*codes))
