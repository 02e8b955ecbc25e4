"""What of the profiles fast and packed is laid over a config: what its card runs, and what only rounds otherwise."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ..base.errors import UserError
from ..base.yamlfiles import Config
from . import models
from .config import flatten
from .gpus import Gpu

VARIANTS = {"fast": "other kernels, which round otherwise", "packed": "rows share sequences, so that batches differ"}
"""The profiles that are fitted to a config, and how a run with one of them differs from its recipe's."""
AMPERE = (8, 0)
"""From which compute capability Triton supports cards (its README, since 3.3), and torch has FlashAttention, of which
its attention over rows of several lengths is made ("FlashAttention only supports Ampere GPUs or newer")."""
_LIGER = ("plugins", "liger_rms_norm", "liger_glu_activation", "liger_rope", "liger_fused_linear_cross_entropy")
_LORA = {
    "lora_qkv_kernel": ("q_proj", "k_proj", "v_proj"),
    "lora_o_kernel": ("o_proj",),
    "lora_mlp_kernel": ("gate_proj", "up_proj", "down_proj"),
}
"""The layers that each of Axolotl's LoRA kernels needs adapters on, all of them (monkeypatch/lora_kernels.py)."""


def fitted(profile: str, fragment: Config, config: Config, gpu: Gpu | None, unfit: dict[str, list[str]]) -> Config:
    """A profile without what a config or a card does not allow, if it is one of `VARIANTS`; plugins join the config's.

    Args:
        profile: its name.
        fragment: its content.
        config: what it is laid over.
        gpu: the card; None is any from Ampere on.
        unfit: where to note keys that are left as they are, or get another value than the profile's, by the reason.
    """
    fit = dict(fragment)
    if profile not in VARIANTS:
        return fit
    for changes, reason in _unfit(config, gpu):
        for key, instead in changes.items():
            if key in fit and fit[key] != instead:
                unfit.setdefault(reason, []).append(key)
                fit[key] = instead
                if instead is None:
                    del fit[key]
    if "plugins" in fit:
        fit["plugins"] = list(dict.fromkeys([*_listed(config, "plugins"), *fit["plugins"]]))
    return fit


def _unfit(config: Config, gpu: Gpu | None) -> Iterator[tuple[Config, str]]:
    """Keys that a profile must not change in a config, or must set to another value, and why."""
    if gpu and gpu.capability < AMPERE:
        yield dict.fromkeys((*_LIGER, "lora_mlp_kernel")), f"Triton, which it is written in, does not support {gpu}"
        yield {"sdpa_varlen": False}, f"torch's attention over packed rows does not run on {gpu}: a mask instead"
    model: dict[str, Any] = {}
    with suppress(UserError):
        model = models.architecture(config, download=False)
    yield from _unfit_liger(config, model)
    yield from _unfit_lora(config, model)


def _unfit_liger(config: Config, model: dict[str, Any]) -> Iterator[tuple[Config, str]]:
    if (kind := model.get("model_type")) and kind not in models.LAYERS:
        yield dict.fromkeys(_LIGER), f"it was not tried with models of type {kind}"
    if config.get("tensor_parallel_size") not in (None, 1):
        yield dict.fromkeys(_LIGER), "Axolotl refuses it under tensor parallelism"
    losses = ("chunked_cross_entropy", "cut_cross_entropy", "liger_cross_entropy")
    if other := next((key for key in losses if config.get(key)), None):
        yield dict.fromkeys(_LIGER[-1:]), f"the config has {other}"
    trained = [*_listed(config, "lora_modules_to_save"), *_listed(config, "lora_target_modules")]
    if "lm_head" in trained:
        yield dict.fromkeys(_LIGER[-1:]), "lm_head is trained, which it was not tried with"


def _unfit_lora(config: Config, model: dict[str, Any]) -> Iterator[tuple[Config, str]]:
    """Dropout: a kernel draws one mask for all its layers, where PEFT draws one for each (axolotl/kernels/lora.py)."""
    if config.get("adapter") not in ("lora", "qlora") or config.get("rl"):
        yield dict.fromkeys(_LORA), "there is no LoRA to speed up, or it is for preference training"
    if config.get("lora_dropout"):
        yield dict.fromkeys(_LORA), f"with lora_dropout {config['lora_dropout']} it would drop other values than PEFT"
    if refused := next((key for key in ("load_in_8bit", "trust_remote_code") if config.get(key)), None):
        yield dict.fromkeys(_LORA), f"Axolotl refuses it beside {refused}"
    if dict(flatten(config)).get("bnb_config_kwargs.bnb_4bit_quant_type", "nf4") != "nf4":
        yield dict.fromkeys(_LORA), "it would decode doubly quantized weights as NF4 (axolotl/kernels/quantize.py)"
    if (activation := model.get("hidden_activation") or model.get("hidden_act") or "silu") != "silu":
        yield {"lora_mlp_kernel": None}, f"it computes SiLU, or GELU by erf, and the model has {activation}"
    targets = _listed(config, "lora_target_modules")
    for kernel, layers in _LORA.items():
        if targets and not config.get("lora_target_linear") and not set(layers) <= set(targets):
            yield {kernel: None}, f"LoRA is not on all of {', '.join(layers)}"


def _listed(config: Config, key: str) -> list[str]:
    """The names in a list of a config, which was not checked yet; none where its value is another, as an expression."""
    value = config.get(key)
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
