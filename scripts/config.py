"""Reading Axolotl configs, laying profiles and overrides over them, and comparing two by key."""

import json
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from .errors import UserError

Config = dict[str, Any]
TRACKING = re.compile("(use_|hf_)?(wandb|mlflow|comet|trackio|swanlab|tensorboard|otel)(_|$)")
"""Keys that say where a run is tracked, which changes nothing of the training."""
OF_THE_RUN = ("output_dir", "dataset_prepared_path", "resume_from_checkpoint")  # a run sets these itself


class _Loader(yaml.CSafeLoader):
    """PyYAML's safe loader, which Axolotl uses too, but a key that stands twice is an error, and
    `2e-4` is a number (PyYAML reads text, which Axolotl turns into that number later)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.CSafeDumper):
    """Quotes text that `_Loader` would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


_PLAIN = (type(None), bool, int, float, str, list, dict)
_MOST_VALUES = 100_000  # a config has some hundred; aliases of aliases can make a short file explode
_MOST_LEVELS = 50
_TOO_DEEP = "nested too deeply to be a config, or an alias that contains itself"


def parse(text: str, where: str) -> Any:
    """The value of a YAML text: nothing but text keys, lists, text, numbers, booleans and null.

    Raises:
        UserError: it is no YAML (with the line) or holds something else.
    """
    try:
        content = yaml.load(text, _Loader)
    except RecursionError:
        raise UserError(f"{where}: {_TOO_DEEP}") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    waiting, seen = [(content, 0)], 0
    while waiting:
        (value, depth), seen = waiting.pop(), seen + 1
        if seen > _MOST_VALUES:
            raise UserError(f"{where}: too large to be a config")
        if depth > _MOST_LEVELS:
            raise UserError(f"{where}: {_TOO_DEEP}")
        too_large = isinstance(value, int | float) and not -(2.0**63) < value < 2.0**63  # NaN is not in between either
        if not isinstance(value, _PLAIN) or too_large:
            raise UserError(f"{where}: {value!r:.50} is no value for a config; put it in quotes if it is text")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise UserError(f"{where}: the key {key!r:.50} is no text; put it in quotes")
            waiting += [(below, depth + 1) for below in value.values()]
        elif isinstance(value, list):
            waiting += [(below, depth + 1) for below in value]
    return content


def read_text(file: Path) -> str:
    """A text file's content.

    Raises:
        UserError: it cannot be read or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a text file in UTF-8") from None


def read_yaml(file: Path) -> Config:
    """The mapping in a YAML file.

    Raises:
        UserError: the file cannot be read, is no YAML (with the line), or holds something else.
    """
    content = parse(read_text(file), str(file))
    if not isinstance(content, dict):
        raise UserError(f"{file}: a config is a mapping of keys to values")
    return content


def sources(file: Path) -> dict[str, str]:
    """What the comment behind each top-level key of a recipe says, which is the setting's source."""
    return dict(re.findall(r"^(\w+):.*?  # (.*)$", read_text(file), re.MULTILINE))


def write_yaml(config: Config) -> str:
    """A config as YAML text, keys in the order they have."""
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def write_flow(value: Any) -> str:
    """A value as YAML on one line, as it may stand within brackets too."""
    text: str = yaml.dump(
        [value], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9, default_flow_style=True
    )
    text = text.rstrip("\n")[1:-1]
    return json.dumps(value) if "\n" in text else text  # which is YAML too; text of several lines comes so otherwise


def line_of(file: Path, key: str) -> int:
    """The line, from 1, on which a dotted key of a YAML file stands, or what it is part of; 1 for neither."""
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=_Loader)
    line = 1
    for part in key.split("."):
        if isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
        elif isinstance(node, yaml.MappingNode):
            found = [pair for pair in node.value if pair[0].value == part]
            if not found:
                break
            line, node = found[-1][0].start_mark.line + 1, found[-1][1]
    return line


def merge(config: Config, changes: Config) -> Config:
    """`config` with `changes` laid over it: mappings merge, anything else replaces, null deletes the key."""
    merged = dict(config)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            below = merged.get(key)
            merged[key] = merge(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def parse_override(text: str) -> tuple[str, Any]:
    """The dotted key and the YAML value of a `key=value`, as given to --set.

    Raises:
        UserError: it has another form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text}: expected key=value, as in --set num_epochs=3")
    return key.strip(), parse(value, f"--set {text}")


def override(config: Config, key: str, value: Any) -> Config:
    """`config` with one dotted key set; a number in the key is a position in a list, null deletes.

    Raises:
        UserError: the key leads through something that has no keys.
    """
    changed: Config = _replaced(config, key, value, key)
    return changed


def _replaced(current: Any, path: str, value: Any, key: str) -> Any:
    """`current` with what stands at `path` below it replaced."""
    if not path:
        return value
    part, _, rest = path.partition(".")
    if isinstance(current, list):
        if not part.isdecimal() or int(part) >= len(current):
            raise UserError(f"--set {key}: {part} is not a position in a list of {len(current)}, counted from 0")
        return [_replaced(old, rest, value, key) if i == int(part) else old for i, old in enumerate(current)]
    if isinstance(current, dict) or current is None:
        changed = (current or {}) | {part: _replaced((current or {}).get(part), rest, value, key)}
        return {name: item for name, item in changed.items() if item is not None}
    raise UserError(f"--set {key}: {current!r} has no key {part}")


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys and values at the leaves of a config; a list of plain values is one leaf."""
    if isinstance(config, dict) and (config or not prefix):
        items: Any = config.items()
    elif isinstance(config, list) and any(isinstance(item, dict | list) for item in config):
        items = enumerate(config)
    else:
        yield prefix, config
        return
    for key, value in items:
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Each dotted key in which two configs differ, with both values; None where one lacks it."""
    left, right = dict(flatten(a)), dict(flatten(b))
    keys = [*left, *(key for key in right if key not in left)]
    return {key: (left.get(key), right.get(key)) for key in keys if not _same(left.get(key), right.get(key))}


def _same(a: Any, b: Any) -> bool:
    """Equality that tells true from 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


class Difference(BaseModel):
    """One key in which a run's config differs from its recipe, and why."""

    key: str
    recipe: Any = None
    run: Any = None
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {self.recipe} -> {self.run}  ({self.why})"


def check_not_of_the_run(key: str, where: str) -> None:
    if key.partition(".")[0] in OF_THE_RUN:
        raise UserError(f"{where}: {key} is the run's own; --runs moves runs, `recipe resume` goes on with one")
