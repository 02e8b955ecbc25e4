"""`recipe analyze quantization`: what bitsandbytes' formats lose of real weights, and what they take. Imports torch."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from safetensors import safe_open

from ..base.errors import UserError
from ..base.files import tensor_shapes
from .plan_tables import drawing

Weights = list[tuple[str, torch.Tensor]]  # kind of layer and fp32 weight, of any shape
BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Format:
    """A way to store weights.

    Attributes:
        name: nf4, fp4, int8 (bitsandbytes' dynamic 8 bits), or nf4 with one scale for a whole tensor.
        block: how many values share a constant; None is all of a tensor.
        double: whether the constants are quantized too: to 8 bits, in blocks of 256.
    """

    name: str
    block: int | None
    double: bool = False


FORMATS = (
    *(Format(name, block, double) for name in ("nf4", "fp4") for block in BLOCKS for double in (False, True)),
    *(Format("int8", block) for block in BLOCKS),
    Format("nf4", None),
)


def weights_of(folder: Path, layers: int) -> Weights:
    """The linear layers of some decoder layers of a model, evenly spaced over its depth.

    Args:
        folder: a model's folder, with safetensors.
        layers: how many; 0 takes all.

    Raises:
        UserError: the folder holds no such model.
    """
    layers_at = []
    for file in sorted(folder.glob("*.safetensors")):
        shapes = tensor_shapes(file)
        if shapes is None:
            raise UserError(f"--model {folder}: {file.name} cannot be read: damaged, or not safetensors")
        found = ((_IN_A_LAYER.match(name), shape) for name, shape in shapes.items())
        layers_at += [(file, layer) for layer, shape in found if layer and len(shape) == 2]
    if not layers_at:
        raise UserError(f"--model {folder}: no folder with a model's decoder layers in safetensors")
    last = max(int(layer["number"]) for _, layer in layers_at)
    chosen = {round(i * last / max(layers - 1, 1)) for i in range(layers)} or range(last + 1)
    weights = []
    for file, layer in layers_at:
        if int(layer["number"]) in chosen:
            weight = safe_open(file, "pt").get_tensor(layer.string)
            if not (weight.is_floating_point() and weight.isfinite().all() and weight.any()):
                problem = "holds no weights to measure: quantized before, or not numbers"
                raise UserError(f"--model {folder}: {layer.string} {problem}")
            weights.append((layer["kind"], weight.float()))
    return weights


_IN_A_LAYER = re.compile(r"(?!.*vision).*?\.(?P<number>\d+)\..*?(?P<kind>\w+)\.weight$")
"""The name of a weight in a decoder layer of that number; with two dimensions it is a linear layer's."""


def synthetic() -> Weights:
    """A tensor of normally distributed values, of the notebook's size and standard deviation."""
    generator = torch.Generator().manual_seed(42)
    return [("synthetic", torch.randn(1000, 512, generator=generator) * 0.1)]


def stored(weight: torch.Tensor, how: Format) -> tuple[torch.Tensor, int]:
    """A weight as it comes back from a format, and the bits that it takes there, constants counted.

    Tables of a format's own, which all tensors share, are not counted.
    """
    if how.block is None:
        return _with_one_scale(weight), 4 * weight.numel() + 32
    # Flat, which makes the same blocks: bitsandbytes 0.50's kernel for the CPU reads a matrix back wrongly where a row
    # is no multiple of the block.
    flat = weight.flatten()
    if how.name == "int8":
        packed, state = bnb.functional.quantize_blockwise(flat, blocksize=how.block)
        back = bnb.functional.dequantize_blockwise(packed, state)
        return back.view_as(weight), 8 * (packed.nbytes + state.absmax.nbytes)
    packed, state = bnb.functional.quantize_4bit(
        flat, blocksize=how.block, compress_statistics=how.double, quant_type=how.name
    )
    size = packed.nbytes + state.absmax.nbytes
    if how.double:
        size += state.state2.absmax.nbytes + state.offset.nbytes
    return bnb.functional.dequantize_4bit(packed, state).view_as(weight), 8 * size


def levels() -> list[float]:
    """The 16 values of NF4, in order."""
    return sorted(bnb.functional.get_4bit_type("nf4", device="cpu").tolist())


def _with_one_scale(weight: torch.Tensor) -> torch.Tensor:
    """The nearest of NF4's levels, scaled by the largest value of the whole tensor."""
    values = torch.tensor(levels())
    scale = weight.abs().max()
    nearest = torch.bucketize(weight / scale, (values[1:] + values[:-1]) / 2)
    return values[nearest] * scale


def measure(weights: Weights) -> list[dict[str, Any]]:
    """For each format, and in it for each kind of layer and for all: error, and bits a parameter.

    mse is the mean squared error, relative_error that over the weights' mean square, snr_db its inverse in decibels.
    """
    rows = []
    for how in FORMATS:
        sums: dict[str, Any] = {kind: np.zeros(4) for kind in (*dict(weights), "all")}
        for kind, weight in weights:
            back, bits = stored(weight, how)
            losses = (((back - weight) ** 2).sum().item(), (weight**2).sum().item(), bits, weight.numel())
            sums[kind] += losses
            sums["all"] += losses
        for kind, of_kind in sums.items():
            error, power, bits, count = of_kind.tolist()
            rows.append(
                {
                    "format": how.name,
                    "block": how.block or "tensor",
                    "double": how.double,
                    "layer": kind,
                    "bits": bits / count,
                    "mse": error / count,
                    "relative_error": error / power,
                    "snr_db": 10 * math.log10(power / error),
                    "parameters": int(count),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows over all layers, as a table shows them."""
    return [
        {
            "format": f"{row['format']}{' + double' if row['double'] else ''}",
            "block": str(row["block"]),
            "bits a parameter": f"{row['bits']:.3f}",
            "mse": f"{row['mse']:.3e}",
            "relative error": f"{row['relative_error']:.5f}",
            "signal to noise dB": f"{row['snr_db']:.2f}",
        }
        for row in rows
        if row["layer"] == "all"
    ]


def by_layer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kind of layer the relative error of the recipes' format, NF4 in doubly quantized blocks of 64."""
    return [
        {
            "layer": row["layer"],
            "parameters": f"{row['parameters']:,}",
            "relative error": f"{row['relative_error']:.5f}",
            "signal to noise dB": f"{row['snr_db']:.2f}",
        }
        for row in rows
        if (row["format"], row["block"], row["double"]) == ("nf4", 64, True)
    ]


def draw(weights: Weights, rows: list[dict[str, Any]], file: Path) -> None:
    """Four panels: weights before and after NF4, its levels, its error beside one scale's, memory by format.

    Args:
        file: where to, as .png or .svg.
    """
    kind, weight = max(weights, key=lambda named: named[1].numel())
    back, _ = stored(weight, Format("nf4", 64, True))
    one_scale, _ = stored(weight, Format("nf4", None))
    edge = 4 * weight.std().item()
    bits = {(row["format"], row["block"], row["double"]): row["bits"] for row in rows}
    bars = {
        "fp32": 32.0,
        "fp16": 16.0,
        "int8, 4096": bits["int8", 4096, False],
        "nf4, 64": bits["nf4", 64, False],
        "nf4, 64, double": bits["nf4", 64, True],
    }
    with drawing(file, (11, 7.5), panels=2) as ((before, of_levels), (errors, memory)):
        for values, name in ((weight, "before"), (back, "after NF4, blocks of 64"), (one_scale, "after one scale")):
            before.hist(values.flatten().numpy(), bins=120, range=(-edge, edge), histtype="step", label=name)
        before.set(title=f"Weights of a {kind}", xlabel="value", ylabel="count", yscale="log")
        before.legend()
        of_levels.stem(range(16), levels())
        of_levels.set(title="The 16 levels of NF4", xlabel="code", ylabel="value, as a share of the block's largest")
        for values, name in ((back, "blocks of 64"), (one_scale, "one scale")):
            error = ((values - weight) / weight.std()).flatten().numpy()
            errors.hist(error, bins=120, range=(-1, 1), histtype="step", density=True, label=name)
        errors.set(title="Error of NF4", xlabel="error, in standard deviations of the weights", ylabel="density")
        errors.legend()
        memory.bar_label(memory.barh(list(bars), list(bars.values())), fmt="%.3g", padding=3)
        memory.set(title="Memory", xlabel="bits a parameter", xlim=(0, 37))
        memory.invert_yaxis()
