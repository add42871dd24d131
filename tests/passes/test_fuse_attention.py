from __future__ import annotations

import dataclasses
import re

import helpers
import numpy as np
import onnx
import pytest

from dllava_export.errors import PostconditionError, PreconditionError
from dllava_export.passes.fuse_attention import FuseAttentionPass
from dllava_export.passes.graph_io import graph_from_model

VALUES = "float[batch, rows, 8] q, float[batch, rows, {kv}] k, float[batch, rows, {kv}] v"
TABLES = "float[batch, rows, 2] cos, float[batch, rows, 2] sin"
OUTPUT = "float[batch, rows, 8] y"
CONSTANTS = """int64[4] q_heads = {0, 0, 2, 4}, int64[4] kv_heads = {0, 0, 1, 4},
    int64[3] merged = {0, 0, -1}, int64[4] repeated = {0, 2, -1, 4},
    int64[1] axis_1 = {1}, int64[1] axis_2 = {2}, int64[2] axes_1_2 = {1, 2},
    int64[5] two_times = {1, 1, 2, 1, 1}, int64[0] scalar = {}, int64 zero = {0}, int64 one = {1},
    int64 narrow = {3}, int64 wide = {100}, float half = {0.5}, float root = {1.4142135},
    float none = {0}, float all = {-3.0e38}, int64[1] minus_one = {-1}, int64[1] four = {4},
    int64[1] two_heads = {2}, int64[1] last_axis = {-1}"""
HEADS = """
    q_rows = Reshape (q, q_heads)
    k_rows = Reshape (k, {heads})
    v_rows = Reshape (v, {heads})
    q4 = Transpose <perm = [0, 2, 1, 3]> (q_rows)
    k4 = Transpose <perm = [0, 2, 1, 3]> (k_rows)
    v4 = Transpose <perm = [0, 2, 1, 3]> (v_rows)
"""
MERGE = """
    rows_first = Transpose <perm = [0, 2, 1, 3]> (attended)
    y = Reshape (rows_first, merged)
"""
MASK = """
    dims = Shape <start = 1, end = 2> (q)
    count = Reshape (dims, scalar)
    column = Range (zero, count, one)
    row = Unsqueeze (column, axis_1)
"""
CAUSAL = MASK + "mask = LessOrEqual (column, row)"
QUERY_SIZE = CAUSAL.replace("<start = 1, end = 2> (q)", "<start = -2, end = -1> (q4)")
WEIGHTED = "q = Mul (q_unscaled, scales)"
PADDED = """
    causal = LessOrEqual (column, row)
    is_valid = Cast <to = 9> (attention_mask)
    is_valid_column = Unsqueeze (is_valid, axes_1_2)
    visible = And (causal, is_valid_column)
    mask = Where (visible, none, all)
"""
OP = "attended = Attention <is_causal = {causal}> ({q}, {k}, {v}{mask})"
PLAIN_OP = OP.format(causal=1, q="q4", k="k4", v="v4", mask="")
MASKED_OP = OP.format(causal=0, q="q4", k="k4", v="v4", mask=", mask")
REPEAT = """
    {x}5 = Unsqueeze ({x}4, axis_2)
    {x}5_twice = Expand ({x}5, two_times)
    {x}_all = Reshape ({x}5_twice, repeated)
"""
SOFTMAX = """
    k_t = Transpose <perm = [0, 1, 3, 2]> ({k})
    products = MatMul (q4, k_t)
    scaled = Mul (products, half)
    scores = Add (scaled, mask)
    probabilities = Softmax <axis = -1> (scores)
    attended = MatMul (probabilities, {v})
"""
SCALED_INPUTS = """
    q_scaled = Div (q4, root)
    k_scaled = Div (k4, root)
    k_t = Transpose <perm = [0, 1, 3, 2]> (k_scaled)
    products = MatMul (q_scaled, k_t)
    scores = Add (mask, products)
    probabilities = Softmax <axis = -1> (scores)
    attended = MatMul (probabilities, v4)
"""
NAN_GUARD = """
    is_nan = IsNaN (raw)
    probabilities = Where (is_nan, none, raw)
"""
GUARDED = SOFTMAX.replace(
    "probabilities = Softmax <axis = -1> (scores)",
    "raw = Softmax <axis = -1> (scores)" + NAN_GUARD,
)
KEY_BY_THREE_AXES = """
    key_rows = Shape <start = 2, end = 3> (k4)
    key_batch = Shape <start = 0, end = 1> (k4)
    three = Concat <axis = 0> (minus_one, key_rows, four)
    back = Concat <axis = 0> (key_batch, two_heads, four, key_rows)
    k3 = Reshape (k4, three)
    k3_t = Transpose <perm = [0, 2, 1]> (k3)
    k_t = Reshape (k3_t, back)
"""
EMPTY_ROWS = """
    visible_number = Cast <to = 1> (visible)
    best = ReduceMax <keepdims = 1> (visible_number, last_axis)
    nothing = Less (best, half)
"""
ROW_GUARD = EMPTY_ROWS + "attended = Where (nothing, none, raw_attended)"
FLOAT_MASK = MASK + PADDED
FUSED = """
    y = Attention <is_causal = 1, q_num_heads = 2, kv_num_heads = {kv}, scale = 0.5>
        ({q}, {k}, v)
"""
ROTATED = """
    q_turned = RotaryEmbedding <interleaved = 0> (q4, cos, sin)
    k_turned = RotaryEmbedding <interleaved = 0> (k4, cos, sin)
"""
ROTATED_ROWS = """
    q_turned = RotaryEmbedding <interleaved = 0, num_heads = 2> (q, cos, sin)
    k_turned = RotaryEmbedding <interleaved = 0, num_heads = 2> (k, cos, sin)
"""


@dataclasses.dataclass(frozen=True)
class Form:
    """Nodes before and after, the width of keys and values, and inputs that disappear."""

    before: str
    after: str = FUSED.format(kv=2, q="q", k="k")
    kv_heads: int = 2
    dropped: str = ""

    def model(self, nodes: str, dropped: str = "") -> onnx.ModelProto:
        inputs = VALUES.format(kv=4 * self.kv_heads) + (
            f", {TABLES}" if "cos" in self.before else ""
        )
        nodes = nodes.replace("{heads}", "q_heads" if self.kv_heads == 2 else "kv_heads")
        return helpers.model_from_text(
            f"({inputs}{dropped}) => ({OUTPUT}) <{CONSTANTS}> {{{nodes}}}"
        )

    def dense(self) -> onnx.ModelProto:
        return self.model(self.before, self.dropped)

    def fused(self) -> onnx.ModelProto:
        return self.model(self.after)


ATTENTION_MASK = ", int64[batch, rows] attention_mask"
GROUPED = FUSED.format(kv=1, q="q", k="k")
OP_FORM = Form(HEADS + PLAIN_OP + MERGE)
SOFTMAX_FORM = Form(
    HEADS + FLOAT_MASK + SOFTMAX.format(k="k4", v="v4") + MERGE, dropped=ATTENTION_MASK
)
FORMS = [
    pytest.param(OP_FORM, id="op"),
    pytest.param(Form(HEADS + CAUSAL + MASKED_OP + MERGE), id="op with a mask"),
    pytest.param(
        Form(HEADS + FLOAT_MASK + MASKED_OP + MERGE, dropped=ATTENTION_MASK),
        id="op with a float mask and padding",
    ),
    pytest.param(SOFTMAX_FORM, id="softmax"),
    pytest.param(
        Form(
            HEADS + FLOAT_MASK + GUARDED.format(k="k4", v="v4") + MERGE,
            dropped=ATTENTION_MASK,
        ),
        id="softmax with a guard against NaN",
    ),
    pytest.param(
        Form(
            HEADS
            + FLOAT_MASK
            + KEY_BY_THREE_AXES
            + "".join(SOFTMAX.splitlines(keepends=True)[2:]).format(v="v4")
            + MERGE,
            dropped=ATTENTION_MASK,
        ),
        id="softmax of a key turned on three axes",
    ),
    pytest.param(
        Form(
            HEADS
            + FLOAT_MASK
            + MASKED_OP.replace("attended", "raw_attended")
            + ROW_GUARD
            + MERGE,
            dropped=ATTENTION_MASK,
        ),
        id="op with a guard for rows that see nothing",
    ),
    pytest.param(
        Form(HEADS + FLOAT_MASK + SCALED_INPUTS + MERGE, dropped=ATTENTION_MASK),
        id="softmax of scaled query and key",
    ),
    pytest.param(
        Form(
            HEADS
            + REPEAT.format(x="k")
            + REPEAT.format(x="v")
            + FLOAT_MASK
            + SOFTMAX.format(k="k_all", v="v_all")
            + MERGE,
            GROUPED,
            1,
            ATTENTION_MASK,
        ),
        id="softmax over repeated heads",
    ),
    pytest.param(Form(HEADS + PLAIN_OP + MERGE, GROUPED, 1), id="op with fewer key heads"),
    pytest.param(
        Form(
            HEADS
            + ROTATED
            + OP.format(causal=1, q="q_turned", k="k_turned", v="v4", mask="")
            + MERGE,
            ROTATED_ROWS + FUSED.format(kv=2, q="q_turned", k="k_turned"),
        ),
        id="op after a rotary embedding",
    ),
]

WINDOW = """
    start = Sub (row, {width})
    causal = LessOrEqual (column, row)
    near = Greater (column, start)
    mask = And (causal, near)
"""
PREFIX = """
    causal = LessOrEqual (column, row)
    first = Less (column, narrow)
    mask = Or (causal, first)
"""
BOTH_WAYS = (
    "past = LessOrEqual (column, row) future = Greater (column, row) mask = Or (past, future)"
)
NOT_CAUSAL = [
    pytest.param(
        BOTH_WAYS, "with 5 rows row 0 sees rows 0 to 4, expected rows 0 to 0", id="both ways"
    ),
    pytest.param(
        PREFIX, "with 5 rows row 0 sees rows 0 to 2, expected rows 0 to 0", id="prefix"
    ),
    pytest.param(
        WINDOW.format(width="narrow"), "with 5 rows row 3 sees rows 1 to 3", id="narrow window"
    ),
    pytest.param(
        WINDOW.format(width="wide"),
        "with 102 rows row 100 sees rows 1 to 100",
        id="wide window",
    ),
    pytest.param("mask = GreaterOrEqual (row, zero)", "its shape is [5, 1]", id="one column"),
]
ALWAYS = "always = Equal (row, row) attended = Where (always, none, raw_attended)"
UNKNOWN = [
    pytest.param(
        HEADS + CAUSAL + MASKED_OP.replace("attended", "raw_attended") + ALWAYS + MERGE,
        "The output of attention '' is set to zero where 'always' holds, and without padding",
        id="output set to zero",
    ),
    pytest.param(
        "y = Relu (q)", "No attention was recognised. Expected Attention nodes", id="none"
    ),
    pytest.param(
        HEADS + OP.format(causal=0, q="q4", k="k4", v="v4", mask="") + MERGE,
        "Attention 0 () has no mask and is not causal; a decoder's attention must be",
        id="no mask",
    ),
    pytest.param(
        HEADS
        + MASK
        + "learned = Sigmoid (bias) mask = Add (learned, bias)"
        + MASKED_OP
        + MERGE,
        "The attention mask 'mask' depends on the weight 'bias'",
        id="learned bias",
    ),
    pytest.param(
        HEADS + OP.format(causal=1, q="q4", k="k4", v="v4", mask=', "", k4, v4') + MERGE,
        "Attention node '' has past keys; expected plain causal attention",
        id="past keys",
    ),
    pytest.param(
        HEADS + PLAIN_OP.replace("is_causal", "softcap = 30.0, is_causal") + MERGE,
        "Attention node '' has softcap 30.0",
        id="softcap",
    ),
    pytest.param(
        CAUSAL + OP_FORM.after.replace("v)", "v, mask)"),
        "Attention node '' has a mask",
        id="mask on rows",
    ),
    pytest.param(
        HEADS + PLAIN_OP + "y = Reshape (attended, merged)",
        "The output of attention '' is not merged back",
        id="heads not merged",
    ),
    pytest.param(
        HEADS + "q_tanh = Tanh (q4)" + PLAIN_OP.replace("(q4", "(q_tanh") + MERGE,
        "The query of attention.0 is computed by Tanh ('q_tanh'); expected Reshape",
        id="unknown query",
    ),
]
ENCODER = "y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v)"


@pytest.mark.parametrize("form", FORMS)
def test_becomes_one_causal_node_over_rows(form: Form) -> None:
    helpers.assert_same_graph(helpers.apply(form.dense(), FuseAttentionPass()), form.fused())


@pytest.mark.parametrize(
    "nodes", [OP_FORM.after, ENCODER], ids=["fused already", "a predictor's"]
)
def test_leaves_attention_over_rows_alone(nodes: str) -> None:
    helpers.assert_changes_nothing(OP_FORM.model(nodes), FuseAttentionPass())


@pytest.mark.parametrize("form", FORMS)
def test_second_run_changes_nothing(form: Form) -> None:
    after = helpers.apply(form.dense(), FuseAttentionPass())
    helpers.assert_changes_nothing(after, FuseAttentionPass())


@pytest.mark.parametrize(("mask", "message"), NOT_CAUSAL)
def test_refuses_masks_that_are_not_causal(mask: str, message: str) -> None:
    model = OP_FORM.model(HEADS + MASK + mask + MASKED_OP + MERGE)
    with pytest.raises(PreconditionError, match=re.escape(message)) as caught:
        helpers.apply(model, FuseAttentionPass())
    assert str(caught.value).startswith("The mask 'mask' of attention '' is not causal:")


def test_refuses_a_mask_that_is_an_input() -> None:
    mask = ", float[batch, 1, rows, rows] mask"
    model = OP_FORM.model(HEADS + MASKED_OP + MERGE, mask)
    message = "^The attention mask is the graph input 'mask', which may mean anything"
    with pytest.raises(PreconditionError, match=message):
        helpers.apply(model, FuseAttentionPass())


@pytest.mark.parametrize(("nodes", "message"), UNKNOWN)
def test_refuses_what_later_passes_cannot_keep(nodes: str, message: str) -> None:
    nodes = nodes.replace("{heads}", "q_heads")
    text = f"({VALUES.format(kv=8)}) => ({OUTPUT}) <{CONSTANTS}> {{{nodes}}}"
    model = helpers.model_from_text(text, helpers.random_weights(bias=(5, 5)))
    for tensor in model.graph.initializer:
        if tensor.name == "bias":
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="weights.safetensors")
    with pytest.raises(PreconditionError, match=f"^{re.escape(message)}"):
        helpers.apply(model, FuseAttentionPass())


def test_a_mask_may_ask_a_product_with_weights_for_its_size() -> None:
    nodes = WEIGHTED + HEADS.format(heads="q_heads") + QUERY_SIZE + MASKED_OP + MERGE
    values = VALUES.format(kv=8).replace(" q,", " q_unscaled,")
    text = f"({values}) => ({OUTPUT}) <{CONSTANTS}> {{{nodes}}}"
    model = helpers.model_from_text(text, helpers.random_weights(scales=(8,)))
    tensor = next(t for t in model.graph.initializer if t.name == "scales")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.safetensors")
    after = helpers.apply(model, FuseAttentionPass())
    assert [node.op_type for node in after.graph.node] == ["Mul", "Attention"]


def test_reports_attention_that_was_left() -> None:
    message = "^Attention node '' was not brought into the causal, three-dimensional form"
    with pytest.raises(PostconditionError, match=message):
        FuseAttentionPass().ensures(graph_from_model(OP_FORM.dense()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 5])
def test_computes_the_same(form: Form, rows: int) -> None:
    rng = np.random.default_rng(4)
    widths = {"q": 8, "k": 4 * form.kv_heads, "v": 4 * form.kv_heads, "cos": 2, "sin": 2}
    feeds = {
        name: rng.normal(size=(2, rows, w)).astype(np.float32) for name, w in widths.items()
    }
    feeds["attention_mask"] = np.ones((2, rows), np.int64)
    before, after = form.dense(), helpers.apply(form.dense(), FuseAttentionPass())
    helpers.assert_close(helpers.run(after, feeds)["y"], helpers.run(before, feeds)["y"])


def test_inputs_that_only_the_mask_read_disappear() -> None:
    after = helpers.apply(SOFTMAX_FORM.dense(), FuseAttentionPass())
    assert [entry.name for entry in after.graph.input] == ["q", "k", "v"]
