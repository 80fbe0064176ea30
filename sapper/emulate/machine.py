"""The machine: threads of the resident blocks as lanes of NumPy arrays, and the scheduler of their strands.

Enters: a parsed function, the shape of the launch, memory. Leaves: effects on memory, counters.
Holds: a *strand* is a set of threads at one place of the program; it may span warps and blocks. Threads that disagree
at a branch part into two strands; strands that meet at one place merge. The strand at the lowest place runs first, so
that threads which went different ways meet again after both; one that runs long without meeting anybody lets others go
on (forward progress of each thread: PTX ISA, "Independent Thread Scheduling"). A strand that waits is asked again when
something happened. When nobody can go on, that is a deadlock, and the error says who waits where.
Registers are arrays over all threads; they are replaced, never changed in place. Whether any of some flags are set is
asked by np.count_nonzero, here and in the units, which takes a quarter of the time of `any`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..targets.ptx import meaning
from ..targets.ptx.rows import BITS
from . import parse
from .counters import Counters, LineCounters
from .errors import ConvergenceError, DeadlockError, EmulationError
from .memory import Memory
from .races import Clocks

Array = NDArray[Any]
T = TypeVar("T")
Lanes = NDArray[np.int64] | None
"""Threads by number, ascending; None: all of the machine."""
WARP = 32
FUEL = 1000
"""Instructions that a strand runs before others that are ready get their turn."""


FRUITLESS = 4
"""How often all threads may poll in vain, with nothing happening between, until that is a deadlock."""


class Wait:
    """Why a strand does not go on. ready: whether each of its threads may. again: the instruction runs again then.
    meets: threads that come to the same place join. polls: the instruction may also give up waiting."""

    def __init__(self, ready: Callable[[Array], Array], text: Callable[[], str], again: bool = False,
                 meets: bool = False, polls: bool = False) -> None:
        self.ready, self.text = ready, text
        self.again, self.meets, self.polls = again, meets, polls


Run = Callable[[Lanes], Wait | None]


@dataclass(slots=True, eq=False)
class Strand:
    place: int
    lanes: Lanes
    wait: Wait | None = None
    seen: int = -1
    """The count of events when it was last asked."""
    tired: bool = False
    """It ran long: others go first."""


@dataclass(slots=True, eq=False)
class Step:
    """One instruction, decoded. whole: it needs all threads of each warp. branch: the place it goes to, or -1."""

    instruction: parse.Instruction
    run: Run
    whole: bool = False
    branch: int = -1
    ends: bool = False
    guard: tuple[int, bool] | None = None
    meets: bool = False
    """Threads that wait here for this strand join it first."""


@dataclass(frozen=True, slots=True)
class Shape:
    """grid and block as (x, y, z); cluster likewise, (1, 1, 1) without clusters."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)

    @property
    def threads(self) -> int:
        return int(np.prod(self.block))

    @property
    def padded_threads(self) -> int:
        return -(-self.threads // WARP) * WARP

    @property
    def warps(self) -> int:
        return self.padded_threads // WARP

    @property
    def blocks(self) -> int:
        return int(np.prod(self.grid))

    @property
    def cluster_blocks(self) -> int:
        return int(np.prod(self.cluster))


@dataclass(frozen=True, slots=True)
class InFlight:
    """A register that an asynchronous instruction still writes. text: what does. wait: what ends that. threads: whose
    register it is, as flags."""

    text: str
    wait: str
    threads: Array


@dataclass(slots=True)
class Options:
    """How to run. lazy: asynchronous effects land only when something waits for them. races, uninitialised: whether
    those are looked for. step_limit: instructions of strands, of blocks that run together, before the run counts as
    endless. deadline: of time.monotonic(), when it stops in any case. lines: count by line of
    the text, too (Counters.lines); what a line touches of shared memory is known while races are looked for.
    short_sums: products of 8-bit floats are summed with as few bits as tensor cores keep (targets/ptx/short_sums.py),
    not in float32. tensor_fences: what orders threads orders their accesses of tensor memory only with tcgen05.fence
    on both sides, as the ISA says; without it, alone, as Triton takes it."""

    lazy: bool = False
    races: bool = True
    uninitialised: bool = True
    step_limit: int = 5_000_000
    deadline: float = float("inf")
    lines: bool = False
    short_sums: bool = False
    tensor_fences: bool = True


class Machine:
    """Runs one function for a batch of blocks (whole clusters) that are resident together."""

    def __init__(self, function: parse.Function, module: parse.Module, shape: Shape, blocks: list[int], memory: Memory,
                 options: Options, counters: Counters, decode: Callable[[Machine, parse.Instruction], Step]) -> None:
        self.function, self.module, self.shape, self.memory = function, module, shape, memory
        self.options, self.counters = options, counters
        self.blocks = blocks
        padded = shape.padded_threads
        self.count = len(blocks) * padded
        self.every = np.arange(self.count, dtype=np.int64)
        self.block_of = self.every // padded
        """Which resident block each thread is of."""
        self.thread_of = self.every % padded
        self.warp_of = self.every // WARP
        self.exited = self.thread_of >= shape.threads
        self.indexed: Array = self.every
        self.index: Any = slice(None)
        """Threads for which an index was asked last, and the index."""
        self.special: dict[str, Array] = self._special_registers()
        self.values: list[Array] = []
        self.whole: list[bool] = []
        self.written: list[Array | None] = []
        self.written_by: list[Lanes] = []
        """Threads that are known to have written a register: a strand reads what it wrote again and again."""
        self.in_flight: dict[int, InFlight] = {}
        """By register."""
        for _, type in function.registers:
            self.values.append(np.zeros(self.count, register_dtype(type)))
            self.whole.append(False)
            self.written.append(None)
            self.written_by.append(None)
        self.strands: list[Strand] = []
        self.events = 0
        self.given_up_at, self.fruitless = -1, 0
        self.giving_up: set[int] = set()
        """Threads whose polling instruction shall say no."""
        self.steps_done = 0
        self.clocks = Clocks(len(blocks), shape.warps, shape.cluster_blocks, options.tensor_fences)
        self.constants: dict[tuple[int, str], Array] = {}
        self.state: dict[str, Any] = {}
        """What the units keep, by unit."""
        self.at_exit: list[Callable[[Array], None]] = []
        self.steps: list[Step] = [decode(self, instruction) for instruction in function.body]
        self.warp_counts = [0] * len(self.steps)
        self.leaders = sorted(set(function.labels.values()))
        self.is_leader = [False] * (len(self.steps) + 1)
        for place in self.leaders:
            self.is_leader[place] = True

    # Threads

    def _special_registers(self) -> dict[str, Array]:
        shape = self.shape
        registers: dict[str, Array] = {}
        thread = np.minimum(self.thread_of, shape.threads - 1).astype(np.uint32)
        block = np.array(self.blocks, dtype=np.uint32)[self.block_of]
        for name, number, size in (("tid", thread, shape.block), ("ctaid", block, shape.grid)):
            x, y = np.uint32(size[0]), np.uint32(size[1])
            for axis, value in zip("xyz", (number % x, number // x % y, number // (x * y)), strict=True):
                registers[f"{name}.{axis}"] = value
        clusters = tuple(g // c for g, c in zip(shape.grid, shape.cluster, strict=True))
        for name, extents in (("ntid", shape.block), ("nctaid", shape.grid), ("cluster_nctaid", shape.cluster),
                              ("nclusterid", clusters)):
            for axis, extent in zip("xyz", extents, strict=True):
                registers[f"{name}.{axis}"] = np.full(self.count, extent, np.uint32)
        rank = np.zeros(self.count, np.uint32)
        for axis, extent in reversed(list(zip("xyz", shape.cluster, strict=True))):
            inside = registers[f"ctaid.{axis}"] % np.uint32(extent)
            registers[f"cluster_ctaid.{axis}"] = inside
            registers[f"clusterid.{axis}"] = registers[f"ctaid.{axis}"] // np.uint32(extent)
            rank = rank * np.uint32(extent) + inside
        registers["cluster_ctarank"] = rank
        registers["cluster_nctarank"] = np.full(self.count, shape.cluster_blocks, np.uint32)
        registers["is_explicit_cluster"] = np.full(self.count, shape.cluster_blocks > 1)
        lane = (self.every % WARP).astype(np.uint32)
        registers["laneid"], registers["warpid"] = lane, (self.thread_of // WARP).astype(np.uint32)
        registers["nwarpid"] = np.full(self.count, shape.warps, np.uint32)
        registers["smid"] = block % np.uint32(132)
        registers["nsmid"] = np.full(self.count, 132, np.uint32)
        registers["gridid"] = np.full(self.count, 1, np.uint64)
        one = np.uint64(1) << lane.astype(np.uint64)
        masks = {"eq": one, "lt": one - np.uint64(1), "le": 2 * one - np.uint64(1)}
        masks["gt"], masks["ge"] = ~masks["le"], ~masks["lt"]
        for name, mask in masks.items():
            registers[f"lanemask_{name}"] = mask.astype(np.uint32)
        # What the CUDA runtime puts there, and cooperative_groups.h reads: high and low half of a pointer.
        registers["envreg1"] = np.full(self.count, self.memory.workspace >> 32, np.uint32)
        registers["envreg2"] = np.full(self.count, self.memory.workspace & 0xFFFFFFFF, np.uint32)
        registers["dynamic_smem_size"] = np.full(self.count, self.memory.dynamic_bytes, np.uint32)
        registers["total_smem_size"] = np.full(self.count, self.memory.shared_bytes, np.uint32)
        return registers

    def kept(self, kind: Callable[[Machine], T]) -> T:
        """What a unit keeps of this machine, of the class `kind`: made when it is first asked for."""
        found = self.state.get(kind.__qualname__)
        if found is None:
            found = self.state[kind.__qualname__] = kind(self)
        return found

    def place_of(self, lane: int) -> str:
        """Where a thread is, for messages."""
        block = self.blocks[int(self.block_of[lane])]
        x, y, _ = self.shape.grid
        where = (block % x, block // x % y, block // (x * y))
        thread = int(self.thread_of[lane])
        return f"block {where}, warp {thread // WARP}, lane {thread % WARP}"

    def lanes_of(self, lanes: Lanes) -> NDArray[np.int64]:
        return self.every if lanes is None else lanes

    def index_of(self, lanes: Array) -> Any:
        """What picks these threads, which are in order, out of an array over all: of neighbours a slice, since that
        gives a view in a fraction of the time."""
        if lanes is not self.indexed:
            neighbours = len(lanes) > 0 and lanes[-1] - lanes[0] == len(lanes) - 1
            self.indexed, self.index = lanes, slice(int(lanes[0]), int(lanes[-1]) + 1) if neighbours else lanes
        return self.index

    # Registers

    def read(self, slot: int, lanes: Lanes) -> Array:
        """The raw bits of a register."""
        if not self.whole[slot]:
            self._check_written(slot, lanes)
        value = self.values[slot]
        return value if lanes is None else value[self.index_of(lanes)]

    def _check_written(self, slot: int, lanes: Lanes) -> None:
        name = self.function.registers[slot][0]
        if slot in self.in_flight:
            self._check_in_flight(slot, lanes, "read")
        if not self.options.uninitialised or (lanes is not None and lanes is self.written_by[slot]):
            return
        written = self.written[slot]
        wanted = self.lanes_of(lanes)
        if written is not None and np.count_nonzero(written[wanted]) == len(wanted):
            self.written_by[slot] = lanes
            return
        missing = wanted if written is None else wanted[~written[wanted]]
        missing = missing[~self.exited[missing]]
        if len(missing):
            raise EmulationError(f"register {name} is read before it is written, by {self.place_of(int(missing[0]))}",
                                 self.line)

    def _check_in_flight(self, slot: int, lanes: Lanes, access: str) -> None:
        found = self.in_flight[slot]
        if np.count_nonzero(found.threads[self.lanes_of(lanes)]):
            raise EmulationError(f"register {self.function.registers[slot][0]} is {access} while {found.text} is in "
                                 f"flight; expected {found.wait} before", self.line)

    def begin_write(self, slot: int, threads: Array, text: str, wait: str) -> None:
        """An asynchronous instruction begins to write a register of these threads; `wait` ends that."""
        old = self.in_flight.get(slot)
        flags = np.zeros(self.count, bool) if old is None else old.threads
        flags[self.index_of(threads)] = True
        self.in_flight[slot] = InFlight(text, wait, flags)
        self.whole[slot] = False

    def landed(self, slot: int, threads: Array) -> None:
        """Such a write has ended."""
        index, old = self.index_of(threads), self.in_flight.get(slot)
        if old is not None:
            old.threads[index] = False
            if not np.count_nonzero(old.threads):
                del self.in_flight[slot]
        written = self.written[slot]
        written = np.zeros(self.count, bool) if written is None else written.copy()
        written[index] = True
        self.written[slot] = written
        self.whole[slot] = slot not in self.in_flight and np.count_nonzero(written | self.exited) == self.count

    def write(self, slot: int, lanes: Lanes, value: Array) -> None:
        """Set a register's raw bits."""
        if self.in_flight and slot in self.in_flight:
            self._check_in_flight(slot, lanes, "written")
        if lanes is None:
            self.values[slot] = value
            self.whole[slot] = slot not in self.in_flight
            return
        old = self.values[slot].copy()
        old[self.index_of(lanes)] = value
        self.values[slot] = old
        if self.whole[slot] or lanes is self.written_by[slot]:
            return
        self.written_by[slot] = lanes
        written = self.written[slot]
        if written is None or np.count_nonzero(written[lanes]) < len(lanes):
            written = np.zeros(self.count, bool) if written is None else written.copy()
            written[lanes] = True
            self.written[slot] = written
            if slot not in self.in_flight and np.count_nonzero(written | self.exited) == self.count:
                self.whole[slot] = True

    def constant(self, bits: int, type: str, lanes: Lanes) -> Array:
        """An immediate for each thread."""
        key = (bits, type)
        found = self.constants.get(key)
        if found is None:
            size = max(BITS[type], 8)
            raw = np.array((bits & ((1 << size) - 1)),
                           dtype=f"u{size // 8}") if type != "pred" else np.array(bool(bits))
            found = self.constants[key] = np.broadcast_to(raw, self.count).copy()
        return found if lanes is None else found[:len(lanes)]

    # Scheduling

    @property
    def line(self) -> int:
        return self.instruction.line

    @property
    def counted_line(self) -> LineCounters | None:
        """The counters of the line that runs, where lines are counted."""
        return self.counters.of_line(self.line) if self.options.lines else None

    def run(self) -> None:
        """Run all threads to their end."""
        alive = self.every[~self.exited]
        self.strands = [Strand(0, None if len(alive) == self.count else alive)]
        self.instruction = self.function.body[0]
        while self.strands:
            self._run(self._pick())
            if time.monotonic() > self.options.deadline:
                raise EmulationError("the run has no end yet, and its time is over")
        for step, count in zip(self.steps, self.warp_counts, strict=True):
            if count:
                name = step.instruction.form.mnemonic
                self.counters.instructions[name] = self.counters.instructions.get(name, 0) + count
                if self.options.lines:
                    self.counters.of_line(step.instruction.line).runs += count

    def happened(self) -> None:
        """Something that a strand may wait for."""
        self.events += 1

    def _pick(self) -> Strand:
        """The strand to run: the lowest place among those that are ready and not tired."""
        for strand in list(self.strands):
            if strand.wait is not None and strand.seen != self.events:
                self._ask(strand)
        ready = [strand for strand in self.strands if strand.wait is None]
        if not ready and self._give_up_polling():
            ready = [strand for strand in self.strands if strand.wait is None]
        if not ready:
            raise DeadlockError("nobody can go on:\n" + "\n".join(self._waiting(strand) for strand in self.strands))
        if len(ready) == 1:
            return ready[0]
        if all(strand.tired for strand in ready):
            for strand in ready:
                strand.tired = False
        return min((strand for strand in ready if not strand.tired), key=lambda strand: strand.place)

    def _give_up_polling(self) -> bool:
        """Let instructions that may fail to wait fail, as long as something happens now and then."""
        polling = [strand for strand in self.strands if strand.wait is not None and strand.wait.polls]
        if self.given_up_at == self.events:
            self.fruitless += 1
        else:
            self.given_up_at, self.fruitless = self.events, 0
        if not polling or self.fruitless >= FRUITLESS:
            return False
        for strand in polling:
            strand.wait = None
            self.giving_up.update(self.lanes_of(strand.lanes).tolist())
        return True

    def _ask(self, strand: Strand) -> None:
        """Let those threads of a waiting strand go on that may."""
        assert strand.wait is not None
        strand.seen = self.events
        lanes = self.lanes_of(strand.lanes)
        ready = strand.wait.ready(lanes)
        if np.count_nonzero(ready) == len(ready):
            self._release(strand)
        elif np.count_nonzero(ready):
            free = Strand(strand.place, lanes[ready], strand.wait)
            strand.lanes = lanes[~ready]
            self.strands.append(free)
            self._release(free)

    @staticmethod
    def _release(strand: Strand) -> None:
        assert strand.wait is not None
        if not strand.wait.again:
            strand.place += 1
        strand.wait = None

    def _waiting(self, strand: Strand) -> str:
        lanes = self.lanes_of(strand.lanes)
        warps = np.unique(self.warp_of[lanes])
        places = []
        for warp in warps[:8]:
            mine = lanes[self.warp_of[lanes] == warp]
            part = "" if len(mine) == WARP else f" ({len(mine)} lanes)"
            places.append(self.place_of(int(mine[0])).rpartition(",")[0] + part)
        more = f" and {len(warps) - 8} more warps" if len(warps) > 8 else ""
        instruction = self.steps[strand.place].instruction
        reason = strand.wait.text() if strand.wait is not None else "ready"
        return f"  {'; '.join(places)}{more}: at line {instruction.line}: {instruction.text} {reason}"

    def merge(self, strand: Strand) -> None:
        """Take in the strands that are at the same place and not held by a barrier."""
        mates = [other for other in self.strands if other is not strand and other.place == strand.place
                 and (other.wait is None or other.wait.meets)]
        if not mates:
            return
        lanes = np.sort(np.concatenate([self.lanes_of(one.lanes) for one in (strand, *mates)]))
        strand.lanes = None if len(lanes) == self.count else lanes
        for other in mates:
            self.strands.remove(other)

    def _warps(self, lanes: Lanes) -> int:
        if lanes is None:
            return self.count // WARP
        return int(np.count_nonzero(np.diff(self.warp_of[lanes]))) + 1 if len(lanes) else 0

    def _run(self, strand: Strand) -> None:
        """Run a strand until it waits, ends, or others should go on."""
        steps, is_leader = self.steps, self.is_leader
        fuel = FUEL
        self.merge(strand)
        warps = self._warps(strand.lanes)
        apart = -1  # the place where others wait for the rest of their warps: to take them in again would be for ever
        while True:
            place = strand.place
            if place >= len(steps):
                self._exit(strand, self.lanes_of(strand.lanes))
                return
            if is_leader[place] and len(self.strands) > 1 and place != apart:
                before = len(self.strands)
                self.merge(strand)
                if len(self.strands) != before:
                    warps = self._warps(strand.lanes)
                if any(other.wait is None and not other.tired and other.place < place for other in self.strands):
                    return
            step = steps[place]
            self.instruction = step.instruction
            fuel -= 1
            if (step.whole or step.meets) and len(self.strands) > 1 and place != apart:
                self.merge(strand)
                warps = self._warps(strand.lanes)
            lanes = strand.lanes
            if step.guard is not None:
                slot, negated = step.guard
                holds = self.read(slot, lanes)
                if negated:
                    holds = ~holds
                if np.count_nonzero(holds) < len(holds):
                    lanes = self.lanes_of(lanes)[holds]
                    if not len(lanes):
                        strand.place += 1
                        self.warp_counts[place] += warps
                        apart = -1
                        continue
            if step.whole and lanes is not None:
                if self._set_apart(strand):
                    if strand.wait is not None:
                        return
                    warps = self._warps(strand.lanes)
                    apart = place
                    continue
                if lanes is not strand.lanes:
                    self._check_same_predicate(lanes)
            self.warp_counts[place] += warps
            apart = -1
            if step.branch >= 0:
                if fuel < 0:
                    self._spend(FUEL)
                    if len(self.strands) > 1:
                        strand.tired = True
                        self._branch(strand, lanes, step)
                        return
                    fuel = FUEL
                if self._branch(strand, lanes, step):
                    warps = self._warps(strand.lanes)
                continue
            if step.ends:
                gone = self.lanes_of(lanes)
                self._exit(strand, gone)
                if strand.lanes is not None and not len(strand.lanes):
                    return
                strand.place += 1
                warps = self._warps(strand.lanes)
                continue
            wait = step.run(lanes)
            if wait is not None:
                if lanes is not strand.lanes:
                    self._part(strand, self.lanes_of(lanes))
                strand.wait, strand.seen = wait, -1
                return
            strand.place = place + 1

    def _spend(self, steps: int) -> None:
        self.steps_done += steps
        if self.steps_done > self.options.step_limit:
            places = "\n".join(self._waiting(strand) for strand in self.strands)
            raise DeadlockError(f"{self.options.step_limit} instructions ran without an end; threads are at:\n{places}")

    def _part(self, strand: Strand, lanes: Array) -> None:
        """Those of a strand that are not in `lanes` go on at the next place as a strand of their own."""
        rest = np.setdiff1d(self.lanes_of(strand.lanes), lanes, assume_unique=True)
        strand.lanes = lanes
        if len(rest):
            self.strands.append(Strand(strand.place + 1, rest))

    def _branch(self, strand: Strand, lanes: Lanes, step: Step) -> bool:
        """Threads `lanes` of the strand go to the target; True where the strand has parted."""
        if lanes is strand.lanes:
            strand.place = step.branch
            return False
        self._part(strand, self.lanes_of(lanes))
        strand.place = step.branch
        return True

    def _exit(self, strand: Strand, gone: Array) -> None:
        for check in self.at_exit:
            check(gone)
        self.exited[gone] = True
        self.happened()
        rest = np.setdiff1d(self.lanes_of(strand.lanes), gone, assume_unique=True)
        strand.lanes = rest
        if not len(rest):
            self.strands.remove(strand)

    def _set_apart(self, strand: Strand) -> bool:
        """Before an instruction for whole warps: threads whose warp is not all here wait for the rest of it, in a
        strand of their own, or the whole strand does. Whether there were any."""
        if strand.lanes is None:
            return False
        lanes = strand.lanes
        complete = self._complete(lanes)
        if np.count_nonzero(complete) == len(complete):
            return False
        wait = Wait(self._complete, lambda: "waits for the other lanes of its warp, which are elsewhere", again=True,
                    meets=True)
        if not np.count_nonzero(complete):
            strand.wait, strand.seen = wait, self.events
        else:
            self.strands.append(Strand(strand.place, lanes[~complete], wait, self.events))
            strand.lanes = lanes[complete]
        return True

    def _check_same_predicate(self, lanes: Array) -> None:
        complete = self._complete(lanes)
        if np.count_nonzero(complete) < len(complete):
            where = self.place_of(int(lanes[~complete][0]))
            raise ConvergenceError(f"{self.instruction.form.mnemonic} runs under a predicate that differs inside a "
                                   f"warp: {where}; expected the same for all lanes", self.line)

    def _complete(self, lanes: Array) -> Array:
        """Which of the threads have all living threads of their warp among them."""
        present = np.bincount(self.warp_of[lanes], minlength=self.count // WARP)
        living = np.bincount(self.warp_of[~self.exited], minlength=self.count // WARP)
        return (present >= living)[self.warp_of[lanes]]

    # Values

    def reader(self, operand: parse.Operand | None, type: str) -> Callable[[Lanes], Array]:
        """A function that reads a single source operand as values of `type`."""
        raw = self.raw_reader(operand, type)
        if isinstance(operand, parse.Register) and type not in meaning.PACKED:
            held, wanted = register_dtype(operand.type), meaning.dtype_of(type)
            if held == wanted:
                return raw
            if held.kind == "u" and wanted.kind != "b" and held.itemsize == wanted.itemsize:
                return lambda lanes: raw(lanes).view(wanted)
        return lambda lanes: as_type(raw(lanes), type)

    def raw_reader(self, operand: parse.Operand | None, type: str) -> Callable[[Lanes], Array]:
        if isinstance(operand, parse.Register):
            slot = operand.slot
            if operand.negated:
                return lambda lanes: ~self.read(slot, lanes)
            registers, whole = self.values, self.whole

            def read(lanes: Lanes) -> Array:
                if not whole[slot]:
                    self._check_written(slot, lanes)
                return registers[slot] if lanes is None else registers[slot][self.index_of(lanes)]

            return read
        if isinstance(operand, parse.Immediate):
            bits = immediate_bits(operand, type)
            return lambda lanes: self.constant(bits, type, lanes)
        if isinstance(operand, parse.Special):
            return self.special_reader(operand.name)
        if isinstance(operand, parse.Symbol):
            bits = self.memory.address_of_symbol(operand.name) + operand.offset
            if self.memory.is_shared(operand.name):
                base = self.memory.shared_rank_bits(self.special["cluster_ctarank"])
                values = (base + np.uint64(bits)).astype(np.uint64)
                return lambda lanes: values if lanes is None else values[self.index_of(lanes)]
            return lambda lanes: self.constant(bits, "u64", lanes)
        raise EmulationError(f"found {operand!r}, expected a register, a number or a variable", self.instruction.line
                             if hasattr(self, "instruction") else 0)

    def special_reader(self, name: str) -> Callable[[Lanes], Array]:
        if name in ("clock", "clock64", "globaltimer", "clock_hi", "globaltimer_lo", "globaltimer_hi"):
            kind = np.uint64 if name in ("clock64", "globaltimer") else np.uint32
            return lambda lanes: np.full(len(self.lanes_of(lanes)), self.steps_done + self.events, kind)
        value = self.special.get(name)
        if value is None:
            raise EmulationError(f"unknown special register %{name}, and no .reg of this name is in scope; special: "
                                 f"{', '.join(sorted(self.special))}")
        return lambda lanes: value if lanes is None else value[self.index_of(lanes)]

    def writer(self, operand: parse.Operand | None, type: str) -> Callable[[Lanes, Array], None] | None:
        """A function that writes values of `type` to a destination; None where it is `_` or left out."""
        if operand is None:
            return None
        if not isinstance(operand, parse.Register):
            raise EmulationError(f"found {operand!r} as a destination, expected a register")
        slot, register = operand.slot, register_dtype(operand.type)
        signed = type.startswith("s") and BITS[type] < BITS[operand.type] and type != "s16x2"

        def write(lanes: Lanes, value: Array) -> None:
            if value.dtype != register or value.ndim > 1:
                value = to_register(value, register, signed)
            self.write(slot, lanes, value)

        return write


def stacked(parts: Sequence[Array]) -> Array:
    """np.stack of arrays of one shape, in half of its time."""
    first = parts[0]
    return np.concatenate(parts).reshape(len(parts), *first.shape)


def register_dtype(type: str) -> Any:
    """The raw dtype of a declared register."""
    if type == "pred":
        return np.dtype(bool)
    if type == "b128":
        return np.dtype("V16")
    return np.dtype(f"u{max(BITS[type] // 8, 2)}")


def as_type(raw: Array, type: str) -> Array:
    """Raw bits of a register as values of a PTX type."""
    wanted = meaning.dtype_of(type)
    if raw.dtype == wanted:
        return raw
    if type == "pred":
        return raw
    size = BITS[type] // 8
    if raw.dtype.itemsize != size:  # a wider register: its low part; a narrower source (an address): extended
        raw = raw.astype(f"u{size}")
    if type in meaning.PACKED:
        return np.asarray(np.ascontiguousarray(raw).view(wanted).reshape(len(raw), -1))
    return raw.view(wanted)


def to_register(value: Array, register: Any, signed: bool) -> Array:
    """Values as the raw bits of a register."""
    if value.ndim == 2:
        value = np.ascontiguousarray(value)
        value = value.view(f"u{value.dtype.itemsize * value.shape[1]}").reshape(len(value))
    if value.dtype == register:
        return value
    size = value.dtype.itemsize
    if "b" in (value.dtype.kind, register.kind):
        return value.astype(register)
    if size == register.itemsize:
        return value.view(register)
    if signed:
        return value.astype(f"i{register.itemsize}").view(register)
    return value.view(f"u{size}").astype(register)


def immediate_bits(operand: parse.Immediate, type: str) -> int:
    """The bits of an immediate as an operand of this type."""
    if type == "f64":
        return int(np.float64(operand.value).view(np.uint64)) if operand.value is not None else operand.bits
    if type == "f32" and operand.value is not None:
        return int(np.float32(operand.value).view(np.uint32))
    return operand.bits
