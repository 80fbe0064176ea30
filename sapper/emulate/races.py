"""Which access happens before which, and the accesses that nothing orders.

Enters: accesses of warps to bytes, and the events that order them. Leaves: RaceError at the first conflict.
Holds: an *agent* is a warp, or the asynchronous engine of a block. Time is one counter that moves on at each event.
`known[a, part, b]` is the last moment such that what agent b did until then happens before what a does now (vector
clocks), for each part of what it did: see WRITES. Every granule of memory remembers who wrote it last and when, and
when each agent read it last. An access conflicts with an earlier one of another agent that is not known to it. Inside a
warp, lanes are ordered by bar.warp.sync and by the barriers only. Warps of one block that store one value to one place
with one instruction are let pass: compilers do so. Bytes that an asynchronous operation still reads or writes are
marked in flight; touching them is a conflict whatever the clocks say.
Source: L. Lamport, "Time, clocks, and the ordering of events", 1978; C. Flanagan, S. Freund, "FastTrack", PLDI 2009;
PTX ISA, chapter "Memory Consistency Model".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import RaceError

Array = NDArray[Any]

REACH = {"cta": 0, "cluster": 1, "gpu": 2, "gl": 2, "sys": 2}
"""By scope: whom an operation is for, the block, the cluster or all (PTX ISA, "Scope")."""
REACHES = 3
WRITES, READS, STARTS, TENSOR, IN_SHARED, IN_GLOBAL = range(6)
"""Parts of what is known of an agent: until when its writes are visible, its reads are over, the mbarriers that it
initialised are there, its accesses of tensor memory are over (which tcgen05.fence::before_thread_sync tells, or the
arrival of a tcgen05.commit); and until when its writes to shared and to global memory are visible to the async proxy
too, which nothing but a fence of proxies makes them."""
PARTS = 6
Group = tuple[str, int]


class Clocks:
    """The knowledge of all agents of a batch of blocks."""

    def __init__(self, blocks: int, warps: int, cluster_blocks: int, tensor_fences: bool = True) -> None:
        self.warps, self.cluster_blocks = warps, cluster_blocks
        self.warp_agents = blocks * warps
        self.count = self.warp_agents + blocks
        self.now = 1
        self.known = np.zeros((self.count, PARTS, self.count), np.int32)
        self.fenced = np.zeros((REACHES, *self.known.shape), np.int32)
        """What each agent knew at its last fence of each reach: what its relaxed writes publish as far."""
        self.seen = np.zeros((REACHES, *self.known.shape), np.int32)
        """What relaxed reads brought from as far, known only after the next fence that reaches there."""
        self.synchronised = np.zeros(self.count, np.int32)
        """When the lanes of a warp were last ordered among themselves."""
        self.own = slice(3 if tensor_fences else 4)
        """Parts in which any release tells how far an agent came itself."""
        self.tensor = np.zeros((self.count, self.count), np.int32) if tensor_fences else None
        """Of TENSOR, what was known at the last tcgen05.fence::after_thread_sync."""

    def engine(self, block: int) -> int:
        """The agent that stands for the asynchronous copies of a block."""
        return self.warp_agents + block

    def tick(self) -> int:
        self.now += 1
        return self.now - 1

    def joint(self, agents: Array) -> Array:
        """What a release by all of these agents together publishes."""
        vector: Array = self.known[agents].max(axis=0)
        vector[self.own, agents] = self.tick()
        return vector

    def acquire(self, agents: Array | int, vector: Array) -> None:
        self.known[agents] = np.maximum(self.known[agents], vector)

    def fence(self, agents: Array, reach: int, acquires: bool = True, releases: bool = True) -> None:
        if acquires:
            self.known[agents] = np.maximum(self.known[agents], self.seen[:reach + 1, agents].max(axis=0))
        if releases:
            moment = self.tick()
            self.fenced[reach, agents] = self.known[agents]
            for part in range(PARTS)[self.own]:
                self.fenced[reach, agents, part, agents] = moment

    def fence_starts(self, agents: Array, reach: int) -> None:
        """One of the mbarriers that they initialised alone."""
        self.fenced[reach, agents, STARTS, agents] = self.tick()

    def fence_proxies(self, agents: Array, parts: tuple[int, ...]) -> None:
        """What these agents wrote, or know to be written, may be read by the async proxy."""
        moment = self.tick()
        for part in parts:
            self.known[agents, part] = np.maximum(self.known[agents, part], self.known[agents, WRITES])
            self.known[agents, part, agents] = moment

    def fence_tensor_before(self, agents: Array) -> None:
        """What these agents did in tensor memory is told by what they release from now on."""
        self.known[agents, TENSOR, agents] = self.tick()

    def fence_tensor_after(self, agents: Array) -> None:
        """What these agents know of tensor memory orders what they do there from now on."""
        if self.tensor is not None:
            self.tensor[agents] = np.maximum(self.tensor[agents], self.known[agents, TENSOR])

    def ordered_tensor(self, agent: int) -> Array:
        """For each agent, until when its accesses of tensor memory come before what `agent` does there now."""
        return np.asarray(self.known[agent, TENSOR] if self.tensor is None else self.tensor[agent])

    def publish(self, kept: dict[Group, Array], agent: int, reach: int, releases: bool) -> None:
        """A write that synchronises, relaxed or a release, by an agent: `kept` has by group what acquires find there.

        A relaxed write publishes what its thread knew at its last fence; a relaxed read brings what takes effect at the
        next one. Each reaches as far as its scope, and the fence's; both sides must reach the other (PTX ISA, "Morally
        Strong Operations"): what is published is kept for the writer's block, its cluster and all, as far as it goes,
        and a reader takes it from its own of these."""
        vectors = [(reach, self.joint(np.array([agent])))] if releases else list(enumerate(self.fenced[:, agent]))
        for far, vector in vectors:
            self.keep(kept, agent, min(far, reach), vector)

    def keep(self, kept: dict[Group, Array], agent: int, reach: int, vector: Array) -> None:
        """Publish what a vector says for whom an agent reaches."""
        for group in self.groups(agent)[:reach + 1]:
            kept[group] = np.maximum(kept[group], vector) if group in kept else vector.copy()

    def take(self, kept: dict[Group, Array], agent: int, reach: int, acquires: bool) -> None:
        """A read that synchronises, relaxed or an acquire."""
        for far, group in enumerate(self.groups(agent)[:reach + 1]):
            if group in kept:
                target = self.known if acquires else self.seen[far]
                target[agent] = np.maximum(target[agent], kept[group])

    def distance(self, agents: Array, others: Array) -> Array:
        """The reach that an operation of the one needs to be for the other."""
        blocks, theirs = agents // self.warps, others // self.warps
        away = blocks // self.cluster_blocks != theirs // self.cluster_blocks
        return np.asarray((blocks != theirs).astype(np.int8) + away)

    def groups(self, agent: int) -> tuple[Group, ...]:
        """What contains a warp, for each reach: its block, its cluster, all."""
        block = agent // self.warps
        return ("block", block), ("cluster", block // self.cluster_blocks), ("all", 0)


class Journal(Protocol):
    """Who is told of each access. kind: "read" or "written"."""

    def note(self, kind: str, places: Array, line: int) -> None: ...


class Shadow:
    """What is known of each granule of one memory.

    rows: agents that may read it (a cluster's). first_agent: of the agents whose row is 0, for each byte's owner.
    """

    def __init__(self, size_bytes: int, granule: int, reader_rows: int, clocks: Clocks, name: str,
                 where: Callable[[int], str]) -> None:
        self.granule, self.clocks, self.name, self.where = granule, clocks, name, where
        granules = -(-size_bytes // granule)
        self.writer = np.full(granules, -1, np.int32)
        self.written_at = np.zeros(granules, np.int32)
        self.written_line = np.zeros(granules, np.int32)
        self.lane = np.zeros(granules, np.int8)
        self.atomic = np.full(granules, -1, np.int8)
        """The reach of the atomic operation that wrote last; -1: something else did."""
        self.read_at = np.zeros((reader_rows, granules), np.int32)
        self.last_read = np.zeros(granules, np.int32)
        """The latest of `read_at` over all agents: most writes are known to come after it."""
        self.rows = reader_rows
        self.writing = np.zeros(granules, np.int32)
        """The line of an asynchronous write in flight, or 0."""
        self.reading = np.zeros(granules, np.int32)
        self.generic = np.zeros(granules, bool)
        """Whether the last write was one of the generic proxy."""
        self.any_writing = self.any_reading = False
        self.journal: Journal | None = None

    def granules(self, offsets: Array, size_bytes: int) -> Array:
        first = offsets // self.granule
        count = max(size_bytes // self.granule, 1)
        return first[:, None] + np.arange(count) if count > 1 else first[:, None]

    def places(self, offsets: Array, size_bytes: int) -> Array:
        """The granules of so many bytes at each of these, each once, in order: by flags, since they are many and lie
        close together."""
        places = self.granules(offsets.reshape(-1), size_bytes).reshape(-1)
        first = int(places.min()) if len(places) else 0
        touched = np.zeros(int(places.max()) - first + 1 if len(places) else 0, bool)
        touched[places - first] = True
        return np.flatnonzero(touched) + first

    def check_reads_of_all(self, places: Array, agents: Array, line: int) -> None:
        """Each of the agents reads each of the granules: looked at once for all where all know all that was written."""
        if self.journal is None and not self.any_writing:
            writer, known = self.writer[places], self.clocks.known[agents, WRITES].min(axis=0)
            if not np.count_nonzero((writer >= 0) & (self.written_at[places] > known[writer])):
                for agent in agents.tolist():
                    self.note_read(agent, places)
                return
        self.check_read(np.broadcast_to(places, (len(agents), len(places))), agents, np.full(len(agents), -1), line)

    def check_read(self, places: Array, agents: Array, lanes: Array, line: int, part: int = WRITES) -> None:
        """places: granules, (threads, k); agents and lanes: of the threads. part: STARTS for uses of mbarriers."""
        if self.journal is not None:
            self.journal.note("read", places, line)
        if self.any_writing:
            self._in_flight(self.writing, places, "read", "write", line)
        writer = self.writer[places]
        agent = agents[:, None]
        at = self.written_at[places]
        late = (writer >= 0) & (at > self.clocks.known[agent, part, writer])
        if np.count_nonzero(late):
            other = late & (writer != agent)
            same = late & (writer == agent) & (self.lane[places] != lanes[:, None]) & (
                at >= self.clocks.synchronised[agent])
            if np.count_nonzero(other) or np.count_nonzero(same):
                self._conflict("read", "written", other | same, places, agents, lanes, line)
        if places.shape[1] == 1:
            agent, places = agents, places[:, 0]
        self.note_read(agent, places)

    def note_read(self, agents: Array | int, places: Array) -> None:
        """These agents read these granules now."""
        self.read_at[agents % self.rows, places] = self.clocks.now
        self.last_read[places] = self.clocks.now

    def check_write(self, places: Array, agents: Array, lanes: Array, line: int,
                    generic: bool = True, atomic: int = -1) -> None:
        """atomic: the reach of an atomic operation."""
        if self.journal is not None:
            self.journal.note("written", places, line)
        if self.any_writing:
            self._in_flight(self.writing, places, "written", "write", line)
        if self.any_reading:
            self._in_flight(self.reading, places, "written", "read", line)
        agent = agents[:, None]
        writer, at = self.writer[places], self.written_at[places]
        late = (writer >= 0) & (writer != agent) & (at > self.clocks.known[agent, WRITES, writer])
        if atomic >= 0:
            late &= np.minimum(self.atomic[places], atomic) < self.clocks.distance(agent, writer)
        if np.count_nonzero(late):
            self._conflict("written", "written", late, places, agents, lanes, line)
        first = (agents // self.rows * self.rows) if self.rows < self.clocks.warp_agents else np.zeros_like(agents)
        knows = self.clocks.known[agent, READS, first[:, None] + np.arange(self.rows)]
        knows[np.arange(self.rows) == (agents % self.rows)[:, None]] = self.clocks.now  # what it read itself
        if np.count_nonzero(self.last_read[places] > knows.min(axis=1)[:, None]):
            early = self.read_at[:, places] > knows.T[:, :, None]
            if np.count_nonzero(early):
                reader = int(np.argmax(early.any(axis=(1, 2))))
                self._conflict("written", "read", early[reader], places, agents, lanes, line, reader)
        self.writer[places] = agent
        self.written_at[places] = self.clocks.now
        self.written_line[places] = line
        self.lane[places] = lanes[:, None]
        self.atomic[places] = atomic
        self.generic[places] = generic

    def mark(self, kind: str, places: Array, line: int) -> None:
        """An asynchronous operation begins to read or write these granules. kind: "reading" or "writing"."""
        getattr(self, kind)[places] = line
        setattr(self, f"any_{kind}", True)

    def unmark(self, kind: str, places: Array) -> None:
        marks = getattr(self, kind)
        marks[places] = 0
        setattr(self, f"any_{kind}", bool(marks.max() > 0))

    def landed(self, places: Array, agent: int | Array, line: int, generic: bool = False) -> None:
        """An asynchronous write has ended: `agent` counts as its writer, now. generic: cp.async, which is not of the
        async proxy."""
        self.writer[places] = agent
        self.written_at[places] = self.clocks.now
        self.written_line[places] = line
        self.lane[places] = -1
        self.atomic[places] = -1
        self.generic[places] = generic

    def check_proxy(self, places: Array, agents: Array, line: int, what: str) -> None:
        """An asynchronous read for these agents of bytes that the generic proxy wrote without a proxy fence is an
        error."""
        writer = self.writer[places]
        known = self.clocks.known[agents, IN_SHARED].min(axis=0)
        wrong = self.generic[places] & (writer >= 0) & (self.written_at[places] > known[writer])
        if np.count_nonzero(wrong):
            place = int(places[wrong][0])
            raise RaceError(f"{what} reads {self.name}+{self._offset(place)}, written at line "
                            f"{self.written_line[place]} by ordinary stores; expected fence.proxy.async between", line)

    def _offset(self, place: int) -> str:
        return self.where(place * self.granule)

    def _in_flight(self, marks: Array, places: Array, access: str, other: str, line: int) -> None:
        found = marks[places]
        if np.count_nonzero(found):
            place = int(places[found != 0][0])
            raise RaceError(f"{self.name}+{self._offset(place)} is {access} while the asynchronous {other} of line "
                            f"{marks[place]} is in flight; expected its wait before", line)

    def _conflict(self, access: str, earlier: str, wrong: Array, places: Array, agents: Array, lanes: Array, line: int,
                  reader: int = -1) -> None:
        thread, part = (int(i) for i in np.argwhere(wrong)[0])
        place, agent = int(places[thread, part]), int(agents[thread])
        other = int(self.writer[place]) if earlier == "written" else reader
        at = f" at line {self.written_line[place]}" if earlier == "written" else ""
        who = self.agent_name(other)
        hint = "bar.warp.sync" if other == agent else "a barrier"
        raise RaceError(f"race on {self.name}+{self._offset(place)}: {access} by {self.agent_name(agent)}, lane "
                        f"{int(lanes[thread])}, and {earlier} before by {who}{at}, with nothing between that orders "
                        f"them; expected {hint}", line)

    def agent_name(self, agent: int) -> str:
        if agent >= self.clocks.warp_agents:
            return "an asynchronous copy"
        return f"warp {agent % self.clocks.warps} of block {agent // self.clocks.warps}"


LATE_LIMIT = 1 << 22
"""Addresses of reads that may wait: 32 MiB of them."""


class LateRead(NamedTuple):
    """One read of global memory. offsets: of so many bytes each, for each of the agents. moment, base: the time, and
    the first agent's number, when it happened."""

    offsets: Array
    size_bytes: int
    agents: Array
    moment: int
    base: int


class GlobalShadow:
    """The same for global memory, with the last two readers only: there may be many agents.

    Agents of blocks that ran in an earlier batch of the launch are not ordered with those of this one, except through
    an atomic operation that an earlier block released and this one acquired.

    Reads of an allocation are looked at when something first writes to it, in their order: most of what a kernel reads
    is never written.
    """

    def __init__(self, size_bytes: int, granule: int) -> None:
        self.granule = granule
        granules = -(-size_bytes // granule)
        self.writer = np.full(granules, -1, np.int32)
        self.written_at = np.zeros(granules, np.int32)
        self.written_line = np.zeros(granules, np.int32)
        self.atomic = np.full(granules, -1, np.int8)
        self.generic = np.zeros(granules, bool)
        self.readers = np.full((2, granules), -1, np.int32)
        self.read_at = np.zeros((2, granules), np.int32)
        self.base = 0
        """The first agent's number in this batch."""
        self.trusted = 0
        """Agents below this number are ordered before those of this batch: earlier launches, and released blocks."""
        self.late: dict[int, list[LateRead]] = {}
        """By where the allocation starts: reads that are still to be looked at."""
        self.late_count = 0
        """Their addresses."""
        self.stored: set[int] = set()
        """Allocations whose reads are looked at as they come, as something wrote there."""
        self.stored_anywhere = False
        """One instruction wrote to several: so are all."""

    def granules(self, offsets: Array, size_bytes: int) -> Array:
        first = offsets // self.granule
        count = max(size_bytes // self.granule, 1)
        return first[:, None] + np.arange(count) if count > 1 else first[:, None]

    def _unordered(self, clocks: Clocks, part: int, other: Array, at: Array, agent: Array) -> Array:
        """Whether the access of `other` at moment `at` is not known to `agent`. other: global numbers, or -1."""
        mine = other >= self.base
        local = np.where(mine, other - self.base, 0)
        known = np.where(mine, (local == agent) | (at <= clocks.known[agent, part, local]), other < self.trusted)
        return np.asarray((other >= 0) & ~known)

    def check(self, kind: str, offsets: Array, size_bytes: int, region: int | None, agents: Array, clocks: Clocks,
              line: int, name: Callable[[int], str], reach: int = REACH["gpu"], generic: bool = True) -> None:
        """kind: "read", "write", "atomic", or "observe": a load that synchronises. offsets: of so many bytes each, for
        each of the agents. region: where the allocation starts that holds them all; None: there are several. reach: of
        what synchronises. generic: not of an asynchronous copy."""
        reads = kind in ("read", "observe")
        if region is None:
            self._look_at(*self.late)
            self.stored_anywhere = self.stored_anywhere or not reads
        elif region not in self.stored and not self.stored_anywhere:
            if kind == "read":
                self.late.setdefault(region, []).append(LateRead(offsets, size_bytes, agents, clocks.now, self.base))
                self.late_count += len(offsets)
                if self.late_count > LATE_LIMIT:
                    self._look_at(*self.late)
            if reads:
                return
            self._look_at(region)
            self.stored.add(region)
        self._check(kind, self.granules(offsets, size_bytes), agents, clocks, line, name, reach, generic)

    def _look_at(self, *regions: int) -> None:
        for region in regions:
            for read in self.late.pop(region, ()):
                self._read(self.granules(read.offsets, read.size_bytes), read.agents[:, None], read.moment, read.base)
                self.late_count -= len(read.offsets)

    def _read(self, places: Array, agent: Array, moment: int, base: int) -> None:
        """The last reader moves on to the second place. base: the first agent's number in the batch that reads."""
        last = self.readers[0][places]
        moved = (last != agent + base) & (last >= base)
        if np.count_nonzero(moved):
            self.readers[1][places[moved]] = last[moved]
            self.read_at[1][places[moved]] = self.read_at[0][places[moved]]
        self.readers[0][places] = agent + base
        self.read_at[0][places] = moment

    def _check(self, kind: str, places: Array, agents: Array, clocks: Clocks, line: int, name: Callable[[int], str],
               reach: int, generic: bool) -> None:
        agent = agents[:, None]
        writer = self.writer[places]
        if np.count_nonzero(writer >= 0):
            wrong = self._unordered(clocks, WRITES, writer, self.written_at[places], agent)
            if kind in ("atomic", "observe"):
                away = np.where(writer < self.base, REACH["gpu"], clocks.distance(agent, writer - self.base))
                wrong &= np.minimum(self.atomic[places], reach) < away
            if np.count_nonzero(wrong):
                self._conflict(kind, "written", wrong, writer, places, line, name)
            if kind == "read" and not generic:
                self._check_proxy(places, agent, clocks, line, name)
        if kind == "observe":
            return
        if kind == "read":
            self._read(places, agent, clocks.now, self.base)
            return
        for slot in (0, 1):
            reader = self.readers[slot][places]
            if not np.count_nonzero(reader >= 0):
                continue
            wrong = self._unordered(clocks, READS, reader, self.read_at[slot][places], agent)
            if np.count_nonzero(wrong):
                self._conflict(kind, "read", wrong, reader, places, line, name)
        self.writer[places] = agent + self.base
        together = self.writer[places] != agent + self.base
        if kind == "write" and np.count_nonzero(together):
            self._conflict(kind, "written", together, self.writer[places], places, line, name)
        self.written_at[places] = clocks.now
        self.written_line[places] = line
        self.atomic[places] = reach if kind == "atomic" else -1
        self.generic[places] = generic

    def _check_proxy(self, places: Array, agent: Array, clocks: Clocks, line: int, name: Callable[[int], str]) -> None:
        """What this batch wrote by ordinary stores is read asynchronously behind a fence of proxies."""
        writer = self.writer[places]
        mine = self.generic[places] & (writer >= self.base)
        late = self.written_at[places] > clocks.known[agent, IN_GLOBAL, np.where(mine, writer - self.base, 0)]
        if np.count_nonzero(mine & late):
            place = int(places[mine & late][0])
            raise RaceError(f"an asynchronous copy reads {name(place * self.granule)}, written at line "
                            f"{self.written_line[place]} by ordinary stores; expected fence.proxy.async between", line)

    def _conflict(self, kind: str, earlier: str, wrong: Array, other: Array, places: Array, line: int,
                  name: Callable[[int], str]) -> None:
        thread, part = (int(i) for i in np.argwhere(wrong)[0])
        place = int(places[thread, part])
        at = f" at line {self.written_line[place]}" if earlier == "written" else ""
        what = {"read": "read", "observe": "read", "write": "written", "atomic": "changed atomically"}[kind]
        raise RaceError(f"race on {name(place * self.granule)}: {what}, and {earlier} before by another warp (number "
                        f"{int(other[thread, part])} of the launches){at}, with nothing between that orders them; "
                        "expected a barrier, or a release and an acquire", line)
