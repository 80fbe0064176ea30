"""Functions of a model's file that are written by hand, as assembly text.

Enters: text in Intel syntax, and what its `@name`s stand for. Leaves: a `Written`: machine code made of the rows that
kernels are made of, with the author's comments. Holds: a name of `reaches` is the address of another function, table or
area of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..assembly.build import Assembly
from ..assembly.notation import Address
from ..assembly.text import TextReader
from ..codegen.machine import Instruction, MachineFunction
from ..ir.nodes import Location
from ..targets.x86_64 import assembly as table


@dataclass(frozen=True, slots=True)
class Written:
    """notes: the lines of comment at the head of the text."""

    machine: MachineFunction
    notes: list[str]


def written(name: str, text: str, numbers: Mapping[str, int] | None = None,
            reaches: Mapping[str, str] | None = None, constants: Mapping[str, bytes] | None = None) -> Written:
    """A function called `name`.

    numbers: `@name` -> an immediate or displacement. reaches: `@name` -> a name of the file, whose address
    `lea rax, @name` loads. constants: `@name` -> bytes beside the code, reached in the same way.
    Raises AssemblyError, at the line of the text.
    """
    assembly = Assembly(name, table, naked=True)
    used = {key: label for key, label in (reaches or {}).items() if f"@{key}\n" in text}
    named = {key: Address(label=label) for key, label in used.items()}
    named |= {key: assembly.constant(content, align_bytes=1) for key, content in (constants or {}).items()}
    TextReader(assembly, "intel", {**(numbers or {}), **named}, Location(name, 0, 1, 1)).read(text)
    made = assembly.machine()
    lines = text.split("\n")
    for item in made.body:
        if isinstance(item, Instruction) and item.location is not None:
            item.comment = lines[item.location.line].partition("#")[2].strip()
            item.location = None
    rest = [line.strip() for line in lines if line.strip()]
    head = next((i for i, line in enumerate(rest) if not line.startswith("#")), len(rest))
    machine = MachineFunction(name, made.body, made.constants, externals=frozenset(used.values()))
    return Written(machine, [line.lstrip("# ") for line in rest[:head]])


