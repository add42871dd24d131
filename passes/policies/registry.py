"""Which policies there are: the built-in ones, listed here alone, and those of other packages.

A policy of another package is an entry point of group `dllava_export.policies`, whose name is
the policy's and whose object is a subclass or an instance of `Policy`. Nothing is imported or
looked for before it is asked for.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dllava_export.errors import DllavaExportError, SettingError
from dllava_export.passes.policies.base import Policy

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "GROUP",
    "NO_POLICY",
    "built_in_policy",
    "check_text_policy",
    "describe_unknown",
    "find_policy",
    "get_policy",
    "policy_names",
    "text_policy_names",
    "untrained_policy_names",
    "usable_policies",
]

logger = logging.getLogger(__name__)

GROUP = "dllava_export.policies"
"""Entry points of other packages' policies."""

NO_POLICY = "none"
"""What users write for a dense decoder; no policy may be called so."""

_BUILT_IN = {
    "predictor": "dllava_export.passes.policies.predictor:PredictorPolicy",
    "random": "dllava_export.passes.policies.random_hash:RandomPolicy",
    "uniform": "dllava_export.passes.policies.uniform:UniformPolicy",
    "norm": "dllava_export.passes.policies.norm:NormPolicy",
}


def policy_names() -> tuple[str, ...]:
    """Return all names, built-in ones first; no policy is imported."""
    from importlib.metadata import entry_points

    others = entry_points(group=GROUP).names - {*_BUILT_IN, NO_POLICY}
    return (*_BUILT_IN, *sorted(others))


def text_policy_names() -> tuple[str, ...]:
    """Return names of policies that decide about generated tokens."""
    return tuple(policy.name for policy in usable_policies() if policy.decides_text)


def untrained_policy_names() -> tuple[str, ...]:
    """Return names of policies that need no trained predictors."""
    return tuple(policy.name for policy in usable_policies() if not policy.needs_predictors)


def usable_policies() -> Iterator[Policy]:
    """Yield all policies; a broken one should not keep the others from being listed."""
    for name in policy_names():
        try:
            policy = get_policy(name)
        except DllavaExportError as error:
            logger.warning("%s", error)
        else:
            yield policy


def get_policy(name: str) -> Policy:
    """Return the policy of a name.

    Raises:
        DllavaExportError: If the package that provides it is broken, or two provide it.
        SettingError: If there is none of that name.
    """
    policy = find_policy(name)
    if policy is None:
        raise SettingError(describe_unknown(name, policy_names()))
    return policy


def find_policy(name: str) -> Policy | None:
    """Return the policy of a name, or None where no package provides it.

    Raises:
        DllavaExportError: If the package that provides it is broken, or two provide it.
    """
    from importlib.metadata import entry_points

    found = tuple(entry_points(group=GROUP, name=name))
    if name in (*_BUILT_IN, NO_POLICY) and found:
        raise DllavaExportError(
            f"Package {_package(found[0])} provides a policy {name!r}, but that name is taken, as "
            f"are all of {', '.join((*_BUILT_IN, NO_POLICY))}. Rename it there, or uninstall the "
            "package."
        )
    if len(found) > 1:
        raise DllavaExportError(
            f"Packages {' and '.join(map(_package, found))} provide a policy {name!r} each. "
            "Uninstall all but one."
        )
    return _load(found[0]) if found else built_in_policy(name)


def built_in_policy(name: str) -> Policy | None:
    """Return the built-in policy of a name, or None; other packages are not looked at."""
    from importlib.metadata import EntryPoint

    if name not in _BUILT_IN:
        return None
    return EntryPoint(name, _BUILT_IN[name], GROUP).load()()


def check_text_policy(name: str, keep_rate: float) -> None:
    """Check the settings of passes that decide about generated tokens.

    Raises:
        DllavaExportError: If the package that provides the policy is broken.
        SettingError: If there is no such policy, it has no decision for a single token, or the
            rate is no share.
    """
    if not 0 < keep_rate < 1:
        raise SettingError(f"keep_rate must be in (0, 1), got {keep_rate}.")
    if not get_policy(name).decides_text:
        raise SettingError(
            f"policy {name!r} has no decision for a single token; expected one of "
            f"{', '.join(text_policy_names())}."
        )


def describe_unknown(name: str, known: Sequence[str]) -> str:
    """Return a message for a policy that is not known, with the names that come close."""
    close = difflib.get_close_matches(name, known)
    remedy = "Is the package that provides it installed?"
    if close:
        remedy = f"Did you mean {' or '.join(map(repr, close))}?"
    return f"policy must be one of {', '.join(known)}, got {name!r}. {remedy}"


def _load(entry: EntryPoint) -> Policy:
    """Import another package's policy and check that it is one."""
    try:
        found = entry.load()
        policy = found() if isinstance(found, type) else found
    except Exception as error:  # whatever the package's own code raises
        raise DllavaExportError(
            f"Policy {entry.name!r} of package {_package(entry)} cannot be loaded from "
            f"{entry.value} ({type(error).__name__}: {error}). Repair or uninstall the package."
        ) from error
    if not isinstance(policy, Policy):
        raise DllavaExportError(
            f"Policy {entry.name!r} of package {_package(entry)} is {entry.value}, a "
            f"{type(policy).__name__}; expected a subclass or an instance of "
            "dllava_export.passes.policies.base.Policy. Repair or uninstall the package."
        )
    texts = {key: getattr(policy, key, None) for key in ("name", "help", "image_tokens")}
    if texts["name"] != entry.name or not all(isinstance(t, str) for t in texts.values()):
        raise DllavaExportError(
            f"Policy {entry.name!r} of package {_package(entry)} has {texts}; expected texts, and "
            "the name of its entry point. Repair or uninstall the package."
        )
    return policy


def _package(entry: EntryPoint) -> str:
    assert entry.dist is not None  # it was found in one
    return f"{entry.dist.name} {entry.dist.version}"
