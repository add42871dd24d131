"""Options and checks that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dllava_export.backends.ort.providers import PROVIDERS
from dllava_export.backends.trt.trt_module import TENSORRT_BACKENDS
from dllava_export.commands.policy_option import PolicyName, PolicyOption
from dllava_export.sparsity import DEFAULT_POLICY

__all__ = [
    "RATE",
    "backend_options",
    "check_folder",
    "parse_ids",
    "sparsity_from",
    "sparsity_options",
]

RATE = click.FloatRange(0, 1, min_open=True)
"""A share in (0, 1]."""


def sparsity_options(function: Callable[..., None]) -> Callable[..., None]:
    """Options that say what is pruned, shared by `export` and `sparsify`."""
    options = [
        click.option(
            "--policy",
            cls=PolicyOption,
            type=PolicyName(decides_text=False),
            help="What scores tokens. {policies}; none: a dense decoder."
            f"  [default: {DEFAULT_POLICY}]",
        ),
        click.option(
            "--sparse-layer",
            type=click.IntRange(min=1),
            help="First decoder layer, 0-based, that sees only kept tokens."
            "  [default: as trained, else 2]",
        ),
        click.option(
            "--image-keep-rate",
            type=RATE,
            help="Share of image tokens kept, in (0, 1].  [default: as trained, else 0.2]",
        ),
        click.option(
            "--image-keep-tokens",
            type=click.IntRange(min=1),
            help="Number of image tokens kept, instead of a rate.",
        ),
        click.option(
            "--output-text-policy",
            type=PolicyName(decides_text=True),
            help="What decides about generated tokens, where it is another."
            "  [default: the policy, where it decides about them; else all are kept]",
        ),
        click.option(
            "--output-text-keep-rate",
            type=RATE,
            help="Share of generated tokens whose keys and values stay from the sparse layer "
            "on, in (0, 1]. A trained predictor decides by its own threshold; the rate then "
            "sizes the cache. 1.0 keeps all.  [default: as trained, else 0.5; 1.0 where the "
            "policy has no decision]",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def backend_options(function: Callable[..., None]) -> Callable[..., None]:
    """Options that say what runs a bundle, and where."""
    backend = click.option(
        "--backend",
        type=click.Choice(["onnxruntime", *TENSORRT_BACKENDS]),
        default="onnxruntime",
        show_default=True,
        help="What runs the bundle; the TensorRT ones run engines of `dllava-export build`.",
    )
    provider = click.option(
        "--provider",
        type=click.Choice(PROVIDERS),
        help="Where ONNX Runtime computes; cuda needs an NVIDIA GPU.  [default: cpu]",
    )
    return backend(provider(function))


def sparsity_from(values: dict[str, Any]) -> Any:
    """Return the `SparsityOptions` that the options of `sparsity_options` say.

    Raises:
        click.UsageError: If both a rate and a number are given.
    """
    from dllava_export.exporting.options import SparsityOptions

    if values["image_keep_rate"] is not None and values["image_keep_tokens"] is not None:
        raise click.UsageError("Give --image-keep-rate or --image-keep-tokens, not both.")
    return SparsityOptions(**values)


def check_folder(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that could not be written before the work is done, not after it."""
    if value is not None and not value.absolute().parent.is_dir():
        raise click.BadParameter(f"folder '{value.parent}' does not exist.")
    return value


def parse_ids(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    """Return the numbers in `1,-200,15,27`."""
    if value is None:
        return None
    try:
        return [int(part) for part in value.replace(",", " ").split()]
    except ValueError as error:
        raise click.BadParameter(
            f"expected numbers like 1,-200,15,27; got {value!r}"
        ) from error
