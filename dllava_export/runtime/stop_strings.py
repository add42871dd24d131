"""Texts that end an answer, found across the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Lets text through until one of several strings stands in it.

    Text that may be the beginning of one is held back until it is clear.

    Args:
        stops: The strings, none of them empty.

    Attributes:
        found: The string that was found; None until then. Nothing is let through afterwards.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Return what may be shown, now that `text` has come."""
        if self.found is not None:
            return ""
        self._held += text
        places = [(self._held.find(stop), stop) for stop in self._stops]
        place, stop = min((entry for entry in places if entry[0] >= 0), default=(-1, ""))
        if place >= 0:
            self.found = stop
            shown, self._held = self._held[:place], ""
            return shown
        num_held = next(
            (
                length
                for length in range(min(self._longest - 1, len(self._held)), 0, -1)
                if any(stop.startswith(self._held[-length:]) for stop in self._stops)
            ),
            0,
        )
        end = len(self._held) - num_held
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def flush(self) -> str:
        """Return what was held back: nothing comes behind it."""
        shown, self._held = self._held, ""
        return shown
