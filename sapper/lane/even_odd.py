"""Rows of bf16 by their even and their odd elements, where a target has no quick way to have them in order.

Enters: a lane function with two rows of bf16 side by side that are loaded, computed with lane by lane, in the same way
both, and stored side by side again (activations, the last walk of a norm). Leaves: one load of both as slots, of which
the even elements are one row and the odd ones the other, and one store of both as slots: a shift and a mask in place of
two permutations, and a shift and a blend in place of two permutations across the register.

What holds: the lanes of both rows are other elements than before, so all that meets them has the same number in all
lanes, or comes of such rows itself, and nothing else reads them. Which bits are stored is as before.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import ROW_B32, ROW_F32, ROW_I32, b32, bf16, i32
from .ops import LANE_OPS

_LANE_BY_LANE = frozenset({
    "add", "sub", "mul", "div", "fma", "min", "max", "neg", "abs", "sqrt", "round", "floor", "ceil", "trunc", "select",
    "cmp", "mask_and", "mask_or", "mask_xor", "mask_not", "bitcast", "shl", "shr", "sar", "and", "or", "xor", "not",
    "cvt", "round_to", "copy_sign", "scale_exponent", "fraction", "lookup",
})
_JOINING = frozenset({"add", "mul"})
"""Of two rows of which one is the other with lanes exchanged, these give lanes that are the same after the exchange. Of
min and max, which of two zeros it is, or whether NaN, depends on the order of the operands."""

PASSED_BY_LOADS = frozenset({name for name, row in LANE_OPS.rows.items() if row.pure and not row.blocks}) | {
    "load", "load_splat", "gather", "s_load", "prefetch"}
_SIDES = 2
DEPTH = 100
"""Ops behind each other that are looked at for a value that is the same in all lanes."""
UPPER_HALF = -1 << 16
"""The bits of the odd element of a slot."""

_Pair = tuple[Op, Op]


def take_even_and_odd(function: Function) -> int:
    """In place; how many pairs of stores became one."""
    users: dict[Value, list[Op]] = {}
    ops = list(function.walk())
    if not any(op.name == "store" and op.attributes["dtype"] is bf16 for op in ops):
        return 0
    for op in ops:
        for value in op.operands:
            users.setdefault(value, []).append(op)
    return _visit(function.body, _Uniform(function), users, function)


def _visit(block: Block, uniform: _Uniform, users: dict[Value, list[Op]], function: Function) -> int:
    count = sum(_visit(inner, uniform, users, function) for op in block.ops for inner in op.blocks)
    lanes = function.attributes["lanes"]
    stores = _pairs(block, "store", lanes)
    if not stores:
        return count
    matcher = _Matcher(uniform, _pairs(block, "load", lanes))
    trees = {pair: tree for pair in stores if (tree := matcher.tree(pair)) is not None}
    before = -1
    while before != len(trees):
        # What is read elsewhere keeps its order, and so does all that meets it.
        before = len(trees)
        taken = {op for pair, tree in trees.items() for op in (*pair, *tree)}
        for pair, tree in list(trees.items()):
            if any(user not in taken for op in tree for result in op.results for user in users.get(result, ())):
                del trees[pair]
    if trees:
        _rewrite(block, list(trees), {op for tree in trees.values() for op in tree}, matcher.loads)
    return count + len(trees)


def _pairs(block: Block, name: str, lanes: int) -> list[_Pair]:
    """Loads or stores of two rows side by side, with nothing between them that one of them may not be moved over: the
    second load goes to where the first is, the first store to where the second is."""
    row_bytes = lanes * bf16.size_bytes
    found: list[_Pair] = []
    waiting: dict[tuple[object, ...], dict[int, Op]] = {}
    for op in block.ops:
        a = op.attributes
        if op.name == name and a["dtype"] is bf16 and not a.get("masked") and "beside" not in a:
            same = tuple(sorted((key, value) for key, value in a.items() if key not in ("disp", "dtype")))
            key, disp = (*(op.operands[1:] if name == "store" else op.operands), *same), a.get("disp", 0)
            if name == "store" and (key not in waiting or any(abs(disp - d) < row_bytes for d in waiting[key])):
                waiting = {}    # it may go to the same memory
            others = waiting.setdefault(key, {})
            # Past the caches go whole rows, which lie as they are aligned.
            free = not a.get("streaming")
            if disp - row_bytes in others and (free or disp % (_SIDES * row_bytes)):
                found.append((others.pop(disp - row_bytes), op))
            elif disp + row_bytes in others and (free or disp % (_SIDES * row_bytes) == 0):
                found.append((op, others.pop(disp + row_bytes)))
            else:
                others[disp] = op
        elif op.name not in PASSED_BY_LOADS or (name == "store" and not LANE_OPS.rows[op.name].pure):
            waiting = {}
    return found


class _Uniform:
    """Which rows have the same in all lanes."""

    def __init__(self, function: Function) -> None:
        self.distances = frozenset(1 << n for n in range(function.attributes["lanes"].bit_length() - 1))
        self.known: dict[Value, frozenset[int]] = {}

    def __contains__(self, value: Value) -> bool:
        return self._exchanges(value, 0) == self.distances

    def _exchanges(self, value: Value, depth: int) -> frozenset[int]:
        """The distances d for which lane i and lane i ^ d have the same, as far as DEPTH ops tell."""
        found = self.known.get(value)
        if found is None:
            found = self.known[value] = self._of(value.op, depth + 1)
        return found

    def _of(self, op: Op | None, depth: int) -> frozenset[int]:
        if op is None or not op.operands or depth > DEPTH:
            return self.distances if op is not None and op.name == "splat_const" else frozenset()
        if op.name in ("splat", "load_splat", "broadcast_lane"):
            return self.distances
        if op.name == "shuffle_xor":
            return self._exchanges(op.operands[0], depth)
        if op.name not in _LANE_BY_LANE:
            return frozenset()
        found = self.distances.intersection(*[self._exchanges(v, depth) for v in op.operands])
        if op.name in _JOINING:
            for a, b in (op.operands, op.operands[::-1]):
                if b.op is not None and b.op.name == "shuffle_xor" and b.op.operands[0] is a:
                    found |= self._exchanges(a, depth) | {b.op.attributes["distance"]}
        return found


class _Matcher:
    """Tells whether two rows are computed in the same way, of rows that are loaded side by side. loads: their pairs."""

    def __init__(self, uniform: _Uniform, loads: Iterable[_Pair]) -> None:
        self.uniform = uniform
        self.loads = list(loads)
        self.side = {pair[side]: (pair, side) for pair in self.loads for side in range(_SIDES)}

    def tree(self, stores: _Pair) -> set[Op] | None:
        """The ops of both rows, loads included; None if they are not of the kind."""
        ops: set[Op] = set()
        pending = [(stores[0].operands[0], stores[1].operands[0])]
        seen: set[tuple[Value, Value]] = set()
        while pending:
            a, b = pending.pop()
            if (a, b) in seen or (a is b and a in self.uniform):
                continue
            seen.add((a, b))
            if a.op is None or b.op is None or a is b:
                return None
            if a.op in self.side or b.op in self.side:
                if (a.op, b.op) not in self.loads:
                    return None
            elif (a.op.name != b.op.name or a.op.name not in _LANE_BY_LANE or a.op.attributes != b.op.attributes
                    or len(a.op.operands) != len(b.op.operands)):
                return None
            else:
                pending += zip(a.op.operands, b.op.operands, strict=True)
            ops |= {a.op, b.op}
        return ops


def _rewrite(block: Block, stores: list[_Pair], taken: set[Op], loads: list[_Pair]) -> None:
    before: dict[Op, list[Op]] = {}
    gone: set[Op] = set()
    place = {op: number for number, op in enumerate(block.ops)}
    for pair in loads:
        if pair[0] in taken:
            first = min(pair, key=place.__getitem__)
            before[first] = _load(pair)
            gone.update(pair)
    for pair in stores:
        last = max(pair, key=place.__getitem__)
        before[last] = _store(pair)
        gone.update(pair)
    block.ops = [new for op in block.ops for new in before.get(op, () if op in gone else (op,))]


def _load(pair: _Pair) -> list[Op]:
    """Both rows take their values along: nothing that uses them has to change."""
    first = pair[0]
    where = first.location
    slots = Op("load", list(first.operands), (ROW_I32,), {**first.attributes, "dtype": i32}, None, where)
    mask = Op("splat_const", [], (ROW_I32,), {"value": UPPER_HALF}, None, where)
    made = [slots, mask]
    for op, bits in zip(pair, (Op("shl", [slots.result], (ROW_I32,), {"amount": bf16.bits}, None, where),
                               Op("and", [slots.result, mask.result], (ROW_I32,), {}, None, where)), strict=True):
        row = Op("bitcast", [bits.result], (ROW_F32,), {}, None, where)
        row.results[0] = op.result
        op.result.move_to(row)
        made += [bits, row]
    return made


def _store(pair: _Pair) -> list[Op]:
    first = pair[0]
    rows = [op.operands[0] for op in pair]
    slots = Op("pack2", rows, (ROW_B32,), {"dtype": bf16}, None, first.location)
    attributes = {key: value for key, value in first.attributes.items() if key not in ("exact", "denormals")}
    return [slots, Op("store", [slots.result, *first.operands[1:]], (), {**attributes, "dtype": b32}, None,
                      first.location)]
