"""Image files to pixel values: what the vision tower was trained on, in PIL and NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dllava_export.errors import InvalidInputError, UnsupportedModelError
from dllava_export.prompts.image_sources import ImageSource, read_image
from dllava_export.prompts.placeholders import check_image_list

__all__ = ["ImageProcessor"]

_ASPECT_RATIOS = ("pad", "square", "crop")
_MAX_EDGE = 1 << 13
_MIN_SCALE = 1e-6  # of a factor or a standard deviation; its inverse is the largest
_MAX_ASPECT = 200  # a 1 x 5000 strip would be resized to 336 x 1,680,000 before it is cropped
_MAX_PADDED_EDGE = 13_377  # of a padded square: 512 MiB


def _edge_lengths(name: str, value: Any) -> tuple[int, int | None]:
    """Return (height, width); width is None where `value` gives the shortest edge only."""
    edges = list(value.values()) if isinstance(value, dict) else [value]
    is_whole = all(type(edge) is int for edge in edges)
    if is_whole and isinstance(value, int):
        return value, (value if name == "crop_size" else None)
    if is_whole and isinstance(value, dict):
        if "shortest_edge" in value and len(value) == 1:
            return value["shortest_edge"], None
        if {"height", "width"} <= value.keys():
            return value["height"], value["width"]
    raise UnsupportedModelError(
        f"preprocessor_config has {name} {value!r}; expected a number of pixels, "
        "{'shortest_edge': ...} or {'height': ..., 'width': ...}. "
        "Use the preprocessor_config.json of a CLIP vision tower."
    )


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Turns images into the pixel values that a CLIP vision tower reads.

    Attributes:
        size: Height and width of the output, in pixels.
        resize_to: (height, width) in pixels before the crop; with width None the shortest edge
            becomes `height` and the aspect ratio is kept.
        resample: Pillow's number of the resize filter; 3 is bicubic.
        rescale_factor: What pixel values 0 to 255 are multiplied by.
        mean: Mean of each channel, on the scale 0 to 1.
        std: Standard deviation of each channel, on the scale 0 to 1.
        pad_to_square: Whether the shorter edge is first padded with the mean colour
            (`image_aspect_ratio` "pad"), so that the crop loses nothing.
    """

    size: int
    resize_to: tuple[int, int | None]
    resample: int
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad_to_square: bool

    @classmethod
    def from_config(
        cls, preprocessor_config: dict[str, Any], image_aspect_ratio: str | None
    ) -> ImageProcessor:
        """Read a CLIP `preprocessor_config.json`, of any transformers version.

        Args:
            preprocessor_config: The parsed file. Missing values are those of CLIP.
            image_aspect_ratio: `pad`, or one of `square`, `crop`, None: resize and crop.

        Raises:
            UnsupportedModelError: If the config asks for other processing than CLIP's.
        """
        if image_aspect_ratio is not None and image_aspect_ratio not in _ASPECT_RATIOS:
            raise UnsupportedModelError(
                f"image_aspect_ratio is {image_aspect_ratio!r}, expected one of "
                f"{', '.join(_ASPECT_RATIOS)}. Models that cut an image into several tiles "
                "are not supported; use a LLaVA-1.5 checkpoint."
            )
        for flag in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if not preprocessor_config.get(flag, True):
                raise UnsupportedModelError(
                    f"preprocessor_config has {flag} false, expected true. "
                    "Use the preprocessor_config.json of a CLIP vision tower."
                )
        resize_to = _edge_lengths("size", preprocessor_config.get("size", 224))
        crop = _edge_lengths("crop_size", preprocessor_config.get("crop_size", 224))
        height, width = crop
        if height != width or not 1 <= height <= _MAX_EDGE:
            raise UnsupportedModelError(
                f"preprocessor_config crops to height {height} and width {width}, expected a "
                f"square of at most {_MAX_EDGE} pixels. Use the preprocessor_config.json of a "
                "CLIP vision tower."
            )
        edges = [edge for edge in resize_to if edge is not None]
        if min(edges) < height or max(edges) > _MAX_EDGE:
            raise UnsupportedModelError(
                f"preprocessor_config resizes to {preprocessor_config.get('size')} and crops "
                f"to {height} pixels, expected a crop no larger than the resized image, and "
                f"edges of at most {_MAX_EDGE}. Correct size or crop_size."
            )
        return cls(
            size=height,
            resize_to=resize_to,
            resample=_resample(preprocessor_config),
            rescale_factor=_number(
                preprocessor_config.get("rescale_factor", 1 / 255), "rescale_factor"
            ),
            mean=_channels(
                preprocessor_config, "image_mean", (0.48145466, 0.4578275, 0.40821073)
            ),
            std=_channels(
                preprocessor_config, "image_std", (0.26862954, 0.26130258, 0.27577711)
            ),
            pad_to_square=image_aspect_ratio == "pad"
            or bool(preprocessor_config.get("do_pad", False)),
        )

    def __call__(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Return the pixel values of `images`.

        Args:
            images: Each what `read_image` takes: a path, bytes, an open file, a PIL image, an
                array [height, width, 3], uint8, and others.

        Returns:
            [batch, 3, size, size], float32. Normalised RGB; batch is 0 for an empty list.

        Raises:
            InvalidInputError: If an image cannot be read or is of a shape that makes no sense.
        """
        check_image_list(images)
        pixel_values = np.empty((len(images), 3, self.size, self.size), np.float32)
        for row, source in zip(pixel_values, images, strict=True):
            row[:] = self._process(source)
        return pixel_values

    def _process(self, source: ImageSource) -> np.ndarray:
        image = read_image(source)
        if self.pad_to_square:
            image = self._padded(image)
        image = self._cropped(self._resized(image))
        # Rescaled in float64 and normalised in float32, as transformers does.
        rescaled = np.asarray(image, np.float64) * self.rescale_factor
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        return ((rescaled.astype(np.float32) - mean) / std).transpose(2, 0, 1)

    def _padded(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if width == height:
            return image
        edge = max(width, height)
        if edge > _MAX_PADDED_EDGE:
            raise InvalidInputError(
                f"Image is {width} x {height} pixels and is padded to a square; expected a "
                f"longer edge of at most {_MAX_PADDED_EDGE} pixels. Make it smaller, or crop it."
            )
        colour = tuple(int(255 * mean) for mean in self.mean)
        square = Image.new("RGB", (edge, edge), colour)
        square.paste(image, ((edge - width) // 2, (edge - height) // 2))
        return square

    def _resized(self, image: Image.Image) -> Image.Image:
        height, width = self.resize_to
        if width is None:
            short, long = sorted(image.size)
            if long > _MAX_ASPECT * short:
                raise InvalidInputError(
                    f"Image is {image.width} x {image.height} pixels; expected a longer edge "
                    f"of at most {_MAX_ASPECT} times the shorter one. Crop the image."
                )
            edge = height
            long_edge = int(edge * long / short)
            wide = image.width > image.height
            height, width = (edge, long_edge) if wide else (long_edge, edge)
        return image.resize((width, height), resample=Image.Resampling(self.resample))

    def _cropped(self, image: Image.Image) -> Image.Image:
        left = (image.width - self.size) // 2
        top = (image.height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


def _resample(config: dict[str, Any]) -> int:
    value = config.get("resample", Image.Resampling.BICUBIC)
    if value not in list(Image.Resampling):
        raise UnsupportedModelError(
            f"preprocessor_config has resample {value!r}, expected one of Pillow's filters, "
            f"{', '.join(map(str, sorted(map(int, Image.Resampling))))}. Use the "
            "preprocessor_config.json of a CLIP vision tower."
        )
    return int(value)


def _channels(
    config: dict[str, Any], name: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    value = config.get(name, default)
    values = value if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3:
        raise UnsupportedModelError(
            f"preprocessor_config has {len(values)} values in {name}, expected 3: red, green, "
            "blue. Use the preprocessor_config.json of a CLIP vision tower."
        )
    red, green, blue = (_number(channel, name) for channel in values)
    return red, green, blue


def _number(value: Any, name: str) -> float:
    """Return a mean from 0 to 1, a standard deviation or a factor above 0."""
    low, high = (0.0, 1.0) if name == "image_mean" else (_MIN_SCALE, 1 / _MIN_SCALE)
    if not (isinstance(value, int | float) and low <= value <= high):
        raise UnsupportedModelError(
            f"preprocessor_config has {value!r} in {name}, expected a number from {low:g} to "
            f"{high:g}. Use the preprocessor_config.json of a CLIP vision tower."
        )
    return float(value)
