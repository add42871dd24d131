"""llama.cpp through llama-cpp-python's low-level functions, on a GGUF file."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from dllava_export.benchmark.gguf_file import write_gguf
from dllava_export.benchmark.random_model import RandomModel
from dllava_export.errors import BackendError

__all__ = ["LlamaCppSubject"]

_ROW_MULTIPLE = 256
_LOG_NOTHING = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C holds no reference


class LlamaCppSubject:
    """See `subject.SuiteSubject`."""

    notes = "F32 weights and F32 KV cache, the package built from source, memory-mapped file"

    def __init__(self, model: RandomModel) -> None:
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        path = _path(model)
        llama_cpp.llama_log_set(_LOG_NOTHING, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = model
        self._loaded = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._loaded:
            raise BackendError(f"llama.cpp refuses {path}, a GGUF file of the LLaMA kind.")
        self._context: Any = None
        self._batch_size = 0
        self._rows = 0
        self._last = [0]

    @staticmethod
    def make_files(model: RandomModel) -> None:
        """Write a GGUF file of `model.llama`."""
        write_gguf(model, _path(model))

    def prepare(self, batch_size: int) -> None:
        """Empty the cache; a new batch size gets a context of its own."""
        self._rows = 0
        if batch_size == self._batch_size:
            llama_cpp.llama_memory_clear(self._memory(), True)
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        self._batch_size = batch_size
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = batch_size
        params.n_ctx = params.n_batch = batch_size * _padded(self._model.max_tokens)
        params.n_threads = params.n_threads_batch = self._model.settings.num_threads
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._loaded, params)
        if not self._context:
            raise BackendError(f"llama.cpp made no context for {params.n_ctx} tokens.")

    def prefill(self) -> None:
        """Feed the prompts, one sequence each."""
        prompts = self._model.prompt_ids(self._batch_size)
        self._feed(prompts, range(self._batch_size))

    def logits(self) -> np.ndarray:
        """See `subject.SuiteSubject`."""
        size = self._model.geometry.vocab_size
        rows = []
        for sequence in range(self._batch_size):
            pointer = llama_cpp.llama_get_logits_ith(self._context, self._last[sequence])
            rows.append(np.ctypeslib.as_array(pointer, (size,)).copy())
        return np.stack(rows)

    def fill(self, num_generated: int) -> None:
        """Feed tokens to the first sequence and copy it to the others."""
        target = self._model.settings.num_prompt_tokens + num_generated
        ids = self._model.prompt_ids(1, num_generated)[:, self._rows : target]
        memory = self._memory()
        llama_cpp.llama_memory_seq_rm(memory, -1, self._rows, -1)
        if ids.size:
            self._feed(ids, range(1))
        for other in range(1, self._batch_size):
            llama_cpp.llama_memory_seq_rm(memory, other, -1, -1)
            llama_cpp.llama_memory_seq_cp(memory, 0, other, -1, -1)

    def decode(self) -> None:
        """Feed a token per sequence."""
        ids = np.full((self._batch_size, 1), self._model.geometry.vocab_size - 1)
        self._feed(ids, range(self._batch_size))

    def _memory(self) -> Any:
        return llama_cpp.llama_get_memory(self._context)

    def _feed(self, ids: np.ndarray, sequences: range) -> None:
        """Run over ids [sequences, tokens]; logits of each sequence's last token.

        Raises:
            BackendError: If llama.cpp fails.
        """
        num_tokens = ids.shape[1]
        batch = llama_cpp.llama_batch_init(ids.size, 0, 1)
        batch.n_tokens = ids.size
        for place, (row, sequence) in enumerate(
            (row, sequence) for sequence in sequences for row in range(num_tokens)
        ):
            batch.token[place] = int(ids[sequence, row])
            batch.pos[place] = self._rows + row
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = row == num_tokens - 1
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise BackendError(
                f"llama_decode returned {status} for {ids.size} tokens behind {self._rows} rows."
            )
        llama_cpp.llama_synchronize(self._context)
        self._rows += num_tokens
        self._last = [num_tokens * (index + 1) - 1 for index in range(len(sequences))]


def _padded(num_rows: int) -> int:
    """Return rows of a sequence as llama.cpp allocates them."""
    return -(-num_rows // _ROW_MULTIPLE) * _ROW_MULTIPLE


def _path(model: RandomModel) -> Path:
    return model.scratch / "decoder.gguf"
