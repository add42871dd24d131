"""Which chat template a checkpoint's conversations are written in: what it says, or a guess."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllava_export.errors import SettingError
from dllava_export.families.chat_templates import (
    CHECKPOINT_TEMPLATE,
    find_template,
    named_templates,
    read_template_file,
)

__all__ = ["TemplateChoice", "choose_template"]


@dataclasses.dataclass(frozen=True)
class TemplateChoice:
    """The template of a checkpoint.

    Attributes:
        name: One of `named_templates()`, or `CHECKPOINT_TEMPLATE`.
        source: Text of the user's file; None for another template.
        warning: Why this may be the wrong one; None where the checkpoint or the user said it.
    """

    name: str
    source: str | None = None
    warning: str | None = None


# What LLaVA calls its templates, in configurations and on its command line.
_SPELLINGS = {
    "v1": "vicuna_v1",
    "vicuna_v1": "vicuna_v1",
    "llama_2": "llama_2",
    "llava_llama_2": "llama_2",
    "mistral_instruct": "mistral_instruct",
    "chatml": "chatml",
    "chatml_direct": "chatml",
    "mistral_direct": "chatml",
    "plain": "plain",
    "llava_plain": "plain",
}
_STATING_KEYS = ("conv_mode", "conv_version", "version")
# Parts of a model's name, the first that fits counts.
_NAME_PARTS = (
    (r"llama-?_?2|llama2", "llama_2"),
    (r"mistral|mixtral", "mistral_instruct"),
    (r"chatml|nous-hermes|-yi-|34b", "chatml"),
    (r"pretrain|-plain", "plain"),
    (r"vicuna|llava-v?1\.5|dynamic-?llava", "vicuna_v1"),
)


def choose_template(
    asked: str | None,
    default: str,
    config: Mapping[str, Any],
    folder: Path,
    *,
    is_known: bool = False,
) -> TemplateChoice:
    """Decide how conversations with a checkpoint are written.

    Args:
        asked: What the user wants: a name, or a file with a jinja2 template.
        default: The family's own.
        config: The checkpoint's `config.json`.
        folder: The checkpoint's.
        is_known: All models of this kind are of `default`.

    Raises:
        SettingError: If `asked` is neither a name nor a template file.
        BundleError: If the checkpoint's own template cannot be read.
    """
    own = find_template(folder)
    if asked is not None:
        return _asked_template(asked, own, folder)
    if default == CHECKPOINT_TEMPLATE and own is not None:
        return TemplateChoice(CHECKPOINT_TEMPLATE)
    for key in _STATING_KEYS:
        stated = _SPELLINGS.get(str(config.get(key)))
        if stated is not None:
            return TemplateChoice(stated)
        if isinstance(config.get(key), str) and key != "version":
            return _guess(
                "vicuna_v1", f"config.json has {key} {config[key]!r}, which is not known here"
            )
    named = f"{config.get('_name_or_path') or ''} {folder.name}".lower()
    found = next((name for part, name in _NAME_PARTS if re.search(part, named)), None)
    if default == CHECKPOINT_TEMPLATE:
        return _guess(found or "vicuna_v1", f"{folder} has no chat template")
    if found == default or (is_known and found is None):
        return TemplateChoice(default)
    if found is not None:
        return _guess(found, f"the name of {folder} says so, but nothing in config.json")
    return _guess(default, f"nothing in {folder} says how its model was prompted")


def _asked_template(asked: str, own: str | None, folder: Path) -> TemplateChoice:
    if asked in named_templates():
        return TemplateChoice(asked)
    if asked == CHECKPOINT_TEMPLATE and own is not None:
        return TemplateChoice(asked)
    if not Path(asked).is_file():
        what = (
            f"{folder} has no chat template of its own"
            if asked == CHECKPOINT_TEMPLATE
            else f"chat_template is {asked!r}"
        )
        raise SettingError(
            f"{what}; expected one of {', '.join(named_templates())}, {CHECKPOINT_TEMPLATE}, "
            "or the path of a file with a jinja2 template."
        )
    return TemplateChoice(CHECKPOINT_TEMPLATE, read_template_file(Path(asked)))


def _guess(name: str, reason: str) -> TemplateChoice:
    return TemplateChoice(
        name,
        warning=f"the chat template {name} is a guess: {reason}. A wrong one gives poor "
        f"answers; say it with --chat-template {'|'.join(named_templates())}|FILE.",
    )
