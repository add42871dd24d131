"""Each op's body on ONNX Runtime against NumPy."""

from __future__ import annotations

import helpers
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dllava_export import names
from dllava_export.passes.graph_builder import GraphBuilder
from dllava_export.passes.graph_io import model_from_graph
from dllava_export.passes.sparse_ops import FUNCTION_TEXTS, function_proto

TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(bool): TensorProto.BOOL,
}


def op_model(
    op: str, outputs: dict[str, type], feeds: dict[str, np.ndarray], **attributes: object
) -> onnx.ModelProto:
    """Return a model of one node; inputs in the order of `feeds`, with their ranks."""
    inputs = [
        helper.make_tensor_value_info(name, TYPES[values.dtype], [None] * values.ndim)
        for name, values in feeds.items()
    ]
    results = [
        helper.make_tensor_value_info(name, TYPES[np.dtype(dtype)], None)
        for name, dtype in outputs.items()
    ]
    plugin = {"plugin_namespace": "dllava", "plugin_version": "1"}
    node = helper.make_node(
        op, list(feeds), list(outputs), domain=names.DOMAIN, **attributes, **plugin
    )
    return helper.make_model(
        helper.make_graph([node], "op", inputs, results),
        opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid(names.DOMAIN, 1)],
        functions=[function_proto(op)],
        ir_version=11,
    )


def run_op(
    op: str, outputs: dict[str, type], feeds: dict[str, np.ndarray], **attributes: object
) -> list[np.ndarray]:
    """Run a node of this domain alone."""
    return list(helpers.run(op_model(op, outputs, feeds, **attributes), feeds).values())


@pytest.mark.parametrize("op", FUNCTION_TEXTS)
def test_every_body_is_standard_onnx(op: str) -> None:
    function = function_proto(op)
    assert {entry.domain: entry.version for entry in function.opset_import} == {"": 24}
    assert {node.domain for node in function.node} == {""}
    assert set(function.attribute) >= {"plugin_namespace", "plugin_version"}


def test_nodes_name_their_plugin() -> None:
    graph = helpers.graph_from_model(helpers.dense_decoder(1))
    builder = GraphBuilder(graph, "here")
    tensors = graph.inputs
    out = builder.op(
        "GatherTokens", tensors, "kept", np.float32, [1, 1, 8], domain=names.DOMAIN
    )
    graph.outputs.append(out)
    node = next(n for n in model_from_graph(graph).graph.node if n.op_type == "GatherTokens")
    attributes = {a.name: a.s.decode() for a in node.attribute}
    assert attributes == {"plugin_namespace": "dllava", "plugin_version": "1"}


# SelectTokens


def select(scores: np.ndarray, token_kind: np.ndarray, kept_lengths: list[int]) -> np.ndarray:
    feeds = {
        "scores": scores,
        "token_kind": token_kind,
        "num_kept": np.array([max(kept_lengths)]),
        "kept_lengths": np.array(kept_lengths),
    }
    return run_op("SelectTokens", {"kept_indices": np.int64}, feeds)[0]


def distinct_scores(*shape: int) -> np.ndarray:
    return (
        np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape).astype(np.float32)
    )


@pytest.mark.parametrize(
    ("kinds", "kept_lengths"),
    [
        pytest.param([[1, 2, 2, 2, 1]], [3], id="odd"),
        pytest.param([[1, 2, 2, 2, 1]], [5], id="all kept"),
        pytest.param([[1, 2, 2, 2, 1]], [2], id="no image row kept"),
        pytest.param([[1, 1, 1]], [3], id="no image rows"),
        pytest.param([[3]], [1], id="one generated row"),
        pytest.param([[2]], [1], id="one image row"),
        pytest.param([[2, 2, 1, 2, 2, 1, 1]], [5], id="two images"),
        pytest.param([[1, 2, 2, 2, 1, 1], [2, 2, 2, 1, 0, 0]], [4, 2], id="padded"),
        pytest.param([[1, 2, 2, 2], [1, 1, 0, 0]], [3, 2], id="one sample without image"),
        pytest.param([[1, 2, 2, 1], [0, 0, 0, 0]], [3, 0], id="one sample of padding"),
        pytest.param([[0, 1, 2, 2, 2, 1]], [4], id="padding on the left"),
    ],
)
def test_selects_the_best_image_rows(kinds: list[list[int]], kept_lengths: list[int]) -> None:
    token_kind = np.array(kinds)
    scores = distinct_scores(*token_kind.shape)
    kept = select(scores, token_kind, kept_lengths)
    expected = helpers.select_tokens(scores, token_kind, max(kept_lengths), kept_lengths)
    assert kept.tolist() == expected.tolist()


@pytest.mark.parametrize("kept", [1, 7, 115])
def test_kept_scores_are_no_lower_than_dropped_ones(kept: int) -> None:
    token_kind = np.full((3, 576), names.IMAGE)
    scores = np.random.default_rng(1).normal(size=(3, 576)).astype(np.float32)
    indices = select(scores, token_kind, [kept] * 3)
    assert indices.shape == (3, kept)
    assert (np.diff(indices, axis=1) > 0).all()
    is_kept = np.zeros(scores.shape, bool)
    np.put_along_axis(is_kept, indices, True, axis=1)
    assert (
        np.where(is_kept, scores, np.inf).min(1) >= np.where(is_kept, -np.inf, scores).max(1)
    ).all()


def test_text_rows_stay_whatever_their_scores() -> None:
    token_kind = np.array([[1, 2, 2, 3, 1]])
    scores = np.array([[-np.inf, 1, 2, -9, np.nan]], np.float32)
    assert select(scores, token_kind, [4]).tolist() == [[0, 2, 3, 4]]


def test_lower_index_wins_ties() -> None:
    token_kind = np.array([[1, 2, 2, 2, 2, 1]] * 2)
    scores = np.array([[0, 5, 5, 5, 5, 0], [0, 1, 5, 5, 5, 0]], np.float32)
    assert select(scores, token_kind, [4, 4]).tolist() == [[0, 1, 2, 5], [0, 2, 3, 5]]


# GatherTokens and GatherLastToken


def coded(*shape: int, dtype: type = np.float32) -> np.ndarray:
    """Return integers that tell where they come from."""
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (2, 5), (1, 4, 2, 3)])
def test_gathers_rows(shape: tuple[int, ...], dtype: type) -> None:
    data = coded(*shape, dtype=dtype)
    index = np.random.default_rng(2).integers(0, shape[1], (shape[0], 3))
    (kept,) = run_op("GatherTokens", {"kept": dtype}, {"data": data, "kept_indices": index})
    assert (kept == np.stack([d[i] for d, i in zip(data, index, strict=True)])).all()


def test_gathers_no_rows() -> None:
    feeds = {"data": coded(2, 4, 3), "kept_indices": np.zeros((2, 0), np.int64)}
    (kept,) = run_op("GatherTokens", {"kept": np.float32}, feeds)
    assert kept.shape == (2, 0, 3)


def test_gathers_the_last_valid_row() -> None:
    data = coded(4, 5, 3)
    feeds = {"data": data, "row_lengths": np.array([5, 1, 3, 0])}
    (last,) = run_op("GatherLastToken", {"last": np.float32}, feeds)
    assert (last[:, 0] == data[[0, 1, 2, 3], [4, 0, 2, 0]]).all()


# PredictorHead


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_predictor_head_scores_rows(rows: int, dtype: type) -> None:
    prefix = "output_text_predictor."
    tensors = helpers.predictor_weights().tensors
    weights = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    order = [f"output_mlp.{i}.{part}" for i in (0, 1, 3, 5, 7) for part in ("weight", "bias")]
    parameters = [np.asarray(weights[name]).astype(dtype) for name in order]
    hidden = helpers.embeddings(2, rows, seed=5).astype(dtype)
    feeds = {"hidden": hidden} | {f"p{i}": p for i, p in enumerate(parameters)}
    outputs = {"scores": np.float32, "keep": bool}
    scores, keep = run_op("PredictorHead", outputs, feeds, epsilon=1e-5)
    logits = helpers.predictor_head(hidden, parameters)
    helpers.assert_close(scores, logits[..., 0].astype(np.float32))
    assert keep.tolist() == (logits[..., 0] > logits[..., 1]).tolist()


def test_predictor_head_drops_at_equal_logits() -> None:
    zeros = {f"p{i}": np.zeros((2, 8) if i == 2 else 2, np.float32) for i in range(4)}
    zeros |= {"p0": np.ones(8, np.float32), "p1": np.zeros(8, np.float32)}
    square = np.zeros((2, 2), np.float32)
    zeros |= {"p4": square, "p5": square[0], "p6": square, "p7": square[0]}
    zeros |= {"p8": square, "p9": square[0]}
    feeds = {"hidden": helpers.embeddings(1, 3)} | zeros
    outputs = {"scores": np.float32, "keep": bool}
    assert not run_op("PredictorHead", outputs, feeds, epsilon=1e-5)[1].any()


# KVCacheAttention


def cache_feeds(
    rows: int,
    write_index: list[int],
    row_lengths: list[int],
    *,
    num_heads: int = 2,
    kv_heads: int = 1,
    capacity: int = 9,
    dtype: type = np.float32,
) -> dict[str, np.ndarray]:
    rng, batch, d = np.random.default_rng(6), len(write_index), 4
    shapes = {
        "query": (batch, rows, num_heads * d),
        "key": (batch, rows, kv_heads * d),
        "value": (batch, rows, kv_heads * d),
        "past_key": (batch, kv_heads, capacity, d),
        "past_value": (batch, kv_heads, capacity, d),
    }
    feeds = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    indices = {"write_index": write_index, "row_lengths": row_lengths}
    return feeds | {name: np.array(value, np.int64) for name, value in indices.items()}


def attend_with_cache(
    feeds: dict[str, np.ndarray], num_heads: int, kv_heads: int
) -> list[np.ndarray]:
    """Return output and present caches in float64, sample by sample."""
    arrays = {k: v.astype(np.float64) if v.dtype != np.int64 else v for k, v in feeds.items()}
    outputs, present = [], {part: arrays[f"past_{part}"].copy() for part in ("key", "value")}
    for b, start in enumerate(arrays["write_index"]):
        rows = arrays["query"].shape[1]
        for part, cache in present.items():
            new = arrays[part][b].reshape(rows, kv_heads, -1).swapaxes(0, 1)
            cache[b, :, start : start + rows] = new
        keys, values = (
            cache[b, :, : start + rows].swapaxes(0, 1).reshape(start + rows, -1)
            for cache in present.values()
        )
        outputs.append(
            helpers.attend(arrays["query"][b], keys, values, num_heads, kv_heads, 0.5)
        )
    return [np.stack(outputs), present["key"], present["value"]]


@pytest.mark.parametrize(("num_heads", "kv_heads"), [(1, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize(
    ("rows", "write_index"),
    [
        pytest.param(5, [0, 0], id="prefill"),
        pytest.param(1, [0], id="one row on an empty cache"),
        pytest.param(1, [3, 7], id="decode at different lengths"),
        pytest.param(1, [8], id="decode in the spare row"),
        pytest.param(3, [4, 1], id="several rows on filled caches"),
        pytest.param(9, [0], id="prefill to the brim"),
    ],
)
def test_writes_the_cache_and_attends_to_it(
    rows: int, write_index: list[int], num_heads: int, kv_heads: int
) -> None:
    heads = {"num_heads": num_heads, "kv_heads": kv_heads}
    feeds = cache_feeds(rows, write_index, [rows] * len(write_index), **heads)
    actual = run_kv(feeds, **heads)
    for result, expected in zip(actual, attend_with_cache(feeds, **heads), strict=True):
        helpers.assert_close(result, expected.astype(np.float32))


KV_OUTPUTS = ("output", "present_key", "present_value")


def kv_model(feeds: dict[str, np.ndarray], num_heads: int, kv_heads: int) -> onnx.ModelProto:
    outputs = dict.fromkeys(KV_OUTPUTS, feeds["query"].dtype.type)
    attributes = {"num_heads": num_heads, "kv_num_heads": kv_heads, "scale": 0.5}
    return op_model("KVCacheAttention", outputs, feeds, **attributes)


def run_kv(
    feeds: dict[str, np.ndarray], num_heads: int = 2, kv_heads: int = 1
) -> list[np.ndarray]:
    return list(helpers.run(kv_model(feeds, num_heads, kv_heads), feeds).values())


@pytest.mark.parametrize("rows", [1, 3])
def test_past_and_present_may_be_one_buffer(rows: int) -> None:
    feeds = cache_feeds(rows, [4, 1], [rows, rows])
    shared = {"present_key": "past_key", "present_value": "past_value"}
    actual = helpers.Runner(kv_model(feeds, 2, 1)).in_place(feeds, shared)
    for name, expected in zip(KV_OUTPUTS, run_kv(feeds), strict=True):
        assert (actual[name] == expected).all()


def test_half_precision_is_close() -> None:
    feeds = cache_feeds(3, [2], [3], dtype=np.float16)
    for result, expected in zip(run_kv(feeds), attend_with_cache(feeds, 2, 1), strict=True):
        helpers.assert_close(result, expected.astype(np.float16))


def test_valid_rows_do_not_see_padding() -> None:
    feeds = cache_feeds(4, [0, 2], [4, 2])
    output = run_kv(feeds)[0]
    for name in ("key", "value"):
        feeds[name][1, 2:] = 99
    assert (run_kv(feeds)[0][1, :2] == output[1, :2]).all()


def test_moves_cache_rows_exactly() -> None:
    feeds = cache_feeds(2, [1, 5], [2, 2])
    feeds["key"], feeds["past_key"] = coded(2, 2, 4) + 1000, coded(2, 1, 9, 4)
    present = run_kv(feeds)[1]
    expected = feeds["past_key"].copy()
    expected[0, 0, 1:3], expected[1, 0, 5:7] = feeds["key"]
    assert (present == expected).all()
