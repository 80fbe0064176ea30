"""What must hold on every path through assembly by hand that a target's assembler takes; each fault is an error at the
author's line.

Enters: a `WarpAssembly`, a target, registers that hold something at its end. Leaves: nothing, or `AssemblyError`.
Holds: one forward walk over the control-flow graph, repeated until nothing changes; a register that is written under a
predicate holds something under that predicate only. Bounds of addresses, races, waits and convergence are the
emulator's to find (sapper/emulate), which runs the piece before it is used.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ..codegen.machine import Instruction, Label, LabelReference, Memory, VirtualRegister
from .errors import AssemblyError
from .loops import cycles_of
from .warp import WarpAssembly

Under = tuple[Any, Any]
"""A register, and the predicate under which it was written."""


@dataclass(slots=True)
class _State:
    """whole: registers that hold something in every thread; partly: under a predicate. points: into which tensors."""

    whole: set[Any] = field(default_factory=set)
    partly: set[Under] = field(default_factory=set)
    points: dict[Any, frozenset[str]] = field(default_factory=dict)

    def copy(self) -> _State:
        return _State(set(self.whole), set(self.partly), dict(self.points))

    def meet(self, other: _State) -> bool:
        whole = self.whole & other.whole
        partly = {u for u in self.partly if u in other.partly or u[0] in other.whole}
        partly |= {u for u in other.partly if u[0] in self.whole}
        points = {r: self.points.get(r, frozenset()) | other.points.get(r, frozenset())
                  for r in (*self.points, *(r for r in other.points if r not in self.points))}
        changed = (whole, partly, points) != (self.whole, self.partly, self.points)
        self.whole, self.partly, self.points = whole, partly, points
        return changed


def check_warp(assembly: WarpAssembly, target: Any, results: Collection[Any] = ()) -> None:
    """Raise AssemblyError for the first thing that is wrong. results: of a block, which runs off its end."""
    _Checker(assembly, target, results).run()


class _Checker:
    def __init__(self, assembly: WarpAssembly, target: Any, results: Collection[Any]) -> None:
        self.assembly, self.table, self.target = assembly, assembly.table, target
        self.body, self.results = assembly.body, results
        self.final = False

    def fail(self, kind: str, headline: str, item: Any, found: str = "", expected: str = "",
             mend: str = "") -> AssemblyError:
        return AssemblyError(kind, headline, getattr(item, "location", None), found, expected, mend)

    def run(self) -> None:
        self.assembly.machine()
        for item in self.instructions():
            problem = item.row.illegal_on(self.target.name)
            if problem is not None:
                problem, _, mend = problem.partition("; instead: ")
                raise self.fail("feature", f"{item.row.mnemonic} is not for {self.target.name}", item, problem,
                                "an instruction of this level", f"write {mend}" if mend else "")
        places = {item.name: place for place, item in enumerate(self.body) if isinstance(item, Label)}
        follow = [self.after(place, places) for place in range(len(self.body))]
        reached = self.reach(follow)
        for place, code in enumerate(self.body):
            if place not in reached and isinstance(code, Instruction):
                raise self.fail("unreachable", "this code is never reached", code, code.row.mnemonic,
                                "a branch to it, or code above that runs on into it")
        self.check_loops(follow)
        states: dict[int, _State] = {0: _State(set(self.assembly.inputs))} if self.body else {}
        pending = [0] if self.body else []
        while pending:
            place = pending.pop()
            state = states[place].copy()
            self.step(place, state)
            for successor in follow[place]:
                if successor not in states:
                    states[successor] = state.copy()
                elif not states[successor].meet(state):
                    continue
                pending.append(successor)
        self.final = True
        for place in sorted(states):
            self.step(place, states[place].copy())

    def pairs(self, item: Instruction) -> list[tuple[Any, Any]]:
        """Each operand with what the form says of it."""
        return list(zip(self.table.operands_of(item.row, len(item.operands)), item.operands, strict=False))

    def instructions(self) -> list[Instruction]:
        return [item for item in self.body if isinstance(item, Instruction)]

    def after(self, place: int, places: dict[str, int]) -> list[int]:
        """Where control goes from a place."""
        item = self.body[place]
        onwards = [place + 1]
        if isinstance(item, Instruction):
            opcode = item.row.row.opcode
            if opcode in self.table.BRANCHES:
                targets = [places[o.name] for o in item.operands if isinstance(o, LabelReference)]
                onwards = targets if item.mask is None else [*targets, place + 1]
            elif opcode in self.table.ENDS and item.mask is None:
                return []
        if len(self.body) in onwards:
            if not self.results:
                last = next(i for i in reversed(self.body) if isinstance(i, Instruction))
                raise self.fail("running-off", f"{self.assembly.name} runs off its end", last, last.row.mnemonic,
                                "ret as the last instruction", "end with ptx.ret()")
            onwards = [p for p in onwards if p < len(self.body)]
        return onwards

    @staticmethod
    def reach(follow: list[list[int]]) -> set[int]:
        seen, pending = {0}, [0]
        while pending and follow:
            for successor in follow[pending.pop()]:
                if successor not in seen:
                    seen.add(successor)
                    pending.append(successor)
        return seen

    def check_loops(self, follow: list[list[int]]) -> None:
        """Each loop must have a branch under a predicate out of it that something in the loop writes; whether its
        condition comes true, the emulator finds."""
        for cycle in cycles_of(list(range(len(follow))), follow):
            inside = set(cycle)
            written = {o for place in cycle if isinstance(item := self.body[place], Instruction)
                       for spec, o in self.pairs(item)
                       if spec.writes and isinstance(o, VirtualRegister)}
            leaves = [item for place in cycle if isinstance(item := self.body[place], Instruction)
                      and item.mask is not None and item.mask in written and not set(follow[place]) <= inside]
            if not leaves:
                last = next(item for p in reversed(cycle) if isinstance(item := self.body[p], Instruction))
                raise self.fail("loop", "this loop can't be shown to end", last, last.row.mnemonic,
                                "a branch out of it under a predicate that a round sets anew",
                                "use a.loop(start, stop, step)")

    def step(self, place: int, state: _State) -> None:
        item = self.body[place]
        if not isinstance(item, Instruction):
            return
        if item.mask is not None:
            self.read(item, item.mask, None, state)
        written: list[Any] = []
        sources: list[Any] = []
        for spec, operand in self.pairs(item):
            parts = operand if isinstance(operand, tuple) else (operand,)
            for part in parts:
                if isinstance(part, Memory):
                    self.memory(item, part, state)
                elif isinstance(part, VirtualRegister):
                    if spec.reads:
                        self.read(item, part, item.mask, state)
                        sources.append(part)
                    if spec.writes:
                        written.append(part)
        points: frozenset[str] = frozenset().union(*(state.points.get(s, frozenset()) for s in sources))
        for register in written:
            if item.mask is None or register in state.whole:
                state.whole.add(register)
            else:
                state.partly.add((register, item.mask))
            # A new value of a predicate: what was written under the old one can't be told apart any more.
            state.partly = {u for u in state.partly if u[1] != register}
            tensor = self.assembly.tensors.get(register)
            found = frozenset({tensor}) if tensor is not None else points
            if item.mask is not None:
                found |= state.points.get(register, frozenset())
            state.points.pop(register, None)
            if found and register.kind != "pred":
                state.points[register] = found
        if self.final and self.results and place == len(self.body) - 1:
            for register in self.results:
                if register not in state.whole:
                    raise self.fail("undefined", "the block leaves its result without a value", item, repr(register),
                                    "a write of it on every path")

    def read(self, item: Instruction, register: Any, under: Any, state: _State) -> None:
        if not self.final or register in state.whole or (under is not None and (register, under) in state.partly):
            return
        some = any(u[0] == register for u in state.partly)
        raise self.fail("undefined", f"{item.row.mnemonic} reads a register that may hold nothing of use", item,
                        "it was written under a predicate only" if some else "nothing was ever put there",
                        "a write on every path to it", "read it under the same predicate, or write it before" if some
                        else "")

    def memory(self, item: Instruction, memory: Memory, state: _State) -> None:
        if memory.label is not None:
            return
        self.read(item, memory.base, item.mask, state)
        if not self.final or not self.table.reaches_global(item.row) or not self.assembly.parameters:
            return
        tensors = state.points.get(memory.base, frozenset())
        if not tensors:
            raise self.fail("footprint", f"{item.row.mnemonic} reaches memory through what is no pointer", item,
                            "an address that no tensor is part of", "a.data(tensor) plus an offset")
        if item.row.row.opcode in self.table.STORES:
            wrong = sorted(tensors - set(self.assembly.stored))
            if wrong:
                raise self.fail("read-only", f"{item.row.mnemonic} stores to {wrong[0]}, which is only read", item,
                                "a store", "a load")
