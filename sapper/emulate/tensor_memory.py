"""Tensor memory: its cells, its allocations, and which access of it happens before which.

Enters: accesses by warps (tcgen05.ld, st) and by the tensor core of a block (mma). Leaves: RaceError for two that
nothing orders, and for one of cells that an asynchronous one still reads or writes; MemoryFault for what is not
allocated, was never written or is not freed at the end. Holds: a block has 128 lanes of 512 columns of 32 bits; a place
is a column of 16 lanes, as no instruction touches fewer, but for lanes that a product is told to leave alone. What the
tensor core did is known as an agent's, the block's engine (races.py); products of one thread run in their order.
Accesses are ordered by what orders their threads only with tcgen05.fence on both sides, or where a tcgen05.commit
arrives for what waits.
Source: PTX ISA, "TensorCore 5th Generation Family Instructions": "Tensor Memory", "Memory Consistency Model".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import EmulationError, MemoryFault, RaceError
from .machine import WARP, Machine
from .races import READS, TENSOR, WRITES

Array = NDArray[Any]
LANES, COLUMNS = 128, 512
GROUP = 16
"""Lanes of a place."""
PLACES = LANES // GROUP * COLUMNS
"""Of a block."""
LOW, WHOLE = 1, 3
"""What is written of a cell: its lower 16 bits, all of it."""
NOBODY = -1


@dataclass(frozen=True, slots=True)
class Toucher:
    """Who touches tensor memory. agent: a warp. thread: whose products run in order; NOBODY for a warp's ld and st.
    line, name: of the instruction."""

    block: int
    agent: int
    thread: int
    line: int
    name: str


class TensorMemory:
    """Of all resident blocks. cells: (blocks, lanes, columns). written: of each cell, LOW or WHOLE. start_of: for each
    column where its allocation starts, NOBODY where there is none. relinquished: blocks that may allocate no more."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        blocks = len(machine.blocks)
        self.cells = np.zeros((blocks, LANES, COLUMNS), np.uint32)
        self.written = np.zeros(self.cells.shape, np.uint8)
        self.start_of = np.full((blocks, COLUMNS), NOBODY, np.int32)
        self.relinquished = np.zeros(blocks, bool)
        self.order = Order(machine, blocks) if machine.options.races else None
        machine.at_exit.append(self.leave)

    def room(self, block: int, columns: int) -> int | None:
        """Where so many columns are free, at a multiple of their number."""
        for start in range(0, COLUMNS, columns):
            if (self.start_of[block, start:start + columns] == NOBODY).all():
                return start
        return None

    def free(self, block: int, start: int, columns: int, by: Toucher) -> None:
        """Raises MemoryFault where that is no allocation, RaceError where anything may still touch it."""
        mine = np.flatnonzero(self.start_of[block] == start)
        if len(mine) != columns:
            found = f"an allocation of {len(mine)} columns" if len(mine) else "no allocation"
            raise MemoryFault(f"{by.name} of {columns} columns at {start}, where there is {found}", by.line)
        if self.order is not None:
            self.order.check_free(places_of(block, np.arange(LANES), mine), by)
        self.start_of[block, mine] = NOBODY
        self.written[block, :, mine] = 0

    def leave(self, gone: Array) -> None:
        """A block's last threads end: all of its columns must be free."""
        machine = self.machine
        for block in np.unique(machine.block_of[gone]).tolist():
            mine = np.flatnonzero(machine.block_of == block)
            kept = np.unique(self.start_of[block][self.start_of[block] != NOBODY])
            if len(kept) and (machine.exited[mine] | np.isin(mine, gone)).all():
                raise MemoryFault(f"block {machine.blocks[block]} ends with tensor memory at column {int(kept[0])}; "
                                  "expected tcgen05.dealloc before", machine.line)

    def check_allocated(self, block: int, columns: Array, by: Toucher) -> None:
        """Columns are of allocations."""
        first, last = int(columns.min()), int(columns.max())
        if last >= COLUMNS or np.count_nonzero(self.start_of[block, first:last + 1] == NOBODY):
            free = first if last >= COLUMNS else first + int(
                (self.start_of[block, first:last + 1] == NOBODY).argmax())
            where = f"columns {first} to {last}" + ("" if last >= COLUMNS else f", of which {free} is not allocated")
            raise MemoryFault(f"{by.name} of {self.machine.place_of(by.agent * WARP)} touches tensor memory at {where}",
                              by.line)

    def check_written(self, block: int, lanes: Array, columns: Array, needs: int, by: Toucher) -> None:
        """Cells (lanes, columns broadcast) that are read were written. needs: LOW or WHOLE."""
        if self.machine.options.uninitialised:
            missing = self.written[block, lanes, columns] & needs != needs
            if np.count_nonzero(missing):
                lane, column = (int(np.broadcast_to(axis, missing.shape)[missing][0]) for axis in (lanes, columns))
                raise MemoryFault(f"{by.name} reads tensor memory at lane {lane}, column {column} of block "
                                  f"{self.machine.blocks[block]}, which nobody wrote", by.line)


def tensor_memory(machine: Machine) -> TensorMemory:
    return machine.kept(TensorMemory)


def places_of(block: int, lanes: Array, columns: Array) -> Array:
    """The places of all of these columns in all of these lanes, each once."""
    groups = np.unique(lanes // GROUP)
    return np.asarray((block * PLACES + groups[:, None] * COLUMNS + np.unique(columns)).reshape(-1))


@dataclass(slots=True, eq=False)
class Use:
    """Places in flight: read or written by an instruction that has not ended. moment: when it began."""

    by: Toucher
    reads: Array
    writes: Array
    moment: int


class Marks:
    """Which places are in flight in one way. line: of the instruction, 0 for none; thread, agent: of its Toucher;
    since: when it began."""

    def __init__(self, places: int) -> None:
        self.line, self.since = np.zeros(places, np.int32), np.zeros(places, np.int32)
        self.thread, self.agent = np.zeros(places, np.int32), np.zeros(places, np.int32)

    def set(self, places: Array, use: Use) -> None:
        self.line[places], self.since[places] = use.by.line, use.moment
        self.thread[places], self.agent[places] = use.by.thread, use.by.agent


class Order:
    """What is known of each place: who wrote it last and when, and when each warp and the tensor core read it last.

    writer: an agent. thread: whose product wrote or read, NOBODY for a warp. read_at: (warps of a block and the tensor
    core, places).
    """

    def __init__(self, machine: Machine, blocks: int) -> None:
        self.machine, self.clocks, self.warps = machine, machine.clocks, machine.shape.warps
        places = blocks * PLACES
        self.writer = np.full(places, NOBODY, np.int32)
        self.writer_thread, self.reader_thread = np.zeros(places, np.int32), np.zeros(places, np.int32)
        self.written_at, self.written_line = np.zeros(places, np.int32), np.zeros(places, np.int32)
        self.read_at = np.zeros((self.warps + 1, places), np.int32)
        self.writing, self.reading = Marks(places), Marks(places)
        self.uses: list[Use] = []

    # Accesses

    def begin(self, by: Toucher, reads: Array, writes: Array) -> Use:
        """An asynchronous instruction begins to read and write these places."""
        self._check_in_flight(self.writing, reads, by, "reads", "writes")
        self._check_in_flight(self.writing, writes, by, "writes", "writes")
        self._check_in_flight(self.reading, writes, by, "writes", "reads")
        self._check_writer(reads, by, "reads")
        self._check_writer(writes, by, "writes")
        self._check_readers(writes, by)
        use = Use(by, reads, writes, self.clocks.now)
        self._mark(use)
        self.uses.append(use)
        if by.thread != NOBODY:
            self._note(use)
        return use

    def end(self, done: list[Use]) -> None:
        """These have ended: a warp's have so for itself, a product for whom its commit arrives."""
        for use in done:
            self.uses.remove(use)
            self.writing.line[use.writes] = 0
            self.reading.line[use.reads] = 0
            if use.by.thread == NOBODY:
                self._note(use)
        for use in self.uses:
            self._mark(use)

    def _mark(self, use: Use) -> None:
        self.writing.set(use.writes, use)
        self.reading.set(use.reads, use)

    def _note(self, use: Use) -> None:
        product = use.by.thread != NOBODY
        agent = self.clocks.engine(use.by.block) if product else use.by.agent
        row = self.warps if product else use.by.agent % self.warps
        now = self.clocks.now
        self.read_at[row, use.reads] = now
        self.writer[use.writes], self.written_at[use.writes] = agent, now
        self.written_line[use.writes] = use.by.line
        if product:
            self.reader_thread[use.reads] = use.by.thread
            self.writer_thread[use.writes] = use.by.thread

    # Checks

    def _after_product(self, by: Toucher, thread: Array, at: Array) -> Array:
        """Whether products of a thread, begun at these moments, come before what is done now: the tensor core has ended
        them, as the arrival of a commit told; or it takes this one after them."""
        order, engine = self.clocks.ordered_tensor(by.agent), self.clocks.engine(by.block)
        owner = thread // WARP
        told = self.clocks.known[by.agent, TENSOR, engine]
        known = (at <= order[engine]) | ((owner == by.agent) & (at <= told))
        if by.thread != NOBODY:
            known |= (thread == by.thread) | (at <= order[owner])
        return np.asarray(known)

    def _check_in_flight(self, marks: Marks, places: Array, by: Toucher, what: str, earlier: str) -> None:
        line = marks.line[places]
        if not np.count_nonzero(line):
            return
        fine = line == 0
        if by.thread != NOBODY:
            thread, since = marks.thread[places], marks.since[places]
            fine |= (thread != NOBODY) & ((thread == by.thread)
                                          | (since <= self.clocks.ordered_tensor(by.agent)[marks.agent[places]]))
        if np.count_nonzero(fine) < len(fine):
            which = int((~fine).argmax())
            product = marks.thread[places[which]] != NOBODY
            wait = "tcgen05.commit, and a wait for its mbarrier," if product else (
                f"tcgen05.wait::{'st' if earlier == 'writes' else 'ld'}")
            raise RaceError(f"{by.name} {what} {self._name(int(places[which]))}, which line {int(line[which])} still "
                            f"{earlier}; expected {wait} between", by.line)

    def _check_writer(self, places: Array, by: Toucher, what: str) -> None:
        writer, at = self.writer[places], self.written_at[places]
        fine = (writer == NOBODY) | (writer == by.agent) | (at <= self.clocks.ordered_tensor(by.agent)[writer])
        if np.count_nonzero(fine) < len(fine):
            fine |= (writer == self.clocks.engine(by.block)) & self._after_product(by, self.writer_thread[places], at)
        if np.count_nonzero(fine) < len(fine):
            which = int((~fine).argmax())
            self._conflict(int(places[which]), by, what, f"written at line {self.written_line[places[which]]}")

    def _check_readers(self, places: Array, by: Toucher) -> None:
        order, first = self.clocks.ordered_tensor(by.agent), by.block * self.warps
        for row in range(self.warps):
            wrong = self.read_at[row, places] > order[first + row]
            if first + row != by.agent and np.count_nonzero(wrong):
                self._conflict(int(places[wrong.argmax()]), by, "writes", f"read by warp {row}")
        at = self.read_at[self.warps, places]
        wrong = (at > 0) & ~self._after_product(by, self.reader_thread[places], at)
        if np.count_nonzero(wrong):
            self._conflict(int(places[wrong.argmax()]), by, "writes", "read by a product")

    def _conflict(self, place: int, by: Toucher, what: str, earlier: str) -> None:
        fences = "" if self.clocks.tensor is None else (
            " with tcgen05.fence::before_thread_sync before it and tcgen05.fence::after_thread_sync after it")
        raise RaceError(f"race on {self._name(place)}: {by.name} of {self.machine.place_of(by.agent * WARP)} {what} "
                        f"it, and it was {earlier} before, with nothing between that orders them; expected a barrier"
                        f"{fences}, or a wait for the mbarrier of a tcgen05.commit", by.line)

    def check_free(self, places: Array, by: Toucher) -> None:
        """Nothing may touch these any more: what orders the threads suffices, as freeing is not asynchronous."""
        for marks, what in ((self.writing, "writes"), (self.reading, "reads")):
            line = marks.line[places]
            if np.count_nonzero(line):
                raise RaceError(f"{by.name} frees {self._name(int(places[line.argmax()]))}, which line "
                                f"{int(line.max())} still {what}", by.line)
        known, first = self.clocks.known[by.agent], by.block * self.warps
        engine = self.clocks.engine(by.block)
        writer, at = self.writer[places], self.written_at[places]
        until = np.where(writer == engine, known[TENSOR, engine], known[WRITES, writer])
        late = (writer != NOBODY) & (writer != by.agent) & (at > until)
        for row in range(self.warps):
            if first + row != by.agent:
                late |= self.read_at[row, places] > known[READS, first + row]
        late |= self.read_at[self.warps, places] > known[TENSOR, engine]
        if np.count_nonzero(late):
            raise RaceError(f"{by.name} frees {self._name(int(places[late.argmax()]))}, which others may still use; "
                            "expected a barrier between", by.line)
        self.writer[places], self.read_at[:, places] = NOBODY, 0

    def _name(self, place: int) -> str:
        block, inside = divmod(place, PLACES)
        lane, column = inside // COLUMNS * GROUP, inside % COLUMNS
        return f"tensor memory at lanes {lane} to {lane + GROUP - 1}, column {column} (block " \
               f"{self.machine.blocks[block]})"


def warp_toucher(machine: Machine, thread: int, line: int, name: str) -> Toucher:
    """The warp of a thread."""
    return Toucher(int(machine.block_of[thread]), int(machine.warp_of[thread]), NOBODY, line, name)


def split_address(address: int, by: Toucher) -> tuple[int, int]:
    """(lane, column) of an address. Raises EmulationError where there is none such."""
    lane, column = address >> 16, address & 0xFFFF
    if not (0 <= lane < LANES and column < COLUMNS):
        raise EmulationError(f"{by.name}: found lane {lane}, column {column}, expected less than {LANES} and {COLUMNS}",
                             by.line)
    return lane, column
