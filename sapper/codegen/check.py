"""The independent allocation checker: does the allocated code compute what the code before allocation did?

Enters: the code with virtual registers, the code after allocation (with or without its frame), and for each item of
the latter its place in the former, -1 where allocation added it. Leaves: nothing, or `CheckError`.
Holds: the allocated code is run symbolically over its control-flow graph. The state says for each register and each
slot which *values* it holds: a value is a register of the code before allocation (virtual or physical, and the flags),
or what a callee-saved register held at entry. An instruction of the old code must find its operands' values in the
registers named now; what it writes is then nowhere else (older copies are stale). An added instruction moves values
about, or makes a constant again. Where paths meet, a place holds what it holds on all of them; this is repeated until
nothing changes. Nothing of the allocator is used here except the facts of the rows.
"""

from __future__ import annotations

from typing import Any

from .machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register, VirtualRegister
from .row_facts import BRANCH, CHANGE, NEXT, READ, RETURN, WRITE, Abi, FactsTable, RowFacts, facts_table, is_idiom


class CheckError(Exception):
    """The allocated code is wrong. The message names the place, what was found and what was expected."""


_FLAGS = 1 << 20  # places: registers 64 * kind + number, then the flags, then slots by byte offset; constants below 0
_SLOT = 1 << 21

# What the symbolic run does at one step; the steps of a block are made once and run often.
_ORIGINAL, _COPY, _MOVE, _PUT, _PUSH, _POP, _ADJUST, _ALIGN, _SAVE, _RESTORE, _CLEAR, _RETURN = range(12)


Values = frozenset[int]
_NOTHING: Values = frozenset()


class _State:
    """held: place -> the values in it. where: value -> the places that hold it, for those values that `list_places` was
    told of. depth: bytes below the entry stack pointer, -1 when aligned."""

    __slots__ = ("depth", "held", "pushed", "saved_depth", "space", "where")

    def __init__(self) -> None:
        self.held: dict[int, Values] = {}
        self.where: dict[int, set[int]] = {}
        self.depth = 0
        self.pushed: tuple[Values, ...] = ()
        self.saved_depth = 0
        self.space = 0

    def copy(self) -> _State:
        other = _State()
        other.held = dict(self.held)
        other.depth = self.depth
        other.pushed = self.pushed
        other.saved_depth = self.saved_depth
        other.space = self.space
        return other

    def list_places(self, asked: Values) -> None:
        """Of these values only: a state has thousands of places, and most blocks few steps."""
        where = self.where = {value: set() for value in asked}
        for place, values in self.held.items():
            if not asked.isdisjoint(values):
                for value in values & asked:
                    where[value].add(place)

    def put(self, place: int, values: Values) -> None:
        """Have a place hold these values, and no others."""
        where = self.where
        for value in self.held.get(place, _NOTHING):
            if value in where:
                where[value].discard(place)
        self.held[place] = values
        for value in values:
            if value in where:
                where[value].add(place)

    def forget(self, value: int) -> None:
        """What holds a value holds it no more."""
        held, places = self.held, self.where[value]
        for place in places:
            held[place] -= {value}
        places.clear()

    def equate(self, target: int, source: int) -> None:
        """What holds `source`, and only that, holds `target` too."""
        if target == source:
            return
        self.forget(target)
        held = self.held
        places = self.where[source]
        for place in places:
            held[place] |= {target}
        self.where[target] = set(places)


class _Checker:
    def __init__(
        self, original: MachineFunction, allocated: MachineFunction, origin: list[int], abi: Abi, framed: bool
    ) -> None:
        self.original = original
        self.allocated = allocated
        self.origin = origin
        self.abi = abi
        self.framed = framed
        self.facts: FactsTable = facts_table(abi)
        self.kinds: dict[str, int] = {kind: number for number, kind in enumerate(abi.registers)}
        self.values: dict[Any, int] = {}  # register of the old code -> the number of its value
        self.names: list[str] = []
        self.bits: list[int] = []  # how wide each value is
        self.allowed = {kind: frozenset(numbers) for kind, numbers in abi.registers.items()}
        self.stack = Register(*abi.stack_pointer)
        self.slots: dict[int, int] = {}
        self.saved_value = 0
        self.rows = {what: abi.frame_row(what) for what in ("subtract", "add", "and", "vzeroupper")}
        kinds = {kind for kind, _ in abi.callee_saved}
        self.pushes, self.pops = ([abi.frame_row(what, kind) for kind in kinds] for what in ("push", "pop"))

    # --- values ----------------------------------------------------------------------------------------------------

    def value(self, key: Any) -> int:
        """The number of a value; given when first asked for."""
        found = self.values.get(key)
        if found is None:
            found = self.values[key] = len(self.names)
            self.names.append(repr(key) if type(key) is VirtualRegister else str(key))
            self.bits.append(0)
        return found

    def place(self, register: Register) -> int:
        """The number of a register's place."""
        kind = self.kinds.get(register.kind)
        if kind is None:
            kind = self.kinds[register.kind] = len(self.kinds)
        return 64 * kind + register.number

    def fail(self, place: int, text: str) -> CheckError:
        item = self.allocated.body[place] if place < len(self.allocated.body) else None
        what = "end" if item is None else item.name if isinstance(item, Label) else f"{item.row.name} {item.operands}"
        return CheckError(f"{self.original.name}: place {place} ({what}): {text}")

    def describe(self, values: Values) -> str:
        return "{" + ", ".join(self.names[value] for value in sorted(values)) + "}"

    def measure(self) -> None:
        """Give every value a number and its width."""
        for item in self.original.body:
            if isinstance(item, Label):
                continue
            assert isinstance(item, Instruction)
            facts = self.facts[item.row]
            for position, operand in enumerate(item.operands):
                kind = type(operand)
                if kind is VirtualRegister:
                    self.widen(operand, facts.bits[position])
                elif kind is Register:
                    self.widen(operand, self.abi.full_bits.get(operand.kind, 64))  # type: ignore[union-attr]
                elif kind is Memory:
                    for part in (operand.base, operand.index):  # type: ignore[union-attr]
                        if part is not None:
                            self.widen(part, 64 if part.kind == "gpr" else max(facts.bits))  # type: ignore[union-attr]
            if item.mask is not None:
                self.widen(item.mask, 64)

    def widen(self, register: Any, width: int) -> None:
        value = self.value(register)
        if width > self.bits[value]:
            self.bits[value] = width

    def constant(self, item: Instruction, facts: RowFacts) -> int | None:
        """The value that an instruction makes from nothing but itself, None if it makes none.

        Such a value lives in a place of its own, which nothing overwrites; a register set to it is a copy of it.
        """
        if item.mask is not None or facts.reads or facts.writes or facts.side_effects or facts.flow != NEXT:
            return None
        if is_idiom(item, facts):
            parts: list[Any] = [facts.name]
        elif not facts.access or facts.access[0] != WRITE or type(item.operands[0]) is Memory:
            return None
        else:
            parts = [facts.name]
            for operand in item.operands[1:]:
                if type(operand) is Immediate:
                    parts.append(operand.value)
                elif type(operand) is Memory and operand.label and operand.base is None and operand.index is None:
                    parts.append((operand.label, operand.disp, operand.broadcast))
                else:
                    return None
        key = tuple(parts)
        if key not in self.values:
            self.widen(key, facts.bits[0])
        return self.value(key)

    def copied(self, item: Instruction, facts: RowFacts) -> tuple[int, int] | None:
        """(value written, value read) if the instruction of the old code is a copy between registers."""
        if not facts.move_bits or item.mask is not None:
            return None
        target, source = item.operands
        both = isinstance(target, (Register, VirtualRegister)) and isinstance(source, (Register, VirtualRegister))
        if not both or target.kind != source.kind:  # type: ignore[union-attr]
            return None
        return self.value(target), self.value(source)

    def whole(self, target: int, source: int, bits: int) -> bool:
        """A copy of so many bits hands on all of the value that anyone looks at."""
        return self.bits[target] <= bits and self.bits[source] <= bits

    # --- steps -----------------------------------------------------------------------------------------------------

    def pair(self, at: int, old: Any, new: Any) -> tuple[int, int]:
        """(place, value) of a register operand; checks that the new one may stand for the old."""
        if type(new) is not Register:
            raise self.fail(at, f"operand {new!r} stands for {old!r}; expected a physical register")
        if type(old) is Register:
            if old != new:
                raise self.fail(at, f"found {new}; expected {old}, which the code names itself")
        elif new.kind != old.kind or new.number not in self.allowed[new.kind]:
            raise self.fail(at, f"{new} cannot hold {old!r}; expected an allocatable register of kind {old.kind}")
        return self.place(new), self.value(old)

    def kept(self, at: int, old: Instruction, new: Instruction) -> tuple[Any, ...]:
        """The step of an instruction of the old code that is still there."""
        facts = self.facts[old.row]
        if new.row is not old.row or len(new.operands) != len(old.operands) or new.zeroing != old.zeroing:
            raise self.fail(at, f"the instruction is not the one it stands for ({old.row.name} {old.operands})")
        reads: list[tuple[int, int]] = []
        writes: list[tuple[int, int]] = []
        constant = is_idiom(old, facts)
        if constant and not is_idiom(new, facts):
            raise self.fail(at, "the registers differ; expected the same one, since the result is a constant only then")
        merging = old.mask is not None and not old.zeroing and facts.merges
        for position, (how, was, now) in enumerate(zip(facts.access, old.operands, new.operands, strict=True)):
            kind = type(was)
            if kind is VirtualRegister and type(now) is Memory and how == READ and not constant:
                bits = self.abi.memory_bits(old.row)[position]
                if bits < facts.bits[position] or now.broadcast:
                    raise self.fail(at, f"found {now} for {was!r}; expected a register, since no memory may stand here")
                reads.append((self.slot(at, now, bits), self.value(was)))
            elif kind is VirtualRegister or kind is Register:
                both = self.pair(at, was, now)
                if (how & READ and not constant) or (how == WRITE and merging):
                    reads.append(both)
                if how & WRITE:
                    writes.append(both)
            elif kind is Memory:
                if type(now) is not Memory or (
                    was.scale, was.disp, was.broadcast, was.label, was.base is None, was.index is None  # type: ignore
                ) != (now.scale, now.disp, now.broadcast, now.label, now.base is None, now.index is None):
                    raise self.fail(at, f"found {now}; expected the address {was}")
                for part, part_now in ((was.base, now.base), (was.index, now.index)):  # type: ignore[union-attr]
                    if part is not None:
                        reads.append(self.pair(at, part, part_now))
            elif was != now:
                raise self.fail(at, f"found {now}; expected {was}")
        if (old.mask is None) != (new.mask is None):
            raise self.fail(at, f"found opmask {new.mask}; expected {old.mask}")
        if old.mask is not None:
            both = self.pair(at, old.mask, new.mask)
            reads.append(both)
            if facts.mask_access & WRITE:
                writes.append(both)
        for name in facts.reads:
            reads.append((self.place(Register(*name)), self.value(Register(*name))))
        for name in facts.writes:
            writes.append((self.place(Register(*name)), self.value(Register(*name))))
        if facts.reads_flags:
            reads.append((_FLAGS, self.value("flags")))
        if facts.writes_flags:
            writes.append((_FLAGS, self.value("flags")))
        seen: dict[int, int] = {}
        for place, value in writes:
            if seen.setdefault(place, value) != value:
                raise self.fail(at, "two results are written to one register")
        if facts.flow == RETURN:
            return (_RETURN, at, reads)
        copied = self.copied(old, facts)
        if copied is not None and self.whole(*copied, facts.move_bits):
            return (_MOVE, at, reads[0][0], reads[0][1], writes[0][0], writes[0][1])
        made = self.constant(old, facts)
        if made is not None and len(writes) == 1:
            return (_MOVE, at, self.home(made), made, *writes[0])
        return (_ORIGINAL, at, reads, [(place, value, frozenset((value,))) for place, value in writes])

    @staticmethod
    def home(made: int) -> int:
        """The place of a constant."""
        return -1 - made

    def omitted(self, at: int, index: int) -> tuple[Any, ...]:
        """The step of an instruction of the old code that is gone: only copies and constants may go."""
        old = self.original.body[index]
        if isinstance(old, Label):
            raise self.fail(at, f"label {old.name} is missing")
        facts = self.facts[old.row]
        copied = self.copied(old, facts)
        if copied is not None and self.whole(*copied, facts.move_bits):
            return (_COPY, at, copied[0], copied[1])
        made = self.constant(old, facts)
        if made is not None and type(old.operands[0]) is VirtualRegister and not facts.writes_flags:
            return (_COPY, at, self.value(old.operands[0]), made)
        raise self.fail(at, f"{old.row.name} {old.operands} of the code before allocation is missing")

    def slot(self, at: int, memory: Memory, bits: int) -> int:
        """The place of a slot; slots may not overlap."""
        if memory.base != self.stack or memory.index is not None or memory.label is not None:
            raise self.fail(at, "an added instruction touches memory outside the frame")
        size_bytes = bits // 8
        if self.slots.get(memory.disp) != size_bytes:
            for offset, other in self.slots.items():
                if offset < memory.disp + size_bytes and memory.disp < offset + other:
                    raise self.fail(at, f"the slot at {memory.disp} of {size_bytes} bytes overlaps the one at {offset} "
                                        f"of {other} bytes")
            self.slots[memory.disp] = size_bytes
        if memory.disp % min(size_bytes, 8) or memory.disp < 0:
            raise self.fail(at, f"the slot at {memory.disp} lies outside the frame or is not aligned")
        return _SLOT + memory.disp

    def added(self, at: int, item: Instruction) -> tuple[Any, ...]:
        """The step of an instruction that allocation or the frame added."""
        row = item.row
        facts = self.facts[row]
        rows = self.rows
        operands = item.operands
        for operand in operands:
            if type(operand) is VirtualRegister:
                raise self.fail(at, f"{operand!r} is still virtual")
        if row in self.pushes:
            return (_PUSH, at, self.place(operands[0]))  # type: ignore[arg-type]
        if row in self.pops:
            return (_POP, at, self.place(operands[0]))  # type: ignore[arg-type]
        if row is rows["vzeroupper"]:
            return (_CLEAR, at)
        if operands and operands[0] == self.stack and type(operands[1]) is Immediate:
            if row is rows["subtract"]:
                return (_ADJUST, at, operands[1].value)
            if row is rows["add"]:
                return (_ADJUST, at, -operands[1].value)
            if row is rows["and"]:
                return (_ALIGN, at, -operands[1].value)
        if facts.move_bits and item.mask is None:
            target, source = operands
            if target == self.stack and type(source) is Memory:
                return (_RESTORE, at, self.slot(at, source, facts.move_bits))
            if source == self.stack and type(target) is Register:
                return (_SAVE, at, self.place(target))
            if type(target) is Memory and type(source) is Register:
                return (_PUT, at, self.slot(at, target, facts.move_bits), self.place(source), facts.move_bits)
            if type(target) is Register and target != self.stack:
                if type(source) is Register:
                    return (_PUT, at, self.place(target), self.place(source), facts.move_bits)
                if type(source) is Memory and source.base == self.stack:
                    return (_PUT, at, self.place(target), self.slot(at, source, facts.move_bits), facts.move_bits)
        made = self.constant(item, facts)
        if made is not None and type(operands[0]) is Register and not facts.writes_flags:
            return (_PUT, at, self.place(operands[0]), self.home(made), 1 << 16)  # all of it
        raise self.fail(at, "allocation added an instruction that is no move, spill, reload, constant or frame code")

    def blocks(self) -> tuple[list[list[tuple[Any, ...]]], list[list[int]]]:
        """The steps of each block of the allocated code, and where each goes."""
        body = self.allocated.body
        if len(self.origin) != len(body):
            raise CheckError(f"{len(self.origin)} origins for {len(body)} items")
        steps: list[list[tuple[Any, ...]]] = [[]]
        goes: list[tuple[int, str | None]] = []
        labels: dict[str, int] = {}
        last = -1

        def close(flow: int, label: str | None) -> None:
            goes.append((flow, label))
            steps.append([])

        for at, item in enumerate(body):
            index = self.origin[at]
            if index >= 0:
                if index <= last:
                    raise self.fail(at, "the order of instructions changed")
                for missing in range(last + 1, index):
                    steps[-1].append(self.omitted(at, missing))
                last = index
            if isinstance(item, Label):
                if index < 0 or self.original.body[index] != item:
                    raise self.fail(at, "this label was not in the code before allocation")
                close(NEXT, None)
                labels[item.name] = len(steps) - 1
                continue
            if index < 0:
                steps[-1].append(self.added(at, item))
                continue
            old = self.original.body[index]
            if not isinstance(old, Instruction):
                raise self.fail(at, "an instruction stands for a label")
            steps[-1].append(self.kept(at, old, item))
            flow = self.facts[item.row].flow
            if flow:
                close(flow, next((o.name for o in item.operands if type(o) is LabelReference), None))
        for missing in range(last + 1, len(self.original.body)):
            steps[-1].append(self.omitted(len(body), missing))
        goes.append((NEXT, None))
        follow: list[list[int]] = []
        for block, (flow, label) in enumerate(goes):
            targets = []
            if flow in (NEXT, BRANCH) and block + 1 < len(goes):
                targets.append(block + 1)
            if label is not None:
                if label not in labels:
                    raise CheckError(f"{self.original.name}: label {label} is missing")
                targets.append(labels[label])
            follow.append(targets)
        return steps, follow

    # --- the symbolic run ------------------------------------------------------------------------------------------

    def narrowed(self, values: Values, bits: int) -> Values:
        """The values that survive a copy of so many bits."""
        lost = [value for value in values if self.bits[value] > bits]
        return values.difference(lost) if lost else values

    def entry(self) -> _State:
        state = _State()
        held = state.held
        registers = [Register(kind, number) for kind, numbers in self.abi.registers.items() for number in numbers]
        for register in (*registers, self.stack):
            held[self.place(register)] = frozenset((self.values[register],)) if register in self.values else _NOTHING
        for key, value in self.values.items():
            if type(key) is tuple:
                held[self.home(value)] = frozenset((value,))
        for pair in self.abi.callee_saved:
            place = self.place(Register(*pair))
            value = self.value(("entry", *pair))
            self.bits[-1] = 64
            held[place] = held.get(place, _NOTHING) | {value}
        self.saved_value = self.value("entry stack pointer")
        self.bits[-1] = 64
        state.space = 1 << 30 if self.framed else self.allocated.frame_bytes
        if self.framed:
            state.space = 0
        return state

    @staticmethod
    def asked(steps: list[tuple[Any, ...]]) -> Values:
        """The values of which a block's steps ask where they are."""
        asked: set[int] = set()
        for step in steps:
            if step[0] == _ORIGINAL:
                asked.update(value for _, value, _ in step[3])
            elif step[0] == _COPY:
                asked.update(step[2:])
            elif step[0] == _MOVE:
                asked.update((step[3], step[5]))
        return frozenset(asked)

    def run_block(self, steps: list[tuple[Any, ...]], state: _State, asked: Values) -> None:
        held = state.held
        state.list_places(asked)
        for step in steps:
            what = step[0]
            at = step[1]
            if what == _ORIGINAL:
                for place, value in step[2]:
                    if value not in held.get(place, _NOTHING):
                        raise self.wrong(at, held, place, value)
                for _, value, _ in step[3]:
                    state.forget(value)
                for place, _, values in step[3]:
                    state.put(place, values)
            elif what == _COPY:
                state.equate(*step[2:])
            elif what == _MOVE:
                place, source, to, target = step[2:]
                if source not in held.get(place, _NOTHING):
                    raise self.wrong(at, held, place, source)
                state.equate(target, source)
                state.put(to, held[place])
            elif what == _PUT:
                _, _, to, source, bits = step
                if source >= _SLOT:
                    self.in_frame(at, state, source, bits)
                values = self.narrowed(held.get(source, _NOTHING), bits)
                if to >= _SLOT:
                    self.in_frame(at, state, to, bits)
                state.put(to, values)
            elif what == _RETURN:
                for place, value in step[2]:
                    if value not in held.get(place, _NOTHING):
                        raise self.wrong(at, held, place, value)
                if self.framed:
                    self.leave(at, state)
            else:
                self.frame_step(step, state)

    def wrong(self, at: int, held: dict[int, Values], place: int, value: int) -> CheckError:
        if place == _FLAGS:
            where = "the flags"
        elif place >= _SLOT:
            where = f"the slot at {place - _SLOT}"
        else:
            where = f"{list(self.kinds)[place // 64]} register {place % 64}"
        return self.fail(at, f"{where}: found {self.describe(held.get(place, _NOTHING))}; expected it to hold "
                             f"{self.describe(frozenset((value,)))}")

    def in_frame(self, at: int, state: _State, place: int, bits: int) -> None:
        if place - _SLOT + bits // 8 > state.space:
            raise self.fail(at, f"the slot at {place - _SLOT} reaches past the frame of {state.space} bytes")

    def frame_step(self, step: tuple[Any, ...], state: _State) -> None:
        """Pushes, pops and changes of the stack pointer."""
        what, at = step[0], step[1]
        held = state.held
        if what == _CLEAR:
            vector = self.kinds.get("vec", -1)
            for place, values in held.items():
                if place // 64 == vector and place < _FLAGS:
                    state.put(place, self.narrowed(values, 128))
        elif what == _PUSH:
            if state.space:
                raise self.fail(at, "a push under the slots of the frame")
            state.pushed = (*state.pushed, held.get(step[2], _NOTHING))
            state.depth += 8
        elif what == _POP:
            if not state.pushed or state.depth != 8 * len(state.pushed):
                raise self.fail(at, "a pop while the stack pointer is not at the last push")
            state.put(step[2], state.pushed[-1])
            state.pushed = state.pushed[:-1]
            state.depth -= 8
        elif what == _ADJUST:
            if state.depth < 0:
                raise self.fail(at, "the stack pointer was aligned; expected it to be restored from the frame")
            state.depth += step[2]
            state.space += step[2]
            if state.space < 0:
                raise self.fail(at, "the stack pointer rises above the frame")
            self.forget_slots(state)
            state.put(_FLAGS, _NOTHING)
        elif what == _ALIGN:
            state.depth = -1
            self.forget_slots(state)
            state.put(_FLAGS, _NOTHING)
        elif what == _SAVE:
            state.put(step[2], frozenset((self.saved_value,)))
            state.saved_depth = state.depth
        else:
            if self.saved_value not in held.get(step[2], _NOTHING):
                raise self.fail(at, "the stack pointer is restored from a place that does not hold it")
            state.depth = state.saved_depth
            state.space = 0
            self.forget_slots(state)

    @staticmethod
    def forget_slots(state: _State) -> None:
        """Offsets from the stack pointer mean other bytes once it has moved."""
        for place in state.held:
            if place >= _SLOT:
                state.put(place, _NOTHING)

    def leave(self, at: int, state: _State) -> None:
        if state.depth != 0 or state.pushed:
            raise self.fail(at, f"the stack pointer is {state.depth} bytes from where it was at entry")
        for pair in self.abi.callee_saved:
            register = Register(*pair)
            if self.value(("entry", *pair)) not in state.held.get(self.place(register), _NOTHING):
                raise self.fail(at, f"{register} is not restored; expected what it held at entry")

    def run(self) -> None:
        self.measure()
        steps, follow = self.blocks()
        asked = [self.asked(block) for block in steps]
        states: list[_State | None] = [None] * len(steps)
        states[0] = self.entry()
        pending = [0]
        waiting = [False] * len(steps)
        while pending:
            block = min(pending)
            pending.remove(block)
            waiting[block] = False
            start = states[block]
            assert start is not None
            state = start.copy()
            self.run_block(steps[block], state, asked[block])
            for target in follow[block]:
                before = states[target]
                if before is None:
                    states[target] = state.copy()
                    changed = True
                else:
                    if (before.depth, before.space, len(before.pushed)) != (
                        state.depth,
                        state.space,
                        len(state.pushed),
                    ):
                        raise CheckError(f"{self.original.name}: paths meet with different stack pointers")
                    changed = False
                    for place, values in before.held.items():
                        others = state.held.get(place, _NOTHING)
                        if values is not others and not values <= others:
                            before.held[place] = values & others
                            changed = True
                    pushed = tuple(a & b for a, b in zip(before.pushed, state.pushed, strict=True))
                    if pushed != before.pushed:
                        before.pushed = pushed
                        changed = True
                if changed and not waiting[target]:
                    waiting[target] = True
                    pending.append(target)


def check(
    original: MachineFunction, allocated: MachineFunction, origin: list[int], abi: Abi, framed: bool = True
) -> None:
    """Raise CheckError unless `allocated` does what `original` does.

    origin: for each item of allocated.body its place in original.body, -1 where it was added (Allocation.origin).
    framed: prologue and epilogues are there, so saved registers and the stack pointer are checked at returns.
    """
    _Checker(original, allocated, origin, abi, framed).run()


__all__ = ["CHANGE", "CheckError", "check"]
