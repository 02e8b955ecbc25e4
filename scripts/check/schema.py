"""Validates configs against Axolotl's JSON Schema, without importing Axolotl.

tools/schemas.py writes the schema.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from functools import cache, partial
from itertools import groupby
from typing import Any

from ..base import yamlfiles
from ..base.errors import UserError, did_you_mean
from ..base.paths import RECIPES
from ..base.secrets import is_secret
from ..base.yamlfiles import Config
from ..config import keys
from ..config.finding import MOST_FINDINGS, Finding, Level
from ..config.merging import listed, override

FILE = RECIPES / "axolotl.schema.json"
UNLISTED = ("unknown-key", "foreign-key")
"""Rules about keys that the schema does not list."""
_finding = partial(Finding, rule_scope="step")  # a plan needs values that follow the schema


@cache
def load() -> Config:
    """The schema of the Axolotl version that this project supports."""
    import orjson

    return orjson.loads(FILE.read_bytes())


def findings(content: Config) -> Iterator[Finding]:
    """Findings for values that break the schema, in the order of the config's keys."""
    import jsonschema

    names = listed(content, "plugins")
    # foreign plugins, whose keys the schema does not list
    foreign = [name for name in names if name not in load()["x-plugins"] and not name.startswith("qlora_recipes.")]
    for error in jsonschema.Draft202012Validator(load()).iter_errors(content):
        for cause in _closest(error):
            for finding in _as_findings(cause, foreign):
                if is_secret(finding.key):
                    finding.problem = "value not allowed"  # without the value, which is secret
                yield finding


def usable(content: Config, broken: Iterable[Finding]) -> tuple[Config, set[str]]:
    """Remove values that break the schema; return the config and the affected top-level keys.

    A removed list item becomes None, so that the other items keep their positions."""
    wrong = set()
    for finding in broken:
        if finding.rule in ("value", "plugin-key"):
            wrong.add(finding.top_key)
            with suppress(UserError):  # `override` fails for a key that contains a dot
                content = override(content, finding.key, None)
    return content, wrong


def _closest(error: Any) -> Iterator[Any]:
    """Replace an error of anyOf by the errors of the alternative nearest to the value.

    jsonschema's best_match prefers the deepest error. If a data set has a misspelt key, best_match would choose the
    alternative SyntheticDataset, and report that alternative's errors.
    """
    alternatives = [list(causes) for _, causes in groupby(error.context or (), lambda cause: cause.schema_path[0])]
    # prefer alternatives of the value's type, then the fewest mistakes
    nearest = min(alternatives, key=lambda errors: (_is_other_type(errors), sum(map(_mistakes, errors))), default=[])
    if not nearest or _is_other_type(nearest) or error.validator != "anyOf":
        yield error
        return
    for cause in nearest:
        yield from _closest(cause)


def _mistakes(error: Any) -> int:
    """Number of mistakes in an error; each unknown key counts as one mistake."""
    return len(_unknown(error)) if error.validator == "additionalProperties" else 1


def _unknown(error: Any) -> list[str]:
    """The keys of a mapping that the schema does not list."""
    return [key for key in error.instance if key not in error.schema.get("properties", {})]


def _is_other_type(errors: list[Any]) -> bool:
    return any(error.validator == "type" and len(error.relative_path) == 0 for error in errors)


_TYPES = {
    "integer": "an integer",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping of keys",
}


def _as_findings(error: Any, foreign: list[str]) -> Iterator[Finding]:
    """Convert an error of jsonschema to findings, with similar names as hints."""
    path = ".".join(map(str, error.absolute_path))
    start = f"{path}." if path else ""
    if error.validator == "additionalProperties":
        for key in _unknown(error)[:MOST_FINDINGS]:
            yield _unknown_key(error, start, key, foreign)
    elif "errorMessage" in error.schema:
        yield Finding("warning", "plugin-key", path, error.schema["errorMessage"], "add it, or delete the key")
    elif error.validator == "required":
        for key in error.validator_value:
            if key not in error.instance:
                yield _finding("error", "missing-key", f"{start}{key}", "missing; set it")
    elif error.validator in ("enum", "const", "anyOf", "type"):
        problem = f"{yamlfiles.write_flow(error.instance):.60} is not {_allowed(error)}"
        yield _finding("error", "value", path, problem, _how_to_write(error.instance))
    else:
        yield _finding("error", "value", path, error.message[:200])


def _unknown_key(error: Any, start: str, key: str, foreign: list[str]) -> Finding:
    """Finding for a key that the schema does not list; `start` is the beginning of its dotted key."""
    names = error.schema.get("properties", {})
    unread = keys.unread(key)
    if error.instance[key] is None:
        return _finding("warning", "unknown-key", f"{start}{key}", unread.reason, "delete the empty key")
    if foreign and not start:
        problem = "unknown to Axolotl"
        return _finding("warning", "foreign-key", key, problem, f"does it belong to {foreign[0]}?")
    if not unread.is_known and get_close_matches(key, names, n=1, cutoff=_MISSPELT):
        return _finding("error", "unknown-key", f"{start}{key}", f"unknown to Axolotl{did_you_mean(key, names)}")
    level: Level = "warning"
    if unread.is_refused and error.instance[key]:
        level = "error"
    return _finding(level, "unknown-key", f"{start}{key}", unread.reason, "correct or delete the key")


_MISSPELT = 0.8
"""Similarity to a key of Axolotl from which a key is a misspelling of it."""


def _choices(error: Any) -> str:
    """Hint with the allowed values nearest to a value, or with all if they are few."""
    choices = [str(choice) for choice in error.schema.get("enum", [error.validator_value])]
    if error.parent and {"type": "boolean"} in error.parent.schema["anyOf"]:
        choices += ["true", "false"]
    listed = f"; choose {', '.join(choices)}" if len(choices) < 40 else ""
    return did_you_mean(str(error.instance), choices) or listed


def _allowed(error: Any) -> str:
    """Values or types that the schema allows, in words."""
    if error.validator in ("enum", "const"):
        return f"an allowed value{_choices(error)}"
    types = []
    for cause in (error, *error.context):
        if cause.validator == "type" and cause.validator_value in _TYPES:
            types.append(_TYPES[cause.validator_value])
    return " or ".join(dict.fromkeys(types))


def _how_to_write(value: Any) -> str:
    """The remedy for a value that YAML reads as an unintended type."""
    if isinstance(value, bool):
        return "YAML reads yes, no, on and off as true or false; put text in quotes"
    if isinstance(value, str) and re.fullmatch(r"[-+.\deE_]+|true|false|null", value):
        return "write it without quotes"
    return ""
