"""Which distributions seem to be installed."""

from __future__ import annotations

import importlib.metadata

import pytest


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Let exactly the distributions in `versions` be installed."""

    def version(name: str) -> str:
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(importlib.metadata, "version", version)
