"""Packages with policies of their own, as an installer would leave them."""

from __future__ import annotations

from installed_packages import Packages

from dllava_export.passes.policies.registry import POLICIES

POLICY = """
import numpy as np
from dllava_export.passes.policies.base import Policy

class Mine(Policy):
    name, help, image_tokens = "mine", "a policy of a test", "nothing in particular"

    def score(self, builder, rows, weights):
        return builder.op("Cast", [rows.position_ids], "scores", np.float32,
                          list(rows.position_ids.shape), to=1)

    def reference(self, rows, weights):
        return rows.position_ids.astype(np.float32)

class Deciding(Mine):
    def keep_token(self, builder, rows, keep_rate, weights):
        raise NotImplementedError

mine = Mine()
number = 3
"""


class PolicyPackages:
    """Packages with a policy each."""

    def __init__(self, packages: Packages) -> None:
        self._packages = packages

    def install(self, name: str, entry: str, source: str = POLICY, package: str = "p") -> None:
        """Install a package whose policy `name` is `entry`, a name in its module."""
        self._packages.install(POLICIES.group, name, entry, source, package)
