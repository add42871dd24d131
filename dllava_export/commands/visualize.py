"""`dllava-export visualize`: draw what a bundle keeps."""

from __future__ import annotations

from pathlib import Path

import click

from dllava_export.commands.options import (
    BackendCommand,
    backend_options,
    check_folder,
    given_backend_options,
    parse_ids,
    single_image,
)

__all__ = ["visualize"]


@click.command(
    cls=BackendCommand,
    epilog='dllava-export visualize out --image cat.png --prompt "What is this?" -o out.png',
)
@click.argument("bundle", type=click.Path(path_type=Path))
@single_image(help="A picture, or none for a text-only prompt.")
@click.option("--prompt", help="The question; the chat template is put around it.")
@click.option(
    "--input-ids",
    callback=parse_ids,
    help="Token ids instead of --prompt, -200 for the image: 1,-200,15,27.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@backend_options
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check_folder,
    help="The figure (.png, .svg, .pdf).",
)
def visualize(
    bundle: Path,
    image: str | None,
    prompt: str | None,
    input_ids: list[int] | None,
    max_new_tokens: int,
    backend: str,
    output: Path,
) -> None:
    """Draw what BUNDLE keeps: patches and their scores, generated tokens, KV cache lengths."""
    if (prompt is None) == (input_ids is None):
        raise click.UsageError("Give either --prompt or --input-ids, one of the two.")

    from dllava_export import api

    api.visualize(
        bundle,
        output,
        image=image,
        prompt=prompt,
        input_ids=input_ids,
        max_new_tokens=max_new_tokens,
        backend=backend,
        **given_backend_options(),
    )
    click.echo(f"Drew {output}")
