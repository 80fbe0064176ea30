"""Code that the target's own assembler finishes: its loops, and what that assembler makes of it, where it is at hand.

Enters: a function as selected, its registers virtual, and its text. Leaves: an `Outline`, plain data for the command
line. Holds: no costs: the assembler gives registers and orders instructions, so its figures stand beside ours.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from ..ir.nodes import Location
from .machine import Instruction, Label, LabelReference, MachineFunction


@dataclass(slots=True)
class OutlineRow:
    """One instruction. place: in the body. labels: that stand before it."""

    place: int
    text: str
    location: Location | None
    labels: list[str]


@dataclass(slots=True)
class OutlineLoop:
    """A stretch of code that ends in a jump back to its label. first, last: places. opcodes: how often each stands in
    it, the commonest first. lines: source lines that it comes from."""

    label: str
    depth: int
    innermost: bool
    first: int
    last: int
    instructions: int
    opcodes: dict[str, int]
    lines: list[tuple[str, int]]


@dataclass(slots=True)
class Outline:
    """A function outlined."""

    name: str
    target: str
    rows: list[OutlineRow]
    loops: list[OutlineLoop]

    def hottest(self) -> OutlineLoop | None:
        """Of the deepest loops the longest."""
        return max(self.loops, key=lambda loop: (loop.depth, loop.instructions), default=None)


def outline(function: MachineFunction, target: Any) -> Outline:
    """Outline a selected function."""
    texts = import_module(f"...targets.{target.family}.text", __name__).item_texts(function)
    rows: list[OutlineRow] = []
    waiting: list[str] = []
    starts: dict[str, int] = {}
    spans: list[tuple[int, int, str]] = []
    for place, (item, text) in enumerate(zip(function.body, texts, strict=True)):
        if isinstance(item, Label):
            waiting.append(text.removesuffix(":"))
            starts[item.name] = place
            continue
        rows.append(OutlineRow(place, text, item.location, waiting))
        waiting = []
        target_label = next((o.name for o in item.operands if isinstance(o, LabelReference)), None)
        if target_label in starts:
            spans.append((starts[target_label], place, texts[starts[target_label]].removesuffix(":")))
    return Outline(function.name, target.name, rows, [_loop(function, span, spans) for span in sorted(spans)])


def _loop(function: MachineFunction, span: tuple[int, int, str], spans: list[tuple[int, int, str]]) -> OutlineLoop:
    first, last, label = span
    inside = [item for item in function.body[first:last + 1] if isinstance(item, Instruction)]
    opcodes = Counter(item.row.mnemonic for item in inside)
    others = [(a, b) for a, b, _ in spans if (a, b) != (first, last)]
    return OutlineLoop(
        label, 1 + sum(a <= first and last <= b for a, b in others),
        not any(first <= a and b <= last for a, b in others), first, last, len(inside),
        dict(sorted(opcodes.items(), key=lambda pair: (-pair[1], pair[0]))),
        sorted({(item.location.file, item.location.line) for item in inside if item.location is not None}))


def assembled(text: str, target: Any) -> dict[str, Any]:
    """What the assembler says of a text: registers, spilled_bytes, instructions, opcodes (None without a disassembler).

    {"missing": why} where it is not at hand, or does not take the text.
    """
    assembler = import_module(f"...targets.{target.family}.assembler", __name__)
    try:
        (made,) = assembler.assemble([text], target.name).values()
    except assembler.AssemblerError as error:
        return {"missing": str(error)}
    figures = {key: value for key, value in asdict(made).items() if key != "code"}
    return figures | {"opcodes": made.opcodes(), "assembler": assembler.name()}
