"""Numbers out of a model's metadata, checked.

In: a dictionary that a file gave. Out: `Numbers`. Holds: a number that comes out is of its type and within its limits,
so what is computed from it (sizes of weights and caches) neither overflows nor exhausts memory by accident.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ModelError

MAX_LAYERS = 1024
MAX_FEATURES = 1 << 20
MAX_POSITIONS = 1 << 24
MAX_VOCABULARY = 1 << 22
MAX_EXPERTS = 1 << 14


class Numbers:
    """Reads checked values out of a dictionary. where: the file, for messages."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self.values = values

    def _fail(self, key: str, value: Any, expected: str) -> ModelError:
        found = "nothing" if value is None else repr(value)[:80]
        return ModelError(f"{self.where}, key {key}", found, expected)

    def whole(self, key: str, most: int, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` to `most`; the default where the key is missing."""
        value = self.values.get(key, default)
        if value is None:
            raise self._fail(key, None, "a whole number")
        if type(value) is not int or not least <= value <= most:
            raise self._fail(key, value, f"a whole number from {least} to {most}")
        return value

    def real(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if value is None:
            raise self._fail(key, None, "a number")
        if type(value) not in (int, float) or not low <= value <= high:
            raise self._fail(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self._fail(key, value, "true or false")
        return value

    def one_of(self, key: str, known: tuple[str, ...], default: str | None = None) -> str:
        value = self.values.get(key, default)
        if value not in known or not isinstance(value, str):
            raise self._fail(key, value, " or ".join(repr(name) for name in known))
        return value
