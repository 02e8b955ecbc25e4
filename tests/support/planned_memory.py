"""Parts of a plan for several GPUs."""

from qlora_recipes.plan.step_plan import StepPlan, bytes_by_parallelism

WEIGHTS = ("base weights", "quantization constants", "embeddings and head")


def kept_by_rank(step_plan: StepPlan, gpus: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer state that a plan gives each GPU, by parallelism."""
    parts, frozen = step_plan.memory.usage.parts, 0
    rest = step_plan.required - sum(parts.get(kind, 0) for kind in (*WEIGHTS, "adapters", "gradients", "optimizer"))
    if step_plan.step.adapter:
        frozen = sum(parts.get(kind, 0) for kind in WEIGHTS)
    trained = step_plan.memory.total("trainable") * (2 if step_plan.step.autocast else 4)
    layer = (frozen + trained) / step_plan.memory.sizes["layers"]
    gathered = max(layer, parts.get("embeddings and head", 0)) * (1 - 1 / gpus)
    by_parallelism = {
        parallelism: size - rest
        for parallelism, size in bytes_by_parallelism(step_plan, gpus).items()
        if parallelism != "DDP"
    }
    return by_parallelism | {parallelism: by_parallelism[parallelism] - gathered for parallelism in ("ZeRO-3", "FSDP")}
