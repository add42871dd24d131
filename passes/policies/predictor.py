"""Dynamic-LLaVA's trained predictors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from dllava_export import names
from dllava_export.errors import PreconditionError
from dllava_export.passes.graph_builder import GraphBuilder
from dllava_export.passes.policies.base import ImageRows
from dllava_export.passes.policies.scores import _F32

__all__ = ["PredictorWeights"]


_NORM_EPSILON = 1e-5  # PyTorch's default, which the official modules use


@dataclasses.dataclass(frozen=True)
class PredictorWeights:
    """Trained predictors: weights by canonical name, and what shapes cannot tell.

    Attributes:
        tensors: `image_predictor.*` and `output_text_predictor.*`; arrays, or tensors that
            refer to external data.
        num_heads: Attention heads of the image predictor's blocks.
    """

    tensors: Mapping[str, onnx.TensorProto | np.ndarray]
    num_heads: int = 8

    def constant(self, name: str) -> gs.Constant:
        """Return a weight as a constant of its own name.

        Raises:
            PreconditionError: If the weight is not there.
        """
        if name not in self.tensors:
            prefix = name.split(".", 1)[0]
            raise PreconditionError(
                f"The checkpoint has no {prefix} ({name!r} is missing), which policy "
                "'predictor' needs. Use a trained Dynamic-LLaVA checkpoint, or one of the "
                "policies that need no training: random, uniform, norm, none."
            )
        value = self.tensors[name]
        if isinstance(value, np.ndarray):
            return gs.Constant(name, value)
        return gs.Constant(name, LazyValues(value))

    def count_blocks(self) -> int:
        """Return the number of transformer blocks of the image predictor."""
        prefix = "image_predictor.transformer."
        blocks = {n[len(prefix) :].split(".")[0] for n in self.tensors if n.startswith(prefix)}
        return len(blocks)


def _predictor_head(
    builder: GraphBuilder, hidden_states: gs.Variable, weights: PredictorWeights
) -> tuple[gs.Variable, gs.Variable]:
    prefix = "output_text_predictor.output_mlp"
    constants = [
        weights.constant(f"{prefix}.{index}.{part}")
        for index in (0, 1, 3, 5, 7)
        for part in ("weight", "bias")
    ]
    shape = list(hidden_states.shape[:2])
    scores, keep = builder.multi_op(
        "PredictorHead",
        [hidden_states, *constants],
        [("scores", _F32, shape), ("keep", bool, shape)],
        domain=names.DOMAIN,
        epsilon=_NORM_EPSILON,
    )
    return scores, keep


def _predictor_scores(
    builder: GraphBuilder, rows: ImageRows, weights: PredictorWeights
) -> gs.Variable:
    """Run the image predictor on the image rows alone and put its scores back in place.

    In decode `num_image_rows` is 0, so every tensor here is empty and costs next to nothing.
    """
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
    log_probs = builder.op(
        "LogSoftmax", [log_odds], "log_probs", _F32, log_odds.shape, axis=-1
    )
    column_keep = builder.scalar(0, np.int64)
    keep = builder.op(
        "Gather", [log_probs, column_keep], "log_prob_keep", _F32, log_odds.shape[:2], axis=-1
    )
    dims = builder.op("Shape", [rows.token_kind], "dims", np.int64, [2])
    empty = gs.Node(
        op="ConstantOfShape",
        name=f"{builder.scope}/no_scores",
        attrs={"value": gs.Constant("value", np.zeros(1, _F32))},
        inputs=[dims],
        outputs=[gs.Variable(f"{builder.scope}/no_scores", dtype=np.dtype(_F32), shape=shape)],
    )
    builder.graph.nodes.append(empty)
    return builder.op(
        "ScatterElements", [empty.outputs[0], index, keep], "scores", _F32, shape, axis=1
    )


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
        x = builder.op("Cast", [hidden], "hidden_f32", _F32, hidden.shape, to=1)
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
        if constant.dtype == _F32:
            return constant
        return self.builder.op("Cast", [constant], f"{name}_f32", _F32, constant.shape, to=1)

    def _norm(self, x: gs.Variable, name: str) -> gs.Variable:
        inputs = [x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias")]
        return self.builder.op(
            "LayerNormalization", inputs, name, _F32, x.shape, axis=-1, epsilon=_NORM_EPSILON
        )

    def _linear(self, x: gs.Variable, name: str, *, bias: bool = True) -> gs.Variable:
        builder = self.builder
        weight = self._weight(f"{name}.weight")
        out_size, in_size = weight.shape
        transposed = builder.op(
            "Transpose", [weight], f"{name}_t", _F32, [in_size, out_size], perm=[1, 0]
        )
        shape = [*x.shape[:-1], out_size]
        product = builder.op("MatMul", [x, transposed], f"{name}_product", _F32, shape)
        if not bias:
            return product
        return builder.op("Add", [product, self._weight(f"{name}.bias")], name, _F32, shape)

    def _gelu(self, x: gs.Variable, what: str) -> gs.Variable:
        return self.builder.op("Gelu", [x], f"{what}_gelu", _F32, x.shape)

    def _add(self, x: gs.Variable, y: gs.Variable, what: str) -> gs.Variable:
        return self.builder.op("Add", [x, y], what, _F32, x.shape)

    def _block(self, x: gs.Variable, name: str) -> gs.Variable:
        builder = self.builder
        qkv = self._linear(self._norm(x, f"{name}.norm1"), f"{name}.attn.qkv", bias=False)
        parts = builder.multi_op(
            "Split",
            [qkv],
            [(f"{name}.{what}", _F32, x.shape) for what in ("query", "key", "value")],
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
                _F32,
                [batch, num_rows, heads, size],
            )
            for x in parts
        )
        query = builder.op("Transpose", [query], f"{name}.q", _F32, shape, perm=[0, 2, 1, 3])
        key = builder.op("Transpose", [key], f"{name}.k_t", _F32, shape_t, perm=[0, 2, 3, 1])
        value = builder.op("Transpose", [value], f"{name}.v", _F32, shape, perm=[0, 2, 1, 3])
        scale = builder.scalar(float(size**-0.5), _F32)
        query = builder.op("Mul", [query, scale], f"{name}.q_scaled", _F32, shape)
        square = [batch, heads, num_rows, num_rows]
        scores = builder.op("MatMul", [query, key], f"{name}.scores", _F32, square)
        probs = builder.op("Softmax", [scores], f"{name}.probs", _F32, square, axis=-1)
        mixed = builder.op("MatMul", [probs, value], f"{name}.mixed", _F32, shape)
        rows_first = builder.op(
            "Transpose",
            [mixed],
            f"{name}.rows",
            _F32,
            [batch, num_rows, heads, size],
            perm=[0, 2, 1, 3],
        )
        merge = builder.constant(f"{name}.merge_heads", [0, 0, width], np.int64)
        return builder.op(
            "Reshape", [rows_first, merge], f"{name}.attended", _F32, parts[0].shape
        )

    def _local_and_global(self, x: gs.Variable) -> gs.Variable:
        """Return the first half of each row beside the mean over rows of the second half."""
        builder = self.builder
        half = x.shape[-1] // 2
        shape = [*x.shape[:-1], half]
        local, second = builder.multi_op(
            "Split",
            [x],
            [("local", _F32, shape), ("second", _F32, shape)],
            axis=-1,
            num_outputs=2,
        )
        mean = builder.op(
            "ReduceMean",
            [second, builder.ints(1)],
            "mean",
            _F32,
            [x.shape[0], 1, half],
            keepdims=1,
        )
        dims = builder.op("Shape", [local], "local_dims", np.int64, [3])
        spread = builder.op("Expand", [mean, dims], "global", _F32, shape)
        return builder.op("Concat", [local, spread], "joined", _F32, x.shape, axis=-1)
