from __future__ import annotations

import pytest

from dllava_export.bundles import layout
from dllava_export.validation.graph_backend import bundle_graphs, dense_graphs
from dllava_export.validation.marked_graphs import mark_decoder


def outputs(model):
    return {value.name for value in model.graph.output}


@pytest.mark.parametrize("lowered", [True, False])
def test_a_decoder_puts_out_what_was_marked(bundles, lowered):
    graph = bundle_graphs(bundles.path("mha"))[layout.DECODER]
    marked = mark_decoder(graph, layers=True, lowered=lowered)
    assert outputs(marked.model) == outputs(graph) | marked.marked
    assert list(marked.hidden_states) == [0, 1, 2, 3]
    assert marked.image_scores is not None
    assert marked.keep_margin is not None
    assert marked.text_indices is None  # of recompute alone
    ops = {node.op_type for node in marked.model.graph.node}
    assert ("GroupQueryAttention" in ops) == lowered
    assert ("KVCacheAttention" in ops) != lowered


def test_recompute_has_a_second_selection_and_no_keep_bit(bundles):
    graph = bundle_graphs(bundles.path("mha"))[layout.RECOMPUTE]
    marked = mark_decoder(graph, layers=False, lowered=False)
    assert marked.hidden_states == {}
    assert marked.text_indices is not None
    assert marked.keep_margin is None


def test_without_a_keep_bit_there_is_no_margin(bundles):
    path = bundles.path("mha", policy="norm", output_text_keep_rate=1.0)
    marked = mark_decoder(bundle_graphs(path)[layout.DECODER], layers=False, lowered=False)
    assert marked.image_scores is not None
    assert marked.keep_margin is None


def test_a_dense_decoder_has_layers_alone(bundles):
    graph = dense_graphs(bundles.path("mha"))[layout.DECODER]
    marked = mark_decoder(graph, layers=True, lowered=False)
    assert marked.marked == set(marked.hidden_states.values())
    assert len(marked.marked) == 4
