"""Settings given by keyword: checked against the dataclass that documents them."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, TypeVar

from dllava_export.errors import SettingError
from dllava_export.registries import close_match

__all__ = ["check_whole_numbers", "real_number", "settings_from", "whole_number"]

T = TypeVar("T")


def settings_from(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return an instance of a dataclass of settings.

    Args:
        kind: The dataclass; it checks what its fields hold.
        values: Field name → value.

    Raises:
        SettingError: If a name is no field, or a field without default is missing.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise SettingError(
                f"There is no setting {name!r}; there are {', '.join(fields) or 'none'}. "
                f"{close_match(name, tuple(fields))}".rstrip()
            )
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SettingError(f"{' and '.join(missing)} must be given; there is no default.")
    return kind(**values)


def whole_number(name: str, value: Any, minimum: int) -> int:
    """Return a setting that counts something.

    Raises:
        SettingError: If it is not a whole number of at least `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise SettingError(f"{name} must be a whole number, got {value!r}.")
    if value < minimum:
        raise SettingError(f"{name} must be at least {minimum}, got {value}.")
    return int(value)


def check_whole_numbers(settings: object, minimum: int, *names: str) -> None:
    """Check attributes that count something; None is for what is not given.

    Raises:
        SettingError: If one is neither None nor a whole number of at least `minimum`.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None:
            whole_number(name, value, minimum)


def real_number(name: str, value: Any) -> float:
    """Return a setting that is a number.

    Raises:
        SettingError: If it is not a real, finite one.
    """
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_real and math.isfinite(value)):
        raise SettingError(f"{name} must be a finite number, got {value!r}.")
    return float(value)
