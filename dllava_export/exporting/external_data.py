"""Where external tensors of an ONNX file lie, and their bytes.

onnx's own reader refuses symbolic links, which a hub cache consists of, and files with several
hard links. Here a place is checked instead: a path below the model's folder, an offset and a
length inside a regular file.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from dllava_export.errors import BundleError

if TYPE_CHECKING:
    import onnx

__all__ = ["ExternalPlace", "external_place", "tensor_bytes"]

_FOUR_BIT_TYPES = ("INT4", "UINT4", "FLOAT4E2M1")  # two values in a byte


@dataclasses.dataclass(frozen=True)
class ExternalPlace:
    """Where the values of an external tensor lie.

    Attributes:
        file: The data file; may be a symbolic link.
        offset: First byte.
        length: Number of bytes; the file has them all.
    """

    file: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """Return the values, little-endian."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Return the bytes of a tensor's values, wherever they lie."""
    import onnx

    num_values = math.prod(tensor.dims)
    if onnx.TensorProto.DataType.Name(tensor.data_type) in _FOUR_BIT_TYPES:
        return (num_values + 1) // 2
    return num_values * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def external_place(path: Path, tensor: onnx.TensorProto) -> ExternalPlace:
    """Return where a tensor's values lie.

    Args:
        path: The ONNX file that the tensor is from.
        tensor: One with external data.

    Raises:
        BundleError: If the place is outside the folder of `path`, is no file, or does not hold
            the whole tensor.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    size = tensor_bytes(tensor)
    offset = _number(path, tensor.name, entries, "offset", 0)
    length = _number(path, tensor.name, entries, "length", size)
    if length != size:
        raise BundleError(
            f"{path} gives the weight {tensor.name!r} {length} bytes, its shape "
            f"{list(tensor.dims)} takes {size}. Export it again."
        )
    file = _file(path, tensor.name, entries.get("location", ""))
    found = file.stat().st_size if file.is_file() else None
    if found is None or found < offset + size:
        state = "is missing" if found is None else f"has {found} bytes"
        raise BundleError(
            f"{file} {state}, expected the weights of {path.name} up to byte {offset + size}. "
            "Copy the external data along with the model."
        )
    return ExternalPlace(file, offset, size)


def _number(path: Path, name: str, entries: dict[str, str], key: str, default: int) -> int:
    text = entries.get(key, str(default))
    if not (text.isascii() and text.isdigit()):
        raise BundleError(
            f"{path} gives the weight {name!r} the {key} {text!r}, expected a number of bytes. "
            "Export it again."
        )
    return int(text)


def _file(path: Path, name: str, location: str) -> Path:
    place = PurePosixPath(location.replace("\\", "/"))
    if not place.name or place.is_absolute() or ".." in place.parts or "\0" in location:
        raise BundleError(
            f"{path} keeps the weight {name!r} in {str(place)!r}; expected a file beside "
            "the model or below. Save it with its external data in one folder."
        )
    file = path.parent / place
    if not file.exists() and path.is_symlink():
        behind = path.resolve().parent / place
        return behind if behind.is_file() else file
    return file
