"""Strings that end a text as it comes in pieces.

In: pieces of text. Out: `StopStrings.push` gives what is certain to be no part of a string to stop at. Holds: the
pieces given back, joined, are the text up to the first such string, however it was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ModelError


class StopStrings:
    """met: whether one of the strings has come; nothing is given back after it."""

    def __init__(self, strings: Sequence[str]) -> None:
        """Raises ModelError for an empty string."""
        if "" in strings:
            raise ModelError("the strings to stop at", "an empty one", "one character at least")
        self._strings = tuple(strings)
        self._held = ""
        self.met = False

    def push(self, text: str) -> str:
        """What may be shown, now that this text came too."""
        if self.met:
            return ""
        if not self._strings:
            return text
        held = self._held + text
        places = [place for place in (held.find(string) for string in self._strings) if place >= 0]
        if places:
            self.met, self._held = True, ""
            return held[: min(places)]
        keep = max((size for string in self._strings for size in range(min(len(string) - 1, len(held)), 0, -1)
                    if held.endswith(string[:size])), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back, where no more text comes."""
        rest, self._held = self._held, ""
        return rest
