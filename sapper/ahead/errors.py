"""The one exception of building a model ahead of time."""

from __future__ import annotations


class AheadError(Exception):
    """Programs that can't become a file as they are. where, found, expected, mend: as in all of sapper's messages."""

    def __init__(self, where: str, found: str, expected: str, mend: str = "") -> None:
        self.where, self.found, self.expected, self.mend = where, found, expected, mend
        super().__init__(f"{where}: found {found}; expected {expected}" + (f"; mend: {mend}" if mend else ""))
