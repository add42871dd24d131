"""Policies alone: each builds scores over given rows, compared with NumPy or torch."""

from __future__ import annotations

import helpers
import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from dllava_export import names
from dllava_export.errors import PreconditionError
from dllava_export.passes.graph_builder import GraphBuilder
from dllava_export.passes.graph_io import model_from_graph
from dllava_export.passes.policies.base import ImageRows
from dllava_export.passes.policies.registry import (
    IMAGE_POLICIES,
    TEXT_POLICIES,
    check_text_policy,
    insert_image_scores,
    insert_text_decision,
)
from dllava_export.passes.policies.weights import PredictorWeights

TYPES = {
    "hidden_states": (np.float32, [names.BATCH, names.ROWS, helpers.HIDDEN]),
    names.POSITION_IDS: (np.int64, [names.BATCH, names.ROWS]),
    names.TOKEN_KIND: (np.int64, [names.BATCH, names.ROWS]),
    "row_lengths": (np.int64, [names.BATCH]),
    names.KEPT_LENGTHS: (np.int64, [names.BATCH]),
}


def empty_graph() -> gs.Graph:
    inputs = [gs.Variable(n, dtype=np.dtype(d), shape=s) for n, (d, s) in TYPES.items()]
    return gs.Graph(inputs=inputs, opset=names.OPSET)


def image_scores(
    policy: str,
    kinds: list[list[int]],
    drop: int = 0,
    weights: PredictorWeights | None = None,
    hidden: np.ndarray | None = None,
) -> np.ndarray:
    """Return [batch, rows] scores of rows given by kind."""
    graph = empty_graph()
    scores = insert_image_scores(
        GraphBuilder(graph, "policy"), policy, ImageRows(*graph.inputs), weights
    )
    graph.outputs = [scores]
    feeds = helpers.prompt(kinds, drop)
    feeds["row_lengths"] = (feeds[names.TOKEN_KIND] != 0).sum(axis=1)
    feeds["hidden_states"] = feeds[names.INPUTS_EMBEDS] if hidden is None else hidden
    return next(iter(helpers.run(model_from_graph(graph), feeds).values()))


def text_decision(
    policy: str, positions: np.ndarray, rate: float, weights: PredictorWeights | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and keep, [batch, rows], of generated rows at some positions."""
    graph = empty_graph()
    hidden, position_ids = graph.inputs[:2]
    builder = GraphBuilder(graph, "policy")
    outputs = insert_text_decision(builder, policy, hidden, position_ids, rate, weights)
    graph.outputs = list(outputs)
    feeds = {
        names.POSITION_IDS: positions,
        "hidden_states": helpers.embeddings(*positions.shape),
    }
    for name in (names.TOKEN_KIND, "row_lengths", names.KEPT_LENGTHS):
        feeds[name] = np.zeros([1] * len(TYPES[name][1]), np.int64)
    scores, keep = helpers.run(model_from_graph(graph), feeds).values()
    return scores, keep


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


# Image rows


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param([[1, 2, 2, 2, 2, 2, 1]], id="one image"),
        pytest.param([[1, 2, 1]], id="one image row"),
        pytest.param([[2, 2, 1, 2, 1]], id="two images"),
        pytest.param([[1, 2, 2, 2, 1], [2, 2, 2, 0, 0]], id="spans differ"),
        pytest.param([[1, 2, 2, 1], [1, 1, 1, 1]], id="a sample without an image"),
    ],
)
def test_predictor_scores_are_the_official_ones(kinds: list[list[int]], blocks: int) -> None:
    weights = helpers.predictor_weights(blocks=blocks)
    scores = image_scores("predictor", kinds, weights=weights)
    hidden = helpers.embeddings(*scores.shape)
    for sample, row_kinds in enumerate(kinds):
        rows = np.flatnonzero(np.array(row_kinds) == names.IMAGE)
        if len(rows):
            expected = official_image_logits(torch.from_numpy(hidden[sample, rows]), weights)
            helpers.assert_close(scores[sample, rows], expected[:, 0].numpy())


def test_predictor_takes_no_image_rows_at_all() -> None:
    scores = image_scores("predictor", [[3], [3]], weights=helpers.predictor_weights())
    assert scores.tolist() == [[0], [0]]


def test_predictor_in_half_precision_computes_in_single() -> None:
    whole = helpers.predictor_weights()
    halved = {k: np.asarray(v).astype(np.float16) for k, v in whole.tensors.items()}
    rounded = {k: v.astype(np.float32) for k, v in halved.items()}
    kinds = [[1, 2, 2, 2, 1]]
    actual = image_scores("predictor", kinds, weights=PredictorWeights(halved, 2))
    assert actual.dtype == np.float32
    helpers.assert_close(
        actual, image_scores("predictor", kinds, weights=PredictorWeights(rounded, 2))
    )


def test_random_scores_are_a_hash_of_the_position() -> None:
    scores = image_scores("random", [[2] * 50])
    helpers.assert_close(scores, helpers.hashed(np.arange(50)[None]))


def test_random_scores_do_not_depend_on_what_is_there() -> None:
    first = image_scores("random", [[1, 2, 2, 1]])
    second = image_scores("random", [[2, 2, 2, 2]], hidden=helpers.embeddings(1, 4, seed=99))
    assert (first == second).all()


def test_random_scores_are_distinct_and_spread() -> None:
    scores = np.sort(image_scores("random", [[2] * 576])[0])
    assert len(set(scores.tolist())) == 576
    assert abs(scores.mean() - 0.5) < 0.05
    assert np.abs(scores - np.linspace(0, 1, 576)).max() < 0.08


@pytest.mark.parametrize("kept", [1, 2, 5, 115, 288, 575, 576])
def test_uniform_marks_exactly_as_many_rows_as_are_kept(kept: int) -> None:
    scores = image_scores("uniform", [[1] + [2] * 576 + [1]], drop=576 - kept)
    assert scores[0, 1:-1].sum() == kept


@pytest.mark.parametrize("kept", [2, 5, 115, 288])
def test_uniform_marks_are_evenly_spaced(kept: int) -> None:
    marked = np.flatnonzero(image_scores("uniform", [[2] * 576], drop=576 - kept)[0])
    assert set(np.diff(marked).tolist()) <= {576 // kept, 576 // kept + 1}


def test_uniform_counts_each_sample_for_itself() -> None:
    scores = image_scores("uniform", [[1, 2, 2, 2, 2], [2, 2, 2, 2, 0], [1, 1]], drop=2)
    marked = [np.flatnonzero(sample[:4]).tolist() for sample in scores]
    assert marked[1] == [1, 3]
    assert (scores[0, 1:] == [0, 1, 0, 1]).all()


def test_norm_scores_are_lengths() -> None:
    scores = image_scores("norm", [[1, 2, 2]])
    helpers.assert_close(scores, np.linalg.norm(helpers.embeddings(1, 3), axis=-1))


@pytest.mark.parametrize("policy", IMAGE_POLICIES)
def test_scores_repeat(policy: str) -> None:
    kinds, weights = [[1, 2, 2, 2, 2, 1]], helpers.predictor_weights()
    first = image_scores(policy, kinds, 2, weights)
    assert (first == image_scores(policy, kinds, 2, weights)).all()


# Generated rows


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_random_text_rate_is_near_the_rate(rate: float) -> None:
    keep = text_decision("random", np.arange(600, 4600)[None], rate)[1]
    assert abs(keep.mean() - rate) < 0.03


def test_random_text_decision_is_the_hash_below_the_rate() -> None:
    positions = np.arange(20, 40).reshape(2, 10)
    scores, keep = text_decision("random", positions, 0.5)
    drawn = helpers.hashed(positions, salt=1 << 20)
    helpers.assert_close(scores, np.float32(0.5) - drawn)
    assert (keep == (drawn < 0.5)).all()


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
def test_uniform_text_decision_is_evenly_spaced(rate: float) -> None:
    keep = text_decision("uniform", np.arange(640, 740)[None], rate)[1][0]
    assert keep.sum() == 100 * rate
    assert len(set(np.diff(np.flatnonzero(keep)).tolist())) <= 2


def test_predictor_text_decision_compares_logits() -> None:
    positions = np.arange(64)[None]
    scores, keep = text_decision("predictor", positions, 0.5, helpers.predictor_weights())
    other = text_decision("predictor", positions + 9, 0.1, helpers.predictor_weights())
    assert 0 < keep.sum() < 64
    assert (scores == other[0]).all()
    assert (keep == other[1]).all()


# What is refused


@pytest.mark.parametrize("tensors", [{}, {"image_predictor.down_mlp.0.weight": np.ones(8)}])
def test_names_the_weight_that_is_missing(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(
        PreconditionError, match=r"^The checkpoint has no image_predictor \('ima"
    ):
        image_scores("predictor", [[1, 2]], weights=PredictorWeights(tensors))


def test_says_what_to_do_without_a_text_predictor() -> None:
    with pytest.raises(
        PreconditionError, match=r"has no output_text_predictor .* random, uniform"
    ):
        text_decision("predictor", np.zeros((1, 1), np.int64), 0.5, None)


@pytest.mark.parametrize("rate", [0, 1, -0.5, 1.5])
def test_refuses_rates_that_need_no_decision(rate: float) -> None:
    with pytest.raises(ValueError, match=r"^keep_rate must be in \(0, 1\), got "):
        check_text_policy("random", rate)


@pytest.mark.parametrize("policy", ["norm", "none", "best"])
def test_refuses_policies_without_a_decision(policy: str) -> None:
    assert policy not in TEXT_POLICIES
    with pytest.raises(ValueError, match=f"^policy '{policy}' has no decision for a single"):
        check_text_policy(policy, 0.5)
