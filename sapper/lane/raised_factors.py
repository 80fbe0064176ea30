"""Elements that rows of fp8 meet, multiplied by 2**120 before the loop that adds up their products (float8_sums.py).

Enters: such a loop, in a function whose scratch memory has a known size. Leaves: a loop before it that copies the
elements, multiplied, to scratch memory, from where the products take them. There is nothing to copy where the last loop
at this place had the same ones, as all panels of a matrix have that share a row of scales: their addresses are kept
beside them, if the function does not write to where they lie. A loop inside of one whose extent is known keeps those of
each of its passes. Holds: what is read follows the counter of the loop, and no further.

Measured on a Zen 3, of the time with a product in each step, 4096 x 4096 from memory, one thread and two: one row 0.93
to 0.98, for gate and up 0.88 to 1.00, 2 rows 0.83 to 0.91, 4 0.86 to 1.00. Copied for each panel anew, by a loop by
hand, one row takes 0.97 to 1.00. An element of 256 or more is too large for that, and its loop runs again: with one in
each row, which is one block of 32, 2 rows take 0.78 to 0.80 of the time before, as without any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir.nodes import Block, Function, Op, Value
from ..ir.scratch import BUFFER_ALIGN_BYTES, scratch_bytes
from ..ir.types import ROW_F32, S64, f32, i64
from .nans import FIRST_SLOT
from .ops import LANE_OPS
from .simplify import constant

MOST_BYTES = 128 * 1024
"""Of what one loop has copied, in all passes of the loop around it."""
MOST_STREAMS = 7
"""Whose addresses, and how many elements there are, are kept in the line before what is copied."""
MOST_PASSES = 64
KEPT_BYTES = BUFFER_ALIGN_BYTES
_READ = frozenset({"load", "load_run", "load_splat", "s_load", "gather", "prefetch"})


@dataclass
class Factors:
    """The elements that a loop takes from memory one after the other, as streams.

    loop, around: the loop, and the one that it is in. bases, disps: where each stream begins, from the counter on.
    places: of each of the loop's loads the stream, and how far behind the begin of this it is. most: how many elements
    of a stream there are at most. passes: how many copies are kept. steady: nothing changes what was copied.
    """

    loop: Op
    around: Op | None
    lanes: int
    bases: list[Value]
    disps: list[int]
    places: dict[Op, tuple[int, int]]
    most: int
    passes: int
    steady: bool

    @property
    def stream_bytes(self) -> int:
        return -(-self.most * f32.size_bytes // BUFFER_ALIGN_BYTES) * BUFFER_ALIGN_BYTES

    @property
    def pass_bytes(self) -> int:
        return KEPT_BYTES + len(self.bases) * self.stream_bytes

    def place(self, load: Op) -> int:
        """Where a load finds its element: so far behind the address that `copy` gives, and the counter."""
        stream, behind = self.places[load]
        return KEPT_BYTES + stream * self.stream_bytes + behind


def factors_of(function: Function, loop: Op, around: Op | None, met: frozenset[Value]) -> Factors | None:
    """The elements `met` of a loop, if all are f32 that follow one another in memory as the counter does, and there is
    room for them."""
    body, step, lanes = loop.blocks[0], loop.attributes["step"], function.attributes["lanes"]
    loads = [op for op in body.ops if op.name == "load_splat" and op.result in met]
    most = _most(loop.operands[1], loop.operands[0])
    if most is None or most < lanes or lanes % (2 * step) or len(loads) != len(met) or any(
            dims for _, axes in function.attributes["scratch"] for _, dims, _ in axes):
        return None
    by_base: dict[Value, list[Op]] = {}
    for load in loads:
        a = load.attributes
        if a["dtype"] is not f32 or a.get("near") or a.get("scale", 1) != f32.size_bytes or (
                load.operands[1:] != [body.arguments[0]]):
            return None
        by_base.setdefault(load.operands[0], []).append(load)
    bases: list[Value] = []
    disps: list[int] = []
    places: dict[Op, tuple[int, int]] = {}
    for base, those in by_base.items():
        for load in sorted(those, key=lambda op: op.attributes.get("disp", 0)):
            disp = load.attributes.get("disp", 0)
            if not bases or bases[-1] is not base or disp - disps[-1] >= step * f32.size_bytes:
                bases.append(base)
                disps.append(disp)
            places[load] = len(bases) - 1, disp - disps[-1]
    if len(bases) > MOST_STREAMS or any(behind % f32.size_bytes for _, behind in places.values()):
        return None
    found = Factors(loop, around, lanes, bases, disps, places, most, 1, _are_steady(function, set(bases)))
    if found.pass_bytes > MOST_BYTES:
        return None
    passes = _passes(around, [*bases, loop.operands[0]]) if around is not None and found.steady else 1
    if passes * found.pass_bytes <= MOST_BYTES and (
            around is None or found.pass_bytes % around.attributes.get("step", 1) == 0):
        found.passes = passes
    return found


class Copier:
    """Writes the copies of a function's loops. emit, append: ops where they are wanted, in the head of the function or
    before a loop."""

    def __init__(self, function: Function, emit: Callable[..., Value], append: Callable[[Op], None]) -> None:
        self.buffers: list[list[object]] = function.attributes["scratch"]
        self.emit = emit
        self.append = append
        self.memory: Value | None = None

    def number(self, value: int) -> Value:
        return self.emit("s_const", [], S64, value=value)

    def begin(self, factors: Factors) -> Value:
        """In the head of the function: where the copies will be, of which there are none yet."""
        if self.memory is None:
            each = self.emit("s_mul", [self.emit("worker", [], S64), self.emit("arg", [], S64, slot=1)], S64)
            self.memory = self.emit("s_add", [self.emit("arg", [], S64, slot=0), each], S64)
        end = scratch_bytes(self.buffers, {})   # type: ignore[arg-type]
        self.buffers.append([1, [[factors.passes * factors.pass_bytes, [], 1]]])
        here = self.emit("s_add", [self.memory, self.number(end)], S64)
        for number in range(factors.passes if factors.steady else 0):
            self.append(Op("s_store", [self.number(0), here], (), _kept(number * factors.pass_bytes)))
        return here

    def copy(self, factors: Factors, here: Value, stop: Value, raise_: Value) -> Value:
        """Before the loop, which goes to `stop`, so many times the lanes: from where it takes what is copied."""
        start, around = factors.loop.operands[0], factors.around
        if factors.passes > 1:
            assert around is not None
            steps = self.emit("s_sub", [around.blocks[0].arguments[0], around.operands[0]], S64)
            step_bytes = self.number(factors.pass_bytes // around.attributes["step"])
            here = self.emit("s_add", [here, self.emit("s_mul", [steps, step_bytes], S64)], S64)
        first = self.emit("s_mul", [start, self.number(f32.size_bytes)], S64)
        copied_stop = self.emit("s_select", [self.differ(factors, here, first, stop), stop, start], S64) if (
            factors.steady) else stop
        copied = self.emit("s_sub", [here, first], S64)
        inside = Block([S64])
        counter = inside.arguments[0]
        for stream, (base, disp) in enumerate(zip(factors.bases, factors.disps, strict=True)):
            where = {"dtype": f32, "scale": f32.size_bytes, "indexed": True, "masked": False}
            row = Op("load", [base, counter], (ROW_F32,), {**where, "disp": disp})
            raised = Op("mul", [row.result, raise_], (ROW_F32,))
            inside.ops += [row, raised, Op("store", [raised.result, copied, counter], (), {
                **where, "disp": KEPT_BYTES + stream * factors.stream_bytes, "streaming": False})]
        inside.ops.append(Op("yield", []))
        self.append(Op("loop", [start, copied_stop], (), {"step": factors.lanes, "label": "raise"}, [inside]))
        return copied

    def differ(self, factors: Factors, here: Value, first: Value, stop: Value) -> Value:
        """s64: 0 if what is copied at `here` is what is wanted, which is kept there now."""
        start = factors.loop.operands[0]
        wanted = [self.emit("s_add", [base, first], S64) for base in dict.fromkeys(factors.bases)]
        if constant(start) is None or constant(stop) is None:
            wanted.append(self.emit("s_sub", [stop, start], S64))
        found = None
        for number, value in enumerate(wanted):
            kept = self.emit("s_load", [here], S64, **_kept(number * i64.size_bytes))
            other = self.emit("s_xor", [value, kept], S64)
            found = other if found is None else self.emit("s_or", [found, other], S64)
            self.append(Op("s_store", [value, here], (), _kept(number * i64.size_bytes)))
        assert found is not None
        return found


def _kept(disp: int) -> dict[str, object]:
    return {"dtype": i64, "scale": 1, "disp": disp, "indexed": False}


def _most(value: Value, base: Value | None, depth: int = 8) -> int | None:
    """What a scalar is at most, less `base`; None where that is not known."""
    op = value.op
    if value is base:
        return 0
    if op is None or not depth:
        return None
    if op.name == "s_const":
        number, of_base = constant(value), 0 if base is None else constant(base)
        return None if number is None or of_base is None else number - of_base
    if op.name == "s_sub" and base is None:
        a, b = op.operands
        found = [_most(a, b, depth - 1), _most(a, None, depth - 1) if _is_positive(b) else None]
        return min((m for m in found if m is not None), default=None)
    if op.name in ("s_min", "s_max"):
        found = [_most(v, base, depth - 1) for v in op.operands]
        known = [m for m in found if m is not None]
        if op.name == "s_min":
            return min(known, default=None)
        return max(known) if len(known) == len(found) else None
    if op.name == "s_add":
        for a, b in (op.operands, op.operands[::-1]):
            one, other = _most(a, base, depth - 1), _most(b, None, depth - 1)
            if one is not None and other is not None:
                return one + other
    return None


def _is_positive(value: Value) -> bool:
    """Or 0."""
    op, number = value.op, constant(value)
    if number is not None:
        return number >= 0
    return op is not None and op.name == "s_and" and any(map(_is_positive, op.operands))


def _passes(around: Op, values: list[Value]) -> int:
    """How many passes a loop makes, if any of these values are others in each."""
    start, stop = map(constant, around.operands[:2]) if around.name == "loop" else (None, None)
    if start is None or stop is None:
        return 1
    passes = -(-(stop - start) // around.attributes["step"])
    counter = around.blocks[0].arguments[0]

    def follows(value: Value) -> bool:
        return value is counter or (value.op is not None and not value.op.blocks and any(
            map(follows, value.op.operands)))

    return passes if 1 < passes <= MOST_PASSES and any(map(follows, values)) else 1


def _are_steady(function: Function, bases: set[Value]) -> bool:
    """Whether these are addresses of tensors that the function does not write to."""
    slots: list[str] = function.attributes["slots"]
    memo: dict[Value, set[str] | None] = {}

    def tensors(value: Value) -> set[str] | None:
        """Names of the tensors that an address may be of, "" for scratch memory; None where that is not known."""
        if value not in memo:
            op = value.op
            if op is None:      # a counter, or something that a loop carries
                owner = value.owner
                memo[value] = set() if isinstance(owner, Block) and owner.arguments[0] is value else None
            elif op.name == "arg":
                slot = op.attributes["slot"]
                name = slots[slot - FIRST_SLOT] if slot >= FIRST_SLOT else ""
                memo[value] = {name} if not name or name.endswith(".data") else set()
            elif op.blocks:
                memo[value] = None
            elif op.name == "s_load":
                memo[value] = set()
            else:
                each = [tensors(v) for v in op.operands if v.type == S64]
                memo[value] = None if None in each else {name for names in each if names for name in names}
        return memo[value]

    read: set[str] = set()
    for base in bases:
        names = tensors(base)
        if names is None or len(names) != 1:
            return False
        read |= names
    if "" in read:
        return False
    for op in function.walk():
        if op.name not in _READ and not op.blocks and not LANE_OPS.rows[op.name].pure:
            for names in (tensors(v) for v in op.operands if v.type == S64):
                if names is None or names & read:
                    return False
    return True
