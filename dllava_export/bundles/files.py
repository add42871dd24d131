"""Files of a bundle: graphs, the files they refer to, tool versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllava_export.errors import BundleError
from dllava_export.extras import installed_version

if TYPE_CHECKING:
    import onnx


__all__ = [
    "describe_tensors",
    "referenced_files",
    "save_models",
    "tool_versions",
]


_TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx-graphsurgeon")


def describe_tensors(
    folder: str, models: Mapping[str, onnx.ModelProto]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return inputs and outputs of each graph under `folder/name`, as a manifest lists them."""
    return {
        f"{folder}/{name}": {
            "inputs": [_describe(value) for value in model.graph.input],
            "outputs": [_describe(value) for value in model.graph.output],
        }
        for name, model in models.items()
        if model.graph.output  # a file of initializers only is no graph
    }


def _describe(value: onnx.ValueInfoProto) -> dict[str, Any]:
    from onnx import helper

    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    shape = [d.dim_param or d.dim_value for d in tensor.shape.dim]
    return {"name": value.name, "dtype": str(dtype), "shape": shape}


def save_models(folder: Path, models: Mapping[str, onnx.ModelProto]) -> None:
    """Write models whose weights are external already."""
    for name, model in models.items():
        (folder / name).write_bytes(model.SerializeToString())


def tool_versions() -> dict[str, str]:
    """Return the versions of this toolkit and of the tools that shape its output."""
    from dllava_export.version import __version__

    versions = {"dllava-export": __version__}
    for tool in _TOOLS:
        found = installed_version(tool)
        if found is not None:  # passes run without PyTorch
            versions[tool] = found
    return versions


def referenced_files(models: Iterable[onnx.ModelProto]) -> set[str]:
    """Return the external data files that models refer to.

    Raises:
        BundleError: If a file lies outside the model's folder.
    """
    files = set()
    for model in models:
        for tensor in model.graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if "location" in entries:
                files.add(entries["location"])
    for name in files:
        if Path(name).name != name:
            raise BundleError(f"Weights in {name!r}: expected a file beside the model.")
    return files
