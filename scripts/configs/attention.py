"""The attention that a config asks for."""

import re

from ..base.yamlfiles import Config
from .precision import precision

OLD_KEYS = {
    "xformers_attention": "xformers",
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}


def attention(config: Config) -> str:
    """Its name as in transformers, also where one of the old keys sets it, and of a kernel on the hub without revision
    and function; empty where the config leaves it to Axolotl."""
    old = next((name for key, name in OLD_KEYS.items() if config.get(key)), "")
    return re.split("[:@]", str(config.get("attn_implementation") or old))[0].strip()


def takes_varlen(config: Config, model: Config) -> bool:
    """Whether Axolotl, on a GPU, lets torch's varlen_attn go over each packed row, where sdpa would need a mask.

    It does unless sdpa_varlen is false or the model has what the kernel lacks: a sliding window, heads wider than 256
    or of two widths (loaders/patch_manager.py, _apply_sdpa_varlen_patch), a scale of its own or dropout in attention
    (monkeypatch/attention/sdpa_varlen.py).

    Args:
        config: the config.
        model: the content of the model's config.json; what it does not say is as in Llama.
    """
    packs = config.get("sample_packing") and attention(config) == "sdpa" and config.get("sdpa_varlen") is not False
    if not packs or precision(config, on_gpu=True).weights == "float32":
        return False
    width = model.get("head_dim") or (model.get("hidden_size") or 0) // (model.get("num_attention_heads") or 1)
    slides = model.get("sliding_window") and model.get("use_sliding_window") is not False
    slides = slides and "sliding_attention" in (model.get("layer_types") or ["sliding_attention"])
    queries = model.get("query_pre_attn_scalar")
    scale = model.get("attention_multiplier") or (queries and queries**-0.5)
    scaled = bool(scale and width) and abs(scale - width**-0.5) > 1e-9
    return not (slides or width > 256 or model.get("v_head_dim") or scaled or model.get("attention_dropout"))
