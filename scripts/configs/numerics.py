"""Number formats, attention and kernels of a training: what Axolotl makes of a config, what a GPU runs, what repeats.

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
from collections.abc import Iterator
from dataclasses import dataclass

from ..base.yamlfiles import Config
from . import models
from .config import flatten, merge
from .gpus import Gpu


@dataclass(frozen=True)
class Precision:
    """Precision that follows from bf16, fp16, bfloat16 and float16; dtypes are named as in torch.

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
        on_gpu: it is trained on an NVIDIA GPU, not on a CPU.
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
    """True if bitsandbytes quantizes the base model (axolotl/loaders/model.py, _set_quantization_config)."""
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
    """True if Axolotl, on a GPU, uses torch's varlen_attn for packed rows, where sdpa would need a mask.

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
"""Environment variables of a deterministic process."""


def environment(config: Config) -> dict[str, str]:
    """The environment variables that the process of a config's training needs; none where it need not repeat."""
    return ENVIRONMENT if config.get(DETERMINISM) else {}


ADAPTED = ("fast", "packed")
"""The profiles that are adapted to a config."""
AMPERE = (8, 0)
"""From which compute capability Triton supports cards (its README, since 3.3), and torch has FlashAttention, of which
its attention over rows of several lengths is made ("FlashAttention only supports Ampere GPUs or newer")."""
Incompatible = dict[str, Config]
"""For each reason the keys of a profile that are left out, as None, or the values that they get instead."""
_LIGER = ("plugins", "liger_rms_norm", "liger_glu_activation", "liger_rope", "liger_fused_linear_cross_entropy")
_LORA = {
    "lora_qkv_kernel": ("q_proj", "k_proj", "v_proj"),
    "lora_o_kernel": ("o_proj",),
    "lora_mlp_kernel": ("gate_proj", "up_proj", "down_proj"),
}
"""The layers that each of Axolotl's LoRA kernels needs adapters on, all of them (monkeypatch/lora_kernels.py)."""


def adapted(fragment: Config, before: Config, config: Config, gpu: Gpu | None, incompatible: Incompatible) -> Config:
    """Adapt a profile of `ADAPTED` to a config and a GPU; its plugins join those before it.

    Args:
        fragment: its content.
        before: the config that it is merged into.
        config: the recipe with the other profiles, also later ones, and overrides.
        gpu: the GPU; None is any from Ampere on.
        incompatible: where to note keys that are left out, or get another value than the profile's.
    """
    fit = dict(fragment)
    for changes, reason in _incompatible(config, gpu):
        differing = {key: instead for key, instead in changes.items() if key in fit and fit[key] != instead}
        if differing:
            incompatible.setdefault(reason, {}).update(differing)
            fit = merge(fit, differing)
    if "plugins" in fit:
        fit["plugins"] = list(dict.fromkeys([*_listed(before, "plugins"), *fit["plugins"]]))
    return fit


def _incompatible(config: Config, gpu: Gpu | None) -> Iterator[tuple[Config, str]]:
    """Keys that a profile must not change, or their other values, with the reason."""
    if gpu and gpu.capability < AMPERE:
        yield dict.fromkeys((*_LIGER, "lora_mlp_kernel")), f"Triton, in which they are written, does not support {gpu}"
        yield {"sdpa_varlen": False}, f"torch's attention over packed rows does not run on {gpu}, and a mask does"
    if config.get("pad_to_sequence_len") or config.get("sample_packing"):
        yield {"pad_to_sequence_len": True}, "the config pads every sequence to one length, or packs"
    model = models.architecture_here(config)
    yield from _incompatible_liger(config, model)
    yield from _incompatible_lora(config, model)


def _incompatible_liger(config: Config, model: Config) -> Iterator[tuple[Config, str]]:
    if (kind := model.get("model_type")) and kind not in models.LAYERS:
        yield dict.fromkeys(_LIGER), f"they were not tried with models of type {kind}"
    losses = ("chunked_cross_entropy", "cut_cross_entropy", "liger_cross_entropy")
    if other := next((key for key in losses if config.get(key)), None):
        yield dict.fromkeys(_LIGER[-1:]), f"the config has {other}"
    trained = [*_listed(config, "lora_modules_to_save"), *_listed(config, "lora_target_modules")]
    if "lm_head" in trained:
        yield dict.fromkeys(_LIGER[-1:]), "lm_head is trained, which it was not tried with"


def _incompatible_lora(config: Config, model: Config) -> Iterator[tuple[Config, str]]:
    """Dropout: a kernel draws one mask for all its layers, where PEFT draws one for each (axolotl/kernels/lora.py)."""
    if config.get("adapter") not in ("lora", "qlora") or config.get("rl"):
        yield dict.fromkeys(_LORA), "there is no LoRA to speed up, or it is for preference training"
    if config.get("lora_dropout"):
        yield dict.fromkeys(_LORA), f"with lora_dropout {config['lora_dropout']} they would drop other values than PEFT"
    if dict(flatten(config)).get("bnb_config_kwargs.bnb_4bit_quant_type", "nf4") != "nf4":
        yield dict.fromkeys(_LORA), "they would decode doubly quantized weights as NF4 (axolotl/kernels/quantize.py)"
    if (activation := model.get("hidden_activation") or model.get("hidden_act") or "silu") != "silu":
        yield {"lora_mlp_kernel": None}, f"it computes SiLU, or GELU by erf, and the model has {activation}"
    targets = _listed(config, "lora_target_modules")
    for kernel, layers in _LORA.items():
        if targets and not config.get("lora_target_linear") and not set(layers) <= set(targets):
            yield {kernel: None}, f"LoRA is not on all of {', '.join(layers)}"


def departures(recipe: Config, run: Config) -> Iterator[str]:
    """Differences in computation between a run and its recipe, by the features that its config turns on."""
    turned_on = {key for key, value in run.items() if value and not recipe.get(key)}
    if any(re.match("liger_|cut_cross_entropy$|lora_.*_kernel$", key) for key in turned_on):
        yield "other kernels, which round otherwise"
    if "sample_packing" in turned_on:
        yield "rows share sequences, so that batches differ"


def _listed(config: Config, key: str) -> list[str]:
    """Names in a list of an unchecked config; empty for any other value."""
    value = config.get(key)
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
