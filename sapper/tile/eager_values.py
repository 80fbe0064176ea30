"""The values of an eager run: tiles, axes and ranges on NumPy, and what Python's operators do with them.

Enters: tiles and Python's own numbers. Leaves: new tiles; an error at the author's line for what has no meaning.
Holds: dtypes and axes come out as the front end gives them to tile IR (lang/elementwise.py, lang/operations.py), and
elements as semantics.py computes them.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from ..ir.types import DType, bool_, f32, i32, i64, index
from ..lang.dims import DimExpression
from ..lang.operations import PRODUCT_DTYPE
from . import semantics
from .eager_place import fail
from .ops import BINARY_INTEGER, BITWISE, COMPARE, UNARY_FLOAT
from .semantics import Array, Axes

Literal = bool | int | float
"""A number of Python's own: it takes the dtype of what it meets."""


class Operators:
    """Python's operators, of tiles and (to say that they need an index) of tensors."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None  # a NumPy number on the left leaves the operation to the tile

    def refuse(self) -> NoReturn:
        """Raise, as it stands where a value does and has none (a tensor, eager_tensor.py)."""
        raise NotImplementedError(type(self).__name__)

    def __add__(self, other: Any) -> Any:
        return binary("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return binary("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return binary("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return binary("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return binary("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return binary("mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return binary("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return binary("div", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return binary("floordiv", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return binary("floordiv", other, self)

    def __mod__(self, other: Any) -> Any:
        return binary("mod", self, other)

    def __rmod__(self, other: Any) -> Any:
        return binary("mod", other, self)

    def __and__(self, other: Any) -> Any:
        return binary("and", self, other)

    def __rand__(self, other: Any) -> Any:
        return binary("and", other, self)

    def __or__(self, other: Any) -> Any:
        return binary("or", self, other)

    def __ror__(self, other: Any) -> Any:
        return binary("or", other, self)

    def __xor__(self, other: Any) -> Any:
        return binary("xor", self, other)

    def __rxor__(self, other: Any) -> Any:
        return binary("xor", other, self)

    def __lshift__(self, other: Any) -> Any:
        return binary("shl", self, other)

    def __rlshift__(self, other: Any) -> Any:
        return binary("shl", other, self)

    def __rshift__(self, other: Any) -> Any:
        return binary("shr", self, other)

    def __rrshift__(self, other: Any) -> Any:
        return binary("shr", other, self)

    def __lt__(self, other: Any) -> Any:
        return binary("lt", self, other)

    def __le__(self, other: Any) -> Any:
        return binary("le", self, other)

    def __gt__(self, other: Any) -> Any:
        return binary("gt", self, other)

    def __ge__(self, other: Any) -> Any:
        return binary("ge", self, other)

    def __eq__(self, other: object) -> Any:
        return binary("eq", self, other)

    def __ne__(self, other: object) -> Any:
        return binary("ne", self, other)

    def __matmul__(self, other: Any) -> Any:
        return contract(self, other)

    def __neg__(self) -> Tile:
        return unary("neg", plain(self))

    def __pos__(self) -> Tile:
        return plain(self)  # type: ignore[no-any-return]

    def __invert__(self) -> Tile:
        return unary("not", plain(self))

    def __pow__(self, power: Any) -> Tile:
        return to_power(plain(self), power)


class Tile(Operators):
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
        dtype = as_dtype(dtype)
        return Tile(semantics.cast(self.array, dtype), self.axes, dtype)

    def bits(self, dtype: Any) -> Tile:
        """The same bits as another dtype of the same width."""
        dtype = as_dtype(dtype)
        if dtype.bits != self.dtype.bits or bool_ in (dtype, self.dtype):
            fail("op-dtype", "a bitcast needs two dtypes of one width", f"{self.dtype} and {dtype}",
                 f"{self.dtype.bits} bits")
        return Tile(semantics.elementwise("bitcast", [self.array], dtype), self.axes, dtype)

    def _one(self, what: str) -> Any:
        if self.axes:
            fail("scalar-needed", f"{what} of a tile", repr(self).splitlines()[0], "a scalar",
                 "use where(condition, a, b), or reduce the tile first")
        return self.array.item() if self.dtype.bits >= 32 or not self.dtype.is_float else float(self.array)

    def __bool__(self) -> bool:
        if self.dtype is not bool_:
            fail("scalar-needed", "a condition that is no bool", str(self.dtype), "bool", "compare it, as in x != 0")
        return bool(self._one("the truth value"))

    def __index__(self) -> int:
        if not self.dtype.is_integer:
            fail("scalar-needed", "an integer is needed", str(self.dtype), "an integer scalar")
        return int(self._one("an integer value"))

    def __float__(self) -> float:
        if not self.weak:
            fail("scalar-needed", "a Python number is needed", str(self.dtype), "a constant")
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
        self.start = whole_number(start)
        self.stop = whole_number(stop)

    def __repr__(self) -> str:
        return f"span({self.start}, {self.stop})"


# Operations -----------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value of the author's as a Tile or a Python number; anything else is an error."""
    if isinstance(value, Tile | bool | int | float):
        return value
    if isinstance(value, DimExpression):
        return Tile(np.asarray(value.__index__(), np.int64), (), index)
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return value.item()
    if isinstance(value, Operators):
        value.refuse()
    fail("unsupported-constant", "a Python object that has no meaning in a kernel", repr(value), "a tile or a number")


def as_dtype(dtype: Any) -> DType:
    dtype = bool_ if dtype is bool or dtype is as_bool else dtype
    if not isinstance(dtype, DType):
        fail("bad-argument", "a dtype is needed", repr(dtype), "a dtype such as f32")
    return dtype


def literal(value: Literal, dtype: DType) -> Tile:
    """A Python number as a scalar of a dtype."""
    if isinstance(value, bool) != (dtype is bool_):
        fail("literal-dtype", "a bool meets numbers, or a number bools", f"{value!r} and {dtype}", "one kind")
    if isinstance(value, float) and not dtype.is_float:
        fail("literal-dtype", "a float literal with an integer tile", f"{value!r} and {dtype}",
             "an integer", "write x.to(f32)")
    if dtype.is_integer:
        low, high = (0, 2**dtype.bits - 1) if dtype.kind == "u" else (-(2**(dtype.bits - 1)), 2**(dtype.bits - 1) - 1)
        if not low <= value <= high:
            fail("literal-range", f"a literal that {dtype} cannot hold", repr(value), f"{low} .. {high}")
    return Tile(semantics.constant(value, dtype), (), dtype)


def _strengthen(tile: Tile, dtype: DType) -> Tile:
    """A weak tile takes the dtype that it meets."""
    have = tile.dtype
    if have is dtype:
        return Tile(tile.array, tile.axes, dtype)
    if (have.is_float and not dtype.is_float) or (have is bool_) != (dtype is bool_):
        fail("literal-dtype", f"a {have} number meets {dtype}", f"{have} and {dtype}", "numbers of one kind",
             "write .to(dtype) on one of the two")
    return tile.to(dtype)


def as_tile(value: Any, dtype: DType) -> Tile:
    """A tile as it is, a weak one or a Python number in the given dtype."""
    value = plain(value)
    if not isinstance(value, Tile):
        return literal(value, dtype)
    return _strengthen(value, dtype) if value.weak else value


def default_dtype(value: Literal) -> DType:
    """What a Python number is where nothing says otherwise."""
    return bool_ if isinstance(value, bool) else i32 if isinstance(value, int) else f32


def _weak_dtype(value: Any) -> DType | None:
    """The dtype that a number would have if it met none; None for a value that has one."""
    if not isinstance(value, Tile):
        return default_dtype(value)
    return value.dtype if value.weak else None


def pair(a: Any, b: Any) -> tuple[Tile, Tile, bool]:
    """Two operands brought to one dtype, and whether the result is weak: numbers follow the other operand; index takes
    in i32 and i64."""
    a, b = plain(a), plain(b)
    left, right = _weak_dtype(a), _weak_dtype(b)
    if left is not None and right is not None:
        joint = f32 if f32 in (left, right) else left if left is right else i32
        return as_tile(a, joint), as_tile(b, joint), True
    if left is not None:
        return as_tile(a, b.dtype), b, False
    if right is not None:
        return a, as_tile(b, a.dtype), False
    if a.dtype is not b.dtype:
        if {a.dtype, b.dtype} in ({index, i32}, {index, i64}):
            return a.to(index), b.to(index), False
        fail("dtype-mix", "operands of different element types", f"{a.dtype} and {b.dtype}", "equal dtypes",
             f"write x.to({a.dtype if a.dtype.is_float else b.dtype})")
    return a, b, False


def _computable(name: str, dtype: DType) -> None:
    """Raise unless the op has a meaning on the dtype."""
    if not dtype.compute:
        fail("dtype-not-computed", f"{name} on a type that is only stored", str(dtype), "a type to compute with",
             "write x.to(f32)")
    if name == "div" and not dtype.is_float:
        fail("division-dtype", "/ on integers", str(dtype), "a float type", "use //, or x.to(f32)")
    if name in UNARY_FLOAT:
        wrong, wanted = not dtype.is_float, "a float type"
    elif name in BINARY_INTEGER:
        wrong, wanted = not dtype.is_integer, "an integer type"
    elif name in BITWISE or name == "not":
        wrong, wanted = dtype.is_float, "an integer type or bool"
    else:
        wrong, wanted = dtype is bool_ and name not in ("eq", "ne"), "a number"
    if wrong:
        fail("op-dtype", f"{name} has no meaning on {dtype}", str(dtype), wanted, "cast it, or compare it first")


def binary(name: str, a: Any, b: Any) -> Tile:
    left, right, weak = pair(a, b)
    _computable(name, left.dtype)
    axes = semantics.union_axes(left.axes, right.axes)
    compares = name in COMPARE
    result = bool_ if compares else left.dtype
    operands = [semantics.align(left.array, left.axes, axes), semantics.align(right.array, right.axes, axes)]
    return Tile(semantics.elementwise(name, operands, result), axes, result, weak and not compares)


def unary(name: str, x: Tile) -> Tile:
    if x.weak and name in UNARY_FLOAT and not x.dtype.is_float:
        x = Tile(semantics.cast(x.array, f32), x.axes, f32, True)
    _computable(name, x.dtype)
    return Tile(semantics.elementwise(name, [x.array], x.dtype), x.axes, x.dtype, x.weak)


def to_power(x: Tile, power: Any) -> Tile:
    if isinstance(power, Tile) and power.weak and power.dtype.is_integer:
        power = power.__index__()
    if isinstance(power, float) and power.is_integer():
        power = int(power)
    if not isinstance(power, int) or isinstance(power, bool) or not -16 <= power <= 16:
        fail("power", "** needs a small constant integer", repr(power), "an integer from -16 to 16",
             "write exp(log(x) * y)")
    if power < 0 and not x.dtype.is_float:
        fail("power", "a negative power of an integer", f"{x.dtype} ** {power}", "a float", "write x.to(f32)")
    if power == 0:
        return Tile(np.ones_like(x.array), x.axes, x.dtype, x.weak)
    result: Tile | None = None
    square, left = x, abs(power)
    while True:
        if left & 1:
            result = square if result is None else binary("mul", result, square)
        left >>= 1
        if not left:
            break
        square = binary("mul", square, square)
    assert result is not None
    return binary("div", 1, result) if power < 0 else result


def contract(a: Any, b: Any) -> Tile:
    a, b = plain(a), plain(b)
    if not isinstance(a, Tile) or not isinstance(b, Tile) or not a.axes or not b.axes:
        fail("contract-scalar", "@ on a scalar", f"{a!r} and {b!r}", "two tiles that share an axis", "use *")
    over = [axis for axis in a.axes if axis in b.axes]
    if not over:
        fail("contract-no-shared-axis", "@ on two tiles that share no axis", f"{a.axes} and {b.axes}",
             "a shared axis")
    result = PRODUCT_DTYPE.get((a.dtype.name, b.dtype.name))
    if result is None:
        fail("contract-dtype", "@ on element types that have no product", f"{a.dtype} and {b.dtype}",
            "bf16, f16, f32; or f64; or i8, u8")
    onto = tuple(axis for axis in semantics.union_axes(a.axes, b.axes) if axis not in over)
    return Tile(semantics.contract(a.array, a.axes, b.array, b.axes, over, onto, result), onto, result)


def whole_number(value: Any) -> int:
    """An int, dimension or integer scalar as an int."""
    value = plain(value)
    if isinstance(value, float | bool):
        fail("bad-range", "a bound that is no integer", repr(value), "an integer")
    return value.__index__()  # type: ignore[no-any-return]


def bounds_of(extent: Any) -> tuple[int, int]:
    return (extent.start, extent.stop) if isinstance(extent, Span) else (0, whole_number(extent))


def scalar_index(value: int) -> Tile:
    return Tile(np.asarray(value, np.int64), (), index)


def as_bool(value: Any = False) -> Any:
    return value.to(bool_) if isinstance(value, Tile) else bool(value)
