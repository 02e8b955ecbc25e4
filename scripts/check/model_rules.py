"""Rules about the base model: access, layers, tokens and context."""

import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..base import hub, paths
from ..base.errors import UserError, did_you_mean
from ..base.files import tensor_shapes
from ..base.processes import bounded
from ..base.run_files import RunFile
from ..config import models
from ..config.finding import MOST_FINDINGS, Level
from ..config.merging import listed
from ..config.training_settings import TrainingSettings
from .rule import Case, Problems, rule


@rule()
def beyond_context(case: Case) -> Problems:
    """RoPE accepts rows longer than the model's context, for which the model was never trained.

    GPT-2 and its like have a table of n_positions rows, beyond which training fails with an index error.
    In a pack, positions begin anew with each row, so that a pack may exceed the context.
    """
    context = case.model.context
    settings = TrainingSettings.of(case.config)
    length = settings.sequence_len
    if not context or length <= context or case.is_set("overrides_of_model_config", "model_config"):
        return
    remedy = f"set it to {context}"
    if settings.sample_packing:
        rows = math.ceil(settings.micro_batch_size * length / context)
        remedy += f", and micro_batch_size to {rows}, for as many packed tokens"
    level: Level = "warning"
    effect = "was not trained"
    if "n_positions" in case.architecture:
        level, effect = "error", "fails"
    problem = f"{length} exceeds the model's context of {context} tokens, beyond which it {effect}"
    yield level, "sequence_len", problem, remedy


@rule()
def rope_parameters(case: Case) -> Problems:
    """Axolotl sets overrides on a complete config, to which transformers 5 then adds nothing (seen: KeyError)."""
    key = str(case.first_set("overrides_of_model_config", "model_config"))
    overrides = case[key] or {}
    if "rope_theta" in overrides:
        yield "warning", f"{key}.rope_theta", "has no effect", "write it into rope_parameters, beside rope_type"
    for name in ("rope_parameters", "rope_scaling"):
        parameters = overrides.get(name)
        if isinstance(parameters, dict) and not {"rope_type", "rope_theta"} <= parameters.keys():
            problem = "loading the model fails without rope_type and rope_theta"
            yield "error", f"{key}.{name}", problem, "write both; rope_theta is in the model's config.json"


@rule()
def missing_special_token(case: Case) -> Problems:
    """Axolotl adds a missing token with a new embedding row, which LoRA does not train (loaders/tokenizer.py).

    Nor for the list additional_special_tokens, of which Axolotl trains without a word on untrained rows (seen).
    The row must be added to the base model before the adapter is loaded; otherwise PEFT fails (seen). Only without a
    trained row of eos_token does the model not learn to stop.
    """
    pattern = case.model.special_tokens
    if not (pattern and case.lora) or set(models.TRAINABLE) <= set(listed(case.config, "lora_modules_to_save")):
        return
    for name, value in (case["special_tokens"] or {}).items():
        tokens = value if isinstance(value, list) else [value]
        unknown = [str(token) for token in tokens if token and not re.fullmatch(pattern, str(token))]
        if unknown:
            level: Level = "error" if name == "eos_token" else "warning"
            problem = (
                f"{', '.join(unknown)} is not a special token of this model: Axolotl adds it with a new embedding row; "
                "LoRA does not train that row, and loading the adapter requires adding it to the base model"
            )
            such_as = f", such as {case.model.pad_token} for padding" if case.model.pad_token else ""
            tying = " and peft_ensure_weight_tying: true" if models.ties_embeddings(case.architecture) else ""
            saving = f"set lora_modules_to_save: [embed_tokens, lm_head]{tying}"
            yield level, f"special_tokens.{name}", problem, f"use one of the model's tokens{such_as}, or {saving}"


@rule()
def tied_embeddings(case: Case) -> Problems:
    """Of tied embeddings that are trained apart, a merge keeps embed_tokens only (PEFT#2777; seen).

    With peft_ensure_weight_tying, PEFT trains them as one matrix, and the merged model equals the trained one (seen).
    """
    if models.lost_in_merge(case.config | {"lora_target_modules": None}, case.architecture):
        problem = "lm_head is tied to embed_tokens in this model: trained apart, only embed_tokens outlives a merge"
        yield "warning", "lora_modules_to_save", problem, "set peft_ensure_weight_tying: true"


@rule()
def no_access(case: Case) -> Problems:
    """A gated model or tokenizer on the hub requires an accepted licence and a token.

    Before a run, missing access is an error. Otherwise it is a warning, because the config may be for another machine.
    The rule does not ask the hub about models on this machine, or models that models.yaml lists as not gated. Axolotl
    also loads tokenizer_config at revision_of_model (axolotl/loaders/tokenizer.py). If tokenizer_config names another
    repository than base_model, that repository lacks this commit.
    """
    yield from _access(case, "base_model", case.model, case.model.weights_here)
    name = case["tokenizer_config"]
    if isinstance(name, str) and name != case["base_model"] and not Path(name).is_dir():
        tokenizer = models.find({"base_model": name})
        yield from _access(case, "tokenizer_config", tokenizer, tokenizer.tokenizer_here)
        revision = str(case["revision_of_model"])
        if re.fullmatch("[0-9a-f]{40}", revision) and not models.is_path(name):
            problem = f"Axolotl looks for {name} at revision_of_model, {revision}, a commit of the base model"
            yield "error", "tokenizer_config", problem, "give a folder with the tokenizer, or delete revision_of_model"


def _access(case: Case, key: str, model: models.Model, is_here: bool) -> Problems:
    """Problems with access to a model or its tokenizer."""
    name = case[key]
    if is_here or not isinstance(name, str) or Path(name).is_relative_to(paths.cache()):
        return  # the small model is created on demand
    if Path(name).is_dir():
        yield "error", key, f"{name} contains no weights", "give a folder that save_pretrained wrote"
    elif models.is_path(name):
        problem = f"{name} {paths.absence(Path(name))}"
        yield case.absent(Path(name)), key, problem, "give a folder, or a model on the hub as owner/name"
    else:
        yield from _hub_access(case, key, name, model)


def _hub_access(case: Case, key: str, name: str, model: models.Model) -> Problems:
    """Problems with access to a model on the hub."""
    level = case.absent(Path(name))
    if hub.is_offline():
        yield level, key, f"{name} is not cached, and HF_HUB_OFFLINE is set", "fetch the model first"
    elif model.gated and not hub.has_token():
        yield level, key, f"{name} is gated, and no token for the hub was found", _how_to_get(name)
    elif case.ask_hub and model.gated is not False:
        answer = hub.access(name)
        if answer.access == "missing":
            problem = f"the hub has no model {name}, or the model is private: {answer.says}{models.similar(name)}"
            yield "error", key, problem, "correct the name; for a private model run `hf auth login`"
        elif answer.access in ("gated", "refused"):
            yield level, key, f"the hub refuses {name}: {answer.says}", _how_to_get(name)


def _how_to_get(name: str) -> str:
    """Steps to get access to a gated model."""
    mirror = ", or use its ungated copy: --profile mirror" if models.catalogue().get(name, {}).get("mirror") else ""
    return f"accept the licence at {hub.page(name)} and run `hf auth login`{mirror}"


@rule()
def unknown_model(case: Case) -> Problems:
    """Some rules are skipped if the model's config.json and tokenizer are missing; a note says so."""
    name = case["base_model"]
    if name and not models.is_path(name) and case.model == models.Model():
        problem = f"{name} is not on this machine: its layers, context and special tokens are not checked"
        yield "note", "base_model", problem, f"to check them, run {models.tokenizer_command(case.config)}"


@rule()
def no_adapter(case: Case) -> Problems:
    """Without an adapter, Axolotl trains and saves the whole model; runs, evaluation and publishing need an adapter."""
    if not case.is_set("adapter"):
        level: Level = "error" if case.launching else "warning"
        problem = "not set: Axolotl would train all weights, and `recipe run` trains only adapters"
        yield level, "adapter", problem, "set lora or qlora, or train with Axolotl itself"


@rule(scope="step")
def no_lora_targets(case: Case) -> Problems:
    """Axolotl's validation accepts LoRA without targets, but PEFT fails after the model is loaded.

    PEFT's error is NoMatchingPeftModuleError.
    """
    if case.lora and not case.is_set("lora_target_modules", "lora_target_linear", "lora_target_parameters"):
        yield "error", "adapter", "LoRA has no target layers", "set lora_target_modules or lora_target_linear: true"


@rule()
def unmatched_adapter(case: Case) -> Problems:
    """PEFT leaves out weights for layers that the model lacks, and trains new ones (PEFT#2118; seen)."""
    adapter, linear = case["lora_model_dir"], case.model.linear
    if not (adapter and linear):
        return
    layers = set(_layer_names(linear, case.model.layers or 1000))
    adapted = set()
    for name in tensor_shapes(Path(adapter) / RunFile.ADAPTER) or ():
        if weight := _ADAPTED.fullmatch(name):
            adapted.add(weight["layer"])
    unmatched = sorted(adapted - layers)
    if unmatched:
        problem = f"the model lacks {len(unmatched)} of the adapter's {len(adapted)} layers, such as {unmatched[0]}"
        remedy = "name an adapter of this model; Axolotl would train new weights in place of these"
        yield "error", "lora_model_dir", problem, remedy


_ADAPTED = re.compile(r"base_model\.model\.(?P<layer>.*)\.lora_(embedding_)?[AB](\.weight)?")
"""Name of a weight in an adapter's file, with the layer that it adapts."""


@rule(scope="step")
def unknown_lora_target(case: Case) -> Problems:
    """PEFT ignores an unknown name if another name matches a layer (BaseTuner.inject_adapter)."""
    linear = case.model.linear
    if not linear:
        return
    for i, name in enumerate(case["lora_modules_to_save"] or ()):
        near = did_you_mean(str(name).rpartition(".")[2], models.TRAINABLE)
        if near and not str(name).endswith(models.TRAINABLE):
            yield "error", f"lora_modules_to_save.{i}", f"no module of this model is called {name}{near}", ""
    if case.lora:
        yield from islice(_unknown_targets(case, linear), MOST_FINDINGS)


def _unknown_targets(case: Case, linear: tuple[str, ...]) -> Problems:
    """Targets that match no layer of the model, whose linear layers have these names."""
    layers = _layer_names(linear, case.model.layers or 1000)
    targets = [*_target_patterns(case["lora_target_modules"])]
    unknown = []
    for key, name, pattern in targets:
        try:
            with bounded(pattern):
                is_layer = any(re.fullmatch(pattern, layer) for layer in layers)
        except (re.error, OverflowError, RecursionError, UserError) as error:
            yield "error", key, f"{name} is not a usable regular expression: {error}", "use a list of names"
            return
        if not is_layer:
            unknown.append((key, name))
    for key, name in unknown:
        near = did_you_mean(name, linear)
        level: Level = "error" if near or len(unknown) == len(targets) else "warning"
        hint = near or f"; choose from {', '.join(linear)}"
        yield level, key, f"no layer of this model is called {name}{hint}", ""


def _layer_names(linear: tuple[str, ...], count: int) -> list[str]:
    """Full names of the layers that LoRA can adapt; `count` is the number of transformer layers."""
    layers = ["model.embed_tokens", "lm_head"]
    for i in range(count):
        for name in linear:
            block = "mlp" if name in models.MLP else "self_attn"
            layers.append(f"model.layers.{i}.{block}.{name}")
    return layers


def _target_patterns(targets: Any) -> Iterator[tuple[str, str, str]]:
    """Key, name and pattern of each LoRA target; PEFT reads a text as a pattern, and a name in a list as an ending."""
    if isinstance(targets, list):
        for i, name in enumerate(targets):
            if name is not None:
                yield f"lora_target_modules.{i}", name, rf"(.*\.)?{re.escape(str(name))}"
    elif targets and targets != "all-linear":
        yield "lora_target_modules", targets, targets


@rule()
def head_without_lora(case: Case) -> Problems:
    """Liger's fused loss and cut cross entropy ignore LoRA on lm_head.

    Both read the base weight of lm_head. Liger: see transformers/model/llama.py. Cut cross entropy: only in versions
    whose transformers/utils.py lacks apply_lce_lm_head, which was added in 2026."""
    if not case.lora or not any(name.endswith("lm_head") for name in listed(case.config, "lora_target_modules")):
        return
    levels: dict[str, Level] = {"liger_fused_linear_cross_entropy": "error", "cut_cross_entropy": "warning"}
    for key, level in levels.items():
        if case[key]:
            problem = "computes the loss without LoRA on lm_head, so that lm_head is not trained"
            yield level, key, problem, "set chunked_cross_entropy: true instead"


@rule(scope="step")
def no_lora_rank(case: Case) -> Problems:
    """Without lora_r or lora_alpha, PEFT fails after the model is loaded."""
    for key in ("lora_r", "lora_alpha"):
        if case.lora and not case.is_set(key, "lora_model_dir"):
            yield "error", "adapter", f"{key} is not set", f"set {key}"


@rule()
def changed_base(case: Case) -> Problems:
    """PiSSA splits the base weights into adapter and residual; Axolotl saves only the adapter.

    PEFT splits the base weights again when it loads the adapter. With pissa_niter_N the split is random: logits
    differed by 0.22 (seen). With pissa, logits were equal (seen).
    """
    start = str(case["peft_init_lora_weights"])
    if case.lora and start.startswith("pissa_niter") and not case["lora_model_dir"]:
        problem = f"{start} splits the base weights at random; loading the adapter splits them differently"
        remedy = "set base_model to a published residual model, and lora_model_dir to its initial adapter"
        yield "error", "peft_init_lora_weights", problem, f"{remedy}, as in pissa-metamathqa/llama-2-7b-pissa"


@rule(scope="step")
def not_quantized(case: Case) -> Problems:
    """Axolotl quantizes to 4 bits only for the adapters qlora and mixlora, which refuse 8 bits (loaders/model.py)."""
    if case["adapter"] != "lora" or not case["load_in_4bit"]:
        return
    bits, remedy = "16", "set adapter: qlora"
    if case["load_in_8bit"]:
        bits, remedy = "8", "delete load_in_4bit, or set adapter: qlora and delete load_in_8bit"
    yield "warning", "adapter", f"lora ignores load_in_4bit: the base has {bits} bits", remedy


@rule()
def overridden_targets(case: Case) -> Problems:
    """With lora_target_linear, Axolotl adapts all linear layers besides the listed ones (loaders/adapter.py; seen)."""
    targets = set(listed(case.config, "lora_target_modules"))
    if case["lora_target_linear"] and targets - set(models.TRAINABLE):
        problem = "adapts all linear layers, not only those of lora_target_modules"
        yield "warning", "lora_target_linear", problem, "delete one of the two keys"
