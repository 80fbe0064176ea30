"""Layouts: where every element of a tile lies in the machine.

Enters: axes as lists of factors, each factor at a level. Leaves: maps from elements to places and back, composed and
inverted layouts, and the steps that turn one layout into another. Holds: different elements have different places; at
every level but memory each place up to the level's extent is taken; lane and slot factors are powers of two.

    m: 14@register; n: 2@register × 16@lane

reads: n = vector * 16 + lane, and register = m * 2 + vector. The factors of an axis stand from the most significant to
the least. A factor's stride is what one step of it adds to the place at its level: the product of the factors of that
level that follow it, unless it says otherwise, as in `8@lane(stride 4)`. An axis of extent 1 is written `m: 1`.

A layout is also a map between any two sets of named coordinates: `inverse()` has the levels as its axes and the axes as
its levels, and `a.then(b)` maps a's axes to b's levels where b's axes are a's levels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

SLOT, LANE, REGISTER, WARP, MEMORY = LEVELS = ("slot", "lane", "register", "warp", "memory")
"""Elements packed in a 32-bit slot; lanes; registers of a warp; warps of a block; memory, in elements."""

Array = np.ndarray[Any, np.dtype[Any]]

_AXIS = re.compile(r"\s*(\w+)\s*:\s*(.+?)\s*$")
_FACTOR = re.compile(r"\s*([0-9]{1,18})\s*(?:@\s*(\w+)\s*(?:\(\s*stride\s+([0-9]{1,18})\s*\))?)?\s*$")


class LayoutError(ValueError):
    """Factors that are no layout, or two layouts that do not fit together."""


@dataclass(frozen=True, slots=True)
class Factor:
    """extent: how many steps. level: where they lie. stride: what one step adds to the place at that level."""

    extent: int
    level: str
    stride: int


class Layout:
    """axes: (name, factors from the most significant to the least), in order. Raises LayoutError.

    Layouts are equal if their axes stand in the same order and every element has the same place.
    """

    __slots__ = ("axes",)

    def __init__(self, axes: Mapping[str, tuple[Factor, ...]]) -> None:
        self.axes: dict[str, tuple[Factor, ...]] = {axis: _joined(factors) for axis, factors in axes.items()}
        for axis, factors in self.axes.items():
            for f in factors:
                if f.extent < 1 or f.stride < 1:
                    raise LayoutError(f"axis {axis}: found {f.extent}@{f.level} of stride {f.stride}; expected both "
                                      ">= 1")
                if f.level in (SLOT, LANE) and (f.extent & (f.extent - 1) or f.stride & (f.stride - 1)):
                    raise LayoutError(f"axis {axis}: found {f.extent}@{f.level} of stride {f.stride}; expected powers "
                                      f"of two at level {f.level}; mend: pad the axis, or put the factor at {REGISTER}")
        for level in self.levels:
            self._check_level(level)

    def _check_level(self, level: str) -> None:
        """Different elements have different places, and no place is left out but in memory."""
        span = 1
        for f in sorted(self._at(level), key=lambda f: f.stride):
            if f.stride < span:
                raise LayoutError(f"level {level}: found {f.extent} steps of stride {f.stride}; expected at least "
                                  f"{span}, what the smaller strides take; else two elements share a place")
            if f.stride > span and level != MEMORY:
                raise LayoutError(f"level {level}: found {f.extent} steps of stride {f.stride}; expected {span}; else "
                                  "a place stays empty")
            span = f.stride * f.extent if level != MEMORY else span + (f.extent - 1) * f.stride

    def _at(self, level: str) -> list[Factor]:
        return [f for factors in self.axes.values() for f in factors if f.level == level]

    # Text.

    @staticmethod
    def parse(text: str, levels: tuple[str, ...] = LEVELS) -> Layout:
        """Read the notation; `*` may stand for `×`. levels: the names that are allowed after @. Raises LayoutError."""
        found: dict[str, list[tuple[int, str, int | None]]] = {}
        for part in text.split(";"):
            axis = _AXIS.match(part)
            if axis is None or axis[1] in found:
                raise LayoutError(f"found {part.strip()!r}; expected AXIS: EXTENT@LEVEL × ..., each axis once")
            factors = found[axis[1]] = []
            for word in axis[2].replace("*", "×").split("×"):
                factor = _FACTOR.match(word)
                if factor is None or (factor[2] or levels[0]) not in levels or (not factor[2] and factor[1] != "1"):
                    raise LayoutError(f"axis {axis[1]}: found {word.strip()!r}; expected EXTENT@LEVEL or "
                                      f"EXTENT@LEVEL(stride S), LEVEL one of {', '.join(levels)}")
                factors.append((int(factor[1]), factor[2] or levels[0], int(factor[3]) if factor[3] else None))
        following: dict[str, int] = {}
        axes: dict[str, tuple[Factor, ...]] = {}
        for name, parsed in reversed(found.items()):
            made = []
            for extent, level, stride in reversed(parsed):
                made.append(Factor(extent, level, following.get(level, 1) if stride is None else stride))
                following[level] = following.get(level, 1) * extent
            axes[name] = tuple(reversed(made))
        return Layout(dict(reversed(axes.items())))

    def __str__(self) -> str:
        following: dict[str, int] = {}
        lines: list[str] = []
        for axis, factors in reversed(self.axes.items()):
            words = []
            for f in reversed(factors):
                expected = following.get(f.level, 1)
                words.append(f"{f.extent}@{f.level}" + (f"(stride {f.stride})" if f.stride != expected else ""))
                following[f.level] = expected * f.extent
            lines.append(f"{axis}: {' × '.join(reversed(words)) or '1'}")
        return "; ".join(reversed(lines))

    def __repr__(self) -> str:
        return f"<layout {self}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and list(self.axes.items()) == list(other.axes.items())

    def __hash__(self) -> int:
        return hash(tuple(self.axes.items()))

    # Extents.

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels that have a factor, in order of first appearance."""
        return tuple(dict.fromkeys(f.level for factors in self.axes.values() for f in factors))

    @property
    def shape(self) -> dict[str, int]:
        """The extent of each axis."""
        return {axis: prod(f.extent for f in factors) for axis, factors in self.axes.items()}

    def level_extent(self, level: str) -> int:
        """How many places the level has, gaps in memory included; 1 where nothing lies at it."""
        return 1 + sum((f.extent - 1) * f.stride for f in self._at(level))

    # Elements and places.

    def place(self, element: Mapping[str, Any]) -> dict[str, Any]:
        """The place at each level of an element. Coordinates are ints, or arrays of them. Raises LayoutError."""
        self._check_coordinates(element, self.shape)
        result: dict[str, Any] = dict.fromkeys(self.levels, 0)
        for axis, factors in self.axes.items():
            rest = element[axis]
            for f in reversed(factors):
                result[f.level] = result[f.level] + rest % f.extent * f.stride
                rest = rest // f.extent
        return result

    def element(self, place: Mapping[str, Any]) -> dict[str, Any]:
        """The element at a place: the inverse of `place`. In padded memory, a place between elements is an error."""
        self._check_coordinates(place, {level: self.level_extent(level) for level in self.levels})
        result: dict[str, Any] = {}
        for axis, factors in self.axes.items():
            coordinate = 0
            for f in factors:
                coordinate = coordinate * f.extent + self._digit(place[f.level], f)
            result[axis] = coordinate
        if MEMORY in self.levels and np.any(self.place(result)[MEMORY] != place[MEMORY]):
            raise LayoutError(f"found memory place {place[MEMORY]}, which holds no element")
        return result

    def _digit(self, place: Any, factor: Factor) -> Any:
        """The step of one factor in a place of its level: what larger strides leave, by its own."""
        if factor.level != MEMORY:
            return place // factor.stride % factor.extent
        for f in sorted(self._at(MEMORY), key=lambda f: -f.stride):
            digit = np.minimum(place // f.stride, f.extent - 1)      # padding may lie between, and is found out later
            if f == factor:
                break
            place = place - digit * f.stride
        return digit

    @staticmethod
    def _check_coordinates(given: Mapping[str, Any], extents: Mapping[str, int]) -> None:
        for name, extent in extents.items():
            if name not in given:
                raise LayoutError(f"found no coordinate {name}; expected {', '.join(extents)}")
            if np.any(np.less(given[name], 0)) or np.any(np.greater_equal(given[name], extent)):
                raise LayoutError(f"coordinate {name}: found {given[name]}; expected 0 to {extent - 1}")

    def spread(self, tile: Array, levels: tuple[str, ...] = (REGISTER, LANE)) -> Array:
        """The elements of a tile (one dimension per axis, in order) as an array with one dimension per level.

        Places of padded memory that hold no element are 0. Raises LayoutError if an element lies at another level.
        """
        self._check_levels(levels)
        if tile.shape != tuple(self.shape.values()):
            raise LayoutError(f"found a tile of shape {tile.shape}; expected {tuple(self.shape.values())}")
        result = np.zeros([self.level_extent(level) for level in levels], tile.dtype)
        result[self._places(levels)] = tile
        return result

    def collect(self, places: Array, levels: tuple[str, ...] = (REGISTER, LANE)) -> Array:
        """The tile whose elements lie in an array with one dimension per level: the inverse of `spread`."""
        self._check_levels(levels)
        expected = tuple(self.level_extent(level) for level in levels)
        if places.shape != expected:
            raise LayoutError(f"found places of shape {places.shape}; expected {expected}")
        collected: Array = places[self._places(levels)]
        return collected

    def _places(self, levels: tuple[str, ...]) -> tuple[Any, ...]:
        grid = np.indices(tuple(self.shape.values()))
        place = self.place(dict(zip(self.axes, grid, strict=True)))
        return tuple(place.get(level, np.zeros(grid.shape[1:], int)) for level in levels)

    def _check_levels(self, levels: tuple[str, ...]) -> None:
        missing = [level for level in self.levels if level not in levels]
        if missing:
            raise LayoutError(f"found elements at level {', '.join(missing)}; expected only {', '.join(levels)}")

    # Algebra.

    def inverse(self) -> Layout:
        """From places to elements: its axes are the levels, its levels the axes. LayoutError: padded memory."""
        weights: list[tuple[str, int, Factor]] = []
        for axis, factors in self.axes.items():
            weight = 1
            for f in reversed(factors):
                weights.append((axis, weight, f))
                weight *= f.extent
        axes: dict[str, tuple[Factor, ...]] = {}
        for level in self.levels:
            here = sorted((w for w in weights if w[2].level == level), key=lambda w: -w[2].stride)
            if prod(f.extent for _, _, f in here) != self.level_extent(level):
                raise LayoutError(f"level {level} has places without an element: found no inverse")
            axes[level] = tuple(Factor(f.extent, axis, weight) for axis, weight, f in here)
        return Layout(axes)

    def then(self, other: Layout) -> Layout:
        """The composition: this layout, whose levels are the axes of `other`. Raises LayoutError if factors cross."""
        axes: dict[str, tuple[Factor, ...]] = {}
        for axis, factors in self.axes.items():
            made: list[Factor] = []
            for f in factors:
                if f.level not in other.axes:
                    raise LayoutError(f"found level {f.level}; expected an axis of the second layout: "
                                      f"{', '.join(other.axes)}")
                made += _through(f, other.axes[f.level])
            axes[axis] = tuple(made)
        return Layout(axes)


def _joined(factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
    """Without factors of one step, and with neighbours joined that are one factor."""
    made: list[Factor] = []
    for f in factors:
        if f.extent == 1:
            continue
        last = made[-1] if made else None
        if last is not None and last.level == f.level and last.stride == f.stride * f.extent:
            made[-1] = Factor(last.extent * f.extent, f.level, f.stride)
        else:
            made.append(f)
    return tuple(made)


def _through(factor: Factor, target: tuple[Factor, ...]) -> list[Factor]:
    """One factor, whose places are coordinates of an axis with factors `target`, as factors of that axis's levels."""
    pieces: list[Factor] = []
    weight, low, left = 1, factor.stride, factor.extent
    for t in reversed(target):
        inner = low // weight if low > weight else 1     # steps of t that are below the factor
        above = weight * t.extent
        if left > 1 and low < above:
            if low % weight or t.extent % inner:
                raise LayoutError(f"found {factor.extent} steps of stride {factor.stride} across a factor of "
                                  f"{t.extent}; expected that one divides the other")
            room = t.extent // inner
            take = min(left, room)
            if left % take or room % take:
                raise LayoutError(f"found {factor.extent} steps of stride {factor.stride} across a factor of "
                                  f"{t.extent}; expected that one divides the other")
            pieces.append(Factor(take, t.level, t.stride * inner))
            left //= take
            low *= take
        weight = above
    if left > 1:
        raise LayoutError(f"found {factor.extent} steps of stride {factor.stride}; expected at most {weight} places")
    return pieces[::-1]


# Conversion.

@dataclass(frozen=True, slots=True)
class Rename:
    """New register i is old register order[i]. It costs nothing: the names of registers change."""

    order: tuple[int, ...]

    def apply(self, rows: Array) -> Array:
        renamed: Array = rows[list(self.order)]
        return renamed


@dataclass(frozen=True, slots=True)
class Exchange:
    """Lane IR `exchange` by `distance` on each pair of registers i and i + register_stride: the bit of the register's
    number and the bit of the lane's change places. Two instructions a pair, about."""

    register_stride: int
    distance: int

    def apply(self, rows: Array) -> Array:
        result = rows.copy()
        clear = np.flatnonzero(np.arange(rows.shape[1]) & self.distance == 0)
        for i in range(rows.shape[0]):
            if i // self.register_stride % 2 == 0:
                result[i][clear + self.distance] = rows[i + self.register_stride][clear]
                result[i + self.register_stride][clear] = rows[i][clear + self.distance]
        return result


@dataclass(frozen=True, slots=True)
class LaneSwap:
    """Two bits of the lane's number change places: lane IR `shuffle_xor` by first + second, kept by a `select` in the
    lanes whose two bits differ. Two instructions a register."""

    first: int
    second: int

    def apply(self, rows: Array) -> Array:
        lane = np.arange(rows.shape[1])
        differ = (lane & self.first != 0) != (lane & self.second != 0)
        return np.where(differ, rows[:, lane ^ (self.first + self.second)], rows)


@dataclass(frozen=True, slots=True)
class ThroughMemory:
    """Stored in one layout and loaded in the other."""

    source: Layout
    target: Layout
    levels: tuple[str, ...] = (REGISTER, LANE)

    def apply(self, rows: Array) -> Array:
        return self.target.spread(self.source.collect(rows, self.levels), self.levels)


Step = Rename | Exchange | LaneSwap | ThroughMemory


@dataclass(frozen=True, slots=True)
class Conversion:
    """steps: in order. kind: the dearest of them: "none", "rename", "shuffle" or "memory"."""

    kind: str
    steps: tuple[Step, ...]

    def apply(self, rows: Array) -> Array:
        """Run the steps on an array [registers, lanes] (through memory: one dimension per level of the step)."""
        for step in self.steps:
            rows = step.apply(rows)
        return rows


@dataclass(slots=True)
class _Digit:
    """A factor on its way: where it is, and where it must go."""

    extent: int
    level: str
    stride: int
    wanted_level: str
    wanted_stride: int


def convert(source: Layout, target: Layout) -> Conversion:
    """The steps that bring a tile from one layout to another. Raises LayoutError if their axes differ.

    Where every element keeps its lane, registers are renamed. Registers and lanes only, and factors that divide each
    other: shuffles, then renaming. Anything else goes through memory.
    """
    if source.shape != target.shape:
        raise LayoutError(f"found a tile of {target.shape}; expected {source.shape}, the same axes and extents")
    if source == target:
        return Conversion("none", ())
    levels = tuple(level for level in LEVELS if level in (*source.levels, *target.levels))
    through = Conversion("memory", (ThroughMemory(source, target, levels),))
    if set(levels) - {REGISTER, LANE} or source.level_extent(LANE) != target.level_extent(LANE):
        return through
    before, after = source._places((REGISTER, LANE)), target._places((REGISTER, LANE))
    if np.array_equal(before[1], after[1]):
        old = np.zeros(target.level_extent(REGISTER), int)
        old[after[0]] = before[0]
        return Conversion("rename", (Rename(tuple(old.tolist())),))
    try:
        moves = source.inverse().then(target)
    except LayoutError:
        return through
    digits = _digits(moves)
    steps: list[Step] = []
    distance = 1
    while distance < target.level_extent(LANE):
        here = next(d for d in digits if d.level == LANE and d.stride == distance)
        wanted = next(d for d in digits if d.wanted_level == LANE and d.wanted_stride == distance)
        if here is not wanted:
            within_lanes = wanted.level == LANE
            steps.append(LaneSwap(distance, wanted.stride) if within_lanes else Exchange(wanted.stride, distance))
            here.level, here.stride, wanted.level, wanted.stride = wanted.level, wanted.stride, LANE, distance
        distance *= 2
    order = [0] * target.level_extent(REGISTER)
    registers = [d for d in digits if d.level == REGISTER]
    for i in range(len(order)):
        order[sum(i // d.stride % d.extent * d.wanted_stride for d in registers)] = i
    if order != sorted(order):
        steps.append(Rename(tuple(order)))
    return Conversion("shuffle", tuple(steps))


def _digits(moves: Layout) -> list[_Digit]:
    """The factors of a map between places; those that touch lanes as single bits."""
    digits: list[_Digit] = []
    for level, factors in moves.axes.items():
        stride = 1
        for f in reversed(factors):
            extent, wanted = f.extent, f.stride
            step = 2 if LANE in (level, f.level) else extent
            while extent > 1:
                digits.append(_Digit(step, level, stride, f.level, wanted))
                stride, wanted, extent = stride * step, wanted * step, extent // step
    return digits
