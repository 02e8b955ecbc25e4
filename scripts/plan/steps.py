"""Memory-relevant settings of the training step that Axolotl makes from a config."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..config import keys
from ..config.gpus import offloads
from ..config.merging import listed
from ..config.numerics import attention, has_sliding_window, precision, takes_varlen
from ..config.training_settings import OPTIMIZER, TrainingSettings

OPTIMIZERS = {
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
}
INT8 = "int8"
LOSSES = ("cut_cross_entropy", "liger_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy")
"""Optimized losses; Axolotl accepts only one of them (check_cross_entropy_conflicts)."""
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


@dataclass(frozen=True)
class PairLoss:
    """Loss of a step on preference pairs.

    Attributes:
        rl: dpo (also for ipo, which needs the same memory), simpo or orpo.
        has_second_model: DPO's reference is a second model, in full fine-tuning; otherwise the adapter is switched off.
        is_precomputed: the reference's log-probabilities are computed before the training.
        learns_chosen: SimPO's loss has a term for the likelihood of chosen answers, as by default in TRL.
    """

    rl: str
    has_second_model: bool = False
    is_precomputed: bool = False
    learns_chosen: bool = False

    @classmethod
    def of(cls, config: Config) -> "PairLoss | None":
        """Loss of a config (setup_reference_model in axolotl/train.py); None without preference pairs."""
        rl = config.get("rl")
        if not rl:
            return None
        if rl == "orpo":
            return cls(rl)
        if rl == "simpo":
            return cls(rl, learns_chosen=config.get("cpo_alpha") != 0)
        return cls("dpo", not config.get("adapter"), bool(config.get("precompute_ref_log_probs")))

    @property
    def has_reference_pass(self) -> bool:
        """True if each step computes the reference's log-probabilities."""
        return self.rl == "dpo" and not self.is_precomputed


@dataclass(frozen=True, kw_only=True)
class Step:
    """Memory-relevant settings of a training step.

    Attributes:
        model: content of the model's config.json, as JSON.
        adapter: qlora, lora, or None for full fine-tuning.
        weights: dtype of unquantized weights, by torch's name.
        autocast: autocast dtype of the forward pass, or None.
        targets: linear layers with LoRA, as in PEFT: their names, a regular expression, or all-linear.
        saved_modules: modules that are fully trained beside LoRA.
        dora: also train the magnitude of each output (arXiv 2402.09353).
        fp32_adapters: adapters of a base in 16 bits are in fp32, as by default in PEFT.
        quantization: data type of 4-bit weights, or `INT8`; without effect on other models.
        double_quantization: quantize the quantization constants.
        checkpointing: reentrant or non-reentrant recomputation of activations in the backward pass, or None.
        attention: sdpa, eager or flash_attention_2.
        padded: a batch has rows of unequal length; attention needs a mask.
        packed: documents share a row; sdpa and eager attention need a mask.
        flat: concatenate the rows of a micro batch. Axolotl does this with packed documents for FlashAttention, which
            keeps them apart without a mask (axolotl/core/trainers/base.py, multipack_real_batches).
        accumulates: gradients of an earlier micro batch exist.
        optimizer: optimizer name in Axolotl.
        chunked_loss: compute the loss on an eighth of the tokens at a time.
        axolotl: train with transformers' Trainer as Axolotl configures it. False means a plain loop: no autocast, PEFT
            weights in fp32, and outputs kept until the next step.
        capability: the lowest compute capability with the same kernels as the GPU; None for a CPU.
    """

    model: str
    adapter: str | None
    weights: str
    autocast: str | None
    rank: int
    targets: tuple[str, ...] | str
    saved_modules: tuple[str, ...]
    dora: bool
    fp32_adapters: bool
    dropout: float
    quantization: str
    double_quantization: bool
    checkpointing: str | None
    attention: str
    padded: bool
    packed: bool
    flat: bool
    accumulates: bool
    optimizer: str
    chunked_loss: bool
    axolotl: bool
    capability: tuple[int, int] | None

    @property
    def is_quantized(self) -> bool:
        """True for a base model in 4 bits (qlora) or 8 bits (lora)."""
        return self.adapter == "qlora" or (self.adapter == "lora" and self.quantization == INT8)


def step_of(config: Config, architecture: Config, capability: tuple[int, int]) -> tuple[Step, list[str]]:
    """Training step that Axolotl makes from a config, and notes on settings that it does not trace.

    Args:
        config: a config that passes `recipe check`.
        architecture: content of the model's config.json.
        capability: the GPU's compute capability.

    Raises:
        UserError: planning does not support the config.
    """
    settings = TrainingSettings.of(config)
    _refuse_unplannable(config, settings, architecture)
    layout = _layout(config, settings, architecture)
    quantization = config.get("bnb_config_kwargs") or {}
    step = Step(
        model=json.dumps(architecture, sort_keys=True),
        adapter=settings.adapter,
        weights=_weights(config, settings),
        autocast=precision(config, on_gpu=True).autocast,
        rank=settings.rank,
        targets=settings.targets,
        saved_modules=settings.saved_modules,
        dora=bool(config.get("peft_use_dora")),
        fp32_adapters=config.get("peft_autocast_adapter_dtype") is not False,
        dropout=0.0 if config.get("rl") else settings.dropout,  # disable_dropout in trl/trainer/dpo_trainer.py
        quantization=INT8 if config.get("load_in_8bit") else quantization.get("bnb_4bit_quant_type", "nf4"),
        double_quantization=quantization.get("bnb_4bit_use_double_quant", True),
        checkpointing=_checkpointing(config),
        attention=_attention(config),
        padded=layout == "padded",
        packed=layout == "packed",
        flat=layout == "flat",
        accumulates=settings.rows_per_step > settings.micro_batch_size,
        optimizer=_optimizer(settings),
        chunked_loss=bool(config.get("chunked_cross_entropy")),
        axolotl=True,
        capability=oldest_alike(capability),
    )
    notes = [*_substitutions(step, config), *_untraced_keys(config), *_untraced(config, settings, architecture)]
    return step, notes


def _weights(config: Config, settings: TrainingSettings) -> str:
    """Dtype of unquantized weights. In full fine-tuning with fp16, the gradient scaler refuses gradients in fp16."""
    formats = precision(config, on_gpu=True)
    if settings.adapter is None and formats.autocast == "float16":
        return "float32"
    return formats.weights


def _attention(config: Config) -> str:
    """Attention implementation in the traced step; kernels other than torch's are traced as FlashAttention."""
    implementation = attention(config) or "sdpa"
    return implementation if implementation in ("sdpa", "eager") else "flash_attention_2"


def _optimizer(settings: TrainingSettings) -> str:
    return settings.optimizer if settings.optimizer in OPTIMIZERS else OPTIMIZER


def _checkpointing(config: Config) -> str | None:
    if not config.get("gradient_checkpointing"):
        return None
    options = config.get("gradient_checkpointing_kwargs") or {}
    return "reentrant" if options.get("use_reentrant") else "non-reentrant"


Layout = Literal["packed", "flat", "padded", "plain"]
"""Layout of the rows in a micro batch; see `Step`. `plain` means that attention needs no mask."""


def _layout(config: Config, settings: TrainingSettings, architecture: Config) -> Layout:
    """Layout of the rows. FlashAttention never needs a mask; for a single row, sdpa needs it only with a window."""
    implementation = _attention(config)
    if implementation == "flash_attention_2":
        return "flat" if settings.sample_packing else "plain"
    if settings.sample_packing:
        return "packed"
    if settings.micro_batch_size > 1 or config.get("pad_to_sequence_len") or config.get("rl"):
        return "padded"
    if implementation == "sdpa" and has_sliding_window(architecture.get("text_config", architecture)):
        return "padded"
    return "plain"


def oldest_alike(capability: tuple[int, int]) -> tuple[int, int]:
    """Lowest compute capability whose kernels need the same memory: Turing's, Ampere's or Hopper's.

    FlashAttention needs Ampere, and Hopper has a larger workspace; see `cuda_attention` and `fake_step._workspace`.
    """
    if capability < (8, 0):
        return (7, 5)
    if capability[0] == 9:
        return (9, 0)
    return (8, 0)


def _refuse_unplannable(config: Config, settings: TrainingSettings, architecture: Config) -> None:
    if settings.adapter not in (None, "lora", "qlora"):
        raise UserError(f"adapter: {settings.adapter} cannot be planned; plans support lora, qlora or no adapter")
    if "quantization_config" in architecture:
        raise UserError("base_model: an already quantized model cannot be planned")
    if config.get("rl") not in (None, "dpo", "ipo", "simpo", "orpo"):
        raise UserError(f"rl: {config['rl']} cannot be planned; plans support dpo, ipo, simpo and orpo")


def _substitutions(step: Step, config: Config) -> Iterator[str]:
    """Notes on settings that are planned as others."""
    if step.weights != precision(config, on_gpu=True).weights:
        yield "weights in fp32: the gradient scaler refuses gradients in fp16"
    optimizer = TrainingSettings.of(config).optimizer
    if step.optimizer != optimizer:
        yield f"optimizer {optimizer}: planned as {OPTIMIZER}"
    implementation = attention(config) or "sdpa"
    if step.attention != implementation:
        yield f"{implementation}: planned as flash_attention_2"


def _untraced_keys(config: Config) -> Iterator[str]:
    """Notes on keys whose effect on the memory is not traced if they are set, or on by default."""
    for key, line in keys.table().items():
        if line.untraced and config.get(key):
            yield f"{key}: not traced; training needs {line.untraced} memory"
    for key in split_keys(config):
        yield f"{key}: not planned; counted as 1"
    if config.get("adapter") and all(config.get(key) is None for key in _KERNELS):
        yield "LoRA kernels, which Axolotl turns on by default: not traced; training needs less memory"


def split_keys(config: Config) -> list[str]:
    """Keys by which several GPUs share the tensors or rows of one model."""
    return [key for key in ("tensor_parallel_size", "context_parallel_size") if (config.get(key) or 1) > 1]


def _untraced(config: Config, settings: TrainingSettings, architecture: Config) -> Iterator[str]:
    """Notes on other settings whose effect on the memory is not traced: combinations, and certain values of keys."""
    if settings.targets == "all-linear" and {"embed_tokens", "lm_head"} & {*listed(config, "lora_target_modules")}:
        yield "lora_target_modules: planned only with the linear layers; training needs more memory"
    if config.get("load_in_8bit"):
        yield "load_in_8bit: traced without outliers; training needs a little more memory"
    if takes_varlen(config, architecture):
        yield "varlen_attn: planned as sdpa with a mask over packed rows; training needs less memory"
    if config.get("gradient_checkpointing") in ("offload", "offload_disk"):
        yield "gradient_checkpointing: offloading is not traced; training needs less memory"
    if offloads(config):
        yield "weights or optimizer state in main memory: not planned; training needs less GPU memory"
