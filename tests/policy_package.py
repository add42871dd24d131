"""Packages with policies of their own, as an installer would leave them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

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
    """Installs packages into a folder that is on Python's path during a test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._monkeypatch = monkeypatch
        monkeypatch.syspath_prepend(folder)

    def install(self, name: str, entry: str, source: str = POLICY, package: str = "p") -> None:
        """Install a package whose policy `name` is `entry`, a name in its module."""
        module = f"policy_package_{package}"
        self._monkeypatch.delitem(sys.modules, module, raising=False)
        (self._folder / f"{module}.py").write_text(source)
        info = self._folder / f"{package}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n"
        )
        (info / "entry_points.txt").write_text(
            f"[{POLICIES.group}]\n{name} = {module}:{entry}\n"
        )
