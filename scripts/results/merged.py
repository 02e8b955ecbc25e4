"""A check that a merged model has the adapter's change in its weights."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from ..base.errors import WorkFailed
from ..base.files import tensor_shapes
from ..base.progress import say
from ..scores.evaluations import ADAPTER

Shards = dict[str, tuple[Path, list[int]]]
"""The tensors of a folder by name: their file and shape."""
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

    def read(shards: Shards, name: str) -> torch.Tensor:
        with safe_open(shards[name][0], "pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor.float()

    suffix = ".lora_A.weight"
    changes, after = _shards(adapter), _shards(merged)
    layers = sorted(name.removesuffix(suffix) for name in changes if name.endswith(suffix))
    weights = {layer: f"{layer.removeprefix('base_model.model.')}.weight" for layer in layers}
    missing = [weight for weight in weights.values() if weight not in after and "experts" not in weight]
    if missing and len(missing) < len(weights):  # all are where a checkpoint calls its layers otherwise than the model
        raise WorkFailed(f"{merged}: {missing[0]} is a layer of the adapter and not of the model; it was not merged")
    before = _shards(base()) if layers else {}
    along = variance = 0.0
    for layer, weight in islice(((layer, weight) for layer, weight in weights.items() if weight in before), _LAYERS):
        a, b = read(changes, f"{layer}{suffix}"), read(changes, f"{layer}.lora_B.weight")
        shapes = before[weight][1], after.get(weight, (None, []))[1]
        if shapes != ([len(b), a.shape[-1]],) * 2:  # packed in the base, transposed, or of a convolution
            continue
        delta = b @ a
        change = read(after, weight) - read(before, weight)
        along += (change * delta).sum().item()
        variance += (change.square().mean() * delta.square().sum()).item()
    if not variance:
        say(f"{merged}: not compared with its base, whose weights are in another form")
    elif along <= _SURE * variance**0.5:
        raise WorkFailed(f"{merged}: its weights lack the adapter's change; evaluate the adapter itself instead")


def _shards(folder: Path) -> Shards:
    files = [folder / ADAPTER] if (folder / ADAPTER).is_file() else folder.glob("*.safetensors")
    return {name: (file, shape) for file in files for name, shape in (tensor_shapes(file) or {}).items()}
