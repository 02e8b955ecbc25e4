"""Read YAML files strictly, write YAML, and find lines of keys."""

import io
import json
import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .files import reading
from .secrets import MASK, masked_comments, names_secret, without_secrets

Config = dict[str, Any]


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.CSafeLoader):
    """PyYAML's safe loader, which Axolotl uses, with two changes.

    Duplicate keys are errors. `2e-4` is a number; PyYAML alone reads it as text, and Axolotl converts it later.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != _MERGE:
                twice = f"the key {key.value} occurs twice; delete one"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.CSafeDumper):
    """PyYAML's dumper; it quotes text that `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
_OTHER_BASE = re.compile(r"^[-+]?(0[\d_]+|[\d_]+(:[0-5]?\d)+(\.[\d_]*)?)$")  # YAML 1.1 reads 012 as 10, and 1:30 as 90
for _first in "-+0123456789":
    _Loader.yaml_implicit_resolvers[_first].insert(0, ("tag:yaml.org,2002:str", _OTHER_BASE))


class Written(float):
    """Number whose text has the digits of the file, such as 42.30."""

    text: str

    def __str__(self) -> str:
        return self.text


class WrittenLoader(_Loader):
    """Loader that keeps the digits of decimal numbers."""

    def construct_yaml_float(self, node: yaml.ScalarNode) -> Written:
        number = Written(super().construct_yaml_float(node))
        number.text = node.value
        return number


WrittenLoader.add_constructor("tag:yaml.org,2002:float", WrittenLoader.construct_yaml_float)
_Dumper.add_representer(Written, lambda dumper, number: dumper.represent_scalar("tag:yaml.org,2002:float", number.text))

_PLAIN = (type(None), bool, int, float, str, list, dict)
_MOST_VALUES = 100_000  # a config has about a hundred values; nested aliases can expand a short text to millions
_MOST_LEVELS = 50
_MOST_BYTES = 100 << 20


def parse(text: str, file: Path | str = "", loader: Any = _Loader, option: str = "") -> Any:
    """Parse YAML text: text, numbers, booleans, null, lists, and mappings with text keys.

    Args:
        text: the text.
        file: its file, for messages.
        loader: PyYAML's class that reads the text.
        option: the option that has the text as its value, for messages.

    Raises:
        UserError: the text is not YAML (with line and column), is too large, or contains any other value.
    """
    try:
        require_small(text, file, option)
        content = yaml.load(text, loader)
        for value in _values(content):
            too_large = isinstance(value, int | float) and not -(2.0**63) < value < 2.0**63  # True for NaN too
            if not isinstance(value, _PLAIN) or too_large:
                problem = f"{value!r:.50} is not allowed in a config"
                raise UserError(problem, file=file, key=option, remedy="if it is text, put it in quotes")
            if isinstance(value, dict):
                for key in value:
                    if not isinstance(key, str):
                        problem = f"the key {key!r:.50} is not text"
                        raise UserError(problem, file=file, key=option, remedy="put it in quotes")
    except (yaml.YAMLError, ValueError, TypeError) as error:  # ValueError: a number of thousands of digits
        problem, line = _problem(error, text)
        raise UserError(f"not valid YAML: {problem}", file=file, line=line, key=option) from None
    return content


def _problem(error: Exception, text: str) -> tuple[str, int | None]:
    """PyYAML's error on one line, and the line of the text; None for a text of one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or not error.problem_mark:
        return str(error).partition("\n")[0], None
    mark = error.problem_mark
    return f"{error.problem} (column {mark.column + 1})", mark.line + 1 if "\n" in text else None


@dataclass
class _Size:
    """Size of a YAML node: its values, and its levels below the first; with its anchor, if any."""

    values: float = 0
    levels: float = 0
    anchor: str | None = None

    def add(self, part: "_Size") -> None:
        self.values += part.values
        self.levels = max(self.levels, part.levels + 1)


def require_small(text: str, file: Path | str, option: str = "") -> None:
    """Refuse YAML text with too many values or levels before it is composed, which could end the process.

    A text counts as a value for every 100 characters. An alias counts as much as the node that it repeats.

    Raises:
        UserError: the text is too large, or a node contains itself.
    """
    by_anchor: dict[str | None, _Size] = {}
    open_nodes = [_Size()]
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            by_anchor[event.anchor] = _Size(math.inf)  # an alias inside this node would repeat it endlessly
            open_nodes.append(_Size(1, anchor=event.anchor))
        elif isinstance(event, yaml.CollectionEndEvent):
            size = open_nodes.pop()
            by_anchor[size.anchor] = size
            open_nodes[-1].add(size)
        elif isinstance(event, yaml.ScalarEvent):
            by_anchor[event.anchor] = _Size(1 + len(event.value) // 100)
            open_nodes[-1].add(by_anchor[event.anchor])
        elif isinstance(event, yaml.AliasEvent):
            open_nodes[-1].add(by_anchor.get(event.anchor, _Size()))  # composing reports an unknown alias
        size = open_nodes[-1]
        if size.values > _MOST_VALUES or max(size.levels, len(open_nodes)) > _MOST_LEVELS:
            problem = "too large or nested too deeply for a config"
            raise UserError(problem, file=file, key=option, remedy="remove values or aliases (*name)")


def _values(value: Any) -> Iterator[Any]:
    """A value and all nested values."""
    yield value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _values(item)


def with_texts(value: Any, changed: Callable[[str], str]) -> Any:
    """Copy of a value in which a function changes each text, also in nested lists and mappings."""
    if isinstance(value, dict):
        return {key: with_texts(item, changed) for key, item in value.items()}
    if isinstance(value, list):
        return [with_texts(item, changed) for item in value]
    return changed(value) if isinstance(value, str) else value


def read_text(file: Path) -> str:
    """A text file's content.

    Raises:
        UserError: the file cannot be read, has more than `_MOST_BYTES`, or is not UTF-8.
    """
    try:
        with io.TextIOWrapper(reading(file, _MOST_BYTES), encoding="utf-8") as stream:
            return stream.read()
    except OSError as error:
        raise UserError(str(error.strerror), file=file) from None
    except UnicodeDecodeError:
        raise UserError("not a text file in UTF-8", file=file) from None


_CARDS_CONFIG = re.compile(
    r"(?:^axolotl version: `?(?P<release>[\w.+-]+)`?[ \t]*\n\s*)?"
    r"^```ya?ml[ \t]*\n(?P<config>(?:(?!```|base_model:).*\n)*+base_model:(?:(?!```).*\n)*+)```",
    re.MULTILINE,
)


def recipe_text(file: Path) -> str:
    """A config's text, in which the last value of each key remains, as for Axolotl, at the same lines.

    Raises:
        UserError: see `read_text`, or a card has no config, or the text is too large.
    """
    return _last_values(_whole_text(file), file)[0]


def duplicates(file: Path) -> list[str]:
    """Keys of a config that have two different values, with both; errors as for `recipe_text`."""
    return _last_values(_whole_text(file), file)[1]


_REST = re.compile(r",?([ \t]*#.*)?")
"""Rest of an entry: a comma within braces, a comment."""


def _without_aliases(text: str, entries: list[tuple[str, Any, Any]]) -> str:
    """YAML text with values in place of their aliases, whose anchors can be in an entry that goes."""
    nodes: dict[int, Any] = {}
    for _, name, value in entries:
        nodes |= {name.start_mark.index: name, value.start_mark.index: value}
    anchors: dict[str, Any] = {}
    aliases = []
    for token in yaml.scan(text, _Loader):
        if isinstance(token, yaml.AnchorToken):
            anchors[token.value] = nodes.get(token.start_mark.index)  # None behind a tag
        elif isinstance(token, yaml.AliasToken) and anchors[token.value]:
            aliases.append((token.start_mark.index, token.end_mark.index, anchors[token.value]))
    for start, end, node in reversed(aliases):
        text = text[:start] + write_flow(yaml.CSafeLoader("").construct_document(node)) + text[end:]
    return text


@lru_cache(maxsize=8)
def _last_values(text: str, file: Path) -> tuple[str, list[str]]:
    """YAML text with spaces for all but the last value of each key, and the keys with two different values."""
    try:
        require_small(text, file)
        entries = list(_entries(_composed(text)))
        if len({key for key, _, _ in entries}) < len(entries):
            text = _without_aliases(text, entries)
            entries = list(_entries(_composed(text)))
    except yaml.YAMLError:  # `parse` reports it
        return text, []
    last = {key: (name, value) for key, name, value in entries}
    differing = []
    end = 0
    for key, name, value in entries:
        start = name.start_mark
        if last[key][0] is name or start.index < end or name.tag == _MERGE:
            continue
        end = next(_REST.finditer(text, value.end_mark.index)).end()
        text = text[: start.index] + re.sub(".", " ", text[start.index : end]) + text[end:]
        values = [without_secrets(yaml.CSafeLoader("").construct_document(node), key) for node in (value, last[key][1])]
        if values[0] != values[1]:
            first, final = map(write_flow, values)
            differing.append(f"{key} {first:.60} (line {start.line + 1}), then {final:.60}")
    return text, differing


def _entries(node: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, name and value of each entry below a YAML node; in a list, both nodes are the item."""
    pairs: list[Any] = []
    if isinstance(node, yaml.MappingNode):
        pairs = [(name.value, name, value) for name, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        pairs = [(index, item, item) for index, item in enumerate(node.value)]
    for label, name, value in pairs:
        dotted = f"{key}.{label}".lstrip(".")
        yield dotted, name, value
        yield from _entries(value, dotted)


def _whole_text(file: Path) -> str:
    """A YAML file's content; of a model card, the config that Axolotl wrote into it, at the same lines."""
    text = read_text(file).removeprefix("\ufeff")
    if file.suffix != ".md":
        return text
    block = _CARDS_CONFIG.search(text)
    if block is None:
        problem = "no Axolotl config in this model card, as a block ```yaml with base_model"
        raise UserError(problem, file=file, remedy="copy the config into a YAML file, and give that")
    return "\n" * text.count("\n", 0, block.start("config")) + block["config"]


def card_release(file: Path) -> str:
    """Release of Axolotl that a model card names above its config; empty if none, or if the file is not a card.

    Raises:
        UserError: see `read_text`.
    """
    block = _CARDS_CONFIG.search(read_text(file)) if file.suffix == ".md" else None
    return (block and block["release"]) or ""


_CARDS_FIGURE = re.compile(r"(?am)^- (Loss|total_train_batch_size|num_devices): ([\d.]{1,12}|nan)$")


def card_figures(file: Path) -> dict[str, str]:
    """Loss, rows per step and number of devices that transformers writes into a model card; empty for other files.

    Raises:
        UserError: see `read_text`.
    """
    return dict(_CARDS_FIGURE.findall(read_text(file))) if file.suffix == ".md" else {}


def read_yaml(file: Path, loader: type[yaml.CSafeLoader] = _Loader) -> Config:
    """The mapping in a YAML file of this project, in which no key occurs twice.

    Args:
        file: the file.
        loader: PyYAML's class that reads the text, such as `WrittenLoader`.

    Raises:
        UserError: the file cannot be read, is not YAML (with the line), or is not a mapping.
    """
    return parse_mapping(read_text(file), file, loader)


def read_recipe(file: Path) -> Config:
    """The mapping in a config or model card, perhaps of somebody else; see `recipe_text`."""
    return parse_mapping(recipe_text(file), file)


def parse_mapping(text: str, file: Path, loader: type[yaml.CSafeLoader] = _Loader) -> Config:
    """Parse a mapping from YAML text; see `read_yaml`."""
    content = parse(text, file, loader)
    if not isinstance(content, dict):
        raise UserError("not a mapping of keys to values", file=file)
    return content


def masked_yaml(file: Path) -> str:
    """Text of a YAML file, with secrets masked by key, also in comments, and by value.

    Raises:
        UserError: see `read_recipe`.
    """
    read_recipe(file)
    text = recipe_text(file)
    spans = set()  # a set, because an alias repeats its anchor's
    for key, _, value in _entries(_composed(text)):
        if isinstance(value, yaml.ScalarNode) and names_secret(key):
            spans.add((value.start_mark.index, value.end_mark.index))
    for start, end in sorted(spans, reverse=True):
        ending = "\n" if text[start:end].endswith("\n") else ""
        text = text[:start] + MASK + ending + text[end:]
    return masked_comments(text)


def sources(file: Path) -> dict[str, str]:
    """Sources of a recipe's settings: the comment after each top-level key."""
    return dict(re.findall(r"^(\w+):.*?  # (.*)$", read_text(file), re.MULTILINE))


def write_yaml(config: Config | list[Config]) -> str:
    """Config, or a list of them, as YAML text, in the order of the keys."""
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def write_flow(value: Any) -> str:
    """A value as YAML on one line, also valid within brackets."""
    text: str = yaml.dump(
        [value], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9, default_flow_style=True
    ).rstrip("\n")[1:-1]
    # PyYAML writes text with line ends on several lines; JSON is valid YAML on one line
    return json.dumps(value) if "\n" in text else text


_LONGEST_LINE = 100  # characters of a value


_FOR_BLOCK = re.compile(r"\S[^\x85\u2028\u2029]*\S\n?")  # PyYAML writes other texts wrongly as a block


class _BlockDumper(_Dumper):
    """Dumper that writes long text as a block, over several lines."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = None
        if _FOR_BLOCK.fullmatch(text) and ("\n" in text or len(text) > _LONGEST_LINE):
            style = "|" if "\n" in text else ">"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_BlockDumper.add_representer(str, _BlockDumper.represent_str)


def write_setting(key: str, value: Any) -> list[str]:
    """Lines of a key and its value, of which the first can get a comment.

    A list of mappings and a long value become a block, if YAML allows one.
    """
    flow = write_flow(value)
    text = yaml.dump({key: value}, Dumper=_BlockDumper, sort_keys=False, allow_unicode=True, width=_LONGEST_LINE)
    first, *lines = text.rstrip("\n").split("\n")
    is_short = len(flow) <= _LONGEST_LINE and not flow.startswith("[{")
    if is_short or not re.fullmatch(r"\w+:( [|>].*)?", first):
        return [f"{key}: {flow}"]
    if isinstance(value, list):
        lines = [f"  {line}" if line else "" for line in lines]
    return [first, *lines]


def on_one_line(value: Any) -> str | None:
    """A setting's value as YAML on one line; text and None unchanged."""
    return value if value is None or isinstance(value, str) else write_flow(value)


def line_of(file: Path, key: Sequence[str]) -> int:
    """Line of a key, or of its nearest existing parent, in a YAML file; else 1.

    Args:
        file: the file.
        key: the parts of the key, outermost first.
    """
    return line_in(recipe_text(file), key)


def line_in(text: str, key: Sequence[str]) -> int:
    """Line of a key in YAML text, as for `line_of`."""
    node = _composed(text)
    line = 1
    for part in key:
        entry = inside(node, part)
        if not entry:
            break
        start, node = entry
        line = start.start_mark.line + 1
    return line


@lru_cache(maxsize=8)  # each mistake in a file needs a line number from the same text
def _composed(text: str) -> Any:
    return yaml.compose(text, Loader=_Loader)


def inside(node: Any, part: str) -> tuple[Any, Any] | None:
    """Return the YAML nodes, key and value, of one part of a dotted key; None if there are none.

    In a list, both nodes are the item.
    """
    if isinstance(node, yaml.MappingNode):
        return next((pair for pair in node.value if pair[0].value == part), None)
    if isinstance(node, yaml.SequenceNode) and part in map(str, range(len(node.value))):
        return node.value[int(part)], node.value[int(part)]
    return None


def in_words(error: Any) -> str:
    """Message for one of pydantic's errors, with the invalid value.

    Args:
        error: one of `ValidationError.errors()`.
    """
    message = str(error["msg"]).removeprefix("Value error, ")
    return (
        message if error["type"] in ("missing", "value_error") else f"{message}, not {write_flow(error['input']):.60}"
    )
