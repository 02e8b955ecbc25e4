"""Precision, attention, kernels and determinism of training: Axolotl's choices, and GPU support.

Axolotl's key full_determinism calls transformers' enable_full_determinism before the model is loaded, and again in the
trainer. It covers generators, torch's kernels (SDPA, NCCL's reductions and torch.compile too), cuBLAS workspaces,
cuDNN's search for the fastest kernel, and FlashAttention's backward pass. It does not cover the order of Python sets of
strings, such as target_modules in PEFT's adapter_config.json. PYTHONHASHSEED fixes this order, but must be set before a
process starts.

bitsandbytes has no switch for determinism. QLoRA does not need one: the kernels for 4-bit weights and AdamW treat each
element or block separately. bitsandbytes' LAMB and LARS sum norms in an order that varies.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..base.yamlfiles import Config
from .merging import merge


@dataclass(frozen=True)
class Precision:
    """Precision set by bf16, fp16, bfloat16 and float16, as names of torch dtypes.

    Attributes:
        weights: the dtype of the loaded model, and of computations in 4-bit layers.
        autocast: the dtype of the forward pass under autocast; None without autocast.
    """

    weights: str
    autocast: str | None


def precision(config: Config, on_gpu: bool) -> Precision:
    """The precision that Axolotl derives from a config.

    Source: resolve_dtype in axolotl/utils/config/__init__.py, _configure_precision_settings in core/builders/base.py.
    The default, bf16: auto, turns bf16 on for every NVIDIA GPU, because torch reports emulated bf16 as supported. On a
    CPU, auto means fp16, unless fp16 is false or float16 is true.

    Args:
        config: the config, with values that the schema allows.
        on_gpu: true for training on an NVIDIA GPU, false on a CPU.
    """
    bf16, fp16, float16 = config.get("bf16", "auto"), config.get("fp16"), config.get("float16")
    if bf16 == "auto" and on_gpu:
        bf16 = not fp16
    elif bf16 == "auto":
        bf16 = False
        if fp16 is None:
            fp16 = not float16
    if bf16 or config.get("bfloat16"):
        return Precision("bfloat16", "bfloat16")
    if fp16:
        return Precision("float16", "float16")
    if float16 or config.get("load_in_8bit"):
        return Precision("float16", None)
    return Precision("float32", None)


def parallelism_precision(config: Config, on_gpu: bool) -> Config:
    """A config whose DeepSpeed settings state the precision instead of "auto".

    transformers replaces "auto" only after ZeRO-3 has created an unquantized model. DeepSpeed then keeps all weights in
    fp32, at twice the memory (seen with DeepSpeed 0.19.8).
    """
    deepspeed = config.get("deepspeed")
    if not isinstance(deepspeed, dict) or deepspeed.get("bf16") != {"enabled": "auto"}:
        return config
    dtype = precision(config, on_gpu).autocast
    stated = {"bf16": {"enabled": dtype == "bfloat16"}, "fp16": {"enabled": dtype == "float16"}}
    return merge(config, {"deepspeed": stated})


def quantized(config: Config) -> bool:
    """True if bitsandbytes quantizes the base model (axolotl/loaders/model.py, _set_quantization_config)."""
    bits = {"qlora": "load_in_4bit", "mixlora": "load_in_4bit", "lora": "load_in_8bit"}.get(str(config.get("adapter")))
    return bool(bits and config.get(bits))


OLD_ATTENTION_KEYS = {
    "xformers_attention": "xformers",
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}


def attention(config: Config) -> str:
    """Attention implementation by its name in transformers; empty if not set.

    Axolotl's old keys are read too. A kernel on the hub is named without its revision and function."""
    old = next((name for key, name in OLD_ATTENTION_KEYS.items() if config.get(key)), "")
    return re.split("[:@]", str(config.get("attn_implementation") or old))[0].strip()


def takes_varlen(config: Config, model: Config) -> bool:
    """True if Axolotl, on a GPU, replaces sdpa by torch's varlen_attn for packed rows.

    With sdpa, packed rows need a mask. Axolotl keeps sdpa:

    - in fp32, or if sdpa_varlen is false;
    - for a model with a sliding window, heads wider than 256, or value heads of a different width
      (loaders/patch_manager.py, _apply_sdpa_varlen_patch);
    - for a model with a custom scale or attention dropout (monkeypatch/attention/sdpa_varlen.py).

    Args:
        config: the config.
        model: the content of the model's config.json; for missing keys, Llama's values are assumed.
    """
    if not config.get("sample_packing") or attention(config) != "sdpa" or config.get("sdpa_varlen") is False:
        return False
    if precision(config, on_gpu=True).weights == "float32":
        return False
    width = _head_width(model)
    if width > 256 or model.get("v_head_dim"):
        return False
    return not (has_sliding_window(model) or _has_custom_scale(model, width) or model.get("attention_dropout"))


def _head_width(model: Config) -> int:
    """Width of an attention head; 0 if unknown."""
    width: int | None = model.get("head_dim")
    if width:
        return width
    return (model.get("hidden_size") or 0) // (model.get("num_attention_heads") or 1)


def has_sliding_window(model: Config) -> bool:
    """True if a layer has a sliding window."""
    if not model.get("sliding_window") or model.get("use_sliding_window") is False:
        return False
    layers = model.get("layer_types")
    return not layers or "sliding_attention" in layers


def _has_custom_scale(model: Config, width: int) -> bool:
    """True if attention scores are scaled by another factor than the inverse root of the head's width."""
    scale, queries = model.get("attention_multiplier"), model.get("query_pre_attn_scalar")
    if not scale and queries:
        scale = queries**-0.5
    if not scale or not width:
        return False
    return abs(scale - width**-0.5) > 1e-9


AMPERE = (8, 0)
"""Lowest compute capability for Triton (its README, since 3.3) and for torch's FlashAttention, the base of varlen_attn
("FlashAttention only supports Ampere GPUs or newer")."""


def departures(recipe: Config, run: Config) -> Iterator[str]:
    """Numerical differences from a recipe, due to features that a run turns on."""
    turned_on = {key for key, value in run.items() if value and not recipe.get(key)}
    if any(re.match("liger_|cut_cross_entropy$|lora_.*_kernel$", key) for key in turned_on):
        yield "other kernels, which round differently"
    if "sample_packing" in turned_on:
        yield "packed rows, so that batches differ"
