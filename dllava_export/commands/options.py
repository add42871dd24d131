"""Options and checks that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from dllava_export.backends.registry import DEFAULT_BACKEND
from dllava_export.commands.command import Command
from dllava_export.commands.policy_option import PolicyName, PolicyOption
from dllava_export.commands.registry_choice import RegistryChoice
from dllava_export.errors import DllavaExportError
from dllava_export.sparsity import DEFAULT_POLICY

__all__ = [
    "RATE",
    "BackendCommand",
    "allow_outside",
    "backend_choice",
    "backend_options",
    "check_folder",
    "check_keep",
    "given_backend_options",
    "link_option",
    "parse_ids",
    "prompt_options",
    "sampling_options",
    "single_image",
    "sparsity_options",
]

_GIVEN = "dllava_export.backend_options"

RATE = click.FloatRange(0, 1, min_open=True)
"""A share in (0, 1]."""


def sparsity_options(function: Callable[..., None]) -> Callable[..., None]:
    """Options that say what is pruned, shared by `export` and `sparsify`."""
    options = [
        click.option(
            "--policy",
            cls=PolicyOption,
            type=PolicyName(decides_text=False),
            help="What scores image tokens. {policies}; none: a dense decoder."
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
            help="What decides about generated tokens; none: all are kept."
            "  [default: the policy, where it decides about them; else none]",
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


def sampling_options(function: Callable[..., None]) -> Callable[..., None]:
    """Options that say how tokens are chosen and what ends an answer, as `Session.generate`."""
    options = [
        click.option(
            "--temperature",
            type=click.FloatRange(min=0),
            default=0.0,
            show_default=True,
            help="0 takes the likeliest token.",
        ),
        click.option("--top-p", type=RATE, default=1.0, show_default=True),
        click.option(
            "--top-k", type=click.IntRange(min=1), help="Likeliest tokens to sample from."
        ),
        click.option(
            "--min-p",
            type=click.FloatRange(0, 1),
            default=0.0,
            show_default=True,
            help="Leave out tokens below this share of the likeliest one's probability.",
        ),
        click.option("--seed", type=click.IntRange(min=0), help="For a temperature above 0."),
        click.option(
            "--repetition-penalty",
            type=click.FloatRange(min=0, min_open=True),
            default=1.0,
            show_default=True,
            help="Above 1, tokens that were there before are less likely.",
        ),
        click.option(
            "--stop",
            multiple=True,
            metavar="TEXT",
            help="Text that ends the answer, which ends before it; may be given several times.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def link_option(function: Callable[..., None]) -> Callable[..., None]:
    """Option that asks for hard links in place of copies of weights."""
    return click.option(
        "--link",
        is_flag=True,
        help="Hard-link weights instead of copying them, where the file system can. The bundle "
        "takes no space and runs, but onnx, netron, polygraphy and onnxslim refuse to read it.",
    )(function)


def backend_choice(
    *, building: bool = False, **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return an option `--backend`.

    Args:
        building: Offer only backends for which engines are built.
        **settings: See `click.option`.
    """

    def names() -> list[str]:
        from dllava_export.backends.registry import BACKENDS

        return [b.name for b in BACKENDS.usable() if b.can_build or not building]

    return click.option("--backend", type=RegistryChoice("backend", names), **settings)


def backend_options(function: Callable[..., None]) -> Callable[..., None]:
    """Options that say what runs a bundle, and where; for a `BackendCommand`."""
    return backend_choice(
        default=DEFAULT_BACKEND,
        show_default=True,
        help="What runs the bundle; the TensorRT ones run engines of `dllava-export build`.",
    )(function)


def allow_outside(function: Callable[..., None]) -> Callable[..., None]:
    """Option of commands that read pictures which a file names."""
    return click.option(
        "--allow-outside",
        is_flag=True,
        help="Take images that lie outside the image folder (absolute names, .., links).",
    )(function)


def single_image(**settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return an option `--image` that is given once: a second one would replace the first."""
    return click.option("--image", multiple=True, callback=_one_image, **settings)


def _one_image(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> str | None:
    if len(value) > 1:
        raise click.BadParameter(
            f"{len(value)} pictures were given ({', '.join(value)}), expected one: several in "
            "one prompt are not supported."
        )
    return value[0] if value else None


def prompt_options(function: Callable[..., None]) -> Callable[..., None]:
    """Options that say how text becomes a prompt."""
    options = [
        click.option(
            "--system", help="Text before the conversation.  [default: the template's]"
        ),
        click.option(
            "--raw-prompt",
            is_flag=True,
            help="The prompt is whole, <image> in the image's place: no template around it.",
        ),
        click.option(
            "--allow-special",
            is_flag=True,
            help="Control tokens in the prompt, such as </s>, are control tokens, not text.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


class BackendCommand(Command):
    """A command that takes every backend's own options; `given_backend_options` has them."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's options and those of the backends."""
        from dllava_export.backends.registry import BACKENDS

        params = super().get_params(ctx)
        taken = {flag for param in params for flag in param.opts}
        try:
            backends = BACKENDS.usable()
        except DllavaExportError as error:  # another package's backend is broken
            raise click.ClickException(str(error)) from error
        offered = {
            option.flag: option
            for backend in backends
            for option in backend.cli_options()
            if option.flag not in taken
        }
        others = [
            click.Option(
                [option.flag, option.name],
                type=click.Choice(option.choices) if option.choices else click.IntRange(min=1),
                help=option.help,
                expose_value=False,
                callback=_remember_option,
            )
            for option in offered.values()
        ]
        place = [param.name for param in params].index("backend") + 1
        return [*params[:place], *others, *params[place:]]


def _remember_option(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value is not None:
        ctx.meta.setdefault(_GIVEN, {})[param.name] = value


def given_backend_options() -> dict[str, Any]:
    """Return the backends' own options that the running command was given."""
    return dict(click.get_current_context().meta.get(_GIVEN, {}))


def check_keep(sparsity: Mapping[str, Any]) -> None:
    """Refuse two ways of saying how many image tokens are kept.

    Raises:
        click.UsageError: If both a rate and a number are given.
    """
    if sparsity["image_keep_rate"] is not None and sparsity["image_keep_tokens"] is not None:
        raise click.UsageError("Give --image-keep-rate or --image-keep-tokens, not both.")


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
