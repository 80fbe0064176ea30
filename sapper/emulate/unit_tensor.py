"""tcgen05 but for its products: tensor memory is allocated and freed, moved to and from registers.

Enters: warps. Leaves: registers, cells of tensor memory. Holds: registers of a load are in flight until
tcgen05.wait::ld, cells of a store until tcgen05.wait::st; in lazy mode the load reads and the store writes only then.
A store takes its values when it begins. A warp reaches its own 32 lanes, by its number modulo 4.
Source: PTX ISA, "TensorCore 5th Generation Family Instructions": "tcgen05.alloc", "tcgen05.ld", "tcgen05.st",
"tcgen05.wait", "tcgen05.fence".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..targets.ptx.fragments import fragment_tensor
from . import parse
from .errors import EmulationError
from .machine import WARP, Lanes, Machine, Run, Wait
from .tensor_memory import (
    COLUMNS,
    GROUP,
    LANES,
    LOW,
    WHOLE,
    TensorMemory,
    Use,
    places_of,
    split_address,
    tensor_memory,
    warp_toucher,
)
from .unit_memory import Access, address_reader, store_to
from .units import unit

Array = NDArray[Any]
LEAST_COLUMNS = 32
"""That are allocated at once; PTX ISA: from 32 to 512, a power of 2."""


def warps_in(machine: Machine, lanes: Lanes) -> list[Array]:
    """The threads of each warp."""
    every = machine.lanes_of(lanes)
    return np.split(every, np.flatnonzero(np.diff(machine.warp_of[every])) + 1)


def one_value(values: Array, instruction: parse.Instruction, what: str) -> int:
    """What is the same for all threads of a warp."""
    if np.count_nonzero(values != values[0]):
        raise EmulationError(f"{instruction.text}: {what} differs between threads", instruction.line)
    return int(values[0])


# --- Allocation -----------------------------------------------------------------------------------------------------


@unit("tensor_allocation")
def _allocation(machine: Machine, instruction: parse.Instruction) -> Run:
    memory, name = tensor_memory(machine), instruction.form.row.name
    if name == "tcgen05.relinquish_alloc_permit":
        def relinquish(lanes: Lanes) -> Wait | None:
            memory.relinquished[machine.block_of[machine.lanes_of(lanes)]] = True
            return None

        return relinquish
    first, count = instruction.operands
    read_count = machine.reader(count, "u32")

    def columns_of(threads: Array) -> int:
        columns = one_value(read_count(threads), instruction, "the number of columns")
        if not LEAST_COLUMNS <= columns <= COLUMNS or columns & (columns - 1):
            raise EmulationError(f"{instruction.text}: found {columns} columns, expected a power of 2 from "
                                 f"{LEAST_COLUMNS} to {COLUMNS}", instruction.line)
        return columns

    if name == "tcgen05.dealloc":
        return _free(machine, instruction, columns_of)
    read_address = address_reader(machine, first)
    space = "shared" if "shared::cta" in instruction.form else "generic"
    access = Access(machine, instruction.text, instruction.line, 4)

    def allocate(threads: Array) -> bool:
        block, columns = int(machine.block_of[threads[0]]), columns_of(threads)
        if memory.relinquished[block]:
            raise EmulationError(f"{instruction.text} after tcgen05.relinquish_alloc_permit of its block",
                                 instruction.line)
        start = memory.room(block, columns)
        if start is None:
            return False
        memory.start_of[block, start:start + columns] = start
        where = read_address(threads)
        one_value(where, instruction, "the address")
        store_to(access, space, threads[:1], where[:1], np.array([[start]], np.uint32))
        return True

    return _as_there_is_room(machine, memory, allocate, columns_of)


def _as_there_is_room(machine: Machine, memory: TensorMemory, allocate: Callable[[Array], bool],
                      columns_of: Callable[[Array], int]) -> Run:
    """Warps wait until others of their block have freed enough."""
    done: set[int] = set()
    """Warps that have theirs, while others of their strand wait."""

    def run(lanes: Lanes) -> Wait | None:
        warps = warps_in(machine, lanes)
        for threads in warps:
            warp = int(machine.warp_of[threads[0]])
            if warp not in done and allocate(threads):
                done.add(warp)
        late = {int(machine.warp_of[threads[0]]): columns_of(threads) for threads in warps
                if int(machine.warp_of[threads[0]]) not in done}
        if not late:
            done.difference_update(int(machine.warp_of[threads[0]]) for threads in warps)
            return None

        def ready(asked: Array) -> Array:
            return np.array([warp not in late or memory.room(int(machine.block_of[lane]), late[warp]) is not None
                             for lane, warp in zip(asked.tolist(), machine.warp_of[asked].tolist(), strict=True)])

        return Wait(ready, lambda: "waits for free tensor memory", again=True)

    return run


def _free(machine: Machine, instruction: parse.Instruction, columns_of: Callable[[Array], int]) -> Run:
    read_address, memory = machine.reader(instruction.operands[0], "b32"), tensor_memory(machine)

    def run(lanes: Lanes) -> Wait | None:
        for threads in warps_in(machine, lanes):
            by = warp_toucher(machine, int(threads[0]), instruction.line, "tcgen05.dealloc")
            lane, start = split_address(one_value(read_address(threads), instruction, "the address"), by)
            if lane:
                raise EmulationError(f"{instruction.text}: found lane {lane} in the address, expected 0",
                                     instruction.line)
            memory.free(by.block, start, columns_of(threads), by)
            machine.happened()
        return None

    return run


# --- Moves ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Move:
    """A load or store in flight. land: makes its effect, None once that is made. slots: of registers that a load
    writes."""

    kind: str
    threads: Array
    use: Use | None
    slots: list[int]
    land: Callable[[], None] | None


class Moves:
    """Those in flight."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.pending: list[Move] = []

    def finish(self, kind: str, lanes: Lanes) -> None:
        machine, memory = self.machine, tensor_memory(self.machine)
        warps = set(machine.warp_of[machine.lanes_of(lanes)].tolist())
        done = [move for move in self.pending
                if move.kind == kind and int(machine.warp_of[move.threads[0]]) in warps]
        for move in done:
            if move.land is not None:
                move.land()
            for slot in move.slots:
                machine.landed(slot, move.threads)
        self.pending = [move for move in self.pending if move not in done]
        if memory.order is not None:
            memory.order.end([move.use for move in done if move.use is not None])


def moves(machine: Machine) -> Moves:
    return machine.kept(Moves)


@unit("tensor_wait")
def _wait(machine: Machine, instruction: parse.Instruction) -> Run:
    kind = instruction.form.get("kind").removeprefix("wait::")

    def run(lanes: Lanes) -> Wait | None:
        moves(machine).finish(kind, lanes)
        return None

    return run


@unit("tensor_fence")
def _fence(machine: Machine, instruction: parse.Instruction) -> Run:
    clocks = machine.clocks
    fence = clocks.fence_tensor_before if "before" in instruction.form.get("kind") else clocks.fence_tensor_after

    def run(lanes: Lanes) -> Wait | None:
        fence(np.unique(machine.warp_of[machine.lanes_of(lanes)]))
        return None

    return run


@unit("tensor_move")
def _move(machine: Machine, instruction: parse.Instruction) -> Run:
    return _Move(machine, instruction)


class _Move:
    """A tcgen05.ld or st. lanes, columns: of each register and thread, from the address on; with halves, a last axis of
    the two columns whose lower 16 bits make up a register."""

    def __init__(self, machine: Machine, instruction: parse.Instruction) -> None:
        self.machine, self.instruction = machine, instruction
        form = instruction.form
        _, self.kind, shape = form.row.name.split(".")
        operands = dict(zip((operand.role for operand in form.operands), instruction.operands, strict=True))
        vector = operands["w" if self.kind == "ld" else "r"]
        self.items = vector.items if isinstance(vector, parse.Vector) else ()
        count = next(operand.count for operand in form.operands if operand.count)
        if len(self.items) != count:
            raise EmulationError(f"{form.mnemonic} has {count} registers, found {len(self.items)}", instruction.line)
        self.read_address = address_reader(machine, operands["m"])
        split = operands.get("i")
        further = split.bits if isinstance(split, parse.Immediate) else 0
        self.lanes, columns = fragment_tensor(shape, count)
        self.height = 32 if shape == "32x32b" else GROUP
        self.halves = "pack::16b" in form or "unpack::16b" in form
        second = further * (np.arange(WARP) // 16 if shape == "16x32bx2" else np.zeros(WARP, np.int64))
        if self.halves:
            self.lanes, columns = self.lanes[..., None], 2 * columns[..., None] + np.arange(2)
            second = second[:, None]
        self.columns = columns + second

    def __call__(self, lanes: Lanes) -> Wait | None:
        for threads in warps_in(self.machine, lanes):
            self._start(threads)
        return None

    def _start(self, threads: Array) -> None:
        machine, instruction = self.machine, self.instruction
        memory = tensor_memory(machine)
        by = warp_toucher(machine, int(threads[0]), instruction.line, instruction.form.mnemonic)
        if len(threads) < WARP:
            raise EmulationError(f"{instruction.text}: found {len(threads)} threads in a warp, expected {WARP}",
                                 instruction.line)
        lane, column = split_address(one_value(self.read_address(threads), instruction, "the address"), by)
        part = by.agent % machine.shape.warps % (LANES // WARP) * WARP
        if lane not in range(part, part + WARP, self.height):
            raise EmulationError(
                f"{instruction.text}: {machine.place_of(int(threads[0]))} begins at lane {lane} of tensor memory; its "
                f"lanes are {part} to {part + WARP - 1}, in steps of {self.height}", instruction.line)
        where = by.block, lane + self.lanes, column + self.columns
        memory.check_allocated(by.block, where[2], by)
        use = None
        if memory.order is not None:
            places, none = places_of(*where), np.zeros(0, np.int64)
            use = memory.order.begin(by, *((places, none) if self.kind == "ld" else (none, places)))
        if self.kind == "ld":
            memory.check_written(*where, LOW if self.halves else WHOLE, by)
        land = self._load(memory, threads, where) if self.kind == "ld" else self._store(memory, threads, where)
        if not machine.options.lazy:
            land()
        slots = [item.slot for item in self.items if isinstance(item, parse.Register)] if self.kind == "ld" else []
        for slot in slots:
            machine.begin_write(slot, threads, f"{by.name} of line {by.line}", "tcgen05.wait::ld")
        moves(machine).pending.append(Move(self.kind, threads, use, slots, land if machine.options.lazy else None))

    def _load(self, memory: TensorMemory, threads: Array, where: tuple[int, Array, Array]) -> Callable[[], None]:
        machine = self.machine

        def land() -> None:
            cells = memory.cells[where]
            if self.halves:
                cells = cells[..., 0] & np.uint32(0xFFFF) | cells[..., 1] << np.uint32(16)
            for item, values in zip(self.items, cells, strict=True):
                if isinstance(item, parse.Register):
                    changed = machine.values[item.slot].copy()
                    changed[machine.index_of(threads)] = values
                    machine.values[item.slot] = changed

        return land

    def _store(self, memory: TensorMemory, threads: Array, where: tuple[int, Array, Array]) -> Callable[[], None]:
        values = np.stack([self.machine.raw_reader(item, "b32")(threads) for item in self.items])
        if self.halves:
            values = np.stack([values & np.uint32(0xFFFF), values >> np.uint32(16)], axis=-1)

        def land() -> None:
            memory.cells[where] = values
            memory.written[where] = LOW if self.halves else WHOLE

        return land
