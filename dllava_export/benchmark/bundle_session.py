"""Open bundles for timing, as they are or in their dense form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllava_export.bundles import layout
from dllava_export.bundles.manifest import read_manifest
from dllava_export.sparsity import Sparsity

if TYPE_CHECKING:
    from dllava_export.runtime.session import Session


__all__ = ["DENSE_SPARSITY", "open_bundle"]

DENSE_SPARSITY = Sparsity(policy="none", output_text_keep_rate=1.0)


def open_bundle(
    folder: Path,
    sparsity: Sparsity,
    num_threads: int,
    wrap_session: Callable[[Any], Any] = lambda session: session,
) -> Session:
    """Open a bundle in ONNX Runtime as it is, or as a dense decoder made from its dense graph.

    Args:
        folder: The bundle.
        sparsity: The bundle's own, or `DENSE_SPARSITY`.
        num_threads: CPU threads.
        wrap_session: See `OrtBackend`.

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
    backend = OrtBackend(
        folder, manifest, num_threads=num_threads, decoder=decoder, wrap_session=wrap_session
    )
    return Session(folder, manifest, backend, manifest.max_position_embeddings)
