"""FLOPs and KV bytes by formula: what each layer computes and stores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from dllava_export import names
from dllava_export.backends.cache_groups import CacheGroup, cache_groups
from dllava_export.backends.kv_plan import bytes_per_row
from dllava_export.geometry import Geometry
from dllava_export.passes.policies.registry import POLICIES
from dllava_export.precision import Precision
from dllava_export.settings import whole_number
from dllava_export.sparsity import Sparsity

__all__ = ["ExactFlops", "KVGroup", "exact_flops", "kv_bytes", "paper_flops", "rows_per_layer"]


@dataclasses.dataclass(frozen=True)
class ExactFlops:
    """FLOPs of one sample; a multiply-add counts 2.

    Attributes:
        prefill: The run over image and prompt.
        decode_step: The last decode step; 0 where there is none.
        generation: The prefill and all decode steps.
    """

    prefill: float
    decode_step: float
    generation: float


@dataclasses.dataclass(frozen=True)
class KVGroup:
    """The KV cache of layers that store the same rows.

    Attributes:
        group: The layers.
        rows: Rows in each layer at the end of the generation.
        bytes: Bytes of keys and values of one sample in all layers of the group.
    """

    group: CacheGroup
    rows: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return values that `json.dumps` takes."""
        group = self.group
        return {
            "name": group.name,
            "num_layers": group.num_layers,
            "rows": self.rows,
            "bytes": self.bytes,
        }


def rows_per_layer(geometry: Geometry, sparsity: Sparsity, prompt_text_len: int) -> list[int]:
    """Return how many rows each decoder layer computes in the prefill of one sample.

    P = prompt_text_len + num_image_tokens below `sparse_layer`, and
    P - num_image_tokens + num_kept from it on.

    Raises:
        SettingError: If `sparse_layer` is not a layer of the model, or no image token or more
            than all would be kept.
    """
    num_image_tokens = geometry.num_image_tokens
    num_kept = sparsity.num_kept_image_tokens(num_image_tokens)
    image_rows = {names.FULL: num_image_tokens, names.SPARSE: num_kept}
    return [
        prompt_text_len + image_rows[group.name]
        for group in cache_groups(geometry, sparsity)
        for _ in range(group.num_layers)
    ]


def paper_flops(hidden_size: int, rows_by_layer: Sequence[int]) -> float:
    """Return FLOPs as the Dynamic-LLaVA paper counts them.

    Sum over layers of 32 * N * C^2 + 4 * N^2 * C, with C the hidden size and N the layer's
    rows. The paper's prefill figures count image tokens only, its decoding figures output
    tokens only; 32 * C^2 is above the linear layers of LLaMA (about 24.1 * C^2). For
    comparison with published tables; `exact_flops` is the real count.

    Args:
        hidden_size: Width of the residual stream.
        rows_by_layer: Rows of each decoder layer.

    Source: Dynamic-LLaVA (arXiv:2412.00876), equation 13.
    """
    return float(
        sum(32 * rows * hidden_size**2 + 4 * rows**2 * hidden_size for rows in rows_by_layer)
    )


def exact_flops(
    geometry: Geometry, sparsity: Sparsity, prompt_text_len: int, output_len: int
) -> ExactFlops:
    """Count the FLOPs of one sample with one image; a multiply-add counts 2.

    Counted, per decoder layer and row: the projections q, k, v, o (with `num_kv_heads`), gate,
    up and down; attention scores and weighted values over the rows that are visible (causal:
    row i attends to i + 1 rows, itself included). Once per run: the language model head, on
    one row. Of the policies, what they count themselves: scoring the image in the prefill, and
    deciding about each token that is fed in decode, if generated tokens are pruned. Those of
    the predictors are their linear layers and the image predictor's full attention.

    Not counted: embeddings, norms, rotary embedding, softmax, activations, biases, residual
    additions, top-k and gathers; the vision tower and the projector.

    The prefill yields the first token, so `output_len` tokens take output_len - 1 decode
    steps. In decode step t (from 1) a layer below `sparse_layer` attends to P + t rows. From
    `sparse_layer` on, a step attends to the kept prompt rows, itself, and the earlier
    generated tokens that were stored: output_text_keep_rate * (t - 1) of them, in expectation.

    Args:
        geometry: Sizes of the model.
        sparsity: What is pruned.
        prompt_text_len: Text tokens of the prompt.
        output_len: Generated tokens, at least 1.

    Raises:
        SettingError: If `output_len` is below 1, a policy is not known or needs a predictor that
            the geometry lacks, or the settings do not fit the model.
    """
    whole_number("output_len", output_len, 1)
    rows = rows_per_layer(geometry, sparsity, prompt_text_len)
    linear = _linear_flops_per_row(geometry)
    attention = 4 * geometry.num_heads * geometry.head_dim  # per pair of rows
    head = 2 * geometry.hidden_size * geometry.vocab_size
    prefill = head + sum(n * linear + n * (n + 1) // 2 * attention for n in rows)
    step_fixed = head + geometry.num_layers * linear
    if not sparsity.is_dense:
        prefill += POLICIES.get(sparsity.policy).image_flops(geometry)
    if sparsity.has_keep_bit:
        step_fixed += POLICIES.get(sparsity.text_policy).text_flops(geometry)

    num_steps = output_len - 1
    rate = sparsity.output_text_keep_rate if sparsity.has_keep_bit else 1.0
    rates = {names.FULL: 1.0, names.SPARSE: rate}

    def attended(step: float) -> float:
        """Sum over layers of the rows that are visible in decode step `step`."""
        return sum(
            group.num_layers * (rows[group.first_layer] + rates[group.name] * (step - 1) + 1)
            for group in cache_groups(geometry, sparsity)
        )

    decode_step = step_fixed + attention * attended(num_steps) if num_steps else 0.0
    # The attended rows grow by the same amount in each step: their mean is the middle one.
    middle = (num_steps + 1) / 2
    decode = num_steps * (step_fixed + attention * attended(middle))
    return ExactFlops(float(prefill), float(decode_step), float(prefill + decode))


def kv_bytes(
    geometry: Geometry,
    sparsity: Sparsity,
    precision: Precision,
    prompt_text_len: int,
    output_len: int,
) -> tuple[KVGroup, ...]:
    """Return the expected KV cache of one sample after `output_len` generated tokens.

    Rows of the full group: P + output_len. Rows of the sparse group: the kept prompt rows
    + ceil(output_text_keep_rate * output_len), or all generated tokens where none are pruned.
    What a run allocates is a little more: capacities have a reserve.

    Args:
        geometry: Sizes of the model.
        sparsity: What is pruned.
        precision: How values are stored.
        prompt_text_len: Text tokens of the prompt.
        output_len: Generated tokens.

    Returns:
        One entry per cache group; a dense decoder has a single one.

    Raises:
        SettingError: If the settings do not fit the model.
    """
    rows = rows_per_layer(geometry, sparsity, prompt_text_len)
    stored = {names.FULL: output_len, names.SPARSE: output_len}
    if sparsity.has_keep_bit:
        stored[names.SPARSE] = math.ceil(sparsity.output_text_keep_rate * output_len)
    row_bytes = bytes_per_row(geometry, precision)
    found = []
    for group in cache_groups(geometry, sparsity):
        num_rows = rows[group.first_layer] + stored[group.name]
        found.append(KVGroup(group, num_rows, group.num_layers * num_rows * row_bytes))
    return tuple(found)


def _linear_flops_per_row(geometry: Geometry) -> int:
    query = geometry.num_heads * geometry.head_dim
    key = geometry.num_kv_heads * geometry.head_dim
    attention = 2 * geometry.hidden_size * (query + key)  # q and o, k and v
    mlp = 3 * geometry.hidden_size * geometry.intermediate_size  # gate, up, down
    return 2 * (attention + mlp)
