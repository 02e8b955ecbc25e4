"""What divides a training among several GPUs, and the steps it makes there."""

from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import read_json
from ..base.yamlfiles import Config
from .config import flatten, merge

KEYS = ("deepspeed", "fsdp_version", "fsdp_config")  # of a config, which choose an engine
CPU_RANKS = "QLORA_RECIPES_CPU_RANKS"  # the environment variable that makes several processes train on the CPU


def engine_of(config: Any) -> str:
    """What divides a training among several GPUs: DDP, ZeRO-1, ZeRO-2, ZeRO-3 or FSDP."""
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
    """Whether an engine keeps weights or the optimizer's state in main memory."""
    deepspeed = config.get("deepspeed")
    if isinstance(deepspeed, str):
        deepspeed = read_json(Path(deepspeed)) or {"offload_param.device": "offload" in deepspeed}
    keys = flatten({"deepspeed": deepspeed, "fsdp": config.get("fsdp_config")})
    return any(
        key.endswith(("offload_param.device", "offload_optimizer.device", "offload_params")) and value not in _NOWHERE
        for key, value in keys
    )


_NOWHERE = (None, False, "none")


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
    rows = accumulated if key == "batch_size" else micro * accumulated
    problem = f"{key} is {accumulated}, which does not divide by {gpus * unit}"
    raise UserError(f"{asked}: {problem}; {_instead(rows, micro, gpus, key)}")


def _instead(rows: int, micro: int, gpus: int, key: str) -> str:
    """What to do where the rows of a step cannot be divided among the GPUs with this micro batch."""
    if rows % gpus:
        more = -(-rows // (micro * gpus)) * gpus
        value = more * micro if key == "batch_size" else more
        return f"--set {key}={value} makes steps of {more * micro} rows instead of {rows}"
    largest = max(size for size in range(1, micro + 1) if (rows // gpus) % size == 0)
    also = "" if key == "batch_size" else f" --set {key}={rows // largest}"
    return f"--set micro_batch_size={largest}{also} keeps steps of {rows} rows"
