"""Packages that add to a registry, as an installer would leave them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


class Packages:
    """Installs packages, of version 1.5, into a folder that is on Python's path during a test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._monkeypatch = monkeypatch
        monkeypatch.syspath_prepend(folder)

    def install(
        self, group: str, name: str, entry: str, source: str, package: str = "p"
    ) -> None:
        """Install a package of one module.

        Args:
            group: Of the entry point.
            name: Of the entry point.
            entry: What it stands for, a name in the module.
            source: The module, `module_of_{package}`.
            package: Name of the distribution.
        """
        module = f"module_of_{package}"
        self._monkeypatch.delitem(sys.modules, module, raising=False)
        (self._folder / f"{module}.py").write_text(source)
        info = self._folder / f"{package}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n"
        )
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{entry}\n")
