"""Asynchronous copies: cp.async with its groups, bulk and tensor copies with mbarriers and bulk groups, st.async.

Enters: addresses of lanes. Leaves: bytes moved, now (eager) or when something waits for them (lazy). Holds: in both
modes the bytes that a copy reads or writes in shared memory are marked in flight until its wait, so that touching them
earlier is an error. In lazy mode a source is read and a destination written only then.
Source: PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy", "cp.async.bulk",
"cp.async.bulk.tensor", "st.async".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..targets.ptx.rows import BITS
from . import parse, tensor_map
from .errors import EmulationError, RaceError
from .machine import WARP, Lanes, Machine, Run, Wait, as_type
from .memory import GLOBAL_BASE, RANK_SHIFT, WRITTEN
from .unit_atomic import combine
from .unit_mbarrier import MbarrierObject, arrive, complete_bytes, find, object_reader, publish
from .unit_memory import (
    Access,
    address_reader,
    count_banks,
    count_sectors,
    global_check,
    load_from,
    read_check_global,
    shared_shadow,
    space_of,
)
from .units import unit

Array = NDArray[Any]


# --- cp.async -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Copy:
    """One cp.async of some threads that has not been waited for. groups: of each thread. move: copies the bytes of the
    chosen threads; None once that is done."""

    lanes: Array
    groups: Array
    places: Array
    line: int
    move: Callable[[Array], None] | None

    def part(self, chosen: Array) -> Copy:
        move = self.move
        rest = np.flatnonzero(chosen)
        return Copy(self.lanes[chosen], self.groups[chosen], self.places[chosen], self.line,
                    None if move is None else lambda which: move(rest[which]))


class Copies:
    """The cp.async operations in flight, and the number of groups that each thread committed."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.committed = np.zeros(machine.count, np.int64)
        self.pending: list[Copy] = []

    def finish(self, lanes: Lanes, limit: Array) -> None:
        """End the copies of threads `lanes` whose group is below their limit."""
        machine, rest = self.machine, []
        limits = np.full(machine.count, -1, np.int64)
        limits[machine.lanes_of(lanes)] = limit
        for copy in self.pending:
            done = copy.groups < limits[copy.lanes]
            if not done.any():
                rest.append(copy)
                continue
            if not done.all():
                rest.append(copy.part(~done))
            if copy.move is not None:
                copy.move(np.flatnonzero(done))
            if machine.options.races:
                shadow = shared_shadow(machine)
                places = copy.places[done]
                shadow.unmark("writing", places)
                shadow.landed(places, machine.warp_of[copy.lanes[done]][:, None], copy.line, generic=True)
                shadow.lane[places] = (copy.lanes[done] % WARP)[:, None]
        self.pending = rest


def copies(machine: Machine) -> Copies:
    return machine.kept(Copies)


@unit("cp_async")
def _cp_async(machine: Machine, instruction: parse.Instruction) -> Run:
    form = instruction.form
    name = form.row.name.removeprefix("cp.async.")
    if name in ("ca", "cg"):
        return _start_copy(machine, instruction)
    if name == "commit_group":
        def commit(lanes: Lanes) -> Wait | None:
            copies(machine).committed[machine.lanes_of(lanes)] += 1
            return None

        return commit
    if name == "mbarrier.arrive":
        return _arrive_after(machine, instruction)
    kept = 0
    if name == "wait_group":
        (operand,) = instruction.operands
        kept = operand.bits if isinstance(operand, parse.Immediate) else 0

    def wait(lanes: Lanes) -> Wait | None:
        every, state = machine.lanes_of(lanes), copies(machine)
        limit = state.committed[every] - kept if name == "wait_group" else np.full(len(every), np.iinfo(np.int64).max)
        state.finish(lanes, limit)
        return None

    return wait


def _start_copy(machine: Machine, instruction: parse.Instruction) -> Run:
    form = instruction.form
    target, source, size_operand, *more = instruction.operands
    given = [operand for operand in more if operand is not None]
    if "L2::cache_hint" in form:
        given.pop()
    width = size_operand.bits if isinstance(size_operand, parse.Immediate) else 0
    if width not in (4, 8, 16) or ("cg" in form and width != 16):
        raise EmulationError(f"{form.mnemonic} copies {width} bytes, expected {'16' if 'cg' in form else '4, 8 or 16'}",
                             instruction.line)
    ignored = read_size = None
    if given:
        if isinstance(given[0], parse.Register) and given[0].type == "pred":
            ignored = machine.reader(given[0], "pred")
        else:
            read_size = machine.reader(given[0], "u32")
    read_target, read_source = address_reader(machine, target), address_reader(machine, source)
    element = min(width, 8)
    access = Access(machine, instruction.text, instruction.line, element, width // element)

    def run(lanes: Lanes) -> Wait | None:
        every, state = machine.lanes_of(lanes), copies(machine)
        to, origin = read_target(lanes), read_source(lanes)
        access.aligned(lanes, to)
        access.aligned(lanes, origin)
        offsets = access.shared_offsets(lanes, to)
        sizes = read_size(lanes).astype(np.int64) if read_size is not None else np.full(len(every), width)
        if ignored is not None:
            sizes = np.where(ignored(lanes), 0, sizes)
        if (sizes > width).any():
            raise access.fault(lanes, sizes > width, origin, f"found a source size above {width}")
        reading = sizes > 0
        shadow = shared_shadow(machine) if machine.options.races else None
        places = np.zeros((len(every), 0), np.int64)
        if shadow is not None:
            places = shadow.granules(offsets, width)
            shadow.check_write(places, machine.warp_of[every], every % WARP, instruction.line)
            shadow.mark("writing", places, instruction.line)
        count_banks(machine, lanes, offsets, width)
        machine.memory.shared.written_views[element][
            (offsets // element)[:, None] + np.arange(access.count)] = WRITTEN[element]

        def move(which: Array) -> None:
            chosen = which[reading[which]]
            data = np.zeros((access.count, len(which)), f"u{element}")
            if len(chosen):
                part = every[chosen]
                full = sizes[chosen] == width
                if not full.all():
                    raise access.fault(part, ~full, origin[chosen], "expected all of its bytes, or none")
                found = _load_source(access, lanes if len(chosen) == len(every) else part, origin[chosen])
                data[:, reading[which]] = found
            machine.memory.shared.views[element][
                (offsets[which] // element)[None] + np.arange(access.count)[:, None]] = data

        later: Callable[[Array], None] | None = move
        if not machine.options.lazy:
            move(np.arange(len(every)))
            later = None
        state.pending.append(Copy(every, state.committed[every].copy(), places, instruction.line, later))
        return None

    return run


def _load_source(access: Access, lanes: Lanes, address: Array) -> Array:
    machine = access.machine
    offsets = access.global_offsets(lanes, address)
    global_check(access, "read", lanes, offsets)
    read_check_global(access, lanes, address, offsets)
    count_sectors(machine, lanes, offsets, access.size * access.count)
    return machine.memory.device.load(offsets, access.size, access.count)


def _arrive_after(machine: Machine, instruction: parse.Instruction) -> Run:
    """cp.async.mbarrier.arrive: an arrival when all earlier cp.async of the thread are done."""
    offsets_of = object_reader(machine, instruction, instruction.operands[0], space_of(instruction.form.get("space")))
    counted = "noinc" in instruction.form

    def run(lanes: Lanes) -> Wait | None:
        every, state = machine.lanes_of(lanes), copies(machine)
        for lane, offset in zip(every.tolist(), offsets_of(lanes).tolist(), strict=True):
            one = find(machine, offset, instruction.line)
            if not counted:
                one.pending += 1
            limit = np.array([state.committed[lane] + 1])

            def land(lane: int = lane, one: MbarrierObject = one, limit: Array = limit) -> None:
                state.finish(np.array([lane]), limit)
                publish(machine, one, int(machine.warp_of[lane]))
                arrive(machine, one, 1, instruction.line)

            if machine.options.lazy:
                one.landing.append(land)
                machine.happened()
            else:
                land()
        return None

    return run


# --- Bulk and tensor copies -----------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class BulkStore:
    """A copy from shared to global memory. read: takes the bytes; write: puts them; None once done."""

    lane: int
    group: int
    line: int
    places: Array
    read: Callable[[], Array] | None
    write: Callable[[Array], None] | None
    data: Array | None = None


class BulkGroups:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.committed = np.zeros(machine.count, np.int64)
        self.pending: list[BulkStore] = []
        machine.at_exit.append(self.leave)

    def take(self, store: BulkStore) -> None:
        if store.read is not None:
            store.data, store.read = store.read(), None

    def finish(self, lane: int, limit: int, only_read: bool) -> None:
        rest = []
        for store in self.pending:
            if store.lane != lane or store.group >= limit:
                rest.append(store)
                continue
            self.take(store)
            if self.machine.options.races and len(store.places):
                shadow = shared_shadow(self.machine)
                shadow.unmark("reading", store.places)
                self._stamp(store)
                store.places = store.places[:0]
            if only_read:
                rest.append(store)
            else:
                self.put(store)
        self.pending = rest
        for store in rest:
            if len(store.places):
                shared_shadow(self.machine).mark("reading", store.places, store.line)

    def _stamp(self, store: BulkStore) -> None:
        """The thread that waited knows that the bytes were read."""
        shared_shadow(self.machine).note_read(int(self.machine.warp_of[store.lane]), store.places)

    def put(self, store: BulkStore) -> None:
        if store.write is not None:
            assert store.data is not None
            store.write(store.data)
            store.write = None

    def leave(self, gone: Array) -> None:
        """At the exit of a thread its stores must have read their source: the memory may be given to another block."""
        leaving = set(gone.tolist())
        for store in self.pending:
            if store.lane in leaving and len(store.places):
                raise RaceError(f"{self.machine.place_of(store.lane)} exits while the bulk copy of line {store.line} "
                                f"may "
                                "still read shared memory; expected cp.async.bulk.wait_group.read before",
                                self.machine.line)
        for store in self.pending:
            if store.lane in leaving:
                self.take(store)
                self.put(store)
        self.pending = [store for store in self.pending if store.lane not in leaving]


def bulk_groups(machine: Machine) -> BulkGroups:
    return machine.kept(BulkGroups)


@unit("bulk_group")
def _bulk_group(machine: Machine, instruction: parse.Instruction) -> Run:
    groups = bulk_groups(machine)
    waits = "wait_group" in instruction.form
    kept = 0
    if waits:
        (operand,) = instruction.operands
        kept = operand.bits if isinstance(operand, parse.Immediate) else 0
    only_read = "read" in instruction.form

    def run(lanes: Lanes) -> Wait | None:
        every = machine.lanes_of(lanes)
        if not waits:
            groups.committed[every] += 1
            return None
        for lane in {store.lane for store in groups.pending} & set(every.tolist()):
            groups.finish(lane, int(groups.committed[lane]) - kept, only_read)
        return None

    return run


@dataclass(slots=True)
class Engine:
    """Moves bytes for one instruction, lane by lane, in units of `size` bytes. Places in shared memory are offsets in
    its arena."""

    machine: Machine
    instruction: parse.Instruction

    def access(self, size: int) -> Access:
        return Access(self.machine, self.instruction.text, self.instruction.line, size, asynchronous=True)

    def shared_places(self, lane: int, address: int, offsets: Array, size: int) -> Array:
        """Offsets in the arena of address + offsets, swizzle included; all in bounds."""
        lanes = np.full(len(offsets), lane)
        return self.access(size).shared_offsets(lanes, address + offsets)

    def read_shared(self, lane: int, offsets: Array, size: int) -> Callable[[], Array]:
        """Begins an asynchronous read of shared memory; the result takes the bytes."""
        machine, line = self.machine, self.instruction.line
        memory = machine.memory
        missing = memory.shared.unwritten(offsets, size, 1)
        if missing is not None and machine.options.uninitialised:
            first = int(offsets[missing][0]) % memory.shared_stride
            raise self.access(size).fault(np.array([lane]), np.array([True]), np.array([first]),
                                          "reads shared memory that nobody wrote")
        if machine.options.races:
            shadow = shared_shadow(machine)
            places = shadow.places(offsets, size)
            agent = np.array([machine.warp_of[lane]])
            shadow.check_reads_of_all(places, agent, line)
            shadow.check_proxy(places, agent, line, self.instruction.form.mnemonic)
            shadow.mark("reading", places, line)
        return lambda: memory.shared.views[size][offsets // size]

    def places_of(self, offsets: Array, size: int) -> Array:
        if not self.machine.options.races:
            return np.zeros(0, np.int64)
        return shared_shadow(self.machine).places(offsets, size)

    def write_shared(self, lane: int, offsets: Array, size: int, data: Callable[[], Array], one: MbarrierObject,
                     stores: bool = False) -> None:
        """Begins an asynchronous write of shared memory that reports to an mbarrier. stores: from registers."""
        machine, line = self.machine, self.instruction.line
        shared = machine.memory.shared
        places = self.places_of(offsets, size)
        block = int(machine.block_of[lane])
        if machine.options.races:
            shadow = shared_shadow(machine)
            agent = np.array([machine.warp_of[lane]])
            shadow.check_write(places[None], agent, np.array([-1]), line, generic=False)
            shadow.mark("writing", places, line)

        def land() -> None:
            shared.views[size][offsets // size] = data()
            shared.written_views[size][offsets // size] = WRITTEN[size]
            known = None
            if machine.options.races:
                shadow = shared_shadow(machine)
                engine = machine.clocks.engine(block)
                shadow.unmark("writing", places)
                shadow.landed(places, engine, line)
                known = machine.clocks.joint(np.array([engine]))
            complete_bytes(machine, one, len(offsets) * size, known, int(machine.warp_of[lane]) if stores else None)

        if machine.options.lazy:
            one.landing.append(land)
            machine.happened()
        else:
            land()

    def global_data(self, lane: int, offsets: Array, inside: Array, size: int) -> Callable[[], Array]:
        """Bytes of global memory at arena offsets; zeros where they are not inside the tensor."""
        device = self.machine.memory.device
        access = self.access(size)
        lanes, wanted = np.full(int(inside.sum()), lane), offsets[inside]
        access.global_offsets(lanes, wanted + GLOBAL_BASE)
        if len(wanted):
            global_check(access, "read", lanes, wanted)
            read_check_global(access, lanes, wanted + GLOBAL_BASE, wanted)
        self.count_sectors(wanted, size)

        def data() -> Array:
            result = np.zeros(len(offsets), f"u{size}")
            result[inside] = device.views[size][wanted // size]
            return result

        return data

    def count_sectors(self, offsets: Array, size: int) -> None:
        """Of one copy between global and shared memory. offsets: of its elements in global memory."""
        self.machine.counters.count_global(self.machine.counted_line, 1, len(np.unique(offsets // 32)),
                                           -(-len(offsets) * size // 32))

    def store_global(self, lane: int, shared: Array, offsets: Array, inside: Array, size: int,
                     operation: tuple[str, str] | None) -> None:
        """Begins a bulk store of shared to global memory. operation: (op, type) of a reduction."""
        machine, device = self.machine, self.machine.memory.device
        groups = bulk_groups(machine)
        access = self.access(size)
        lanes, wanted = np.full(int(inside.sum()), lane), offsets[inside]
        access.global_offsets(lanes, wanted + GLOBAL_BASE)
        read = self.read_shared(lane, shared, size)

        def write(data: Array) -> None:
            kept = data[inside]
            if not len(wanted):
                return
            global_check(access, "write" if operation is None else "atomic", lanes, wanted)
            if operation is not None:
                op, type = operation
                old = device.load(wanted, size, 1)[0]
                kept = combine(op, type, as_type(old, type), as_type(kept, type)).view(f"u{size}")
            device.store(wanted, size, kept[None])

        self.count_sectors(wanted, size)
        store = BulkStore(lane, int(groups.committed[lane]), self.instruction.line, self.places_of(shared, size), read,
                          write)
        if not machine.options.lazy:
            groups.take(store)
            groups.put(store)
        groups.pending.append(store)


@unit("bulk")
def _bulk(machine: Machine, instruction: parse.Instruction) -> Run:
    """cp.async.bulk of contiguous bytes."""
    form = instruction.form
    engine = Engine(machine, instruction)
    target, source, size_operand, *rest = instruction.operands
    read_target, read_source = address_reader(machine, target), address_reader(machine, source)
    read_size = machine.reader(size_operand, "u32")
    stores = "bulk_group" in form
    to_cluster = form.row.name == "cp.async.bulk.cluster"
    operation = None
    if form.row.opcode == "cp" and "reduce" in form:
        operation = ("add" if "noftz" in form else form.get("op"), form.get("type"))
    objects_at = None if stores else object_reader(machine, instruction, rest[0], "shared")
    mask = machine.reader(rest[1], "u16") if "multicast::cluster" in form else None

    def run(lanes: Lanes) -> Wait | None:
        every = machine.lanes_of(lanes)
        to, origin, sizes = read_target(lanes), read_source(lanes), read_size(lanes)
        masks = mask(lanes) if mask is not None else None
        reports = objects_at(lanes) if objects_at is not None else None
        for number, lane in enumerate(every.tolist()):
            size = int(sizes[number])
            if size % 16 or int(to[number]) % 16 or int(origin[number]) % 16:
                raise EmulationError(f"{instruction.text}: found {size} bytes from {int(origin[number]):#x} to "
                                     f"{int(to[number]):#x}, expected multiples of 16", instruction.line)
            step = 8 if operation is None else BITS[operation[1]] // 8
            offsets = np.arange(size // step) * step
            every_byte = np.ones(len(offsets), bool)
            if stores:
                shared = engine.shared_places(lane, int(origin[number]), offsets, step)
                engine.store_global(lane, shared, int(to[number]) - GLOBAL_BASE + offsets, every_byte, step, operation)
                continue
            assert reports is not None
            if to_cluster:
                data = engine.read_shared(lane, engine.shared_places(lane, int(origin[number]), offsets, step), step)
            else:
                data = engine.global_data(lane, int(origin[number]) - GLOBAL_BASE + offsets, every_byte, step)
            for address, one in _receivers(machine, lane, int(to[number]), int(reports[number]),
                                           None if masks is None else int(masks[number]), instruction.line):
                engine.write_shared(lane, engine.shared_places(lane, address, offsets, step), step, data, one)
        return None

    return run


def _receivers(machine: Machine, lane: int, address: int, report: int, mask: int | None,
               line: int) -> list[tuple[int, MbarrierObject]]:
    """(address in the cluster's window, mbarrier) of each block that receives; all of the mask with multicast."""
    if mask is None:
        return [(address, find(machine, report, line))]
    stride = machine.memory.shared_stride
    size = machine.shape.cluster_blocks
    first = int(machine.block_of[lane]) // size * size
    low = address & ((1 << RANK_SHIFT) - 1)
    return [(low | rank << RANK_SHIFT, find(machine, report % stride + (first + rank) * stride, line))
            for rank in range(size) if mask >> rank & 1]


def _tensor_of(machine: Machine, lane: int, address: int, line: int) -> tensor_map.Tensor:
    """The tensor map at a generic address."""
    cache: dict[tuple[int, int], tensor_map.Tensor] = machine.state.setdefault("tensor maps", {})
    key = (lane if address < GLOBAL_BASE else 0, address)
    found = cache.get(key)
    if found is None:
        access = Access(machine, "tensor map", line, 8, 8)
        if address % 64:
            raise EmulationError(f"the tensor map is at {address:#x}, expected a multiple of 64", line)
        halves = [load_from(access, "generic", np.array([lane]), np.array([address + at])) for at in (0, 64)]
        found = cache[key] = tensor_map.decode(np.concatenate(halves)[:, 0].tobytes())
    return found


@unit("tensor")
def _tensor(machine: Machine, instruction: parse.Instruction) -> Run:
    """cp.async.bulk.tensor: a box of a tensor, in the order of its dimensions, swizzled in shared memory."""
    form = instruction.form
    engine = Engine(machine, instruction)
    stores = "bulk_group" in form
    tensor_operand, other = instruction.operands[:2] if stores else (instruction.operands[1], instruction.operands[0])
    if not isinstance(tensor_operand, parse.Address) or not tensor_operand.coordinates or not isinstance(
            tensor_operand.coordinates[0], parse.Vector):
        raise EmulationError("expected [tensor map, {coordinates}]", instruction.line)
    coordinates = [machine.reader(item, "s32") for item in tensor_operand.coordinates[0].items]
    read_map = address_reader(machine, tensor_operand)
    read_shared = address_reader(machine, other)
    objects_at = None if stores else object_reader(machine, instruction, instruction.operands[2], "shared")
    mask = machine.reader(instruction.operands[3], "u16") if "multicast::cluster" in form else None
    dimensions = int(form.get("dim")[0])
    op = form.get("op")

    def run(lanes: Lanes) -> Wait | None:
        every = machine.lanes_of(lanes)
        maps, shared = read_map(lanes), read_shared(lanes)
        where = [read(lanes) for read in coordinates]
        masks = mask(lanes) if mask is not None else None
        reports = objects_at(lanes) if objects_at is not None else None
        for number, lane in enumerate(every.tolist()):
            tensor = _tensor_of(machine, lane, int(maps[number]), instruction.line)
            if len(tensor.box) != dimensions or len(where) != dimensions:
                raise EmulationError(f"{instruction.text}: the tensor map has {len(tensor.box)} dimensions",
                                     instruction.line)
            at = tuple(int(axis[number]) for axis in where)
            size = tensor.unit(at) if not op else int(tensor.dtype.itemsize)
            offsets, inside = tensor.box_offsets(at, size)
            offsets = offsets + tensor.address - GLOBAL_BASE
            linear = np.arange(len(offsets)) * size
            address = int(shared[number])
            if address % 128:
                raise EmulationError(f"{instruction.text}: shared memory address {address:#x}, expected a multiple of "
                                     "128", instruction.line)

            def placed(base: int, linear: Array = linear, tensor: tensor_map.Tensor = tensor, lane: int = lane,
                       size: int = size) -> Array:
                return engine.shared_places(lane, 0, tensor_map.swizzled(base + linear, tensor.swizzle), size)

            if stores:
                engine.store_global(lane, placed(address), offsets, inside, size,
                                    (op, _type_name(tensor.dtype)) if op else None)
                continue
            assert reports is not None
            data = engine.global_data(lane, offsets, inside, size)
            for base, one in _receivers(machine, lane, address, int(reports[number]),
                                        None if masks is None else int(masks[number]), instruction.line):
                engine.write_shared(lane, placed(base), size, data, one)
        return None

    return run


def _type_name(dtype: Any) -> str:
    names = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
    kind = np.dtype(dtype)
    return names.get(kind.name, f"{'s' if kind.kind == 'i' else 'u'}{kind.itemsize * 8}")


@unit("st_async")
def _st_async(machine: Machine, instruction: parse.Instruction) -> Run:
    """st.async, red.async: a store into the cluster's shared memory that reports its bytes to an mbarrier there."""
    form = instruction.form
    engine = Engine(machine, instruction)
    target, value, report = instruction.operands
    type = form.get("type")
    items = value.items if isinstance(value, parse.Vector) else (value,)
    readers = [machine.reader(item, type) for item in items]
    size = BITS[type] // 8
    read_target = address_reader(machine, target)
    objects_at = object_reader(machine, instruction, report, "shared")
    op = form.get("op")

    def run(lanes: Lanes) -> Wait | None:
        every, to, reports = machine.lanes_of(lanes), read_target(lanes), objects_at(lanes)
        values = np.stack([np.ascontiguousarray(read(lanes)).view(f"u{size}") for read in readers])
        for number, lane in enumerate(every.tolist()):
            offsets = engine.shared_places(lane, int(to[number]), np.arange(len(items)) * size, size)

            def data(offsets: Array = offsets, number: int = number) -> Array:
                given = np.ascontiguousarray(values[:, number])
                if not op:
                    return given
                old = machine.memory.shared.views[size][offsets // size]
                return combine(op, type, as_type(old, type), as_type(given, type)).view(f"u{size}")

            engine.write_shared(lane, offsets, size, data, find(machine, int(reports[number]), instruction.line), True)
        return None

    return run
