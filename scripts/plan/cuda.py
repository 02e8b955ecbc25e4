"""GPU-only memory of a training step: scratch memory of kernels, and storages of CUDA-specific operations."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .allocator import Events


class Recorder(TorchDispatchMode):
    """Dispatch mode that records storages when torch operations make them and when they are freed.

    Attributes:
        cuda: also record scratch memory inside CUDA kernels, which no tensor shows.
        events: new and freed storages, in order.
        kinds: kind of content by storage id.
        kind: kind assigned to new storages.
        vocabulary: vocabulary size; a tensor is logits if its last dimension has this size.
        storages: number of storages recorded.
        paged: bytes of optimizer state that can leave the GPU.
    """

    def __init__(self, cuda: bool = False) -> None:
        super().__init__()
        self.cuda = cuda
        self.events: Events = []
        self.kinds: dict[int, str] = {}
        self.kind = "activations"
        self.vocabulary: int | None = None
        self.storages = 0
        self.paged = 0
        self._live: dict[int, int] = {}

    def add(self, tensor: torch.Tensor, kind: str) -> None:
        """Assign a kind to a tensor's storage, and record the storage if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            self.kinds[self._live[key]] = kind
        elif storage.nbytes():
            self._live[key] = self.new_storage(storage.nbytes(), kind)
            weakref.finalize(storage, self._freed, key)

    def new_storage(self, size: int, kind: str) -> int:
        """Record a new storage and return its id."""
        self.storages += 1
        self.kinds[self.storages] = kind
        self.events.append((self.storages, size))
        return self.storages

    def _freed(self, key: int) -> None:
        self.events.append((self._live.pop(key), -1))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = getattr(function, "_opname", "") if self.cuda else ""
        if operation in _BEFORE:
            self._scratch(_BEFORE[operation](args))
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self._live:
                self.add(value, "logits" if value.shape[-1:] == (self.vocabulary,) else self.kind)
        if operation in _AFTER:
            self._scratch(_AFTER[operation](args))
        return result

    def _scratch(self, size: int) -> None:
        self.events.append((self.new_storage(size, "kernel workspaces"), -1))


def _dequantized(args: Any) -> int:
    """Bytes of the dequantized weight and, if the constants are quantized, two fp32 copies of them.

    Source: bitsandbytes/backends/cuda/ops.py, _dequant_linear_fallback. The fallback runs for more than 1,536 tokens;
    for up to 1,536 tokens, a kernel may need none of this memory.
    """
    inputs, _, shape, constants, block = args[:5]
    size = math.prod(shape)
    nested = constants.numel() * block < size  # `constants` are then those of the second level
    return size * inputs.element_size() + (2 * size // block * 4 if nested else 0)


def _attention_backward(args: Any) -> int:
    """Bytes of row sums and fp32 accumulators in the backward pass of efficient attention.

    fp32 inputs need no accumulators. Other inputs need one for dq, and also for dk and dv if heads are wider than 64.
    Source: aten/src/ATen/native/transformers/cuda/attention_backward.cu
    """
    query = args[1]
    sums = query.shape[:-1].numel() * 4
    if query.dtype == torch.float32:
        return sums
    accumulators = 3 if query.shape[-1] > 64 else 1
    return sums + 4 * query.numel() * accumulators


# Functions from a kernel's arguments to its scratch bytes, allocated before or after the kernel's result.
_BEFORE: dict[str, Callable[[Any], int]] = {
    "gemm_4bit": _dequantized,
    # the product in int32, and in fp16 (bitsandbytes/backends/cuda/ops.py, int8_mm_dequant)
    "int8_scaled_mm": lambda args: args[0].shape[:-1].numel() * args[1].shape[0] * (4 + 2),
}
_AFTER: dict[str, Callable[[Any], int]] = {
    # grad * output (aten/src/ATen/native/cuda/SoftMax.cu)
    "_softmax_backward_data": lambda args: args[0].nbytes,
    # sorted indices and similar buffers (aten/src/ATen/native/cuda/Embedding.cu)
    "embedding_dense_backward": lambda args: args[1].numel() * 8 * 4,
    "_scaled_dot_product_efficient_attention_backward": _attention_backward,
}


def cuda_attention(
    capability: tuple[int, int],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention with the kernel that torch chooses on CUDA: FlashAttention or memory-efficient."""
    aten = torch.ops.aten
    if capability >= (8, 0) and attn_mask is None and query.dtype != torch.float32:
        outputs = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
        return outputs[0]
    groups = query.size(-3) // key.size(-3)
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=-3) for part in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask, 0)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.size(-2))
    outputs = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )
    return outputs[0]


def cuda_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """CUDA dropout, which stores its mask as bytes instead of in the input's dtype."""
    return torch.native_dropout(input, p, True)[0] if training and p else input


def cuda_softmax(input: torch.Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> torch.Tensor:
    """CUDA softmax, whose kernel converts only fp16 inputs to fp32 (aten/src/ATen/native/cuda/SoftMax.cu)."""
    if dtype == torch.float32 and input.dtype == torch.float16:
        return torch.ops.aten._softmax(input, dim, True)
    return input.softmax(dim, dtype=dtype)
