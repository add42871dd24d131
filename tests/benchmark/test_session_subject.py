from __future__ import annotations

import numpy as np
import pytest
import tolerances

from dllava_export.benchmark.session_subject import DenseSubject, SparseSubject
from dllava_export.benchmark.transformers_subject import DynamicCacheSubject
from dllava_export.errors import BackendError


@pytest.fixture(scope="module")
def sparse(tiny_model) -> SparseSubject:
    return SparseSubject(tiny_model)


@pytest.fixture(scope="module")
def dense(tiny_model) -> DenseSubject:
    return DenseSubject(tiny_model)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_dense_computes_what_transformers_computes(tiny_model, dense, batch_size):
    other = DynamicCacheSubject(tiny_model)
    for subject in (dense, other):
        subject.prepare(batch_size)
        subject.prefill()
    np.testing.assert_allclose(dense.logits(), other.logits(), atol=tolerances.SAME_MODEL)


def test_filling_starts_from_the_prompt_each_time(sparse):
    sparse.prepare(2)
    sparse.prefill()
    for length in (10, 4):
        sparse.fill(length)
        sparse.decode()
        # The prompt has 24 rows, 11 from `sparse_layer` on; of generated tokens half stay.
        assert sparse.session.cache_lengths[0].tolist() == [24 + length + 1] * 2
        assert set(sparse.session.cache_lengths[2].tolist()) <= {
            11 + length // 2,
            12 + length // 2,
        }


def test_calibrated_predictor_keeps_the_wanted_share(sparse, tiny_model):
    kv_bytes, kept = sparse.generate()
    assert kept == pytest.approx(0.5, abs=0.01)
    num_rows = 11 + round(kept * 200)
    assert kv_bytes == num_rows * 2 * 2 * 16 * 4  # keys, values; 2 heads of 16 in float32


def test_kv_bytes_follow_the_formula(dense):
    dense.prepare(1)
    dense.prefill()
    assert dense.kv_bytes(100) == 100 * 2 * 2 * 16 * 4


def test_overhead_is_a_share_and_leaves_no_trace(dense):
    dense.prepare(1)
    dense.prefill()
    before, lengths = dense.session, dense.session.cache_lengths
    assert 0 < dense.overhead(5) < 1
    assert dense.session is before
    np.testing.assert_array_equal(dense.session.cache_lengths, lengths)


def test_overhead_says_when_a_step_is_not_one_run(dense, monkeypatch):
    monkeypatch.setattr(DenseSubject, "decode", lambda self: None)
    with pytest.raises(BackendError, match="5 decode steps made 0 runs of ONNX Runtime"):
        dense.overhead(5)


def test_versions_are_named(sparse):
    assert sparse.version.startswith("dllava-export ")
    assert "onnxruntime " in sparse.version
