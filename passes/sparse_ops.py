"""The ops of domain `ai.dllava`: each a function whose body is standard ONNX.

ONNX Runtime runs the bodies. TensorRT's parser takes a plugin of the same name where one is
registered, else the body. `plugin_namespace` and `plugin_version` on the nodes tell it which.
"""

from __future__ import annotations

import functools

import onnx
import onnx.parser

from dllava_export import names

__all__ = ["FUNCTION_TEXTS", "function_proto"]

# scores [batch, rows] float32, higher is kept; token_kind [batch, rows] int64;
# num_kept [1] int64; kept_lengths [batch] int64 -> kept_indices [batch, num_kept] int64.
# Row kinds other than padding (0) and image (2) are always kept. Of each sample the best
# kept_lengths[b] rows stay, ascending; entries from kept_lengths[b] on hold rows - 1.
# Ties go to the lower row. The score of a row that must stay is a finite stand-in for
# infinity, since some backends compute with it.
_SELECT_TOKENS = """
SelectTokens <plugin_namespace, plugin_version> (scores, token_kind, num_kept, kept_lengths)
    => (kept_indices)
{
    padding = Constant <value = int64 {0}> ()
    image = Constant <value = int64 {2}> ()
    lowest = Constant <value = float {-3.0e38}> ()
    highest = Constant <value = float {3.0e38}> ()
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    axis_1 = Constant <value = int64[1] {1}> ()
    scalar_shape = Constant <value_ints: ints = []> ()
    is_padding = Equal (token_kind, padding)
    is_image = Equal (token_kind, image)
    floor = Where (is_padding, lowest, highest)
    ranked = Where (is_image, scores, floor)
    best_values, best = TopK <axis = 1, largest = 1, sorted = 1> (ranked, num_kept)
    rows = Shape <start = 1, end = 2> (token_kind)
    num_kept_scalar = Reshape (num_kept, scalar_shape)
    slots = Range (zero, num_kept_scalar, one)
    lengths = Unsqueeze (kept_lengths, axis_1)
    is_kept = Less (slots, lengths)
    kept_or_end = Where (is_kept, best, rows)
    ascending, order = TopK <axis = 1, largest = 0, sorted = 1> (kept_or_end, num_kept)
    last_row = Sub (rows, one)
    kept_indices = Min (ascending, last_row)
}
"""

# data [batch, rows, ...]; kept_indices [batch, num_kept] int64 -> [batch, num_kept, ...].
_GATHER_TOKENS = """
GatherTokens <plugin_namespace, plugin_version> (data, kept_indices) => (kept)
{
    last = Constant <value = int64[1] {-1}> ()
    index = Unsqueeze (kept_indices, last)
    kept = GatherND <batch_dims = 1> (data, index)
}
"""

# data [batch, rows, ...]; row_lengths [batch] int64 -> [batch, 1, ...], the last valid row.
_GATHER_LAST_TOKEN = """
GatherLastToken <plugin_namespace, plugin_version> (data, row_lengths) => (last_row)
{
    one = Constant <value = int64 {1}> ()
    zero = Constant <value = int64 {0}> ()
    index_axes = Constant <value = int64[2] {1, 2}> ()
    last = Sub (row_lengths, one)
    row = Max (last, zero)
    index = Unsqueeze (row, index_axes)
    last_row = GatherND <batch_dims = 1> (data, index)
}
"""

# hidden_states [batch, rows, hidden_size]; LayerNorm and four Linear layers with their biases,
# weights as PyTorch stores them, [out, in] -> scores [batch, rows] float32 (logit of keep) and
# keep [batch, rows] bool (logit of keep > logit of drop). Arithmetic is float32 throughout.
_LINEAR = """
    weight_{i}_f32 = Cast <to = 1> (weight_{i})
    weight_{i}_t = Transpose <perm = [1, 0]> (weight_{i}_f32)
    bias_{i}_f32 = Cast <to = 1> (bias_{i})
    product_{i} = MatMul ({x}, weight_{i}_t)
    linear_{i} = Add (product_{i}, bias_{i}_f32)
"""
_PREDICTOR_HEAD = (
    """
PredictorHead <epsilon, plugin_namespace, plugin_version>
    (hidden_states, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3,
     weight_4, bias_4) => (scores, keep)
{
    hidden_f32 = Cast <to = 1> (hidden_states)
    norm_weight_f32 = Cast <to = 1> (norm_weight)
    norm_bias_f32 = Cast <to = 1> (norm_bias)
    normed = LayerNormalization <axis = -1, epsilon: float = @epsilon>
        (hidden_f32, norm_weight_f32, norm_bias_f32)
"""
    + _LINEAR.format(i=1, x="normed")
    + "    gelu_1 = Gelu (linear_1)\n"
    + _LINEAR.format(i=2, x="gelu_1")
    + "    gelu_2 = Gelu (linear_2)\n"
    + _LINEAR.format(i=3, x="gelu_2")
    + "    gelu_3 = Gelu (linear_3)\n"
    + _LINEAR.format(i=4, x="gelu_3")
    + """
    column_keep = Constant <value = int64 {0}> ()
    column_drop = Constant <value = int64 {1}> ()
    scores = Gather <axis = -1> (linear_4, column_keep)
    drop_scores = Gather <axis = -1> (linear_4, column_drop)
    keep = Greater (scores, drop_scores)
}
"""
)

# query [batch, rows, num_heads * head_dim], key and value [batch, rows, kv_num_heads *
# head_dim], past_key and past_value [batch, kv_num_heads, capacity, head_dim], write_index and
# row_lengths [batch] int64 -> output [batch, rows, num_heads * head_dim] and the caches,
# updated in place.
# Row i of sample b is stored at cache row write_index[b] + i and attends to cache rows up to
# there. Rows from row_lengths[b] on are padding: their output means nothing, and what they
# store is overwritten before anything attends to it.
_KV_CACHE_ATTENTION = """
KVCacheAttention <num_heads, kv_num_heads, scale, plugin_namespace, plugin_version>
    (query, key, value, past_key, past_value, write_index, row_lengths)
    => (output, present_key, present_value)
{
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    scalar_shape = Constant <value_ints: ints = []> ()
    last = Constant <value = int64[1] {-1}> ()
    per_sample = Constant <value = int64[3] {1, 2, 3}> ()
    q_heads = Constant <value_int: int = @num_heads> ()
    kv_heads = Constant <value_int: int = @kv_num_heads> ()
    keep_batch_rows = Constant <value = int64[2] {0, 0}> ()
    q_heads_1d = Reshape (q_heads, last)
    kv_heads_1d = Reshape (kv_heads, last)
    q_shape = Concat <axis = 0> (keep_batch_rows, q_heads_1d, last)
    kv_shape = Concat <axis = 0> (keep_batch_rows, kv_heads_1d, last)
    q_rows = Reshape (query, q_shape)
    k_rows = Reshape (key, kv_shape)
    v_rows = Reshape (value, kv_shape)
    q_bhnd = Transpose <perm = [0, 2, 1, 3]> (q_rows)
    k_bhnd = Transpose <perm = [0, 2, 1, 3]> (k_rows)
    v_bhnd = Transpose <perm = [0, 2, 1, 3]> (v_rows)
    present_key = TensorScatter <axis = 2, mode = "linear"> (past_key, k_bhnd, write_index)
    present_value = TensorScatter <axis = 2, mode = "linear"> (past_value, v_bhnd, write_index)
    rows_1d = Shape <start = 1, end = 2> (query)
    rows = Reshape (rows_1d, scalar_shape)
    capacity_1d = Shape <start = 2, end = 3> (past_key)
    capacity = Reshape (capacity_1d, scalar_shape)
    columns = Range (zero, capacity, one)
    row_numbers = Range (zero, rows, one)
    row_column = Unsqueeze (row_numbers, last)
    first = Unsqueeze (write_index, per_sample)
    cache_rows = Add (first, row_column)
    visible = LessOrEqual (columns, cache_rows)
    attended = Attention <scale: float = @scale> (q_bhnd, present_key, present_value, visible)
    rows_heads = Transpose <perm = [0, 2, 1, 3]> (attended)
    merged = Constant <value = int64[3] {0, 0, -1}> ()
    output = Reshape (rows_heads, merged)
}
"""

FUNCTION_TEXTS = {
    "SelectTokens": _SELECT_TOKENS,
    "GatherTokens": _GATHER_TOKENS,
    "GatherLastToken": _GATHER_LAST_TOKEN,
    "PredictorHead": _PREDICTOR_HEAD,
    "KVCacheAttention": _KV_CACHE_ATTENTION,
}


@functools.cache
def function_proto(op: str) -> onnx.FunctionProto:
    """Return the function that defines an op of domain `ai.dllava`.

    Raises:
        KeyError: If there is no such op.
    """
    header = f'<domain: "{names.DOMAIN}", opset_import: ["" : {names.OPSET}]>'
    return onnx.parser.parse_function(header + FUNCTION_TEXTS[op])
