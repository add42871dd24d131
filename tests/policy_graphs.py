"""What tests of policies share: the nodes of one policy alone, run, and its reference."""

from __future__ import annotations

import helpers
import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
import torch

from dllava_export import names
from dllava_export.geometry import Geometry, PredictorGeometry
from dllava_export.passes.gather_last_row import GatherLastRowPass
from dllava_export.passes.graph_builder import GraphBuilder
from dllava_export.passes.graph_io import model_from_graph
from dllava_export.passes.insert_image_selection import InsertImageSelectionPass
from dllava_export.passes.insert_kv_cache import InsertKVCachePass
from dllava_export.passes.policies.base import (
    AttentionArrays,
    AttentionRows,
    ImageArrays,
    ImageRows,
    Policy,
    TextArrays,
    TextRows,
)
from dllava_export.passes.policies.weights import PredictorWeights

Kinds = list[list[int]]

ROWS = [names.BATCH, names.ROWS]
HEADS, KV_HEADS, SCALE = 4, 2, 0.4
TYPES = {
    "hidden_states": (np.float32, [*ROWS, helpers.HIDDEN]),
    "query": (np.float32, [*ROWS, HEADS * helpers.HEAD_DIM]),
    "key": (np.float32, [*ROWS, KV_HEADS * helpers.HEAD_DIM]),
    "position_ids": (np.int64, ROWS),
    "token_kind": (np.int64, ROWS),
    "row_lengths": (np.int64, [names.BATCH]),
    "kept_lengths": (np.int64, [names.BATCH]),
}
SIZES = Geometry(
    num_layers=3,
    hidden_size=8,
    intermediate_size=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=11,
    num_image_tokens=10,
    predictor=PredictorGeometry(d_model=4, nhead=2, dim_feedforward=6, num_layers=1),
)

# What `assert_nodes` expects of policies that look at attention: the number of each row and
# whether it is of a prompt; from `reader`, row numbers, to what those rows pay, `paid`.
PROMPT_ROW_NODES = """\
count = Shape <start = 1, end = 2> (token_kind)
    limit = Reshape (count, scalar_shape)
    row = Range (zero, limit, one)
    is_text = Equal (token_kind, one)
    is_image = Equal (token_kind, two)
    is_prompt = Or (is_text, is_image)
    prompt_row = Where (is_prompt, row, zero)
"""
PAID_NODES = """\
reader_row = Max (reader, zero)
    reader_query = ai.dllava.GatherTokens (qr0, reader_row)
    query = Cast <to = 1> (reader_query)
    query_scaled = Mul (query, scale)
    query_heads = Reshape (query_scaled, query_split)
    query_t = Transpose <perm = [0, 2, 3, 1, 4]> (query_heads)
    key = Cast <to = 1> (kr0)
    key_heads = Reshape (key, key_split)
    key_t = Transpose <perm = [0, 2, 3, 1]> (key_heads)
    key_groups = Unsqueeze (key_t, axis_2)
    product = MatMul (query_t, key_groups)
    column = Unsqueeze (reader, last_axis)
    visible = LessOrEqual (row, column)
    mask = Unsqueeze (visible, axes_1_2)
    masked = Where (mask, product, lowest)
    weights = Softmax <axis = -1> (masked)
    paid = ReduceMean <keepdims = 0> (weights, axes_1_2)
"""
PAID_CONSTANTS = (
    ", int64[0] scalar_shape = {}, float scale = {0.5}, int64[2] axes_1_2 = {1, 2}, "
    "int64[5] query_split = {0, 0, 1, 2, 8}, int64[4] key_split = {0, 0, 1, 8}, "
    "float lowest = {-3e38}"
)


def empty_graph(*wanted: str) -> tuple[gs.Graph, dict[str, gs.Variable]]:
    """Return a graph without nodes and its inputs by name."""
    inputs = {
        name: gs.Variable(name, dtype=np.dtype(TYPES[name][0]), shape=TYPES[name][1])
        for name in wanted
    }
    return gs.Graph(inputs=list(inputs.values()), opset=names.OPSET), inputs


def image_feeds(kinds: Kinds, drop: int = 0, seed: int = 3) -> dict[str, np.ndarray]:
    """Return what a policy looks at, of rows given by kind; numbers are drawn from a seed."""
    feeds = helpers.prompt(kinds, drop, seed)
    token_kind = feeds[names.TOKEN_KIND]
    feeds["row_lengths"] = (token_kind != names.PADDING).sum(axis=1)
    feeds["hidden_states"] = feeds[names.INPUTS_EMBEDS]
    rng = np.random.default_rng([seed, 1])
    for name in ("query", "key"):
        shape = (*token_kind.shape, TYPES[name][1][-1])
        feeds[name] = rng.normal(size=shape).astype(np.float32)
    return feeds


class ScoreGraph:
    """The nodes of a policy that score image rows, on ONNX Runtime."""

    def __init__(
        self,
        policy: Policy,
        weights: PredictorWeights | None = None,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self._dtype = np.dtype(dtype)
        graph, inputs = empty_graph(*TYPES)
        for name in ("hidden_states", "query", "key"):
            inputs[name].dtype = self._dtype
        attention = AttentionRows(
            query=inputs.pop("query"),
            key=inputs.pop("key"),
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            scale=SCALE,
        )
        rows = ImageRows(**inputs, attention=attention)
        graph.outputs = [policy.score(GraphBuilder(graph, "policy"), rows, weights)]
        self._run = helpers.Runner(model_from_graph(graph))

    def __call__(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """Return scores [batch, rows] of what `image_feeds` gives."""
        cast = {
            name: values.astype(self._dtype) if values.dtype == np.float32 else values
            for name, values in feeds.items()
        }
        (scores,) = self._run(cast).values()
        return scores


def image_scores(
    policy: Policy,
    kinds: Kinds,
    drop: int = 0,
    weights: PredictorWeights | None = None,
) -> np.ndarray:
    """Return [batch, rows] scores of rows given by kind, from the graph."""
    return ScoreGraph(policy, weights)(image_feeds(kinds, drop))


def reference_scores(
    policy: Policy,
    kinds: Kinds,
    drop: int = 0,
    weights: PredictorWeights | None = None,
    feeds: dict[str, np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Return what the reference gives the image rows of each sample."""
    feeds = image_feeds(kinds, drop) if feeds is None else feeds
    found = []
    for sample, rows in enumerate(image_rows(kinds)):
        arrays = image_arrays(feeds, sample, rows, len(rows) - drop)
        found.append(policy.reference(arrays, weights) if len(rows) else np.zeros(0))
    return found


def image_arrays(
    feeds: dict[str, np.ndarray], sample: int, rows: np.ndarray, num_kept: int
) -> ImageArrays:
    """Return what a reference sees of one sample of `image_feeds`."""
    valid = slice(feeds["row_lengths"][sample])
    query, key = (feeds[name][sample, valid] for name in ("query", "key"))
    return ImageArrays(
        hidden_states=feeds["hidden_states"][sample, rows],
        position_ids=feeds[names.POSITION_IDS][sample, rows],
        num_kept=num_kept,
        attention=AttentionArrays(
            query=query.reshape(len(query), HEADS, -1),
            key=key.reshape(len(key), KV_HEADS, -1),
            scale=SCALE,
            token_kind=feeds[names.TOKEN_KIND][sample, valid],
        ),
    )


def assert_nodes(policy: str, text: str, constants: str = "") -> None:
    """Compare what the pass adds for a policy before layer 1 with nodes that make `scores`.

    They may read `h0`, `qr0`, `kr0` (query and key of layer 0), `position_ids`, `token_kind`,
    `row_lengths` and `kept_lengths`.
    """
    for cache in (False, True):
        passes = [GatherLastRowPass(), *([InsertKVCachePass()] if cache else [])]
        after = helpers.apply(
            helpers.dense_decoder(2), *passes, InsertImageSelectionPass(policy, 1)
        )
        expected = helpers.SparseText(cache, text, constants=constants).model({})
        helpers.assert_same_graph(after, expected)


def image_rows(kinds: Kinds) -> list[np.ndarray]:
    """Return indices of image rows, by sample."""
    return [np.flatnonzero(np.array(sample) == names.IMAGE) for sample in kinds]


def text_decision(
    policy: Policy,
    positions: np.ndarray,
    rate: float,
    weights: PredictorWeights | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and keep, [batch, rows], of generated rows at some positions."""
    graph, inputs = empty_graph("hidden_states", "position_ids")
    builder = GraphBuilder(graph, "policy")
    graph.outputs = list(policy.keep_token(builder, TextRows(**inputs), rate, weights))
    feeds = {
        names.POSITION_IDS: positions,
        "hidden_states": helpers.embeddings(*positions.shape),
    }
    scores, keep = helpers.run(model_from_graph(graph), feeds).values()
    return scores, keep


def reference_decision(
    policy: Policy,
    positions: np.ndarray,
    rate: float,
    weights: PredictorWeights | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and margins, [batch, rows], of the same rows from the reference."""
    samples = [
        policy.reference_keep(
            TextArrays(hidden_states=hidden, position_ids=places), rate, weights
        )
        for hidden, places in zip(helpers.embeddings(*positions.shape), positions, strict=True)
    ]
    scores, margins = zip(*samples, strict=True)
    return np.stack(scores), np.stack(margins)


def official_image_logits(x: torch.Tensor, weights: PredictorWeights) -> torch.Tensor:
    """Return log-probabilities [n, 2] for the image rows [n, hidden_size] of one sample."""
    prefix = "image_predictor."
    w = {
        name[len(prefix) :]: torch.from_numpy(np.asarray(values))
        for name, values in weights.tensors.items()
        if name.startswith(prefix)
    }

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-5)

    gelu = torch.nn.functional.gelu
    z = gelu(linear(norm(x, "down_mlp.0"), "down_mlp.1"))
    for block in range(weights.count_blocks()):
        name = f"transformer.{block}"
        qkv = linear(norm(z, f"{name}.norm1"), f"{name}.attn.qkv")
        n, width = z.shape
        heads = weights.num_heads
        q, k, v = qkv.reshape(n, 3, heads, width // heads).permute(1, 2, 0, 3)
        probs = (q @ k.transpose(-1, -2) * (width // heads) ** -0.5).softmax(-1)
        z = z + linear((probs @ v).transpose(0, 1).reshape(n, width), f"{name}.attn.proj")
        inner = gelu(linear(norm(z, f"{name}.norm2"), f"{name}.mlp.fc1"))
        z = z + linear(inner, f"{name}.mlp.fc2")
    local, other = z.chunk(2, dim=-1)
    z = torch.cat([local, other.mean(0, keepdim=True).expand_as(other)], dim=-1)
    z = gelu(linear(gelu(linear(z, "output_mlp.0")), "output_mlp.2"))
    return linear(z, "output_mlp.4").log_softmax(-1)
