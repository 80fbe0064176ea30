"""Which module carries out the rows of which unit: `UNITS`, filled by the decorator `unit` (see rows.py, Meaning)."""

from __future__ import annotations

from collections.abc import Callable

from . import parse
from .machine import Machine, Run

Unit = Callable[[Machine, parse.Instruction], Run]
UNITS: dict[str, Unit] = {}
"""Unit of a row -> how its instructions are decoded."""


def unit(name: str) -> Callable[[Unit], Unit]:
    """Registers the decoder of a unit."""

    def register(function: Unit) -> Unit:
        UNITS[name] = function
        return function

    return register
