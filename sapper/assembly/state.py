"""What the static checks know at a place of assembly by hand, and what they have in common.

Enters: an `Assembly`, a target. Leaves: `State`, what may hold on the paths to a place; `Checked`, the errors and names
of registers of a checker. Holds: states only grow where paths meet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..codegen.machine import Instruction, Register, VirtualRegister
from ..codegen.row_facts import facts_table
from ..ir.nodes import Location
from .build import Assembly, Region
from .errors import AssemblyError

STACK = Region("the stack", True)
CONSTANTS = Region("constants", False)

Token = tuple[Any, ...]
"""A value: ("entry", register), ("input",), ("made", owner or None, instruction), ("gone", why, instruction), ("low",
bits, instruction): only so many bits were written, where nothing was before."""

CALLERS: frozenset[Any] = frozenset({None})
NOTHING: frozenset[Token] = frozenset({("gone", "nothing was ever put there", None)})


@dataclass(slots=True)
class State:
    """values: of each register, and of stack slots by their depth. points: where registers and slots may point.

    flags: for each flag the instructions that may have set it; None for the caller, ("lost", item) for one that leaves
    it undefined. depth: bytes below the entry stack pointer.
    stack: bytes below the entry stack pointer that were written, counted downwards from 1; None where all may be.
    wide: the instructions that last left upper halves full. modes: MXCSR's values; saved: those stored at an address.
    tiles: their configurations: None for none, else (the shapes, None if they are not known; the instruction).
    """

    values: dict[Any, frozenset[Token]] = field(default_factory=dict)
    points: dict[Any, frozenset[Region]] = field(default_factory=dict)
    flags: dict[str, frozenset[Any]] = field(default_factory=dict)
    depth: int = 0
    stack: frozenset[int] | None = frozenset()
    wide: Instruction | None = None
    modes: frozenset[Instruction | None] = frozenset({None})
    saved: dict[Any, frozenset[Instruction | None]] = field(default_factory=dict)
    tiles: frozenset[Any] = CALLERS

    def copy(self) -> State:
        return State(dict(self.values), dict(self.points), dict(self.flags), self.depth, self.stack, self.wide,
                     self.modes, dict(self.saved), self.tiles)

    def where(self, operand: Any) -> frozenset[Region]:
        """Where a register may point; nowhere, for what is none."""
        is_register = isinstance(operand, (Register, VirtualRegister))
        return self.points.get(operand, frozenset()) if is_register else frozenset()

    def meet(self, other: State) -> bool:
        """Take in what another path brings; whether that was new."""
        changed = False
        for key in [*self.values, *(k for k in other.values if k not in self.values)]:
            both = self.values.get(key, NOTHING) | other.values.get(key, NOTHING)
            if both != self.values.get(key):
                self.values[key] = both
                changed = True
        for key, places in other.points.items():
            mine = self.points.get(key)
            both_places = places if mine is None else mine | places
            if both_places != mine:
                self.points[key] = both_places
                changed = True
        for flag in dict.fromkeys([*self.flags, *other.flags]):
            setters = self.flags.get(flag, CALLERS) | other.flags.get(flag, CALLERS)
            if setters != self.flags.get(flag):
                self.flags[flag] = setters
                changed = True
        if self.modes | other.modes != self.modes:
            self.modes, changed = self.modes | other.modes, True
        if self.tiles | other.tiles != self.tiles:
            self.tiles, changed = self.tiles | other.tiles, True
        for key in list(self.saved):
            both_modes = self.saved[key] | other.saved.get(key, frozenset())
            if both_modes != self.saved[key] or key not in other.saved:
                changed = True
                if key in other.saved:
                    self.saved[key] = both_modes
                else:
                    del self.saved[key]
        if other.stack is not None and (self.stack is None or not self.stack <= other.stack):
            self.stack, changed = other.stack if self.stack is None else self.stack & other.stack, True
        if self.wide is None and other.wide is not None:
            self.wide, changed = other.wide, True
        return changed


class Checked:
    """A piece under check. final: the states hold on every path now, so that errors may be raised."""

    def __init__(self, assembly: Assembly, target: Any, waived: frozenset[str] = frozenset()) -> None:
        self.assembly = assembly
        self.waived = waived
        self.table = assembly.table
        self.features = frozenset(target.features)
        self.target = target
        self.abi = self.table.register_file(target)
        self.facts = facts_table(self.abi)
        self.body = assembly.body
        self.stack = Register(*self.table.STACK_POINTER)
        self.saved = [Register(*pair) for pair in self.table.CALLEE_SAVED]
        self.final = False

    def fail(self, kind: str, headline: str, item: Any, found: str = "", expected: str = "",
             mend: str = "") -> AssemblyError:
        location = item.location if isinstance(item, Instruction) else None
        return AssemblyError(kind, headline, location, found, expected, mend)

    def name(self, register: Any) -> str:
        if isinstance(register, VirtualRegister):
            return repr(register)
        names = (n for n, (kind, number, _) in self.table.REGISTERS.items()
                 if (kind, number) == (register.kind, register.number))
        return next(names, str(register))


def at(item: Instruction) -> str:
    location: Location | None = item.location
    return f"line {location.line}" if location is not None else "a place without a line"


def gone(token: Token) -> str:
    return f"{token[1]}" + (f" ({at(token[2])})" if token[2] is not None else "")


def order(token: Token) -> tuple[int, int]:
    """What a message names first: nothing, then the caller's, then by line."""
    item = token[2] if len(token) > 2 else None
    line = item.location.line if item is not None and item.location is not None else 0
    return ["gone", "low", "entry", "input", "made"].index(token[0]), line
