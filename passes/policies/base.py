"""What a policy is."""

from __future__ import annotations

import dataclasses

import onnx_graphsurgeon as gs

__all__ = ["ImageRows"]


@dataclasses.dataclass(frozen=True)
class ImageRows:
    """What a policy may look at when it scores image rows.

    Attributes:
        hidden_states: [batch, rows, hidden_size], the residual stream at `sparse_layer`.
        position_ids: [batch, rows] int64.
        token_kind: [batch, rows] int64.
        row_lengths: [batch] int64, valid rows before the selection.
        kept_lengths: [batch] int64, valid rows after it.
    """

    hidden_states: gs.Variable
    position_ids: gs.Variable
    token_kind: gs.Variable
    row_lengths: gs.Variable
    kept_lengths: gs.Variable
