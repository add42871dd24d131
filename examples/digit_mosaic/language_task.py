"""Teach the decoder to answer, several questions about a mosaic in one sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from mosaic_data import (
    NUM_PATCHES,
    Mosaic,
    Question,
    Split,
    all_questions,
    asked_cell,
    make_mosaic,
    mosaic_rng,
    place_question,
)
from stages import Stage
from torch import nn
from torch.nn import functional
from tower_task import Task, choose_patches, tower_features

from dllava_export.names import IMAGE_PLACEHOLDER_ID
from dllava_export.training.model import TrainingModel

__all__ = ["LanguageTask", "Pack", "PackBatch", "accuracy", "answer_logits"]

_EVALUATION_BATCH = 25


@dataclasses.dataclass(frozen=True)
class Pack:
    """Several questions about one picture in a row, none of which sees another.

    Attributes:
        input_ids: [rows] int64; -200 for patches.
        position_ids: [rows] int64, as if each question were the only one.
        segments: [rows] int64; 0 for what all questions share, then 1, 2, ...
        is_answer: [rows] bool.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    segments: np.ndarray
    is_answer: np.ndarray

    @classmethod
    def make(cls, task: Task, questions: Sequence[Question], patches: np.ndarray) -> Pack:
        """Pack questions behind a system prompt and some patches of a picture."""
        ids, positions, segments, is_answer = [], [], [], []
        for number, question in enumerate(questions, 1):
            whole, answered = task.encode(question.text, question.answer)
            start = int(np.flatnonzero(whole == IMAGE_PLACEHOLDER_ID)[0])
            if number == 1:
                ids += [whole[:start], np.full(len(patches), IMAGE_PLACEHOLDER_ID)]
                positions += [np.arange(start), start + patches]
                segments.append(np.zeros(start + len(patches), np.int64))
                is_answer.append(np.zeros(start + len(patches), bool))
            rest = whole[start + 1 :]
            ids.append(rest)
            positions.append(np.arange(len(rest)) + start + NUM_PATCHES)
            segments.append(np.full(len(rest), number))
            is_answer.append(answered[start + 1 :])
        return cls(*(np.concatenate(part) for part in (ids, positions, segments, is_answer)))


@dataclasses.dataclass(frozen=True)
class PackBatch:
    """Packs padded on the right, with pictures; see `Pack`.

    Attributes:
        input_ids: [batch, rows].
        position_ids: [batch, rows].
        segments: [batch, rows]; -1 for padding.
        is_answer: [batch, rows].
        pixels: [batch, 3, 192, 192].
        patches: [batch, num_patches] int64.
        kinds: For each sample the kinds of its questions.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    is_answer: torch.Tensor
    pixels: torch.Tensor
    patches: torch.Tensor
    kinds: list[list[str]]

    @classmethod
    def make(
        cls,
        task: Task,
        mosaics: Sequence[Mosaic],
        questions: Sequence[Sequence[Question]],
        patches: Sequence[np.ndarray],
    ) -> PackBatch:
        """Pack the questions of each mosaic."""
        packs = [
            Pack.make(task, asked, rows)
            for asked, rows in zip(questions, patches, strict=True)
        ]
        return cls(
            _padded([pack.input_ids for pack in packs], 0),
            _padded([pack.position_ids for pack in packs], 0),
            _padded([pack.segments for pack in packs], -1),
            _padded([pack.is_answer for pack in packs], False),
            task.pixels(mosaics),
            torch.from_numpy(np.stack(patches)),
            [[question.kind for question in asked] for asked in questions],
        )

    @classmethod
    def draw(
        cls,
        task: Task,
        split: Split,
        seed: int,
        indices: Iterable[int],
        num_patches: int = NUM_PATCHES,
    ) -> PackBatch:
        """Make mosaics, and ask all kinds of questions about each, `place` three times."""
        mosaics, questions, patches = [], [], []
        for index in indices:
            rng = mosaic_rng(seed, index)
            mosaic = make_mosaic(rng, split)
            asked = all_questions(mosaic, asked_cell(rng, mosaic))
            asked += [place_question(mosaic, asked_cell(rng, mosaic)) for _ in range(2)]
            mosaics.append(mosaic)
            questions.append(asked)
            patches.append(choose_patches(rng, mosaic, num_patches))
        return cls.make(task, mosaics, questions, patches)


def _padded(rows: Sequence[np.ndarray], value: int) -> torch.Tensor:
    result = np.full((len(rows), max(map(len, rows))), value, rows[0].dtype)
    for target, row in zip(result, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(result)


def answer_logits(model: TrainingModel, batch: PackBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [num, vocab_size] and ids [num] of all tokens of all answers."""
    decoder = model.language_model.model
    whole = torch.arange(NUM_PATCHES).expand(len(batch.pixels), -1)
    with torch.no_grad():  # of whole pictures, as in use
        features = tower_features(model, batch.pixels, whole)
    index = batch.patches[..., None].expand(-1, -1, features.shape[-1])
    features = features.gather(1, index)
    is_image = batch.input_ids == IMAGE_PLACEHOLDER_ID
    embeds = decoder.embed_tokens(batch.input_ids.masked_fill(is_image, 0))
    hidden = embeds.masked_scatter(is_image[..., None], model.projector(features))
    rotary = decoder.rotary_emb(hidden, batch.position_ids)
    mask = _pack_mask(batch.segments)
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    target = batch.is_answer[:, 1:]
    logits = model.language_model.lm_head(decoder.norm(hidden[:, :-1][target]))
    return logits, batch.input_ids[:, 1:][target]


def _pack_mask(segments: torch.Tensor) -> torch.Tensor:
    """Return [batch, 1, rows, rows] bool: earlier rows of the same question or of none."""
    query, key = segments[:, :, None], segments[:, None, :]
    return (((key == 0) & (query >= 0)) | (key == query)).tril()[:, None]


class LanguageTask(nn.Module):
    """Answers to packed questions, with the tower frozen."""

    def __init__(self, model: TrainingModel, task: Task) -> None:
        super().__init__()
        self.model = model
        self._task = task
        # The model's own attention takes no mask, and packs need one.
        model.language_model.config._attn_implementation = "sdpa"

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        parameters = self.named_parameters()
        return {name: p for name, p in parameters if not name.startswith("model.tower.")}

    def forward(self, stage: Stage, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of a step and what to log."""
        batch = PackBatch.draw(
            self._task, "train", stage.seed, stage.indices(step), stage.num_patches
        )
        logits, ids = answer_logits(self.model, batch)
        right = logits.detach().argmax(-1) == ids
        return functional.cross_entropy(logits, ids), {
            "token_accuracy": float(right.float().mean())
        }


def accuracy(
    model: TrainingModel, task: Task, split: Split, seed: int, num_mosaics: int
) -> dict[str, float]:
    """Return the share of answers that are right word for word, by kind of question.

    All tokens of an answer are predicted in one pass behind the right ones before them: an
    answer is right here exactly where the likeliest tokens, one by one, would spell it.
    """
    found: dict[str, list[bool]] = {}
    for start in range(0, num_mosaics, _EVALUATION_BATCH):
        indices = range(start, min(start + _EVALUATION_BATCH, num_mosaics))
        batch = PackBatch.draw(task, split, seed, indices)
        with torch.no_grad():
            logits, ids = answer_logits(model, batch)
        wrong = torch.zeros(batch.is_answer.shape, dtype=torch.bool)
        wrong[:, 1:][batch.is_answer[:, 1:]] = logits.argmax(-1) != ids
        for row, kinds in enumerate(batch.kinds):
            for number, kind in enumerate(kinds, 1):
                is_right = not bool(wrong[row][batch.segments[row] == number].any())
                found.setdefault(kind, []).append(is_right)
    return {kind: float(np.mean(values)) for kind, values in found.items()}
