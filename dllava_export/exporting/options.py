"""What a user asks of sparsification, completed by what the model was trained for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dllava_export.errors import UnsupportedModelError
from dllava_export.sparsity import Sparsity

if TYPE_CHECKING:
    from dllava_export.geometry import PredictorConfig

__all__ = ["SparsityOptions", "complete_sparsity"]


@dataclasses.dataclass(frozen=True)
class SparsityOptions:
    """What a user asked for; None means: as the checkpoint was trained, else the defaults."""

    policy: str | None = None
    sparse_layer: int | None = None
    image_keep_rate: float | None = None
    image_keep_tokens: int | None = None
    output_text_keep_rate: float | None = None


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
        UnsupportedModelError: If predictors are asked for and there are none.
        ValueError: If a setting is out of range.
    """
    policy = options.policy or "predictor"
    if policy == "predictor" and not (trained is not None and trained.use_vision_predictor):
        raise UnsupportedModelError(
            f"{source} without an image predictor, which policy 'predictor' needs. {remedy}, or "
            "a policy that needs no training: --policy random, uniform, norm, or none for a "
            "dense decoder."
        )
    if policy == "none":
        return Sparsity(policy="none", output_text_keep_rate=1.0)
    values: dict[str, Any] = {"policy": policy}
    if trained is not None:
        values["sparse_layer"] = trained.sparse_layer
        values["image_keep_rate"] = trained.vision_keep_rate
        values["output_text_keep_rate"] = trained.output_text_keep_rate
    lacks_text = trained is not None and not trained.has_output_text
    if policy == "norm" or (policy == "predictor" and lacks_text):
        values["output_text_keep_rate"] = 1.0
    values.update({k: v for k, v in dataclasses.asdict(options).items() if v is not None})
    sparsity = Sparsity(**values)
    if sparsity.sparse_layer >= num_layers:
        raise ValueError(
            f"sparse_layer must be in 1..{num_layers - 1} for {num_layers} decoder layers, got "
            f"{sparsity.sparse_layer}."
        )
    if num_image_tokens:
        sparsity.num_kept_image_tokens(num_image_tokens)
    if sparsity.has_keep_bit and policy == "predictor" and lacks_text:
        raise UnsupportedModelError(
            f"{source} without an output-text predictor, but an output text keep rate of "
            f"{sparsity.output_text_keep_rate} was asked for. Use 1.0."
        )
    return sparsity
