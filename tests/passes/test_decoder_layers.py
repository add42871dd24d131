from __future__ import annotations

import helpers
import onnx
import pytest

from dllava_export.errors import PreconditionError
from dllava_export.passes.decoder_layers import find_decoder_layers, find_final_logits
from dllava_export.passes.graph_io import graph_from_model

BIAS = """
    product = MatMul (n0, "0.q")
    q0 = Add (product, bias)
"""


def decoder(
    *changes: tuple[str, str], num_layers: int = 2, outputs: str = ""
) -> onnx.ModelProto:
    """Return the dense decoder with some of its text replaced."""
    nodes = helpers.dense_text(num_layers)
    for old, new in changes:
        assert nodes.count(old) == 1
        nodes = nodes.replace(old, new)
    declared = f"float[batch, rows, 11] logits{outputs}"
    weights = helpers.decoder_weights(num_layers) | helpers.random_weights(bias=(8,))
    return helpers.model_from_text(
        helpers.graph_text(helpers.DENSE_INPUTS, declared, nodes), weights
    )


def test_finds_layers_first_to_last() -> None:
    layers = find_decoder_layers(graph_from_model(helpers.dense_decoder(3)))
    assert [layer.index for layer in layers] == [0, 1, 2]
    assert [layer.hidden_in.name for layer in layers] == ["inputs_embeds", "h0", "h1"]
    assert [layer.hidden_mid.name for layer in layers] == ["m0", "m1", "m2"]
    assert [layer.hidden_out.name for layer in layers] == ["h0", "h1", "h2"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param([('q0 = MatMul (n0, "0.q")', BIAS)], id="bias"),
        pytest.param(
            [("(qr0, kr0, v0)", "(q0, k0, v0)")],
            id="no rotary embedding",
        ),
        pytest.param(
            [('o0 = MatMul (a0, "0.o")', 'oo = MatMul (a0, "0.o") o0 = Add (oo, bias)')],
            id="output bias",
        ),
        pytest.param([("h0 = Add (m0, d0)", "h0 = Add (d0, m0)")], id="sum the other way"),
    ],
)
def test_knows_variants_of_a_layer(changes: list[tuple[str, str]]) -> None:
    assert len(find_decoder_layers(graph_from_model(decoder(*changes)))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            [('q1 = MatMul (n1, "1.q")', 'qt = MatMul (n1, "1.q") q1 = Tanh (qt)')],
            "^Decoder layer 1: the query of '.*' does not come from a norm through one",
            id="unknown op before attention",
        ),
        pytest.param(
            [("o1 = MatMul", "o1 = Mul (h0, h0) oo = MatMul")],
            "^Decoder layer 1: the output of '.*' is not added back to 'h0'",
            id="no residual",
        ),
        pytest.param(
            [("h1 = Add (m1, d1)", "h1 = Mul (m1, d1)")],
            "^Decoder layer 1: found 0 residual additions after 'm1'",
            id="no second residual",
        ),
        pytest.param(
            [("h0 = Add (m0, d0)", "hh = Add (m0, d0) h0 = Tanh (hh)")],
            "^Decoder layer 1 starts at 'h0', expected the output 'hh' of layer 0",
            id="something between layers",
        ),
        pytest.param(
            [
                (
                    "qr0 = RotaryEmbedding <interleaved = 0, num_heads = 2> (q0, cos, sin)",
                    "qr0 = Add (n0, n0)",
                )
            ],
            "^Decoder layer 0: the query of",
            id="a sum without a projection",
        ),
    ],
)
def test_says_where_the_structure_breaks(changes: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(PreconditionError, match=message):
        find_decoder_layers(graph_from_model(decoder(*changes)))


def test_says_when_there_is_no_attention() -> None:
    model = helpers.model_from_text("(float[b, r, 8] x) => (float[b, r, 8] y) {y = Relu (x)}")
    with pytest.raises(PreconditionError, match="expected Attention with q_num_heads or ai"):
        find_decoder_layers(graph_from_model(model))


def test_bidirectional_attention_is_no_layer() -> None:
    model = decoder()
    for node in model.graph.node:
        for attribute in [a for a in node.attribute if a.name == "is_causal"]:
            attribute.i = 0
    with pytest.raises(PreconditionError, match=r"^The graph has no causal attention"):
        find_decoder_layers(graph_from_model(model))


def test_finds_the_logits() -> None:
    graph = graph_from_model(helpers.dense_decoder(2))
    assert find_final_logits(graph, find_decoder_layers(graph)[-1]).name == "logits"


@pytest.mark.parametrize("name", ["h1", "normed"])
def test_refuses_a_second_output_of_the_last_layer(name: str) -> None:
    graph = graph_from_model(decoder(outputs=f", float[batch, rows, 8] {name}"))
    message = rf"^2 graph outputs depend on the last decoder layer \(\['logits', '{name}'\]\)"
    with pytest.raises(PreconditionError, match=message):
        find_final_logits(graph, find_decoder_layers(graph)[-1])
