from __future__ import annotations

import numpy as np
from transformers import LlamaForCausalLM

from dllava_export.benchmark.random_model import random_token_ids
from dllava_export.bundles import layout
from dllava_export.bundles.manifest import read_manifest
from dllava_export.precision import Precision


def test_llama_folder_loads_and_ties_its_table(tiny_model):
    llama = LlamaForCausalLM.from_pretrained(tiny_model.llama)
    assert llama.config.num_hidden_layers == tiny_model.geometry.num_layers
    assert llama.lm_head.weight.data_ptr() == llama.model.embed_tokens.weight.data_ptr()
    assert 0.015 < llama.model.layers[2].mlp.up_proj.weight.std() < 0.025


def test_bundle_shares_the_weights_file(tiny_model):
    linked = [
        path
        for path in (tiny_model.bundle / layout.LLM_FOLDER).iterdir()
        if path.samefile(tiny_model.weights)
    ]
    assert len(linked) == 1


def test_bundle_is_sparse_as_asked(tiny_model):
    manifest = read_manifest(tiny_model.bundle)
    assert manifest.sparsity.policy == "predictor"
    assert manifest.sparsity.sparse_layer == tiny_model.settings.sparse_layer
    assert manifest.geometry.num_image_tokens == 16
    assert manifest.precision == Precision.of("fp32")


def test_longer_prompts_continue_shorter_ones(tiny_model):
    short, long = tiny_model.prompt_ids(2), tiny_model.prompt_ids(2, 7)
    assert short.shape == (2, 24)
    assert long.shape == (2, 31)
    np.testing.assert_array_equal(long[:, :24], short)
    assert (short[0] != short[1]).any()


def test_token_ids_are_ordinary_and_repeat(tiny_model):
    ids = random_token_ids(tiny_model.geometry, (500,), seed=1)
    assert ids.min() >= 3
    assert ids.max() < 320
    np.testing.assert_array_equal(ids, random_token_ids(tiny_model.geometry, (500,), seed=1))


def test_scratch_folder_is_there(tiny_model):
    assert tiny_model.scratch.is_dir()
