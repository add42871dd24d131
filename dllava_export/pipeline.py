"""Which passes run, in which order, and why each stands where it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllava_export.passes import Pass, PredictorWeights
    from dllava_export.sparsity import Sparsity

__all__ = ["decoder_passes", "lowering_passes", "normalising_passes", "recompute_passes"]


def normalising_passes() -> list[Pass]:
    """Bring a dense decoder, whoever traced it, into the form the other passes know."""
    from dllava_export import passes

    return [
        passes.FuseRMSNormPass(),  # layers are found by their norms
        passes.FuseRotaryEmbeddingPass(),  # before attention, which looks through it
        passes.FuseAttentionPass(),  # drops masks, which the passes below could not gather
        passes.ReplaceTokenIdsPass(),  # after the masks are gone, which read input_ids' shape
        passes.GatherLastRowPass(),  # counts valid rows, which cache and selection read
    ]


def decoder_passes(sparsity: Sparsity, weights: PredictorWeights | None) -> list[Pass]:
    """Return what makes the decoder with a KV cache (prefill and decode)."""
    from dllava_export import passes

    steps = [*normalising_passes(), passes.InsertKVCachePass()]
    if not sparsity.is_dense:
        # After the cache, whose later layers it moves to a capacity of their own.
        steps.append(
            passes.InsertImageSelectionPass(sparsity.policy, sparsity.sparse_layer, weights)
        )
    if sparsity.has_keep_bit:
        # Last: it rewinds the write index that the image selection introduced.
        steps.append(
            passes.InsertKeepBitPass(sparsity.policy, sparsity.output_text_keep_rate, weights)
        )
    return steps


def recompute_passes(sparsity: Sparsity, weights: PredictorWeights | None) -> list[Pass]:
    """Return what makes the decoder without a KV cache."""
    from dllava_export import passes

    steps = normalising_passes()
    if not sparsity.is_dense:
        steps.append(
            passes.InsertImageSelectionPass(sparsity.policy, sparsity.sparse_layer, weights)
        )
    if sparsity.has_keep_bit:
        # After the image selection: it competes among the rows that one left.
        steps.append(
            passes.InsertOutputTextSelectionPass(
                sparsity.policy, sparsity.output_text_keep_rate, weights
            )
        )
    return steps


def lowering_passes() -> list[Pass]:
    """Return what fits a portable graph to ONNX Runtime."""
    from dllava_export import passes

    return [passes.LowerForOnnxRuntimePass()]
