"""The predictors as torch modules, with the parameter names of Dynamic-LLaVA's checkpoints.

Source    Dynamic-LLaVA, `VisionPredictor` and `TextPredictor`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from dllava_export.geometry import PredictorConfig

__all__ = [
    "ImagePredictor",
    "OutputTextPredictor",
    "Predictors",
    "init_predictor",
    "sample_keep_mask",
]

_INIT_STD = 0.02


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, rows, width = x.shape
        qkv = self.qkv(x).view(batch, rows, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, rows, head_dim]
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, rows, width))


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class _Block(nn.Module):
    """A transformer block that normalises first; image tokens see each other both ways."""

    def __init__(self, width: int, num_heads: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _Mlp(width, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ImagePredictor(nn.Module):
    """Scores the tokens of an image, all of them in view."""

    def __init__(self, hidden_size: int, config: PredictorConfig) -> None:
        super().__init__()
        width = config.d_model
        inner = int(width * (config.dim_feedforward / width))  # in floats, as upstream has it
        self.down_mlp = nn.Sequential(
            nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width), nn.GELU()
        )
        self.transformer = nn.ModuleList(
            [_Block(width, config.nhead, inner) for _ in range(config.num_layers)]
        )
        self.output_mlp = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits.

        Args:
            hidden: [num_images, num_image_tokens, hidden_size], float32. Residual stream.

        Returns:
            [num_images, num_image_tokens, 2], float32. Column 0 is for keeping the token.
        """
        x = self.down_mlp(hidden)
        for block in self.transformer:
            x = block(x)
        local, shared = x.chunk(2, dim=-1)
        shared = shared.mean(dim=1, keepdim=True).expand_as(local)
        return self.output_mlp(torch.cat([local, shared], dim=-1))


class OutputTextPredictor(nn.Module):
    """Scores generated tokens one by one."""

    def __init__(self, hidden_size: int, config: PredictorConfig) -> None:
        super().__init__()
        width = config.d_model
        self.output_mlp = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, width),
            nn.GELU(),
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [..., 2], float32, of hidden [..., hidden_size]; column 0 is keep."""
        return self.output_mlp(hidden)


class Predictors(nn.Module):
    """The predictors that a configuration asks for, under their canonical names.

    Attributes:
        image_predictor: None where images are kept whole.
        output_text_predictor: None where answers are kept whole.
    """

    def __init__(self, hidden_size: int, config: PredictorConfig) -> None:
        super().__init__()
        self.image_predictor = (
            ImagePredictor(hidden_size, config) if config.use_vision_predictor else None
        )
        self.output_text_predictor = (
            OutputTextPredictor(hidden_size, config) if config.has_output_text else None
        )


def init_predictor(predictor: nn.Module, generator: torch.Generator) -> None:
    """Draw matrices from a normal distribution; biases become 0, norms 1.

    Logits then start near 0, so that about half of the tokens are kept.
    """
    for module in predictor.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=_INIT_STD, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def sample_keep_mask(
    logits: torch.Tensor, tau: float, generator: torch.Generator
) -> torch.Tensor:
    """Decide by hard Gumbel-Softmax which tokens to keep.

    Args:
        logits: [..., 2], float32. Column 0 is keep.
        tau: Temperature, above 0.
        generator: Of the CPU, so that all devices draw the same numbers.

    Returns:
        [...], float32. Exactly 0 or 1 in the forward pass; in the backward pass the gradient
        of the soft decision (straight through).
    """
    log_p = functional.log_softmax(logits.float(), dim=-1)
    exponential = torch.empty(log_p.shape).exponential_(generator=generator)
    noise = -exponential.log().to(log_p.device)  # distributed as Gumbel(0, 1)
    soft = ((log_p + noise) / tau).softmax(dim=-1)
    keep = soft[..., 0]
    hard = (soft.argmax(dim=-1) == 0).to(keep.dtype)
    return hard + (keep - keep.detach())
