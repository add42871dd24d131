"""Open a bundle in a backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllava_export.backends.registry import BACKENDS, DEFAULT_BACKEND, backend_options
from dllava_export.boundary import raises_expected_errors_only
from dllava_export.bundles.graph_facts import check_graphs
from dllava_export.bundles.manifest import Manifest, Verification, read_manifest
from dllava_export.errors import InvalidInputError, SettingError
from dllava_export.runtime.session import Session
from dllava_export.settings import whole_number

__all__ = ["check_image_choice", "load"]


@raises_expected_errors_only
def load(
    path: str | Path,
    backend: str = DEFAULT_BACKEND,
    *,
    max_length: int | None = None,
    verify: Verification = True,
    **options: Any,
) -> Session:
    """Open a bundle.

    Args:
        path: The bundle.
        backend: What runs it: `onnxruntime`, or `tensorrt` or `tensorrt-rtx` for engines that
            `dllava-export build` made, or one of another package.
        max_length: Largest number of tokens, prompt and answer together, that a sample may
            have; by default the model's `max_position_embeddings`, or the capacity of its
            engines if that is less. It cannot be larger than that: positions that a model was
            not made for give no sensible answers.
        verify: What is compared with the manifest. True, the quick check: what graphs and
            manifest both say, sizes and digests; those of files above 256 MiB cover 64 evenly
            spread MiB, which finds a replaced file but not every changed byte. `full`: every
            byte of all files, in seconds per 10 GB. False: sizes alone.
        **options: The backend's own, see its `options`: `provider` ("cpu" or "cuda") and
            `num_threads` of ONNX Runtime, `cuda_graph` of TensorRT.

    Raises:
        BackendError: If there is no such backend or option, or it cannot run the bundle.
        BundleError: If the bundle is incomplete, changed, or of another schema version.
        SettingError: If `max_length` is not positive, or more than the model takes.
    """
    factory = BACKENDS.get(backend)
    chosen = backend_options(factory, options)
    folder = Path(path)
    if max_length is not None:
        max_length = whole_number("max_length", max_length, 1)
    manifest = read_manifest(folder, verify=verify)
    if max_length is not None and max_length > manifest.max_position_embeddings:
        raise SettingError(
            f"max_length is {max_length}, the model takes "
            f"{manifest.max_position_embeddings} tokens at most (max_position_embeddings): "
            "positions behind them give no sensible answers. Leave max_length out, or take a "
            "model with a longer context."
        )
    if verify:
        check_graphs(folder, manifest)
    opened = factory.open(folder, manifest, chosen, verify=bool(verify))
    longest = manifest.max_position_embeddings if max_length is None else max_length
    if max_length is None and opened.max_length is not None:
        longest = min(longest, opened.max_length)
    return Session(folder, manifest, opened, longest)


def check_image_choice(manifest: Manifest, image: str | None) -> str | None:
    """Return the picture to use; `none` stands for a text-only prompt.

    Raises:
        InvalidInputError: If the bundle takes pictures and nothing was said, or takes none.
    """
    if image is None and manifest.has_visual:
        raise InvalidInputError(
            "The bundle takes an image with its prompt, and none was given. Pass --image FILE, "
            "or --image none for a text-only prompt."
        )
    return None if image == "none" else image
