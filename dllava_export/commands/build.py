"""`dllava-export build`: a bundle's graphs become TensorRT engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dllava_export.commands.command import Command
from dllava_export.commands.options import backend_choice

__all__ = ["build"]

_COUNT = click.IntRange(min=1)
_SHAPES = "NAME:1x2x3,NAME:4"


@click.command(
    cls=Command, epilog="dllava-export build out --backend tensorrt-rtx --max-input-len 1088"
)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@backend_choice(
    building=True,
    required=True,
    help="tensorrt builds for the GPU of this machine; tensorrt-rtx needs none to build.",
)
@click.option(
    "--max-batch-size", type=_COUNT, default=1, show_default=True, help="Samples at once."
)
@click.option(
    "--max-input-len",
    type=_COUNT,
    help="Tokens that one prompt may have, those of the image included."
    "  [default: the image and 512 more, or half of what the cache has beside the image]",
)
@click.option(
    "--max-kv-cache-capacity",
    type=_COUNT,
    help="Rows of the KV cache per sample: prompt, answer and one spare row. The smaller cache "
    "from the sparse layer on follows from it.  [default: the model's context and 1]",
)
@click.option(
    "--min-shapes",
    metavar=_SHAPES,
    help="Smallest shapes, as trtexec spells them; numbers of num_kept and num_image_rows are "
    "their values. Sizes that inputs share change in all of them.",
)
@click.option("--opt-shapes", metavar=_SHAPES, help="Shapes that kernels are chosen for.")
@click.option("--max-shapes", metavar=_SHAPES, help="Largest shapes.")
@click.option(
    "--timing-cache-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Read and written: later builds skip what was timed before. tensorrt only."
    "  [default: one beside the engines]",
)
@click.option(
    "--builder-optimization-level",
    type=click.IntRange(0, 5),
    help="0 builds fastest, 5 searches longest.  [default: TensorRT's, 3]",
)
@click.option(
    "--plugin-path",
    "plugin_paths",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Shared library with further plugins; may be given several times. tensorrt only.",
)
@click.option(
    "--strip-weights",
    is_flag=True,
    help="Leave the weights out. tensorrt-rtx needs a GPU for it.",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="8.9",
    help="GPU to build for; may be given several times. tensorrt-rtx only."
    "  [default: all that it builds for by itself]",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print shapes, profiles, sizes and memory; build nothing, need no TensorRT.",
)
@click.option("--force", is_flag=True, help="Build even if memory will probably not suffice.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def build(
    obj: dict[str, Any],
    /,
    bundle: Path,
    min_shapes: str | None,
    opt_shapes: str | None,
    max_shapes: str | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build TensorRT engines of BUNDLE, beside its graphs.

    One engine holds the decoder with a profile for prefill and one for decode; further ones
    hold the vision tower and the decoder without KV cache. They land in
    BUNDLE/engines/BACKEND with a config.json that says what they take.
    """
    from dllava_export import api
    from dllava_export.backends.trt.build.profile_shapes import ShapeOverrides, parse_shapes

    texts = (min_shapes, opt_shapes, max_shapes)
    overrides = ShapeOverrides(*(parse_shapes(text) if text else {} for text in texts))
    result = api.build(
        bundle, dry_run=dry_run, progress=obj["progress"], overrides=overrides, **options
    )
    click.echo(json.dumps(result.to_json(), indent=2) if as_json else result.to_text())
