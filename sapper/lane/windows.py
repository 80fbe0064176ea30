"""Windows: what neighbouring lanes read from places that are not neighbours, but near.

Enters loads whose lanes lie a few elements apart (`x[2 * i + 1]`), one behind the other (`x[N - 1 - i]`), or move from
lane to lane by one element or none (`x[i // 2]`, `x[maximum(i - 1, 0)]`); leaves loads of whole rows, of which each
lane takes its element, in place of gathers. A gather takes two to six cycles for each lane, a row and a permutation
two in all.

What holds: a row ends with the last element that one of its lanes reads, so that no other memory is touched than what
lies between two elements that are read.
"""

from __future__ import annotations

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_F32, ROW_I32, DType, RowType, bf16, bool_, f16, f32, i8, i16, i32, u8
from ..tile.affine import affine
from ..tile.ops import memory_of
from ..tile.plan import axes_of
from ..tile.sums import is_join
from .even_odd import UPPER_HALF
from .narrow_stores import NarrowStores
from .squares import is_as_in_memory
from .state import PAIR, Access, Scalar, element_bytes, row_dtype

WINDOW_COST = 3.0
"""Of a row of which lanes take elements: besides the load a mask, the places of the elements, and a permutation."""

SHARED_COST = 0.1
"""Of one element that all lanes read, as of an operand that does not move along them (model.py)."""

STRIDES = (2, 3, 4, 6, 8)
"""Of so many elements from lane to lane a row is made of as many loads, and nearly as many permutations."""

PAIR_STRIDES = (2,)
"""The same where two rows can only be exchanged elements of (pairs.py)."""

PICKED = frozenset({f32, i32, bf16, f16, i8, u8, i16})
"""Dtypes of one register for as many elements as there are lanes."""


class Windows(NarrowStores):
    # What is one.

    def window_cost(self, op: Op, access: Access, lane: str) -> float | None:
        """In loads of a row, about, were the axis across the lanes; None if it is no window."""
        stride = self._elements_apart(op, access, lane)
        if stride is not None:
            return 1.5 * abs(stride)
        moving = self._moving_index(op, access, lane)
        if moving is None:
            return None
        return SHARED_COST if self._shared_quotient(moving[0], lane) is not None else WINDOW_COST

    def _elements_apart(self, op: Op, access: Access, lane: str) -> int | None:
        """How many elements apart neighbouring lanes read, if by a few, or backwards."""
        stride, size = access.axes.get(lane, 0), element_bytes(access.dtype)
        if (not self.picks(op) or not isinstance(stride, int) or stride % size or any(
                lane in axes_of(value) for value, _ in access.gathers)):
            return None
        apart = stride // size
        return apart if apart == -1 or apart in STRIDES else None

    def _moving_index(self, op: Op, access: Access, lane: str) -> tuple[Value, Scalar] | None:
        """The index of a load, and its stride in bytes, that moves from lane to lane by at most one element, if nothing
        else does; or that mostly does not move at all, at any stride."""
        moving = [(value, step) for value, step in access.gathers if lane in axes_of(value)]
        if not self.facts.picks or len(moving) != 1 or access.axes.get(lane, 0) != 0 or not _direction(
                moving[0][0], lane):
            return None
        near = self.picks(op) and moving[0][1] == element_bytes(access.dtype)
        shared = access.dtype is not bool_ and self._shared_quotient(moving[0][0], lane) is not None
        return moving[0] if near or shared else None

    def _shared_quotient(self, index: Value, lane: str) -> Op | None:
        """The quotient in an index by which it is the same in all lanes where the first one's coordinate is a multiple
        of their number, as in `scale[n, k // 32]`; None of other indices."""
        op = index.op
        if op is None or op.name == "index":
            return None
        if op.name == "floordiv":
            divisor, form = _constant(op.operands[1]), affine(op.operands[0])
            return op if divisor > 0 and divisor % self.lanes == 0 and form is not None and not form.scalars and (
                dict(form.axes) == {lane: 1} and form.constant % self.lanes == 0) else None
        along = [v for v in op.operands if lane in axes_of(v)]
        return self._shared_quotient(along[0], lane) if op.name in (*SAME, "add", "sub") and len(along) == 1 else None

    def picks(self, op: Op) -> bool:
        """Whether lanes can take elements of a row of what an op reads."""
        return self.facts.picks and op.result.type.dtype in PICKED  # type: ignore[union-attr]

    # Loads.

    def window_row(self, op: Op, access: Access, at: dict[str, int], level: int, mask: Value | None) -> Value | None:
        """The row of a load that is a window, or None."""
        lane = next((a for a in axes_of(op.result) if self.bound[a].lane), None)
        alive = self._alive(lane) if lane is not None else None
        if lane is None or alive is None or access.near or access.relative or self.bound[lane].spread is not None:
            return None
        apart, moving = self._elements_apart(op, access, lane), self._moving_index(op, access, lane)
        if apart is not None and apart > 1:
            row = self._strided(op, access, at, level, apart, alive)
        elif apart is not None:
            # Backwards: the window begins with what the last lane reads.
            back = self.sub(alive, 1)
            start = Access(self.sub(access.base, self.mul(back, element_bytes(access.dtype))), access.disp, access.axes,
                           access.dtype)
            places = self._once("sub", self.row_of(back), self.iota())
            row = self._pick(self._row_at(start, at, level, alive), places)
        elif moving is not None and self.picks(op) and moving[1] == element_bytes(access.dtype):
            row = self._moved(access, moving[0], lane, at, level, alive)
        elif moving is not None and self._begins_at_vector(self._coordinate_divided(moving[0], lane, at)):
            index, step = moving
            first = self._scalar_at(index, lane, at, 0)
            here = Access(self.add(access.base, self.mul(first, step)), access.disp, access.axes, access.dtype)
            row = self._fetch(here, op.result, at, level, None)
        else:
            return None
        if mask is not None:
            dtype = row_dtype(access.dtype)
            row = self.emit(level, "select", [mask, row, self.constant(0.0 if dtype.is_float else 0, dtype)], row.type)
        return row

    def _strided(self, op: Op, access: Access, at: dict[str, int], level: int, apart: int, alive: Scalar) -> Value:
        """Element `apart * l` for lane l, of the loads of `apart` rows."""
        count = self.add(self.mul(self.sub(alive, 1), apart), 1)
        size, place = element_bytes(access.dtype), self._place_between(op, apart, at)
        if place is not None:
            # Other loads take the elements between these: from the same rows, which end with the last of them.
            axis, number = place
            before = number * size if axis is None else 0
            access = Access(access.base, access.disp - before, access.axes, access.dtype)
            at, count = at if axis is None else {**at, axis: 0}, self.mul(alive, apart)
            if access.dtype is bf16 and apart == PAIR:
                return self._half_of_slots(access, at, level, place[1], alive)
        number = 0 if place is None else place[1]
        rows = [self._row_at(Access(access.base, access.disp + part * self.lanes * size, access.axes, access.dtype), at,
                             level, self.sub(count, part * self.lanes), shared=place is not None)
                for part in range(apart)]
        while apart % 2 == 0:
            rows = [self._two_rows("unzip", rows[n], rows[n + 1])[number % 2] for n in range(0, len(rows), 2)]
            apart, number = apart // 2, number // 2
        if apart == 1:
            return rows[0]
        places = self._once("add", self._once("mul", self.iota(), self.constant(apart, i32)),
                            self.constant(number, i32))
        row = self._pick(rows[0], places)
        for part in range(1, apart):
            here = self._once("cmp", places, self.constant(part * self.lanes, i32), cond="ge")
            row = self._once("select", here, self._pick(rows[part], places), row)
        return row

    def _half_of_slots(self, access: Access, at: dict[str, int], level: int, number: int, alive: Scalar) -> Value:
        """The even or the odd ones of pairs of bf16, which lie in a slot for each lane: a shift, or a mask."""
        slots = self._row_at(Access(access.base, access.disp, access.axes, i32), at, level, alive, shared=True)
        memo = self.levels[level].memo
        key = ("half of slots", slots, number)
        if key not in memo:
            half = self.emit(level, "and", [slots, self.constant(UPPER_HALF, i32)], ROW_I32) if number else self.emit(
                level, "shl", [slots], ROW_I32, amount=bf16.bits)
            memo[key] = self.emit(level, "bitcast", [half], ROW_F32)
        found: Value = memo[key]
        return found

    def _place_between(self, op: Op, apart: int, at: dict[str, int]) -> tuple[str | None, int] | None:
        """Which of the elements that are side by side a load of every `apart`-th takes, where these are a dimension by
        themselves and the function never stores there: the axis along it, if there is one, and the element."""
        tensor, last = op.operands[0], affine(op.operands[-1])
        dims = tensor.type.dims  # type: ignore[union-attr]
        if dims[-1] != apart or self.strides(tensor)[-1] != 1 or memory_of(tensor) in self.stored:
            return None
        if last is None or last.scalars or len(last.axes) > 1:
            return None
        if not last.axes:
            return None, last.constant
        (axis, step), = last.axes.items()
        bound = self.bound[axis]
        alone = step == 1 and last.constant == 0 and bound.offset == 0 and not bound.lane and bound.apart == 1
        return (axis, at[axis]) if alone else None

    def _coordinate_divided(self, index: Value, lane: str, at: dict[str, int]) -> Scalar:
        """Of an index that lanes share, what lane 0 has of which they have the quotient."""
        quotient = self._shared_quotient(index, lane)
        assert quotient is not None
        return self._scalar_at(quotient.operands[0], lane, at, 0)

    def _begins_at_vector(self, start: Scalar) -> bool:
        """Whether a coordinate is known to be a multiple of the lanes, as an extent less a rest is, where loops over
        whole vectors end."""
        if isinstance(start, int) or self.is_multiple(start, self.lanes):
            return self.is_multiple(start, self.lanes)
        op = start.op
        if op is None:
            first, step = self.steps.get(start, (1, 1))
            return step % self.lanes == 0 and self._begins_at_vector(first)
        if op.name == "s_add":
            return all(map(self._begins_at_vector, op.operands))
        rest = op.operands[1].op if op.name == "s_sub" else None
        if rest is None or rest.name not in ("s_mod", "s_and") or rest.operands[0] is not op.operands[0]:
            return False
        number = rest.operands[1].op
        below = number.attributes["value"] + (rest.name == "s_and") if number is not None and (
            number.name == "s_const") else 1
        return bool(below % self.lanes == 0 and (rest.name == "s_mod" or below & below - 1 == 0))

    def _moved(self, access: Access, index: Value, lane: str, at: dict[str, int], level: int, alive: Scalar) -> Value:
        """What lanes read whose index moves by at most one element from each to the next."""
        step = element_bytes(access.dtype)
        first, places = self._scalar_at(index, lane, at, 0), self._lane_places(index, lane, at)
        grows = _direction(index, lane) > 0
        known = self._known_reach(index, lane, at) if alive == self.lanes else None
        far: Scalar
        if known is not None:
            far = known
        else:
            last = self._scalar_at(index, lane, at, self.sub(alive, 1))
            far = self.sub(last, first) if grows else self.sub(first, last)
        start = first
        if not grows:
            start = self.sub(first, far)
            places = self._once("add", places, self.row_of(far)) if places is not None else None
        here = Access(self.add(access.base, self.mul(start, step)), access.disp,
                      {a: s for a, s in access.axes.items() if a != lane}, access.dtype)
        if places is None or far == 0:
            operands, attributes = self.address(here, at)
            return self.emit(level, "load_splat", operands, RowType(row_dtype(access.dtype)), dtype=access.dtype,
                             **attributes)
        return self._pick(self._row_at(here, at, level, self.add(far, 1)), places)

    def _row_at(self, access: Access, at: dict[str, int], level: int, count: Scalar, shared: bool = False) -> Value:
        """The first `count` elements at an address, and zeros. shared: by all loads of the level."""
        operands, attributes = self.address(access, at)
        inside = [] if isinstance(count, int) and count >= self.lanes else [self._once("mask_first", self.value(count))]
        memo = self.levels[level].memo if shared else {}
        key = ("row at", access.dtype, *operands, *inside, *attributes.values())
        if key not in memo:
            memo[key] = self.emit(level, "load", [*operands, *inside], RowType(row_dtype(access.dtype)),
                                  dtype=access.dtype, masked=bool(inside), **attributes)
        found: Value = memo[key]
        return found

    def _pick(self, row: Value, places: Value) -> Value:
        return self._once("pick", row, places)

    # Stores.

    def _stored_apart(self, op: Op, lane: str | None) -> int | None:
        """How many elements apart neighbouring lanes store, where rows can be made that fill what lies between."""
        access = self.access(op)
        stride, size = access.axes.get(lane or "", 0), element_bytes(access.dtype)
        dtype = op.operands[1].type.dtype  # type: ignore[union-attr]
        if access.gathers or is_join(op) or self.transposes_by_scatter or not is_as_in_memory(op):
            return None
        apart = stride // size if isinstance(stride, int) and stride % size == 0 else None
        return apart if apart in (STRIDES if self.facts.picks and dtype in PICKED else PAIR_STRIDES) else None

    def filling_axis(self, op: Op, lane: str | None) -> str | None:
        """The axis whose elements lie between those that neighbouring lanes store, side by side, and fill what is
        there."""
        apart, access = self._stored_apart(op, lane), self.access(op)
        for axis, step in access.axes.items() if apart is not None else ():
            if step == element_bytes(access.dtype) and axis != lane:
                bound, o = self.bound.get(axis), self.open.get(axis)
                if bound is not None:
                    whole = bound.offset == 0 and bound.count == apart and not bound.lane
                else:
                    whole = o is not None and o.offset == 0 and o.extent == apart
                return axis if whole else None
        return None

    def filled_stores(self, jobs: list[tuple[Op | Value, dict[str, int], Value]]) -> dict[int, list[int]]:
        """Of stores that fill what lies between lanes: the number of the first one -> of all, in their order."""
        numbers = {(op, tuple(sorted(at.items()))): number for number, (op, at, _) in enumerate(jobs)}
        found = {}
        for number, (op, at, _) in enumerate(jobs):
            lane = next((a for a in at if self.bound[a].lane), None)
            if not isinstance(op, Op) or lane is None or self._alive(lane) is None:
                continue
            axis = self.filling_axis(op, lane)
            if axis is None:
                others = [(other, at) for other in self._filled_together(op, lane, jobs)]
            else:
                others = [(op, {**at, axis: place}) for place in range(self.bound[axis].count)] * (at[axis] == 0)
            if others:
                found[number] = [numbers[other, tuple(sorted(place.items()))] for other, place in others]
        return found

    def _filled_together(self, op: Op, lane: str, jobs: list[tuple[Op | Value, dict[str, int], Value]]) -> list[Op]:
        """The stores that fill what lies between lanes with this one, which is the first in memory, if they are all
        that store to the tensor."""
        apart, access, size = self._stored_apart(op, lane), self.access(op), element_bytes(self.access(op).dtype)
        memory = memory_of(op.operands[0])
        alike = {root for root, _, _ in jobs if isinstance(root, Op) and memory_of(root.operands[0]) is memory}
        if len(alike) != apart:
            return []
        places = {}
        for other in alike:
            there = self.access(other)
            if there.base is access.base and there.axes == access.axes and not there.gathers and not is_join(other):
                places[there.disp - access.disp] = other
        return [places[n * size] for n in range(apart)] if set(places) == {n * size for n in range(apart)} else []

    def store_filled(self, op: Op, at: dict[str, int], rows: list[Value], streaming: bool) -> None:
        """Store what fills a stretch of memory: element n * count + c of it is that of lane n of row c."""
        access, count = self.access(op), len(rows)
        lane = next(a for a in at if self.bound[a].lane)
        alive = self._alive(lane)
        assert alive is not None
        operands, attributes = self.address(access, at)
        disp, row_bytes = attributes.pop("disp"), self.lanes * element_bytes(access.dtype)
        for part, row in enumerate(self._in_turns(rows)):
            left = self.sub(self.mul(alive, count), part * self.lanes)
            whole = isinstance(left, int) and left >= self.lanes
            inside = [] if whole else [self._once("mask_first", self.value(left))]
            self.effect("store", [row, *operands, *inside], dtype=access.dtype, masked=not whole,
                        disp=disp + part * row_bytes, streaming=streaming and whole and disp % row_bytes == 0,
                        **attributes)

    def _in_turns(self, rows: list[Value]) -> list[Value]:
        """As many rows as there are, whose elements follow each other as memory has them: one of each row in turn."""
        count = len(rows)
        if count == 1:
            return rows
        if count % 2 == 0:
            halves = self._in_turns(rows[0::2]), self._in_turns(rows[1::2])
            return [row for low, high in zip(*halves, strict=True) for row in self._two_rows("zip", low, high)]
        made = []
        for part in range(count):
            number = self._once("add", self.iota(), self.constant(part * self.lanes, i32))
            places = self._once("idiv", number, self.constant(count, i32))
            within = self._once("imod", number, self.constant(count, i32))
            row = self._pick(rows[0], places)
            for n, other in enumerate(rows[1:], 1):
                here = self._once("cmp", within, self.constant(n, i32), cond="eq")
                row = self._once("select", here, self._pick(other, places), row)
            made.append(row)
        return made

    def _alive(self, lane: str) -> Scalar | None:
        """How many lanes hold an element, if the mask says it."""
        mask = self.bound[lane].mask
        if mask is None:
            return self.lanes
        known = mask.op is not None and mask.op.name == "mask_first"
        return self.scalar("s_min", mask.op.operands[0], self.lanes) if known else None  # type: ignore[union-attr]

    # Indices along the lanes.

    def _scalar_at(self, index: Value, lane: str, at: dict[str, int], number: Scalar) -> Scalar:
        """An index in the lane of that number."""
        op = index.op
        if lane not in axes_of(index) or op is None:
            return self.integer(index, at)
        if op.name == "index":
            return self.add(self.coordinate(lane, at[lane]), number)
        parts = [self._scalar_at(v, lane, at, number) for v in op.operands]
        return parts[0] if op.name in SAME else self.scalar(_SCALARS[op.name], parts[0], parts[1])

    def _known_reach(self, index: Value, lane: str, at: dict[str, int]) -> int | None:
        """How far the last lane's index lies from the first one's, if that is known."""
        op = index.op
        assert op is not None
        if op.name == "index":
            return self.lanes - 1
        if op.name in ("min", "max"):
            return None
        reach = next(self._known_reach(v, lane, at) if op.name in (*SAME, "add", "sub", "floordiv") else None
                     for v in op.operands if lane in axes_of(v))
        if op.name != "floordiv" or reach is None:
            return reach
        divisor = _constant(op.operands[1])
        return reach // divisor if self._begins_at_multiple(op, lane, at) else None

    def _begins_at_multiple(self, quotient: Op, lane: str, at: dict[str, int]) -> bool:
        """Whether lane 0 has a multiple of the divisor, or all lanes lie between two of them."""
        divisor = _constant(quotient.operands[1])
        first = self._scalar_at(quotient.operands[0], lane, at, 0)
        if _direction(quotient.operands[0], lane) < 0:
            return False
        if isinstance(first, int):
            return first % divisor == 0 or first % divisor + self.lanes <= divisor
        if divisor % self.lanes == 0:
            return self.is_multiple(first, self.lanes)
        return divisor & (divisor - 1) == 0 and self.is_multiple(first, divisor)

    def _lane_places(self, index: Value, lane: str, at: dict[str, int]) -> Value | None:
        """By how much an index of each lane differs from that of lane 0; None: not at all."""
        op = index.op
        if lane not in axes_of(index) or op is None:
            return None
        if op.name == "index":
            return self.iota()
        rows = [self._lane_places(v, lane, at) for v in op.operands]
        if op.name in SAME:
            return rows[0]
        if op.name == "add":
            return rows[0] if rows[1] is None else rows[1]
        if op.name == "sub":
            return rows[0] if rows[1] is None else self._once("neg", rows[1])
        first = [self._scalar_at(v, lane, at, 0) for v in op.operands]
        if op.name == "floordiv":
            divisor = _constant(op.operands[1])
            if rows[0] is None:
                return None
            if self._begins_at_multiple(op, lane, at):
                return None if divisor % self.lanes == 0 else self._once("idiv", rows[0], self.constant(divisor, i32))
            rest = self.row_of(self.scalar("s_mod", first[0], divisor))
            return self._once("idiv", self._once("add", rows[0], rest), self.constant(divisor, i32))
        before = self.scalar(_SCALARS[op.name], first[0], first[1])
        moved = []
        for row, begin in zip(rows, first, strict=True):
            offset = self.row_of(self.sub(begin, before))
            moved.append(offset if row is None else self._once("add", row, offset))
        return self._once(op.name, *moved)

    def _once(self, name: str, *operands: Value, **attributes: str) -> Value:
        """A row or mask, made once where its operands are."""
        depth = max(self.depths.get(v, 0) for v in operands)
        memo = self.levels[depth].memo
        key = (name, operands, *attributes.values())
        if key not in memo:
            kept = {"pick": operands[0].type, "select": operands[-1].type, "cmp": MASK, "mask_first": MASK}
            memo[key] = self.emit(depth, name, list(operands), kept.get(name, ROW_I32), **attributes)
        found: Value = memo[key]
        return found

    def _two_rows(self, name: str, *rows: Value) -> tuple[Value, Value]:
        """What an op makes of two rows, once."""
        depth = max(self.depths.get(v, 0) for v in rows)
        memo = self.levels[depth].memo
        if (name, rows) not in memo:
            memo[name, rows] = self.emit_pair(depth, name, list(rows), {})
        found: tuple[Value, Value] = memo[name, rows]
        return found


SAME = ("cast", "full")
_SCALARS = {"add": "s_add", "sub": "s_sub", "min": "s_min", "max": "s_max", "floordiv": "s_floordiv"}


def _constant(value: Value) -> int:
    """The number that an index is, 0 if it is none."""
    form = affine(value)
    return form.constant if form is not None and form.is_constant else 0


def _direction(index: Value, lane: str) -> int:
    """1 if an index grows from each lane to the next by one or not at all, -1 if it falls so; 0 if it may do
    otherwise, or is the same in all."""
    op = index.op
    if op is None or lane not in axes_of(index):
        return 0
    if op.name == "index":
        return 1
    dtype: DType = index.type.dtype  # type: ignore[union-attr]
    if op.name not in (*SAME, *_SCALARS) or not dtype.is_integer or dtype.bits < i32.bits:
        return 0
    ways = [_direction(v, lane) for v in op.operands if lane in axes_of(v)]
    if op.name in ("min", "max"):
        return ways[0] if len(set(ways)) == 1 else 0
    if len(ways) != 1 or (op.name == "floordiv" and _constant(op.operands[1]) <= 0):
        return 0
    return -ways[0] if op.name == "sub" and lane in axes_of(op.operands[1]) else ways[0]


def is_near(index: Value, lane: str) -> bool:
    """Whether an index along the dimension whose elements are neighbours makes a load a window."""
    form = affine(index)
    if form is None:
        return bool(_direction(index, lane))
    return form.axes.get(lane) in (-1, *STRIDES)
