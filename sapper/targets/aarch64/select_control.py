"""Selection rules of AArch64: tasks and barriers.

See select.py. Source: Linux system calls of arm64 (number in x8, arguments from x0 on, the result in x0); futex(2).
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op
from .select_common import Rule, add_number, load_immediate

_COUNTER_BYTES = 64
"""From one counter of tasks in the sync block to the next."""


def before_tasks(s: Any, number: Any) -> None:
    """The first task of a worker has its own number."""
    s.emit("mov.64", number, s.facts.worker)


def next_task(s: Any, number: Any) -> None:
    """Nothing: it is in the register already."""


def _counter(s: Any, disp: int) -> Any:
    """The address of a word of the sync block."""
    sync, place = s.new("gpr"), s.new("gpr")
    s.emit("ldr.64", sync, s.memory(s.facts.arguments, disp=16))
    add_number(s, place, sync, disp)
    return place


def after_task(s: Any, counter: int, number: Any) -> None:
    """number = workers + the counter's value; the counter goes up by one, atomically. Counters lie 64 bytes apart."""
    place, one, taken = _counter(s, _COUNTER_BYTES * counter), s.new("gpr"), s.new("gpr")
    load_immediate(s, one, 1)
    s.emit("ldaddal.64", one, taken, s.memory(place))
    s.emit("add.64", number, taken, s.facts.workers)


_FUTEX, _FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 98, 128, 129
_ARRIVED, _GENERATION = 512, 516
"""Bytes from the sync block: how many workers have arrived (i32), and how often all have (i32)."""
_SPINS = 2000
_SYSTEM_CALL = 8
"""The register with the number of a call."""


def barrier(s: Any, op: Op) -> None:
    """The last to arrive resets the count, raises the generation and wakes the others; these watch the generation for
    some 2000 rounds, then sleep on it (futex). Alone there is nobody to wait for. A counter of tasks is set back while
    nobody takes any: by the last to arrive, before it lets the others go. ldaddal and ldar order what is around
    them."""
    facts = s.facts
    after, last, spin = s.new_label("barrier"), s.new_label("barrier_last"), s.new_label("barrier_spin")
    sleep = s.new_label("barrier_sleep")
    counter = op.attributes.get("reset")
    alone = after if counter is None else s.new_label("barrier_alone")
    s.emit("cmp.imm.64", facts.workers, 1)
    s.branch("b.le", alone)
    arrivals, generations = _counter(s, _ARRIVED), _counter(s, _GENERATION)
    generation, now, arrived, spins, one = (s.new("gpr") for _ in range(5))
    # The generation is read before arriving: afterwards the last one may raise it at any moment.
    s.emit("ldar.32", generation, s.memory(generations))
    load_immediate(s, one, 1)
    s.emit("ldaddal.32", one, arrived, s.memory(arrivals))
    s.emit("add.imm.64", arrived, arrived, 1)
    s.emit("cmp.64", arrived, facts.workers)
    s.branch("b.eq", last)
    load_immediate(s, spins, _SPINS)
    s.label(spin)
    s.emit("ldar.32", now, s.memory(generations))
    s.emit("cmp.32", now, generation)
    s.branch("b.ne", after)
    s.emit("yield")
    s.emit("subs.imm.64", spins, spins, 1)
    s.branch("b.ne", spin)
    s.label(sleep)
    _futex(s, generations, _FUTEX_WAIT_PRIVATE, generation)
    s.emit("ldar.32", now, s.memory(generations))
    s.emit("cmp.32", now, generation)
    s.branch("b.eq", sleep)
    s.branch("b", after)
    s.label(last)
    none, old = s.new("gpr"), s.new("gpr")
    load_immediate(s, none, 0)
    s.emit("str.32", s.memory(arrivals), none)
    if counter is not None:
        s.emit("str.64", s.memory(_counter(s, _COUNTER_BYTES * counter)), none)
    s.emit("ldaddal.32", one, old, s.memory(generations))
    _futex(s, generations, _FUTEX_WAKE_PRIVATE, None)
    if counter is not None:
        s.branch("b", after)
        s.label(alone)
        zero = s.new("gpr")
        load_immediate(s, zero, 0)
        s.emit("str.64", s.memory(_counter(s, _COUNTER_BYTES * counter)), zero)
    s.label(after)


def _futex(s: Any, place: Any, operation: int, expected: Any) -> None:
    """futex(place, operation, expected or INT_MAX, no timeout): the kernel keeps all registers but x0."""
    s.emit("mov.64", s.physical("gpr", 0), place)
    load_immediate(s, s.physical("gpr", 1), operation)
    if expected is None:
        load_immediate(s, s.physical("gpr", 2), 0x7FFFFFFF)
    else:
        s.emit("mov.64", s.physical("gpr", 2), expected)
    load_immediate(s, s.physical("gpr", 3), 0)
    load_immediate(s, s.physical("gpr", _SYSTEM_CALL), _FUTEX)
    s.emit("svc")


def nothing(s: Any, op: Op) -> None:
    """Stores are never past the caches, and a register is stored whole."""
    del s, op


RULES: dict[str, Rule] = {"barrier": barrier, "fence_streaming": nothing, "sync_lanes": nothing}
