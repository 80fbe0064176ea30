"""Functions with routines of their own: code that a `call` to a label inside reaches, and `ret` leaves.

Enters: an `Assembly`, naked. Leaves: the same with a copy of each routine at each call of it, so that what static.py
knows of a call's place holds in the routine too: what lies in registers that are no arguments, how deep the stack is.
Holds: the copy is for checking only; calls of what is outside stay calls.
"""

from __future__ import annotations

from ..codegen.machine import Instruction, Label, LabelReference, Register
from ..ir.nodes import Location
from .build import Assembly
from .errors import AssemblyError
from .notation import LabelName, Mem, Reg

_MOST_ITEMS = 50_000


def inlined(assembly: Assembly) -> Assembly:
    """Raises AssemblyError for a routine that calls itself, and code that neither runs nor is called."""
    return _Inliner(assembly).run()


class _Inliner:
    def __init__(self, assembly: Assembly) -> None:
        self.given = assembly
        self.table = assembly.table
        self.places = {item.name: place for place, item in enumerate(assembly.body) if isinstance(item, Label)}
        self.made = Assembly(assembly.name, assembly.table, naked=True, constants=assembly.constants,
                             inputs=assembly.inputs, words=assembly.words)
        self.used: set[int] = set()
        self.copies = 0
        self.main = self.reached(0)
        self.ends: list[LabelName] = []

    def run(self) -> Assembly:
        self.copy(0, (), None)
        for end in self.ends:
            self.made.place(end)
            self.made.emit("jmp", (end,))
        for place, item in enumerate(self.given.body):
            if isinstance(item, Instruction) and place not in self.used:
                raise AssemblyError("unreachable", "this code is never reached", item.location, item.row.mnemonic,
                                    "a jump or a call to it, or code above that runs on into it")
        return self.made

    def end(self) -> LabelName:
        """A place that is not left."""
        self.ends.append(self.made.label("end"))
        return self.ends[-1]

    def reached(self, start: int) -> set[int]:
        """Places that control comes to from one on, calls taken as what comes back."""
        body, found, pending = self.given.body, set[int](), [start]
        while pending:
            place = pending.pop()
            if place in found or place >= len(body):
                continue
            found.add(place)
            item = body[place]
            if isinstance(item, Label) or item.row.control not in ("jump", "return"):
                pending.append(place + 1)
            if isinstance(item, Instruction) and item.row.control in ("jump", "branch"):
                pending += [self.places[o.name] for o in item.operands if isinstance(o, LabelReference)]
        return found

    def called(self, item: Instruction) -> str | None:
        """The label of a routine here that an instruction calls."""
        if item.row.control != "call":
            return None
        name = next((o.name for o in item.operands if isinstance(o, LabelReference)), None)
        return name if name in self.places else None

    def copy(self, start: int, chain: tuple[str, ...], after: LabelName | None, call: Instruction | None = None,
             ) -> None:
        """What is reached from a place on, `ret` going on at `after`; then the routines that it calls. call: of it."""
        body, made = self.given.body, self.made
        reached = self.reached(start) - (self.main if chain else set())
        self.used |= reached
        if len(made.body) > _MOST_ITEMS:
            raise AssemblyError("loop", f"{self.given.name}: routines call each other without end", None)
        self.copies += 1
        names = {name: f"{name}.{self.copies}" for name, place in self.places.items() if place in reached}
        routines: list[tuple[str, LabelName, LabelName, Instruction]] = []
        stack = Reg("gpr", 64, Register(*self.table.STACK_POINTER))
        for place in sorted(reached):
            item = body[place]
            if isinstance(item, Label):
                made.body.append(Label(names[item.name], item.align))
                continue
            where = item.location
            routine = self.called(item)
            outside = {o.name for o in item.operands if isinstance(o, LabelReference) and o.name in self.places
                       and o.name not in names and item.row.control != "call"}
            if routine is not None:
                if routine in chain:
                    raise AssemblyError("loop", "a routine that calls itself", where, routine,
                                        "calls that come to an end", "write it as a loop")
                begin, back = made.label("routine"), made.label("back")
                routines.append((routine, begin, back, self._move(stack, -8, where)))
                made.emit("jmp", (begin,), location=where)
                made.place(back)
            elif item.row.control == "jump" and not any(isinstance(o, LabelReference) for o in item.operands):
                made.emit(self.table.RETURN, (), location=where)  # the last call in place of a return
            elif item.row.control == "return" and after is not None:
                assert call is not None
                made.returns[self._move(stack, 8, where)] = call
                made.emit("jmp", (after,), location=where)
            else:
                operands = [o if not isinstance(o, LabelReference) else LabelReference(
                    self.end().name if o.name in outside else names.get(o.name, o.name)) for o in item.operands]
                made.body.append(Instruction(item.row, operands, item.mask, item.zeroing, where, item.comment))
            # Behind a system call that ends the process, and where a routine goes on in the code of its caller.
            goes_on = isinstance(item, Label) or item.row.control not in ("jump", "return")
            if goes_on and place + 1 not in reached and routine is None:
                made.emit("jmp", (self.end(),))
        for routine, begin, back, its_call in routines:
            made.place(begin)
            entry = LabelName(f"{routine}.{self.copies + 1}")  # what stands before it may be reached from it
            made.emit("jmp", (entry,))
            self.copy(self.places[routine], (*chain, routine), back, its_call)

    def _move(self, stack: Reg, bytes_: int, where: Location | None) -> Instruction:
        self.made.emit("lea", (stack, Mem(stack + bytes_)), location=where)
        made = self.made.body[-1]
        assert isinstance(made, Instruction)
        return made
