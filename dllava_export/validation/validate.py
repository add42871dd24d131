"""Validate a bundle: run one conversation on both sides, compare, report.

Both sides are polygraphy runners, opened one after the other, so that only one model is in
memory at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from dllava_export.bundles.graph_facts import check_graphs
from dllava_export.bundles.manifest import read_manifest
from dllava_export.errors import BackendError
from dllava_export.names import IMAGE_PLACEHOLDER_ID
from dllava_export.precision import BF16
from dllava_export.runtime.session import Session
from dllava_export.sparsity import DENSE
from dllava_export.validation.comparison import CompareConversations, Shape
from dllava_export.validation.conversation import (
    Conversation,
    conversation_for,
    load_candidate,
)
from dllava_export.validation.graph_backend import GraphBackend, bundle_graphs, dense_graphs
from dllava_export.validation.report import ValidationReport
from dllava_export.validation.session_runner import SessionRunner
from dllava_export.validation.settings import ValidationSettings, tolerances_for

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner

    from dllava_export.bundles.manifest import Manifest


__all__ = ["validate_bundle"]


def validate_bundle(
    folder: str | Path,
    settings: ValidationSettings,
    *,
    image: str | None = None,
    prompt: str | None = None,
) -> ValidationReport:
    """Compare what a bundle computes with what it should.

    Args:
        folder: The bundle.
        settings: What to compare, and how close it must come.
        image: A picture for `prompt`, or `none` for a text-only one.
        prompt: The question; None draws random pixels and tokens.

    Raises:
        BackendError: If the backend is unknown, missing, or cannot run the bundle.
        BundleError: If the bundle is incomplete, changed, or of another schema version.
        CheckpointError: If the checkpoint cannot be read.
        InvalidInputError: If prompt or checkpoint do not fit the bundle.
    """
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    folder = Path(folder)
    manifest = read_manifest(folder, verify="full")
    check_graphs(folder, manifest)
    conversation = conversation_for(folder, manifest, settings, image=image, prompt=prompt)
    candidate = _candidate(folder, manifest, settings, conversation)
    reference = _reference(folder, manifest, settings, conversation)
    tolerances = tolerances_for(settings, manifest)
    compare = CompareConversations(
        sparsity=manifest.sparsity,
        shape=_shape(manifest, conversation),
        tolerances=tolerances,
        is_dense_reference=settings.against == "dense",
    )
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # the report says it all, and shorter
        results = Comparator.run([candidate, reference], data_loader=[conversation.feed])
        compared = Comparator.compare_accuracy(results, compare_func=compare)
    ((_, (checks,)),) = compared[0].items()
    return ValidationReport(
        bundle=str(folder),
        candidate=candidate.name,
        reference=reference.name,
        origin=conversation.origin,
        shape=compare.shape,
        sparsity=manifest.sparsity,
        precision=str(manifest.precision),
        tolerances=tolerances,
        checks=tuple(checks.values()),
    )


def _candidate(
    folder: Path, manifest: Manifest, settings: ValidationSettings, conversation: Conversation
) -> SessionRunner:
    """Return the bundle in the backend that is validated.

    ONNX Runtime's own session keeps no inner values, so that with `layers` the same lowered
    graphs run with more outputs.
    """
    name, feed = settings.backend, conversation.feed
    if settings.backend_options:
        name = f"{name} ({', '.join(map(str, settings.backend_options.values()))})"
    if settings.layers and settings.is_on_cpu:
        opener = functools.partial(
            _open_graphs, folder, manifest, settings, lowered=True, dense=False
        )
        return SessionRunner(f"{name} (every layer put out)", feed, opener, layers=True)

    def open_session() -> tuple[Session, GraphBackend | None]:
        return load_candidate(folder, settings), None

    return SessionRunner(name, feed, open_session, layers=settings.layers)


def _reference(
    folder: Path, manifest: Manifest, settings: ValidationSettings, conversation: Conversation
) -> BaseRunner:
    feed, layers = conversation.feed, settings.layers
    if settings.against == "torch":
        return _torch_reference(manifest, settings, conversation)
    if settings.against == "dense":
        name, lowered = "the dense decoder of the same bundle in ONNX Runtime", True
    elif settings.is_on_cpu:
        name, lowered = "the portable graphs in ONNX Runtime", False
    else:
        name, lowered = "ONNX Runtime on the CPU", True
    opener = functools.partial(
        _open_graphs, folder, manifest, settings, lowered=lowered,
        dense=settings.against == "dense",
    )  # fmt: skip
    return SessionRunner(name, feed, opener, layers=layers)


def _torch_reference(
    manifest: Manifest, settings: ValidationSettings, conversation: Conversation
) -> BaseRunner:
    import torch

    from dllava_export.validation.masked_model import load_masked_model
    from dllava_export.validation.torch_runner import TorchRunner

    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    assert settings.checkpoint is not None  # the settings were checked
    return TorchRunner(
        f"PyTorch in float32, from {settings.checkpoint}",
        conversation.feed,
        functools.partial(load_masked_model, settings.checkpoint, manifest),
        manifest.sparsity,
        layers=settings.layers,
    )


def _open_graphs(
    folder: Path,
    manifest: Manifest,
    settings: ValidationSettings,
    *,
    lowered: bool,
    dense: bool,
) -> tuple[Session, GraphBackend]:
    if manifest.precision.activations == BF16:
        raise BackendError(
            "The bundle is in bf16, which ONNX Runtime has no CPU kernels for, so that it cannot "
            "be compared there. Use another backend, and --against torch."
        )
    if dense:
        manifest = dataclasses.replace(manifest, sparsity=DENSE)
    backend = GraphBackend(
        folder,
        dense_graphs(folder) if dense else bundle_graphs(folder),
        layers=settings.layers,
        lowered=lowered,
        num_threads=settings.num_threads,
    )
    return Session(folder, manifest, backend, manifest.max_position_embeddings), backend


def _shape(manifest: Manifest, conversation: Conversation) -> Shape:
    is_placeholder = conversation.input_ids == IMAGE_PLACEHOLDER_ID
    num_image = 0
    if is_placeholder.any():
        features = conversation.image_features
        num_image = manifest.geometry.num_image_tokens
        num_image = num_image if features is None else features.shape[1]
    return Shape(
        num_layers=manifest.geometry.num_layers,
        num_prompt=int((~is_placeholder).sum()) + num_image,
        num_steps=len(conversation.output_ids),
        image_start=int(is_placeholder.argmax()),
        num_image=num_image,
    )
