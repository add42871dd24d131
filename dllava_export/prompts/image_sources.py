"""Pictures in every form that callers have them in, to upright RGB."""

from __future__ import annotations

import base64
import binascii
import io
import os
import pathlib
import re
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dllava_export.errors import InvalidInputError
from dllava_export.short_text import shortened

if TYPE_CHECKING:
    import torch

__all__ = ["ImageSource", "read_image"]

ImageSource: TypeAlias = (
    "str | bytes | bytearray | memoryview | os.PathLike[str] | BinaryIO | Image.Image"
    " | np.ndarray | torch.Tensor"
)
"""What `read_image` takes."""

# Pillow reads some forty more, of which some start other programs (EPS).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_MAX_PIXELS = 89_000_000  # below where Pillow begins to warn; 256 MiB as RGB
_MAX_BYTES = 1 << 28
_MAX_PATH = 4096
# How PNG, JPEG, WEBP, GIF and TIFF files begin in base64.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "SUkqA", "TU0AK")
_CHANNELS = (1, 3, 4)


def read_image(source: ImageSource) -> Image.Image:
    """Return a picture as upright RGB.

    The EXIF orientation is applied. Transparent pixels are blended over white. 16-bit grey is
    brought to 8 bits by its high byte. Of an animation the first frame is taken.

    Args:
        source: The path of a file (PNG, JPEG, WEBP, GIF, BMP, TIFF or PPM), its bytes, an open
            binary file, a `data:` or `file:` URL, its bytes in base64; a PIL image; an array
            [height, width] or [height, width, channels] of 1, 3 or 4 channels, uint8; a
            tensor of torch [channels, height, width], uint8.

    Returns:
        An image of mode `RGB`.

    Raises:
        InvalidInputError: If it is none of these, missing, empty, truncated, or too large.
    """
    if isinstance(source, Image.Image):
        return _upright(source, "Image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_bytes(bytes(source), "Image data")
    if isinstance(source, str):
        return _from_text(source)
    if isinstance(source, os.PathLike):
        return _from_path(pathlib.Path(os.fsdecode(source)))
    if hasattr(source, "detach") and hasattr(source, "numpy"):
        return _from_tensor(source)
    if hasattr(source, "read"):
        return _from_file(source)
    raise InvalidInputError(
        f"An image is a {type(source).__name__} ({shortened(repr(source))}), expected a path, "
        "bytes, an open binary file, a PIL image, an array or a tensor. Pass one picture for "
        "each prompt."
    )


def _from_text(text: str) -> Image.Image:
    scheme = text[:8].lower()
    if scheme.startswith(("http://", "https://")):
        raise InvalidInputError(
            f"Image {shortened(text)} is to be fetched from the network, expected a picture at "
            "hand. Download it, and pass the file or its bytes."
        )
    if scheme.startswith("data:"):
        return _from_data_url(text)
    if scheme.startswith("file:"):
        path = urllib.request.url2pathname(urllib.parse.urlsplit(text).path)
        return _from_path(pathlib.Path(path))
    if text.startswith(_BASE64_STARTS) and not _exists(text):
        return _from_bytes(_from_base64(text), "Image data in base64")
    if len(text) > _MAX_PATH:
        raise InvalidInputError(
            f"An image is a text of {len(text)} characters ({shortened(text)}), expected the "
            "path of a file, a data: URL, or a picture in base64. Pass bytes as bytes."
        )
    return _from_path(pathlib.Path(text))


def _exists(text: str) -> bool:
    try:
        return os.path.exists(text)
    except (OSError, ValueError):
        return False


def _from_data_url(url: str) -> Image.Image:
    head, comma, data = url.partition(",")
    if not comma:
        raise InvalidInputError(
            f"Image {shortened(url)} is no data: URL, expected data:image/png;base64,... ."
        )
    content = urllib.parse.unquote_to_bytes(data)
    if head.lower().endswith(";base64"):
        content = _from_base64(content.decode("latin-1"))
    return _from_bytes(content, "Image data of a data: URL")


def _from_base64(text: str) -> bytes:
    text = re.sub(r"\s+", "", text).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError(
            f"Image data {shortened(text)} is no base64 ({error}), expected A-Z, a-z, 0-9, + "
            "and /. Encode the picture's bytes again."
        ) from error


def _from_path(path: pathlib.Path) -> Image.Image:
    name = f"Image file {_shown(path)}"
    try:
        exists, is_file = path.exists(), path.is_file()
        size = path.stat().st_size if is_file else 0
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{name} cannot be found ({shortened(error)}); expected an image such as PNG or "
            "JPEG. Check the path."
        ) from error
    if not exists:
        raise InvalidInputError(
            f"{name} does not exist; expected an image such as PNG or JPEG. Check the path."
        )
    if not is_file:
        raise InvalidInputError(
            f"{_shown(path)} is not a file; expected an image such as PNG or JPEG. Pass an "
            "image file."
        )
    if size == 0:
        raise InvalidInputError(
            f"{name} has 0 bytes; expected an image such as PNG or JPEG. "
            "Copy or download the file again."
        )
    return _decoded(path, f"{name} ({size} bytes)")


def _shown(path: pathlib.Path) -> str:
    text = str(path)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def _from_file(file: Any) -> Image.Image:
    name = "The open image file"
    try:
        if file.seekable():
            file.seek(0)
        data = file.read(_MAX_BYTES + 1)
    # Whoever wrote the class decides what it raises: closed, for writing only, no `seekable`.
    except Exception as error:
        raise InvalidInputError(
            f"{name} cannot be read ({shortened(error)}), expected a file opened in mode 'rb'."
        ) from error
    if not isinstance(data, bytes):
        raise InvalidInputError(
            f"{name} gives {type(data).__name__}, expected bytes. Open it in mode 'rb'."
        )
    return _from_bytes(data, name)


def _from_bytes(data: bytes, name: str) -> Image.Image:
    if not data:
        raise InvalidInputError(
            f"{name} has 0 bytes; expected an image such as PNG or JPEG. Read the picture again."
        )
    if len(data) > _MAX_BYTES:
        raise InvalidInputError(
            f"{name} has more than {_MAX_BYTES} bytes, expected one picture. Save it smaller."
        )
    return _decoded(io.BytesIO(data), f"{name} ({len(data)} bytes)")


def _decoded(file: pathlib.Path | io.BytesIO, name: str) -> Image.Image:
    try:
        image = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise InvalidInputError(
            f"{name} cannot be decoded: it is none of {', '.join(_FORMATS)}. Open it in an "
            "image viewer, and save it as PNG."
        ) from error
    # Pillow's readers fail in as many ways as files can be damaged.
    except Exception as error:
        raise _cannot_be_decoded(name, error) from error
    with image:
        return _upright(image, name)


def _cannot_be_decoded(name: str, error: Exception) -> InvalidInputError:
    return InvalidInputError(
        f"{name} cannot be decoded: {shortened(error)}. Expected a complete image such as PNG "
        "or JPEG. Open it in an image viewer, or copy it again."
    )


def _upright(image: Image.Image, name: str) -> Image.Image:
    """Load an image and return it as RGB, after a look at its size."""
    num_pixels = image.width * image.height
    if not 1 <= num_pixels <= _MAX_PIXELS:
        remedy = "Make it smaller" if num_pixels else "Pass another picture"
        raise InvalidInputError(
            f"{name} has {image.width} x {image.height} pixels; expected 1 to {_MAX_PIXELS} "
            f"pixels. {remedy}."
        )
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), name)
    except InvalidInputError:
        raise
    # As for `Image.open`; the file of a lazily loaded image may be closed, too.
    except Exception as error:
        raise _cannot_be_decoded(name, error) from error


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


def _from_tensor(tensor: Any) -> Image.Image:
    shape = tuple(tensor.shape)
    if str(tensor.dtype) != "torch.uint8":  # NumPy has no bfloat16 to look at
        raise _wrong_array("tensor", shape, tensor.dtype)
    array = tensor.detach().cpu().numpy()
    is_last = len(shape) == 3 and shape[0] not in _CHANNELS and shape[2] in _CHANNELS
    return _from_array(array if len(shape) != 3 or is_last else array.transpose(1, 2, 0))


def _from_array(array: np.ndarray) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS)
    if array.dtype != np.uint8 or not is_image or 0 in array.shape:
        raise _wrong_array("array", array.shape, array.dtype)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return _upright(Image.fromarray(np.ascontiguousarray(array)), "Image array")


def _wrong_array(what: str, shape: tuple[int, ...], dtype: Any) -> InvalidInputError:
    form = "[channels, height, width]" if what == "tensor" else "[height, width, channels]"
    return InvalidInputError(
        f"Image {what} has shape {shortened(list(shape))} and dtype {shortened(dtype)}; "
        f"expected {form} of 1, 3 or 4 channels and uint8. Convert it to values 0 to 255."
    )
