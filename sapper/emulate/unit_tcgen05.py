"""tcgen05.mma: products whose sums lie in tensor memory; tcgen05.cp; tcgen05.commit, which tells that they are made.

Enters: descriptors of operands in shared memory, or the address of A in tensor memory, and the instruction's own
descriptor. Leaves: sums in tensor memory, arrivals at mbarriers. Holds: a product is in flight until the arrival of a
later commit of its thread, which comes when something waits for it; in lazy mode it reads its operands and writes its
sums only then. The tensor core of a block takes products in the order in which they are issued.
Source: PTX ISA, "TensorCore 5th Generation Family Instructions": "tcgen05.mma", "Instruction descriptor", "Data Path
Layout Organization", "Block scaling", "tcgen05.cp", "tcgen05.commit"; CUTLASS, include/cute/arch/mma_sm100_desc.hpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..targets.ptx.warp import accumulate, elements
from . import parse
from .errors import EmulationError
from .machine import WARP, Lanes, Machine, Run, Wait
from .memory import SHARED_START
from .operand_tiles import Descriptor, Tile, begin_reads, tile_at
from .races import READS, TENSOR, WRITES
from .tensor_memory import LANES, LOW, WHOLE, Toucher, Use, places_of, split_address, tensor_memory
from .unit_mbarrier import MbarrierObject, arrive_for, find, object_reader
from .unit_memory import Access, address_reader, shared_shadow
from .unit_warp import member_reader
from .units import unit

Array = NDArray[Any]
Cells = tuple[Array, Array]
"""(lanes, columns) of tensor memory, to be broadcast."""
DEPTH_BYTES = 32
"""Of K, of every kind."""
_TYPES: dict[str, dict[int, str]] = {
    "f16": {0: "f16", 1: "bf16"}, "tf32": {2: "tf32"}, "f8f6f4": {0: "e4m3", 1: "e5m2"}, "i8": {0: "u8", 1: "s8"},
    "mxf8f6f4": {0: "e4m3", 1: "e5m2"}}
"""By kind and bits 7 to 9 (A) or 10 to 12 (B) of the instruction descriptor."""
_SUMS: dict[str, dict[int, str]] = {
    "f16": {0: "f16", 1: "f32"}, "tf32": {1: "f32"}, "f8f6f4": {0: "f16", 1: "f32"}, "i8": {2: "s32"}}
"""By kind and bits 4 and 5."""
_SIZES = {"f16": 2, "tf32": 4, "f8f6f4": 1, "i8": 1, "mxf8f6f4": 1}
"""Bytes of an element, by kind."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoded instruction descriptor. negated, transposed: of A and B; transposed: M or N is contiguous, not K.
    scales: which byte of a cell has the scales of A, and of B; None: they have none."""

    type_a: str
    type_b: str
    sums: str
    m: int
    n: int
    negated: tuple[bool, bool]
    transposed: tuple[bool, bool]
    saturates: bool
    scales: tuple[int, int] | None = None

    @staticmethod
    def decode(bits: int, kind: str) -> Shape:
        """Raises EmulationError for what the kind does not have, and for sparse operands."""
        if kind == "mxf8f6f4":
            return Shape._decode_scaled(bits)
        unknown = {"bit 2, of sparse operands,": bits & 7, "bit 6": bits & 1 << 6, "bit 23": bits & 1 << 23,
                   "bit 29": bits & 1 << 29, "bits 30 and 31": bits >> 30}
        if kind == "i8":
            unknown["bits 13 and 14, negation of integers,"] = bits & 3 << 13
        else:
            unknown["bit 3, saturation of floats,"] = bits & 1 << 3
        for what, value in unknown.items():
            if value:
                raise EmulationError(f"found {what} set in the instruction descriptor {bits:#x} of kind::{kind}")
        if kind == "tf32" and bits & 3 << 15:  # CUTLASS: SWIZZLE_128B_BASE32B
            raise EmulationError(f"found a transposed operand in the instruction descriptor {bits:#x} of kind::tf32, "
                                 "which wants the swizzle of 32-byte chunks; the emulator has operands along K alone")
        m, n = (bits >> 24 & 0x1F) << 4, (bits >> 17 & 0x3F) << 3
        _check_shape(m, n, kind)
        return Shape(_named(_TYPES[kind], bits >> 7 & 7, "type of A", kind),
                     _named(_TYPES[kind], bits >> 10 & 7, "type of B", kind),
                     _named(_SUMS[kind], bits >> 4 & 3, "type of D", kind), m, n,
                     (bool(bits >> 13 & 1), bool(bits >> 14 & 1)), (bool(bits >> 15 & 1), bool(bits >> 16 & 1)),
                     bool(bits >> 3 & 1))

    @staticmethod
    def _decode_scaled(bits: int) -> Shape:
        kind = "mxf8f6f4"
        if bits & 0b1001111 or bits >> 31:
            raise EmulationError(f"found some of bits 0 to 3, 6 and 31 set in the instruction descriptor {bits:#x} of "
                                 f"kind::{kind}")
        if not bits >> 23 & 1:
            raise EmulationError(f"found bit 23 of the instruction descriptor {bits:#x} clear, expected UE8M0 scales")
        m, n = (bits >> 24 & 0x1F) << 4, (bits >> 17 & 0x3F) << 3
        if m != LANES or not 8 <= n <= 256:
            raise EmulationError(f"found M = {m}, N = {n} in the instruction descriptor, expected M = {LANES}, N of 8 "
                                 f"to 256 for kind::{kind}")
        return Shape(_named(_TYPES[kind], bits >> 7 & 7, "type of A", kind),
                     _named(_TYPES[kind], bits >> 10 & 7, "type of B", kind), "f32", m, n,
                     (bool(bits >> 13 & 1), bool(bits >> 14 & 1)), (bool(bits >> 15 & 1), bool(bits >> 16 & 1)), False,
                     (bits >> 29 & 3, bits >> 4 & 3))


def _named(known: dict[int, str], code: int, what: str, kind: str) -> str:
    if code not in known:
        raise EmulationError(f"found {what} {code} in the instruction descriptor, expected one of "
                             f"{', '.join(f'{number} ({name})' for number, name in known.items())} for kind::{kind}")
    return known[code]


def _check_shape(m: int, n: int, kind: str) -> None:
    step = {64: 8, 128: 16}.get(m)
    if step is None:
        raise EmulationError(f"found M = {m} in the instruction descriptor, expected 64 or 128")
    if kind == "i8" and n > 32:
        step = 16
    if n % step or not step <= n <= 256:
        raise EmulationError(f"found N = {n} in the instruction descriptor, expected a multiple of {step} up to 256 "
                             f"for M = {m} of kind::{kind}")


def lanes_of_rows(m: int, first: int) -> Array:
    """The lane of tensor memory of each of M rows (PTX ISA, layouts D and F): of 64, each warp's lanes have 16."""
    rows = np.arange(m)
    return first + (rows if m == LANES else rows // 16 * WARP + rows % 16)


@dataclass(slots=True, eq=False)
class Product:
    """A product in flight. shared: granules of shared memory that it reads. carry_out: makes its effect, None once that
    is made."""

    thread: int
    line: int
    shared: Array
    use: Use | None
    carry_out: Callable[[], None] | None


class TensorCore:
    """The products in flight, of each block in the order of their issue."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.pending: dict[int, list[Product]] = {}

    def issue(self, block: int, product: Product) -> None:
        if not self.machine.options.lazy and product.carry_out is not None:
            product.carry_out()
            product.carry_out = None
        self.pending.setdefault(block, []).append(product)

    def finish(self, block: int, done: list[Product]) -> None:
        """These are made, and what was issued before them."""
        machine, pending = self.machine, self.pending.get(block, [])
        done = [product for product in done if product in pending]
        if not done:
            return
        for product in pending[:pending.index(done[-1]) + 1]:
            if product.carry_out is not None:
                product.carry_out()
                product.carry_out = None
        rest = [product for product in pending if product not in done]
        self.pending[block] = rest
        order = tensor_memory(machine).order
        if order is None:
            return
        shadow = shared_shadow(machine)
        for product in done:
            shadow.unmark("reading", product.shared)
        for product in rest:
            shadow.mark("reading", product.shared, product.line)
        order.end([product.use for product in done if product.use is not None])


def tensor_core(machine: Machine) -> TensorCore:
    return machine.kept(TensorCore)


# --- tcgen05.commit -------------------------------------------------------------------------------------------------


@unit("tensor_commit")
def _commit(machine: Machine, instruction: parse.Instruction) -> Run:
    form = instruction.form
    address, *rest = instruction.operands
    space = "shared" if "shared::cluster" in form else "generic"
    offsets_of = object_reader(machine, instruction, address, space)
    read_mask = machine.reader(rest[0], "u16") if rest else None

    def run(lanes: Lanes) -> Wait | None:
        masks = read_mask(lanes) if read_mask is not None else None
        for number, (thread, offset) in enumerate(
                zip(machine.lanes_of(lanes).tolist(), offsets_of(lanes).tolist(), strict=True)):
            places = [offset] if masks is None else _of_cluster(machine, thread, offset, int(masks[number]))
            _arrive_after(machine, thread, [find(machine, place, instruction.line) for place in places],
                          instruction.line)
        return None

    return run


def _of_cluster(machine: Machine, thread: int, offset: int, mask: int) -> list[int]:
    """The same place in each block of the cluster that the mask names."""
    stride, size = machine.memory.shared_stride, machine.shape.cluster_blocks
    if mask >> size or not mask:
        raise EmulationError(f"found the mask {mask:#x} of blocks at shared memory+{offset % stride - SHARED_START}, "
                             f"expected some of {size}", machine.line)
    first = int(machine.block_of[thread]) // size * size
    return [offset % stride + (first + rank) * stride for rank in range(size) if mask >> rank & 1]


def _arrive_after(machine: Machine, thread: int, objects: list[MbarrierObject], line: int) -> None:
    """One arrival at each, when all that the thread issued before is made. It tells that their accesses are over, and
    what they came after; not what the thread wrote itself."""
    core, block, clocks = tensor_core(machine), int(machine.block_of[thread]), machine.clocks
    mine = [product for product in core.pending.get(block, []) if product.thread == thread]
    warp = machine.warp_of[thread:thread + 1]
    known = np.zeros_like(clocks.known[0])
    known[WRITES], known[READS] = clocks.known[warp[0], WRITES], clocks.joint(warp)[READS]
    known[TENSOR, clocks.engine(block)] = clocks.tick()
    for one in objects:
        def land(one: MbarrierObject = one) -> None:
            core.finish(block, mine)
            arrive_for(machine, one, known, line)

        one.landing.append(land)
        machine.happened()


# --- tcgen05.cp -----------------------------------------------------------------------------------------------------


_COPIED_LANES = {
    "128x256b": np.arange(LANES)[:, None], "128x128b": np.arange(LANES)[:, None],
    "64x128b.warpx2::02_13": np.arange(64)[:, None] + [0, 64],
    "64x128b.warpx2::01_23": np.arange(64)[:, None] // WARP * 64 + np.arange(64)[:, None] % WARP + [0, 32],
    "32x128b.warpx4": np.arange(WARP)[:, None] + [0, 32, 64, 96]}
"""Where each row of the source goes to, by shape."""


@unit("tensor_copy")
def _copy(machine: Machine, instruction: parse.Instruction) -> Run:
    """Rows of 16 or 32 bytes in shared memory to 4 or 8 columns."""
    shape = instruction.form.row.name.removeprefix("tcgen05.cp.")
    lanes = _COPIED_LANES[shape]
    words = 8 if "x256b" in shape else 4
    target, source = instruction.operands
    read_target, read_source = address_reader(machine, target), machine.reader(source, "b64")
    access = Access(machine, instruction.text, instruction.line, 4)

    def start(thread: int) -> None:
        one, memory = np.array([thread]), tensor_memory(machine)
        by = Toucher(int(machine.block_of[thread]), int(machine.warp_of[thread]), thread, instruction.line,
                     instruction.form.mnemonic)
        lane, column = split_address(int(read_target(one)[0]), by)
        if lane:
            raise EmulationError(f"{instruction.text}: found lane {lane} of tensor memory, expected 0",
                                 instruction.line)
        tile = tile_at(access, thread, Descriptor.decode_tensor(int(read_source(one)[0])), len(lanes), words, False)
        columns = column + np.arange(words)
        memory.check_allocated(by.block, columns, by)
        places = places_of(by.block, lanes, columns)
        use = memory.order.begin(by, places[:0], places) if memory.order is not None else None
        where = by.block, lanes[:, :, None], columns
        memory.written[where] = WHOLE
        shared = begin_reads(access, one, [tile], by.name)

        def carry_out() -> None:
            memory.cells[where] = machine.memory.shared.views[4][tile.offsets // 4][:, None]

        tensor_core(machine).issue(by.block, Product(thread, instruction.line, shared, use, carry_out))

    def run(threads: Lanes) -> Wait | None:
        for thread in machine.lanes_of(threads).tolist():
            start(thread)
        return None

    return run


# --- tcgen05.mma ----------------------------------------------------------------------------------------------------


@unit("tensor_product")
def _product(machine: Machine, instruction: parse.Instruction) -> Run:
    return _Multiply(machine, instruction)


class _Multiply:
    """A `tcgen05.mma`: its operands, and how a thread issues it."""

    def __init__(self, machine: Machine, instruction: parse.Instruction) -> None:
        self.machine, self.instruction = machine, instruction
        form = instruction.form
        self.kind = form.row.name.rpartition(".")[2]
        self.size = _SIZES[self.kind]
        d, a, b, shape, *rest = instruction.operands
        self.read_scales: list[Callable[[Lanes], Array]] = []
        if self.kind == "mxf8f6f4":
            self.read_scales, rest = [address_reader(machine, one) for one in rest[:2]], [None, *rest[2:]]
        off, keeps, *scale = rest
        self.read_d = address_reader(machine, d)
        self.read_a = address_reader(machine, a) if isinstance(a, parse.Address) else None
        self.read_descriptor_a = None if self.read_a is not None else machine.reader(a, "b64")
        self.read_descriptor_b = machine.reader(b, "b64")
        self.read_shape, self.read_keeps = machine.reader(shape, "b32"), machine.reader(keeps, "pred")
        self.read_off = member_reader(machine, form.operands[4], off) if off is not None else None
        if isinstance(off, parse.Vector) and len(off.items) != form.operands[4].count:
            raise EmulationError(f"{form.mnemonic} has {form.operands[4].count} registers of lanes to leave alone, "
                                 f"found {len(off.items)}", instruction.line)
        self.shift = scale[0].bits if scale and isinstance(scale[0], parse.Immediate) else 0
        if not 0 <= self.shift <= 15:
            raise EmulationError(f"{instruction.text}: found scale {self.shift}, expected 0 to 15", instruction.line)
        self.access = Access(machine, instruction.text, instruction.line, self.size)
        self.decoded: dict[int, Shape] = {}

    def __call__(self, lanes: Lanes) -> Wait | None:
        for thread in self.machine.lanes_of(lanes).tolist():
            self._issue(thread, np.array([thread]))
        return None

    def _issue(self, thread: int, one: Array) -> None:
        machine, line = self.machine, self.instruction.line
        block = int(machine.block_of[thread])
        by = Toucher(block, int(machine.warp_of[thread]), thread, line, self.instruction.form.mnemonic)
        bits = int(self.read_shape(one)[0])
        shape = self.decoded.get(bits)
        if shape is None:
            shape = self.decoded[bits] = Shape.decode(bits, self.kind)
        sums = self._cells(int(self.read_d(one)[0]), shape.m, shape.n, by)
        depth = DEPTH_BYTES // self.size
        tiles = [tile_at(self.access, thread, Descriptor.decode_tensor(int(self.read_descriptor_b(one)[0])), shape.n,
                         depth, shape.transposed[1])]
        in_tensor = None
        if self.read_a is not None:
            in_tensor = self._cells(int(self.read_a(one)[0]), shape.m, DEPTH_BYTES // 4, by)
            if shape.transposed[0]:
                raise EmulationError(f"{self.instruction.text}: A in tensor memory is transposed", line)
        elif self.read_descriptor_a is not None:
            tiles.append(tile_at(self.access, thread,
                                 Descriptor.decode_tensor(int(self.read_descriptor_a(one)[0])), shape.m, depth,
                                 shape.transposed[0]))
        keeps = bool(self.read_keeps(one)[0])
        kept_rows = self._kept_rows(one, sums[0])
        scales = [_scale_cells(split_address(int(read(one)[0]), by), extent)
                  for read, extent in zip(self.read_scales, (shape.m, shape.n), strict=False)]
        use = self._begin(by, shape, sums, [*([] if in_tensor is None else [in_tensor]), *scales], keeps)
        shared = begin_reads(self.access, one, tiles, by.name)

        def carry_out() -> None:
            self._carry_out(block, shape, tiles, in_tensor, scales, sums, keeps, kept_rows)

        tensor_core(machine).issue(block, Product(thread, line, shared, use, carry_out))

    def _cells(self, address: int, m: int, columns: int, by: Toucher) -> Cells:
        """Of a matrix with so many rows."""
        lane, column = split_address(address, by)
        if lane not in ((0,) if m == LANES else (0, 16)):
            raise EmulationError(f"{self.instruction.text}: found lane {lane} of tensor memory, expected "
                                 f"{'0' if m == LANES else '0 or 16'} for M = {m}", by.line)
        return lanes_of_rows(m, lane)[:, None], column + np.arange(columns)[None]

    def _kept_rows(self, one: Array, lanes: Array) -> Array:
        """Which rows are written: those whose lanes the product is not told to leave alone."""
        if self.read_off is None:
            return np.ones(len(lanes), bool)
        masks = self.read_off(one)[:, 0]
        return np.asarray(masks[lanes[:, 0] // WARP] >> (lanes[:, 0] % WARP).astype(np.uint32) & 1 == 0)

    def _begin(self, by: Toucher, shape: Shape, sums: Cells, operands: list[Cells], keeps: bool) -> Use | None:
        """Check and mark what it touches of tensor memory."""
        memory = tensor_memory(self.machine)
        written = LOW if shape.sums == "f16" else WHOLE
        read = [*([(*sums, written)] if keeps else []), *((*cells, WHOLE) for cells in operands)]
        for _, columns, _ in (*read, (*sums, 0)):
            memory.check_allocated(by.block, columns, by)
        use = None
        if memory.order is not None:
            writes = places_of(by.block, *sums)
            reads = [places_of(by.block, lanes, columns) for lanes, columns, _ in read]
            use = memory.order.begin(by, np.concatenate([writes[:0], *reads]), writes)
        for lanes, columns, needs in read:
            memory.check_written(by.block, lanes, columns, needs, by)
        memory.written[by.block, sums[0], sums[1]] = written
        return use

    def _carry_out(self, block: int, shape: Shape, tiles: list[Tile], in_tensor: Cells | None, scales: list[Cells],
                   sums: Cells, keeps: bool, kept_rows: Array) -> None:
        machine, memory = self.machine, tensor_memory(self.machine)
        if in_tensor is not None:
            a = elements(memory.cells[(block, *in_tensor)], shape.type_a).reshape(shape.m, -1)
        else:
            a = tiles[1].matrix(machine, shape.type_a)
        b = tiles[0].matrix(machine, shape.type_b)
        if shape.negated[0] != shape.negated[1]:
            a = -a
        cells = memory.cells[(block, *sums)]
        old = _values(cells, shape.sums)
        old = (np.ldexp(old, -self.shift) if self.shift else old) if keeps else np.zeros_like(old)
        product = a @ b.T
        if shape.scales is not None:
            of_a, of_b = (self._scales(memory.cells[(block, *cells)], byte, extent) for cells, byte, extent in zip(
                scales, shape.scales, product.shape, strict=True))
            product = np.ldexp(product, of_a[:, None] + of_b)
            product[np.maximum(of_a[:, None], of_b) > 127] = np.nan
        made = _bits(accumulate(product, old, shape.saturates))
        memory.cells[(block, *sums)] = np.where(kept_rows[:, None], made, cells)


    def _scales(self, cells: Array, byte: int, extent: int) -> Array:
        """Exponents of 2 of each row, 128 for NaN (UE8M0), from cells (parts of 32 lanes, 32, columns)."""
        found = (cells >> np.uint32(8 * byte) & np.uint32(0xFF)).astype(np.int32)
        if np.count_nonzero(found != found[0]):
            raise EmulationError(f"{self.instruction.text}: scales differ between the 32 lanes of one warp and those "
                                 "of another, expected the same in all four", self.instruction.line)
        return np.asarray(found[0].T.reshape(-1)[:extent] - 127)


def _scale_cells(address: tuple[int, int], extent: int) -> Cells:
    """(lanes, columns) of the scales of so many rows: row r at lane r mod 32 of each warp's lanes, column r / 32."""
    lane, column = address
    if lane:
        raise EmulationError(f"found scales at lane {lane} of tensor memory, expected 0")
    return np.arange(LANES).reshape(-1, WARP, 1), column + np.arange(-(-extent // WARP))


def _values(cells: Array, type: str) -> Array:
    """Sums from cells: those of 16 bits are the lower half."""
    if type == "f16":
        return cells.astype(np.uint16).view(np.float16)
    return cells.view(np.float32 if type == "f32" else np.int32)


def _bits(sums: Array) -> Array:
    return np.ascontiguousarray(sums).view(f"u{sums.dtype.itemsize}").astype(np.uint32)
