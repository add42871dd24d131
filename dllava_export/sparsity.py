"""What is pruned, where and how much: the settings every stage of the toolkit shares."""

from __future__ import annotations

import dataclasses

from dllava_export.errors import SettingError
from dllava_export.passes.policies.registry import NO_POLICY, POLICIES, text_policy_names
from dllava_export.settings import check_whole_numbers, real_number, whole_number

__all__ = ["DEFAULT_POLICY", "DENSE", "Sparsity", "num_kept_tokens"]

DEFAULT_POLICY = "predictor"


def num_kept_tokens(num_image_tokens: int, keep_rate: float) -> int:
    """Return floor(keep_rate * num_image_tokens), in Python floats as the official code has it.

    At 100 tokens and 0.29 this gives 28; float32 arithmetic would give 29.
    """
    return int(num_image_tokens * keep_rate)


def _check_rate(name: str, rate: float) -> None:
    if not 0 < real_number(name, rate) <= 1:
        raise SettingError(f"{name} must be in (0, 1], got {rate}.")


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """Sparsification settings of one bundle.

    Settings without an effect take their defaults, so that what prunes alike compares equal;
    every dense one is `DENSE`. A policy of another package need not be installed: a bundle
    holds its nodes and runs without it. Who adds nodes asks the registry.

    Attributes:
        policy: What scores image tokens: a name that `passes/policies/registry.py` knows, or
            `none` for a dense decoder.
        sparse_layer: First decoder layer (0-based) that sees only kept tokens; at least 1.
        image_keep_rate: Share of image tokens kept, in (0, 1].
        image_keep_tokens: Number of image tokens kept; overrides `image_keep_rate`.
        output_text_keep_rate: Expected share of generated tokens whose keys and values are
            stored from `sparse_layer` on, in (0, 1]. At 1.0 there is no keep bit.
        output_text_policy: What decides about generated tokens: a name as for `policy`, None for
            `policy` itself; `none` keeps all, as a rate of 1.0 does.
    """

    policy: str = DEFAULT_POLICY
    sparse_layer: int = 2
    image_keep_rate: float = 0.2
    image_keep_tokens: int | None = None
    output_text_keep_rate: float = 0.5
    output_text_policy: str | None = None

    def __post_init__(self) -> None:
        # Layer 0 has no layer before it, whose output policies look at.
        whole_number("sparse_layer", self.sparse_layer, 1)
        _check_rate("image_keep_rate", self.image_keep_rate)
        _check_rate("output_text_keep_rate", self.output_text_keep_rate)
        check_whole_numbers(self, 1, "image_keep_tokens")
        self._normalise()
        if self.output_text_policy == NO_POLICY:
            raise SettingError(
                f"output_text_policy is {NO_POLICY!r}, which keeps all generated tokens, but "
                f"output_text_keep_rate is {self.output_text_keep_rate}. Use "
                "output_text_keep_rate 1.0, or an output_text_policy that decides: "
                f"{', '.join(text_policy_names())}."
            )
        if self.has_keep_bit:
            self._check_text_policy()

    def _normalise(self) -> None:
        values: dict[str, object] = {}
        if self.is_dense:
            values = {field.name: field.default for field in dataclasses.fields(self)}
            values |= {"policy": NO_POLICY, "output_text_keep_rate": 1.0}
        elif self.output_text_policy == self.policy or not self.has_keep_bit:
            values = {"output_text_policy": None}
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the class is frozen

    def _check_text_policy(self) -> None:
        policy = POLICIES.find_built_in(self.text_policy)
        if policy is not None and not policy.decides_text:
            raise SettingError(
                f"policy {policy.name!r} ranks image tokens and has no decision for a single "
                f"generated token, but output_text_keep_rate is {self.output_text_keep_rate}. "
                "Use output_text_keep_rate 1.0, or an output_text_policy: "
                f"{', '.join(text_policy_names())}."
            )

    @property
    def is_dense(self) -> bool:
        """True where nothing is pruned and no selection is inserted."""
        return self.policy == NO_POLICY

    @property
    def has_keep_bit(self) -> bool:
        """True where generated tokens are pruned from the KV cache."""
        return not self.is_dense and self.output_text_keep_rate < 1

    @property
    def text_policy(self) -> str:
        """Name of what decides about generated tokens, where `has_keep_bit`."""
        return self.output_text_policy or self.policy

    @property
    def policy_text(self) -> str:
        """What prunes, for people: the policy, and that of generated tokens if it is another."""
        if self.output_text_policy is None:
            return self.policy
        return f"{self.policy} (generated tokens: {self.output_text_policy})"

    def num_kept_image_tokens(self, num_image_tokens: int) -> int:
        """Return how many of `num_image_tokens` survive; 0 of 0, where there is no image.

        Raises:
            SettingError: If that would be none, or more than there are.
        """
        if self.is_dense or num_image_tokens == 0:
            return num_image_tokens
        if self.image_keep_tokens is None:
            kept = num_kept_tokens(num_image_tokens, self.image_keep_rate)
        else:
            kept = self.image_keep_tokens
        if not 1 <= kept <= num_image_tokens:
            raise SettingError(
                f"{kept} of {num_image_tokens} image tokens would be kept, expected 1 to "
                f"{num_image_tokens}. Change the image keep rate or the number of kept tokens."
            )
        return kept


DENSE = Sparsity(NO_POLICY)
"""Nothing is pruned."""
