"""Export vision-language models to ONNX with token pruning inside the decoder, and run them.

import dllava_export

dllava_export.export("Osilly/Dynamic-LLaVA-7B", "out")
with dllava_export.load("out") as session:
    print(session.generate("What is this?", image="cat.png").text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dllava_export.version import __version__

if TYPE_CHECKING:
    from dllava_export.api import (
        bench,
        build,
        evaluate,
        export,
        inspect,
        plan,
        sparsify,
        train_predictors,
        validate,
        visualize,
    )
    from dllava_export.errors import DllavaExportError
    from dllava_export.runtime.chat import Chat
    from dllava_export.runtime.loading import load
    from dllava_export.runtime.results import Generation, Piece
    from dllava_export.runtime.session import Session
    from dllava_export.sparsity import Sparsity

__all__ = [
    "Chat",
    "DllavaExportError",
    "Generation",
    "Piece",
    "Session",
    "Sparsity",
    "__version__",
    "bench",
    "build",
    "evaluate",
    "export",
    "inspect",
    "load",
    "plan",
    "sparsify",
    "train_predictors",
    "validate",
    "visualize",
]

# What is not a function of `api`, by the module that has it.
_HOMES = {
    "Chat": "runtime.chat",
    "DllavaExportError": "errors",
    "Generation": "runtime.results",
    "Piece": "runtime.results",
    "Session": "runtime.session",
    "Sparsity": "sparsity",
    "load": "runtime.loading",
}


def __getattr__(name: str) -> Any:
    # Only what is asked for is imported: `dllava-export --help` must not load NumPy.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"dllava_export.{_HOMES.get(name, 'api')}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
