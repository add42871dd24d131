"""onnxruntime-genai on the model that its own builder makes of the dense decoder."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from dllava_export.benchmark.random_model import RandomModel
from dllava_export.errors import BackendError

__all__ = ["GenaiSubject"]


class GenaiSubject:
    """See `subject.SuiteSubject`."""

    notes = (
        "model of its own builder, fp32 for the CPU, logits of the last row only "
        "(prune_lm_head); greedy search, shared past and present buffers"
    )

    def __init__(self, model: RandomModel) -> None:
        version = importlib.metadata.version("onnxruntime-genai")
        self.version = f"onnxruntime-genai {version}"
        config = og.Config(str(_folder(model)))
        threads = {"intra_op_num_threads": model.settings.num_threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = model
        self._og_model = og.Model(config)
        self._generator: Any = None
        self._batch_size = 0
        self._logits = np.zeros((0, 0), np.float32)

    @staticmethod
    def make_files(model: RandomModel) -> None:
        """Run the package's model builder on `model.llama`.

        Raises:
            BackendError: If it fails.
        """
        builder = (sys.executable, "-m", "onnxruntime_genai.models.builder")
        places = ("-i", str(model.llama), "-o", str(_folder(model)), "-c", str(model.scratch))
        options = ("-p", "fp32", "-e", "cpu", "--extra_options", "prune_lm_head=true")
        done = subprocess.run(
            (*builder, *places, *options),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise BackendError(f"onnxruntime-genai's model builder failed: {lines[-1]}")

    def prepare(self, batch_size: int) -> None:
        """Make a generator: its caches are its own."""
        self._batch_size = batch_size
        self._generator = None  # before the next takes as much
        params = og.GeneratorParams(self._og_model)
        length = self._model.max_tokens
        params.set_search_options(
            batch_size=batch_size, max_length=length, min_length=length, do_sample=False
        )
        self._generator = og.Generator(self._og_model, params)

    def prefill(self) -> None:
        """Append the prompts, which runs the decoder."""
        self._append(self._model.prompt_ids(self._batch_size))

    def logits(self) -> np.ndarray:
        """See `subject.SuiteSubject`."""
        return np.asarray(self._generator.get_logits())[:, -1].astype(np.float32)

    def fill(self, num_generated: int) -> None:
        """Start anew with a longer prompt: a batch of several takes only one prompt."""
        self.prepare(self._batch_size)
        self._append(self._model.prompt_ids(self._batch_size, num_generated))
        self._generator.generate_next_token()  # picks from the prompt's logits, runs nothing

    def decode(self) -> None:
        """Run the decoder on the token picked last, and pick the next."""
        self._generator.generate_next_token()

    def _append(self, ids: np.ndarray) -> None:
        self._generator.append_tokens(ids.astype(np.int32))


def _folder(model: RandomModel) -> Path:
    return model.scratch / "genai"
