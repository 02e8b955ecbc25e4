"""Rules about the base model: its access, layers, tokens and context."""

import re
from pathlib import Path

from ..base import hub, paths
from ..base.errors import did_you_mean
from ..configs import models
from .finding import Case, Level, Problems, rule


@rule
def beyond_context(case: Case) -> Problems:
    """Positions that the model was never trained on; RoPE extends them without an error."""
    context = case.model.context
    length = case["sequence_len"] or 0
    if context and length > context and not (case["overrides_of_model_config"] or case["model_config"]):
        yield "error", "sequence_len", f"{length}, but the model was made for {context} tokens", "lower it"


@rule
def missing_special_token(case: Case) -> Problems:
    """Axolotl adds it to the tokenizer and a row to the embedding, which LoRA does not train (loaders/tokenizer.py).

    A padding token carries no loss, so that its untrained row does not matter, but whoever loads the adapter has to
    add the row too; PEFT fails otherwise (seen).
    """
    own = case.model.special_tokens
    if not own or {"embed_tokens", "lm_head"} <= set(case["lora_modules_to_save"] or []):
        return
    for name, token in (case["special_tokens"] or {}).items():
        if isinstance(token, str) and not re.fullmatch(own, token):
            level: Level = "warning" if name == "pad_token" else "error"
            problem = (
                f"{token} is not a special token of this model: Axolotl adds it, and a row to an embedding that has no "
                "spare one, which LoRA does not train, and which has to be added to the base model to load the adapter"
            )
            own_pad = f", as {case.model.pad_token} for padding" if case.model.pad_token else ""
            remedy = f"name one that it has{own_pad}, or set lora_modules_to_save: [embed_tokens, lm_head]"
            yield level, f"special_tokens.{name}", problem, remedy


@rule
def no_access(case: Case) -> Problems:
    """The hub refuses a gated model without a token, and with one whose owner has not accepted its licence.

    On a laptop that checks for another machine that is no error. The hub is asked only about a model that is not here,
    and not about one that models.yaml knows to be ungated.
    """
    level: Level = "error" if case.launching else "warning"
    name = case["base_model"]
    if case.model.weights_here or not isinstance(name, str) or Path(name).is_relative_to(paths.cache()):
        return  # a stand-in is converted when it is needed
    if Path(name).is_dir():
        yield "error", "base_model", f"{name} has no weights in it", "give a folder that save_pretrained wrote"
    elif models.is_path(name):
        yield "error", "base_model", f"{name} does not exist", "give a folder or a model of the hub as owner/name"
    elif hub.is_offline():
        yield level, "base_model", f"{name} is not in the hub's cache, and HF_HUB_OFFLINE is set", "fetch it first"
    elif case.model.gated and not hub.has_token():
        yield level, "base_model", f"{name} is gated, and there is no token", _how_to_get(name)
    elif case.ask_hub and case.model.gated is not False:
        yield from _of_the_hub(name, level)


def _of_the_hub(name: str, level: Level) -> Problems:
    """Access to a model by the hub's answer about token and licence."""
    answer = hub.access(name)
    if answer.access == "missing":
        problem = f"the hub has no model {name}, or a private one: {answer.says}"
        near = did_you_mean(name, models.catalogue())
        yield "error", "base_model", f"{problem}{near}", "correct the name, or `hf auth login` if it is private"
    elif answer.access in ("gated", "refused"):
        yield level, "base_model", f"the hub refuses {name}: {answer.says}", _how_to_get(name)


def _how_to_get(name: str) -> str:
    """Remedy that gives access to a gated model."""
    mirror = ", or take its ungated copy by --profile mirror" if models.catalogue().get(name, {}).get("mirror") else ""
    return f"accept its licence at {hub.page(name)} and `hf auth login`{mirror}"


@rule
def unknown_model(case: Case) -> Problems:
    """Without a model's config.json and tokenizer some rules find nothing, which must not look as if all were well."""
    name = case["base_model"]
    if name and isinstance(name, str) and not models.is_path(name) and case.model == models.Model():
        problem = f"{name} is not on this machine, so its layers, context and special tokens are not checked"
        remedy = f"`hf download {name} --include config.json --include 'tokenizer*'` fetches what they are read from"
        yield "note", "base_model", problem, remedy + did_you_mean(name, models.catalogue())


@rule
def no_lora_targets(case: Case) -> Problems:
    """Axolotl's validation lets it pass; PEFT fails once the model is loaded (NoMatchingPeftModuleError)."""
    if case.lora and not case.is_set("lora_target_modules", "lora_target_linear", "lora_target_parameters"):
        yield "error", "adapter", "no layers are named for LoRA", "set lora_target_modules or lora_target_linear: true"


@rule
def unknown_lora_target(case: Case) -> Problems:
    """PEFT passes over a name that matches no layer, as long as another does (BaseTuner.inject_adapter)."""
    targets, linear = case["lora_target_modules"], case.model.linear
    if not (case.lora and targets and linear) or targets == "all-linear":
        return
    layers = ["model.embed_tokens", "lm_head"]
    for i in range(case.model.layers or 1000):
        layers += [f"model.layers.{i}.{'mlp' if name in models.MLP else 'self_attn'}.{name}" for name in linear]
    listed = isinstance(targets, list)
    first = "lora_target_modules"
    named = {f"{first}.{i}": name for i, name in enumerate(targets)} if listed else {first: targets}
    for key, name in named.items():
        pattern = rf"(.*\.)?{re.escape(str(name))}" if listed else name
        try:
            is_layer = any(re.fullmatch(pattern, layer) for layer in layers)
        except (re.error, OverflowError, RecursionError) as error:
            yield "error", key, f"{name} is not a regular expression: {error}", "use a list of names"
            return
        if name is not None and not is_layer:
            hint = did_you_mean(name, linear) or f"; it has {', '.join(linear)}"
            yield "error", key, f"no layer of this model is called {name}{hint}", ""


@rule
def head_without_lora(case: Case) -> Problems:
    """These losses read the head's base weight, and so pass over LoRA on it: Liger's (transformers/model/llama.py), and
    cut cross entropy until its transformers/utils.py had apply_lce_lm_head, in 2026."""
    targets = case["lora_target_modules"] or ()
    adapted = case.lora and any(isinstance(name, str) and name.endswith("lm_head") for name in targets)
    levels: dict[str, Level] = {"liger_fused_linear_cross_entropy": "error", "cut_cross_entropy": "warning"}
    for key, level in levels.items():
        if adapted and case[key]:
            problem = "computes the loss without LoRA on lm_head, which then is not trained"
            yield level, key, problem, "set chunked_cross_entropy: true instead"


@rule
def no_lora_rank(case: Case) -> Problems:
    """PEFT gets None and fails once the model is loaded."""
    for key in ("lora_r", "lora_alpha"):
        if case.lora and not case.is_set(key, "lora_model_dir"):
            yield "error", "adapter", f"{key} is not set", f"set {key}"


@rule
def changed_base(case: Case) -> Problems:
    """PiSSA moves part of the base weights into the adapter, and Axolotl saves the adapter without the rest.

    PEFT splits the weights anew when it loads that. With pissa_niter_N it does so at random, and logits differed by
    0.22; with pissa they did not (seen).
    """
    start = str(case["peft_init_lora_weights"])
    if case.lora and start.startswith("pissa_niter") and not case["lora_model_dir"]:
        problem = f"{start} splits the base weights at random, and saves the adapter alone, which is evaluated wrongly"
        remedy = "take a published residual model as base_model, and its initial adapter as lora_model_dir"
        yield "error", "peft_init_lora_weights", problem, f"{remedy}, as pissa-metamathqa/llama-2-7b-pissa does"


@rule
def not_quantized(case: Case) -> Problems:
    """Axolotl quantizes to 4 bits for the adapters qlora and mixlora only (axolotl/loaders/model.py)."""
    if case["adapter"] == "lora" and case["load_in_4bit"]:
        yield "error", "adapter", "lora leaves the base in 16 bits, load_in_4bit or not", "set adapter: qlora"
