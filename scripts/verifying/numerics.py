"""What one batch of real text gives, in the formats and on the processors of this machine: losses and gradients of the
stand-in in NF4, with the adapter of a training, and the outputs of that adapter. Imports torch.
"""

import math
from pathlib import Path
from typing import Any

import orjson
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from ..base import yamlfiles
from ..base.paths import find_recipe
from ..configs import standin
from ..data.sample import usual_sample
from .bench import RECIPE, Bench, Figure, Figures

disable_progress_bar()
ROWS, LENGTH = 2, 128
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def _batch(device: str) -> dict[str, torch.Tensor]:
    """The first rows of the sample, cut to one length."""
    rows = map(orjson.loads, (usual_sample() / "train.jsonl").read_bytes().splitlines()[:ROWS])
    tokenizer = AutoTokenizer.from_pretrained(standin.model_folder())
    texts = [f"{row['input']}\n{row['output']}" for row in rows]
    ids = tokenizer(texts, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")["input_ids"]
    return {"input_ids": ids.to(device), "labels": ids.masked_fill(ids == tokenizer.pad_token_id, -100).to(device)}


def _model(adapter: Path, device: str, dtype: torch.dtype, quantized: bool = True) -> Any:
    """The stand-in with an adapter, ready to be trained."""
    how = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype) if quantized else None
    auto: Any = AutoModelForCausalLM
    base = auto.from_pretrained(
        standin.model_folder(), dtype=dtype, quantization_config=how, device_map=device, attn_implementation="eager"
    )
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # a kernel that rounds to bf16, see runs/plugin.py
    return model.eval()  # no dropout


def _loss_and_norm(model: Any, device: str, autocast: torch.dtype | None = None) -> tuple[float, float]:
    """The loss of the batch, and the norm of its gradient."""
    model.zero_grad()
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        loss = model(**_batch(device)).loss
    loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return loss.item(), math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))


def numerics(bench: Bench) -> Figures:
    """Loss and gradient of NF4 layers beside those of the weights that they stand for, in bf16, and on a GPU beside
    the CPU's."""
    adapter = bench.result("training") / "output"
    device = "cuda" if bench.gpu else "cpu"
    model = _model(adapter, device, torch.float32)
    found = _loss_and_norm(model, device)
    figures: dict[str, Figure] = {}

    def compare(name: str, found: tuple[float, float], expected: tuple[float, float]) -> None:
        for what, one, other in zip(("loss", "gradient norm"), found, expected, strict=True):
            figures[f"{name}, {what}"] = Figure(one, other)

    plain_layers(model)
    compare("NF4", found, _loss_and_norm(model, device))
    del model
    if bench.bf16:
        in_bf16 = _model(adapter, device, torch.bfloat16)
        compare("bf16", _loss_and_norm(in_bf16, device, torch.bfloat16), found)
        del in_bf16
    if bench.gpu:
        compare("NF4 on GPU and CPU", found, _loss_and_norm(_model(adapter, "cpu", torch.float32), "cpu"))
    return figures


def plain_layers(model: Any) -> None:
    """Put a plain linear layer with the same weights in the place of each in 4 bits."""
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


def adapter(bench: Bench) -> Figures:
    """What a saved adapter adds to the outputs of its layers, beside the recipe's alpha / r times B A x, and what the
    merged model puts out; in fp64, where rounding does not show."""
    device = "cuda" if bench.gpu else "cpu"
    recipe = yamlfiles.read_yaml(find_recipe(RECIPE)[1])
    model = _model(bench.result("training") / "output", device, torch.float64, quantized=False).double()
    inputs = _batch(device)["input_ids"][:1, :64]
    with torch.inference_mode():
        scale = _scale(model, inputs)
        plain = model(inputs).logits
        merged = model.merge_and_unload()(inputs).logits
    apart = ((merged - plain).abs().max() / plain.abs().max()).item()
    return {
        "adapter scale, as saved": Figure(scale, recipe["lora_alpha"] / recipe["lora_r"]),
        "merged adapter": Figure(apart),
    }


def _scale(model: Any, inputs: torch.Tensor) -> float | None:
    """The factor before B A x by which LoRA layers' outputs differ from their base layers', over all layers.

    None where some layer adds anything else.
    """
    sums = torch.zeros(3, dtype=torch.float64)

    def add(layer: Any, given: Any, output: torch.Tensor) -> None:
        added = output - layer.base_layer(given[0])
        update = layer.lora_B["default"](layer.lora_A["default"](given[0]))
        sums.add_(torch.stack([(added * update).sum(), update.square().sum(), added.square().sum()]).cpu())

    hooks = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, LoraLayer)]
    model(inputs)
    for hook in hooks:
        hook.remove()
    along, updates, added = sums.tolist()
    straight = updates > 0 and along**2 >= (1 - 1e-9) * updates * added
    return along / updates if straight else None
