"""Writes the mathematical row ops as basic ones, for targets that have no instruction for them.

Enters: a lane function and the set of op names that the target has. Leaves: the same function without exp, exp2, log,
log2, tanh, sigmoid, erf, sin, cos, rsqrt, scale_exponent, round, floor, ceil and trunc, save those in the set. Holds:
results keep their values and places; errors and special values are as docs/math.md says, for f32 and f64 rows. `fma`
and the other arithmetic ops are taken to be there.

Constants are `splat_const` ops at the head of the function, each value once, so loops keep them out of their bodies.
The polynomials are in sapper/lane/polynomials.py, fitted by tools/fit_polynomials.py.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable

from ..ir.nodes import Block, Function, Location, Op, Value
from ..ir.types import MASK, ROW_F32, ROW_F64, ROW_I32, ROW_I64, RowType, Type
from . import polynomials
from .tables import tabulate, use_tables

EXPANDABLE = frozenset({
    "exp", "exp2", "log", "log2", "tanh", "sigmoid", "erf", "sin", "cos", "rsqrt", "scale_exponent", "round", "floor",
    "ceil", "trunc",
})
"""The ops that expand_math can do without."""


class _Format:
    """What the expansions need to know of f32 or f64."""

    def __init__(self, row: RowType, bits_row: RowType, suffix: str, mantissa_bits: int, bias: int) -> None:
        self.row = row
        self.bits_row = bits_row
        self.mantissa_bits = mantissa_bits
        self.bias = bias
        width = row.dtype.bits
        self.sign_bit = -(1 << (width - 1))
        self.magic = 1.5 * 2.0**mantissa_bits
        """Adding it rounds |x| < 2**(mantissa_bits - 1) to an integer, which the low bits of the sum then hold."""
        self.least_normal = 2.0 ** (1 - bias)
        self.is_f32 = mantissa_bits == 23
        for name in ("EXPM1", "EXP2", "SIN", "COS", "ERF_SMALL", "ERF_LARGE"):
            setattr(self, name.lower(), getattr(polynomials, f"{name}_{suffix}"))
        # exp: below `exp_low` it rounds to 0, above `exp_high` it overflows.
        self.exp_low, self.exp_high = (-104.0, 89.0) if self.is_f32 else (-746.0, 710.0)
        self.zero_power = -151 if self.is_f32 else -1076
        """The greatest power of two that times any number up to 3/2 rounds to 0."""
        self.exp_zero = -105.0 if self.is_f32 else -746.0
        """Its logarithm, or below, but not by half a power."""
        self.sigmoid_limits = (-105.42, 70.0) if self.is_f32 else (-746.6, 600.0)
        """The first is 1077 ln 2 (152 ln 2, by the table 152 1/16 ln 2) and a little more."""
        self.exp2_low, self.exp2_high = (-151.0, 129.0) if self.is_f32 else (-1076.0, 1025.0)
        self.tanh_limit = 9.1 if self.is_f32 else 19.1
        self.erf_split, self.erf_limit = 1.0, (4.0 if self.is_f32 else 6.0)

    expm1: tuple[float, ...]
    exp2: tuple[float, ...]
    sin: tuple[float, ...]
    cos: tuple[float, ...]
    erf_small: tuple[float, ...]
    erf_large: tuple[float, ...]


_FORMATS = {
    ROW_F32: _Format(ROW_F32, ROW_I32, "F32", 23, 127),
    ROW_F64: _Format(ROW_F64, ROW_I64, "F64", 52, 1023),
}


# Cody and Waite, "Software Manual for the Elementary Functions", 1980: x - n ln 2 without cancellation error, as
# n has at most 8 (11) bits and the first part leaves as many free. pi / 2 has full-width parts, whose products fma
# forms exactly; three of them reach |x| of some 1e5 in f32.
_LN2_PARTS = {ROW_F32: polynomials.LN2_F32, ROW_F64: polynomials.LN2_F64}
_HALF_PI_PARTS = {ROW_F32: polynomials.HALF_PI_F32, ROW_F64: polynomials.HALF_PI_F64}


PRODUCT = "product_with_erf"
"""What _join_products makes for _expand_block: g (1 + erf y), of a value of which `factors` make y and g."""

LEAST_OPS, LEAST_OPS_BY_HALVES = 4, 8
"""Ops on four bits that a lookup takes the place of: it is one instruction, by halves four, and wants registers."""

ERF_TABLE_LIMIT = 3.875 - 2.0**-22
"""The greatest f32 that is nearer to 15 / 4 than to 16 / 4."""


def times(factor: float, coefficients: tuple[float, ...]) -> tuple[float, ...]:
    """A polynomial times a number."""
    return tuple(factor * c for c in coefficients)


class _Emitter:
    """Emits ops in place of one, for rows of one format."""

    __slots__ = (
        "absolute", "coarse", "constants", "format", "head", "legal", "location", "most", "ops", "slow_underflow")

    def __init__(self, legal: frozenset[str], slow_underflow: bool) -> None:
        self.legal = legal
        self.slow_underflow = slow_underflow
        self.ops: list[Op] = []
        self.head: list[Op] = []
        self.constants: dict[tuple[bytes, RowType], Value] = {}
        self.format = _FORMATS[ROW_F32]
        self.location: Location | None = None
        self.most = math.inf
        """What the operand at hand is known not to be above."""
        self.coarse = False
        """Whether few bits of the result at hand count."""
        self.absolute = False
        """Whether it is added to a number of 1 or more alone."""

    # Building blocks.

    def emit(self, name: str, operands: list[Value], type: RowType, **attributes: object) -> Value:
        op = Op(name, operands, (type,), attributes, None, self.location)
        self.ops.append(op)
        return op.results[0]

    def row(self, name: str, *operands: Value) -> Value:
        """A row op of the format, expanded in its turn if the target lacks it."""
        if name in EXPANDABLE and not _has(self.legal, name, self.format.row):
            return _EXPANSIONS[name](self, *operands)
        return self.emit(name, list(operands), self.format.row)

    def constant(self, value: float) -> Value:
        return self.pooled(float(value), struct.pack("<d", value), self.format.row)

    def bits_constant(self, value: int) -> Value:
        return self.pooled(value, value.to_bytes(9, "little", signed=True), self.format.bits_row)

    def pooled(self, value: float | int, key: bytes, type: RowType) -> Value:
        found = self.constants.get((key, type))
        if found is None:
            op = Op("splat_const", [], (type,), {"value": value})
            self.head.append(op)
            found = self.constants[(key, type)] = op.results[0]
        return found

    def add(self, a: Value, b: Value) -> Value:
        return self.emit("add", [a, b], self.format.row)

    def sub(self, a: Value, b: Value) -> Value:
        return self.emit("sub", [a, b], self.format.row)

    def mul(self, a: Value, b: Value) -> Value:
        return self.emit("mul", [a, b], self.format.row)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self.emit("fma", [a, b, c], self.format.row)

    @property
    def flushes(self) -> bool:
        """Whether `power` takes powers of two for 0 that make a product round to 0: then no lower limit is needed."""
        return self.slow_underflow and "scale_exponent" in self.legal

    @property
    def exp_low(self) -> float:
        """A lower limit for exp, where the result is 0: by rounding, or as a power made by shifts is 0 there."""
        rounds = "scale_exponent" in self.legal or self.approximates
        return self.format.exp_low if rounds else self.format.exp_zero

    def limited(self, x: Value, low: float, high: float) -> Value:
        """x brought into a range; NaN goes through, as min and max give their second operand for it."""
        if not self.flushes:
            x = self.row("max", self.constant(low), x)
        return x if self.most <= high else self.row("min", self.constant(high), x)

    def to_bits(self, a: Value) -> Value:
        return self.emit("bitcast", [a], self.format.bits_row)

    def from_bits(self, a: Value) -> Value:
        return self.emit("bitcast", [a], self.format.row)

    def bits(self, name: str, a: Value, b: Value) -> Value:
        return self.emit(name, [a, b], self.format.bits_row)

    def shift(self, name: str, a: Value, amount: int) -> Value:
        return self.emit(name, [a], self.format.bits_row, amount=amount)

    def compare(self, cond: str, a: Value, b: Value) -> Value:
        op = Op("cmp", [a, b], (MASK,), {"cond": cond}, None, self.location)
        self.ops.append(op)
        return op.results[0]

    def select(self, mask: Value, a: Value, b: Value) -> Value:
        return self.emit("select", [mask, a, b], self.format.row)

    def polynomial(self, x: Value, coefficients: tuple[float, ...]) -> Value:
        """sum(c[k] * x**k), by Horner's rule."""
        value = self.constant(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            value = self.fma(value, x, self.constant(c))
        return value

    def split_polynomial(self, x: Value, coefficients: tuple[float, ...]) -> Value:
        """The same by two chains in x**2, of the even powers and the odd ones: an op more, in hardly more than half the
        time from x to the result."""
        square = self.mul(x, x)
        return self.fma(self.polynomial(square, coefficients[1::2]), x, self.polynomial(square, coefficients[::2]))

    def copy_sign(self, magnitude: Value, sign: Value) -> Value:
        """A magnitude >= +0 (or NaN) with the sign of another value."""
        if self.format.is_f32 and "copy_sign" in self.legal:
            return self.emit("copy_sign", [magnitude, sign], self.format.row)
        bit = self.bits("and", self.to_bits(sign), self.bits_constant(self.format.sign_bit))
        return self.from_bits(self.bits("or", self.to_bits(magnitude), bit))

    def negative(self, a: Value) -> Value:
        """-|a|, in one instruction."""
        return self.from_bits(self.bits("or", self.to_bits(a), self.bits_constant(self.format.sign_bit)))

    def rounded(self, x: Value, factor: float, offset: int) -> tuple[Value, Value]:
        """n, which is x times a factor, rounded to an integer; and a float whose low bits hold n + offset."""
        magic = self.constant(self.format.magic + offset)
        places = self.add(x, magic) if factor == 1.0 else self.fma(x, self.constant(factor), magic)
        return self.sub(places, magic), places

    def to_exponent(self, places: Value) -> Value:
        """2**n of a float whose low bits hold n + bias."""
        return self.from_bits(self.shift("shl", self.to_bits(places), self.format.mantissa_bits))

    @property
    def makes_powers(self) -> bool:
        """Whether f32 powers of two are made by shifts: no instruction scales by one or raises to one."""
        return self.format.is_f32 and "scale_exponent" not in self.legal and not self.approximates

    def power(self, a: Value, n: Value) -> Value:
        """a 2**floor(n) by `scale_exponent`, where that is no more than 3/2 2**n. Where an underflow takes long, what
        would be rounded to 0 is 0 without one."""
        least = [self.constant(self.format.zero_power + 1)] if self.flushes else []
        return self.emit("scale_exponent", [a, n, *least], self.format.row)

    def split_exponent(self, x: Value, factor: float, most: float) -> tuple[Value, float, Callable[[Value], Value]]:
        """n, which is x times a factor, rounded to an integer, |n| < 2 * bias; a power of two s; and what multiplies s
        times a number from 1/2 to 3/2 by 2**n / s, rounding once. most: what x is known not to be above.

        Without `scale_exponent` 2**n is two powers that are normal numbers, of which only the second can round or
        overflow. They have half of n each; of n that are not above 0 one has it all. What is left of n, s, is a
        constant that the coefficients of a polynomial take in, and is such that the powers are 0 where the product
        would round to 0: underflows take long on many processors, also those to 0.
        """
        f = self.format
        if "scale_exponent" in self.legal:
            n = self.row("round", x if factor == 1.0 else self.mul(x, self.constant(factor)))
            return n, 1.0, lambda a: self.power(a, n)
        if most <= 0:
            n, places = self.rounded(x, factor, -f.zero_power)
            whole = self.to_exponent(places)
            return n, 2.0 ** (f.bias + f.zero_power), lambda a: self.mul(a, whole)
        n, places = self.rounded(x, factor, 1 - f.zero_power)
        both = self.shift("shl", self.to_bits(places), f.mantissa_bits)
        halved = self.shift("shl", self.to_bits(places), f.mantissa_bits - 1)
        exponent = self.bits("and", halved, self.bits_constant(-1 << f.mantissa_bits))
        first, second = self.from_bits(exponent), self.from_bits(self.bits("sub", both, exponent))
        return n, 2.0 ** (2 * f.bias + f.zero_power - 1), lambda a: self.mul(self.mul(a, first), second)

    def reduced(self, x: Value, n: Value) -> Value:
        """x - n ln 2, small."""
        high, low = _LN2_PARTS[self.format.row]
        return self.fma(n, self.constant(-low), self.fma(n, self.constant(-high), x))

    def scaled_by_constant(self, x: Value, highest: int = 1) -> tuple[Value, float] | None:
        """a and c if x is a c, c a constant above 0 whose powers up to the highest are not beyond the formats' middle
        half."""
        op = x.op
        if op is None or op.name != "mul":
            return None
        for a, c in (op.operands, op.operands[::-1]):
            factor = c.op.attributes["value"] if c.op is not None and c.op.name == "splat_const" else 0.0
            if 2.0 ** (-63 / highest) < factor < 2.0 ** (63 / highest):
                return a, factor
        return None

    def lookup(self, places: Value, table: tuple[float, ...]) -> Value:
        """table[i mod 16], i the integers in the low bits of a float."""
        return self.emit("lookup", [self.to_bits(places)], self.format.row, table=table)

    @property
    def is_short(self) -> bool:
        """Whether the short forms serve, for results of which few bits count."""
        return self.coarse and self.format.is_f32 and {"fraction", "scale_exponent"} <= self.legal

    def exp2_short(self, x: Value, scale: float) -> Value:
        """2**x times a power of two, for any x: a polynomial of what lies above the next integer below. Infinities have
        the fraction 0, and their powers of two are right."""
        power = self.polynomial(self.emit("fraction", [x], self.format.row, down=True),
                                times(scale, polynomials.EXP2_SHORT_F32))
        return self.emit("scale_exponent", [power, x], self.format.row)

    @property
    def approximates(self) -> bool:
        """Whether powers of two and quotients of 1 are instructions, which give f32 but for its last bits."""
        return self.format.is_f32 and {"exp2.f32", "reciprocal"} <= self.legal

    def reciprocal(self, x: Value) -> Value:
        return self.emit("reciprocal", [x], self.format.row)

    def exp_by_exp2(self, x: Value, most: float) -> Value:
        """e**x for exp_low <= x <= exp_high or NaN, as 2**y e**r, where y is x / ln 2 rounded, and r = x - y ln 2 so
        small that e**r is 1 + r. most: what x is known not to be above. Where 2**y may be infinite, it is multiplied by
        that: added, the product with r would be NaN."""
        y = self.mul(x, self.constant(1 / math.log(2)))
        r, power = self.reduced(x, y), self.row("exp2", y)
        if most <= 0:
            return self.fma(power, r, power)
        return self.mul(power, self.add(r, self.constant(1.0)))

    @property
    def has_tables(self) -> bool:
        return self.format.is_f32 and {"lookup", "scale_exponent"} <= self.legal

    def split_by_table(self, x: Value) -> tuple[Value, Value, Value]:
        """x = n ln 2 + r for x as in exp_reduced, n a multiple of 1/16: n, a float whose low bits say which, and r. n
        has 12 bits, so its product with the first part of ln 2 may have more than 24, but fma forms it exactly, and the
        difference is exact."""
        magic = self.constant(self.format.magic / 16)
        places = self.fma(x, self.constant(1 / math.log(2)), magic)
        n = self.sub(places, magic)
        return n, places, self.reduced(x, n)

    def exp_by_table(self, x: Value) -> Value:
        """e**x for x as in exp_reduced: the fraction of n is a place in a table (Tang, "Table-driven implementation of
        the exponential function", 1989), and r is so small that two coefficients are enough."""
        n, places, r = self.split_by_table(x)
        power = self.lookup(places, *polynomials.EXP2_TABLE_F32)
        expm1 = self.fma(self.mul(r, r), self.polynomial(r, polynomials.EXPM1_TABLE_F32), r)
        return self.power(self.fma(power, expm1, power), n)

    def exp_reduced(self, x: Value, most: float) -> Value:
        """e**x for exp_low <= x <= exp_high or NaN, and below that where `flushes`. most: what x is known not to be
        above."""
        if self.has_tables:
            return self.exp_by_table(x)
        n, scale, scaled = self.split_exponent(x, 1 / math.log(2), most)
        return scaled(self.polynomial(self.reduced(x, n), times(scale, (1.0, 1.0, *self.format.expm1))))

    def split_log(self, x: Value) -> tuple[Value, Value]:
        """e and f with x = 2**e * (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), for 0 < x < infinity."""
        f = self.format
        scale = 2.0 ** (f.mantissa_bits + 1)
        tiny = self.compare("lt", x, self.constant(f.least_normal))
        bits = self.to_bits(self.select(tiny, self.mul(x, self.constant(scale)), x))
        one = struct.unpack("<i", struct.pack("<f", 1.0))[0] if f.is_f32 else 0x3FF0000000000000
        root = struct.unpack("<i", struct.pack("<f", math.sqrt(0.5)))[0] if f.is_f32 else 0x3FE6A09E00000000
        moved = self.bits("add", bits, self.bits_constant(one - root))  # now the exponent changes at sqrt(1/2)
        fraction = self.bits("and", moved, self.bits_constant((1 << f.mantissa_bits) - 1))
        m = self.from_bits(self.bits("add", fraction, self.bits_constant(root)))
        # e + bias, set into the low bits of 2**mantissa_bits, is a float without a conversion
        biased = self.shift("shr", moved, f.mantissa_bits)
        large = (f.bias + f.mantissa_bits) << f.mantissa_bits
        e = self.from_bits(self.bits("or", biased, self.bits_constant(large)))
        shift = 2.0**f.mantissa_bits + f.bias
        e = self.sub(e, self.select(tiny, self.constant(shift + f.mantissa_bits + 1), self.constant(shift)))
        return e, self.sub(m, self.constant(1.0))

    def finish_log(self, x: Value, result: Value) -> Value:
        """The result for 0 < x < infinity; elsewhere -infinity at 0, NaN below, infinity at infinity."""
        at_zero = self.select(self.compare("eq", x, self.constant(0.0)), self.constant(-math.inf),
                              self.constant(math.nan))
        result = self.select(self.compare("gt", x, self.constant(0.0)), result, at_zero)
        return self.select(self.compare("eq", x, self.constant(math.inf)), x, result)

    def log1p_f64(self, f: Value, extra: Value | None) -> Value:
        """log(1 + f) + extra for f64: 2 s + s z q(z) with s = f / (2 + f), arranged so that f itself is exact.

        2 s = f - s f, and s f = h - s h with h = f**2 / 2, so log(1 + f) = f - (h - s (h + z q(z))) (the way of Sun's
        fdlibm, e_log.c).
        """
        s = self.emit("div", [f, self.add(f, self.constant(2.0))], self.format.row)
        z = self.mul(s, s)
        tail = self.mul(z, self.polynomial(z, polynomials.LOG_F64))
        h = self.mul(self.mul(f, f), self.constant(0.5))
        inner = self.mul(s, self.add(h, tail))
        if extra is not None:
            inner = self.add(inner, extra)
        return self.sub(f, self.sub(h, inner))


# One function for each op. Each ends in an op of its own, whose result takes the place of the old one.


def _exp(e: _Emitter, x: Value) -> Value:
    f = e.format
    if e.is_short:
        return e.exp2_short(e.mul(x, e.constant(1 / math.log(2))), 1.0)
    if e.approximates:
        if e.coarse:
            return e.row("exp2", e.mul(x, e.constant(1 / math.log(2))))
        return e.exp_by_exp2(e.limited(x, f.exp_low, f.exp_high), e.most)
    if e.coarse and e.makes_powers:
        x = e.limited(x, e.exp_low, f.exp_high)
        n, scale, scaled = e.split_exponent(x, 1 / math.log(2), e.most)
        r = e.fma(x, e.constant(1 / math.log(2)), e.emit("neg", [n], f.row))
        return scaled(e.polynomial(r, times(scale, polynomials.EXP2_NEAREST_F32)))
    return e.exp_reduced(e.limited(x, e.exp_low, f.exp_high), e.most)


def _exp2(e: _Emitter, x: Value) -> Value:
    f = e.format
    if f.is_f32 and {"fraction", "scale_exponent"} <= e.legal:
        # No limits are needed: infinities have the fraction 0, and their powers of two are right.
        power = e.polynomial(e.emit("fraction", [x], f.row), (1.0, *f.exp2))
        return e.emit("scale_exponent", [power, e.row("round", x)], f.row)
    x = e.limited(x, f.exp2_low, f.exp2_high)
    n, scale, scaled = e.split_exponent(x, 1.0, e.most)
    return scaled(e.polynomial(e.sub(x, n), times(scale, (1.0, *f.exp2))))


def _log(e: _Emitter, x: Value) -> Value:
    exponent, f = e.split_log(x)
    high, low = _LN2_PARTS[e.format.row]
    extra = e.mul(exponent, e.constant(low))
    if e.format.is_f32:
        small = e.fma(e.mul(f, f), e.polynomial(f, polynomials.LOG_F32), extra)
        result = e.fma(exponent, e.constant(high), e.add(f, small))
    else:
        result = e.fma(exponent, e.constant(high), e.log1p_f64(f, extra))
    return e.finish_log(x, result)


def _log2(e: _Emitter, x: Value) -> Value:
    exponent, f = e.split_log(x)
    if e.format.is_f32:
        result = e.fma(f, e.polynomial(f, polynomials.LOG2_F32), f)
    else:
        natural = e.log1p_f64(f, None)
        high, low = polynomials.LOG2E_F64
        result = e.fma(natural, e.constant(high), e.mul(natural, e.constant(low)))
    return e.finish_log(x, e.add(exponent, result))


def _tanh(e: _Emitter, x: Value) -> Value:
    """m / (m + 2) with m = e**(2 |x|) - 1, whose relative error is small at 0 too; with the sign of x.

    Short, where only the absolute error counts: 1 - 2 / (1 + e**(2 x)).
    """
    f = e.format
    if e.coarse and e.approximates:
        power = e.row("exp2", e.mul(x, e.constant(2 / math.log(2))))
        return e.fma(e.reciprocal(e.add(power, e.constant(1.0))), e.constant(-2.0), e.constant(1.0))
    magnitude = e.row("min", e.constant(f.tanh_limit), e.emit("abs", [x], f.row))  # beyond it the result is 1
    doubled = e.add(magnitude, magnitude)
    n, places = e.rounded(doubled, 1 / math.log(2), f.bias)
    r, power = e.reduced(doubled, n), e.to_exponent(places)
    expm1 = e.fma(e.mul(r, r), e.polynomial(r, f.expm1), r)
    m = e.fma(power, expm1, e.sub(power, e.constant(1.0)))
    below = e.add(m, e.constant(2.0))
    return e.copy_sign(e.mul(m, e.reciprocal(below)) if e.approximates else e.emit("div", [m, below], f.row), x)


def _sigmoid(e: _Emitter, x: Value) -> Value:
    """s / (s + s e**-x), where s is a power of two so small that e**-x does not overflow before the quotient does
    underflow, which it does gradually, and not so small that what is left of s e**-x could matter."""
    f = e.format
    if e.approximates:
        # e**-x is infinite where the quotient is below the normal numbers.
        z = e.row("exp2", e.mul(x, e.constant(-1 / math.log(2)))) if e.coarse else \
            e.exp_by_exp2(e.limited(e.emit("neg", [x], f.row), f.exp_low, f.exp_high), math.inf)
        return e.reciprocal(e.add(z, e.constant(1.0)))
    shift = f.mantissa_bits + 1
    scale = e.constant(2.0**-shift)
    if e.is_short:
        z = e.exp2_short(e.mul(x, e.constant(-1 / math.log(2))), 2.0**-shift)
        return e.emit("div", [scale, e.add(z, scale)], f.row)
    # Below, s 2**n is infinite and the quotient 0; above, e**-x has not counted for long, and s 2**n is normal.
    low, high = f.sigmoid_limits
    x = e.row("max", e.constant(low), e.row("min", e.constant(high), x))
    below = _sum_by_table(e, x, shift) if e.has_tables else e.add(_scaled_power(e, x, shift), scale)
    return e.emit("div", [scale, below], f.row)


def _sum_by_table(e: _Emitter, x: Value, shift: int) -> Value:
    """2**-shift (1 + e**-x) as a + (a b + 2**-shift), where a (1 + b) is e**-x 2**-shift: what is rounded first counts
    less. 1 + b is e**r and a 32nd more, so that b is above 0, as infinity times it must not be negative."""
    n, places, r = e.split_by_table(e.emit("neg", [x], e.format.row))
    more = 1 + 2.0**-5
    power = e.lookup(places, tuple(2.0 ** (j / 16 - shift) / more for j in range(16)))
    a = e.emit("scale_exponent", [power, n], e.format.row)
    b = e.polynomial(r, (more - 1, *times(more, (1.0, *polynomials.EXPM1_TABLE_F32))))
    return e.add(a, e.fma(a, b, e.constant(2.0**-shift)))


def _scaled_power(e: _Emitter, x: Value, shift: int) -> Value:
    """2**-shift e**-x, where that is a normal number, or infinite, as n, -x / ln 2 rounded, says."""
    f = e.format
    scales = "scale_exponent" in e.legal
    if scales:
        n = e.row("round", e.mul(x, e.constant(-1 / math.log(2))))
    else:
        n, places = e.rounded(x, -1 / math.log(2), f.bias - shift)
    if e.coarse and e.makes_powers:
        r = e.fma(x, e.constant(-1 / math.log(2)), e.emit("neg", [n], f.row))
        coefficients = polynomials.EXP2_NEAREST_F32
    else:
        high, low = _LN2_PARTS[f.row]
        r = e.fma(n, e.constant(low), e.fma(n, e.constant(high), x))     # of -x what is left is -r
        coefficients = tuple(c * (-1) ** k for k, c in enumerate((1.0, 1.0, *f.expm1)))
    if scales:
        return e.emit("scale_exponent", [e.polynomial(r, times(2.0**-shift, coefficients)), n], f.row)
    return e.mul(e.polynomial(r, coefficients), e.to_exponent(places))


def _erf(e: _Emitter, x: Value) -> Value:
    """x + x q(x**2) up to 1; beyond it 1 - e**(log erfc |x|), the exponent a polynomial.

    With tables: a polynomial round the nearest multiple of 1/4. The last piece ends in 1, from where on all are 1.
    """
    f = e.format
    if e.has_tables:
        magic = e.constant(f.magic / 4)
        scaled = e.scaled_by_constant(x) if e.is_short else None
        if scaled is None:
            magnitude = e.row("min", e.constant(ERF_TABLE_LIMIT), e.emit("abs", [x], f.row))
            places = e.add(magnitude, magic)
            u = e.sub(magnitude, e.sub(places, magic))
        else:
            # The product is formed twice, in multiply-adds, and what is left of it is more exact than it would be.
            x, factor = scaled
            magnitude = e.row("min", e.constant(ERF_TABLE_LIMIT / factor), e.emit("abs", [x], f.row))
            places = e.fma(magnitude, e.constant(factor), magic)
            u = e.fma(magnitude, e.constant(factor), e.emit("neg", [e.sub(places, magic)], f.row))
        tables = polynomials.ERF_SHORT_TABLE_F32 if e.is_short else polynomials.ERF_TABLE_F32
        last, *others = [e.lookup(places, table) for table in reversed(tables)]
        for coefficient in others:
            last = e.fma(last, u, coefficient)
        return e.copy_sign(last, x)
    if e.coarse and (e.makes_powers or e.approximates):
        return _erf_short(e, x)
    if e.absolute and e.makes_powers:
        return _erf_beside_one(e, x)
    z = e.mul(x, x)
    polynomial = e.split_polynomial if e.makes_powers else e.polynomial
    small = e.fma(x, polynomial(z, f.erf_small), x)
    magnitude = e.row("min", e.constant(f.erf_limit), e.emit("abs", [x], f.row))
    if e.makes_powers:
        # erfc |x| is at most erfc(1), 1/6, of a result near 1: so much less exact it may be.
        exponent = polynomial(magnitude, polynomials.ERF_TAIL_F32)
        n, places = e.rounded(exponent, 1.0, f.bias)
        power = polynomial(e.sub(exponent, n), times(-1.0, polynomials.ERF_TAIL_POWER_F32))
        large = e.fma(power, e.to_exponent(places), e.constant(1.0))
    elif e.approximates:
        large = e.sub(e.constant(1.0), e.row("exp2", polynomial(magnitude, polynomials.ERF_TAIL_F32)))
    else:
        centre, half = (f.erf_limit + f.erf_split) / 2, (f.erf_limit - f.erf_split) / 2
        u = e.fma(magnitude, e.constant(1 / half), e.constant(-centre / half))
        large = e.sub(e.constant(1.0), e.exp_reduced(e.polynomial(u, f.erf_large), 0.0))
    return e.select(e.compare("lt", magnitude, e.constant(f.erf_split)), small, e.copy_sign(large, x))


def _erf_short(e: _Emitter, x: Value) -> Value:
    """x p(x**2) / q(x**2) as far as erf is not 1 yet, where the quotient is 1, too. A factor of x is taken into the
    polynomials where a multiplication counts."""
    x, factor = (e.scaled_by_constant(x, 11) if e.makes_powers else None) or (x, 1.0)
    limit = polynomials.ERF_LIMIT_F32 / factor
    x = e.row("max", e.constant(-limit), e.row("min", e.constant(limit), x))
    z = e.mul(x, x)
    above = e.mul(x, e.polynomial(z, tuple(c * factor ** (2 * k + 1) for k, c in enumerate(polynomials.ERF_ABOVE_F32))))
    below = e.polynomial(z, tuple(c * factor ** (2 * k) for k, c in enumerate(polynomials.ERF_BELOW_F32)))
    return e.mul(above, e.reciprocal(below)) if e.approximates else e.emit("div", [above, below], e.format.row)


def _erf_beside_one(e: _Emitter, x: Value) -> Value:
    """With the sign of x, 1 - erfc |x|."""
    x, factor = e.scaled_by_constant(x, 8) or (x, 1.0)
    return e.copy_sign(_less_erfc(e, e.emit("abs", [x], e.format.row), factor, 1.0), x)


def _product_with_erf(e: _Emitter, x: Value, factor: float, times_x: float) -> Value:
    """g (1 + erf y) of two multiples of x, g = times_x x and y = factor x: both have its sign, so this is
    g + |g| (1 - erfc |y|), and no sign is set."""
    magnitude = e.emit("abs", [x], e.format.row)
    g = x if times_x == 1.0 else e.mul(x, e.constant(times_x))
    return e.fma(_less_erfc(e, magnitude, factor, times_x), magnitude, g)


def _less_erfc(e: _Emitter, magnitude: Value, factor: float, one: float) -> Value:
    """one (1 - erfc t), t = factor * magnitude, as 1 - 2**(log2 erfc t), the exponent t p(t): what that is inexact by
    is a part of erfc, which is 1 at most, and so the error is absolute."""
    t = e.row("min", e.constant(e.format.erf_limit / factor), magnitude)
    coefficients = tuple(c * factor**k for k, c in enumerate(polynomials.ERF_LOG2_F32, 1))
    square = e.mul(t, t)
    even = e.mul(square, e.polynomial(square, coefficients[1::2]))
    exponent = e.fma(e.polynomial(square, coefficients[::2]), t, even)
    if "round" in e.legal:
        # Rounded apart from the float whose low bits hold it n is there an addition earlier. Ties go the same way in
        # both, as what n has added to it there is even.
        places = e.add(exponent, e.constant(e.format.magic + e.format.bias - 1))
        n = e.row("round", exponent)
    else:
        n, places = e.rounded(exponent, 1.0, e.format.bias - 1)
    power = e.polynomial(e.sub(exponent, n), times(-2.0 * one, (1.0, *polynomials.ERF_LOG2_POWER_F32)))
    return e.fma(power, e.to_exponent(places), e.constant(one))


def _turn(e: _Emitter, x: Value, quarters: int) -> Value:
    """sin(x + quarters * pi / 2)."""
    f = e.format
    magic = e.constant(f.magic)
    t = e.fma(x, e.constant(2 / math.pi), magic)  # the low bits hold the number of quarter turns
    q = e.sub(t, magic)
    r = x
    for part in _HALF_PI_PARTS[f.row]:
        r = e.fma(q, e.constant(-part), r)
    z = e.mul(r, r)
    sine = e.fma(e.mul(r, z), e.polynomial(z, f.sin), r)
    cosine = e.fma(e.mul(z, z), e.polynomial(z, f.cos), e.fma(z, e.constant(-0.5), e.constant(1.0)))
    turns = e.to_bits(t)
    if quarters:
        turns = e.bits("add", turns, e.bits_constant(quarters))
    odd = e.compare("ne", e.bits("and", turns, e.bits_constant(1)), e.bits_constant(0))
    half_turns = e.bits("and", e.shift("shl", turns, f.row.dtype.bits - 2), e.bits_constant(f.sign_bit))
    return e.from_bits(e.bits("xor", e.to_bits(e.select(odd, cosine, sine)), half_turns))


def _sin(e: _Emitter, x: Value) -> Value:
    return _turn(e, x, 0)


def _cos(e: _Emitter, x: Value) -> Value:
    return _turn(e, x, 1)


def _rsqrt(e: _Emitter, x: Value) -> Value:
    return e.emit("div", [e.constant(1.0), e.emit("sqrt", [x], e.format.row)], e.format.row)


def _scale_exponent(e: _Emitter, a: Value, n: Value) -> Value:
    """Three products by powers of two that are normal numbers, the one nearest n last, so that only it rounds.

    floor(n) = last + middle + first, each as large as the exponent allows: where `first` or `middle` is below 0 the
    last factor is the least of all, and anything that rounds before it becomes 0 in it anyhow.
    """
    f = e.format
    low, high = e.constant(1.0 - f.bias), e.constant(float(f.bias))
    limit = 3.0 * (f.bias - 1)  # past the distance from the least denormal number to the greatest one
    rest = e.row("floor", n)
    rest = e.row("min", e.constant(limit), e.row("max", e.constant(-limit), rest))
    powers = []
    for position in range(3):
        part = e.row("min", high, e.row("max", low, rest))
        powers.append(e.to_exponent(e.add(part, e.constant(f.magic + f.bias))))
        if position < 2:
            rest = e.sub(rest, part)
    product = e.mul(a, powers[2])
    product = e.mul(e.mul(product, powers[1]), powers[0])
    # an infinite n is not a large finite one for a = 0 and a = infinity, and NaN has no power: n * 0 is NaN for these
    wrong = e.mul(n, e.constant(0.0))
    infinite = e.mul(a, e.select(e.compare("gt", n, e.constant(0.0)), n, wrong))
    below = e.mul(a, e.constant(0.0))
    infinite = e.select(e.compare("eq", n, e.constant(-math.inf)), below, infinite)
    return e.select(e.compare("eq", wrong, e.constant(0.0)), product, infinite)


def _round_with(finish: Callable[[_Emitter, Value, Value], Value]) -> Callable[[_Emitter, Value], Value]:
    """|x| + 2**mantissa_bits - 2**mantissa_bits is |x| rounded to an integer, ties to even; larger |x| are integers."""

    def expand(e: _Emitter, x: Value) -> Value:
        f = e.format
        large = e.constant(2.0**f.mantissa_bits)
        magnitude = e.emit("abs", [x], f.row)
        rounded = e.sub(e.add(magnitude, large), large)
        return e.select(e.compare("lt", magnitude, large), finish(e, x, rounded), x)

    return expand


def _finish_round(e: _Emitter, x: Value, rounded: Value) -> Value:
    return e.copy_sign(rounded, x)


def _finish_trunc(e: _Emitter, x: Value, rounded: Value) -> Value:
    over = e.compare("gt", rounded, e.emit("abs", [x], e.format.row))
    return e.copy_sign(e.select(over, e.sub(rounded, e.constant(1.0)), rounded), x)


def _finish_floor(e: _Emitter, x: Value, rounded: Value) -> Value:
    signed = e.copy_sign(rounded, x)
    return e.select(e.compare("gt", signed, x), e.sub(signed, e.constant(1.0)), signed)


def _finish_ceil(e: _Emitter, x: Value, rounded: Value) -> Value:
    signed = e.copy_sign(rounded, x)
    up = e.select(e.compare("lt", signed, x), e.add(signed, e.constant(1.0)), signed)
    return e.copy_sign(e.emit("abs", [up], e.format.row), x)  # -0 for -1 < x <= -0


_EXPANSIONS: dict[str, Callable[..., Value]] = {
    "exp": _exp, "exp2": _exp2, "log": _log, "log2": _log2, "tanh": _tanh, "sigmoid": _sigmoid, "erf": _erf,
    "sin": _sin, "cos": _cos, "rsqrt": _rsqrt, "scale_exponent": _scale_exponent,
    "round": _round_with(_finish_round), "floor": _round_with(_finish_floor), "ceil": _round_with(_finish_ceil),
    "trunc": _round_with(_finish_trunc), PRODUCT: _product_with_erf,
}


def _has(legal: frozenset[str], name: str, row: Type) -> bool:
    assert isinstance(row, RowType)
    return name in legal or f"{name}.{row.dtype.name}" in legal


def expand_math(function: Function, legal: frozenset[str], slow_underflow: bool = False) -> int:
    """Expand, in place, every op of EXPANDABLE that is not in `legal`; how many there were.

    legal: names of the lane ops that the target has instructions for, those for one type only as `exp2.f32`. Where
    `lookup` is one, small integers become floats by it (tables.py). `lookup_by_halves`: that is one, of several
    instructions. slow_underflow: a result below the normal numbers takes long; that of minus infinity then has none on
    its way to 0, as it stands for what is masked.
    """
    if "lookup" in legal:
        use_tables(function)
        tabulate(function, LEAST_OPS)
    elif "lookup_by_halves" in legal:
        tabulate(function, LEAST_OPS_BY_HALVES)
    emitter = _Emitter(legal, slow_underflow)
    wanted = EXPANDABLE - legal
    if emitter.makes_powers and "erf" in wanted:
        _join_products(function.body, emitter, function.count_uses())
    count = _expand_block(function.body, wanted | {PRODUCT}, emitter, legal) if wanted else 0
    if emitter.head:
        function.body.ops[:0] = emitter.head
    return count


def _join_products(block: Block, emitter: _Emitter, uses: Counter[Value]) -> None:
    """g (1 + erf y) becomes one op, where g and y are multiples of one value and nothing else reads what is between."""
    erfs = {op.results[0] for op in block.ops if op.attributes.get("absolute") and uses[op.results[0]] == 1}
    if erfs:
        ops: list[Op] = []
        gone: set[Op] = set()
        for op in block.ops:
            found = _product_of(op, erfs, emitter, uses) if op.name in ("mul", "fma") else None
            if found is None:
                ops.append(op)
                continue
            (x, *factors), total, erf = found
            gone |= {total, erf}
            ops.append(Op(PRODUCT, [x], (op.results[0].type,), {"factors": factors}, None, op.location))
            result = op.results[0]
            if op.name == "fma":
                ops.append(Op("add", [ops[-1].results[0], op.operands[2]], (result.type,), {}, None, op.location))
            ops[-1].results[0] = result
            result.move_to(ops[-1])
        block.ops = [op for op in ops if op not in gone]
    for op in block.ops:
        for inner in op.blocks:
            _join_products(inner, emitter, uses)


def _product_of(op: Op, erfs: set[Value], emitter: _Emitter,
                uses: Counter[Value]) -> tuple[tuple[Value, float, float], Op, Op] | None:
    """x and the factors that make y and g of it, the sum, and erf y."""
    for total, g in (op.operands[:2], op.operands[1::-1]):
        if total.op is None or total.op.name != "add" or uses[total] != 1:
            continue
        for one, f in (total.op.operands, total.op.operands[::-1]):
            if f in erfs and f.op is not None and one.op is not None and one.op.name == "splat_const" and (
                    one.op.attributes["value"] == 1.0):
                y = f.op.operands[0]
                (x, factor), (other, times_x) = (emitter.scaled_by_constant(v, 8) or (v, 1.0) for v in (y, g))
                if x is other:
                    return (x, factor, times_x), total.op, f.op
    return None


def _expand_block(block: Block, wanted: frozenset[str], emitter: _Emitter, legal: frozenset[str]) -> int:
    count = 0
    if not wanted.isdisjoint([op.name for op in block.ops]):
        ops: list[Op] = []
        for op in block.ops:
            if op.name not in wanted or _has(legal, op.name, op.results[0].type):
                ops.append(op)
                continue
            old = op.results[0]
            assert isinstance(old.type, RowType)
            emitter.format = _FORMATS[old.type]
            emitter.location = op.location
            emitter.ops = ops
            emitter.most = op.attributes.get("most", math.inf)
            emitter.coarse = bool(op.attributes.get("coarse"))
            emitter.absolute = bool(op.attributes.get("absolute"))
            new = _EXPANSIONS[op.name](emitter, *op.operands, *op.attributes.get("factors", ()))
            last = new.op
            assert last is ops[-1] and last is not None
            last.results[0] = old  # the value stays, so nothing that uses it has to change
            old.move_to(last)
            count += 1
        block.ops = ops
    for op in block.ops:
        for inner in op.blocks:
            count += _expand_block(inner, wanted, emitter, legal)
    return count
