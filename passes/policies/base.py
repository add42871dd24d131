"""What a policy is: it scores image rows, and may decide about generated tokens.

    ImageRows ► score ► SelectTokens          the best-scoring image rows go on
    TextRows ► keep_token ► keep bit          a generated token leaves keys and values, or not

A policy is one file with a subclass of `Policy`. In this folder `registry.py` finds it; a
package of your own names it in an entry point of group `dllava_export.policies`, whose name is
the policy's and whose object is the class. What is not loaded at import stays out of a bundle's
way when it runs: import onnx and onnx_graphsurgeon inside functions, NumPy anywhere.

All arithmetic is float32 or integer in every precision: a near-tie decides what stays.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx_graphsurgeon as gs

    from dllava_export.geometry import Geometry
    from dllava_export.passes.graph_builder import GraphBuilder
    from dllava_export.passes.policies.weights import PredictorWeights

__all__ = [
    "AttentionArrays",
    "AttentionRows",
    "ImageArrays",
    "ImageRows",
    "Policy",
    "TextArrays",
    "TextRows",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionRows:
    """Queries and keys of layer `sparse_layer` - 1 in the graph, rotated, of the rows fed.

    Query head h reads key head h // (num_heads / num_kv_heads). Rows of earlier runs, which a
    cache holds, are not among them.

    Attributes:
        query: [batch, rows, num_heads * head_dim], in the precision of the model.
        key: [batch, rows, num_kv_heads * head_dim], likewise.
        num_heads: Query heads.
        num_kv_heads: Key heads.
        scale: What products of query and key are multiplied by.
    """

    query: gs.Variable
    key: gs.Variable
    num_heads: int
    num_kv_heads: int
    scale: float

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return int(self.query.shape[-1]) // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRows:
    """What a policy may look at in the graph when it scores image rows.

    The rows of prefill are the prompt's, of each sample and padded on the right; decode runs
    the same nodes over one row per sample. Recompute adds the generated rows at the end.

    Attributes:
        hidden_states: [batch, rows, hidden_size], the residual stream at `sparse_layer`, in
            the precision of the model.
        position_ids: [batch, rows] int64.
        token_kind: [batch, rows] int64; `names.IMAGE` marks the rows that compete.
        row_lengths: [batch] int64, valid rows before the selection.
        kept_lengths: [batch] int64, valid rows after it.
        attention: Queries and keys of the layer before.
    """

    hidden_states: gs.Variable
    position_ids: gs.Variable
    token_kind: gs.Variable
    row_lengths: gs.Variable
    kept_lengths: gs.Variable
    attention: AttentionRows


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRows:
    """What a policy may look at in the graph when it decides about generated tokens.

    Attributes:
        hidden_states: [batch, rows, hidden_size], the residual stream at `sparse_layer`, in
            the precision of the model.
        position_ids: [batch, rows] int64, original positions of these rows.
    """

    hidden_states: gs.Variable
    position_ids: gs.Variable


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionArrays:
    """The same for the NumPy reference, of all valid rows of one sample.

    Attributes:
        query: [rows, num_heads, head_dim] float32.
        key: [rows, num_kv_heads, head_dim] float32.
        scale: What products of query and key are multiplied by.
        token_kind: [rows] int64; `names.IMAGE` marks the rows that compete.
    """

    query: np.ndarray
    key: np.ndarray
    scale: float
    token_kind: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageArrays:
    """The same for the NumPy reference, of one sample and its image rows only.

    Attributes:
        hidden_states: [n, hidden_size] float32.
        position_ids: [n] int64, positions in the prompt.
        num_kept: How many of the n will be kept.
        attention: Queries and keys of the layer before, of all rows.
    """

    hidden_states: np.ndarray
    position_ids: np.ndarray
    num_kept: int
    attention: AttentionArrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextArrays:
    """The same for the NumPy reference, of one sample's generated rows.

    Attributes:
        hidden_states: [n, hidden_size] float32.
        position_ids: [n] int64, positions in the sequence.
    """

    hidden_states: np.ndarray
    position_ids: np.ndarray


class Policy(abc.ABC):
    """Scores image rows; who competes and how many stay is not decided here.

    Attributes:
        name: What users write; also part of the names of its nodes.
        help: What it is, for the command line: a few words, no full stop.
        image_tokens: By what it keeps image tokens, for README's table.
        generated_tokens: By what it keeps generated tokens.
        needs: What a model must come with.
        needs_predictors: True where it needs a checkpoint's trained predictors.
        score_meaning: What its image scores are, where that is worth a caption.
    """

    name: str
    help: str
    image_tokens: str
    generated_tokens: str = "all kept"
    needs: str = "nothing"
    needs_predictors: bool = False
    score_meaning: str = ""

    @abc.abstractmethod
    def score(
        self, builder: GraphBuilder, rows: ImageRows, weights: PredictorWeights | None
    ) -> gs.Variable:
        """Add the nodes that score rows.

        Args:
            builder: Where new nodes are named.
            rows: What to look at.
            weights: Trained predictors, if there are any.

        Returns:
            [batch, rows] float32, higher is kept; only those of image rows mean something.
            Among equal scores the lower index wins.
        """

    @abc.abstractmethod
    def reference(self, rows: ImageArrays, weights: PredictorWeights | None) -> np.ndarray:
        """Score an image's rows in NumPy, as `validate` compares them: [n] float32."""

    @property
    def decides_text(self) -> bool:
        """True where it decides about generated tokens; else all of them are kept."""
        return type(self).keep_token is not Policy.keep_token

    def keep_token(
        self,
        builder: GraphBuilder,
        rows: TextRows,
        keep_rate: float,
        weights: PredictorWeights | None,
    ) -> tuple[gs.Variable, gs.Variable]:
        """Add the nodes that decide about generated tokens, each for itself.

        Args:
            builder: Where new nodes are named.
            rows: What to look at.
            keep_rate: Share of generated tokens to keep, in (0, 1).
            weights: Trained predictors, if there are any.

        Returns:
            scores [batch, rows] float32, by which recompute ranks; keep [batch, rows] bool.
        """
        raise TypeError(f"policy {self.name!r} does not decide about generated tokens")

    def reference_keep(
        self, rows: TextArrays, keep_rate: float, weights: PredictorWeights | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decide about generated tokens in NumPy.

        Returns:
            scores [n] float32, as those of `keep_token`; margin [n] float32, above 0 where a
            row is kept.
        """
        raise TypeError(f"policy {self.name!r} does not decide about generated tokens")

    def image_flops(self, geometry: Geometry) -> int:
        """Return the FLOPs that scoring one image takes; a multiply-add counts 2.

        As everywhere in `cost/`, only matrix products count.

        Raises:
            SettingError: If the geometry lacks sizes that this needs.
        """
        return 0

    def text_flops(self, geometry: Geometry) -> int:
        """Return the FLOPs that deciding about one generated token takes.

        Raises:
            SettingError: If the geometry lacks sizes that this needs.
        """
        return 0
