"""`dllava-export run`: answer a prompt about an image."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from dllava_export.commands.options import (
    BackendCommand,
    backend_options,
    given_backend_options,
    parse_ids,
    prompt_options,
    sampling_options,
    single_image,
)

__all__ = ["run"]


@click.command(
    cls=BackendCommand, epilog='dllava-export run out --image cat.png --prompt "What is this?"'
)
@click.argument("bundle", type=click.Path(path_type=Path))
@single_image(help="A picture, or none for a text-only prompt.")
@click.option("--prompt", help="The question; the chat template is put around it.")
@click.option(
    "--input-ids",
    callback=parse_ids,
    help="Token ids instead of --prompt, -200 for the image: 1,-200,15,27.",
)
@prompt_options
@click.option(
    "--mode",
    type=click.Choice(["cache", "recompute"]),
    default="cache",
    show_default=True,
    help="With KV cache, or one pass over everything per token.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@sampling_options
@backend_options
@click.option("--json", "as_json", is_flag=True, help="Print text, tokens and counts as JSON.")
def run(
    bundle: Path,
    image: str | None,
    prompt: str | None,
    input_ids: list[int] | None,
    backend: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Answer a prompt about an image with BUNDLE; text appears as it is generated."""
    if (prompt is None) == (input_ids is None):
        raise click.UsageError("Give either --prompt or --input-ids, one of the two.")

    from dllava_export.runtime.loading import check_image_choice, load

    with load(bundle, backend, **given_backend_options()) as session:
        picture = check_image_choice(session.manifest, image)
        stream = session.stream(prompt, image=picture, input_ids=input_ids, **settings)
        for piece in stream:
            if not as_json:
                text = piece.text if session.manifest.chat_template else f"{piece.token_id} "
                click.echo(text, nl=False)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(stream.result), indent=2))
        return
    click.echo()
    click.echo(stream.result.to_text(), err=True)
