from __future__ import annotations

import dataclasses

import pytest
from counted_bundle import HIDDEN, NUM_IMAGE, SPARSITY, VOCAB, WIDE, make_counted_bundle

from dllava_export.backends.kv_plan import plan_kv_cache
from dllava_export.bundles import layout
from dllava_export.cost.graph_sizes import GraphSizes, Rows, graph_sizes, read_graphs
from dllava_export.errors import BundleError

ROWS = Rows(prompt=20, kept=16, image=NUM_IMAGE)


def sizes(folder, manifest, rows=ROWS) -> GraphSizes:
    plan = plan_kv_cache(
        manifest.geometry,
        SPARSITY,
        manifest.precision,
        batch=3,
        num_prompt=20,
        num_kept=16,
        num_new=400,
    )
    return graph_sizes(read_graphs(folder, manifest), plan, rows)


def test_counts_one_sample(tmp_path):
    found = sizes(tmp_path, make_counted_bundle(tmp_path))
    ends = 20 * HIDDEN * 2 + 20 * 8 + VOCAB * 2 + NUM_IMAGE * 5 * 2 + NUM_IMAGE * HIDDEN * 2
    assert found == GraphSizes(
        decoder_weights=(HIDDEN * WIDE + WIDE * VOCAB) * 2,
        predictor_weights=WIDE * 3 * 4,
        visual_weights=5 * HIDDEN * 2,
        decoder_activations=2 * 20 * WIDE * 2,
        visual_activations=NUM_IMAGE * HIDDEN * 2,
        buffers=ends,
    )


def test_counts_the_predictor_where_it_is_the_peak(tmp_path):
    manifest = make_counted_bundle(tmp_path)
    image = sizes(tmp_path, manifest, Rows(20, 16, 1000))
    assert image.decoder_activations == (20 * WIDE + 1000 * WIDE + 1000 * 3) * 2


def test_a_bare_decoder_has_no_vision(tmp_path):
    manifest = make_counted_bundle(tmp_path, has_visual=False, embedding=None)
    graphs = read_graphs(tmp_path, manifest)
    assert (graphs.visual, graphs.embedding_bytes) == (None, 0)
    found = sizes(tmp_path, manifest)
    assert (found.visual_weights, found.visual_activations) == (0, 0)


def test_policies_without_training_have_no_predictor(tmp_path):
    manifest = make_counted_bundle(tmp_path)
    (tmp_path / layout.LLM_FOLDER / layout.PREDICTORS).unlink()
    found = sizes(tmp_path, manifest)
    assert found.predictor_weights == 0
    assert found.decoder_weights == (HIDDEN * WIDE + WIDE * VOCAB + WIDE * 3) * 2


def test_damaged_graph(tmp_path):
    manifest = make_counted_bundle(tmp_path)
    (tmp_path / layout.VISUAL_FOLDER / layout.VISUAL).write_bytes(b"\xff\xff no model")
    with pytest.raises(BundleError, match=r"model\.onnx cannot be read as an ONNX model"):
        read_graphs(tmp_path, manifest)
    # Nobody looks at it in a bundle without vision.
    read_graphs(tmp_path, dataclasses.replace(manifest, has_visual=False))
