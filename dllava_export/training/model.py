"""The model in training: transformers' modules, with the predictors' decisions as a soft mask.

    pixel values ► tower ► projector ─┐
    token ids ─► embedding ───────────┴► layers below sparse_layer ► predictors ► keep mask
                                                     └► layers from sparse_layer on ► loss

Nothing is removed: all rows go through all layers, and from `sparse_layer` on attention leaves
out the rows that the keep mask drops.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionModel, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dllava_export.errors import UnsupportedModelError
from dllava_export.families.clip_tower import (
    canonical_tower_name,
    clip_features,
    projector_module,
)
from dllava_export.families.llava import LlavaSpec
from dllava_export.families.predictors import (
    ImagePredictor,
    OutputTextPredictor,
    Predictors,
    init_predictor,
    sample_keep_mask,
)
from dllava_export.training.data import IGNORED_LABEL, Batch
from dllava_export.training.masked_attention import ATTENTION_NAME
from dllava_export.training.settings import TrainingSettings

if TYPE_CHECKING:
    from dllava_export.checkpoints.checkpoint import Checkpoint
    from dllava_export.geometry import PredictorConfig


__all__ = ["PREDICTORS", "Losses", "TrainingModel", "build_model", "canonical_name"]

PREDICTORS = ("image_predictor.", "output_text_predictor.")
"""Prefixes of the predictors' parameters, in the model and in canonical names."""

ChooseKeepMask = Callable[[torch.Tensor], torch.Tensor]
"""From the residual stream [batch, rows, hidden_size] to a keep mask [batch, rows] float32."""


@dataclasses.dataclass(frozen=True)
class Losses:
    """What one forward pass gives.

    Attributes:
        ce: Cross entropy of the answers' tokens, mean over tokens.
        image_mask: Weighted squared error of the image keep rates, mean over images.
        text_mask: Weighted squared error of the answers' keep rates, mean over samples; short
            answers count as 0.
        image_keep_rate: Share of image tokens kept; None without images or predictor.
        text_keep_rate: Share of tokens kept in answers that are long enough; None without any.
    """

    ce: torch.Tensor
    image_mask: torch.Tensor
    text_mask: torch.Tensor
    image_keep_rate: float | None
    text_keep_rate: float | None

    @property
    def total(self) -> torch.Tensor:
        """What is minimised."""
        return self.ce + self.image_mask + self.text_mask


class TrainingModel(nn.Module):
    """LLaVA with predictors. Made by `build_model`.

    Attributes:
        tower: transformers' CLIP tower.
        projector: Linear layers with activations in between.
        language_model: transformers' LLaMA.
        image_predictor: None in a plain LLaVA.
        output_text_predictor: None where answers are kept whole.
    """

    image_predictor: ImagePredictor | None
    output_text_predictor: OutputTextPredictor | None

    def __init__(
        self,
        spec: LlavaSpec,
        predictors: PredictorConfig | None,
        settings: TrainingSettings,
    ) -> None:
        super().__init__()
        config = copy.deepcopy(spec.text_config)
        config._attn_implementation = ATTENTION_NAME
        tower_config = copy.deepcopy(spec.vision_config)
        tower_config._attn_implementation = "sdpa"
        self.tower = CLIPVisionModel(tower_config)
        self.projector = projector_module(spec.projector)
        self.language_model = LlamaForCausalLM(config)
        hidden_size = config.hidden_size
        self.image_predictor = self.output_text_predictor = None
        if predictors is not None:
            modules = Predictors(hidden_size, predictors)
            self.image_predictor = modules.image_predictor
            self.output_text_predictor = modules.output_text_predictor
        self._predictors = predictors
        self._settings = settings
        self._feature_layer = spec.feature_layer
        self._compute_dtype = torch.float32

    def forward(self, batch: Batch, tau: float, generator: torch.Generator) -> Losses:
        """Return the losses of a batch, with sampled decisions.

        Args:
            batch: On the model's device.
            tau: Temperature of the decisions.
            generator: Of the decisions; of the CPU.
        """
        image_mask = text_mask = None

        def choose(hidden: torch.Tensor) -> torch.Tensor:
            nonlocal image_mask, text_mask
            keep_mask, image_mask, text_mask = self.sample_masks(hidden, batch, tau, generator)
            return keep_mask

        embeds = self.embed(batch)
        hidden = self.decode(embeds, None if self._predictors is None else choose)
        ce = self._cross_entropy(hidden, batch.labels)
        weight = self._settings.mask_loss_weight
        image_error, image_rate = self._image_error(image_mask)
        text_error, text_rate = self._text_error(text_mask, batch.is_answer)
        return Losses(ce, weight * image_error, weight * text_error, image_rate, text_rate)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Return token embeddings with image features in place, [batch, rows, hidden_size]."""
        is_image = batch.is_image
        ids = batch.input_ids.masked_fill(is_image, 0)
        embeds = self.language_model.model.embed_tokens(ids)
        if batch.pixel_values is None:
            return embeds
        with self._mixed_precision():
            with torch.set_grad_enabled(
                torch.is_grad_enabled() and not self._settings.freeze_tower
            ):
                pixels = batch.pixel_values.to(next(self.tower.parameters()).dtype)
                features = clip_features(self.tower, pixels, self._feature_layer)
            features = self.projector(features.to(next(self.projector.parameters()).dtype))
        return embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))

    def decode(
        self,
        embeds: torch.Tensor,
        choose_keep_mask: ChooseKeepMask | None,
    ) -> torch.Tensor:
        """Run all decoder layers over all rows.

        Args:
            embeds: [batch, rows, hidden_size].
            choose_keep_mask: Called with the residual stream before layer `sparse_layer`; what
                it returns acts from there on. None keeps everything.

        Returns:
            [batch, rows, hidden_size], after the last norm.
        """
        decoder = self.language_model.model
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
        rotary = decoder.rotary_emb(embeds, positions)
        sparse_layer = self._predictors.sparse_layer if self._predictors else None
        hidden = embeds
        keep_mask = None
        with self._mixed_precision():
            for index, layer in enumerate(decoder.layers):
                if index == sparse_layer and choose_keep_mask is not None:
                    with torch.autocast(hidden.device.type, enabled=False):
                        keep_mask = choose_keep_mask(hidden)
                hidden = self._run_layer(layer, hidden, rotary, keep_mask)
            return decoder.norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [..., vocab_size], float32, of hidden states after the last norm."""
        with self._mixed_precision():
            return self.language_model.lm_head(hidden).float()

    def sample_masks(
        self, hidden: torch.Tensor, batch: Batch, tau: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Decide which tokens to keep.

        Args:
            hidden: [batch, rows, hidden_size]. Residual stream before `sparse_layer`.
            batch: Says where images and answers are.
            tau: Temperature.
            generator: Of the CPU.

        Returns:
            [batch, rows], float32: keep mask; 1 for prompt text and short answers.
            [num_images, num_image_tokens], float32: its image rows; None without images.
            [batch, rows], float32: its answer rows, 0 elsewhere and for short answers; None
            where answers are kept whole.
        """
        hidden = hidden.float()
        keep_mask = torch.ones(hidden.shape[:2], device=hidden.device)
        image_mask = text_mask = None
        if self.image_predictor is not None and batch.pixel_values is not None:
            num_images = len(batch.pixel_values)
            image_rows = hidden[batch.is_image].view(num_images, -1, hidden.shape[-1])
            image_mask = sample_keep_mask(self.image_predictor(image_rows), tau, generator)
            keep_mask = keep_mask.masked_scatter(batch.is_image, image_mask)
        if self.output_text_predictor is not None:
            sampled = self._long_answers(batch.is_answer)
            logits = self.output_text_predictor(hidden[sampled])
            decided = sample_keep_mask(logits, tau, generator)
            text_mask = torch.zeros_like(keep_mask).masked_scatter(sampled, decided)
            keep_mask = torch.where(sampled, text_mask, keep_mask)
        return keep_mask, image_mask, text_mask

    def _run_layer(
        self,
        layer: nn.Module,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keep_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        if self._settings.gradient_checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(
                layer,
                hidden,
                position_embeddings=rotary,
                keep_mask=keep_mask,
                use_reentrant=False,
            )
        return layer(hidden, position_embeddings=rotary, keep_mask=keep_mask)

    def _long_answers(self, is_answer: torch.Tensor) -> torch.Tensor:
        """Return [batch, rows] bool: answers of at least `min_answer_tokens` tokens."""
        is_long = is_answer.sum(1, keepdim=True) >= self._settings.min_answer_tokens
        return is_answer & is_long

    def _cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean over labelled tokens; each is predicted by the row before it."""
        is_labelled = labels[:, 1:] != IGNORED_LABEL
        logits = self.logits(hidden[:, :-1][is_labelled])  # [num_labelled, vocab_size]
        return functional.cross_entropy(logits, labels[:, 1:][is_labelled])

    def _image_error(self, mask: torch.Tensor | None) -> tuple[torch.Tensor, float | None]:
        if mask is None or self._predictors is None:
            return self._zero(), None
        rates = mask.mean(1)  # [num_images]
        error = (self._predictors.vision_keep_rate - rates).square().mean()
        return error, float(rates.detach().mean())

    def _text_error(
        self, mask: torch.Tensor | None, is_answer: torch.Tensor
    ) -> tuple[torch.Tensor, float | None]:
        if mask is None or self._predictors is None:
            return self._zero(), None
        sampled = self._long_answers(is_answer)
        is_long = sampled.any(1)
        rates = mask.sum(1) / sampled.sum(1).clamp_min(1)  # [batch]
        errors = (self._predictors.output_text_keep_rate - rates).square()
        error = torch.where(is_long, errors, 0).mean()  # over short answers too
        if not is_long.any():
            return error, None
        return error, float(rates.detach()[is_long].mean())

    def _zero(self) -> torch.Tensor:
        return torch.zeros((), device=next(self.parameters()).device)

    @contextlib.contextmanager
    def _mixed_precision(self) -> Iterator[None]:
        device = next(self.parameters()).device.type
        enabled = self._compute_dtype != torch.float32
        with torch.autocast(device, self._compute_dtype if enabled else None, enabled):
            yield


def build_model(
    checkpoint: Checkpoint,
    predictors: PredictorConfig | None,
    settings: TrainingSettings,
    device: torch.device,
) -> TrainingModel:
    """Load a checkpoint for training; predictors that it lacks are drawn from the seed.

    Args:
        checkpoint: From `read_checkpoint` or `random_checkpoint`.
        predictors: What to train, from `resolve_predictors`.
        settings: Of the run.
        device: Where to.

    Returns:
        The model; `requires_grad` is set for what shall be trained.

    Raises:
        UnsupportedModelError: If the checkpoint is of another family than LLaVA.
    """
    spec = checkpoint.spec
    if not isinstance(spec, LlavaSpec):
        raise UnsupportedModelError(
            f"{checkpoint.path} is a checkpoint of the family {checkpoint.family.name!r}, "
            "expected 'llava': other models cannot be run in PyTorch yet. Use a LLaVA-1.5 or "
            "Dynamic-LLaVA checkpoint."
        )
    default = "bf16" if device.type == "cuda" else "fp32"
    is_mixed = (settings.compute_precision or default) == "bf16"
    with torch.device("meta"):  # the weights come from the checkpoint
        model = TrainingModel(spec, predictors, settings)
    if is_mixed:
        model._compute_dtype = torch.bfloat16
    state = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        is_trained = _is_trained(name, settings)
        parameter.requires_grad_(is_trained)
        source = checkpoint.tensors.get(canonical_name(name))
        if source is None:  # a new predictor
            state[name] = torch.empty(parameter.shape, device=device)
            continue
        values = torch.from_numpy(np.array(source.read(), np.float32))
        dtype = torch.bfloat16 if is_mixed and not is_trained else torch.float32
        state[name] = values.to(device, dtype)
    model.load_state_dict(state, assign=True)
    model.language_model.tie_weights()
    _init_new_predictors(model, checkpoint.tensors, settings.seed)
    _restore_buffers(model, device)
    return model.train()


def canonical_name(name: str) -> str:
    """Return the canonical name of a parameter of the model; see `families.family`."""
    return canonical_tower_name(name.removeprefix("language_model."))


def _is_trained(name: str, settings: TrainingSettings) -> bool:
    if name.startswith(PREDICTORS):
        return True
    return not (settings.freeze_tower if name.startswith("tower.") else settings.freeze_model)


def _init_new_predictors(
    model: TrainingModel, tensors: Mapping[str, object], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for prefix, predictor in (
        ("image_predictor", model.image_predictor),
        ("output_text_predictor", model.output_text_predictor),
    ):
        if predictor is None or any(name.startswith(f"{prefix}.") for name in tensors):
            continue
        device = next(predictor.parameters()).device
        with torch.no_grad():
            init_predictor(predictor.cpu(), generator)  # the same numbers on all devices
        predictor.to(device)


def _restore_buffers(model: TrainingModel, device: torch.device) -> None:
    """Fill in what no checkpoint stores: rotary frequencies and positions of the tower."""
    decoder = model.language_model.model
    decoder.rotary_emb = LlamaRotaryEmbedding(model.language_model.config).to(device)
    for module in model.tower.modules():
        positions = dict(module.named_buffers(recurse=False)).get("position_ids")
        if positions is not None:
            module.position_ids = torch.arange(positions.shape[-1], device=device)[None]
