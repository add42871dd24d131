"""Compare what two runtimes or two forms of a model compute."""

from __future__ import annotations

__all__: list[str] = []
