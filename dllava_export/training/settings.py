"""What a training run shall do: steps, learning rates, losses, what is frozen."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from dllava_export.errors import DllavaExportError, SettingError
from dllava_export.geometry import PredictorConfig
from dllava_export.precision import BF16, FP32, NUMBER_FORMATS
from dllava_export.settings import check_whole_numbers, real_number

if TYPE_CHECKING:
    from dllava_export.checkpoints.checkpoint import Checkpoint


__all__ = ["BadRecordError", "TrainingError", "TrainingSettings", "resolve_predictors"]

_SIZES = ("d_model", "nhead", "dim_feedforward", "num_layers")


class TrainingError(DllavaExportError):
    """A training run cannot start, go on, or be resumed."""


class BadRecordError(TrainingError):
    """A record of the training data cannot be used."""


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """Settings of one training run; the defaults are those of Dynamic-LLaVA.

    None stands for: as the checkpoint was trained, else the default in brackets.

    Attributes:
        steps: Optimizer steps; overrides `epochs`.
        epochs: Passes over the data; may be a fraction.
        batch_size: Records in one forward pass.
        accumulation_steps: Forward passes whose gradients one step averages.
        predictor_lr: Highest learning rate of the predictors.
        model_lr: Highest learning rate of language model and projector.
        weight_decay: AdamW's, for matrices; biases and norms have none.
        warmup_ratio: Share of the steps in which learning rates rise from 0, in [0, 1).
        max_grad_norm: Gradients are scaled down to this norm.
        seed: Of new predictors, of the order of the data and of the sampled decisions.
        train_predictors: False trains a plain LLaVA with the same loop.
        freeze_model: Train the predictors alone.
        freeze_tower: Leave the vision tower as it is.
        sparse_layer: First decoder layer (0-based) that sees only kept tokens [2].
        image_keep_rate: Share of image tokens to keep, in (0, 1] [0.2].
        output_text_keep_rate: Share of answer tokens to keep, in (0, 1] [0.5].
        use_output_text_predictor: False trains the image predictor alone [True].
        d_model: Width of new predictors [512].
        nhead: Attention heads of a new image predictor [8].
        dim_feedforward: MLP width of a new image predictor [2048].
        num_layers: Blocks of a new image predictor [2].
        min_answer_tokens: Answers shorter than this are kept whole.
        mask_loss_weight: Weight of both keep-rate losses.
        tau_start: Temperature of the Gumbel-Softmax at the first step.
        tau_end: The same after the last step; in between it falls exponentially.
        max_length: Rows of a record, image included; longer ones are bad records. The
            checkpoint's context by default.
        precision: Of the checkpoint written: `fp32`, `fp16` or `bf16`; as read by default.
        compute_precision: `fp32`, or `bf16` for mixed precision; by default bf16 on CUDA. What
            is trained is fp32 either way, and so are the predictors' computations.
        gradient_checkpointing: Recompute layers in the backward pass to save memory.
        device: `cpu`, `cuda`, `cuda:1`; `auto` takes CUDA where there is one.
        checkpoint_every: Steps between two saves of the training state; 0 for none.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulation_steps: int = 1
    predictor_lr: float = 2e-4
    model_lr: float = 5e-6
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    seed: int = 0
    train_predictors: bool = True
    freeze_model: bool = False
    freeze_tower: bool = True
    sparse_layer: int | None = None
    image_keep_rate: float | None = None
    output_text_keep_rate: float | None = None
    use_output_text_predictor: bool | None = None
    d_model: int | None = None
    nhead: int | None = None
    dim_feedforward: int | None = None
    num_layers: int | None = None
    min_answer_tokens: int = 50
    mask_loss_weight: float = 100.0
    tau_start: float = 1.0
    tau_end: float = 0.1
    max_length: int | None = None
    precision: str | None = None
    compute_precision: str | None = None
    gradient_checkpointing: bool = False
    device: str = "auto"
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        counts = "batch_size", "accumulation_steps", "min_answer_tokens", "steps", "max_length"
        check_whole_numbers(self, 1, *counts, "sparse_layer", *_SIZES)
        check_whole_numbers(self, 0, "seed", "checkpoint_every")
        for name in ("epochs", "max_grad_norm", "tau_start", "tau_end"):
            value = getattr(self, name)
            _check(real_number(name, value) > 0, name, "above 0", value)
        for name in ("predictor_lr", "model_lr", "weight_decay", "mask_loss_weight"):
            value = getattr(self, name)
            _check(real_number(name, value) >= 0, name, "at least 0", value)
        for name in ("image_keep_rate", "output_text_keep_rate"):
            value = getattr(self, name)
            is_rate = value is None or 0 < real_number(name, value) <= 1
            _check(is_rate, name, "in (0, 1]", value)
        ratio = real_number("warmup_ratio", self.warmup_ratio)
        _check(0 <= ratio < 1, "warmup_ratio", "in [0, 1)", ratio)
        for name, allowed in (
            ("precision", tuple(NUMBER_FORMATS)),
            ("compute_precision", _COMPUTE),
        ):
            value = getattr(self, name)
            _check(value is None or value in allowed, name, " or ".join(allowed), value)
        if self.freeze_model and not self.train_predictors and self.freeze_tower:
            raise SettingError(
                "freeze_model is set and train_predictors is not, so that nothing would be "
                "trained. Set one of the two."
            )

    def num_steps(self, num_records: int) -> int:
        """Return how many optimizer steps a run over `num_records` takes."""
        if self.steps is not None:
            return self.steps
        per_step = self.batch_size * self.accumulation_steps
        return max(1, math.ceil(self.epochs * num_records / per_step))

    def tau(self, step: int, num_steps: int) -> float:
        """Return the temperature at `step`, 0-based: tau_start (tau_end/tau_start)^(step/all)."""
        return self.tau_start * (self.tau_end / self.tau_start) ** (step / num_steps)

    def lr_factor(self, step: int, num_steps: int) -> float:
        """Return the share of the highest learning rate at `step`, 0-based.

        It rises linearly over ceil(warmup_ratio * num_steps) steps, then falls as a cosine.
        """
        num_warmup = math.ceil(self.warmup_ratio * num_steps)
        if step < num_warmup:
            return step / num_warmup
        progress = (step - num_warmup) / max(1, num_steps - num_warmup)
        return 0.5 * (1 + math.cos(math.pi * progress))


_COMPUTE = (FP32.name, BF16.name)


def _check(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise SettingError(f"{name} must be {expected}, got {value!r}.")


def resolve_predictors(
    settings: TrainingSettings, checkpoint: Checkpoint
) -> PredictorConfig | None:
    """Return the predictors to train: the checkpoint's, or new ones; None for a plain LLaVA.

    Raises:
        SettingError: If a setting is impossible, or is another size than the checkpoint's.
    """
    if not settings.train_predictors:
        return None
    found = checkpoint.spec.predictors
    values: dict[str, Any] = {} if found is None else dataclasses.asdict(found)
    for name in _SIZES:
        value = getattr(settings, name)
        if value is None:
            continue
        if found is not None and value != values[name]:
            raise SettingError(
                f"{name} is {value}, but {checkpoint.path} has predictors with {name} "
                f"{values[name]}, expected the same. Leave it out, or start from a checkpoint "
                "without predictors."
            )
        values[name] = value
    chosen = {
        "sparse_layer": settings.sparse_layer,
        "vision_keep_rate": settings.image_keep_rate,
        "output_text_keep_rate": settings.output_text_keep_rate,
        "has_output_text": settings.use_output_text_predictor,
        "use_vision_predictor": True,
    }
    values.update({name: value for name, value in chosen.items() if value is not None})
    predictors = PredictorConfig(**values)
    last = checkpoint.spec.num_layers - 1
    if predictors.sparse_layer > last:
        raise SettingError(
            f"sparse_layer must be in 1..{last} for {last + 1} decoder layers, got "
            f"{predictors.sparse_layer}."
        )
    if int(checkpoint.spec.num_image_tokens * predictors.vision_keep_rate) < 1:
        raise SettingError(
            f"image_keep_rate {predictors.vision_keep_rate} keeps none of "
            f"{checkpoint.spec.num_image_tokens} image tokens, expected at least one. Raise it."
        )
    return predictors
