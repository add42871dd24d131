"""Give ONNX models their weights: linked from the checkpoint where possible, else streamed.

Graphs are built with initializers that only *refer* to a checkpoint tensor
(`reference_tensor`). `attach_weights` turns each into external data next to the models:

    "@checkpoint" ─┬─ same type, file can be shared ─► hard link or clone of the checkpoint's file
                   ├─ otherwise ──────────────────► model.onnx.data, converted piece by piece
                   └─ at most 1 KiB ──────────────► inside the model

ONNX Runtime accepts hard links inside the model's folder and refuses symbolic ones; onnx
refuses both. `BundleWriter` links only where it was told to.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from dllava_export.bundles.bundle_writer import BundleWriter, progress_bar
from dllava_export.checkpoints.tensor_source import DTYPE_NAMES, TensorSource
from dllava_export.errors import CheckpointError

__all__ = [
    "CHECKPOINT_LOCATION",
    "MAX_INLINE_BYTES",
    "AttachReport",
    "attach_weights",
    "reference_tensor",
    "write_embedding",
    "write_safetensors",
]

logger = logging.getLogger(__name__)

CHECKPOINT_LOCATION = "@checkpoint"
"""Stands for a file name in a reference, until `attach_weights` puts a real one there."""

MAX_INLINE_BYTES = 1 << 10
"""Tensors up to this size stay in their graph; larger ones go to a data file."""

_SOURCE_KEY = "source"
_PAGE_BYTES = 4096
_EMBEDDING_FILE = "embedding.safetensors"
_EMBEDDING_NAME = "embedding"
_DTYPE_KEYS = {dtype: name for name, dtype in DTYPE_NAMES.items()}


@dataclasses.dataclass(frozen=True)
class AttachReport:
    """What `attach_weights` did. A tensor that several models use counts once.

    Attributes:
        bytes_shared: Bytes of tensors in links to, or clones of, the checkpoint's own files.
        bytes_written: Bytes of tensors copied or converted into the data file.
        bytes_inlined: Bytes of tensors stored inside the models.
        files: Names of the files in the folder that the models refer to.
    """

    bytes_shared: int
    bytes_written: int
    bytes_inlined: int
    files: tuple[str, ...]


def reference_tensor(
    name: str,
    source: TensorSource | tuple[np.dtype, tuple[int, ...]],
    *,
    source_name: str | None = None,
    dtype: np.dtype | None = None,
) -> onnx.TensorProto:
    """Return an initializer without data that refers to a checkpoint tensor.

    Args:
        name: Name of the initializer.
        source: The checkpoint tensor, or just its dtype and shape.
        source_name: Its canonical name; `name` by default.
        dtype: Type of the initializer; that of the checkpoint tensor by default.
    """
    found_dtype, shape = (
        (source.dtype, source.shape) if isinstance(source, TensorSource) else source
    )
    tensor = onnx.TensorProto(name=name, dims=shape)
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype or found_dtype))
    entries = {"location": CHECKPOINT_LOCATION, _SOURCE_KEY: source_name or name}
    _set_external_data(tensor, entries)
    return tensor


def attach_weights(
    models: Mapping[str, onnx.ModelProto],
    folder: Path,
    sources: Mapping[str, TensorSource],
    *,
    data_name: str = "model.onnx.data",
    share: bool = True,
    writer: BundleWriter | None = None,
) -> AttachReport:
    """Replace every reference in `models` by external data in `folder`; the models change.

    The type of an initializer decides: a source of another type is converted. All models share
    one data file. Initializers with data of their own are left alone. The caller saves the
    models into `folder`.

    Args:
        models: Name → model; names are for messages.
        folder: Existing folder that the models will be saved in.
        sources: Canonical name → checkpoint tensor.
        data_name: Name of the data file; not written where nothing goes into it.
        share: Link or clone checkpoint files where `writer` can; False copies the tensors.
        writer: Puts files into the folder; one that makes no hard links by default.

    Raises:
        CheckpointError: If a reference names no source or one of another shape, or a value
            does not fit the initializer's type.
        BundleError: If a file cannot be written.
    """
    writer = writer or BundleWriter()
    files = _SharedFiles(folder, writer if share else None)
    shared: dict[int, int] = {}  # id of the source → bytes
    inlined: dict[tuple[int, int], bytes] = {}  # (id of the source, data type) → values
    streamed: dict[tuple[int, int], list[onnx.TensorProto]] = {}
    for label, model in models.items():
        for tensor in _references(model.graph):
            source = _source_of(tensor, sources, label)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            key = id(source), tensor.data_type
            if source.num_values * dtype.itemsize <= MAX_INLINE_BYTES:
                if key not in inlined:
                    inlined[key] = b"".join(_converted(source, dtype))
                _set_raw_data(tensor, inlined[key])
            elif source.dtype == dtype and (file := files.name_of(source)):
                assert source.location is not None
                shared[id(source)] = source.num_bytes
                _set_location(tensor, file, source.location.offset, source.num_bytes)
            else:
                streamed.setdefault(key, []).append(tensor)
    chosen = {id(source): source for source in sources.values()}
    pairs = [(chosen[key[0]], tensors) for key, tensors in streamed.items()]
    bytes_written = _write_data(folder / data_name, pairs, writer) if pairs else 0
    report = AttachReport(
        bytes_shared=sum(shared.values()),
        bytes_written=bytes_written,
        bytes_inlined=sum(map(len, inlined.values())),
        files=(*files.names, *([data_name] if pairs else [])),
    )
    logger.info("%s: %s", folder, report)
    return report


def write_embedding(
    folder: Path,
    source: TensorSource,
    dtype: np.dtype,
    *,
    writer: BundleWriter | None = None,
) -> dict[str, Any]:
    """Put the token embeddings where the runtime can map them.

    Args:
        folder: Existing folder for the file.
        source: The embeddings: [vocab_size, hidden_size].
        dtype: Type the runtime shall find.
        writer: Puts files into the folder; one that makes no hard links by default. Where
            neither type nor file system allow a link or clone of the checkpoint's file,
            `embedding.safetensors` is written.

    Returns:
        A reference for `EmbeddingTable`, ready for JSON: `file` (in `folder`), `offset` in
        bytes, `dtype` (`F32`, `F16` or `BF16`) and `shape`.

    Raises:
        CheckpointError: If a value does not fit `dtype`.
        BundleError: If the file cannot be written.
    """
    dtype = np.dtype(dtype)
    writer = writer or BundleWriter()
    file = _SharedFiles(folder, writer).name_of(source) if source.dtype == dtype else None
    if file is not None:
        assert source.location is not None
        offset = source.location.offset
    else:
        file = _EMBEDDING_FILE
        tensors = {_EMBEDDING_NAME: (source, dtype)}
        offset = write_safetensors(folder / file, tensors, writer=writer)[_EMBEDDING_NAME]
    return {
        "file": file,
        "offset": offset,
        "dtype": _DTYPE_KEYS[dtype],
        "shape": list(source.shape),
    }


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[TensorSource, np.dtype]],
    *,
    writer: BundleWriter | None = None,
) -> dict[str, int]:
    """Write tensors to a `.safetensors` file, never holding more than a piece of one.

    Args:
        path: The file; replaced only when all is written.
        tensors: Name → tensor and the type to store it in.
        writer: What the file belongs to, if to a bundle.

    Returns:
        Name → offset of its values in the file, in bytes.

    Raises:
        CheckpointError: If a value does not fit its type.
        BundleError: If the file cannot be written.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, (source, dtype) in tensors.items():
        begin, end = end, end + source.num_values * np.dtype(dtype).itemsize
        key = _DTYPE_KEYS[np.dtype(dtype)]
        header[name] = {"dtype": key, "shape": source.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    writer = writer or BundleWriter()
    with writer.new_file(path) as file, progress_bar(path, end, writer.progress) as bar:
        file.write(struct.pack("<Q", len(text)) + text)
        for source, dtype in tensors.values():
            for data in _converted(source, np.dtype(dtype)):
                file.write(data)
                bar.update(len(data))
    start = 8 + len(text)
    return {name: start + entry["data_offsets"][0] for name, entry in header.items()}


def _references(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield the initializers of `graph` and its subgraphs that refer to the checkpoint."""
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get("location") == CHECKPOINT_LOCATION:
            yield tensor
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _references(subgraph)


def _source_of(
    tensor: onnx.TensorProto, sources: Mapping[str, TensorSource], label: str
) -> TensorSource:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name = entries.get(_SOURCE_KEY, tensor.name)
    source = sources.get(name)
    if source is None:
        raise CheckpointError(
            f"Initializer '{tensor.name}' of {label} refers to '{name}', expected one of the "
            f"{len(sources)} tensors of the checkpoint. Use the checkpoint it was built from."
        )
    if source.shape != tuple(tensor.dims):
        raise CheckpointError(
            f"Initializer '{tensor.name}' of {label} is {list(tensor.dims)}, '{name}' of the "
            f"checkpoint is {list(source.shape)}, expected the same shape. "
            "Use the checkpoint it was built from."
        )
    return source


def _set_external_data(tensor: onnx.TensorProto, entries: Mapping[str, object]) -> None:
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    tensor.data_location = onnx.TensorProto.EXTERNAL


def _set_location(tensor: onnx.TensorProto, file: str, offset: int, length: int) -> None:
    _set_external_data(tensor, {"location": file, "offset": offset, "length": length})


def _set_raw_data(tensor: onnx.TensorProto, data: bytes) -> None:
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.DEFAULT
    tensor.raw_data = data


class _SharedFiles:
    """Links to, or clones of, checkpoint files in one folder, made on demand."""

    def __init__(self, folder: Path, writer: BundleWriter | None) -> None:
        self._folder = folder
        self._writer = writer
        self._names: dict[Path, str | None] = {}

    @property
    def names(self) -> list[str]:
        """Names of the files."""
        return [name for name in self._names.values() if name]

    def name_of(self, source: TensorSource) -> str | None:
        """Return the name of what shares the file of `source`, or None if there is nothing."""
        if self._writer is None or source.location is None:
            return None
        path = source.location.path
        if path not in self._names:
            self._names[path] = self._share(self._writer, path)
        return self._names[path]

    def _share(self, writer: BundleWriter, path: Path) -> str | None:
        number = 1
        while True:
            suffix = "" if number == 1 else f"-{number}"
            target = self._folder / f"checkpoint{suffix}-{path.name}"
            if writer.is_shared(path, target):
                return target.name
            try:
                return target.name if writer.share(path, target) else None
            except FileExistsError:  # another file of the same name, a vision tower's perhaps
                number += 1


def _converted(source: TensorSource, dtype: np.dtype) -> Iterator[bytes]:
    """Yield the values of `source` as little-endian bytes of `dtype`, in pieces."""
    for piece in source.chunks():
        if piece.dtype == dtype:
            yield piece.tobytes()
            continue
        exact = piece.astype(np.float32)  # holds every supported type
        with np.errstate(over="ignore", invalid="ignore"):
            result = exact.astype(dtype)
        overflows = np.isfinite(exact) & ~np.isfinite(result.astype(np.float32))
        if overflows.any():
            largest = float(ml_dtypes.finfo(dtype).max)
            raise CheckpointError(
                f"Tensor '{source.name}' has the value {exact[overflows][0]:g}, expected at "
                f"most {largest:g} for {dtype.name}. Export at bf16 or fp32."
            )
        yield result.tobytes()


def _write_data(
    path: Path,
    pairs: list[tuple[TensorSource, list[onnx.TensorProto]]],
    writer: BundleWriter,
) -> int:
    """Write the data file, point the initializers into it, return the bytes of tensors."""
    dtypes = [onnx.helper.tensor_dtype_to_np_dtype(users[0].data_type) for _, users in pairs]
    lengths = [
        source.num_values * dtype.itemsize
        for (source, _), dtype in zip(pairs, dtypes, strict=True)
    ]
    total = sum(lengths)
    with writer.new_file(path) as file, progress_bar(path, total, writer.progress) as bar:
        for (source, users), dtype, length in zip(pairs, dtypes, lengths, strict=True):
            # Page-aligned tensors can be mapped one by one.
            alignment = _PAGE_BYTES if length > 1 << 20 else 64
            file.write(bytes(-file.tell() % alignment))
            offset = file.tell()
            for data in _converted(source, dtype):
                file.write(data)
                bar.update(len(data))
            for tensor in users:
                _set_location(tensor, path.name, offset, length)
    return sum(lengths)
