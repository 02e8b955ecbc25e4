"""`recipe analyze`: parameters that LoRA trains, and what bitsandbytes' formats lose of real weights. Imports torch."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from textwrap import shorten
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from ..base.errors import UserError
from ..base.files import tensor_shapes
from .layers import alike, having

RANKS = (4, 8, 16, 32, 64, 128)
SPARE = ("r 128", "r 4", "r 64", "r 16", "r 8")  # columns that a narrow table leaves out
Weights = list[tuple[str, torch.Tensor]]  # kind of layer and fp32 weight, of any shape
BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)


def lora(architectures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Trainable parameters and their share of all, for each model, set of layers and rank.

    LoRA's matrices have rank x inputs and outputs x rank values (arXiv 2106.09685).

    Args:
        architectures: the content of each model's config.json, by its name.

    Raises:
        UserError: transformers or PEFT cannot build a model.
    """
    found = []
    for name, architecture in architectures.items():
        counted = counted_parameters(architecture)
        total = counted.pop("total")
        for (label, layers), rank in product(_sets(list(counted)).items(), RANKS):
            trained = rank * sum(counted[layer] for layer in layers)
            share = trained / (trained + total)
            found.append({"model": name, "layers": label, "rank": rank, "trainable": trained, "share": share})
    return found


def lora_table(counts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model and set of layers, a column for each rank."""
    return [
        {"model": model, "layers": layers}
        | {f"r {row['rank']}": f"{row['trainable']:,} ({row['share']:.2%})" for row in line}
        for (model, layers), line in groupby(counts, itemgetter("model", "layers"))
    ]


def _sets(layers: list[str]) -> dict[str, list[str]]:
    """Sets of a model's linear layers: those that make queries and values, all of attention, all.

    Where one layer makes queries, keys and values, as Phi-3's qkv_proj does, it is the first set, which has its name.
    """
    of_attention = [layer for layer in layers if "attn" in layer or "attention" in layer]
    ends = {layer: layer.rpartition(".")[2] for layer in layers}
    queries = {"q, v": [layer for layer in of_attention if ends[layer] in ("q_proj", "v_proj")]}
    if not queries["q, v"]:
        queries = {ends[layer]: [layer] for layer in of_attention if "qkv" in layer or "query_key_value" in layer}
    return {label: of for label, of in (queries | {"attention": of_attention, "all linear": layers}).items() if of}


def counted_parameters(architecture: dict[str, Any]) -> dict[str, int]:
    """Under `total` all parameters of a model, and what LoRA of rank 1 trains on each kind of linear layer.

    Where layers are alike, they are counted in models of one and two; each more adds as much.

    Raises:
        UserError: transformers or PEFT cannot build the model.
    """
    try:
        if (number := alike(architecture)) <= 2:
            return _count(architecture)
        one, two = (_count(having(architecture, n)) for n in (1, 2))
    except Exception as error:  # any model's code runs in it
        problem = shorten(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"base_model: its parameters cannot be counted: {problem}") from None
    return {key: one[key] + (number - 1) * (two[key] - one[key]) for key in two}


def _count(architecture: dict[str, Any]) -> dict[str, int]:
    """The same, of the whole model as transformers builds it and PEFT adapts it, on torch's meta device, which stores
    no values."""
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"), no_init_weights():
        model = auto.from_config(AutoConfig.for_model(**architecture))
        model.tie_weights()
        counts = Counter({"total": model.num_parameters()})
        model = get_peft_model(model, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = name.partition(".lora_")[0].split(".")
            counts[".".join(layer[-2:])] += parameter.numel()
    return dict(counts)


@dataclass(frozen=True)
class Format:
    """A way to store weights.

    Attributes:
        name: nf4, fp4 or int8 (bitsandbytes' dynamic 8 bits).
        block: how many values share a constant.
        double: whether the constants are quantized too: to 8 bits, in blocks of 256.
    """

    name: str
    block: int
    double: bool = False


FORMATS = (
    *(Format(name, block, double) for name in ("nf4", "fp4") for block in BLOCKS for double in (False, True)),
    *(Format("int8", block) for block in BLOCKS),
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
                    "block": how.block,
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


def quantization_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
