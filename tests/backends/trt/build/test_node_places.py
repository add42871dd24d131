from __future__ import annotations

import pytest

from dllava_export.backends.trt.build.build_plan import load_structure
from dllava_export.backends.trt.build.node_places import NodePlaces


@pytest.fixture(scope="module")
def model(bundles):
    return load_structure(bundles.path("mha", "fp32") / "llm" / "model.onnx")


@pytest.fixture(scope="module")
def places(model):
    return NodePlaces(model, "decoder")


@pytest.mark.parametrize(
    ("node", "place"),
    [
        ("layers.0/kv_cache/output", "decoder layer 0, attention"),
        ("layers.3/kv_cache/output", "decoder layer 3, attention"),
        ("attention.1/query_rotated", "decoder layer 1, attention"),
        (
            "layers.2/select_image/predictor/image_order",
            "image selection before decoder layer 2",
        ),
        ("layers.2/keep_bit/predictor/is_generated", "keep bit before decoder layer 2"),
        ("rows/is_padding", "decoder, outside its layers"),
        ("tensorrt/layers.1/kv_cache/output/query_split", "decoder layer 1, attention"),
        ("no_such_node", "decoder, outside its layers"),
    ],
)
def test_place_by_name(places, node, place):
    assert places.place(node) == place


def test_place_of_nodes_without_a_telling_name(model, places):
    order = [node.name for node in model.graph.node]
    sigmoids = [node.name for node in model.graph.node if node.op_type == "Sigmoid"]
    assert [places.place(name) for name in sigmoids] == [
        f"decoder layer {layer}, MLP" for layer in range(4)
    ]
    last = next(n.name for n in model.graph.node if "logits" in n.output)
    assert order.index(last) > order.index(sigmoids[-1])
    assert places.place(last) == "language model head"


def test_finds_the_node_that_a_message_means(places):
    text = (
        "IBuilder::build: Error Code 4: Internal Error (kOPT values violate constraints: "
        "layers.2/select_image/predictor/image_order: length of axis (rows) is smaller than K)"
    )
    assert places.find(text) == "layers.2/select_image/predictor/image_order"
    lowered = (
        "could not find any implementation for tensorrt/layers.1/kv_cache/output/product."
    )
    assert places.find(lowered) == "layers.1/kv_cache/output"
    assert places.find("out of memory") is None


def test_graph_without_decoder_layers(bundles):
    visual = load_structure(bundles.path("mha", "fp32") / "visual" / "model.onnx")
    name = next(node.name for node in visual.graph.node if node.op_type == "Attention")
    assert NodePlaces(visual, "visual").place(name) == "visual, outside its layers"
