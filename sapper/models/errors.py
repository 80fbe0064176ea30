"""The one exception that models raise for what a user handed over: files, names, settings."""

from __future__ import annotations


class ModelError(Exception):
    """A model file, its contents or a request cannot be used.

    where: the file, key or tensor. found, expected: what is there and what should be. mend: the likely way out.
    """

    def __init__(self, where: object, found: str, expected: str, mend: str = "") -> None:
        self.where, self.found, self.expected, self.mend = str(where), found, expected, mend
        super().__init__(f"{where}: found {found}; expected {expected}" + (f"; mend: {mend}" if mend else ""))
