"""Registries: things of one kind by name, built in or from other packages.

A package of somebody else adds a thing by an entry point of the registry's group: its name is
the thing's name, its object a subclass of the contract or an instance of one.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dllava_export.errors import RegistryError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["Registry", "close_match"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one kind by name.

    Nothing is imported or looked for before it is asked for. A broken package does not keep
    the others from being listed: it is an error when its own thing is wanted.

    Args:
        kind: What they are, for messages: `policy`.
        group: Entry point group of other packages.
        built_in: Name → `module:class`, in the order in which they are shown; or what finds
            them, called when something is first asked for.
        contract: The class that all are instances of.
        texts: Attributes that must be texts; `name` must be that of the entry point.
        unknown: Makes the error for a name that is not known, from its message.
        reserved: Further names that nothing may have.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        built_in: Mapping[str, str] | Callable[[], Mapping[str, str]],
        *,
        contract: type[T],
        texts: Sequence[str],
        unknown: Callable[[str], Exception],
        reserved: Sequence[str] = (),
    ) -> None:
        self.group = group
        self._kind = kind
        self._given = built_in
        self._contract, self._texts = contract, tuple(texts)
        self._unknown = unknown
        self._reserved = tuple(reserved)

    @functools.cached_property
    def _built_in(self) -> dict[str, str]:
        return dict(self._given() if callable(self._given) else self._given)

    @property
    def _taken(self) -> tuple[str, ...]:
        return (*self._built_in, *self._reserved)

    def names(self) -> tuple[str, ...]:
        """Return all names, built-in ones first; nothing of other packages is imported."""
        from importlib.metadata import entry_points

        return (
            *self._built_in,
            *sorted(entry_points(group=self.group).names - {*self._taken}),
        )

    def usable(self) -> Iterator[T]:
        """Yield all things; of a broken one only a warning is logged."""
        for name in self.names():
            try:
                found = self.get(name)
            except RegistryError as error:
                logger.warning("%s", error)
            else:
                yield found

    def get(self, name: str) -> T:
        """Return the thing of a name.

        Raises:
            Exception: What `unknown` makes, if there is none.
            RegistryError: If the package that provides it is broken, or two provide it.
        """
        found = self.find(name)
        if found is None:
            raise self._unknown(self.describe_unknown(name))
        return found

    def find(self, name: str) -> T | None:
        """Return the thing of a name, or None where no package provides it.

        Raises:
            RegistryError: If the package that provides it is broken, or two provide it.
        """
        from importlib.metadata import entry_points

        found = tuple(entry_points(group=self.group, name=name))
        if name in self._taken and found:
            raise RegistryError(
                f"Package {_package(found[0])} provides a {self._kind} {name!r}, but that name "
                f"is taken, as are all of {', '.join(self._taken)}. Rename it there, or "
                "uninstall the package."
            )
        if len(found) > 1:
            raise RegistryError(
                f"Packages {' and '.join(map(_package, found))} provide a {self._kind} {name!r} "
                "each. Uninstall all but one."
            )
        return self._load(found[0]) if found else self.find_built_in(name)

    def find_built_in(self, name: str) -> T | None:
        """Return the built-in thing of a name, or None; other packages are not looked at."""
        if name not in self._built_in:
            return None
        module, _, attribute = self._built_in[name].partition(":")
        kind: type[T] = getattr(importlib.import_module(module), attribute)
        return kind()

    def describe_unknown(self, name: str, known: Sequence[str] | None = None) -> str:
        """Return a message for a name that is not known, with those that come close.

        Args:
            name: What was asked for.
            known: The names to choose from; all by default.
        """
        known = self.names() if known is None else known
        remedy = close_match(name, known) or "Is the package that provides it installed?"
        return f"{self._kind} must be one of {', '.join(known)}, got {name!r}. {remedy}"

    def _load(self, entry: EntryPoint) -> T:
        """Import another package's thing and check that it is one."""
        who = f"{self._kind.capitalize()} {entry.name!r} of package {_package(entry)}"
        remedy = "Repair or uninstall the package."
        try:
            value: Any = entry.load()
            made = value() if isinstance(value, type) else value
        except Exception as error:  # whatever the package's own code raises
            raise RegistryError(
                f"{who} cannot be loaded from {entry.value} ({type(error).__name__}: {error}). "
                f"{remedy}"
            ) from error
        if not isinstance(made, self._contract):
            contract = f"{self._contract.__module__}.{self._contract.__qualname__}"
            raise RegistryError(
                f"{who} is {entry.value}, a {type(made).__name__}; expected a subclass or an "
                f"instance of {contract}. {remedy}"
            )
        texts = {key: getattr(made, key, None) for key in self._texts}
        if texts["name"] != entry.name or not all(isinstance(t, str) for t in texts.values()):
            raise RegistryError(
                f"{who} has {texts}; expected texts, and the name of its entry point. {remedy}"
            )
        return made


def close_match(name: str, known: Sequence[str]) -> str:
    """Return a question after the known names next to `name`; empty if none is near."""
    near = difflib.get_close_matches(name, known)
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _package(entry: EntryPoint) -> str:
    assert entry.dist is not None  # it was found in one
    return f"{entry.dist.name} {entry.dist.version}"
