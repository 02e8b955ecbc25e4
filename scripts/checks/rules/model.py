"""Whether the base model can be had, and has the tokens and the context that a config asks for."""

import re
from pathlib import Path

from ...base import paths
from ...base.errors import did_you_mean
from ...configs import datafiles, models
from ..finding import Level
from .case import Case, Found, rule


@rule
def beyond_context(case: Case) -> Found:
    """Positions that a model never saw; RoPE extends them without an error."""
    context, length = case.model.context, case["sequence_len"] or 0
    if context and length > context and not (case["overrides_of_model_config"] or case["model_config"]):
        yield "error", "sequence_len", f"{length}, but the model was made for {context} tokens", "lower it"


@rule
def missing_special_token(case: Case) -> Found:
    """Axolotl adds it to the tokenizer and a row to the embedding, which LoRA does not train (loaders/tokenizer.py).

    A padding token carries no loss, so that its untrained row does not matter, but whoever loads the adapter has to
    add the row too; PEFT fails otherwise (seen).
    """
    tokens = case["special_tokens"] or {}
    trained = {"embed_tokens", "lm_head"} <= set(case["lora_modules_to_save"] or [])
    known = case.model.special_tokens
    for name, token in tokens.items():
        if known and isinstance(token, str) and not re.fullmatch(known, token) and not trained:
            level: Level = "warning" if name == "pad_token" else "error"
            problem = (
                f"{token} is no special token of this model: Axolotl adds it, and a row to an embedding that has no "
                "spare one, which is saved with the adapter and has to be added to the base model to load that"
            )
            own = case.model.pad_token if name == "pad_token" else None
            remedy = f"name one that it has{f', as its own {own}' if own else ''}"
            if level == "error":
                problem, remedy = f"{problem}; LoRA does not train it", f"{remedy}, or set {_TRAINED_EMBEDDING}"
            yield level, f"special_tokens.{name}", problem, remedy


_TRAINED_EMBEDDING = "lora_modules_to_save: [embed_tokens, lm_head]"


@rule
def chat_model(case: Case) -> Found:
    """No mistake, but worth knowing: what the model learnt of its own format is not used."""
    for key, dataset in datafiles.datasets(case.config, "datasets"):
        if case.model.chat and str(dataset.get("type")).startswith("alpaca") and not case["chat_template"]:
            yield "note", f"{key}.type", "the base model is a chat model, the prompt that of a base model", ""


@rule
def no_access(case: Case) -> Found:
    """The hub refuses a gated model without a token. On a laptop that checks for another machine it is no error."""
    level: Level = "error" if case.launching else "warning"
    model, name = case.model, case["base_model"]
    if model.weights_here or not isinstance(name, str) or Path(name).is_relative_to(paths.cache()):
        return  # what is in this project's cache is made when it is needed
    if Path(name).is_dir():
        yield "error", "base_model", f"{name} has no weights in it", "give a folder that save_pretrained wrote"
    elif models.is_path(name):
        yield "error", "base_model", f"{name} does not exist", "give a folder or a model of the hub as owner/name"
    elif models.is_offline():
        yield level, "base_model", f"{name} is not in the hub's cache, and HF_HUB_OFFLINE is set", "fetch it first"
    elif model.gated and not models.has_token():
        yield level, "base_model", f"{name} is gated, and there is no token", "`hf auth login`, or --mirror"


@rule
def unknown_model(case: Case) -> Found:
    """Without a model's config.json and tokenizer some rules find nothing, which must not look as if all were well."""
    name = case["base_model"]
    if not isinstance(name, str) or not name or models.is_path(name) or case.model != models.Model():
        return
    problem = f"{name} is not on this machine, so its layers, context and special tokens are not checked"
    remedy = f"`hf download {name} --include config.json --include 'tokenizer*'` makes them known"
    yield "note", "base_model", problem, remedy + did_you_mean(name, models.catalogue())
