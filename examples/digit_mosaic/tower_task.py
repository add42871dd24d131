"""Teach the tower what each patch belongs to, with a read-out that is thrown away afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from mosaic_data import (
    NUM_PATCHES,
    PATCHES_PER_SIDE,
    PLACES,
    Mosaic,
    make_mosaic,
    mosaic_rng,
)
from stages import Stage
from torch import nn
from torch.nn import functional

from dllava_export.checkpoints.checkpoint import Checkpoint
from dllava_export.prompts.images import ImageProcessor
from dllava_export.prompts.tokenizer import ChatTokenizer
from dllava_export.training.model import TrainingModel

__all__ = ["Task", "TowerTask", "choose_patches", "patch_labels", "tower_features"]

_LABELS = ("digit", "cell", "rank")
_NUM_LABELS = (11, len(PLACES), 10)  # ten digits or none; nine ranks or none
_NO_DIGIT = 10


class Task:
    """Makes batches for one checkpoint's tokenizer and image processor."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizer = ChatTokenizer.from_folder(
            checkpoint.path,
            template="vicuna_v1",
            image_token_id=checkpoint.spec.image_token_id,
        )
        processor = ImageProcessor.from_config(
            checkpoint.preprocessor, checkpoint.spec.image_aspect_ratio
        )
        self._mean = 255 * torch.tensor(processor.mean)[:, None, None]
        self._std = 255 * torch.tensor(processor.std)[:, None, None]

    def pixels(self, mosaics: Sequence[Mosaic]) -> torch.Tensor:
        """Return what the image processor makes of mosaics, [batch, 3, 192, 192] float32."""
        pixels = torch.from_numpy(np.stack([mosaic.pixels for mosaic in mosaics]))
        return (pixels.permute(0, 3, 1, 2).float() - self._mean) / self._std

    def encode(self, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids with -200 for the image, and where the answer stands."""
        return self._tokenizer.encode_answered([(question, answer)], image_turn=0)


def choose_patches(rng: np.random.Generator, mosaic: Mosaic, num_patches: int) -> np.ndarray:
    """Return `num_patches` patches, ascending: all with ink, and others by chance."""
    if num_patches == NUM_PATCHES:
        return np.arange(NUM_PATCHES)
    ink, ground = np.flatnonzero(mosaic.has_ink), np.flatnonzero(~mosaic.has_ink)
    others = rng.choice(ground, num_patches - len(ink), replace=False)
    return np.sort(np.concatenate([ink, others]))


def tower_features(
    model: TrainingModel, pixels: torch.Tensor, patches: torch.Tensor
) -> torch.Tensor:
    """Return features of some patches only, [batch, num_patches, vision_hidden].

    Args:
        model: Its last block is never used: features come from the one before.
        pixels: [batch, 3, 192, 192].
        patches: [batch, num_patches] int64. Patches that the tower sees.
    """
    tower = model.tower
    embedded = tower.embeddings(pixels)
    index = patches[..., None].expand(-1, -1, embedded.shape[-1])
    hidden = torch.cat([embedded[:, :1], embedded[:, 1:].gather(1, index)], dim=1)
    hidden = tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    return hidden[:, 1:]


class TowerTask(nn.Module):
    """Labels for patches, and a linear read-out that is thrown away afterwards.

    The first stage is best at digits that lie anywhere, the second at whole pictures.
    """

    def __init__(self, model: TrainingModel, task: Task) -> None:
        super().__init__()
        width = model.tower.config.hidden_size
        self.model = model
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, sum(_NUM_LABELS))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._task = task

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        names = ("model.tower.", "norm.", "head.")
        return {name: p for name, p in self.named_parameters() if name.startswith(names)}

    def forward(self, stage: Stage, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of a step and what to log."""
        mosaics, patches = [], []
        for index in stage.indices(step):
            rng = mosaic_rng(stage.seed, index)
            mosaics.append(make_mosaic(rng, "train", stage.num_digits))
            patches.append(choose_patches(rng, mosaics[-1], stage.num_patches))
        return self._loss(mosaics, torch.from_numpy(np.stack(patches)), stage.weights)

    def _loss(
        self,
        mosaics: Sequence[Mosaic],
        patches: torch.Tensor,
        weights: tuple[float, float, float],
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss on patches, and shares of ink patches that are right."""
        features = tower_features(self.model, self._task.pixels(mosaics), patches)
        labels = torch.from_numpy(np.stack([patch_labels(mosaic) for mosaic in mosaics]))
        labels = labels.gather(
            1, patches[..., None].expand(-1, -1, 3)
        )  # [batch, num_patches, 3]
        logits = self.head(self.norm(features)).split(list(_NUM_LABELS), dim=-1)
        has_ink = labels[..., 0] < _NO_DIGIT
        loss = torch.zeros(())
        logged = {}
        for part, weight in enumerate(weights):
            target = labels[..., part]
            errors = functional.cross_entropy(
                logits[part].transpose(1, 2), target, reduction="none"
            )
            loss = loss + weight * (errors[has_ink].mean() + 0.3 * errors[~has_ink].mean())
            right = logits[part].argmax(-1) == target
            logged[f"{_LABELS[part]}_accuracy"] = float(right[has_ink].float().mean())
        return loss, logged


def patch_labels(mosaic: Mosaic) -> np.ndarray:
    """Return [576, 3] int64: digit (10 for none), cell, rank in reading order (0 for none)."""
    row, column = np.divmod(np.arange(NUM_PATCHES), PATCHES_PER_SIDE)
    cell = row // 8 * 3 + column // 8
    digit, rank = np.full(len(PLACES), _NO_DIGIT), np.zeros(len(PLACES), np.int64)
    for number, (place, value) in enumerate(mosaic.digits.items(), 1):
        digit[place], rank[place] = value, number
    return np.stack(
        [
            np.where(mosaic.has_ink, digit[cell], _NO_DIGIT),
            cell,
            np.where(mosaic.has_ink, rank[cell], 0),
        ],
        axis=1,
    )
