"""Find the files of a checkpoint, in a folder or on the hub, and read its weight headers."""

from __future__ import annotations

import re
from pathlib import Path

from dllava_export.checkpoints.tensor_source import (
    TensorSource,
    check_number_of_tensors,
    safetensors_sources,
    torch_sources,
)
from dllava_export.errors import CheckpointError
from dllava_export.families.config_file import read_json
from dllava_export.families.config_kinds import OBJECT

__all__ = ["HUB_ID", "download", "download_config", "read_tensors", "resolve_folder"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt")
_HUB_BIN_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def resolve_folder(location: str | Path) -> Path:
    """Return the folder that `location` names, after a download where it is a hub id.

    Raises:
        CheckpointError: If it is neither a folder nor a hub id that can be downloaded.
    """
    path = Path(location)
    if path.is_dir():
        return path
    name = str(location)
    if path.exists() or not HUB_ID.fullmatch(name):
        found = "a file" if path.exists() else "neither a folder nor a hub id"
        raise CheckpointError(
            f"'{name}' is {found}, expected a checkpoint folder or a hub id like "
            "'owner/name'. Check the path."
        )
    return download(name)


def download(name: str) -> Path:
    """Download a hub repository: safetensors, or `.bin` files where there are none.

    Raises:
        CheckpointError: If that is not possible.
    """
    folder = _download(name, _HUB_FILES)
    if not any(folder.glob("*.safetensors")):
        folder = _download(name, _HUB_BIN_FILES)
    return folder


def download_config(name: str) -> Path:
    """Download a hub repository without its weights; see `download`."""
    return _download(name, ("*.json",))


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"'{name}' is not a local folder, and could not be downloaded from the hub: "
            f"{reason}. Expected a checkpoint folder or a reachable hub id. Check the name "
            "and the network, or download it elsewhere and name the folder."
        ) from error


def read_tensors(folder: Path) -> dict[str, TensorSource]:
    """Read the headers of a folder's weight files, chosen in transformers' order.

    Returns:
        Key → tensor, as the files spell it.

    Raises:
        CheckpointError: If files are missing or damaged.
    """
    for weights, index, read in (
        ("model.safetensors", "model.safetensors.index.json", safetensors_sources),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", torch_sources),
    ):
        if (folder / weights).is_file():
            return read(folder / weights)
        if not (folder / index).is_file():
            continue
        weight_map = _weight_map(folder / index)
        tensors: dict[str, TensorSource] = {}
        for shard in sorted(set(weight_map.values())):
            stored = read(folder / shard)
            twice = next((key for key in stored if key in tensors), None)
            if twice is not None:
                raise CheckpointError(
                    f"{folder / shard} holds the tensor {twice!r}, as "
                    f"{(tensors[twice].file or folder).name} does, expected it in one file. "
                    "Restore the files."
                )
            tensors |= stored
            check_number_of_tensors(folder, len(tensors))
        return tensors
    is_adapter = (folder / "adapter_config.json").is_file()
    remedy = (
        "Merge the LoRA adapter into its base model" if is_adapter else "Restore the weights"
    )
    raise CheckpointError(
        f"{folder} has no weights, expected model.safetensors, pytorch_model.bin, or shards "
        f"with their index file. {remedy}."
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Return key → shard name of an index file; every shard is there."""
    values = read_json(index, "a checkpoint", kinds={"weight_map": (OBJECT,)})
    weight_map = values.get("weight_map")
    if not weight_map:
        raise CheckpointError(
            f"{index} has no weight_map, expected key → file name. Restore the file."
        )
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{index} puts '{key}' into {shard!r}, expected the name of a file beside it. "
                "Restore the file."
            )
    missing = sorted(
        shard for shard in set(weight_map.values()) if not (index.parent / shard).is_file()
    )
    if missing:
        num = len(set(weight_map.values()))
        raise CheckpointError(
            f"{index.name} names {num} files, {len(missing)} of them are missing from "
            f"{index.parent}: {', '.join(missing[:5])}. Download them."
        )
    return weight_map
