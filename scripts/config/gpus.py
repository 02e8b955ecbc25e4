"""GPUs for checks and plans, and parallelism of trainings on several GPUs."""

import math
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..base import hardware, yamlfiles
from ..base.errors import UserError, meant
from ..base.files import read_json
from ..base.yamlfiles import Config
from .merging import flatten, merge

PARALLELISM_KEYS = ("deepspeed", "fsdp_version", "fsdp_config")  # keys of a config
SIZE = re.compile(r"(\d{1,3}) ?Gi?B", re.IGNORECASE)  # a memory size, which `recipe plan` accepts in place of a GPU
CPU_RANKS = "QLORA_RECIPES_CPU_RANKS"  # environment variable that allows several training processes on the CPU


@dataclass(frozen=True)
class Gpu:
    """A GPU; unknown facts are None.

    Attributes:
        capability: compute capability, such as (8, 6).
        memory: nominal memory in GiB; for an unlisted GPU in this machine, as reported by the driver.
        tflops: peak rate in fp16 or bf16, in 10^12 operations per second.
    """

    name: str
    capability: tuple[int, int]
    memory: float | None = None
    tflops: float | None = None

    @property
    def sm(self) -> str:
        """The capability in Axolotl's notation, such as sm_86."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    def __str__(self) -> str:
        return f"{self.name} ({self.sm})"


ANY_GPU = Gpu("H100", (9, 0))
"""Default GPU for validation, if the user names no GPU and this machine has none."""


@cache
def catalogue() -> dict[str, Gpu]:
    """The GPUs of gpus.yaml, by name."""
    return {
        name: Gpu(name, _capability(facts["capability"]), facts["memory"], facts.get("tflops"))
        for name, facts in yamlfiles.read_yaml(Path(__file__).with_name("gpus.yaml")).items()
    }


def find_gpu(name: str, option: str = "--gpu") -> Gpu:
    """Find a GPU by name, part of a name, or compute capability.

    Args:
        name: the name, part of a name, or compute capability.
        option: the option that takes the name, for messages.

    Raises:
        UserError: the name matches no GPU or several GPUs, or is a memory size.
    """
    capability = re.sub(r"(?i)^sm_?(\d+)(\d)$", r"\1.\2", name)
    if re.fullmatch(r"\d{1,2}\.\d", capability):
        return Gpu(name, _capability(capability))
    if SIZE.fullmatch(name):
        raise UserError(f"{option} {name}: a memory size, which only `recipe plan` accepts; name a GPU")
    hint = f"; choose {', '.join(catalogue())}, or a compute capability such as sm_86"
    return named(name) or named(f"RTX {name}") or catalogue()[meant(name, catalogue(), "GPU", hint, option)]


def here() -> Gpu | None:
    """The first NVIDIA GPU visible to CUDA in this process; None without one."""
    first = next(iter(hardware.visible_gpus().values()), None)
    if first is None:
        return None
    gpu = Gpu(first["name"], _capability(first["compute_capability"]), first["memory_gib"])
    listed = named(gpu.name) or gpu
    if math.isclose(listed.memory or 0, first["memory_gib"], rel_tol=0.15):  # some GPUs are sold in two sizes
        gpu = replace(gpu, memory=listed.memory)  # nominal, because plans subtract the part that torch cannot use
    return replace(gpu, tflops=listed.tflops)


def named(name: str) -> Gpu | None:
    """Listed GPU of this name, with or without the memory size; None if unlisted."""
    plain = _plain(name)
    listed = {_plain(gpu.name): gpu for gpu in reversed(catalogue().values())}
    return listed.get(plain) or listed.get(re.sub(r"(16|24|32|40|48|64|80|94|96|141)gb$", "", plain))


def _plain(name: str) -> str:
    """A GPU's name without vendor, form factor and punctuation."""
    return re.sub(r"nvidia|geforce|tesla|pcie|sxm\d?|hbm\d?e?|[^a-z0-9]", "", name.lower()).replace("gib", "gb")


def _capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def deepspeed_of(config: Any) -> Config:
    """DeepSpeed's settings, from a config or from the file that it names; empty without them.

    If the file is missing or damaged, stage and offloading are taken from its name, such as zero3.
    """
    settings = config.get("deepspeed") or {}
    if not isinstance(settings, str):
        return settings
    content = read_json(Path(settings))
    if content:
        return content
    stage = re.search("zero([123])", settings.lower())
    zero: Config = {"stage": int(stage[1]) if stage else 2}
    if "offload" in settings:
        zero["offload_param"] = {"device": "cpu"}
    return {"zero_optimization": zero}


def parallelism_of(config: Any) -> str:
    """Parallelism of a training on several GPUs: DDP, ZeRO-1, ZeRO-2, ZeRO-3 or FSDP."""
    stage = dict(flatten(deepspeed_of(config))).get("zero_optimization.stage")
    if stage in (1, 2, 3):
        return f"ZeRO-{stage}"
    if config.get("fsdp_config") and not config.get("deepspeed"):
        return "FSDP"
    return "DDP"


def offloads(config: Any) -> bool:
    """True if DeepSpeed or FSDP offloads weights or optimizer state from the GPU."""
    keys = flatten({"deepspeed": deepspeed_of(config), "fsdp": config.get("fsdp_config")})
    devices = ("offload_param.device", "offload_optimizer.device", "offload_params")
    return any(key.endswith(devices) and value not in (None, False, "none") for key, value in keys)


def divided(config: Config, gpus: int, asked: str) -> Config:
    """Divide the batch among GPUs; an optimizer step keeps its number of rows.

    Args:
        config: the config for one GPU.
        gpus: the total number of GPUs.
        asked: the options that request the GPUs, for messages.

    Raises:
        UserError: the rows of a step cannot be split evenly.
    """
    key = "gradient_accumulation_steps"
    count = config.get(key) or 1
    if gpus == 1 or not isinstance(count, int):
        return config  # the schema reports a value that is not a count
    if count % gpus == 0:
        return merge(config, {key: count // gpus})
    problem = f"{key} is {count}, not a multiple of {gpus}"
    raise UserError(f"{asked}: {problem}; use --set to choose a multiple, and perhaps a smaller micro_batch_size")
