"""Selection rules of x86-64: tasks, barriers, and pieces by hand.

See select.py. Source: System V ABI; futex(2).
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op
from ...lang.by_hand import CONTRACTIONS, PIECES
from .registers import R10, RAX, RDI, RDX, RSI
from .select_common import Rule

_COUNTER_BYTES = 64
"""From one counter of tasks in the sync block to the next."""


def before_tasks(s: Any, number: Any) -> None:
    """The first task of a worker has its own number."""
    s.emit("mov.64", number, s.facts.worker)


def next_task(s: Any, number: Any) -> None:
    """Nothing: it is in the register already."""


def after_task(s: Any, counter: int, number: Any) -> None:
    """number = workers + the counter's value; the counter goes up by one, atomically. Counters lie 64 bytes apart."""
    sync = s.new("gpr")
    s.emit("mov.64", sync, s.memory(s.facts.arguments, disp=16))
    s.emit("mov.32", number, 1)
    s.emit("lock.xadd.64", s.memory(sync, disp=_COUNTER_BYTES * counter), number)
    s.emit("add.64", number, s.facts.workers)


def asm(s: Any, op: Op) -> None:
    """A piece by hand writes its own instructions."""
    PIECES[op.attributes["by"]].select(s, op)


def asm_contract(s: Any, op: Op) -> None:
    """A micro-kernel by hand writes its own instructions."""
    CONTRACTIONS[op.attributes["by"]].select(s, op)


_FUTEX, _FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 202, 128, 129
_ARRIVED, _GENERATION = 512, 516
"""Bytes from the sync block: how many workers have arrived (i32), and how often all have (i32)."""
_SPINS = 2000


def barrier(s: Any, op: Op) -> None:
    """The last to arrive resets the count, raises the generation and wakes the others; these watch the generation for
    some 2000 rounds, then sleep on it (futex). Alone there is nobody to wait for. A counter of tasks is set
    back while nobody takes any: by the last to arrive, before it lets the others go."""
    facts = s.facts
    after, last, spin = s.new_label("barrier"), s.new_label("barrier_last"), s.new_label("barrier_spin")
    sleep = s.new_label("barrier_sleep")
    counter = op.attributes.get("reset")
    alone = after if counter is None else s.new_label("barrier_alone")
    sync, generation, arrived, spins = s.new("gpr"), s.new("gpr"), s.new("gpr"), s.new("gpr")
    s.emit("mov.64", sync, s.memory(facts.arguments, disp=16))
    s.emit("cmp.64", facts.workers, 1)
    s.branch("jle", alone)
    # The generation is read before arriving: afterwards the last one may raise it at any moment.
    s.emit("mov.32", generation, s.memory(sync, disp=_GENERATION))
    s.emit("mov.32", arrived, 1)
    s.emit("lock.xadd.32", s.memory(sync, disp=_ARRIVED), arrived)
    s.emit("add.32", arrived, 1)
    s.emit("cmp.32", arrived, facts.workers)
    s.branch("je", last)
    s.emit("mov.32", spins, _SPINS)
    s.label(spin)
    s.emit("cmp.32", generation, s.memory(sync, disp=_GENERATION))
    s.branch("jne", after)
    s.emit("pause")
    s.emit("sub.32", spins, 1)
    s.branch("jne", spin)
    s.label(sleep)
    _futex(s, sync, _FUTEX_WAIT_PRIVATE, generation)
    s.emit("cmp.32", generation, s.memory(sync, disp=_GENERATION))
    s.branch("je", sleep)
    s.branch("jmp", after)
    s.label(last)
    s.emit("mov.32", s.memory(sync, disp=_ARRIVED), 0)
    if counter is not None:
        _reset(s, sync, counter)
    s.emit("lock.add.32", s.memory(sync, disp=_GENERATION), 1)
    _futex(s, sync, _FUTEX_WAKE_PRIVATE, None)
    if counter is not None:
        s.branch("jmp", after)
        s.label(alone)
        _reset(s, sync, counter)
    s.label(after)


def _reset(s: Any, sync: Any, counter: int) -> None:
    s.emit("mov.64", s.memory(sync, disp=_COUNTER_BYTES * counter), 0)


def _futex(s: Any, sync: Any, operation: int, expected: Any) -> None:
    """futex(generation's address, operation, expected or INT_MAX, no timeout): the kernel keeps all registers but
    rax, rcx and r11."""
    s.emit("lea.64", s.physical("gpr", RDI), s.memory(sync, disp=_GENERATION))
    s.emit("mov.32", s.physical("gpr", RSI), operation)
    s.emit("mov.32", s.physical("gpr", RDX), 0x7FFFFFFF if expected is None else expected)
    s.emit("mov.32", s.physical("gpr", R10), 0)
    s.emit("mov.32", s.physical("gpr", RAX), _FUTEX)
    s.emit("syscall")


def fence_streaming(s: Any, op: Op) -> None:
    del op
    s.emit("sfence")


def sync_lanes(s: Any, op: Op) -> None:
    """Nothing: a register is stored whole."""
    del s, op


RULES: dict[str, Rule] = {
    "asm": asm, "asm_contract": asm_contract, "barrier": barrier, "fence_streaming": fence_streaming,
    "sync_lanes": sync_lanes,
}
