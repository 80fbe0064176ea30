"""Code that the target's own assembler finishes: its loops, and what that assembler makes of it, where it is at hand.

Enters: a function as selected, its registers virtual, and its text. Leaves: an `Outline`, plain data for the command
line. Holds: the assembler gives registers and orders instructions, so costs are lower bounds, from what the target's
processors do at best in a cycle, and the assembler's figures stand beside ours.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ..ir.nodes import Location
from ..targets import module_of
from .lives import Lives, limits, lives
from .machine import Instruction, Label, LabelReference, MachineFunction


@dataclass(slots=True)
class OutlineRow:
    """One instruction. place: in the body. labels: that stand before it. wanted: registers of 32 bits, in the order
    written. limit: that a thread has."""

    place: int
    text: str
    location: Location | None
    labels: list[str]
    wanted: int
    limit: int


@dataclass(slots=True)
class OutlineLoop:
    """A stretch of code that ends in a jump back to its label. first, last: places. innermost: no loop is in it but
    such as only wait. opcodes: how often each stands in it, the commonest first. lines: those of the source.

    cycles: of a processor, that one pass of one warp takes at least, where other warps fill its waits; bound: what
    takes so long, a unit or "issue". units: cycles of each. operations: on floats, loaded_bytes, stored_bytes: of
    global memory, by a warp in a pass. wanted: most registers of 32 bits at once, in the order written."""

    label: str
    depth: int
    innermost: bool
    first: int
    last: int
    instructions: int
    opcodes: dict[str, int]
    lines: list[tuple[str, int]]
    cycles: float
    bound: str
    units: dict[str, float]
    operations: int
    loaded_bytes: int
    stored_bytes: int
    wanted: int


@dataclass(slots=True)
class Outline:
    """A function outlined. lives: of its registers; names: of these in the text."""

    name: str
    target: str
    rows: list[OutlineRow]
    loops: list[OutlineLoop]
    lives: Lives
    names: dict[Any, str]

    @property
    def most(self) -> list[tuple[int, int]]:
        """(most that are wanted at once, registers that a thread has there), the largest number of these first."""
        found: dict[int, int] = {}
        for row in self.rows:
            found[row.limit] = max(row.wanted, found.get(row.limit, 0))
        return [(found[limit], limit) for limit in sorted(found, reverse=True)]

    def hottest(self) -> OutlineLoop | None:
        """The innermost loop that does most in a pass (operations, bytes, cycles): copies and tails do less."""
        return max((loop for loop in self.loops if loop.innermost), key=lambda loop: (
            loop.operations, loop.loaded_bytes + loop.stored_bytes, loop.cycles), default=None)


def outline(function: MachineFunction, target: Any) -> Outline:
    """Outline a selected function."""
    texts, names = module_of(target.family, "text").items_and_names(function)
    table = table_of(target)
    registers = lives(function.body, table)
    limit = limits(function.body, table, table.most_registers(function, target))
    rows: list[OutlineRow] = []
    waiting: list[str] = []
    starts: dict[str, int] = {}
    spans: list[tuple[int, int, str]] = []
    for place, (item, text) in enumerate(zip(function.body, texts, strict=True)):
        if isinstance(item, Label):
            waiting.append(text.removesuffix(":"))
            starts[item.name] = place
            continue
        rows.append(OutlineRow(place, text, item.location, waiting, registers.words[place], limit[place]))
        waiting = []
        target_label = next((o.name for o in item.operands if isinstance(o, LabelReference)), None)
        if target_label in starts:
            spans.append((starts[target_label], place, texts[starts[target_label]].removesuffix(":")))
    loops = [_loop(function, span, spans, target, registers.words) for span in sorted(spans)]
    return Outline(function.name, target.name, rows, loops, registers, names)


def _loop(function: MachineFunction, span: tuple[int, int, str], spans: list[tuple[int, int, str]],
          target: Any, words: list[int]) -> OutlineLoop:
    first, last, label = span
    inside = [item for item in function.body[first:last + 1] if isinstance(item, Instruction)]
    opcodes = Counter(item.row.mnemonic for item in inside)
    others = [(a, b) for a, b, _ in spans if (a, b) != (first, last)]
    costs = costs_of(target)
    table = table_of(target)

    def only_waits(a: int) -> bool:
        """Whether the loop that begins at a place asks a signal again and again."""
        return bool(table.polls(next(item for item in function.body[a:] if isinstance(item, Instruction))))

    each = [costs.cost_of_item(item, target.name) for item in inside]
    units = {"issue": sum(cost.issues for cost in each) / costs.SCHEDULERS}
    for cost in each:
        if cost.unit:
            units[cost.unit] = units.get(cost.unit, 0.0) + cost.cycles
    bound = max(units, key=lambda unit: units[unit])
    return OutlineLoop(
        label, 1 + sum(a <= first and last <= b for a, b in others),
        not any(first <= a and b <= last and not only_waits(a) for a, b in others), first, last, len(inside),
        dict(sorted(opcodes.items(), key=lambda pair: (-pair[1], pair[0]))),
        sorted({(item.location.file, item.location.line) for item in inside if item.location is not None}),
        units[bound], bound, units, sum(c.operations for c in each),
        sum(c.loaded_bytes for c in each) + sum(map(table.announced_bytes, inside)),
        sum(c.stored_bytes for c in each), max(words[first:last + 1]))


def table_of(target: Any) -> Any:
    """What the target's family says of its instructions beside the rows."""
    return module_of(target.family, "assembly")


def costs_of(target: Any) -> Any:
    """What the target's family says of costs."""
    return module_of(target.family, "costs")


def assembled(text: str, target: Any) -> dict[str, Any]:
    """What the assembler says of a text: registers, spilled_bytes, instructions, opcodes (None without a disassembler).

    {"missing": why} where it is not at hand, or does not take the text.
    """
    assembler = module_of(target.family, "assembler")
    try:
        (made,) = assembler.assemble([text], target.name).values()
    except assembler.AssemblerError as error:
        return {"missing": str(error)}
    figures = {key: value for key, value in asdict(made).items() if key != "code"}
    return figures | {"opcodes": made.opcodes(), "assembler": assembler.name()}
