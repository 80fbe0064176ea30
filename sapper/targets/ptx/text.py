"""Machine IR -> PTX text.

Enters: a machine function whose registers are virtual, and a level. Leaves: a module with one kernel. Holds: ptxas
takes it for that level; the PTX version is the lowest that has every instruction; registers are declared by kind and
numbered in the order in which they appear, so the same function gives the same text. An instruction that the level
lacks raises LevelError with the author's line.

The kernel's parameters are the words of the argument block (docs/ir.md), 64 bits each: scratch, scratch_bytes, sync,
then one for each slot, such as a_data, dim_N; and the tensor maps, map_0, map_1, ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .levels import version_for
from .rows import write_line

KINDS = {"gpr": ("%rd", ".b64"), "vec": ("%r", ".b32"), "wide": ("%d", ".b64"), "pred": ("%p", ".pred"),
         "half": ("%h", ".b16")}
"""Kind of register -> prefix and type. Untyped bits go with every instruction of their size."""

BLOCK_WARPS = 4
"""Of a block, one for each quarter of an SM, where a worker is a single warp."""

NEAR = "near"
"""The symbol of a block's shared memory."""

NEAR_ALIGN_BYTES = 1024
"""Of shared memory: address bits below are those of offsets."""


SWIZZLE_BYTES = 128
"""Of the boxes that tensor maps of a kernel describe: chunks of 16 bytes are permuted in rows of so many."""
MAP_BYTES = 128
"""Of a tensor map, which starts at a multiple of half of it (PTX ISA, "tensormap")."""
SYNC_BYTES, FLAGS_AT, FLAG_BYTES = 64 << 10, 1024, 4
"""Of the sync block, zero before a launch and after; where the flags of its warps begin, which say that one handed
over (select_workers.py); and of a flag."""


def most_workers(warps: int) -> int:
    """Of so many warps, that have flags."""
    return (SYNC_BYTES - FLAGS_AT) // (FLAG_BYTES * warps)


class LevelError(ValueError):
    """An instruction that the level lacks."""


@dataclass(frozen=True, slots=True)
class SpecialRegister:
    """A register that PTX gives every thread, read by mov."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a variable."""

    name: str


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A place in a tensor: the register with its map's address, and coordinates (registers or numbers), innermost
    first."""

    map: Any
    coordinates: tuple[Any, ...]

    @property
    def registers(self) -> tuple[Any, ...]:
        """Those that it is made of."""
        return (self.map, *(part for part in self.coordinates if not isinstance(part, int)))


NOBODY = Symbol("_")
"""A result that nobody wants."""

SPECIAL = {name: SpecialRegister(name) for name in ("%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x")}


class _Printer:
    def __init__(self, machine: Any) -> None:
        self.names: dict[Any, str] = {}
        self.counts = dict.fromkeys(KINDS, 0)
        self.used: dict[str, Any] = {}
        self.machine = machine

    def register(self, register: Any) -> str:
        name = self.names.get(register)
        if name is None:
            number = self.counts[register.kind] = self.counts[register.kind] + 1
            name = self.names[register] = f"{KINDS[register.kind][0]}{number}"
        return name

    def operand(self, found: Any, operand: Any) -> str:
        """The text of one operand; operand: what the form says of it."""
        if type(found) is tuple:
            return "{" + ", ".join(self.operand(part, operand) for part in found) + "}"
        if operand.role == "l":
            return label_name(found.name)
        if isinstance(found, (SpecialRegister, Symbol)):
            return found.name
        if isinstance(found, TensorPlace):
            where = ", ".join(str(c) if isinstance(c, int) else self.register(c) for c in found.coordinates)
            return f"[{self.register(found.map)}, {{{where}}}]"
        if operand.role == "m" or hasattr(found, "disp"):
            base = self.register(found.base) if found.label is None else parameter_name(found.label)
            return f"[{base}+{found.disp}]" if found.disp else f"[{base}]"
        if hasattr(found, "value"):
            return immediate(found.value, operand.type)
        return self.register(found)

    def line(self, item: Any) -> str:
        self.used[item.row.mnemonic] = item.row
        given = list(reversed(item.operands))
        short = len(item.operands) < len(item.row.operands)     # what may be left out by `|` is never asked for
        texts = []
        for operand in item.row.operands:
            absent = short and (operand.joined or (operand.optional and operand.count and type(given[-1]) is not tuple))
            found = None if absent or not given else given.pop()
            texts.append(None if found is None else self.operand(found, operand))
        predicate = f"@{self.register(item.mask)} " if item.mask is not None else ""
        return write_line(item.row, texts, predicate)

    def item(self, item: Any) -> str:
        """A label, or an instruction."""
        return self.line(item) if hasattr(item, "row") else f"{label_name(item.name)}:"

    def body(self) -> list[str]:
        lines = []
        last = None
        for item in self.machine.body:
            text = self.item(item)
            if not hasattr(item, "row"):
                lines.append(text)
                continue
            text = f"    {text}"
            location = item.location
            if location is not None and location != last:
                text = f"{text:<64}// {location.file}:{location.line}".replace("\n", " ")
                last = location
            lines.append(text)
        return lines


def item_texts(machine: Any) -> list[str]:
    """The text of each item of the body, with the registers of `print_function`."""
    return items_and_names(machine)[0]


def items_and_names(machine: Any) -> tuple[list[str], dict[Any, str]]:
    """The same, and the name of each register."""
    printer = _Printer(machine)
    return [printer.item(item) for item in machine.body], printer.names


def first_line(text: str, machine: Any) -> int:
    """Of the text that `print_function` gave for a function, the line, from 1, of the first item of its body."""
    return text.count("\n") - len(machine.body)


def label_name(name: str) -> str:
    """A label of machine IR as PTX takes it."""
    return "$" + _identifier(name.lstrip("."))


def parameter_name(name: str) -> str:
    """a_data for the slot a.data."""
    return _identifier(name.replace(".", "_"))


def map_name(number: int) -> str:
    """The parameter that is a tensor map."""
    return f"map_{number}"


def _identifier(name: str) -> str:
    """Characters that PTX does not take become _xx."""
    return "".join(c if c == "_" or (c.isalnum() and c.isascii()) else f"_{ord(c):x}" for c in name)


def immediate(value: int, type_: str) -> str:
    """Bits, or an integer, as a constant of a type. A float is written by its bits."""
    if type_ == "f32":
        return f"0f{value & 0xFFFFFFFF:08X}"
    if type_ == "f64":
        return f"0d{value & 0xFFFFFFFFFFFFFFFF:016X}"
    return str(value) if -(2**20) < value < 2**20 else hex(value)


def check_level(machine: Any, level: str) -> None:
    """Raises LevelError where the level lacks an instruction."""
    legal: set[str] = set()
    for item in machine.body:
        if not hasattr(item, "row") or item.row.mnemonic in legal:
            continue
        problem = item.row.illegal_on(level)
        if problem is not None:
            where = f"{item.location}: " if item.location is not None else ""
            raise LevelError(f"{where}{machine.name}: {problem}")
        legal.add(item.row.mnemonic)


def block_warps(machine: Any) -> int:
    """Warps of a block."""
    warps: int = machine.warps
    return warps if warps > 1 else BLOCK_WARPS


def print_function(machine: Any, level: str) -> str:
    """The whole module."""
    check_level(machine, level)
    printer = _Printer(machine)
    body = printer.body()
    major, minor = version_for(level, [form.needs for form in printer.used.values()])
    declared = [f"    .reg {type_} {prefix}<{printer.counts[kind] + 1}>;"
                for kind, (prefix, type_) in KINDS.items() if printer.counts[kind]]
    near = [f".extern .shared .align {NEAR_ALIGN_BYTES} .b8 {NEAR}[];", ""] if machine.near_bytes else []
    maps = [f"    .param .align {MAP_BYTES // 2} .b8 {map_name(number)}[{MAP_BYTES}]"
            for number in range(len(machine.tensor_maps))]
    return "\n".join([
        f".version {major}.{minor}", f".target {level}", ".address_size 64", "", *near,
        f".visible .entry {_identifier(machine.name)}(",
        ",\n".join([*(f"    .param .b64 {parameter_name(name)}" for name in machine.parameters), *maps]), ")",
        # One block on an SM is enough: ptxas then spills nothing for the sake of a second.
        f".reqntid {32 * block_warps(machine)}, 1, 1",
        *([f".reqnctapercluster {machine.cluster}, 1, 1"] if machine.cluster > 1 else []),
        f".maxnreg {machine.most_registers}" if machine.most_registers else ".minnctapersm 1",
        "{", *declared, "", *body, "}", ""])
