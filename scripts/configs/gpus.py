"""The GPUs that a recipe can be checked and planned for, and the engines that divide a training among several."""

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..base import machine, yamlfiles
from ..base.errors import UserError, meant
from ..base.files import read_json
from ..base.yamlfiles import Config
from .config import flatten, merge

ENGINE_KEYS = ("deepspeed", "fsdp_version", "fsdp_config")  # of a config
CPU_RANKS = "QLORA_RECIPES_CPU_RANKS"  # the environment variable that makes several processes train on the CPU


@dataclass(frozen=True)
class Gpu:
    """A GPU; what is not known about it is None.

    Attributes:
        capability: its compute capability, as (8, 6).
        memory: in GiB, as on the label; of an unlisted GPU in this machine, as its driver reports it.
        tflops: its peak rate in fp16 or bf16, in 10^12 operations a second.
    """

    name: str
    capability: tuple[int, int]
    memory: float | None = None
    tflops: float | None = None

    @property
    def sm(self) -> str:
        """The capability as Axolotl writes it: sm_86."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    def __str__(self) -> str:
        return f"{self.name} ({self.sm})"


@cache
def catalogue() -> dict[str, Gpu]:
    """The GPUs of gpus.yaml, by name."""
    return {
        name: Gpu(name, _capability(facts["capability"]), facts["memory"], facts.get("tflops"))
        for name, facts in yamlfiles.read_yaml(Path(__file__).with_name("gpus.yaml")).items()
    }


def find(name: str, option: str = "--gpu") -> Gpu:
    """Find a GPU by its name, a part of it, or its compute capability.

    Args:
        name: the name.
        option: the option that gave it, for messages.

    Raises:
        UserError: there is none of that name, or there are several.
    """
    if match := re.fullmatch(r"sm_?(\d{1,2})(\d)|(\d{1,2})\.(\d)", name, re.IGNORECASE):
        return Gpu(name, (int(match[1] or match[3]), int(match[2] or match[4])))
    hint = f"; there are {', '.join(catalogue())}, or a compute capability such as sm_86"
    return named(name) or named(f"RTX {name}") or catalogue()[meant(name, catalogue(), "GPU", hint, option)]


def here() -> Gpu | None:
    """The first NVIDIA GPU that CUDA shows to this process."""
    first = next(iter(machine.visible_gpus().values()), None)
    if first is None:
        return None
    gpu = Gpu(first["name"], _capability(first["compute_capability"]), first["memory_gib"])
    listed = named(gpu.name)  # its label's memory, from which plans take off what a driver does not show
    return replace(gpu, memory=listed.memory, tflops=listed.tflops) if listed else gpu


def named(name: str) -> Gpu | None:
    """The listed GPU of a name, with or without the size of its memory."""
    plain = _plain(name)
    listed = {_plain(gpu.name): gpu for gpu in reversed(catalogue().values())}
    return listed.get(plain) or listed.get(re.sub(r"(16|24|32|40|48|64|80|94|96|141)gb$", "", plain))


def _plain(name: str) -> str:
    """A name without the parts that are spelt differently from place to place."""
    return re.sub(r"nvidia|geforce|tesla|pcie|sxm\d?|hbm\d?e?|[^a-z0-9]", "", name.lower()).replace("gib", "gb")


def _capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def engine_of(config: Any) -> str:
    """Engine that divides a training among several GPUs: DDP, ZeRO-1, ZeRO-2, ZeRO-3 or FSDP."""
    engine = config.get("deepspeed")
    if isinstance(engine, str):
        if not Path(engine).is_file():
            return f"ZeRO-{next((stage for stage in (3, 2, 1) if f'zero{stage}' in engine.lower()), 2)}"
        engine = read_json(Path(engine))
    if engine:
        stage = (engine.get("zero_optimization") or {}).get("stage") if isinstance(engine, dict) else None
        return f"ZeRO-{stage}" if stage in (1, 2, 3) else "DDP"
    return "FSDP" if config.get("fsdp_config") or config.get("fsdp") else "DDP"


def offloads(config: Any) -> bool:
    """True if an engine keeps weights or the optimizer's state in main memory."""
    deepspeed = config.get("deepspeed")
    if isinstance(deepspeed, str):
        deepspeed = read_json(Path(deepspeed)) or {"offload_param.device": "offload" in deepspeed}
    keys = flatten({"deepspeed": deepspeed, "fsdp": config.get("fsdp_config")})
    devices = ("offload_param.device", "offload_optimizer.device", "offload_params")
    return any(key.endswith(devices) and value not in (None, False, "none") for key, value in keys)


def divided(config: Config, gpus: int, asked: str) -> Config:
    """A config whose optimizer steps have as many rows on several GPUs as it has on one.

    Args:
        config: the config for one.
        gpus: how many there are in all.
        asked: the options that asked for them, for messages.

    Raises:
        UserError: the rows of a step cannot be divided like that.
    """
    key = "batch_size" if config.get("batch_size") else "gradient_accumulation_steps"
    micro = config.get("micro_batch_size")
    accumulated = config.get(key) or 1
    if gpus == 1 or not isinstance(micro, int) or not isinstance(accumulated, int) or micro < 1 or accumulated < 1:
        return config  # the schema reports what is not a number
    unit = micro if key == "batch_size" else 1
    if accumulated % (gpus * unit) == 0:
        return merge(config, {key: accumulated // gpus})
    problem = f"{key} is {accumulated}, and no multiple of {gpus * unit}"
    raise UserError(f"{asked}: {problem}; --set such a one, or a smaller micro_batch_size with it")
