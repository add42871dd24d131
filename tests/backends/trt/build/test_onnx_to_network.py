from __future__ import annotations

import pytest

from dllava_export import names
from dllava_export.backends.trt.build.build_plan import load_structure
from dllava_export.backends.trt.build.node_places import NodePlaces
from dllava_export.backends.trt.build.onnx_to_network import (
    build_failure,
    custom_ops,
    lowered_model,
    network_from_onnx,
)
from dllava_export.backends.trt.trt_module import trt_logger
from dllava_export.errors import EngineBuildError


@pytest.fixture(scope="module")
def path(bundles):
    return bundles.path("mha", "fp32") / "llm" / "model.onnx"


@pytest.fixture
def parse(path):
    """Return a function that parses a model with TensorRT-RTX."""
    trt = pytest.importorskip("tensorrt_rtx")
    log = trt_logger(trt)
    builder = trt.Builder(log)
    places = NodePlaces(load_structure(path), "decoder")
    return lambda model: network_from_onnx(trt, builder, log, model, path, places)


def test_parses_a_decoder_with_its_external_weights(path, parse):
    network = parse(lowered_model(load_structure(path), 65, 49))
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    assert {t.name for t in inputs if t.is_shape_tensor} == {
        names.NUM_KEPT,
        names.NUM_IMAGE_ROWS,
    }
    shapes = {t.name: tuple(t.shape) for t in inputs}
    assert shapes[names.past(0, "key")] == (-1, 4, 65, 16)
    assert shapes[names.past(3, "value")] == (-1, 4, 49, 16)


def test_names_the_node_that_the_parser_refuses(path, parse):
    model = lowered_model(load_structure(path), 65, 49)
    node = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    node.op_type = "NoSuchOp"
    place = rf"node '{node.name}' \(NoSuchOp\) at decoder layer 0, MLP: "
    with pytest.raises(EngineBuildError, match=rf"cannot parse .*model\.onnx: {place}"):
        parse(model)


def test_names_the_custom_op_in_whose_body_the_parser_stops(path, parse):
    model = load_structure(path)
    expected = (
        r"node 'layers\.0/kv_cache/output' \(TensorScatter in the body of KVCacheAttention\) at "
        r"decoder layer 0, attention: .*static sequence length"
    )
    with pytest.raises(EngineBuildError, match=expected):
        parse(model)  # its capacities are symbolic


def test_bodies_of_plugins_are_left_out(path):
    model = lowered_model(load_structure(path), 65, 49, ("SelectTokens", "KVCacheAttention"))
    assert set(custom_ops(model)) == {
        "GatherLastToken",
        "GatherTokens",
        "KVCacheAttention",
        "PredictorHead",
        "SelectTokens",
    }
    assert {body.name for body in model.functions} == {
        "GatherLastToken",
        "GatherTokens",
        "PredictorHead",
    }


def test_failed_build_names_node_and_place(path):
    places = NodePlaces(load_structure(path), "decoder")
    errors = [
        "catchCudaError: cudaError 35: no driver",
        "Error Code 4: layers.2/select_image/predictor/image_order: axis is smaller than K",
    ]
    message = str(build_failure(path, errors, places))
    assert "at node 'layers.2/select_image/predictor/image_order' (image selection" in message
    assert "before decoder layer 2): Error Code 4: " in message
    assert "no driver" not in message


def test_failed_build_without_a_reason(path):
    places = NodePlaces(load_structure(path), "decoder")
    assert "model.onnx: it gave no reason." in str(build_failure(path, [], places))
    only_cuda = ["catchCudaError: cudaError 35: no driver"]
    assert "no driver." in str(build_failure(path, only_cuda, places))
