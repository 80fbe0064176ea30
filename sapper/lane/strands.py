"""The workers of a run of the lane interpreter, and their warps: who has the turn, who waits for whom.

Workers take turns: one runs until it meets a barrier or asks for a task, then the next one does, so that a run is
deterministic and the tasks are shared out round robin. Where a worker has several warps, these take turns likewise,
and a worker's tasks are those of its number, so that its warps agree. Copies land at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ..ir.nodes import Op
from ..ir.text import print_op
from .memory import Array, LaneError, Memory
from .ops import TASK_COUNTERS

Step = Callable[[list[Any]], None]
"""One op, compiled: changes the environment, a list of values whose entry 0 is the worker."""


class Aborted(Exception):
    """Another worker failed."""


class Launch:
    """What the workers of one run share. A strand is a warp of a worker, and what takes turns."""

    def __init__(self, words: list[int], memory: Memory, workers: int, warps: int = 1, near_bytes: int = 0,
                 cluster: int = 1) -> None:
        if workers % cluster:
            raise LaneError(f"found {workers} workers; expected a multiple of the {cluster} of a cluster")
        self.cluster = cluster
        self.words = words
        self.memory = memory
        self.workers = workers
        self.warps = warps
        self.strands = workers * warps
        self.near = [memory.allocate(f"near memory of worker {n}", near_bytes, 1024)
                     for n in range(workers) if near_bytes]
        self.meetings: dict[tuple[int, int], int] = {}
        self.counters = [0] * TASK_COUNTERS
        self.turns = [threading.Semaphore(0) for _ in range(self.strands)]
        self.running = [True] * self.strands
        self.waiting = 0
        self.generation = 0
        self.signals: dict[int, Signal] = {}
        self.sums: dict[int, tuple[Array, range]] = {}
        self.handed: set[int] = set()
        self.fruitless = 0
        self.failure: BaseException | None = None

    def next_turn(self, worker: int) -> None:
        """Let the next worker that still runs go on."""
        for step in range(1, self.strands + 1):
            other = (worker + step) % self.strands
            if self.running[other]:
                self.turns[other].release()
                return

    def give_way(self, worker: int) -> None:
        if self.strands > 1:
            self.next_turn(worker)
            self.turns[worker].acquire()
            if self.failure is not None:
                raise Aborted

    def barrier(self, worker: int, op: Op) -> None:
        generation = self.generation
        self.waiting += 1
        if self.waiting == self.strands:
            self.waiting = 0
            if "reset" in op.attributes:
                self.counters[op.attributes["reset"]] = 0
            self.generation += 1
            return
        while self.generation == generation:
            if self.waiting == sum(self.running):
                raise LaneError(f"{at_op(op)}: found {self.strands - self.waiting} workers that ended before this "
                                "barrier; expected all to arrive")
            self.give_way(worker)

    def meet(self, warp: int, op: Op, workers: int = 1) -> None:
        """Wait until every warp of so many workers, this one's among them, has come as often as it."""
        mine = self.meetings[workers, warp] = self.meetings.get((workers, warp), 0) + 1
        self.fruitless = 0
        size = self.warps * workers
        first = warp // size * size

        def late() -> list[int]:
            return [other for other in range(first, first + size) if self.meetings.get((workers, other), 0) < mine]

        while late():
            if not all(self.running[other] for other in late()):
                raise LaneError(f"{at_op(op)}: found a warp that ended before; expected all of the worker's to arrive")
            self.give_way(warp)

    def hand_over(self, warp: int) -> None:
        self.handed.add(warp)
        self.fruitless = 0

    def take_over(self, warp: int, other: int, op: Op) -> None:
        """Wait until another warp of the launch has handed over."""
        while other not in self.handed:
            self.fruitless += 1
            if self.fruitless > 2 * self.strands:
                raise LaneError(f"{at_op(op)}: found nobody who can go on; expected warp {other % self.warps} of "
                                f"worker {other // self.warps} to hand over")
            self.give_way(warp)
        self.handed.remove(other)

    def near_to(self, worker: Worker, op: Op) -> list[int]:
        """From a worker's near memory to that of each worker on which an op acts."""
        size = op.attributes.get("workers", 1)
        first = worker.number // size * size
        return [self.near[other] - self.near[worker.number] for other in range(first, first + size)]

    def signal(self, address: int, op: Op) -> Signal:
        found = self.signals.get(address)
        if found is None:
            raise LaneError(f"{at_op(op)}: found no signal at {address:#x}; expected one that signal_start made")
        return found

    def count(self, signal: Signal, arrivals: int, announced: int) -> None:
        """Arrivals, and bytes announced or, below 0, copied."""
        signal.arrivals -= arrivals
        signal.bytes += announced
        self.fruitless = 0
        if signal.arrivals == 0 and signal.bytes == 0:
            signal.phase += 1
            signal.arrivals = signal.each

    def wait(self, warp: int, signal: Signal, parity: int, op: Op) -> None:
        """Until the last phase of this parity is over: the signal is in one of the other."""
        while signal.phase & 1 == parity:
            self.fruitless += 1
            if self.fruitless > 2 * self.strands:
                raise LaneError(f"{at_op(op)}: found nobody who can go on; expected {signal.arrivals} arrivals and "
                                f"{signal.bytes} bytes in phase {signal.phase}")
            self.give_way(warp)


class Signal:
    """each: arrivals of a phase; arrivals, bytes: what is still to come in this one."""

    __slots__ = ("arrivals", "bytes", "each", "phase")

    def __init__(self, each: int) -> None:
        self.each = self.arrivals = each
        self.bytes = self.phase = 0


class Worker:
    """A warp of a worker. strand: its number among all warps of the launch. tiles: whether it has them configured."""

    __slots__ = ("launch", "memory", "number", "strand", "tiles", "warp", "words")

    def __init__(self, launch: Launch, strand: int) -> None:
        self.launch = launch
        self.strand = strand
        self.number, self.warp = divmod(strand, launch.warps)
        self.memory = launch.memory
        self.words = launch.words
        self.tiles = False


def at_op(op: Op) -> str:
    """An op and its place, for errors."""
    place = f" at {op.location}" if op.location is not None else ""
    return f"lane op {op.name}{place} ({print_op(op)})"


def bytes_at(worker: Worker, op: Op, address: int, size_bytes: int, write: bool, lane: int | None) -> Array:
    """The bytes that an op reads or writes, as a view; lane: whose they are. Raises LaneError outside the buffers."""
    found = worker.memory.find(address, size_bytes, write)
    if isinstance(found, str):
        where = f" lane {lane}" if lane is not None else ""
        raise LaneError(f"{at_op(op)}{where}, worker {worker.number}: found {found}; "
                        "expected an access inside a registered buffer")
    return found
