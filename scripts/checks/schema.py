"""The JSON Schema of Axolotl's configuration: written from the installed Axolotl, applied without importing it."""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from ..base import yamlfiles
from ..base.errors import did_you_mean
from ..base.paths import RECIPES
from ..base.yamlfiles import Config
from ..configs.config import override
from .finding import Finding

FILE = RECIPES / "axolotl.schema.json"

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
    "learning_rate": {"exclusiveMinimum": 0},
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
}

# What Axolotl leaves undescribed of the keys that the recipes use.
DESCRIPTIONS = {
    "learning_rate": "The highest learning rate, which the warm-up ends at",
    "lr_scheduler": "How the learning rate goes on after the warm-up: one of transformers' schedules, one_cycle or rex",
    "num_epochs": "How often the training goes through the data; part of an epoch is possible",
    "lora_r": "The rank of LoRA's update matrices: more can learn more, and takes more memory",
    "lora_alpha": "LoRA's update counts lora_alpha / lora_r times (lora_alpha / sqrt(lora_r) with peft_use_rslora)",
    "lora_dropout": "The share of LoRA's inputs that is dropped in training, from 0 to 1",
    "lora_target_modules": "The layers that LoRA adapts: names, each the end of a layer's path, or one regular "
    "expression for whole paths. lora_target_linear: true takes all linear layers",
}


def generate() -> str:
    """The schema of the installed Axolotl, as text. Imports Axolotl and transformers, some 15 s.

    Keys are those of its pydantic models and of the plugins that come with it, and no others where Axolotl itself
    defines the level. To the types are added the values that the installed stack accepts for optimizer, scheduler,
    adapter, attention, data set type and bitsandbytes' options, and `BOUNDS`. A plugin's keys are allowed where the
    config lists the plugin (`x-plugins` has which are whose).
    """
    from . import installed

    return installed.schema(BOUNDS, DESCRIPTIONS)


@cache
def load() -> dict[str, Any]:
    """The schema of the Axolotl that this project was made for."""
    import orjson

    return orjson.loads(FILE.read_bytes())


TRAIN_OPTIONS = {"debug", "debug_num_examples", "debug_text_only", "prompter", "shard"}
"""The options of `axolotl train` that are no keys of the config and start one training, with underscores."""


def key_of_option(option: str) -> str | None:
    """The config's key that an option of `axolotl train` sets, or unsets with no_ before it; None where it is none."""
    return next(
        (key for key in (option, option.removeprefix("no_")) if key.partition(".")[0] in load()["properties"]), None
    )


_SECRET = re.compile(r"(api_key|secret|password)$|^[^.]*(?<!auth_)token$")


def is_secret(key: str) -> bool:
    """Whether a dotted key is for something that must not stand in a file."""
    return bool(_SECRET.search(key))


def findings(content: Config) -> Iterator[Finding]:
    """Each place where a config breaks the schema, in the order of the config's keys."""
    import jsonschema

    plugins = content.get("plugins")
    foreign = [name for name in plugins if _is_foreign(name)] if isinstance(plugins, list) else []
    for error in jsonschema.Draft202012Validator(load()).iter_errors(content):
        for found in _closest(error):
            yield from _as_findings(found, foreign)


def usable(content: Config, broken: Iterable[Finding]) -> tuple[Config, set[str]]:
    """What rules can rely on: a config without the values that break the schema, and the top-level keys that these are
    part of. An item of a list becomes None, so that the others keep their positions."""
    keys = [finding.key for finding in broken if finding.rule in ("value", "plugin-key")]
    for key in keys:
        content = override(content, key, None)
    return content, {key.partition(".")[0] for key in keys}


def _is_foreign(plugin: Any) -> bool:
    """Whether a plugin is neither Axolotl's nor this project's, so that its keys are not known here."""
    if not isinstance(plugin, str):
        return False
    return plugin not in load()["x-plugins"] and not plugin.startswith("qlora_recipes.")


def _closest(error: Any) -> Iterator[Any]:
    """The errors behind one of anyOf, in the alternative that the value comes nearest to."""
    if not error.context or error.validator not in ("anyOf", "oneOf"):
        yield error
        return
    alternatives: dict[int, list[Any]] = {}
    for found in error.context:
        alternatives.setdefault(found.schema_path[0], []).append(found)
    # the wrong type says least about what was meant; then the fewest mistakes
    nearest = min(alternatives.values(), key=lambda errors: (_is_other_type(errors), sum(map(_mistakes, errors))))
    if _is_other_type(nearest):
        yield error
    else:
        for found in nearest:
            yield from _closest(found)


def _mistakes(error: Any) -> int:
    """How much one error weighs: an unknown key each."""
    unknown = error.validator == "additionalProperties" and error.instance.keys() - error.schema.get("properties", {})
    return len(unknown) if unknown else 1


def _is_other_type(errors: list[Any]) -> bool:
    return any(error.validator == "type" and len(error.relative_path) == 0 for error in errors)


_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping of keys",
}


def _as_findings(error: Any, foreign: list[str]) -> Iterator[Finding]:
    """What one of jsonschema's errors comes to for the one who wrote the config."""
    path = ".".join(map(str, error.absolute_path))
    value, wanted = error.instance, error.validator_value
    if error.validator == "additionalProperties" and isinstance(value, dict):
        known = error.schema.get("properties", {})
        for key in (key for key in value if key not in known):
            below = f"{path}.{key}" if path else key
            problem = f"no key of Axolotl's{did_you_mean(key, known) or '; it would be ignored'}"
            if value[key] is None:
                yield Finding("warning", "unknown-key", below, problem, "it is empty: delete it")
            elif foreign and not path:  # it may be that plugin's
                yield Finding("warning", "unknown-key", below, problem, f"or is it one of {foreign[0]}?")
            else:
                yield Finding("error", "unknown-key", below, problem)
    elif "errorMessage" in error.schema:
        yield Finding("error", "plugin-key", path, error.schema["errorMessage"], "add it, or delete the key")
    elif error.validator == "required":
        for key in [key for key in wanted if key not in value]:
            yield Finding("error", "missing-key", f"{path}.{key}" if path else key, "has to be set")
    elif error.validator in ("anyOf", "type"):
        yield Finding("error", "value", path, f"{_shown(value)} is not {_types(error.schema)}", _how_to_write(value))
    elif error.validator in ("enum", "const"):
        choices = [str(choice) for choice in (wanted if isinstance(wanted, list) else [wanted])]
        near = did_you_mean(str(value), choices)
        some = "" if near or len(choices) > 40 else f"one of {', '.join(choices)}"
        yield Finding("error", "value", path, f"{_shown(value)} is no value for it{near}", some or _how_to_write(value))
    elif error.validator in _BOUND_WORDS:
        yield Finding("error", "value", path, f"{_shown(value)} is not {_BOUND_WORDS[error.validator]} {wanted}")
    else:
        yield Finding("error", "value", path, error.message[:200])


_BOUND_WORDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}


def _shown(value: Any) -> str:
    """A value as YAML would have it, shortened."""
    text = (
        yamlfiles.write_yaml({"": value}).removeprefix("'':").strip() if isinstance(value, dict | list) else str(value)
    )
    if isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    return text if len(text) <= 60 else f"{text[:57]}..."


def _how_to_write(value: Any) -> str:
    """What to do about a value that YAML reads as another type than its writer meant."""
    if isinstance(value, bool):
        return "YAML reads yes, no, on and off as true or false; put text in quotes"
    if isinstance(value, str) and re.fullmatch(r"[-+.\deE_]+|true|false|null", value):
        return "write it without quotes"
    return ""


def _types(schema: dict[str, Any]) -> str:
    """The types that a schema allows, in words."""
    found = dict.fromkeys(_TYPES[name] for name in _type_names(schema) if name in _TYPES)
    return " or ".join(found) or "what is allowed here"


def _type_names(schema: Any) -> Iterable[str]:
    if not isinstance(schema, dict):
        return
    if "$ref" in schema:
        yield from _type_names(load()["$defs"][schema["$ref"].rpartition("/")[2]])
    for member in schema.get("anyOf", []):
        yield from _type_names(member)
    names = schema.get("type", [])
    yield from [names] if isinstance(names, str) else names
