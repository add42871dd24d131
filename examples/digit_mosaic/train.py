"""Train LLaVA on mosaics of digits, in stages; each can be interrupted and goes on.

    python train.py OUT

| stage | what is trained | on what |
| --- | --- | --- |
| tower | vision tower | which digit each patch belongs to, its cell, its place in reading order |
| language | projector and decoder | packed questions, tower frozen |
| predictors | predictors, and slowly the decoder | conversations, by `dllava_export.training` |
| together | the same, decoder faster | others |
| decoder | the same, decoder fastest | others |

The sparse checkpoint is the mean of the last two: either alone describes mosaics worse.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from language_task import LanguageTask, accuracy
from mosaic_data import NUM_PATCHES, write_conversations
from mosaic_model import write_untrained
from safetensors.torch import load_file, save_file
from stages import LOG_FILE, PLOT_FILE, Stage, Trainable, plot_log, run_stage
from tower_task import Task, TowerTask

from dllava_export.checkpoints.checkpoint import read_checkpoint
from dllava_export.training.loop import train_predictors
from dllava_export.training.model import build_model
from dllava_export.training.output import write_checkpoint
from dllava_export.training.settings import TrainingSettings

__all__ = ["DENSE_FOLDER", "SPARSE_FOLDER", "STAGES", "train", "train_sparse", "write_mean"]

DENSE_FOLDER = "dense"
PREDICTORS_FOLDER = "predictors"
TOGETHER_FOLDER = "together"
DECODER_FOLDER = "decoder"
SPARSE_FOLDER = "sparse"

# Mostly the long answer and the sum: those whose tokens depend on earlier ones.
_KINDS = (
    "describe",
    "sum",
    "count",
    "describe",
    "list",
    "sum",
    "place",
    "describe",
    "sum",
    "largest",
)
NUM_CONVERSATIONS = {PREDICTORS_FOLDER: 2000, TOGETHER_FOLDER: 3200, DECODER_FOLDER: 1600}
_WEIGHTS_FILE = "model.safetensors"
_TEST_SEED = 97
NUM_TEST_MOSAICS = 500
PREDICTOR_SETTINGS = TrainingSettings(
    steps=200,
    batch_size=8,
    predictor_lr=1e-3,
    model_lr=3e-5,
    image_keep_rate=0.2,
    output_text_keep_rate=0.5,
    min_answer_tokens=4,
    sparse_layer=2,
    d_model=96,
    nhead=4,
    dim_feedforward=256,
    num_layers=2,
    precision="fp16",
    checkpoint_every=50,
)
"""The decoder hardly moves at first: predictors that still guess would only confuse it."""

TOGETHER_SETTINGS = dataclasses.replace(
    PREDICTOR_SETTINGS, steps=400, predictor_lr=3e-4, model_lr=1e-4, seed=1
)
"""Then it gets used to what is missing."""

DECODER_SETTINGS = dataclasses.replace(
    PREDICTOR_SETTINGS, steps=200, predictor_lr=1e-4, model_lr=3e-4, seed=2
)
"""At last the decoder moves fastest, over decisions that hardly change any more."""

# Few patches first: steps are several times cheaper, and the decoder learns early that most
# patches may be missing. The whole picture is then a matter of some more steps.
STAGES = (
    Stage("tower", "tower", 2000, 32, 64, 1.5e-3, (1, 9), seed=0),
    Stage("tower-whole", "tower", 300, 16, NUM_PATCHES, 8e-4, seed=5),
    Stage("language", "language", 2000, 8, 64, 2e-3, seed=1),
    Stage("language-whole", "language", 300, 8, NUM_PATCHES, 1e-3, seed=2),
)


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
    parts: dict[str, Trainable] = {
        "tower": TowerTask(model, task),
        "language": LanguageTask(model, task),
    }
    for stage in stages:
        run_stage(folder, stage, parts[stage.part])
    (folder / DENSE_FOLDER).mkdir(exist_ok=True)
    write_checkpoint(folder / DENSE_FOLDER, model, checkpoint, None, settings)
    plot_log(folder / LOG_FILE, folder / PLOT_FILE)
    return accuracy(model, task, "test", _TEST_SEED, NUM_TEST_MOSAICS)


def train_sparse(folder: Path) -> None:
    """Train predictors from `dense`, and write `sparse`, a Dynamic-LLaVA."""
    steps = (
        (DENSE_FOLDER, PREDICTORS_FOLDER, PREDICTOR_SETTINGS, 3),
        (PREDICTORS_FOLDER, TOGETHER_FOLDER, TOGETHER_SETTINGS, 4),
        (TOGETHER_FOLDER, DECODER_FOLDER, DECODER_SETTINGS, 5),
    )
    for source, target, settings, data_seed in steps:
        if (folder / target / "config.json").is_file():
            continue
        data = folder / f"conversations_{target}"
        if not (data / "questions.json").is_file():
            num_conversations = NUM_CONVERSATIONS[target]
            write_conversations(data, "train", data_seed, num_conversations, kinds=_KINDS)
        report = train_predictors(
            folder / source,
            data / "questions.json",
            folder / target,
            settings,
            resume=True,
            progress=True,
        )
        print(report.to_text())
    write_mean(folder / TOGETHER_FOLDER, folder / DECODER_FOLDER, folder / SPARSE_FOLDER)


def write_mean(first: Path, second: Path, out: Path) -> None:
    """Write a checkpoint whose weights are the means of those of two others.

    Args:
        first: A checkpoint of one safetensors file; all other files are taken from it.
        second: One of the same shapes.
        out: Where to; appears when it is complete.
    """
    partial = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(first, partial, ignore=shutil.ignore_patterns("training_log.*"))
    ours, theirs = (load_file(path / _WEIGHTS_FILE) for path in (first, second))
    means = {
        name: ((ours[name].float() + theirs[name].float()) / 2).to(ours[name].dtype)
        for name in ours
    }
    save_file(means, partial / _WEIGHTS_FILE, metadata={"format": "pt"})
    partial.rename(out)


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
