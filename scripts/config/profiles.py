"""Keys of profiles that do not suit a GPU or a config."""

from collections.abc import Iterator

from ..base.yamlfiles import Config
from . import models
from .gpus import Gpu
from .merging import flatten, listed, merge
from .numerics import AMPERE

ADAPTED = ("fast", "packed")
"""The profiles that are adapted to a config."""
Incompatible = dict[str, Config]
"""Changed profile keys by reason: None for a key left out, otherwise the value used instead."""
_LIGER_LOSS = "liger_fused_linear_cross_entropy"
_LIGER = ("plugins", "liger_rms_norm", "liger_glu_activation", "liger_rope", _LIGER_LOSS)
_LORA = ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel")
"""Axolotl's LoRA kernels; if not all of their layers have adapters, Axolotl leaves one out, with a warning."""


def incompatible_keys(fragment: Config, config: Config, gpu: Gpu | None) -> Incompatible:
    """Keys of a profile of `ADAPTED` that do not suit a config or a GPU.

    Args:
        fragment: the content of the profile.
        config: the recipe with the other profiles and the overrides.
        gpu: the GPU; if None, Ampere or newer is assumed.
    """
    incompatible: Incompatible = {}
    for changes, reason in _incompatible(config, gpu):
        for key, instead in changes.items():
            if fragment.get(key, instead) != instead:
                incompatible.setdefault(reason, {})[key] = instead
                fragment = merge(fragment, {key: instead})
    return incompatible


def adapted(fragment: Config, config: Config, incompatible: Incompatible) -> Config:
    """Profile without the keys that do not suit a config.

    If the profile lists plugins, the result lists those of the config too, because merging replaces lists.

    Args:
        fragment: the content of the profile.
        config: the config into which the profile is merged.
        incompatible: see `incompatible_keys`.
    """
    for changes in incompatible.values():
        fragment = merge(fragment, changes)
    if "plugins" in fragment:
        fragment["plugins"] = list(dict.fromkeys([*listed(config, "plugins"), *fragment["plugins"]]))
    return fragment


def _incompatible(config: Config, gpu: Gpu | None) -> Iterator[tuple[Config, str]]:
    """Keys that a profile must leave out (None) or change, with reasons."""
    if gpu and gpu.capability < AMPERE:
        yield dict.fromkeys((*_LIGER, "lora_mlp_kernel")), f"these kernels need Triton, which does not support {gpu}"
        yield {"sdpa_varlen": False}, f"varlen_attn does not run on {gpu}; sdpa with a mask does"
    if config.get("pad_to_sequence_len") or config.get("sample_packing"):
        yield {"pad_to_sequence_len": True}, "the config packs rows, or pads all to one length"
    model = models.architecture_here(config)
    yield from _incompatible_liger(config, model)
    yield from _incompatible_lora(config, model)


def _incompatible_liger(config: Config, model: Config) -> Iterator[tuple[Config, str]]:
    kind = model.get("model_type")
    if kind and kind not in models.LAYERS:
        yield dict.fromkeys(_LIGER), f"the Liger kernels are not tested with the model type {kind}"
    for loss in ("chunked_cross_entropy", "cut_cross_entropy", "liger_cross_entropy"):
        if config.get(loss):
            yield {_LIGER_LOSS: None}, f"the config has {loss}"
    trained = [*listed(config, "lora_modules_to_save"), *listed(config, "lora_target_modules")]
    if "lm_head" in trained:
        yield {_LIGER_LOSS: None}, "Liger's loss is not tested with a trained lm_head"


def _incompatible_lora(config: Config, model: Config) -> Iterator[tuple[Config, str]]:
    """LoRA kernels to leave out, with reasons.

    With dropout, a kernel uses one mask for all its layers; PEFT uses one per layer (axolotl/kernels/lora.py).
    """
    if config.get("adapter") not in ("lora", "qlora") or config.get("rl"):
        yield dict.fromkeys(_LORA), "the LoRA kernels need LoRA, and do not support preference training"
    if config.get("lora_dropout"):
        yield (
            dict.fromkeys(_LORA),
            f"with lora_dropout {config['lora_dropout']}, the kernels drop other values than PEFT",
        )
    if dict(flatten(config)).get("bnb_config_kwargs.bnb_4bit_quant_type", "nf4") != "nf4":
        yield dict.fromkeys(_LORA), "the kernels decode doubly quantized weights as NF4 (axolotl/kernels/quantize.py)"
    activation = model.get("hidden_activation") or model.get("hidden_act") or "silu"
    if activation != "silu":
        yield {"lora_mlp_kernel": None}, f"the kernel computes SiLU or GELU (erf), but the model uses {activation}"
