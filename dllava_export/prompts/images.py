"""Image files to pixel values: what the vision tower was trained on, in PIL and NumPy."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dllava_export.errors import InvalidInputError, UnsupportedModelError

__all__ = ["ImageProcessor", "ImageSource", "read_image"]

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray

_ASPECT_RATIOS = ("pad", "square", "crop")
_MAX_EDGE = 1 << 13
_MAX_NUMBER = 1e30  # a float32 with room to multiply
_MAX_ASPECT = 200  # a 1 x 5000 strip would be resized to 336 x 1,680,000 before it is cropped
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read one image file as upright RGB.

    The EXIF orientation is applied. Transparent pixels are blended over white. 16-bit grey is
    brought to 8 bits by its high byte. Of an animation the first frame is taken.

    Args:
        path: A file of any format that Pillow reads.

    Returns:
        An image of mode `RGB`.

    Raises:
        InvalidInputError: If the file is missing, empty, truncated or not an image.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise InvalidInputError(
            f"Image file {path} does not exist; expected an image such as PNG or JPEG. "
            "Check the path."
        )
    if not path.is_file():
        raise InvalidInputError(
            f"{path} is not a file; expected an image such as PNG or JPEG. Pass an image file."
        )
    if path.stat().st_size == 0:
        raise InvalidInputError(
            f"Image file {path} has 0 bytes; expected an image such as PNG or JPEG. "
            "Copy or download the file again."
        )
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), f"Image file {path}")
    except _DECODE_ERRORS as error:
        raise InvalidInputError(
            f"Image file {path} ({path.stat().st_size} bytes) cannot be decoded: {error}. "
            "Expected a complete image such as PNG or JPEG. "
            "Open it in an image viewer, or copy it again."
        ) from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    # A mode of 32 bits says nothing of the range. NaN fails these comparisons too.
    if image.mode == "F" or not (low >= 0 and high <= 65535):
        raise InvalidInputError(
            f"{name} has mode {image.mode!r} with values {low} to {high}; expected 8 or 16 "
            "bits per channel. Convert it to an 8-bit PNG first."
        )
    if image.mode.startswith("I;16") or high > 255:
        values = values.astype(np.uint16) >> 8
    return Image.fromarray(values.astype(np.uint8))


def _image_from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InvalidInputError(
            f"Image array has shape {list(array.shape)} and dtype {array.dtype}; expected "
            "[height, width, 3] and uint8. Convert it, with channels last and values 0 to 255."
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _edge_lengths(name: str, value: Any) -> tuple[int, int | None]:
    """Return (height, width); width is None where `value` gives the shortest edge only."""
    if isinstance(value, int):
        return value, (value if name == "crop_size" else None)
    if isinstance(value, dict) and "shortest_edge" in value and len(value) == 1:
        return int(value["shortest_edge"]), None
    if isinstance(value, dict) and {"height", "width"} <= value.keys():
        return int(value["height"]), int(value["width"])
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
            images: Each a path, a PIL image, or an array [height, width, 3], uint8.

        Returns:
            [batch, 3, size, size], float32. Normalised RGB; batch is 0 for an empty list.

        Raises:
            InvalidInputError: If an image cannot be read or is of a shape that makes no sense.
        """
        pixel_values = np.empty((len(images), 3, self.size, self.size), np.float32)
        for row, source in zip(pixel_values, images, strict=True):
            row[:] = self._process(source)
        return pixel_values

    def _process(self, source: ImageSource) -> np.ndarray:
        if isinstance(source, np.ndarray):
            image = _image_from_array(source)
        elif isinstance(source, Image.Image):
            image = _to_rgb(ImageOps.exif_transpose(source), "Image")
        else:
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
    """Return a finite float32 number; a standard deviation and a factor are not 0."""
    is_number = isinstance(value, int | float) and abs(value) <= _MAX_NUMBER
    if not is_number or (name != "image_mean" and abs(value) < 1 / _MAX_NUMBER):
        raise UnsupportedModelError(
            f"preprocessor_config has {value!r} in {name}, expected a finite number"
            f"{'' if name == 'image_mean' else ' other than 0'}. Use the "
            "preprocessor_config.json of a CLIP vision tower."
        )
    return float(value)
