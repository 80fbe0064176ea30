"""Terms over bit-vectors: what a symbolic run of a piece computes, and how two of them are shown to be equal.

Enters: operations on terms. Leaves: `Term`s, each equal one the same object; their value for given inputs; the input
bits that they depend on; their form for z3. Holds: what only moves bits (shifts by constants, masks, concatenations,
parts) becomes one concatenation of parts of inputs and constants, so that two ways to move the same bits give the same
term; widths are bits, values are unsigned.

    input  (name, width)            const  value                       concat  parts, the highest first
    part   bits low .. low + width  not and or xor add sub mul         eq ult slt   one bit
    ite    condition, then, else    shl lshr ashr   by a term          call    a NumPy function that is only evaluated
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

Values = np.ndarray[Any, np.dtype[Any]]


class NotSymbolic(Exception):
    """What is asked for depends on a value that is not known, or is not a matter of bits."""


class Term:
    """One term. operator: see above. detail: of an input its name, of a constant its value, of a part its low bit, of a
    call (name, function, dtypes of the arguments, dtype of the result)."""

    __slots__ = ("arguments", "detail", "operator", "width")

    def __init__(self, operator: str, width: int, arguments: tuple[Term, ...], detail: Any) -> None:
        self.operator = operator
        self.width = width
        self.arguments = arguments
        self.detail = detail

    def __int__(self) -> int:
        raise NotSymbolic("it is stored where only known values may lie")

    def __repr__(self) -> str:
        inside = ", ".join([*map(repr, self.arguments), *([] if self.detail is None else [str(self.detail)])])
        return f"{self.operator}{self.width}({inside})"


_known: dict[tuple[Any, ...], Term] = {}


def forget() -> None:
    """Let go of all terms. Those made before are not the same objects as those made afterwards."""
    _known.clear()


def _made(operator: str, width: int, arguments: tuple[Term, ...] = (), detail: Any = None) -> Term:
    key = (operator, width, arguments, detail)
    found = _known.get(key)
    if found is None:
        found = _known[key] = Term(operator, width, arguments, detail)
    return found


def const(value: int, width: int) -> Term:
    return _made("const", width, (), value & ((1 << width) - 1))


def variable(name: str, width: int) -> Term:
    return _made("input", width, (), name)


# --- Moving bits ------------------------------------------------------------------------------------------------------

def part(a: Term, low: int, width: int) -> Term:
    """Bits low .. low + width - 1."""
    if width == a.width:
        return a
    if a.operator == "const":
        return const(a.detail >> low, width)
    if a.operator == "part":
        return part(a.arguments[0], a.detail + low, width)
    if a.operator == "concat":
        found, top = [], a.width
        for piece in a.arguments:
            bottom = top - piece.width
            first, last = max(low, bottom), min(low + width, top)
            if first < last:
                found.append(part(piece, first - bottom, last - first))
            top = bottom
        return concat(found)
    if a.operator in ("and", "or", "xor", "not") or (low == 0 and a.operator in ("add", "sub", "mul")):
        return _OPERATIONS[a.operator](*(part(x, low, width) for x in a.arguments))
    if a.operator == "ite":
        condition, then, otherwise = a.arguments
        return ite(condition, part(then, low, width), part(otherwise, low, width))
    return _made("part", width, (a,), low)


def concat(parts: Iterable[Term]) -> Term:
    """The first of the parts is the highest."""
    merged: list[Term] = []
    for piece in (inner for p in parts for inner in (p.arguments if p.operator == "concat" else (p,))):
        joined = _joined(merged[-1], piece) if merged else None
        if joined is None:
            merged.append(piece)
        else:
            merged[-1] = joined
    return merged[0] if len(merged) == 1 else _made("concat", sum(p.width for p in merged), tuple(merged))


def _joined(high: Term, low: Term) -> Term | None:
    """One term for two neighbours, where there is one."""
    width = high.width + low.width
    if high.operator == low.operator == "const":
        return const(high.detail << low.width | low.detail, width)
    if high.operator == "part":
        source, start = low.arguments[0] if low.operator == "part" else None, low.detail
        if source is high.arguments[0] and start + low.width == high.detail:
            return part(source, start, width)
    return None


def extended(a: Term, width: int, signed: bool) -> Term:
    """More bits: the sign, or zeros."""
    more = width - a.width
    if more <= 0:
        return part(a, 0, width)
    return concat([*[part(a, a.width - 1, 1)] * more, a] if signed else [const(0, more), a])


def _cuts(*terms: Term) -> list[int]:
    """Where any of the terms is cut into parts, from 0 to the width."""
    found = {0, terms[0].width}
    for a in terms:
        at = a.width
        for piece in a.arguments if a.operator == "concat" else ():
            at -= piece.width
            found.add(at)
        if a.operator == "const":  # runs of equal bits
            edges = a.detail ^ a.detail >> 1
            found |= {bit + 1 for bit in range(a.width - 1) if edges >> bit & 1}
    return sorted(found)


def _by_parts(operation: Callable[..., Term], *terms: Term) -> Term | None:
    """An operation that works on each bit by itself, on each part of what is in parts; None: it is in one."""
    cuts = _cuts(*terms)
    if len(cuts) == 2:
        return None
    return concat([operation(*(part(a, low, high - low) for a in terms))
                   for low, high in reversed(list(pairwise(cuts)))])


def _all_ones(a: Term) -> bool:
    return a.operator == "const" and bool(a.detail == (1 << a.width) - 1)


def _is_zero(a: Term) -> bool:
    return a.operator == "const" and a.detail == 0


def invert(a: Term) -> Term:
    if a.operator == "const":
        return const(~a.detail, a.width)
    if a.operator == "not":
        return a.arguments[0]
    return _by_parts(invert, a) or _made("not", a.width, (a,))


def both(a: Term, b: Term) -> Term:
    if _is_zero(a) or _all_ones(b) or a is b:
        return a
    if _is_zero(b) or _all_ones(a):
        return b
    return _by_parts(both, a, b) or _made("and", a.width, _ordered(a, b))


def either(a: Term, b: Term) -> Term:
    if _is_zero(a) or _all_ones(b) or a is b:
        return b
    if _is_zero(b) or _all_ones(a):
        return a
    return _by_parts(either, a, b) or _made("or", a.width, _ordered(a, b))


def differing(a: Term, b: Term) -> Term:
    if a is b:
        return const(0, a.width)
    if _is_zero(a) or _is_zero(b):
        return b if _is_zero(a) else a
    if _all_ones(a) or _all_ones(b):
        return invert(b if _all_ones(a) else a)
    return _by_parts(differing, a, b) or _made("xor", a.width, _ordered(a, b))


def ite(condition: Term, a: Term, b: Term) -> Term:
    if a is b:
        return a
    if condition.operator == "const":
        return a if condition.detail else b
    if condition.operator == "not":
        return ite(condition.arguments[0], b, a)
    if a.operator == b.operator == "const" and (cut := _by_parts(lambda x, y: ite(condition, x, y), a, b)) is not None:
        return cut
    if a.width == 1 and a.operator == b.operator == "const":
        return condition if a.detail else invert(condition)
    if "concat" in (a.operator, b.operator):
        cut = _by_parts(lambda x, y: ite(condition, x, y), a, b)
        if cut is not None:
            return cut
    return _made("ite", a.width, (condition, a, b))


def _ordered(a: Term, b: Term) -> tuple[Term, Term]:
    """Operands of what commutes, a constant last; a fixed order of others would need a key that costs more."""
    return (b, a) if a.operator == "const" else (a, b)


# --- Arithmetic -------------------------------------------------------------------------------------------------------

def add(a: Term, b: Term) -> Term:
    a, b = _ordered(a, b)
    if _is_zero(b):
        return a
    if a.operator == b.operator == "const":
        return const(a.detail + b.detail, a.width)
    return _made("add", a.width, (a, b))


def sub(a: Term, b: Term) -> Term:
    if _is_zero(b):
        return a
    if b.operator == "const":
        return add(a, const(-b.detail, b.width))
    return const(0, a.width) if a is b else _made("sub", a.width, (a, b))


def mul(a: Term, b: Term) -> Term:
    a, b = _ordered(a, b)
    if b.operator == "const":
        if a.operator == "const":
            return const(a.detail * b.detail, a.width)
        if b.detail == 0:
            return b
        if b.detail & (b.detail - 1) == 0:
            return shift_left(a, const(b.detail.bit_length() - 1, a.width))
    return _made("mul", a.width, (a, b))


def shift_left(a: Term, by: Term) -> Term:
    if by.operator == "const":
        n = min(by.detail, a.width)
        return a if n == 0 else concat([*([part(a, 0, a.width - n)] if n < a.width else []), const(0, n)])
    return _made("shl", a.width, (a, by))


def shift_right(a: Term, by: Term) -> Term:
    if by.operator == "const":
        n = min(by.detail, a.width)
        return a if n == 0 else concat([const(0, n), *([part(a, n, a.width - n)] if n < a.width else [])])
    return _made("lshr", a.width, (a, by))


def shift_right_signed(a: Term, by: Term) -> Term:
    if by.operator == "const":
        n = min(by.detail, a.width - 1)
        return extended(part(a, n, a.width - n), a.width, True)
    return _made("ashr", a.width, (a, by))


def equal(a: Term, b: Term) -> Term:
    if a is b or (a.operator == b.operator == "const"):
        return const(a is b, 1)
    if a.width == 1:
        return invert(differing(a, b))
    return _made("eq", 1, _ordered(a, b))


def less(a: Term, b: Term, signed: bool = False) -> Term:
    if a is b:
        return const(0, 1)
    if a.operator == b.operator == "const":
        return const(_signed(a) < _signed(b) if signed else a.detail < b.detail, 1)
    if signed and _is_zero(b):
        return part(a, a.width - 1, 1)
    return _made("slt" if signed else "ult", 1, (a, b))


def _signed(a: Term) -> int:
    return int(a.detail - (1 << a.width) if a.detail >> (a.width - 1) else a.detail)


def call(name: str, function: Callable[..., Any], sources: tuple[str, ...], result: str, *arguments: Term) -> Term:
    """function on arrays of the dtypes `sources`, giving one of `result`. name: for messages; one for each function."""
    made = _made("call", 8 * _size(result), arguments, (name, function, sources, result))
    if all(a.operator == "const" for a in arguments):
        return const(int(evaluate(made, {})[0]), made.width)
    return made


def _size(dtype: str) -> int:
    return _dtype(dtype).itemsize


@lru_cache
def _dtype(name: str) -> np.dtype[Any]:
    if name in ("bool", "?"):
        return np.dtype(bool)
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return found


_OPERATIONS: dict[str, Callable[..., Term]] = {
    "and": both, "or": either, "xor": differing, "not": invert, "add": add, "sub": sub, "mul": mul,
}


# --- What a term depends on, and its value ----------------------------------------------------------------------------

Bit = tuple[str, int]
"""A bit of an input: the input's name, the bit's number."""


def inputs_of(a: Term) -> list[Term]:
    """The inputs that a term contains, in the order in which they are met."""
    return [t for t in _post_order(a) if t.operator == "input"]


def calls_of(a: Term) -> list[str]:
    """Names of the functions that a term calls."""
    return list(dict.fromkeys(str(t.detail[0]) for t in _post_order(a) if t.operator == "call"))


def _post_order(*roots: Term) -> list[Term]:
    """All subterms, arguments first. Not by recursion: terms get deep."""
    order: list[Term] = []
    seen: set[Term] = set()
    pending = [(root, False) for root in reversed(roots)]
    while pending:
        a, done = pending.pop()
        if done:
            order.append(a)
        elif a not in seen:
            seen.add(a)
            if not a.arguments:
                order.append(a)
                continue
            pending.append((a, True))
            pending += [(x, False) for x in reversed(a.arguments) if x not in seen]
    return order


def support(root: Term) -> frozenset[Bit]:
    """The bits of inputs on which a term can depend: no other bit changes its value."""
    # For each term the bits that are wanted of it, collected from the root down.
    wanted: dict[Term, int] = {root: (1 << root.width) - 1}
    found: set[Bit] = set()
    for a in reversed(_post_order(root)):
        bits = wanted.get(a, 0)
        if a.operator == "input":
            found |= {(a.detail, bit) for bit in range(a.width) if bits >> bit & 1}
        at = a.width
        for position, x in enumerate(a.arguments):
            whole = (1 << x.width) - 1
            if a.operator == "concat":
                at -= x.width
                mine = bits >> at & whole
            elif a.operator == "part":
                mine = bits << a.detail & whole
            elif a.operator in ("and", "or", "xor", "not") or (a.operator == "ite" and position):
                mine = bits
            elif a.operator in ("add", "sub", "mul"):
                mine = (1 << bits.bit_length()) - 1  # a carry goes up
            else:
                mine = whole
            if bits:
                wanted[x] = wanted.get(x, 0) | mine
    return frozenset(found)


def evaluate(root: Term, inputs: Mapping[str, Values]) -> Values:
    """The value for arrays of input values (one element for each assignment), unsigned; Python ints above 64 bits."""
    return evaluate_all([root], inputs)[0]


def evaluate_all(roots: Sequence[Term], inputs: Mapping[str, Values]) -> list[Values]:
    """As `evaluate`, of terms that share much."""
    count = max((len(v) for v in inputs.values()), default=1)
    known: dict[Term, Values] = {}
    for a in _post_order(*roots):
        kind: Any = np.uint64 if a.width <= 64 else object
        mask = (1 << a.width) - 1
        xs = [known[x] for x in a.arguments]
        if a.operator == "const":
            value = np.full(count, a.detail, kind)
        elif a.operator == "input":
            value = np.asarray(inputs[a.detail]).astype(kind)
        elif a.operator == "call":
            _, function, sources, result = a.detail
            given = [x.astype(f"u{_size(s)}").view(_dtype(s)) for x, s in zip(xs, sources, strict=True)]
            with np.errstate(all="ignore"):
                made = np.asarray(function(*given)).astype(_dtype(result), copy=False)
            value = np.broadcast_to(made, (count,)).copy().view(f"u{_size(result)}").astype(np.uint64)
        elif a.operator == "concat":
            value = np.zeros(count, kind)
            for x, argument in zip(xs, a.arguments, strict=True):
                value = (value << kind(argument.width) if kind is np.uint64 else value << argument.width) \
                    | x.astype(kind)
        else:
            value = _computed(a, xs)
        known[a] = (value & (np.uint64(mask) if value.dtype != object else mask)).astype(kind)
    return [known[root] for root in roots]


def _computed(a: Term, xs: list[Values]) -> Values:
    if a.operator == "part":
        return xs[0] >> (np.uint64(a.detail) if xs[0].dtype != object else a.detail)
    if a.operator == "not":
        return ~xs[0]
    if a.operator == "ite":
        return np.where(xs[0] != 0, xs[1], xs[2])
    if a.operator == "eq":
        return np.asarray(xs[0] == xs[1]).astype(np.uint64)
    if a.operator in ("ult", "slt"):
        flip = 1 << (a.arguments[0].width - 1) if a.operator == "slt" else 0
        x, y = (v ^ (np.uint64(flip) if v.dtype != object else flip) for v in xs)
        return np.asarray(x < y).astype(np.uint64)
    if a.operator in ("shl", "lshr", "ashr"):
        return _shifted(a, xs)
    operation: dict[str, Callable[[Values, Values], Values]] = {
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "add": np.add, "sub": np.subtract,
        "mul": np.multiply}
    return operation[a.operator](xs[0], xs[1])


def _shifted(a: Term, xs: list[Values]) -> Values:
    width = a.width
    low = (1 << width) - 1
    x, by = (v.astype(object) for v in xs)
    top = 1 << (width - 1)
    amount = np.minimum(by, width)
    made: Values
    if a.operator == "shl":
        made = (x << amount) & low
    elif a.operator == "lshr":
        made = x >> amount
    else:
        made = (((x ^ top) - top) >> amount) & low
    return made if width > 64 else made.astype(np.uint64)


def shape_of(*roots: Term) -> tuple[Any, ...]:
    """A key that two lists of terms share where one is the other with other inputs in the same places."""
    numbers: dict[Term, int] = {}
    inputs: dict[Any, int] = {}
    lines = []
    for a in _post_order(*roots):
        numbers[a] = len(numbers)
        detail = inputs.setdefault(a.detail, len(inputs)) if a.operator == "input" else a.detail
        lines.append((a.operator, a.width, detail, *(numbers[x] for x in a.arguments)))
    return *lines, *(numbers[root] for root in roots)


# --- z3 ---------------------------------------------------------------------------------------------------------------

def to_z3(roots: Sequence[Term]) -> list[Any]:
    """The terms as z3 bit-vectors. Calls become functions of which nothing is known."""
    import z3

    known: dict[Term, Any] = {}

    def bit(condition: Any) -> Any:
        return z3.If(condition, z3.BitVecVal(1, 1), z3.BitVecVal(0, 1))

    operations: dict[str, Callable[..., Any]] = {
        "not": lambda x: ~x, "and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y,
        "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
        "shl": lambda x, y: x << y, "lshr": z3.LShR, "ashr": lambda x, y: x >> y,
        "eq": lambda x, y: bit(x == y), "ult": lambda x, y: bit(z3.ULT(x, y)), "slt": lambda x, y: bit(x < y),
        "ite": lambda c, x, y: z3.If(c == 1, x, y), "concat": lambda *xs: z3.Concat(*xs),
    }
    for a in _post_order(*roots):
        xs = [known[x] for x in a.arguments]
        if a.operator == "const":
            known[a] = z3.BitVecVal(a.detail, a.width)
        elif a.operator == "input":
            known[a] = z3.BitVec(a.detail, a.width)
        elif a.operator == "part":
            known[a] = z3.Extract(a.detail + a.width - 1, a.detail, xs[0])
        elif a.operator == "call":
            sorts = [z3.BitVecSort(x.width) for x in a.arguments] + [z3.BitVecSort(a.width)]
            known[a] = z3.Function(f"{a.detail[0]}:{','.join(a.detail[2])}", *sorts)(*xs)
        else:
            known[a] = operations[a.operator](*xs)
    return [known[root] for root in roots]
