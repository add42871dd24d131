"""Which tokens begin, end and pad a text: what each file of a checkpoint says of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllava_export.errors import BundleError
from dllava_export.families.config_file import read_json
from dllava_export.families.config_kinds import GENERATION_KINDS, Kinds

__all__ = ["StatedIds", "contradictions", "end_ids", "stated_ids", "tokenizer_ids"]

StatedIds = Mapping[str, Mapping[str, tuple[int, ...]]]
"""`bos`, `eos` or `pad` → file → ids."""

_ROLES = ("bos", "eos", "pad")
_CONFIG = "config.json"


def stated_ids(folder: Path) -> StatedIds:
    """Return what the files in a folder say; those that are not there say nothing.

    Read are config.json, generation_config.json, and tokenizer_config.json, whose tokens get
    their ids from tokenizer.json or its own `added_tokens_decoder`.

    Args:
        folder: Of a checkpoint, or of a bundle's decoder.

    Raises:
        BundleError: If one of them is no JSON object, or has an id that is none.
    """
    config = _read(folder / _CONFIG)
    inner = config.get("text_config")
    texts = {**(inner if isinstance(inner, dict) else {}), **config}
    generation = _read(folder / "generation_config.json", GENERATION_KINDS)
    tokenizer_config = _read(folder / "tokenizer_config.json")
    known = _ids_by_token(_read(folder / "tokenizer.json"), tokenizer_config)
    stated: dict[str, dict[str, tuple[int, ...]]] = {}
    for role in _ROLES:
        key = f"{role}_token_id"
        token = tokenizer_config.get(f"{role}_token")
        if isinstance(token, dict):
            token = token.get("content")
        found = {
            _CONFIG: _ids(texts.get(key)),
            "generation_config.json": _ids(generation.get(key)),
            "tokenizer_config.json": _ids(
                known.get(token) if isinstance(token, str) else None
            ),
        }
        stated[role] = {file: ids for file, ids in found.items() if ids}
    return stated


def tokenizer_ids(folder: Path) -> Mapping[str, int]:
    """Return `bos`, `eos`, `pad` and `unk` → id, of a tokenizer that is a `tokenizer.json`.

    They are what transformers makes of the folder, without its seconds of being imported. A
    token that is not in the vocabulary has no id: no prompt can hold it.

    Args:
        folder: Of a checkpoint, or of a bundle's decoder.

    Raises:
        BundleError: If a file is no JSON object.
    """
    config = _read(folder / "tokenizer_config.json")
    is_older = "added_tokens_decoder" not in config
    named = {**config, **(_read(folder / "special_tokens_map.json") if is_older else {})}
    known = _ids_by_token(_read(folder / "tokenizer.json"), config)
    found = {}
    for role in (*_ROLES, "unk"):
        token = named.get(f"{role}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str) and type(known.get(token)) is int:
            found[role] = known[token]
    return found


def end_ids(stated: StatedIds) -> tuple[int, ...]:
    """Return the ids that end an answer, ascending.

    Those of generation_config.json and the tokenizer all count (LLaMA-3 has several). Those of
    config.json count with them, unless they are altogether others: config.json is the file that
    is carried along unchanged when a model gets another tokenizer.
    """
    files = dict(stated["eos"])
    inner = set(files.pop(_CONFIG, ()))
    others = {token for ids in files.values() for token in ids}
    return tuple(sorted(others | inner if not others or others & inner else others))


def contradictions(stated: StatedIds, vocab_size: int) -> list[str]:
    """Return warnings, one for each kind of token that files disagree about.

    Args:
        stated: From `stated_ids`.
        vocab_size: Rows of the token embedding.
    """
    warnings = []
    for role, files in stated.items():
        says = "; ".join(f"{file} says {_shown(ids)}" for file, ids in files.items())
        sets = [set(ids) for ids in files.values()]
        # One of several ends is no contradiction.
        if any(not a & b for a in sets for b in sets):
            used = f"; used: {_shown(end_ids(stated))}" if role == "eos" else ""
            warnings.append(
                f"files disagree about {role}_token_id: {says}{used}. Correct them."
            )
        outside = sorted({i for ids in sets for i in ids if not 0 <= i < vocab_size})
        if outside:
            warnings.append(
                f"{role}_token_id {_shown(tuple(outside))} is not in the vocabulary of "
                f"{vocab_size}: {says}. Correct it if the tokenizer makes such ids."
            )
    return warnings


def _shown(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids))


def _read(path: Path, kinds: Kinds | None = None) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_json(path, "a folder with a tokenizer", BundleError, kinds=kinds)


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(i for i in values if type(i) is int)


def _ids_by_token(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of words, as far as the files say them."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    known = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    decoder = config.get("added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(token, dict) and str(key).isdecimal():
            known[token.get("content")] = int(key)
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict):
            known[token.get("content")] = token.get("id")
    return known
