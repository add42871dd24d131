"""What is pruned, where and how much: the settings every stage of the toolkit shares."""

from __future__ import annotations

import dataclasses
import math

__all__ = ["POLICIES", "Sparsity", "num_kept_tokens"]

POLICIES = ("predictor", "random", "uniform", "norm", "none")


def num_kept_tokens(num_image_tokens: int, keep_rate: float) -> int:
    """Return floor(keep_rate * num_image_tokens), in Python floats as the official code has it.

    At 100 tokens and 0.29 this gives 28; float32 arithmetic would give 29.
    """
    return int(num_image_tokens * keep_rate)


def _check_rate(name: str, rate: float) -> None:
    if not (isinstance(rate, int | float) and math.isfinite(rate) and 0 < rate <= 1):
        raise ValueError(f"{name} must be in (0, 1], got {rate}.")


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """Sparsification settings of one bundle.

    Attributes:
        policy: What scores tokens: `predictor` (trained), `random`, `uniform`, `norm`, or
            `none` for a dense decoder.
        sparse_layer: First decoder layer (0-based) that sees only kept tokens; at least 1.
        image_keep_rate: Share of image tokens kept, in (0, 1].
        image_keep_tokens: Number of image tokens kept; overrides `image_keep_rate`.
        output_text_keep_rate: Expected share of generated tokens whose keys and values are
            stored from `sparse_layer` on, in (0, 1]. At 1.0 there is no keep bit.
    """

    policy: str = "predictor"
    sparse_layer: int = 2
    image_keep_rate: float = 0.2
    image_keep_tokens: int | None = None
    output_text_keep_rate: float = 0.5

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(
                f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}."
            )
        if self.sparse_layer < 1:
            raise ValueError(
                f"sparse_layer must be at least 1, got {self.sparse_layer}: "
                "the predictors read the output of an earlier layer."
            )
        _check_rate("image_keep_rate", self.image_keep_rate)
        _check_rate("output_text_keep_rate", self.output_text_keep_rate)
        if self.image_keep_tokens is not None and self.image_keep_tokens < 1:
            raise ValueError(
                f"image_keep_tokens must be at least 1, got {self.image_keep_tokens}."
            )
        if self.policy == "norm" and self.output_text_keep_rate < 1:
            raise ValueError(
                "policy 'norm' ranks image tokens and has no decision for a single generated "
                f"token, but output_text_keep_rate is {self.output_text_keep_rate}. "
                "Use output_text_keep_rate 1.0, or policy predictor, random or uniform."
            )

    @property
    def is_dense(self) -> bool:
        """True where nothing is pruned and no selection is inserted."""
        return self.policy == "none"

    @property
    def has_keep_bit(self) -> bool:
        """True where generated tokens are pruned from the KV cache."""
        return not self.is_dense and self.output_text_keep_rate < 1

    def num_kept_image_tokens(self, num_image_tokens: int) -> int:
        """Return how many of `num_image_tokens` survive; 0 of 0, where there is no image.

        Raises:
            ValueError: If that would be none, or more than there are.
        """
        if self.is_dense or num_image_tokens == 0:
            return num_image_tokens
        if self.image_keep_tokens is None:
            kept = num_kept_tokens(num_image_tokens, self.image_keep_rate)
        else:
            kept = self.image_keep_tokens
        if not 1 <= kept <= num_image_tokens:
            raise ValueError(
                f"{kept} of {num_image_tokens} image tokens would be kept, expected 1 to "
                f"{num_image_tokens}. Change the image keep rate or the number of kept tokens."
            )
        return kept
