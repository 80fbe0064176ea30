"""The levels of NVIDIA processors, and what an instruction demands of them.

Leaves: `LEVELS`, `Needs`, `lacking`. Holds: a level with an `a` (architecture-specific features) has what its plain
level has, and what names it alone; its features are not inherited by later levels.
Source: PTX ISA, section 10.2 (.target) and section 13 (release notes: first version for each target).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LEVELS: dict[str, tuple[int, int]] = {
    "sm_80": (7, 0), "sm_86": (7, 1), "sm_89": (7, 8), "sm_90": (7, 8), "sm_90a": (8, 0), "sm_100": (8, 6),
    "sm_100a": (8, 6), "sm_120": (8, 7), "sm_120a": (8, 7),
}
"""Level -> the first PTX version that may name it as its target."""


def number_of(level: str) -> int:
    """90 for "sm_90a"."""
    return int(level.removeprefix("sm_").rstrip("af"))


@dataclass(frozen=True, slots=True)
class Needs:
    """What a form demands. version: of PTX. minimum: the lowest level number, any later one has it.
    only: if not empty, exactly these architecture-specific levels have it, whatever their number."""

    version: tuple[int, int] = (7, 0)
    minimum: int = 80
    only: tuple[str, ...] = ()

    @staticmethod
    def parse(text: str) -> Needs:
        """ "8.0 sm_90" (this level and later ones), or "8.0 sm_90a sm_100a" (these and no others)."""
        version, *levels = text.split()
        major, minor = version.split(".")
        special = tuple(level for level in levels if level.endswith("a"))
        minimum = min((number_of(level) for level in levels), default=80)
        return Needs((int(major), int(minor)), minimum, special)


def combine(needs: Iterable[Needs]) -> Needs:
    """All of them together."""
    version, minimum, only = (7, 0), 80, None
    for need in needs:
        version, minimum = max(version, need.version), max(minimum, need.minimum)
        if need.only:
            only = need.only if only is None else tuple(level for level in only if level in need.only)
    return Needs(version, minimum, only or ())


def lacking(needs: Needs, level: str) -> str | None:
    """None where `level` has what is needed; else a few words. Raises KeyError for an unknown level."""
    if level not in LEVELS:
        raise KeyError(f"unknown level {level!r}; known: {', '.join(LEVELS)}")
    if needs.only:
        return None if level in needs.only else f"is only on {', '.join(needs.only)}; found {level}"
    if number_of(level) < needs.minimum:
        return f"needs sm_{needs.minimum} or later; found {level}"
    return None


def version_for(level: str, needs: Iterable[Needs] = ()) -> tuple[int, int]:
    """The lowest PTX version that serves the level and all of `needs`: older drivers refuse newer text."""
    return max([LEVELS[level], *(need.version for need in needs)])
