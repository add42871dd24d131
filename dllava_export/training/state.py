"""What a run needs to go on exactly where it was interrupted, in one file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from dllava_export.checkpoints.checkpoint import Checkpoint
from dllava_export.reporting.output_files import replaced_when_complete
from dllava_export.training.settings import TrainingError

__all__ = ["STATE_FILE", "checkpoint_digest", "load_state", "save_state"]

STATE_FILE = "training_state.pt"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a state; the one before it stays until the new one is complete.

    Raises:
        TrainingError: If it cannot be written.
    """
    path = folder / STATE_FILE
    try:
        with (
            replaced_when_complete(path, lambda error: error) as partial,
            partial.open("wb") as file,
        ):
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"{path} could not be written: {error}. The state before it is still there. Free "
            "some space and go on with --resume."
        ) from error


def load_state(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read the state of a run, or return None where there is none yet.

    Args:
        folder: The run's.
        identity: What must be as it was when the state was written: name → value.

    Raises:
        TrainingError: If the file is damaged, or belongs to another run.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["identity"]
        changed = [
            f"{name} was {found.get(name)!r}, is {value!r}"
            for name, value in identity.items()
            if found.get(name) != value
        ]
    # What torch raises for a damaged archive or pickle is of every kind.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TrainingError(
            f"{path} cannot be read ({reason}), expected the state of a run. Remove {folder} "
            "and start anew."
        ) from error
    if changed:
        raise TrainingError(
            f"{folder} holds another run: {'; '.join(changed)}. Resume with what it was started "
            "with, or choose another folder."
        )
    return state


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Return a digest of names, types and sizes of a checkpoint's tensors."""
    entries = sorted(
        (name, source.dtype.name, source.shape) for name, source in checkpoint.tensors.items()
    )
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:12]
