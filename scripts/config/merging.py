"""Changes of configs: merging, overrides, differences by key, and the recipe that a variant changes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.secrets import MASK, masked, names_secret, without_secrets
from ..base.yamlfiles import Config, parse, write_flow


def merge(config: Config, changes: Config) -> Config:
    """Merge `changes` into `config`.

    Mappings are merged. Any other value replaces the previous one; None deletes the key.
    """
    merged = config | changes
    for key, value in changes.items():
        if isinstance(value, dict):
            below = config.get(key)
            merged[key] = merge(below if isinstance(below, dict) else {}, value)
        elif value is None:
            del merged[key]
    return merged


def top_key(key: str) -> str:
    """First part of a dotted key."""
    return key.partition(".")[0]


def last_key(key: str) -> str:
    """Last part of a dotted key."""
    return key.rpartition(".")[2]


@dataclass(frozen=True)
class Override:
    """A value for a dotted key; None deletes the key."""

    key: str
    value: Any = None  # run.json omits None

    @property
    def written(self) -> str:
        """The value as --set takes it: text that needs no quotes without them, all else as YAML on one line."""
        if isinstance(self.value, str):
            with suppress(UserError):
                if parse_overrides(f"{self.key}={self.value}")[1] == [self.value]:
                    return self.value
        return write_flow(self.value)

    @property
    def text(self) -> str:
        """The override as `key=value`."""
        return f"{self.key}={self.written}"

    @property
    def source(self) -> "Source":
        """The override as the source of a change."""
        return Source("override", self.key, self.written)

    def without_secrets(self) -> "Override":
        """The override with secrets masked."""
        return Override(self.key, without_secrets(self.value, self.key))


@dataclass(frozen=True, kw_only=True)
class TypedOverride(Override):
    """An override from the command line, which messages repeat as the user typed it."""

    typed: str

    @property
    def written(self) -> str:
        return self.typed


def parse_override(text: str) -> Override:
    """Parse `key=value` from --set, whose value is YAML.

    Raises:
        UserError: the text is malformed, or has several values.
    """
    key, values = parse_overrides(text)
    if len(values) > 1:
        remedy = "write a list as [a,b], and text with commas in quotes"
        raise UserError("several values, which only `recipe sweep` takes", key=f"--set {text}", remedy=remedy)
    return TypedOverride(key, values[0], typed=text.partition("=")[2])


def parse_overrides(text: str) -> tuple[str, list[Any]]:
    """Split `key=value,value` from --set into a dotted key and values, which are those of a YAML list.

    Raises:
        UserError: the text is malformed.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError("expected key=value, as in --set num_epochs=3", key=f"--set {text}")
    if "," not in value:
        return key.strip(), [parse(value, option=f"--set {text}")]
    return key.strip(), parse(f"[{value}]", option=f"--set {text}")


def override(config: Config, key: str, value: Any) -> Config:
    """Set one dotted key.

    A number in the key is a position in a list. The value None deletes the key.

    Raises:
        UserError: the key leads into a value without keys, or to a missing position in a list.
    """
    return _replaced(config, key, value, key)


def apply(config: Config, overrides: Iterable[Override]) -> Config:
    """Set the keys of overrides, one after the other; see `override`."""
    for change in overrides:
        config = override(config, change.key, change.value)
    return config


def _replaced(current: Any, path: str, value: Any, key: str) -> Any:
    """Return `current` with `value` at a path inside it; errors show the full `key`."""
    if not path:
        return value
    part, _, rest = path.partition(".")
    if isinstance(current, list):
        if part not in map(str, range(len(current))):
            problem = f"{part} is not a position in a list of {len(current)}, counted from 0"
            raise UserError(problem, key=f"--set {key}")
        return [_replaced(item, rest, value, key) if i == int(part) else item for i, item in enumerate(current)]
    if not isinstance(current, dict | None):
        raise UserError(f"{current!r} has no key {part}", key=f"--set {key}")
    mapping = current or {}
    changed = mapping | {part: _replaced(mapping.get(part), rest, value, key)}
    return {name: item for name, item in changed.items() if item is not None}


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a list of plain values counts as one value."""
    if isinstance(config, dict) and (config or not prefix):
        items: Any = config.items()
    elif isinstance(config, list) and any(isinstance(item, dict | list) for item in config):
        items = enumerate(config)
    else:
        yield prefix, config
        return
    for key, value in items:
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))


def value_at(config: Any, key: str) -> Any:
    """Value at a dotted key; None if there is none."""
    for part in key.split("."):
        if isinstance(config, list) and part.isdecimal():
            config = dict(enumerate(config)).get(int(part))
        elif isinstance(config, dict):
            config = config.get(part)
        else:
            return None
    return config


def listed(config: Config, key: str) -> list[str]:
    """Names in the list at a key of an unchecked config; empty if it is not a list."""
    value = config.get(key)
    if not isinstance(value, list):
        return []
    return [name for name in value if isinstance(name, str)]


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configs differ, with both values (None if missing)."""
    left, right = dict(flatten(a)), dict(flatten(b))
    differing = {}
    for key in left | right:
        old, new = left.get(key), right.get(key)
        if old != new or isinstance(old, bool) != isinstance(new, bool):  # in Python, True equals 1
            differing[key] = (old, new)
    return differing


SourceKind = Literal["recipe", "profile", "override", "rehearsal", "gpus", "default", "base"]


@dataclass(frozen=True)
class Source:
    """Source of a changed value.

    Attributes:
        kind: `recipe`, the file of a variant or edited copy; `profile`; `override`; `rehearsal`, a substitution;
            `gpus`, the division of the batch; `default`, a setting that the project makes explicit; `base`, the merged
            model of another recipe's run.
        name: the file, the profile, the key of the override, or the options that request the GPUs.
        detail: the value of the override as written, or the reason for the change.
    """

    kind: SourceKind
    name: str = ""
    detail: str = ""

    @property
    def text(self) -> str:
        """The source in words, for tables and messages."""
        if self.kind == "profile":
            return f"profile {self.name}"
        if self.kind == "override":
            return f"--set {self.name}={self.detail}"
        if self.kind == "rehearsal":
            return f"rehearsal: {self.detail}"
        if self.kind == "gpus":
            return f"{self.name}: {self.detail}"
        return self.name or self.detail

    def without_secrets(self, key: str) -> "Source":
        """The source of a key's value, with secrets masked."""
        if self.kind == "override" and (names_secret(self.name) or names_secret(key)):
            return Source(self.kind, masked(self.name), MASK)
        return Source(self.kind, masked(self.name), masked(self.detail))


@dataclass(kw_only=True)
class Difference:
    """A changed key: its values in the recipe file and the run, and the source of the change."""

    key: str
    recipe: Any = None
    run: Any = None
    source: Source

    def without_secrets(self) -> "Difference":
        """The difference with secrets masked."""
        return Difference(
            key=self.key,
            recipe=without_secrets(self.recipe, self.key),
            run=without_secrets(self.run, self.key),
            source=self.source.without_secrets(self.key),
        )

    def __str__(self) -> str:
        shown = self.without_secrets()
        recipe, run = (str(value).partition("\n")[0] for value in (shown.recipe, shown.run))  # only the first lines
        return f"{self.key}: {recipe} -> {run}  ({shown.source.text})"


def chained(first: Sequence[Difference], second: Sequence[Difference]) -> list[Difference]:
    """Combine the differences of two steps: recipe to variant, variant to run."""
    combined = {difference.key: difference for difference in first}
    for difference in second:
        former = combined.get(difference.key, difference)
        combined[difference.key] = replace(difference, recipe=former.recipe)
    return [difference for difference in combined.values() if difference.recipe != difference.run]


def recipe_content(name: str) -> Config:
    """Content of a recipe's file, found by name.

    Raises:
        UserError: no recipe or several recipes match, or the file is malformed.
    """
    return yamlfiles.read_recipe(paths.find_recipe(name)[1])
