"""What the installed Axolotl accepts: its configuration as a JSON Schema, and its own validation of a config.

Importing this imports Axolotl, some 10 s.
"""

import copy
import enum
import importlib
import inspect
import json
import logging
import pkgutil
import re
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import axolotl.integrations
import torch
from axolotl import prompt_strategies
from axolotl.core.builders.base import TrainerBuilderBase
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.prompters import PromptStyle
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.data.wrappers import DATASET_HANDLERS
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.deprecated import DeprecatedParameters
from axolotl.utils.schemas.enums import CANONICAL_ATTN_IMPLS, CustomSupportedOptimizers
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from transformers import BitsAndBytesConfig, SchedulerType, Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from ..base.yamlfiles import Config
from ..configs.gpus import Gpu
from .finding import Finding

ALWAYS = ("axolotl.integrations.context_parallel.", "axolotl.integrations.expert_parallel.")
"""Plugins that Axolotl loads whether or not a config lists them (`axolotl.integrations.base.get_builtin_plugins`)."""


class _Schema(GenerateJsonSchema):
    """Spells out torch's dtypes, for which JSON has no form."""

    def enum_schema(self, schema: Any) -> dict[str, Any]:
        values = [member.value for member in schema["members"]]
        if all(isinstance(value, str | int) for value in values):
            return super().enum_schema(schema)
        return {"enum": [str(value).removeprefix("torch.") for value in values]}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def encode_default(self, dft: Any) -> Any:
        return str(dft.value) if isinstance(dft, enum.Enum) else super().encode_default(dft)


def schema(bounds: dict[str, dict[str, float]], descriptions: dict[str, str]) -> str:
    """The schema that `qlora_recipes.checks.schema.generate` describes.

    Args:
        bounds: for some keys, JSON Schema's keywords that bound their numbers.
        descriptions: for some keys that Axolotl does not describe, what they mean.
    """
    main = AxolotlInputConfig.model_json_schema(schema_generator=_Schema)
    keys, definitions = main["properties"], main["$defs"]
    for name, field in AxolotlInputConfig.model_fields.items():
        if field.alias:  # Axolotl takes either name
            keys[name] = keys[field.alias]
        elif told := _deprecation(name, field):
            keys[name] |= {"deprecated": True, "deprecationMessage": told[0], "x-removed": told[1]}

    plugins, spellings, adapters = _add_plugins(keys, definitions)
    _set_values(keys, "optimizer", _optimizers())
    _set_values(keys, "lr_scheduler", [*SchedulerType, "one_cycle", "rex"])
    _set_values(keys, "adapter", adapters)
    _set_values(keys, "eval_strategy", [*IntervalStrategy])
    _set_values(keys, "save_strategy", [*SaveStrategy])
    _set_values(keys, "attn_implementation", sorted(CANONICAL_ATTN_IMPLS), "^[^/]+/[^/]+$")  # or a kernel on the hub
    _set_values(definitions["SFTDataset"]["properties"], "type", *_sft_types())
    for kind in ("dpo", "kto"):
        _set_values(definitions[f"{kind.upper()}Dataset"]["properties"], "type", _preference_types(kind))
    options = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    keys["bnb_config_kwargs"]["anyOf"][0] |= {
        "properties": {key: {} for key in [*options, "blocksize"]} | {"bnb_4bit_quant_type": {"enum": ["nf4", "fp4"]}},
        "additionalProperties": False,  # transformers only logs an option that it does not know
    }
    plugin_names = {"anyOf": [{"type": "string", "enum": sorted(spellings)}, {"type": "string"}]}  # or anyone's
    keys["plugins"]["anyOf"][0]["items"] = plugin_names
    for name, bound in bounds.items():
        alternatives = keys[name].get("anyOf", [keys[name]])
        for alternative in alternatives:
            if alternative["type"] in ("integer", "number"):
                alternative |= bound
        alternatives.sort(key=lambda one: one["type"] == "string")  # editors judge by the first
    for name, description in descriptions.items():
        keys[name]["description"] = description

    of_fsdp = definitions["FSDPConfig"]["properties"]  # Axolotl takes its keys with their old prefix too
    of_fsdp |= {f"fsdp_{key}": value | {"deprecated": True} for key, value in of_fsdp.items() if key != "fsdp_version"}
    for level in (main, *definitions.values()):
        if "properties" in level:
            level.setdefault("additionalProperties", False)
    main["allOf"] = [
        {"if": {"not": _lists(names)}, "then": {"properties": dict.fromkeys(plugins[name], _ignored(name))}}
        for name, names in spellings.items()
        if plugins[name] and not name.startswith(ALWAYS)
    ]
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": f"axolotl {version('axolotl')}, written by `recipe render --schema`",
    }
    return json.dumps(_without_null_defaults(head | main | {"x-plugins": plugins}), indent=1) + "\n"


def _add_plugins(
    keys: dict[str, Any], definitions: dict[str, Any]
) -> tuple[dict[str, list[str]], dict[str, list[str]], list[str]]:
    """Add the keys of Axolotl's own plugins, and what they refer to, to those of the schema.

    Returns:
        The keys of each plugin, by each of the names that a config can call it; those names by the first of them; and
        the adapters that there are with all plugins.
    """
    plugins: dict[str, list[str]] = {}
    spellings: dict[str, list[str]] = {}
    adapters = ["lora", "qlora", "llama-adapter"]
    for name, plugin in _plugins():
        adapters += [capability.name for capability in plugin.get_adapter_capabilities()]
        arguments = _class(plugin.get_input_args())
        own = set(arguments.model_fields) - AxolotlInputConfig.model_fields.keys() if arguments else ()
        modules = (name.rpartition(".")[0], type(plugin).__module__)
        names = [f"{module}{sign}{type(plugin).__name__}" for module in modules for sign in ".:"]
        spellings[name] = list(dict.fromkeys(names))
        plugins |= dict.fromkeys(spellings[name], sorted(own))
        if arguments:
            of_plugin = arguments.model_json_schema(schema_generator=_Schema)
            definitions |= of_plugin.get("$defs", {})
            keys |= {key: value for key, value in of_plugin["properties"].items() if key not in keys}
    return plugins, spellings, adapters


def _without_null_defaults(value: Any) -> Any:
    """A schema without its defaults of null, which editors would write into a config."""
    if isinstance(value, list):
        return [_without_null_defaults(item) for item in value]
    if isinstance(value, dict):
        kept = [(key, item) for key, item in value.items() if (key, item) != ("default", None)]
        return {key: _without_null_defaults(item) for key, item in kept}
    return value


class _Told(Exception):
    """What a validator logged."""


def _deprecation(name: str, field: FieldInfo) -> tuple[str, bool] | None:
    """What Axolotl says of a key that it is done with, and whether it refuses it; None for any other."""
    if name in DeprecatedParameters.model_fields:
        log = SimpleNamespace(warning=lambda message: _raise(_Told(message)))
        with patch("axolotl.utils.schemas.deprecated.LOG", log):
            for value in (1, "x", {"x": 1}):
                try:
                    DeprecatedParameters.model_validate({name: value})
                except ValidationError:  # of another type
                    continue
                except (_Told, DeprecationWarning) as told:
                    return str(told), isinstance(told, DeprecationWarning)
    extra = field.json_schema_extra
    description = str(extra.get("description", "")) if isinstance(extra, dict) else ""
    if isinstance(field.deprecated, str) or description.startswith("Deprecated"):
        return field.deprecated if isinstance(field.deprecated, str) else description, False
    return None


def _raise(error: Exception) -> None:
    raise error


def _lists(names: list[str]) -> dict[str, Any]:
    """A schema of the configs that list a plugin by one of its names."""
    return {"required": ["plugins"], "properties": {"plugins": {"type": "array", "contains": {"enum": names}}}}


def _ignored(plugin: str) -> dict[str, Any]:
    """A schema that no value follows, with what an editor shows then."""
    return {"type": "null", "errorMessage": f"ignored unless plugins lists {plugin}", "doNotSuggest": True}


def _set_values(keys: dict[str, Any], key: str, values: list[str], pattern: str | None = None) -> None:
    """Have a key's text be one of some values, or follow a pattern."""
    text: list[dict[str, Any]] = [{"type": "string", "enum": [str(getattr(value, "value", value)) for value in values]}]
    if pattern:
        text.append({"type": "string", "pattern": pattern})
    others = [one for one in keys[key]["anyOf"] if one.get("type") != "string" and "CustomSupported" not in str(one)]
    keys[key]["anyOf"] = text + others


def _plugins() -> Iterator[tuple[str, BasePlugin]]:
    """Axolotl's own plugins, by the name that a config lists them under."""
    for package in pkgutil.iter_modules(axolotl.integrations.__path__):
        try:
            module = importlib.import_module(f"axolotl.integrations.{package.name}")
        except ImportError:  # a plugin whose own library is not installed cannot be used here either
            continue
        for name, found in list(vars(module).items()):
            if isinstance(found, type) and issubclass(found, BasePlugin) and found is not BasePlugin:
                yield f"axolotl.integrations.{package.name}.{name}", found()


def _class(path: str | None) -> type[BaseModel] | None:
    module, _, name = (path or "").rpartition(".")
    return getattr(importlib.import_module(module), name) if module else None


def _optimizers() -> list[str]:
    """The optimizers that can be made here: some need a package that is not installed, some Axolotl never handles."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    accepted = []
    with tempfile.TemporaryDirectory() as folder:
        for name in OptimizerNames:
            arguments = TrainingArguments(folder, optim=name, optim_target_modules=["0"], use_cpu=True)
            try:
                Trainer.get_optimizer_cls_and_kwargs(arguments, model)
            except (ImportError, ValueError):
                continue
            accepted.append(name.value)
    for custom in CustomSupportedOptimizers:
        builder = SimpleNamespace(cfg=DictDefault(optimizer=custom.value), model=model)
        values = {"learning_rate": 1.0, "weight_decay": 0.0, "dion_learning_rate": 1.0, "dion_momentum": 0.9}
        try:
            TrainerBuilderBase._configure_optimizer(builder, values, {})
        except (ImportError, ValueError):
            continue
        accepted.append(custom.value)
    return accepted


def _modules(package: ModuleType) -> Iterator[tuple[str, ModuleType]]:
    """The modules of a package, at any depth, by their path inside it."""
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        name = found.name.removeprefix(f"{package.__name__}.")
        if not name.startswith("_"):
            yield name, importlib.import_module(found.name)


def _sft_types() -> tuple[list[str], str]:
    """The data set types for supervised fine-tuning, and a pattern for a strategy in a module of the user's own.

    `axolotl.prompt_strategies.load` finds a module and the function load in it, or load_x behind a dot; what it
    does not find, `get_dataset_wrapper` looks up in DATASET_HANDLERS, with a prompt style behind a colon.
    """
    types = [f"{kind}{style}" for kind in DATASET_HANDLERS for style in ("", *(f":{s.value}" for s in PromptStyle))]
    for name, module in _modules(prompt_strategies):
        for function in _functions(module, "tokenizer"):
            if re.fullmatch("load|load_.*", function) and name != "user_defined":  # that one is for a mapping as type
                types.append(name if function == "load" else f"{name}.{function}")
    shipped = "|".join(sorted({re.escape(kind.partition(".")[0].partition(":")[0]) for kind in types}))
    return list(dict.fromkeys(types)), rf"^(?!({shipped})(\.|$))[A-Za-z_]\w*(\.\w+)+$"


def _preference_types(kind: str) -> list[str]:
    """The data set types for DPO or KTO: module.function, or a module alone for its function default."""
    types = []
    for name, module in _modules(importlib.import_module(f"{prompt_strategies.__name__}.{kind}")):
        for function in _functions(module, "cfg"):
            types += [f"{name}.{function}", *([name] if function == "default" else [])]
    return types


def _functions(module: ModuleType, first: str) -> Iterator[str]:
    """The names of what a module defines, takes a first parameter of some name, and is no class."""
    for name, found in vars(module).items():
        own = callable(found) and not isinstance(found, type) and found.__module__ == module.__name__
        if own and next(iter(inspect.signature(found).parameters), None) == first:
            yield name


ANY_GPU = Gpu("H100", (9, 0))
"""What a config is validated for where no GPU is named or there."""


def capabilities(gpu: Gpu = ANY_GPU) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Axolotl's probe (`axolotl.cli.config.gpu_capabilities`) would say of one GPU, and of this environment."""
    of_gpu = {
        "bf16": True,  # it says so of every GPU, as torch emulates it
        "fp8": gpu.capability >= (9, 0),
        "tf32": gpu.capability >= (8, 0),
        "n_gpu": 1,
        "n_node": 1,
        "compute_capability": gpu.sm,
    }
    return of_gpu, {"torch_version": torch.__version__.partition("+")[0]}


def validate(content: Config, gpu: Gpu) -> Iterator[Finding]:
    """What Axolotl's own validation of a config says for a GPU: errors, and what it logs as warnings."""
    logger, records = logging.getLogger("axolotl"), list[logging.LogRecord]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    former, logger.handlers, logger.propagate = (logger.handlers, logger.propagate), [handler], False
    disabled = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    PluginManager._instance = None  # plugins of a config validated before
    try:
        cfg = DictDefault(copy.deepcopy(content))
        prepare_plugins(cfg)
        validate_config(cfg, *capabilities(gpu))
    except ValidationError as error:
        for one in error.errors():
            key = str(one["loc"][0]) if one["loc"] else ""  # below, pydantic names its classes too
            yield Finding("error", "axolotl", key, one["msg"].removeprefix("Value error, "))
    except Exception as error:  # validators, and plugins as they load, can raise anything
        yield Finding("error", "axolotl", "", f"{type(error).__name__}: {error}")
    finally:
        logger.handlers, logger.propagate = former
        logging.disable(disabled)
    for record in records:
        yield Finding("warning", "axolotl-warning", "", record.getMessage())
