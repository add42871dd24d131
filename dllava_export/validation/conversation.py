"""What both sides of a validation are fed: one prompt, and the tokens that follow it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dllava_export.backends.registry import BACKENDS
from dllava_export.bundles import layout
from dllava_export.errors import InvalidInputError
from dllava_export.names import IMAGE_PLACEHOLDER_ID
from dllava_export.runtime.loading import check_image_choice, load

if TYPE_CHECKING:
    from dllava_export.bundles.manifest import Manifest
    from dllava_export.runtime.session import Session
    from dllava_export.validation.settings import ValidationSettings


__all__ = [
    "IMAGE_FEATURES",
    "INPUT_IDS",
    "OUTPUT_IDS",
    "PIXEL_VALUES",
    "Conversation",
    "conversation_about",
    "conversation_for",
    "load_candidate",
    "random_conversation",
]

# Names under which a conversation is fed.
INPUT_IDS = "input_ids"  # [1, t] int64, -200 for the image
PIXEL_VALUES = "pixel_values"  # [1, 3, image_size, image_size] float32
IMAGE_FEATURES = "image_features"  # [1, num_image_tokens, hidden_size] float32
OUTPUT_IDS = "output_ids"  # [1, num_steps] int64

_TEXT_BEFORE, _TEXT_AFTER = 8, 16
_NUM_IMAGE_ROWS = 64  # of a bare decoder, which does not know how many an image has


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A prompt and the answer that is forced on both sides.

    Attributes:
        input_ids: [t] int64, at most one -200 for the image.
        output_ids: [num_steps] int64.
        pixel_values: [1, 3, image_size, image_size] float32, or None.
        image_features: [1, num_image_tokens, hidden_size] float32 where there is no tower.
        origin: Where it comes from, for people.
    """

    input_ids: np.ndarray
    output_ids: np.ndarray
    pixel_values: np.ndarray | None
    image_features: np.ndarray | None
    origin: str

    @property
    def feed(self) -> dict[str, np.ndarray]:
        """Everything by name, batch first."""
        values = {INPUT_IDS: self.input_ids[None], OUTPUT_IDS: self.output_ids[None]}
        if self.pixel_values is not None:
            values[PIXEL_VALUES] = self.pixel_values
        if self.image_features is not None:
            values[IMAGE_FEATURES] = self.image_features
        return values


def conversation_for(
    folder: Path,
    manifest: Manifest,
    settings: ValidationSettings,
    *,
    image: str | None,
    prompt: str | None,
) -> Conversation:
    """Return what a validation feeds a bundle; the same arguments give the same values.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        settings: Number of steps and seed; what runs the bundle, to answer a prompt.
        image: A picture for `prompt`, or `none` for a text-only one.
        prompt: The question; None draws random pixels and tokens.

    Raises:
        BackendError: If the bundle cannot be run, where there is a prompt.
        InvalidInputError: If there is an image without a prompt, or they do not fit the bundle.
    """
    steps = settings.num_steps
    if prompt is None:
        if image is not None:
            raise InvalidInputError(
                f"An image ({image}) was given without a prompt. Give both, or neither for "
                "random values."
            )
        size = _image_size(manifest) if manifest.has_visual else None
        return random_conversation(manifest, size, num_steps=steps, seed=settings.seed)
    session = load_candidate(folder, settings)
    picture = check_image_choice(manifest, image)
    return conversation_about(session, picture, prompt, num_steps=steps)


def load_candidate(folder: Path, settings: ValidationSettings) -> Session:
    """Open the bundle in the backend that is validated; its digests were checked before."""
    options = dict(settings.backend_options)
    known = {
        field.name for field in dataclasses.fields(BACKENDS.get(settings.backend).options)
    }
    if settings.num_threads is not None and "num_threads" in known:
        options["num_threads"] = settings.num_threads
    return load(folder, settings.backend, verify=False, **options)


def random_conversation(
    manifest: Manifest, image_size: int | None, *, num_steps: int, seed: int
) -> Conversation:
    """Draw a prompt with an image and an answer.

    Args:
        manifest: Of the bundle.
        image_size: Height and width of pixel values; None for a bundle without a tower, which
            is fed random image features.
        num_steps: Tokens of the answer.
        seed: Of everything that is drawn.
    """
    rng = np.random.default_rng(seed)
    geometry = manifest.geometry
    ids = rng.integers(0, geometry.vocab_size, _TEXT_BEFORE + _TEXT_AFTER + num_steps)
    ids[ids == manifest.image_token_id] = 0
    prompt = np.insert(ids[: _TEXT_BEFORE + _TEXT_AFTER], _TEXT_BEFORE, IMAGE_PLACEHOLDER_ID)
    pixels = features = None
    if image_size is not None:
        shape = (1, 3, image_size, image_size)
        pixels = rng.standard_normal(shape, np.float32)
    else:
        num_rows = geometry.num_image_tokens or _NUM_IMAGE_ROWS
        features = rng.standard_normal((1, num_rows, geometry.hidden_size), np.float32)
    return Conversation(
        prompt, ids[-num_steps:], pixels, features, f"random values, seed {seed}"
    )


def conversation_about(
    session: Session, image: str | None, prompt: str, *, num_steps: int
) -> Conversation:
    """Read a prompt as the bundle does; the answer is the session's own, likeliest tokens.

    It goes on behind the end of the answer, so that there are `num_steps` tokens.

    Args:
        session: Of the bundle.
        image: A picture; None for a text-only prompt.
        prompt: The question; the bundle's chat template is put around it.
        num_steps: Tokens of the answer.

    Raises:
        InvalidInputError: If the bundle has no tokenizer, or the picture cannot be used.
    """
    text = session.tokenizer.render(prompt, with_image=image is not None)
    ids = np.asarray(session.tokenizer.encode(text), np.int64)
    pixels = None if image is None else session.image_processor([image])
    prompts = session.normalised_prompts(ids, np.ones_like(ids))
    logits = session.prefill(prompts, pixels, max_new_tokens=num_steps).logits
    tokens: list[int] = []
    while len(tokens) < num_steps:
        if session.is_full[0]:
            raise InvalidInputError(
                f"Only {len(tokens)} tokens fit behind the prompt, {num_steps} steps were "
                "asked for. Shorten the prompt or ask for fewer steps."
            )
        tokens.append(int(logits[0].argmax()))
        logits = session.decode([tokens[-1]]).logits
    what = "text" if image is None else image
    return Conversation(
        ids, np.array(tokens, np.int64), pixels, None, f"{what}, {prompt!r}, greedy answer"
    )


def _image_size(manifest: Manifest) -> int:
    (pixels,) = manifest.tensors[f"{layout.VISUAL_FOLDER}/{layout.VISUAL}"]["inputs"]
    return int(pixels["shape"][-1])
