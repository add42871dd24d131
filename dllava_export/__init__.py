"""Export LLaVA and Dynamic-LLaVA models to ONNX with token sparsification inside the decoder.

import dllava_export
session = dllava_export.load("out")
print(session.generate(["cat.png"], ["What is this?"])[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["load"]

if TYPE_CHECKING:
    from dllava_export.runtime.loading import load


def __getattr__(name: str) -> Any:
    # `load` needs NumPy; `import dllava_export` for its version alone should not.
    if name == "load":
        from dllava_export.runtime.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
