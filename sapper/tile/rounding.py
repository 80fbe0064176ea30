"""How far a correct result may be from the interpreter's: found by running with random rounding.

Enters: a tile function and arguments. Leaves: for each tensor what it must hold afterwards, and how far each element
may be off. Holds: an element that no rounding reaches must be equal, bit for bit but for the sign of zero.

A fixed tolerance is wrong both ways: cancellation makes correct results differ in every digit, and a chain of exact
ops must not differ at all. So the kernel is run a few times more with each inexact result moved by a random amount
within its error (J. Vignes, "A stochastic arithmetic for reliable scientific computation", Mathematics and
Computers in Simulation 35, 1993), and with other tile sizes; the spread of the outcomes is each element's own bound.
What the language leaves open (which of 0.0 and -0.0 a maximum takes, an overflow inside a sum) comes out
as an unbounded spread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import DType, TensorType, TileType, bf16, f32, f64
from . import semantics
from .interpret import interpret
from .ops import place_of
from .semantics import Array

FUNCTION_ULPS = 4
"""Twice the error (in ulp of f32 or f64) that the library allows itself in exp, tanh and their like."""

FLUSHED = frozenset(("exp", "exp2", "sigmoid"))
"""Functions whose results in f32 below the normal numbers are 0 on some targets (docs/math.md, On PTX)."""

FUNCTIONS = frozenset(("exp", "exp2", "log", "log2", "rsqrt", "tanh", "sigmoid", "erf", "sin", "cos"))
_EPSILON = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7, "f8e4m3": 2.0**-3,
            "f8e5m2": 2.0**-2}
_LARGEST = {"f64": 2.0**1023 * (2 - 2.0**-52), "f32": 2.0**127 * (2 - 2.0**-23), "f16": 65504.0,
            "bf16": 2.0**127 * (2 - 2.0**-7), "f8e4m3": 448.0, "f8e5m2": 57344.0}
_SMALLEST = {"f64": 2.0**-1074, "f32": 2.0**-149, "f16": 2.0**-24, "bf16": 2.0**-133, "f8e4m3": 2.0**-9,
             "f8e5m2": 2.0**-16}
_LEAST_NORMAL = 2.0**-126
"""Of bf16 and f32."""
_WAYS = np.array([np.inf, -np.inf, np.nan])
"""What a sum may be whose terms overflow."""

EVENNESS = 0.5
"""Of the odds of these ways, and of what the sum is here, in a run: below 1 most sums go one way, and few another."""

MORE_RUNS = 64
"""Runs more where something would be wrong though sums may overflow: of a layer whose rows have several of them, which
the next one adds up, few go all one way. By 12 runs alone two layers with a maximum between were called wrong with 9 of
50 seeds, with these by none."""


def ulp(values: Array, dtype: DType) -> Array:
    """The distance to the next float of a dtype at each value, as f64; 0 where not finite."""
    wide = np.abs(values.astype(np.float64))
    with np.errstate(all="ignore"):
        exponent = np.frexp(np.where(np.isfinite(wide), wide, 0.0))[1] - 1
        step = np.ldexp(_EPSILON[dtype.name], exponent)
    return np.where(np.isfinite(wide), np.maximum(np.where(wide == 0, 0.0, step), _SMALLEST[dtype.name]), 0.0)


def rounds(op: Op) -> bool:
    """Whether the result of an op may differ between correct implementations on equal operands.

    f32 and f64 products may be fused with a sum. Sums of integers and IEEE operations are exact.
    """
    type = op.operands[1].type if op.name == "store" else op.results[0].type
    assert isinstance(type, TileType)
    if not type.dtype.is_float or op.name == "store":
        return type.dtype.is_float and op.attributes.get("join") == "add"
    if op.name == "mul":
        return type.dtype in (f32, f64)
    if op.name == "asm":
        return bool(op.attributes["tolerance"])
    return op.name in FUNCTIONS or op.name == "contract" or (
        op.name in ("reduce", "scan") and op.attributes["kind"] == "sum")


def fusible(function: Function) -> set[Value]:
    """Products that may be part of the only sum that reads them (docs/language.md, Products)."""
    users: dict[Value, list[Op]] = {}
    for op in function.walk():
        for value in op.operands:
            users.setdefault(value, []).append(op)

    def adds(op: Op) -> bool:
        return op.name in ("add", "sub") or (op.name in ("reduce", "scan") and op.attributes["kind"] == "sum") or (
            op.attributes.get("join") == "add")

    return {op.results[0] for op in function.walk() if op.name == "mul" and rounds(op)
            and len(users.get(op.results[0], ())) == 1 and adds(users[op.results[0]][0])}


def depends_on_order(op: Op) -> bool:
    """Whether the result of an op may differ if comparisons of 0.0 with -0.0 come in another order."""
    type = op.operands[op.name == "store"].type if op.operands else None
    extreme = op.attributes.get("join") in ("max", "min") if op.name == "store" else (
        op.name in ("reduce", "scan") and op.attributes["kind"] != "sum")
    return extreme and isinstance(type, TileType) and type.dtype.is_float


def reached(function: Function, *starts: Callable[[Op], bool]) -> set[Value]:
    """The values, tensors among them, that depend on a result for which one of `starts` holds."""
    inexact: set[Value] = set()

    def spread(source: Value, target: Value) -> None:
        if source in inexact:
            inexact.add(target)

    def visit(block: Block) -> None:
        for op in block.ops:
            if op.name == "store":
                for source in op.operands[1:]:
                    spread(source, place_of(op.operands[0]))
                if any(holds(op) for holds in starts):
                    inexact.add(place_of(op.operands[0]))
                continue
            if op.name == "load":
                for source in (place_of(op.operands[0]), *op.operands[1:]):
                    spread(source, op.result)
                continue
            for inner in op.blocks:
                if op.name != "if":
                    carried = inner.arguments[len(inner.arguments) - len(op.results):]
                    initial = op.operands[len(op.operands) - len(op.results):]
                    yielded = inner.ops[-1].operands if inner.ops else []
                    for start, argument, result in zip(initial, carried, op.results, strict=True):
                        spread(start, argument)
                        spread(start, result)
                    for value, argument in zip(yielded, carried, strict=False):
                        spread(value, argument)
                visit(inner)
                if inner.ops and inner.ops[-1].name == "yield":
                    for value, result in zip(inner.ops[-1].operands, op.results, strict=True):
                        spread(value, result)
            if op.blocks or op.name in ("view", "buffer"):
                continue
            for result in op.results:
                for source in op.operands:
                    spread(source, result)
                if any(holds(op) for holds in starts):
                    inexact.add(result)

    before = -1
    while len(inexact) != before:
        before = len(inexact)
        visit(function.body)
    return inexact


class RandomRounding:
    """Moves inexact results of a run at random; give it to interpret as `perturb`.

    inexact: what reached(function, rounds) found. fused: what fusible(function) did. seed: same seed, same moves.
    flushes: of FLUSHED, by every other seed. mixed: sums that may overflow go each its own way, or are as they are.
    has_chosen: whether there was one.
    """

    __slots__ = ("_flushes", "_fused", "_inexact", "_odds", "_random", "_scales", "_seed", "has_chosen")

    def __init__(self, inexact: set[Value], fused: set[Value], seed: int, flushes: bool = False,
                 mixed: bool = False) -> None:
        self._inexact, self._fused, self._flushes = inexact, fused, flushes and seed % 2 == 0
        self._seed, self._random = seed, np.random.default_rng(seed)
        self._odds = self._random.dirichlet((EVENNESS,) * (len(_WAYS) + 1)) if mixed else None
        self._scales: dict[Value, Array] = {}
        self.has_chosen = False

    def __call__(self, op: Op, operands: list[Array], result: Array) -> Array:
        if op.name == "store":
            size, count = operands
            return self._joined(op, size, count, result) if op.attributes["join"] == "add" else (
                self._either_zero(result, op.operands[1].type.dtype))  # type: ignore[union-attr]
        type = op.results[0].type
        assert isinstance(type, TileType)
        if op.name in ("reduce", "scan") and op.attributes["kind"] != "sum":
            return self._extreme(op, operands[0], result, type.dtype)
        if not type.dtype.is_float or type.dtype.name not in _EPSILON or not result.size:
            return result
        if op.name == "scan":
            return self._running_sum(op, operands[0], result, type)
        if op.name in ("reduce", "contract"):
            return self._sum(op, operands, result, type.dtype)
        narrow = type.dtype not in (f32, f64)
        if op.name in FUNCTIONS:
            moved = self._move(result, type.dtype, 1 if narrow else FUNCTION_ULPS)
            flushed = self._flushes and op.name in FLUSHED and type.dtype is f32
            return np.where(np.abs(moved) < _LEAST_NORMAL, np.float32(0), moved) if flushed else moved
        if op.name == "asm" and op.attributes["tolerance"]:
            factor = 1.0 + op.attributes["tolerance"] * self._random.choice([-1.0, 1.0], result.shape)
            return self._move(semantics.cast(np.asarray(result.astype(np.float64) * factor), type.dtype), type.dtype, 1)
        if op.name == "mul" and not narrow:
            moved = self._move(result, type.dtype, 1)
            return self._unrounded(op, operands, moved) if op.results[0] in self._fused else moved
        if op.name in ("add", "sub") and any(v in self._scales for v in op.operands) and all(
                v in self._scales or v.op is None for v in op.operands):
            return self._together(op, operands, result, type)
        if op.name == "cast" and narrow and op.operands[0] in self._inexact:
            return self._move(result, type.dtype, 1)
        return result

    def _move(self, values: Array, dtype: DType, ulps: int) -> Array:
        # Never by nothing: an element that no run moves would be taken for exact.
        steps = self._random.integers(1, ulps + 1, values.shape) * self._random.choice([-1, 1], values.shape)
        moved = values.astype(np.float64) + ulp(values, dtype) * steps
        exact = (values == 0) | ~np.isfinite(values.astype(np.float64))
        return np.asarray(np.where(exact, values, semantics.cast(np.asarray(moved), dtype)))

    def _beyond(self, where: Array, values: Array) -> Array:
        """What becomes of sums that may overflow on the way: of some runs, the same everywhere. An order of terms is
        one for many sums, and the largest of those that go each another way were always the same."""
        if not where.any():
            return values
        self.has_chosen = True
        if self._odds is not None:
            ways = self._random.choice(len(self._odds), where.shape, p=self._odds)
            return np.where(where & (ways < len(_WAYS)), _WAYS[ways % len(_WAYS)], values)
        way = self._seed % (len(_WAYS) + 1)
        chosen = self._random.choice(_WAYS, where.shape) if way == len(_WAYS) else np.full(where.shape, _WAYS[way])
        return np.where(where, chosen, values)

    def _unrounded(self, op: Op, operands: list[Array], product: Array) -> Array:
        """What is rounded to an infinity, or to 0, is something smaller, or larger, inside a sum. The first of several
        in a sum makes that infinite, and the others leave it so, whatever their sign: in turns of four runs none stays
        an infinity, those above stay, those below, or any."""
        type = op.results[0].type
        assert isinstance(type, TileType)
        left, right = (semantics.align(x, v.type.axes, type.axes)  # type: ignore[union-attr]
                       for x, v in zip(operands, op.operands, strict=True))
        beyond = np.isinf(product) & np.isfinite(left) & np.isfinite(right)
        way = self._seed % 4
        if way == 3:
            beyond &= self._random.random(product.shape) < 0.5
        elif way:
            beyond &= product < 0 if way == 1 else product > 0
        below = (product == 0) & (left != 0) & (right != 0)
        inside = np.where(beyond, _LARGEST[type.dtype.name], _SMALLEST[type.dtype.name])
        return np.where(beyond | below, np.copysign(inside, product).astype(product.dtype), product)

    def _sum(self, op: Op, operands: list[Array], result: Array, dtype: DType) -> Array:
        """An error that grows with the root of the length, relative to the sum of magnitudes."""
        first = op.operands[0].type
        target = op.results[0].type
        assert isinstance(first, TileType) and isinstance(target, TileType)
        over = op.attributes["over"]
        magnitudes = [np.abs(x.astype(np.float64)) for x in operands]

        def total(terms: list[Array]) -> Array:
            if op.name == "reduce":
                kept = tuple(axis for axis in first.axes if axis not in over)
                return semantics.align(semantics.reduce("sum", terms[0], first.axes, over, f64), kept, target.axes)
            second = op.operands[1].type
            assert isinstance(second, TileType)
            return semantics.contract(terms[0], first.axes, terms[1], second.axes, over, target.axes, f64)

        scale = total(magnitudes)
        if op.name == "reduce":
            length = magnitudes[0].size // max(1, result.size)
        else:
            second = op.operands[1].type
            assert isinstance(second, TileType)
            extents = dict(zip((*first.axes, *second.axes), (*operands[0].shape, *operands[1].shape), strict=True))
            length = int(np.prod([extents[axis] for axis in over]))
        inside = f64 if dtype is f64 else f32
        error = scale * (_EPSILON[inside.name] * (1.0 + np.sqrt(length))) + length * _SMALLEST[inside.name]
        wide = result.astype(np.float64)
        moved = wide + error * self._random.uniform(-1.0, 1.0, result.shape)
        spoilt = None
        if op.name == "contract" and all(v.type.dtype is bf16 for v in op.operands):  # type: ignore[union-attr]
            # Packed dot products take denormals for zero, of the elements as of each sum (docs/language.md, Products).
            kept = total([np.where(x < _LEAST_NORMAL, 0.0, x) for x in magnitudes])
            moved += (scale - kept + length * _LEAST_NORMAL) * self._random.choice([-1.0, 1.0], result.shape)
            spoilt = np.isnan(kept) & ~np.isnan(scale)  # an infinity times what was taken for zero
        elif op.name == "contract" and dtype is not f64:
            # Parts of f32 elements below the least normal number may count as zero (docs/language.md, Products).
            lost = total([x + (_LEAST_NORMAL if v.type.dtype is f32 else 0.0)  # type: ignore[union-attr]
                          for x, v in zip(magnitudes, op.operands, strict=True)])
            with np.errstate(invalid="ignore"):
                below = np.where(np.isfinite(scale), lost - scale, 0.0)
            moved += below * self._random.choice([-1.0, 1.0], result.shape)
        if dtype not in (f32, f64):
            moved = self._move(semantics.cast(np.asarray(moved), dtype), dtype, 1).astype(np.float64)
        moved = np.where(np.isfinite(scale), moved, wide)
        if spoilt is not None:
            moved = self._beyond(spoilt, moved)
        if inside is f32:  # a partial sum of finite terms may overflow, also where the others are infinite
            finite, settled = scale, np.isnan(scale)
            if not np.isfinite(scale).all():
                finite = total([np.where(np.isfinite(x), x, 0.0) for x in magnitudes])
                # Infinities of both signs, in any order.
                settled = np.isnan(total([np.where(np.isfinite(x), np.sign(x), x) for x in (
                    given.astype(np.float64) for given in operands)]))
            moved = self._beyond(~settled & (finite > _LARGEST["f32"]), moved)
            if op.name == "contract":
                self._scales[op.results[0]] = finite
        moved = np.where(moved == 0, np.copysign(0.0, self._random.uniform(-1.0, 1.0, result.shape)), moved)
        return semantics.cast(np.asarray(moved), dtype)

    def _together(self, op: Op, operands: list[Array], result: Array, type: TileType) -> Array:
        """Products that are added, or taken off each other, and what a loop carries: one sum may take all of them
        (docs/language.md, Sums), which may overflow on the way."""
        scale = np.zeros(result.shape)
        for value, given in zip(op.operands, operands, strict=True):
            known = self._scales.get(value)
            size = np.where(np.isfinite(given), np.abs(given), 0.0) if known is None else known
            scale = scale + semantics.align(size, value.type.axes, type.axes)  # type: ignore[union-attr]
        self._scales[op.results[0]] = scale
        return self._beyond(scale > _LARGEST[type.dtype.name], result).astype(result.dtype)

    def _joined(self, op: Op, size: Array, count: Array, total: Array) -> Array:
        """As for sums. size: of the finite magnitudes that are joined; count: how many values. Sums in memory of narrow
        floats are rounded each time. An element moves the same way each time it is joined: else two might cancel."""
        dtype = op.operands[1].type.dtype  # type: ignore[union-attr]
        if not dtype.is_float:
            return total
        steps = np.sqrt(count) if dtype in (f32, f64) else count
        error = size * _EPSILON[dtype.name] * (1.0 + steps) + count * _SMALLEST[dtype.name]
        ways = np.random.default_rng(self._seed).choice([-1.0, 1.0], total.shape)
        with np.errstate(all="ignore"):
            moved = total.astype(np.float64) + error * ways
        beyond = ~np.isnan(total) & (size + error > _LARGEST[dtype.name])    # also where the others are infinite
        return semantics.cast(self._beyond(beyond, moved), dtype)

    def _running_sum(self, op: Op, operand: Array, result: Array, type: TileType) -> Array:
        """As for sums, element by element."""
        at = type.axes.index(op.attributes["over"][0])
        inside = f64 if type.dtype is f64 else f32
        wide = result.astype(np.float64)
        with np.errstate(all="ignore"):
            scale = np.cumsum(np.abs(operand.astype(np.float64)), axis=at)
            length = operand.shape[at]
            error = scale * (_EPSILON[inside.name] * (1.0 + np.sqrt(length))) + length * _SMALLEST[inside.name]
            moved = wide + error * self._random.uniform(-1.0, 1.0, result.shape)
            moved = np.where(np.isfinite(scale), moved, wide)
            if inside is f32:
                finite = np.cumsum(np.where(np.isfinite(operand), np.abs(operand.astype(np.float64)), 0.0), axis=at)
                moved = self._beyond(finite > _LARGEST["f32"], moved)
        moved = np.where(moved == 0, np.copysign(0.0, self._random.uniform(-1.0, 1.0, result.shape)), moved)
        if type.dtype not in (f32, f64):
            return self._move(semantics.cast(np.asarray(moved), type.dtype), type.dtype, 1)
        return semantics.cast(np.asarray(moved), type.dtype)

    def _extreme(self, op: Op, operand: Array, result: Array, dtype: DType) -> Array:
        """Of 0.0 and -0.0, which are equal, the order decides which is taken."""
        type, target = op.operands[0].type, op.results[0].type
        assert isinstance(type, TileType) and isinstance(target, TileType)
        if not type.dtype.is_float or not operand.size:
            return result
        return self._either_zero(result, dtype)

    def _either_zero(self, result: Array, dtype: DType) -> Array:
        if dtype.is_float:
            sign = np.copysign(1.0, self._random.uniform(-1.0, 1.0, result.shape))
            result = np.where(result == 0, semantics.cast(sign * 0.0, dtype), result)
        return np.asarray(result)


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a tensor must hold after a kernel.

    values: the interpreter's. bound: how far each element may be off, as f64; infinite where anything may stand. more:
    where anything may stand that bound does not say, found by more runs, which take their time.
    """

    name: str
    dtype: DType
    values: Array
    bound: Array
    more: Callable[[], Array] | None = field(default=None, compare=False, repr=False)

    def mismatch(self, actual: Array) -> str | None:
        """None if `actual` agrees, else a sentence about the first element that does not. NaN agrees with NaN."""
        if actual.shape != self.values.shape or actual.dtype != self.values.dtype:
            return (f"{self.name} is {actual.dtype}{list(actual.shape)}; expected "
                    f"{self.values.dtype}{list(self.values.shape)}")
        with np.errstate(all="ignore"):
            wide, expected = _wide(actual), _wide(self.values)
            distance = np.abs(wide - expected)
            good = (actual == self.values) | (np.isnan(wide) & np.isnan(expected)) | (distance <= self.bound)
            good |= np.isinf(self.bound)
        if self.more is not None and not np.all(good):
            good |= self.more()
        if np.all(good):
            return None
        wrong = tuple(int(i) for i in np.argwhere(~good)[0])
        count = int(np.count_nonzero(~good))
        return (f"{self.name}[{', '.join(map(str, wrong))}] is {actual[wrong]}; expected {self.values[wrong]} "
                f"+- {self.bound[wrong]:.3g} ({count} of {good.size} elements are wrong)")


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def expect(function: Function, arguments: Mapping[str, Any], runs: int = 4, seed: int = 0, slack: float = 3.0,
           tile_sizes: Sequence[int | None] = (1, None, 3, 8), flushes: bool = False) -> dict[str, Expectation]:
    """Run a kernel without touching the arguments; what each tensor must hold afterwards. One array may have two names.

    runs: how many runs with random rounding; each has its own tile size, in turn from tile_sizes (1 takes long for
    large tensors). slack: what the spread is multiplied by, since a few runs seldom meet the worst case. flushes:
    whether FLUSHED are 0 below the normal numbers. The bound of an inexact float is at least 4 ulp (1 ulp of narrower
    ones).
    """
    inexact = reached(function, rounds)
    unsettled = reached(function, rounds, depends_on_order)
    fused = fusible(function)
    tensors = {value.name: value for value in function.tensors()}

    def once(tile_size: int | None, perturb: RandomRounding | None) -> dict[str, Array]:
        made = {id(given): np.array(given) for name, given in arguments.items() if name in tensors}
        copies = {name: made.get(id(given), given) for name, given in arguments.items()}
        interpret(function, copies, tile_size, perturb=perturb)
        return {name: copies[name] for name in tensors}

    reference = once(None, None)
    others: list[dict[str, Array]] = []
    has_chosen = False
    if any(value in unsettled for value in tensors.values()):
        for at in range(runs):
            rounding = RandomRounding(inexact, fused, seed + at, flushes)
            others.append(once(tile_sizes[at % len(tile_sizes)], rounding))
            has_chosen |= rounding.has_chosen

    @cache
    def more() -> dict[str, Array]:
        """Of each tensor, the elements that are infinite, or no number, otherwise in more runs."""
        found = {name: np.zeros(values.shape, bool) for name, values in reference.items()}
        for at in range(runs, runs + MORE_RUNS):
            other = once(None, RandomRounding(inexact, fused, seed + at, flushes, mixed=True))
            for name, values in reference.items():
                a, b = _wide(other[name]), _wide(values)
                found[name] |= (a != b) & ~(np.isnan(a) & np.isnan(b)) & ~(np.isfinite(a) & np.isfinite(b))
        return found

    def more_of(name: str) -> Array:
        return more()[name]

    result = {}
    for name, value in tensors.items():
        assert isinstance(value.type, TensorType)
        dtype, values = value.type.dtype, reference[name]
        same_array = {tensors[other] for other in tensors if arguments[other] is arguments[name]}
        bound = np.zeros(values.shape)
        if same_array & unsettled:
            with np.errstate(all="ignore"):
                for other in others:
                    distance = np.abs(_wide(other[name]) - _wide(values))
                    same = (other[name] == values) | (np.isnan(_wide(other[name])) & np.isnan(_wide(values)))
                    distance = np.where(same, 0.0, np.where(np.isnan(distance), np.inf, distance))
                    bound = np.maximum(bound, distance * slack)
                if not dtype.is_float:
                    bound = np.where(bound > 0, np.inf, 0.0)
                elif same_array & inexact:
                    bound = bound + ulp(values, dtype) * (4 if dtype in (f32, f64) else 1)
                    overflows = np.isfinite(_wide(values)) & (np.abs(_wide(values)) + bound > _LARGEST[dtype.name])
                    bound = np.where(overflows, np.inf, bound)
        open_ended = has_chosen and dtype.is_float and not same_array.isdisjoint(unsettled)
        result[name] = Expectation(name, dtype, values, bound, partial(more_of, name) if open_ended else None)
    return result
