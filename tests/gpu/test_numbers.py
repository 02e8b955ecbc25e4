"""Adapters, 4-bit weights, and packed rows in this process, beside what they are defined as."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from axolotl.monkeypatch.attention.sdpa_varlen import patch_sdpa_varlen
from axolotl.utils.collators import DataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq
from axolotl.utils.trainer import add_position_ids
from bitsandbytes.nn import Linear4bit
from figures import Figure
from memory_plugin import cap_memory
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from trainings import BF16, DEVICE, GPU, RECIPE, needs_gpu
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.paths import find_recipe
from qlora_recipes.config import substitution
from qlora_recipes.data.prepare import default_sample
from qlora_recipes.training.losses import MASKED

Check = Callable[..., None]
HALF = torch.bfloat16 if BF16 else torch.float16
LENGTHS = (17, 120, 64, 33, 5)  # tokens of packed rows, which start and end anywhere


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    """Leaves some of the GPU's memory to others, and gives back what a test took."""
    cap_memory()
    yield
    gc.collect()
    torch.cuda.empty_cache()


def texts(count: int) -> list[str]:
    rows = map(orjson.loads, (default_sample() / "train.jsonl").read_bytes().splitlines()[:count])
    return [f"{row['input']}\n{row['output']}" for row in rows]


def batch(device: str) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(substitution.model_folder())
    ids = tokenizer(texts(2), truncation=True, max_length=128, padding="max_length", return_tensors="pt")["input_ids"]
    return {"input_ids": ids.to(device), "labels": ids.masked_fill(ids == tokenizer.pad_token_id, MASKED).to(device)}


def load(run: Path, device: str, dtype: torch.dtype, quantized: bool = True) -> Any:
    """The model of a run with its adapter, ready to be trained, without dropout."""
    base_model = yamlfiles.read_yaml(run / "config.yaml")["base_model"]
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    how = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype) if quantized else None
    base = AutoModelForCausalLM.from_pretrained(
        base_model, dtype=dtype, quantization_config=how, device_map=device, attn_implementation="eager"
    )
    model = PeftModel.from_pretrained(base, run / "output", is_trainable=True)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # a kernel that rounds to bf16, see training/run_plugin.py
    return model.eval()


def loss_and_norm(model: Any, device: str, autocast: torch.dtype | None = None) -> tuple[float, float]:
    model.zero_grad()
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        loss = model(**batch(device)).loss
    loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return loss.item(), math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))


def compared(name: str, measured: Sequence[float], expected: Sequence[float], bounds: Sequence[float]) -> list[Figure]:
    names = (f"{name}, loss", f"{name}, gradient norm")
    return [Figure(*values) for values in zip(names, measured, expected, bounds, strict=True)]


def apart(measured: torch.Tensor, expected: torch.Tensor) -> float:
    return float((measured.float().cpu() - expected.float().cpu()).abs().max() / expected.abs().max())


def test_model_in_4_bits(training, check):
    model = load(training, DEVICE, torch.float32)
    measured = loss_and_norm(model, DEVICE)
    put_plain_layers(model)
    # fp32 rounds by 6e-8 in each of some 200 sums one after the other
    check(*compared("NF4 beside its definition", measured, loss_and_norm(model, DEVICE), (1e-5, 1e-4)))


def put_plain_layers(model: Any) -> None:
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear4bit):
                plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
                plain.weight = torch.nn.Parameter(dequantized(layer.weight), requires_grad=False)
                plain.bias = layer.bias
                setattr(parent, name, plain)


def dequantized(weight: Any) -> torch.Tensor:
    """A doubly quantized NF4 weight in fp32, by the definition of the format (arXiv 2305.14314, section 3), without
    bitsandbytes' kernels: two codes a byte, each a level times the constant of its block of 64; constants are 8-bit
    codes, each a level times the constant of its block of 256, around a mean.
    """
    state = weight.quant_state
    codes = torch.stack([weight.data >> 4, weight.data & 15], dim=-1).flatten().int()
    of_blocks = state.state2
    blocks = of_blocks.code[state.absmax.int()].float()
    constants = blocks * of_blocks.absmax.repeat_interleave(of_blocks.blocksize)[: len(blocks)] + state.offset
    values = state.code[codes] * constants.repeat_interleave(state.blocksize)[: len(codes)]
    return values.view(state.shape).float()


@pytest.mark.skipif(not BF16, reason="needs a processor, or a GPU, that computes in bf16")
def test_model_in_bf16(training, check):
    exact = loss_and_norm(load(training, DEVICE, torch.float32), DEVICE)
    measured = loss_and_norm(load(training, DEVICE, torch.bfloat16), DEVICE, torch.bfloat16)
    # rounds by 4e-3, of which the mean over a few hundred tokens keeps little, and a norm more
    check(*compared("bf16 beside fp32", measured, exact, (0.01, 0.05)))


@needs_gpu
def test_model_on_gpu_and_cpu(training, check):
    measured, exact = (loss_and_norm(load(training, device, torch.float32), device) for device in (DEVICE, "cpu"))
    check(*compared("NF4 on GPU beside CPU", measured, exact, (1e-3, 1e-2)))  # GPUs add in another order


def test_saved_adapter(training, check):
    """In fp64, where rounding does not show."""
    config = yamlfiles.read_yaml(find_recipe(RECIPE)[1])
    model = load(training, DEVICE, torch.float64, quantized=False).double()
    inputs = batch(DEVICE)["input_ids"][:1, :64]
    with torch.inference_mode():
        scale = scale_of(model, inputs)
        plain = model(inputs).logits
        merged = model.merge_and_unload()(inputs).logits
    check(
        # over sums of thousands of products
        Figure("adapter scale, as saved", scale, config["lora_alpha"] / config["lora_r"], 1e-9),
        Figure("merged adapter, largest error", apart(merged, plain), bound=1e-6),  # Llama's norms round to fp32
    )


def scale_of(model: Any, inputs: torch.Tensor) -> float | None:
    """The factor before B A x by which LoRA layers' outputs differ from their base layers', over all layers.

    None where some layer adds anything else.
    """
    sums = torch.zeros(3, dtype=torch.float64)

    def add(layer: Any, arguments: Any, output: torch.Tensor) -> None:
        added = output - layer.base_layer(arguments[0])
        update = layer.lora_B["default"](layer.lora_A["default"](arguments[0]))
        sums.add_(torch.stack([(added * update).sum(), update.square().sum(), added.square().sum()]).cpu())

    hooks = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, LoraLayer)]
    model(inputs)
    for hook in hooks:
        hook.remove()
    along, updates, added = sums.tolist()
    straight = updates > 0 and along**2 >= (1 - 1e-9) * updates * added
    return along / updates if straight else None


def test_packed_rows_do_not_see_each_other(check):
    """With the attention that Axolotl takes (loaders/patch_manager.py), on a GPU in half precision."""
    if GPU and BF16:  # from Ampere on
        patch_sdpa_varlen()
    folder, dtype = substitution.model_folder(), HALF if GPU else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=DEVICE, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text, length in zip(texts(len(LENGTHS)), LENGTHS, strict=True):
        ids = tokenizer(text)["input_ids"][:length]
        rows.append({"input_ids": ids, "labels": [MASKED, *ids[1:]]})
    # as Axolotl's trainer does without packing, and with it and sdpa (core/trainers/base.py): one sequence, no mask
    alone = DataCollatorForSeq2Seq(tokenizer)([row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows])
    collate = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=256)
    packed = collate([[add_position_ids(dict(row)) for row in rows]])
    packed.pop("attention_mask", None)
    one, other = losses(model, alone), losses(model, packed)
    measured = float((one - other).abs().mean()) if one.shape == other.shape else None
    # seen on a CPU: 1e-7 in fp32, 8e-4 in bf16, and 0.8 or more where rows see each other
    check(Figure("packed rows, mean difference of losses", measured, bound=0.01 if GPU else 1e-5))


@torch.inference_mode()
def losses(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of each token that carries one, row by row."""
    inputs_here = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    labels = inputs_here.pop("labels")[:, 1:].flatten()
    logits = model.eval()(**inputs_here, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits[labels != MASKED], labels[labels != MASKED], reduction="none").cpu()
