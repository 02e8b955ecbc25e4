"""`recipe analyze quantization`: what bitsandbytes' formats lose of real weights, and what they take. Imports torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError, safe_open

from ..base.errors import UserError
from ..configs import models

Weights = list[tuple[str, torch.Tensor]]  # kind of layer and fp32 weight, of any shape
BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
SYNTHETIC = (1000, 512, 0.1)  # rows, columns and standard deviation of the notebook's example


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


def formats() -> list[Format]:
    """The formats that are measured."""
    four_bits = [Format(name, block, double) for name in ("nf4", "fp4") for block in BLOCKS for double in (False, True)]
    return [*four_bits, *(Format("int8", block) for block in BLOCKS), Format("nf4", None)]


def weights_of(folder: Path, layers: int) -> Weights:
    """The linear layers of some decoder layers of a model, evenly spaced over its depth.

    Args:
        folder: a model's folder, with safetensors.
        layers: how many; 0 takes all.

    Raises:
        UserError: the folder holds no such model.
    """
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    try:
        found = [
            (file, name, match) for file in files for name in _names(file) if (match := _layer_of(name)) is not None
        ]
    except SafetensorError as error:
        raise UserError(f"--model {folder}: its safetensors cannot be read: {error}") from None
    if not found:
        raise UserError(f"--model {folder}: no folder with a Llama's weights in safetensors")
    depth = 1 + max(layer for _, _, layer in found)
    chosen = range(depth) if not layers else {round(i * (depth - 1) / max(layers - 1, 1)) for i in range(layers)}
    weights = []
    for file, name, layer in found:
        if layer in chosen:
            with safe_open(file, "pt") as tensors:
                weight = tensors.get_tensor(name)
            if not (weight.is_floating_point() and weight.isfinite().all() and weight.any()):
                raise UserError(
                    f"--model {folder}: {name} holds no weights to measure: quantized before, or no numbers"
                )
            weights.append((name.split(".")[-2], weight.float()))
    return weights


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def _layer_of(name: str) -> int | None:
    """The number of the decoder layer that a linear layer's weight is in; None for any other tensor."""
    parts = name.split(".")
    if len(parts) < 5 or parts[-1] != "weight" or parts[-2] not in models.LINEAR_LAYERS or not parts[-4].isdecimal():
        return None
    return int(parts[-4])


def synthetic(seed: int = 42) -> Weights:
    """A tensor of normally distributed values, as the notebook has it."""
    rows, columns, deviation = SYNTHETIC
    generator = torch.Generator().manual_seed(seed)
    return [("synthetic", torch.randn(rows, columns, generator=generator) * deviation)]


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


def levels(name: str = "nf4") -> list[float]:
    """The 16 values of a 4-bit format, in order."""
    return sorted(bnb.functional.get_4bit_type(name, device="cpu").tolist())


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
    for how in formats():
        sums: dict[str, list[float]] = {}
        for kind, weight in weights:
            back, bits = stored(weight, how)
            error, power = ((back - weight) ** 2).sum().item(), (weight**2).sum().item()
            for of in (kind, "all"):
                total = sums.setdefault(of, [0.0, 0.0, 0.0, 0.0])
                for i, value in enumerate((error, power, bits, weight.numel())):
                    total[i] += value
        sums["all"] = sums.pop("all")  # last
        for kind, (error, power, bits, count) in sums.items():
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


def by_layer(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each kind of layer the relative error of the recipes' format, NF4 in doubly quantized blocks of 64."""
    for row in rows:
        if (row["format"], row["block"], row["double"]) == ("nf4", 64, True):
            yield {
                "layer": row["layer"],
                "parameters": f"{row['parameters']:,}",
                "relative error": f"{row['relative_error']:.5f}",
                "signal to noise dB": f"{row['snr_db']:.2f}",
            }


def draw(weights: Weights, rows: list[dict[str, Any]], file: Path) -> None:
    """Four panels: weights before and after NF4, its levels, its error beside one scale's, memory by format.

    Args:
        file: where to, as .png or .svg.
    """
    from matplotlib.figure import Figure

    kind, weight = max(weights, key=lambda named: named[1].numel())
    back, _ = stored(weight, Format("nf4", 64, True))
    one_scale, _ = stored(weight, Format("nf4", None))
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (before, of_levels), (errors, memory) = figure.subplots(2, 2)
    edge = 4 * weight.std().item()
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
    shown = [(row["format"], row["block"], row["double"]) for row in rows]
    bits = {"fp32": 32.0, "fp16": 16.0} | {
        f"{name}, {block}{', double' if double else ''}": rows[shown.index((name, block, double))]["bits"]
        for name, block, double in (("int8", 4096, False), ("nf4", 64, False), ("nf4", 64, True))
    }
    bars = memory.barh(list(bits), list(bits.values()))
    memory.bar_label(bars, fmt="%.3g", padding=3)
    memory.set(title="Memory", xlabel="bits a parameter", xlim=(0, 37))
    memory.invert_yaxis()
    figure.savefig(file)
