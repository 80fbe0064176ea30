"""Machine code written by hand for sapper's own use: the workers, and the entry points of libraries.

Enters: names of rows and operands. Leaves: the body of a `MachineFunction`.
"""

from __future__ import annotations

from typing import Any

from ..targets.x86_64.instructions import ROWS
from .machine import Immediate, Instruction, Label, LabelReference, Memory, Register


class Listing:
    """A list of instructions under construction.

    Operands: an int is a general register, a string a label of the function; all else stands as it is.
    """

    def __init__(self) -> None:
        self.body: list[Instruction | Label] = []

    def __call__(self, row: str, *operands: int | str | Register | Immediate | Memory) -> None:
        converted: list[Any] = []
        for operand in operands:
            if isinstance(operand, int):
                converted.append(Register("gpr", operand))
            else:
                converted.append(LabelReference(operand) if isinstance(operand, str) else operand)
        self.body.append(Instruction(ROWS[row], converted))

    def label(self, name: str, align: int = 1) -> None:
        self.body.append(Label(name, align))


def at(base: int, disp: int = 0, index: int | None = None) -> Memory:
    """Memory at general register `base` + `index` + `disp` bytes."""
    return Memory(Register("gpr", base), None if index is None else Register("gpr", index), 1, disp)
