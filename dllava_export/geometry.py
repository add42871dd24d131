"""Sizes of a model: decoder, image rows, predictors."""

from __future__ import annotations

import dataclasses

from dllava_export.errors import SettingError

__all__ = ["Geometry", "PredictorConfig", "PredictorGeometry"]

_MAX_SIZE = 1 << 16
_MAX_SIZES = {"num_layers": 1 << 8}


@dataclasses.dataclass(frozen=True)
class PredictorGeometry:
    """Sizes of the predictors; the output-text predictor has `d_model` only.

    Attributes:
        d_model: Width behind the first linear layer.
        nhead: Attention heads of the image predictor.
        dim_feedforward: MLP width of the image predictor's blocks.
        num_layers: Number of the image predictor's blocks.
    """

    d_model: int = 512
    nhead: int = 8
    dim_feedforward: int = 2048
    num_layers: int = 2


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder, all that counts of FLOPs and bytes depend on.

    Attributes:
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab_size: Rows of the language model head.
        num_image_tokens: Rows that one image puts into the sequence.
        predictor: Sizes of the predictors; None for policies that have none.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_image_tokens: int
    predictor: PredictorGeometry | None = None


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """The trained predictors of a Dynamic-LLaVA checkpoint.

    Attributes:
        d_model: Width of the predictors.
        nhead: Attention heads in the image predictor's blocks.
        dim_feedforward: MLP width of the image predictor's blocks.
        num_layers: Blocks of the image predictor.
        sparse_layer: First decoder layer (0-based) that sees only kept tokens.
        vision_keep_rate: Share of image tokens kept, in (0, 1].
        output_text_keep_rate: Share of generated tokens training aimed to keep, in (0, 1].
        use_vision_predictor: True where there is an image predictor.
        has_output_text: True where there is an output-text predictor.
    """

    d_model: int = 512
    nhead: int = 8
    dim_feedforward: int = 2048
    num_layers: int = 2
    sparse_layer: int = 2
    vision_keep_rate: float = 0.2
    output_text_keep_rate: float = 0.5
    use_vision_predictor: bool = True
    has_output_text: bool = True

    def __post_init__(self) -> None:
        for name in ("d_model", "nhead", "dim_feedforward", "num_layers", "sparse_layer"):
            value = getattr(self, name)
            if not (type(value) is int and value >= 1):
                raise SettingError(
                    f"{name} must be a whole number of at least 1, got {value!r}."
                )
            if value > _MAX_SIZES.get(name, _MAX_SIZE):
                raise SettingError(
                    f"{name} must be at most {_MAX_SIZES.get(name, _MAX_SIZE)}, got {value}."
                )
        if self.d_model % self.nhead or self.d_model % 4:
            raise SettingError(
                f"d_model must be a multiple of nhead ({self.nhead}) and of 4, "
                f"got {self.d_model}."
            )
        for name in ("vision_keep_rate", "output_text_keep_rate"):
            rate = getattr(self, name)
            if type(rate) not in (int, float) or not 0 < rate <= 1:
                raise SettingError(f"{name} must be in (0, 1], got {rate!r}.")
