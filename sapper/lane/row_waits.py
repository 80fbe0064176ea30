"""How long rows wait for themselves, and how many at once make up for it.

Enters: the walks of a row, of which later ones need sums of earlier ones (norms, softmax, quantisation). Leaves: the
number of rows that are worked on at once. Between the walks a row waits: for the lanes of a sum to be joined, a chain
of shuffles and additions, for what is computed of it, a chain as well, of divisions and roots, and for the processor
to learn that a loop has ended. Another row's arithmetic fills that time, in a processor that takes what is ready; what
it can't do is to look past the end of a loop for another row. Where rows are long, or memory takes as long, the waiting
is a small part, and single rows need fewer registers and less code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import log2

from ..ir.nodes import Op, Value
from ..ir.types import TileType
from ..tile.plan import COSTLY, LATE, Plan, Walk, axes_of
from ..tile.schedule import Facts

LOOP_END = 20
"""Cycles that a branch costs which was not foreseen, as the last one of a loop of a dozen rounds."""

SHUFFLE = 3
"""Cycles from a row to its shuffled copy."""

CHAIN = 5
"""Cycles of an instruction of a chain, about: 4 for a sum, 24 for a division, which counts as 4 instructions."""

PORTS, PORTS_APART = 2, 3
"""Vector instructions in a cycle, and where sums have pipes of their own. Measured on a Zen 3, 512 rows of 512 to 1024,
what two at once save beside this estimate: LayerNorm in f32 9 to 16 % (0.08), in bf16 7 to 13 (0.09), RMSNorm in bf16
8 to 13 (0.08), as bytes 4 to 7 (0.09), in f32 rounded to bf16 3 (0.07), in f32 0 (0.06), softmax in bf16 2 (0.06), in
f32 -8 (0.05)."""

FAR_BYTES = 8
"""Bytes in a cycle that a core reads or writes beyond its first cache, both at once: what a copy within the last cache
reaches on a Granite Rapids, 29 GB/s at 3.6 GHz."""

MEMORY_BYTES = 5
"""Those of a copy in memory: 18 GB/s there."""

CACHE_SHARE = 4
"""So many times a call's rows fit the last cache where they surely stay in it, if extents are known, and twice as
often for each that is not. Measured on a Zen 3, 4096 and 16384 rows of 768, two at once take, of the time by one:
LayerNorm in f32 0.99 and 1.22, in bf16 1.08 and 1.07, RMSNorm in bf16 1.05 and 1.09, as bytes 1.28 and 1.47; 100000
rows of 100, which wait most of their time, 0.89, 0.71, 0.70 and 0.83."""

WORTH = 0.08
"""Part of the time that two rows at once must save. Measured on a Granite Rapids, 512 rows of 512 to 768, beside this
estimate: layer_norm in bf16 +23 % (0.11), rms_norm in bf16 +30 % (0.10), layer_norm in f32 +9 % (0.09), softmax in bf16
+13 % (0.08), rms_norm in f32 -2 % (0.07), softmax in f32 -2 % (0.07)."""


@dataclass(slots=True)
class Waits:
    """cycles: for which a row is waited. steady_cycles: of a row's instructions and bytes."""

    cycles: float = 0.0
    steady_cycles: float = 0.0

    def saved(self, rows: int) -> float:
        """Part of the time that this many rows at once save, beside half as many."""
        return self.cycles / rows / (self.cycles + self.steady_cycles)


def waits_of(rows: str, plan: Plan, facts: Facts, typical_extent: Callable[[str], int],
             bytes_of_cycle: float = FAR_BYTES) -> Waits | None:
    """Of one coordinate of an axis, and of each other that is not whole; None where a walk has several that are whole,
    or none makes a sum along one. typical_extent: of an axis that is whole; else 0."""
    found = Waits()
    ports = PORTS_APART if facts.sums_apart else PORTS
    near: set[Value] = set()
    for walk in plan.items:
        if not isinstance(walk, Walk):
            return None
        along, *more = [a for a in walk.axes if typical_extent(a)] or [""]
        vectors = typical_extent(along) / facts.lanes if along else 0
        if more or rows not in walk.axes or along == rows:
            return None
        count = _Count(rows, along, plan.kept, near)
        for root in walk.roots():
            count.root(root)
        found.steady_cycles += vectors * (count.instructions / ports + count.size_bytes * facts.lanes / bytes_of_cycle)
        found.cycles += CHAIN * count.chain
        if along in walk.reduced:
            found.cycles += log2(facts.lanes) * (SHUFFLE + facts.fma_latency) + LOOP_END
    return found if any(walk.reduced for walk in plan.items if isinstance(walk, Walk)) else None


ROWS_IN_TURN = 4
"""Most rows at once of which loops inside carry single values along. Measured on a Zen 3, us, by one, two, four and
eight rows: IIR filters of 8 x 48000 1341, 656, 628, 474, of 64 x 4096 891, 448, 430, 1369 (rows a power of two apart
share a set of the first cache, of eight lines, and each is read and written); scans of segments, 64 x 8192, 676, 342,
336, 392; FNV hashes of 256 bytes 171, 111, 88, 87; checksums by a table 1119, 575, 296, 170; 1024 tridiagonal systems
1015, 509, 334, 456."""


def rows_in_turn(rows: str, plan: Plan, axes: Collection[str], held: Callable[[int], bool]) -> int:
    """Of how many coordinates of an axis loops in order are run at once: as many as make up for the time for which each
    waits for its own last value (a recurrence along a row, none of whose elements lie across the lanes). axes: all axes
    that are walked around. held: whether registers hold so many values. 1 where loops inside do anything else."""
    most = ROWS_IN_TURN
    loops = [loop for item in plan.items if isinstance(item, Op) for loop in item.walk() if loop.blocks]
    chained = [loop for loop in loops if any(rows in axes_of(v) for v in loop.results)]
    if not chained or any(loop.name != "each" for loop in loops):
        return 1
    for loop in loops:
        block = loop.blocks[0]
        if any(op.name in LATE or not set(axes_of(v)) <= set(axes) for op in block.ops for v in op.results):
            return 1
        if loop not in chained or any(op.blocks for op in block.ops):
            continue
        behind: dict[Value, int] = dict.fromkeys(loop.blocks[0].arguments[loop.attributes["count"]:], 0)
        cycles = 0
        for op in block.ops:
            cycles += 0 if op.name in ("const", "index", "dim", "yield") else COSTLY.get(op.name, 1)
            waited = [behind[v] for v in op.operands if v in behind]
            if waited and op.name != "yield":
                behind |= dict.fromkeys(op.results, max(waited) + COSTLY.get(op.name, 1))
        chain = max((behind.get(v, 0) for v in block.ops[-1].operands), default=0)
        while most > 1 and not (CHAIN * chain >= most // 2 * cycles / PORTS and held(most * len(loop.results))):
            most //= 2
    return most


@dataclass(slots=True)
class _Count:
    """What a walk takes. near: values that earlier walks have read from memory, or computed for a whole row.

    instructions: for a vector. chain: for a row. size_bytes: of an element of the row, in far memory.
    """

    rows: str
    along: str
    kept: set[Value]
    near: set[Value]
    instructions: int = 0
    chain: int = 0
    size_bytes: int = 0

    def root(self, root: Op | Value) -> None:
        seen: set[Value] = set()
        if isinstance(root, Value):
            assert root.op is not None
            self._instruction(root.op, root)
        elif root.name == "store":
            stored = root.operands[1]
            self.instructions += 1
            self.size_bytes += stored.type.dtype.size_bytes if self.along in axes_of(stored) else 0  # type: ignore[union-attr]
        else:
            self.instructions += 1
        for value in root.op.operands if isinstance(root, Value) and root.op is not None else root.operands:  # type: ignore[union-attr]
            self._value(value, seen)

    def _value(self, value: Value, seen: set[Value]) -> None:
        op = value.op
        if (op is None or value in seen or not isinstance(value.type, TileType) or value in self.kept
                or op.name in (*LATE, "const", "index", "dim")):
            return
        seen.add(value)
        self._instruction(op, value)
        for operand in op.operands:
            self._value(operand, seen)

    def _instruction(self, op: Op, value: Value) -> None:
        axes = axes_of(value)
        if self.along in axes:
            self.instructions += COSTLY.get(op.name, 1)
            if op.name == "load" and self.rows in axes and value not in self.near:
                self.size_bytes += value.type.dtype.size_bytes  # type: ignore[union-attr]
        elif self.rows in axes and value not in self.near:
            self.chain += COSTLY.get(op.name, 1)
        self.near.add(value)
