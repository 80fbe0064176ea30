"""Proves that the warps of a worker wait for each other, for copies and for matrix instructions wherever they must.

Enters: a lane function whose workers have several warps. Leaves: the faults that were found, none if it is right. Knows
nothing of how the function was made: all warps of one worker are run on example extents, scalars and addresses only,
and every access of near memory is compared with those before it. An access must *know* that the ones it depends on are
over, from what it waited for, not from the order in which they happened to run:

    a warp knows what it did, what warps knew that arrived where it waited, and that a signal's phases are over
    (vector clocks: Mattern, "Virtual Time and Global States of Distributed Systems", 1989)
    a copy is over when its signal's phase is, or after the async_wait of the warp that issued it
    a matrix instruction of a group reads until its group_wait, a copy of a box from near memory until its store_wait
    products whose sums have a memory of their own are over when the phase is of a signal that a later sums_signal of
    their warp arrived at; that warp's own are done in turn
    a wait for a parity is taken at its weakest: for the first phase of that parity of which the warp does not know yet;
    if it knows of one, and of none of the other parity since, it passes at once

Where workers hand over to each other, several of them are run, and memory by which they do so is compared likewise; of
a cluster all are.

Threads of control depend on scalars alone, so that one order of events stands for all. Loops in which nobody waits are
run once, their counters as intervals; those that only start copies, as often as they say; the others a few rounds only,
which suffice to use every stage again. Lanes that a mask turns off touch nothing, where it is made of known scalars and
of the lanes' numbers; where memory holds it, or it is off in all of them, any may be on. What is not seen that way:
faults that come only after more rounds, or from scalars that memory holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import DTYPES, MASK, ROW_I32, ScalarType
from . import fragments
from .arithmetic import pure_function
from .ops import ADDRESS_AT
from .synchronise import bytes_of_lane

ROUNDS, TILES = 6, 3
"""Rounds of a loop in which warps wait, every other time one less, and how often such a loop is run: stages are left in
each state."""
EXTENT, SCALAR = 576, 581
"""Every run-time dimension, and every scalar: what a loop goes to that ends at one is no multiple of a piece."""
MOST_ROUNDS = 32
"""Of a loop around loops of waits, none of which may run."""
WORKERS = 2
HANDING = ((EXTENT, WORKERS), (128, WORKERS), (128, 8))
"""Extents and workers where workers hand over: the first with which they do counts. Shares that go with the number of
tiles want few of them."""
NEAR_STRIDE, SCRATCH, SUMS = 1 << 24, 1 << 40, 1 << 60
"""From a worker's near memory, or its sums, to the next one's, and where scratch memory and sums begin."""
SUMS_PARTS = fragments.SUMS_ROWS // fragments.ROWS
"""Of sums memory: a column of 16 rows, which a warp moves at once, has an address."""
PAGE_BYTES = 1024
"""Places are looked for among those of the same pages: most are a row or two of a tile."""
MOST_FAULTS = 8

Interval = tuple[int, int]
Clock = dict[int, int]
"""Agent (a warp, or a signal) -> its latest epoch (phase) that is known to be over."""

_SYNCHRONISES = frozenset({
    "hand_over", "take_over", "sync_warps", "sync_cluster",
    "signal_start", "signal_fence", "signal_arrive", "signal_expect", "signal_wait", "tensor_copy",
    "store_fence", "tensor_store", "store_wait",
    "group_fence", "group_multiply", "group_multiply_rows", "group_commit", "group_wait", "async_copy",
    "async_commit", "async_wait", "sums_open", "sums_close", "sums_multiply", "sums_multiply_rows", "sums_signal",
    "sums_load", "sums_store", "sums_acquire", "sums_release"})
_WAITS = frozenset({"take_over", "sync_warps", "sync_cluster", "signal_wait", "group_wait", "async_wait"})
_FIRST_SUM = {"group_multiply": 2, "group_multiply_rows": 5}
"""Operands before the sums."""
_MATRICES = frozenset({"load_matrix", "store_matrix"})
_WRITES = frozenset({"store", "store_run", "store_lane0", "scatter", "s_store", "store_matrix"})


class AsyncError(Exception):
    """A lane function whose warps do not wait where they must."""


@dataclass(frozen=True, slots=True)
class Fault:
    """op: what came too early. found: in words. other: the op that it did not wait for, if there is one."""

    op: Op
    found: str
    other: Op | None = None

    def __str__(self) -> str:
        where = f"{self.op.location}: " if self.op.location is not None else ""
        return f"{where}{self.op.name}: found {self.found}" + (f" ({self.other.name})" if self.other else "")


class Row(NamedTuple):
    """An integer in each lane, and their extremes."""

    lanes: Any
    low: int
    high: int

    @staticmethod
    def of(lanes: Any) -> Row:
        return Row(lanes, int(np.minimum.reduce(lanes)), int(np.maximum.reduce(lanes)))


_COMPUTE, _TOUCH, _LOOP, _CHOOSE, _WAIT, _ACT = range(6)


class Step(NamedTuple):
    """One op, looked up once: it is run by all warps in all rounds. do: by what, as `how` says."""

    op: Op
    how: int
    do: Any


class Loop(NamedTuple):
    """waits, waits_inside: whether warps wait in it, and in a loop in it. entering, carried, leaving: what takes the
    values of what, when it begins, for the next round and behind it; sums and others that are never known left out."""

    waits: bool
    waits_inside: bool
    entering: list[tuple[Value, Value]]
    carried: list[tuple[Value, Value]]
    leaving: list[tuple[Value, Value]]


class Form(NamedTuple):
    """What an ordinary access of near memory always has. base, offset: of its address, the offset times `scale`;
    rows: it is a row, in which the bits of `flip` are inverted. lane_bytes, lanes: each lane's, and how many of them
    lie side by side from there on. mask: of the lanes that touch memory, None for all."""

    base: Value
    offset: Value | None
    rows: bool
    flip: int
    disp: int
    scale: int
    lane_bytes: int
    lanes: int
    mask: Value | None
    writes: bool

    @staticmethod
    def of(op: Op, lanes: int) -> Form:
        known = op.attributes
        at = ADDRESS_AT.get(op.name, 0)
        lane_bytes = 16 if op.name in _MATRICES else bytes_of_lane(op)
        rows = op.name in ("gather", "scatter", *_MATRICES) or bool(known.get("gathered"))
        beside = lanes if op.name in ("load", "load_run", "store", "store_run") and not rows else 1
        offset = op.operands[at + 1] if rows or known.get("indexed") else None
        return Form(op.operands[at], offset, rows, known.get("flip", 0), known.get("disp", 0), known.get("scale", 1),
                    lane_bytes, beside, op.operands[-1] if known.get("masked") else None, op.name in _WRITES)


@dataclass(slots=True, eq=False)
class Access:
    """Of bytes of near memory. agent, epoch: whose, when it is over (None: nobody waited yet). ordinary: not by a copy
    of boxes or a matrix instruction of a group."""

    op: Op
    agent: int
    epoch: int | None
    ordinary: bool


@dataclass(slots=True, eq=False)
class Place:
    """An interval of near memory: the last write, reads since by warp, the places that it overlaps, and those of them
    that were ever written."""

    low: int
    high: int
    write: Access | None = None
    reads: dict[int, Access] = field(default_factory=dict)
    others: list[Place] = field(default_factory=list)
    written: list[Place] = field(default_factory=list)


@dataclass(slots=True)
class Signal:
    """each: arrivals of a phase; arrivals, announced: still to come. gathered: what those who arrived knew. published:
    the same for each phase that is over. starter: who started it, when; fenced: for copies to see."""

    agent: int
    each: int
    arrivals: int
    starter: Access
    fenced: bool = False
    announced: int = 0
    gathered: Clock = field(default_factory=dict)
    published: list[Clock] = field(default_factory=list)


@dataclass(slots=True)
class Warp:
    """number: among all warps, of which it is the one `own` of a worker. batches: the reads of each batch of matrix
    instructions that is not known to be done; issued: of those in no batch; groups, copies: likewise of copies by
    lanes; stores: batches of copies of boxes from near memory, of which the last has not ended. started: accesses of
    products whose sums have a memory, of no sums_signal yet; signalled: how many of these there were; acquired: whether
    its next product, load or store of sums comes after what it waited for; moving: whether these may come after what it
    tells. held: an ordinary access that the next one may belong to, the bytes, and whether it writes. runs: of each
    loop in which it waits."""

    number: int
    worker: int = 0
    own: int = 0
    clock: Clock = field(default_factory=dict)
    epoch: int = 0
    values: dict[Value, Any] = field(default_factory=dict)
    batches: list[list[Access]] = field(default_factory=list)
    issued: list[Access] = field(default_factory=list)
    fenced: bool = False
    groups: list[list[Access]] = field(default_factory=list)
    copies: list[Access] = field(default_factory=list)
    stores: list[list[Access]] = field(default_factory=lambda: [[]])
    started: list[Access] = field(default_factory=list)
    signalled: int = 0
    acquired: bool = False
    moving: bool = False
    held: tuple[Op, int, int, bool] | None = None
    runs: dict[Op, int] = field(default_factory=dict)


def rehearse(function: Function) -> list[Fault]:
    """The faults, one of each kind and line, at most MOST_FAULTS."""
    return [*_sums_in_flight(function), *_rehearsed(function)][:MOST_FAULTS]


def _rehearsed(function: Function) -> list[Fault]:
    if not any(op.name == "take_over" or op.attributes.get("handed") for op in function.walk()):
        cluster = function.attributes.get("cluster", 1)
        return _Rehearsal(function, EXTENT, WORKERS * cluster, cluster).run()
    found: list[Fault] = []
    for extent, workers in HANDING:
        rehearsal = _Rehearsal(function, extent, workers, workers)
        found += rehearsal.run()
        if found or rehearsal.handed_over:
            break
    return found


def check(function: Function) -> None:
    """Raises AsyncError with the faults of a function, if it has several warps and any."""
    if function.attributes.get("warps", 1) > 1:
        faults = rehearse(function)
        if faults:
            raise AsyncError(f"{function.name}: {'; '.join(map(str, faults))}; expected a wait between")


# Sums of matrix instructions of a group: they may be touched by the next ones, and by a wait for all of them.


def _sums_in_flight(function: Function) -> Iterator[Fault]:
    """Uses of sums before a wait for all batches."""
    flying: set[Value] = set()
    loops = [op for op in function.walk() if op.name == "loop"]
    users = [op for op in function.walk() if op.name in _FIRST_SUM]
    for op in users:
        flying.update(op.results)
    grown = True
    while grown:
        before = len(flying)
        for loop in loops:
            block = loop.blocks[0]
            for at, value in enumerate(block.ops[-1].operands):
                if value in flying or loop.operands[at + 2] in flying:
                    flying.update((block.arguments[at + 1], loop.results[at]))
        grown = len(flying) > before
    for op in function.walk():
        for at, value in enumerate(op.operands):
            waits = op.name == "group_wait" and op.attributes["pending"] == 0
            if value in flying and at < _FIRST_SUM.get(op.name, len(op.operands)) and not waits \
                    and op.name not in ("yield", "loop"):
                yield Fault(op, "sums that a matrix instruction may still be working on", value.op)
                break


class _Rehearsal:
    """extent: of every dimension. workers: of the launch, of whom the first `rehearsed` are run. handed_over: whether
    any of them had something for another one. foreign: what others did in a worker's near memory."""

    def __init__(self, function: Function, extent: int, workers: int, rehearsed: int) -> None:
        self.function, self.extent, self.workers = function, extent, workers
        self.handed: dict[tuple[int, int], Clock] = {}
        self.handed_over = False
        self.foreign: list[tuple[int, Access]] = []
        attributes = function.attributes
        self.near_bytes: int = attributes.get("near_bytes", 0)
        each = attributes.get("warps", 1)
        self.warps = [Warp(n, *divmod(n, each)) for n in range(rehearsed * each)]
        self.lanes: int = attributes["lanes"]
        self.faults: dict[tuple[object, ...], Fault] = {}
        self.places: dict[Interval, Place] = {}
        self.pages: dict[int, list[Place]] = {}
        self.loaded: dict[Op, int] = {}
        self.signals: dict[int, Signal] = {}
        self.words: dict[int, Any] = {}
        self.sums: dict[int, int] = {}
        self.opened: dict[int, Op] = {}
        self.cluster = attributes.get("cluster", 1)
        sizes = [each] * rehearsed + [each * rehearsed]     # the warps of each worker, and of all
        self.met = [[0] * size for size in sizes]
        self.meeting: list[Clock] = [{} for _ in sizes]
        self.meetings: list[list[Clock]] = [[] for _ in sizes]
        self.waits: dict[Block, bool] = {}
        self.needed = self._needed()
        self.steps: dict[Block, list[Step]] = {}
        self.loops: dict[Op, Loop] = {}
        self.spans: dict[tuple[Op, int], int] = {}
        self.flipped: dict[tuple[bytes, int, int], Interval] = {}
        self.iota = Row.of(np.arange(self.lanes, dtype=np.int32))
        self.splats: dict[int, Row] = {}
        self.rows: dict[tuple[Any, ...], tuple[list[Any], Row | None]] = {}
        self.holding: dict[Op, bool] = {}

    # Which ops matter.

    def synchronises(self, block: Block) -> bool:
        if block not in self.waits:
            self.waits[block] = any(op.name in _SYNCHRONISES or any(map(self.synchronises, op.blocks))
                                    for op in block.ops)
        return self.waits[block]

    def holds_wait(self, op: Op) -> bool:
        """Whether a warp waits somewhere in an op with blocks."""
        if op not in self.holding:
            self.holding[op] = any(inner.name in _WAITS for inner in op.walk())
        return self.holding[op]

    def _needed(self) -> set[Op]:
        """Ops that touch near memory, that wait, and what their operands, but for data, are made of."""
        needed: set[Op] = set()
        stack: list[Op] = []

        def want(values: list[Value]) -> None:
            stack.extend(v.op for v in values if v.op is not None and v.op not in needed)

        def visit(block: Block) -> bool:
            found = False
            for op in block.ops:
                inside = [visit(nested) for nested in op.blocks]
                if not (any(inside) or op.name in _SYNCHRONISES or self._is_near(op)):
                    continue
                found = True
                needed.add(op)
                if op.name == "loop":
                    want(op.operands[:2])
                    want([v for v in (*op.operands[2:], *op.blocks[0].ops[-1].operands)
                          if isinstance(v.type, ScalarType)])
                elif op.name == "store_run":
                    want(op.operands[:2 if op.attributes.get("gathered") else 1])
                    want(op.operands[-1:] if op.attributes.get("masked") else [])
                elif op.name == "store_matrix":
                    want(op.operands[:2])
                elif op.name in _WRITES and op.name != "s_store":
                    want(op.operands[1:])
                elif op.name == "group_wait":
                    pass
                elif op.name in _FIRST_SUM or op.name == "sums_store":
                    want([v for v in op.operands if isinstance(v.type, ScalarType)])
                else:
                    want(op.operands)
            return found

        visit(self.function.body)
        while stack:
            op = stack.pop()
            if op not in needed:
                needed.add(op)
                want(op.operands)
        return needed

    @staticmethod
    def _is_near(op: Op) -> bool:
        return op.name in _MATRICES or bool(op.attributes.get("near") or op.attributes.get("handed"))

    # Running.

    def run(self) -> list[Fault]:
        running = {warp.number: self._block(warp, self.function.body) for warp in self.warps}
        stuck: dict[int, Op] = {}
        while running:
            moved = False
            for number, steps in list(running.items()):
                waits_at = next(steps, None)
                if waits_at is None:
                    self.flush(self.warps[number])
                    del running[number]
                    stuck.pop(number, None)
                    moved = True
                else:
                    moved |= stuck.get(number) is not waits_at or self.progress
                    stuck[number] = waits_at
                self.progress = False
            if not moved:
                for op in dict.fromkeys(stuck.values()):
                    self.fault(op, "a wait for what nobody does")
                break
        for access in (access for warp in self.warps for batch in warp.stores for access in batch):
            self.fault(access.op, "a copy from near memory that the warp did not wait for before its end")
        for worker in self.sums:
            self.fault(self.opened[worker], "sums that nobody gave up")
        for worker, access in self.foreign:
            if not all(self.knows(warp, access) for warp in self.warps if warp.worker == worker):
                self.fault(access.op, "another worker that may have ended before")
        return list(self.faults.values())

    progress = False

    def fault(self, op: Op, found: str, other: Op | None = None) -> None:
        self.faults.setdefault((op.name, op.location, found, other and other.name), Fault(op, found, other))

    def _block(self, warp: Warp, block: Block) -> Iterator[Op]:
        """Run a block; gives the op at which the warp waits, as long as it does."""
        values = warp.values
        steps = self.steps.get(block)
        if steps is None:
            steps = self.steps[block] = [self._step(op) for op in block.ops if op in self.needed]
        for op, how, do in steps:
            if how == _COMPUTE:
                values[op.results[0]] = do(warp)
            elif how == _TOUCH:
                self._ordinary(warp, op, do)
            elif how == _LOOP:
                yield from self._loop(warp, op)
            elif how == _CHOOSE:
                taken = values.get(op.operands[0])
                chosen = op.blocks if not isinstance(taken, int) else [op.blocks[not taken]]
                for nested in chosen:
                    yield from self._block(warp, nested)
            else:
                self.flush(warp)
                if how == _WAIT:
                    yield from do(self, warp, op)
                else:
                    do(self, warp, op)
                    self.progress = True

    def _step(self, op: Op) -> Step:
        name = op.name
        if name == "loop" or name == "tasks":
            return Step(op, _LOOP, None)
        if name == "if":
            return Step(op, _CHOOSE, None)
        if name in _SYNCHRONISES:
            return Step(op, _WAIT, _WAITING[name]) if name in _WAITING else Step(op, _ACT, _ACTIONS[name])
        if self._is_near(op):
            return Step(op, _TOUCH, Form.of(op, self.lanes))
        return Step(op, _COMPUTE, self._evaluation(op))

    def _loop(self, warp: Warp, op: Op) -> Iterator[Op]:
        values, block = warp.values, op.blocks[0]
        counter = block.arguments[0]
        first, last, step = (warp.worker, values.get(op.operands[0]), self.workers) if op.name == "tasks" else (
            *map(values.get, op.operands[:2]), op.attributes["step"])
        loop = self.loops.get(op)
        if loop is None:
            loop = self.loops[op] = self._loop_of(op)
        for argument, value in loop.entering:
            values[argument] = values.get(value)
        numbers = range(first, last, step) if isinstance(first, int) and isinstance(last, int) else None
        if not self.synchronises(block):
            low, high = _bounds(first), _bounds(last)
            values[counter] = None if low is None or high is None else (low[0], max(low[0], high[1] - 1))
            if numbers:
                values[counter] = numbers[0], numbers[-1]
            for argument, _ in loop.entering:
                values[argument] = None
            if numbers is None or numbers:
                yield from self._block(warp, block)
            for result, _ in loop.leaving:
                values[result] = None
            return
        if numbers is None:
            self.fault(op, "a loop of waits whose bounds memory holds")
            return
        if loop.waits and not loop.waits_inside:
            before = warp.runs.get(op, 0)
            # Who waits once for each tile has as many tiles as who does so in a loop for each.
            of_tiles = op.name == "tasks" or op.attributes.get("label") == "tile"
            numbers = numbers[:max(0, TILES - before) if of_tiles else ROUNDS - before % 2]
            warp.runs[op] = before + (len(numbers) if of_tiles else 1)
        for count, number in enumerate(numbers):
            if loop.waits_inside and (count >= MOST_ROUNDS or (warp.runs and min(warp.runs.values()) >= TILES)):
                break
            values[counter] = number
            yield from self._block(warp, block)
            carried = [values.get(v) for _, v in loop.carried]
            for (argument, _), known in zip(loop.carried, carried, strict=True):
                values[argument] = known
        for result, argument in loop.leaving:
            values[result] = values.get(argument)

    def _loop_of(self, op: Op) -> Loop:
        block = op.blocks[0]
        waits_inside = any(self.holds_wait(inner) for inner in block.ops if inner.blocks and inner.name != "if")
        pairs: list[list[tuple[Value, Value]]] = [[], [], []]
        if op.name == "loop":
            arguments = block.arguments[1:]
            for kept, pair in zip(pairs, ((arguments, op.operands[2:]), (arguments, block.ops[-1].operands),
                                          (op.results, arguments)), strict=True):
                kept += [(to, value) for to, value in zip(*pair, strict=True)
                         if isinstance(to.type, ScalarType) or to.type in (ROW_I32, MASK)]
        return Loop(self.holds_wait(op), waits_inside, *pairs)

    def _evaluation(self, op: Op) -> Callable[[Warp], Any]:
        """What gives the result of an op for a warp: a scalar, an interval, a row, or None where nothing is known."""
        name, operands = op.name, op.operands
        if name == "near_memory":
            return lambda warp: warp.worker * NEAR_STRIDE
        if name == "worker":
            return lambda warp: warp.worker
        if name == "warp":
            return lambda warp: warp.own
        if name == "s_load":        # groups begin and end where memory says: a later load is of a larger number
            return lambda warp: self.loaded.setdefault(op, EXTENT * (1 + len(self.loaded)))
        if name in ("s_const", "splat_const", "arg", "workers", "iota"):
            result = self._constant(op)
            return lambda warp: result
        if name not in _SCALARS or len(operands) != 2 or name == "s_cmp" or not isinstance(op.results[0].type,
                                                                                           ScalarType):
            return lambda warp: self._computed(op, [warp.values.get(v) for v in operands])
        function, divides = _SCALARS[name], name in ("s_floordiv", "s_mod")
        first, second = operands

        def scalar(warp: Warp) -> Any:
            a, b = warp.values.get(first), warp.values.get(second)
            if isinstance(a, int) and isinstance(b, int):
                return None if divides and not b else function(a, b)
            return None if a is None or b is None else _corners(name, function, a, b)

        return scalar

    def _constant(self, op: Op) -> Any:
        """What is the same for all warps."""
        if op.name == "s_const":
            return op.attributes["value"]
        if op.name == "splat_const":
            return self.splat(op.attributes["value"]) if op.results[0].type == ROW_I32 else None
        if op.name == "arg":
            slot = op.attributes["slot"]
            name = "" if slot < 3 else self.function.attributes["slots"][slot - 3]
            return (slot + 1) * SCRATCH if slot < 3 or name.endswith(".data") else \
                SCALAR if name.startswith("scalar.") else self.extent
        return self.workers if op.name == "workers" else self.iota

    def _computed(self, op: Op, operands: list[Any]) -> Any:
        for value in operands:
            if value is None:
                return None
        if isinstance(op.results[0].type, ScalarType):
            function = _SCALARS.get(op.name)
            if function is None:
                return None
            if op.name == "s_cmp":
                return int(_COMPARE[op.attributes["cond"]](*operands)) if _all_ints(operands) else (0, 1)
            if op.name == "s_select":
                if isinstance(operands[0], int):
                    return operands[2 - bool(operands[0])]
                return _hull(*(_bounds(v) or (0, 0) for v in operands[1:]))
            if _all_ints(operands):
                return None if op.name in ("s_floordiv", "s_mod") and not operands[1] else function(*operands)
            return _corners(op.name, function, *operands)
        # An interval of one number, as the counter of a loop's only round is.
        operands = [v[0] if not isinstance(v, int | Row) and v[0] == v[1] else v for v in operands]
        if op.name == "splat":
            return self.splat(operands[0]) if isinstance(operands[0], int) else None
        if op.results[0].type not in (ROW_I32, MASK) or not all(isinstance(v, (int, Row)) for v in operands):
            return None     # an interval is of a scalar that is not one number
        # Most rows are the same in all warps, and in all rounds.
        key = op, *[id(v) if isinstance(v, Row) else v for v in operands]
        made = self.rows.get(key)
        if made is None:
            known = pure_function(op, self.lanes)
            result = None if known is None else Row.of(known(*(v.lanes if isinstance(v, Row) else v for v in operands)))
            made = self.rows[key] = operands, result    # operands stay, and so do their numbers
        return made[1]

    def splat(self, number: int) -> Row:
        """The low 32 bits in every lane."""
        found = self.splats.get(number)
        if found is None:
            lanes = np.full(self.lanes, number & 0xFFFFFFFF, np.uint32).view(np.int32)
            found = self.splats[number] = Row.of(lanes)
        return found

    # Knowledge.

    def knows(self, warp: Warp, access: Access) -> bool:
        if access.epoch is None:
            return False
        return access.agent == warp.number or warp.clock.get(access.agent, -1) >= access.epoch

    def release(self, warp: Warp, into: Clock) -> None:
        """What the warp knows, and all it did."""
        _merge(into, warp.clock)
        into[warp.number] = warp.epoch
        warp.epoch += 1

    def place(self, interval: Interval) -> Place:
        found = self.places.get(interval)
        if found is None:
            low, high = interval
            found = self.places[interval] = Place(low, high)
            pages = [self.pages.setdefault(page, []) for page in range(low // PAGE_BYTES, high // PAGE_BYTES + 1)]
            near = pages[0] if len(pages) == 1 else dict.fromkeys(other for page in pages for other in page)
            for other in near:
                if other.low < high and low < other.high:
                    found.others.append(other)
                    other.others.append(found)
            found.written = [other for other in found.others if other.write is not None]
            if low < high:
                found.others.append(found)
            for page in pages:
                page.append(found)
        return found

    def touch(self, warp: Warp, interval: Interval, access: Access, writes: bool, in_turn: bool = False) -> None:
        """in_turn: what one agent does so is done in its order."""
        low, high = interval
        first = low // NEAR_STRIDE * NEAR_STRIDE if 0 <= low < SCRATCH else 0
        if low >= SUMS and high - 1 - low >= self.sums.get(warp.worker, 0) - low % fragments.SUMS_COLUMNS:
            self.fault(access.op, "sums that are not set aside")
            return
        if low < SCRATCH and not first <= low <= high <= first + self.near_bytes:
            self.fault(access.op, f"bytes {low - first} to {high - first} of {self.near_bytes} of near memory")
            return
        place = self.place(interval)
        number, epoch_of = warp.number, warp.clock.get
        missing = 0 if writes else high - low
        for other in place.written:
            before = other.write
            assert before is not None
            if not writes:
                missing -= (high if high < other.high else other.high) - (low if low > other.low else other.low)
            # As `knows` says, which is called too often here.
            epoch = before.epoch
            if in_turn and before.agent == access.agent:
                continue
            if epoch is None or (before.agent != number and epoch_of(before.agent, -1) < epoch):
                self.fault(access.op, "what was not waited for" if not writes else "a write over a write", before.op)
            elif before.ordinary and not access.ordinary:
                self.fault(access.op, "ordinary stores that copies and matrix instructions need not see", before.op)
        for other in place.others if writes else ():
            for read in other.reads.values():
                epoch = read.epoch
                if in_turn and read.agent == access.agent:
                    continue
                if epoch is None or (read.agent != number and epoch_of(read.agent, -1) < epoch):
                    self.fault(access.op, "a write over what may still be read", read.op)
        if missing > 0:
            self.fault(access.op, "bytes that nobody wrote")
        if writes:
            if place.write is None:
                for other in place.others:
                    other.written.append(place)
            place.write = access
            if place.reads:
                place.reads = {}
        else:
            place.reads[number] = access

    def flush(self, warp: Warp) -> None:
        """The ordinary access that was held becomes one."""
        if warp.held is not None:
            op, low, high, writes = warp.held
            warp.held = None
            self.touch(warp, (low, high), Access(op, warp.number, warp.epoch, True), writes)

    # Ops.

    def _address(self, warp: Warp, op: Op, at: int, disp: str = "disp") -> int | None:
        base = warp.values.get(op.operands[at])
        if not isinstance(base, int):
            self.fault(op, "an address that memory holds")
            return None
        return base + int(op.attributes.get(disp, 0))

    def _ordinary(self, warp: Warp, op: Op, form: Form) -> None:
        """A load or store of near memory by a warp's lanes."""
        values = warp.values
        base = values.get(form.base)
        known = _bounds(base)
        mask = None if form.mask is None else values.get(form.mask)
        if mask is not None and not mask.high:
            mask = None     # off everywhere with the extents of the example; with others any lane may be on
        first, last = 0, form.lanes - 1
        if mask is not None and last:
            first, last = map(int, np.flatnonzero(mask.lanes)[[0, -1]])
        offset: Any = (0, 0)
        if form.offset is not None:
            offset = values.get(form.offset)
            if not form.rows:
                offset = _bounds(offset)
            elif offset is not None:
                if mask is not None:
                    offset = Row.of(offset.lanes[mask.lanes])
                offset = self._flipped(offset, base, form.flip) if form.flip and isinstance(base, int) else (
                    offset.low, offset.high)
        if known is not None and offset is not None:
            low = known[0] + offset[0] * form.scale + form.disp + first * form.lane_bytes
            high = known[1] + offset[1] * form.scale + form.disp + (last + 1) * form.lane_bytes
        else:
            low, high = self._all_near(warp)
        if form.mask is not None and mask is None:      # lanes that are off touch nothing
            high = min(high, self._all_near(warp)[1])
        writes = form.writes
        held = warp.held
        if held is not None and held[3] == writes and held[1] <= high and low <= held[2]:
            warp.held = held[0], min(held[1], low), max(held[2], high), writes
        else:
            self.flush(warp)
            warp.held = op, low, high, writes
        if op.name == "s_store" and high - low == form.lane_bytes:
            self.words[low] = values.get(op.operands[0])
        elif op.name == "s_load":
            values[op.results[0]] = self.words.get(low) if high - low == form.lane_bytes else None

    def _flipped(self, offset: Row, base: int, flip: int) -> Interval:
        """The extremes of offsets from a base when bits of the addresses are inverted."""
        key = offset.lanes.tobytes(), base, flip
        found = self.flipped.get(key)
        if found is None:
            row = Row.of(((base + offset.lanes) ^ flip) - base)
            found = self.flipped[key] = row.low, row.high
        return found

    def _all_near(self, warp: Warp) -> Interval:
        """Of the warp's worker."""
        return warp.worker * NEAR_STRIDE, warp.worker * NEAR_STRIDE + self.near_bytes

    def _meet(self, warp: Warp, op: Op) -> Iterator[Op]:
        place, own = (warp.worker, warp.own) if op.name == "sync_warps" else (-1, warp.number)
        met, meetings = self.met[place], self.meetings[place]
        mine = met[own]
        met[own] += 1
        self.release(warp, self.meeting[place])
        if min(met) > mine:
            meetings.append(dict(self.meeting[place]))
        self.progress = True
        while len(meetings) <= mine:
            yield op
        _merge(warp.clock, meetings[mine])

    def _hand_over(self, warp: Warp, op: Op) -> None:
        self.handed_over = True
        if (warp.worker, warp.own) in self.handed:
            self.fault(op, "what was handed over before, and not taken yet")
        known = self.handed[warp.worker, warp.own] = {}
        self.release(warp, known)

    def _take_over(self, warp: Warp, op: Op) -> Iterator[Op]:
        self.handed_over = True
        other = warp.values.get(op.operands[0])
        if not isinstance(other, int):
            self.fault(op, "a worker that memory holds")
            return
        while (other, warp.own) not in self.handed:
            yield op
        _merge(warp.clock, self.handed.pop((other, warp.own)))
        self.progress = True

    def _away(self, warp: Warp, op: Op) -> list[int]:
        """From the warp's near memory to that of each worker on which an op acts."""
        size = op.attributes.get("workers", 1)
        return [(other - warp.worker % size) * NEAR_STRIDE for other in range(size)]

    def _reach(self, warp: Warp, away: int, access: Access) -> None:
        self.foreign.append((warp.worker + away // NEAR_STRIDE, access))

    def _signal(self, warp: Warp, op: Op, at: int = 0, disp: str = "disp", away: int = 0) -> Signal | None:
        address = self._address(warp, op, at, disp)
        address = None if address is None else address + away
        found = None if address is None else self.signals.get(address)
        if address is not None and (found is None or not self.knows(warp, found.starter)):
            self.fault(op, "a signal that may not have started", None if found is None else found.starter.op)
        return found

    def _start(self, warp: Warp, op: Op) -> None:
        address = self._address(warp, op, 0)
        if address is not None:
            access = Access(op, warp.number, warp.epoch, True)
            self.touch(warp, (address, address + 8), access, True)
            each = op.attributes["arrivals"]
            self.signals[address] = Signal(len(self.warps) + len(self.signals), each, each, access)

    def _fence_signals(self, warp: Warp, op: Op) -> None:
        for signal in self.signals.values():
            signal.fenced |= signal.starter.agent == warp.number

    # Sums in a memory of their own. Agent -1 - n is what warp n starts: an epoch of it is over with each sums_signal.

    def _open_sums(self, warp: Warp, op: Op) -> None:
        address = self._address(warp, op, 0)
        if address is not None:
            self.touch(warp, (address, address + 4), Access(op, warp.number, warp.epoch, True), True)
            self.words[address] = 0
            self.sums[warp.worker], self.opened[warp.worker] = op.attributes["columns"], op

    def _close_sums(self, warp: Warp, op: Op) -> None:
        columns = self.sums.pop(warp.worker, 0)
        if columns != op.attributes["columns"]:
            self.fault(op, f"{columns} columns that are set aside")
        first = SUMS + warp.worker * NEAR_STRIDE
        for place in self.places.values():
            if first <= place.low < first + SUMS_PARTS * fragments.SUMS_COLUMNS:
                for access in (place.write, *place.reads.values()):
                    if access is not None and not self.knows(warp, access):
                        self.fault(op, "sums that may still be worked on", access.op)

    def _columns(self, warp: Warp, op: Op, at: int, columns: int, disp: str = "") -> list[Interval]:
        """Of sums, in all parts from that of the place on."""
        place = self._address(warp, op, at, disp)
        if place is None:
            return []
        row, column = divmod(place, fragments.ROW_PLACES)
        first = SUMS + warp.worker * NEAR_STRIDE + column
        starts = [first + part * fragments.SUMS_COLUMNS for part in range(row // fragments.ROWS, SUMS_PARTS)]
        return [(start, start + columns) for start in starts]

    def _start_product(self, warp: Warp, op: Op) -> None:
        if not warp.acquired:
            self.fault(op, "a wait before it without sums_acquire")
        agent, columns = -1 - warp.number, op.attributes["columns"]

        def touch(interval: Interval, writes: bool = False) -> None:
            access = Access(op, agent, None, False)
            self.touch(warp, interval, access, writes, True)
            warp.started.append(access)

        if op.name == "sums_multiply_rows":
            for interval in self._columns(warp, op, 0, fragments.DEPTH // 2, "left_disp"):
                touch(interval)
        sides = ((0, "left", op.attributes["rows"]), (1, "right", columns))
        for at, side, extent in sides[op.name == "sums_multiply_rows":]:
            near = self._operand_of_group(warp, op, at, side, extent)
            if near is not None:
                touch(near)
        for interval in self._columns(warp, op, 2, columns):
            if warp.values.get(op.operands[3]) != 0:
                touch(interval)
            touch(interval, True)

    def _signal_products(self, warp: Warp, op: Op) -> None:
        for access in warp.started:
            access.epoch = warp.signalled
        warp.started = []
        for away in self._away(warp, op):
            signal = self._signal(warp, op, away=away)
            if signal is None:
                continue
            if signal.arrivals == 0:
                self.fault(op, "more arrivals than a phase has")
                continue
            if away:
                self._reach(warp, away, Access(op, -1 - warp.number, warp.signalled, False))
            _merge(signal.gathered, warp.clock)     # known before the products were started
            signal.gathered[-1 - warp.number] = warp.signalled
            self._count(signal, 1, 0)
        warp.signalled += 1

    def _move_sums(self, warp: Warp, op: Op) -> None:
        """sums_load and sums_store, of one part."""
        if not warp.acquired:
            self.fault(op, "a wait before it without sums_acquire")
        stores = op.name == "sums_store"
        columns = 2 * (len(op.operands) - 1 if stores else len(op.results))
        for interval in self._columns(warp, op, 0, columns)[:1]:
            self.touch(warp, interval, Access(op, warp.number, warp.epoch, False), stores)
            warp.moving = True

    def _acquire_sums(self, warp: Warp, op: Op) -> None:
        warp.acquired = True

    def _release_sums(self, warp: Warp, op: Op) -> None:
        warp.moving = False

    def _count(self, signal: Signal, arrivals: int, announced: int) -> None:
        signal.arrivals -= arrivals
        signal.announced += announced
        if signal.arrivals == 0 and signal.announced == 0:
            signal.gathered[signal.agent] = len(signal.published)
            signal.published.append(dict(signal.gathered))
            signal.arrivals = signal.each

    def _arrive(self, warp: Warp, op: Op) -> None:
        if warp.moving:
            self.fault(op, "loads or stores of sums before it without sums_release")
        for away in self._away(warp, op):
            signal = self._signal(warp, op, away=away)
            if signal is not None:
                if signal.arrivals == 0:
                    self.fault(op, "more arrivals than a phase has")
                    return
                if away:
                    self._reach(warp, away, Access(op, warp.number, warp.epoch, True))
                self.release(warp, signal.gathered)
                self._count(signal, 1, op.attributes.get("bytes", 0))

    def _wait(self, warp: Warp, op: Op) -> Iterator[Op]:
        signal = self._signal(warp, op)
        parity = warp.values.get(op.operands[1])
        if signal is None or not isinstance(parity, int):
            self.fault(op, "a parity that memory holds")
            return
        warp.acquired = False
        following = warp.clock.get(signal.agent, -1) + 1
        if following & 1 != parity:
            return
        while len(signal.published) <= following:
            yield op
        _merge(warp.clock, signal.published[following])

    def _copy_box(self, warp: Warp, op: Op) -> None:
        start = self._address(warp, op, 0)
        _, dtype, _, box = self.function.attributes["tensor_maps"][op.attributes["map"]]
        size = prod(box) * DTYPES[dtype].size_bytes
        for away in self._away(warp, op):
            signal = self._signal(warp, op, 1, "signal_disp", away)
            if signal is None or start is None:
                return
            if not signal.fenced:
                self.fault(op, "a signal that copies may not see yet", signal.starter.op)
            access = Access(op, signal.agent, len(signal.published), False)
            if away:
                self._reach(warp, away, access)
            self.touch(warp, (start + away, start + away + size), access, True)
            self._count(signal, 0, -size)

    def _fence_stores(self, warp: Warp, op: Op) -> None:
        for place in self.places.values():
            if place.write is not None and place.write.agent == warp.number:
                place.write.ordinary = False

    def _store_box(self, warp: Warp, op: Op) -> None:
        start = self._address(warp, op, 0)
        if start is None:
            return
        _, dtype, _, box = self.function.attributes["tensor_maps"][op.attributes["map"]]
        access = Access(op, warp.number, None, False)
        self.touch(warp, (start, start + prod(box) * DTYPES[dtype].size_bytes), access, False)
        warp.stores[-1].append(access)

    def _wait_stores(self, warp: Warp, op: Op) -> None:
        warp.stores.append([])
        done = len(warp.stores) - 1 - op.attributes["pending"]
        for access in (access for batch in warp.stores[:max(0, done)] for access in batch):
            access.epoch = warp.epoch
        del warp.stores[:max(0, done)]

    def _fence_group(self, warp: Warp, op: Op) -> None:
        warp.fenced = True

    def _multiply(self, warp: Warp, op: Op) -> None:
        if not warp.fenced:
            self.fault(op, "a batch without group_fence before it")
        columns = (len(op.operands) - _FIRST_SUM[op.name]) * 2
        sides = ((0, "left", 64), (1, "right", columns))
        for at, side, extent in sides if op.name == "group_multiply" else ((0, "right", columns),):
            interval = self._operand_of_group(warp, op, at, side, extent)
            if interval is not None:
                access = Access(op, warp.number, None, False)
                self.touch(warp, interval, access, False)
                warp.issued.append(access)

    def _operand_of_group(self, warp: Warp, op: Op, at: int, side: str, extent: int) -> Interval | None:
        """Where an operand of `extent` rows, or columns, lies in near memory."""
        start = self._address(warp, op, at, f"{side}_disp")
        if start is None:
            return None
        last = self.spans.get((op, at))
        if last is None:
            rows, panel = op.attributes[f"{side}_rows"], op.attributes.get(f"{side}_panel_bytes", 0)
            size = op.attributes["dtype"].size_bytes
            deep = np.array(fragments.GROUP_DEPTH_BYTES // size - 1)
            last = self.spans[op, at] = int(fragments.near_offsets(np.array(extent - 1), deep, rows, panel, size))
        row = fragments.ROW_BYTES
        return start // row * row, (start + last) // row * row + row

    def _commit(self, warp: Warp, op: Op) -> None:
        warp.batches.append(warp.issued)
        warp.issued, warp.fenced = [], False

    def _wait_group(self, warp: Warp, op: Op) -> None:
        kept = op.attributes["pending"]
        if op.operands and warp.issued:
            self.fault(op, "sums of matrix instructions in no batch", warp.issued[0].op)
        done = max(0, len(warp.batches) - kept)
        for access in (access for batch in warp.batches[:done] for access in batch):
            access.epoch = warp.epoch
        del warp.batches[:done]

    def _copy_lanes(self, warp: Warp, op: Op) -> None:
        base, row = (warp.values.get(v) for v in op.operands[:2])
        disp = op.attributes.get("disp", 0)
        interval = self._all_near(warp)
        if isinstance(base, int) and row is not None:
            interval = base + disp + row.low, base + disp + row.high + 16
        access = Access(op, warp.number, None, True)
        self.touch(warp, interval, access, True)
        warp.copies.append(access)

    def _commit_copies(self, warp: Warp, op: Op) -> None:
        warp.groups.append(warp.copies)
        warp.copies = []

    def _wait_copies(self, warp: Warp, op: Op) -> None:
        done = max(0, len(warp.groups) - op.attributes["pending"])
        for access in (access for group in warp.groups[:done] for access in group):
            access.epoch = warp.epoch
        del warp.groups[:done]


_ACTIONS: dict[str, Callable[[_Rehearsal, Warp, Op], None]] = {
    "hand_over": _Rehearsal._hand_over,
    "signal_start": _Rehearsal._start, "signal_fence": _Rehearsal._fence_signals,
    "signal_arrive": _Rehearsal._arrive, "signal_expect": _Rehearsal._arrive, "tensor_copy": _Rehearsal._copy_box,
    "store_fence": _Rehearsal._fence_stores, "tensor_store": _Rehearsal._store_box,
    "store_wait": _Rehearsal._wait_stores,
    "group_fence": _Rehearsal._fence_group, "group_multiply": _Rehearsal._multiply,
    "group_multiply_rows": _Rehearsal._multiply,
    "sums_open": _Rehearsal._open_sums, "sums_close": _Rehearsal._close_sums,
    "sums_multiply": _Rehearsal._start_product, "sums_multiply_rows": _Rehearsal._start_product,
    "sums_signal": _Rehearsal._signal_products, "sums_load": _Rehearsal._move_sums,
    "sums_store": _Rehearsal._move_sums, "sums_acquire": _Rehearsal._acquire_sums,
    "sums_release": _Rehearsal._release_sums,
    "group_commit": _Rehearsal._commit, "group_wait": _Rehearsal._wait_group, "async_copy": _Rehearsal._copy_lanes,
    "async_commit": _Rehearsal._commit_copies, "async_wait": _Rehearsal._wait_copies,
}

_WAITING: dict[str, Callable[[_Rehearsal, Warp, Op], Iterator[Op]]] = {
    "sync_warps": _Rehearsal._meet, "sync_cluster": _Rehearsal._meet, "take_over": _Rehearsal._take_over,
    "signal_wait": _Rehearsal._wait,
}

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b}

_SCALARS: dict[str, Callable[..., int]] = {
    "s_add": lambda a, b: a + b, "s_sub": lambda a, b: a - b, "s_mul": lambda a, b: a * b, "s_min": min, "s_max": max,
    "s_and": lambda a, b: a & b, "s_or": lambda a, b: a | b, "s_xor": lambda a, b: a ^ b, "s_shl": lambda a, b: a << b,
    "s_shr": lambda a, b: a >> b, "s_sar": lambda a, b: a >> b, "s_floordiv": lambda a, b: a // b,
    "s_mod": lambda a, b: a % b, "s_cmp": lambda a, b: 0, "s_select": lambda a, b, c: 0}

_MONOTONE = frozenset({"s_add", "s_sub", "s_mul", "s_min", "s_max", "s_shl", "s_sar"})


def _all_ints(values: list[Any]) -> bool:
    return all(isinstance(v, int) for v in values)


def _bounds(value: Any) -> Interval | None:
    """Of a number or an interval."""
    return (value, value) if isinstance(value, int) else value


def _hull(a: Interval, b: Interval) -> Interval:
    return min(a[0], b[0]), max(a[1], b[1])


def _corners(name: str, function: Callable[..., int], a: Any, b: Any) -> Interval | None:
    """An operation of intervals that is monotone in each operand; of others only masks by a constant are followed."""
    first, second = _bounds(a), _bounds(b)
    assert first is not None and second is not None
    if name in _MONOTONE:
        found = [function(x, y) for x in first for y in second]
        return min(found), max(found)
    if name == "s_and":
        for (low, high), mask in ((first, b), (second, a)):
            if isinstance(mask, int):
                return (0, mask) if mask >= 0 else (low + mask + 1, high)
    return None


def _merge(into: Clock, other: Clock) -> None:
    for agent, epoch in other.items():
        if into.get(agent, -1) < epoch:
            into[agent] = epoch
