"""Whether LoRA has layers, a rank, and the base that it asks for."""

import re

from ...base.errors import did_you_mean
from ...configs import models
from ..patience import TooLong, matching
from .case import Case, Problems, rule


@rule
def no_lora_targets(case: Case) -> Problems:
    """Axolotl's validation lets it pass; PEFT fails once the model is loaded (NoMatchingPeftModuleError)."""
    if case.lora and not case.is_set("lora_target_modules", "lora_target_linear", "lora_target_parameters"):
        yield "error", "adapter", "no layers are named for LoRA", "set lora_target_modules or lora_target_linear: true"


@rule
def unknown_lora_target(case: Case) -> Problems:
    """PEFT passes over a name that matches no layer, as long as another does (BaseTuner.inject_adapter)."""
    targets = case["lora_target_modules"]
    known = case.model.linear
    linear = known or models.LINEAR_LAYERS
    if not (case.lora and targets and (known or isinstance(targets, str))) or targets == "all-linear":
        return
    paths = ["model.embed_tokens", "lm_head"]
    for i in range(case.model.layers or 1000):
        paths += [f"model.layers.{i}.{'mlp' if name in models.MLP else 'self_attn'}.{name}" for name in linear]
    if isinstance(targets, str):
        try:
            if not matching(targets, paths) and known:
                problem = f"{targets} matches no layer of this model"
                yield "error", "lora_target_modules", problem, f"it has {', '.join(linear)}"
        except re.error as error:
            problem = f"{targets} is not a regular expression: {error}"
            yield "error", "lora_target_modules", problem, "use a list of names"
        except TooLong as error:
            yield "error", "lora_target_modules", str(error), "use a list of names"
        return
    for i, target in enumerate(targets):
        if target is not None and not any(f".{path}".endswith(f".{target}") for path in paths):
            hint = did_you_mean(target, linear) or f"; it has {', '.join(linear)}"
            yield "error", f"lora_target_modules.{i}", f"no layer of this model is called {target}{hint}", ""


@rule
def no_lora_rank(case: Case) -> Problems:
    """PEFT gets None and fails once the model is loaded."""
    for key in ("lora_r", "lora_alpha"):
        if case.lora and not case.is_set(key, "lora_model_dir"):
            yield "error", "adapter", f"{key} is not set", f"set {key}"


@rule
def not_quantized(case: Case) -> Problems:
    """Axolotl quantizes to 4 bits for the adapters qlora and mixlora only (axolotl/loaders/model.py)."""
    if case["adapter"] == "lora" and case["load_in_4bit"]:
        yield "error", "adapter", "lora leaves the base in 16 bits, load_in_4bit or not", "set adapter: qlora"
    if case["adapter"] == "qlora" and not case["load_in_4bit"]:
        yield "error", "adapter", "qlora needs load_in_4bit: true", "set it, or adapter: lora"
    for key in ("load_in_4bit", "load_in_8bit"):
        if not case.is_set("adapter") and case[key]:
            yield "error", key, "a quantized base cannot be trained without an adapter", "set adapter: qlora"
