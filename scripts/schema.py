"""Axolotl's configuration keys: generated from the installed Axolotl, looked up without importing it."""

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from .config import Config
from .errors import did_you_mean

FILE = Path(__file__).with_name("axolotl.schema.json")


def generate() -> str:
    """The JSON Schema of the installed Axolotl's configuration, as text. Imports Axolotl, some 10 s.

    The keys of the plugins that come with Axolotl stand under `x-plugins`, by the plugin's name.
    """
    import enum
    import importlib
    import pkgutil
    from importlib.metadata import version

    import axolotl.integrations
    from axolotl.integrations.base import BasePlugin
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from pydantic.json_schema import GenerateJsonSchema

    class Schema(GenerateJsonSchema):
        """Spells out torch's dtypes, for which JSON has no form."""

        def enum_schema(self, schema: Any) -> dict[str, Any]:
            values = [member.value for member in schema["members"]]
            if all(isinstance(value, str | int) for value in values):
                return super().enum_schema(schema)
            return {"enum": [str(value).removeprefix("torch.") for value in values]}

        def encode_default(self, dft: Any) -> Any:
            return str(dft.value) if isinstance(dft, enum.Enum) else super().encode_default(dft)

    plugins = {}
    for package in pkgutil.iter_modules(axolotl.integrations.__path__):
        try:
            module = importlib.import_module(f"axolotl.integrations.{package.name}")
        except ImportError:  # a plugin whose own library is not installed cannot be used here either
            continue
        for name, found in list(vars(module).items()):
            if isinstance(found, type) and issubclass(found, BasePlugin) and found is not BasePlugin:
                where, _, arguments = (found().get_input_args() or "").rpartition(".")
                keys = getattr(importlib.import_module(where), arguments).model_fields if where else ()
                plugins[f"axolotl.integrations.{package.name}.{name}"] = sorted(keys)
    schema = AxolotlInputConfig.model_json_schema(schema_generator=Schema)
    for name, field in AxolotlInputConfig.model_fields.items():
        if field.alias:  # Axolotl takes either name
            schema["properties"][name] = schema["properties"][field.alias]
    head = {"$comment": f"axolotl {version('axolotl')}, written by `recipe render --schema`"}
    return json.dumps(head | schema | {"x-plugins": plugins}, indent=1) + "\n"


@cache
def load() -> dict[str, Any]:
    """The schema of the Axolotl that this project was made for."""
    import orjson

    return orjson.loads(FILE.read_bytes())


def unknown_keys(config: Config) -> Iterator[tuple[str, str]]:
    """Each dotted key that Axolotl does not know, with a hint at the nearest ones; Axolotl ignores them."""
    plugins = config.get("plugins")
    yield from _unknown(config, [load()], "", _plugin_keys(plugins if isinstance(plugins, list) else ()))


_TRAIN_OPTIONS = {"debug", "debug_num_examples", "debug_text_only", "merge_lora", "prompter", "shard", "sweep", "cloud"}


def is_option(name: str) -> bool:
    """Whether `axolotl train` has an option of that name (with underscores): its own, or a config key, or its no_."""
    key = name.partition(".")[0]
    known = load()["properties"].keys() | _TRAIN_OPTIONS
    return key in known or key.removeprefix("no_") in known


def _plugin_keys(plugins: Iterable[str]) -> set[str]:
    """The top-level keys of the plugins that a config lists, and of those that Axolotl always loads."""
    always = ("axolotl.integrations.context_parallel.", "axolotl.integrations.expert_parallel.")
    shipped = load()["x-plugins"]
    return {key for name in shipped if name in plugins or name.startswith(always) for key in shipped[name]}


def _unknown(
    value: Any, schemas: list[dict[str, Any]], path: str, more: Iterable[str] = ()
) -> Iterator[tuple[str, str]]:
    """Unknown keys of a value that may follow any of the schemas; `more` are further keys of the top level."""
    schemas = [alternative for schema in schemas for alternative in _alternatives(schema)]
    if isinstance(value, list):
        below = [schema["items"] for schema in schemas if "items" in schema]
        for i, item in enumerate(value):
            yield from _unknown(item, below, f"{path}{i}.")
    elif isinstance(value, dict):
        objects = [schema["properties"] for schema in schemas if "properties" in schema]
        if not objects or any(schema.get("additionalProperties") for schema in schemas):
            return  # a mapping that Axolotl hands on as it is
        known = {key for properties in objects for key in properties} | set(more)
        for key, item in value.items():
            if key not in known:
                yield f"{path}{key}", did_you_mean(key, known)
            else:
                yield from _unknown(item, [o[key] for o in objects if key in o], f"{path}{key}.")


def _alternatives(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema without its indirections: the targets of $ref and the members of anyOf."""
    if "$ref" in schema:
        yield from _alternatives(load()["$defs"][schema["$ref"].rpartition("/")[2]])
    elif "anyOf" in schema:
        for member in schema["anyOf"]:
            yield from _alternatives(member)
    else:
        yield schema
