"""Read a dense decoder that somebody else exported to ONNX, and bring its files into order.

Exporters differ in what they leave in a graph: constants as nodes, head counts computed from
shapes, weights inline or in files of any name. `read_decoder` checks the graph, gives its
weights one place on disk and folds everything that does not change with the input's size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllava_export import names
from dllava_export.bundles.bundle_writer import BundleWriter
from dllava_export.bundles.layout import DATA_FILE
from dllava_export.errors import (
    BundleError,
    DllavaExportError,
    PreconditionError,
    UnsupportedModelError,
)
from dllava_export.exporting.external_data import external_place, tensor_bytes
from dllava_export.exporting.graph_limits import (
    check_number_of_nodes,
    check_sizes_of_shapes,
    may_fold,
)
from dllava_export.reporting.interrupts import interrupts_as_themselves
from dllava_export.short_text import shortened

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir


__all__ = ["ForeignDecoder", "damage_explained", "read_decoder"]

logger = logging.getLogger(__name__)

_INPUT_IDS, _ATTENTION_MASK = "input_ids", "attention_mask"
_KNOWN_INPUTS = (_INPUT_IDS, names.INPUTS_EMBEDS, _ATTENTION_MASK, names.POSITION_IDS)
_CACHE_WORDS = ("past", "cache", "present")
_EXAMPLE_SIZES = ((2, 5), (3, 7))  # batch and rows; no size repeats
_MAX_FOLDED_VALUES = 1024
_MAX_REASON = 300


@dataclasses.dataclass(frozen=True)
class ForeignDecoder:
    """A dense decoder, ready for the passes.

    Attributes:
        model: The graph; its weights are external data in the folder it was read into.
        embedding: Reference for `weights.EmbeddingTable`, None where it takes embeddings.
    """

    model: onnx.ModelProto
    embedding: dict[str, Any] | None


def read_decoder(
    path: Path, folder: Path, writer: BundleWriter | None = None
) -> ForeignDecoder:
    """Read a decoder and put its weights into `folder`: copied, or moved out of the graph.

    Args:
        path: An `.onnx` file; external data beside it.
        folder: Existing folder that the decoder's models will be saved in.
        writer: Puts files into the folder. Data files are never hard-linked: onnx would refuse
            to read them, for the one whom they belong to as well.

    Raises:
        BundleError: If the file is missing, damaged, or lacks its external data.
        UnsupportedModelError: If it is no decoder this toolkit knows.
        PreconditionError: If it was exported with a KV cache.
    """
    from dllava_export.passes.graph_io import check_opset

    model = _load(path)
    with damage_explained(path):
        check_opset(model)
        check_number_of_nodes(path, model)
        _check_inputs(path, model)
        _place_weights(path, model, folder, writer or BundleWriter())
        model = _tidy(path, model)
        return ForeignDecoder(model, _embedding_reference(model, folder))


@contextlib.contextmanager
def damage_explained(path: Path) -> Iterator[None]:
    """Let what onnx, its optimizer and ONNX Runtime raise for a damaged graph be an error of ours.

    Raises:
        BundleError: In place of any exception that is no `DllavaExportError`.
    """
    try:
        yield
    except (DllavaExportError, OSError):
        raise
    # Each of them has exceptions of its own, and raises KeyError, ValueError and the like too.
    except Exception as error:
        reason = shortened(error, _MAX_REASON)
        raise BundleError(
            f"{path} cannot be read as a decoder ({type(error).__name__}: {reason}). It is "
            "damaged, or holds what the passes do not know. Check it with onnx.checker, and "
            "export or download it again."
        ) from error


def _load(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise BundleError(
            f"{path} does not exist; expected a bundle folder or an .onnx file with a dense "
            "decoder."
        )
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise BundleError(
            f"{path} is not an ONNX file, or it is truncated ({error}). Expected a dense "
            "decoder. Export or download it again."
        ) from error
    if not model.graph.node or not model.opset_import:
        raise BundleError(
            f"{path} holds {len(model.graph.node)} nodes and {len(model.opset_import)} opset "
            "imports; expected an ONNX model of a dense decoder. Export or download it again."
        )
    return model


def _check_inputs(path: Path, model: onnx.ModelProto) -> None:
    weights = {tensor.name for tensor in model.graph.initializer}
    found = [value.name for value in model.graph.input if value.name not in weights]
    unknown = [name for name in found if name not in _KNOWN_INPUTS]
    cached = [name for name in unknown if any(word in name.lower() for word in _CACHE_WORDS)]
    if cached:
        raise PreconditionError(
            f"{path} has {len(cached)} inputs of a KV cache, the first is {cached[0]!r}; "
            "expected none, since the passes add a cache of their own. Export it without "
            "(use_cache=False; with Optimum, --task text-generation)."
        )
    fixed = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim[:2]]
        for value in model.graph.input
        if any(dim.dim_value for dim in value.type.tensor_type.shape.dim[:2])
        and value.name in _KNOWN_INPUTS
    }
    if fixed:
        name, sizes = next(iter(fixed.items()))
        raise UnsupportedModelError(
            f"{path}: the input {name!r} is exported with the fixed sizes "
            f"{[size or 'any' for size in sizes]} for batch and rows; expected both to be "
            "dynamic. Export it with dynamic shapes."
        )
    if unknown:
        raise UnsupportedModelError(
            f"{path} has the inputs {unknown}; expected no others than "
            f"{', '.join(_KNOWN_INPUTS)}. Export the language model alone."
        )


# Weights: one copy on disk, whatever number of graphs uses them.


def _place_weights(
    path: Path, model: onnx.ModelProto, folder: Path, writer: BundleWriter
) -> None:
    """Copy external data, move large inline values to a data file, take small ones in."""
    from dllava_export.exporting.weights import MAX_INLINE_BYTES

    brought: dict[Path, str] = {}
    inline = []
    tables = _tables_of_token_ids(model)
    for tensor in _tensors(model.graph):
        has_room = tensor_bytes(tensor) <= MAX_INLINE_BYTES and tensor.name not in tables
        if tensor.data_location != tensor.EXTERNAL:
            if not has_room:
                inline.append(tensor)
            continue
        place = external_place(path, tensor)
        if has_room:
            tensor.raw_data = place.read()
            tensor.data_location = tensor.DEFAULT
            del tensor.external_data[:]
            continue
        if place.file not in brought:
            name = _free_name(place.file.name, brought.values())
            writer.bring(place.file, folder / name, may_link=False)
            brought[place.file] = name
        _refer(tensor, brought[place.file], place.offset, place.length)
    _move_out(inline, folder / DATA_FILE, writer)


def _tensors(graph: onnx.GraphProto) -> Iterable[onnx.TensorProto]:
    """Yield the initializers and constants of a graph and its subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield attribute.t
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _tensors(subgraph)


def _tables_of_token_ids(model: onnx.ModelProto) -> set[str]:
    return {
        node.input[0]
        for node in model.graph.node
        if node.op_type == "Gather" and node.input[1] == _INPUT_IDS
    }


def _free_name(name: str, taken: Iterable[str]) -> str:
    """Return a name for a data file that clashes with none."""
    used = set(taken)
    free, number = f"decoder-{name}", 1
    while free in used:
        number += 1
        free = f"decoder-{number}-{name}"
    return free


def _move_out(tensors: Sequence[onnx.TensorProto], file: Path, writer: BundleWriter) -> None:
    """Write inline values to a data file and let the tensors refer to it."""
    import onnx

    if not tensors:
        return
    with writer.new_file(file) as data:
        for tensor in tensors:
            data.write(bytes(-data.tell() % 64))
            offset = data.tell()
            values = onnx.numpy_helper.to_array(tensor)
            data.write(values.tobytes())
            for field in ("float_data", "int32_data", "int64_data", "double_data"):
                tensor.ClearField(field)
            _refer(tensor, file.name, offset, values.nbytes)


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    entries = {"location": location, "offset": offset, "length": length}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    tensor.data_location = tensor.EXTERNAL


def _embedding_reference(model: onnx.ModelProto, folder: Path) -> dict[str, Any] | None:
    """Return where the token embeddings lie, ready for `weights.EmbeddingTable`."""
    import onnx

    from dllava_export.checkpoints.tensor_source import DTYPE_NAMES

    tables = _tables_of_token_ids(model)
    tensor = next((t for t in model.graph.initializer if t.name in tables), None)
    if tensor is None:
        return None
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    key = next((name for name, known in DTYPE_NAMES.items() if known == dtype), None)
    if key is None or len(tensor.dims) != 2:
        raise UnsupportedModelError(
            f"The token embeddings {tensor.name!r} are {dtype.name} {list(tensor.dims)}, "
            f"expected [vocab_size, hidden_size] of {', '.join(DTYPE_NAMES)}. Quantised "
            "decoders are not supported."
        )
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return {
        "file": entries["location"],
        "offset": int(entries["offset"]),
        "dtype": key,
        "shape": list(tensor.dims),
    }


# Shapes: what the passes read head counts and ranks from.


@interrupts_as_themselves()
def _tidy(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold what does not depend on the input's size, and give every value a shape.

    The graph is optimised for two example sizes. A value that is the same constant in both is
    a constant; a dimension that is the same in both is fixed, and one that follows the
    batch or the rows is named after them.
    """
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes import common

    from dllava_export.exporting.tracing import quiet_exporter

    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    symbolic = ir.serde.deserialize_model(_with_input_sizes(model, names.BATCH, names.ROWS))
    with quiet_exporter():
        common.InlinePass()(symbolic)
    check_sizes_of_shapes(path, symbolic)
    _optimise(symbolic)
    flat = ir.serde.serialize_model(symbolic)
    examples = []
    for sizes in _EXAMPLE_SIZES:
        example = ir.serde.deserialize_model(_with_input_sizes(flat, *sizes))
        _optimise(example)
        examples.append(example)
    _merge(symbolic, examples)
    _read_sizes_off_inputs(symbolic)
    _optimise(symbolic, merge_equal=True)
    tidy = ir.serde.serialize_model(symbolic)
    for entry in (*tidy.graph.node, *tidy.graph.value_info, *tidy.graph.input):
        del entry.metadata_props[:]  # an exporter's source lines: of no use from here on
    return onnx.shape_inference.infer_shapes(tidy, data_prop=True)


def _with_input_sizes(
    model: onnx.ModelProto, batch: int | str, rows: int | str
) -> onnx.ModelProto:
    """Return a copy whose inputs have these first two dimensions, and no other shapes."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for output in copy.graph.output:
        output.type.tensor_type.ClearField("shape")
    for value in copy.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, (batch, rows), strict=False):
            dim.Clear()
            if isinstance(size, int):
                dim.dim_value = size
            else:
                dim.dim_param = size
    return copy


def _optimise(model: ir.Model, *, merge_equal: bool = False) -> None:
    """Fold and tidy up, out of reach of weights; keep the names of equal values, or merge them."""
    import onnx_ir as ir
    import onnxscript.optimizer
    from onnx_ir.passes import common

    from dllava_export.exporting.tracing import quiet_exporter

    weights: list[tuple[ir.Value, ir.TensorProtocol]] = []
    with quiet_exporter():
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        for name, value in list(model.graph.initializers.items()):
            if not isinstance(value.const_value, ir.ExternalTensor):
                continue
            # As a graph input, a weight is left alone.
            weights.append((value, value.const_value))
            value.const_value = None
            del model.graph.initializers[name]
            model.graph.inputs.append(value)
        # Not optimize_ir: its rewriting takes minutes at 32 layers and is of no use here.
        onnxscript.optimizer.fold_constants(
            model, onnx_shape_inference=True, should_fold=may_fold
        )
        common.IdentityEliminationPass()(model)
        if merge_equal:
            common.DeduplicateInitializersPass()(model)
            common.CommonSubexpressionEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)
    for value, tensor in weights:
        model.graph.inputs.remove(value)
        if value.uses():
            value.const_value = tensor
            model.graph.initializers[str(value.name)] = value


def _merge(model: ir.Model, examples: Sequence[ir.Model]) -> None:
    """Write what two examples have in common into the model they were made from."""
    import onnx_ir as ir

    values = [
        {str(v.name): v for node in e.graph for v in node.outputs}
        | dict(e.graph.initializers.items())
        for e in examples
    ]
    for node in list(model.graph):
        for value in node.outputs:
            found = [example.get(str(value.name)) for example in values]
            constant = _same_constant(found)
            if constant is not None and not value.is_graph_output():
                value.replace_all_uses_with(_constant(model, value, constant))
            else:
                shape = _common_shape(found)
                value.shape = value.shape if shape is None else ir.Shape(shape)


def _same_constant(found: Sequence[ir.Value | None]) -> np.ndarray | None:
    """Return a small value that both examples folded to the same constant, else None."""
    import numpy as np

    arrays = []
    for value in found:
        if value is None or value.const_value is None:
            return None
        if value.const_value.size > _MAX_FOLDED_VALUES:
            return None
        arrays.append(value.const_value.numpy())
    first, second = arrays
    same = first.dtype == second.dtype and np.array_equal(first, second)
    return first if same else None


def _common_shape(found: Sequence[ir.Value | None]) -> list[int | str | None] | None:
    """Return fixed dimensions as numbers, the batch and the rows by name, others as None."""
    shapes = [value.shape for value in found if value is not None and value.shape is not None]
    if len(shapes) < len(found) or len({len(shape) for shape in shapes}) > 1:
        return None
    roles = dict(
        zip(zip(*_EXAMPLE_SIZES, strict=True), (names.BATCH, names.ROWS), strict=True)
    )
    return [
        first if isinstance(first, int) and first == second else roles.get((first, second))
        for first, second in zip(*shapes, strict=True)
    ]


def _read_sizes_off_inputs(model: ir.Model) -> None:
    """Let Gather(Shape(x), axis) be a constant, or read the shape of an input in place of x.

    A mask that asks token embeddings for their number of rows depends on no weight then.
    """
    import numpy as np
    import onnx_ir as ir

    inputs = {value.name: value for value in model.graph.inputs}
    source = inputs.get(names.POSITION_IDS)
    sizes = ir.node("Shape", [source]) if source is not None else None
    for node in list(model.graph):
        size = _gathered_size(node)
        if size is None:
            continue
        index = node.inputs[1]
        assert index is not None and index.const_value is not None
        if isinstance(size, int):
            result = np.full(index.const_value.shape.numpy(), size, np.int64)
            node.outputs[0].replace_all_uses_with(_constant(model, node.outputs[0], result))
        elif sizes is not None and size in (names.BATCH, names.ROWS):
            axis = (names.BATCH, names.ROWS).index(size)
            values = np.full(index.const_value.shape.numpy(), axis, np.int64)
            node.replace_input_with(0, sizes.outputs[0])
            node.replace_input_with(1, _constant(model, index, values))
    if sizes is not None:
        model.graph.insert_before(model.graph[0], sizes)


def _gathered_size(node: ir.Node) -> int | str | None:
    """Return the dimension that Gather(Shape(x), axis) reads, None for any other node."""
    shape, index = (
        (node.inputs[0], node.inputs[1]) if node.op_type == "Gather" else (None, None)
    )
    producer = shape.producer() if shape is not None else None
    if producer is None or producer.op_type != "Shape" or producer.attributes:
        return None
    x = producer.inputs[0]
    constant = index.const_value if index is not None else None
    if x is None or x.shape is None or constant is None or constant.size != 1:
        return None
    size = x.shape[int(constant.numpy().reshape(-1)[0])]
    return size if isinstance(size, int) else size.value


def _constant(model: ir.Model, like: ir.Value, values: np.ndarray) -> ir.Value:
    """Add an initializer, named after the value it was made from."""
    import onnx_ir as ir

    name, number = f"{like.name}/folded", 1
    while name in model.graph.initializers:
        number += 1
        name = f"{like.name}/folded_{number}"
    constant = ir.Value(name=name, shape=ir.Shape(values.shape), type=like.type)
    constant.const_value = ir.tensor(values, name=name)
    model.graph.initializers[name] = constant
    return constant
