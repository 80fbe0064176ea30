"""Code by hand and generated code, ranked by what they cost on paper.

Enters: a kernel, a target, what is known of its calls, blocks by hand. Leaves: a `Rank` for each and for the generated
code, the cheapest first. Holds: nothing is run. The cost is the bound of the main loop, the one that does most in a
pass (codegen/explain.py: ports, latency, front end, from the costs of the rows; codegen/outline.py where the target's
assembler gives registers), for each f32 operation of it, or for each byte stored where it stores: a block may take
fewer operations for the same result. What the bound leaves out, memory above all, a measurement decides: `sapper tune`
tries blocks like any part of a schedule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..codegen.explain import explain
from ..codegen.outline import outline
from ..codegen.pipeline import HINTS, LARGE, compile_kernel, facts_of
from ..lane.choices import choices
from ..lang.by_hand import bare_name
from ..tile.canonical import canonicalize
from ..tile.reduce_loops import reduce_loops
from ..tile.schedule import DimClass, Schedule, Specialization

HOPELESS = 1.25
"""A block whose bound is more than so many times that of the generated code is not worth a measurement."""


@dataclass(frozen=True, slots=True)
class Rank:
    """name: of the block, "" for the generated code. cycles: of the main loop, for one `unit` ("operation", "byte").

    bound: which of the bounds it is. front_end: cycles that its instructions need to enter, likewise: of two with one
    bound, the one with fewer leaves more room. used: whether the code has the block; else it is the generated code's.
    """

    name: str
    cycles: float
    unit: str
    bound: str
    front_end: float = 0.0
    used: bool = True


def rank(kernel: Any, target: Any, blocks: Iterable[str], schedule: Schedule | None = None, **facts: Any) -> list[Rank]:
    """facts: as compile_kernel takes them. Raises what it raises, and Unexplained for a target without costs."""
    base = schedule or Schedule()
    found = [_rank(kernel, target, "", base, facts)]
    for name in blocks:
        found.append(_rank(kernel, target, name, replace(base, assembly=(*base.assembly, name)), facts))
    return sorted(found, key=lambda r: (r.cycles, r.front_end, r.name))


def fitting(kernel: Any, target: Any, schedule: Schedule | None = None, **facts: Any) -> tuple[str, ...]:
    """Blocks by hand, of those that are registered, which the kernel could have and the schedule does not name."""
    function = kernel.tile_ir(dict(facts["static_dims"]))
    reduce_loops(function)
    canonicalize(function)
    dims = {name: DimClass(HINTS.get(bound, LARGE), divisor) for name, (bound, divisor) in facts["dim_classes"].items()}
    return choices(function, schedule or Schedule(), facts_of(target),
                   Specialization(dims, dict(facts["unit_strides"]))).blocks


def _rank(kernel: Any, target: Any, name: str, schedule: Schedule, facts: dict[str, Any]) -> Rank:
    compiled = compile_kernel(kernel, target=target, schedule=schedule, **facts)
    made = compiled.made
    loop: Any
    if target.assembler_allocates:
        loop = outline(made.machine, target).hottest()
        entering = 0.0 if loop is None else loop.units["issue"]
    else:
        loops = [loop for loop in explain(made.machine, target, made.statistics).loops if loop.innermost]
        loop = max(loops, key=lambda loop: (loop.operations, loop.stored_bytes), default=None)
        entering = 0.0 if loop is None else loop.front_end_cycles
    used = not name or f"{target.family}:{bare_name(name)}" in compiled.pieces
    if loop is None:
        return Rank(name, 0.0, "operation", "no loop", used=used)
    unit, amount = ("byte", loop.stored_bytes) if loop.stored_bytes else ("operation", loop.operations)
    amount = max(1.0, amount)
    return Rank(name, loop.cycles / amount, unit, loop.bound, entering / amount, used)


def worth_a_trial(ranks: Iterable[Rank]) -> set[str]:
    """Names of the blocks that may win."""
    known = list(ranks)
    generated = next(r.cycles for r in known if not r.name)
    return {r.name for r in known if r.name and r.used and r.cycles <= HOPELESS * generated}
