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
from ..assembly.routines import inlined
from ..assembly.static import check_static
from ..assembly.text import TextReader
from ..codegen.machine import Instruction, MachineFunction, Register
from ..ir.nodes import Location
from ..targets.x86_64 import assembly as table
from ..targets.x86_64.target import target

LEAST = target("v3")
"""What every target has for which models are built."""


def check(assembly: Assembly) -> None:
    """The static checks. Raises AssemblyError."""
    for number in range(len(table.ARGUMENTS)):
        assembly.inputs[Register(*table.ARGUMENTS[number])] = None
    check_static(inlined(assembly), LEAST, frozenset({"loop", "footprint"}))


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
    Raises AssemblyError, at the line of the text: also for what sapper/assembly/static.py finds, in routines as often
    as they are called. Not checked are the ends of loops, which wait for other threads or look for what the data has,
    and addresses, which lie in memory themselves.
    """
    assembly = Assembly(name, table, naked=True)
    used = {key: label for key, label in (reaches or {}).items() if f"@{key}\n" in text}
    named = {key: Address(label=label) for key, label in used.items()}
    named |= {key: assembly.constant(content, align_bytes=1) for key, content in (constants or {}).items()}
    TextReader(assembly, "intel", {**(numbers or {}), **named}, Location(name, 0, 1, 1)).read(text)
    check(assembly)
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


