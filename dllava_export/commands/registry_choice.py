"""A choice among the names of a registry, looked up only when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from dllava_export.registries import close_match

__all__ = ["RegistryChoice"]


class RegistryChoice(click.ParamType[str]):
    """One of the names that `names` returns.

    `click.Choice` wants them when the module is imported: that would load what the registry
    holds, and look for other packages, before `--help` shows anything.

    Args:
        what: What is chosen: `backend`.
        names: Returns the names there are.
    """

    def __init__(self, what: str, names: Callable[[], Sequence[str]]) -> None:
        self.name = what
        self._names = names

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return the names for the help text."""
        return f"[{'|'.join(self._names())}]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        """Return the name, or fail with those there are."""
        names = tuple(self._names())
        if value not in names:
            self.fail(
                f"{value!r} is not one of {', '.join(map(repr, names))}. "
                f"{close_match(str(value), names)}".rstrip(),
                param,
                ctx,
            )
        return str(value)
