"""Bundles with several policies and numbers of image tokens, made for one evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dllava_export.bundles.manifest import Manifest, read_manifest
from dllava_export.evaluation.questions import EvaluationError
from dllava_export.exporting.options import SparsityOptions
from dllava_export.passes.policies.registry import NO_POLICY

if TYPE_CHECKING:
    from dllava_export.evaluation.settings import EvaluationSettings

__all__ = ["DENSE_NAME", "Variant", "check_sweep", "sweep_variants"]

DENSE_NAME = "dense"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A bundle that is asked: one made from another, or, without a sweep, that one itself.

    Attributes:
        name: What tables call it: `dart 32`, or `dense`; behind its bundle's name where there
            are several.
        source: The bundle that it was made from.
        folder: Where it is; one that was made is removed when the evaluation ends.
        manifest: Its manifest.
    """

    name: str
    source: Path
    folder: Path
    manifest: Manifest


def check_sweep(
    bundles: Sequence[Variant], settings: EvaluationSettings, backend: str
) -> None:
    """Say before the work what would make a sweep fail.

    Args:
        bundles: The bundles, as they are.
        settings: Whose `image_keep_tokens` and `policies` are swept.
        backend: As `load` takes it.

    Raises:
        EvaluationError: If a bundle has fewer image tokens than asked for or no policy to
            sweep, or the backend runs engines, which new bundles do not have.
        BackendError: If there is no such backend.
    """
    from dllava_export.backends.registry import BACKENDS

    if BACKENDS.get(backend).can_build:
        raise EvaluationError(
            f"A sweep makes bundles, which have no engines for backend {backend!r}; expected a "
            "backend that needs none, onnxruntime. Or make the bundles with `sparsify`, build "
            "their engines and name them all."
        )
    for bundle in bundles:
        path, num_image = bundle.source, bundle.manifest.geometry.num_image_tokens
        if max(settings.image_keep_tokens) > num_image:
            raise EvaluationError(
                f"{max(settings.image_keep_tokens)} image tokens were asked for, and an image "
                f"has {num_image} in {path}; expected 1 to {num_image}. Change "
                "--image-keep-tokens."
            )
        if bundle.manifest.sparsity.is_dense and not settings.policies:
            raise EvaluationError(
                f"{path} is dense and has no policy to sweep, expected one. Name it with "
                "--policy."
            )


@contextlib.contextmanager
def sweep_variants(
    bundles: Sequence[Variant], settings: EvaluationSettings, *, progress: bool = False
) -> Iterator[list[Variant]]:
    """Give, for each bundle, its dense decoder and each policy with each number of tokens.

    All are made before the first is asked, so that a policy that cannot be fails at once. They
    share their weights with the bundle where the file system can link.

    Args:
        bundles: The bundles, as they are.
        settings: Whose `image_keep_tokens` and `policies` are swept.
        progress: Show a progress bar on stderr.

    Raises:
        DllavaExportError: If a bundle or a policy cannot be used.
    """
    from tqdm import tqdm

    from dllava_export.exporting.sparsifier import sparsify_decoder

    wanted = [
        (bundle.source, f"{bundle.name}: {label}" if len(bundles) > 1 else label, options)
        for bundle in bundles
        for label, options in _wanted(bundle.manifest, settings)
    ]
    with contextlib.ExitStack() as stack:
        found = []
        bar = tqdm(wanted, "sparsifying", disable=not progress, leave=False)
        for path, label, options in bar:
            folder = stack.enter_context(_folder_beside(path)) / "bundle"
            sparsify_decoder(path, folder, options, link=True)
            found.append(Variant(label, path, folder, read_manifest(folder)))
        yield found


def _wanted(
    manifest: Manifest, settings: EvaluationSettings
) -> Iterator[tuple[str, SparsityOptions]]:
    yield DENSE_NAME, SparsityOptions(policy=NO_POLICY)
    own = manifest.sparsity
    for policy in settings.policies or (own.policy,):
        for number in settings.image_keep_tokens:
            options = SparsityOptions(policy=policy, image_keep_tokens=number)
            if not own.is_dense:
                options = dataclasses.replace(options, sparse_layer=own.sparse_layer)
            if policy == own.policy:  # else what `sparsify --policy` would choose for text
                options = dataclasses.replace(
                    options,
                    output_text_policy=own.output_text_policy,
                    output_text_keep_rate=own.output_text_keep_rate,
                )
            yield f"{policy} {number}", options


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """Give a temporary folder where weights can be linked, if that may be written."""
    parent = path.resolve().parent
    place = parent if os.access(parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.sweep-", dir=place) as folder:
        yield Path(folder)
