from __future__ import annotations

import numpy as np
import pytest
import tolerances

from dllava_export import names
from dllava_export.bundles import layout
from dllava_export.bundles.manifest import read_manifest
from dllava_export.runtime.session import Session
from dllava_export.validation.graph_backend import GraphBackend, bundle_graphs, dense_graphs

IDS = [np.array([1, 5, 6, 7, 8]), np.array([1, 9, 10])]


def open_graphs(path, *, layers=True, lowered=True):
    backend = GraphBackend(
        path, bundle_graphs(path), layers=layers, lowered=lowered, num_threads=1
    )
    return Session(path, read_manifest(path, verify=False), backend, 128), backend


@pytest.mark.parametrize("lowered", [True, False])
def test_it_computes_what_the_product_does(bundles, lowered):
    expected = bundles.session("mha")
    session, _ = open_graphs(bundles.path("mha"), lowered=lowered)
    for run in (
        lambda s: s.prefill(IDS, max_new_tokens=8).logits,
        lambda s: s.decode([3, 4]).logits,
        lambda s: s.decode([5, 6], active=np.array([True, False])).logits[:1],
        lambda s: s.recompute(IDS, output_ids=np.array([[3], [4]])).logits,
    ):
        np.testing.assert_allclose(run(session), run(expected), atol=tolerances.SAME_MODEL)
    np.testing.assert_array_equal(session.cache_lengths, expected.cache_lengths)


def test_a_further_prompt_goes_on_with_what_is_cached(bundles):
    expected = bundles.session("mha")
    session, _ = open_graphs(bundles.path("mha"))
    for each in (session, expected):
        each.prefill(IDS, max_new_tokens=40)
        each.decode([3, 4])
    more = [np.array([11, 12, 13]), np.array([14])]
    found = session.extend(more).logits
    np.testing.assert_allclose(found, expected.extend(more).logits, atol=tolerances.SAME_MODEL)


def test_inner_values_are_kept(bundles):
    session, backend = open_graphs(bundles.path("mha"))
    session.prefill([IDS[0]], max_new_tokens=2)
    num_layers = session.manifest.geometry.num_layers
    assert sorted(backend.decoder.hidden_states) == list(range(num_layers))
    for name in backend.decoder.hidden_states.values():
        assert backend.inner[name].shape == (1, 5, 64)
    assert backend.inner[backend.decoder.image_scores].shape == (1, 5)
    session.decode([3])
    margin = backend.inner[backend.decoder.keep_margin]
    assert margin.shape == (1, 1)


def test_the_margin_has_the_sign_of_the_decision(bundles):
    session, backend = open_graphs(bundles.path("mha"), layers=False)
    assert backend.decoder.hidden_states == {}
    session.prefill([IDS[0]], max_new_tokens=20)
    keep, margins = [], []
    for token in range(3, 19):
        keep.append(bool(session.decode([token]).keep[0]))
        margins.append(float(backend.inner[backend.decoder.keep_margin][0, 0]))
    assert keep == [margin > 0 for margin in margins]
    assert {True, False} == set(keep)


@pytest.mark.parametrize("policy", ["random", "uniform"])
def test_policies_without_weights_have_margins_too(bundles, policy):
    session, backend = open_graphs(bundles.path("mha", policy=policy), layers=False)
    session.prefill([IDS[0]], max_new_tokens=12)
    for token in range(3, 13):
        kept = bool(session.decode([token]).keep[0])
        assert kept == (float(backend.inner[backend.decoder.keep_margin][0, 0]) > 0)


def test_dense_graphs_prune_nothing(bundles):
    path = bundles.path("mha")
    graphs = dense_graphs(path)
    backend = GraphBackend(path, graphs, layers=False, lowered=True, num_threads=1)
    assert backend.decoder.marked == set()
    outputs = {value.name for value in graphs[layout.DECODER].graph.output}
    assert names.KEPT_INDICES not in outputs
