"""Arguments to check a kernel with: random and hostile, of ragged shapes and odd strides.

Enters: a kernel, or a function that makes its plain arguments. Leaves: `Case`s, small ones first. Holds: the same seed
gives the same cases; integers that the kernel uses as indices, bounds or divisors are drawn so that they mean
something.

What a tensor's integers are used for is read off the tile IR: a value that reaches an index of dimension d is drawn
below the extent of d, one that only reaches a loop's bound stays small, a divisor or shift count is 1 to 7. Places to
which iterations store that are asserted to be disjoint are all different.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from ..ir.extents import evaluate_nested, names_in, names_of, shape_of
from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import Dim, DType, TensorType, TileType
from ..tile.interpret import interpret
from ..tile.semantics import OutOfBounds
from .arguments import integer_range
from .dtypes import numpy_dtype

Array = numpy.ndarray[Any, numpy.dtype[Any]]
Arguments = dict[str, Any]
MakeArguments = Callable[[numpy.random.Generator, Mapping[str, int]], Arguments]

SMALL_VOLUME = 2_000
"""Up to this product of all extents a case may also be run element by element."""

LARGE_VOLUME = 60_000
_LOOP_BOUND = 8
_JOINT = ((15, 17, 33), (29, 46, 6), (29, 66, 2))
_BOUNDARIES = (0, 1, 2, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 27, 28, 29, 31, 32, 33, 47, 48, 49)
_UNITS = (5, 2, 3)
"""Of what dimensions are multiples of: where that is much, the others above are one or two of it."""
_LARGEST_DIVISOR = 512
_FEW = (2, 4, 9, 12, 13, 17, 18, 19), (2, 3, 4, 5, 9, 10, 17, 19)
"""Extents of which no two, and no two differences, less 1 or as they are, are alike in both rows."""
_ATTEMPTS = 8
_DIMS = {
    "ones": (1,), "small": (2, 3, 5, 7), "ragged": (15, 17, 31, 33, 18), "large": (65, 70, 100, 129),
    "round": (16, 32, 64, 128),
}
_LONG = ("ragged", "large", "round")


@dataclass(frozen=True, slots=True)
class Case:
    """One call. label: how it was drawn. arguments: by name, in order; two names may have one array. static: dims to be
    compiled in.

    small: it may be run element by element. packed: it is also made with packed matrices, where the kernel takes them.
    """

    label: str
    arguments: Arguments
    static: frozenset[str] = frozenset()
    small: bool = True
    packed: bool = False


@dataclass(slots=True)
class IntegerUse:
    """What the integers of one argument are used for. dims: the extents that they index. distinct: they say where
    iterations that are asserted to be disjoint store."""

    dims: list[Dim]
    bound: bool = False
    divisor: bool = False
    distinct: bool = False


def integer_uses(function: Function) -> dict[str, IntegerUse]:
    """What the integer arguments of a tile IR function are used for, by name."""
    uses = {}
    for argument in function.arguments:
        type = argument.type
        if isinstance(type, (TensorType, TileType)) and type.dtype.is_integer:
            uses[argument.name] = _uses_of(function, argument)
    return uses


def _most(index: Value) -> float:
    """The largest value of an index that is cut to some low bits; else infinity."""
    op = index.op
    if op is None or op.name != "and":
        return math.inf
    masks = [v.op for v in op.operands]
    while any(mask is not None and mask.name in ("full", "cast") for mask in masks):
        masks = [mask.operands[0].op if mask is not None and mask.name in ("full", "cast") else mask for mask in masks]
    known = [int(mask.attributes["value"]) for mask in masks if mask is not None and mask.name == "const"]
    return min((value for value in known if value >= 0), default=math.inf)


def _uses_of(function: Function, start: Value) -> IntegerUse:
    return _Uses(function, start).found()


class _Uses:
    """What becomes of an integer: the values that depend on it, axes whose ranges do, and what these are used for."""

    def __init__(self, function: Function, start: Value) -> None:
        self.function = function
        self.use = IntegerUse([])
        self.tainted: set[Value] = {start}
        self.axes: set[str] = set()
        self.asserted = {op for loop in function.walk() if loop.attributes.get("asserted") for op in loop.walk()}

    def found(self) -> IntegerUse:
        before = (-1, -1)
        while before != (len(self.tainted), len(self.axes)):
            before = len(self.tainted), len(self.axes)
            for op in self.function.walk():
                if op.name in ("load", "store"):
                    self._access(op)
                elif op.name in ("tiles", "whole", "each"):
                    self._loop(op)
                elif op.name == "index":
                    if op.attributes["axis"] in self.axes:
                        self.tainted.add(op.result)
                else:
                    self._other(op)
        return self.use

    def _access(self, op: Op) -> None:
        tensor, indices = op.operands[0], op.operands[1 if op.name == "load" else 2 :]
        assert isinstance(tensor.type, TensorType)
        for dim, index in zip(tensor.type.dims, indices, strict=True):
            if index not in self.tainted or (isinstance(dim, int) and _most(index) < dim):
                continue  # any value will do
            if op.name == "store" and op in self.asserted:
                self.use.distinct = True
            if dim == "?":
                self.use.bound = True
            elif dim not in self.use.dims:
                self.use.dims.append(dim)
        if tensor in self.tainted and op.name == "load" and not op.result.type.dtype.is_float:  # type: ignore[union-attr]
            self.tainted.add(op.result)

    def _loop(self, op: Op) -> None:
        operands = op.operands
        names = op.attributes.get("axes") or [op.attributes.get("axis", "")]
        count = op.attributes.get("count", len(names))
        for at in range(count):
            if operands[2 * at] in self.tainted or operands[2 * at + 1] in self.tainted:
                self.use.bound = True
                if op.name == "each":
                    self.tainted.add(op.blocks[0].arguments[at])
                else:
                    self.axes.add(names[at])
        if not op.blocks:
            return
        block = op.blocks[0]
        carried = block.arguments[len(block.arguments) - len(op.results) :]
        yielded = block.terminator.operands if block.terminator is not None else []
        for sources in (operands[2 * count :], yielded):
            for source, argument, result in zip(sources, carried, op.results, strict=False):
                if source in self.tainted:
                    self.tainted |= {argument, result}

    def _other(self, op: Op) -> None:
        if op.name in ("floordiv", "mod", "shl", "shr") and op.operands[1] in self.tainted:
            self.use.divisor = True
        for block in op.blocks:
            if block.terminator is not None:
                for source, result in zip(block.terminator.operands, op.results, strict=True):
                    if source in self.tainted:
                        self.tainted.add(result)
        if not op.blocks and any(v in self.tainted for v in op.operands):
            self.tainted.update(r for r in op.results if isinstance(r.type, TileType) and r.type.dtype.is_integer)


@dataclass(frozen=True, slots=True)
class _Traits:
    """What a kernel does that limits the values it may be given, and which tensors it reads and stores."""

    uses: dict[str, IntegerUse]
    stored: frozenset[str]
    loaded: frozenset[str]
    float_to_integer: bool
    periodic: bool


def _traits(function: Function) -> _Traits:
    stored = {op.operands[0].name for op in function.walk() if op.name == "store"}
    loaded = {op.operands[0].name for op in function.walk() if op.name == "load" or "join" in op.attributes}
    narrowing = any(
        op.name == "cast" and op.operands[0].type.dtype.is_float and op.result.type.dtype.is_integer  # type: ignore[union-attr]
        for op in function.walk()
    )
    periodic = any(op.name in ("sin", "cos") for op in function.walk())
    return _Traits(integer_uses(function), frozenset(stored), frozenset(loaded), narrowing, periodic)


def cases(
    kernel: Any, function: Function, seed: int, runs: int, make_arguments: MakeArguments | None = None,
    shapes: tuple[Mapping[str, int], ...] = (), divisible: Mapping[str, int] | None = None,
    contiguous: tuple[str, ...] = (),
) -> Iterator[Case]:
    """Cases for a kernel whose tile IR is `function`, the smallest first.

    make_arguments: plain arguments for some extents; None: they are drawn from the signature. shapes: the extents, in
    turns; none: these are drawn. divisible: what extents are rounded up to a multiple of. contiguous: tensors
    that lie in C order whatever the layout.
    """
    traits = _traits(function)
    contiguous += tuple(row[0] for row in function.attributes.get("requires", ()) if row[1] == "contiguous")
    dims = names_of(type for _, type in kernel.parameters)
    plan, pairs = _plan(runs), pairs_of_dims(function, dims)
    pairs = [*pairs[-1:], *pairs[:-1]]      # the first pair then has the first large extents
    ordered = sorted(shapes, key=lambda shape: _volume(shape.values()))
    for at, (extents, layout, hostile, fixed) in enumerate(plan):
        random = numpy.random.default_rng([seed, at])
        if ordered:
            shape = dict(ordered[at % len(ordered)])
        else:
            kept: tuple[str, ...] = ()
            if pairs and extents in _LONG:
                kept, pairs = pairs[0], [*pairs[1:], pairs[0]]
            shape = _draw_dims(random, dims, extents, kept)
            for dim, factor in (divisible or {}).items():
                shape[dim] = -(-shape[dim] // factor) * factor
            _make_whole(shape, function)
        if make_arguments is not None:
            arguments = make_arguments(random, shape)
        else:
            arguments = _fitting(kernel, function, traits, [seed, at, 1], shape)
        if hostile:
            for name, value in arguments.items():
                if isinstance(value, numpy.ndarray) and name in traits.loaded:
                    _poison(random, value, traits)
        static = frozenset(d for d in dims if fixed and random.random() < 0.6)
        if at % 3:      # what calls get; and the code for any extents
            static |= kernel.specialise
        arranged = {
            name: _arrange(value, "contiguous" if name in contiguous else layout, name in traits.stored)
            if isinstance(value, numpy.ndarray) else value
            for name, value in arguments.items()
        }
        joined = [] if at % 3 == 1 else _join(kernel, arguments, arranged)
        label = ", ".join([
            " ".join(f"{name}={extent}" for name, extent in shape.items()) or "no dimensions",
            layout,
            *(["hostile values"] if hostile else []),
            *([f"static {' '.join(sorted(static))}"] if static else []),
            *joined,
        ])
        yield Case(label, arranged, static, _volume(shape.values()) <= SMALL_VOLUME, at % 3 == 1)


def _join(kernel: Any, arguments: Arguments, arranged: Arguments) -> list[str]:
    """Let both tensors of each pair of `in_place` be one array, with the values of what is read; in words, which.

    arguments: the values. arranged: them as they are laid out; changed."""
    joined = []
    for output, source in kernel.options.get("in_place", ()):
        mine, theirs = arranged[output], arranged[source]
        if mine.shape == theirs.shape and mine.dtype == theirs.dtype and mine.strides == theirs.strides:
            mine[...] = arguments[source]
            arranged[source] = mine
            joined.append(f"{output} is {source}")
    return joined


def arguments_of_shape(kernel: Any, function: Function, shape: Mapping[str, int],
                       scalars: Mapping[str, Any] | None = None) -> Arguments:
    """Random contiguous arguments of one shape, for timing.

    scalars: values that are given. Other integer scalars that end a loop or begin an index are as large as the tensors
    allow, so that there is something to time, where that is an extent or the difference of two, less 1 or as it is.
    """
    traits, given = _traits(function), dict(scalars or {})
    arguments = _draw_arguments(kernel, traits, numpy.random.default_rng(0), shape) | given
    free = [name for name, use in traits.uses.items() if (use.bound or use.dims) and not use.divisor
            and not isinstance(arguments[name], numpy.ndarray) and name not in given]
    if not free:
        return arguments
    order = {extent: at for at, extent in enumerate(sorted(set(shape.values())))}
    few = []
    for extents in _FEW:
        small = {d: min(extent, extents[min(order[extent], len(extents) - 1)]) for d, extent in shape.items()}
        _make_whole(small, function)
        few.append((small, _draw_arguments(kernel, traits, numpy.random.default_rng(0), small)
                    | dict.fromkeys(free, 0) | {n: 0 for n, value in given.items() if isinstance(value, int)}))
    terms = sorted((shape[a] - (shape[b] if b else 0) - less, a, b, less)
                   for a in shape for b in ("", *shape) for less in (0, 1) if a != b)
    for name in free:
        for value, a, b, less in terms:
            tried = [(small[a] - (small[b] if b else 0) - less, call) for small, call in few]
            if value >= 0 and all(n >= 0 and _is_inside(function, call | {name: n})
                                  and not _is_inside(function, call | {name: n + 1}) for n, call in tried):
                arguments[name] = value
                for n, call in tried:
                    call[name] = n
                break
    return arguments


def _is_inside(function: Function, arguments: Arguments) -> bool:
    """Whether a call touches no element that is not there."""
    try:
        interpret(function, copies_of(arguments))
    except OutOfBounds:
        return False
    return True


def boundary_cases(
    kernel: Any, function: Function, seed: int, divisible: Mapping[str, int], contiguous: tuple[str, ...] = (),
) -> Iterator[Case]:
    """Cases in which loops and vectors end in every way: first all dimensions together, long enough that each has whole
    steps and a rest, then one at a time at, just below and just above where they end."""
    traits = _traits(function)
    dims = names_of(type for _, type in kernel.parameters)
    shapes = [{d: _round_up(joint[(at + turn) % len(joint)], divisible.get(d, 1)) for at, d in enumerate(dims)}
              for joint in _JOINT for turn in range(len(joint))]
    for dim in dims:
        for extent in dict.fromkeys(_round_up(n, divisible.get(dim, 1)) for n in _BOUNDARIES):
            shapes.append({d: divisible.get(d, 3) for d in dims} | {dim: extent})
    if divisible:
        shapes += [{d: divisible.get(d, 7) * _UNITS[(at + turn) % len(_UNITS)] for at, d in enumerate(dims)}
                   for turn in range(len(_UNITS))]
    for at, shape in enumerate(shapes):
        arguments = _fitting(kernel, function, traits, [seed, at], shape)
        arranged = {n: _arrange(v, "contiguous" if n in contiguous else "rows apart", n in traits.stored)
                    if isinstance(v, numpy.ndarray) else v for n, v in arguments.items()}
        yield Case(f"boundary {' '.join(f'{d}={e}' for d, e in shape.items())}", arranged, frozenset(),
                   _volume(shape.values()) <= SMALL_VOLUME)


def shaped_cases(kernel: Any, function: Function, seed: int, shapes: Iterable[dict[str, int]]) -> Iterator[Case]:
    """Two cases of each shape: contiguous, and with rows apart and hostile values."""
    traits = _traits(function)
    for at, shape in enumerate(shapes):
        for hostile, layout in enumerate(("contiguous", "rows apart")):
            arguments = _fitting(kernel, function, traits, [seed, at, hostile], shape)
            arranged = {}
            for name, value in arguments.items():
                if hostile and isinstance(value, numpy.ndarray) and name in traits.loaded:
                    _poison(numpy.random.default_rng([seed, at]), value, traits)
                arranged[name] = _arrange(value, layout, name in traits.stored) if isinstance(value, numpy.ndarray) \
                    else value
            yield Case(f"{' '.join(f'{d}={e}' for d, e in shape.items())}, {layout}", arranged, frozenset(),
                       _volume(shape.values()) <= SMALL_VOLUME)


def _round_up(value: int, factor: int) -> int:
    return -(-value // factor) * factor


def _make_whole(shape: dict[str, int], function: Function) -> None:
    """Make extents larger until what views divide has no rest, what they are indexed with is inside, extents that are
    computed of others are not negative, and what the kernel asserts holds; or smaller where that leads nowhere."""
    rows = [row[1:] for row in function.attributes.get("requires", ()) if row[1] in ("multiple", "inside")]
    rows += [("inside", -1, dim) for tensor in function.arguments if isinstance(tensor.type, TensorType)
             for dim in tensor.type.dims if isinstance(dim, tuple)]
    for turn in range(2 * _LARGEST_DIVISOR if rows else 0):
        for kind, left, right, *walked in rows:
            if any(evaluate_nested(count, shape) <= 0 for count in walked):
                continue
            for name in names_in(right if kind == "multiple" else left):
                shape[name] = max(1, shape[name])
            try:
                a, b = evaluate_nested(left, shape), evaluate_nested(right, shape)
            except ZeroDivisionError:
                shape.update({name: max(1, shape[name]) for name in [*names_in(left), *names_in(right)]})
                continue
            if kind == "multiple" and a % b:
                for name in names_in(left)[:1]:
                    shape[name] += 1
            elif kind == "inside" and a >= b:
                larger = names_in(right)[:1]
                if isinstance(right, str):
                    shape[right] = a + 1
                elif larger and turn < _LARGEST_DIVISOR:
                    shape[larger[0]] += 1
                else:
                    shape.update({name: shape[name] // 2 for name in names_in(left)})


def _plan(runs: int) -> list[tuple[str, str, bool, bool]]:
    """(extents, layout, hostile values, static dims) of each case."""
    first = [
        ("small", "contiguous", False, False), ("ones", "contiguous", False, False),
        ("zero", "contiguous", False, False), ("small", "contiguous", True, False),
        ("ragged", "rows apart", False, False), ("small", "every other", True, False),
        ("large", "contiguous", False, True), ("ragged", "columns first", True, False),
        ("round", "contiguous", False, False), ("ragged", "backwards", False, True),
        ("large", "rows apart", True, True), ("zero", "every other", False, True),
    ]
    return [first[at % len(first)] for at in range(runs)]


def _volume(extents: Any) -> int:
    volume = 1
    for extent in extents:
        volume *= max(1, extent)
    return volume


def pairs_of_dims(function: Function, dims: list[str]) -> list[tuple[str, ...]]:
    """Dimensions two of which the loops over tiles of a nest walk, or else any two. Which of both lies across the lanes
    shows only where both are long."""
    found: dict[tuple[str, ...], None] = {}

    def visit(block: Block, around: tuple[str, ...]) -> None:
        for op in block.ops:
            ends = [v.op for v in op.operands[1:2 * len(op.attributes["axes"]):2]] if op.name == "tiles" else []
            walked = tuple(end.attributes["name"] for end in ends if end is not None and end.name == "dim")
            inside = tuple(dict.fromkeys((*around, *walked)))
            found.update(dict.fromkeys(itertools.combinations(inside, 2)))
            for inner in op.blocks:
                visit(inner, inside)

    visit(function.body, ())
    return list(found) or list(itertools.combinations(dims, 2))


def _draw_dims(random: numpy.random.Generator, dims: list[str], extents: str, kept: tuple[str, ...]) -> dict[str, int]:
    """kept: which stay as long as they are drawn where all together are too many points."""
    pool = _DIMS["small" if extents == "zero" else extents]
    shape = {dim: int(random.choice(pool)) for dim in dims}
    while _volume(shape.values()) > LARGE_VOLUME:
        widest = max(shape, key=lambda dim: (dim not in kept and shape[dim] > 2, shape[dim]))
        shape[widest] = shape[widest] // 2 + 1
    if extents == "zero" and dims:
        shape[dims[int(random.integers(len(dims)))]] = 0
    return shape


def _draw_arguments(
    kernel: Any, traits: _Traits, random: numpy.random.Generator, shape: Mapping[str, int]
) -> Arguments:
    arguments: Arguments = {}
    scale = float(random.choice([1.0, 1.0, 0.01, 30.0]))
    for name, type in kernel.parameters:
        use = traits.uses.get(name)
        if isinstance(type, TensorType):
            extents = shape_of(type.dims, shape)
            if name in traits.stored and name not in traits.loaded:
                arguments[name] = _unwritten(extents, type.dtype)
            else:
                arguments[name] = _draw_values(random, extents, type.dtype, scale, use, shape, traits.periodic)
        elif name in kernel.defaults and random.random() < 0.5:
            arguments[name] = kernel.defaults[name]
        else:
            value = _draw_values(random, (), type.dtype, 1.0, use, shape, traits.periodic)
            arguments[name] = value[()].item()
            if type.dtype.is_float and random.random() < 0.5:
                arguments[name] = abs(arguments[name])
    return arguments


def _unwritten(extents: tuple[int, ...], dtype: DType) -> Array:
    """NaN, or the largest integer, so that an element that stays unwritten is found."""
    value: Any = numpy.nan if dtype.is_float else dtype.kind != "b" and integer_range(dtype)[1]
    return numpy.full(extents, value).astype(numpy_dtype(dtype))


def _draw_values(
    random: numpy.random.Generator, extents: tuple[int, ...], dtype: DType, scale: float, use: IntegerUse | None,
    shape: Mapping[str, int], periodic: bool,
) -> Array:
    """periodic: sines are taken, which have few bits left of large angles."""
    theirs = numpy_dtype(dtype)
    if dtype.is_float:
        return numpy.asarray(random.standard_normal(extents) * scale).astype(theirs)
    if dtype.kind == "b":
        return numpy.asarray(random.integers(0, 2, extents)).astype(theirs)
    low, high = integer_range(dtype)
    if use is not None and use.divisor:
        low, high = 1, 7
    elif use is not None and use.dims:
        low, high = 0, max(0, min(high, min(shape_of(use.dims, shape)) - 1))
        if use.distinct and math.prod(extents) <= high + 1:
            return random.permutation(high + 1)[:math.prod(extents)].reshape(extents).astype(theirs)
    elif use is not None and use.bound:
        low, high = 0, _LOOP_BOUND
    elif periodic or random.random() < 0.5:
        low, high = max(low, -9), min(high, 9)
    return numpy.asarray(random.integers(low, high, extents, dtype=numpy.int64, endpoint=True)).astype(theirs)


def _fitting(
    kernel: Any, function: Function, traits: _Traits, seed: list[int], shape: dict[str, int]
) -> Arguments:
    """Arguments with which no index is out of bounds, if a few attempts find some; `shape` is changed to theirs.

    What a kernel adds to its indices is not known, so integers are made smaller, and then dimensions larger.
    """
    types = dict(kernel.parameters)
    for name, use in traits.uses.items():
        for dim in use.dims if use.distinct and isinstance(types[name], TensorType) else ():
            if isinstance(dim, str):    # a place for each
                shape[dim] = max(shape[dim], math.prod(shape_of(types[name].dims, shape)))
    arguments = _draw_arguments(kernel, traits, numpy.random.default_rng(seed), shape)
    for attempt in range(_ATTEMPTS):
        trial = copies_of(arguments)
        try:
            interpret(function, trial)
            break
        except OutOfBounds as error:
            dims = types[error.tensor].dims
            dim = dims[error.dimension] if error.dimension < len(dims) else 0
            if error.index < 0 or attempt < 2 or not isinstance(dim, str):
                _make_integers_smaller(arguments, traits, attempt)
            else:
                shape[dim] = error.index + 1
                _make_whole(shape, function)
                if _volume(shape.values()) > 4 * LARGE_VOLUME:
                    break
                arguments = _draw_arguments(kernel, traits, numpy.random.default_rng(seed), shape)
                _make_integers_smaller(arguments, traits, 0)
        except Exception:  # not a matter of extents: the station that is at fault will say what is wrong
            break
    return arguments


def _make_integers_smaller(arguments: Arguments, traits: _Traits, attempt: int) -> None:
    for name, use in traits.uses.items():
        if use.dims or use.bound:
            if isinstance(arguments[name], numpy.ndarray):
                arguments[name][...] = arguments[name] // 4 if attempt == 0 else 0
            else:
                arguments[name] = arguments[name] // 4 if attempt == 0 else 0


_EXTREMES = {
    "float64": (5e-324, 1.7976931348623157e308), "float32": (1e-45, 3.4028234663852886e38),
    "float16": (6e-8, 65504.0), "bfloat16": (1e-40, 3.3895313892515355e38),
    "float8_e4m3fn": (2.0**-9, 448.0), "float8_e5m2": (2.0**-16, 57344.0),
}
"""A denormal number and the largest of each float."""


def _poison(random: numpy.random.Generator, values: Array, traits: _Traits) -> None:
    """Put NaN, infinities, denormal and extreme numbers in a fifth of the places of a float array."""
    name = values.dtype.name
    if name not in _EXTREMES or traits.float_to_integer or not values.size:
        return
    small, large = _EXTREMES[name]
    inf = numpy.inf
    pool = [numpy.nan, inf, -inf, 0.0, -0.0, small, -small, small * 5, 1.0]
    if not traits.periodic:
        pool += [large, -large]
    at = numpy.asarray(random.random(values.shape) < 0.2)
    with numpy.errstate(all="ignore"):
        values[at] = random.choice(pool, int(at.sum())).astype(values.dtype)


def _arrange(values: Array, layout: str, stored: bool) -> Array:
    """The same values in another layout. Memory between the elements holds 0xA5."""
    if layout == "contiguous" or values.ndim == 0:
        return numpy.ascontiguousarray(values)
    size = values.itemsize
    shape = values.shape
    extents = list(shape)
    steps = [1] * values.ndim
    order = list(range(values.ndim))
    if layout == "rows apart":
        extents[-1] += 3
    elif layout == "every other":
        steps[-1] = 2
        extents[-1] = 2 * extents[-1] + 1
    elif layout == "columns first":
        order.reverse()
    strides = [0] * values.ndim
    step = size
    for axis in reversed(order):
        strides[axis] = step * steps[axis]
        step *= max(1, extents[axis])
    offset = 0
    if layout == "backwards" and not stored:
        for axis in range(values.ndim):
            strides[axis] = -strides[axis]
            offset -= strides[axis] * max(0, shape[axis] - 1)
    memory = numpy.full(step + size, 0xA5, numpy.uint8)
    arranged: Array = numpy.ndarray(shape, values.dtype, memory.data, offset, strides)
    arranged[...] = values
    return arranged


def copies_of(arguments: Mapping[str, Any], past: int | None = None) -> Arguments:
    """Arguments in memory of their own, strides kept. What was one array is one. past: see copy_of."""
    made: dict[int, Array] = {}
    return {name: made[id(value)] if id(value) in made else made.setdefault(id(value), copy_of(value, past))
            if isinstance(value, numpy.ndarray) else value for name, value in arguments.items()}


def copy_of(values: Array, past: int | None = None) -> Array:
    """A copy with the same strides in memory of its own. past: its first byte lies so many beyond a multiple of 64."""
    if values.flags.c_contiguous or not values.size:
        memory = numpy.empty(values.nbytes + 1 + (0 if past is None else 64 + past), numpy.uint8)
        at = 0 if past is None else -memory.ctypes.data % 64 + past
        fresh: Array = numpy.ndarray(values.shape, values.dtype, memory.data, at,
                                     values.strides if not values.flags.c_contiguous and values.size else None)
        fresh[...] = values
        return fresh
    low = sum((n - 1) * s for n, s in zip(values.shape, values.strides, strict=True) if s < 0)
    high = sum((n - 1) * s for n, s in zip(values.shape, values.strides, strict=True) if s > 0) + values.itemsize
    memory = numpy.full(high - low + (0 if past is None else 64 + past), 0xA5, numpy.uint8)
    at = 0 if past is None else -memory.ctypes.data % 64 + past
    copied: Array = numpy.ndarray(values.shape, values.dtype, memory.data, at - low, values.strides)
    copied[...] = values
    return copied
