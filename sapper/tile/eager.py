"""The eager run: the author's own Python function, on NumPy.

Enters: a kernel and its arguments. Leaves: the arguments, changed in place. Holds: the function's own code object runs,
line by line, with tiles, scalars, axes and tensors that are backed by NumPy arrays, so that pdb, breakpoints and print
work inside a kernel. It means what the tile IR means (sapper/tile/interpret.py): both compute through semantics.py.

Names that Python defines itself (sum, max, min, abs, round, range, int, float, bool) mean sapper's inside a kernel. So
the code runs as a copy of the function whose builtins are overlaid; the functions that it calls, and the dimensions
that it names, are replaced in the copy's globals and closure in the same way. The author's module is not touched.
What the copy's code does about Python's own numbers is said in eager_code.py.
"""

from __future__ import annotations

import builtins as python
import dis
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import CellType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NoReturn

import numpy as np

from ..ir.nodes import Location
from ..ir.types import DType, TensorType, bf16, bool_, f16, f32, f64, i8, i32, i64, index, u8
from ..lang import builtins as language
from ..lang import context
from ..lang.dims import DimExpression
from ..lang.errors import KernelError
from ..lang.kernel import Kernel
from . import races, semantics
from .eager_code import LOCALS, METHOD, WEAKEN, code_of
from .interpret import bind_arguments
from .ops import UNARY_FLOAT
from .semantics import Array, Axes

Literal = bool | int | float
"""A number of Python's own: it takes the dtype of what it meets."""


def run(kernel: Kernel, arguments: Sequence[Any] | Mapping[str, Any],
        tile_sizes: Mapping[str, int] | int | None = None) -> None:
    """Run a kernel's Python function; tensors among the arguments are changed in place.

    arguments: in the order of the kernel's parameters, or by name; scalars may be left out if they have defaults.
    They are checked as sapper.tile.interpret.bind_arguments says.
    tile_sizes: by the name of the loop variable, or one size for all; an axis without one is a single tile.
    KernelError: what has no meaning, at the author's line. IndexError: an access out of bounds.
    """
    names = [name for name, _ in kernel.parameters]
    if not isinstance(arguments, Mapping):
        if len(arguments) > len(names):
            raise TypeError(f"{kernel.name} takes {len(names)} arguments; {len(arguments)} were given")
        arguments = dict(zip(names, arguments, strict=False))
    bound, dims = bind_arguments(kernel.name, kernel.parameters, {**kernel.defaults, **arguments})
    values: list[Any] = []
    for name, type in kernel.parameters:
        if isinstance(type, TensorType):
            values.append(TensorView(bound[name], type, name))
        else:
            values.append(Tile(bound[name].copy(), (), type.dtype))
    running = Context(dims, tile_sizes)
    with context.use(running), np.errstate(all="ignore"):
        running.overlay(kernel.python_function)(*values)


# Places and errors --------------------------------------------------------------------------------------------------


def _author_frame() -> FrameType:
    """The innermost frame outside sapper's own lang and tile packages: the author's line."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("sapper.lang.", "sapper.tile.")):
        frame = frame.f_back
    assert frame is not None
    return frame


def _place() -> Location:
    frame = _author_frame()
    file, line = frame.f_code.co_filename, frame.f_lineno
    position = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), None)
    if position is None or position[2] is None or position[3] is None or position[0] != line:
        return Location(file, line)
    return Location(file, line, position[2] + 1, max(position[2], position[3] if position[1] == line else 0) + 1)


def _fail(kind: str, headline: str, found: str = "", expected: str = "", mend: str = "") -> NoReturn:
    raise KernelError(kind, headline, _place(), found, expected, mend)


_targets: dict[tuple[CodeType, int], list[str]] = {}


def _assigned_names() -> list[str]:
    """The names that the value of the running call is about to be stored to: the loop variables of
    `for m, n in tiles(M, N)`, or n of `n = whole(N)`. Empty if it goes elsewhere."""
    frame = _author_frame()
    key = (frame.f_code, frame.f_lasti)
    names = _targets.get(key)
    if names is None:
        names = _targets[key] = []
        for instruction in dis.get_instructions(frame.f_code):
            if instruction.offset <= frame.f_lasti:
                continue
            if instruction.opname.startswith("STORE_") and instruction.argval is not None:
                stored = instruction.argval
                names.extend(stored if isinstance(stored, tuple) else [str(stored)])
            elif instruction.opname not in ("GET_ITER", "FOR_ITER", "UNPACK_SEQUENCE", "CACHE", "NOP", "EXTENDED_ARG"):
                break
    return names


# Values -------------------------------------------------------------------------------------------------------------


class _Operators:
    """Python's operators, of tiles and (to say that they need an index) of tensors."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None  # a NumPy number on the left leaves the operation to the tile

    def __add__(self, other: Any) -> Any:
        return _binary("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return _binary("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return _binary("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _binary("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return _binary("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return _binary("mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return _binary("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _binary("div", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return _binary("floordiv", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _binary("floordiv", other, self)

    def __mod__(self, other: Any) -> Any:
        return _binary("mod", self, other)

    def __rmod__(self, other: Any) -> Any:
        return _binary("mod", other, self)

    def __and__(self, other: Any) -> Any:
        return _binary("and", self, other)

    def __rand__(self, other: Any) -> Any:
        return _binary("and", other, self)

    def __or__(self, other: Any) -> Any:
        return _binary("or", self, other)

    def __ror__(self, other: Any) -> Any:
        return _binary("or", other, self)

    def __xor__(self, other: Any) -> Any:
        return _binary("xor", self, other)

    def __rxor__(self, other: Any) -> Any:
        return _binary("xor", other, self)

    def __lshift__(self, other: Any) -> Any:
        return _binary("shl", self, other)

    def __rlshift__(self, other: Any) -> Any:
        return _binary("shl", other, self)

    def __rshift__(self, other: Any) -> Any:
        return _binary("shr", self, other)

    def __rrshift__(self, other: Any) -> Any:
        return _binary("shr", other, self)

    def __lt__(self, other: Any) -> Any:
        return _binary("lt", self, other)

    def __le__(self, other: Any) -> Any:
        return _binary("le", self, other)

    def __gt__(self, other: Any) -> Any:
        return _binary("gt", self, other)

    def __ge__(self, other: Any) -> Any:
        return _binary("ge", self, other)

    def __eq__(self, other: object) -> Any:
        return _binary("eq", self, other)

    def __ne__(self, other: object) -> Any:
        return _binary("ne", self, other)

    def __matmul__(self, other: Any) -> Any:
        return _contract(self, other)

    def __neg__(self) -> Tile:
        return _unary("neg", _plain(self))

    def __pos__(self) -> Tile:
        return _plain(self)  # type: ignore[no-any-return]

    def __invert__(self) -> Tile:
        return _unary("not", _plain(self))

    def __pow__(self, power: Any) -> Tile:
        return _power(_plain(self), power)


class Tile(_Operators):
    """A tile value; a scalar is one without axes.

    array: its elements so far, one dimension for each name in axes. dtype: a sapper dtype. weak: made of Python numbers
    alone, as where(c, 1.0, 2.0) is, so that it takes the dtype of what it meets. Arithmetic makes new tiles.
    """

    __slots__ = ("array", "axes", "dtype", "weak")

    def __init__(self, array: Array, axes: Axes, dtype: DType, weak: bool = False) -> None:
        self.array = np.asarray(array)
        self.axes = axes
        self.dtype = dtype
        self.weak = weak

    def to(self, dtype: Any) -> Tile:
        """This tile as another dtype; see semantics.cast."""
        dtype = _dtype(dtype)
        return Tile(semantics.cast(self.array, dtype), self.axes, dtype)

    def bits(self, dtype: Any) -> Tile:
        """The same bits as another dtype of the same width."""
        dtype = _dtype(dtype)
        if dtype.bits != self.dtype.bits or bool_ in (dtype, self.dtype):
            _fail("op-dtype", "a bitcast needs two dtypes of one width", f"{self.dtype} and {dtype}",
                  f"{self.dtype.bits} bits")
        return Tile(semantics.elementwise("bitcast", [self.array], dtype), self.axes, dtype)

    def _one(self, what: str) -> Any:
        if self.axes:
            _fail("scalar-needed", f"{what} of a tile", repr(self).splitlines()[0], "a scalar",
                  "use where(condition, a, b), or reduce the tile first")
        return self.array.item() if self.dtype.bits >= 32 or not self.dtype.is_float else float(self.array)

    def __bool__(self) -> bool:
        if self.dtype is not bool_:
            _fail("scalar-needed", "a condition that is no bool", str(self.dtype), "bool", "compare it, as in x != 0")
        return bool(self._one("the truth value"))

    def __index__(self) -> int:
        if not self.dtype.is_integer:
            _fail("scalar-needed", "an integer is needed", str(self.dtype), "an integer scalar")
        return int(self._one("an integer value"))

    def __float__(self) -> float:
        if not self.weak:
            _fail("scalar-needed", "a Python number is needed", str(self.dtype), "a constant")
        return float(self._one("a Python number"))

    def __repr__(self) -> str:
        if not self.axes:
            return f"{self.dtype} {self.array}"
        axes = ", ".join(f"{axis}={size}" for axis, size in zip(self.axes, self.array.shape, strict=True))
        return f"{self.dtype}[{axes}]\n{self.array}"


class Axis(Tile):
    """An axis in scope, walked from start to stop: in arithmetic, the tile of its coordinates (dtype index)."""

    __slots__ = ("start", "stop", "whole")

    def __init__(self, name: str, start: int, stop: int, whole: bool = False) -> None:
        super().__init__(np.arange(start, stop, dtype=np.int64), (name,), index)
        self.start = start
        self.stop = stop
        self.whole = whole

    def __repr__(self) -> str:
        return f"axis {self.axes[0]} ({self.start} .. {self.stop})"


class Span:
    """A range from start up to, but without, stop."""

    __slots__ = ("start", "stop")

    def __init__(self, start: Any, stop: Any) -> None:
        self.start = _whole_number(start)
        self.stop = _whole_number(stop)

    def __repr__(self) -> str:
        return f"span({self.start}, {self.stop})"


class TensorView(_Operators):
    """A tensor argument: reached only by indices, one for each dimension. shape: an int for a static extent, else an
    index scalar."""

    __slots__ = ("array", "dtype", "memory", "name", "shape")

    def __init__(self, array: Array, type: TensorType, name: str, memory: Array | None = None) -> None:
        self.array = array
        self.memory = array if memory is None else memory
        self.dtype = type.dtype
        self.name = name
        self.shape = tuple(extent if isinstance(dim, int) else _scalar_index(extent)
                           for dim, extent in zip(type.dims, array.shape, strict=True))

    def _indices(self, indices: Any, doing: str) -> tuple[tuple[Array, ...], Axes]:
        given = [_as_tile(i, index) for i in (indices if isinstance(indices, tuple) else (indices,))]
        if len(given) != self.array.ndim:
            _fail("rank", f"{self.name} is indexed with the wrong number of indices", f"{len(given)}",
                  f"{self.array.ndim}")
        for tile in given:
            if not tile.dtype.is_integer:
                _fail("gather-dtype", f"an index of {self.name} that is no integer", str(tile.dtype),
                      "an integer dtype")
        axes = semantics.union_axes(*(tile.axes for tile in given))
        where = tuple(semantics.align(tile.array, tile.axes, axes) for tile in given)
        semantics.check_bounds(self.array.shape, where, self.name, lambda: str(_place()), doing)
        if any(index.size == 0 for index in where):  # NumPy would still check the indices that are not empty
            where = tuple(np.broadcast_arrays(*where))
        return where, axes

    def _touch(self, where: tuple[Array, ...], store: bool) -> None:
        """Tell the loops whose iterations are asserted to be disjoint which bytes are meant."""
        touches = context.current().touches
        if not touches.loops or not self.array.size:
            return
        spans = [(extent - 1) * step for extent, step in zip(self.memory.shape, self.memory.strides, strict=True)]
        first = -sum(min(0, span) for span in spans)  # bytes from the lowest address of the tensor to its element 0
        size = first + sum(max(0, span) for span in spans) + self.memory.itemsize
        start = first + self.array.__array_interface__["data"][0] - self.memory.__array_interface__["data"][0]
        places = sum((index * step for index, step in zip(where, self.array.strides, strict=True)), np.int64(start))
        flat = (np.asarray(places).reshape(-1, 1) + np.arange(self.array.itemsize)).reshape(-1)
        try:
            (touches.store if store else touches.load)(self.name, size, flat)
        except races.Meeting as meeting:
            element = np.argwhere(flat == meeting.element)[0, 0] // self.array.itemsize
            place = [int(i.reshape(-1)[element]) for i in np.broadcast_arrays(*where)]
            _fail("disjoint", f"{self.name}[{', '.join(map(str, place))}] {meeting.what}", "iterations that meet",
                  "iterations none of which touches what another writes",
                  "leave disjoint=True out, or mend the indices")

    def __getitem__(self, indices: Any) -> Tile:
        where, axes = self._indices(indices, "load")
        self._touch(where, store=False)
        return Tile(np.array(self.array[where]), axes, self.dtype)

    def __setitem__(self, indices: Any, value: Any) -> None:
        where, axes = self._indices(indices, "store")
        self._touch(where, store=True)
        tile = _as_tile(value, self.dtype)
        if tile.dtype is not self.dtype:
            _fail("store-dtype", f"a stored value has another element type than {self.name}", str(tile.dtype),
                  str(self.dtype), f"write value.to({self.dtype})")
        lost = [axis for axis in tile.axes if axis not in axes]
        if lost:
            _fail("store-axes", f"a value stored to {self.name} spans axes that the index lacks",
                  f"axes {', '.join(lost)}", f"axes among {', '.join(axes) or 'none'}",
                  "index with them, or reduce them first")
        self.array[where] = semantics.align(tile.array, tile.axes, axes)

    def view(self, *extents: Any, dtype: Any = None) -> TensorView:
        """The same memory with other extents, or as another dtype."""
        kind = self.dtype if dtype is None else _dtype(dtype)
        sizes = [_whole_number(extent) for extent in extents] or list(self.array.shape)
        try:
            array = semantics.view(self.array, sizes, kind)
        except ValueError as error:
            _fail("view", f"{self.name} cannot be viewed like this", str(error))
        return TensorView(array, TensorType(kind, tuple(sizes)), self.name, self.memory)

    def __repr__(self) -> str:
        return f"tensor {self.name}: {self.dtype}{list(self.array.shape)}\n{self.array}"


# Operations ---------------------------------------------------------------------------------------------------------

_TO_F32 = frozenset((a, b) for narrow in (bf16, f16) for a in (narrow, f32) for b in (narrow, f32))
_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))
_INTEGER_ONLY = frozenset(("floordiv", "mod", "shl", "shr"))
_BITWISE = frozenset(("and", "or", "xor", "not"))


def _plain(value: Any) -> Any:
    """A value of the author's as a Tile or a Python number; anything else is an error."""
    if isinstance(value, Tile | bool | int | float):
        return value
    if isinstance(value, DimExpression):
        return Tile(np.asarray(value.__index__(), np.int64), (), index)
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return value.item()
    if isinstance(value, TensorView):
        _fail("tensor-without-index", f"tensor {value.name} is used as a value", value.name,
              f"{value.name}[...] with an index for each dimension")
    _fail("unsupported-constant", "a Python object that has no meaning in a kernel", repr(value), "a tile or a number")


def _dtype(dtype: Any) -> DType:
    dtype = bool_ if dtype is bool or dtype is _bool else dtype
    if not isinstance(dtype, DType):
        _fail("bad-argument", "a dtype is needed", repr(dtype), "a dtype such as f32")
    return dtype


def _literal(value: Literal, dtype: DType) -> Tile:
    """A Python number as a scalar of a dtype."""
    if isinstance(value, bool) != (dtype is bool_):
        _fail("literal-dtype", "a bool meets numbers, or a number bools", f"{value!r} and {dtype}", "one kind")
    if isinstance(value, float) and not dtype.is_float:
        _fail("literal-dtype", "a float literal with an integer tile", f"{value!r} and {dtype}",
              "an integer", "write x.to(f32)")
    if dtype.is_integer:
        low, high = (0, 2**dtype.bits - 1) if dtype.kind == "u" else (-(2**(dtype.bits - 1)), 2**(dtype.bits - 1) - 1)
        if not low <= value <= high:
            _fail("literal-range", f"a literal that {dtype} cannot hold", repr(value), f"{low} .. {high}")
    return Tile(semantics.constant(value, dtype), (), dtype)


def _strengthen(tile: Tile, dtype: DType) -> Tile:
    """A weak tile takes the dtype that it meets."""
    have = tile.dtype
    if have is dtype:
        return Tile(tile.array, tile.axes, dtype)
    if (have.is_float and not dtype.is_float) or (have is bool_) != (dtype is bool_):
        _fail("literal-dtype", f"a {have} number meets {dtype}", f"{have} and {dtype}", "numbers of one kind",
              "write .to(dtype) on one of the two")
    return tile.to(dtype)


def _as_tile(value: Any, dtype: DType) -> Tile:
    """A tile as it is, a weak one or a Python number in the given dtype."""
    value = _plain(value)
    if not isinstance(value, Tile):
        return _literal(value, dtype)
    return _strengthen(value, dtype) if value.weak else value


def _default_dtype(value: Literal) -> DType:
    """What a Python number is where nothing says otherwise."""
    return bool_ if isinstance(value, bool) else i32 if isinstance(value, int) else f32


def _weak_dtype(value: Any) -> DType | None:
    """The dtype that a number would have if it met none; None for a value that has one."""
    if not isinstance(value, Tile):
        return _default_dtype(value)
    return value.dtype if value.weak else None


def _pair(a: Any, b: Any) -> tuple[Tile, Tile, bool]:
    """Two operands brought to one dtype, and whether the result is weak: numbers follow the other operand; index takes
    in i32 and i64."""
    a, b = _plain(a), _plain(b)
    left, right = _weak_dtype(a), _weak_dtype(b)
    if left is not None and right is not None:
        joint = f32 if f32 in (left, right) else left if left is right else i32
        return _as_tile(a, joint), _as_tile(b, joint), True
    if left is not None:
        return _as_tile(a, b.dtype), b, False
    if right is not None:
        return a, _as_tile(b, a.dtype), False
    if a.dtype is not b.dtype:
        if {a.dtype, b.dtype} in ({index, i32}, {index, i64}):
            return a.to(index), b.to(index), False
        _fail("dtype-mix", "operands of different element types", f"{a.dtype} and {b.dtype}", "equal dtypes",
              f"write x.to({a.dtype if a.dtype.is_float else b.dtype})")
    return a, b, False


def _computable(name: str, dtype: DType) -> None:
    """Raise unless the op has a meaning on the dtype."""
    if not dtype.compute:
        _fail("dtype-not-computed", f"{name} on a type that is only stored", str(dtype), "a type to compute with",
              "write x.to(f32)")
    if name == "div" and not dtype.is_float:
        _fail("division-dtype", "/ on integers", str(dtype), "a float type", "use //, or x.to(f32)")
    if name in UNARY_FLOAT:
        wrong, wanted = not dtype.is_float, "a float type"
    elif name in _INTEGER_ONLY:
        wrong, wanted = not dtype.is_integer, "an integer type"
    elif name in _BITWISE:
        wrong, wanted = dtype.is_float, "an integer type or bool"
    else:
        wrong, wanted = dtype is bool_ and name not in ("eq", "ne"), "a number"
    if wrong:
        _fail("op-dtype", f"{name} has no meaning on {dtype}", str(dtype), wanted, "cast it, or compare it first")


def _binary(name: str, a: Any, b: Any) -> Tile:
    left, right, weak = _pair(a, b)
    _computable(name, left.dtype)
    axes = semantics.union_axes(left.axes, right.axes)
    compares = name in _COMPARISONS
    result = bool_ if compares else left.dtype
    operands = [semantics.align(left.array, left.axes, axes), semantics.align(right.array, right.axes, axes)]
    return Tile(semantics.elementwise(name, operands, result), axes, result, weak and not compares)


def _unary(name: str, x: Tile) -> Tile:
    if x.weak and name in UNARY_FLOAT and not x.dtype.is_float:
        x = Tile(semantics.cast(x.array, f32), x.axes, f32, True)
    _computable(name, x.dtype)
    return Tile(semantics.elementwise(name, [x.array], x.dtype), x.axes, x.dtype, x.weak)


def _power(x: Tile, power: Any) -> Tile:
    if isinstance(power, Tile) and power.weak and power.dtype.is_integer:
        power = power.__index__()
    if isinstance(power, float) and power.is_integer():
        power = int(power)
    if not isinstance(power, int) or isinstance(power, bool) or not -16 <= power <= 16:
        _fail("power", "** needs a small constant integer", repr(power), "an integer from -16 to 16",
              "write exp(log(x) * y)")
    if power < 0 and not x.dtype.is_float:
        _fail("power", "a negative power of an integer", f"{x.dtype} ** {power}", "a float", "write x.to(f32)")
    if power == 0:
        return Tile(np.ones_like(x.array), x.axes, x.dtype, x.weak)
    result: Tile | None = None
    square, left = x, abs(power)
    while True:
        if left & 1:
            result = square if result is None else _binary("mul", result, square)
        left >>= 1
        if not left:
            break
        square = _binary("mul", square, square)
    assert result is not None
    return _binary("div", 1, result) if power < 0 else result


def _contract(a: Any, b: Any) -> Tile:
    a, b = _plain(a), _plain(b)
    if not isinstance(a, Tile) or not isinstance(b, Tile) or not a.axes or not b.axes:
        _fail("contract-scalar", "@ on a scalar", f"{a!r} and {b!r}", "two tiles that share an axis", "use *")
    over = [axis for axis in a.axes if axis in b.axes]
    if not over:
        _fail("contract-no-shared-axis", "@ on two tiles that share no axis", f"{a.axes} and {b.axes}",
              "a shared axis")
    both = (a.dtype, b.dtype)
    if both == (f64, f64):
        result = f64
    elif both in _TO_F32:
        result = f32
    elif all(d in (i8, u8) for d in both):
        result = i32
    else:
        _fail("contract-dtype", "@ on element types that have no product", f"{a.dtype} and {b.dtype}",
              "bf16, f16, f32; or f64; or i8, u8")
    onto = tuple(axis for axis in semantics.union_axes(a.axes, b.axes) if axis not in over)
    return Tile(semantics.contract(a.array, a.axes, b.array, b.axes, over, onto, result), onto, result)


def _whole_number(value: Any) -> int:
    """An int, dimension or integer scalar as an int."""
    value = _plain(value)
    if isinstance(value, float | bool):
        _fail("bad-range", "a bound that is no integer", repr(value), "an integer")
    return value.__index__()  # type: ignore[no-any-return]


def _bounds(extent: Any) -> tuple[int, int]:
    return (extent.start, extent.stop) if isinstance(extent, Span) else (0, _whole_number(extent))


def _scalar_index(value: int) -> Tile:
    return Tile(np.asarray(value, np.int64), (), index)


# The context --------------------------------------------------------------------------------------------------------


class Context:
    """What the functions of sapper.lang.builtins do during one eager run.

    dims: extents by name. tile_sizes: see run.
    """

    def __init__(self, dims: Mapping[str, int],
                 tile_sizes: Mapping[str, int] | int | None = None) -> None:
        self.dims = dims
        self.tile_sizes = tile_sizes
        self.touches = races.Touches()
        self._copies: dict[FunctionType, FunctionType] = {}
        self._used: dict[str, int] = {}

    def dim(self, name: str) -> int:
        """The extent of a symbolic dimension in this call."""
        if name not in self.dims:
            _fail("unbound-dim", "a dimension that no parameter has", name, ", ".join(self.dims))
        return self.dims[name]

    # The copy of the author's function.

    def overlay(self, function: FunctionType) -> FunctionType:
        """A copy of a function, of the same code, in which builtins, dimensions and called functions mean sapper's."""
        copy = self._copies.get(function)
        if copy is not None:
            return copy
        world = dict(function.__globals__)
        world["__builtins__"] = {**vars(python), **_OVERLAY}
        code = code_of(function)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        closure = tuple(CellType() for _ in code.co_freevars)
        copy = FunctionType(code, world, function.__name__, function.__defaults__, closure)
        copy.__kwdefaults__ = function.__kwdefaults__
        self._copies[function] = copy  # before what it calls, which may call it back
        for name in _global_names(code):
            if name in world:
                world[name] = self._replaced(world[name])
        for name, mine in zip(code.co_freevars, closure, strict=True):
            try:
                mine.cell_contents = self._replaced(cells[name].cell_contents)
            except ValueError:  # an empty cell stays empty
                continue
        return copy

    def _replaced(self, value: Any) -> Any:
        """What stands for a global or closed-over value in the copy."""
        if isinstance(value, Kernel):
            return self.overlay(value.python_function)
        if isinstance(value, FunctionType):
            return value if _is_ours(value.__module__) else self.overlay(value)
        if isinstance(value, DimExpression):
            return _scalar_index(value.__index__())
        if isinstance(value, ModuleType) and not _is_ours(value.__name__):
            return _Module(value, self)
        return value

    # Loops, ranges and axes.

    def _axis_names(self, count: int) -> list[tuple[str, str]]:
        """For each of count axes, the author's name and one that is unique in this run."""
        names = _assigned_names()
        if len(names) != count:
            names = ["axis"] * count
        unique = []
        for name in names:
            used = self._used.get(name, 0)
            self._used[name] = used + 1
            unique.append((name, f"{name}_{used}" if used else name))
        return unique

    def tiles(self, *extents: Any) -> Iterator[Any]:
        """Axes, tile by tile, the last one fastest."""
        if not extents:
            _fail("bad-range", "tiles() without an extent", "", "tiles(M, ...)")
        steps: list[list[Axis]] = []
        for (name, unique), extent in zip(self._axis_names(len(extents)), extents, strict=True):
            start, stop = _bounds(extent)
            size = self.tile_sizes.get(name) if isinstance(self.tile_sizes, Mapping) else self.tile_sizes
            size = max(1, stop - start) if size is None else size
            steps.append([Axis(unique, at, min(at + size, stop))
                          for at in range(start, stop, size)])
        return self._walk(steps)

    def each(self, *extents: Any, disjoint: bool = False) -> Iterator[Any]:
        """Index scalars, the last one fastest. disjoint: whether iterations meet is watched."""
        if not extents:
            _fail("bad-range", "each() without an extent", "", "each(B, ...)")
        walked = self._walk([[_scalar_index(at) for at in range(*_bounds(extent))] for extent in extents])
        return self._watched(walked, _assigned_names()) if disjoint else walked

    def _watched(self, walked: Iterator[Any], names: list[str]) -> Iterator[Any]:
        loop = races.Loop()
        self.touches.loops.append(loop)
        for item in walked:
            indices = item if isinstance(item, tuple) else (item,)
            loop.iterations.append(", ".join(f"{name} = {int(i)}" for name, i in zip(names, indices, strict=True)))
            yield item
        self.touches.loops.remove(loop)

    @staticmethod
    def _walk(steps: Sequence[Sequence[Any]]) -> Iterator[Any]:
        return iter(steps[0]) if len(steps) == 1 else itertools.product(*steps)

    def whole(self, extent: Any) -> Axis:
        """An axis that is one tile."""
        start, stop = _bounds(extent)
        ((_, unique),) = self._axis_names(1)
        return Axis(unique, start, max(start, stop), True)

    def span(self, start: Any, stop: Any) -> Span:
        """A range with a start."""
        return Span(start, stop)

    def range(self, *bounds: Any) -> Iterator[Tile]:
        """Python's range, over index scalars."""
        numbers = [_whole_number(bound) for bound in bounds]
        return (_scalar_index(at) for at in range(*numbers))

    # Tiles from nothing.

    def zeros(self, *axes: Any, dtype: Any) -> Tile:
        """A tile of zeros."""
        dtype = _dtype(dtype)
        return self.full(*axes, value=False if dtype is bool_ else 0, dtype=dtype)

    def full(self, *axes: Any, value: Any, dtype: Any = None) -> Tile:
        """A tile that holds one value everywhere."""
        value = _plain(value)
        if dtype is not None:
            dtype = _dtype(dtype)
        elif isinstance(value, Tile) and not value.weak:
            dtype = value.dtype
        else:
            _fail("call-arguments", "full needs a dtype", repr(value), "dtype=...", "write dtype=f32")
        scalar = _as_tile(value, dtype)
        if scalar.axes:
            _fail("scalar-needed", "full of a tile", repr(scalar).splitlines()[0], "a scalar")
        if scalar.dtype is not dtype:
            _fail("dtype-mix", "full of a value of another dtype", str(scalar.dtype), str(dtype),
                  f"write value.to({dtype})")
        for axis in axes:
            if not isinstance(axis, Axis):
                _fail("unknown-axis", "a value is used where an axis is expected", repr(axis), "a loop variable")
        shape = tuple(axis.stop - axis.start for axis in axes)
        return Tile(np.full(shape, scalar.array), tuple(axis.axes[0] for axis in axes), dtype)

    # Elementwise.

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """a where the condition holds, else b."""
        if isinstance(condition, bool):
            return a if condition else b
        chosen = _as_tile(condition, bool_)
        if chosen.dtype is not bool_:
            _fail("op-dtype", "a condition that is no bool", str(chosen.dtype), "bool", "compare it, as in x != 0")
        left, right, weak = _pair(a, b)
        axes = semantics.union_axes(chosen.axes, left.axes, right.axes)
        operands = [semantics.align(tile.array, tile.axes, axes) for tile in (chosen, left, right)]
        return Tile(semantics.elementwise("select", operands, left.dtype), axes, left.dtype, weak)

    def maximum(self, a: Any, b: Any) -> Any:
        """a if a > b else b."""
        a, b = _plain(a), _plain(b)
        return _binary("max", a, b) if isinstance(a, Tile) or isinstance(b, Tile) else a if a > b else b

    def minimum(self, a: Any, b: Any) -> Any:
        """a if a < b else b."""
        a, b = _plain(a), _plain(b)
        return _binary("min", a, b) if isinstance(a, Tile) or isinstance(b, Tile) else a if a < b else b

    # Reductions.

    def _reduce(self, kind: str, x: Any, over: Any) -> Tile:
        x = _plain(x)
        if not isinstance(x, Tile):
            _fail("bad-argument", f"{kind} of a constant", repr(x), "a tile")
        axes = over if isinstance(over, tuple) else (over,)
        names = []
        for axis in axes:
            if not isinstance(axis, Axis) or axis.axes[0] not in x.axes:
                _fail("over", f"{kind}(..., over=) names no axis of the tile", repr(axis),
                      f"axes among {', '.join(x.axes)}")
            names.append(axis.axes[0])
        if kind in ("argmax", "argmin") and len(names) != 1:
            _fail("over", f"{kind} over several axes", ", ".join(names), "one axis")
        if not x.dtype.compute or x.dtype is bool_:
            _fail("op-dtype", f"{kind} of {x.dtype}", str(x.dtype), "a number", "write x.to(i32)")
        dtype = index if kind.startswith("arg") else x.dtype
        value = semantics.reduce(kind, x.array, x.axes, names, dtype, [axis.start for axis in axes])
        return Tile(value, tuple(axis for axis in x.axes if axis not in names), dtype)

    def sum(self, x: Any, *, over: Any) -> Tile:
        """The sum over axes."""
        return self._reduce("sum", x, over)

    def max(self, *values: Any, over: Any = None) -> Any:
        """Over axes, or of several values."""
        return self._extreme("max", values, over)

    def min(self, *values: Any, over: Any = None) -> Any:
        """Over axes, or of several values."""
        return self._extreme("min", values, over)

    def _extreme(self, kind: str, values: tuple[Any, ...], over: Any) -> Any:
        if over is not None:
            if len(values) != 1:
                _fail("bad-argument", f"{kind} over an axis takes one tile", str(len(values)), "1")
            return self._reduce(kind, values[0], over)
        if len(values) < 2:
            _fail("bad-argument", f"{kind} of one value", str(len(values)), f"{kind}(a, b), or {kind}(t, over=n)")
        result = values[0]
        for value in values[1:]:
            result = self.maximum(result, value) if kind == "max" else self.minimum(result, value)
        return result

    def argmax(self, x: Any, *, over: Any) -> Tile:
        """The coordinate of the largest element."""
        return self._reduce("argmax", x, over)

    def argmin(self, x: Any, *, over: Any) -> Tile:
        """The coordinate of the smallest element."""
        return self._reduce("argmin", x, over)

    # Axes taken in their order.

    def _ordered(self, what: str, x: Any, over: Any) -> Tile:
        """The operand, checked."""
        x = _plain(x)
        if not isinstance(x, Tile) or not isinstance(over, Axis) or over.axes[0] not in x.axes:
            _fail("over", f"{what}(..., over=) names no axis of the tile", repr(over), "an axis of the tile")
        if not x.dtype.compute or x.dtype is bool_:
            _fail("op-dtype", f"{what} of {x.dtype}", str(x.dtype), "a number", "write x.to(i32)")
        self._need_whole(what, over)
        return x

    @staticmethod
    def _need_whole(what: str, axis: Axis) -> None:
        if not axis.whole:
            _fail("whole-axis", f"{what} along axis {axis.axes[0]} of a loop", repr(axis), "an axis of `whole`",
                  f"take {axis.axes[0]} = whole(...)")

    def _scan(self, kind: str, x: Any, over: Any) -> Tile:
        x = self._ordered(f"cum{kind}", x, over)
        return Tile(semantics.scan(kind, x.array, x.axes.index(over.axes[0]), x.dtype), x.axes, x.dtype)

    def cumsum(self, x: Any, *, over: Any) -> Tile:
        """The sum of each element and all before it."""
        return self._scan("sum", x, over)

    def cummax(self, x: Any, *, over: Any) -> Tile:
        """The largest of each element and all before it."""
        return self._scan("max", x, over)

    def cummin(self, x: Any, *, over: Any) -> Tile:
        """The smallest of each element and all before it."""
        return self._scan("min", x, over)

    def topk(self, x: Any, k: Any, *, over: Any) -> tuple[Tile, Tile]:
        """The largest elements, and their coordinates."""
        x = self._ordered("topk", x, over)
        if not isinstance(k, Axis) or k.start or k.axes[0] in x.axes:
            _fail("unknown-axis", "the second axis of topk counts the results", repr(k),
                  "an axis from 0 that the tile does not span", "take another: k = whole(8)")
        self._need_whole("topk", k)
        name = over.axes[0]
        values, places = semantics.topk(x.array, x.axes, name, k.stop, over.start)
        axes = (*(axis for axis in x.axes if axis != name), k.axes[0])
        return Tile(values, axes, x.dtype), Tile(places, axes, index)


def _constant_function(name: str, x: Any) -> Any:
    """A function of a Python number is one, as precise as Python has it."""
    if name == "abs":
        return abs(x)
    return float(semantics.elementwise(name, [np.asarray(float(x))], f64))


def _make_unary(name: str) -> Any:
    def method(self: Context, x: Any) -> Any:
        x = _plain(x)
        return _unary(name, x) if isinstance(x, Tile) else _constant_function(name, x)

    method.__name__ = name
    method.__doc__ = f"{name}, elementwise."
    return method


def _asm(self: Context, piece: Any, *inputs: Any, meaning: Any, tolerance: float = 0.0) -> Any:
    """What the piece means; only compiled code runs it."""
    return meaning(*[i for i in inputs if isinstance(_plain(i), Tile)])


Context.asm = _asm  # type: ignore[attr-defined]

for _name in language.UNARY_NAMES:
    setattr(Context, _name, _make_unary(_name))


# Python's own names -------------------------------------------------------------------------------------------------


def _range(*bounds: Any) -> Iterator[Tile]:
    running: Context = context.current()
    return running.range(*bounds)


def _float(value: Any = 0.0) -> Any:
    return value.to(f32) if isinstance(value, Tile) else float(value)


def _int(value: Any = 0) -> Any:
    return value.to(i32) if isinstance(value, Tile) else int(value)


def _bool(value: Any = False) -> Any:
    return value.to(bool_) if isinstance(value, Tile) else bool(value)


def _weaken(value: Any) -> Any:
    """A Python number as a scalar without a dtype; anything else as it is."""
    if isinstance(value, bool | int | float):
        dtype = _default_dtype(value)
        return Tile(_literal(value, dtype).array, (), dtype, True)
    return value


def _method(value: Any, name: str, *arguments: Any) -> Any:
    """value.to(dtype) or value.bits(dtype), also of a Python number."""
    if isinstance(value, bool | int | float) and len(arguments) == 1:
        if name == "bits":
            return _as_tile(value, _default_dtype(value)).bits(arguments[0])
        dtype = _dtype(arguments[0])
        return _literal(bool(value) if dtype is bool_ else int(value) if dtype.is_integer else value, dtype)
    return getattr(value, name)(*arguments)


_OVERLAY: dict[str, Any] = {
    WEAKEN: _weaken, METHOD: _method, LOCALS: locals,
    "sum": language.sum, "max": language.max, "min": language.min, "abs": language.abs, "round": language.round,
    "range": _range, "float": _float, "int": _int, "bool": _bool,
}


def _is_ours(module: str | None) -> bool:
    """Whether a module's functions are the language, or libraries that know nothing of tiles."""
    root = (module or "").split(".")[0]
    if root == "sapper":
        return (module or "").split(".")[1:2] != ["kernels"] and (module or "").split(".")[1:2] != ["models"]
    return root in ("numpy", "math", "ml_dtypes", "pdb", "builtins", "typing")


def _global_names(code: CodeType) -> list[str]:
    """Names that the code, or code nested in it, may look up in its globals."""
    names = list(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            names += _global_names(inner)
    return names


class _Module:
    """A module whose functions are seen as their overlaid copies."""

    __slots__ = ("_context", "_module")

    def __init__(self, module: ModuleType, running: Context) -> None:
        self._module = module
        self._context = running

    def __getattr__(self, name: str) -> Any:
        return self._context._replaced(getattr(self._module, name))


__all__ = ["Axis", "Context", "Span", "TensorView", "Tile", "run"]
