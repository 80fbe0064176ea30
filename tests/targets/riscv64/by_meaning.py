"""RISC-V machine code run by the meanings of its rows, in Python: where no emulator is installed.

Enters: a machine function as compiled, memory as sapper/emulate/laid_out.py has it. Holds: what vectors are set to is
followed, and has to be what each row names; lanes behind the last become all ones, as the processor may leave them; an
access beyond a buffer is an error. One worker: there are no calls of the system.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sapper.codegen.machine import Instruction, Label, LabelReference, MachineFunction, Memory, Register
from sapper.emulate.laid_out import Buffers, with_arguments
from sapper.targets.riscv64.abi import ARGUMENTS
from sapper.targets.riscv64.meaning import dtype_of
from sapper.targets.riscv64.registers import LINK, MASK, PAIR, STACK
from sapper.targets.riscv64.rows import ANY

ALL = (1 << 64) - 1
STACK_BYTES = 1 << 16


def signed(number: int, bits: int = 64) -> int:
    number &= (1 << bits) - 1
    return number - (1 << bits) if number >> (bits - 1) else number


BRANCHES: dict[str, Callable[..., bool]] = {
    "beq": lambda a, b: a == b, "bne": lambda a, b: a != b, "blt": lambda a, b: signed(a) < signed(b),
    "bge": lambda a, b: signed(a) >= signed(b), "beqz": lambda a: a == 0, "bnez": lambda a: a != 0,
    "bltz": lambda a: signed(a) < 0, "bgez": lambda a: signed(a) >= 0, "bgtz": lambda a: signed(a) > 0,
    "blez": lambda a: signed(a) <= 0, "bltu": lambda a, b: a < b, "bgeu": lambda a, b: a >= b, "j": lambda: True,
    "jal": lambda: True}


class Processor:
    """Registers, memory, and what vectors are set to: lanes, and bits of an element (0: unknown)."""

    def __init__(self, vector_bits: int, memory: list[tuple[int, Any]]) -> None:
        self.size = vector_bits // 8
        self.memory = memory
        rng = np.random.default_rng(0)      # what registers hold at first is not to matter
        self.gpr = [0, *(int(n) for n in rng.integers(0, 1 << 62, 31))]
        self.fpr = [int(n) for n in rng.integers(0, 1 << 62, 32)]
        self.vec = rng.integers(0, 256, (32, self.size)).astype(np.uint8)
        self.lanes = self.element = 0

    def bytes_at(self, address: int, size: int) -> Any:
        for first, held in self.memory:
            if first <= address and address + size <= first + len(held):
                return held[address - first:address - first + size]
        raise AssertionError(f"found an access of {size} bytes at {address:#x}; expected one within a buffer")

    def run(self, function: MachineFunction) -> int:
        """How many instructions were run."""
        labels = {item.name: place for place, item in enumerate(function.body) if isinstance(item, Label)}
        place = count = 0
        while True:
            item = function.body[place]
            place += 1
            if isinstance(item, Label):
                continue
            count += 1
            name = item.row.name
            if name == "ret":
                if not self.gpr[LINK]:
                    return count
                place = self.gpr[LINK]      # a return address is the place of the instruction behind the call
                continue
            if name == "jal":
                self.gpr[LINK] = place
            if name in BRANCHES:
                if BRANCHES[name](*(self.gpr[o.number] for o in item.operands if isinstance(o, Register))):
                    place = labels[next(o.name for o in item.operands if isinstance(o, LabelReference))]
                continue
            try:
                self.step(item)
            except Exception as error:
                raise AssertionError(f"{name} {item.operands}: {error}") from error

    def step(self, item: Instruction) -> None:
        row = item.row
        if row.name.startswith("vsetivli"):
            self.lanes, self.element = item.operands[0].value, int(row.name.split(".")[1][1:])
            return
        if row.element:
            assert self.element == row.element or (row.element == ANY and self.element), (
                f"found vectors set to {self.element} bits; expected {row.element}")
        if row.name in ("fence", "pause") or row.name.startswith("prefetch"):
            return
        if row.name == "vmv1r.v.mask":
            self.vec[MASK] = self.vec[item.operands[0].number]
        elif row.name == "vsext.vf2.pair":
            self._pair(self._lanes(item.operands[0].number, np.int32).astype(np.int64))
        elif row.name == "vsll.vi.pair":
            self._pair(self._offsets() << item.operands[0].value)
        elif row.name == "lr.w":
            held = self._read(item.operands[1], row.operands[1], "", False)
            self.gpr[item.operands[0].number] = signed(held, 32) & ALL
        elif row.name == "sc.w":            # nobody else has written there
            self._write(item.operands[2], "", self.gpr[item.operands[1].number] & ALL >> 32, row, False)
            self.gpr[item.operands[0].number] = 0
        elif row.cost in ("gather", "scatter"):
            self._apart(item)
        elif row.masked and any(isinstance(o, Memory) for o in item.operands):
            self._each_lane(item, 0)
        else:
            self._by_meaning(item)

    # --- Vectors ----------------------------------------------------------------------------------------------------

    def _lanes(self, number: int, dtype: Any) -> Any:
        return self.vec[number].view(dtype)[:self.lanes].copy()

    def _mask(self) -> Any:
        return np.unpackbits(self.vec[MASK], bitorder="little")[:self.lanes].astype(bool)

    def _put(self, number: int, values: Any) -> None:
        """A row; behind it all ones."""
        data = values.tobytes()[:self.size]
        self.vec[number] = np.frombuffer(data.ljust(self.size, b"\xff"), np.uint8)

    def _pair(self, offsets: Any) -> None:
        data = offsets.tobytes()
        self._put(PAIR, np.frombuffer(data[:self.size], np.uint8))
        self._put(PAIR + 1, np.frombuffer(data[self.size:], np.uint8))

    def _offsets(self) -> Any:
        return self.vec[PAIR:PAIR + 2].reshape(-1).view(np.int64)[:self.lanes].copy()

    def _apart(self, item: Instruction) -> None:
        """Lanes that lie by offsets or by a stride."""
        memory = next(o for o in item.operands if isinstance(o, Memory))
        assert memory.index is not None
        if memory.index.kind == "gpr":
            offsets = [signed(self.gpr[memory.index.number]) * lane for lane in range(self.lanes)]
        else:
            offsets = self._offsets().tolist()
        self._each_lane(item, offsets)

    def _each_lane(self, item: Instruction, offsets: Any) -> None:
        row = item.row
        memory = next(o for o in item.operands if isinstance(o, Memory))
        register = next(o for o in item.operands if isinstance(o, Register))
        size = self._width(row)
        values = self.vec[register.number].view(f"u{size}").copy()
        on = self._mask() if row.masked else np.ones(self.lanes, bool)
        for lane in range(self.lanes):
            if on[lane]:
                there = offsets[lane] if offsets else size * lane
                data = self.bytes_at(self.gpr[memory.base.number] + memory.disp + there & ALL, size)
                if row.stores:
                    data[:] = np.frombuffer(values[lane].tobytes(), np.uint8)
                else:
                    values[lane] = np.frombuffer(data.tobytes(), values.dtype)[0]
        if not row.stores:
            self._put(register.number, values[:self.lanes])

    @staticmethod
    def _width(row: Any) -> int:
        """Bytes of an element in memory, by the row's name: vse16.v, vluxei64.v.16."""
        parts = row.name.split(".")
        return int("".join(c for c in parts[2 if "ei64" in parts[0] else 0] if c.isdigit())) // 8

    # --- The others -------------------------------------------------------------------------------------------------

    def _by_meaning(self, item: Instruction) -> None:
        row = item.row
        dtypes = iter(reversed(row.dtypes) if row.stores else row.dtypes)
        whole = "1r" in row.name
        reads: list[Any] = []
        written: list[tuple[Any, str]] = []
        for form, operand in zip(row.operands, item.operands, strict=True):
            dtype = next(dtypes) if form.kind == "vec" or (form.kind == "mem" and row.dtypes) else ""
            if form.writes:
                written.append((operand, dtype))
            if form.reads:
                reads.append(self._read(operand, form, dtype, whole))
        if row.masked:
            reads.append(self._mask())
        with np.errstate(all="ignore"):
            made = row.meaning(*reads)
        made = made if isinstance(made, tuple) else (made,)
        results = [*zip(written, made, strict=True)]
        results.sort(key=lambda result: not isinstance(result[0][0], Memory))   # its base may be written, too
        for (operand, dtype), value in results:
            self._write(operand, dtype, value, row, whole)

    def _read(self, operand: Any, form: Any, dtype: str, whole: bool) -> Any:
        if form.kind == "imm":
            return operand.value
        if form.kind in ("gpr", "fpr"):
            return getattr(self, form.kind)[operand.number]
        if form.kind == "vec":
            if dtype == "m":
                return np.unpackbits(self.vec[operand.number], bitorder="little")[:self.lanes].astype(bool)
            return self.vec[operand.number].copy() if whole else self._lanes(operand.number, dtype_of(dtype))
        address = self.gpr[operand.base.number] + operand.disp & ALL
        if not dtype:
            return int.from_bytes(self.bytes_at(address, form.bits // 8).tobytes(), "little")
        size = self.size if whole else self.lanes * dtype_of(dtype).itemsize
        return self.bytes_at(address, size).view(dtype_of(dtype)).copy()

    def _write(self, operand: Any, dtype: str, value: Any, row: Any, whole: bool) -> None:
        if isinstance(operand, Memory):
            data = value.tobytes() if dtype else int(value).to_bytes(row.memory_bits // 8, "little")
            address = self.gpr[operand.base.number] + operand.disp & ALL
            self.bytes_at(address, len(data))[:] = np.frombuffer(data, np.uint8)
        elif operand.kind == "vec":
            if dtype == "m":
                bits = np.ones(8 * self.size, bool)
                bits[:self.lanes] = value[:self.lanes]
                self.vec[operand.number] = np.packbits(bits, bitorder="little")
            else:
                self._put(operand.number, value if whole else value[:self.lanes])
        elif operand != Register("gpr", 0):
            getattr(self, operand.kind)[operand.number] = int(value) & ALL


def run_by_meaning(function: MachineFunction, vector_bits: int, words_of: Callable[[Buffers], Any], scratch: int,
                   at_end: bool = True) -> int:
    """Run a kernel as `run_code` of sapper/emulate/riscv.py does, alone. How many instructions that took."""
    buffers, words = with_arguments(words_of, scratch, 1, at_end)
    stack, _ = buffers.add(STACK_BYTES)
    processor = Processor(vector_bits, buffers.memory)
    for number, value in zip((*ARGUMENTS[:3], STACK, LINK), (words, 0, 1, stack + STACK_BYTES, 0), strict=True):
        processor.gpr[number] = value
    kept = processor.gpr[8:10] + processor.gpr[18:28] + processor.fpr[8:10] + processor.fpr[18:28]
    count = processor.run(function)
    assert kept == processor.gpr[8:10] + processor.gpr[18:28] + processor.fpr[8:10] + processor.fpr[18:28]
    assert processor.gpr[STACK] == stack + STACK_BYTES
    buffers.give_back()
    return count
