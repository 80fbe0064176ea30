"""Scratch memory: where buffers lie in it, and how much of it a kernel needs.

Enters: extents, each with a bound, and an element type. Leaves: addresses, from the start of what a worker or all of
them have, and a record of every buffer, by which who launches the kernel makes so much.
"""

from __future__ import annotations

from math import gcd, lcm
from typing import Any

from ..ir.nodes import Op, Value
from ..ir.scratch import BUFFER_ALIGN_BYTES
from ..ir.types import S64, DType, TensorType
from .extents import ExtentLowering
from .prefetches import LINE_BYTES
from .state import Access, Capacity, Scalar, element_bytes, memory_dtype

PAGE_BYTES = 4096

BETWEEN_BYTES = 17 * LINE_BYTES
"""Between buffers of whole pages. A load waits for earlier stores that the last 12 bits of its address might be one of
(Intel 248966, memory disambiguation), and walks take several buffers at one pace: products of blocks of 4 bits for a
gated layer took 2.7 times as long on a Granite Rapids where nothing was between."""


class ScratchLowering(ExtentLowering):
    """Gives scratch memory. scratch_sizes: of the buffers so far, as the attribute `scratch` has them; scratch_end:
    where the next one is, from the start of a worker's memory. shared_sizes, shared_end: the same of buffers that all
    workers see, where these are many; of few the first one has them in its own memory."""

    scratch_sizes: list[list[object]]
    scratch_end: Scalar
    shared_sizes: list[list[object]]
    shared_end: Scalar

    def _buffer(self, op: Op) -> None:
        """Memory that all workers see, or, if it is their own, that each has."""
        tensor = op.result
        assert isinstance(tensor.type, TensorType)
        if op.attributes.get("own"):
            # So much for each of what its size is the sum of, at most.
            rooms = [self.scratch([(capacity, 1)], tensor.type.dtype) for capacity in self._room(op.operands[0])]
            self.tensor_bases[tensor], self.tensor_strides[tensor] = rooms[0], [1]
            return
        size: Scalar = 1
        strides: list[Scalar] = []
        extents: list[tuple[Capacity | int, int]] = []
        for value in reversed(op.operands):
            capacity = self.hint(value)[2]
            assert capacity is not None, "split_parts asks first"
            strides.insert(0, size)
            # Rows of what many workers share start at lines, so that copies may have several elements at once.
            multiple = LINE_BYTES // element_bytes(tensor.type.dtype) if self.facts.many_workers and not extents else 1
            extents.insert(0, (capacity, multiple))
            # What is the least of several is bounded by one of these, which may be far more.
            least = value.op is not None and value.op.name == "min" and multiple == 1
            size = self.mul(size, self.integer(value) if least else self._rounded(capacity, multiple))
        self.tensor_bases[tensor] = self.scratch(extents, tensor.type.dtype, shared=True,
                                                 behind=self.facts.many_workers)
        if op.attributes.get("apart") and len(strides) > 1:
            between = LINE_BYTES // element_bytes(tensor.type.dtype)
            self.scratch([extents[0], (between, 1)], tensor.type.dtype, shared=True, behind=self.facts.many_workers)
            strides[0] = self.add(strides[0], between)
        self.tensor_strides[tensor] = strides

    def _room(self, size: Value) -> list[Capacity]:
        """Bounds whose sum bounds a size."""
        op = size.op
        if op is not None and op.name == "add":
            return [capacity for value in op.operands for capacity in self._room(value)]
        if op is not None and op.name == "min":
            last = self.hint(op.operands[1])[2]
            if last is None or last.is_sum:
                return self._room(op.operands[1])
        capacity = self.hint(size)[2]
        assert capacity is not None, "it was made so"
        return [capacity]

    def scratch(self, extents: list[tuple[Capacity | int, int]], dtype: DType, shared: bool = False,
                behind: bool = False) -> Scalar:
        """Address of a new scratch buffer: product over axes of their capacity, rounded up to a multiple each. shared:
        that of the first worker. behind: there is but one, behind the memory of all workers.

        The attribute `scratch` lists every buffer, and what is between them, as [element bytes, [[constant, [dims],
        multiple], ...]]; `shared_scratch` those behind all workers' memory. Warps with tasks of their own
        have as many buffers, one after the other.
        """
        size = element_bytes(dtype)
        words: Scalar = size
        record: list[object] = []
        if self.warps_have_tasks and not shared:
            record.append([self.warps, [], 1])
            *outer, (innermost, multiple) = extents
            extents = [*outer, (innermost, lcm(multiple, BUFFER_ALIGN_BYTES // gcd(size, BUFFER_ALIGN_BYTES)))]
        for capacity, multiple in extents:
            c = capacity if isinstance(capacity, Capacity) else Capacity(capacity)
            words = self.mul(words, self._rounded(c, multiple))
            record.append([c.constant, _lists(c.dims), multiple])
        if behind:
            base = self.add(self._behind_workers(), self.shared_end)
            self.shared_end = self.add(self.shared_end, self.round_up(words, BUFFER_ALIGN_BYTES))
            self.shared_sizes.append([size, record])
            return base
        base = self.add(self._scratch_base(shared), self.scratch_end)
        if self.warps_have_tasks and not shared:
            base = self.add(base, self.mul(self.warp(), words))
            words = self.mul(words, self.warps)
        self.scratch_end = self.add(self.scratch_end, self.round_up(words, BUFFER_ALIGN_BYTES))
        self.scratch_sizes.append([size, record])
        if isinstance(words, int) and words % PAGE_BYTES == 0:
            self.scratch_end = self.add(self.scratch_end, BETWEEN_BYTES)
            self.scratch_sizes.append([1, [[BETWEEN_BYTES, [], 1]]])
        return base

    def _rounded(self, capacity: Capacity, multiple: int) -> Scalar:
        extent: Scalar = capacity.constant
        for dim in capacity.dims:
            extent = self.mul(extent, self.extent(dim))
        return self.round_up(extent, multiple)

    def _behind_workers(self) -> Scalar:
        """Where the last worker's memory ends."""
        memo = self.levels[0].memo
        if "behind workers" not in memo:
            each = self.emit(0, "arg", [], S64, slot=1)
            memo["behind workers"] = self.add(self._scratch_base(True), self.mul(self.emit_once("workers"), each))
        return memo["behind workers"]  # type: ignore[no-any-return]

    def _scratch_base(self, shared: bool = False) -> Scalar:
        memo = self.levels[0].memo
        if shared:
            if "first scratch" not in memo:
                memo["first scratch"] = self.emit(0, "arg", [], S64, slot=0)
        elif "scratch" not in memo:
            base = self.emit(0, "arg", [], S64, slot=0)
            each = self.emit(0, "arg", [], S64, slot=1)
            worker = self.emit(0, "worker", [], S64)
            memo["scratch"] = self.add(base, self.mul(worker, each))
        return memo["first scratch" if shared else "scratch"]  # type: ignore[no-any-return]

    def allocate(self, value: Value, dtype: DType, axes: list[tuple[str, Capacity | int]],
                 apart: bool = False) -> Access:
        """A scratch buffer for a tile: the last axis is contiguous and padded to whole rows (twice, for tails). Many
        rows, and those that shall be `apart`, lie a line further apart, so that those at hand are not all in one set of
        the first cache."""
        extents: list[tuple[Capacity | int, int]] = [(c, 1) for _, c in axes[:-1]]
        extents.append((axes[-1][1], self.lanes))
        base = self.scratch(extents, dtype)
        between = LINE_BYTES if apart or any(axis in self.chunked for axis, _ in axes[:-1]) else 0
        if between:
            self.scratch([*extents[:-1], (between // element_bytes(dtype), 1)], dtype)
        access = Access(base, 0, {}, memory_dtype(dtype), relative=True)
        step: Scalar = element_bytes(dtype)
        for (axis, capacity), (_, multiple) in zip(reversed(axes), reversed(extents), strict=True):
            access.axes[axis] = step
            c = capacity if isinstance(capacity, Capacity) else Capacity(capacity)
            step = self.add(self.mul(step, self._rounded(c, multiple)), between)
            between = 0
        return access


def _lists(nested: Any) -> Any:
    """What a parsed function has in place of tuples."""
    return [_lists(part) for part in nested] if isinstance(nested, tuple) else nested
