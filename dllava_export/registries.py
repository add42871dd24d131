"""Registries: things of one kind by name, built in or from other packages.

A package of somebody else adds to one by an entry point of the registry's group: its name is
the thing's name, its object an instance of the registry's contract, or a class of it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from dllava_export.errors import RegistryError

__all__ = ["Registry", "close_match"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one kind by name.

    Modules of built-in things are imported when one is asked for, other packages looked for
    when a name is not built in, or all names are wanted: this costs a search through what is
    installed.

    Args:
        kind: What they are, for messages: `policy`.
        group: Entry point group of other packages.
        built_in: Name → `module:attribute`, in the order in which they are shown.
        contract: What each must be an instance of.
        unknown: Makes the error for a name that is not known, from its message.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        built_in: Mapping[str, str],
        contract: Callable[[], type[T]],
        unknown: Callable[[str], Exception],
    ) -> None:
        self._kind, self._group = kind, group
        self._built_in = dict(built_in)
        self._contract, self._unknown = contract, unknown
        self._loaded: dict[str, T] = {}
        self._others: dict[str, importlib.metadata.EntryPoint] | None = None

    def get(self, name: str) -> T:
        """Return a thing.

        Raises:
            Exception: What `unknown` makes, if there is none of this name.
            RegistryError: If a package that adds it is broken.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def names(self) -> tuple[str, ...]:
        """Return all names, built-in ones first.

        Raises:
            RegistryError: If packages add a name twice.
        """
        return (*self._built_in, *self._found())

    def all(self) -> list[T]:
        """Return all things, in the order of their names."""
        return [self.get(name) for name in self.names()]

    def _load(self, name: str) -> T:
        if name in self._built_in:
            module, _, attribute = self._built_in[name].partition(":")
            value = getattr(importlib.import_module(module), attribute)
            return value() if isinstance(value, type) else value
        entry = self._found().get(name)
        if entry is None:
            raise self._unknown(
                f"There is no {self._kind} {name!r}; there are {', '.join(self.names())}."
                f"{close_match(name, self.names())}"
            )
        where = f"{self._kind} {name!r} of {_distribution(entry)} (entry point {entry.value})"
        try:
            value = entry.load()
            made = value() if isinstance(value, type) else value
        # Whatever somebody else's module raises: it is not ours to crash on.
        except Exception as error:
            raise RegistryError(
                f"The {where} cannot be loaded: {type(error).__name__}: {error}. Repair or "
                "uninstall that package."
            ) from error
        contract = self._contract()
        if not isinstance(made, contract):
            raise RegistryError(
                f"The {where} is a {type(made).__name__}, expected a {contract.__module__}."
                f"{contract.__name__}. Repair or uninstall that package."
            )
        return made

    def _found(self) -> dict[str, importlib.metadata.EntryPoint]:
        if self._others is None:
            found: dict[str, importlib.metadata.EntryPoint] = {}
            for entry in importlib.metadata.entry_points(group=self._group):
                if entry.name in self._built_in or entry.name in found:
                    other = (
                        "this toolkit"
                        if entry.name in self._built_in
                        else _distribution(found[entry.name])
                    )
                    raise RegistryError(
                        f"{_distribution(entry)} adds a {self._kind} {entry.name!r}, a name that "
                        f"{other} has already. Rename its entry point, or uninstall it."
                    )
                found[entry.name] = entry
            self._others = found
        return self._others


def close_match(name: str, known: tuple[str, ...]) -> str:
    """Return a sentence that names the known name next to `name`; empty if none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _distribution(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "a package"
