"""Machine IR: a list of instructions, each a row of the target's table with operands.

Before allocation registers may be virtual; after it all are physical. Operand order is the vendor's (Intel) order.
The width of a register operand is the row's affair: `Register("vec", 3)` is xmm3, ymm3 or zmm3 as the row says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Union

from ..ir.nodes import Location


class Register(NamedTuple):
    """A physical register. kind: "gpr", "vec" or "mask" (a target may name others)."""

    kind: str
    number: int


class VirtualRegister:
    """A register still to be allocated; compared by identity. number is unique in its function and orders output."""

    __slots__ = ("hint", "kind", "number")

    def __init__(self, kind: str, number: int, hint: Register | None = None) -> None:
        self.kind = kind
        self.number = number
        self.hint = hint

    def __repr__(self) -> str:
        return f"%{self.kind}{self.number}"


AnyRegister = Union[Register, VirtualRegister]


@dataclass(slots=True)
class Memory:
    """[base + index * scale + disp], or [rip + label + disp] when `label` is set.

    broadcast: one element spread over the vector, where the row allows it.
    index may be a vector register (gather, scatter).
    """

    base: AnyRegister | None = None
    index: AnyRegister | None = None
    scale: int = 1
    disp: int = 0
    broadcast: bool = False
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Immediate:
    value: int


@dataclass(frozen=True, slots=True)
class LabelReference:
    """The target of a jump, or of a rip-relative address."""

    name: str


Operand = Union[Register, VirtualRegister, Memory, Immediate, LabelReference]


class Instruction:
    """One instruction. row: the target table's row. mask: opmask register; zeroing: masked lanes become 0."""

    __slots__ = ("comment", "location", "mask", "operands", "row", "zeroing")

    def __init__(
        self,
        row: Any,
        operands: list[Operand],
        mask: AnyRegister | None = None,
        zeroing: bool = False,
        location: Location | None = None,
        comment: str = "",
    ) -> None:
        self.row = row
        self.operands = operands
        self.mask = mask
        self.zeroing = zeroing
        self.location = location
        self.comment = comment


@dataclass(slots=True)
class Label:
    """A place in the instruction list. align: pad to a multiple of so many bytes."""

    name: str
    align: int = 1


@dataclass(slots=True)
class MachineFunction:
    """Instructions and labels in order, and the constants that lie beside the code.

    constants: label -> (alignment in bytes, bytes), reached by rip-relative addresses: no relocation is needed.
    frame_bytes: stack space for spills, set by the allocator.
    externals: labels that stand elsewhere (other functions, writable memory), reached by rip-relative addresses that
    who puts the parts together fills in.
    parameters: names of the words of the argument block, for targets that pass each as a parameter.
    warps, near_bytes: warps and near memory of a worker. near_buffers: what lies there, as (name, first byte, bytes);
    some may overlap, one after another. cluster: workers of one. tensor_maps: see `Compiled`.
    ordered: labels after which instructions keep the order in which they were written by hand. most_registers: of a
    thread, where the target's assembler gives them; 0: as many as it likes.
    """

    name: str
    body: list[Instruction | Label]
    constants: dict[str, tuple[int, bytes]]
    frame_bytes: int = 0
    externals: frozenset[str] = frozenset()
    parameters: tuple[str, ...] = ()
    warps: int = 1
    near_bytes: int = 0
    cluster: int = 1
    near_buffers: tuple[tuple[str, int, int], ...] = ()
    ordered: frozenset[str] = frozenset()
    tensor_maps: tuple[Any, ...] = ()
    most_registers: int = 0

    def instruction_count(self) -> int:
        """How many instructions there are; labels are none."""
        return list(map(type, self.body)).count(Instruction)
