"""Training with several processes (ranks): CPU setup, communication, and a check of 4-bit weights.

The check compares packed weights in the first forward pass with the loaded weights. An engine that casts parameters to
the training dtype treats packed codes as numbers, without an error.
"""

import hashlib
import os
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn.modules import Linear4bit

LAYERS = 3  # maximum number of compared layers, spread over the model
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # number of ranks, set by the launcher


def use_cpu(engine: str) -> None:
    """Make Axolotl and accelerate train with an engine on the CPU, communicating over gloo.

    By default, Axolotl queries the GPU driver and gives each rank a GPU. On a CPU, accelerate supports only DDP and
    silently ignores DeepSpeed and FSDP (AcceleratorState). For these two, the patches make accelerate assume GPUs, with
    gloo as the communication backend and the CPU as the device.
    """
    import axolotl.utils.trainer
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from axolotl.loaders.model import ModelLoader

    axolotl.utils.trainer.check_cuda_p2p_ib_support = lambda: True
    if engine == "DDP":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    else:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
        build_mesh = ParallelismConfig.build_device_mesh
        ParallelismConfig.build_device_mesh = lambda config, _: build_mesh(config, "cpu")
    set_device_map = ModelLoader._set_device_map_config

    def set_cpu_device_map(loader: Any) -> None:
        set_device_map(loader)
        if "device_map" in loader.model_kwargs:
            loader.model_kwargs["device_map"] = {"": "cpu"}

    ModelLoader._set_device_map_config = set_cpu_device_map
    if engine.startswith("ZeRO"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes most of a minute


def engine_in_use(trainer: Any) -> str:
    """Name of the active engine, as in `gpus.engine_of`, or "one process"."""
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from torch.distributed.tensor import DTensor

    model = trainer.model_wrapped
    if isinstance(model, DeepSpeedEngine):
        if isinstance(model.optimizer, DeepSpeedZeroOptimizer_Stage3):
            return "ZeRO-3"
        if isinstance(model.optimizer, DeepSpeedZeroOptimizer):
            return "ZeRO-2" if model.optimizer.partition_gradients else "ZeRO-1"
        return "DDP"
    if all(isinstance(weight, DTensor) for weight in model.parameters()):
        return "FSDP"
    return "DDP" if isinstance(model, torch.nn.parallel.DistributedDataParallel) else "one process"


def check_engine(asked: str, trainer: Any) -> None:
    """Stop training if Axolotl silently uses another engine or number of ranks than requested.

    Raises:
        RuntimeError: the engine or the number of ranks differs.
    """
    used = engine_in_use(trainer)
    among = trainer.accelerator.num_processes
    if (used, among) != (asked, WORLD_SIZE):
        raise RuntimeError(f"requested {asked} on {WORLD_SIZE} processes, but Axolotl uses {used} on {among}")


def of_all(value: float, device: torch.device) -> list[float]:
    """Values of all ranks in rank order, gathered on each rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    mine = torch.tensor([value], dtype=torch.float64, device=device)
    gathered = [mine.clone() for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return [float(number) for number in gathered]


def codes(layer: Linear4bit) -> str:
    """Hash of a layer's packed bytes."""
    packed = layer.weight.detach().clone()  # a numpy view would keep an engine from freeing the original
    return hashlib.sha256(packed.view(torch.uint8).cpu().numpy()).hexdigest()


class PackedWeights:
    """Hashes of a few packed 4-bit layers of a newly loaded model.

    Layers that an engine has already sharded are left out.
    """

    def __init__(self, model: torch.nn.Module):
        layers = [each for each in model.named_modules() if isinstance(each[1], Linear4bit) and each[1].weight.numel()]
        chosen = layers[:: max(-(-len(layers) // LAYERS), 1)]
        self.layers = [(name, layer, codes(layer)) for name, layer in chosen]

    def compare_in_first_pass(self) -> None:
        """Compare each layer in the next forward pass, once an engine's hooks have gathered its weights.

        Raises:
            RuntimeError: in the forward pass, if bytes differ.
        """
        for name, layer, loaded in self.layers:
            _compare(name, layer, loaded)


def _compare(name: str, layer: Linear4bit, loaded: str) -> None:
    def compare(*_: Any) -> None:
        hook.remove()
        if codes(layer) != loaded:
            raise RuntimeError(
                f"{name}: its packed 4-bit weights were cast to {layer.weight.dtype}, which destroys them; "
                "set bnb_config_kwargs.bnb_4bit_quant_storage: uint8, which engines do not cast"
            )

    hook = layer.register_forward_pre_hook(compare)
