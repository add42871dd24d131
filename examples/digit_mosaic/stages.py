"""A stage of training: learning rate, steps, states to go on from, log and its picture."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import torch
from mosaic_data import MAX_DIGITS
from torch import nn
from tqdm import tqdm

__all__ = ["LOG_FILE", "PLOT_FILE", "Stage", "Trainable", "plot_log", "run_stage"]

LOG_FILE = "log.jsonl"
PLOT_FILE = "log.png"
SAVE_EVERY = 120  # seconds


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


class Trainable(Protocol):
    """What a stage trains."""

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        ...

    def __call__(self, stage: Stage, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of a step and what to log."""
        ...


def run_stage(folder: Path, stage: Stage, part: Trainable) -> None:
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
            if time.monotonic() - saved > SAVE_EVERY or step + 1 == stage.steps:
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
    import numpy as np
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
