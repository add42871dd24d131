"""What a user asks of sparsification, completed by what the model was trained for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dllava_export.errors import SettingError, UnsupportedModelError
from dllava_export.passes.policies.registry import (
    NO_POLICY,
    POLICIES,
    check_text_policy,
    untrained_policy_names,
)
from dllava_export.sparsity import DEFAULT_POLICY, DENSE, Sparsity

if TYPE_CHECKING:
    from dllava_export.geometry import PredictorConfig
    from dllava_export.passes.policies.base import Policy

__all__ = ["SparsityOptions", "complete_sparsity", "untrained_choices"]


@dataclasses.dataclass(frozen=True)
class SparsityOptions:
    """What a user asked for; None means: as the checkpoint was trained, else the defaults."""

    policy: str | None = None
    sparse_layer: int | None = None
    image_keep_rate: float | None = None
    image_keep_tokens: int | None = None
    output_text_keep_rate: float | None = None
    output_text_policy: str | None = None


def untrained_choices() -> str:
    """Return what to choose where there are no predictors, for messages."""
    names = ", ".join(untrained_policy_names())
    return f"--policy {names}, or {NO_POLICY} for a dense decoder"


def complete_sparsity(
    options: SparsityOptions,
    trained: PredictorConfig | None,
    *,
    num_layers: int,
    num_image_tokens: int,
    source: str,
    remedy: str,
) -> Sparsity:
    """Fill in what the user left open, as the predictors were trained.

    Args:
        options: What the user asked for.
        trained: The predictors there are, if any.
        num_layers: Decoder layers.
        num_image_tokens: Rows of an image; 0 where that is known at run time only.
        source: Where predictors were looked for, a clause for messages.
        remedy: How to get predictors, for messages.

    Raises:
        DllavaExportError: If the package that provides a policy is broken.
        UnsupportedModelError: If predictors are asked for and there are none.
        SettingError: If a setting is out of range, or a policy is not known.
    """
    name = options.policy or DEFAULT_POLICY
    if name == NO_POLICY:
        _check_dense(options)
        return DENSE
    policy = _policy(name)
    has_image = trained is not None and trained.use_vision_predictor
    if policy.needs_predictors and not has_image:
        raise UnsupportedModelError(
            f"{source} without an image predictor, which policy {name!r} needs. {remedy}, or "
            f"a policy that needs no training: {untrained_choices()}."
        )
    can_decide = _can_decide(options.output_text_policy or name, trained)
    values: dict[str, Any] = {"policy": name}
    if trained is not None:
        values["sparse_layer"] = trained.sparse_layer
        values["image_keep_rate"] = trained.vision_keep_rate
        values["output_text_keep_rate"] = trained.output_text_keep_rate
    if options.output_text_policy in (None, NO_POLICY) and not can_decide:
        values["output_text_keep_rate"] = 1.0  # nobody asked for a decision
    values.update({k: v for k, v in dataclasses.asdict(options).items() if v is not None})
    sparsity = Sparsity(**values)
    if sparsity.sparse_layer >= num_layers:
        raise SettingError(
            f"sparse_layer must be in 1..{num_layers - 1} for {num_layers} decoder layers, got "
            f"{sparsity.sparse_layer}."
        )
    if num_image_tokens:
        sparsity.num_kept_image_tokens(num_image_tokens)
    if sparsity.has_keep_bit:
        check_text_policy(sparsity.text_policy, sparsity.output_text_keep_rate)
        if not can_decide:
            raise UnsupportedModelError(
                f"{source} without an output-text predictor, but an output text keep rate of "
                f"{sparsity.output_text_keep_rate} was asked for. Use 1.0, or an output-text "
                f"policy that needs no training."
            )
    return sparsity


def _check_dense(options: SparsityOptions) -> None:
    """Refuse what a dense decoder cannot do: its layers all share one cache."""
    rate, policy = options.output_text_keep_rate, options.output_text_policy
    if policy in (None, NO_POLICY) and (rate is None or rate == 1):
        return
    found = f"output_text_keep_rate is {rate}"
    if policy not in (None, NO_POLICY):
        found = f"output_text_policy is {policy!r}"
    raise SettingError(
        f"policy {NO_POLICY!r} makes a dense decoder, which keeps all generated tokens, but "
        f"{found}. Leave it out, or use an image policy: {', '.join(POLICIES.names())}."
    )


def _can_decide(name: str, trained: PredictorConfig | None) -> bool:
    """True where a policy decides about generated tokens and has what it needs for that."""
    if name == NO_POLICY:
        return False
    policy = _policy(name)
    has_predictor = trained is not None and trained.has_output_text
    return policy.decides_text and (has_predictor or not policy.needs_predictors)


def _policy(name: str) -> Policy:
    """Return a policy; the message about one that is not known names the dense choice too."""
    policy = POLICIES.find(name)
    if policy is None:
        raise SettingError(POLICIES.describe_unknown(name, (*POLICIES.names(), NO_POLICY)))
    return policy
