"""Name registry: the extension point of optimizers, metrics, writers, callbacks and everything else chosen by name.

The name in a configuration is looked up in a registry. The package registers its own entries on import; a plug-in
(`t5x_like.plugins`) registers more of them from the user's own file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from t5x_like.errors import ConfigError, ConfigProblem

T = TypeVar("T")

_generation = 0
_owners: set[str] = set()


def generation() -> int:
    """Return a number that grows with every registration, so that caches derived from registries can be dropped."""
    return _generation


def has_registered(module: str) -> bool:
    """Return whether a module has registered classes or functions that it defines."""
    return module in _owners


def note_registration(entry: Any) -> None:
    """Note that the module of a class or function has registered it; for registries of other kinds than `Registry`."""
    global _generation
    _owners.add(getattr(entry, "__module__", ""))
    _generation += 1


class Registry(Mapping[str, T], Generic[T]):
    """Mapping from name to entry, to which `register` adds.

    Attributes:
      noun: Singular noun for an entry, used in messages ("optimizer").
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._entries: dict[str, T] = {}
        self._origins: dict[str, str] = {}

    # An identity, not a value: a registry can be the metadata of a type, which must be hashable.
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def register(self, name: str, entry: T, *, defined_by: Any = None) -> T:
        """Add an entry and return it.

        A module that is executed again replaces its own entries. Anything else under a taken name is an error, because
        the same configuration would then mean two things.

        Args:
          name: Name in the configuration.
          entry: Class, function or instance.
          defined_by: Class or function whose module and qualified name identify the entry; None: the entry, or its
            class if it is an instance.

        Raises:
          ConfigError: the name is empty or already taken by another object.
        """
        if not name:
            raise ConfigError([ConfigProblem(f"registration ({self.noun})", "an empty name", "a name")])
        source = entry if defined_by is None else defined_by
        origin = _origin(source)
        known = self._entries.get(name)
        if known is not None and known is not entry and self._origins[name] != origin:
            raise ConfigError(
                [
                    ConfigProblem(
                        f"registration of {origin}",
                        f"the {self.noun} name {name!r}, already registered by {self._origins[name]}",
                        "a name that is not taken",
                    )
                ]
            )
        self._entries[name], self._origins[name] = entry, origin
        note_registration(source)
        return entry

    def decorator(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers what it decorates under `name`."""
        return lambda entry: self.register(name, entry)

    def lookup(self, name: str, where: str) -> T:
        """Return the entry of this name.

        Args:
          where: Dotted path of the field that names it, for the message.

        Raises:
          ConfigError: no entry has this name; the message lists those that exist.
        """
        if name in self._entries:
            return self._entries[name]
        raise ConfigError([self.unknown(name, where)])

    def unknown(self, name: str, where: str) -> ConfigProblem:
        """Return the problem of a name that is not registered."""
        near = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"perhaps {near[0]!r}; " if near else ""
        names = ", ".join(sorted(self._entries)) or "none is registered"
        return ConfigProblem(
            where,
            f"the unknown {self.noun} {name!r}",
            f"one of: {names}",
            f"{hint}name the file that registers your own {self.noun} in `plugins`",
        )


def _origin(entry: Any) -> str:
    """Return module and qualified name of an entry."""
    described = entry if hasattr(entry, "__qualname__") else type(entry)
    return f"{getattr(described, '__module__', '?')}.{described.__qualname__}"
