"""Blocks of a cluster that end while others may still reach into their shared memory.

Enters: accesses by threads of another block than the one whose shared memory they touch (not asynchronous copies, which
their receiver waits for). Leaves: RaceError, where the block has ended, or ends without knowing that the access is
over. Source: PTX ISA, "Cluster of Cooperative Thread Arrays": shared memory of a block is there while it runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RaceError
from .machine import Machine
from .races import READS

Array = NDArray[Any]


class Ends:
    """reached: of each block, by agents of others: when it was last touched, and at which line."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.reached: dict[int, dict[int, tuple[int, int]]] = {}
        machine.at_exit.append(self.leave)

    def reach(self, lanes: Array, blocks: Array, line: int) -> None:
        """Lanes touch the shared memory of these blocks, which are not their own."""
        machine = self.machine
        running = np.bincount(machine.block_of[~machine.exited], minlength=len(machine.blocks))
        for agent, block in np.unique(np.stack([machine.warp_of[lanes], blocks]), axis=1).T.tolist():
            if not running[block]:
                raise RaceError(f"reaches into shared memory of block {machine.blocks[block]}, which has ended; "
                                "expected barrier.cluster before its end", line)
            self.reached.setdefault(block, {})[agent] = machine.clocks.now, line

    def leave(self, gone: Array) -> None:
        """Threads end: a block of which they are the last must know of all that others did."""
        machine = self.machine
        for block in np.unique(machine.block_of[gone]).tolist():
            mine = np.flatnonzero(machine.block_of == block)
            if block not in self.reached or not (machine.exited[mine] | np.isin(mine, gone)).all():
                continue
            known = machine.clocks.known[np.unique(machine.warp_of[mine]), READS].max(axis=0)
            for agent, (time, line) in self.reached[block].items():
                if time > known[agent]:
                    warp, other = agent % machine.clocks.warps, agent // machine.clocks.warps
                    raise RaceError(f"block {machine.blocks[block]} ends, while warp {warp} of block "
                                    f"{machine.blocks[other]} may still reach into its shared memory; expected "
                                    "barrier.cluster before", line)


def ends(machine: Machine) -> Ends:
    return machine.kept(Ends)
