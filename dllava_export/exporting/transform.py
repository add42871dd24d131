"""From a dense decoder to the decoders of a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dllava_export.bundles import layout
from dllava_export.pipeline import decoder_passes, recompute_passes, transformed
from dllava_export.sparsity import Sparsity

if TYPE_CHECKING:
    import onnx

    from dllava_export.passes.base import PassResult
    from dllava_export.passes.policies.weights import PredictorWeights

__all__ = ["transform_decoder"]


def transform_decoder(
    dense: onnx.ModelProto, sparsity: Sparsity, weights: PredictorWeights | None
) -> tuple[dict[str, onnx.ModelProto], dict[str, list[dict[str, Any]]]]:
    """Make the decoder with and without KV cache from a dense one.

    Returns:
        Models by file name, and what each pass did, by file name.
    """
    models, applied = {}, {}
    for name, passes in (
        (layout.DECODER, decoder_passes(sparsity, weights)),
        (layout.RECOMPUTE, recompute_passes(sparsity, weights)),
    ):
        models[name], results = transformed(dense, passes)
        applied[name] = [_pass_entry(result) for result in results]
    return models, applied


def _pass_entry(result: PassResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "parameters": result.settings,
        "modified": result.modified,
        "num_nodes": result.num_nodes,
    }
