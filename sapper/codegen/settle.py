"""Allocated code -> instructions that the processor has: what several of them do, the state of vectors, far jumps.

Enters: a machine function all of whose registers are physical, with its frame, of a target whose vector instructions
depend on a state (`vector_state`), and the lanes of its rows. Leaves: the same function, each of whose rows has a word.
Holds:
  - a row without a word, and an address that a word can't hold, become several instructions (`expand` of the family's
    settle.py);
  - before each instruction the processor is set to the elements that its row names (`element`). Nothing is known of
    what it is set to on entry. It is set where that changes, and before a loop rather than in it;
  - the mask register is not made a copy of what it holds already;
  - a branch that does not reach its label jumps over a jump that does.
"""

from __future__ import annotations

from typing import Any

from ..targets import module_of
from .machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register
from .row_facts import JUMP, NEXT, RETURN, FactsTable

Items = list[Instruction | Label]
_UNSEEN = -2
"""No way to a place is known yet. 0: it is not known what the processor is set to; else bits of the elements."""
ANY = -1


class _Emitter:
    """What a family's settle.py writes with. location, comment: of what it writes."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.body: Items = []
        self.location: Any = None
        self.comment = ""

    def emit(self, name: str, *operands: Any) -> None:
        self.body.append(Instruction(self.rows[name], [Immediate(o) if type(o) is int else o for o in operands],
                                     location=self.location, comment=self.comment))
        self.comment = ""

    physical = staticmethod(Register)

    @staticmethod
    def memory(base: Any, disp: int = 0) -> Memory:
        return Memory(base, disp=disp)


class _Settling:
    """One function being settled. family: the target's settle.py."""

    def __init__(self, target: Any, registers: Any, facts: FactsTable, lanes: int) -> None:
        self.family = module_of(target.family, "settle")
        self.vector_bits: int = target.vector_bits
        self.rows, self.facts, self.lanes = registers.rows, facts, lanes

    def expanded(self, body: Items) -> Items:
        """Each row has a word."""
        s = _Emitter(self.rows)
        together: list[Any] = []
        for place, item in enumerate(body):
            if isinstance(item, Label):
                s.body.append(item)
                continue
            s.location, s.comment = item.location, item.comment
            kind = item.row.mnemonic
            if kind in self.family.TOGETHER:
                together.append(item.operands[0])
                behind = body[place + 1] if place + 1 < len(body) else None
                if not isinstance(behind, Instruction) or behind.row.mnemonic != kind:
                    self.family.TOGETHER[kind](s, together)
                    together = []
            elif not self.family.expand(s, item):
                s.body.append(item)
        return s.body

    def without_known_masks(self, body: Items) -> Items:
        """Copies to the mask register of what it holds go, within a block."""
        made: Items = []
        held: Register | None = None
        for item in body:
            if isinstance(item, Label):
                held = None
            elif item.row.name == self.family.MASK_COPY:
                if item.operands[0] == held:
                    continue
                held = item.operands[0]     # type: ignore[assignment]
            elif held is not None and self._writes(item, held):
                held = None
            made.append(item)
        return made

    def _writes(self, item: Instruction, held: Register) -> bool:
        """Whether it writes that register, or the mask register."""
        written = [operand for operand, form in zip(item.operands, item.row.operands, strict=True) if form.writes]
        return held in written or self.family.MASK_REGISTER in written or any(
            kind == held.kind for kind, _ in item.row.implicit_writes)

    # --- The state of vectors ---------------------------------------------------------------------------------------

    def with_states(self, body: Items) -> Items:
        body = self._asked_before_loops(body)
        states = self._states(body)
        s = _Emitter(self.rows)
        for place, item in enumerate(body):
            wanted = self._wanted(item, states[place])
            if wanted != states[place] and wanted > 0 and states[place] != _UNSEEN:
                s.location = item.location if isinstance(item, Instruction) else None
                self.family.set_elements(s, wanted, self.lanes, self.vector_bits)
            if not isinstance(item, _Asked):
                s.body.append(item)
        return s.body

    def _wanted(self, item: Instruction | Label, state: int) -> int:
        """What the processor is set to as an item begins, and after it but for what loses that."""
        if isinstance(item, _Asked):
            return item.element
        if isinstance(item, Label) or not item.row.element:
            return state
        element: int = item.row.element
        return (state if state > 0 else self.family.USUAL_ELEMENT) if element == ANY else element

    def _states(self, body: Items) -> list[int]:
        """What the processor is set to before each item, by all ways there."""
        labels = {item.name: place for place, item in enumerate(body) if isinstance(item, Label)}
        states = [_UNSEEN] * (len(body) + 1)
        states[0] = 0
        waiting = [0]
        while waiting:
            place = waiting.pop()
            while place < len(body):
                item = body[place]
                state = self._wanted(item, states[place])
                follows = True
                if isinstance(item, Instruction) and not isinstance(item, _Asked):
                    if item.row.name == self.family.LOSES_STATE:
                        state = 0
                    flow = self.facts[item.row].flow
                    follows = flow not in (JUMP, RETURN)
                    if flow not in (NEXT, RETURN) and self._meets(states, labels[_label_of(item)], state):
                        waiting.append(labels[_label_of(item)])
                if not follows or not self._meets(states, place + 1, state):
                    break
                place += 1
        return states

    @staticmethod
    def _meets(states: list[int], place: int, state: int) -> bool:
        """Whether a way to a place with that state changes what is known there."""
        before = states[place]
        met = state if before in (_UNSEEN, state) else 0
        states[place] = met
        return met != before

    def _asked_before_loops(self, body: Items) -> Items:
        """With what a loop asks for first before it, where the code runs into it."""
        jumped = {}
        for place, item in enumerate(body):
            if isinstance(item, Instruction) and self.facts[item.row].flow not in (NEXT, RETURN):
                jumped[_label_of(item)] = place     # the last one
        made: Items = []
        runs = True
        for place, item in enumerate(body):
            if isinstance(item, Label) and runs and jumped.get(item.name, -1) > place:
                element = self._first_asked(body, place, jumped[item.name])
                if element:
                    made.append(_Asked(element))
            runs = isinstance(item, Label) or self.facts[item.row].flow not in (JUMP, RETURN)
            made.append(item)
        return made

    @staticmethod
    def _first_asked(body: Items, start: int, stop: int) -> int:
        for item in body[start:stop]:
            if isinstance(item, Instruction) and item.row.element > 0:
                return int(item.row.element)
        return 0

    # --- Jumps ------------------------------------------------------------------------------------------------------

    def with_far_jumps(self, body: Items, size: int) -> Items:
        """Until all branches reach: each that is made longer may bring others out of reach."""
        count = 0
        while True:
            labels, offsets, at = {}, [], 0
            for item in body:
                if isinstance(item, Label):
                    at = -(-at // item.align) * item.align
                    labels[item.name] = at
                offsets.append(at)
                at += size * isinstance(item, Instruction)
            far = {place for place, item in enumerate(body) if isinstance(item, Instruction)
                   and item.row.name in self.family.INVERTED and not _reaches(item, labels, offsets[place])}
            if not far:
                return body
            made: Items = []
            for place, item in enumerate(body):
                if place not in far or not isinstance(item, Instruction):
                    made.append(item)
                    continue
                count += 1
                near = Label(f".near{count}")
                made += [Instruction(self.rows[self.family.INVERTED[item.row.name]],
                                     [*item.operands[:-1], LabelReference(near.name)], location=item.location),
                         Instruction(self.rows[self.family.JUMP], [item.operands[-1]], location=item.location), near]
            body = made


class _Asked(Label):
    """In place of an instruction: the processor is to be set to elements of so many bits here."""

    __slots__ = ("element",)

    def __init__(self, element: int) -> None:
        super().__init__("")
        self.element = element


def _label_of(item: Instruction) -> str:
    return next(operand.name for operand in item.operands if isinstance(operand, LabelReference))


def _reaches(item: Instruction, labels: dict[str, int], at: int) -> bool:
    places = item.row.words[0].fields["l"]
    distance: int = labels[_label_of(item)] - at
    return -1 << len(places) <= distance < 1 << len(places)


def settle(function: MachineFunction, registers: Any, target: Any, lanes: int) -> None:
    """In place. registers: the facts of the target (row_facts.Abi), with its rows."""
    from .row_facts import facts_table

    settling = _Settling(target, registers, facts_table(registers), lanes)
    body = settling.without_known_masks(settling.expanded(function.body))
    function.body = settling.with_far_jumps(settling.with_states(body), target.word_bytes)
