"""Writes the JSON Schemas of recipes, from the installed Axolotl, and of study.yaml."""

import enum
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator
from importlib.metadata import version
from types import ModuleType
from typing import Any

import axolotl.integrations
from axolotl import prompt_strategies
from axolotl.integrations.base import BasePlugin, get_builtin_plugins
from axolotl.prompters import PromptStyle
from axolotl.utils.data.wrappers import DATASET_HANDLERS
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.enums import CANONICAL_ATTN_IMPLS, ChatTemplate, CustomSupportedOptimizers
from pydantic.json_schema import GenerateJsonSchema, NoDefault
from transformers import BitsAndBytesConfig, SchedulerType
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from qlora_recipes.check import schema
from qlora_recipes.data import studies

# Values that Axolotl takes and that cannot train: JSON Schema's bounds for a key. Axolotl 0.21 lets each of them pass.
BOUNDS: dict[str, dict[str, float]] = {
    "num_epochs": {"exclusiveMinimum": 0},
    "max_steps": {"minimum": 1},
    "micro_batch_size": {"minimum": 1},
    "eval_batch_size": {"minimum": 1},
    "batch_size": {"minimum": 1},
    "gradient_accumulation_steps": {"minimum": 1},
    "sequence_len": {"minimum": 2},
    "warmup_steps": {"minimum": 0},
    "warmup_ratio": {"minimum": 0, "exclusiveMaximum": 1},
    "weight_decay": {"minimum": 0},
    "learning_rate": {"exclusiveMinimum": 0, "maximum": 1},
    "max_grad_norm": {"minimum": 0},
    "val_set_size": {"minimum": 0},
    "evals_per_epoch": {"minimum": 0},
    "saves_per_epoch": {"minimum": 0},
    "eval_steps": {"minimum": 0},
    "save_steps": {"minimum": 0},
    "save_total_limit": {"minimum": 1},
    "logging_steps": {"minimum": 1},
    "lora_r": {"minimum": 1},
    "lora_alpha": {"exclusiveMinimum": 0},
    "lora_dropout": {"minimum": 0, "exclusiveMaximum": 1},
    "seed": {"minimum": 0, "maximum": 2**32 - 1},
}

# What Axolotl leaves undescribed of the keys that the recipes use.
DESCRIPTIONS = {
    "learning_rate": "The highest learning rate, which the warm-up ends at",
    "lr_scheduler": "How the learning rate changes after the warm-up: one of transformers' schedules, one_cycle or rex",
    "num_epochs": "How often the training goes through the data; part of an epoch is possible",
    "lora_r": "The rank of LoRA's update matrices: more can learn more, and takes more memory",
    "lora_alpha": "LoRA's update counts lora_alpha / lora_r times (lora_alpha / sqrt(lora_r) with peft_use_rslora)",
    "lora_dropout": "The share of LoRA's inputs that is dropped in training, from 0 to 1",
    "lora_target_modules": "The layers that LoRA adapts: names, each the end of a layer's path, or one regular "
    "expression for whole paths. lora_target_linear: true takes all linear layers",
}


class _Schema(GenerateJsonSchema):
    """Spells out torch's dtypes, for which JSON has no form."""

    def enum_schema(self, schema: Any) -> dict[str, Any]:
        values = [member.value for member in schema["members"]]
        if all(isinstance(value, str | int) for value in values):
            return super().enum_schema(schema)
        return {"enum": [str(value).removeprefix("torch.") for value in values]}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def get_default_value(self, schema: Any) -> Any:
        default = super().get_default_value(schema)
        return NoDefault if default is None else default  # editors would write a null into a config

    def encode_default(self, dft: Any) -> Any:
        return str(dft.value) if isinstance(dft, enum.Enum) else super().encode_default(dft)


def axolotl_schema() -> str:
    """The schema of the installed Axolotl, as text.

    Keys are those of its pydantic models and of the plugins that come with it, and no others where Axolotl itself
    defines the level. To the types are added the values that the installed stack knows for optimizer, scheduler,
    adapter, attention, data set type, chat template and bitsandbytes' options, and `BOUNDS`. A plugin's keys are
    allowed where the config lists the plugin (`x-plugins` has which are whose).
    """
    main = AxolotlInputConfig.model_json_schema(schema_generator=_Schema)
    keys, definitions = main["properties"], main["$defs"]
    for name, field in AxolotlInputConfig.model_fields.items():
        if field.alias:  # Axolotl takes either name
            keys[name] = keys[field.alias]

    plugins, spellings, adapters = _add_plugins(keys, definitions)
    templates = [template.value for template in ChatTemplate]
    templates += [f"tokenizer_default_fallback_{name}" for name in templates]
    allowed = {
        "chat_template": templates,
        "optimizer": [*OptimizerNames, *CustomSupportedOptimizers],
        "lr_scheduler": [*SchedulerType, "one_cycle", "rex"],
        "adapter": adapters,
        "eval_strategy": [*IntervalStrategy],
        "save_strategy": [*SaveStrategy],
    }
    for key, values in allowed.items():
        _set_values(keys, key, values)
    _set_values(keys, "attn_implementation", sorted(CANONICAL_ATTN_IMPLS), "^[^/]+/[^/]+$")  # or a kernel on the hub
    _set_values(definitions["SFTDataset"]["properties"], "type", *_sft_types())
    _set_values(definitions["SFTDataset"]["properties"], "chat_template", templates)
    for section in ("datasets", "test_datasets"):  # Axolotl makes each an SFTDataset, which drops other keys
        keys[section]["anyOf"][0]["items"]["anyOf"].remove({"$ref": "#/$defs/StepwiseSupervisedDataset"})
    # Axolotl has no schema of its own for data sets of ORPO
    _set_values(definitions["DPODataset"]["properties"], "type", _preference_types("dpo") + _preference_types("orpo"))
    _set_values(definitions["KTODataset"]["properties"], "type", _preference_types("kto"))
    options = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    keys["bnb_config_kwargs"]["anyOf"][0] |= {
        "properties": {key: {} for key in [*options, "blocksize"]} | {"bnb_4bit_quant_type": {"enum": ["nf4", "fp4"]}},
        "additionalProperties": False,  # transformers only logs an option that it does not know
    }
    plugin_names = {"anyOf": [{"type": "string", "enum": sorted(spellings)}, {"type": "string"}]}  # or anyone's
    keys["plugins"]["anyOf"][0]["items"] = plugin_names
    _bound_and_describe(keys)
    of_fsdp = definitions["FSDPConfig"]["properties"]  # Axolotl takes its keys with their old prefix too
    of_fsdp |= {f"fsdp_{key}": value | {"deprecated": True} for key, value in of_fsdp.items() if key != "fsdp_version"}
    for level in (main, *definitions.values()):
        if "properties" in level:
            level.setdefault("additionalProperties", False)
    main["allOf"] = [
        _only_with(name, names, plugins[name])
        for name, names in spellings.items()
        if plugins[name] and not {*names} & {*get_builtin_plugins()}  # which are on whether or not a config lists them
    ]
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": f"axolotl {version('axolotl')}, written by tools/schemas.py",
    }
    return json.dumps(head | main | {"x-plugins": plugins}, indent=1) + "\n"


def _bound_and_describe(keys: dict[str, Any]) -> None:
    """Add to keys what Axolotl leaves out of them: bounds of numbers, and descriptions."""
    for name, bound in BOUNDS.items():
        alternatives = keys[name].get("anyOf", [keys[name]])
        for alternative in alternatives:
            if alternative["type"] in ("integer", "number"):
                alternative.update(bound)
        alternatives.sort(key=lambda alternative: alternative["type"] == "string")  # editors judge by the first
    for name, description in DESCRIPTIONS.items():
        keys[name]["description"] = description


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
        path = plugin.get_input_args()
        arguments = pkgutil.resolve_name(path) if path else None
        own_keys = set(arguments.model_fields) - AxolotlInputConfig.model_fields.keys() if arguments else ()
        modules = (name.rpartition(".")[0], type(plugin).__module__)
        names = [f"{module}{sign}{type(plugin).__name__}" for module in modules for sign in ".:"]
        spellings[name] = list(dict.fromkeys(names))
        plugins |= dict.fromkeys(spellings[name], sorted(own_keys))
        if arguments:
            of_plugin = arguments.model_json_schema(schema_generator=_Schema)
            definitions |= of_plugin.get("$defs", {})
            keys |= {key: value for key, value in of_plugin["properties"].items() if key not in keys}
    return plugins, spellings, adapters


def _only_with(plugin: str, names: list[str], keys: list[str]) -> dict[str, Any]:
    """A schema that forbids a plugin's keys, with what an editor shows, unless `plugins` has one of its names."""
    listed = {"required": ["plugins"], "properties": {"plugins": {"type": "array", "contains": {"enum": names}}}}
    ignored = {"type": "null", "errorMessage": f"ignored unless plugins lists {plugin}", "doNotSuggest": True}
    return {"if": {"not": listed}, "then": {"properties": dict.fromkeys(keys, ignored)}}


def _set_values(keys: dict[str, Any], key: str, values: list[str], pattern: str | None = None) -> None:
    """Have a key's text be one of some values, or follow a pattern."""
    text: list[dict[str, Any]] = [{"type": "string", "enum": [str(getattr(value, "value", value)) for value in values]}]
    if pattern:
        text.append({"type": "string", "pattern": pattern})
    names = re.compile("CustomSupported|ChatTemplate")
    kinds = [kind for kind in keys[key]["anyOf"] if kind.get("type") != "string" and not names.search(str(kind))]
    keys[key]["anyOf"] = text + kinds


def _plugins() -> Iterator[tuple[str, BasePlugin]]:
    """Axolotl's own plugins, by the name that a config lists them under."""
    for package in pkgutil.iter_modules(axolotl.integrations.__path__):
        try:
            module = importlib.import_module(f"axolotl.integrations.{package.name}")
        except ImportError:  # a plugin whose own library is not installed cannot be used here either
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, type) and issubclass(value, BasePlugin) and value is not BasePlugin:
                yield f"axolotl.integrations.{package.name}.{name}", value()


def _sft_types() -> tuple[list[str], str]:
    """The data set types for supervised fine-tuning, and a pattern for a strategy in a module of the user's own.

    `axolotl.prompt_strategies.load` finds a module and the function load in it, or load_x behind a dot; what it
    does not find, `get_dataset_wrapper` looks up in DATASET_HANDLERS, with a prompt style behind a colon.
    """
    types = [f"{kind}{style}" for kind in DATASET_HANDLERS for style in ("", *(f":{s.value}" for s in PromptStyle))]
    for module, function in _strategies(prompt_strategies, "tokenizer"):
        if re.fullmatch("load|load_.*", function) and module != "user_defined":  # that one is for a mapping as type
            types.append(module if function == "load" else f"{module}.{function}")
    built_in = "|".join(sorted({re.escape(kind.partition(".")[0].partition(":")[0]) for kind in types}))
    return list(dict.fromkeys(types)), rf"^(?!({built_in})(\.|$))[A-Za-z_]\w*(\.\w+)+$"


def _preference_types(kind: str) -> list[str]:
    """The data set types for DPO, KTO or ORPO: module.function, or a module alone for its function default."""
    types = []
    for module, function in _strategies(importlib.import_module(f"{prompt_strategies.__name__}.{kind}"), "cfg"):
        types += [f"{module}.{function}", *([module] if function == "default" else [])]
    return types


def _strategies(package: ModuleType, first: str) -> Iterator[tuple[str, str]]:
    """Functions of a package's modules with a first parameter of some name: paths of modules, and names."""
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        path = module.name.removeprefix(f"{package.__name__}.")
        if not path.startswith("_"):
            for name, value in vars(importlib.import_module(module.name)).items():
                is_own = callable(value) and not isinstance(value, type) and value.__module__ == module.name
                if is_own and next(iter(inspect.signature(value).parameters), None) == first:
                    yield path, name


def study_schema() -> str:
    """The JSON Schema of a study.yaml, for editors."""
    content = studies.Study.model_json_schema()
    content["$defs"]["PublishedScore"] = {"anyOf": [{"type": "number"}, content["$defs"]["PublishedScore"]]}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    schema.FILE.write_text(axolotl_schema(), encoding="utf-8")
    studies.SCHEMA.write_text(study_schema(), encoding="utf-8")
