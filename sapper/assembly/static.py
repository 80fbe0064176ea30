"""What must hold on every path through assembly by hand; each fault is an error at the author's line.

Enters: an `Assembly` before allocation, and a target. Leaves: nothing, or `AssemblyError`.
Holds: one forward walk over the control-flow graph, repeated until nothing changes. The state says of each register
which *values* it may hold (from the caller, an owner's, an instruction's, none), where it may point, which
instruction's flags are up, how deep the stack is and what lies on it. A path that never runs counts like one that does.

Checked: features of the target; unreachable code; loops that can't be shown to end; undefined and stale registers;
pinned values overwritten; flags; stack depth and alignment at calls; registers that the caller relies on; MXCSR;
vzeroupper; memory through what is no pointer, stores to what may only be read; footprint.py shows that addresses stay
inside their regions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..codegen.liveness import (
    READ,
    RETURN,
    WRITE,
    AllocationError,
    blocks_of,
    facts_table,
    is_idiom,
)
from ..codegen.machine import Immediate, Instruction, Label, Memory, Register, VirtualRegister
from ..ir.nodes import Location
from .build import Assembly, Region
from .errors import AssemblyError
from .footprint import Footprint
from .loops import Loops

STACK = Region("the stack", True)
CONSTANTS = Region("constants", False)

Token = tuple[Any, ...]
"""A value: ("entry", register), ("input",), ("made", owner or None, instruction), ("gone", why, instruction), ("low",
bits, instruction): only so many bits were written, where nothing was before."""

_CALLERS: frozenset[Any] = frozenset({None})
_NOTHING: frozenset[Token] = frozenset({("gone", "nothing was ever put there", None)})


def check_static(assembly: Assembly, target: Any, waived: frozenset[str] = frozenset()) -> None:
    """Raise AssemblyError for the first thing that is wrong. waived: what is not checked: "loop", where it is another
    thread or the data that ends one, "footprint", where memory holds the addresses of memory."""
    _Checker(assembly, target, waived).run()


def shown(assembly: Assembly, target: Any) -> tuple[list[Instruction], list[Instruction]]:
    """The accesses that are shown to stay inside their regions whatever the extents are, and those that depend on what
    is not known before the code runs. Raises AssemblyError like check_static."""
    checker = _Checker(assembly, target)
    checker.run()
    return list(checker.footprint.shown), list(checker.footprint.unknown)


def accessed_regions(assembly: Assembly, target: Any) -> list[tuple[Instruction, Any, str]]:
    """Each access to memory as (instruction, operand of its row, name of a region that it may reach).

    Raises AssemblyError like check_static.
    """
    checker = _Checker(assembly, target)
    checker.run()
    return checker.accessed


@dataclass(slots=True)
class _State:
    """values: of each register, and of stack slots by their depth. points: where registers and slots may point.

    flags: for each flag the instructions that may have set it; None for the caller, ("lost", item) for one that leaves
    it undefined. depth: bytes below the entry stack pointer.
    stack: bytes below the entry stack pointer that were written, counted downwards from 1; None where all may be.
    wide: the instructions that last left upper halves full. modes: MXCSR's values; saved: those stored at an address.
    """

    values: dict[Any, frozenset[Token]] = field(default_factory=dict)
    points: dict[Any, frozenset[Region]] = field(default_factory=dict)
    flags: dict[str, frozenset[Any]] = field(default_factory=dict)
    depth: int = 0
    stack: frozenset[int] | None = frozenset()
    wide: Instruction | None = None
    modes: frozenset[Instruction | None] = frozenset({None})
    saved: dict[Any, frozenset[Instruction | None]] = field(default_factory=dict)

    def copy(self) -> _State:
        return _State(dict(self.values), dict(self.points), dict(self.flags), self.depth, self.stack, self.wide,
                      self.modes, dict(self.saved))

    def where(self, operand: Any) -> frozenset[Region]:
        """Where a register may point; nowhere, for what is none."""
        is_register = isinstance(operand, (Register, VirtualRegister))
        return self.points.get(operand, frozenset()) if is_register else frozenset()

    def meet(self, other: _State) -> bool:
        """Take in what another path brings; whether that was new."""
        changed = False
        for key in [*self.values, *(k for k in other.values if k not in self.values)]:
            both = self.values.get(key, _NOTHING) | other.values.get(key, _NOTHING)
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
            setters = self.flags.get(flag, _CALLERS) | other.flags.get(flag, _CALLERS)
            if setters != self.flags.get(flag):
                self.flags[flag] = setters
                changed = True
        if self.modes | other.modes != self.modes:
            self.modes, changed = self.modes | other.modes, True
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


class _Checker:
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
        self.flags_used: set[Instruction] = set()
        self.lost_to: dict[Instruction, Instruction] = {}
        self.final = False
        self.accessed: list[tuple[Instruction, Any, str]] = []

    def fail(self, kind: str, headline: str, item: Any, found: str = "", expected: str = "",
             mend: str = "") -> AssemblyError:
        location = item.location if isinstance(item, Instruction) else None
        return AssemblyError(kind, headline, location, found, expected, mend)

    # --- The walk ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        self.assembly.machine()
        self.check_features()
        try:
            self.starts, self.follow = blocks_of(self.body, self.abi)
        except AllocationError as error:
            last = next((i for i in reversed(self.body) if isinstance(i, Instruction)), None)
            raise self.fail("running-off", f"{self.assembly.name}: {error}", last) from None
        self.check_reachable()
        graph = self.assembly, self.starts, self.follow, self.writes_of
        loops = Loops(*graph)
        if "loop" not in self.waived:
            loops.check()
        self.footprint = Footprint(*graph, loops.equalities)
        states: list[_State | None] = [None] * len(self.follow)
        states[0] = self.entry()
        pending = [0]
        while pending:
            block = min(pending)
            pending.remove(block)
            start = states[block]
            assert start is not None
            left = self.block(block, start.copy())
            for successor in self.follow[block]:
                known = states[successor]
                state = left.copy()
                if known is None:
                    states[successor] = state
                    changed = True
                else:
                    if known.depth != state.depth:
                        raise self.fail("stack", "paths meet with different stack depths", self.first(successor),
                                        f"{state.depth} and {known.depth} bytes", "the same depth on every path")
                    changed = known.meet(state)
                if changed and successor not in pending:
                    pending.append(successor)
        # Errors are raised only now, from the states that hold on every path, so that their wording does not depend
        # on the order in which paths were walked.
        self.final = True
        for block, reached in enumerate(states):
            if reached is not None:
                self.block(block, reached.copy())
        self.check_comparisons()
        if "footprint" not in self.waived:
            self.footprint.run()

    def writes_of(self, item: Instruction) -> list[Any]:
        return self.accesses(item, self.facts[item.row])[1]

    def first(self, block: int) -> Instruction | None:
        for place in range(self.starts[block], self.starts[block + 1]):
            item = self.body[place]
            if isinstance(item, Instruction):
                return item
        return None

    def entry(self) -> _State:
        state = _State()
        for register in self.saved:
            state.values[register] = frozenset({("entry", register)})
        for register, region in self.assembly.inputs.items():
            state.values[register] = frozenset({("input",)})
            if region is not None:
                state.points[register] = frozenset({region})
        state.values[self.stack] = frozenset({("input",)})
        return state

    def block(self, block: int, state: _State) -> _State:
        for place in range(self.starts[block], self.starts[block + 1]):
            item = self.body[place]
            if isinstance(item, Instruction):
                self.step(item, state)
        return state

    # --- One instruction --------------------------------------------------------------------------------------------

    def step(self, item: Instruction, state: _State) -> None:
        facts = self.facts[item.row]
        reads, writes = self.accesses(item, facts)
        restored = self.restored(item, state)
        saving = self.moves_stack(item, state)
        for register, bits in reads:
            if not (saving and register in self.saved):
                self.check_read(item, register, bits, state)
        self.read_flags(item, state)
        self.check_memory(item, state)
        places = self.pointed(item, state)
        if facts.flow == RETURN:
            self.leave(item, state)
        if item.row.control == "call":
            self.call(item, state)
        owners = self.assembly.owners.get(item, {})
        for register in writes:
            explicit = register in owners
            low = self.low_bits(item, register, state)
            made: Token = ("low", low, item) if low else ("made", owners.get(register) if explicit else None, item)
            state.values[register] = frozenset({made})
            state.points.pop(register, None)
        if places is not None and writes:
            state.points[writes[0]] = places
        if restored is not None:
            state.values[writes[0]], state.points[writes[0]] = restored
        self.track_stack(item, state)
        self.write_flags(item, state)
        self.track_modes(item, state, writes)

    def read_flags(self, item: Instruction, state: _State) -> None:
        only_saved = item.row.name in self.table.STACK
        for flag in item.row.flags_read:
            for setter in state.flags.get(flag, _CALLERS):
                if only_saved and not isinstance(setter, Instruction):
                    continue
                if setter is None and self.final:
                    raise self.fail("flags", f"{item.row.mnemonic} reads flags that nothing has set on some path", item,
                                    f"{flag}f of the caller, or of before a call", "a comparison on every path to it")
                if isinstance(setter, tuple) and self.final:
                    why = {"lost": "leaves undefined", "address": "sets by where an address lies"}[setter[0]]
                    raise self.fail("flags", f"{item.row.mnemonic} reads a flag that says nothing", item,
                                    f"{flag}f, which {setter[1].row.mnemonic} at {_at(setter[1])} {why}",
                                    "a comparison between the two")
                if isinstance(setter, Instruction):
                    self.flags_used.add(setter)

    def write_flags(self, item: Instruction, state: _State) -> None:
        """Flags that the manual leaves undefined after an instruction are lost; those that it leaves alone are kept."""
        defined = self.table.flags_defined(item.row) if item.row.flags_written else ""
        pointer = (bool(item.operands) and item.row.mnemonic in self.table.STEPS
                   and (item.operands[0] == self.stack or bool(state.where(item.operands[0]))))
        for flag in item.row.flags_written:
            for before in state.flags.get(flag, _CALLERS):
                if isinstance(before, Instruction):
                    self.lost_to.setdefault(before, item)
            state.flags[flag] = frozenset({
                ("lost", item) if flag not in defined else ("address", item) if pointer else item})

    def low_bits(self, item: Instruction, register: Any, state: _State) -> int:
        """How many bits of a general register an instruction gives it, where it leaves the others as they were and
        nothing was there; else 0."""
        for spec, operand in zip(item.row.operands, item.operands, strict=True):
            if operand == register and spec.kind == "gpr" and spec.writes and spec.bits < 32:
                before = state.values.get(register, _NOTHING)
                if any(token[0] == "gone" for token in before):
                    return int(spec.bits)
                return max((token[1] for token in before if token[0] == "low"), default=0)
        return 0

    def accesses(self, item: Instruction, facts: Any) -> tuple[list[tuple[Any, int]], list[Any]]:
        """Registers read, with the bits that are, and registers written; implied ones included."""
        reads: list[tuple[Any, int]] = []
        writes: list[Any] = []
        constant = is_idiom(item, facts)
        merging = item.mask is not None and not item.zeroing and facts.merges
        for how, bits, operand in zip(facts.access, facts.bits, item.operands, strict=True):
            if isinstance(operand, (Register, VirtualRegister)):
                if not constant and (how & READ or (how & WRITE and merging)):
                    reads.append((operand, bits))
                if how & WRITE:
                    writes.append(operand)
            elif isinstance(operand, Memory):
                reads += [(part, 64) for part in (operand.base, operand.index) if part is not None]
        if item.mask is not None:
            reads.append((item.mask, 64))
            if facts.mask_access & WRITE:
                writes.append(item.mask)
        implied = self.table.READS_AT_LEAST.get(item.row.name, facts.reads)
        reads += [(Register(*pair), 64) for pair in implied if pair != self.table.STACK_POINTER]
        writes += [Register(*pair) for pair in facts.writes if pair != self.table.STACK_POINTER]
        return reads, writes

    def check_read(self, item: Instruction, register: Any, bits: int, state: _State) -> None:
        if not self.final:
            return
        name = self.name(register)
        owner = self.assembly.owners.get(item, {}).get(register)
        for token in sorted(state.values.get(register, _NOTHING), key=_order):
            if token[0] == "gone":
                raise self.fail("undefined", f"{item.row.mnemonic} reads {name}, which may hold nothing of use", item,
                                _gone(token), "a write on every path to it", "write it first, or declare it as input")
            if token[0] == "low" and token[1] < bits:
                raise self.fail("undefined", f"{item.row.mnemonic} reads {bits} bits of {name}, whose upper ones hold "
                                "nothing of use", item, f"{token[1]} bits, written by {token[2].row.mnemonic} at "
                                f"{_at(token[2])}", "a write of the whole register", "clear it before, or movzx")
            if token[0] == "entry":
                raise self.fail("undefined", f"{item.row.mnemonic} reads {name}, which holds the caller's value", item,
                                "no write before it", "a write first")
            if owner is not None and token[0] == "made" and token[1] is not owner:
                raise self.fail("clobber", f"{name} no longer holds what was put there", item,
                                f"overwritten by {token[2].row.mnemonic} at {_at(token[2])}",
                                "the pinned value", "take another register, or save the value")

    def name(self, register: Any) -> str:
        if isinstance(register, VirtualRegister):
            return repr(register)
        names = (n for n, (kind, number, _) in self.table.REGISTERS.items()
                 if (kind, number) == (register.kind, register.number))
        return next(names, str(register))

    # --- Stack, calls, returns --------------------------------------------------------------------------------------

    def moves_stack(self, item: Instruction, state: _State) -> bool:
        """Follow the stack pointer. True for an instruction that only puts a register on the stack, or takes it off."""
        row = item.row
        moved = self.table.STACK.get(row.name)
        target = item.operands[0] if item.operands else None
        if moved is None and target == self.stack and self.facts[row].access[0] & WRITE:
            amount = item.operands[1] if len(item.operands) > 1 else None
            if isinstance(amount, Memory) and (amount.base, amount.index, row.mnemonic) == (self.stack, None, "lea"):
                call = self.assembly.returns.get(item)
                place = ("slot", state.depth)
                if self.final and call is not None and state.values.get(place) != frozenset({("made", None, call)}):
                    raise self.fail("stack", "a routine returns with an unbalanced stack", item,
                                    "something else than the return address", "the depth at its call")
                self.shift(item, state, -amount.disp)
                if amount.disp < 0:
                    state.values["slot", state.depth] = frozenset({("made", None, item)})
                return False
            if row.mnemonic == "and" and isinstance(amount, Immediate) and amount.value < 0:
                self.realign(item, state, -amount.value)
                return False
            if row.mnemonic not in ("sub", "add") or not isinstance(amount, Immediate):
                raise self.fail("stack", "the stack pointer is changed in a way that can't be followed", item,
                                row.mnemonic, "push, pop, sub rsp, n, add rsp, n, lea rsp, [rsp + n], and rsp, -n")
            moved = amount.value if row.mnemonic == "sub" else -amount.value
            self.shift(item, state, moved)
            return False
        if moved is not None:
            self.shift(item, state, moved)
            if moved < 0:
                return True
            mine: frozenset[Token] = frozenset({("made", None, item)})
            is_register = isinstance(target, Register)
            state.values[("slot", state.depth)] = state.values.get(target, _NOTHING) if is_register else mine
            state.points[("slot", state.depth)] = state.where(target)
            return True
        if row.mnemonic in self.table.MOVES and len(item.operands) == 2:
            source = item.operands[1]
            if isinstance(target, Memory) and target.base == self.stack and target.index is None:
                place = ("slot", state.depth - target.disp)
                is_register = isinstance(source, Register) and row.operands[1].bits == 64
                state.values[place] = state.values.get(source, _NOTHING) if is_register else \
                    frozenset({("made", None, item)})
                state.points[place] = state.where(source) if is_register else frozenset()
                return is_register
        for spec, operand in zip(row.operands, item.operands, strict=True):
            if isinstance(operand, Memory) and self.stack in (operand.base, operand.index) and spec.writes:
                over = self.bytes_of(spec, operand, state) if operand.index is None else None
                for place in [p for p in state.values if type(p) is tuple]:
                    if over is None or (place[1] - 8 < over.stop - 1 and over.start <= place[1]):
                        state.values[place] = frozenset({("made", None, item)})
                        state.points[place] = frozenset()
        return False

    def realign(self, item: Instruction, state: _State, align: int) -> None:
        """The stack pointer goes down to a multiple: how far is not known, so that the function can't return, and what
        lay on the stack is not found any more."""
        self.shift(item, state, (-state.depth - 8) % align)
        state.stack = None
        for place in [p for p in state.values if type(p) is tuple]:
            del state.values[place]

    def shift(self, item: Instruction, state: _State, moved: int) -> None:
        if not self.assembly.naked:
            raise self.fail("stack", "only a naked function moves the stack pointer", item, item.row.mnemonic,
                            "virtual registers, which spill by themselves", "Assembly(naked=True)")
        state.depth += moved
        if state.depth < 0:
            raise self.fail("stack", "the stack pointer rises above the return address", item,
                            f"{-state.depth} bytes above it", "as many bytes pushed as popped")

    def restored(self, item: Instruction, state: _State) -> tuple[frozenset[Token], frozenset[Region]] | None:
        """What an instruction takes off the stack into its first operand, None if it takes nothing that is known."""
        if self.table.STACK.get(item.row.name, 0) < 0:
            place = ("slot", state.depth)
            if not item.operands:
                self.flags_from(item, state.values.get(place, _NOTHING))
                return None
        else:
            source = item.operands[1] if len(item.operands) == 2 else None
            if (item.row.mnemonic not in self.table.MOVES or not isinstance(source, Memory)
                    or source.base != self.stack or source.index is not None):
                return None
            place = ("slot", state.depth - source.disp)
        values = state.values.get(place)
        return None if values is None else (values, state.points.get(place, frozenset()))

    def flags_from(self, item: Instruction, values: frozenset[Token]) -> None:
        """popfq sets more than the flags of a comparison: the direction flag must be what it was."""
        saved = all(token[0] == "made" and token[2] is not None and token[2].row.name in self.table.STACK
                    and token[2].row.flags_read for token in values)
        if self.final and not saved:
            raise self.fail("state", f"{item.row.mnemonic} may leave the direction flag changed", item,
                            "a word that is not known to be of the flags", "what pushfq saved")

    def leave(self, item: Instruction, state: _State) -> None:
        if not self.assembly.naked or not self.final:
            self.leave_modes(item, state)
            return
        if state.depth:
            raise self.fail("stack", "the function returns with an unbalanced stack", item, f"{state.depth} bytes left",
                            "the depth of entry", f"pop, or add rsp, {state.depth}")
        for register in self.saved:
            if state.values.get(register) != frozenset({("entry", register)}):
                raise self.fail("callee-saved", f"{self.name(register)} is not restored before the return", item,
                                "a changed register", "what it held at entry", "push it first and pop it here")
        if state.wide is not None:
            raise self.fail("mixing", "the function returns with upper halves in use", item,
                            f"{state.wide.row.name} at {_at(state.wide)}", "vzeroupper before the return",
                            "the caller's SSE code would be slow otherwise")
        self.leave_modes(item, state)

    def leave_modes(self, item: Instruction, state: _State) -> None:
        changed = [m for m in state.modes if m is not None]
        if changed and self.final:
            raise self.fail("state", "the function returns with MXCSR changed", item,
                            f"vldmxcsr at {_at(changed[0])}", "the caller's mode", "store it first and load it here")

    def call(self, item: Instruction, state: _State) -> None:
        if not self.assembly.naked:
            raise self.fail("stack", "a call out of a function whose frame is made for it", item, "call",
                            "a naked function", "Assembly(naked=True)")
        if self.final and (state.depth + 8) % self.table.STACK_ALIGN_BYTES:
            raise self.fail("stack", "a call with a misaligned stack", item, f"{state.depth} bytes pushed",
                            f"8 more than a multiple of {self.table.STACK_ALIGN_BYTES}", "sub rsp, 8 before it")
        if self.final and state.wide is not None:
            raise self.fail("mixing", "a call with upper halves in use", item, f"{state.wide.row.name} at "
                            f"{_at(state.wide)}", "vzeroupper before the call")
        kept = {*self.saved, self.stack}
        gone = frozenset({("gone", "a call destroys it", item)})
        if state.stack is not None:
            state.stack = frozenset(byte for byte in state.stack if byte <= state.depth)
        for register in list(state.values):
            below = type(register) is tuple and register[1] > state.depth
            if below or (isinstance(register, Register) and register not in kept):
                state.values[register] = gone
                state.points.pop(register, None)
        state.values[Register(*self.table.RESULT)] = frozenset({("made", None, item)})
        state.flags = {}

    # --- Upper halves, MXCSR ----------------------------------------------------------------------------------------

    def track_modes(self, item: Instruction, state: _State, writes: list[Any]) -> None:
        name = item.row.name
        if name == "vzeroupper":
            state.wide = None
            gone = frozenset({("gone", "vzeroupper cleared its upper half", item)})
            for register, tokens in state.values.items():
                if type(register) is not tuple and register.kind == "vec" and any(
                        token[0] != "made" or _is_wide(token[2]) for token in tokens):
                    state.values[register] = gone
        elif _is_wide(item):
            state.wide = item
        if name == "vstmxcsr":
            state.saved[_address(item.operands[0])] = state.modes
        elif name == "vldmxcsr":
            state.modes = state.saved.get(_address(item.operands[0]), frozenset({item}))
        elif state.saved:
            stored = [(o, spec.memory_bits // 8) for spec, o in zip(item.row.operands, item.operands, strict=True)
                      if isinstance(o, Memory) and spec.writes]
            for address in list(state.saved):
                if address[0] in writes or any(self.may_meet(address, memory, size) for memory, size in stored):
                    del state.saved[address]

    def may_meet(self, address: tuple[Any, ...], memory: Memory, bytes_: int) -> bool:
        """Whether a store may lie over the four bytes of MXCSR that were kept at an address."""
        base, index, scale, disp, label = address
        if label is not None or memory.label is not None:
            return bool(label == memory.label)
        if (base, index, scale) == (memory.base, memory.index, memory.scale):
            return bool(memory.disp < disp + 4 and disp < memory.disp + bytes_)
        return bool((base == self.stack) == (memory.base == self.stack))

    def track_stack(self, item: Instruction, state: _State) -> None:
        """Which bytes below the entry stack pointer hold something; any may, once a register has its address."""
        if state.stack is None:
            return
        row, operands = item.row, item.operands
        if self.table.STACK.get(row.name, 0) > 0:
            state.stack |= frozenset(range(state.depth - 7, state.depth + 1))
        for spec, operand in zip(row.operands, operands, strict=True):
            if isinstance(operand, Memory) and self.stack in (operand.base, operand.index):
                if spec.role == "a" and row.mnemonic != "lea":
                    continue
                if row.mnemonic == "lea" and operands[0] == self.stack:
                    continue
                if row.mnemonic == "lea" or (spec.writes and operand.index is not None):
                    state.stack = None
                    return
                if spec.writes:
                    state.stack |= frozenset(self.bytes_of(spec, operand, state))
        if row.mnemonic in self.table.MOVES and operands[1] == self.stack:
            state.stack = None

    @staticmethod
    def bytes_of(spec: Any, memory: Memory, state: _State) -> range:
        """The bytes of an access on the stack, counted downwards from the entry stack pointer."""
        first = state.depth - memory.disp
        return range(first - spec.memory_bits // 8 + 1, first + 1)

    def check_stack(self, item: Instruction, spec: Any, memory: Memory, state: _State) -> None:
        """An access through the stack pointer."""
        name = item.row.mnemonic
        if not self.assembly.naked:
            raise self.fail("stack", f"{name} reaches into the frame, which is made for the function", item,
                            f"byte {memory.disp} from the stack pointer on", "virtual registers, which spill by "
                            "themselves", "hold it in a register, or write the frame: Assembly(naked=True)")
        if spec.role == "a":
            return
        if memory.index is None and memory.disp < -self.table.RED_ZONE_BYTES:
            raise self.fail("stack", f"{name} reaches below the red zone, where a signal may write", item,
                            f"byte {memory.disp} from the stack pointer on",
                            f"at most {self.table.RED_ZONE_BYTES} bytes below it", "sub rsp, n first")
        if spec.reads and memory.index is None and state.stack is not None and item.mask is None:
            missing = [b for b in self.bytes_of(spec, memory, state) if b > 0 and b not in state.stack]
            if missing:
                why = "a call destroys what lies below the stack pointer" if missing[0] > state.depth else \
                    "nothing was put there on some path"
                raise self.fail("undefined", f"{name} reads bytes of the stack that hold nothing of use", item,
                                f"byte {memory.disp} from the stack pointer on: {why}", "a store on every path to it",
                                "store it first")

    # --- Memory -----------------------------------------------------------------------------------------------------

    def places_of(self, memory: Memory, state: _State) -> frozenset[Region]:
        """Where an address may lie."""
        if memory.label is not None:
            return frozenset({CONSTANTS})
        found: set[Region] = set()
        if self.stack in (memory.base, memory.index):
            found.add(STACK)
        for part in (memory.base, memory.index):
            found |= state.points.get(part, frozenset())
        return frozenset(found)

    def check_memory(self, item: Instruction, state: _State) -> None:
        if not self.final:
            return
        for spec, operand in zip(item.row.operands, item.operands, strict=True):
            if isinstance(operand, Memory) and self.stack in (operand.base, operand.index):
                self.check_stack(item, spec, operand, state)
            if not isinstance(operand, Memory) or spec.role == "a":
                continue
            if spec.writes and operand.base == self.stack and operand.index is None \
                    and operand.disp + spec.memory_bits // 8 > state.depth:
                raise self.fail("stack", f"{item.row.mnemonic} stores over the return address or above it", item,
                                f"byte {operand.disp} from the stack pointer on", f"bytes below {state.depth}")
            places = self.places_of(operand, state)
            if not places and "footprint" not in self.waived:
                raise self.fail("footprint", f"{item.row.mnemonic} reaches memory through what is no pointer", item,
                                "an address that no declared region is part of", "a declared pointer plus an offset",
                                "declare the pointer: a.input(register, Region(...))")
            bytes_ = (spec.broadcast_bits if operand.broadcast else spec.memory_bits) // 8
            if operand.label is not None and operand.index is None:
                held = len(self.assembly.constants[operand.label][1])
                if not 0 <= operand.disp <= held - bytes_:
                    raise self.fail("footprint", f"{item.row.mnemonic} reaches outside a constant", item,
                                    f"bytes {operand.disp} to {operand.disp + bytes_ - 1}", f"{held} bytes")
            for region in sorted(places, key=lambda region: region.name):
                self.accessed.append((item, spec, region.name))
                if spec.writes and not region.writable:
                    raise self.fail("read-only", f"{item.row.mnemonic} stores to {region.name}, which is only read",
                                    item, "a store", "a load", "declare it writable if it is an output")

    def pointed(self, item: Instruction, state: _State) -> frozenset[Region] | None:
        """Where the register that the instruction writes points afterwards; None: nowhere that is known."""
        row, operands = item.row, item.operands
        if not operands or not isinstance(operands[0], (Register, VirtualRegister)):
            return None
        source: Any = operands[-1]
        if row.mnemonic in self.table.MOVES:
            if isinstance(source, (Register, VirtualRegister)):
                return frozenset({STACK}) if source == self.stack else state.points.get(source)
            if isinstance(source, Memory) and source.index is None:
                region = self.assembly.words.get(source.base, {}).get(source.disp)
                return None if region is None else frozenset({region})
            return None
        if row.mnemonic == "lea":
            return self.places_of(source, state) or None
        if row.mnemonic in ("add", "sub", "inc", "dec"):
            mine = state.where(operands[0])
            if len(operands) > 1:
                other = state.where(source)
                if row.mnemonic == "sub" and other:
                    return None  # how far apart two addresses are
                mine |= other
            return mine or None
        if row.mnemonic == "and":
            return state.points.get(operands[0])
        if row.mnemonic.startswith("cmov"):
            return (state.where(operands[0]) | state.where(source)) or None
        return None

    # --- The graph --------------------------------------------------------------------------------------------------

    def check_features(self) -> None:
        for item in self.body:
            if isinstance(item, Label):
                continue
            evex = item.mask is not None or any(
                (isinstance(o, Memory) and o.broadcast) or (isinstance(o, Register) and o.kind == "vec"
                                                            and o.number > 15) for o in item.operands)
            if not self.table.legal_encodings(item.row, self.features, evex):
                raise self.fail("feature", f"{item.row.mnemonic} needs what {self.target.name} lacks", item,
                                self.missing(item, evex, self.features), ", ".join(sorted(self.features)))
            declared = self.assembly.features
            if declared is not None:
                granted = self.table.with_implied(declared)
                if not self.table.legal_encodings(item.row, granted, evex):
                    raise self.fail("feature", f"{item.row.mnemonic} needs a feature that is not declared", item,
                                    self.missing(item, evex, granted), " ".join(sorted(declared)),
                                    "add it to features, or write it otherwise")

    @staticmethod
    def missing(item: Instruction, evex: bool, features: frozenset[str]) -> str:
        needed = item.row.evex_features if evex else item.row.features
        return ", ".join(sorted((needed or frozenset()) - features)) or "an EVEX encoding"

    def check_reachable(self) -> None:
        seen = {0}
        pending = [0]
        while pending:
            for successor in self.follow[pending.pop()]:
                if successor not in seen:
                    seen.add(successor)
                    pending.append(successor)
        for block in range(len(self.follow)):
            if block not in seen and (item := self.first(block)) is not None:
                raise self.fail("unreachable", "this code is never reached", item, item.row.mnemonic,
                                "a jump to it, or code above that runs on into it", "delete it")

    def check_comparisons(self) -> None:
        for item in self.body:
            if isinstance(item, Instruction) and item.row.mnemonic in self.table.COMPARISONS \
                    and item not in self.flags_used:
                lost = self.lost_to.get(item)
                raise self.fail("flags", f"the flags of {item.row.mnemonic} are never read", item,
                                f"{lost.row.mnemonic} at {_at(lost)} sets them anew" if lost else "no reader",
                                "a reader before anything else sets the flags", "move the comparison down to its user")


def _is_wide(item: Instruction) -> bool:
    """Whether an instruction writes more than 128 bits of a vector register."""
    return any(spec.kind == "vec" and spec.writes and spec.bits > 128 and not isinstance(operand, Memory)
               for spec, operand in zip(item.row.operands, item.operands, strict=True))


def _address(operand: Any) -> tuple[Any, ...]:
    return operand.base, operand.index, operand.scale, operand.disp, operand.label


def _at(item: Instruction) -> str:
    location: Location | None = item.location
    return f"line {location.line}" if location is not None else "a place without a line"


def _gone(token: Token) -> str:
    return f"{token[1]}" + (f" ({_at(token[2])})" if token[2] is not None else "")


def _text(item: Any) -> str:
    return item.name if isinstance(item, Label) else str(item.row.mnemonic)


def _order(token: Token) -> tuple[int, int]:
    """What a message names first: nothing, then the caller's, then by line."""
    item = token[2] if len(token) > 2 else None
    line = item.location.line if item is not None and item.location is not None else 0
    return ["gone", "low", "entry", "input", "made"].index(token[0]), line
