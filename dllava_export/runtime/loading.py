"""Open a bundle in a backend."""

from __future__ import annotations

from pathlib import Path

from dllava_export.backends.backend import Backend
from dllava_export.backends.ort.backend import OrtBackend
from dllava_export.backends.trt.backend import TrtBackend
from dllava_export.bundles.manifest import Manifest, read_manifest
from dllava_export.errors import BackendError, InvalidInputError
from dllava_export.runtime.session import Session

__all__ = ["BACKENDS", "check_image_choice", "load"]


BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")


def load(
    path: str | Path,
    backend: str = "onnxruntime",
    *,
    provider: str | None = None,
    max_length: int | None = None,
    num_threads: int | None = None,
    verify: bool = True,
    cuda_graph: bool = True,
) -> Session:
    """Open a bundle.

    Args:
        path: The bundle.
        backend: `onnxruntime`, or `tensorrt` or `tensorrt-rtx` for engines that
            `dllava-export build` made.
        provider: Where ONNX Runtime computes: `cpu` (the default) or `cuda`.
        max_length: Largest number of tokens, prompt and answer together, that a sample may
            have; by default the model's `max_position_embeddings`, or the capacity of its
            engines if that is less.
        num_threads: CPU threads of ONNX Runtime; its own default where None. TensorRT has none.
        verify: Compare the files with the digests in the manifest.
        cuda_graph: Run TensorRT's decode steps as a CUDA graph.

    Raises:
        BackendError: If there is no such backend, or it cannot run the bundle.
        BundleError: If the bundle is incomplete, changed, or of another schema version.
        ValueError: If `max_length` is not positive.
    """
    if backend not in BACKENDS:
        raise BackendError(
            f"There is no backend {backend!r}; this version has {', '.join(BACKENDS)}. "
            "`dllava-export doctor` tells what each one needs."
        )
    if provider is not None and backend != OrtBackend.name:
        raise BackendError(
            f"provider {provider!r} was given with backend {backend!r}, which has none; "
            "it belongs to onnxruntime. Leave it out."
        )
    folder = Path(path)
    manifest = read_manifest(folder, verify=verify)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}.")
    longest = manifest.max_position_embeddings if max_length is None else max_length
    if backend == OrtBackend.name:
        opened: Backend = OrtBackend(
            folder,
            manifest,
            provider=provider or "cpu",
            num_threads=num_threads,
            max_length=longest,
        )
    else:
        opened = TrtBackend(folder, manifest, backend, verify=verify, cuda_graph=cuda_graph)
        if max_length is None:
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
