"""Selection rules of PTX: scalars that decide, jumps, the counters of loops, tasks.

See select.py. All threads of a warp go the same way, as only scalars decide.
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Value
from .select_common import scalar
from .select_lanes import vote

# --- Jumps -----------------------------------------------------------------------------------------------------------

def jump(s: Any, label: str) -> None:
    s.branch("bra.uni", label)


def predicate(s: Any, value: Value) -> Any:
    """A predicate that is on where a scalar is not 0."""
    made = s.new("pred")
    op = value.op
    if value in s.deferred and op is not None:
        if op.name == "s_cmp":
            s.emit(f"setp.{op.attributes['cond']}.s64", made, *(scalar(s, v) for v in op.operands))
        else:
            vote(s, made, op)
    else:
        s.emit("setp.ne.s64", made, scalar(s, value), 0)
    return made


def branch_if(s: Any, made: Any, wanted: bool, label: str) -> None:
    """Jump if the predicate is on, or off. All threads go the same way."""
    if not wanted:
        turned = s.new("pred")
        s.emit("not.pred", turned, made)
        made = turned
    s.branch("bra.uni", label)
    s.body[-1].mask = made


def branch_unless(s: Any, value: Value, label: str) -> None:
    """Jump if the condition is 0."""
    number = s.constant_of(value)
    if number is None:
        branch_if(s, predicate(s, value), False, label)
    elif not number:
        jump(s, label)


def compare_branch(s: Any, condition: str, a: Any, b: Any, label: str) -> None:
    made = s.new("pred")
    s.emit(f"setp.{condition}.s64", made, a, b)
    branch_if(s, made, True, label)


# --- Counters of loops -----------------------------------------------------------------------------------------------

def add_immediate(s: Any, register: Any, number: int) -> None:
    s.emit("add.s64", register, register, number)


def add_register(s: Any, register: Any, other: Any) -> None:
    s.emit("add.s64", register, register, other)


def subtract_register(s: Any, register: Any, other: Any) -> None:
    s.emit("sub.s64", register, register, other)


def subtract_branch(s: Any, register: Any, number: int, label: str) -> None:
    """Take a number off; jump if what remains is above 0."""
    s.emit("sub.s64", register, register, number)
    compare_branch(s, "gt", register, 0, label)


# --- Tasks -----------------------------------------------------------------------------------------------------------

def before_tasks(s: Any, number: Any) -> None:
    """The first task of a worker has its own number."""
    del number
    s.facts.task = s.new("gpr")
    s.emit("mov.b64", s.facts.task, s.facts.worker)


def next_task(s: Any, number: Any) -> None:
    s.emit("mov.b64", number, s.facts.task)


def after_task(s: Any, counter: int, number: Any) -> None:
    """Tasks are dealt out in turn: no counter is needed."""
    del counter, number
    s.emit("add.s64", s.facts.task, s.facts.task, s.facts.workers)
