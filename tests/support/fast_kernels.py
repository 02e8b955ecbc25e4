"""The kernels that the profile fast turns on, run by Triton's interpreter on a CPU, beside what they take the place of.

Run with a small Llama's folder; writes as JSON, for each comparison, the largest difference as a share of the largest
value.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
import triton.language as tl
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches, patch_self_attn_lora
from axolotl.utils.dict import DictDefault
from liger_kernel.ops import rms_norm
from liger_kernel.transformers import apply_liger_kernel_to_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


def as_on_a_gpu(converted: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """How the interpreter passes an argument to a kernel: also numbers with a point, which a GPU gets in fp32."""

    def convert(argument: Any) -> Any:
        if isinstance(argument, float):
            import numpy

            return tl.tensor(TensorHandle(numpy.array([argument], dtype=numpy.float32), tl.float32), tl.float32)
        return converted(argument)

    return convert


def on_the_cpu(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.empty where Axolotl's kernels ask for CUDA's memory."""

    def make(*shape: Any, **options: Any) -> torch.Tensor:
        return empty(*shape, **{key: value for key, value in options.items() if (key, value) != ("device", "cuda")})

    return make


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def small_model(folder: Path, **lora: Any) -> Any:
    """A 4-bit Llama with adapters that are not zero, the same each time."""
    torch.manual_seed(1)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    auto: Any = AutoModelForCausalLM
    base = auto.from_pretrained(folder, dtype=torch.float32, quantization_config=how, attn_implementation="sdpa")
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False, **lora))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.train()


def trained(model: Any) -> dict[str, torch.Tensor]:
    """The loss of a batch, and the gradients of the adapters."""
    torch.manual_seed(2)
    ids = torch.randint(3, model.config.vocab_size, (2, 17))
    loss = model(input_ids=ids, labels=ids.masked_fill(ids % 5 == 0, -100), num_items_in_batch=20).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": loss.detach()[None], **gradients}


def compared(folder: Path) -> Iterator[tuple[str, float]]:
    """A training step of a Llama in NF4: with the LoRA kernels, then with Liger's too, beside PEFT's and transformers'
    own. With dropout it is another step, so that a fitted profile leaves the LoRA kernels out."""
    variants: dict[str, dict[str, Any]] = {
        "LoRA kernels": {},
        "LoRA kernels, with DoRA": {"use_dora": True},
        "LoRA kernels, with rsLoRA": {"use_rslora": True},
        "LoRA kernels, with dropout": {"lora_dropout": 0.1},
    }
    plain = {name: trained(small_model(folder, **options)) for name, options in variants.items()}
    kernels = DictDefault(base_model=str(folder), lora_qkv_kernel=True, lora_o_kernel=True, lora_mlp_kernel=True)
    patch_self_attn_lora(kernels)

    def compare(name: str, options: dict[str, Any], expected: dict[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
        found = trained(apply_lora_kernel_patches(small_model(folder, **options), kernels))
        assert found.keys() == expected.keys()
        yield f"{name}: loss", apart(found["loss"], expected["loss"])
        yield f"{name}: gradients", max(apart(found[key], expected[key]) for key in expected)

    for name, options in variants.items():
        yield from compare(name, options, plain[name])
    apply_liger_kernel_to_llama(rms_norm=True, swiglu=True, rope=True, fused_linear_cross_entropy=True)
    norm = type(small_model(folder).base_model.model.model.norm)
    assert norm.__module__.startswith("liger_kernel"), norm
    yield from compare("all that is fast", {}, plain["LoRA kernels"])


if __name__ == "__main__":
    torch.manual_seed(0)
    with (
        patch.object(interpreter, "_implicit_cvt", as_on_a_gpu(interpreter._implicit_cvt)),
        patch.object(torch, "empty", on_the_cpu(torch.empty)),
        patch.object(rms_norm, "rsqrt", lambda x: tl.rsqrt(x)),  # libdevice's, which the interpreter does not have
    ):
        print(json.dumps(dict(compared(Path(sys.argv[1])))))
