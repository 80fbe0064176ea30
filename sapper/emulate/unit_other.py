"""Instructions without an effect on values that the emulator can see (hints), and those that ask for places.

Source: PTX ISA, "prefetch", "griddepcontrol", "nanosleep", "createpolicy", "mapa", "getctarank", "setmaxnreg".
"""

from __future__ import annotations

import numpy as np

from ..targets.ptx import meaning
from ..targets.ptx.target import FILE_REGISTERS, REGISTER_GRANULE
from . import parse
from .errors import EmulationError
from .machine import WARP, Array, Lanes, Machine, Run, Wait
from .memory import RANK_SHIFT, SHARED_BASE
from .units import unit


@unit("hint")
def _hint(machine: Machine, instruction: parse.Instruction) -> Run:
    def run(lanes: Lanes) -> Wait | None:
        return None

    return run


@unit("policy")
def _policy(machine: Machine, instruction: parse.Instruction) -> Run:
    """A cache policy is opaque and changes nothing but speed."""
    write = machine.writer(instruction.operands[0], "b64")

    def run(lanes: Lanes) -> Wait | None:
        if write is not None:
            write(lanes, machine.constant(0x14F0000000000000, "b64", lanes))
        return None

    return run


@unit("carry")
def _carry(machine: Machine, instruction: parse.Instruction) -> Run:
    """Sums with the carry of the thread's condition code (PTX ISA, "Extended-Precision Integer Arithmetic"). A
    difference is the sum with the complement, whose carry says that nothing was borrowed: the ISA speaks of a borrow,
    but divisions that NVIDIA's compiler expands take up the one of `sub.cc` by `addc`."""
    form, opcode = instruction.form, instruction.form.row.opcode
    target, *operands = instruction.operands
    type = form.get("type")
    readers = [machine.reader(operand, type) for operand in operands]
    write = machine.writer(target, type)
    takes, gives, subtracts = opcode.endswith("c"), "cc" in form, opcode.startswith("sub")

    def run(lanes: Lanes) -> Wait | None:
        values = [read(lanes) for read in readers]
        if opcode.startswith("mad"):
            values = [meaning.mul(form, values[0], values[1]), values[2]]
        a, b = (np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}") for value in values)
        b = ~b if subtracts else b
        every = machine.lanes_of(lanes)
        flags = machine.state.setdefault("carry", np.zeros(machine.count, bool))
        given = flags[every] if takes else np.full(len(a), subtracts)
        part = a + b
        total = part + given.astype(a.dtype)
        out = (part < a) | (total < part)
        if gives:
            flags[every] = out
        if write is not None:
            write(lanes, total)
        return None

    return run


@unit("cluster")
def _cluster(machine: Machine, instruction: parse.Instruction) -> Run:
    form = instruction.form
    generic = "shared::cluster" not in form
    base = np.int64(SHARED_BASE if generic else 0)
    kind = form.get("type", "u64")
    read = machine.raw_reader(instruction.operands[1], kind)
    low = np.int64((1 << RANK_SHIFT) - 1)
    if form.row.opcode == "getctarank":
        write_rank = machine.writer(instruction.operands[0], "u32")

        def rank(lanes: Lanes) -> Wait | None:
            if write_rank is not None:
                write_rank(lanes, (read(lanes).astype(np.int64) >> RANK_SHIFT).astype(np.uint32))
            return None

        return rank
    read_rank = machine.reader(instruction.operands[2], "u32")
    write = machine.writer(instruction.operands[0], kind)

    def run(lanes: Lanes) -> Wait | None:
        ranks = read_rank(lanes).astype(np.int64)
        if (ranks >= machine.shape.cluster_blocks).any():
            raise EmulationError(f"{instruction.text}: found rank {int(ranks.max())}, expected one of a cluster of "
                                 f"{machine.shape.cluster_blocks} blocks", instruction.line)
        address = base + (((read(lanes).astype(np.int64) - base) & low) | (ranks << RANK_SHIFT))
        if write is not None:
            write(lanes, address.astype(np.uint64 if kind == "u64" else np.uint32))
        return None

    return run


class RegisterPool:
    """Registers of the threads of each warp, and what of its block's nobody has. At the start all are shared out: to a
    thread as many as the text says, or else the most that an SM has for a block."""

    def __init__(self, machine: Machine) -> None:
        threads = machine.shape.padded_threads
        most = FILE_REGISTERS // threads // REGISTER_GRANULE * REGISTER_GRANULE
        self.warps_of_block = threads // WARP
        self.held = np.full(machine.count // WARP, machine.function.most_registers or most, np.int64)
        self.free = np.zeros(len(self.held) // self.warps_of_block, np.int64)

    def may_take(self, warps: Array, wanted: int) -> Array:
        missing: Array = wanted - self.held[warps] <= self.free[warps // self.warps_of_block]
        return missing

    def take(self, warp: int, wanted: int) -> None:
        self.free[warp // self.warps_of_block] -= wanted - self.held[warp]
        self.held[warp] = wanted


@unit("setmaxnreg")
def _setmaxnreg(machine: Machine, instruction: parse.Instruction) -> Run:
    """What the warps of one group give back to their block's pool those of another take, when it is there."""
    (count,) = instruction.operands
    wanted = count.bits if isinstance(count, parse.Immediate) else 0
    if not 24 <= wanted <= 256 or wanted % 8:
        raise EmulationError(f"{instruction.text}: found {wanted}, expected a multiple of 8 from 24 to 256",
                             instruction.line)

    def run(lanes: Lanes) -> Wait | None:
        pool = machine.kept(RegisterPool)
        left = []
        for warp in np.unique(machine.warp_of[machine.lanes_of(lanes)]).tolist():
            if pool.may_take(np.array(warp), wanted):
                pool.take(warp, wanted)
            else:
                left.append(warp)
        machine.happened()
        if not left:
            return None
        return Wait(lambda some: pool.may_take(machine.warp_of[some], wanted), lambda: (
            f"waits for {wanted - pool.held[left[0]]} more registers of each thread of a warp (its block's pool has "
            f"{pool.free[left[0] // pool.warps_of_block]})"), again=True)

    return run
