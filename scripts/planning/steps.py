"""Training step that Axolotl makes of a config, as far as its memory is concerned."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..configs import datafiles
from ..configs.gpus import offloads
from ..configs.numerics import attention, precision, takes_varlen

OPTIMIZER = "adamw_torch_fused"  # Axolotl's default
OPTIMIZERS = {
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
}
_TAKE_MORE = ("lora_target_parameters", "unfrozen_parameters")
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
SPLIT = ("tensor_parallel_size", "context_parallel_size")
_TAKE_LESS = (
    *("cut_cross_entropy", "liger_cross_entropy", "liger_fused_linear_cross_entropy", "activation_offloading"),
    *("liger_rms_norm", "liger_glu_activation"),
    *("peft_layers_to_transform", "peft_layers_pattern", "lora_exclude_modules"),
    *_KERNELS,
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Settings of a training step that its memory depends on.

    Attributes:
        model: the content of the model's config.json, as JSON.
        adapter: qlora, lora, or None for a training of all weights.
        weights: the dtype of weights that are not quantized, as torch names it.
        autocast: the dtype of the forward pass under autocast; None where there is no autocast.
        targets: the linear layers with LoRA, or a regular expression or all-linear, as in PEFT.
        saved_modules: modules trained whole beside LoRA.
        dora: LoRA trains the magnitude of each output as well (arXiv 2402.09353).
        double_quantization: the quantization constants are quantized too.
        checkpointing: way to compute a layer's activations again in the backward pass: None, reentrant or
            non-reentrant.
        attention: sdpa, eager or flash_attention_2.
        padded: rows of unequal length make a batch, so that attention needs a mask.
        packed: documents share a row, so that sdpa and eager need a mask.
        flat: the rows of a micro batch are laid end to end, as they are where FlashAttention keeps packed documents
            apart (axolotl/core/trainers/base.py, multipack_real_batches).
        accumulates: there are gradients of an earlier micro batch.
        optimizer: its name, as in Axolotl.
        chunked_loss: the loss is computed on an eighth of the tokens at a time.
        axolotl: transformers' Trainer runs it, as Axolotl sets it up; else a plain loop, which keeps the outputs until
            the next step, has no autocast, and leaves PEFT's weights in fp32.
        capability: the GPU's compute capability; None for the CPU, without memory inside kernels.
    """

    model: str
    adapter: str | None = "qlora"
    weights: str = "float16"
    autocast: str | None = None
    rank: int = 32
    targets: tuple[str, ...] | str = ("q_proj", "k_proj", "v_proj", "o_proj")
    saved_modules: tuple[str, ...] = ()
    dora: bool = False
    dropout: float = 0.0
    quantization: str = "nf4"
    double_quantization: bool = True
    checkpointing: str | None = "non-reentrant"
    attention: str = "sdpa"
    padded: bool = False
    packed: bool = False
    flat: bool = False
    accumulates: bool = False
    optimizer: str = "adamw_torch_fused"
    chunked_loss: bool = False
    axolotl: bool = True
    capability: tuple[int, int] | None = (7, 5)


def step_of(config: Config, architecture: dict[str, Any], capability: tuple[int, int]) -> tuple[Step, list[str]]:
    """Training step that Axolotl makes of a config, and notes on its parts that are not traced.

    Args:
        config: a config without errors in `recipe check`.
        architecture: the content of the model's config.json.
        capability: the GPU's compute capability.

    Raises:
        UserError: it cannot be planned.
    """
    _refuse_unplannable(config, architecture)
    adapter = config.get("adapter")
    notes = []
    formats = precision(config, on_gpu=True)
    dtype = formats.weights
    if not adapter and formats.autocast == "float16":
        dtype = "float32"
        notes.append("weights in fp32: a gradient scaler refuses gradients in fp16")
    optimizer = str(config.get("optimizer") or OPTIMIZER)
    if optimizer not in OPTIMIZERS:
        notes.append(f"optimizer {optimizer}: planned as {OPTIMIZER}")
        optimizer = OPTIMIZER
    implementation = attention(config) or "sdpa"
    if implementation not in ("sdpa", "eager", "flash_attention_2"):
        notes.append(f"{implementation}: planned as flash_attention_2")
        implementation = "flash_attention_2"
    notes += _not_traced(config, architecture)
    rows = rows_of(config)
    packed = bool(config.get("sample_packing"))
    pads = rows > 1 or bool(config.get("pad_to_sequence_len"))
    masks = implementation != "flash_attention_2"
    slides = implementation == "sdpa" and _has_window(architecture)
    quantization = config.get("bnb_config_kwargs") or {}
    reentrant = (config.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant")
    checkpointing = "reentrant" if reentrant else "non-reentrant"
    targets = "all-linear" if config.get("lora_target_linear") else config.get("lora_target_modules") or ()
    step = Step(
        model=json.dumps(architecture, sort_keys=True),
        adapter=adapter,
        weights=dtype,
        autocast=formats.autocast,
        rank=int(config.get("lora_r") or 8),
        targets=targets if isinstance(targets, str) else tuple(targets),
        saved_modules=tuple(config.get("lora_modules_to_save") or ()),
        dora=bool(config.get("peft_use_dora")),
        dropout=float(config.get("lora_dropout") or 0),
        quantization=quantization.get("bnb_4bit_quant_type", "nf4"),
        double_quantization=quantization.get("bnb_4bit_use_double_quant", True),
        checkpointing=checkpointing if config.get("gradient_checkpointing") else None,
        attention=implementation,
        padded=(pads or slides) and masks and not packed,
        packed=packed and masks,
        flat=packed and not masks,
        accumulates=datafiles.effective_batch(config) > rows,
        optimizer=optimizer,
        chunked_loss=bool(config.get("chunked_cross_entropy")),
        capability=capability,
    )
    return step, notes


def _has_window(architecture: dict[str, Any]) -> bool:
    """True for a model with sliding-window attention, for which sdpa needs a mask once a row is as long."""
    text = architecture.get("text_config", architecture)
    return bool(text.get("sliding_window") and text.get("use_sliding_window", True))


def _refuse_unplannable(config: Config, architecture: dict[str, Any]) -> None:
    adapter = config.get("adapter")
    if adapter not in (None, "lora", "qlora"):
        raise UserError(f"adapter: {adapter} cannot be planned; lora, qlora and none can")
    if config.get("load_in_8bit") or "quantization_config" in architecture:
        raise UserError("a base model in 8 bits, or quantized before, cannot be planned")
    if config.get("rl"):
        raise UserError("rl: preference training cannot be planned")


def _not_traced(config: Config, architecture: dict[str, Any]) -> Iterator[str]:
    """Notes on settings that a trace leaves out, and on the direction of the error."""
    yield from (f"{key}: not traced; it takes less" for key in _TAKE_LESS if config.get(key))
    yield from (f"{key}: not planned; as if it were 1" for key in SPLIT if (config.get(key) or 1) > 1)
    if config.get("adapter") and all(config.get(key) is None for key in _KERNELS):
        yield "LoRA kernels, which Axolotl turns on where none of their keys is set: not traced; they take less"
    yield from (f"{key}: not traced; it takes more" for key in _TAKE_MORE if config.get(key))
    if takes_varlen(config, architecture):
        yield "varlen_attn: planned as sdpa with a mask over packed rows; it takes less"
    if config.get("gradient_checkpointing") in ("offload", "offload_disk"):
        yield "offloading: not traced; it takes less"
    if offloads(config):
        yield "weights or optimizer state in main memory: not planned; it takes less"
    if int(config.get("eval_batch_size") or 0) > rows_of(config):
        yield "eval_batch_size: evaluation is not traced, and with more rows than training may take more"


def rows_of(config: Config) -> int:
    """Rows of a micro batch."""
    return int(config.get("micro_batch_size") or 1)


def length_of(config: Config) -> int:
    """Most tokens of a row."""
    return int(config.get("sequence_len") or 512)  # Axolotl's default (utils/schemas/config.py)
