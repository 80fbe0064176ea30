"""Sums of products with fp8 that are made again where a NaN is among the numbers, or a factor is very large.

Enters: a simplified lane function with rows of e4m3 that are widened two at a time (`join_loads`). Leaves: a loop that
does nothing but add their products up twice: first with the numbers 2**-120 times too small, NaN like the number that
it would be, and lanes in the order in which numbers are widened soonest, which takes less than half as much. What makes
them large again multiplies the elements that they meet: before the loop (raised_factors.py), or where these are fewer.
Meanwhile the greatest code is kept. The loop that was there comes after, for no pass at all unless a NaN was met or a
sum is no number: then it begins anew. Where codes of two steps fill a register, the first takes two at a time, and the
other what is left. Holds: all results are as before, bit for bit, but for which NaN.

A product of such an element, if it is a number then, is the same: multiplying by 2**120 is exact but where it
overflows, and then the sum stays infinite or NaN.

Measured on a Zen 3, of the time that NaN takes in each step, 4096 x 4096 from memory: one row 0.88, for gate and up
0.81, 2 rows 0.89, 4 0.96; 3 of experts 0.88. Of that again, with the lanes in another order, one and two threads: one
row 0.82 to 0.86, for gate and up 0.82 to 0.87, 2 rows 0.87 to 0.92, 4 0.90 to 0.98.
"""

from __future__ import annotations

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import MASK, ROW_B32, ROW_F32, ROW_I32, S64, RowType, Type, b32
from .ops import LANE_OPS
from .raised_factors import Copier, Factors, factors_of
from .simplify import constant

ROWS = 2
"""Rows that are widened at once where this is worth it."""
RAISE = 2.0**120
_ALLOWED = {"load", "load_splat", "prefetch", "s_load"}
_BY_LANES = {"fma", "mul", "add", "sub"}
"""Ops of which each lane of the result is made of the same lane of rows."""


def add_up_quickly(function: Function) -> bool:
    """In place. Whether there was such a loop."""
    writer = _Writer(function)
    writer.visit(function.body)
    function.body.ops[:0] = writer.head
    return bool(writer.head)


class _Writer:
    """head: constants, which come first in the function. ops: of the block at hand."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.lanes: int = function.attributes["lanes"]
        self.half_bytes = ROWS * self.lanes
        self.head: list[Op] = []
        self.constants: dict[tuple[float | int, Type], Value] = {}
        self.ops: list[Op] = []
        self.copier = Copier(function, self.emit, self.append)

    def emit(self, name: str, operands: list[Value], type: Type, **attributes: object) -> Value:
        op = Op(name, operands, (type,), attributes)
        self.ops.append(op)
        return op.result

    def append(self, op: Op) -> None:
        self.ops.append(op)

    def constant(self, value: float | int, type: Type) -> Value:
        key = (value, type)
        if key not in self.constants:
            name = "splat_const" if isinstance(type, RowType) else "s_const"
            op = Op(name, [], (type,), {"value": value})
            self.head.append(op)
            self.constants[key] = op.result
        return self.constants[key]

    def visit(self, block: Block, around: Op | None = None) -> None:
        for op in block.ops:
            for inner in op.blocks:
                self.visit(inner, op)
        loops = {op: halves for op in block.ops if op.name == "loop" and (halves := _adds_up(op))}
        if not loops:
            return
        self.ops = []
        for op in block.ops:
            if op in loops:
                self.twice(op, loops[op], around)
            else:
                self.ops.append(op)
        block.ops = self.ops

    def twice(self, loop: Op, halves: list[tuple[int, int]], around: Op | None) -> None:
        """The quick loop, and the other one, which is `loop` still. halves: see `_halves`. around: the loop outside."""
        met = _met(loop)
        factors = factors_of(self.function, loop, around, met) if met else None
        folded = met if len(met) < _rows(loop) else frozenset()
        start, stop, *initial = loop.operands
        apart = {} if self.pairs(loop.blocks[0].ops) else _steps_apart(loop)
        quick_stop = stop
        if factors is not None or apart:    # the other loop makes what is left of the steps
            whole = self.lanes if factors is not None else 2 * loop.attributes["step"]
            first, last = constant(start), constant(stop)
            if first is not None and last is not None:
                quick_stop = self.constant(first + (last - first) // whole * whole, S64)
            else:
                count = self.emit("s_and", [self.emit("s_sub", [stop, start], S64), self.constant(-whole, S64)], S64)
                quick_stop = self.emit("s_add", [start, count], S64)
        copied = self.copied(factors, quick_stop) if factors is not None else None
        types = [value.type for value in initial]
        inside = Block([S64, *types, ROW_B32])
        none = self.constant(0, ROW_I32)
        flags = self.emit("bitcast", [none], ROW_B32)
        step = loop.attributes["step"]
        quick = Op("loop", [start, quick_stop, *initial, flags], [*types, ROW_B32],
                   {**loop.attributes, "step": 2 * step if apart else step}, [inside], loop.location)
        outside, self.ops = self.ops, []
        self.quick_body(loop.blocks[0], inside, folded, apart, factors, copied)
        inside.ops, self.ops = self.ops, outside
        self.ops.append(quick)
        *sums, most = quick.results
        again = self.is_needed(most, sums if folded or factors is not None else [])
        for low, high in halves:
            sums[low], sums[high] = self.zip(*self.zip(sums[low], sums[high]))
        anew = self.emit("cmp", [self.emit("splat", [again], ROW_I32), none], MASK, cond="ne")
        loop.operands = [
            self.emit("s_select", [again, start, quick_stop], S64), stop,
            *(self.emit("select", [anew, first, found], type)
              for first, found, type in zip(initial, sums, types, strict=True))]
        self.ops.append(loop)

    def copied(self, factors: Factors, stop: Value) -> Value:
        """From where a quick loop that goes to `stop` takes these elements, made large."""
        outside, self.ops = self.ops, []
        here = self.copier.begin(factors)
        self.head += self.ops
        self.ops = outside
        return self.copier.copy(factors, here, stop, self.constant(RAISE, ROW_F32))

    def zip(self, one: Value, other: Value) -> list[Value]:
        op = Op("zip", [one, other], (one.type, other.type))
        self.ops.append(op)
        return op.results

    def quick_body(self, body: Block, inside: Block, folded: frozenset[Value], apart: dict[Op, int],
                   factors: Factors | None, copied: Value | None) -> None:
        """apart: of each op in memory, how many bytes further the next step has its own, if two are made at once.
        factors, copied: what was made large before the loop, and where it is."""
        counter, *carried = inside.arguments
        most, raise_ = carried.pop(), self.constant(RAISE, ROW_F32)
        mapped = {body.arguments[0]: counter}
        steps: list[list[tuple[Op, Op]]] = []
        for number in range(2 if apart else 1):
            made: list[tuple[Op, Op]] = []
            mapped |= zip(body.arguments[1:], carried, strict=True)
            for op in body.ops[:-1]:
                if number and op.name == "s_mul":
                    continue    # of the counter
                attributes = dict(op.attributes)
                operands = [mapped.get(v, v) for v in op.operands]
                if factors is not None and copied is not None and op in factors.places:
                    operands[0], attributes["disp"] = copied, factors.place(op)
                if op in apart:
                    attributes["disp"] = attributes.get("disp", 0) + number * apart[op]
                made.append((op, Op(op.name, operands, [v.type for v in op.results], attributes, None, op.location)))
                mapped |= zip(op.results, made[-1][1].results, strict=True)
            carried = [mapped.get(v, v) for v in body.ops[-1].operands]
            steps.append(made)
        raised: dict[Value, Value] = {}
        pairs = self.pairs([new for made in steps for _, new in made])
        for op, new in (pair for made in steps for pair in made):
            new.operands = [raised.get(v, v) for v in new.operands]
            if op.name == "widen_float8":
                load = new.operands[0].op
                assert load is not None
                most = self.note(most, load, pairs.get(load))
            self.ops.append(new)
            if op.name == "widen_float8":
                new.attributes["scaled"] = True
            if factors is not None:
                continue
            if op.name == "widen_float8" and not folded:
                raised |= {row: self.emit("mul", [row, raise_], ROW_F32) for row in new.results}
            elif op.results and op.results[0] in folded:
                raised[new.result] = self.emit("mul", [new.result, raise_], ROW_F32)
        self.ops.append(Op("yield", [*(raised.get(v, v) for v in carried), most], (), {}, None, body.ops[-1].location))

    def pairs(self, ops: list[Op]) -> dict[Op, bool]:
        """The loads whose codes fill a register together with those of another: whether it is the first of both."""
        loads: dict[tuple[object, ...], dict[int, Op]] = {}
        for op in ops:
            if op.name == "load" and op.attributes.get("twice"):
                a = op.attributes
                loads.setdefault((*op.operands, a.get("scale", 1), a.get("near", False)), {})[a.get("disp", 0)] = op
        found: dict[Op, bool] = {}
        for places in loads.values():
            for disp in sorted(places):
                other = places.get(disp + self.half_bytes)
                if other is not None and places[disp] not in found:
                    found |= {places[disp]: True, other: False}
        return found

    def note(self, most: Value, load: Op, first: bool | None) -> Value:
        """The greater of these and of what is loaded, doubled. first: see `pairs`, of which one notes both."""
        codes = load.result
        if first is False:
            return most
        if first:
            attributes = {name: value for name, value in load.attributes.items() if name != "twice"}
            codes = self.emit("load", list(load.operands), ROW_B32, **attributes)
        number = self.emit("bitcast", [codes], ROW_I32)
        doubled = self.emit("bitcast", [self.emit("add", [number, number], ROW_I32)], ROW_B32)
        return self.emit("max_u8", [most, doubled], ROW_B32)

    def is_needed(self, most: Value, sums: list[Value]) -> Value:
        """s64: whether the greatest of the codes, doubled, is NaN (all bits but the lowest are set, which may be the
        sign of its neighbour), or one of these sums no number."""
        number = self.emit("bitcast", [most], ROW_I32)
        halved = self.emit("shr", [number], ROW_I32, amount=1)
        code = self.emit("and", [halved, self.constant(0x7F7F7F7F, ROW_I32)], ROW_I32)
        carried = self.emit("add", [code, self.constant(0x01010101, ROW_I32)], ROW_I32)
        full = self.emit("and", [carried, self.constant(-0x7F7F7F80, ROW_I32)], ROW_I32)
        needed = self.emit("cmp", [full, self.constant(0, ROW_I32)], MASK, cond="ne")
        if sums:
            zero = self.constant(0.0, ROW_F32)
            total = self.emit("mul", [sums[0], zero], ROW_F32)
            for one in sums[1:]:
                total = self.emit("fma", [one, zero, total], ROW_F32)
            no_number = self.emit("cmp", [total, zero], MASK, cond="ne")
            needed = self.emit("mask_or", [needed, no_number], MASK)
        return self.emit("mask_any", [needed], S64)


def _adds_up(loop: Op) -> list[tuple[int, int]]:
    """Of a loop that widens rows of fp8 by twos, and begins all that it carries with constants, `_halves`."""
    ops = loop.blocks[0].ops
    if not (any(op.name == "widen_float8" and len(op.results) == ROWS for op in ops)
            and all(value.op is not None and value.op.name == "splat_const" for value in loop.operands[2:])
            and all(value.type == ROW_F32 for value in loop.operands[2:])
            and all(not op.blocks and (LANE_OPS.rows[op.name].pure or op.name in _ALLOWED) for op in ops[:-1])
            and all(_is_twice(op.operands[0]) for op in ops if op.name == "widen_float8")
            and ops[-1].name == "yield"):
        return []
    return _halves(loop)


def _halves(loop: Op) -> list[tuple[int, int]]:
    """Of the sums that a loop carries, which are the same of either row that is widened at once: the order of lanes may
    be another one then for both. None where something meets these that is not the same in all lanes, but the like."""
    body = loop.blocks[0]
    carried = frozenset(body.arguments[1:])
    kinds: dict[Value, tuple[int, object]] = {}
    numbers: dict[object, int] = {}
    last = dict(zip(body.arguments[1:], body.ops[-1].operands, strict=True))
    begun: list[tuple[Value, int]] = []
    for op in body.ops[:-1]:
        if op.name == "widen_float8":
            kinds |= {row: (half, op) for half, row in enumerate(op.results)}
            continue
        rows = {kinds[v][0] for v in op.operands if v in kinds}
        if not rows:
            if not carried.isdisjoint(op.operands):
                return []
            continue
        if op.name not in _BY_LANES or len(rows) > 1 or any(
                v not in kinds and v not in carried and not _is_splat(v) for v in op.operands):
            return []
        half = rows.pop()
        key: object = (op.name, *("sum" if v in carried else kinds[v][1] if v in kinds else v for v in op.operands))
        kinds[op.result] = half, numbers.setdefault(key, len(numbers))
        begun += [(v, half) for v in op.operands if v in carried]
    if any(last[v] not in kinds or kinds[last[v]][0] != half for v, half in begun) or len(begun) < len(carried):
        return []
    places: dict[object, tuple[list[int], list[int]]] = {}
    for number, value in enumerate(body.ops[-1].operands):
        half, key = kinds[value]
        places.setdefault(key, ([], []))[half].append(number)
    if any(len(low) != len(high) for low, high in places.values()):
        return []
    return [pair for low, high in places.values() for pair in zip(low, high, strict=True)]


def _is_splat(value: Value) -> bool:
    return value.op is not None and value.op.name in ("load_splat", "splat", "splat_const")


def _is_twice(row: Value) -> bool:
    op = row.op
    return op is not None and op.name == "load" and op.attributes["dtype"] is b32 and bool(op.attributes.get("twice"))


def _rows(loop: Op) -> int:
    return sum(len(op.results) for op in loop.blocks[0].ops if op.name == "widen_float8")


def _met(loop: Op) -> frozenset[Value]:
    """The elements that all rows of fp8 meet, if nothing else meets these; each product is added to what is carried on,
    so that one that is no number remains none."""
    body = loop.blocks[0]
    rows = {row for op in body.ops if op.name == "widen_float8" for row in op.results}
    uses: dict[Value, list[tuple[Op, int]]] = {}
    for op in body.ops:
        for place, value in enumerate(op.operands):
            uses.setdefault(value, []).append((op, place))
    splats: set[Value] = set()
    for row in rows:
        for op, place in uses.get(row, ()):
            if op.name != "fma" or place == 2:
                return frozenset()
            splats.add(op.operands[1 - place])
    if not all(
            splat.op is not None and splat.op.name == "load_splat" and splat in uses
            and splat.op in body.ops for splat in splats):
        return frozenset()
    for splat in splats:
        if any(op.name != "fma" or place == 2 or op.operands[1 - place] not in rows for op, place in uses[splat]):
            return frozenset()
    for argument, value in zip(body.arguments[1:], body.ops[-1].operands, strict=True):
        while value is not argument:
            if value.op is None or value.op.name != "fma" or len(uses[value]) != 1:
                return frozenset()
            value = value.op.operands[2]
    return frozenset(splats)


def _steps_apart(loop: Op) -> dict[Op, int]:
    """Of each op in memory, how many bytes further the next step of a loop has its own: nothing if that is not known of
    all, or where something else follows the counter."""
    body, apart = loop.blocks[0], {}
    counter, step = body.arguments[0], loop.attributes["step"]
    multiples = {counter: step}
    for op in body.ops:
        if op.name == "s_mul" and counter in op.operands:
            other = op.operands[1 - op.operands.index(counter)].op
            if other is None or other.name != "s_const":
                return {}
            multiples[op.result] = step * other.attributes["value"]
        elif op.attributes.get("indexed") and op.operands[1] in multiples and op.name in ("load", "load_splat"):
            apart[op] = op.attributes.get("scale", 1) * multiples[op.operands[1]]
        elif any(value in multiples for value in op.operands) or op.name in _ALLOWED | {"s_mul"}:
            return {}
    return apart
