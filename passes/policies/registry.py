"""Which policies there are: those of this folder, and those of other packages.

A file of this folder that has a subclass of `Policy` is a policy; nothing lists them. One of
another package is an entry point of group `dllava_export.policies`, whose name is the policy's
and whose object is a subclass or an instance of `Policy`.
"""

from __future__ import annotations

import importlib
import pkgutil

from dllava_export.errors import SettingError
from dllava_export.passes import policies
from dllava_export.passes.policies.base import Policy
from dllava_export.registries import Registry

__all__ = [
    "NO_POLICY",
    "POLICIES",
    "check_text_policy",
    "text_policy_names",
    "untrained_policy_names",
]

NO_POLICY = "none"
"""What users write for a dense decoder; no policy may be called so."""


def _built_in() -> dict[str, str]:
    """Return name → `module:class` of the policies of this folder, sorted by name."""
    found = {}
    for entry in pkgutil.iter_modules(policies.__path__, f"{policies.__name__}."):
        if entry.name == __name__:
            continue  # being imported
        for value in vars(importlib.import_module(entry.name)).values():
            if isinstance(value, type) and issubclass(value, Policy) and value is not Policy:
                found[value.name] = f"{value.__module__}:{value.__qualname__}"
    return dict(sorted(found.items()))


POLICIES: Registry[Policy] = Registry(
    "policy",
    "dllava_export.policies",
    _built_in,
    contract=Policy,  # type: ignore[type-abstract]  # nothing makes one of it
    texts=("name", "help", "image_tokens"),
    unknown=SettingError,
    reserved=(NO_POLICY,),
)


def text_policy_names() -> tuple[str, ...]:
    """Return names of policies that decide about generated tokens."""
    return tuple(policy.name for policy in POLICIES.usable() if policy.decides_text)


def untrained_policy_names() -> tuple[str, ...]:
    """Return names of policies that need no trained predictors."""
    return tuple(policy.name for policy in POLICIES.usable() if not policy.needs_predictors)


def check_text_policy(name: str, keep_rate: float) -> None:
    """Check the settings of passes that decide about generated tokens.

    Raises:
        RegistryError: If the package that provides the policy is broken.
        SettingError: If there is no such policy, it has no decision for a single token, or the
            rate is no share.
    """
    if not 0 < keep_rate < 1:
        raise SettingError(f"keep_rate must be in (0, 1), got {keep_rate}.")
    if not POLICIES.get(name).decides_text:
        raise SettingError(
            f"policy {name!r} has no decision for a single token; expected one of "
            f"{', '.join(text_policy_names())}."
        )
