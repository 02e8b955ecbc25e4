"""The installed Axolotl: the schema of its configs, its validation, and its tokenization of rows.

Importing this imports Axolotl, some 10 s.
"""

import enum
import importlib
import inspect
import json
import logging
import os
import pkgutil
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from typing import Any
from unittest.mock import patch

import axolotl.integrations
import torch
from axolotl import prompt_strategies
from axolotl.integrations.base import BasePlugin, PluginManager, get_builtin_plugins
from axolotl.prompters import PromptStyle
from axolotl.utils.config import normalize_cfg_datasets, normalize_config, prepare_plugins, validate_config
from axolotl.utils.data.wrappers import DATASET_HANDLERS, get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.enums import CANONICAL_ATTN_IMPLS, ChatTemplate, CustomSupportedOptimizers
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from pydantic import ValidationError
from pydantic.json_schema import GenerateJsonSchema, NoDefault
from transformers import BitsAndBytesConfig, SchedulerType
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from ..base.errors import UserError
from ..base.processes import end_with_parent
from ..base.yamlfiles import Config
from ..configs.gpus import Gpu
from ..runs.eval_loss import MASKED
from .finding import Finding
from .schema import BOUNDS, DESCRIPTIONS

disable_progress_bar()
# Axolotl tokenizes in a process that it forks, which would outlive a killed command and keep the locks it inherited
os.register_at_fork(after_in_child=end_with_parent)


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


def generate_schema() -> str:
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
    for kind in ("dpo", "kto"):
        _set_values(definitions[f"{kind.upper()}Dataset"]["properties"], "type", _preference_types(kind))
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
        "$comment": f"axolotl {version('axolotl')}, written by `recipe render --schema`",
    }
    return json.dumps(head | main | {"x-plugins": plugins}, indent=1) + "\n"


def _bound_and_describe(keys: dict[str, Any]) -> None:
    """Add to keys what Axolotl leaves out of them: bounds of numbers, and descriptions."""
    for name, bound in BOUNDS.items():
        alternatives = keys[name].get("anyOf", [keys[name]])
        for alternative in alternatives:
            if alternative["type"] in ("integer", "number"):
                alternative |= bound
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
    kept = [kind for kind in keys[key]["anyOf"] if kind.get("type") != "string" and not names.search(str(kind))]
    keys[key]["anyOf"] = text + kept


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
    shipped = "|".join(sorted({re.escape(kind.partition(".")[0].partition(":")[0]) for kind in types}))
    return list(dict.fromkeys(types)), rf"^(?!({shipped})(\.|$))[A-Za-z_]\w*(\.\w+)+$"


def _preference_types(kind: str) -> list[str]:
    """The data set types for DPO or KTO: module.function, or a module alone for its function default."""
    types = []
    for module, function in _strategies(importlib.import_module(f"{prompt_strategies.__name__}.{kind}"), "cfg"):
        types += [f"{module}.{function}", *([module] if function == "default" else [])]
    return types


def _strategies(package: ModuleType, first: str) -> Iterator[tuple[str, str]]:
    """Functions of a package's modules with a first parameter of some name: paths of modules, and names."""
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        path = found.name.removeprefix(f"{package.__name__}.")
        if not path.startswith("_"):
            for name, value in vars(importlib.import_module(found.name)).items():
                own = callable(value) and not isinstance(value, type) and value.__module__ == found.name
                if own and next(iter(inspect.signature(value).parameters), None) == first:
                    yield path, name


ANY_GPU = Gpu("H100", (9, 0))
"""The GPU that a config is validated for where none is named or there."""


def capabilities(gpu: Gpu = ANY_GPU) -> tuple[dict[str, Any], dict[str, Any]]:
    """Answers of Axolotl's probe (`axolotl.cli.config.gpu_capabilities`) for one GPU and this environment."""
    of_gpu = {
        "bf16": True,  # it says so of every GPU, as torch emulates it
        "fp8": gpu.capability >= (9, 0),
        "tf32": gpu.capability >= (8, 0),
        "n_gpu": 1,
        "n_node": 1,
        "compute_capability": gpu.sm,
    }
    return of_gpu, {"torch_version": torch.__version__.partition("+")[0]}


def validated(content: Config, gpu: Gpu = ANY_GPU) -> DictDefault:
    """A config as Axolotl's own validation for a GPU leaves it. Validators, and plugins that load, raise anything."""
    PluginManager._instance = None  # plugins of a config validated before
    cfg = DictDefault(content)
    prepare_plugins(cfg)
    return validate_config(cfg, *capabilities(gpu))


def validate(content: Config, gpu: Gpu) -> list[Finding]:
    """Errors of Axolotl's own validation of a config for a GPU, and what it logs as warnings."""
    findings = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: findings.append(Finding("warning", "axolotl-warning", "", record.getMessage()))
    disabled = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    with patch.multiple(logging.getLogger("axolotl"), handlers=[handler], propagate=False):
        try:
            validated(content, gpu)
        except ValidationError as error:
            for problem in error.errors():
                key = str(problem["loc"][0]) if problem["loc"] else ""  # below, pydantic names its classes too
                findings.append(Finding("error", "axolotl", key, problem["msg"].removeprefix("Value error, ")))
        except Exception as error:
            findings.append(Finding("error", "axolotl", "", f"{type(error).__name__}: {error}"))
    logging.disable(disabled)
    return findings


@dataclass
class Tokens:
    """A tokenized row: token ids, and for each the id that is to be learnt there, or MASKED."""

    ids: list[int]
    labels: list[int]

    @property
    def learnt(self) -> int:
        """Number of tokens that carry loss."""
        return sum(label != MASKED for label in self.labels)


def tokenize(
    where: str, cfg: Any, dataset: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], longest: int
) -> list[Tokens]:
    """Rows as Axolotl tokenizes them for training, before it drops or cuts the long ones.

    Args:
        where: what messages call the rows.
        cfg: a config, as Axolotl's DictDefault.
        dataset: the entry of the rows' data set in it.
        tokenizer: the tokenizer.
        rows: fields by name.
        longest: the most tokens of a prompt, and of an answer, which Axolotl cuts separately.

    Raises:
        UserError: Axolotl cannot tokenize them.
    """
    kind = dataset["type"]
    base, _, style = kind.partition(":") if isinstance(kind, str) else ("", "", "")
    # its | would keep cfg's values; any number of processes, 1 too, would have some started for these few rows
    limited = DictDefault({**cfg, "sequence_len": longest, "dataset_num_proc": None})
    fields = dict.fromkeys(name for row in rows for name in row)
    try:
        table = Dataset.from_list([{name: row.get(name) for name in fields} for row in rows])
        tokenized, _ = get_dataset_wrapper(dataset, tokenizer, limited, base, table, style or None)
    except Exception as error:  # a strategy can raise anything, and so can values of several types in a field
        problem = f"Axolotl cannot tokenize these rows as {kind}: {type(error).__name__}: {error}"
        raise UserError(f"{where}: {problem}") from None
    return [Tokens(row["input_ids"], row["labels"]) for row in tokenized]


def require_one_each(where: str, dataset: Any, rows: Sequence[Any], tokenized: Sequence[Tokens]) -> None:
    """Raise UserError where a data set's type does not make one training row of each row."""
    if len(tokenized) != len(rows):
        problem = f"Axolotl makes {len(tokenized)} training rows of {len(rows)} ({dataset['type']})"
        raise UserError(f"{where}: {problem}; they cannot be evaluated")


def taught_ends(cfg: Config, tokenizer: Any) -> set[int]:
    """Tokens that a training teaches as the end of an answer: the end-of-text token and `eot_tokens`."""
    of_turns = tokenizer.convert_tokens_to_ids(list(cfg.get("eot_tokens") or []))
    return ({tokenizer.eos_token_id} | (set(of_turns) - {tokenizer.unk_token_id})) - {None}


def as_trained(content: Config) -> Any:
    """A config as a training has it: validated, with defaults, and each data set's chat template. Raises anything."""
    cfg = validated(content)
    normalize_config(cfg)
    normalize_cfg_datasets(cfg)
    return cfg
