"""Chains of contractions (chained.py) whose rows are too long for one warp: several share them, each with a part.

Enters a chain one of whose whole axes is so long that the sums over it, or the left operand along it, do not fit a
thread's registers: the latent vector of multi-head latent attention, 512 numbers that are keys and values at once.
Leaves what ChainLowering does, with that axis cut into slices, one for each warp of a group that has the same rows:

    contraction over the axis   each warp sums its part of the depth; the parts go to near memory, all warps meet, and
                                each adds up those of its group, in one order: they go on with equal numbers
    contraction that gives it   each warp has its part of the columns
    what does not span it       is computed by each warp of the group, and stored by the first

    near memory   stages | sums: [group of warps][slice][run of registers][lane][register of the run]

What is written there is read before the warps meet again, at the start of the next piece.
"""

from __future__ import annotations

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_F32, S64, f32
from ..tile.schedule import MatrixUnit
from . import fragments
from .chained import MOST_EXTENT, Chain, ChainLowering, Contraction, Stream
from .state import Scalar

MOST_WARPS = 8
SHORTEST_STEP = 32
RUN = 4
"""Registers that a lane stores at once."""


class SharedRowsLowering(ChainLowering):
    """Takes chains that ChainLowering finds too long. slices: of each axis of `parted`, and warps of a group; 1: none
    is cut."""

    slices = 1
    parted: frozenset[str] = frozenset()

    def _chain_shape(self, unit: MatrixUnit, chain: Chain) -> tuple[int, int, int] | None:
        shape = super()._chain_shape(unit, chain)
        if shape is not None or not self.extents:
            return shape
        axis = max(self.extents, key=lambda a: self.extents[a])
        if any(extent > MOST_EXTENT for other, extent in self.extents.items() if other != axis) \
                or self.is_reduced(chain, axis):
            return None
        step, slices = unit.chain_step, 2
        while step >= SHORTEST_STEP:
            while slices < MOST_WARPS and self._chain_registers(chain, step, slices) > unit.chain_registers:
                slices *= 2
            fits = self._chain_registers(chain, step, slices) <= unit.chain_registers \
                and self.extents[axis] % (slices * fragments.PANEL) == 0
            groups = max(1, min(MOST_WARPS // slices, -(-self.chain_extent(chain) // fragments.ROWS)))
            row_bytes = sum(self._padded_bytes(op, chain) for op in chain.streams)
            near_bytes = unit.chain_stages * step * row_bytes + groups * slices * self._slice_bytes(step)
            if fits and near_bytes <= unit.near_bytes:
                self.slices, self.parted = slices, frozenset([axis])
                return step, groups * slices, 1
            step, slices = step // 2, 2
        return None

    @staticmethod
    def is_reduced(chain: Chain, axis: str) -> bool:
        """Whether rows are reduced along an axis, of which no warp may have a part then."""
        return any(op.name == "reduce" and axis in op.attributes["over"]
                   for op in (*chain.body.ops, *chain.loop.blocks[0].ops))

    def _padded_bytes(self, op: Op, chain: Chain) -> int:
        """Of a row of a streamed operand in near memory: whole panels."""
        (across,) = [a for a in op.result.type.axes if a != chain.step]  # type: ignore[union-attr]
        return -(-self.extents[across] // fragments.PANEL) * fragments.ROW_BYTES

    def _slice_bytes(self, columns: int) -> int:
        """Of one warp's sums of 16 rows."""
        return columns // 2 * self.lanes * f32.size_bytes

    def chain_rows(self) -> int:
        return super().chain_rows() // self.slices

    def row_group(self) -> Scalar:
        return self.scalar("s_floordiv", self.warp(), self.slices)

    def _slice(self) -> Scalar:
        return self.scalar("s_mod", self.warp(), self.slices)

    def part_of(self, axis: str) -> tuple[Scalar, int]:
        if axis not in self.parted:
            return super().part_of(axis)
        extent = self.extents[axis] // self.slices
        return self.mul(self._slice(), extent), extent

    def piece_start(self, stream: Stream) -> Value:
        if stream.across not in self.parted:
            return super().piece_start(stream)
        panels = self.extents[stream.across] // self.slices // fragments.PANEL
        return self.value(self.add(self.stage, self.mul(self._slice(), panels * stream.panel_bytes)))

    def shared_sums_bytes(self) -> int:
        return self.warps * self._slice_bytes(self.step) if self.slices > 1 else 0

    def is_parted(self, contraction: Op) -> bool:
        assert self.chain is not None
        return self.slices > 1 and self.chain.contractions[contraction].over in self.parted

    def whole_sums(self, found: Contraction, sums: dict[tuple[int, ...], Value]) -> dict[tuple[int, ...], Value]:
        if self.slices == 1 or found.over not in self.parted:
            return sums
        each = len(sums) * self.lanes * f32.size_bytes
        group = self.add(self.add(self.near(), self.sums_at), self.mul(self.row_group(), self.slices * each))
        rows, whole = list(sums.values()), []
        self.put_runs(self.add(group, self.mul(self._slice(), each)), rows)
        self.effect("sync_warps", [])
        for first in range(0, len(rows), RUN):
            parts = [self.take_run(group, part * len(rows) + first) for part in range(self.slices)]
            for total, *others in zip(*parts, strict=True):
                for part in others:
                    total = self.emit(self.depth, "add", [total, part], ROW_F32)
                whole.append(total)
        return dict(zip(sums, whole, strict=True))

    def put_runs(self, base: Scalar, rows: list[Value]) -> None:
        """Rows of f32 to near memory, RUN of a lane at once."""
        for first in range(0, len(rows), RUN):
            operands, attributes = self.memory_operands(base, 0, 1, first * self.lanes * f32.size_bytes)
            self.effect("store_run", [*operands, *rows[first:first + RUN]], dtype=f32, streaming=False, near=True,
                        **attributes)

    def take_run(self, base: Scalar, first: int) -> tuple[Value, ...]:
        """RUN rows from there, the first of which is this one."""
        operands, attributes = self.memory_operands(base, 0, 1, first * self.lanes * f32.size_bytes)
        read = Op("load_run", operands, [ROW_F32] * RUN, {"dtype": f32, "masked": False, "near": True, **attributes},
                  None, self.location)
        self.finish(read)
        return tuple(read.results)

    def mask_of_parts(self, mask: Value | None, axes: tuple[str, ...]) -> Value | None:
        if self.slices == 1 or not self.parted.isdisjoint(axes):
            return mask
        first = self.emit(0, "s_cmp", [self.value(self._slice()), self.value(0)], S64, cond="eq")
        lanes = self.emit(0, "mask_first", [self.value(self.mul(first, self.lanes))], MASK)
        return lanes if mask is None else self.emit(self.depth, "mask_and", [mask, lanes], MASK)
