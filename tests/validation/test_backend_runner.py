from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import tolerances
from polygraphy.exception import PolygraphyException
from polygraphy.json import load_json

from dllava_export import names
from dllava_export.backends.ort.backend import OrtBackend, open_session
from dllava_export.backends.ort.factory import OrtFactory
from dllava_export.bundles.manifest import read_manifest, write_manifest
from dllava_export.errors import BackendError
from dllava_export.precision import Precision
from dllava_export.validation.backend_runner import BackendRunner
from dllava_export.validation.graph_inputs import save_graph_inputs
from dllava_export.validation.settings import ValidationSettings

GRAPHS = {
    "visual": "visual/model.onnx",
    "decoder_prefill": "llm/model.onnx",
    "decoder_decode": "llm/model.onnx",
    "recompute": "llm/recompute.onnx",
}


@pytest.fixture(scope="module")
def feeds(bundles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    found = {}
    for key, sparsity in (("sparse", {}), ("dense", {"policy": "none"})):
        settings = ValidationSettings(num_steps=3, num_threads=1)
        path = bundles.path("mha", **sparsity)
        saved = save_graph_inputs(path, folder / key, settings)
        found[key] = (
            path,
            {each.file.stem: load_json(str(each.file))[0] for each in saved.files},
        )
    return found


def infer(model, feed, backend="onnxruntime"):
    with BackendRunner(model, backend) as runner:
        outputs = runner.infer(feed)
        assert runner.last_inference_time() > 0
    return outputs


def portable(model, feed):
    session = open_session(model, num_threads=1)
    outputs = [entry.name for entry in session.get_outputs()]
    return dict(zip(outputs, session.run(None, feed), strict=True))


@pytest.mark.parametrize("use", GRAPHS)
@pytest.mark.parametrize("sparsity", ["sparse", "dense"])
def test_outputs_are_those_of_the_graph_on_disk(feeds, sparsity, use):
    path, by_use = feeds[sparsity]
    found = infer(path / GRAPHS[use], by_use[use])
    expected = portable(path / GRAPHS[use], by_use[use])
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_allclose(
            found[name], values, atol=tolerances.GOLDEN, rtol=tolerances.DENSE, err_msg=name
        )


def test_inputs_stay_and_results_do_not_follow_the_next_run(feeds):
    path, by_use = feeds["sparse"]
    feed = {name: array.copy() for name, array in by_use["decoder_prefill"].items()}
    with BackendRunner(path / "llm/model.onnx", "onnxruntime") as runner:
        first = runner.infer(feed)
        kept = {name: array.copy() for name, array in first.items()}
        other = {**feed, names.INPUTS_EMBEDS: feed[names.INPUTS_EMBEDS] + 1}
        second = runner.infer(other)
    for name, array in by_use["decoder_prefill"].items():
        assert np.array_equal(feed[name], array)
    for name, array in kept.items():
        assert np.array_equal(first[name], array)
    assert not np.array_equal(first["present.0.key"], second["present.0.key"])


def test_larger_buffers_of_an_engine_are_cut_to_what_was_fed(feeds, monkeypatch):
    class Roomy(OrtBackend):
        def allocate(self, plan):
            capacities = {name: rows + 5 for name, rows in plan.capacities.items()}
            super().allocate(dataclasses.replace(plan, capacities=capacities))

    path, by_use = feeds["sparse"]
    expected = infer(path / "llm/model.onnx", by_use["decoder_decode"])
    monkeypatch.setattr(
        OrtFactory, "open", lambda _, f, m, *__, **___: Roomy(f, m, num_threads=1)
    )
    found = infer(path / "llm/model.onnx", by_use["decoder_decode"])
    for name, values in expected.items():
        np.testing.assert_allclose(
            found[name], values, atol=tolerances.SAME_MODEL, err_msg=name
        )


def test_bf16_is_refused(feeds, tmp_path):
    out = tmp_path / "bf16"
    shutil.copytree(feeds["sparse"][0], out, copy_function=shutil.copyfile)
    write_manifest(
        out, dataclasses.replace(read_manifest(out), precision=Precision.of("bf16"))
    )
    with pytest.raises(
        BackendError, match="is in bf16, which polygraphy's arrays do not have"
    ):
        BackendRunner(out / "llm/model.onnx", "onnxruntime").activate()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("llm/dense.onnx", "is none of the graphs that the product runs; expected llm/model"),
        ("elsewhere/llm/model.onnx", "expected a bundle"),
    ],
)
def test_other_models_are_refused_in_terms_of_both_packages(feeds, model, message):
    runner = BackendRunner(feeds["sparse"][0] / model, "onnxruntime")
    for kind in (BackendError, PolygraphyException):
        with pytest.raises(kind, match=message):
            runner.activate()
