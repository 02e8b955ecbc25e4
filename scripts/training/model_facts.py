"""Compares the loaded model with its config: LoRA, precision, trainable weights, tokens, tying, a loaded adapter.

The model states what is trained, whatever keys, defaults and libraries led to it; the config states what was meant. A
difference is a finding, without a rule for each mistake.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights

from ..base.yamlfiles import Config
from ..config import models, substitution
from ..config.finding import MODEL
from ..config.numerics import precision
from .signals import Findings

_KEYS = {  # attributes of PEFT's config, and Axolotl's keys for them
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_dora": "peft_use_dora",
    "use_rslora": "peft_use_rslora",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
    "layers_to_transform": "peft_layers_to_transform",
    "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
}
_NAMED = {  # keys with names of modules, which PEFT ignores if no module matches; expression with a name
    "lora_target_modules": r"(.*\.)?({})",
    "lora_modules_to_save": r"(.*\.)?({})",
    "lora_rank_pattern": r"(.*\.)?({})",
    "lora_alpha_pattern": r"(.*\.)?({})",
    "peft_layers_to_transform": r".*\.{}\..*",
}
_QUANTIZED = {"load_in_4bit": "Linear4bit", "load_in_8bit": "Linear8bitLt"}  # classes of bitsandbytes
_SHOWN = 3


class Fact(NamedTuple):
    """Property of a model, or of a module or parameter, beside the config.

    Attributes:
        key: the config key that states the property.
        place: the name of the module or parameter, or of the property.
        expected: the property by the config.
        actual: the property of the model.
    """

    key: str
    place: str
    expected: Any
    actual: Any

    @property
    def kind(self) -> str:
        """Name of the module or parameter without the number of its layer."""
        return re.sub(r"\.\d+", ".*", self.place)


def add_differences(findings: Findings, facts: Iterable[Fact]) -> None:
    """Add a finding for each key in which model and config differ."""
    by_key: dict[str, dict[str, None]] = {}
    for fact in facts:
        if fact.expected != fact.actual:
            difference = f"{fact.kind} is {fact.actual}, not {fact.expected}"
            by_key.setdefault(fact.key, {})[difference] = None
    for key, differences in by_key.items():
        problem = "; ".join([*differences][:_SHOWN])
        if len(differences) > _SHOWN:
            problem += f"; and {len(differences) - _SHOWN} more"
        findings.add(MODEL, key, f"in the loaded model, {problem}", "correct this key, or the keys that override it")


def facts(config: Config, model: Any, tokenizer: Any, rows: int) -> Iterator[Fact]:
    """Facts about a model with LoRA before its first step, those that agree, too.

    Args:
        config: Axolotl's config.
        model: PEFT's model.
        tokenizer: the tokenizer, with the tokens that the config adds.
        rows: the number of embedding rows in the base model's files.
    """
    for attribute, key in _KEYS.items():
        expected, actual = config.get(key) or None, getattr(model.peft_config["default"], attribute) or None
        if not (key == "lora_target_modules" and _adds_all_linear(config)):
            yield Fact(key, attribute, _plain(expected), _plain(actual))
    for name, parameter in model.named_parameters():
        is_added = re.search(r"\.(lora_\w+|modules_to_save|trainable_tokens_delta)\.", name)
        yield Fact("adapter", name, _trained(is_added), _trained(parameter.requires_grad))
    if not substitution.uses_small_model(config):  # the names are those of another model
        yield from _matches(config, [name for name, _ in model.get_base_model().named_modules()])
    yield from _precision(config, model)
    yield from _embeddings(model, tokenizer, rows)
    if config.get("lora_model_dir"):
        trained_on = str(model.peft_config["default"].base_model_name_or_path)
        yield from _base_of_adapter(config["base_model"], trained_on)
        yield from _loaded(load_peft_weights(config["lora_model_dir"], "cpu"), model)


def _matches(config: Config, modules: list[str]) -> Iterator[Fact]:
    """Modules for each name in the config; PEFT refuses a text as target that matches none."""
    for key, pattern in _NAMED.items():
        names = config.get(key)
        if isinstance(names, list):
            names = [re.escape(str(name)) for name in names]
        elif not isinstance(names, dict):
            continue
        for name in names:
            is_found = any(re.fullmatch(pattern.format(name), module) for module in modules)
            yield Fact(key, name, "in the model", "in the model" if is_found else "missing")


def _adds_all_linear(config: Config) -> bool:
    """True if the targets are all linear layers; `check` warns of a list beside the key."""
    return bool(config.get("lora_target_linear")) or config.get("lora_target_modules") == "all-linear"


def _plain(value: Any) -> Any:
    """Names in alphabetical order, because PEFT keeps a set."""
    return ", ".join(sorted(map(str, value))) if isinstance(value, list | set) else value


def _trained(is_trained: object) -> str:
    return "trained" if is_trained else "frozen"


def _precision(config: Config, model: Any) -> Iterator[Fact]:
    """Class and dtype of the frozen layers below the adapter."""
    dtype = getattr(torch, precision(config, torch.cuda.is_available()).weights)
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or name.endswith(models.TRAINABLE):
            continue
        base = layer.get_base_layer()
        if not hasattr(base, "weight"):  # experts, or quantized by another library
            continue
        layer_class = type(base).__name__
        for key, quantized in _QUANTIZED.items():
            if config.get(key):
                yield Fact(key, name, quantized, layer_class)
            elif layer_class == quantized:
                yield Fact(key, name, "16 bits", layer_class)
        if not config.get("load_in_8bit"):
            yield Fact("bf16", name, dtype, getattr(base, "compute_dtype", base.weight.dtype))


def _embeddings(model: Any, tokenizer: Any, rows: int) -> Iterator[Fact]:
    """Rows of new tokens, which must be trained, and the tying of embedding and head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if len(tokenizer) > rows + ((tokenizer.pad_token_id or 0) >= rows):  # padding carries no loss
        is_trained = any(parameter.requires_grad for parameter in embedding.parameters())
        yield Fact("special_tokens", f"the embedding of the tokens from {rows}", _trained(True), _trained(is_trained))
    is_tied = bool(model.config.get_text_config().tie_word_embeddings)
    yield Fact("lora_modules_to_save", "tying of embedding and head", is_tied, head.weight is embedding.weight)


def _base_of_adapter(name: str, trained_on: str) -> Iterator[Fact]:
    """Base model of the adapter from which the training starts; a path says nothing about its model."""
    if not (models.is_path(name) or models.is_path(trained_on)):
        yield Fact("lora_model_dir", "the adapter's base model", models.original(name), models.original(trained_on))


def _loaded(saved: dict[str, Any], model: Any) -> Iterator[Fact]:
    """Weights of the adapter from which the training starts."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(saved.keys() | state.keys()):
        is_loaded = name in saved and name in state and torch.equal(saved[name].to(state[name]), state[name])
        yield Fact("lora_model_dir", name, "loaded", "loaded" if is_loaded else "missing")


def updates(model: Any, optimizer: Any) -> Iterator[Fact]:
    """Facts about the trainable parameters before the first update: each has a gradient and is in the optimizer.

    Of the parameters of a kind, such as those of a layer's experts, one is enough.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    kinds: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = Fact("", name, 0, 0).kind
            kinds[kind] = kinds.get(kind, False) or (parameter.grad is not None and id(parameter) in held)
    for kind, is_updated in kinds.items():
        yield Fact("adapter", kind, "updated", "updated" if is_updated else "without an update")
