"""Training with several processes (ranks): CPU setup, communication, and a check of the engine."""

import os
from typing import Any

import torch
import torch.distributed as dist

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # number of ranks, set by the launcher


def use_cpu(engine: str) -> None:
    """Make Axolotl and accelerate train with an engine on the CPU, communicating over gloo.

    By default, Axolotl queries the GPU driver and gives each rank a GPU. On a CPU, accelerate supports only DDP and
    silently ignores DeepSpeed and FSDP (AcceleratorState). For these two, this function makes accelerate assume GPUs,
    with gloo as the communication backend and the CPU as the device.
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
