"""A check that packed 4-bit weights reach the first forward pass as they were loaded.

An engine that casts parameters to the dtype of the training takes packed codes for numbers, without an error.
"""

import hashlib
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit

LAYERS = 3  # so many, from the first to the last, are compared


def codes(layer: Linear4bit) -> str:
    """Hash of a layer's packed bytes."""
    packed = layer.weight.detach().clone()  # numpy would keep an engine from freeing the original
    return hashlib.sha256(packed.view(torch.uint8).cpu().numpy()).hexdigest()


class PackedWeights:
    """Packed bytes of a few 4-bit layers of a model that was just loaded.

    Layers whose weights an engine has divided already are left out.
    """

    def __init__(self, model: torch.nn.Module):
        layers = [each for each in model.named_modules() if isinstance(each[1], Linear4bit) and each[1].weight.numel()]
        chosen = layers[:: max(-(-len(layers) // LAYERS), 1)]
        self.layers = [(name, layer, codes(layer)) for name, layer in chosen]

    def compare_in_first_pass(self) -> None:
        """Compare each layer in its next pass, after the hooks by which an engine gathers its weights.

        Raises:
            RuntimeError: in that pass, if bytes differ.
        """
        for name, layer, loaded in self.layers:
            _compare(name, layer, loaded)


def _compare(name: str, layer: Linear4bit, loaded: str) -> None:
    def compare(*_: Any) -> None:
        hook.remove()
        if codes(layer) != loaded:
            raise RuntimeError(
                f"{name}: its packed 4-bit weights were cast to {layer.weight.dtype}, which destroys them; "
                "set bnb_config_kwargs.bnb_4bit_quant_storage: uint8, which no engine casts"
            )

    hook = layer.register_forward_pre_hook(compare)
