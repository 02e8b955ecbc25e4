"""Reads YAML files strictly, writes them, and finds the line of a key."""

import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError

Config = dict[str, Any]


_OWN = "in words of this project"  # the context of such an error


class _Loader(yaml.CSafeLoader):
    """PyYAML's safe loader, which Axolotl uses too, but a duplicate key is an error, and
    `2e-4` is a number (PyYAML reads text, which Axolotl turns into that number later)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                twice = f"the key {key.value} occurs twice; delete one"
                raise yaml.MarkedYAMLError(_OWN, problem=twice, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.CSafeDumper):
    """Quotes text that `_Loader` would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


_PLAIN = (type(None), bool, int, float, str, list, dict)
_MOST_VALUES = 100_000  # a config has about a hundred; aliases of aliases can make a short file explode
_MOST_LEVELS = 50
_TOO_DEEP = "nested too deeply to be a config, or an alias that contains itself"


def parse(text: str, where: str) -> Any:
    """The value of a YAML text: text, numbers, booleans, null, lists, and mappings with text keys.

    Raises:
        UserError: it is not YAML (with the line) or holds something else.
    """
    try:
        if problem := _out_of_bounds(text):
            raise UserError(f"{where}: {problem}")
        content = yaml.load(text, _Loader)
    except RecursionError:
        raise UserError(f"{where}: {_TOO_DEEP}") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{where}{_in_plain_words(error, text)}") from None
    for value, depth in _values(content):
        if depth > _MOST_LEVELS:
            raise UserError(f"{where}: {_TOO_DEEP}")
        too_large = isinstance(value, int | float) and not -(2.0**63) < value < 2.0**63  # nor is NaN in between
        if not isinstance(value, _PLAIN) or too_large:
            raise UserError(f"{where}: {value!r:.50} is not a value for a config; put it in quotes if it is text")
        for key in value if isinstance(value, dict) else ():
            if not isinstance(key, str):
                raise UserError(f"{where}: the key {key!r:.50} is not text; put it in quotes")
    return content


def _out_of_bounds(text: str) -> str | None:
    """Why a text is no config, if its aliases make it explode or its nesting would end the process; seen before either,
    in what the parser meets one after the other."""
    count = 0
    sizes: dict[str | None, int] = {}  # of what anchors name
    begun: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, _Loader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor in [of for of, _ in begun]:
                return _TOO_DEEP
            count += sizes.get(anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            begun.append((anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            sizes[anchor] = 1
        if len(begun) > _MOST_LEVELS or count > _MOST_VALUES:
            return _TOO_DEEP if len(begun) > _MOST_LEVELS else "too large to be a config"
    return None


def _in_plain_words(error: Any, text: str) -> str:
    """The line of a mistake where there are several, and what it is, without the terms of YAML's grammar."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:  # of a value, not of its form
        return f": not valid YAML: {str(error).splitlines()[0]}"
    lines = [*text.splitlines(), ""]
    at = lines[mark.line][: mark.column + 1]
    words = error.problem
    for pattern, at_its_beginning, plain in _PLAIN_WORDS if error.context != _OWN else ():
        if re.search(pattern, f"{error.context}: {words}, {at}"):
            mark = error.context_mark if at_its_beginning else mark
            words = plain.format(lines[mark.line][mark.column :][:1])
            break
    return f"{f':{min(mark.line + 1, len(lines) - 1)}' if '\n' in text else ''}: not valid YAML: {words}"


_PLAIN_WORDS = (  # by what PyYAML says, and whether the mistake is where it began to read
    ("tab character|any token.*\t$", False, "a tab; indent with spaces"),
    ("mapping values.*, .*: .*:$", False, "a value with a colon and a space in it; put it in quotes"),
    ("mapping values", False, "indented too far, or the line above lacks the colon and space behind its key"),
    ("find expected ':'", True, "no colon between a key and its value"),
    ("a flow ", True, "a [ or {{ that is not closed, or that lacks a comma"),
    ("quoted scalar: .*end of stream", True, "a quotation mark that is not closed"),
    ("unknown escape", False, "a backslash in double quotes; use single ones"),
    ("an alias|an anchor", True, "a value that begins with {}; put it in quotes"),
    ("block collection", False, "a list and keys at the same depth; indent one of them"),
    ("sequence entries", False, "a list begins behind a key; put its first dash on a line of its own"),
    ("node content", False, "a value is missing, or a bracket ends that does not begin"),
    ("expected key", False, "indented unlike the lines above, or a quote or bracket ends where it should not"),
    ("undefined alias|any token|the tag", False, "a value that begins with {}; put it in quotes"),
    ("another document", False, "--- begins a second config; give each a file of its own"),
)


def _values(value: Any, depth: int = 0) -> Iterator[tuple[Any, int]]:
    """A value and all within it, each with its depth."""
    yield value, depth
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _values(item, depth + 1)


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
        UserError: the file cannot be read, is not YAML (with the line), or holds something else.
    """
    content = parse(read_text(file), str(file))
    if not isinstance(content, dict):
        raise UserError(f"{file}: a config is a mapping of keys to values")
    return content


def sources(file: Path) -> dict[str, str]:
    """The comment behind each top-level key of a recipe, which is the setting's source."""
    return dict(re.findall(r"^(\w+):.*?  # (.*)$", read_text(file), re.MULTILINE))


def write_yaml(config: Config) -> str:
    """A config as YAML text, keys in their order."""
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def write_flow(value: Any) -> str:
    """A value as YAML on one line, valid within brackets too."""
    text: str = yaml.dump(
        [value], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9, default_flow_style=True
    ).rstrip("\n")[1:-1]
    return json.dumps(value) if "\n" in text else text  # JSON is YAML too; PyYAML breaks text of several lines


def line_of(file: Path, key: str | Sequence[str]) -> int:
    """The line, from 1, of a key (dotted, or its parts) in a YAML file, or of what it is part of; 1 if neither is."""
    node = _composed(file.read_text(encoding="utf-8"))
    line = 1
    for part in key.split(".") if isinstance(key, str) else key:
        entry = inside(node, part)
        if not entry:
            break
        start = entry[0] if isinstance(node, yaml.MappingNode) else entry[1]
        line = start.start_mark.line + 1
        node = entry[1]
    return line


def respelt(text: str) -> Iterator[tuple[str, str, int | float]]:
    """The numbers in a YAML text that YAML 1.1 reads in another base, as 012 and 1:30: the dotted key, and both."""

    def within(node: Any, key: str) -> Iterator[tuple[str, str, int | float]]:
        if isinstance(node, yaml.ScalarNode):
            if node.tag.endswith((":int", ":float")) and re.fullmatch(r"[-+]?0[\d_]+|.*:.*", node.value):
                yield key, node.value, yaml.load(node.value, _Loader)
            return
        pairs = node.value if isinstance(node, yaml.MappingNode) else enumerate(node.value)
        for part, value in pairs:
            name = str(getattr(part, "value", part))
            yield from within(value, f"{key}.{name}" if key else name)

    if node := _composed(text):
        yield from within(node, "")


@lru_cache(maxsize=8)  # a file with many mistakes is asked for each
def _composed(text: str) -> Any:
    return yaml.compose(text, Loader=_Loader)


def inside(node: Any, part: str) -> tuple[Any, Any] | None:
    """The node of a key in a mapping, and of its value; or a list's node, and that of the item at a position in it."""
    if isinstance(node, yaml.MappingNode):
        return next((pair for pair in node.value if pair[0].value == part), None)
    if isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value):
        return node, node.value[int(part)]
    return None


def in_words(error: Any, forms: Mapping[str, str] | None = None) -> str:
    """A mistake that pydantic found in values from a YAML file, and what to write instead.

    Args:
        error: one of `ValidationError.errors()`.
        forms: what texts of some patterns are, in words.
    """
    wanted = dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "keys with values")
    wanted |= dict.fromkeys(("list_type", "tuple_type"), "a list, as in [a, b]")
    wanted |= {
        "string_type": "text",
        "bool_type": "true or false",
        "int_type": "a whole number",
        "float_type": "a number",
    }
    if error["type"] in wanted:
        return f"expected {wanted[error['type']]} instead of {write_flow(error['input']):.60}"
    bounds = {
        "greater_than_equal": "at least {ge}",
        "greater_than": "more than {gt}",
        "less_than_equal": "at most {le}",
    }
    bounds |= {"literal_error": "one of {expected}", "string_too_short": "text", "string_pattern_mismatch": "{form}"}
    if error["type"] in bounds:
        pattern = error["ctx"].get("pattern", "")
        form = (forms or {}).get(pattern, f"text that {pattern} matches")
        return (
            f"expected {bounds[error['type']].format(**error['ctx'], form=form)}, not {write_flow(error['input']):.60}"
        )
    least = error.get("ctx", {}).get("min_length", 1)
    words = {"too_short": "holds nothing; give at least one" if least == 1 else f"give at least {least}"}
    words |= {"extra_forbidden": "no such key here; correct its name or delete it", "missing": "is missing; add it"}
    return words.get(error["type"]) or str(error["msg"]).removeprefix("Value error, ")
