"""Which functions are computed for a result of few bits, so that few bits of their own count.

Enters: a tile function. Leaves: the results of exp, sigmoid, erf and tanh, in f32, that reach nothing but roundings to
a type of at most 8 significant bits, and those by products, quotients, choices and signs, which keep a relative error
as it is; of exp, which is never negative, sums as well. erf and tanh count only where a constant of at least 1 is added
to them, as in GELU: then it is an absolute error that matters. Holds: what such a result is rounded to differs from
what it would be only where the exact value is next to the middle of two neighbours (docs/math.md).
"""

from __future__ import annotations

from ..ir.nodes import Function, Op, Value
from ..ir.types import TileType, f32

FUNCTIONS = frozenset({"exp", "sigmoid", "erf", "tanh"})
QUOTIENTS = frozenset({"div"})
_FEW_BITS = frozenset({"bf16", "f8e4m3", "f8e5m2"})
_KEEPS_ERROR = frozenset({"mul", "div", "neg"})


def coarse(function: Function, of: frozenset[str] = FUNCTIONS) -> frozenset[Value]:
    """The results that may be coarse, of ops of these names."""
    users: dict[Value, list[Op]] = {}
    for op in function.walk():
        for value in op.operands:
            users.setdefault(value, []).append(op)
    found: dict[Value, bool] = {}

    def ends(value: Value, summable: bool) -> bool:
        """Whether all that reads a value rounds it. summable: it is never negative."""
        if value not in found:
            found[value] = False        # what comes back to itself is carried by a loop
            found[value] = bool(users.get(value)) and all(passes(op, value, summable) for op in users[value])
        return found[value]

    def passes(op: Op, value: Value, summable: bool) -> bool:
        if not op.results or op.blocks or not isinstance(op.results[0].type, TileType):
            return False
        if op.name == "cast":
            return op.results[0].type.dtype.name in _FEW_BITS
        if op.results[0].type.dtype is not f32:
            return False
        if op.name == "reduce":
            return summable and op.attributes["kind"] == "sum" and ends(op.results[0], True)
        if op.name == "select":
            return op.operands[0] is not value and ends(op.results[0], False)
        return op.name in _KEEPS_ERROR and ends(op.results[0], False)

    results = set()
    for op in function.walk():
        if op.name not in of or op.results[0].type.dtype is not f32:  # type: ignore[union-attr]
            continue
        value = op.results[0]
        if op.name in ("erf", "tanh"):
            sums = users.get(value, [])
            few = bool(sums) and all(one_is_added(user) and ends(user.results[0], False) for user in sums)
        else:
            few = ends(value, op.name == "exp")
        if few:
            results.add(value)
    return frozenset(results)


def beside_one(function: Function, of: frozenset[str]) -> frozenset[Value]:
    """The results in f32, of ops of these names, that are added to constants of at least 1 and nothing else: it is
    their absolute error that counts."""
    users: dict[Value, list[Op]] = {}
    for op in function.walk():
        for value in op.operands:
            users.setdefault(value, []).append(op)
    return frozenset(
        op.results[0] for op in function.walk()
        if op.name in of and op.results[0].type.dtype is f32  # type: ignore[union-attr]
        and (sums := users.get(op.results[0])) and all(map(one_is_added, sums)))


def one_is_added(op: Op) -> bool:
    return op.name == "add" and any(_at_least_one(value) for value in op.operands)


def _at_least_one(value: Value) -> bool:
    op = value.op
    while op is not None and op.name == "full":
        op = op.operands[0].op
    return op is not None and op.name == "const" and abs(op.attributes["value"]) >= 1
