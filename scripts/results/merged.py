"""A check that a merged model has the adapter's change in its weights."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from ..base.errors import WorkFailed
from ..base.files import read_json, tensor_shapes
from ..scores.evaluations import ADAPTER

_LAYERS = 16  # are compared; names are of all
_SURE = 6  # standard deviations


def require_applied(base: Callable[[], Path], adapter: Path, merged: Path) -> None:
    """Refuse a merged model without the change that its adapter makes.

    Axolotl rounds a base of QLoRA to NF4 as it merges, so merged weights differ from the base's in any case. Their
    difference is therefore compared along the adapter's own change, to which that rounding has no relation.

    Args:
        base: finds the folder of the base model.
        adapter: the folder of the adapter, of LoRA's kind; others are not compared.
        merged: the folder of both.

    Raises:
        WorkFailed: a layer of the adapter is not in the model, or the change is not there.
    """
    import torch
    from safetensors import safe_open

    def read(shards: dict[str, Path], name: str) -> torch.Tensor:
        with safe_open(shards[name], "pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor.float()

    suffix = ".lora_A.weight"
    changes, after = _shards(adapter), _shards(merged)
    layers = sorted(name.removesuffix(suffix) for name in changes if name.endswith(suffix))
    weights = {layer: f"{layer.removeprefix('base_model.model.')}.weight" for layer in layers}
    for weight in weights.values():
        if weight not in after and "experts" not in weight:  # which checkpoints and models call otherwise
            raise WorkFailed(f"{merged}: {weight} is a layer of the adapter and not of the model; it was not merged")
    if not layers:
        return
    before = _shards(base())
    along = variance = 0.0
    for layer, weight in islice(((layer, weight) for layer, weight in weights.items() if weight in before), _LAYERS):
        delta = read(changes, f"{layer}.lora_B.weight") @ read(changes, f"{layer}{suffix}")
        if read_json(adapter / "adapter_config.json").get("fan_in_fan_out"):
            delta = delta.T
        change = read(after, weight) - read(before, weight)
        along += (change * delta).sum().item()
        variance += (change.square().mean() * delta.square().sum()).item()
    if along <= _SURE * variance**0.5:
        raise WorkFailed(f"{merged}: its weights lack the adapter's change; evaluate the adapter itself instead")


def _shards(folder: Path) -> dict[str, Path]:
    """Files of a folder by the names of the tensors in them."""
    files = [folder / ADAPTER] if (folder / ADAPTER).is_file() else folder.glob("*.safetensors")
    return {name: file for file in files for name in tensor_shapes(file) or {}}
