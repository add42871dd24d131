"""Train LLaVA on mosaics of digits, in stages; each can be interrupted and goes on.

    python train.py OUT

| stage | what is trained | on what |
| --- | --- | --- |
| tower | vision tower | which digit each patch belongs to, its cell, its place in reading order |
| language | projector and decoder | packed questions, tower frozen |
| predictors | predictors and decoder | conversations, by `dllava_export.training` |
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from mosaic_data import (
    MAX_DIGITS,
    NUM_PATCHES,
    PATCHES_PER_SIDE,
    PLACES,
    Mosaic,
    Question,
    Split,
    all_questions,
    asked_cell,
    make_mosaic,
    mosaic_rng,
    place_question,
    write_conversations,
)
from mosaic_model import write_untrained
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from dllava_export.chat import IMAGE_PLACEHOLDER_ID, ChatTokenizer
from dllava_export.checkpoint import Checkpoint, read_checkpoint
from dllava_export.images import ImageProcessor
from dllava_export.training import train_predictors
from dllava_export.training.model import TrainingModel, build_model
from dllava_export.training.output import write_checkpoint
from dllava_export.training.settings import TrainingSettings

__all__ = ["STAGES", "Stage", "accuracy", "plot_log", "run_stage", "train"]

DENSE_FOLDER = "dense"
SPARSE_FOLDER = "sparse"
LOG_FILE = "log.jsonl"
PLOT_FILE = "log.png"
_SAVE_EVERY = 120  # seconds
_LABELS = ("digit", "cell", "rank")
_NUM_LABELS = (11, len(PLACES), 10)  # ten digits or none; nine ranks or none
_NO_DIGIT = 10
_EVALUATION_BATCH = 25


# One question in three is for the long answer, the only one whose tokens are dropped.
_KINDS = (
    "describe",
    "count",
    "list",
    "describe",
    "place",
    "sum",
    "describe",
    "largest",
    "place",
)
_NUM_CONVERSATIONS = 3000
_DATA_SEED = 3
_TEST_SEED = 97
_NUM_TEST_MOSAICS = 500
PREDICTOR_SETTINGS = TrainingSettings(
    steps=300,
    batch_size=8,
    predictor_lr=1e-3,
    model_lr=1e-4,
    image_keep_rate=0.2,
    output_text_keep_rate=0.5,
    sparse_layer=2,
    d_model=96,
    nhead=4,
    dim_feedforward=256,
    num_layers=2,
    precision="fp16",
    checkpoint_every=50,
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One of the stages, with a learning rate that rises and falls once.

    Attributes:
        name: Of its files.
        part: `tower` or `language`: what is trained.
        steps: Optimizer steps.
        batch_size: Mosaics in a step.
        num_patches: Patches of a mosaic that are looked at, all with ink among them.
        lr: Highest learning rate.
        num_digits: Digits in a mosaic, both inclusive.
        weights: Of the losses on digit, cell and rank, for the tower.
        seed: Of its mosaics.
    """

    name: str
    part: Literal["tower", "language"]
    steps: int
    batch_size: int
    num_patches: int
    lr: float
    num_digits: tuple[int, int] = (1, MAX_DIGITS)
    weights: tuple[float, float, float] = (1.0, 0.1, 0.5)
    seed: int = 0

    def lr_of_step(self, step: int) -> float:
        """Return the learning rate: a short linear rise, then a cosine down to 2 %."""
        warmup = min(100, max(1, self.steps // 10))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    def indices(self, step: int) -> range:
        """Return which mosaics a step sees."""
        return range(step * self.batch_size, (step + 1) * self.batch_size)


# Few patches first: steps are several times cheaper, and the decoder learns early that most
# patches may be missing. The whole picture is then a matter of some more steps.
STAGES = (
    Stage("tower", "tower", 2200, 32, 64, 1.5e-3, (4, 9), (1.0, 0.1, 0.1), seed=0),
    Stage("tower-whole", "tower", 400, 16, NUM_PATCHES, 8e-4, seed=5),
    Stage("language", "language", 2400, 8, 64, 2e-3, seed=1),
    Stage("language-whole", "language", 500, 8, NUM_PATCHES, 1e-3, seed=2),
)


class Task:
    """Makes batches for one checkpoint's tokenizer and image processor."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizer = ChatTokenizer.from_folder(
            checkpoint.path, template="vicuna_v1", image_token_id=checkpoint.image_token_id
        )
        processor = ImageProcessor.from_config(
            checkpoint.preprocessor, checkpoint.image_aspect_ratio
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


def run_stage(folder: Path, stage: Stage, part: TowerTask | LanguageTask) -> None:
    """Do the steps of a stage that are left, or take over its result where it is done.

    Args:
        folder: Gets the stage's state, every two minutes and at its end, and its log.
        stage: Which.
        part: What is trained; changed in place.
    """
    parameters = part.trained()
    optimizer = _optimizer(parameters.values())
    path = folder / f"{stage.name}.pt"
    first = 0
    if path.is_file():
        first = _restore(torch.load(path), parameters, optimizer)
    saved = time.monotonic()
    with (
        _open_log(folder / LOG_FILE, stage.name, first) as log,
        tqdm(total=stage.steps, initial=first, desc=stage.name) as bar,
    ):
        for step in range(first, stage.steps):
            start = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = stage.lr_of_step(step)
            loss, extra = part(stage, step)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds = round(time.monotonic() - start, 3)
            entry = {"stage": stage.name, "step": step + 1, "loss": loss.item(), **extra}
            log.write(json.dumps({**entry, "seconds": seconds}) + "\n")
            log.flush()
            bar.set_postfix({key: f"{value:.3f}" for key, value in extra.items()})
            bar.update()
            if time.monotonic() - saved > _SAVE_EVERY or step + 1 == stage.steps:
                _save(path, step + 1, parameters, optimizer)
                saved = time.monotonic()


def _open_log(path: Path, stage: str, num_steps: int) -> IO[str]:
    """Open the log; steps of this stage that were done after its last save go away."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    entries = [json.loads(line) for line in lines]
    kept = [
        entry for entry in entries if entry["stage"] != stage or entry["step"] <= num_steps
    ]
    log = path.open("w", encoding="utf-8")
    log.writelines(json.dumps(entry) + "\n" for entry in kept)
    return log


def _optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    chosen = list(parameters)
    groups = [
        {"params": [p for p in chosen if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in chosen if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def _save(
    path: Path, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW
) -> None:
    state = {"step": step, "parameters": parameters, "optimizer": optimizer.state_dict()}
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _restore(
    state: dict[str, Any], parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW
) -> int:
    """Return the steps that are done."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def plot_log(path: Path, picture: Path) -> None:
    """Draw the loss of each stage, every step in a pale tone and a moving mean over it."""
    from matplotlib.figure import Figure

    losses: dict[str, list[float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        losses.setdefault(entry["stage"], []).append(entry["loss"])
    figure = Figure(figsize=(1 + 3 * len(losses), 3.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(losses), squeeze=False)[0]
    for axes, (stage, values) in zip(panels, losses.items(), strict=True):
        width = math.ceil(len(values) / 40)
        means = np.convolve(values, np.full(width, 1 / width), mode="valid")
        axes.plot(
            range(1, len(values) + 1), values, color="#2a6fbb", alpha=0.25, linewidth=0.8
        )
        axes.plot(range(width, len(values) + 1), means, color="#2a6fbb", linewidth=1.8)
        axes.set_title(stage, loc="left", fontweight="bold", fontsize=10)
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss")
    figure.savefig(picture)


def train(folder: Path, stages: Sequence[Stage] = STAGES) -> dict[str, float]:
    """Do all stages that are left, and write `dense`, a plain LLaVA.

    Returns:
        Share of right answers about 500 mosaics of unseen digits, by kind of question.
    """
    start = folder / "untrained"
    if not (start / "config.json").is_file():
        write_untrained(start, seed=0)
    checkpoint = read_checkpoint(start)
    settings = TrainingSettings(train_predictors=False, freeze_tower=False, precision="fp16")
    model = build_model(checkpoint, None, settings, torch.device("cpu"))
    task = Task(checkpoint)
    parts: dict[str, TowerTask | LanguageTask] = {
        "tower": TowerTask(model, task),
        "language": LanguageTask(model, task),
    }
    for stage in stages:
        run_stage(folder, stage, parts[stage.part])
    (folder / DENSE_FOLDER).mkdir(exist_ok=True)
    write_checkpoint(folder / DENSE_FOLDER, model, checkpoint, None, settings)
    plot_log(folder / LOG_FILE, folder / PLOT_FILE)
    return accuracy(model, task, "test", _TEST_SEED, _NUM_TEST_MOSAICS)


def train_sparse(folder: Path) -> None:
    """Train predictors from `dense`, and write `sparse`, a Dynamic-LLaVA."""
    data = folder / "conversations"
    if not (data / "questions.json").is_file():
        write_conversations(data, "train", _DATA_SEED, _NUM_CONVERSATIONS, kinds=_KINDS)
    report = train_predictors(
        folder / DENSE_FOLDER,
        data / "questions.json",
        folder / SPARSE_FOLDER,
        PREDICTOR_SETTINGS,
        resume=True,
        progress=True,
    )
    print(report.to_text())


def main() -> None:
    """Train, and say how good it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for states and checkpoints")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / DENSE_FOLDER / "config.json").is_file():
        for kind, share in train(out).items():
            print(f"{kind:10} {share:.1%}")
    if not (out / SPARSE_FOLDER / "config.json").is_file():
        train_sparse(out)


if __name__ == "__main__":
    main()
