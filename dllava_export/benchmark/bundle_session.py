"""Open bundles for timing, and bring their caches to a length without generating."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from dllava_export.bundles import layout
from dllava_export.bundles.manifest import read_manifest
from dllava_export.sparsity import Sparsity

if TYPE_CHECKING:
    from dllava_export.runtime.session import Session


__all__ = ["open_bundle", "pretend_generated"]

_ROW_VALUE = 0.01


def open_bundle(folder: Path, sparsity: Sparsity, num_threads: int) -> Session:
    """Open a bundle in ONNX Runtime as it is, or as a dense decoder made from its dense graph.

    Args:
        folder: The bundle.
        sparsity: The bundle's own, or `DENSE`.
        num_threads: CPU threads.

    Raises:
        DllavaExportError: If the bundle cannot be loaded.
    """
    import onnx

    from dllava_export.backends.ort.backend import OrtBackend
    from dllava_export.exporting.transform import transform_decoder
    from dllava_export.runtime.session import Session

    manifest = read_manifest(folder, verify=False)
    decoder = None
    if sparsity.is_dense and not manifest.sparsity.is_dense:
        path = folder / layout.LLM_FOLDER / layout.DENSE_DECODER
        models, _ = transform_decoder(
            onnx.load(path, load_external_data=False), sparsity, None
        )
        decoder = models[layout.DECODER]
        manifest = dataclasses.replace(manifest, sparsity=sparsity)
    backend = OrtBackend(folder, manifest, num_threads=num_threads, decoder=decoder)
    return Session(folder, manifest, backend, manifest.max_position_embeddings)


def pretend_generated(session: Session, num_tokens: int) -> None:
    """Leave the caches as so many generated tokens would, the expected share of them kept.

    In memory of the CPU the rows are written: a row that never was costs less to read, since
    the system backs all of those with one page. What a row holds costs no time.
    """
    sparsity = session.manifest.sparsity
    rate = sparsity.output_text_keep_rate if sparsity.has_keep_bit else 1.0
    before = session.cache_lengths
    session._full = session._full + num_tokens
    session._sparse = session._sparse + round(rate * num_tokens)
    if session._backend.name != "onnxruntime":
        return
    for layer, after in enumerate(session.cache_lengths):
        for rows in session.cache(layer):
            rows[:, :, before[layer].min() : after.max()] = _ROW_VALUE
