"""What of the profiles fast and packed is laid over a config: what its card runs, and what only rounds otherwise."""

import re
from collections.abc import Iterator
from typing import Any

from ..base.yamlfiles import Config
from . import models
from .config import flatten
from .gpus import Gpu

VARIANTS = ("fast", "packed")
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
    """A profile of `VARIANTS` without what a config or a card does not allow; its plugins join those before it.

    Args:
        fragment: its content.
        before: what it is laid over.
        config: what all else comes to: a recipe, the other profiles, also those behind it, and overrides.
        gpu: the card; None is any from Ampere on.
        incompatible: where to note keys that are left out, or get another value than the profile's.
    """
    fit = dict(fragment)
    for changes, reason in _incompatible(config, gpu):
        for key, instead in changes.items():
            if key in fit and fit[key] != instead:
                incompatible.setdefault(reason, {})[key] = instead
                fit[key] = instead
                if instead is None:
                    del fit[key]
    if "plugins" in fit:
        fit["plugins"] = list(dict.fromkeys([*_listed(before, "plugins"), *fit["plugins"]]))
    return fit


def _incompatible(config: Config, gpu: Gpu | None) -> Iterator[tuple[Config, str]]:
    """Keys that a profile must not change in a config, or must set to another value, and why."""
    if gpu and gpu.capability < AMPERE:
        yield dict.fromkeys((*_LIGER, "lora_mlp_kernel")), f"Triton, in which they are written, does not support {gpu}"
        yield {"sdpa_varlen": False}, f"torch's attention over packed rows does not run on {gpu}, and a mask does"
    if config.get("pad_to_sequence_len") or config.get("sample_packing"):
        yield {"pad_to_sequence_len": True}, "the config pads every sequence to one length, or packs"
    model = models.architecture_here(config)
    yield from _incompatible_liger(config, model)
    yield from _incompatible_lora(config, model)


def _incompatible_liger(config: Config, model: dict[str, Any]) -> Iterator[tuple[Config, str]]:
    if (kind := model.get("model_type")) and kind not in models.LAYERS:
        yield dict.fromkeys(_LIGER), f"they were not tried with models of type {kind}"
    if config.get("tensor_parallel_size") not in (None, 1):
        yield dict.fromkeys(_LIGER), "Axolotl refuses them under tensor parallelism"
    losses = ("chunked_cross_entropy", "cut_cross_entropy", "liger_cross_entropy")
    if other := next((key for key in losses if config.get(key)), None):
        yield dict.fromkeys(_LIGER[-1:]), f"the config has {other}"
    trained = [*_listed(config, "lora_modules_to_save"), *_listed(config, "lora_target_modules")]
    if "lm_head" in trained:
        yield dict.fromkeys(_LIGER[-1:]), "lm_head is trained, which it was not tried with"


def _incompatible_lora(config: Config, model: dict[str, Any]) -> Iterator[tuple[Config, str]]:
    """Dropout: a kernel draws one mask for all its layers, where PEFT draws one for each (axolotl/kernels/lora.py)."""
    if config.get("adapter") not in ("lora", "qlora") or config.get("rl"):
        yield dict.fromkeys(_LORA), "there is no LoRA to speed up, or it is for preference training"
    if config.get("lora_dropout"):
        yield dict.fromkeys(_LORA), f"with lora_dropout {config['lora_dropout']} they would drop other values than PEFT"
    if refused := next((key for key in ("load_in_8bit", "trust_remote_code") if config.get(key)), None):
        yield dict.fromkeys(_LORA), f"Axolotl refuses them beside {refused}"
    if dict(flatten(config)).get("bnb_config_kwargs.bnb_4bit_quant_type", "nf4") != "nf4":
        yield dict.fromkeys(_LORA), "they would decode doubly quantized weights as NF4 (axolotl/kernels/quantize.py)"
    if (activation := model.get("hidden_activation") or model.get("hidden_act") or "silu") != "silu":
        yield {"lora_mlp_kernel": None}, f"it computes SiLU, or GELU by erf, and the model has {activation}"
    targets = _listed(config, "lora_target_modules")
    for kernel, layers in _LORA.items():
        if targets and not config.get("lora_target_linear") and not set(layers) <= set(targets):
            yield {kernel: None}, f"LoRA is not on all of {', '.join(layers)}"


def departures(recipe: Config, run: Config) -> Iterator[str]:
    """How a run computes otherwise than its recipe, by what its config turns on, whether a profile did that or not."""
    turned_on = {key for key, value in run.items() if value and not recipe.get(key)}
    if any(re.match("liger_|cut_cross_entropy$|lora_.*_kernel$", key) for key in turned_on):
        yield "other kernels, which round otherwise"
    if "sample_packing" in turned_on:
        yield "rows share sequences, so that batches differ"


def _listed(config: Config, key: str) -> list[str]:
    """The names in a list of a config, which was not checked yet; none where its value is another, as an expression."""
    value = config.get(key)
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
