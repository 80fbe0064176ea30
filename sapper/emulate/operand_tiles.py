"""Operands of products that lie in shared memory: matrix descriptors, and the bytes that they tell of.

Enters: the 64 bits of a descriptor of wgmma or of tcgen05.mma, extents. Leaves: a `Tile`: where each element lies.
Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions": "Shared Memory Matrix Layout", "Matrix Descriptor
Format"; "TensorCore 5th Generation Family Instructions": "Shared memory descriptor"; the layouts of both majors are
those that CUTLASS names canonical (include/cute/arch/mma_sm90_desc.hpp, include/cute/atom/mma_traits_sm100.hpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..targets.ptx.warp import ELEMENTS, widened
from .errors import EmulationError
from .machine import Machine
from .memory import RANK_SHIFT
from .tensor_map import swizzled
from .unit_memory import Access, shared_shadow

Array = NDArray[Any]
_SWIZZLE = (0, 128, 64, 32)
"""Bytes, by bits 62 and 63 of a descriptor of wgmma."""
_TENSOR_SWIZZLE = {0: 0, 2: 128, 4: 64, 6: 32}
"""Bytes, by bits 61 to 63 of one of tcgen05.mma."""
_TENSOR_VERSION = 1
"""Bits 46 and 47 there."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A decoded matrix descriptor, in bytes. address: in the shared window."""

    address: int
    leading: int
    stride: int
    swizzle: int

    @staticmethod
    def decode(bits: int) -> Descriptor:
        """One of wgmma. Raises EmulationError for a base offset, of patterns that do not start at multiples of their
        size."""
        return Descriptor._decode(bits, _SWIZZLE[bits >> 62 & 3])

    @staticmethod
    def decode_tensor(bits: int) -> Descriptor:
        """One of tcgen05.mma. Raises EmulationError for another version than sm_100's, leading bytes that are an
        address, and the swizzle of 32-byte chunks, too."""
        if bits >> 46 & 7 != _TENSOR_VERSION:
            raise EmulationError(f"found version {bits >> 46 & 7} in bits 46 to 48 of a matrix descriptor, expected "
                                 f"{_TENSOR_VERSION}")
        if bits >> 52 & 0x1FF:
            raise EmulationError(f"found {bits >> 52 & 0x1FF:#x} in bits 52 to 60 of a matrix descriptor, expected 0")
        swizzle = _TENSOR_SWIZZLE.get(bits >> 61 & 7)
        if swizzle is None:
            raise EmulationError(f"found swizzle {bits >> 61 & 7} in a matrix descriptor, expected one of "
                                 f"{', '.join(map(str, _TENSOR_SWIZZLE))}")
        return Descriptor._decode(bits, swizzle)

    @staticmethod
    def _decode(bits: int, swizzle: int) -> Descriptor:
        if bits >> 49 & 7:
            raise EmulationError(f"found base offset {bits >> 49 & 7} in a matrix descriptor, expected 0")
        return Descriptor((bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, swizzle)

    def offsets(self, rows: int, depth: int, size: int, transposed: bool) -> Array:
        """Addresses of the elements (rows, depth) of an operand: rows are M or N, depth is K. transposed: M or N is
        contiguous, not K."""
        row, column = np.arange(rows)[:, None], np.arange(depth)[None, :]
        width = self.swizzle or 16
        if not transposed:  # K is contiguous: groups of 8 rows, `stride` apart
            inner = column * size
            chunk = (inner // 16) * self.leading + inner % 16 if not self.swizzle else inner
            offset = (row % 8) * width + (row // 8) * self.stride + chunk
        else:  # M or N is contiguous: groups of 8 of K
            inner = row * size
            if self.swizzle:
                offset = inner % width + (inner // width) * self.leading + (column % 8) * width + (
                    column // 8) * self.stride
            else:
                offset = inner % 16 + (inner // 16) * self.stride + (column % 8) * 16 + (column // 8) * self.leading
        return swizzled(self.address + offset, self.swizzle)


@dataclass(slots=True, eq=False)
class Tile:
    """A matrix in shared memory, as a descriptor has it. offsets: of its elements in the arena; places: its granules.
    size: bytes of an element. written: all of it is known to be, which it then stays."""

    offsets: Array
    places: Array
    size: int
    written: bool = False

    def matrix(self, machine: Machine, type: str) -> Array:
        """Its elements now, in the type in which products are exact."""
        raw = machine.memory.shared.views[self.size][self.offsets // self.size]
        if type == "tf32":
            return np.asarray((raw & np.uint32(0xFFFFE000)).view(np.float32))
        return widened(raw.view(np.dtype(ELEMENTS[type])))


def tile_at(access: Access, thread: int, descriptor: Descriptor, extent: int, depth: int, transposed: bool) -> Tile:
    """Where the elements are that a descriptor tells of. access: of one element. thread: of the block whose shared
    memory it is."""
    machine = access.machine
    cache: dict[Any, Tile] = machine.state.setdefault("descriptors", {})
    block = int(machine.block_of[thread])
    key = (block, descriptor, extent, depth, access.size, transposed)
    found = cache.get(key)
    if found is None:
        rank = block % machine.shape.cluster_blocks
        flat = descriptor.offsets(extent, depth, access.size, transposed).reshape(-1)
        flat = flat | rank << RANK_SHIFT
        offsets = access.shared_offsets(np.full(len(flat), thread), flat).reshape(extent, depth)
        places = shared_shadow(machine).places(offsets, access.size) if machine.options.races else np.zeros(0, np.int64)
        found = cache[key] = Tile(offsets, places, access.size)
    return found


def begin_reads(access: Access, threads: Array, tiles: list[Tile], name: str) -> Array:
    """Check and mark the bytes of shared memory that a product of these threads reads; their granules."""
    machine = access.machine
    if machine.options.uninitialised:
        for tile in tiles:
            flat = tile.offsets.reshape(-1)
            missing = None if tile.written else machine.memory.shared.unwritten(flat, access.size, 1)
            if missing is not None:
                at = np.array([int(flat[missing][0]) % machine.memory.shared_stride])
                raise access.fault(threads[:1], np.array([True]), at, "reads shared memory that nobody wrote")
            tile.written = True
    places = np.concatenate([tile.places for tile in tiles])
    if machine.options.races:
        shadow = shared_shadow(machine)
        agents = np.unique(machine.warp_of[threads])
        shadow.check_reads_of_all(places, agents, access.line)
        shadow.check_proxy(places, agents, access.line, name)
        shadow.mark("reading", places, access.line)
    return places
