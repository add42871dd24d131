"""What pass tests share: graphs as text, structural comparison, runs and NumPy references."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
import onnx.printer
import onnxruntime as ort
from onnx import numpy_helper

from dllava_export import names
from dllava_export.passes.base import Pass
from dllava_export.passes.graph_io import graph_from_model, model_from_graph
from dllava_export.passes.policies.weights import PredictorWeights

TOLERANCES = {
    # Largest difference measured in these tests over 1 + |value|, with values up to 6.4:
    # 5.4e-6, four times that for other processors' kernels.
    np.dtype(np.float32): (2e-5, 2e-5),
    # Two units in the last of 11 bits; measured 1.8e-4.
    np.dtype(np.float16): (2e-3, 2e-3),
}

# Graphs as text.

_HEADER = """<ir_version: 11, opset_import: ["" : 24, "ai.dllava" : 1, "com.microsoft" : 1]>
graph """
_PLUGIN = ("plugin_namespace", "plugin_version")


def model_from_text(
    text: str, weights: Mapping[str, np.ndarray] | None = None
) -> onnx.ModelProto:
    """Parse a graph given as `(inputs) => (outputs) <constants> { nodes }`, add its weights.

    Functions are attached for the custom ops that it uses.
    """
    model = onnx.parser.parse_model(_HEADER + text)
    used = {name for node in model.graph.node for name in node.input}
    for name, values in (weights or {}).items():
        if name in used:
            model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model_from_graph(graph_from_model(model))


def random_weights(seed: int = 1, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return float32 weights of some shapes from a seed."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def structure(model: onnx.ModelProto) -> str:
    """Return the graph as text that depends on its structure alone.

    Nodes are listed in the order in which the outputs need them and values are numbered in
    that order; small integers and scalars are written as values, weights keep their names.
    Names of nodes, shapes in between, functions and plugin attributes are left out.
    """
    graph = model.graph
    canonical = _Canonical(graph)
    outputs = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in graph.output]
    for output in outputs:
        canonical.visit(output.name)
    bare = onnx.helper.make_graph(canonical.nodes, "graph", list(graph.input), outputs)
    for value in bare.output:
        canonical.aliases[value.name] = canonical.renamed[value.name]
    lines = onnx.printer.to_text(bare).splitlines()
    lines += [f"{name} is {new}" for name, new in canonical.aliases.items()]
    return "\n".join(lines)


class _Canonical:
    """Numbers values depth first from the outputs."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.producers = {name: node for node in graph.node for name in node.output}
        self.constants = {t.name: _constant_name(t) for t in graph.initializer}
        self.renamed = {"": "", **{v.name: v.name for v in graph.input}}
        self.nodes: list[onnx.NodeProto] = []
        self.aliases: dict[str, str] = {}

    def visit(self, name: str) -> str:
        if name in self.renamed:
            return self.renamed[name]
        if name in self.constants:
            return self.constants[name]
        node = self.producers[name]
        inputs = [self.visit(entry) for entry in node.input]
        for output in node.output:
            if output:
                self.renamed[output] = f"v{len(self.renamed)}"
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        copy.name = ""
        copy.input[:] = inputs
        copy.output[:] = [self.renamed[output] for output in node.output]
        attributes = [a for a in copy.attribute if a.name not in _PLUGIN]
        for attribute in attributes:
            attribute.t.ClearField("name")
        del copy.attribute[:]
        copy.attribute.extend(sorted(attributes, key=lambda a: a.name))
        self.nodes.append(copy)
        return self.renamed[name]


def _constant_name(tensor: onnx.TensorProto) -> str:
    values = numpy_helper.to_array(tensor)
    is_float = np.issubdtype(values.dtype, np.floating)
    if values.size > (1 if is_float else 16):
        return tensor.name
    return f"{values.dtype.name} {values.tolist()}"


def assert_same_graph(actual: onnx.ModelProto, expected: onnx.ModelProto) -> None:
    """Compare two models by structure; the order of outputs counts, that of inputs does not."""
    for model in (actual, expected):
        model.graph.input.sort(key=lambda value: value.name)
    texts = (structure(model).splitlines() for model in (expected, actual))
    difference = "\n".join(difflib.unified_diff(*texts, "expected", "actual", lineterm=""))
    assert not difference, difference


def apply(model: onnx.ModelProto, *passes: Pass) -> onnx.ModelProto:
    """Return a model after some passes."""
    graph = graph_from_model(model)
    for step in passes:
        step(graph)
    return model_from_graph(graph)


def assert_changes_nothing(model: onnx.ModelProto, step: Pass) -> None:
    """Check that a pass says so, and that it is so to the byte."""
    before = model_from_graph(graph_from_model(model))
    graph = graph_from_model(model)
    assert step(graph) is False
    assert model_from_graph(graph).SerializeToString() == before.SerializeToString()


# Runs.


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a model once on ONNX Runtime; feeds that it has no input for are left out."""
    return Runner(model)(feeds)


class Runner:
    """A model on ONNX Runtime."""

    def __init__(self, model: onnx.ModelProto) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # TensorScatter warns where buffers are not shared
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {entry.name for entry in self.session.get_inputs()}
        self.outputs = [entry.name for entry in self.session.get_outputs()]

    def in_place(
        self, feeds: Mapping[str, np.ndarray], shared: Mapping[str, str]
    ) -> dict[str, np.ndarray]:
        """Run with outputs written into buffers of inputs, as `shared` pairs them."""
        binding = self.session.io_binding()
        values = {k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            if name in shared:
                binding.bind_ortvalue_output(name, values[shared[name]])
            else:
                binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        return {k: v.numpy() for k, v in zip(self.outputs, outputs, strict=True)}

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        used = {name: values for name, values in feeds.items() if name in self.inputs}
        return dict(zip(self.outputs, self.session.run(None, used), strict=True))


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Compare within the tolerance of the actual dtype; integers and booleans exactly."""
    assert actual.shape == expected.shape
    if actual.dtype not in TOLERANCES:
        assert actual.tolist() == expected.tolist()
        return
    atol, rtol = TOLERANCES[actual.dtype]
    np.testing.assert_allclose(actual, expected, rtol, atol, equal_nan=False)


# A tiny decoder: 8 wide, 2 heads of 8 over 1 key and value head, vocabulary 11.

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 8, 2, 1, 8, 12, 11
EPSILON = 1e-5

ROTARY = """
    position = Unsqueeze ({positions}, axis_2)
    position_float = Cast <to = 1> (position)
    angle = Mul (position_float, frequencies)
    cos = Cos (angle)
    sin = Sin (angle)
"""
ATTENTION = """
    a{i} = Attention <is_causal = 1, q_num_heads = 2, kv_num_heads = 1, scale = 0.5>
        (qr{i}, kr{i}, v{i})
"""
CACHED_ATTENTION = """
    a{i}, "present.{i}.key", "present.{i}.value" = ai.dllava.KVCacheAttention
        <num_heads = 2, kv_num_heads = 1, scale = 0.5>
        (qr{i}, kr{i}, v{i}, "past_key_values.{i}.key", "past_key_values.{i}.value",
         {write_index}, {lengths})
"""
LAYER = """
    n{i} = RMSNormalization <axis = -1, epsilon = 1e-5, stash_type = 1> ({x}, "{i}.norm_1")
    q{i} = MatMul (n{i}, "{i}.q")
    k{i} = MatMul (n{i}, "{i}.k")
    v{i} = MatMul (n{i}, "{i}.v")
    qr{i} = RotaryEmbedding <interleaved = 0, num_heads = 2> (q{i}, {cos}, {sin})
    kr{i} = RotaryEmbedding <interleaved = 0, num_heads = 1> (k{i}, {cos}, {sin})
    {attention}
    o{i} = MatMul (a{i}, "{i}.o")
    m{i} = Add ({x}, o{i})
    nn{i} = RMSNormalization <axis = -1, epsilon = 1e-5, stash_type = 1> (m{i}, "{i}.norm_2")
    u{i} = MatMul (nn{i}, "{i}.up")
    s{i} = Sigmoid (u{i})
    g{i} = Mul (u{i}, s{i})
    d{i} = MatMul (g{i}, "{i}.down")
    h{i} = Add (m{i}, d{i})
"""
HEAD = """
    normed = RMSNormalization <axis = -1, epsilon = 1e-5, stash_type = 1> ({x}, norm)
    lm_head_t = Transpose <perm = [1, 0]> (lm_head)
    {logits} = MatMul (normed, lm_head_t)
"""
ROW_LENGTHS = """
    is_padding = Equal (token_kind, zero)
    is_valid = Not (is_padding)
    counted = Cast <to = 7> (is_valid)
    row_lengths = ReduceSum <keepdims = 0> (counted, axis_1)
"""
LAST_ROW = """
    last = ai.dllava.GatherLastToken ({x}, {lengths})
"""
SQUEEZE = """
    logits = Squeeze (row_logits, axis_1)
"""
NEXT_WRITE_INDEX = """
    advanced_{group} = Add (write_index_{group}, {stored})
    capacity_{group} = Shape <start = 2, end = 3> ("past_key_values.{i}.key")
    spare_{group} = Sub (capacity_{group}, axis_1)
    next_write_index_{group} = Min (advanced_{group}, spare_{group})
"""
CONSTANTS = """int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64 three = {3},
    int64[1] axis_0 = {0}, int64[1] axis_1 = {1}, int64[1] axis_2 = {2},
    int64[1] last_axis = {-1}"""
DENSE_INPUTS = "float[batch, rows, 8] inputs_embeds, int64[batch, rows] position_ids"


def layer_text(
    i: int,
    x: str,
    attention: str = ATTENTION,
    cos: str = "cos",
    sin: str = "sin",
    **names: str,
) -> str:
    """Return one decoder layer from the residual stream `x` to `h{i}`."""
    inner = attention.format(i=i, **names)
    return LAYER.format(i=i, x=x, cos=cos, sin=sin, attention=inner)


def dense_text(num_layers: int = 2) -> str:
    """Return the nodes of the decoder as the fusing passes leave it."""
    xs = ["inputs_embeds", *(f"h{i}" for i in range(num_layers))]
    layers = "".join(layer_text(i, xs[i]) for i in range(num_layers))
    rotary = ROTARY.format(positions="position_ids")
    return rotary + layers + HEAD.format(x=xs[-1], logits="logits")


NORM_SCORES = """
    hidden_f32 = Cast <to = 1> (h0)
    length = ReduceL2 <keepdims = 0> (hidden_f32, last_axis)
    scores = Neg (length)
"""
SELECTION = """
    kept_indices = ai.dllava.SelectTokens (scores, token_kind, num_kept, kept_lengths)
    kept_h0 = ai.dllava.GatherTokens (h0, kept_indices)
    kept_cos = ai.dllava.GatherTokens (cos, kept_indices)
    kept_sin = ai.dllava.GatherTokens (sin, kept_indices)
"""


@dataclasses.dataclass(frozen=True)
class SparseText:
    """Text of the decoder of 2 layers with a selection before layer 1.

    Attributes:
        cache: Whether it has KV caches.
        scores: Nodes that make `scores` of `h0`.
        more: Nodes that further passes added.
        rows: Prefix of the rows that layer 1 reads.
        lengths: Their number per sample.
        stored: How far the sparse write index moves.
        inputs: Further inputs.
        outputs: Further outputs.
        constants: Further constants.
    """

    cache: bool
    scores: str = NORM_SCORES
    more: str = ""
    rows: str = "kept_"
    lengths: str = "kept_lengths"
    stored: str = "kept_lengths"
    inputs: str = ""
    outputs: str = ""
    constants: str = ""

    def model(self, weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
        """Return the model; decoder weights are added."""
        attention = CACHED_ATTENTION if self.cache else ATTENTION
        full = {"write_index": "write_index_full", "lengths": "row_lengths"}
        sparse = {"write_index": "write_index_sparse", "lengths": self.lengths}
        rows = self.rows
        text = graph_text(
            self._inputs(),
            self._outputs(),
            ROW_LENGTHS,
            ROTARY.format(positions="position_ids"),
            layer_text(0, "inputs_embeds", attention, **full),
            self.scores,
            SELECTION,
            self.more,
            layer_text(1, f"{rows}h0", attention, f"{rows}cos", f"{rows}sin", **sparse),
            LAST_ROW.format(x="h1", lengths=self.lengths),
            HEAD.format(x="last", logits="row_logits"),
            SQUEEZE,
            self._next_indices() if self.cache else "",
        )
        text = text.replace(CONSTANTS, CONSTANTS + self.constants)
        return model_from_text(text, decoder_weights(2) | dict(weights))

    def _inputs(self) -> str:
        text = f"{DENSE_INPUTS}, int64[batch, rows] token_kind, int64[1] num_kept"
        text += ", int64[batch] kept_lengths"
        if self.cache:
            text += ", int64[batch] write_index_full, int64[batch] write_index_sparse, "
            text += cache_values("past_key_values", 2, sparse_layer=1)
        return text + self.inputs

    def _outputs(self) -> str:
        text = "float[batch, 11] logits"
        if self.cache:
            text += f", {cache_values('present', 2, sparse_layer=1)}"
            text += ", int64[batch] next_write_index_full"
        text += ", int64[batch, num_kept] kept_indices"
        text += ", int64[batch] next_write_index_sparse" if self.cache else ""
        return text + self.outputs

    def _next_indices(self) -> str:
        full = NEXT_WRITE_INDEX.format(group="full", stored="row_lengths", i=0)
        return full + NEXT_WRITE_INDEX.format(group="sparse", stored=self.stored, i=1)


def cache_values(direction: str, num_layers: int, sparse_layer: int | None = None) -> str:
    """Return declarations of cache inputs (`past_key_values`) or outputs (`present`)."""
    split = num_layers if sparse_layer is None else sparse_layer
    return ", ".join(
        f'float[batch, 1, capacity_{group}, 8] "{direction}.{i}.{part}"'
        for i, group in enumerate(["full"] * split + ["sparse"] * (num_layers - split))
        for part in ("key", "value")
    )


def graph_text(inputs: str, outputs: str, *parts: str) -> str:
    """Put declarations and nodes together."""
    return f"({inputs}) => ({outputs}) <{CONSTANTS}> {{{''.join(parts)}}}"


def dense_decoder(num_layers: int = 2) -> onnx.ModelProto:
    """Return the tiny decoder: inputs_embeds, position_ids ► logits [batch, rows, 11]."""
    text = graph_text(DENSE_INPUTS, "float[batch, rows, 11] logits", dense_text(num_layers))
    return model_from_text(text, decoder_weights(num_layers))


def decoder_weights(num_layers: int = 2) -> dict[str, np.ndarray]:
    """Return weights of the tiny decoder by name, float32, from a fixed seed."""
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"norm": (HIDDEN,), "lm_head": (VOCAB, HIDDEN)}
    for i in range(num_layers):
        shapes |= {
            f"{i}.norm_1": (HIDDEN,),
            f"{i}.q": (HIDDEN, HEADS * HEAD_DIM),
            f"{i}.k": (HIDDEN, KV_HEADS * HEAD_DIM),
            f"{i}.v": (HIDDEN, KV_HEADS * HEAD_DIM),
            f"{i}.o": (HEADS * HEAD_DIM, HIDDEN),
            f"{i}.norm_2": (HIDDEN,),
            f"{i}.up": (HIDDEN, MLP),
            f"{i}.down": (MLP, HIDDEN),
        }
    weights = {
        name: (rng.normal(0, 0.5, shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    weights["frequencies"] = np.array([1, 0.5, 0.25, 0.125], np.float32)
    return weights


def predictor_weights(seed: int = 21, blocks: int = 1) -> PredictorWeights:
    """Return both predictors, 4 wide with 2 heads, from a fixed seed."""
    width, inner = 4, 6
    linear = {"down_mlp.1": (HIDDEN, width), "output_mlp.0": (width, 4)}
    linear |= {"output_mlp.2": (4, 3), "output_mlp.4": (3, 2)}
    norms = {"down_mlp.0": HIDDEN}
    for block in range(blocks):
        prefix = f"transformer.{block}"
        linear |= {
            f"{prefix}.attn.qkv": (width, 3 * width),
            f"{prefix}.attn.proj": (width, width),
        }
        linear |= {f"{prefix}.mlp.fc1": (width, inner), f"{prefix}.mlp.fc2": (inner, width)}
        norms |= {f"{prefix}.norm1": width, f"{prefix}.norm2": width}
    text = {"output_mlp.1": (HIDDEN, 4), "output_mlp.3": (4, 4)}
    text |= {"output_mlp.5": (4, 3), "output_mlp.7": (3, 2)}
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for prefix, linears, sizes in (
        ("image_predictor", linear, norms),
        ("output_text_predictor", text, {"output_mlp.0": HIDDEN}),
    ):
        for name, (size_in, size_out) in linears.items():
            tensors[f"{prefix}.{name}.weight"] = rng.normal(0, 0.7, (size_out, size_in))
            tensors[f"{prefix}.{name}.bias"] = rng.normal(0, 0.3, size_out)
        for name, size in sizes.items():
            tensors[f"{prefix}.{name}.weight"] = rng.normal(1, 0.2, size)
            tensors[f"{prefix}.{name}.bias"] = rng.normal(0, 0.2, size)
    for block in range(blocks):
        del tensors[f"image_predictor.transformer.{block}.attn.qkv.bias"]
    return PredictorWeights({k: v.astype(np.float32) for k, v in tensors.items()}, num_heads=2)


# NumPy references.

Select = Callable[[np.ndarray, np.ndarray], Sequence[int]]


class ReferenceDecoder:
    """The tiny decoder in NumPy, one sample without padding, with a cache of exact length.

    Args:
        num_layers: Decoder layers.
        renumbers: Give selected rows the positions 0, 1, 2, ..., as no decoder here must.

    Attributes:
        attended: Query [rows, 2, 8] and key [rows, 1, 8] of the layer that ran last, rotated.
    """

    attended: tuple[np.ndarray, np.ndarray]

    def __init__(self, num_layers: int = 2, *, renumbers: bool = False) -> None:
        self._renumbers = renumbers
        self.weights = {
            k: v.astype(np.float64) for k, v in decoder_weights(num_layers).items()
        }
        self.num_layers = num_layers
        self.caches = [
            [np.zeros((0, KV_HEADS * HEAD_DIM)) for _ in range(2)] for _ in range(num_layers)
        ]

    def feed(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        sparse_layer: int | None = None,
        select: Select | None = None,
        is_stored: Callable[[np.ndarray, np.ndarray], bool] = lambda hidden, positions: True,
    ) -> np.ndarray:
        """Feed rows on top of the cache; return the last row's logits.

        Args:
            embeds: [rows, 8].
            positions: [rows].
            sparse_layer: Where `select` and `is_stored` act.
            select: From hidden states and positions to the rows that go on.
            is_stored: Whether the rows enter the caches from `sparse_layer` on.
        """
        x, positions = embeds.astype(np.float64), np.asarray(positions)
        stored = True
        for i in range(self.num_layers):
            if i == sparse_layer:
                if select is not None:
                    rows = list(select(x, positions))
                    x, positions = x[rows], positions[rows]
                    if self._renumbers:
                        positions = np.arange(len(rows))
                stored = is_stored(x, positions)
            x = self._layer(i, x, positions, stored)
        return self._norm(x[-1], "norm") @ self.weights["lm_head"].T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
        return x * scale * self.weights[name]

    def _layer(self, i: int, x: np.ndarray, positions: np.ndarray, stored: bool) -> np.ndarray:
        weights = self.weights
        normed = self._norm(x, f"{i}.norm_1")
        query = self._rotate(normed @ weights[f"{i}.q"], positions, HEADS)
        key = self._rotate(normed @ weights[f"{i}.k"], positions, KV_HEADS)
        self.attended = tuple(x.reshape(len(x), -1, HEAD_DIM) for x in (query, key))
        keys = np.concatenate([self.caches[i][0], key])
        values = np.concatenate([self.caches[i][1], normed @ weights[f"{i}.v"]])
        if stored:
            self.caches[i] = [keys, values]
        x = x + attend(query, keys, values, HEADS, KV_HEADS, 0.5) @ weights[f"{i}.o"]
        inner = self._norm(x, f"{i}.norm_2") @ weights[f"{i}.up"]
        return x + (inner / (1 + np.exp(-inner))) @ weights[f"{i}.down"]

    def _rotate(self, x: np.ndarray, positions: np.ndarray, heads: int) -> np.ndarray:
        angle = positions[:, None, None] * self.weights["frequencies"]
        first, second = np.split(x.reshape(len(x), heads, HEAD_DIM), 2, axis=-1)
        cos, sin = np.cos(angle), np.sin(angle)
        turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
        return turned.reshape(len(x), -1)


def attend(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> np.ndarray:
    """Attend from [rows, heads * d] to [past + rows, kv_heads * d], causally; the last rows."""
    rows, past = len(query), len(keys) - len(query)
    head_dim = query.shape[1] // num_heads
    visible = np.arange(len(keys)) <= past + np.arange(rows)[:, None]
    outputs = []
    for head in range(num_heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        kv_head = head // (num_heads // kv_num_heads)
        kv_part = slice(kv_head * head_dim, (kv_head + 1) * head_dim)
        scores = np.where(visible, query[:, part] @ keys[:, kv_part].T * scale, -np.inf)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        outputs.append(probs / probs.sum(-1, keepdims=True) @ values[:, kv_part])
    return np.concatenate(outputs, -1)


def select_tokens(
    scores: np.ndarray, token_kind: np.ndarray, num_kept: int, kept_lengths: Sequence[int]
) -> np.ndarray:
    """Return [batch, num_kept]: the best rows of each sample, ascending, then rows - 1."""
    kept = np.full((len(scores), num_kept), scores.shape[1] - 1)
    for row, kinds, sample, count in zip(kept, token_kind, scores, kept_lengths, strict=True):
        rank = {names.IMAGE: 1, names.PADDING: 2}
        order = sorted(
            range(len(sample)),
            key=lambda r: (
                rank.get(int(kinds[r]), 0),
                -sample[r] * (kinds[r] == names.IMAGE),
                r,
            ),
        )
        row[:count] = sorted(order[:count])
    return kept


def hashed(positions: np.ndarray, salt: int = 0) -> np.ndarray:
    """Return the hash of policy `random` in exact integers, as shares in [0, 1]."""
    prime = 2**31 - 1
    x = [int(p) + salt + 1 for p in np.ravel(positions)]
    values = [((48271 * v + 1103515245) % prime * v + 12345) % prime for v in x]
    return (np.array(values).reshape(np.shape(positions)) / prime).astype(np.float32)


# Requests.


def embeddings(batch: int, rows: int, seed: int = 3) -> np.ndarray:
    """Return [batch, rows, 8] float32 from a seed."""
    return np.random.default_rng(seed).normal(size=(batch, rows, HIDDEN)).astype(np.float32)


def prompt(kinds: Sequence[Sequence[int]], drop: int, seed: int = 3) -> dict[str, np.ndarray]:
    """Return decoder inputs for samples given by their row kinds; `drop` image rows go.

    Samples without an image drop nothing; shorter ones are padded on the right.
    """
    rows = max(len(sample) for sample in kinds)
    padded = [list(sample) + [names.PADDING] * (rows - len(sample)) for sample in kinds]
    token_kind = np.array(padded, np.int64)
    num_image = (token_kind == names.IMAGE).sum(axis=1)
    kept = (token_kind != names.PADDING).sum(axis=1) - np.where(num_image > 0, drop, 0)
    return {
        names.INPUTS_EMBEDS: embeddings(len(kinds), rows, seed),
        names.POSITION_IDS: np.tile(np.arange(rows), (len(kinds), 1)),
        names.TOKEN_KIND: token_kind,
        names.NUM_KEPT: np.array([kept.max()]),
        names.KEPT_LENGTHS: kept,
        names.NUM_IMAGE_ROWS: np.array([num_image.max()]),
    }


def empty_caches(batch: int, capacities: Sequence[int]) -> dict[str, np.ndarray]:
    """Return cache inputs, one capacity per layer, and both write indices at 0."""
    caches = {
        names.past(i, part): np.zeros((batch, KV_HEADS, capacity, HEAD_DIM), np.float32)
        for i, capacity in enumerate(capacities)
        for part in ("key", "value")
    }
    indices = (names.write_index(names.FULL), names.write_index(names.SPARSE))
    return caches | {name: np.zeros(batch, np.int64) for name in indices}


def carried_over(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what one run's outputs are to the next: caches and write indices."""
    feeds = {
        name.replace("present", "past_key_values"): values
        for name, values in outputs.items()
        if name.startswith("present")
    }
    for before, after in (
        (names.write_index(names.FULL), names.next_write_index(names.FULL)),
        (names.write_index(names.SPARSE), names.next_write_index(names.SPARSE)),
    ):
        if after in outputs:
            feeds[before] = outputs[after]
    return feeds


def generated_row(batch: int, position: int, seed: int) -> dict[str, np.ndarray]:
    """Return decoder inputs for one generated token per sample."""
    ones = np.ones(batch, np.int64)
    return {
        names.INPUTS_EMBEDS: embeddings(batch, 1, seed),
        names.POSITION_IDS: position * ones[:, None],
        names.TOKEN_KIND: names.GENERATED_TEXT * ones[:, None],
        names.NUM_KEPT: np.array([1]),
        names.KEPT_LENGTHS: ones,
        names.NUM_IMAGE_ROWS: np.array([0]),
    }


def text_logits(hidden: np.ndarray) -> np.ndarray:
    """Return keep minus drop of the output-text predictor for [n, 8], positive where kept."""
    logits = _text_predictor(hidden)
    return logits[:, 0] - logits[:, 1]


def text_scores(hidden: np.ndarray) -> np.ndarray:
    """Return the output-text predictor's logit of keep for [n, 8]."""
    return _text_predictor(hidden)[:, 0]


def _text_predictor(hidden: np.ndarray) -> np.ndarray:
    tensors = predictor_weights().tensors
    order = [f"output_mlp.{i}.{part}" for i in (0, 1, 3, 5, 7) for part in ("weight", "bias")]
    parameters = [np.asarray(tensors[f"output_text_predictor.{name}"]) for name in order]
    return predictor_head(hidden, parameters)


def predictor_head(hidden: np.ndarray, parameters: Sequence[np.ndarray]) -> np.ndarray:
    """Return logits [..., 2] of norm and four linear layers in float64."""
    x = hidden.astype(np.float64)
    norm_weight, norm_bias, *linears = (p.astype(np.float64) for p in parameters)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    x = x * norm_weight + norm_bias
    for weight, bias in zip(linears[:-2:2], linears[1:-2:2], strict=True):
        x = x @ weight.T + bias
        x = x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))
    return x @ linears[-2].T + linears[-1]
