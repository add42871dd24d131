"""This toolkit in ONNX Runtime, sparse and in its dense form."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dllava_export.benchmark.bundle_session import (
    open_bundle,
)
from dllava_export.benchmark.random_model import RandomModel
from dllava_export.bundles.manifest import read_manifest
from dllava_export.errors import BackendError
from dllava_export.names import IMAGE_PLACEHOLDER_ID
from dllava_export.sparsity import DENSE, Sparsity

__all__ = ["DenseSubject", "SparseSubject"]


class _SessionSubject(abc.ABC):
    """See `subject.SuiteSubject`. The image's features are the embeddings of ordinary tokens.

    The dense form therefore computes what every other subject computes from token ids.
    """

    notes = "image features given: the vision tower is not part of any time"

    def __init__(
        self,
        model: RandomModel,
        sparsity: Sparsity,
        wrap_session: Callable[[Any], Any] = lambda session: session,
    ) -> None:
        import onnxruntime

        from dllava_export.version import __version__

        self.version = f"dllava-export {__version__}, onnxruntime {onnxruntime.__version__}"
        self.session = open_bundle(
            model.bundle, sparsity, model.settings.num_threads, wrap_session
        )
        self._model = model
        self._logits = np.zeros((0, 0), np.float32)
        self._after_prefill = np.zeros((0, 0), np.int64)
        self._prompts: list[np.ndarray] = []
        self._features = np.zeros((0, 0, 0), np.float32)

    @abc.abstractmethod
    def again(self, wrap_session: Callable[[Any], Any]) -> _SessionSubject:
        """Return the same subject with sessions that are wrapped."""

    def prepare(self, batch_size: int) -> None:
        """Make prompts of one image behind the first token."""
        ids = self._model.prompt_ids(batch_size)
        last = 1 + self._model.settings.num_image_tokens
        self._features = self.session.embed(ids[:, 1:last])
        rest = np.delete(ids, np.s_[1:last], axis=1)
        self._prompts = list(np.insert(rest, 1, IMAGE_PLACEHOLDER_ID, axis=1))

    def prefill(self) -> None:
        """Feed the prompts; the buffers of the prefill before are used again."""
        settings = self._model.settings
        num_new = max(self._model.max_tokens - settings.num_prompt_tokens, settings.kv_length)
        result = self.session.prefill(
            self._prompts, image_features=self._features, max_new_tokens=num_new
        )
        self._logits = result.logits
        self._after_prefill = self.session.cache_lengths

    def logits(self) -> np.ndarray:
        """See `subject.SuiteSubject`."""
        return self._logits

    def fill(self, num_generated: int) -> None:
        """Go back to the prompt, then write rows behind it."""
        self.session.rewind(self._after_prefill)
        self.session.fill(num_generated)

    def decode(self) -> None:
        """Feed a token."""
        self.session.decode([self._model.geometry.vocab_size - 1] * len(self._prompts))

    def generate(self) -> tuple[int, float]:
        """Prefill one prompt and feed its answer, each token through the predictor.

        Returns:
            Bytes of the valid cache rows from `sparse_layer` on, and the share of tokens kept.
        """
        self.prepare(1)
        self.prefill()
        prompt_rows = int(self.session.cache_lengths[-1, 0])
        answer = self._model.generated_ids()
        for token in answer:
            self.session.decode([int(token)])
        lengths = self.session.cache_lengths[self._model.settings.sparse_layer :]
        kept = (int(lengths[-1, 0]) - prompt_rows) / len(answer)
        return int(lengths.sum()) * self.session.kv_plan.bytes_per_row, kept

    def kv_bytes(self, num_rows: int) -> int:
        """Return the bytes of so many rows in the caches from `sparse_layer` on, at batch 1."""
        num_layers = self._model.geometry.num_layers - self._model.settings.sparse_layer
        return num_layers * num_rows * self.session.kv_plan.bytes_per_row

    def overhead(self, num_steps: int) -> float:
        """Return the share of decode steps that is not spent inside ONNX Runtime.

        Raises:
            BackendError: If a step is not one run.
        """
        runs: list[_TimedRuns] = []

        def wrap(session: Any) -> Any:
            runs.append(_TimedRuns(session))
            return runs[-1]

        subject = self.again(wrap)
        (timed,) = runs
        subject.prepare(1)
        subject.prefill()
        subject.decode()
        timed.seconds, timed.num_runs = 0.0, 0
        start = time.perf_counter()
        for _ in range(num_steps):
            subject.decode()
        elapsed = time.perf_counter() - start
        subject.session.close()
        if timed.num_runs != num_steps:
            raise BackendError(
                f"{num_steps} decode steps made {timed.num_runs} runs of ONNX Runtime, expected "
                "one each: the backend no longer runs its decoder with bindings."
            )
        return 1 - timed.seconds / elapsed


class SparseSubject(_SessionSubject):
    """The bundle as it is."""

    def again(self, wrap_session: Callable[[Any], Any]) -> SparseSubject:
        """See `_SessionSubject`."""
        return SparseSubject(self._model, wrap_session)

    def __init__(
        self, model: RandomModel, wrap_session: Callable[[Any], Any] = lambda session: session
    ) -> None:
        sparsity = read_manifest(model.bundle, verify=False).sparsity
        super().__init__(model, sparsity, wrap_session)


class DenseSubject(_SessionSubject):
    """The bundle's dense graph."""

    def again(self, wrap_session: Callable[[Any], Any]) -> DenseSubject:
        """See `_SessionSubject`."""
        return DenseSubject(self._model, wrap_session)

    def __init__(
        self, model: RandomModel, wrap_session: Callable[[Any], Any] = lambda session: session
    ) -> None:
        super().__init__(model, DENSE, wrap_session)


class _TimedRuns:
    """Stands before an `InferenceSession` and counts the time inside its runs."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.seconds = 0.0
        self.num_runs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, *args: Any) -> None:
        """Run and count."""
        start = time.perf_counter()
        self._session.run_with_iobinding(*args)
        self.seconds += time.perf_counter() - start
        self.num_runs += 1
