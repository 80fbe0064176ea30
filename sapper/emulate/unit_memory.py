"""Loads, stores and addresses.

Enters: addresses of lanes in a state space. Leaves: values in registers or memory. Holds: every access is checked for
bounds, alignment, bytes that nobody wrote, and races, and counted with its bank conflicts or sectors.
Source: PTX ISA, sections "State Spaces", "ld", "st", "cvta", "isspacep"; CUDA C++ Programming Guide (32 banks of 4
bytes; sectors of 32 bytes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..targets.ptx.rows import BITS
from . import parse
from .counters import Journal
from .ends import ends
from .errors import EmulationError, MemoryFault
from .machine import WARP, Lanes, Machine, Run, Wait, stacked
from .memory import (
    GLOBAL_BASE,
    LOCAL_BASE,
    PARAMETER_BASE,
    RANK_SHIFT,
    SHARED_BASE,
    SHARED_START,
    WINDOW,
    Arena,
    Region,
)
from .races import REACH, Group, Shadow
from .units import unit

Array = NDArray[Any]

_SPACE_BASE = {"global": GLOBAL_BASE, "const": GLOBAL_BASE, "shared": SHARED_BASE, "local": LOCAL_BASE,
               "param": PARAMETER_BASE}


def space_of(modifier: str) -> str:
    """The state space of a modifier: shared::cta is shared, none is generic."""
    return modifier.partition("::")[0] or "generic"


def address_reader(machine: Machine, operand: parse.Operand | None) -> Callable[[Lanes], Array]:
    """Addresses (int64) of `[base + offset]`, one for each lane."""
    if not isinstance(operand, parse.Address):
        raise EmulationError(f"found {operand!r}, expected an address in brackets")
    base, offset = operand.base, operand.offset
    if isinstance(base, parse.Symbol):
        base, offset = parse.Symbol(base.name, base.offset + offset), 0
    read = machine.raw_reader(base, "u64")
    if offset == 0:
        return lambda lanes: read(lanes).astype(np.int64)
    return lambda lanes: read(lanes).astype(np.int64) + offset


@dataclass(slots=True)
class Access:
    """Memory traffic of one instruction. size: bytes of an element; count: elements of a lane. line: of the text.
    region: the allocation of global memory in which all that it reached last lies; None: there are several.
    asynchronous: by a copy. scope: of one that synchronises."""

    machine: Machine
    text: str
    line: int
    size: int
    count: int = 1
    region: Region | None = None
    asynchronous: bool = False
    scope: str = "gpu"

    def fault(self, lanes: Lanes, wrong: Array, address: Array, what: str) -> MemoryFault:
        lane = int(self.machine.lanes_of(lanes)[wrong][0])
        at = int(address[wrong][0])
        return MemoryFault(f"{self.text}: {self.machine.place_of(lane)}, address {at:#x}: {what}", self.line)

    def aligned(self, lanes: Lanes, address: Array) -> None:
        width = self.size * self.count
        wrong = address & (width - 1) if width & (width - 1) == 0 else address % self.size
        if np.count_nonzero(wrong):
            raise self.fault(lanes, wrong != 0, address, f"expected an address that is a multiple of {width}")

    def global_offsets(self, lanes: Lanes, address: Array) -> Array:
        offsets = address - GLOBAL_BASE
        if self.region is None or not self.region.holds(offsets):
            device, width = self.machine.memory.device, self.size * self.count
            outside = device.outside(offsets, width)
            if outside is not None:
                first = int(offsets[outside][0])
                raise self.fault(lanes, outside, address, f"{width} bytes out of bounds at {device.describe(first)}")
            region = device.region(int(offsets[0]), width) if len(offsets) else None
            self.region = region if region is not None and region.holds(offsets) else None
        return offsets

    def shared_offsets(self, lanes: Lanes, address: Array) -> Array:
        """Offsets in the arena that holds the shared memory of all resident blocks."""
        machine, memory = self.machine, self.machine.memory
        rank, inside = address >> RANK_SHIFT, address & ((1 << RANK_SHIFT) - 1)
        # Below 0 is far above all as an unsigned number.
        wrong = (inside - SHARED_START).view(np.uint64) > max(memory.shared_bytes - self.size * self.count, -1)
        wrong |= rank.view(np.uint64) >= machine.shape.cluster_blocks
        if np.count_nonzero(wrong):
            raise self.fault(lanes, wrong, address, f"{self.size * self.count} bytes outside of the "
                             f"{memory.shared_bytes} bytes of shared memory")
        block = machine.block_of if lanes is None else machine.block_of[machine.index_of(lanes)]
        size = machine.shape.cluster_blocks
        if size > 1:
            own, block = block, block // size * size + rank
            away = block != own
            if machine.options.races and not self.asynchronous and np.count_nonzero(away):
                ends(machine).reach(machine.lanes_of(lanes)[away], block[away], self.line)
        return np.asarray(block * memory.shared_stride + inside)

    def split(self, lanes: Lanes, address: Array) -> list[tuple[str, Array, Array, Array]]:
        """Generic addresses by space: (space, positions among the lanes, lanes, addresses in the space)."""
        every = self.machine.lanes_of(lanes)
        found = []
        for space, low, high in (("shared", SHARED_BASE, SHARED_BASE + WINDOW),
                                 ("local", LOCAL_BASE, LOCAL_BASE + WINDOW),
                                 ("param", PARAMETER_BASE, PARAMETER_BASE + WINDOW), ("global", 0, SHARED_BASE)):
            inside = (address >= low) & (address < high)
            if np.count_nonzero(inside):
                place = np.flatnonzero(inside)
                base = 0 if space == "global" else low
                found.append((space, place, every[place], address[place] - base))
        return found


def _lane_arrays(machine: Machine, lanes: Lanes) -> tuple[Array, Array]:
    every = machine.lanes_of(lanes)
    return machine.warp_of[every], every % WARP


def smallest_access(machine: Machine) -> tuple[int, int]:
    """(shared, global): the smallest bytes that any instruction of the function accesses there: the shadow's
    granule."""
    found = machine.state.get("granules")
    if found is None:
        sizes = {"shared": 4, "global": 4}
        for instruction in machine.function.body:
            form = instruction.form
            if form.row.unit in ("memory", "atomic"):
                bits = BITS.get(form.get("type"), 32)
                space = space_of(form.get("space"))
                for name in sizes if space == "generic" else (space,):
                    if name in sizes:
                        sizes[name] = min(sizes[name], bits // 8)
        found = machine.state["granules"] = (sizes["shared"], sizes["global"])
    return (int(found[0]), int(found[1]))


def shared_shadow(machine: Machine) -> Shadow:
    """What the race detector knows of the shared memory of all resident blocks."""
    found = machine.state.get("shared shadow")
    if found is None:
        stride = machine.memory.shared_stride

        def where(offset: int) -> str:
            block = machine.blocks[offset // stride]
            return f"{offset % stride - SHARED_START} (block {block})"

        rows = machine.shape.warps * machine.shape.cluster_blocks
        granule = smallest_access(machine)[0]
        found = Shadow(machine.memory.shared.size, granule, rows, machine.clocks, "shared memory", where)
        if machine.options.lines:
            memory = machine.memory
            found.journal = Journal(machine.counters, granule, memory.shared_stride, memory.shared_bytes)
        machine.state["shared shadow"] = found
    assert isinstance(found, Shadow)
    return found


def load_shared(access: Access, lanes: Lanes, address: Array, kind: str = "read") -> Array:
    """(count, lanes) elements. kind: "read", or "observe" for loads that synchronise."""
    machine = access.machine
    access.aligned(lanes, address)
    offsets = access.shared_offsets(lanes, address)
    read_check_shared(access, lanes, offsets, kind)
    count_banks(machine, lanes, offsets, access.size * access.count)
    return machine.memory.shared.load(offsets, access.size, access.count)


def read_check_shared(access: Access, lanes: Lanes, offsets: Array, kind: str = "read") -> None:
    machine = access.machine
    if machine.options.races and kind == "read":
        shadow = shared_shadow(machine)
        agents, lane = _lane_arrays(machine, lanes)
        shadow.check_read(shadow.granules(offsets, access.size * access.count), agents, lane, access.line)
    if machine.options.uninitialised:
        missing = machine.memory.shared.unwritten(offsets, access.size, access.count)
        if missing is not None:
            stride = machine.memory.shared_stride
            raise access.fault(lanes, missing, offsets % stride, "reads shared memory that nobody wrote")


def store_shared(access: Access, lanes: Lanes, address: Array, values: Array, kind: str = "write") -> None:
    machine = access.machine
    access.aligned(lanes, address)
    offsets = access.shared_offsets(lanes, address)
    if machine.options.races:
        shadow = shared_shadow(machine)
        agents, lane = _lane_arrays(machine, lanes)
        shadow.check_write(shadow.granules(offsets, access.size * access.count), agents, lane, access.line,
                           atomic=REACH[access.scope] if kind == "atomic" else -1)
    count_banks(machine, lanes, offsets, access.size * access.count)
    arena = machine.memory.shared
    arena.store(offsets, access.size, values)
    if kind == "write":
        check_same_store(access, arena, lanes, address, offsets, values)


def check_same_store(access: Access, arena: Arena, lanes: Lanes, address: Array, offsets: Array, values: Array) -> None:
    """Two lanes of one instruction that store different values to one place are a race."""
    if not access.machine.options.races:
        return
    kept = arena.load(offsets, access.size, len(values))
    wrong = (kept != values).any(axis=0)
    if np.count_nonzero(wrong):
        raise access.fault(lanes, wrong, address, "another lane stores a different value there with the same "
                                                  "instruction")


def global_check(access: Access, kind: str, lanes: Lanes, offsets: Array) -> None:
    machine = access.machine
    shadow = machine.memory.device.shadow
    if machine.options.races and shadow is not None:
        region = access.region.start if access.region is not None else None
        agents = machine.warp_of if lanes is None else machine.warp_of[machine.index_of(lanes)]
        shadow.check(kind, offsets, access.size * access.count, region, agents, machine.clocks, access.line,
                     machine.memory.device.describe, REACH[access.scope], not access.asynchronous)


def load_global(access: Access, lanes: Lanes, address: Array, kind: str = "read") -> Array:
    machine, device = access.machine, access.machine.memory.device
    access.aligned(lanes, address)
    offsets = access.global_offsets(lanes, address)
    global_check(access, kind, lanes, offsets)
    read_check_global(access, lanes, address, offsets)
    count_sectors(machine, lanes, offsets, access.size * access.count)
    return device.load(offsets, access.size, access.count)


def read_check_global(access: Access, lanes: Lanes, address: Array, offsets: Array) -> None:
    written = access.region is not None and access.region.written
    if access.machine.options.uninitialised and not written:
        missing = access.machine.memory.device.unwritten(offsets, access.size, access.count)
        if missing is not None:
            raise access.fault(lanes, missing, address, "reads global memory that nobody wrote: "
                               + access.machine.memory.device.describe(int(offsets[missing][0])))


def store_global(access: Access, lanes: Lanes, address: Array, values: Array, kind: str = "write") -> None:
    machine, device = access.machine, access.machine.memory.device
    access.aligned(lanes, address)
    offsets = access.global_offsets(lanes, address)
    global_check(access, kind, lanes, offsets)
    count_sectors(machine, lanes, offsets, access.size * access.count)
    device.store(offsets, access.size, values)
    if kind == "write":
        check_same_store(access, device, lanes, address, offsets, values)


def _local_offsets(access: Access, lanes: Lanes, address: Array) -> Array:
    """Local memory: a copy of the window for each thread."""
    memory = access.machine.memory
    wrong = (address < 0) | (address + access.size * access.count > memory.local_bytes)
    if np.count_nonzero(wrong):
        raise access.fault(lanes, wrong, address, f"outside of the {memory.local_bytes} bytes of local memory")
    return access.machine.lanes_of(lanes) * memory.local_stride + address


def load_from(access: Access, space: str, lanes: Lanes, address: Array, kind: str = "read") -> Array:
    """(count, lanes) elements from addresses of one space."""
    memory = access.machine.memory
    if space in ("global", "const"):
        return load_global(access, lanes, address, kind)
    if space == "shared":
        return load_shared(access, lanes, address, kind)
    access.aligned(lanes, address)
    if space == "local":
        offsets = _local_offsets(access, lanes, address)
        missing = memory.local.unwritten(offsets, access.size, access.count)
        if missing is not None and access.machine.options.uninitialised:
            raise access.fault(lanes, missing, address, "reads local memory that nobody wrote")
        return memory.local.load(offsets, access.size, access.count)
    if space == "param":
        wrong = (address < 0) | (address + access.size * access.count > memory.parameter_bytes)
        if np.count_nonzero(wrong):
            raise access.fault(lanes, wrong, address, "outside of the parameters")
        return memory.parameters.load(address, access.size, access.count)
    every = access.machine.lanes_of(lanes)
    result = np.zeros((access.count, len(every)), f"u{access.size}")
    for part, place, part_lanes, part_address in access.split(lanes, address):
        whole = len(place) == len(every)
        values = load_from(access, part, lanes if whole else part_lanes, part_address, kind)
        if whole:
            return values
        result[:, place] = values
    return result


def store_to(access: Access, space: str, lanes: Lanes, address: Array, values: Array, kind: str = "write") -> None:
    """values: (count, lanes). kind: "write", or "atomic" for stores that synchronise."""
    if space == "global":
        store_global(access, lanes, address, values, kind)
    elif space == "shared":
        store_shared(access, lanes, address, values, kind)
    elif space == "local":
        access.aligned(lanes, address)
        access.machine.memory.local.store(_local_offsets(access, lanes, address), access.size, values)
    elif space == "generic":
        every = access.machine.lanes_of(lanes)
        for part, place, part_lanes, part_address in access.split(lanes, address):
            whole = len(place) == len(every)
            store_to(access, part, lanes if whole else part_lanes, part_address, values if whole else values[:, place],
                     kind)
    else:
        raise EmulationError(f"{access.text} stores to .{space}, which is read only", access.line)


# --- Synchronisation through memory ---------------------------------------------------------------------------------


class Synchronisation:
    """What operations at an address made known, for others there (PTX ISA, "Release and Acquire Patterns")."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.known: dict[tuple[str, int], dict[Group, Array]] = {}

    def _agents(self, lanes: Lanes, address: Array) -> list[tuple[int, int]]:
        agents = self.machine.warp_of[self.machine.lanes_of(lanes)]
        return sorted({*zip(agents.tolist(), address.tolist(), strict=True)})

    def publish(self, lanes: Lanes, space: str, address: Array, releases: bool, scope: str) -> None:
        device, reach = self.machine.memory.device, REACH[scope]
        for agent, where in self._agents(lanes, address):
            self.machine.clocks.publish(self.known.setdefault((space, where), {}), agent, reach, releases)
            if space != "shared" and reach == REACH["gpu"]:
                device.released[where] = device.agents_used

    def observe(self, lanes: Lanes, space: str, address: Array, acquires: bool, scope: str) -> None:
        device, reach = self.machine.memory.device, REACH[scope]
        for agent, where in self._agents(lanes, address):
            self.machine.clocks.take(self.known.get((space, where), {}), agent, reach, acquires)
            if space != "shared" and reach == REACH["gpu"] and where in device.released and device.shadow is not None:
                device.shadow.trusted = max(device.shadow.trusted, device.released[where])


def synchronisation(machine: Machine) -> Synchronisation:
    return machine.kept(Synchronisation)


# --- Counters -------------------------------------------------------------------------------------------------------


def count_banks(machine: Machine, lanes: Lanes, offsets: Array, width: int) -> None:
    """Cycles of a shared access: lanes of a warp in groups that move 128 bytes, words of one bank one after another."""
    known = machine.state.setdefault("banks", {})
    threads = machine.lanes_of(lanes)
    key = (width, (offsets - offsets[0]).tobytes(), int(offsets[0]) % 128, _placing(lanes, threads))
    found = known.get(key)
    if found is None:
        words = max(width // 4, 1)
        touched = [np.unique((group // 4)[:, None] + np.arange(words))
                   for group in _groups(threads, offsets, WARP if width <= 4 else WARP * 4 // width)]
        warps = len(_groups(threads, offsets, WARP))
        cycles = sum(int(np.bincount(group % 32, minlength=32).max()) for group in touched)
        found = known[key] = (warps, cycles, len(touched) if width > 4 else warps)
    machine.counters.count_shared(machine.counted_line, *found)


def count_sectors(machine: Machine, lanes: Lanes, offsets: Array, width: int) -> None:
    known = machine.state.setdefault("sectors", {})
    threads = machine.lanes_of(lanes)
    key = (width, (offsets - offsets[0]).tobytes(), int(offsets[0]) % 32, _placing(lanes, threads))
    found = known.get(key)
    if found is None:
        groups = _groups(threads, offsets, WARP)
        sectors = sum(len(np.unique((group[:, None] + np.arange(width)) // 32)) for group in groups)
        ideal = sum(-(-len(np.unique(group)) * width // 32) for group in groups)
        found = known[key] = (len(groups), sectors, ideal)
    machine.counters.count_global(machine.counted_line, *found)


def _placing(lanes: Lanes, threads: Array) -> bytes:
    """Which lanes of which warps these are, but for the number of the first warp."""
    return b"" if lanes is None else (threads - threads[0] // WARP * WARP).tobytes()


def _groups(threads: Array, offsets: Array, size: int) -> list[Array]:
    """The offsets of each group of `size` neighbouring lanes."""
    return np.split(offsets, np.flatnonzero(np.diff(threads // size)) + 1)


# --- Instructions ---------------------------------------------------------------------------------------------------


@unit("memory")
def _memory(machine: Machine, instruction: parse.Instruction) -> Run:
    form = instruction.form
    space = space_of(form.get("space") or ("global" if "global" in form else ""))
    if space == "param":  # a variable that passes a parameter to a function lies in local memory
        where = next((operand.base for operand in instruction.operands if isinstance(operand, parse.Address)), None)
        if isinstance(where, parse.Symbol):
            space = machine.memory.symbols[where.name][0]
    type = form.get("type")
    size = BITS[type] // 8
    ordered, scope = form.get("order"), form.get("scope") or "gpu"
    synchronises = bool(ordered) or "volatile" in form
    if form.row.opcode == "ld":
        target, address, *_ = instruction.operands
        read_address = address_reader(machine, address)
        items = target.items if isinstance(target, parse.Vector) else (target,)
        writers = [machine.writer(item, type) for item in items]
        access = Access(machine, instruction.text, instruction.line, size, len(items), scope=scope)
        parameter = isinstance(address, parse.Address) and isinstance(address.base, parse.Symbol) and space == "param"

        def load(lanes: Lanes) -> Wait | None:
            where = read_address(lanes)
            values = load_from(access, space, lanes, where, "observe" if synchronises else "read")
            for write, value in zip(writers, values, strict=True):
                if write is not None:
                    write(lanes, _signed(value, type))
            if synchronises and not parameter:
                synchronisation(machine).observe(lanes, space, where, ordered == "acquire", scope)
            return None

        return load
    address, value, *_ = instruction.operands
    read_address = address_reader(machine, address)
    items = value.items if isinstance(value, parse.Vector) else (value,)
    readers = [machine.reader(item, type) for item in items]
    access = Access(machine, instruction.text, instruction.line, size, len(items), scope=scope)

    def store(lanes: Lanes) -> Wait | None:
        where = read_address(lanes)
        values = stacked([_bits(read(lanes), size) for read in readers])
        if synchronises:
            synchronisation(machine).publish(lanes, space, where, ordered == "release", scope)
        store_to(access, space, lanes, where, values, "atomic" if synchronises else "write")
        return None

    return store


def _signed(value: Array, type: str) -> Array:
    return value.view(f"i{value.dtype.itemsize}") if type.startswith("s") else value


def _bits(value: Array, size: int) -> Array:
    return value if value.dtype == np.dtype(f"u{size}") else np.ascontiguousarray(value).view(f"u{size}")


@unit("address")
def _address(machine: Machine, instruction: parse.Instruction) -> Run:
    form = instruction.form
    space = space_of(form.get("space"))
    base = 0 if space in ("global", "const") else _SPACE_BASE[space]
    read = machine.raw_reader(instruction.operands[1], "u64")
    if form.row.opcode == "isspacep":
        write = machine.writer(instruction.operands[0], "pred")

        def test(lanes: Lanes) -> Wait | None:
            value = read(lanes).astype(np.int64)
            low, high = (0, SHARED_BASE) if base == 0 else (base, base + WINDOW)
            assert write is not None
            write(lanes, (value >= low) & (value < high))
            return None

        return test
    size = form.get("size")
    write = machine.writer(instruction.operands[0], size)
    sign = -1 if "to" in form else 1

    def convert(lanes: Lanes) -> Wait | None:
        value = read(lanes).astype(np.int64) + sign * base
        assert write is not None
        write(lanes, value.astype(np.uint64) if size == "u64" else value.astype(np.uint32))
        return None

    return convert
