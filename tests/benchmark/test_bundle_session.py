from __future__ import annotations

import numpy as np
import pytest

from dllava_export.benchmark.bundle_session import open_bundle
from dllava_export.bundles.manifest import read_manifest
from dllava_export.sparsity import DENSE


@pytest.fixture
def prefilled(tiny_model):
    def open_it(*, is_dense: bool):
        own = read_manifest(tiny_model.bundle).sparsity
        session = open_bundle(tiny_model.bundle, DENSE if is_dense else own, 1)
        session.prefill([[1, -200, 5, 6]], np.ones((1, 3, 56, 56), np.float32))
        return session

    return open_it


def test_opens_the_dense_form_of_a_sparse_bundle(prefilled):
    session = prefilled(is_dense=True)
    assert session.manifest.sparsity.is_dense
    assert session.cache_lengths.tolist() == [[19], [19], [19]]


@pytest.mark.parametrize(
    ("is_dense", "lengths"),
    [
        # Of 16 image tokens 3 stay, of 40 generated ones half.
        pytest.param(False, [[59], [59], [3 + 3 + 20]], id="sparse"),
        pytest.param(True, [[59], [59], [59]], id="dense"),
    ],
)
def test_caches_grow_as_by_generating(prefilled, is_dense, lengths):
    session = prefilled(is_dense=is_dense)
    session.fill(40)
    assert session.cache_lengths.tolist() == lengths


def test_rows_are_written_behind_the_prompt_only(prefilled):
    session = prefilled(is_dense=False)
    keys = session.cache(2)[0]
    prompt = keys[:, :, :6].copy()
    session.fill(40)
    np.testing.assert_array_equal(keys[:, :, :6], prompt)
    assert (keys[:, :, 6:26] == np.float32(0.01)).all()
    assert not keys[:, :, 26:].any()


def test_decoding_goes_on_behind_them(prefilled):
    session = prefilled(is_dense=True)
    session.fill(40)
    assert session.decode([7]).cache_lengths.tolist() == [[60], [60], [60]]
