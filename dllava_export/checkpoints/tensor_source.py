"""Where a checkpoint tensor lies and how to read it; nothing is loaded until asked for.

Headers are read at once (`safetensors_sources`, `torch_sources`), values later and in pieces
(`TensorSource.chunks`), so that a 7B checkpoint never has to fit in memory.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from dllava_export.errors import CheckpointError
from dllava_export.families.config_file import LFS_POINTER, LFS_REMEDY
from dllava_export.json_text import parse_json
from dllava_export.precision import NUMBER_FORMATS
from dllava_export.short_text import shortened

if TYPE_CHECKING:
    import torch


__all__ = [
    "CHUNK_BYTES",
    "DTYPE_NAMES",
    "IGNORED_KEYS",
    "MAX_TENSORS",
    "FileLocation",
    "RandomSource",
    "SafetensorsSource",
    "TensorSource",
    "TorchSource",
    "check_number_of_tensors",
    "safetensors_sources",
    "torch_sources",
]

CHUNK_BYTES = 16 << 20
MAX_TENSORS = 100_000
_MAX_HEADER_BYTES = 100_000_000

# Buffers that older versions of transformers stored; none of them is a weight.
IGNORED_KEYS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")

# Names as in a safetensors header.
DTYPE_NAMES: Mapping[str, np.dtype] = {f.stored_name: f.numpy for f in NUMBER_FORMATS.values()}


@dataclasses.dataclass(frozen=True)
class FileLocation:
    """Raw little-endian values of one tensor inside a file.

    Attributes:
        path: The file; may be a symbolic link.
        offset: First byte, from the start of the file; not necessarily aligned.
        num_bytes: Length in bytes.
    """

    path: Path
    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class TensorSource(abc.ABC):
    """One tensor that has not been loaded.

    Attributes:
        name: Key in the checkpoint, as its author wrote it.
        dtype: float32, float16 or bfloat16 (ml_dtypes).
        shape: Sizes, row-major.
        location: Where the bytes lie, or None where they cannot be referred to.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    location: FileLocation | None = None

    @property
    def num_values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the values in bytes, at `dtype`."""
        return self.num_values * self.dtype.itemsize

    @property
    def file(self) -> Path | None:
        """The file the tensor is in, if any; for messages."""
        return self.location.path if self.location else None

    @abc.abstractmethod
    def read(self) -> np.ndarray:
        """Return the values: `shape`, `dtype`; read-only and paged in lazily if possible."""

    @abc.abstractmethod
    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
        """Yield the values in row-major order, as 1-D arrays of at most `max_bytes` bytes."""


@dataclasses.dataclass(frozen=True)
class SafetensorsSource(TensorSource):
    """A tensor inside a `.safetensors` file; `location` is always set."""

    def read(self) -> np.ndarray:
        """Return a read-only memory map of the values."""
        assert self.location is not None
        if self.num_values == 0:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.location.path, self.dtype, "r", self.location.offset, self.shape)

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
        """Yield the values with plain file reads, so that no more than a chunk is resident."""
        assert self.location is not None
        num_left = self.num_values
        per_chunk = max(1, max_bytes // self.dtype.itemsize)
        with self.location.path.open("rb") as file:
            file.seek(self.location.offset)
            while num_left:
                num = min(num_left, per_chunk)
                data = file.read(num * self.dtype.itemsize)
                if len(data) != num * self.dtype.itemsize:
                    num_missing = num_left * self.dtype.itemsize - len(data)
                    raise CheckpointError(
                        f"{self.location.path} ended {num_missing} bytes before the end of "
                        f"tensor '{self.name}', expected {self.num_bytes} bytes of it. "
                        "It was truncated just now: restore it and export again."
                    )
                num_left -= num
                yield np.frombuffer(data, self.dtype)


@dataclasses.dataclass(frozen=True)
class TorchSource(TensorSource):
    """A tensor of a memory-mapped `.bin` file.

    Attributes:
        path: The file.
        tensor: The mapped tensor; holds the mapping open.
    """

    path: Path | None = None
    tensor: torch.Tensor | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def file(self) -> Path | None:
        """The `.bin` file."""
        return self.path

    def read(self) -> np.ndarray:
        """Return the mapped values; a copy only where they are not contiguous."""
        import torch

        assert self.tensor is not None
        tensor = self.tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type of its own
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
        """Yield slices of the mapped values."""
        flat = self.read().reshape(-1)
        per_chunk = max(1, max_bytes // self.dtype.itemsize)
        for start in range(0, flat.size, per_chunk):
            yield flat[start : start + per_chunk]


@dataclasses.dataclass(frozen=True)
class RandomSource(TensorSource):
    """A tensor whose values follow from a seed, its name and its shape.

    Vectors named `*.weight` belong to norms and are ones, `*.bias` is zeros, anything else is
    normal with standard deviation 0.02.

    Attributes:
        seed: Seed shared by all tensors of a checkpoint.
    """

    seed: int = 0

    def read(self) -> np.ndarray:
        """Return newly generated values, the same ones at every call."""
        pieces = list(self.chunks())
        flat = np.concatenate(pieces) if pieces else np.zeros(0, self.dtype)
        return flat.reshape(self.shape)

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
        """Yield generated values; they do not depend on `max_bytes`."""
        per_chunk = max(1, max_bytes // self.dtype.itemsize)
        digest = hashlib.sha256(f"{self.seed}/{self.name}".encode()).digest()
        # One stream per tensor, drawn piece by piece: a float32 normal uses up the generator
        # in the same way whatever the size of the pieces.
        generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        num_left = self.num_values
        while num_left:
            num = min(num_left, per_chunk)
            num_left -= num
            if self.name.endswith(".bias"):
                yield np.zeros(num, self.dtype)
            elif self.name.endswith(".weight") and len(self.shape) == 1:
                yield np.ones(num, self.dtype)
            else:
                values = generator.standard_normal(num, np.float32)
                yield (values * np.float32(0.02)).astype(self.dtype)


def _read_safetensors_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header of `path`, the offset of its data, and their number of bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(f"{path} holds no weights: {LFS_REMEDY}.")
            file.seek(0)
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if len(head) < 8 or not 2 <= length <= size - 8:
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file: its header claims "
                    f"{length} bytes, the file has {max(0, size - 8)} after the length field. "
                    "Download it again."
                )
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} has a header of {length} bytes, expected at most "
                    f"{_MAX_HEADER_BYTES}, the limit of the format. Download it again."
                )
            text = file.read(length)
        header = parse_json(text, unique_keys=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Expected a file.") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a safetensors file: its {length} byte header is not JSON "
            f"({error}). Download it again."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path} is not a safetensors file: its header is a JSON {type(header).__name__}, "
            "expected an object. Download it again."
        )
    header.pop("__metadata__", None)
    check_number_of_tensors(path, len(header))
    return header, 8 + length, size - 8 - length


def check_number_of_tensors(path: Path, number: int) -> None:
    """Refuse more tensors than `MAX_TENSORS`.

    Raises:
        CheckpointError: If there are more.
    """
    if number > MAX_TENSORS:
        raise CheckpointError(
            f"{path} lists {number} tensors, expected at most {MAX_TENSORS}: a 13B model has "
            "800. Name the checkpoint itself."
        )


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor of a safetensors header; `end` is exclusive."""

    key: str
    dtype_name: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _header_entry(path: Path, key: str, entry: object) -> _Entry:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(name) for name in ("dtype", "shape", "data_offsets"))
    if isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list):
        numbers = [*shape, *offsets]
        if len(offsets) == 2 and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            return _Entry(key, dtype, tuple(shape), offsets[0], offsets[1])
    raise CheckpointError(
        f"{path} is corrupt: the header entry of {key!r} is {str(entry)[:200]}, expected dtype, "
        "shape and data_offsets. Download it again."
    )


def _check_places(path: Path, entries: Iterable[_Entry], num_data_bytes: int) -> None:
    """Check that tensors lie end to end and fill the data: no overlap, no hole, no rest."""
    position, before = 0, "the start of the data"
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.end > num_data_bytes:
            raise CheckpointError(
                f"{path} is truncated: tensor {entry.key!r} ends at byte {entry.end} of the "
                f"data, the file has {num_data_bytes} bytes of data. Download it again."
            )
        if entry.begin != position or entry.end < entry.begin:
            what = "overlaps" if entry.begin < position else "leaves a hole behind"
            raise CheckpointError(
                f"{path} is corrupt: tensor {entry.key!r} at bytes {entry.begin} to {entry.end} "
                f"{what} {before}, expected it to start at byte {position}. Download it again."
            )
        position, before = entry.end, f"tensor {entry.key!r}"
    if position != num_data_bytes:
        raise CheckpointError(
            f"{path} is corrupt: its tensors end at byte {position}, the file has "
            f"{num_data_bytes} bytes of data, expected no more than the tensors. "
            "Download it again."
        )


def safetensors_sources(path: Path) -> dict[str, TensorSource]:
    """Read the header of a `.safetensors` file.

    Keys that match `IGNORED_KEYS` are left out. A header is refused that `safetensors` itself
    refuses: keys that stand twice, tensors that overlap or leave holes.

    Raises:
        CheckpointError: If the file is truncated, corrupt, or holds a type other than float32,
            float16 and bfloat16.
    """
    header, data_start, num_data_bytes = _read_safetensors_header(path)
    entries = [_header_entry(path, key, entry) for key, entry in header.items()]
    _check_places(path, entries, num_data_bytes)
    sources: dict[str, TensorSource] = {}
    for entry in entries:
        if IGNORED_KEYS.search(entry.key):
            continue
        dtype = DTYPE_NAMES.get(entry.dtype_name)
        if dtype is None:
            raise CheckpointError(
                f"{path}: tensor {entry.key!r} is {entry.dtype_name}, expected "
                f"{', '.join(DTYPE_NAMES)}. Use a checkpoint that is not quantised."
            )
        num_bytes = math.prod(entry.shape) * dtype.itemsize
        if entry.end - entry.begin != num_bytes:
            raise CheckpointError(
                f"{path} is corrupt: tensor {entry.key!r} has {entry.end - entry.begin} bytes, "
                f"{entry.dtype_name} {list(entry.shape)} needs {num_bytes}. Download it again."
            )
        location = FileLocation(path, data_start + entry.begin, num_bytes)
        sources[entry.key] = SafetensorsSource(entry.key, dtype, entry.shape, location)
    return sources


def torch_sources(path: Path) -> dict[str, TensorSource]:
    """Map a `.bin` file written by `torch.save` without loading its tensors.

    Keys that match `IGNORED_KEYS` are left out.

    Raises:
        CheckpointError: If it is not such a file, or holds anything but tensors of float32,
            float16 and bfloat16.
    """
    import torch

    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Expected a file.") from error
    if is_pointer:
        raise CheckpointError(f"{path} holds no weights: {LFS_REMEDY}.")
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    # What torch raises for a damaged archive or pickle is of every kind.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be mapped: {reason}. Expected a state dict in the zip format of "
            "torch.save (torch 1.6 on). Download it again, or convert it to safetensors."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__}, expected a dict of tensors. "
            "Save the model's state_dict()."
        )
    check_number_of_tensors(path, len(state))
    dtypes = {known.torch: known.numpy for known in NUMBER_FORMATS.values()}
    sources: dict[str, TensorSource] = {}
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise CheckpointError(
                f"{path} has the key {shortened(key)} of type {type(key).__name__}, expected "
                "names of tensors. Save the model's state_dict()."
            )
        if IGNORED_KEYS.search(key):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: {key!r} is a {type(tensor).__name__}, expected a tensor. "
                "Save the model's state_dict()."
            )
        is_strided = tensor.layout == torch.strided and not tensor.is_nested
        is_plain = is_strided and tensor.device.type == "cpu"
        if not is_plain or tensor.is_quantized or tensor.dtype not in dtypes:
            kind = "" if is_plain else f", {tensor.layout}, on {tensor.device}"
            raise CheckpointError(
                f"{path}: tensor {key!r} is {tensor.dtype}{kind}, expected values of "
                f"{', '.join(map(str, dtypes))} in the file. Use a checkpoint that is not "
                "quantised or sparse."
            )
        num_bytes, stored = tensor.nbytes, tensor.untyped_storage().nbytes()
        if num_bytes > stored:
            raise CheckpointError(
                f"{path}: tensor {key!r} repeats {stored} bytes as {num_bytes}, expected all "
                "values in the file. Save contiguous tensors."
            )
        sources[key] = TorchSource(
            key, dtypes[tensor.dtype], tuple(tensor.shape), None, path, tensor
        )
    return sources
