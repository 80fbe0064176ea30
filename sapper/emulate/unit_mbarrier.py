"""mbarrier objects: arrivals, transaction bytes, phases.

Enters: arrivals of threads and of asynchronous copies. Leaves: phases, and what they make known. Holds: an object is
known by its place in shared memory, and holds its counts here; the state that `mbarrier.arrive` returns has the number
of the phase, and above it the arrivals that were pending. A phase completes when no arrival and no transaction byte is
pending. In lazy mode a copy lands when somebody waits for the object that it reports to. Source: PTX ISA, "Parallel
Synchronization ...: mbarrier".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import parse
from .errors import EmulationError
from .machine import WARP, Lanes, Machine, Run, Wait
from .memory import SHARED_BASE, SHARED_START
from .races import REACH, READS, STARTS, Group
from .unit_memory import Access, address_reader, shared_shadow, space_of
from .units import unit

Array = NDArray[Any]


@dataclass(slots=True)
class MbarrierObject:
    """count: arrivals of a phase; pending: still to come in this one; bytes: transactions still to come.
    landing: copies of lazy mode, and commits of products, that land when somebody waits. known: what arrivals made
    known, as far as their scopes go; open: what whoever waits knows: what copies wrote, and that what was read before
    an arrival is over (a lane that arrives has its values; CUTLASS lets buffers of a cluster be overwritten after
    arrivals of a block's scope). Both, too, up to the last complete phase."""

    name: str
    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    landing: list[Callable[[], None]] = field(default_factory=list)
    known: dict[Group, Array] = field(default_factory=dict)
    open: Array | None = None
    told: tuple[dict[Group, Array], Array | None] = field(default_factory=lambda: ({}, None))


def objects(machine: Machine) -> dict[int, MbarrierObject]:
    """Offset in the arena of shared memory -> object."""
    found = machine.state.setdefault("mbarriers", {})
    assert isinstance(found, dict)
    return found


def find(machine: Machine, offset: int, line: int) -> MbarrierObject:
    found = objects(machine).get(offset)
    if found is None:
        stride = machine.memory.shared_stride
        raise EmulationError(f"no mbarrier was initialised at shared memory+{offset % stride - SHARED_START} of block "
                             f"{machine.blocks[offset // stride]}", line)
    return found


def _complete(machine: Machine, one: MbarrierObject) -> None:
    if one.pending == 0 and one.bytes == 0:
        one.phase += 1
        one.pending = one.count
        one.told = dict(one.known), one.open
        machine.happened()


def publish(machine: Machine, one: MbarrierObject, agent: int, reach: int = REACH["cta"],
            releases: bool = True) -> None:
    """What arrivals of an agent make known."""
    clocks = machine.clocks
    clocks.publish(one.known, agent, reach, releases)
    if releases:
        read = np.zeros_like(clocks.known[agent])
        read[READS] = clocks.joint(np.array([agent]))[READS]
        _open(one, read)


def arrive(machine: Machine, one: MbarrierObject, count: int, line: int) -> None:
    """`count` arrivals, whose agents have published."""
    if count > one.pending:
        raise EmulationError(f"{one.name}: {count} arrivals, where {one.pending} are pending in phase {one.phase}",
                             line)
    one.pending -= count
    _complete(machine, one)


def arrive_for(machine: Machine, one: MbarrierObject, known: Array, line: int) -> None:
    """One arrival of asynchronous operations, which makes `known` known to whoever waits."""
    _open(one, known)
    arrive(machine, one, 1, line)


def take(machine: Machine, one: MbarrierObject, agent: int, reach: int, acquires: bool) -> None:
    """What a wait of an agent for a phase that is over makes known to it."""
    clocks, (known, everybodys) = machine.clocks, one.told
    clocks.take(known, agent, reach, acquires)
    if everybodys is not None:
        target = clocks.known if acquires else clocks.seen[REACH["cta"]]
        target[agent] = np.maximum(target[agent], everybodys)


def _open(one: MbarrierObject, vector: Array) -> None:
    one.open = vector if one.open is None else np.maximum(one.open, vector)


def expect(one: MbarrierObject, size_bytes: int) -> None:
    one.bytes += size_bytes


def complete_bytes(machine: Machine, one: MbarrierObject, size_bytes: int, known: Array | None,
                   sender: int | None = None) -> None:
    """Transaction bytes arrived; `known` is what that makes known. sender: the agent whose cluster it is for; None: to
    whoever waits."""
    if known is not None and sender is not None:
        machine.clocks.keep(one.known, sender, REACH["cluster"], known)
    elif known is not None:
        _open(one, known)
    one.bytes -= size_bytes
    _complete(machine, one)


def object_reader(machine: Machine, instruction: parse.Instruction, operand: parse.Operand | None,
                  space: str) -> Callable[[Lanes], Array]:
    """Offsets in the arena of the objects that lanes address."""
    access = Access(machine, instruction.text, instruction.line, 8)
    read = address_reader(machine, operand)
    base = SHARED_BASE if space == "generic" else 0

    def offsets(lanes: Lanes) -> Array:
        address = read(lanes) - base
        access.aligned(lanes, address)
        return access.shared_offsets(lanes, address)

    return offsets


@unit("mbarrier")
def _mbarrier(machine: Machine, instruction: parse.Instruction) -> Run:
    form, line = instruction.form, instruction.line
    parts = form.mnemonic.split(".")
    action = parts[1]
    if action == "pending_count":
        return _pending_count(machine, instruction)
    space = space_of(form.get("space"))
    result, address, *rest = (None, *instruction.operands) if action in (
        "init", "inval", "expect_tx", "complete_tx") else instruction.operands
    offsets_of = object_reader(machine, instruction, address, space)
    amount = machine.reader(rest[0], "u64" if "wait" in action and "parity" not in form else "u32") if rest and (
        rest[0] is not None) else None
    releases, reach = "relaxed" not in form, REACH[form.get("scope") or "cta"]

    changes_life = action in ("init", "inval")

    def each(lanes: Lanes) -> list[tuple[int, int, int]]:
        """(lane, offset, amount). The life of an object must be ordered with its uses."""
        every, offsets = machine.lanes_of(lanes), offsets_of(lanes)
        amounts = amount(lanes) if amount is not None else np.ones(len(every), np.uint32)
        if machine.options.races:
            shadow = shared_shadow(machine)
            where = shadow.granules(offsets, 8), machine.warp_of[every], every % WARP, line
            if changes_life:
                shadow.check_write(*where)
            else:
                shadow.check_read(*where, part=STARTS)
        return list(zip(every.tolist(), offsets.tolist(), amounts.tolist(), strict=True))

    if changes_life:
        return _life(machine, instruction, each, action == "init")
    if "wait" in action:
        return _waiting(machine, instruction, each, result, parity="parity" in form)
    write = machine.writer(result, "b64") if result is not None else None
    expects = "expect_tx" in form.mnemonic
    drops = action == "arrive_drop"

    def run(lanes: Lanes) -> Wait | None:
        states, published = [], set()
        for lane, offset, number in each(lanes):
            one, agent = find(machine, offset, line), int(machine.warp_of[lane])
            states.append(one.pending << 32 | one.phase)
            if action == "expect_tx":
                expect(one, number)
            elif action == "complete_tx":
                complete_bytes(machine, one, number, None)
            else:
                if expects:
                    expect(one, number)
                count = 1 if expects else number
                if drops:
                    one.count -= count
                if (agent, offset) not in published:
                    published.add((agent, offset))
                    publish(machine, one, agent, reach, releases)
                arrive(machine, one, count, line)
        if write is not None:
            write(lanes, np.array(states, np.uint64))
        return None

    return run


def _pending_count(machine: Machine, instruction: parse.Instruction) -> Run:
    write, read = machine.writer(instruction.operands[0], "u32"), machine.reader(instruction.operands[1], "b64")

    def run(lanes: Lanes) -> Wait | None:
        if write is not None:
            write(lanes, (read(lanes) >> np.uint64(32)).astype(np.uint32))
        return None

    return run


def _life(machine: Machine, instruction: parse.Instruction, each: Callable[[Lanes], list[tuple[int, int, int]]],
          begins: bool) -> Run:
    def run(lanes: Lanes) -> Wait | None:
        known = objects(machine)
        stride = machine.memory.shared_stride
        for _, offset, number in each(lanes):
            if begins:
                if not 0 < number < 1 << 20:
                    raise EmulationError(f"found a count of {number}, expected 1 to {(1 << 20) - 1}", instruction.line)
                name = f"mbarrier at shared memory+{offset % stride - SHARED_START} of block " \
                       f"{machine.blocks[offset // stride]}"
                known[offset] = MbarrierObject(name, number, number)
            else:
                find(machine, offset, instruction.line)
                del known[offset]
        return None

    return run


def _waiting(machine: Machine, instruction: parse.Instruction, each: Callable[[Lanes], list[tuple[int, int, int]]],
             result: parse.Operand | None, parity: bool) -> Run:
    write = machine.writer(result, "pred")
    acquires, reach = "relaxed" not in instruction.form, REACH[instruction.form.get("scope") or "cta"]
    refused: set[int] = set()
    """Threads whose first question lazy mode answered with no, as hardware may."""

    def over(one: MbarrierObject, number: int) -> bool:
        return one.phase & 1 != number & 1 if parity else one.phase > number & 0xFFFFFFFF

    def ask(offset: int, number: int) -> tuple[MbarrierObject, bool]:
        one = find(machine, offset, instruction.line)
        while one.landing and not over(one, number):
            one.landing.pop(0)()
        return one, over(one, number)

    def run(lanes: Lanes) -> Wait | None:
        told = each(lanes)
        asked = dict.fromkeys((offset, number) for _, offset, number in told)
        if machine.options.lazy:
            open_yet = {one for one in asked if not over(find(machine, one[0], instruction.line), one[1])}
            fresh = [lane for lane, offset, number in told if (offset, number) in open_yet and lane not in refused]
            if fresh:
                refused.update(fresh)
                if write is not None:
                    write(lanes, np.zeros(len(told), bool))
                return None
            refused.difference_update(lane for lane, _, _ in told)
        answer = ask(*told[0][1:]) if len(asked) == 1 else None     # of all lanes, as they mostly ask for the same
        done, late, taken = [], [], set()
        for lane, offset, number in told:
            one, ended = ask(offset, number) if answer is None else answer
            done.append(ended)
            if not ended:
                late.append((lane, one, number))
            elif (lane // WARP, offset) not in taken:
                taken.add((lane // WARP, offset))
                take(machine, one, lane // WARP, reach, acquires)
        if late and not any(lane in machine.giving_up for lane, _, _ in late):
            waiting = {lane: (one, number) for lane, one, number in late}

            def ready(lanes: Array) -> Array:
                return np.array([lane not in waiting or over(*waiting[lane]) or bool(waiting[lane][0].landing)
                                 for lane in lanes.tolist()])

            return Wait(ready, lambda: _told(waiting, parity), again=True, polls=True)
        machine.giving_up.difference_update(lane for lane, _, _ in told)
        if write is not None:
            write(lanes, np.array(done))
        return None

    return run


def _told(waiting: dict[int, tuple[MbarrierObject, int]], parity: bool) -> str:
    pieces = []
    for one, number in {one.name: (one, number) for one, number in waiting.values()}.values():
        wanted = f"parity {number & 1}" if parity else f"phase {number}"
        pieces.append(f"{wanted} of the {one.name} (in phase {one.phase}, {one.pending} of {one.count} arrivals and "
                      f"{one.bytes} bytes pending)")
    return "waits for " + ", ".join(pieces)
