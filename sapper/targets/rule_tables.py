"""The tables of a family's modules of selection rules as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def joined(family: str, tables: Iterable[Mapping[str, Entry]]) -> dict[str, Entry]:
    """Entries by lane op. Raises ValueError for an op that is in two of the tables."""
    found: dict[str, Entry] = {}
    for table in tables:
        twice = found.keys() & table.keys()
        if twice:
            raise ValueError(f"selection rules of {family}: found two for {', '.join(sorted(twice))}; expected one")
        found.update(table)
    return found
