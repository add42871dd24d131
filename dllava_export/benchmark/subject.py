"""What the suite asks of everything it measures."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


__all__ = [
    "CONVERTED",
    "DENSE",
    "REFERENCE",
    "SPARSE",
    "SUBJECTS",
    "BundleSubject",
    "Subject",
    "SuiteSubject",
    "subject_class",
]

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
    """A decoder in some runtime that can be timed: it does the same over and over."""

    def prefill(self) -> None:
        """Run the decoder over the prompts; the token after them is known at the end."""
        ...

    def fill(self, num_generated: int) -> None:
        """Bring the caches to what they hold after so many generated tokens; not timed."""
        ...

    def decode(self) -> None:
        """Run the decoder over one token per sample."""
        ...


class SuiteSubject(Subject, Protocol):
    """A subject of the suite: a decoder of random weights, opened with a `RandomModel`.

    Attributes:
        version: Package and version, of everything that computes.
        notes: How it is run, where that is not obvious.
    """

    version: str
    notes: str

    def prepare(self, batch_size: int) -> None:
        """Do what comes before a prefill and is not timed: old caches are dropped."""
        ...

    def logits(self) -> np.ndarray:
        """Return what the last prefill gave, [batch, vocab_size] float32."""
        ...


class BundleSubject(Subject, Protocol):
    """A subject of `bench BUNDLE`: it also says what its caches take."""

    def kv_bytes(self, length: int) -> int:
        """Return the bytes of the valid cache rows after so many generated tokens."""
        ...

    def kv_allocated_bytes(self) -> int:
        """Return the bytes of the cache buffers."""
        ...


def subject_class(name: str) -> Any:
    """Return a class of `SUBJECTS`, a `SuiteSubject` that a `RandomModel` opens.

    Raises:
        ImportError: If a package it needs is not installed.
    """
    module, _, kind = SUBJECTS[name].partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), kind)
