"""What a bundle carries beside its graphs to read prompts: tokenizer and picture settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dllava_export.bundles import layout
from dllava_export.bundles.manifest import Manifest
from dllava_export.errors import BundleError, InvalidInputError
from dllava_export.families.config_file import read_json
from dllava_export.families.config_kinds import PREPROCESSOR_KINDS

if TYPE_CHECKING:
    from dllava_export.prompts.images import ImageProcessor
    from dllava_export.prompts.tokenizer import ChatTokenizer

__all__ = ["open_image_processor", "open_tokenizer"]


def open_tokenizer(folder: Path, manifest: Manifest) -> ChatTokenizer:
    """Load a bundle's tokenizer with its chat template.

    Raises:
        InvalidInputError: If the bundle has none.
        BundleError: If it cannot be read.
    """
    from dllava_export.prompts.tokenizer import ChatTokenizer

    if manifest.chat_template is None:
        raise InvalidInputError(
            f"{folder} has no tokenizer, so it takes token ids instead of text. Use "
            "--input-ids, or export from a checkpoint with a tokenizer."
        )
    return ChatTokenizer.from_folder(
        folder / layout.LLM_FOLDER,
        template=manifest.chat_template,
        image_token_id=manifest.image_token_id,
    )


def open_image_processor(folder: Path, manifest: Manifest) -> ImageProcessor:
    """Load what turns pictures into a bundle's `pixel_values`.

    Raises:
        InvalidInputError: If the bundle takes no pictures.
        BundleError: If its settings cannot be read.
    """
    from dllava_export.prompts.images import ImageProcessor

    if not manifest.has_visual:
        raise InvalidInputError(
            f"{folder} has no vision tower and takes no images. Export it from a LLaVA "
            "checkpoint, or leave the image out."
        )
    path = folder / layout.VISUAL_FOLDER / "preprocessor_config.json"
    config = read_json(
        path, "the visual part of a bundle", BundleError, kinds=PREPROCESSOR_KINDS
    )
    return ImageProcessor.from_config(config, manifest.image_aspect_ratio)
