"""Parts of a plan for several GPUs."""

from qlora_recipes.plan.planner import Planner, per_gpu

WEIGHTS = ("base weights", "quantization constants", "embeddings and head")


def kept_by_rank(planner: Planner, gpus: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer state that a plan gives each GPU, by engine."""
    parts, frozen = planner.memory.usage.parts, 0
    rest = planner.required - sum(parts.get(kind, 0) for kind in (*WEIGHTS, "adapters", "gradients", "optimizer"))
    if planner.step.adapter:
        frozen = sum(parts.get(kind, 0) for kind in WEIGHTS)
    trained = planner.memory.total("trainable") * (2 if planner.step.autocast else 4)
    layer = (frozen + trained) / planner.memory.sizes["layers"]
    gathered = max(layer, parts.get("embeddings and head", 0)) * (1 - 1 / gpus)
    kept = {engine: size - rest for engine, size in per_gpu(planner, gpus).items() if engine != "DDP"}
    return kept | {engine: kept[engine] - gathered for engine in ("ZeRO-3", "FSDP")}
