"""Workers of a cluster: neighbours along one axis, of whom each copies a part of the operand that all of them read.

Enters a walk of groups of warps (groups.py) for which the schedule, or the model, takes clusters along one axis of its
tiles. What holds:

    shares    of the depth are a cluster's: its workers have the same pieces of tiles side by side (depth_shares.py)
    tiles     as many as fill the last cluster; one past the end of the axis is worked through and nothing of it stored:
              boxes bring zeros there, and the scale of its block is the last one
    full      announces the whole stage, of which parts come from each worker of the cluster
    free      is waited for before a part is copied to all: so the multiplying warps arrive at that of every worker
    begin     nobody copies or arrives before all of the cluster have started their signals (`sync_cluster`)
    end       nobody ends while another may still copy to its near memory, or arrive there
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir.nodes import Value
from ..tile.schedule import ScheduleError
from .boxed_stores import BoxedStores
from .depth_shares import ALONE, Cluster
from .fragments import PANEL
from .state import Scalar

if TYPE_CHECKING:
    from .groups import Operand
    from .matrix import MatrixWalk

SWIZZLED_ROWS = 8


class Clusters(BoxedStores):
    """cluster, cluster_axis: see DepthShares, where they are 1 and None."""

    groups = 0

    def check_cluster(self) -> None:
        for axis, size in self.schedule.cluster.items():
            reason = "another axis besides" if len(self.schedule.cluster) > 1 else self._unclustered(axis, size)
            if reason is not None:
                raise ScheduleError(f"schedule of {self.function.name}: cluster of {size} along {axis}: found {reason}"
                                    "; expected one product on instructions of groups of warps, and parts of what its "
                                    "workers share; mend: leave cluster out")

    def _unclustered(self, axis: str, size: int) -> str | None:
        found, group = self.matrix_walk, self.facts.matrix_group
        if found is not None and axis not in (found.rows, found.columns):
            return f"an axis that is neither of its rows, {found.rows}, nor of its columns, {found.columns}"
        if found is not None and size == 1:
            return None
        if found is None or group is None or not self.groups:
            return "a walk, or a target, without them"
        if size not in group.clusters:
            return f"a size that is none of 1, {', '.join(map(str, group.clusters))}"
        if self.schedule.chunks:
            return "chunks besides, by which workers have other pieces"
        if self.in_order:
            return "a loop over groups, whose tiles are no tasks that neighbours could take"
        if not all(self._is_known(axis) for axis in (found.rows, found.columns)):
            return "rows of which memory tells how many there are, whose tiles are no tasks either"
        if not any(self._parts_well(found, tile, axis, size) for tile in self.fitting_tiles()):
            return "an operand with fewer parts"
        return None

    def _is_known(self, axis: str) -> bool:
        """Whether an axis starts and ends where the call says, so that its tiles are tasks."""
        bounds = self._range_of(axis)
        return bounds is not None and all(v.op is None or v.op.name in ("dim", "const") for v in bounds)

    def clusters_of(self, tile: tuple[int, int]) -> list[Cluster]:
        """The model takes the least number of workers: a cluster is of processors of one group, of which an H100 has
        eight of up to 18 (NVIDIA H100 Tensor Core GPU Architecture), so that larger ones leave more of them idle."""
        found, group = self.matrix_walk, self.facts.matrix_group
        if found is None or group is None or not self.groups:
            return [ALONE]
        for axis, size in self.schedule.cluster.items():
            return [(axis, size) if size > 1 and self._parts_well(found, tile, axis, size) else ALONE]
        return [ALONE, *((axis, size) for axis in (found.rows, found.columns) for size in group.clusters[:1]
                         if self._unclustered(axis, size) is None and self._parts_well(found, tile, axis, size))]

    def _parts_well(self, found: MatrixWalk, tile: tuple[int, int], axis: str, size: int) -> bool:
        """Whether each worker has whole groups of swizzled rows to copy, or whole panels."""
        extents = dict(zip((found.rows, found.columns), tile, strict=True))
        outer = found.columns if axis == found.rows else found.rows
        loads = found.right if axis == found.rows else found.left
        return all(extents[outer] % (size * (SWIZZLED_ROWS if found.depth in self._forms(op)[-1].axes else PANEL)) == 0
                   for op in loads)

    def copied_parts(self, outer: str) -> int:
        """In how many parts an operand with this outer axis is copied, one by each worker."""
        return 1 if outer == self.cluster_axis else self.cluster

    def place_of_block(self, axis: str, at: Scalar) -> Scalar:
        """A coordinate whose block has a scale, for the tile that begins at `at`: that one, or the axis's last where
        the tile lies past the end."""
        if axis != self.cluster_axis:
            return at
        tile = self.open[axis]
        return self.scalar("s_min", at, self.sub(self.add(tile.offset, tile.extent), 1))

    def rank(self) -> Scalar:
        """Of this worker in its cluster."""
        return self.scalar("s_mod", self.emit_once("worker"), self.cluster)

    def copy_operand(self, operand: Operand, target: Value, signal: Value, at: dict[str, Value], full_at: int) -> None:
        """This worker's part of a piece, to all workers that read it."""
        parts = self.copied_parts(operand.outer)
        step, size = (operand.extent // parts, operand.bytes // parts) if operand.along_depth else (
            PANEL, operand.panel_bytes)
        start: Scalar = at[operand.outer]
        if parts > 1:
            start = self.add(start, self.mul(self.rank(), operand.extent // parts))
            target = self.value(self.add(target, self.mul(self.rank(), operand.bytes // parts)))
        for number in range(operand.extent // parts // step):
            place = {**at, operand.outer: self.value(self.add(start, number * step))}
            with self.located(operand.op):
                self.effect("tensor_copy", [target, signal, *self._coordinates_of(operand.op, place)], map=operand.map,
                            disp=operand.at + number * size, signal_disp=full_at, **self.of_cluster(parts))

    @staticmethod
    def of_cluster(workers: int) -> dict[str, int]:
        """The attribute of an op that acts on several workers."""
        return {"workers": workers} if workers > 1 else {}
