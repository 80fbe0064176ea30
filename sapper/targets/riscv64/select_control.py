"""Selection rules of RISC-V: tasks and barriers.

See select.py. Source: Linux system calls of riscv64 (number in a7, arguments from a0 on, the result in a0; vector
registers are lost: Documentation/arch/riscv/vector.rst); futex(2).
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op
from .select_common import Rule, load_immediate
from .select_scalars import add_number

_COUNTER_BYTES = 64
"""From one counter of tasks in the sync block to the next."""


def before_tasks(s: Any, number: Any) -> None:
    """The first task of a worker has its own number."""
    s.emit("mv", number, s.facts.worker)


def next_task(s: Any, number: Any) -> None:
    """Nothing: it is in the register already."""


def _counter(s: Any, disp: int) -> Any:
    """The address of a word of the sync block."""
    sync, place = s.new("gpr"), s.new("gpr")
    s.emit("ld", sync, s.memory(s.facts.arguments, disp=16))
    add_number(s, place, sync, disp)
    return place


def after_task(s: Any, counter: int, number: Any) -> None:
    """number = workers + the counter's value; the counter goes up by one, atomically. Counters lie 64 bytes apart."""
    place, one, taken = _counter(s, _COUNTER_BYTES * counter), s.new("gpr"), s.new("gpr")
    load_immediate(s, one, 1)
    s.emit("amoadd.d", taken, one, s.memory(place))
    s.emit("add", number, taken, s.facts.workers)


_FUTEX, _FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 98, 128, 129
_ARRIVED, _GENERATION = 512, 516
"""Bytes from the sync block: how many workers have arrived (i32), and how often all have (i32)."""
_SPINS = 2000
_SYSTEM_CALL = 17
"""The register with the number of a call."""


def barrier(s: Any, op: Op) -> None:
    """The last to arrive resets the count, raises the generation and wakes the others; these watch the generation for
    some 2000 rounds, then sleep on it (futex). Alone there is nobody to wait for. A counter of tasks is set back while
    nobody takes any: by the last to arrive, before it lets the others go. amoadd.aqrl and fences order what is around
    them."""
    facts = s.facts
    after, last, spin = s.new_label("barrier"), s.new_label("barrier_last"), s.new_label("barrier_spin")
    sleep, done = s.new_label("barrier_sleep"), s.new_label("barrier_done")
    counter = op.attributes.get("reset")
    alone = done if counter is None else s.new_label("barrier_alone")
    one = s.new("gpr")
    load_immediate(s, one, 1)
    s.branch("bge", alone, one, facts.workers)
    arrivals, generations = _counter(s, _ARRIVED), _counter(s, _GENERATION)
    generation, now, arrived, spins, all_ = (s.new("gpr") for _ in range(5))
    # The generation is read before arriving: afterwards the last one may raise it at any moment.
    s.emit("lw", generation, s.memory(generations))
    s.emit("fence")
    s.emit("amoadd.w", arrived, one, s.memory(arrivals))
    s.emit("addi", all_, arrived, 1)
    s.branch("beq", last, all_, facts.workers)
    load_immediate(s, spins, _SPINS)
    s.label(spin)
    s.emit("lw", now, s.memory(generations))
    s.branch("bne", after, now, generation)
    s.emit("pause")
    s.emit("addi", spins, spins, -1)
    s.branch("bgtz", spin, spins)
    s.label(sleep)
    _futex(s, generations, _FUTEX_WAIT_PRIVATE, generation)
    s.emit("lw", now, s.memory(generations))
    s.branch("beq", sleep, now, generation)
    s.branch("j", after)
    s.label(last)
    none, old = s.new("gpr"), s.new("gpr")
    load_immediate(s, none, 0)
    s.emit("sw", s.memory(arrivals), none)
    if counter is not None:
        s.emit("sd", s.memory(_counter(s, _COUNTER_BYTES * counter)), none)
    s.emit("amoadd.w", old, one, s.memory(generations))
    _futex(s, generations, _FUTEX_WAKE_PRIVATE, None)
    s.label(after)
    s.emit("fence")
    if counter is not None:
        s.branch("j", done)
        s.label(alone)
        none = s.new("gpr")
        load_immediate(s, none, 0)
        s.emit("sd", s.memory(_counter(s, _COUNTER_BYTES * counter)), none)
    s.label(done)


def _futex(s: Any, place: Any, operation: int, expected: Any) -> None:
    """futex(place, operation, expected or INT_MAX, no timeout): the kernel keeps all registers but a0 and vectors."""
    argument = [s.physical("gpr", number) for number in range(10, 16)]
    s.emit("mv", argument[0], place)
    load_immediate(s, argument[1], operation)
    if expected is None:
        load_immediate(s, argument[2], 0x7FFFFFFF)
    else:
        s.emit("mv", argument[2], expected)
    load_immediate(s, argument[3], 0)
    load_immediate(s, argument[4], 0)
    load_immediate(s, argument[5], 0)
    load_immediate(s, s.physical("gpr", _SYSTEM_CALL), _FUTEX)
    s.emit("ecall")


def nothing(s: Any, op: Op) -> None:
    """Stores are never past the caches, and a register is stored whole."""
    del s, op


RULES: dict[str, Rule] = {"barrier": barrier, "fence_streaming": nothing, "sync_lanes": nothing}
