"""Merged weights with and without their adapter's change, beside a base that a merge rounds to NF4."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file

from qlora_recipes.base.errors import WorkFailed
from qlora_recipes.results.merged import require_applied
from qlora_recipes.scores.evaluations import ADAPTER

LAYER = "model.layers.0.self_attn.q_proj"


def save(folder: Path, file: str, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / file)
    return folder


@pytest.mark.parametrize(
    ("scale", "names", "in_base", "applied"),
    [
        (0.5, [LAYER], LAYER, True),
        (0.0, [LAYER], LAYER, False),
        (0.5, [LAYER, "other"], LAYER, False),
        (0.5, ["as.the.model.calls.it"], LAYER, True),
        (0.5, [LAYER], "in.another.form", True),
    ],
)
def test_a_merge_has_the_adapters_change(
    tmp_path: Path, scale: float, names: list[str], in_base: str, applied: bool
) -> None:
    torch.manual_seed(0)
    weight, a, b = 0.05 * torch.randn(128, 64), 0.1 * torch.randn(8, 64), 0.02 * torch.randn(128, 8)
    rounded = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
    base = save(tmp_path / "base", "model.safetensors", {f"{in_base}.weight": weight})
    both = {"A": a, "B": b}
    tensors = {f"base_model.model.{name}.lora_{each}.weight": both[each].clone() for name in names for each in both}
    adapter = save(tmp_path / "adapter", ADAPTER, tensors)
    merged = save(tmp_path / "merged", "model.safetensors", {f"{LAYER}.weight": rounded + scale * b @ a})
    if applied:
        require_applied(lambda: base, adapter, merged)
    else:
        with pytest.raises(WorkFailed):
            require_applied(lambda: base, adapter, merged)
