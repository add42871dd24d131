"""Attention that leaves out dropped tokens by a factor in the softmax, so that it can be learnt.

With p_j the keep mask of key j, N rows and S the causal scores:

    G_ij = p_j + (1 - p_j) [i = j]              a token always sees itself
    e_ij = exp(S_ij - max_j S_ij) G_ij          the maximum is over dropped keys too
    A_ij = (e_ij + eps / N) / (sum_k e_ik + eps)

With a mask of zeros and ones this is what a decoder computes from whose cache the dropped rows
are missing, up to the eps terms. The gradient reaches the mask through G.

Source    Dynamic-LLaVA, `softmax_with_policy`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["ATTENTION_NAME", "masked_attention", "masked_softmax"]

ATTENTION_NAME = "dllava_masked"
"""Name under which transformers' decoder layers find `masked_attention`."""

_EPSILON = 1e-6


def masked_softmax(scores: torch.Tensor, keep_mask: torch.Tensor) -> torch.Tensor:
    """Return attention weights that leave out dropped keys.

    Args:
        scores: [batch, num_heads, rows, rows]. Scaled, and -inf where key follows query.
        keep_mask: [batch, rows], float32, in [0, 1].

    Returns:
        [batch, num_heads, rows, rows], float32. Rows sum to 1.
    """
    scores = scores.float()
    num_rows = scores.shape[-1]
    diagonal = torch.eye(num_rows, device=scores.device)
    column = keep_mask[:, None, None, :]
    factors = column + (1 - column) * diagonal  # [batch, 1, rows, rows]
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp() * factors
    total = weights.sum(dim=-1, keepdim=True)
    return (weights + _EPSILON / num_rows) / (total + _EPSILON)


def masked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    keep_mask: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention as transformers' decoder layers call it.

    Batches are padded on the right: no valid row sees padding, so that no other mask is needed.

    Args:
        module: The layer's attention module.
        query: [batch, num_heads, rows, head_dim].
        key: [batch, num_kv_heads, rows, head_dim].
        value: [batch, num_kv_heads, rows, head_dim].
        attention_mask: None.
        scaling: Factor of the scores.
        keep_mask: [batch, rows], float32; None keeps all.

    Returns:
        [batch, rows, num_heads, head_dim], and None for the weights.
    """
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    if keep_mask is None:
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling
        )
    else:
        scores = (query @ key.transpose(-1, -2)) * scaling
        num_rows = scores.shape[-1]
        is_later = torch.ones(num_rows, num_rows, dtype=torch.bool, device=scores.device).triu(
            1
        )
        weights = masked_softmax(scores.masked_fill(is_later, -torch.inf), keep_mask)
        mixed = weights.to(value.dtype) @ value
    return mixed.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, masked_attention)
