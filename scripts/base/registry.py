"""Registries: functions, classes and values by name, which modules add where they define them."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module

from .errors import UserError, did_you_mean


class Registry[T](Mapping[str, T]):
    """Entries of one kind by name, in the order in which they were added.

    A module adds its entries when it is imported. The first look-up imports the modules, so that a command imports only
    those of the registries it uses.

    Args:
        kind: the kind of entry, for messages, such as metric.
        modules: full names of the modules that add entries; they import nothing slow.
    """

    def __init__(self, kind: str, *modules: str):
        self.kind = kind
        self._modules = modules
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Add an entry, and return it.

        Raises:
            ValueError: another entry has the name.
        """
        if name in self._entries:
            raise ValueError(f"two {self.kind}s are called {name}")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a function or class."""
        return partial(self.add, name)

    def names(self) -> list[str]:
        """Names of all entries."""
        return [*self]

    def find(self, name: str, option: str = "") -> T:
        """Entry of a name that a user has given, perhaps as the value of an option.

        Raises:
            UserError: no entry has the name.
        """
        self.built_in()  # so that a KeyError of an import is no unknown name
        try:
            return self[name]
        except KeyError:
            raise UserError(self.unknown(name), key=option and f"{option} {name}") from None

    def unknown(self, name: str) -> str:
        """Message about a name that no entry has, with similar names or all."""
        hint = did_you_mean(name, self) or f"; the {self.kind}s are {', '.join(self)}"
        return f"no {self.kind} is called {name}{hint}"

    def built_in(self) -> dict[str, T]:
        """Entries that the modules have added."""
        for module in self._modules:
            import_module(module)
        return self._entries

    def __getitem__(self, name: str) -> T:
        return self.built_in()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.built_in())

    def __len__(self) -> int:
        return sum(1 for _ in self)
