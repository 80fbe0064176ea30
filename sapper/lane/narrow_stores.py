"""Stores of whole rows as bf16, where the target rounds by an instruction that takes denormals for 0.

Enters: rows of one piece of a walk, and where they are stored. Leaves: a test whether any lane of them is denormal,
which is rare, and two ways: one rounds by integer arithmetic, the other by that instruction, two rows at a time where
they lie one after the other. Where all of them do, and zeros are rare, they are rounded first, and tested only if a
zero came of it, as comes of every denormal: that is one test for two rows in place of two.
"""

from __future__ import annotations

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_B32, S64, b32, bf16
from ..tile.schedule import Facts
from ..tile.zeros import often_zero
from .squares import Squares, unrounded
from .state import Access, element_bytes

MOST_ROWS = 8
"""Rows of one piece: of more, as follow the sums of a contraction, both ways would be long."""

Job = tuple[Op, dict[str, int], Value]
"""A store, register coordinates, and the row that goes there."""


class NarrowStores(Squares):
    facts: Facts

    def rounds_by_instruction(self, op: Op, at: dict[str, int], row: Value) -> bool:
        """Whether a row is one of those that `store_rounded` takes: whole, and of consecutive elements."""
        access = self.access(op)
        spans = [a for a in at if self.bound[a].lane]
        if not self.facts.flushes_as_it_rounds or access.dtype is not bf16 or access.gathers or len(spans) != 1:
            return False
        contiguous = access.axes.get(spans[0]) == element_bytes(bf16)
        return contiguous and self.bound[spans[0]].mask is None and not self.is_rounded_by_block(row, bf16)

    def store_rounded(self, jobs: list[Job], streams: list[bool]) -> None:
        """streams: whether each store goes past the caches."""
        rows = [unrounded(row) for _, _, row in jobs]
        firsts = list(range(0, len(jobs), 2))
        paired = len(jobs) % 2 == 0 and all(self._follows(*jobs[n:n + 2]) for n in firsts)
        if not paired or any(often_zero(op.operands[1]) for op, _, _ in jobs):
            self._store_tested(jobs, rows, streams, {})
            return
        both = {n: self.emit(self.depth, "concat_bf16", rows[n:n + 2], ROW_B32) for n in firsts}
        any_zero = self.emit(self.depth, "any_zero_bf16", list(both.values()), S64)
        self.fork(any_zero, lambda: self._store_tested(jobs, rows, streams, both),
                  lambda: self._store_by_instruction(jobs, rows, streams, both))

    def _store_tested(self, jobs: list[Job], rows: list[Value], streams: list[bool], both: dict[int, Value]) -> None:
        odd = None
        for row in rows:
            found = self.emit(self.depth, "is_denormal", [row], MASK)
            odd = found if odd is None else self.emit(self.depth, "mask_or", [odd, found], MASK)
        assert odd is not None
        any_odd = self.emit(self.depth, "mask_any", [odd], S64)

        def by_integers() -> None:
            for (op, at, _), row, streaming in zip(jobs, rows, streams, strict=True):
                self._put_rounded(op, at, row, streaming, "rare")

        self.fork(any_odd, by_integers, lambda: self._store_by_instruction(jobs, rows, streams, both))

    def _store_by_instruction(self, jobs: list[Job], rows: list[Value], streams: list[bool],
                              both: dict[int, Value]) -> None:
        """both: pairs that are rounded already, by the number of their first row."""
        number = 0
        while number < len(jobs):
            op, at, _ = jobs[number]
            if number + 1 < len(jobs) and self._follows(jobs[number], jobs[number + 1]):
                pair = both.get(number)
                if pair is None:
                    pair = self.emit(self.depth, "concat_bf16", rows[number:number + 2], ROW_B32)
                operands, attributes = self.address(self._store_access(op, at), at)
                self.effect("store", [pair, *operands], dtype=b32, masked=False, streaming=streams[number],
                            **attributes)
                number += 2
            else:
                self._put_rounded(op, at, rows[number], streams[number], "none")
                number += 1

    def _store_access(self, op: Op, at: dict[str, int]) -> Access:
        return self._at_scalars(self.access(op), at)

    def _put_rounded(self, op: Op, at: dict[str, int], row: Value, streaming: bool, denormals: str) -> None:
        operands, attributes = self.address(self._store_access(op, at), at)
        self.effect("store", [row, *operands], dtype=bf16, masked=False, streaming=streaming, denormals=denormals,
                    **attributes)

    def _follows(self, first: Job, second: Job) -> bool:
        """Whether the second row lies just after the first, and both fill a row of slots together: of an even number of
        rows the first of a pair is as well aligned as a store past the caches asks."""
        (op, at, _), (other, there, _) = first, second
        lane = next(a for a in at if self.bound[a].lane)
        even = self.bound[lane].count % 2 == 0 and at[lane] % 2 == 0
        return op is other and even and there == {**at, lane: at[lane] + 1}


__all__ = ["Job", "NarrowStores"]
