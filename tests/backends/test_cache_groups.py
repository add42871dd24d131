from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dllava_export import names
from dllava_export.backends.cache_groups import CacheGroup, cache_groups
from dllava_export.errors import SettingError
from dllava_export.geometry import Geometry
from dllava_export.sparsity import DENSE, Sparsity

GEOMETRY = Geometry(
    num_layers=5,
    hidden_size=64,
    intermediate_size=144,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=131,
    num_image_tokens=36,
)


@pytest.mark.parametrize("sparse_layer", [1, 2, 4])
def test_a_sparse_decoder_has_two_groups(sparse_layer):
    full, sparse = cache_groups(GEOMETRY, Sparsity(sparse_layer=sparse_layer))
    assert full == CacheGroup(names.FULL, 0, sparse_layer)
    assert sparse == CacheGroup(names.SPARSE, sparse_layer, 5 - sparse_layer)


def test_a_dense_decoder_has_one_group():
    assert cache_groups(GEOMETRY, DENSE) == (CacheGroup("full", 0, 5),)
    shallow = dataclasses.replace(GEOMETRY, num_layers=1)
    assert cache_groups(shallow, DENSE) == (CacheGroup("full", 0, 1),)


@pytest.mark.parametrize("sparsity", [DENSE, Sparsity(), Sparsity(sparse_layer=4)])
def test_groups_share_out_all_layers(sparsity):
    layers = np.zeros(5, int)
    for group in cache_groups(GEOMETRY, sparsity):
        layers[group.layers] += 1
        assert len(layers[group.layers]) == group.num_layers
        assert group.name in names.GROUPS
    assert layers.tolist() == [1] * 5


def test_groups_say_their_layers():
    full, sparse = cache_groups(GEOMETRY, Sparsity(sparse_layer=2))
    assert (full.text, sparse.text) == ("layers 0 to 1", "layers 2 to 4")
    assert (full.layers, sparse.layers) == (slice(0, 2), slice(2, 5))


@pytest.mark.parametrize("sparse_layer", [5, 9])
def test_refuses_a_layer_that_is_not_there(sparse_layer):
    with pytest.raises(
        SettingError,
        match=rf"^sparse_layer must be below the 5 layers of the model, got {sparse_layer}\.$",
    ):
        cache_groups(GEOMETRY, Sparsity(sparse_layer=sparse_layer))


# Names of the tensors of a group.


@pytest.mark.parametrize("group", names.GROUPS)
def test_a_group_s_tensors_are_named_after_it(group):
    assert names.write_index(group) == f"write_index_{group}"
    assert names.next_write_index(group) == f"next_write_index_{group}"
    assert names.capacity(group) == f"capacity_{group}"
    assert names.group_of(names.capacity(group)) == group


def test_past_and_present_go_together():
    past, present = names.past(3, "key"), names.present(3, "key")
    assert names.is_past(past)
    assert not names.is_past(present)
    assert names.is_present(present)
    assert not names.is_present(past)
    assert names.present_of(past) == present
    others = [names.LOGITS, *map(names.write_index, names.GROUPS)]
    assert not any(names.is_past(name) or names.is_present(name) for name in others)
