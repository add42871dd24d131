"""transformers' LLaMA with SDPA attention and either of its caches, run eagerly.

That is how `generate` runs it on a CPU: it compiles for a static cache on accelerators only
(`_valid_auto_compile_criteria` in transformers 5.23).
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from dllava_export.benchmark.random_model import RandomModel

__all__ = ["DynamicCacheSubject", "StaticCacheSubject"]


class _TransformersSubject(abc.ABC):
    """See `subject.SuiteSubject`."""

    notes = ""

    def __init__(self, model: RandomModel) -> None:
        torch.set_num_threads(model.settings.num_threads)
        transformers.utils.logging.disable_progress_bar()
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self._model = model
        self._llama: Any = LlamaForCausalLM.from_pretrained(
            model.llama, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self._ids = torch.zeros(0, dtype=torch.int64)
        self._logits = torch.zeros(0)
        self._cache: Any = None

    @abc.abstractmethod
    def _new_cache(self) -> Any: ...

    def prepare(self, batch_size: int) -> None:
        """Drop the cache."""
        self._ids = torch.from_numpy(self._model.prompt_ids(batch_size))
        self._cache = self._new_cache()

    def prefill(self) -> None:
        """Feed the prompts; logits of the last row only."""
        self._logits = self._run(self._ids)

    def logits(self) -> np.ndarray:
        """See `subject.SuiteSubject`."""
        return self._logits[:, -1].numpy()

    def fill(self, num_generated: int) -> None:
        """Append random rows to every layer's cache."""
        geometry = self._model.geometry
        target = self._model.settings.num_prompt_tokens + num_generated
        num_rows = target - int(self._cache.get_seq_length())
        head_dim = geometry.hidden_size // geometry.num_heads
        shape = (len(self._ids), geometry.num_kv_heads, num_rows, head_dim)
        if num_rows <= 0:
            return
        with torch.inference_mode():  # the caches were made in it
            for layer in range(geometry.num_layers):
                self._cache.update(torch.randn(shape), torch.randn(shape), layer)

    def decode(self) -> None:
        """Feed a token."""
        self._run(torch.full((len(self._ids), 1), self._model.geometry.vocab_size - 1))

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            outputs = self._llama(
                input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        return outputs.logits


class DynamicCacheSubject(_TransformersSubject):
    """The default cache: it grows by concatenation."""

    notes = "SDPA, eager"

    def _new_cache(self) -> Any:
        return DynamicCache(config=self._llama.config)


class StaticCacheSubject(_TransformersSubject):
    """The cache of fixed size: attention runs over all of it, under a mask."""

    notes = (
        "SDPA, eager: torch.compile is not used, as `generate` compiles on accelerators only; "
        "the cache has the rows of the longest case throughout"
    )

    def _new_cache(self) -> Any:
        return StaticCache(config=self._llama.config, max_cache_len=self._model.max_tokens)
