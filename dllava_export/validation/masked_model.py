"""A bundle's model in PyTorch, from its checkpoint: nothing is removed, dropped rows are masked.

    all rows ► layers below sparse_layer ► policy ► keep mask ► layers from sparse_layer on

One forward pass over prompt and answer gives what prefill and every decode step give: a row
that was dropped is masked out of later rows' attention, and still sees itself. The modules are
transformers' own, the policies their NumPy references; nothing here comes from a graph.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dllava_export.errors import InvalidInputError
from dllava_export.families.clip_tower import clip_features
from dllava_export.families.llava import LlavaSpec
from dllava_export.names import GENERATED_TEXT, IMAGE, IMAGE_PLACEHOLDER_ID, PROMPT_TEXT
from dllava_export.passes.policies.base import AttentionArrays, ImageArrays, TextArrays
from dllava_export.passes.policies.registry import POLICIES
from dllava_export.passes.policies.weights import PredictorWeights
from dllava_export.training.masked_attention import masked_attention
from dllava_export.training.model import TrainingModel, build_model
from dllava_export.training.settings import TrainingSettings

if TYPE_CHECKING:
    from dllava_export.bundles.manifest import Manifest
    from dllava_export.checkpoints.checkpoint import Checkpoint
    from dllava_export.geometry import PredictorConfig
    from dllava_export.sparsity import Sparsity


__all__ = ["Forward", "MaskedModel", "Rows", "Selection", "load_masked_model"]

_ATTENTION_NAME = "dllava_masked_recorded"


@dataclasses.dataclass(frozen=True)
class Rows:
    """A prompt with image features in place, and the answer behind it.

    Attributes:
        embeds: [rows, hidden_size] float32.
        is_image: [rows] bool.
        num_prompt: Rows before the answer.
        image_features: [num_image_tokens, hidden_size] float32, or None.
    """

    embeds: torch.Tensor
    is_image: np.ndarray
    num_prompt: int
    image_features: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Selection:
    """What the policy decides.

    Attributes:
        kept: [rows] bool; prompt text is always kept.
        image_scores: [num_image_tokens] float32, higher is kept; None without an image.
        text_scores: [num_steps] float32, what recompute ranks by; None without a keep bit.
        keep_margin: [num_steps] float32, above 0 where a row is kept; None without a keep bit.
    """

    kept: np.ndarray
    image_scores: np.ndarray | None
    text_scores: np.ndarray | None
    keep_margin: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Forward:
    """What a forward pass gives, for all rows.

    Attributes:
        logits: [rows, vocab_size] float32.
        hidden_states: Per layer [rows, hidden_size] float32, what it puts out.
        keys: Per layer [rows, num_kv_heads * head_dim] float32, after rotary embedding.
        values: Likewise.
    """

    logits: np.ndarray
    hidden_states: list[np.ndarray]
    keys: list[np.ndarray]
    values: list[np.ndarray]


class MaskedModel:
    """The model behind a bundle, in float32. Made by `load_masked_model`."""

    def __init__(
        self,
        model: TrainingModel,
        manifest: Manifest,
        feature_layer: int,
        weights: PredictorWeights | None,
    ) -> None:
        self._model = model
        self._weights = weights
        self._sparsity = manifest.sparsity
        self._feature_layer = feature_layer

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._model.language_model.model.layers)

    @torch.inference_mode()
    def rows(
        self,
        input_ids: np.ndarray,
        output_ids: np.ndarray,
        pixel_values: np.ndarray | None,
        image_features: np.ndarray | None,
    ) -> Rows:
        """Embed prompt [t] and answer [num_steps]; one image takes the placeholder's place."""
        if pixel_values is not None:
            features = self._encode_image(torch.from_numpy(pixel_values))
        elif image_features is not None:
            features = torch.from_numpy(image_features)[0].float()
        else:
            features = None
        ids = np.concatenate([input_ids, output_ids])
        is_placeholder = ids == IMAGE_PLACEHOLDER_ID
        embeds = self._model.language_model.model.embed_tokens(
            torch.from_numpy(np.where(is_placeholder, 0, ids))
        )
        is_image = np.zeros(len(ids), bool)
        if features is not None:
            start = int(np.flatnonzero(is_placeholder)[0])
            embeds = torch.cat([embeds[:start], features, embeds[start + 1 :]])
            is_image = np.zeros(len(embeds), bool)
            is_image[start : start + len(features)] = True
        return Rows(
            embeds,
            is_image,
            len(embeds) - len(output_ids),
            None if features is None else features.numpy(),
        )

    def _encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = clip_features(self._model.tower, pixel_values, self._feature_layer)
        return self._model.projector(features)[0]

    @torch.inference_mode()
    def forward(self, rows: Rows, kept: np.ndarray | None) -> tuple[Forward, Selection]:
        """Run all layers over all rows.

        Args:
            rows: From `rows`.
            kept: [rows] bool; None lets the policy decide.

        Returns:
            What the layers give, and what the policy decides or was told.
        """
        decoder = self._model.language_model.model
        positions = torch.arange(len(rows.embeds))[None]
        rotary = decoder.rotary_emb(rows.embeds[None], positions)
        recorded: dict[int, _Attended] = {}
        hidden, mask, states = rows.embeds[None], None, []
        selection = Selection(np.ones(len(rows.embeds), bool), None, None, None)
        for index, layer in enumerate(decoder.layers):
            if index == self._sparsity.sparse_layer and not self._sparsity.is_dense:
                selection = self._select(rows, hidden[0], recorded[index - 1])
                used = selection.kept if kept is None else kept
                mask = torch.from_numpy(used).float()[None]
            hidden = layer(
                hidden, position_embeddings=rotary, keep_mask=mask, recorded=recorded
            )
            states.append(hidden[0].numpy())
        logits = self._model.language_model.lm_head(decoder.norm(hidden))[0]
        attended = [recorded[i] for i in sorted(recorded)]
        num_rows = len(rows.embeds)
        keys = [_by_row(layer.key).reshape(num_rows, -1) for layer in attended]
        values = [_by_row(layer.value).reshape(num_rows, -1) for layer in attended]
        return Forward(logits.numpy(), states, keys, values), selection

    def _select(self, rows: Rows, hidden: torch.Tensor, before: _Attended) -> Selection:
        kept = np.ones(len(hidden), bool)
        image_scores = text_scores = margin = None
        if rows.is_image.any():
            image_scores = self._score_image(rows, hidden, before)
            num_kept = self._sparsity.num_kept_image_tokens(len(image_scores))
            best = np.argsort(-image_scores, kind="stable")[:num_kept]  # ties: lower index
            kept[rows.is_image] = np.isin(np.arange(len(image_scores)), best)
        if self._sparsity.has_keep_bit:
            text_scores, margin = self._score_text(rows, hidden[rows.num_prompt :])
            kept[rows.num_prompt :] = margin > 0
        return Selection(kept, image_scores, text_scores, margin)

    def _score_image(self, rows: Rows, hidden: torch.Tensor, before: _Attended) -> np.ndarray:
        positions = np.flatnonzero(rows.is_image)
        kinds = np.where(rows.is_image, IMAGE, PROMPT_TEXT)
        kinds[rows.num_prompt :] = GENERATED_TEXT
        image_rows = ImageArrays(
            hidden_states=hidden.numpy()[positions],
            position_ids=positions,
            num_kept=self._sparsity.num_kept_image_tokens(len(positions)),
            attention=AttentionArrays(
                query=_by_row(before.query),
                key=_by_row(before.key),
                scale=before.scale,
                token_kind=kinds,
            ),
        )
        return POLICIES.get(self._sparsity.policy).reference(image_rows, self._weights)

    def _score_text(self, rows: Rows, hidden: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        generated = TextArrays(
            hidden_states=hidden.numpy(),
            position_ids=rows.num_prompt + np.arange(len(hidden)),
        )
        policy = POLICIES.get(self._sparsity.text_policy)
        rate = self._sparsity.output_text_keep_rate
        return policy.reference_keep(generated, rate, self._weights)


def load_masked_model(checkpoint: str, manifest: Manifest) -> MaskedModel:
    """Load the checkpoint that a bundle was exported from, in float32 on the CPU.

    Raises:
        CheckpointError: If it cannot be read.
        InvalidInputError: If it is of other sizes than the bundle, or lacks its predictors.
        SettingError: If the package that provides the bundle's policy is not installed.
    """
    from dllava_export.checkpoints.checkpoint import read_checkpoint

    source, num_layers = read_checkpoint(checkpoint), manifest.geometry.num_layers
    if source.spec.num_layers > num_layers:  # the bundle was cut too
        source = read_checkpoint(checkpoint, num_decoder_layers=num_layers)
    _check_fits(checkpoint, source.spec.text_config, manifest)
    predictors = _needed_predictors(checkpoint, source, manifest.sparsity)
    settings = TrainingSettings(
        freeze_model=True, compute_precision="fp32", gradient_checkpointing=False
    )
    model = build_model(source, predictors, settings, torch.device("cpu")).eval()
    model.language_model.config._attn_implementation = _ATTENTION_NAME
    weights = None if predictors is None else _predictor_weights(model, predictors)
    assert isinstance(source.spec, LlavaSpec)  # else `build_model` refused it
    return MaskedModel(model, manifest, source.spec.feature_layer, weights)


def _needed_predictors(
    location: str, source: Checkpoint, sparsity: Sparsity
) -> PredictorConfig | None:
    """Return how a checkpoint's predictors are made, or None where no policy needs them."""
    if sparsity.is_dense:
        return None
    needs_image = POLICIES.get(sparsity.policy).needs_predictors
    needs_text = sparsity.has_keep_bit and POLICIES.get(sparsity.text_policy).needs_predictors
    if not (needs_image or needs_text):
        return None
    found = source.spec.predictors
    lacks_image = found is None or not found.use_vision_predictor
    lacks_text = found is None or not found.has_output_text
    if (needs_image and lacks_image) or (needs_text and lacks_text):
        raise InvalidInputError(
            f"{location} lacks predictors that the bundle has. Give the checkpoint that "
            "the bundle's predictors came from."
        )
    return found


def _predictor_weights(model: TrainingModel, config: PredictorConfig) -> PredictorWeights:
    modules = {
        "image_predictor": model.image_predictor,
        "output_text_predictor": model.output_text_predictor,
    }
    tensors = {
        f"{prefix}.{name}": value.numpy()
        for prefix, module in modules.items()
        if module is not None
        for name, value in module.state_dict().items()
    }
    return PredictorWeights(tensors, config.nhead)


def _check_fits(checkpoint: str, config: Any, manifest: Manifest) -> None:
    geometry = manifest.geometry
    expected = {
        "num_hidden_layers": geometry.num_layers,
        "hidden_size": geometry.hidden_size,
        "num_attention_heads": geometry.num_heads,
        "num_key_value_heads": geometry.num_kv_heads,
        "vocab_size": geometry.vocab_size,
    }
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise InvalidInputError(
                f"{checkpoint} has {name} {getattr(config, name)}, the bundle {value}. Give "
                "the checkpoint that the bundle was exported from."
            )


@dataclasses.dataclass(frozen=True)
class _Attended:
    """What one layer attended with: [1, heads, rows, head_dim], rotated, before groups."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float


def _by_row(tensor: torch.Tensor) -> np.ndarray:
    """Return [1, heads, rows, head_dim] as [rows, heads, head_dim]."""
    return tensor[0].transpose(0, 1).numpy()


def _recorded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    recorded: dict[int, _Attended],
    scaling: float,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Remember by layer what attention gets, then attend as in training."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    recorded[layer] = _Attended(query, key, value, scaling)
    return masked_attention(
        module, query, key, value, attention_mask, scaling=scaling, **settings
    )


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION_NAME, _recorded_attention)
