"""The JSON Schema of Axolotl's configuration, which tools/schemas.py writes, applied without importing Axolotl."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import groupby
from typing import Any

from ..base import yamlfiles
from ..base.errors import UserError, did_you_mean
from ..base.paths import RECIPES
from ..base.progress import is_secret
from ..base.yamlfiles import Config
from ..configs.config import override
from .finding import Finding

FILE = RECIPES / "axolotl.schema.json"


@cache
def load() -> Config:
    """The schema of the Axolotl that this project was made for."""
    import orjson

    return orjson.loads(FILE.read_bytes())


def findings(content: Config) -> Iterator[Finding]:
    """Each place where a config breaks the schema, in the order of the config's keys."""
    import jsonschema

    plugins = content.get("plugins")
    names = [name for name in plugins if isinstance(name, str)] if isinstance(plugins, list) else []
    # plugins that are neither Axolotl's nor this project's: their keys are not known here
    foreign = [name for name in names if name not in load()["x-plugins"] and not name.startswith("qlora_recipes.")]
    for error in jsonschema.Draft202012Validator(load()).iter_errors(content):
        for cause in _closest(error):
            for finding in _as_findings(cause, foreign):
                if is_secret(finding.key):
                    finding.problem = "its value is not allowed"  # and stays unsaid
                yield finding


def usable(content: Config, broken: Iterable[Finding]) -> tuple[Config, set[str]]:
    """A config without the values that break the schema, for rules, and the top-level keys that these are
    part of. An item of a list becomes None, so that the others keep their positions."""
    keys = [finding.key for finding in broken if finding.rule in ("value", "plugin-key")]
    for key in keys:
        with suppress(UserError):  # a key with a dot in it
            content = override(content, key, None)
    return content, {key.partition(".")[0] for key in keys}


def _closest(error: Any) -> Iterator[Any]:
    """The errors behind one of anyOf, in the alternative that the value comes nearest to.

    jsonschema's best_match prefers the deepest error: it takes a misspelt key of a data set for a synthetic one's.
    """
    alternatives = [list(causes) for _, causes in groupby(error.context or (), lambda cause: cause.schema_path[0])]
    # an alternative of another type says least about what was meant; then the one with the fewest mistakes
    nearest = min(alternatives, key=lambda errors: (_is_other_type(errors), sum(map(_mistakes, errors))), default=[])
    if not nearest or _is_other_type(nearest) or error.validator != "anyOf":
        yield error
        return
    for cause in nearest:
        yield from _closest(cause)


def _mistakes(error: Any) -> int:
    """Number of mistakes that an error stands for: each unknown key is one."""
    return len(_unknown(error)) if error.validator == "additionalProperties" else 1


def _unknown(error: Any) -> list[str]:
    """The keys of a mapping that its schema does not have."""
    return [key for key in error.instance if key not in error.schema.get("properties", {})]


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
    """One of jsonschema's errors as findings, with near names."""
    path = ".".join(map(str, error.absolute_path))
    start = f"{path}." if path else ""
    value = error.instance
    if error.validator == "additionalProperties":
        for key in _unknown(error):
            near = did_you_mean(key, error.schema.get("properties", {}))
            problem = f"no key of Axolotl's{near or '; it would be ignored'}"
            if value[key] is None:
                yield Finding("warning", "unknown-key", f"{start}{key}", problem, "it is empty: delete it")
            elif foreign and not path:  # it may be that plugin's
                yield Finding("warning", "unknown-key", key, problem, f"or is it one of {foreign[0]}?")
            else:
                yield Finding("error", "unknown-key", f"{start}{key}", problem)
    elif "errorMessage" in error.schema:
        yield Finding("error", "plugin-key", path, error.schema["errorMessage"], "add it, or delete the key")
    elif error.validator == "required":
        for key in [key for key in error.validator_value if key not in value]:
            yield Finding("error", "missing-key", f"{start}{key}", "has to be set")
    elif error.validator == "enum":
        choices = [str(choice) for choice in error.validator_value]
        near = did_you_mean(str(value), choices) or (f"; one of {', '.join(choices)}" if len(choices) < 40 else "")
        yield Finding("error", "value", path, f"{_as_yaml(value)} is not an allowed value{near}", _how_to_write(value))
    elif error.validator in ("anyOf", "type"):
        types = [cause.validator_value for cause in (error, *error.context) if cause.validator == "type"]
        allowed = " or ".join(dict.fromkeys(_TYPES[kind] for kind in types if kind in _TYPES))
        yield Finding("error", "value", path, f"{_as_yaml(value)} is not {allowed}", _how_to_write(value))
    else:
        yield Finding("error", "value", path, error.message[:200])


def _as_yaml(value: Any) -> str:
    """A value as it is written in YAML, shortened."""
    text = yamlfiles.write_flow(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _how_to_write(value: Any) -> str:
    """The remedy for a value that YAML reads as another type than its writer meant."""
    if isinstance(value, bool):
        return "YAML reads yes, no, on and off as true or false; put text in quotes"
    if isinstance(value, str) and re.fullmatch(r"[-+.\deE_]+|true|false|null", value):
        return "write it without quotes"
    return ""
