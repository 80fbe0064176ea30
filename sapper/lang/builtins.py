"""The functions of the language.

The compiler knows them by identity when it reads a kernel's source; when a kernel's Python runs under the reference
interpreter they call the method of the same name of the current context (sapper/lang/context.py). Elsewhere
they raise RuntimeError.
"""

from __future__ import annotations

import builtins as python
from collections.abc import Iterable
from typing import Any

from . import context
from .bindings import near


def _call(name: str, *arguments: Any, **keywords: Any) -> Any:
    running = context.current()
    if running is None:
        own = f"; mend: for Python's own, `from builtins import {name}` below `from sapper import *`" if hasattr(
            python, name) else ""
        raise RuntimeError(
            f"{name}() was called outside a kernel; it has a meaning only in a function decorated with "
            f"@sapper.kernel, or in one that such a function calls{own}"
        )
    return getattr(running, name)(*arguments, **keywords)


# Loops, ranges and axes.

def tiles(*extents: Any) -> Any:
    """`for m, n in tiles(M, N):` walks the extents tile by tile; each loop variable is an axis.

    An extent is a Dim, an int, an integer scalar, or a span. The size of a tile is the schedule's.
    """
    return _call("tiles", *extents)


def each(*extents: Any, disjoint: bool = False) -> Any:
    """`for b in each(B):` walks the extents one index at a time; each loop variable is an index scalar.

    disjoint=True asserts that no iteration touches what another writes, where that can't be proved: the loop runs in
    parallel. `sapper check` and the interpreter test it.
    """
    return _call("each", *extents, disjoint=disjoint)


def whole(extent: Any) -> Any:
    """`n = whole(N)` brings an axis that is taken as one tile, to the end of the block."""
    return _call("whole", extent)


def span(start: Any, stop: Any) -> Any:
    """A range from start up to, but without, stop; both may be scalars known only at run time."""
    return _call("span", start, stop)


# Tiles from nothing.

def zeros(*axes: Any, dtype: Any) -> Any:
    """A tile of zeros that spans the axes."""
    return _call("zeros", *axes, dtype=dtype)


def full(*axes: Any, value: Any, dtype: Any = None) -> Any:
    """A tile that spans the axes and holds value everywhere; dtype may be left out if value has one."""
    return _call("full", *axes, value=value, dtype=dtype)


# Elementwise.

def where(condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, else b."""
    return _call("where", condition, a, b)


def maximum(a: Any, b: Any) -> Any:
    """a if a > b else b, elementwise."""
    return _call("maximum", a, b)


def minimum(a: Any, b: Any) -> Any:
    """a if a < b else b, elementwise."""
    return _call("minimum", a, b)


def abs(x: Any) -> Any:
    """The absolute value."""
    return _call("abs", x)


def exp(x: Any) -> Any:
    """e to the power of x."""
    return _call("exp", x)


def exp2(x: Any) -> Any:
    """2 to the power of x."""
    return _call("exp2", x)


def log(x: Any) -> Any:
    """The natural logarithm."""
    return _call("log", x)


def log2(x: Any) -> Any:
    """The logarithm to base 2."""
    return _call("log2", x)


def sqrt(x: Any) -> Any:
    """The square root."""
    return _call("sqrt", x)


def rsqrt(x: Any) -> Any:
    """1 / sqrt(x)."""
    return _call("rsqrt", x)


def tanh(x: Any) -> Any:
    """The hyperbolic tangent."""
    return _call("tanh", x)


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return _call("sigmoid", x)


def erf(x: Any) -> Any:
    """The error function."""
    return _call("erf", x)


def sin(x: Any) -> Any:
    """The sine of x in radians."""
    return _call("sin", x)


def cos(x: Any) -> Any:
    """The cosine of x in radians."""
    return _call("cos", x)


def floor(x: Any) -> Any:
    """The largest whole number not above x, in x's dtype."""
    return _call("floor", x)


def ceil(x: Any) -> Any:
    """The smallest whole number not below x, in x's dtype."""
    return _call("ceil", x)


def round(x: Any) -> Any:
    """The nearest whole number, ties to even, in x's dtype."""
    return _call("round", x)


def asm(piece: Any, *inputs: Any, meaning: Any, tolerance: float = 0.0) -> Any:
    """One instruction, or a block, of a target on tiles: `asm(x86.vrcp14ps, t, meaning=lambda t: 1 / t)`.

    meaning: the same in the language, a function of the inputs. It is what the call means: interpreters and every
    target that lacks the piece compute it. inputs: tiles, or integers that the instruction takes as immediates (the
    meaning is not given those). tolerance: the relative error that the piece may have.
    """
    return _call("asm", piece, *inputs, meaning=meaning, tolerance=tolerance)


# Reductions.

def sum(x: Any, *, over: Any) -> Any:
    """The sum over an axis or a tuple of axes; the dtype stays (bf16 and f16 are summed in f32 and rounded once)."""
    return _call("sum", x, over=over)


def max(*values: Any, over: Any = None) -> Any:
    """max(t, over=n) over an axis or a tuple of axes; max(a, b) is maximum."""
    return _call("max", *values, over=over)


def min(*values: Any, over: Any = None) -> Any:
    """min(t, over=n) over an axis or a tuple of axes; min(a, b) is minimum."""
    return _call("min", *values, over=over)


def argmax(x: Any, *, over: Any) -> Any:
    """The coordinate (dtype index) of the largest element along one axis, the lowest one on ties."""
    return _call("argmax", x, over=over)


def argmin(x: Any, *, over: Any) -> Any:
    """The coordinate (dtype index) of the smallest element along one axis, the lowest one on ties."""
    return _call("argmin", x, over=over)


def cumsum(x: Any, *, over: Any) -> Any:
    """Along an axis of `whole`, the sum of each element and all before it; the dtype stays."""
    return _call("cumsum", x, over=over)


def cummax(x: Any, *, over: Any) -> Any:
    """Along an axis of `whole`, the largest of each element and all before it."""
    return _call("cummax", x, over=over)


def cummin(x: Any, *, over: Any) -> Any:
    """Along an axis of `whole`, the smallest of each element and all before it."""
    return _call("cummin", x, over=over)


def topk(x: Any, k: Any, *, over: Any) -> Any:
    """values, places = topk(x, k, over=n): the largest elements along an axis of `whole`, and their coordinates.

    places: of dtype index. k: an axis of `whole`, from 0; it takes the place of n, and says how many.
    Falling, the lower coordinate first on ties. NaN takes no part; a place that no element above the lowest value
    fills has that value, and n's first coordinate.
    """
    return _call("topk", x, k, over=over)


UNARY_NAMES = ("abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "tanh", "sigmoid", "erf", "sin", "cos",
               "floor", "ceil", "round")
REDUCTIONS = ("sum", "max", "min", "argmax", "argmin")
NAMES = (*UNARY_NAMES, "asm", "tiles", "each", "whole", "span", "zeros", "full", "where", "maximum", "minimum",
         *REDUCTIONS, "cumsum", "cummax", "cummin", "topk")

_WALK = "walk an extent, for n in tiles(N), and index with n"
_PARTS = "write each part to its place, as out[n] and out[N + n]"
_CLAMP = "write minimum(maximum(x, low), high)"
_PRODUCT = "contract by axes of one name: a[m, k] @ b[k, n]"
_PLACES = "write out[i[n]] += value: it adds also where an element comes again"
_GATHER = "index with a tile: x[i[n], k]"
_RANDOM = "hash the coordinates and a seed, as dropout of examples/training.py does"
ELSEWHERE: dict[str, str] = {
    "all": "write min(x.to(i32), over=n) != 0", "any": "write max(x.to(i32), over=n) != 0",
    "arange": "write the axis: in arithmetic n stands for its coordinates", "argsort": "take topk(x, k, over=n)",
    "atomic_add": _PLACES, "atomic_max": _PLACES, "atomic_min": _PLACES, "bincount": _PLACES, "cat": _PARTS,
    "clamp": _CLAMP, "clip": _CLAMP, "concat": _PARTS, "concatenate": _PARTS, "cosh": "write 0.5 * (exp(x) + exp(-x))",
    "cumprod": "carry it: total = total * x[i] in a loop, for i in range(N)", "dot": _PRODUCT, "dropout": _RANDOM,
    "einsum": _PRODUCT, "embedding": _GATHER, "enumerate": _WALK, "expm1": "write exp(x) - 1.0",
    "flip": "compute the index: x[N - 1 - n]", "gather": _GATHER,
    "gelu": "write 0.5 * x * (1.0 + erf(0.70710678 * x))", "index_add": _PLACES, "index_select": _GATHER,
    "isinf": "write abs(x) == float('inf')", "isnan": "write x != x", "log1p": "write log(1.0 + x)",
    "logical_and": "write a & b", "logical_not": "write ~a", "logical_or": "write a | b",
    "logsumexp": "write top + log(sum(exp(x - top), over=n)) of top = max(x, over=n)", "matmul": _PRODUCT,
    "mean": "write sum(x, over=n) / N.to(f32)", "norm": "write sqrt(sum(x * x, over=n))",
    "ones": "write full(n, value=1, dtype=f32)", "outer": "write a[m] * b[n]",
    "pad": "write where(inside, x[minimum(maximum(i, 0), N - 1)], 0.0)",
    "permute": "write the axes in another order where the value is stored",
    "popcount": "add up the bits: v - (v >> 1 & 0x55555555), and so on by twos, fours and bytes",
    "pow": "write exp2(y * log2(x))", "power": "write exp2(y * log2(x))",
    "prod": "carry it: total = total * x[i] in a loop, for i in range(N)", "rand": _RANDOM, "randint": _RANDOM,
    "randn": _RANDOM, "relu": "write maximum(x, 0.0)", "reshape": "view the tensor: x.view(M, N // 4, 4)",
    "reversed": "walk upwards and compute the index: N - 1 - i", "roll": "compute the index: x[(n + s) % N]",
    "scatter": _PLACES, "scatter_add": _PLACES, "sign": "write where(x > 0.0, 1.0, where(x < 0.0, -1.0, 0.0))",
    "silu": "write x * sigmoid(x)", "sinh": "write 0.5 * (exp(x) - exp(-x))",
    "softmax": "write e = exp(x - max(x, over=n)), and e / sum(e, over=n)",
    "softplus": "write maximum(x, 0.0) + log(1.0 + exp(-abs(x)))", "sort": "take topk(x, k, over=n)",
    "square": "write x * x", "stack": _PARTS, "std": "write sqrt(sum(d * d, over=n) / N.to(f32)) of d = x - mean",
    "take": _GATHER, "tan": "write sin(x) / cos(x)",
    "transpose": "write the axes in another order where the value is stored",
    "tril": "write where(n <= m, x[m, n], 0.0)", "triu": "write where(n >= m, x[m, n], 0.0)",
    "trunc": "write where(x < 0.0, ceil(x), floor(x))", "var": "write sum(d * d, over=n) / N.to(f32) of d = x - mean",
    "zip": _WALK,
}
"""What functions are called elsewhere, and how a kernel says it."""


def likely(name: str, known: Iterable[str], otherwise: str) -> str:
    """How a kernel says what a name is taken to mean that there is not: a mend."""
    return ELSEWHERE.get(name) or near(name, known, otherwise)
