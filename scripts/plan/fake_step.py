"""Memory of a training step, traced by running the step on fake tensors.

The trace runs the real model, adapters, quantized layers and optimizer, without values, data or a GPU. Importing this
module imports torch, transformers, PEFT and bitsandbytes.
"""

import gc
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from warnings import catch_warnings

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, masking_utils
from transformers.initialization import no_init_weights

from ..training.losses import chunked_loss
from .allocator import MIB, Counts, MemoryTrace, Shape, lasting, ordered
from .cuda import Recorder, cuda_attention, cuda_dropout, cuda_softmax
from .steps import PairLoss, Step


@contextmanager
def _fake(step: Step, pair_loss: PairLoss | None = None) -> Iterator[None]:
    """Run the block on fake CPU tensors that behave like GPU tensors."""
    with ExitStack() as stack:
        for context in (*_torch_contexts(), *_bitsandbytes_patches(), *_model_patches(step)):
            stack.enter_context(context)
        if pair_loss and step.capability:
            for context in _pair_patches():
                stack.enter_context(context)
        yield


def _torch_contexts() -> list[AbstractContextManager[Any]]:
    return [
        catch_warnings(action="ignore"),  # warnings about fake tensors
        FakeTensorMode(allow_non_fake_inputs=True),
        # nn.Module._apply swaps tensors, but recorded fake tensors cannot be swapped
        patch("torch.utils.swap_tensors", lambda old, new: setattr(old, "data", new.data)),
        patch("torch.optim.adam._get_value", lambda value: 1.0 if isinstance(value, torch.Tensor) else value),
    ]


def _bitsandbytes_patches() -> list[AbstractContextManager[Any]]:
    return [
        # a Params4bit cannot hold a fake tensor, but a plain parameter with the same attributes can
        patch("bitsandbytes.nn.modules.Params4bit", lambda data, **_: nn.Parameter(data, requires_grad=False)),
        patch("bitsandbytes.nn.modules.Int8Params", lambda data, **_: nn.Parameter(data, requires_grad=False)),
        # the original would compute 256 values with real tensors, and cache them for the process
        patch("bitsandbytes.functional.create_dynamic_map", lambda *_, **__: torch.empty(256)),
        patch.dict(bnb.functional.name2qmap, clear=True),
    ]


def _model_patches(step: Step) -> list[AbstractContextManager[Any]]:
    """Patches of masks, kernels and loss for a step."""
    patches: list[AbstractContextManager[Any]] = []
    if not step.packed:  # with fake tensors, the function would always find packed rows
        patches.append(patch("transformers.masking_utils.find_packed_sequence_indices", lambda *_, **__: None))
    if step.attention == "flash_attention_2":  # traced as sdpa without a mask, even for a sliding window
        masks = masking_utils.AttentionMaskInterface._global_mapping
        patches.append(patch.dict(masks, {"sdpa": lambda *_, **__: None}))
    if step.capability:
        autocast_on = torch.is_autocast_enabled
        patches += [
            patch("torch.is_autocast_enabled", lambda device="cpu": autocast_on("cpu")),
            patch.object(F, "scaled_dot_product_attention", partial(cuda_attention, step.capability)),
            patch.object(F, "softmax", cuda_softmax),
            patch.object(F, "dropout", cuda_dropout),
        ]
    if step.chunked_loss:
        patches.append(patch.dict("transformers.loss.loss_utils.LOSS_MAPPING", {"ForCausalLM": chunked_loss()}))
    return patches


class _NoKernel:
    """Triton kernel without effect."""

    def __getitem__(self, _: Any) -> Callable[..., None]:
        return lambda *_, **__: None


def _pair_patches() -> list[AbstractContextManager[Any]]:
    """Patches that let TRL take the way of a GPU to log-probabilities, and the reference model that to its layers."""
    return [
        patch("trl.trainer.utils._supports_trl_loss_kernel", lambda *_: True),
        patch("trl.kernels.logprob_entropy._forward_kernel", _NoKernel()),
        patch("trl.kernels.logprob_entropy._backward_kernel", _NoKernel()),
        patch("bitsandbytes.nn.modules.has_avx512bf16", lambda: False),
    ]


def _build(step: Step, recorder: Recorder, pair_loss: PairLoss | None = None) -> Any:
    """Make the model of fake tensors, and record its storages by kind."""
    model = _loaded(step, recorder)
    with recorder:
        model = _trainable(step, model)
        if pair_loss and pair_loss.rl == "dpo" and step.is_quantized:
            _cast_adapters(model)
    model.train()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.requires_grad and step.adapter:
            recorder.add(tensor, "adapters")
        elif "embed_tokens" in name or "lm_head" in name:
            recorder.add(tensor, "embeddings and head")
        else:
            recorder.add(tensor, "base weights")
    return model


def _loaded(step: Step, recorder: Recorder) -> Any:
    """Model as it is loaded: quantized if the step's is, and recorded."""
    model = base_model(step)
    if step.is_quantized:
        _quantize(step, model, recorder)
    for tensor in (*model.parameters(), *model.buffers()):
        recorder.add(tensor, "base weights")
    return model


def _reference_model(step: Step, recorder: Recorder) -> Any:
    """Second model for the reference, which Axolotl loads as the first one, without adapters."""
    model = _loaded(step, recorder)
    with recorder:
        model = _prepared(step, model)
    for tensor in (*model.parameters(), *model.buffers()):
        recorder.add(tensor, "reference model")
    model.forward = _forward(step, model)
    return model.eval()


def base_model(step: Step) -> Any:
    """Model with unquantized weights, without adapters."""
    config = AutoConfig.for_model(**json.loads(step.model))
    config.use_cache = False
    config._attn_implementation = "eager" if step.attention == "eager" else "sdpa"
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, step.weights))
    model.tie_weights()
    for module in model.modules():
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):  # these need the values of positions
            module.rope_type = "default"
    return model


def _quantize(step: Step, model: nn.Module, recorder: Recorder) -> None:
    """Replace the linear layers except the output head by 4-bit or 8-bit layers."""
    quantized = _in_8_bits if step.adapter == "lora" else _in_4_bits
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and name != "lm_head":
                setattr(parent, name, quantized(step, layer, recorder))


def _in_8_bits(_: Step, layer: nn.Linear, recorder: Recorder) -> nn.Module:
    """Quantize a linear layer to 8 bits; without outliers, whose number depends on the values."""
    quantized = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False
    )
    recorder.kind = "quantization constants"
    with recorder:
        packed, constants, _ = bnb.functional.int8_vectorwise_quant(torch.empty_like(layer.weight, dtype=torch.float16))
    recorder.kind = "activations"
    recorder.add(packed, "base weights")
    quantized.weight = nn.Parameter(packed, requires_grad=False)
    vars(quantized.weight).update(CB=packed, SCB=constants)
    quantized.bias = layer.bias
    return quantized


def _in_4_bits(step: Step, layer: nn.Linear, recorder: Recorder) -> nn.Module:
    """Quantize a linear layer during loading, as bitsandbytes does."""
    statistics = {"compress_statistics": step.double_quantization, "quant_type": step.quantization}
    quantized = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        **statistics,
    )
    recorder.kind = "quantization constants"
    with recorder:
        loaded = torch.empty(layer.weight.shape, dtype=layer.weight.dtype)
        packed, state = bnb.functional.quantize_4bit(loaded, **statistics)
        del loaded
    recorder.kind = "activations"
    recorder.add(packed, "base weights")
    weight = nn.Parameter(packed, requires_grad=False)
    vars(weight).update(quant_state=state, bnb_quantized=True, module=quantized, blocksize=64, **statistics)
    quantized.weight = weight
    quantized.quant_state = state
    if layer.bias is not None:
        quantized.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return quantized


def _prepared(step: Step, model: Any) -> Any:
    """Model with the dtypes of a training, without adapters."""
    if step.is_quantized:
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = step.adapter == "qlora", step.adapter == "lora"
        model.is_quantized = True
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(step.checkpointing))
    if step.axolotl:
        _convert_embeddings(step, model)
    elif not step.adapter:
        model.float()
    return model


def _trainable(step: Step, model: Any) -> Any:
    """Prepare the model for training: adapters, dtypes and checkpointing."""
    model = _prepared(step, model)
    if step.adapter:
        model = get_peft_model(model, lora_config(step), autocast_adapter_dtype=step.fp32_adapters)
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": step.checkpointing == "reentrant"})
    if _requires_input_gradients(step):
        model.enable_input_require_grads()
    return model


def _cast_adapters(model: nn.Module) -> None:
    """Convert adapters of a quantized base model as TRL's DPO trainer does (trl/trainer/dpo_trainer.py)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def _convert_embeddings(step: Step, model: nn.Module) -> None:
    """Convert embeddings, head and norms as Axolotl does (loaders/model.py, _configure_embedding_dtypes)."""
    dtype = torch.float32
    if step.adapter or step.attention == "flash_attention_2":
        dtype = getattr(torch, step.weights)
    for name, module in model.named_modules():
        if "norm" in name or name.endswith(("embed_tokens", "lm_head")):
            module.to(dtype)


def lora_config(step: Step) -> LoraConfig:
    return LoraConfig(
        r=step.rank,
        lora_alpha=step.rank,
        lora_dropout=step.dropout,
        target_modules=step.targets if isinstance(step.targets, str) else list(step.targets),
        modules_to_save=list(step.saved_modules) or None,
        use_dora=step.dora,
        task_type="CAUSAL_LM",
    )


def _requires_input_gradients(step: Step) -> bool:
    """True if the embedding's output requires gradients, as in axolotl/loaders/adapter.py, load_adapter."""
    if step.axolotl:
        return step.adapter is not None
    return step.checkpointing is not None


def _optimizer(step: Step, model: nn.Module, trained: list[torch.Tensor], recorder: Recorder) -> Any:
    """Create the optimizer; for an optimizer of bitsandbytes, also its state.

    torch's optimizer creates its state in the first step. bitsandbytes keeps state in fp32 for tensors with fewer than
    4,096 values, and transformers' Trainer for each nn.Embedding (create_optimizer in trainer.py). On a GPU, a paged
    optimizer pages the state of tensors with 100,000 values or more.
    """
    if not _uses_bitsandbytes(step.optimizer):
        fused = "fused" in step.optimizer
        return torch.optim.AdamW(trained, fused=fused, foreach=not fused)
    bits = 8 if "8bit" in step.optimizer else 32
    optimizer = bnb.optim.AdamW(trained, optim_bits=bits)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    pages = "paged" in step.optimizer and step.capability is not None

    def buffer(parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if not pages or parameter.numel() < 100_000:
            return torch.zeros_like(parameter, dtype=dtype)
        recorder.paged += parameter.numel() * dtype.itemsize
        return torch.empty(0, dtype=dtype)

    with patch.object(optimizer, "get_state_buffer", buffer):
        for number, parameter in enumerate(trained):
            optimizer.args.optim_bits = 32 if id(parameter) in embeddings else bits
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, number)
    return optimizer


def _uses_bitsandbytes(optimizer: str) -> bool:
    """True for an optimizer of bitsandbytes, which updates weights in place; `OPTIMIZERS` has also torch's."""
    return "torch" not in optimizer


def _allocate_state(step: Step, optimizer: Any, trained: list[torch.Tensor]) -> None:
    """Create the state of torch's optimizer, as its first step does."""
    if _uses_bitsandbytes(step.optimizer):
        return
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _forward(step: Step, model: Any) -> Callable[..., Any]:
    """Forward pass of the model, under autocast if the step has one."""
    if step.autocast is None:
        return model.forward
    return convert_outputs_to_fp32(torch.autocast("cpu", dtype=getattr(torch, step.autocast))(model.forward))


def _inputs(step: Step, shape: Shape) -> dict[str, torch.Tensor]:
    """Batch of rows as the trainer passes it to the model."""
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.long)}
    if step.axolotl:
        inputs |= {"labels": torch.zeros(shape, dtype=torch.long), "num_items_in_batch": torch.tensor(1)}
    else:
        inputs["labels"] = inputs["input_ids"]
    if step.padded:
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
    if step.packed:
        inputs["position_ids"] = torch.zeros(shape, dtype=torch.long)
    return inputs


Batch = tuple[torch.Tensor, Any]
"""Loss of a batch, and what a training keeps of it until its next step."""


class _AllAnswers(TorchDispatchMode):
    """Mode for operations whose result depends on values, which fake tensors lack: each token belongs to an answer."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1
        if function is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
            tensor, [mask] = args
            return tensor.new_empty((mask.numel(), *tensor.shape[mask.ndim :]))
        return function(*args, **(kwargs or {}))


def _pairs_trainer(step: Step, model: Any, loss: PairLoss, recorder: Recorder) -> Any:
    """TRL's trainer of a loss on pairs, with the attributes that its loss reads, as Axolotl sets them."""
    from trl import DPOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    trainer: Any = object.__new__({"dpo": DPOTrainer, "simpo": CPOTrainer, "orpo": ORPOTrainer}[loss.rl])
    model.forward = _forward(step, model)
    vars(trainer).update(
        model=model,
        ref_model=_reference_model(step, recorder) if loss.has_second_model else None,
        precompute_ref_logps=loss.is_precomputed,
        accelerator=SimpleNamespace(device="cpu", unwrap_model=_same, gather=_same, gather_for_metrics=_same),
        args=SimpleNamespace(
            device="cpu", gradient_checkpointing_kwargs={"use_reentrant": step.checkpointing == "reentrant"}
        ),
        beta=0.1,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        use_liger_kernel=False,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        # SimPO's and ORPO's
        _peft_has_been_casted_to_bf16=False,
        _stored_metrics={"train": defaultdict(list)},
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=0.5,
        cpo_alpha=float(loss.learns_chosen),
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
    )
    return trainer


def _pair_inputs(loss: PairLoss, shape: Shape) -> dict[str, torch.Tensor]:
    """Batch of pairs as the trainer passes it to its loss; a pair has two rows."""
    pairs = shape[0] // 2
    inputs = {}
    if loss.rl == "dpo":
        for name in ("input_ids", "attention_mask", "completion_mask"):
            inputs[name] = torch.ones(shape, dtype=torch.long)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            inputs[name] = torch.zeros(pairs)
        return inputs
    for answer in ("chosen", "rejected"):
        for name in ("input_ids", "attention_mask", "labels"):
            inputs[f"{answer}_{name}"] = torch.ones((pairs, shape[1]), dtype=torch.long)
    return inputs


def _pair_rows(trainer: Any, loss: PairLoss, _: Step, model: Any, shape: Shape) -> Batch:
    """Loss of a batch of pairs."""
    inputs = _pair_inputs(loss, shape)
    with _AllAnswers():
        return trainer.compute_loss(model, inputs), None


def _same(value: Any) -> Any:
    return value


def _rows(step: Step, model: Any, shape: Shape) -> Batch:
    """Loss of a batch of rows; Trainer.compute_loss and training_step free the rest before the backward pass."""
    inputs = _inputs(step, shape)
    outputs = _forward(step, model)(**inputs)
    return outputs["loss"], None if step.axolotl else (inputs, outputs)


def _evaluate(step: Step, model: Any, batch: Callable[[Step, Any, Shape], Batch], shape: Shape) -> None:
    """Run one batch as transformers' Trainer evaluates, which keeps no logits of a batch (prediction_step).

    Several rows need a mask, even if a training micro batch is a single row.
    """
    model.eval()
    padded = step.padded or (shape[0] > 1 and not step.packed)
    with torch.no_grad():
        batch(replace(step, padded=padded), model, shape)


def _run(
    step: Step,
    recorder: Recorder,
    model: Any,
    trained: list[torch.Tensor],
    optimizer: Any,
    micro_batch: Callable[[], Batch],
) -> None:
    """Run one micro batch forward and backward, then the optimizer step."""
    if step.accumulates:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
            recorder.add(parameter.grad, "gradients")
    loss, _kept = micro_batch()
    loss.backward()
    del loss
    for parameter in trained:
        recorder.add(parameter.grad, "gradients")
    if step.axolotl:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
    if not _uses_bitsandbytes(step.optimizer):
        optimizer.step()
    model.zero_grad()


def trace(step: Step, shape: Shape, evaluation: Shape | None = None, pair_loss: PairLoss | None = None) -> MemoryTrace:
    """Trace the memory of a step with one micro batch shape, and of an evaluation if its shape is given.

    With a loss on pairs, the rows are the answers of preference pairs.
    """
    recorder = Recorder(cuda=step.capability is not None)
    gc.disable()  # so that every trace frees reference cycles at the same points
    gc.freeze()  # so that gc.collect() skips older objects
    try:
        with _fake(step, pair_loss):
            model, batch = _build(step, recorder, pair_loss), _rows
            if pair_loss:
                batch = partial(_pair_rows, _pairs_trainer(step, model, pair_loss, recorder), pair_loss)
            parameters = _count(model)
            sizes = _sizes(model.config.get_text_config())
            if step.capability:
                for _ in range(2):  # cuBLAS has one workspace per thread: one for forward, one for backward
                    recorder.new_storage(_workspace(step.capability), "kernel workspaces")
            trained = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and _VISION not in name  # text rows do not use the vision tower
            ]
            recorder.kind = "optimizer"
            with recorder:
                optimizer = _optimizer(step, model, trained, recorder)
            recorder.kind = "activations"
            loaded = recorder.events
            recorder.events = []
            with recorder:
                _allocate_state(step, optimizer, trained)
            for value in tree_iter(list(optimizer.state.values())):
                if isinstance(value, torch.Tensor):
                    recorder.add(value, "optimizer")
            gc.collect()
            loaded += lasting(recorder.events)
            recorder.vocabulary = sizes["vocabulary"]
            recorder.events = []
            with recorder:
                _run(step, recorder, model, trained, optimizer, partial(batch, step, model, shape))
            gc.collect()
            events = ordered(recorder.events)
            recorder.events = []
            if evaluation:
                with recorder:
                    _evaluate(step, model, batch, evaluation)
                gc.collect()
            evaluated = ordered(recorder.events)
    finally:
        gc.unfreeze()
        gc.enable()
    return MemoryTrace(
        loaded, events, evaluated, recorder.kinds, parameters, sizes, recorder.paged, expandable=step.axolotl
    )


def _workspace(capability: tuple[int, int]) -> int:
    """Bytes of a cuBLAS workspace.

    32 MiB on Hopper; otherwise 2 * 4 MiB + 8 * 16 KiB (aten/src/ATen/cuda/CublasHandlePool.cpp).
    """
    return 32 * MIB if capability[0] == 9 else 8 * MIB + 128 * 1024


def _sizes(config: PreTrainedConfig) -> dict[str, int]:
    """Sizes of a model; transformers' defaults replace keys missing from config.json."""
    heads = config.num_attention_heads
    return {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "attention_width": heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        "vocabulary": config.vocab_size,
    }


def _count(model: nn.Module) -> Counts:
    """Counts of trainable and frozen parameters by kind of layer.

    4-bit parameters are counted unpacked. If a module is fully trained beside LoRA, its frozen original is not counted.
    """
    counts: Counts = {}
    for name, parameter in model.named_parameters():
        if "original_module" in name:
            continue
        state = getattr(parameter, "quant_state", None)
        size = state.shape.numel() if state else parameter.numel()
        count = counts.setdefault(_kind(name), {"frozen": 0, "trainable": 0})
        count["trainable" if parameter.requires_grad else "frozen"] += size
    return counts


def _kind(parameter: str) -> str:
    """Kind of the layer to which a parameter belongs: vision_tower, norm, or the layer's own name."""
    layer = _IN_LAYER.sub("", parameter).rpartition(".")[2]
    if _VISION in parameter:
        return _VISION
    return "norm" if "norm" in layer else layer


_VISION = "vision_tower"
"""Name of a model's image encoder, for example in Gemma 3."""

_IN_LAYER = re.compile(r"(\.(weight|bias|default|base_layer|modules_to_save|lora_\w+))+$")
"""Part of a parameter's name behind the layer's name."""
