"""TensorRT plugins, one folder each: Triton kernels, compiled into an engine.

Nothing of them is needed to run the engine. `README.md` lists them and their limits.
"""

from __future__ import annotations

from dllava_export.plugins.registration import PLUGIN_FOLDERS, PLUGIN_OPS, register_plugins

__all__ = ["PLUGIN_FOLDERS", "PLUGIN_OPS", "register_plugins"]
