"""Runs machine IR from the meanings of its rows: no hardware, no encoding, registers virtual or physical.

Enters: machine IR, registers, and the buffers that it may touch. Leaves: the buffers as the code leaves them, or an
`AssemblyError` at the author's line. Holds: every access lies inside a buffer (a write inside a writable one), no
register and no flag is read that was not written, and at most `limit` instructions run.

A vector register is 64 bytes of which those above a row's size are cleared when the row writes it, as VEX and EVEX do.
A tile register is [rows][bytes] of the shape that its configuration, a register too, gives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ..codegen.machine import (
    Immediate,
    Instruction,
    Label,
    LabelReference,
    MachineFunction,
    Memory,
    Register,
    VirtualRegister,
)
from .errors import AssemblyError
from .symbolic import Lanes, NotSymbolic

Array = np.ndarray[Any, np.dtype[Any]]  # of bytes; or of bytes that are not known (symbolic.py)
VECTOR_BYTES = 64
STACK_BYTES = 4096
LIMIT = 2_000_000
"""Instructions that a piece may run before it counts as endless."""
_LOW = (1 << 64) - 1


class Buffers(Protocol):
    """Memory by address, such as `lane.interpret.Memory`."""

    def find(self, address: int, size_bytes: int, write: bool) -> Any:
        """The bytes as a view, or a sentence that says why not."""
        ...

    def allocate(self, name: str, size_bytes: int, align_bytes: int = 64) -> int: ...


class Emulator:
    """One run. registers: values by register (int, or bytes of a vector). flags: those defined, by letter.

    executed: instructions so far. reached: their places in the body. written: (address, bytes) of every store.
    """

    def __init__(self, table: Any, memory: Buffers, registers: Mapping[Any, Any] | None = None) -> None:
        self.table = table
        self.memory = memory
        self.registers: dict[Any, Any] = dict(registers or {})
        self.flags: dict[str, int] = {}
        self.mxcsr = int(table.DEFAULT_MXCSR)
        self.item: Instruction | None = None
        self.executed = 0
        self.reached: set[int] = set()
        self.written: list[tuple[int, int]] = []
        self.random = np.random.default_rng(0)
        stack = memory.allocate("the stack", STACK_BYTES)
        # As after a call: rsp + 8 is a multiple of 16.
        self.stack_register = Register(*table.STACK_POINTER)
        self.registers[self.stack_register] = self.entry_stack = stack + STACK_BYTES - 8

    # --- State ------------------------------------------------------------------------------------------------------

    @property
    def stack_pointer(self) -> int:
        return int(self.registers[self.stack_register])

    @stack_pointer.setter
    def stack_pointer(self, value: int) -> None:
        self.registers[self.stack_register] = value

    def fail(self, kind: str, headline: str, found: str = "", expected: str = "", mend: str = "") -> AssemblyError:
        location = self.item.location if self.item is not None else None
        return AssemblyError(kind, headline, location, found, expected, mend)

    def get(self, register: Any) -> Any:
        found = self.registers.get(register)
        if found is None:
            reader = self.item.row.mnemonic if self.item is not None else "the caller"
            raise self.fail("undefined", f"{reader} reads a register that was never written", repr(register))
        return found

    def view(self, address: int, size_bytes: int, write: bool) -> Array:
        found = self.memory.find(address, size_bytes, write)
        if isinstance(found, str):
            kind = "read-only" if "read-only" in found else "footprint"
            name = self.item.row.mnemonic if self.item is not None else "code"
            raise self.fail(kind, f"{name} reaches memory that it may not", found)
        return found  # type: ignore[no-any-return]

    def read(self, address: int, size_bytes: int) -> Array:
        return self.view(address, size_bytes, False)

    def write(self, address: int, data: Array) -> None:
        self.view(address, len(data), True)[:] = data
        self.written.append((address, len(data)))

    def clear_above(self, kind: str, number: int, size_bytes: int) -> None:
        """Clear the bytes of a register from `size_bytes` on."""
        held = self.registers.get(Register(kind, number))
        if held is not None:
            self.registers[Register(kind, number)] = self.table.padded(held[:size_bytes], VECTOR_BYTES)

    # --- Running ----------------------------------------------------------------------------------------------------

    def run(self, function: MachineFunction, limit: int = LIMIT) -> None:
        """Run to the return, or off the end of the code. Raises AssemblyError."""
        body = function.body
        places = {item.name: place for place, item in enumerate(body) if isinstance(item, Label)}
        self.constants = {label: self._constant(align, data) for label, (align, data) in function.constants.items()}
        place = 0
        while place < len(body):
            item = body[place]
            place += 1
            if isinstance(item, Label):
                continue
            self.reached.add(place - 1)
            self.item = item
            self.executed += 1
            if self.executed > limit:
                raise self.fail("loop", f"still running after {limit} instructions")
            control = item.row.control
            try:
                if not control:
                    self.execute(item)
                elif control == "return":
                    break
                elif control in ("jump", "branch"):
                    target = next((o.name for o in item.operands if isinstance(o, LabelReference)), None)
                    if target is None:
                        raise self.fail("notation", f"{item.row.name} is not interpreted")
                    if control == "jump" or self.taken(item):
                        place = places[target]
                else:
                    raise self.fail("notation", f"{item.row.name} is not interpreted")
            except NotSymbolic as error:
                raise NotSymbolic(f"{item.row.mnemonic}: {error}") from None
        self.item = None

    def _constant(self, align: int, data: bytes) -> int:
        address = self.memory.allocate("constants", len(data), align)
        self.memory.find(address, len(data), True)[:] = np.frombuffer(data, np.uint8)
        return address

    def taken(self, item: Instruction) -> bool:
        return bool(item.row.meaning(self.known_flags(item)))

    def known_flags(self, item: Instruction) -> dict[str, int]:
        missing = [f for f in item.row.flags_read if f not in self.flags]
        if missing:
            raise self.fail("flags", f"{item.row.mnemonic} reads flags that are not defined", ", ".join(missing))
        return self.flags

    def address(self, memory: Memory) -> int:
        if memory.label is not None:
            return int(self.constants[memory.label]) + memory.disp
        total = memory.disp
        if memory.base is not None:
            total += self.get(memory.base)
        if memory.index is not None:
            total += self.get(memory.index) * memory.scale
        return int(total & _LOW)

    def gathered(self, spec: Any, memory: Memory, mask: int | None) -> tuple[list[int], list[int]]:
        """Addresses of a gather's or scatter's lanes, and the lanes that are on."""
        index = self.get(memory.index)
        bits = 32 if "d" in _index_letter(self.item) else 64
        lanes = min(spec.index_bits // bits, self._lanes())
        offsets = index[:lanes * bits // 8].view(f"i{bits // 8}")
        base = (self.get(memory.base) if memory.base is not None else 0) + memory.disp
        on = [lane for lane in range(lanes) if mask is None or mask >> lane & 1]
        return [(base + int(o) * memory.scale) & _LOW for o in offsets], on

    def shape(self, tile: Any) -> tuple[int, int]:
        """Rows, and bytes of a row, of a tile register."""
        shapes = self.table.tile_shapes(self.get(Register(*self.table.CONFIGURATION)))
        found = self.table.tile_shape(tile.number if isinstance(tile, Register) else None, shapes) if shapes else (0, 0)
        if found is None:
            raise self.fail("state", "a tile without a number is used where not all tiles have the same shape",
                            ", ".join(f"{rows} x {bytes_}" for rows, bytes_ in shapes), "one shape, or tiles by name")
        return found

    def rows_of(self, item: Instruction, memory: Memory) -> tuple[list[int], int]:
        """The address of each row of the tile that an instruction loads or stores, and the bytes of a row."""
        rows, row_bytes = self.shape(next(o for o in item.operands if not isinstance(o, Memory)))
        stride = 0 if memory.index is None else self.get(memory.index) * memory.scale
        first = self.get(memory.base) if memory.base is not None else 0
        return [(first + memory.disp + row * stride) & _LOW for row in range(rows)], row_bytes

    def _tile_from(self, addresses: list[int], row_bytes: int, write: bool) -> Array:
        rows = [self.view(address, row_bytes, write) for address in addresses]
        if any(isinstance(row, Lanes) for row in rows):
            raise NotSymbolic("tiles are not followed")
        return np.stack(rows) if rows else np.zeros((0, row_bytes), np.uint8)

    def _lanes(self) -> int:
        assert self.item is not None
        specs = [s for s in self.item.row.operands if s.kind == "vec" and s.dtype]
        index = next(s for s in self.item.row.operands if s.index_bits)
        return max(1, int(specs[0].bits) // int(index.memory_bits))

    def _read(self, item: Instruction, spec: Any, operand: Any, mask: Any, constant: bool) -> tuple[Any, Any]:
        """What an operand has before the instruction, and the place in memory that its result goes to."""
        if isinstance(operand, Immediate):
            return operand.value & ((1 << spec.bits) - 1) if spec.kind == "gpr" else operand.value, None
        if isinstance(operand, Memory):
            return self._read_memory(item, spec, operand, mask)
        if spec.kind == "tile" and not spec.reads:
            return np.zeros(self.shape(operand), np.uint8), None
        if spec.reads or (spec.writes and item.mask is not None and not item.zeroing) or spec.role == "a":
            return self._value(spec, operand, constant), None
        return self._blank(spec), None

    def _read_memory(self, item: Instruction, spec: Any, operand: Memory, mask: Any) -> tuple[Any, Any]:
        """Likewise, of a tile's rows, of lanes' own elements, of an address alone, or of bytes side by side."""
        if spec.sibmem:
            addresses, row_bytes = self.rows_of(item, operand)
            return self._tile_from(addresses, row_bytes, spec.writes), (addresses, row_bytes)
        if spec.index_bits:
            addresses, on = self.gathered(spec, operand, mask)
            size = spec.memory_bits // 8
            got = [np.zeros(size, np.uint8)] * len(addresses)
            for lane in on:
                got[lane] = self.view(addresses[lane], size, spec.writes)
            return np.concatenate(got), (addresses, on, size)
        address = self.address(operand)
        if spec.role == "a":
            return address, None
        size = (spec.broadcast_bits if operand.broadcast else spec.memory_bits) // 8
        if item.row.mnemonic in self.table.ALIGNED and address % size:
            raise self.fail("footprint", f"{item.row.mnemonic} needs memory aligned to {size} bytes",
                            f"an address {address % size} bytes past such a one",
                            "any address that a call may bring: of a tensor, a multiple of an element's size",
                            "take the instruction that moves it wherever it lies, such as vmovups or vmovdqu")
        return self._load(item, spec, operand, address, size, mask), (address, size)

    def execute(self, item: Instruction) -> None:
        """One instruction that is no jump."""
        row = item.row
        mask = None if item.mask is None else self.get(item.mask)
        constant = item.mask is None and _same_registers(item) and row.name in self.table.IDIOMS
        raw: list[Any] = []
        places: list[Any] = []
        for spec, operand in zip(row.operands, item.operands, strict=True):
            value, place = self._read(item, spec, operand, mask, constant)
            raw.append(value)
            places.append(place)
        if row.meaning is None:
            action = self.table.ACTIONS.get(row.name)
            if action is None:
                raise self.fail("notation", f"{row.name} is not interpreted")
            try:
                action(self, raw)
            except NotImplementedError as error:
                raise self.fail("notation", f"{row.mnemonic}: {error}") from None
            after, implicit, flags, mask_after = raw, [], {}, mask
        else:
            flags_in = self.known_flags(item) if row.flags_read else None
            try:
                with np.errstate(all="ignore"):
                    after, implicit, flags, mask_after = self.table.execute(
                        row, raw, tuple(isinstance(o, Memory) for o in item.operands), mask, item.zeroing, flags_in,
                        tuple(self.get(Register(*pair)) for pair in row.implicit_reads))
            except OverflowError as error:
                raise self.fail("result", f"{row.mnemonic} traps", str(error)) from None
        for spec, operand, value, place in zip(row.operands, item.operands, after, places, strict=True):
            if not spec.writes:
                continue
            if row.tolerance and spec.dtype in ("f32", "f64"):
                if isinstance(value, Lanes):
                    raise NotSymbolic("it is only approximate")
                value = self._approximate(value.view(f"f{int(spec.dtype[1:]) // 8}"), row.tolerance).view(np.uint8)
            if isinstance(operand, Memory):
                self._store(item, spec, place, value, mask)
            else:
                self._put(spec, operand, value)
        if self.table.CONFIGURATION in row.implicit_writes:
            for register in [r for r in self.registers if r.kind == "tile"]:
                del self.registers[register]
        for pair, value in zip(row.implicit_writes, implicit, strict=False):
            if pair != self.table.STACK_POINTER:
                self.registers[Register(*pair)] = value if isinstance(value, np.ndarray) else value & _LOW
        if row.flags_written:
            self.flags = {f: v for f, v in self.flags.items() if f not in row.flags_written} | flags
        if item.mask is not None and row.masking == "required":
            self.registers[item.mask] = mask_after

    def _approximate(self, exact: Array, tolerance: float) -> Array:
        """A result that the manual only promises within a relative error: as far off as it may be, either way.

        The meaning of such a row is the exact value, and code that is right only with that would be wrong on a chip.
        """
        with np.errstate(all="ignore"):
            off = exact * (1 + tolerance * self.random.choice([-1.0, 1.0], exact.shape))
        return np.where(np.isfinite(off), off, exact).astype(exact.dtype)

    def _load(self, item: Instruction, spec: Any, operand: Memory, address: int, size: int, mask: int | None) -> Array:
        """Memory of one operand; lanes that the opmask has off are not touched."""
        if mask is None or operand.broadcast or item.row.packing == "compress" or item.row.scalar:
            return self.view(address, size, spec.writes).copy()
        each = lane_bytes(item)
        lanes = size // each
        on = range((mask & ((1 << lanes) - 1)).bit_count()) if item.row.packing else \
            [lane for lane in range(lanes) if mask >> lane & 1]
        taken = dict.fromkeys(range(lanes), np.zeros(each, np.uint8))
        for lane in on:
            taken[lane] = self.view(address + lane * each, each, spec.writes)
        return np.concatenate(list(taken.values()))

    def _value(self, spec: Any, register: Any, constant: bool) -> Any:
        if constant:
            return self._blank(spec)
        value = self.get(register)
        if spec.kind == "vec":
            return value[:spec.bits // 8].copy()
        return value if spec.kind == "tile" else value & ((1 << spec.bits) - 1)

    @staticmethod
    def _blank(spec: Any) -> Any:
        return np.zeros(spec.bits // 8, np.uint8) if spec.kind == "vec" else 0

    def _put(self, spec: Any, register: Any, value: Any) -> None:
        if spec.kind == "vec":
            self.registers[register] = self.table.padded(value, VECTOR_BYTES)
        elif spec.kind == "tile":
            self.registers[register] = value
        elif spec.kind == "gpr" and spec.bits < 32:
            low = (1 << spec.bits) - 1
            self.registers[register] = self.registers.get(register, 0) & ~low | value & low
        else:
            self.registers[register] = value & _LOW

    def _store(self, item: Instruction, spec: Any, place: Any, value: Any, mask: int | None) -> None:
        if spec.sibmem:
            for address, row in zip(place[0], value, strict=True):
                self.write(address, row)
            return
        if spec.index_bits:
            addresses, on, size = place
            for lane in on:
                self.write(addresses[lane], value[lane * size:][:size])
            return
        address, size = place
        data = value[:size]
        if mask is None:
            self.write(address, data)
            return
        each = lane_bytes(item)
        if item.row.packing:
            self.write(address, data[:(mask & ((1 << size // each) - 1)).bit_count() * each])
            return
        for lane in range(1 if item.row.scalar else size // each):
            if mask >> lane & 1:
                at = lane * each
                self.write(address + at, data[at:at + each])


def lane_bytes(item: Instruction) -> int:
    """Bytes that one bit of the opmask stands for at the memory operand."""
    row = item.row
    for spec, operand in zip(row.operands, item.operands, strict=True):
        if isinstance(operand, Memory) and spec.dtype:
            wide = row.operands[0] if row.operands[0].kind == "vec" else spec
            lanes = wide.bits // int(wide.dtype[1:]) if wide.dtype.lstrip("bfiu").isdigit() else 1
            return max(1, int(spec.memory_bits) // 8 // max(1, lanes))
    raise ValueError(f"row {row.name} has no lanes in memory")


def _index_letter(item: Instruction | None) -> str:
    """d or q of a gather's or scatter's mnemonic: the size of its indices."""
    assert item is not None
    for word in ("gather", "scatter"):
        _, found, rest = item.row.mnemonic.partition(word)
        if found:
            return str(rest[0])
    raise ValueError(f"row {item.row.name} has no vector of indices")


def _same_registers(item: Instruction) -> bool:
    registers = [o for o in item.operands if isinstance(o, (Register, VirtualRegister))]
    return len(registers) > 1 and all(r == registers[0] for r in registers)

