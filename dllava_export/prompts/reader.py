"""Read prompts: token ids, text and pictures become rows that fit the bundle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dllava_export.bundles import layout
from dllava_export.bundles.embedding import EmbeddingTable
from dllava_export.bundles.manifest import Manifest
from dllava_export.errors import BundleError, CapacityError, InvalidInputError
from dllava_export.families.config_file import read_json
from dllava_export.families.registry import positions_of
from dllava_export.families.special_token_ids import tokenizer_ids
from dllava_export.names import IMAGE_PLACEHOLDER_ID
from dllava_export.prompts.bundle_files import open_image_processor, open_tokenizer
from dllava_export.prompts.image_values import checked_values
from dllava_export.prompts.placeholders import check_prompt, normalise_placeholders
from dllava_export.prompts.rows import PromptRows, assemble_prompt
from dllava_export.prompts.token_ids import CheckedPrompts, checked_prompts, without_padding

if TYPE_CHECKING:
    from dllava_export.prompts.images import ImageProcessor
    from dllava_export.prompts.tokenizer import ChatTokenizer


__all__ = ["AttentionMask", "PromptReader", "Prompts"]

Prompts = np.ndarray | Sequence[np.ndarray] | Sequence[Sequence[int]] | Sequence[int]
"""[batch, t] token ids, one row for each sample, or the [t] ids of a single one."""

AttentionMask: TypeAlias = "np.ndarray | Sequence[np.ndarray] | Sequence[Sequence[int]]"

_PROCESSOR_MAKES_PIXELS = "Use session.image_processor to prepare pictures."
_SESSION_MAKES_FEATURES = "Use session.encode_images to make them."


class PromptReader:
    """What a bundle carries beside its graphs to read prompts, opened when first needed.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        max_length: Tokens a prompt may have at most.
        encode_images: Turns pixel values into image features.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        max_length: int,
        encode_images: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        self.manifest = manifest
        self.max_length = max_length
        self.positions = positions_of(manifest.family)
        self._folder = folder
        self._encode_images = encode_images
        self._embedding: EmbeddingTable | None = None
        if manifest.embedding is not None:
            self._embedding = EmbeddingTable(folder / layout.LLM_FOLDER, manifest.embedding)

    @functools.cached_property
    def tokenizer(self) -> ChatTokenizer:
        """The bundle's tokenizer; see `open_tokenizer`."""
        return open_tokenizer(self._folder, self.manifest)

    @functools.cached_property
    def image_processor(self) -> ImageProcessor:
        """What turns pictures into `pixel_values`; see `open_image_processor`."""
        return open_image_processor(self._folder, self.manifest)

    def checked_pixels(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return pixel values as an array of the right shape.

        Raises:
            InvalidInputError: If the shape or the kind of the values is wrong, one is not
                finite, or the bundle takes no pictures.
        """
        size = self.image_processor.size
        pixels = checked_values(
            pixel_values, "pixel_values", self._dtype, _PROCESSOR_MAKES_PIXELS
        )
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise InvalidInputError(
                f"pixel_values has shape {list(pixels.shape)}, expected [num_images, 3, {size}, "
                f"{size}]. {_PROCESSOR_MAKES_PIXELS}"
            )
        return pixels

    @property
    def _dtype(self) -> np.dtype:
        return self.manifest.precision.activations.numpy

    @functools.cached_property
    def pad_token_ids(self) -> frozenset[int]:
        """Ids that fill up shorter prompts of a batch; empty where nothing is known of them."""
        if self.manifest.chat_template is not None:
            # Not the configuration's too: the tokenizer may give that id to a word.
            found = {self._special_ids.get("pad")}
        else:
            text_config = self._config.get("text_config", {})
            found = {self._config.get("pad_token_id"), text_config.get("pad_token_id")}
        return frozenset(token for token in found if isinstance(token, int) and token >= 0)

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        path = self._folder / layout.LLM_FOLDER / "config.json"
        return read_json(path, "a bundle", BundleError) if path.is_file() else {}

    @functools.cached_property
    def _special_ids(self) -> Mapping[str, int]:
        """What the tokenizer's files say; the tokenizer itself takes a second to import."""
        folder = self._folder / layout.LLM_FOLDER
        if (folder / "tokenizer.json").is_file():
            return tokenizer_ids(folder)
        return self.tokenizer.special_ids

    @functools.cached_property
    def _padding_is_a_token_too(self) -> bool:
        """Whether a pad id also begins or ends a text, or stands for an unknown word."""
        others = {*self.manifest.eos_token_ids, self._config.get("bos_token_id")}
        if self.manifest.chat_template is not None:
            others.update(self._special_ids.get(role) for role in ("bos", "eos", "unk"))
        return bool(self.pad_token_ids & others)

    def normalised(
        self, input_ids: Prompts, attention_mask: AttentionMask | None = None
    ) -> CheckedPrompts:
        """Return one int64 array per sample, with -200 as the only image placeholder.

        Args:
            input_ids: [batch, t] int64, one array per sample, or [t] of a single one. What
                this method returned is returned as it is.
            attention_mask: As many 0 and 1; 0 where `input_ids` is padded.

        Raises:
            InvalidInputError: If a sample is not a row of integers, the mask does not fit, or
                there is none and a prompt is padded.
        """
        if isinstance(input_ids, CheckedPrompts) and attention_mask is None:
            return input_ids
        num_image_tokens = self.manifest.geometry.num_image_tokens
        prompts = without_padding(
            checked_prompts(input_ids),
            attention_mask,
            self.pad_token_ids,
            self._padding_is_a_token_too,
        )
        return CheckedPrompts(
            normalise_placeholders(ids, self.manifest.image_token_id, num_image_tokens)
            for ids in prompts
        )

    def lookup(self, ids: np.ndarray) -> np.ndarray:
        """Return embeddings [..., hidden_size] of token ids [...].

        Raises:
            InvalidInputError: If an id is outside the vocabulary, or there is no table.
        """
        if self._embedding is None:
            raise InvalidInputError(
                f"{self._folder} has no token embeddings, so it cannot take token ids."
            )
        return self._embedding.lookup(ids)

    def rows(
        self,
        input_ids: Prompts,
        pixel_values: np.ndarray | None,
        image_features: np.ndarray | None,
        outputs: np.ndarray | None = None,
        attention_mask: AttentionMask | None = None,
    ) -> PromptRows:
        """Check prompts against images and return the rows to feed.

        Args:
            input_ids: [batch, t] int64, or one array per sample.
            pixel_values: [num_images, 3, image_size, image_size] float32 or None.
            image_features: [num_images, num_image_tokens, hidden_size] or None.
            outputs: [batch, j] int64 generated so far, or None.
            attention_mask: As for `normalised`.

        Raises:
            InvalidInputError: If prompts and images do not fit the bundle or each other.
            CapacityError: If a prompt is longer than `max_length`.
        """
        prompts = self.normalised(input_ids, attention_mask)
        if not prompts:
            raise InvalidInputError("There is no prompt; expected at least one.")
        if pixel_values is not None and image_features is not None:
            raise InvalidInputError(
                "pixel_values and image_features were both given; expected one of the two. "
                "Features are used in place of pixels."
            )
        if pixel_values is not None:
            pixel_values = self.checked_pixels(pixel_values)
        if image_features is not None:
            image_features = self._checked_features(image_features)
        num_images = max(
            (len(x) for x in (pixel_values, image_features) if x is not None), default=0
        )
        # With an image for every prompt or for none, the message can name the sample.
        has_image: bool | list[bool] = num_images > 0
        if 0 < num_images < len(prompts):
            has_image = [bool((ids == IMAGE_PLACEHOLDER_ID).any()) for ids in prompts]
        check_prompt(
            prompts, has_image=has_image, vocab_size=self.manifest.geometry.vocab_size
        )
        if pixel_values is not None:
            image_features = self._encode_images(pixel_values)
        if outputs is not None and len(outputs) != len(prompts):
            raise InvalidInputError(
                f"output_ids is for {len(outputs)} samples, the prompts are {len(prompts)}."
            )
        rows = assemble_prompt(
            prompts, image_features, self.lookup, self.positions, outputs=outputs
        )
        num_outputs = 0 if outputs is None else outputs.shape[1]
        longest = int(rows.lengths.max()) - num_outputs
        if longest > self.max_length:
            raise CapacityError(
                f"The prompt has {longest} tokens ({int(rows.num_image.max())} of them image "
                f"tokens), the session has room for {self.max_length}. Shorten the prompt"
                f"{self._more_room()}."
            )
        return rows

    def _more_room(self) -> str:
        most = self.manifest.max_position_embeddings
        if self.max_length < most:
            return f" or load the bundle with a larger max_length ({most} at most)"
        return ": the model takes no longer ones"

    def _checked_features(self, image_features: np.ndarray) -> np.ndarray:
        features = checked_values(
            image_features, "image_features", self._dtype, _SESSION_MAKES_FEATURES
        )
        geometry = self.manifest.geometry
        shape = features.shape
        # A bare decoder does not know how many rows an image has.
        num_rows = geometry.num_image_tokens or (shape[1] if len(shape) == 3 else "n")
        if len(shape) != 3 or shape[1:] != (num_rows, geometry.hidden_size):
            raise InvalidInputError(
                f"image_features has shape {list(shape)}, expected [num_images, {num_rows}, "
                f"{geometry.hidden_size}]. {_SESSION_MAKES_FEATURES}"
            )
        return features

    def kept_lengths(self, rows: PromptRows) -> np.ndarray:
        """Return rows of each sample that go on from `sparse_layer`, [batch] int64."""
        sparsity = self.manifest.sparsity
        dropped = [
            n - sparsity.num_kept_image_tokens(int(n)) if n else 0 for n in rows.num_image
        ]
        return rows.lengths - np.array(dropped, np.int64)
