"""wgmma: products of a warpgroup, with operands in shared memory given by descriptors.

Enters: descriptors, or fragments of A in registers. Leaves: sums in the registers of the four warps. Holds: the sums
are in flight until wgmma.wait_group; reading or writing them before is an error, as is changing a register of a wgmma
after the last wgmma.fence. In lazy mode operands are read and sums written only at the wait.
Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..targets.ptx import fragments
from ..targets.ptx.rows import BITS
from ..targets.ptx.short_sums import add_products, short_sum
from ..targets.ptx.warp import accumulate, elements
from . import parse
from .errors import EmulationError, RaceError
from .machine import Lanes, Machine, Run, Wait
from .operand_tiles import Descriptor, Tile, begin_reads, tile_at
from .unit_memory import Access, shared_shadow
from .unit_warp import member_reader
from .units import unit

Array = NDArray[Any]
GROUP = 128
"""Threads of a warpgroup."""
WAIT = "wgmma.wait_group"


@dataclass(slots=True, eq=False)
class Product:
    """One wgmma in flight. threads: of its warpgroup; places: granules of shared memory that it reads."""

    text: str
    line: int
    threads: Array
    group: int
    slots: list[int]
    places: Array
    carry_out: Any


class Products:
    """The wgmma operations in flight, by warpgroup."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.committed: dict[int, int] = {}
        self.pending: list[Product] = []
        self.slots: set[int] = set()
        """Registers that any wgmma of the function uses."""
        self.fenced: dict[int, Array] = {}
        """Their values at the last fence, or as a wgmma left them since."""

    def fence(self, lanes: Lanes) -> None:
        values = self.machine.values
        for slot in sorted(self.slots):
            old = self.fenced.get(slot)
            if lanes is None or old is None:
                self.fenced[slot] = values[slot]
            elif old is not values[slot]:
                merged, index = old.copy(), self.machine.index_of(lanes)
                merged[index] = values[slot][index]
                self.fenced[slot] = merged

    def check_fenced(self, slots: list[int], threads: Array, line: int) -> None:
        values, index = self.machine.values, self.machine.index_of(threads)
        for slot in slots:
            old = self.fenced.get(slot)
            if old is not values[slot] and (old is None or not np.array_equal(old[index], values[slot][index])):
                name = self.machine.function.registers[slot][0]
                raise RaceError(f"wgmma uses register {name}, which changed since the last wgmma.fence of its warps; "
                                "expected wgmma.fence between", line)

    def set(self, slot: int, threads: Array, value: Array) -> None:
        """A sum's register, written by the tensor core."""
        machine = self.machine
        fenced, index = self.fenced.get(slot), machine.index_of(threads)
        same = fenced is machine.values[slot]
        if len(threads) == machine.count:
            machine.values[slot] = value
        else:
            changed = machine.values[slot].copy()
            changed[index] = value
            machine.values[slot] = changed
        if same:
            self.fenced[slot] = machine.values[slot]
        elif fenced is not None:
            changed = fenced.copy()
            changed[index] = value
            self.fenced[slot] = changed

    def finish(self, threads: Array, kept: int) -> None:
        """End the products of the warpgroup of `threads` but for the latest `kept` groups."""
        machine = self.machine
        block = int(threads[0]) // GROUP
        limit = self.committed.get(block, 0) - kept
        done: list[Product] = []
        rest: list[Product] = []
        for product in self.pending:
            mine = int(product.threads[0]) // GROUP == block and product.group < limit
            (done if mine else rest).append(product)
        for product in done:
            if product.carry_out is not None:
                product.carry_out()
        self.pending = rest
        shadow = shared_shadow(machine) if machine.options.races else None
        for product in done:
            if shadow is not None:
                shadow.unmark("reading", product.places)
                for agent in np.unique(machine.warp_of[product.threads]).tolist():
                    shadow.note_read(agent, product.places)
            for slot in product.slots:
                machine.landed(slot, product.threads)
        for product in rest if done else ():    # what ended took marks of what goes on: places, and registers
            if shadow is not None:
                shadow.mark("reading", product.places, product.line)
            if int(product.threads[0]) // GROUP == block:
                for slot in product.slots:
                    machine.begin_write(slot, product.threads, product.text, WAIT)



def products(machine: Machine) -> Products:
    return machine.kept(Products)


def _groups(machine: Machine, lanes: Lanes) -> tuple[list[Array], Wait | None]:
    """The warpgroups of the lanes; a wait until all four warps of each are there."""
    every = machine.lanes_of(lanes)
    if machine.shape.padded_threads % GROUP:
        raise EmulationError(f"wgmma needs blocks of whole warpgroups of 128 threads, found {machine.shape.threads}",
                             machine.line)
    numbers = every // GROUP
    counts = np.bincount(numbers, minlength=machine.count // GROUP)
    if ((counts == 0) | (counts == GROUP)).all():
        return [every[numbers == number] for number in np.flatnonzero(counts)], None

    def ready(asked: Array) -> Array:
        present = np.bincount(asked // GROUP, minlength=machine.count // GROUP)
        return np.asarray((present == GROUP)[asked // GROUP])

    return [], Wait(ready, lambda: "waits for the other warps of its warpgroup", again=True, meets=True)


def _slots(operand: parse.Operand | None) -> list[int]:
    items = operand.items if isinstance(operand, parse.Vector) else (operand,)
    return [item.slot for item in items if isinstance(item, parse.Register)]


@unit("wgmma")
def _wgmma(machine: Machine, instruction: parse.Instruction) -> Run:
    name = instruction.form.row.name
    state = products(machine)
    if name == "wgmma.fence":
        def fence(lanes: Lanes) -> Wait | None:
            state.fence(lanes)
            return None

        return fence
    if name == "wgmma.commit_group":
        def commit(lanes: Lanes) -> Wait | None:
            groups, wait = _groups(machine, lanes)
            for threads in groups:
                block = int(threads[0]) // GROUP
                state.committed[block] = state.committed.get(block, 0) + 1
            return wait

        return commit
    if name == "wgmma.wait_group":
        (operand,) = instruction.operands
        kept = operand.bits if isinstance(operand, parse.Immediate) else 0

        def wait_group(lanes: Lanes) -> Wait | None:
            groups, wait = _groups(machine, lanes)
            for threads in groups:
                state.finish(threads, kept)
            return wait

        return wait_group
    return _Multiply(machine, instruction)


class _Multiply:
    """A `wgmma.mma_async`: its operands, and how a group of warps carries it out.

    size: bytes of an element. signs: that A and B are multiplied by. used: slots of the sums, and of A where that is in
    registers. rows, columns: of the sums, by register, thread and place in the register.
    """

    def __init__(self, machine: Machine, instruction: parse.Instruction) -> None:
        self.machine, self.instruction, self.state = machine, instruction, products(machine)
        form = instruction.form
        sums, a_operand, b_operand, scale_d, *rest = instruction.operands
        numbers = [o.bits if isinstance(o, parse.Immediate) else 0 for o in rest if o is not None]
        self.m, self.n, self.k = _shape(form.get("shape"))
        type_d, self.type_a, self.type_b = form.mnemonic.split(".")[-3:]
        self.size = 4 if self.type_a == "tf32" else BITS.get(self.type_a, 8) // 8
        self.signs = [1 if number != -1 else -1 for number in numbers[:2]] if type_d != "s32" else []
        transposes = [bool(number) for number in (*numbers[2:], 0, 0)[:2]]
        in_registers = isinstance(a_operand, parse.Vector)
        self.trans_a, self.trans_b = (False, transposes[0]) if in_registers else transposes
        self.sum_slots = _slots(sums)
        if len(self.sum_slots) != form.operands[0].count:
            raise EmulationError(
                f"{form.mnemonic} has {form.operands[0].count} registers of sums, found {len(self.sum_slots)}",
                instruction.line)
        self.used = self.sum_slots + (_slots(a_operand) if in_registers else [])
        self.state.slots.update(self.used)
        self.read_a = self.read_descriptor_a = None
        if in_registers:
            from ..targets.ptx.rows import Operand

            self.read_a = member_reader(machine, Operand("r", "b32", 4), a_operand)
        else:
            self.read_descriptor_a = machine.reader(a_operand, "b64")
        self.read_descriptor_b = machine.reader(b_operand, "b64")
        self.read_scale = machine.reader(scale_d, "pred")
        self.rows, self.columns = fragments.fragment_wgmma(len(self.sum_slots), 2 if type_d == "f16" else 1)
        self.kind: Any = {"f32": np.float32, "s32": np.int32, "f16": np.float16}[type_d]
        self.access = Access(machine, instruction.text, instruction.line, self.size)
        types = self.type_a, self.type_b
        self.how = short_sum(machine.module.target, "wgmma", types) if machine.options.short_sums else None
        self.saturates = "satfinite" in form

    def __call__(self, lanes: Lanes) -> Wait | None:
        groups, wait = _groups(self.machine, lanes)
        for threads in groups:
            self._start(threads, None if len(threads) == self.machine.count else threads)
        return wait

    def _start(self, threads: Array, lanes: Lanes) -> None:
        """By one group of warps: at once, or where its wait says so."""
        machine, state, instruction = self.machine, self.state, self.instruction
        state.check_fenced(self.used, threads, instruction.line)
        keeps = self.read_scale(lanes)
        if keeps.any() != keeps.all():
            raise EmulationError(f"{instruction.text}: scale-d differs between threads", instruction.line)
        if keeps.any():
            for slot in self.sum_slots:
                if slot not in machine.in_flight:
                    machine.read(slot, lanes)
        tiles = [self._tile(threads, int(self.read_descriptor_b(lanes)[0]), self.n, self.trans_b)]
        registers = None if self.read_a is None else self.read_a(lanes)
        if self.read_descriptor_a is not None:
            tiles.append(self._tile(threads, int(self.read_descriptor_a(lanes)[0]), self.m, self.trans_a))
        places = begin_reads(self.access, threads, tiles, instruction.form.mnemonic)

        def carry_out() -> None:
            self._carry_out(threads, tiles, registers, bool(keeps.any()))

        if not machine.options.lazy:
            carry_out()
        group = state.committed.get(int(threads[0]) // GROUP, 0)
        state.pending.append(Product(instruction.text, instruction.line, threads, group, self.sum_slots, places,
                                     carry_out if machine.options.lazy else None))
        for slot in self.sum_slots:
            machine.begin_write(slot, threads, f"{instruction.form.mnemonic} of line {instruction.line}", WAIT)

    def _tile(self, threads: Array, bits: int, extent: int, transposed: bool) -> Tile:
        return tile_at(self.access, int(threads[0]), Descriptor.decode(bits), extent, self.k, transposed)

    def _carry_out(self, threads: Array, tiles: list[Tile], a_registers: Array | None, keeps: bool) -> None:
        """tiles: of B, and of A where that is in memory. keeps: whether the sums go on from what they are."""
        machine, rows, columns = self.machine, self.rows, self.columns
        if a_registers is not None:
            parts = elements(a_registers.reshape(4, 4, 32), self.type_a)
            matrix_a = fragments.gather(parts, *fragments.fragment_a(4, parts.shape[-1]), (16, self.k))
            matrix_a = matrix_a.reshape(self.m, self.k)
        else:
            matrix_a = tiles[1].matrix(machine, self.type_a)
        matrix_b = tiles[0].matrix(machine, self.type_b).T
        if self.signs and self.signs[0] * self.signs[1] < 0:
            matrix_a = -matrix_a
        old = np.zeros(rows.shape, self.kind)  # (registers, threads, places)
        if keeps:
            stacked = np.stack([machine.values[slot][threads] for slot in self.sum_slots])
            old = stacked.view(self.kind).reshape(rows.shape)
        if self.how is not None:
            before = np.empty((self.m, self.n), self.kind)
            before[rows, columns] = old
            total = add_products(self.how, (self.type_a, self.type_b), matrix_a, matrix_b, before)[rows, columns]
        else:
            total = accumulate((matrix_a @ matrix_b)[rows, columns], old, self.saturates)
        bits = np.ascontiguousarray(total).view(np.uint32).reshape(len(self.sum_slots), len(threads))
        for slot, value in zip(self.sum_slots, bits, strict=True):
            self.state.set(slot, threads, value)


def _shape(text: str) -> tuple[int, int, int]:
    m, rest = text.removeprefix("m").split("n")
    n, k = rest.split("k")
    return int(m), int(n), int(k)
