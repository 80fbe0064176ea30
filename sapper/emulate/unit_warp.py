"""Instructions of whole warps: shuffles, votes, mma, ldmatrix and stmatrix, bar.warp.sync.

Enters: lanes of one or more warps. Leaves: registers. Holds: an instruction with a member mask waits until all of its
members are there; reading a lane that takes no part is an error. Source: PTX ISA, "shfl.sync", "ldmatrix", "stmatrix",
"bar.warp.sync", "activemask".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..targets.ptx import fragments
from ..targets.ptx.rows import Operand
from ..targets.ptx.short_sums import short_sum
from ..targets.ptx.warp import ELEMENTS
from . import parse
from .errors import EmulationError
from .machine import WARP, Lanes, Machine, Run, Wait, as_type, stacked
from .unit_memory import Access, address_reader, load_from, load_shared, space_of, store_to
from .units import unit

Array = NDArray[Any]


class Warps:
    """The warps that lanes belong to. index: all of their threads, (warps, 32); active: which of these take part."""

    def __init__(self, machine: Machine, lanes: Lanes) -> None:
        self.of = lanes
        if lanes is None or len(lanes) == machine.count:
            self.whole, self.count = True, machine.count // WARP
            self.lanes: Lanes = None
            self.index = machine.every.reshape(-1, WARP)
            self.active: Array = machine.state.setdefault("all active", np.ones((self.count, WARP), bool))
            return
        warps = np.unique(machine.warp_of[lanes])
        self.count = len(warps)
        self.index = warps[:, None] * WARP + np.arange(WARP)
        self.whole = len(lanes) == self.index.size
        self.lanes = lanes
        if self.whole:
            self.active = np.ones(self.index.shape, bool)
        else:
            self.active = np.zeros(machine.count, bool)
            self.active[lanes] = True
            self.active = self.active[self.index]

    def spread(self, values: Array) -> Array:
        """(warps, 32) from one value for each lane; 0 for those that take no part."""
        if self.whole:
            return values.reshape(self.count, WARP)
        result = np.zeros(self.index.shape, values.dtype)
        result[self.active] = values
        return result

    def spread_each(self, values: Array) -> Array:
        """(registers, warps, 32) from (registers, lanes)."""
        if self.whole:
            return values.reshape(len(values), self.count, WARP)
        result = np.zeros((len(values), *self.index.shape), values.dtype)
        result[:, self.active] = values
        return result

    def gather(self, values: Array) -> Array:
        """One value for each lane."""
        return values.reshape(-1) if self.whole else values[self.active]


def warps_of(machine: Machine, lanes: Lanes) -> Warps:
    """The warps of the lanes: a strand runs many instructions with the same ones."""
    found = machine.state.get("warps")
    if found is None or found.of is not lanes:
        found = machine.state["warps"] = Warps(machine, lanes)
    assert isinstance(found, Warps)
    return found


def member_reader(machine: Machine, operand: Operand, found: parse.Operand | None) -> Callable[[Lanes], Array]:
    """Values of an operand; a vector as (registers, lanes)."""
    if operand.count:
        items = found.items if isinstance(found, parse.Vector) else (found,)
        readers = [machine.raw_reader(item, operand.type) for item in items]
        return lambda lanes: stacked([as_type(read(lanes), operand.type) for read in readers])
    return machine.reader(found, operand.type)


@unit("warp")
def _warp(machine: Machine, instruction: parse.Instruction) -> Run:
    form, meaning = instruction.form, instruction.form.row.meaning
    assert meaning is not None
    if form.row.opcode == "mma" and machine.options.short_sums:
        types = form.mnemonic.split(".")
        how = short_sum(machine.module.target, "mma", (types[-3], types[-2]))
        meaning = meaning if how is None else partial(meaning, how=how)
    pairs = list(zip(form.operands, instruction.operands, strict=True))
    sources = [(member_reader(machine, operand, found), operand.count) for operand, found in pairs if operand.reads]
    results = [(operand, found) for operand, found in pairs if operand.writes]
    writers: list[list[Callable[[Lanes, Array], None] | None]] = []
    for operand, found in results:
        items = found.items if isinstance(found, parse.Vector) else (found,)
        writers.append([machine.writer(item, operand.type) for item in items])
    mask_reader = None
    if "sync" in form and "aligned" not in form:  # the member mask is the last operand
        mask_reader = machine.reader(pairs[-1][1], "u32")
    checked = form.row.opcode == "shfl"
    by_members = mask_reader is not None and not checked

    def run(lanes: Lanes) -> Wait | None:
        warps = warps_of(machine, lanes)
        if mask_reader is not None:
            late = _members_missing(machine, instruction, warps, mask_reader(lanes))
            if late is not None:
                return late
        values = []
        for read, count in sources:
            value = read(lanes)
            values.append(warps.spread_each(value) if count else warps.spread(value))
        result = _of_groups(meaning, form, warps, values) if by_members else meaning(form, warps.active, *values)
        if checked and not warps.whole:
            _check_shuffle(machine, instruction, warps, values)
        several = result if isinstance(result, tuple) else (result,)
        for parts, value, (operand, _) in zip(writers, several, results, strict=False):
            for number, write in enumerate(parts):
                if write is not None:
                    write(lanes, warps.gather(value[number] if operand.count else value))
        return None

    return run


def _of_groups(meaning: Any, form: Any, warps: Warps, values: list[Array]) -> Any:
    """The members of a mask vote, match, reduce and elect among themselves: parts of a warp that are here together may
    have different masks. values: the masks last."""
    masks = values[-1]
    first, *others = np.unique(masks[warps.active])
    result = meaning(form, warps.active & (masks == first), *values)
    for mask in others:
        members = warps.active & (masks == mask)
        made = meaning(form, members, *values)
        result = tuple(np.where(members, new, old) for new, old in zip(made, result, strict=True)) if isinstance(
            result, tuple) else np.where(members, made, result)
    return result


def _members_missing(machine: Machine, instruction: parse.Instruction, warps: Warps, mask: Array) -> Wait | None:
    """None where all members of each lane's mask are here; else a wait until they are. A lane that its own mask does
    not name is an error: what it does is undefined."""
    masks = warps.spread(mask)
    stranger = warps.active & (masks >> np.arange(WARP, dtype=np.uint32) & 1 == 0)
    if np.count_nonzero(stranger):
        lane, named = int(warps.index[stranger][0]), int(masks[stranger][0])
        raise EmulationError(f"{instruction.text}: found {machine.place_of(lane)} with the member mask {named:#x}; "
                             "expected one that names it", instruction.line)
    if warps.whole:
        return None
    living = ~machine.exited[warps.index]
    wanted = ((masks[:, :, None] >> np.arange(WARP, dtype=np.uint32)) & 1).astype(bool)
    missing = (wanted & living[:, None, :] & ~warps.active[:, None, :]).any(axis=2) & warps.active
    if not np.count_nonzero(missing):
        return None
    waiting = set(warps.index[missing].tolist())

    def ready(lanes: Array) -> Array:
        """Threads that left no longer count; those that arrive merge with this strand before."""
        present = np.zeros(machine.count, bool)
        present[lanes] = True
        now = wanted & ~machine.exited[warps.index][:, None, :] & ~present[warps.index][:, None, :]
        free = ~now.any(axis=2)
        allowed = np.ones(machine.count, bool)
        allowed[warps.index] = free
        return allowed[lanes]

    return Wait(ready, lambda: f"waits for the other members of its mask ({len(waiting)} lanes wait)", again=True,
                meets=True)


def _check_shuffle(machine: Machine, instruction: parse.Instruction, warps: Warps, values: list[Array]) -> None:
    """Reading a lane that takes no part has no defined value."""
    meaning = instruction.form.row.meaning
    assert meaning is not None
    taken, _ = meaning(instruction.form, warps.active, warps.active.astype(np.uint32), *values[1:])
    wrong = (taken == 0) & warps.active
    if np.count_nonzero(wrong):
        lane = int(warps.index[wrong][0])
        raise EmulationError(f"{instruction.text}: {machine.place_of(lane)} reads a lane that takes no part",
                             instruction.line)


@unit("activemask")
def _activemask(machine: Machine, instruction: parse.Instruction) -> Run:
    write = machine.writer(instruction.operands[0], "b32")

    def run(lanes: Lanes) -> Wait | None:
        warps = warps_of(machine, lanes)
        word = (warps.active * (np.uint32(1) << np.arange(WARP, dtype=np.uint32))).sum(axis=1, dtype=np.uint32)
        if write is not None:
            write(lanes, warps.gather(np.broadcast_to(word[:, None], warps.index.shape)))
        return None

    return run


@unit("warp_barrier")
def _warp_barrier(machine: Machine, instruction: parse.Instruction) -> Run:
    read = machine.reader(instruction.operands[0], "u32")

    def run(lanes: Lanes) -> Wait | None:
        warps = warps_of(machine, lanes)
        late = _members_missing(machine, instruction, warps, read(lanes))
        if late is None:
            machine.clocks.synchronised[warps.index[:, 0] // WARP] = machine.clocks.now + 1
            machine.clocks.tick()
        return late

    return run


# --- Matrices of shared memory --------------------------------------------------------------------------------------


@unit("matrix_memory")
def _matrix_memory(machine: Machine, instruction: parse.Instruction) -> Run:
    """ldmatrix, stmatrix: lanes 8 i ... 8 i + 7 give the addresses of the rows of matrix i, 16 bytes each."""
    form = instruction.form
    count = int(form.get("num")[1:])
    transposed, loads = "trans" in form, form.row.opcode == "ldmatrix"
    registers, address = instruction.operands if loads else instruction.operands[::-1]
    read_address = address_reader(machine, address)
    items = registers.items if isinstance(registers, parse.Vector) else (registers,)
    if len(items) != count:
        raise EmulationError(f"{form.mnemonic} has {count} registers, found {len(items)}", instruction.line)
    space = space_of(form.get("space"))
    access = Access(machine, instruction.text, instruction.line, 8, 2)
    rows, columns = fragments.fragment_b(1, 2)  # the 8 x 8 fragment with rows and columns exchanged
    if not transposed:
        rows, columns = columns, rows

    def row_lanes(warps: Warps) -> NDArray[np.int64]:
        return warps.index[:, :8 * count].reshape(-1)

    if loads:
        writers = [machine.writer(item, "b32") for item in items]

        def load(lanes: Lanes) -> Wait | None:
            warps = warps_of(machine, lanes)
            where = warps.spread(read_address(lanes))[:, :8 * count].reshape(-1)
            givers = row_lanes(warps)
            read = load_shared if space == "shared" else _load_generic
            words = read(access, None if len(givers) == machine.count else givers, where)
            data = np.ascontiguousarray(words.T).view(np.uint16).reshape(warps.count, count, 8, 8)
            parts = data[:, :, rows[0], columns[0]]  # (warps, matrices, lanes, slots)
            whole = np.ascontiguousarray(parts).view(np.uint32)[..., 0]
            for number, write in enumerate(writers):
                if write is not None:
                    write(lanes, warps.gather(np.ascontiguousarray(whole[:, number])))
            return None

        return load
    readers = [machine.reader(item, "b32") for item in items]

    def store(lanes: Lanes) -> Wait | None:
        warps = warps_of(machine, lanes)
        where = warps.spread(read_address(lanes))[:, :8 * count].reshape(-1)
        data = np.empty((warps.count, count, 8, 8), np.uint16)
        for number, read in enumerate(readers):
            words = np.ascontiguousarray(warps.spread(read(lanes)))
            data[:, number, rows[0], columns[0]] = words.view(np.uint16).reshape(warps.count, WARP, 2)
        values = np.ascontiguousarray(data.reshape(-1, 8).view(np.uint64).T)
        givers = row_lanes(warps)
        store_to(access, space, None if len(givers) == machine.count else givers, where, values)
        return None

    return store


def _load_generic(access: Access, lanes: Lanes, address: Array) -> Array:
    return load_from(access, "generic", lanes, address)


@unit("wmma")
def _wmma(machine: Machine, instruction: parse.Instruction) -> Run:
    """wmma.load, wmma.store: a matrix whose rows or columns are as many elements apart as the last operand says."""
    form = instruction.form
    _, action, side, _, _, layout, *_, type = form.mnemonic.split(".")
    m, n, k = fragments.shape_of(form.mnemonic)
    rows, columns = {"a": (m, k), "b": (k, n), "c": (m, n), "d": (m, n)}[side]
    operands = list(instruction.operands)
    registers, address = operands[:2] if action == "load" else operands[1::-1]
    items = registers.items if isinstance(registers, parse.Vector) else (registers,)
    kind = np.dtype(ELEMENTS.get(type, np.float32))
    size = kind.itemsize
    access = Access(machine, instruction.text, instruction.line, size)
    read_address, space = address_reader(machine, address), space_of(form.get("space"))
    between = machine.reader(operands[2], "u32") if operands[2] is not None else None
    row, column = np.divmod(np.arange(rows * columns), columns)
    major, minor = (row, column) if layout == "row" else (column, row)
    major, minor = (part.reshape(WARP, -1) for part in (major, minor))      # of each lane's elements

    def places(lanes: Lanes) -> Array:
        """(elements of a lane, lanes)"""
        steps = between(lanes).astype(np.int64) if between is not None else np.int64(minor.max() + 1)
        lane = machine.lanes_of(lanes) % WARP
        return np.asarray(read_address(lanes) + (major[lane].T * steps + minor[lane].T) * size)

    if action == "load":
        writers = [machine.writer(item, "b32") for item in items]

        def load(lanes: Lanes) -> Wait | None:
            found = np.stack([load_from(access, space, lanes, where)[0] for where in places(lanes)], axis=1)
            words = np.ascontiguousarray(found).view(np.uint32)
            for number, write in enumerate(writers):
                if write is not None:
                    write(lanes, np.ascontiguousarray(words[:, number % words.shape[1]]))
            return None

        return load
    readers = [machine.reader(item, "b32") for item in items]

    def store(lanes: Lanes) -> Wait | None:
        words = np.stack([read(lanes) for read in readers], axis=1)
        values = np.ascontiguousarray(words).view(f"u{size}")
        for number, where in enumerate(places(lanes)):
            store_to(access, space, lanes, where, np.ascontiguousarray(values[:, number])[None])
        return None

    return store
