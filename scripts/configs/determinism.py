"""What makes a training repeat bit for bit, and whether it holds in the process that trains.

Axolotl's key full_determinism does all of it but one thing: before the model is loaded, and again in its trainer,
transformers' enable_full_determinism seeds every generator, has torch take deterministic algorithms or raise an error
where there is none, fixes the workspaces of cuBLAS, turns off cuDNN's search for the fastest kernel, and has
FlashAttention take its deterministic backward pass. torch's SDPA kernels, NCCL's reductions and what torch.compile
generates heed the same switch of torch. The one thing is the order of Python's sets of names, such as that of PEFT's
target_modules in adapter_config.json, which a process fixes only as it starts.

bitsandbytes has no such switch and does not need one for QLoRA: its kernels for 4-bit weights and for AdamW treat each
element, or each block, by itself. Its LAMB and LARS add up norms in no fixed order.
"""

import os
import sys
from typing import Any

from ..base.yamlfiles import Config

KEY = "full_determinism"
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""What the process has to be started with."""
_HELD: dict[str, tuple[object, ...]] = {
    "torch deterministic algorithms": (True,),
    "torch only warns where there is none": (False,),
    "torch inductor deterministic": (True,),
    "cudnn deterministic": (True,),
    "cudnn benchmark": (False,),
    "CUBLAS_WORKSPACE_CONFIG": (":16:8", ":4096:8"),  # the two that NVIDIA calls deterministic
    "FLASH_ATTENTION_DETERMINISTIC": ("1",),
    "order of sets is random": (False,),
}


def environment(config: Config) -> dict[str, str]:
    """The environment variables that the process of a config's training needs; none where it need not repeat."""
    return ENVIRONMENT if config.get(KEY) else {}


def in_force() -> dict[str, Any]:
    """The settings of this process, which trains, by name.

    Raises:
        RuntimeError: one of them is not as a repeatable training needs it.
    """
    import torch
    from torch._inductor import config as inductor

    found: dict[str, Any] = {
        "torch deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch only warns where there is none": torch.is_deterministic_algorithms_warn_only_enabled(),
        "torch inductor deterministic": inductor.deterministic,
        "cudnn deterministic": torch.backends.cudnn.deterministic,
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "FLASH_ATTENTION_DETERMINISTIC": os.environ.get("FLASH_ATTENTION_DETERMINISTIC"),
        "order of sets is random": bool(sys.flags.hash_randomization),
    }
    for name, value in found.items():
        if value not in _HELD[name]:
            raise RuntimeError(f"asked for a training that repeats bit for bit, but {name}: {value}")
    return found
