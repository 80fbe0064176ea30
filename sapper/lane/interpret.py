"""The lane interpreter: runs any lane program, at any lane count, on real memory with NumPy.

Enters: a lane function, the argument block as 64-bit words (docs/ir.md, "Lane IR"), and a Memory that knows every
buffer the program may touch. Leaves: what the program stored. Holds: each op means what its line in
sapper/lane/ops.py says, f32 arithmetic is rounded to f32 after each op, `fma` is rounded once, and no byte outside a
registered buffer is read or written: LaneError names op, lane, address and the nearest buffer instead.

Rows are NumPy vectors of `lanes` elements (b32: uint32), masks vectors of bool, scalars Python integers. No vector
is ever changed in place, so values may share storage.

Workers take turns: one runs until it meets a barrier or asks for a task, then the next one does, so that a run is
deterministic and the tasks are shared out round robin. Where a worker has several warps, these take turns likewise,
and a worker's tasks are those of its number, so that its warps agree. Copies land at once.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..ir.nodes import Block, Function, Op, Value
from ..ir.text import print_op
from ..ir.types import (
    DTYPES,
    NARROW_FLOATS,
    DType,
    RowType,
    b32,
    bf16,
    bool_,
    f8e4m3,
    f8e5m2,
    f16,
    f32,
    f64,
    i8,
    i16,
    i32,
    i64,
    u8,
)
from ..lang.by_hand import CONTRACTIONS, PIECES, PRODUCTS
from . import fragments
from .ops import TASK_COUNTERS

Array = NDArray[Any]

_where: Callable[[Any, Any, Any], Array] = np.where

NUMPY_ROWS: dict[DType, np.dtype[Any]] = {
    f32: np.dtype(np.float32), f64: np.dtype(np.float64), i32: np.dtype(np.int32), i64: np.dtype(np.int64),
    b32: np.dtype(np.uint32),
}
"""What holds the lanes of a row."""

_MEMORY: dict[DType, np.dtype[Any]] = {
    **NUMPY_ROWS, bf16: np.dtype(ml_dtypes.bfloat16), f16: np.dtype(np.float16), i8: np.dtype(np.int8),
    u8: np.dtype(np.uint8), i16: np.dtype(np.int16), bool_: np.dtype(np.uint8),
    f8e4m3: np.dtype(ml_dtypes.float8_e4m3fn), f8e5m2: np.dtype(ml_dtypes.float8_e5m2),
}

_ROW_OF_MEMORY: dict[DType, np.dtype[Any]] = {
    f32: NUMPY_ROWS[f32], **dict.fromkeys(NARROW_FLOATS, NUMPY_ROWS[f32]), f64: NUMPY_ROWS[f64],
    i64: NUMPY_ROWS[i64], b32: NUMPY_ROWS[b32], **dict.fromkeys((i8, u8, i16, i32, bool_), NUMPY_ROWS[i32]),
}


class LaneError(RuntimeError):
    """A lane program did what it must not: an access outside every buffer, a division of scalars by zero, ..."""


class Memory:
    """The buffers that a program may touch, by address. They are real memory of this process."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._buffers: list[tuple[str, int, int, bool, NDArray[np.uint8]]] = []
        self._last: tuple[int, int, bool, NDArray[np.uint8]] = (0, 0, False, np.empty(0, np.uint8))
        """Start, end, whether it may be written, and bytes of the buffer that was found last: often the next one."""
        self._keep: list[Any] = []

    def add(self, name: str, address: int, size_bytes: int, writable: bool = True) -> None:
        """Register `size_bytes` of memory at `address`.

        Buffers that overlap (views of one array) become one, which may be written if any of them may.
        """
        if size_bytes == 0:
            return
        self._last = (0, 0, False, np.empty(0, np.uint8))
        end = address + size_bytes
        at = bisect.bisect_left(self._starts, address)
        while at > 0 and self._starts[at - 1] + self._buffers[at - 1][2] > address:
            at -= 1
        while at < len(self._starts) and self._starts[at] < end:
            other, start, size, other_writable, _ = self._buffers.pop(at)
            self._starts.pop(at)
            name, writable = f"{other}+{name}", writable or other_writable
            address, end = min(address, start), max(end, start + size)
        size_bytes = end - address
        storage = (ctypes.c_uint8 * size_bytes).from_address(address)
        view = np.ctypeslib.as_array(storage)
        self._starts.insert(at, address)
        self._buffers.insert(at, (name, address, size_bytes, writable, view))

    def add_array(self, name: str, array: Array) -> int:
        """Register all bytes that an array's elements span (also those its strides skip); the address of its first."""
        data = int(array.__array_interface__["data"][0])
        if array.size:
            spans = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
            low = sum([s for s in spans if s < 0])
            high = sum([s for s in spans if s > 0]) + array.itemsize
            self.add(name, data + low, high - low, bool(array.flags.writeable))
        self._keep.append(array)
        return data

    def allocate(self, name: str, size_bytes: int, align_bytes: int = 64) -> int:
        """New zeroed memory, aligned, kept alive by this object; its address."""
        store = np.zeros(size_bytes + align_bytes, np.uint8)
        address = -(-int(store.ctypes.data) // align_bytes) * align_bytes
        self._keep.append(store)
        self.add(name, address, size_bytes)
        return address

    def find(self, address: int, size_bytes: int, write: bool) -> NDArray[np.uint8] | str:
        """The bytes at an address as a view, or a sentence saying why not."""
        start, end, writable, view = self._last
        if start <= address and address + size_bytes <= end and (writable or not write):
            return view[address - start : address - start + size_bytes]
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0:
            name, start, size, writable, view = self._buffers[at]
            offset = address - start
            if offset + size_bytes <= size:
                if write and not writable:
                    return f"a write of {size_bytes} bytes at byte {offset} of {name}, which is read-only"
                self._last = start, start + size, writable, view
                return view[offset : offset + size_bytes]
        return f"{'a write' if write else 'a read'} of {size_bytes} bytes at {address:#x}, {self._nearest(address)}"

    def _nearest(self, address: int) -> str:
        best: tuple[int, str] | None = None
        for name, start, size, _, _ in self._buffers:
            if address >= start:
                near = (address - start - size, f"{address - start - size} bytes past the end of {name} ({size} bytes)")
            else:
                near = (start - address, f"{start - address} bytes before {name}")
            if best is None or near < best:
                best = near
        return best[1] if best is not None else "with no buffer registered"


# Arithmetic.

_LOW = (1 << 64) - 1


def wrap64(value: int) -> int:
    """The low 64 bits, as a signed integer."""
    value &= _LOW
    return value - (1 << 64) if value >> 63 else value


_BELOW_F32, _HALF_F32 = np.uint64((1 << 29) - 1), np.uint64(1 << 28)
"""Bits of an f64 below those of an f32, and the half of the last one."""
_DENORMAL_F32, _ONE = np.uint64((0x381 << 53) - 1), np.uint64(1)
"""The magnitude's bits of 2**-126 as f64, doubled to lose the sign, less 1."""


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in f32, rounded once.

    The product of two 24-bit significands is exact in f64. The sum is rounded there to odd, and then to f32, which
    is the sum rounded once because 53 >= 24 + 2 (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums:
    proved algorithms using rounding to odd", 2008).
    """
    product = a.astype(np.float64) * b
    total = product + c
    bits = total.view(np.uint64)
    # Rounding twice goes wrong only at what looks like a tie of the second time, where all bits below are 0; the
    # rest of this is for those, and for results that have fewer bits (below 2**-126, but for 0).
    ties = (bits & _BELOW_F32) == _HALF_F32
    if np.count_nonzero(ties | ((bits + bits) - _ONE < _DENORMAL_F32)):
        addend = c.astype(np.float64)
        part = total - product
        error = (product - (total - part)) + (addend - part)  # exact (Knuth's two-sum)
        signed = total.view(np.int64)
        to_odd = (error != 0) & ((signed & 1) == 0) & np.isfinite(total)
        away = (error > 0) == (total > 0)  # the true sum is farther from zero than the rounded one
        total = _where(to_odd, signed + _where(away, 1, -1), signed).view(np.float64)
    return total.astype(np.float32)


def _fma64_one(a: float, b: float, c: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b + c
    if not math.isfinite(c):
        return c  # whatever a * b would overflow to
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        # An exact zero is +0 unless both terms are -0 (IEEE 754, 6.3); a product of non-zeros must not underflow here.
        sign = math.copysign(1.0, a) * math.copysign(1.0, b)
        return -0.0 if sign < 0 and c == 0 and math.copysign(1.0, c) < 0 else 0.0
    try:
        rounded = exact.numerator / exact.denominator  # Python rounds a quotient of integers once, to nearest even
    except OverflowError:
        rounded = math.inf if exact > 0 else -math.inf
    return -0.0 if rounded == 0 and exact < 0 else rounded


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in f64, rounded once, by rational arithmetic."""
    return np.array([_fma64_one(*abc) for abc in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], np.float64)


def scale_exponent(a: Array, n: Array) -> Array:
    """a * 2**floor(n), rounded once."""
    limit = 4200  # beyond the distance between the extremes of f64
    power = _where(np.isfinite(n), np.clip(np.floor(n), -limit, limit), 0).astype(np.int32)
    scaled = np.ldexp(a, power)
    infinite = _where(n > 0, a * a.dtype.type(np.inf), a * a.dtype.type(0))
    return _where(np.isinf(n), infinite, _where(np.isnan(n), n, scaled))


def cvt(value: Array, to: np.dtype[Any]) -> Array:
    """Conversion between rows; a float that does not fit an integer gives its lowest (unspecified by the lane IR)."""
    if value.dtype.kind == "f" and to.kind == "i":
        limit = 2.0 ** (8 * to.itemsize - 1)
        fits = (value >= -limit) & (value < limit)
        return _where(fits, _where(fits, value, 0).astype(to), np.iinfo(to).min)
    return value.astype(to)


def _unsigned(value: Any) -> Any:
    return value.view(np.uint32 if value.dtype.itemsize == 4 else np.uint64)


def _shift(name: str) -> Callable[[Any, Any], Any]:
    def left(a: Any, n: Any) -> Any:
        return (_unsigned(a) << (_unsigned(n) & (8 * a.dtype.itemsize - 1))).view(a.dtype)

    def logical(a: Any, n: Any) -> Any:
        return (_unsigned(a) >> (_unsigned(n) & (8 * a.dtype.itemsize - 1))).view(a.dtype)

    def arithmetic(a: Any, n: Any) -> Any:
        signed = a.view(np.int32 if a.dtype.itemsize == 4 else np.int64)
        return (signed >> (n.view(signed.dtype) & (8 * a.dtype.itemsize - 1))).view(a.dtype)

    return {"shl": left, "shr": logical, "sar": arithmetic}[name]


def _idiv(a: Array, b: Array) -> Array:
    """Floor division; 0 where the divisor is 0, as it may be in lanes that a mask has switched off."""
    return _where(b == 0, a.dtype.type(0), _where(b == -1, -a, np.floor_divide(a, _where(b == 0, 1, b))))


def _imod(a: Any, b: Any) -> Any:
    return a - b * _idiv(a, b)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


_MATH: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "tanh": np.tanh, "sigmoid": _sigmoid, "erf": _erf,
    "sin": np.sin, "cos": np.cos, "rsqrt": lambda x: 1 / np.sqrt(x),
}


def _in_f64(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """f32 functions are computed in f64 and rounded, which is within 0.51 ulp."""
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}


def _dot2(acc: Array, a: Array, b: Array) -> Array:
    """The odd pair first, each product added with one rounding; denormals are zero on the way in and out (VDPBF16PS,
    Intel SDM volume 2)."""
    def add(x: Array, y: Array, total: Array) -> Array:
        return _flushed(fma32(_flushed(x.view(np.float32)), _flushed(y.view(np.float32)), _flushed(total)))

    high, half = np.uint32(0xFFFF0000), np.uint32(16)
    return add(a << half, b << half, add(a & high, b & high, acc))


def fraction(a: Array) -> Array:
    """What lies beyond the nearest integer, exactly (VREDUCEPS, Intel SDM volume 2)."""
    rest = a - np.rint(a)
    return _where(np.isinf(a), np.float32(0), _where(rest == 0, np.float32(0), rest))


def _pack_bf16(a: Array, b: Array) -> Array:
    """VCVTNE2PS2BF16 (Intel SDM volume 2), the two results side by side in each slot; a NaN keeps its upper bits."""
    packed: Array = _halves(a) | _halves(b) << np.uint32(16)
    return packed


def _halves(row: Array) -> Array:
    """bf16 in the lower halves."""
    bits = _flushed(row).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
    chosen: Array = np.where(np.isnan(row), bits | np.uint32(0x400000), rounded)
    return chosen >> np.uint32(16)


def _concat_bf16(a: Array, b: Array) -> Array:
    """VCVTNE2PS2BF16 (Intel SDM volume 2)."""
    return np.concatenate([_halves(a), _halves(b)]).astype(np.uint16).view(np.uint32)


def _flushed(row: Array) -> Array:
    return np.where(np.abs(row) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), row), row)


def _dot4(acc: Any, a: Any, b: Any) -> Any:
    lanes = len(acc)
    products = a.view(np.uint8).reshape(lanes, 4).astype(np.int32) * b.view(np.int8).reshape(lanes, 4).astype(np.int32)
    return acc + products.sum(axis=1, dtype=np.int32)


def round_to(value: Array, dtype: DType) -> Array:
    """An f32 row rounded to bf16, f16 or fp8, nearest even."""
    return value.astype(_MEMORY[dtype]).astype(np.float32)


_SCALAR_BINARY: dict[str, Callable[[int, int], int]] = {
    "s_add": lambda a, b: wrap64(a + b),
    "s_sub": lambda a, b: wrap64(a - b),
    "s_mul": lambda a, b: wrap64(a * b),
    "s_min": lambda a, b: a if a < b else b,
    "s_max": lambda a, b: a if a > b else b,
    "s_and": lambda a, b: a & b,
    "s_or": lambda a, b: a | b,
    "s_xor": lambda a, b: a ^ b,
    "s_shl": lambda a, b: wrap64(a << (b & 63)),
    "s_shr": lambda a, b: wrap64((a & _LOW) >> (b & 63)),
    "s_sar": lambda a, b: a >> (b & 63),
    "s_floordiv": lambda a, b: wrap64(a // b),
    "s_mod": lambda a, b: a % b,
}

_ROW_PLAIN: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "min": lambda a, b: _where(a < b, a, b),
    "max": lambda a, b: _where(a > b, a, b),
    "neg": lambda a: -a,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.rint,
    "trunc": np.trunc,
    "scale_exponent": scale_exponent,
    "fraction": fraction,
    "fma": lambda a, b, c: fma32(a, b, c) if a.dtype == np.float32 else fma64(a, b, c),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "idiv": _idiv,
    "imod": _imod,
    "select": lambda m, a, b: _where(m, a, b),
    "mask_and": lambda a, b: a & b,
    "mask_or": lambda a, b: a | b,
    "mask_xor": lambda a, b: a ^ b,
    "mask_not": lambda a: ~a,
    "mask_any": lambda a: int(a.any()),
    "mask_all": lambda a: int(a.all()),
    "mask_to_row": lambda a: a.astype(np.int32),
    "lane0": lambda a: int(a[0]),
    "dot2_bf16": _dot2,
    "dot4_u8i8": _dot4,
    "pack_bf16": _pack_bf16,
    "concat_bf16": _concat_bf16,
    "is_denormal": lambda a: (a != 0) & (np.abs(a) < np.finfo(np.float32).tiny),
    **{name: _in_f64(function) for name, function in _MATH.items()},
}


def row_constant(value: float | int, dtype: DType, lanes: int) -> Array:
    """A constant in every lane; integers keep their low bits."""
    kind = NUMPY_ROWS[dtype]
    if kind.kind == "f":
        return np.full(lanes, value, kind)
    unsigned = np.dtype(f"u{kind.itemsize}")
    return np.full(lanes, int(value) & ((1 << dtype.bits) - 1), unsigned).view(kind)


def _row_numpy(value: Value) -> np.dtype[Any]:
    assert isinstance(value.type, RowType)
    return NUMPY_ROWS[value.type.dtype]


def pure_function(op: Op, lanes: int) -> Callable[..., Any] | None:
    """The function from operand values to the result of a pure op (exchange: to both); None if it is not one."""
    name = op.name
    attributes = op.attributes
    if name in _SCALAR_BINARY:
        return _SCALAR_BINARY[name]
    if name in ("shl", "shr", "sar"):
        shift = _shift(name)
        if len(op.operands) == 2:
            return shift
        amount = np.full(lanes, attributes["amount"], _row_numpy(op.operands[0]))
        return lambda a: shift(a, amount)
    if name in _ROW_PLAIN:
        return _ROW_PLAIN[name]
    if name == "s_const":
        scalar = wrap64(attributes["value"])
        return lambda: scalar
    if name == "s_cmp":
        compare = _COMPARE[attributes["cond"]]
        return lambda a, b: int(compare(a, b))
    if name == "s_select":
        return lambda c, a, b: a if c else b
    if name == "cmp":
        return _COMPARE[attributes["cond"]]
    if name == "splat_const":
        assert isinstance(op.result.type, RowType)
        constant = row_constant(attributes["value"], op.result.type.dtype, lanes)
        return lambda: constant
    if name == "splat":
        assert isinstance(op.result.type, RowType)
        dtype = op.result.type.dtype
        return lambda s: row_constant(s, dtype, lanes)
    if name == "iota":
        numbers = np.arange(lanes, dtype=np.int32)
        return lambda: numbers
    if name == "mask_first":
        places = np.arange(lanes)
        return lambda count: places < count
    if name == "lookup":
        table = np.array(attributes["table"], np.float32)
        return lambda i: table[i & 15]
    if name == "pick":
        return lambda a, i: a[i % lanes]
    if name == "cvt":
        to = _row_numpy(op.result)
        return lambda a: cvt(a, to)
    if name == "bitcast":
        to = _row_numpy(op.result)
        return lambda a: a.view(to)
    if name == "round_to":
        narrow = attributes["dtype"]
        return lambda a: round_to(a, narrow)
    if name == "pack2":
        kind = _MEMORY[attributes["dtype"]]
        return lambda a, b: np.stack([a, b], axis=1).astype(kind).view(np.uint32)[:, 0]
    if name == "shuffle_xor":
        source = np.arange(lanes) ^ attributes["distance"]
        return lambda a: a[source]
    if name == "broadcast_lane":
        lane = attributes["lane"]
        return lambda a: np.full(lanes, a[lane])
    if name == "widen_float8":
        kind = _MEMORY[attributes["dtype"]]
        return lambda a: tuple(a.view(kind).astype(np.float32).reshape(4, lanes))
    if name == "exchange":
        distance = attributes["distance"]
        clear = (np.arange(lanes) & distance) == 0
        up = (np.arange(lanes) + distance) % lanes
        down = (np.arange(lanes) - distance) % lanes
        return lambda a, b: (_where(clear, a, b[down]), _where(clear, a[up], b))
    if name == "unzip":
        return lambda a, b: (np.concatenate([a[::2], b[::2]]), np.concatenate([a[1::2], b[1::2]]))
    if name == "zip":
        return lambda a, b: tuple(np.stack([a, b], axis=1).reshape(2, lanes))
    if name == "interleave":
        return lambda a, b: tuple(np.stack([a.view(np.uint16), b.view(np.uint16)], axis=1).reshape(2, 2 * lanes).view(
            np.uint32))
    return None


# Running.

_Step = Callable[[list[Any]], None]
"""One op, compiled: changes the environment, a list of values whose entry 0 is the worker."""


class _Aborted(Exception):
    """Another worker failed."""


class _Launch:
    """What the workers of one run share. A strand is a warp of a worker, and what takes turns."""

    def __init__(self, words: list[int], memory: Memory, workers: int, warps: int = 1, near_bytes: int = 0) -> None:
        self.words = words
        self.memory = memory
        self.workers = workers
        self.warps = warps
        self.strands = workers * warps
        self.near = [memory.allocate(f"near memory of worker {n}", near_bytes, 1024)
                     for n in range(workers) if near_bytes]
        self.meetings: dict[int, int] = {}
        self.counters = [0] * TASK_COUNTERS
        self.turns = [threading.Semaphore(0) for _ in range(self.strands)]
        self.running = [True] * self.strands
        self.waiting = 0
        self.generation = 0
        self.signals: dict[int, _Signal] = {}
        self.fruitless = 0
        self.failure: BaseException | None = None

    def next_turn(self, worker: int) -> None:
        """Let the next worker that still runs go on."""
        for step in range(1, self.strands + 1):
            other = (worker + step) % self.strands
            if self.running[other]:
                self.turns[other].release()
                return

    def give_way(self, worker: int) -> None:
        if self.strands > 1:
            self.next_turn(worker)
            self.turns[worker].acquire()
            if self.failure is not None:
                raise _Aborted

    def barrier(self, worker: int, op: Op) -> None:
        generation = self.generation
        self.waiting += 1
        if self.waiting == self.strands:
            self.waiting = 0
            if "reset" in op.attributes:
                self.counters[op.attributes["reset"]] = 0
            self.generation += 1
            return
        while self.generation == generation:
            if self.waiting == sum(self.running):
                raise LaneError(f"{_at(op)}: found {self.strands - self.waiting} workers that ended before this "
                                "barrier; expected all to arrive")
            self.give_way(worker)


    def meet(self, warp: int, op: Op) -> None:
        """Wait until every warp of this one's worker has come as often as it."""
        mine = self.meetings[warp] = self.meetings.get(warp, 0) + 1
        self.fruitless = 0
        first = warp // self.warps * self.warps
        others = range(first, first + self.warps)
        while any(self.meetings.get(other, 0) < mine for other in others):
            if not all(self.running[other] for other in others if self.meetings.get(other, 0) < mine):
                raise LaneError(f"{_at(op)}: found a warp that ended before; expected all of the worker's to arrive")
            self.give_way(warp)


    def signal(self, address: int, op: Op) -> _Signal:
        found = self.signals.get(address)
        if found is None:
            raise LaneError(f"{_at(op)}: found no signal at {address:#x}; expected one that signal_start made")
        return found

    def count(self, signal: _Signal, arrivals: int, announced: int) -> None:
        """Arrivals, and bytes announced or, below 0, copied."""
        signal.arrivals -= arrivals
        signal.bytes += announced
        self.fruitless = 0
        if signal.arrivals == 0 and signal.bytes == 0:
            signal.phase += 1
            signal.arrivals = signal.each

    def wait(self, warp: int, signal: _Signal, parity: int, op: Op) -> None:
        """Until the last phase of this parity is over: the signal is in one of the other."""
        while signal.phase & 1 == parity:
            self.fruitless += 1
            if self.fruitless > 2 * self.strands:
                raise LaneError(f"{_at(op)}: found nobody who can go on; expected {signal.arrivals} arrivals and "
                                f"{signal.bytes} bytes in phase {signal.phase}")
            self.give_way(warp)


class _Signal:
    """each: arrivals of a phase; arrivals, bytes: what is still to come in this one."""

    __slots__ = ("arrivals", "bytes", "each", "phase")

    def __init__(self, each: int) -> None:
        self.each = self.arrivals = each
        self.bytes = self.phase = 0


class _Worker:
    """A warp of a worker. strand: its number among all warps of the launch. tiles: whether it has them configured."""

    __slots__ = ("launch", "memory", "number", "strand", "tiles", "warp", "words")

    def __init__(self, launch: _Launch, strand: int) -> None:
        self.launch = launch
        self.strand = strand
        self.number, self.warp = divmod(strand, launch.warps)
        self.memory = launch.memory
        self.words = launch.words
        self.tiles = False


def _at(op: Op) -> str:
    place = f" at {op.location}" if op.location is not None else ""
    return f"lane op {op.name}{place} ({print_op(op)})"


class Program:
    """A lane function made ready to run. Compile once, run often."""

    def __init__(self, function: Function) -> None:
        if function.stage != "lane":
            raise LaneError(f"found a {function.stage} function; expected a lane function")
        self.function = function
        self.lanes: int = function.attributes["lanes"]
        self._slots: dict[Value, int] = {}
        self._steps = self._block(function.body)

    def run(self, words: NDArray[np.int64], memory: Memory, workers: int = 1) -> None:
        """Run a launch of `workers` workers; see run()."""
        attributes = self.function.attributes
        launch = _Launch([int(w) for w in words], memory, workers, attributes.get("warps", 1),
                         attributes.get("near_bytes", 0))
        if launch.strands == 1:
            self._run_worker(launch, 0)
            return
        threads = [threading.Thread(target=self._run_thread, args=(launch, n), daemon=True)
                   for n in range(launch.strands)]
        for thread in threads:
            thread.start()
        launch.turns[0].release()
        for thread in threads:
            thread.join()
        if launch.failure is not None:
            raise launch.failure

    def _run_worker(self, launch: _Launch, number: int) -> None:
        environment: list[Any] = [None] * (len(self._slots) + 1)
        environment[0] = _Worker(launch, number)
        with np.errstate(all="ignore"):
            for step in self._steps:
                step(environment)

    def _run_thread(self, launch: _Launch, number: int) -> None:
        launch.turns[number].acquire()
        try:
            if launch.failure is None:
                self._run_worker(launch, number)
        except _Aborted:
            return  # the worker that failed has said why
        except BaseException as error:
            launch.failure = error
        finally:
            launch.running[number] = False
            launch.next_turn(number)

    # From ops to steps.

    def _slot(self, value: Value) -> int:
        return self._slots.setdefault(value, len(self._slots) + 1)

    def _block(self, block: Block) -> list[_Step]:
        return [self._op(op) for op in block.ops if op.name != "yield"]

    def _op(self, op: Op) -> _Step:
        function = pure_function(op, self.lanes)
        if function is not None:
            return self._pure(op, function)
        build = _BUILDERS.get(op.name)
        if build is None:
            raise LaneError(f"found op {op.name}; expected an op of the lane IR")
        return build(self, op)

    def _pure(self, op: Op, function: Callable[..., Any]) -> _Step:
        operands = [self._slot(v) for v in op.operands]
        if len(op.results) > 1:
            results = [self._slot(v) for v in op.results]

            def several(e: list[Any]) -> None:
                for place, made in zip(results, function(*[e[v] for v in operands]), strict=True):
                    e[place] = made

            return several
        result = self._slot(op.result)
        if op.name in ("s_floordiv", "s_mod"):
            a, b = operands

            def divide(e: list[Any]) -> None:
                if e[b] == 0:
                    raise LaneError(f"{_at(op)}: found the divisor 0; expected another")
                e[result] = function(e[a], e[b])

            return divide
        if not operands:
            value = function()

            def constant(e: list[Any]) -> None:
                e[result] = value

            return constant
        if len(operands) == 1:
            (a,) = operands

            def unary(e: list[Any]) -> None:
                e[result] = function(e[a])

            return unary
        if len(operands) == 2:
            a, b = operands

            def binary(e: list[Any]) -> None:
                e[result] = function(e[a], e[b])

            return binary
        a, b, c = operands

        def ternary(e: list[Any]) -> None:
            e[result] = function(e[a], e[b], e[c])

        return ternary

    def _address(self, op: Op, first: int) -> tuple[Callable[[list[Any]], int], int | None]:
        """What computes the address of the memory operand at operand `first`, and the slot of the mask or None."""
        attributes = op.attributes
        disp = attributes.get("disp", 0)
        scale = attributes.get("scale", 1)
        base = self._slot(op.operands[first])
        mask = self._slot(op.operands[-1]) if attributes.get("masked") else None
        if attributes.get("indexed"):
            index = self._slot(op.operands[first + 1])
            return (lambda e: (e[base] + e[index] * scale + disp) & _LOW), mask
        return (lambda e: (e[base] + disp) & _LOW), mask

    def _offsets(self, op: Op, first: int) -> tuple[Callable[[list[Any]], list[int]], int | None]:
        """The same for gather and scatter: an address for each lane."""
        attributes = op.attributes
        disp = attributes.get("disp", 0)
        scale = attributes.get("scale", 1)
        base = self._slot(op.operands[first])
        offsets = self._slot(op.operands[first + 1])
        mask = self._slot(op.operands[-1]) if attributes.get("masked") else None
        return (lambda e: [(e[base] + o * scale + disp) & _LOW for o in e[offsets].tolist()]), mask


def _bytes(worker: _Worker, op: Op, address: int, size_bytes: int, write: bool, lane: int | None) -> Array:
    found = worker.memory.find(address, size_bytes, write)
    if isinstance(found, str):
        where = f" lane {lane}" if lane is not None else ""
        raise LaneError(f"{_at(op)}{where}, worker {worker.number}: found {found}; "
                        "expected an access inside a registered buffer")
    return found


def _build_arg(program: Program, op: Op) -> _Step:
    slot, result = op.attributes["slot"], program._slot(op.result)

    def arg(e: list[Any]) -> None:
        words = e[0].words
        if slot >= len(words):
            raise LaneError(f"{_at(op)}: found an argument block of {len(words)} words; expected at least {slot + 1}")
        e[result] = words[slot]

    return arg


def _build_worker(program: Program, op: Op) -> _Step:
    result = program._slot(op.result)

    def worker(e: list[Any]) -> None:
        e[result] = e[0].number

    return worker


def _build_workers(program: Program, op: Op) -> _Step:
    result = program._slot(op.result)

    def workers(e: list[Any]) -> None:
        e[result] = e[0].launch.workers

    return workers


def _build_s_load(program: Program, op: Op) -> _Step:
    address, _ = program._address(op, 0)
    kind, result = _MEMORY[op.attributes["dtype"]], program._slot(op.result)

    def s_load(e: list[Any]) -> None:
        e[result] = int(_bytes(e[0], op, address(e), kind.itemsize, False, None).view(kind)[0])

    return s_load


def _build_s_store(program: Program, op: Op) -> _Step:
    address, _ = program._address(op, 1)
    value = program._slot(op.operands[0])
    size_bytes = _MEMORY[op.attributes["dtype"]].itemsize

    def s_store(e: list[Any]) -> None:
        data = (e[value] & ((1 << 8 * size_bytes) - 1)).to_bytes(size_bytes, "little")
        _bytes(e[0], op, address(e), size_bytes, True, None)[:] = np.frombuffer(data, np.uint8)

    return s_store


def _build_load(program: Program, op: Op) -> _Step:
    address, mask = program._address(op, 0)
    kind, row = _MEMORY[op.attributes["dtype"]], _ROW_OF_MEMORY[op.attributes["dtype"]]
    result, lanes, size_bytes = program._slot(op.result), program.lanes, kind.itemsize

    def load(e: list[Any]) -> None:
        at = address(e)
        whole = e[0].memory.find(at, lanes * size_bytes, False)
        if isinstance(whole, str):  # some lane is outside; which one, and is it on?
            raw = np.zeros(lanes, kind)
            on = e[mask] if mask is not None else np.ones(lanes, bool)
            for lane in np.flatnonzero(on).tolist():
                lane_at = (at + lane * size_bytes) & _LOW
                raw[lane] = _bytes(e[0], op, lane_at, size_bytes, False, lane).view(kind)[0]
        else:
            raw = whole.view(kind)
        value = raw.astype(row)
        e[result] = value if mask is None else _where(e[mask], value, row.type(0))

    return load


def _build_asm(program: Program, op: Op) -> _Step:
    piece, immediates = PIECES[op.attributes["by"]], list(op.attributes["immediates"])
    operands, result = [program._slot(v) for v in op.operands], program._slot(op.result)

    def asm(e: list[Any]) -> None:
        e[result] = piece.run([e[o] for o in operands], immediates)

    return asm


def _build_asm_contract(program: Program, op: Op) -> _Step:
    piece, rows, rights = CONTRACTIONS[op.attributes["by"]], op.attributes["rows"], op.attributes["rights"]
    operands, results = [program._slot(v) for v in op.operands], [program._slot(v) for v in op.results]
    tile = rows, len(results) // (rows * rights)
    first = 3 + rights

    def asm_contract(e: list[Any]) -> None:
        values = [e[o] for o in operands]
        for result, value in zip(results, piece.run(e[0].memory, tile, values[:first], values[first:]), strict=True):
            e[result] = value

    return asm_contract


def _build_load_splat(program: Program, op: Op) -> _Step:
    address, _ = program._address(op, 0)
    kind, row = _MEMORY[op.attributes["dtype"]], _ROW_OF_MEMORY[op.attributes["dtype"]]
    result, lanes = program._slot(op.result), program.lanes

    def load_splat(e: list[Any]) -> None:
        e[result] = _bytes(e[0], op, address(e), kind.itemsize, False, None).view(kind).astype(row).repeat(lanes)

    return load_splat


def _build_gather(program: Program, op: Op) -> _Step:
    addresses, mask = program._offsets(op, 0)
    kind, row = _MEMORY[op.attributes["dtype"]], _ROW_OF_MEMORY[op.attributes["dtype"]]
    result, lanes = program._slot(op.result), program.lanes

    base, offsets = program._slot(op.operands[0]), program._slot(op.operands[1])
    scale, disp = op.attributes.get("scale", 1), op.attributes.get("disp", 0)
    step = scale // kind.itemsize if scale % kind.itemsize == 0 else 0

    def gather(e: list[Any]) -> None:
        if step and mask is None:
            # All lanes in one piece of a buffer, as is usual.
            places = e[offsets]
            low, high = int(places.min()), int(places.max())
            span = e[0].memory.find((e[base] + low * scale + disp) & _LOW, (high - low) * scale + kind.itemsize, False)
            if not isinstance(span, str):
                e[result] = span.view(kind)[(places - low) * step].astype(row)
                return
        raw = np.zeros(lanes, kind)
        on = e[mask].tolist() if mask is not None else [True] * lanes
        for lane, at in enumerate(addresses(e)):
            if on[lane]:
                raw[lane] = _bytes(e[0], op, at, kind.itemsize, False, lane).view(kind)[0]
        e[result] = raw.astype(row)

    return gather


def _narrowing(op: Op) -> Callable[[Array], Array]:
    """From a row to elements in memory. An exact store takes the upper halves as they are, whatever is below; one of
    rows without denormals takes these for 0."""
    kind = _MEMORY[op.attributes["dtype"]]
    if op.attributes.get("denormals") == "none":
        return lambda row: _halves(row).astype(np.uint16).view(kind)
    if op.attributes.get("exact"):
        return lambda row: (row.view(np.uint32) >> 16).astype(np.uint16).view(kind)
    return lambda row: row.astype(kind)


def _build_store(program: Program, op: Op) -> _Step:
    address, mask = program._address(op, 1)
    kind = _MEMORY[op.attributes["dtype"]]
    value, lanes, size_bytes = program._slot(op.operands[0]), program.lanes, kind.itemsize
    streaming = op.attributes.get("streaming", False)
    aligned_bytes = min(lanes * size_bytes, 64)
    narrowed = _narrowing(op)

    def store(e: list[Any]) -> None:
        at = address(e)
        if streaming and at % aligned_bytes:
            raise LaneError(f"{_at(op)}: found the address {at:#x}; expected one aligned to {aligned_bytes} bytes")
        raw = narrowed(e[value])
        whole = e[0].memory.find(at, lanes * size_bytes, True)
        if mask is None and not isinstance(whole, str):
            whole.view(kind)[:] = raw
        elif mask is not None and not isinstance(whole, str):
            np.copyto(whole.view(kind), raw, where=e[mask])
        else:
            on = e[mask] if mask is not None else np.ones(lanes, bool)
            for lane in np.flatnonzero(on).tolist():
                lane_at = (at + lane * size_bytes) & _LOW
                _bytes(e[0], op, lane_at, size_bytes, True, lane).view(kind)[0] = raw[lane]

    return store


def _run_addresses(program: Program, op: Op, run: int) -> tuple[Callable[[list[Any]], list[int]], int | None]:
    """Where the run of each lane begins, and the slot of the mask or None."""
    run_bytes = run * _MEMORY[op.attributes["dtype"]].itemsize
    gathered = op.attributes.get("gathered")
    of_lanes, mask = program._offsets(op, 0) if gathered else (None, None)
    address, _ = program._address(op, 0)

    def aligned(e: list[Any]) -> list[int]:
        if of_lanes is not None:
            found = of_lanes(e)
        else:
            start = address(e)
            found = [(start + lane * run_bytes) & _LOW for lane in range(program.lanes)]
        for at in found:
            if at % run_bytes:
                raise LaneError(f"{_at(op)}: found the address {at:#x}; expected one aligned to {run_bytes} bytes")
        return found

    return aligned, mask


def _build_load_run(program: Program, op: Op) -> _Step:
    run, lanes = len(op.results), program.lanes
    (addresses, mask), results = _run_addresses(program, op, run), [program._slot(v) for v in op.results]
    kind, row = _MEMORY[op.attributes["dtype"]], _ROW_OF_MEMORY[op.attributes["dtype"]]

    def load_run(e: list[Any]) -> None:
        raw = np.zeros((lanes, run), kind)
        on = e[mask].tolist() if mask is not None else [True] * lanes
        for lane, at in enumerate(addresses(e)):
            if on[lane]:
                raw[lane] = _bytes(e[0], op, at, run * kind.itemsize, False, lane).view(kind)
        for place, result in enumerate(results):
            e[result] = raw[:, place].astype(row)

    return load_run


def _build_store_run(program: Program, op: Op) -> _Step:
    values = [program._slot(v) for v in op.operands[2 if op.attributes.get("gathered") else 1:]]
    run = len(values)
    (addresses, _), kind, narrowed = _run_addresses(program, op, run), _MEMORY[op.attributes["dtype"]], _narrowing(op)

    def store_run(e: list[Any]) -> None:
        rows = np.stack([narrowed(e[value]) for value in values], axis=1)
        for lane, at in enumerate(addresses(e)):
            _bytes(e[0], op, at, run * kind.itemsize, True, lane).view(kind)[:] = rows[lane]

    return store_run


def _build_store_lane0(program: Program, op: Op) -> _Step:
    address, _ = program._address(op, 1)
    kind, value, narrowed = _MEMORY[op.attributes["dtype"]], program._slot(op.operands[0]), _narrowing(op)

    def store_lane0(e: list[Any]) -> None:
        _bytes(e[0], op, address(e), kind.itemsize, True, 0).view(kind)[0] = narrowed(e[value][:1])[0]

    return store_lane0


def _build_scatter(program: Program, op: Op) -> _Step:
    addresses, mask = program._offsets(op, 1)
    kind, value, lanes = _MEMORY[op.attributes["dtype"]], program._slot(op.operands[0]), program.lanes

    def scatter(e: list[Any]) -> None:
        raw = e[value].astype(kind)
        on = e[mask].tolist() if mask is not None else [True] * lanes
        for lane, at in enumerate(addresses(e)):
            if on[lane]:
                _bytes(e[0], op, at, kind.itemsize, True, lane).view(kind)[0] = raw[lane]

    return scatter


def _nothing(e: list[Any]) -> None:
    """A hint, or an order that the interpreter keeps anyway."""


def _build_nothing(program: Program, op: Op) -> _Step:
    return _nothing


def _yields(program: Program, block: Block) -> list[int]:
    terminator = block.terminator
    return [program._slot(v) for v in terminator.operands] if terminator is not None else []


def _build_loop(program: Program, op: Op) -> _Step:
    start, stop, *initial = [program._slot(v) for v in op.operands]
    (block,) = op.blocks
    counter, *carried = [program._slot(v) for v in block.arguments]
    steps = program._block(block)
    yields = _yields(program, block)
    results = [program._slot(v) for v in op.results]
    by = op.attributes["step"]

    def loop(e: list[Any]) -> None:
        values = [e[v] for v in initial]
        i, end = e[start], e[stop]
        while i < end:
            e[counter] = i
            for slot, value in zip(carried, values, strict=True):
                e[slot] = value
            for step in steps:
                step(e)
            values = [e[v] for v in yields]
            i = i + by
        for slot, value in zip(results, values, strict=True):
            e[slot] = value

    return loop


def _build_if(program: Program, op: Op) -> _Step:
    condition = program._slot(op.operands[0])
    then, otherwise = [(program._block(block), _yields(program, block)) for block in op.blocks]
    results = [program._slot(v) for v in op.results]

    def branch(e: list[Any]) -> None:
        steps, yields = then if e[condition] else otherwise
        for step in steps:
            step(e)
        for slot, value in zip(results, [e[v] for v in yields], strict=True):
            e[slot] = value

    return branch


def _build_tasks(program: Program, op: Op) -> _Step:
    total = program._slot(op.operands[0])
    (block,) = op.blocks
    index = program._slot(block.arguments[0])
    steps = program._block(block)
    counter = op.attributes["counter"]

    def tasks(e: list[Any]) -> None:
        worker: _Worker = e[0]
        if worker.launch.warps > 1:
            for task in range(worker.number, e[total], worker.launch.workers):
                e[index] = task
                for step in steps:
                    step(e)
            return
        while True:
            task = worker.launch.counters[counter]
            worker.launch.counters[counter] = task + 1
            if task >= e[total]:
                return
            e[index] = task
            for step in steps:
                step(e)
            worker.launch.give_way(worker.strand)

    return tasks


def _build_barrier(program: Program, op: Op) -> _Step:
    def barrier(e: list[Any]) -> None:
        e[0].launch.barrier(e[0].strand, op)

    return barrier


def _build_warp(program: Program, op: Op) -> _Step:
    result = program._slot(op.result)

    def warp(e: list[Any]) -> None:
        e[result] = e[0].warp

    return warp


def _build_near_memory(program: Program, op: Op) -> _Step:
    result = program._slot(op.result)

    def near_memory(e: list[Any]) -> None:
        e[result] = e[0].launch.near[e[0].number]

    return near_memory


def _build_sync_warps(program: Program, op: Op) -> _Step:
    def sync_warps(e: list[Any]) -> None:
        e[0].launch.meet(e[0].strand, op)

    return sync_warps


def _build_async_copy(program: Program, op: Op) -> _Step:
    near, near_offsets, base, offsets = [program._slot(v) for v in op.operands[:4]]
    mask = program._slot(op.operands[4]) if op.attributes.get("masked") else None
    disp, source_disp = op.attributes.get("disp", 0), op.attributes.get("source_disp", 0)
    zeros = np.zeros(16, np.uint8)

    def async_copy(e: list[Any]) -> None:
        for lane in range(program.lanes):
            target = _bytes(e[0], op, e[near] + int(e[near_offsets][lane]) + disp, 16, True, lane)
            target[:] = zeros if mask is not None and not e[mask][lane] else _bytes(
                e[0], op, e[base] + int(e[offsets][lane]) + source_disp, 16, False, lane)

    return async_copy


def _build_load_matrix(program: Program, op: Op) -> _Step:
    base, offsets = [program._slot(v) for v in op.operands]
    results = [program._slot(v) for v in op.results]
    flip, disp = op.attributes.get("flip", 0), op.attributes.get("disp", 0)
    transposed = op.attributes["transposed"]

    def load_matrix(e: list[Any]) -> None:
        rows = [_bytes(e[0], op, ((e[base] + int(e[offsets][lane])) ^ flip) + disp, 16, False, lane).view(np.uint16)
                for lane in range(program.lanes)]
        for number, result in enumerate(results):
            matrix = np.stack(rows[8 * number:8 * number + 8])
            matrix = np.ascontiguousarray(matrix.T if transposed else matrix)
            e[result] = matrix.reshape(-1).view(np.uint32)

    return load_matrix


def _build_asm_multiply(program: Program, op: Op) -> _Step:
    piece, rows, columns = PRODUCTS[op.attributes["by"]], op.attributes["rows"], op.attributes["columns"]
    operands, results = [program._slot(v) for v in op.operands], [program._slot(v) for v in op.results]
    first, last = 4 * rows, 4 * rows + 2 * columns

    def asm_multiply(e: list[Any]) -> None:
        values = [e[v] for v in operands]
        for result, value in zip(results, piece.run(values[:first], values[first:last], values[last:]), strict=True):
            e[result] = value

    return asm_multiply


def _build_matrix_multiply(program: Program, op: Op) -> _Step:
    operands, results = [program._slot(v) for v in op.operands], [program._slot(v) for v in op.results]
    dtype = op.attributes["dtype"]
    kinds = _MEMORY[dtype], _MEMORY[op.attributes.get("right_dtype", dtype)]
    slots = 4 // dtype.size_bytes
    deep = fragments.DEPTH_BYTES // dtype.size_bytes
    exact = np.float64 if dtype.is_float else np.int64

    def spread(registers: list[Array], kind: Any, places: fragments.Places, shape: tuple[int, int]) -> NDArray[Any]:
        made = np.zeros(shape, exact)
        held = np.stack(registers).view(kind).reshape(len(registers), program.lanes, -1).transpose(0, 2, 1)
        made[places] = held.astype(exact)
        return made

    def matrix_multiply(e: list[Any]) -> None:
        registers = [e[v] for v in operands]
        a = spread(registers[:4], kinds[0], fragments.left_places(slots), (fragments.ROWS, deep))
        b = spread(registers[4:6], kinds[1], fragments.right_places(slots), (deep, fragments.COLUMNS))
        sums = np.stack(registers[6:])
        c = sums.astype(exact) + (a @ b)[fragments.C]
        for result, row in zip(results, c.astype(sums.dtype), strict=True):
            e[result] = row

    return matrix_multiply


def multiply_tiles(c: Array, a: Array, b: Array, kinds: tuple[Any, Any]) -> Array:
    """c [i, j] + the sum over d of the products of slots a [i, d] and b [d, j]; kinds: of the elements of a and b.

    Of bf16, first and second elements have sums of their own, in the order of d, which are added at the end (TDPBF16PS,
    Intel SDM volume 2, as it says without exceptions to fused multiply-adds, and with denormals as zero).
    """
    each = 4 // np.dtype(kinds[0]).itemsize
    left = a.view(kinds[0]).reshape(*a.shape, each)
    right = b.view(kinds[1]).reshape(*b.shape, each)
    if c.dtype == np.int32:
        wide = (m.astype(np.int64) for m in (left, right))
        total: Array = (c + np.einsum("ide,dje->ij", *wide)).astype(np.int32)
        return total
    left, right = (_flushed(m.astype(np.float32)) for m in (left, right))
    sums = np.zeros((each, *c.shape), np.float32)
    for d in range(a.shape[1]):
        for e in range(each):
            sums[e] = _flushed(fma32(left[:, d, e, None], right[None, d, :, e], sums[e]))
    return _flushed(_flushed(c) + _flushed(sums[0] + sums[1]))


def _build_tile_state(program: Program, op: Op) -> _Step:
    begins = op.name == "tile_configure"

    def tile_state(e: list[Any]) -> None:
        if e[0].tiles is begins:
            raise LaneError(f"{_at(op)}: found tiles that are {'' if begins else 'not '}configured; expected each "
                            "tile_configure to be followed by its tile_release")
        e[0].tiles = begins

    return tile_state


def _configured(worker: _Worker, op: Op) -> None:
    if not worker.tiles:
        raise LaneError(f"{_at(op)}: found no tile_configure before it; expected one in this worker")


def _tile_rows(program: Program, op: Op, first: int) -> Callable[[list[Any]], Iterator[tuple[int, int, int]]]:
    """What gives number, address and size of each row in memory. first: the operand that is the base."""
    base, stride = (program._slot(v) for v in op.operands[first:])
    disp = op.attributes.get("disp", 0)
    size: int = program.function.attributes["tile"]
    return lambda e: ((row, (e[base] + row * e[stride] + disp) & _LOW, 4 * size) for row in range(size))


def _build_tile_zero(program: Program, op: Op) -> _Step:
    result, kind = program._slot(op.result), NUMPY_ROWS[op.result.type.dtype]  # type: ignore[union-attr]
    size = program.function.attributes["tile"]
    zeros = np.zeros((size, size), kind)

    def tile_zero(e: list[Any]) -> None:
        _configured(e[0], op)
        e[result] = zeros

    return tile_zero


def _build_tile_load(program: Program, op: Op) -> _Step:
    rows, kind = _tile_rows(program, op, 0), NUMPY_ROWS[op.result.type.dtype]  # type: ignore[union-attr]
    result = program._slot(op.result)

    def tile_load(e: list[Any]) -> None:
        _configured(e[0], op)
        e[result] = np.stack([_bytes(e[0], op, at, size, False, None).view(kind) for _, at, size in rows(e)])

    return tile_load


def _build_tile_store(program: Program, op: Op) -> _Step:
    rows, value = _tile_rows(program, op, 1), program._slot(op.operands[0])

    def tile_store(e: list[Any]) -> None:
        _configured(e[0], op)
        for row, at, size in rows(e):
            _bytes(e[0], op, at, size, True, None)[:] = e[value][row].view(np.uint8)

    return tile_store


def _build_tile_multiply(program: Program, op: Op) -> _Step:
    c, a, b = (program._slot(v) for v in op.operands)
    kinds = _MEMORY[op.attributes["dtype"]], _MEMORY[op.attributes["right_dtype"]]
    result = program._slot(op.result)

    def tile_multiply(e: list[Any]) -> None:
        _configured(e[0], op)
        e[result] = multiply_tiles(e[c], e[a], e[b], kinds)

    return tile_multiply


def _build_signal(act: Callable[[_Worker, Op, int, list[int]], None]) -> Callable[[Program, Op], _Step]:
    """act: worker, op, address of the signal, the other operands."""
    def build(program: Program, op: Op) -> _Step:
        address, *others = [program._slot(v) for v in op.operands]
        disp = op.attributes.get("disp", 0)
        return lambda e: act(e[0], op, e[address] + disp, [e[slot] for slot in others])

    return build


def _signal_start(worker: _Worker, op: Op, address: int, _: list[int]) -> None:
    _bytes(worker, op, address, 8, True, None)
    worker.launch.signals[address] = _Signal(op.attributes["arrivals"])


def _signal_arrive(worker: _Worker, op: Op, address: int, _: list[int]) -> None:
    worker.launch.count(worker.launch.signal(address, op), 1, op.attributes.get("bytes", 0))


def _signal_wait(worker: _Worker, op: Op, address: int, others: list[int]) -> None:
    worker.launch.wait(worker.strand, worker.launch.signal(address, op), others[0], op)


def _build_tensor_copy(program: Program, op: Op) -> _Step:
    near, signal, *coordinates = [program._slot(v) for v in op.operands]
    disp, signal_disp = op.attributes.get("disp", 0), op.attributes.get("signal_disp", 0)
    attributes = program.function.attributes
    name, dtype, dims, box = attributes["tensor_maps"][op.attributes["map"]]
    words = {slot: 3 + number for number, slot in enumerate(attributes["slots"])}
    kind = _MEMORY[DTYPES[dtype]]

    def tensor_copy(e: list[Any]) -> None:
        worker: _Worker = e[0]
        shape = [dim if isinstance(dim, int) else worker.words[words[f"dim.{dim}"]] for dim in dims]
        inside = np.zeros(box, kind)
        where = [(max(0, e[at]), min(e[at] + n, extent))
                 for at, n, extent in zip(coordinates, box, shape, strict=True)]
        if all(first < last for first, last in where):
            size_bytes = math.prod(shape) * kind.itemsize
            tensor = _bytes(worker, op, worker.words[words[f"{name}.data"]], size_bytes, False, None).view(kind)
            part = tensor.reshape(shape)[tuple(slice(*bounds) for bounds in where)]
            inside[tuple(slice(first - e[at], last - e[at])
                         for at, (first, last) in zip(coordinates, where, strict=True))] = part
        start = e[near] + disp
        target = _bytes(worker, op, start, inside.nbytes, True, None)
        target[fragments.swizzled(start + np.arange(inside.nbytes)) - start] = inside.reshape(-1).view(np.uint8)
        worker.launch.count(worker.launch.signal(e[signal] + signal_disp, op), 0, -inside.nbytes)

    return tensor_copy


def _build_group_multiply(program: Program, op: Op) -> _Step:
    """The left operand in near memory, or in registers."""
    in_registers = op.name == "group_multiply_rows"
    slots = [program._slot(v) for v in op.operands]
    right, left, sums = (slots[0], slots[1:5], slots[5:]) if in_registers else (slots[1], slots[:1], slots[2:])
    results = [program._slot(v) for v in op.results]
    attributes = op.attributes
    kind = _MEMORY[attributes["dtype"]]
    columns = len(sums) * fragments.COLUMNS // 4
    size = kind.itemsize
    deep, fresh = fragments.GROUP_DEPTH_BYTES // size, attributes.get("fresh", False)

    def operand(e: list[Any], side: str, at: int, first: int, extent: int) -> NDArray[np.float64]:
        """(outer, depth) of the outer coordinates from `first` on."""
        offsets = fragments.near_offsets(np.arange(first, first + extent)[:, None],
                                         np.arange(deep)[None, :], attributes[f"{side}_rows"],
                                         attributes.get(f"{side}_panel_bytes", 0), size)
        places = fragments.swizzled(e[at] + attributes.get(f"{side}_disp", 0) + offsets)
        low, high = int(places.min()), int(places.max()) + size
        held = _bytes(e[0], op, low, high - low, False, None)
        raw = np.stack([held[places - low + byte] for byte in range(size)], axis=-1)
        elements: NDArray[np.float64] = raw.view(kind)[..., 0].astype(np.float64)
        return elements

    def group_multiply(e: list[Any]) -> None:
        if in_registers:
            a = np.zeros((fragments.ROWS, fragments.DEPTH))
            held = np.stack([e[slot] for slot in left]).view(kind).reshape(4, program.lanes, -1).transpose(0, 2, 1)
            a[fragments.A] = held.astype(np.float64)
        else:
            a = operand(e, "left", left[0], e[0].warp % 4 * fragments.ROWS, fragments.ROWS)
        product = a @ operand(e, "right", right, 0, columns).T
        rows, within = fragments.C
        for number, (result, slot) in enumerate(zip(results, sums, strict=True)):
            register = number % 4
            part = product[rows[register], number // 4 * fragments.COLUMNS + within[register]]
            before = 0.0 if fresh else e[slot].astype(np.float64)
            e[result] = (before + part).astype(np.float32)

    return group_multiply


def _build_group_wait(program: Program, op: Op) -> _Step:
    pairs = [(program._slot(result), program._slot(v)) for result, v in zip(op.results, op.operands, strict=True)]

    def group_wait(e: list[Any]) -> None:
        for result, held in pairs:
            e[result] = e[held]

    return group_wait


_BUILDERS: dict[str, Callable[[Program, Op], _Step]] = {
    "arg": _build_arg, "worker": _build_worker, "workers": _build_workers, "s_load": _build_s_load,
    "s_store": _build_s_store, "load": _build_load, "load_splat": _build_load_splat, "asm": _build_asm,
    "asm_contract": _build_asm_contract,
    "gather": _build_gather, "store": _build_store, "store_lane0": _build_store_lane0,
    "load_run": _build_load_run, "store_run": _build_store_run,
    "scatter": _build_scatter, "prefetch": _build_nothing,
    "loop": _build_loop, "if": _build_if, "tasks": _build_tasks, "barrier": _build_barrier,
    "fence_streaming": _build_nothing, "sync_lanes": _build_nothing, "warp": _build_warp,
    "near_memory": _build_near_memory, "sync_warps": _build_sync_warps, "async_copy": _build_async_copy,
    "async_commit": _build_nothing, "async_wait": _build_nothing, "load_matrix": _build_load_matrix,
    "matrix_multiply": _build_matrix_multiply, "asm_multiply": _build_asm_multiply,
    "tile_configure": _build_tile_state, "tile_release": _build_tile_state, "tile_zero": _build_tile_zero,
    "tile_load": _build_tile_load, "tile_store": _build_tile_store, "tile_multiply": _build_tile_multiply,
    "signal_start": _build_signal(_signal_start), "signal_fence": _build_nothing,
    "signal_arrive": _build_signal(_signal_arrive), "signal_expect": _build_signal(_signal_arrive),
    "signal_wait": _build_signal(_signal_wait), "tensor_copy": _build_tensor_copy, "group_fence": _build_nothing,
    "group_multiply": _build_group_multiply,
    "group_multiply_rows": _build_group_multiply, "group_commit": _build_nothing, "group_wait": _build_group_wait,
    "register_budget": _build_nothing,
}


def run(function: Function, words: NDArray[np.int64], memory: Memory, workers: int = 1) -> None:
    """Run a lane function.

    words: the argument block (docs/ir.md: scratch address, scratch bytes of a worker, sync block address, then the
    words of the attribute `slots`). memory: every buffer that the words point to. workers: how many take part.
    Raises LaneError for an access outside the buffers, a scalar division by zero, a misaligned streaming store, or
    a barrier that not every worker reaches.
    """
    Program(function).run(words, memory, workers)


def bind_arguments(
    function: Function,
    arrays: Mapping[str, Array],
    scalars: Mapping[str, Any] | None = None,
    dims: Mapping[str, int] | None = None,
    workers: int = 1,
) -> tuple[NDArray[np.int64], Memory]:
    """The argument block and memory of a call, as the function's attributes `slots` and `scratch_bytes` ask for.

    arrays: by tensor name. scalars: by name, as NumPy scalars of the right dtype (np.float32 bits go to the low
    half; Python floats count as f64, integers are sign-extended). dims: by name. LaneError for a slot nobody fills.
    """
    memory = Memory()
    addresses = {name: memory.add_array(name, array) for name, array in arrays.items()}
    scratch_bytes = -(-function.attributes.get("scratch_bytes", 0) // 64) * 64
    scratch = memory.allocate("scratch", scratch_bytes * workers) if scratch_bytes else 0
    words = [scratch, scratch_bytes, memory.allocate("sync", 9 * 64)]
    for slot in function.attributes.get("slots", ()):
        words.append(_word(slot, arrays, addresses, scalars or {}, dims or {}))
    return np.array([wrap64(w) for w in words], np.int64), memory


def _word(slot: str, arrays: Mapping[str, Array], addresses: Mapping[str, int], scalars: Mapping[str, Any],
          dims: Mapping[str, int]) -> int:
    kind, _, rest = slot.partition(".")
    if kind == "dim" and rest in dims:
        return int(dims[rest])
    if kind == "scalar" and rest in scalars:
        value = scalars[rest]
        if isinstance(value, np.float32):
            return int(value.view(np.uint32))
        if isinstance(value, (float, np.float64)):
            return int(np.float64(value).view(np.int64))
        return int(value)
    if kind in arrays and rest == "data":
        return addresses[kind]
    if kind in arrays and rest.startswith("stride."):
        array = arrays[kind]
        return int(array.strides[int(rest[len("stride.") :])]) // array.itemsize
    raise LaneError(f"found slot {slot!r} in function.attributes; expected one that the arguments fill")


__all__ = ["LaneError", "Memory", "Program", "bind_arguments", "fma32", "fma64", "pure_function", "run"]
