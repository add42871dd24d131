"""Keep control tokens that a user types from being taken for those of a template.

A text is tokenised as a whole, since pieces would get other tokens at their edges. So a
template's own control tokens are written as aliases, words that nobody can type, and the copy
of the tokenizer that is used here knows the aliases alone: `</s>` in a question is five
characters to it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from typing import Any

from dllava_export.errors import InvalidInputError
from dllava_export.names import IMAGE_PLACEHOLDER
from dllava_export.short_text import shortened

__all__ = ["ControlTokens"]

_LOOKS_LIKE_CONTROL = re.compile(r"<.+>|\[[A-Z/_]+\]|\uff5c.+\uff5c", re.DOTALL)


class ControlTokens:
    """A tokenizer's control tokens, and a copy of it that takes them from aliases only.

    Args:
        backend: A `tokenizers.Tokenizer`.
        control_ids: Ids that are control tokens whatever they look like.

    Attributes:
        answer_mark: A word that nobody can type, to find an answer again in a template's text.
    """

    def __init__(self, backend: Any, control_ids: Collection[int]) -> None:
        from tokenizers import AddedToken, Tokenizer

        content = json.loads(backend.to_str())
        controls = [
            token
            for token in content["added_tokens"]
            if token["special"]
            or token["id"] in control_ids
            or _LOOKS_LIKE_CONTROL.fullmatch(token["content"])
        ]
        for token in controls:
            token["special"] = True
        self._guarded = Tokenizer.from_str(json.dumps(content))
        self._guarded.no_truncation()
        self._guarded.no_padding()
        self._controls = frozenset(token["content"] for token in controls)
        self._texts = sorted({*self._controls, IMAGE_PLACEHOLDER}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._texts)))
        nonce = secrets.token_hex(8)
        self.answer_mark = f"\ue000{nonce}a\ue001"
        self._typed = {text: f"\ue000{nonce}t{i}\ue001" for i, text in enumerate(self._texts)}
        self._typed_pattern = re.compile(f"\ue000{nonce}t(\\d+)\ue001")
        self._aliases = {t: f"\ue000{nonce}c{i}\ue001" for i, t in enumerate(self._texts)}
        flags = ("lstrip", "normalized", "rstrip", "single_word")
        self._guarded.add_tokens(
            [
                AddedToken(
                    self._aliases[token["content"]],
                    special=False,
                    **{flag: token[flag] for flag in flags},
                )
                for token in controls
            ]
        )
        self._guarded.encode_special_tokens = True
        self._original_ids = {
            self._guarded.token_to_id(self._aliases[text]): backend.token_to_id(text)
            for text in self._controls
        }
        # Any text may give the unknown token.
        unknown = content["model"].get("unk_token"), content["model"].get("unk_id")
        self._control_ids = {
            token["id"]
            for token in controls
            if token["content"] not in unknown and token["id"] not in unknown
        }

    def marked(self, text: str, *, allow_special: bool = False) -> str:
        """Return a user's text with what looks like a control token marked as typed.

        A literal `<image>` is marked even with `allow_special`: it is no place for an image.
        """
        if allow_special:
            return text.replace(IMAGE_PLACEHOLDER, self._typed[IMAGE_PLACEHOLDER])
        return self._pattern.sub(lambda match: self._typed[match[0]], text)

    def typed_in(self, text: str) -> str | None:
        """Return the first control token in a user's text, or None."""
        match = next(
            (m for m in self._pattern.finditer(text) if m[0] != IMAGE_PLACEHOLDER), None
        )
        return match[0] if match else None

    def unmarked(self, text: str) -> str:
        """Return a marked text as people read it."""
        return self._typed_pattern.sub(lambda match: self._texts[int(match[1])], text)

    def ids(self, marked: str) -> list[int]:
        """Return the token ids of a marked text, without any that the tokenizer would add.

        Raises:
            InvalidInputError: If the tokenizer makes a control token of typed text all the same.
        """
        aliased = self._pattern.sub(
            lambda m: self._aliases[m[0]] if m[0] in self._controls else m[0], marked
        )
        text = self.unmarked(aliased)
        try:
            found = self._guarded.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the tokenizers library has no exceptions of its own
            raise InvalidInputError(
                f"The tokenizer cannot encode {shortened(repr(text))}: {error}. Expected one that "
                "takes any text. Use other words, or a tokenizer with a token for unknown ones."
            ) from error
        typed = self._control_ids.intersection(found)
        if typed:
            raise InvalidInputError(
                f"The text holds what this tokenizer reads as control token {min(typed)}; "
                "expected plain text. Remove it, or pass allow_special=True (--allow-special)."
            )
        return [self._original_ids.get(token, token) for token in found]
