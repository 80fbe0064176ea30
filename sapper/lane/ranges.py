"""Between which bounds the scalars of a lane function lie.

Enters: a lane function. Leaves: `Ranges`. Holds: a scalar lies in its range in every run whose tensors have extents
below 2**31 and that has fewer than 2**24 workers and 2**31 tasks, and divides by 0 nowhere.
"""

from __future__ import annotations

from collections.abc import Callable

from ..ir.nodes import Function, Op, Value

Range = tuple[int, int]
"""Least and greatest value."""

LIMIT = 2**63
ALL: Range = (-LIMIT, LIMIT - 1)
COUNT: Range = (0, 2**31 - 1)
MOST_WORKERS = 2**24
_CORNERS: dict[str, Callable[[int, int], int]] = {
    "s_mul": lambda a, b: a * b, "s_min": min, "s_max": max,
}


class Ranges:
    def __init__(self, function: Function) -> None:
        self.slots: list[str] = function.attributes["slots"]
        self.loops = {op.blocks[0]: op for op in function.walk() if op.name in ("loop", "tasks")}
        self.known: dict[Value, Range] = {}

    def of(self, value: Value) -> Range:
        found = self.known.get(value)
        if found is None:
            self.known[value] = ALL     # what depends on itself, through a loop, is not known
            low, high = self._of(value)
            found = self.known[value] = (low, high) if -LIMIT <= low <= high < LIMIT else ALL
        return found

    def _of(self, value: Value) -> Range:
        op = value.op
        if op is None:
            return self._argument(value)
        name = op.name
        if name == "s_const":
            return op.attributes["value"], op.attributes["value"]
        if name == "arg":
            slot = op.attributes["slot"] - 3
            return COUNT if slot >= 0 and self.slots[slot].startswith("dim.") else ALL
        if name in ("worker", "workers"):
            return int(name == "workers"), MOST_WORKERS
        if name in ("s_cmp", "mask_any", "mask_all"):
            return 0, 1
        if name == "s_load":
            dtype = op.attributes["dtype"]
            if dtype.kind == "i":
                return -(1 << (dtype.bits - 1)), (1 << (dtype.bits - 1)) - 1
            return 0, (1 << (8 if dtype.kind == "b" else dtype.bits)) - 1
        if not op.operands or op.blocks or name == "lane0":
            return ALL
        ranges = [self.of(v) for v in op.operands]
        a, b = ranges[-2:] if len(ranges) > 1 else (ranges[0], ranges[0])
        if name == "s_select":
            return min(a[0], b[0]), max(a[1], b[1])
        if name == "s_sub":
            least = self._least_difference(op.operands[0], op.operands[1])
            return (a[0] - b[1] if least is None else max(least, a[0] - b[1])), a[1] - b[0]
        if name in ("s_floordiv", "s_mod") and b[0] == 0:
            b = 1, b[1]
        if name in _CORNERS:
            corners = [_CORNERS[name](x, y) for x in a for y in b]
            return min(corners), max(corners)
        if name == "s_add":
            most = [a[1] + b[1]]
            for one, other in (op.operands, op.operands[::-1]):
                end = self._end(other, one)
                most += [self.of(end)[1]] if end is not None else []
            return a[0] + b[0], min(most)
        if name == "s_and" and b[0] == b[1] < 0 and -b[0] & (-b[0] - 1) == 0:
            return a[0] + b[0] + 1, a[1]        # down to a multiple of a power of two
        if name == "s_and":
            bounds = [high for low, high in (a, b) if low >= 0]
            return (0, min(bounds)) if bounds else ALL
        if name in ("s_shl", "s_sar", "s_shr") and b[0] == b[1] and 0 <= b[0] < 64 and (name != "s_shr" or a[0] >= 0):
            return (a[0] << b[0], a[1] << b[0]) if name == "s_shl" else (a[0] >> b[0], a[1] >> b[0])
        if name == "s_floordiv" and b[0] >= 1:
            divided = _rounded_up(op)
            if divided is not None:
                corners = [-(-x // y) for x in self.of(divided) for y in b]
            else:
                corners = [x // y for x in a for y in b]
            return min(corners), max(corners)
        if name == "s_mod" and b[0] >= 1:
            return 0, min(b[1] - 1, a[1]) if a[0] >= 0 else b[1] - 1
        return ALL

    def _least_difference(self, a: Value, b: Value, depth: int = 8) -> int | None:
        """A lower bound of a - b that follows from how a is made of b, or from the loops that count between them."""
        if a is b:
            return 0
        if not depth:
            return None
        loop = self._counted(b)
        if loop is not None and loop.operands[1] is a:
            return 1                        # a counter is below its bound
        loop = self._counted(a)
        if loop is not None:
            return self._least_difference(loop.operands[0], b, depth - 1)
        if a.op is not None and a.op.name == "s_add":
            for one, other in (a.op.operands, a.op.operands[::-1]):
                least = self._least_difference(one, b, depth - 1)
                if least is not None:
                    return least + self.of(other)[0]
        return None

    def _end(self, value: Value, start: Value) -> Value | None:
        """An `end` such that value <= end - start, where value is made so: start + value is then at most end."""
        op = value.op
        if op is None:
            return None
        if op.name == "s_sub":
            if op.operands[1] is start:
                return op.operands[0]
            return self._end(op.operands[0], start) if self.of(op.operands[1])[0] >= 0 else None
        if op.name == "s_and" and self.of(op.operands[1])[1] < 0:
            return self._end(op.operands[0], start)
        return None

    def _counted(self, value: Value) -> Op | None:
        """The loop whose counter this is."""
        loop = self.loops.get(value.owner)  # type: ignore[arg-type]
        return loop if loop is not None and loop.name == "loop" and value is loop.blocks[0].arguments[0] else None

    def _argument(self, value: Value) -> Range:
        loop = self.loops.get(value.owner)  # type: ignore[arg-type]
        if loop is None or value is not loop.blocks[0].arguments[0]:
            return ALL
        if loop.name == "tasks":
            return COUNT
        return self.of(loop.operands[0])[0], max(self.of(loop.operands[0])[0], self.of(loop.operands[1])[1] - 1)


def _rounded_up(op: Op) -> Value | None:
    """x, where a division is floordiv(x + divisor - 1, divisor): it is x / divisor rounded up."""
    last = op.operands[0].op
    if last is None or last.name != "s_add" or last.operands[1].op is None \
            or last.operands[1].op.name != "s_const" or last.operands[1].op.attributes["value"] != -1:
        return None
    first = last.operands[0].op
    if first is None or first.name != "s_add" or op.operands[1] not in first.operands:
        return None
    return first.operands[0] if first.operands[1] is op.operands[1] else first.operands[1]
