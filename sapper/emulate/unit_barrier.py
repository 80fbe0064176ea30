"""Barriers of a block and of a cluster, and fences.

Enters: threads that arrive. Leaves: waits, and what the barrier makes known (races.py). Holds: a barrier completes when
as many threads as it expects have arrived; without a count it expects all living threads of the block; a warp counts
with all of its 32 lanes. Source: PTX ISA, "bar, barrier", "barrier.cluster", "membar, fence".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import parse
from .errors import EmulationError
from .machine import WARP, Lanes, Machine, Run, Wait
from .races import IN_GLOBAL, IN_SHARED, REACH
from .unit_memory import space_of
from .units import unit

Array = NDArray[Any]


@dataclass(slots=True)
class Barrier:
    """One barrier of one block (or the cluster's). phase: how often it completed. arrived: threads since then.
    expected: as said by those that arrived, 0 for all living threads. known: what arrivals made known."""

    name: str
    phase: int = 0
    arrived: int = 0
    expected: int = -1
    agents: set[int] = field(default_factory=set)
    waiting: set[int] = field(default_factory=set)
    known: Array | None = None
    sum: int = 0
    all: bool = True
    any: bool = False
    results: dict[int, tuple[int, bool, bool]] = field(default_factory=dict)
    """By phase: the count of true predicates, all, any."""


def barriers(machine: Machine) -> dict[tuple[int, int], Barrier]:
    """(block, number) -> barrier."""
    found = machine.state.get("barriers")
    if found is None:
        found = machine.state["barriers"] = {}

        def leave(gone: Array) -> None:
            machine.exited[gone] = True
            for (block, _), barrier in found.items():
                _complete(machine, block, barrier)

        machine.at_exit.append(leave)
    assert isinstance(found, dict)
    return found


def _living(machine: Machine, block: int) -> int:
    padded = machine.shape.padded_threads
    return int(np.count_nonzero(~machine.exited[block * padded:(block + 1) * padded]))


def _complete(machine: Machine, block: int, barrier: Barrier) -> None:
    if barrier.arrived == 0:
        return
    expected = barrier.expected or _living(machine, block)
    if barrier.arrived < expected:
        return
    if barrier.arrived > expected:
        raise EmulationError(f"{barrier.arrived} threads arrived at {barrier.name} of block {block}, which expects "
                             f"{expected}", machine.line)
    waiting = np.array(sorted(barrier.waiting), np.int64)
    if barrier.known is not None and len(waiting):
        machine.clocks.acquire(waiting, barrier.known)
        machine.clocks.synchronised[waiting] = machine.clocks.tick() + 1
    barrier.results[barrier.phase] = (barrier.sum, barrier.all, barrier.any)
    barrier.results.pop(barrier.phase - 2, None)
    barrier.phase += 1
    barrier.arrived, barrier.expected, barrier.known = 0, -1, None
    barrier.agents, barrier.waiting = set(), set()
    barrier.sum, barrier.all, barrier.any = 0, True, False
    machine.happened()


def _arrive(machine: Machine, block: int, barrier: Barrier, lanes: Array, expected: int, waits: bool,
            predicate: Array | None) -> None:
    if barrier.expected not in (-1, expected):
        raise EmulationError(f"{barrier.name} of block {block} is waited for with {expected or 'all'} threads, and "
                             f"with "
                             f"{barrier.expected or 'all'} elsewhere", machine.line)
    barrier.expected = expected
    agents = np.unique(machine.warp_of[lanes])
    barrier.arrived += len(lanes) if not expected else _counted(machine, lanes, agents)
    joint = machine.clocks.joint(agents)
    barrier.known = joint if barrier.known is None else np.maximum(barrier.known, joint)
    if waits:
        barrier.waiting.update(agents.tolist())
    if predicate is not None:
        barrier.sum += int(np.count_nonzero(predicate))
        barrier.all = barrier.all and bool(predicate.all())
        barrier.any = barrier.any or bool(predicate.any())
    _complete(machine, block, barrier)


def _counted(machine: Machine, lanes: Array, agents: Array) -> int:
    """A warp whose living threads all arrive counts as 32 threads."""
    total = 0
    for agent in agents:
        mine = int(np.count_nonzero(machine.warp_of[lanes] == agent))
        living = int(np.count_nonzero(~machine.exited[agent * WARP:(agent + 1) * WARP]))
        total += WARP if mine == living else mine
    return total


@unit("barrier")
def _barrier(machine: Machine, instruction: parse.Instruction) -> Run:
    form = instruction.form
    reduces, arrives = "red" in form, "arrive" in form
    operands = list(instruction.operands)
    target = operands.pop(0) if reduces else None
    number = operands.pop(0)
    predicate = None
    if reduces:
        given = [operand for operand in operands if operand is not None]
        predicate = machine.reader(given[-1], "pred")
        count = given[0] if len(given) == 2 else None
    else:
        count = operands[0]
    read_number = machine.reader(number, "u32")
    read_count = machine.reader(count, "u32") if count is not None else None
    popc = "popc" in form
    write = machine.writer(target, "u32" if popc else "pred") if reduces else None
    tickets: dict[int, tuple[Barrier, int]] = {}
    """Threads that wait for the result of a reduction."""

    def arrive(lanes: Lanes) -> list[tuple[Array, Barrier, int]]:
        every = machine.lanes_of(lanes)
        numbers = read_number(lanes)
        counts = read_count(lanes) if read_count is not None else np.zeros(len(every), np.uint32)
        values = predicate(lanes) if predicate is not None else None
        key = machine.block_of[every] * 16 + numbers
        parts = []
        for one in np.unique(key):
            place = key == one
            block, which = int(one) // 16, int(one) % 16
            barrier = barriers(machine).setdefault((block, which), Barrier(f"barrier {which}"))
            phase = barrier.phase
            _arrive(machine, block, barrier, every[place], int(counts[place][0]), not arrives,
                    values[place] if values is not None else None)
            parts.append((every[place], barrier, phase))
        return parts

    def run(lanes: Lanes) -> Wait | None:
        every = machine.lanes_of(lanes)
        if reduces and int(every[0]) in tickets:
            give(lanes)
            return None
        parts = arrive(lanes)
        if arrives:
            return None
        if reduces:
            for part, barrier, phase in parts:
                for lane in part.tolist():
                    tickets[lane] = (barrier, phase)
        if all(barrier.phase > phase for _, barrier, phase in parts):
            if reduces:
                give(lanes)
            return None
        return _wait(machine, parts, again=reduces)

    def give(lanes: Lanes) -> None:
        every = machine.lanes_of(lanes)
        values = []
        for lane in every.tolist():
            barrier, phase = tickets.pop(lane)
            total, every_true, some_true = barrier.results[phase]
            values.append(total if popc else every_true if "and" in form else some_true)
        if write is not None:
            write(lanes, np.array(values, np.uint32 if popc else bool))

    return run


def _wait(machine: Machine, parts: list[tuple[Array, Barrier, int]], again: bool = False) -> Wait:
    def ready(lanes: Array) -> Array:
        free = np.zeros(machine.count, bool)
        for part, barrier, phase in parts:
            free[part] = barrier.phase > phase
        return free[lanes]

    def text() -> str:
        told = [f"{barrier.name} ({barrier.arrived} of "
                f"{barrier.expected or _living(machine, int(machine.block_of[part[0]]))} threads arrived)"
                for part, barrier, phase in parts if barrier.phase <= phase]
        return "waits for " + ", ".join(told)

    return Wait(ready, text, again=again)


@unit("cluster_barrier")
def _cluster_barrier(machine: Machine, instruction: parse.Instruction) -> Run:
    arrives = "arrive" in instruction.form
    size = machine.shape.cluster_blocks
    state: dict[int, Barrier] = machine.state.setdefault("cluster barriers", {})
    phases: Array = machine.state.setdefault("cluster phases", np.full(machine.count, -1))
    """The phase that each thread arrived at and has not waited for; -1: none."""

    def expected(cluster: int) -> int:
        padded = machine.shape.padded_threads * size
        return int(np.count_nonzero(~machine.exited[cluster * padded:(cluster + 1) * padded]))

    def run(lanes: Lanes) -> Wait | None:
        every = machine.lanes_of(lanes)
        clusters = machine.block_of[every] // size
        if arrives:
            for cluster in np.unique(clusters).tolist():
                part = every[clusters == cluster]
                barrier = state.setdefault(cluster, Barrier("the cluster's barrier"))
                if (phases[part] >= 0).any():
                    raise EmulationError("barrier.cluster.arrive without barrier.cluster.wait after the last one",
                                         machine.line)
                phases[part] = barrier.phase
                agents = np.unique(machine.warp_of[part])
                barrier.arrived += len(part)
                clocks = machine.clocks
                joint = clocks.fenced[REACH["cluster"]:, agents].max(axis=(0, 1)) if "relaxed" in instruction.form \
                    else clocks.joint(agents)
                barrier.known = joint if barrier.known is None else np.maximum(barrier.known, joint)
                if barrier.arrived >= expected(cluster):
                    barrier.phase, barrier.arrived = barrier.phase + 1, 0
                    machine.happened()
            return None
        if (phases[every] < 0).any():
            raise EmulationError("barrier.cluster.wait without barrier.cluster.arrive before", machine.line)

        def ready(asked: Array) -> Array:
            return np.array([state[int(machine.block_of[lane]) // size].phase > phases[lane] for lane in asked])

        if not ready(every).all():
            return Wait(ready, lambda: "waits for the other blocks of its cluster", again=True)
        phases[every] = -1
        for cluster in np.unique(clusters).tolist():
            agents = np.unique(machine.warp_of[every[clusters == cluster]])
            known = state[cluster].known
            if known is not None:
                machine.clocks.acquire(agents, known)
            machine.clocks.synchronised[agents] = machine.clocks.tick() + 1
        return None

    return run


@unit("fence")
def _fence(machine: Machine, instruction: parse.Instruction) -> Run:
    form = instruction.form
    reach = REACH[form.get("scope") or form.get("level") or ("cluster" if "mbarrier_init" in form else "gpu")]

    def run(lanes: Lanes) -> Wait | None:
        agents = np.unique(machine.warp_of[machine.lanes_of(lanes)])
        if "mbarrier_init" in form:
            machine.clocks.fence_starts(agents, reach)
        else:
            machine.clocks.fence(agents, reach, form.get("sem") != "release", form.get("sem") != "acquire")
        return None

    return run


@unit("fence_proxy")
def _fence_proxy(machine: Machine, instruction: parse.Instruction) -> Run:
    """One of global memory says nothing of shared memory."""
    space = space_of(instruction.form.get("space"))
    parts = {"generic": (IN_SHARED, IN_GLOBAL), "shared": (IN_SHARED,), "global": (IN_GLOBAL,)}[space]

    def run(lanes: Lanes) -> Wait | None:
        machine.clocks.fence_proxies(np.unique(machine.warp_of[machine.lanes_of(lanes)]), parts)
        return None

    return run
