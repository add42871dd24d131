"""Which passes run, in which order, and why each stands where it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from dllava_export.passes.base import Pass, PassResult
    from dllava_export.passes.policies.weights import PredictorWeights
    from dllava_export.sparsity import Sparsity


__all__ = [
    "decoder_passes",
    "lowering_passes",
    "normalising_passes",
    "recompute_passes",
    "tensorrt_passes",
    "transformed",
]


def transformed(
    model: onnx.ModelProto, passes: Sequence[Pass]
) -> tuple[onnx.ModelProto, list[PassResult]]:
    """Run passes over a copy of a model; weights stay external.

    Returns:
        The new model, and what each pass did.
    """
    from dllava_export.passes.base import run_passes
    from dllava_export.passes.graph_io import graph_from_model, model_from_graph

    graph = graph_from_model(model)
    results = run_passes(graph, passes)
    return model_from_graph(graph), results


def normalising_passes() -> list[Pass]:
    """Bring a dense decoder, whoever traced it, into the form the other passes know."""
    from dllava_export.passes.fuse_attention import FuseAttentionPass
    from dllava_export.passes.fuse_rms_norm import FuseRMSNormPass
    from dllava_export.passes.fuse_rotary_embedding import FuseRotaryEmbeddingPass
    from dllava_export.passes.gather_last_row import GatherLastRowPass
    from dllava_export.passes.replace_token_ids import ReplaceTokenIdsPass

    return [
        FuseRMSNormPass(),  # layers are found by their norms
        FuseRotaryEmbeddingPass(),  # before attention, which looks through it
        FuseAttentionPass(),  # drops masks, which the passes below could not gather
        ReplaceTokenIdsPass(),  # after the masks are gone, which read input_ids' shape
        GatherLastRowPass(),  # counts valid rows, which cache and selection read
    ]


def decoder_passes(sparsity: Sparsity, weights: PredictorWeights | None) -> list[Pass]:
    """Return what makes the decoder with a KV cache (prefill and decode)."""
    from dllava_export.passes.insert_image_selection import InsertImageSelectionPass
    from dllava_export.passes.insert_keep_bit import InsertKeepBitPass
    from dllava_export.passes.insert_kv_cache import InsertKVCachePass

    steps = [*normalising_passes(), InsertKVCachePass()]
    if not sparsity.is_dense:
        # After the cache, whose later layers it moves to a capacity of their own.
        steps.append(InsertImageSelectionPass(sparsity.policy, sparsity.sparse_layer, weights))
    if sparsity.has_keep_bit:
        # Last: it rewinds the write index that the image selection introduced.
        steps.append(
            InsertKeepBitPass(sparsity.text_policy, sparsity.output_text_keep_rate, weights)
        )
    return steps


def recompute_passes(sparsity: Sparsity, weights: PredictorWeights | None) -> list[Pass]:
    """Return what makes the decoder without a KV cache."""
    from dllava_export.passes.insert_image_selection import InsertImageSelectionPass
    from dllava_export.passes.insert_output_text_selection import InsertOutputTextSelectionPass

    steps = normalising_passes()
    if not sparsity.is_dense:
        steps.append(InsertImageSelectionPass(sparsity.policy, sparsity.sparse_layer, weights))
    if sparsity.has_keep_bit:
        # After the image selection: it competes among the rows that one left.
        steps.append(
            InsertOutputTextSelectionPass(
                sparsity.text_policy, sparsity.output_text_keep_rate, weights
            )
        )
    return steps


def lowering_passes(provider: str = "cpu") -> list[Pass]:
    """Return what fits a portable graph to ONNX Runtime.

    Args:
        provider: See `LowerForOnnxRuntimePass`.
    """
    from dllava_export.passes.fuse_residual_norm import FuseResidualNormPass
    from dllava_export.passes.lower_for_onnxruntime import LowerForOnnxRuntimePass
    from dllava_export.passes.pack_projections import PackProjectionsPass

    steps: list[Pass] = [LowerForOnnxRuntimePass(provider)]
    if provider == "cpu":
        # After the lowering, whose ops they join: fewer kernels to start in a decode step.
        steps += [FuseResidualNormPass(), PackProjectionsPass()]
    return steps


def tensorrt_passes(
    capacities: Mapping[str, int], plugin_ops: tuple[str, ...] = ()
) -> list[Pass]:
    """Return what fits a portable graph to TensorRT, and its ops to their plugins.

    Args:
        capacities: See `LowerForTensorRTPass`.
        plugin_ops: Custom ops that a plugin computes.
    """
    from dllava_export.passes.lower_for_plugins import LowerForPluginsPass
    from dllava_export.passes.lower_for_tensorrt import LowerForTensorRTPass

    steps: list[Pass] = [LowerForTensorRTPass(capacities, plugin_ops)]
    if plugin_ops:
        steps.append(LowerForPluginsPass(plugin_ops))
    return steps
