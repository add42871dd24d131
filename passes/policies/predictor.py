"""Policy `predictor`: Dynamic-LLaVA's trained predictors.

    image rows ► image predictor ► log-probability of keep
    generated token ► output-text predictor ► logit of keep; kept where above that of drop

The image predictor sees an image's rows together, the output-text predictor one token at a
time; neither sees other text. Both compute in float32.

Source    Dynamic-LLaVA, `VisionPredictor` and `TextPredictor`.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

from dllava_export import names
from dllava_export.errors import SettingError
from dllava_export.passes.policies.base import (
    ImageArrays,
    ImageRows,
    Policy,
    TextArrays,
    TextRows,
)
from dllava_export.passes.policies.scores import F32
from dllava_export.passes.policies.weights import PredictorWeights

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from dllava_export.geometry import Geometry, PredictorGeometry
    from dllava_export.passes.graph_builder import GraphBuilder

__all__ = ["PredictorPolicy"]

_NORM_EPSILON = 1e-5  # PyTorch's default, which the official modules use
_NO_WEIGHTS = PredictorWeights({})  # says which one is missing when it is asked
_TEXT_LAYERS = (1, 3, 5, 7)  # linear layers of the output-text predictor, behind its norm


class PredictorPolicy(Policy):
    """Scores by the trained image predictor, decides by the trained output-text predictor."""

    name = "predictor"
    help = "Dynamic-LLaVA's trained predictors"
    image_tokens = "trained predictor"
    generated_tokens = "trained predictor, by its own threshold"
    needs = "a Dynamic-LLaVA checkpoint"
    needs_predictors = True
    score_meaning = "log-probability to keep"

    def score(
        self, builder: GraphBuilder, rows: ImageRows, weights: PredictorWeights | None
    ) -> gs.Variable:
        """Run the image predictor on the image rows alone and put its scores back in place.

        In decode `num_image_rows` is 0, so every tensor is empty and costs next to nothing.
        """
        return _image_scores(builder, rows, weights or _NO_WEIGHTS)

    def reference(self, rows: ImageArrays, weights: PredictorWeights | None) -> np.ndarray:
        """Return log-probabilities of keep, [n] float32."""
        logits = _image_logits(rows.hidden_states, weights or _NO_WEIGHTS)
        keep, drop = logits.T
        return (-np.logaddexp(0, drop - keep)).astype(F32)

    def keep_token(
        self,
        builder: GraphBuilder,
        rows: TextRows,
        keep_rate: float,
        weights: PredictorWeights | None,
    ) -> tuple[gs.Variable, gs.Variable]:
        """Keep a token where its logit of keep, the score, is above that of drop.

        The threshold was trained; `keep_rate` only sizes caches.
        """
        return _text_decision(builder, rows.hidden_states, weights or _NO_WEIGHTS)

    def reference_keep(
        self, rows: TextArrays, keep_rate: float, weights: PredictorWeights | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return logits of keep, and how far they are above those of drop."""
        keep, drop = _text_logits(rows.hidden_states, weights or _NO_WEIGHTS).T
        return keep.astype(F32), (keep - drop).astype(F32)

    def image_flops(self, geometry: Geometry) -> int:
        """Count the image predictor's linear layers and its attention over all image rows."""
        predictor = _sizes(geometry)
        rows, width = geometry.num_image_tokens, predictor.d_model
        # qkv and output projection, MLP; then scores and values over all pairs of rows.
        block_row = 4 * width**2 + 2 * width * predictor.dim_feedforward
        block = rows * block_row + 2 * rows**2 * width
        ends = rows * (geometry.hidden_size * width + _output_mlp_macs(predictor))
        return 2 * (ends + predictor.num_layers * block)

    def text_flops(self, geometry: Geometry) -> int:
        """Count the output-text predictor's linear layers."""
        predictor = _sizes(geometry)
        return 2 * (geometry.hidden_size * predictor.d_model + _output_mlp_macs(predictor))


def _sizes(geometry: Geometry) -> PredictorGeometry:
    if geometry.predictor is None:
        raise SettingError(
            "policy is 'predictor', but the geometry has no predictor; expected its sizes. "
            "Pass predictor=PredictorGeometry(...)."
        )
    return geometry.predictor


def _output_mlp_macs(predictor: PredictorGeometry) -> int:
    widths = (predictor.d_model, predictor.d_model // 2, predictor.d_model // 4, 2)
    return sum(a * b for a, b in itertools.pairwise(widths))


# The graph.


def _text_decision(
    builder: GraphBuilder, hidden_states: gs.Variable, weights: PredictorWeights
) -> tuple[gs.Variable, gs.Variable]:
    prefix = "output_text_predictor.output_mlp"
    constants = [
        weights.constant(f"{prefix}.{index}.{part}")
        for index in (0, *_TEXT_LAYERS)
        for part in ("weight", "bias")
    ]
    shape = list(hidden_states.shape[:2])
    scores, keep = builder.multi_op(
        "PredictorHead",
        [hidden_states, *constants],
        [("scores", F32, shape), ("keep", bool, shape)],
        domain=names.DOMAIN,
        epsilon=_NORM_EPSILON,
    )
    return scores, keep


def _image_scores(
    builder: GraphBuilder, rows: ImageRows, weights: PredictorWeights
) -> gs.Variable:
    import onnx_graphsurgeon as gs

    shape = list(rows.token_kind.shape)
    index = _image_row_indices(builder, rows.token_kind)
    num_image = index.shape[1]
    hidden_size = rows.hidden_states.shape[-1]
    hidden = builder.op(
        "GatherTokens",
        [rows.hidden_states, index],
        "image_hidden_states",
        rows.hidden_states.dtype,
        [names.BATCH, num_image, hidden_size],
        domain=names.DOMAIN,
    )
    log_odds = _ImagePredictor(builder, weights).logits(hidden)
    log_probs = builder.op("LogSoftmax", [log_odds], "log_probs", F32, log_odds.shape, axis=-1)
    column_keep = builder.scalar(0, np.int64)
    keep = builder.op(
        "Gather", [log_probs, column_keep], "log_prob_keep", F32, log_odds.shape[:2], axis=-1
    )
    dims = builder.op("Shape", [rows.token_kind], "dims", np.int64, [2])
    zero = gs.Constant("value", np.zeros(1, F32))
    empty = builder.op("ConstantOfShape", [dims], "no_scores", F32, shape, value=zero)
    return builder.op("ScatterElements", [empty, index, keep], "scores", F32, shape, axis=1)


def _image_row_indices(builder: GraphBuilder, token_kind: gs.Variable) -> gs.Variable:
    """Return the image rows of each sample, ascending: [batch, num_image_rows] int64.

    A sample without an image yields its first rows; their scores are never looked at.
    """
    shape = list(token_kind.shape)
    num_image_rows = builder.graph_input(names.NUM_IMAGE_ROWS, np.int64, [1])
    image, one = builder.scalar(names.IMAGE, np.int64), builder.scalar(1, np.int64)
    is_image = builder.op("Equal", [token_kind, image], "is_image", bool, shape)
    count = builder.op("Shape", [token_kind], "num_rows", np.int64, [1], start=1, end=2)
    scalar = builder.constant("scalar_shape", [], np.int64)
    limit = builder.op("Reshape", [count, scalar], "row_limit", np.int64, [])
    zero = builder.scalar(0, np.int64)
    row = builder.op("Range", [zero, limit, one], "row", np.int64, [names.ROWS])
    behind = builder.op("Add", [row, count], "row_behind", np.int64, [names.ROWS])
    order = builder.op("Where", [is_image, row, behind], "order", np.int64, shape)
    out = [names.BATCH, names.NUM_IMAGE_ROWS]
    _, index = builder.multi_op(
        "TopK",
        [order, num_image_rows],
        [("image_order", np.int64, out), ("image_rows", np.int64, out)],
        axis=1,
        largest=0,
        sorted=1,
    )
    return index


class _ImagePredictor:
    """Writes Dynamic-LLaVA's image predictor: [batch, n, hidden_size] to [batch, n, 2]."""

    def __init__(self, builder: GraphBuilder, weights: PredictorWeights) -> None:
        self.builder = builder
        self.weights = weights

    def logits(self, hidden: gs.Variable) -> gs.Variable:
        """Project down, mix rows in blocks, join local and global halves, project out."""
        builder = self.builder
        x = builder.op("Cast", [hidden], "hidden_f32", F32, hidden.shape, to=1)
        x = self._gelu(self._linear(self._norm(x, "down_mlp.0"), "down_mlp.1"), "down")
        for block in range(self.weights.count_blocks()):
            x = self._block(x, f"transformer.{block}")
        x = self._local_and_global(x)
        x = self._gelu(self._linear(x, "output_mlp.0"), "output_0")
        x = self._gelu(self._linear(x, "output_mlp.2"), "output_2")
        return self._linear(x, "output_mlp.4")

    def _weight(self, name: str) -> gs.Tensor:
        """Return a weight in float32; runtimes fold the cast when they load the model."""
        constant = self.weights.constant(f"image_predictor.{name}")
        if constant.dtype == F32:
            return constant
        return self.builder.op("Cast", [constant], f"{name}_f32", F32, constant.shape, to=1)

    def _norm(self, x: gs.Variable, name: str) -> gs.Variable:
        inputs = [x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias")]
        return self.builder.op(
            "LayerNormalization", inputs, name, F32, x.shape, axis=-1, epsilon=_NORM_EPSILON
        )

    def _linear(self, x: gs.Variable, name: str, *, bias: bool = True) -> gs.Variable:
        builder = self.builder
        weight = self._weight(f"{name}.weight")
        out_size, in_size = weight.shape
        transposed = builder.op(
            "Transpose", [weight], f"{name}_t", F32, [in_size, out_size], perm=[1, 0]
        )
        shape = [*x.shape[:-1], out_size]
        product = builder.op("MatMul", [x, transposed], f"{name}_product", F32, shape)
        if not bias:
            return product
        return builder.op("Add", [product, self._weight(f"{name}.bias")], name, F32, shape)

    def _gelu(self, x: gs.Variable, what: str) -> gs.Variable:
        return self.builder.op("Gelu", [x], f"{what}_gelu", F32, x.shape)

    def _add(self, x: gs.Variable, y: gs.Variable, what: str) -> gs.Variable:
        return self.builder.op("Add", [x, y], what, F32, x.shape)

    def _block(self, x: gs.Variable, name: str) -> gs.Variable:
        builder = self.builder
        qkv = self._linear(self._norm(x, f"{name}.norm1"), f"{name}.attn.qkv", bias=False)
        parts = builder.multi_op(
            "Split",
            [qkv],
            [(f"{name}.{what}", F32, x.shape) for what in ("query", "key", "value")],
            axis=-1,
            num_outputs=3,
        )
        attended = self._attend(parts, name)
        x = self._add(x, self._linear(attended, f"{name}.attn.proj"), f"{name}.mid")
        inner = self._linear(self._norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        inner = self._linear(self._gelu(inner, f"{name}.mlp"), f"{name}.mlp.fc2")
        return self._add(x, inner, f"{name}.out")

    def _attend(self, parts: list[gs.Variable], name: str) -> gs.Variable:
        """Attend without a mask, written out: the Attention op refuses zero rows (decode)."""
        builder = self.builder
        batch, num_rows, width = parts[0].shape
        heads = self.weights.num_heads
        size = width // heads
        split = builder.constant(f"{name}.split_heads", [0, 0, heads, size], np.int64)
        shape, shape_t = [batch, heads, num_rows, size], [batch, heads, size, num_rows]
        query, key, value = (
            builder.op(
                "Reshape",
                [x, split],
                f"{x.name.rsplit('.')[-1]}_heads",
                F32,
                [batch, num_rows, heads, size],
            )
            for x in parts
        )
        query = builder.op("Transpose", [query], f"{name}.q", F32, shape, perm=[0, 2, 1, 3])
        key = builder.op("Transpose", [key], f"{name}.k_t", F32, shape_t, perm=[0, 2, 3, 1])
        value = builder.op("Transpose", [value], f"{name}.v", F32, shape, perm=[0, 2, 1, 3])
        scale = builder.scalar(float(size**-0.5), F32)
        query = builder.op("Mul", [query, scale], f"{name}.q_scaled", F32, shape)
        square = [batch, heads, num_rows, num_rows]
        scores = builder.op("MatMul", [query, key], f"{name}.scores", F32, square)
        probs = builder.op("Softmax", [scores], f"{name}.probs", F32, square, axis=-1)
        mixed = builder.op("MatMul", [probs, value], f"{name}.mixed", F32, shape)
        rows_first = builder.op(
            "Transpose",
            [mixed],
            f"{name}.rows",
            F32,
            [batch, num_rows, heads, size],
            perm=[0, 2, 1, 3],
        )
        merge = builder.constant(f"{name}.merge_heads", [0, 0, width], np.int64)
        return builder.op(
            "Reshape", [rows_first, merge], f"{name}.attended", F32, parts[0].shape
        )

    def _local_and_global(self, x: gs.Variable) -> gs.Variable:
        """Return the first half of each row beside the mean over rows of the second half."""
        builder = self.builder
        half = x.shape[-1] // 2
        shape = [*x.shape[:-1], half]
        local, second = builder.multi_op(
            "Split",
            [x],
            [("local", F32, shape), ("second", F32, shape)],
            axis=-1,
            num_outputs=2,
        )
        mean = builder.op(
            "ReduceMean",
            [second, builder.ints(1)],
            "mean",
            F32,
            [x.shape[0], 1, half],
            keepdims=1,
        )
        dims = builder.op("Shape", [local], "local_dims", np.int64, [3])
        spread = builder.op("Expand", [mean, dims], "global", F32, shape)
        return builder.op("Concat", [local, spread], "joined", F32, x.shape, axis=-1)


# The same in NumPy, in float64.


def _image_logits(hidden: np.ndarray, weights: PredictorWeights) -> np.ndarray:
    """Return logits [n, 2] of the rows [n, hidden_size] of one image."""
    prefix = "image_predictor"
    x = _normed(hidden.astype(np.float64), weights, f"{prefix}.down_mlp.0")
    x = _gelu(_linear(x, weights, f"{prefix}.down_mlp.1"))
    for block in range(weights.count_blocks()):
        x = _block(x, weights, f"{prefix}.transformer.{block}")
    local, other = np.split(x, 2, axis=-1)
    x = np.concatenate([local, np.broadcast_to(other.mean(0), other.shape)], axis=-1)
    for layer in (0, 2):
        x = _gelu(_linear(x, weights, f"{prefix}.output_mlp.{layer}"))
    return _linear(x, weights, f"{prefix}.output_mlp.4")


def _block(x: np.ndarray, weights: PredictorWeights, name: str) -> np.ndarray:
    """Return [n, width] behind a transformer block in which all rows see each other."""
    qkv = _normed(x, weights, f"{name}.norm1") @ weights.array(f"{name}.attn.qkv.weight").T
    shape = len(x), weights.num_heads, -1  # [n, num_heads, size]
    query, key, value = (part.reshape(shape) for part in np.split(qkv, 3, axis=-1))
    scores = np.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", probs, value).reshape(x.shape)
    x = x + _linear(mixed, weights, f"{name}.attn.proj")
    inner = _linear(_normed(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
    return x + _linear(_gelu(inner), weights, f"{name}.mlp.fc2")


def _text_logits(hidden: np.ndarray, weights: PredictorWeights) -> np.ndarray:
    """Return logits [n, 2] of generated rows [n, hidden_size]."""
    prefix = "output_text_predictor.output_mlp"
    x = _normed(hidden.astype(np.float64), weights, f"{prefix}.0")
    for layer in _TEXT_LAYERS[:-1]:
        x = _gelu(_linear(x, weights, f"{prefix}.{layer}"))
    return _linear(x, weights, f"{prefix}.{_TEXT_LAYERS[-1]}")


def _normed(x: np.ndarray, weights: PredictorWeights, name: str) -> np.ndarray:
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(
        x.var(-1, keepdims=True) + _NORM_EPSILON
    )
    return scaled * weights.array(f"{name}.weight") + weights.array(f"{name}.bias")


def _linear(x: np.ndarray, weights: PredictorWeights, name: str) -> np.ndarray:
    return x @ weights.array(f"{name}.weight").T + weights.array(f"{name}.bias")


def _gelu(x: np.ndarray) -> np.ndarray:
    erf = np.vectorize(math.erf, otypes=[np.float64])  # NumPy has none
    return x / 2 * (1 + erf(x / math.sqrt(2)))
