"""What must hold on every path through assembly by hand; each fault is an error at the author's line.

Enters: an `Assembly` before allocation, and a target. Leaves: nothing, or `AssemblyError`.
Holds: one forward walk over the control-flow graph, repeated until nothing changes. The state (state.py) says of each
register which *values* it may hold (from the caller, an owner's, an instruction's, none), where it may point, which
instruction's flags are up, how deep the stack is and what lies on it. A path that never runs counts like one that does.

Checked, here or in conventions.py: features of the target; unreachable code; loops that can't be shown to end;
undefined and stale registers; pinned values overwritten; flags; stack depth and alignment at calls; registers that the
caller relies on; MXCSR; vzeroupper; tiles (tiles.py); memory through what is no pointer, stores to what may only be
read; footprint.py shows that addresses stay inside their regions.
"""

from __future__ import annotations

from typing import Any

from ..codegen.liveness import blocks_of
from ..codegen.machine import Instruction, Label, Memory, Register, VirtualRegister
from ..codegen.row_facts import READ, RETURN, WRITE, AllocationError, is_idiom
from .build import Assembly, Region
from .conventions import Conventions
from .footprint import Footprint
from .loops import Loops
from .state import CALLERS, CONSTANTS, NOTHING, STACK, State, Token, at, gone, order


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


class _Checker(Conventions):
    """flags_used, lost_to: comparisons that somebody reads, and what set their flags anew. accessed: see
    accessed_regions."""

    def __init__(self, assembly: Assembly, target: Any, waived: frozenset[str] = frozenset()) -> None:
        super().__init__(assembly, target, waived)
        self.flags_used: set[Instruction] = set()
        self.lost_to: dict[Instruction, Instruction] = {}
        self.accessed: list[tuple[Instruction, Any, str]] = []

    # --- The walk ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        self.assembly.machine()
        if not any(isinstance(item, Instruction) for item in self.body):
            raise self.fail("running-off", f"{self.assembly.name} has no instruction", None, "no code")
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
        self.footprint = Footprint(*graph, loops.equalities, self.shapes)
        states: list[State | None] = [None] * len(self.follow)
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

    def entry(self) -> State:
        state = State()
        for register in self.saved:
            state.values[register] = frozenset({("entry", register)})
        for register, region in self.assembly.inputs.items():
            state.values[register] = frozenset({("input",)})
            if region is not None:
                state.points[register] = frozenset({region})
        state.values[self.stack] = frozenset({("input",)})
        return state

    def block(self, block: int, state: State) -> State:
        for place in range(self.starts[block], self.starts[block + 1]):
            item = self.body[place]
            if isinstance(item, Instruction):
                self.step(item, state)
        return state

    # --- One instruction --------------------------------------------------------------------------------------------

    def step(self, item: Instruction, state: State) -> None:
        facts = self.facts[item.row]
        reads, writes = self.accesses(item, facts)
        restored = self.restored(item, state)
        saving = self.moves_stack(item, state)
        for register, bits in reads:
            if not (saving and register in self.saved):
                self.check_read(item, register, bits, state)
        self.read_flags(item, state)
        self.check_memory(item, state)
        self.check_tiles(item, state)
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
        self.track_tiles(item, state)

    def read_flags(self, item: Instruction, state: State) -> None:
        only_saved = item.row.name in self.table.STACK
        for flag in item.row.flags_read:
            for setter in state.flags.get(flag, CALLERS):
                if only_saved and not isinstance(setter, Instruction):
                    continue
                if setter is None and self.final:
                    raise self.fail("flags", f"{item.row.mnemonic} reads flags that nothing has set on some path", item,
                                    f"{flag}f of the caller, or of before a call", "a comparison on every path to it")
                if isinstance(setter, tuple) and self.final:
                    why = {"lost": "leaves undefined", "address": "sets by where an address lies"}[setter[0]]
                    raise self.fail("flags", f"{item.row.mnemonic} reads a flag that says nothing", item,
                                    f"{flag}f, which {setter[1].row.mnemonic} at {at(setter[1])} {why}",
                                    "a comparison between the two")
                if isinstance(setter, Instruction):
                    self.flags_used.add(setter)

    def write_flags(self, item: Instruction, state: State) -> None:
        """Flags that the manual leaves undefined after an instruction are lost; those that it leaves alone are kept."""
        defined = self.table.flags_defined(item.row) if item.row.flags_written else ""
        pointer = (bool(item.operands) and item.row.mnemonic in self.table.STEPS
                   and (item.operands[0] == self.stack or bool(state.where(item.operands[0]))))
        for flag in item.row.flags_written:
            for before in state.flags.get(flag, CALLERS):
                if isinstance(before, Instruction):
                    self.lost_to.setdefault(before, item)
            state.flags[flag] = frozenset({
                ("lost", item) if flag not in defined else ("address", item) if pointer else item})

    def low_bits(self, item: Instruction, register: Any, state: State) -> int:
        """How many bits of a general register an instruction gives it, where it leaves the others as they were and
        nothing was there; else 0."""
        for spec, operand in zip(item.row.operands, item.operands, strict=True):
            if operand == register and spec.kind == "gpr" and spec.writes and spec.bits < 32:
                before = state.values.get(register, NOTHING)
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

    def check_read(self, item: Instruction, register: Any, bits: int, state: State) -> None:
        if not self.final:
            return
        name = self.name(register)
        owner = self.assembly.owners.get(item, {}).get(register)
        for token in sorted(state.values.get(register, NOTHING), key=order):
            if token[0] == "gone":
                raise self.fail("undefined", f"{item.row.mnemonic} reads {name}, which may hold nothing of use", item,
                                gone(token), "a write on every path to it", "write it first, or declare it as input")
            if token[0] == "low" and token[1] < bits:
                raise self.fail("undefined", f"{item.row.mnemonic} reads {bits} bits of {name}, whose upper ones hold "
                                "nothing of use", item, f"{token[1]} bits, written by {token[2].row.mnemonic} at "
                                f"{at(token[2])}", "a write of the whole register", "clear it before, or movzx")
            if token[0] == "entry":
                raise self.fail("undefined", f"{item.row.mnemonic} reads {name}, which holds the caller's value", item,
                                "no write before it", "a write first")
            if owner is not None and token[0] == "made" and token[1] is not owner:
                raise self.fail("clobber", f"{name} no longer holds what was put there", item,
                                f"overwritten by {token[2].row.mnemonic} at {at(token[2])}",
                                "the pinned value", "take another register, or save the value")

    # --- Memory -----------------------------------------------------------------------------------------------------

    def places_of(self, memory: Memory, state: State) -> frozenset[Region]:
        """Where an address may lie."""
        if memory.label is not None:
            return frozenset({CONSTANTS})
        found: set[Region] = set()
        if self.stack in (memory.base, memory.index):
            found.add(STACK)
        for part in (memory.base, memory.index):
            found |= state.points.get(part, frozenset())
        return frozenset(found)

    def check_memory(self, item: Instruction, state: State) -> None:
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

    def pointed(self, item: Instruction, state: State) -> frozenset[Region] | None:
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
                                f"{lost.row.mnemonic} at {at(lost)} sets them anew" if lost else "no reader",
                                "a reader before anything else sets the flags", "move the comparison down to its user")
