"""What the suite asks of everything it measures."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


__all__ = ["CONVERTED", "DENSE", "REFERENCE", "SPARSE", "SUBJECTS", "Subject", "subject_class"]

SPARSE, DENSE, REFERENCE = "sparse", "dense", "transformers, dynamic cache"
"""This toolkit's two forms, and whose logits the dense subjects are compared with."""

SUBJECTS = {
    SPARSE: "session_subject:SparseSubject",
    DENSE: "session_subject:DenseSubject",
    REFERENCE: "transformers_subject:DynamicCacheSubject",
    "transformers, static cache": "transformers_subject:StaticCacheSubject",
    "onnxruntime-genai": "genai_subject:GenaiSubject",
    "llama.cpp": "llama_cpp_subject:LlamaCppSubject",
}
"""Name → module of this package and class, in the order of the tables."""

CONVERTED = ("onnxruntime-genai", "llama.cpp")
"""Subjects that load a format of their own; their classes have `make_files(model)`."""


class Subject(Protocol):
    """A decoder of random weights in some runtime; opened with a `RandomModel`.

    Attributes:
        version: Package and version, of everything that computes.
        notes: How it is run, where that is not obvious.
    """

    version: str
    notes: str

    def prepare(self, batch_size: int) -> None:
        """Do what comes before a prefill and is not timed: old caches are dropped."""
        ...

    def prefill(self) -> None:
        """Run the decoder over the prompts; the token after them is known at the end."""
        ...

    def logits(self) -> np.ndarray:
        """Return what the last prefill gave, [batch, vocab_size] float32."""
        ...

    def fill(self, num_generated: int) -> None:
        """Bring the caches to what they hold after so many generated tokens; not timed."""
        ...

    def decode(self) -> None:
        """Run the decoder over one token per sample."""
        ...


def subject_class(name: str) -> Any:
    """Return a class of `SUBJECTS`, a `Subject` that a `RandomModel` opens.

    Raises:
        ImportError: If a package it needs is not installed.
    """
    module, _, kind = SUBJECTS[name].partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), kind)
