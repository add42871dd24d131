"""Find the files of a checkpoint, in a folder or on the hub, and read its weight headers."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from dllava_export.checkpoints.tensor_source import (
    TensorSource,
    check_number_of_tensors,
    safetensors_sources,
    torch_sources,
)
from dllava_export.errors import CheckpointError
from dllava_export.families.config_file import read_json
from dllava_export.families.config_kinds import ADAPTER_KINDS, OBJECT

__all__ = [
    "CONFIG",
    "HUB_ID",
    "check_is_checkpoint",
    "download",
    "download_config",
    "read_tensors",
    "resolve_folder",
]

logger = logging.getLogger(__name__)

CONFIG = "config.json"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt")
_HUB_BIN_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "mm_projector.bin")

_ADAPTER_CONFIG = "adapter_config.json"
_NON_LORA = "non_lora_trainables.bin"
_PROJECTOR = "mm_projector.bin"
_LORA_KEY = re.compile(r"\.lora_[AB]\.|\.base_layer\.")
_WRAPPERS = ("base_model.model.", "module.")  # PEFT; data parallel and DeepSpeed
_COMPILED = "_orig_mod."  # torch.compile, which may wrap a part
_MAX_WRAPPERS = 4


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


def check_is_checkpoint(folder: Path) -> None:
    """Refuse a folder without config.json or weights, and say what it is instead.

    Raises:
        CheckpointError: If it is a LoRA adapter, a projector alone, or half a download.
    """
    if not (folder / CONFIG).is_file() and (reason := _what_it_is(folder)):
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {CONFIG}. {reason}")


def read_tensors(
    folder: Path, side_files: Mapping[str, str] | None = None
) -> dict[str, TensorSource]:
    """Read the headers of a folder's weight files, chosen in transformers' order.

    Prefixes of wrappers (`module.`, `base_model.model.`, `_orig_mod.`) are taken off the keys.

    Args:
        folder: The folder.
        side_files: Name of a `.bin` file that is read as well, if it is there → part of the
            keys that it holds; it is left out where the weights have such keys.

    Returns:
        Key → tensor, as the files spell it, less prefixes.

    Raises:
        CheckpointError: If files are missing or damaged.
    """
    tensors = _unwrapped(folder, _read_weights(folder))
    for name, part in (side_files or {}).items():
        if not (folder / name).is_file() or any(part in key for key in tensors):
            continue
        logger.info("%s: reading %s, which the weights lack", folder, name)
        beside = _unwrapped(folder, torch_sources(folder / name))
        tensors |= {key: source for key, source in beside.items() if part in key}
    return tensors


def _read_weights(folder: Path) -> dict[str, TensorSource]:
    for weights, index, read in (
        ("model.safetensors", "model.safetensors.index.json", safetensors_sources),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", torch_sources),
    ):
        if (folder / weights).is_file():
            return read(folder / weights)
        if not (folder / index).is_file():
            continue
        tensors: dict[str, TensorSource] = {}
        for shard in sorted(set(_weight_map(folder / index).values())):
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
    raise CheckpointError(
        f"{folder} has no weights, expected model.safetensors, pytorch_model.bin, or shards "
        f"with their index file. {_what_it_is(folder) or 'Restore the weights.'}"
    )


def _unwrapped(folder: Path, tensors: dict[str, TensorSource]) -> dict[str, TensorSource]:
    """Take prefixes of wrappers off the keys."""
    if any(_LORA_KEY.search(key) for key in tensors):
        raise CheckpointError(
            f"The weights of {folder} hold a LoRA adapter beside its base "
            f"({next(key for key in tensors if _LORA_KEY.search(key))!r}), expected both merged. "
            "Merge them with PEFT's merge_and_unload() and save the model."
        )
    keys = {key: key.replace(_COMPILED, "") for key in tensors}
    for _ in range(_MAX_WRAPPERS):
        prefix = next(
            (p for p in _WRAPPERS if keys and all(k.startswith(p) for k in keys.values())), ""
        )
        keys = {key: name.removeprefix(prefix) for key, name in keys.items()}
    result = {keys[key]: source for key, source in tensors.items()}
    if len(result) < len(tensors):
        raise CheckpointError(
            f"The weights of {folder} hold tensors both with and without {_COMPILED!r} in "
            "their names, expected each once. Remove one of them."
        )
    return result


def _what_it_is(folder: Path) -> str | None:
    """Return what a folder without configuration or weights is, and what to do."""
    if (folder / _ADAPTER_CONFIG).is_file():
        file = folder / _ADAPTER_CONFIG
        base = read_json(file, "a LoRA adapter", kinds=ADAPTER_KINDS).get(
            "base_model_name_or_path"
        )
        trained = " with non_lora_trainables.bin" if (folder / _NON_LORA).is_file() else ""
        return (
            f"It is a LoRA adapter{trained} of {repr(base) if base else 'a base model'}. Merge "
            "the LoRA adapter into its base model (LLaVA's scripts/merge_lora_weights.py, or "
            "PEFT's merge_and_unload) and name the result."
        )
    if (folder / _PROJECTOR).is_file():
        return (
            f"It holds {_PROJECTOR} alone, the projector of LLaVA's first stage. Put it, with "
            "its config.json, beside the weights of the language model it was trained with."
        )
    return _download_state(folder)


def _download_state(folder: Path) -> str | None:
    """Return what to do about a download from the hub that is not complete."""
    cache = folder.parent.parent
    if folder.parent.name == "snapshots" and cache.name.startswith("models--"):
        name = cache.name.removeprefix("models--").replace("--", "/")
        return f"It is an incomplete snapshot in the hub's cache. Run `hf download {name}`."
    if any((folder / ".cache" / "huggingface").rglob("*.incomplete")):
        return "Its download from the hub was interrupted. Run `hf download` again."
    return None


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
                f"{index} puts {key!r} into {shard!r}, expected the name of a file beside it. "
                "Restore the file."
            )
    missing = sorted(
        # os.path takes names that no file can have.
        shard
        for shard in set(weight_map.values())
        if not os.path.isfile(index.parent / shard)
    )
    if missing:
        num = len(set(weight_map.values()))
        raise CheckpointError(
            f"{index.name} names {num} files, {len(missing)} of them are missing from "
            f"{index.parent}: {', '.join(missing[:5])}. "
            f"{_download_state(index.parent) or 'Download them.'}"
        )
    return weight_map
