"""The number formats and the attention that Axolotl makes of a config, and whether a training repeats bit for bit.

Axolotl's key full_determinism does all of it but one thing: before the model is loaded, and again in its trainer,
transformers' enable_full_determinism seeds every generator, has torch take deterministic algorithms or raise an error
where there is none, fixes the workspaces of cuBLAS, turns off cuDNN's search for the fastest kernel, and has
FlashAttention take its deterministic backward pass. torch's SDPA kernels, NCCL's reductions and what torch.compile
generates heed the same switch of torch. The one thing is the order of Python's sets of names, such as that of PEFT's
target_modules in adapter_config.json, which a process fixes only as it starts.

bitsandbytes has no such switch and does not need one for QLoRA: its kernels for 4-bit weights and for AdamW treat each
element, or each block, by itself. Its LAMB and LARS add up norms in no fixed order.
"""

import re
from dataclasses import dataclass

from ..base.yamlfiles import Config


@dataclass(frozen=True)
class Precision:
    """What Axolotl makes of bf16, fp16, bfloat16 and float16; dtypes are named as in torch.

    Attributes:
        weights: the dtype that the model is loaded in, and that 4-bit layers compute in.
        autocast: the dtype of the forward pass under autocast; None where there is no autocast.
    """

    weights: str
    autocast: str | None


def precision(config: Config, on_gpu: bool) -> Precision:
    """The precision that Axolotl resolves for a config (axolotl/utils/config/__init__.py, resolve_dtype, and
    core/builders/base.py, _configure_precision_settings).

    bf16: auto, the default, is on for every NVIDIA GPU, because torch counts emulation as support. Without a GPU it
    becomes fp16, unless fp16 is switched off or float16 is on.

    Args:
        config: the config; values of these keys other than the schema's are not expected.
        on_gpu: whether it is trained on an NVIDIA GPU, and not on a CPU.
    """
    bf16, fp16, float16 = config.get("bf16", "auto"), config.get("fp16"), config.get("float16")
    if bf16 == "auto":
        bf16 = on_gpu and not fp16
        if not on_gpu and fp16 is None and not float16:
            fp16 = True
    if bf16 or config.get("bfloat16"):
        return Precision("bfloat16", "bfloat16")
    if fp16:
        return Precision("float16", "float16")
    return Precision("float16" if float16 or config.get("load_in_8bit") else "float32", None)


def quantized(config: Config) -> bool:
    """Whether bitsandbytes quantizes the base model (axolotl/loaders/model.py, _set_quantization_config)."""
    bits = {"qlora": "load_in_4bit", "mixlora": "load_in_4bit", "lora": "load_in_8bit"}.get(str(config.get("adapter")))
    return bool(bits and config.get(bits))


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


DETERMINISM = "full_determinism"
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""What the process has to be started with."""


def environment(config: Config) -> dict[str, str]:
    """The environment variables that the process of a config's training needs; none where it need not repeat."""
    return ENVIRONMENT if config.get(DETERMINISM) else {}
