"""Peers that are no dependencies: each test says which package it lacks when it is skipped."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from dllava_export.benchmark.subject import CONVERTED, REFERENCE, subject_class

PACKAGES = {"onnxruntime-genai": ["onnxruntime_genai"], "llama.cpp": ["llama_cpp", "gguf"]}
TOLERANCES = {
    "onnxruntime-genai": 1e-5,
    "llama.cpp": 2e-3,  # its exponential and attention on the CPU are approximations
}


@pytest.fixture(params=CONVERTED, scope="module")
def peer(request, tiny_model):
    for package in PACKAGES[request.param]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    kind = subject_class(request.param)
    kind.make_files(tiny_model)
    return request.param, kind(tiny_model)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_peer_computes_what_transformers_computes(peer, tiny_model, batch_size):
    name, subject = peer
    reference = subject_class(REFERENCE)(tiny_model)
    for each in (subject, reference):
        each.prepare(batch_size)
        each.prefill()
    np.testing.assert_allclose(subject.logits(), reference.logits(), atol=TOLERANCES[name])


def test_peer_decodes_at_every_length(peer, tiny_model):
    _, subject = peer
    subject.prepare(2)
    subject.prefill()
    for length in (0, 200):
        subject.fill(length)
        for _ in range(tiny_model.settings.decode_steps):
            subject.decode()


@pytest.mark.parametrize("name", CONVERTED)
def test_peer_that_is_not_installed_says_so(name):
    try:
        importlib.import_module(PACKAGES[name][0])
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match=PACKAGES[name][0]):
            subject_class(name)
    else:
        pytest.skip(f"{name} is installed")
