"""What tests of policies share: the nodes of one policy alone, run, and its reference."""

from __future__ import annotations

import helpers
import numpy as np
import onnx_graphsurgeon as gs
import torch

from dllava_export import names
from dllava_export.passes.graph_builder import GraphBuilder
from dllava_export.passes.graph_io import model_from_graph
from dllava_export.passes.policies.base import (
    ImageArrays,
    ImageRows,
    Policy,
    TextArrays,
    TextRows,
)
from dllava_export.passes.policies.weights import PredictorWeights

Kinds = list[list[int]]

TYPES = {
    "hidden_states": (np.float32, [names.BATCH, names.ROWS, helpers.HIDDEN]),
    "position_ids": (np.int64, [names.BATCH, names.ROWS]),
    "token_kind": (np.int64, [names.BATCH, names.ROWS]),
    "row_lengths": (np.int64, [names.BATCH]),
    "kept_lengths": (np.int64, [names.BATCH]),
}


def empty_graph(*wanted: str) -> tuple[gs.Graph, dict[str, gs.Variable]]:
    """Return a graph without nodes and its inputs by name."""
    inputs = {
        name: gs.Variable(name, dtype=np.dtype(TYPES[name][0]), shape=TYPES[name][1])
        for name in wanted
    }
    return gs.Graph(inputs=list(inputs.values()), opset=names.OPSET), inputs


def image_feeds(kinds: Kinds, drop: int, hidden: np.ndarray | None) -> dict[str, np.ndarray]:
    feeds = helpers.prompt(kinds, drop)
    feeds["row_lengths"] = (feeds[names.TOKEN_KIND] != names.PADDING).sum(axis=1)
    feeds["hidden_states"] = feeds[names.INPUTS_EMBEDS] if hidden is None else hidden
    return feeds


def image_scores(
    policy: Policy,
    kinds: Kinds,
    drop: int = 0,
    weights: PredictorWeights | None = None,
    hidden: np.ndarray | None = None,
) -> np.ndarray:
    """Return [batch, rows] scores of rows given by kind, from the graph."""
    graph, inputs = empty_graph(*TYPES)
    scores = policy.score(GraphBuilder(graph, "policy"), ImageRows(**inputs), weights)
    graph.outputs = [scores]
    (values,) = helpers.run(model_from_graph(graph), image_feeds(kinds, drop, hidden)).values()
    return values


def reference_scores(
    policy: Policy, kinds: Kinds, drop: int = 0, weights: PredictorWeights | None = None
) -> list[np.ndarray]:
    """Return what the reference gives the image rows of each sample."""
    feeds = image_feeds(kinds, drop, None)
    found = []
    for sample, rows in enumerate(image_rows(kinds)):
        arrays = ImageArrays(
            hidden_states=feeds["hidden_states"][sample, rows],
            position_ids=feeds[names.POSITION_IDS][sample, rows],
            num_kept=len(rows) - drop,
        )
        found.append(policy.reference(arrays, weights) if len(rows) else np.zeros(0))
    return found


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
