"""What prefill, decode, recompute and generation give."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from dllava_export.prompts.image_sources import ImageSource

__all__ = [
    "NOT_GIVEN",
    "DecodeResult",
    "Generation",
    "ImageInput",
    "NotGiven",
    "OnToken",
    "Piece",
    "PrefillResult",
    "RecomputeResult",
    "TokenLogprob",
]


@dataclasses.dataclass(frozen=True)
class PrefillResult:
    """What a prompt gives.

    Attributes:
        logits: [batch, vocab_size] float32, for the token after the prompt.
        kept_image_indices: [batch, k] int64, ascending, 0-based within the image; -1 for
            samples without an image.
        cache_lengths: [layers, batch] int64, valid rows of each cache.
    """

    logits: np.ndarray
    kept_image_indices: np.ndarray
    cache_lengths: np.ndarray


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """What one token per sample gives.

    Attributes:
        logits: [batch, vocab_size] float32, for the token after it.
        keep: [batch] bool, true where its keys and values stay in every cache.
        forced: [batch] bool, true where the policy wanted to keep it but the sparse caches
            were full.
        cache_lengths: [layers, batch] int64.
    """

    logits: np.ndarray
    keep: np.ndarray
    forced: np.ndarray
    cache_lengths: np.ndarray


@dataclasses.dataclass(frozen=True)
class RecomputeResult:
    """What one pass without a cache gives.

    Attributes:
        logits: [batch, vocab_size] float32, for the token after the last one given.
        num_rows: [batch] int64, rows after selection.
    """

    logits: np.ndarray
    num_rows: np.ndarray


class NotGiven(enum.Enum):
    """What an argument is that was left out, where None says something."""

    NOT_GIVEN = "not given"


NOT_GIVEN = NotGiven.NOT_GIVEN

ImageInput: TypeAlias = "ImageSource"
"""A picture: what `read_image` takes."""

OnToken = Callable[[int, "int | None", str], Any]
"""Called with (sample, token id, text)."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One generated token.

    Attributes:
        text: What it adds to the answer; empty while a character is incomplete, while it may
            be the beginning of a stop string, or without a tokenizer.
        token_id: Its id; None in a last piece with the text that was held back until it was
            clear that the answer ends there.
        sample: Which prompt of the batch it belongs to.
    """

    text: str
    token_id: int | None
    sample: int = 0


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, before temperature and all else that changes the choice.

    Attributes:
        token_id: The generated token.
        logprob: Natural logarithm of its probability.
        top: Token id → the same of the likeliest ones, likeliest first.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclasses.dataclass
class Generation:
    """The answer to one prompt, and what it took.

    Attributes:
        text: The answer; empty without a tokenizer.
        token_ids: Generated ids, the end-of-sequence id not among them; those of a stop string
            are, though the text ends before it.
        logprobs: One for each of them, where `top_logprobs` was given.
        finish_reason: `stop` (end of sequence or stop string), `length` (max_new_tokens or
            cache full), `cancelled` (the stream was closed) or `error` (an exception ended it).
        num_prompt_tokens: Prompt rows, image tokens included.
        num_image_tokens: Image tokens before selection; 0 without an image.
        num_kept_image_tokens: Image tokens after it.
        num_fed_tokens: Generated tokens that were fed back.
        num_kept_tokens: Of those, how many stay in the sparse caches; in recompute mode, how
            many the last pass kept.
        num_forced_drops: Tokens the policy wanted to keep when the sparse caches were full.
            Where there are any, a larger `max_new_tokens`, which sizes the caches, may give
            another answer.
        prefill_seconds: Time to the first token's logits, for the whole batch.
        decode_seconds: Time of all further passes, for the whole batch.
    """

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str = "length"
    num_prompt_tokens: int = 0
    num_image_tokens: int = 0
    num_kept_image_tokens: int = 0
    num_fed_tokens: int = 0
    num_kept_tokens: int = 0
    num_forced_drops: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def to_text(self) -> str:
        """Return a line or two on counts and speed."""
        kept = f"{self.num_kept_image_tokens} of {self.num_image_tokens} image tokens kept"
        image = f", {kept}" if self.num_image_tokens else ""
        steps = self.num_fed_tokens
        speed = f", {steps / self.decode_seconds:.1f} tokens/s" if self.decode_seconds else ""
        lines = [
            f"prompt {self.num_prompt_tokens} tokens{image}; first token after "
            f"{1e3 * self.prefill_seconds:.0f} ms",
            f"generated {len(self.token_ids)} tokens ({self.finish_reason}){speed}; KV of "
            f"{self.num_kept_tokens} of {steps} stays in the sparse layers",
        ]
        if self.num_forced_drops:
            lines.append(
                f"{self.num_forced_drops} tokens were dropped because the sparse KV cache was "
                "full"
            )
        return "\n".join(lines)
