"""The decoders the suite measures, and how often."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["GEOMETRIES", "SuiteCase", "SuiteGeometry", "SuiteSettings"]


@dataclasses.dataclass(frozen=True)
class SuiteCase:
    """One batch size.

    Attributes:
        batch_size: Samples, all of the same length.
        prefill_rounds: Turns, in every start, in which every subject prefills once.
        decode_rounds: Turns, in every start and at each length, in which every subject decodes
            some steps.
    """

    batch_size: int
    prefill_rounds: int
    decode_rounds: int


@dataclasses.dataclass(frozen=True)
class SuiteGeometry:
    """Sizes of a decoder and of its predictors.

    Attributes:
        name: Part of file names.
        title: For people.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        vocab_size: Rows of the embedding table.
        ties_embeddings: True where the table is also the last matrix.
        predictor_width: Of both predictors; about an eighth of `hidden_size`, as published.
        predictor_heads: Attention heads of the image predictor.
        cases: Batch sizes and rounds.
        num_starts: How often all processes are started anew: where its memory happens to lie
            makes a process faster or slower for as long as it lives.
    """

    name: str
    title: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    ties_embeddings: bool
    predictor_width: int
    predictor_heads: int
    cases: tuple[SuiteCase, ...]
    num_starts: int

    def llama_config(self) -> dict[str, Any]:
        """Return the decoder as transformers' `LlamaConfig` spells it."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.ties_embeddings,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 8192,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def to_text(self) -> str:
        """Return the sizes in a line."""
        return (
            f"{self.num_layers} layers, hidden {self.hidden_size}, {self.num_heads} heads over "
            f"{self.num_kv_heads} KV heads, MLP {self.intermediate_size}, vocabulary "
            f"{self.vocab_size}; predictors {self.predictor_width} wide"
        )


GEOMETRIES = (
    SuiteGeometry(
        name="smollm2_135m",
        title="SmolLM2-135M's decoder",
        num_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        vocab_size=49152,
        ties_embeddings=True,
        predictor_width=128,
        predictor_heads=4,
        cases=(SuiteCase(1, 2, 3), SuiteCase(4, 1, 3)),
        num_starts=3,
    ),
    SuiteGeometry(
        name="hidden_2048",
        title="A wide decoder of 8 layers",
        num_layers=8,
        hidden_size=2048,
        intermediate_size=5632,
        num_heads=16,
        num_kv_heads=16,
        vocab_size=32000,
        ties_embeddings=False,
        predictor_width=256,
        predictor_heads=8,
        # A prefill takes seconds here.
        cases=(SuiteCase(1, 3, 3), SuiteCase(4, 3, 3)),
        num_starts=1,
    ),
)


@dataclasses.dataclass(frozen=True)
class SuiteSettings:
    """What is measured at every geometry.

    Attributes:
        geometries: The decoders.
        image_tokens_per_side: An image has the square of it as tokens.
        num_text_tokens: Text tokens of the prompt, beside the image.
        decode_lengths: Generated tokens in the cache when decode steps are timed, ascending.
        decode_steps: Timed decode steps of one turn.
        num_threads: CPU threads of every subject.
        sparse_layer: First decoder layer that sees only kept tokens.
        image_keep_rate: Share of image tokens kept.
        output_text_keep_rate: Share of generated tokens kept; the predictor is calibrated to it on
            the tokens that are generated.
        kv_length: Tokens really generated to count the KV bytes that stay.
    """

    geometries: tuple[SuiteGeometry, ...] = GEOMETRIES
    image_tokens_per_side: int = 24
    num_text_tokens: int = 64
    decode_lengths: tuple[int, ...] = (0, 512, 1024, 2048)
    decode_steps: int = 6
    num_threads: int = 2
    sparse_layer: int = 2
    image_keep_rate: float = 0.2
    output_text_keep_rate: float = 0.5
    kv_length: int = 1024

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of the prompt."""
        return self.image_tokens_per_side**2

    @property
    def num_prompt_tokens(self) -> int:
        """All tokens of the prompt."""
        return self.num_image_tokens + self.num_text_tokens

    def max_tokens(self, rounds: int) -> int:
        """Return the rows a cache needs: prompt, longest answer, steps on top of it."""
        steps = rounds * (self.decode_steps + 1)
        return self.num_prompt_tokens + self.decode_lengths[-1] + steps + 1
