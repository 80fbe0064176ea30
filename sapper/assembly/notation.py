"""Registers, memory operands and mnemonics as Python values.

    acc = a.zmm()                         a virtual register; x86.zmm3 or a.pin("zmm3") is that register
    ptr[base + index * 4 + 8]             memory whose size the instruction says; dword[...] says it itself
    broadcast[base + 8]                   one element spread over the lanes
    acc[k1], acc[k1, z]                   under an opmask: merging, zeroing
    x86.vaddps(acc, acc, ptr[base])       adds an instruction to the assembly being built

Holds: a value made here is constant. Which form of an instruction is meant follows from the kinds and sizes of the
operands alone: the first row of the table that takes them, as an assembler does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Union

from ..codegen.encode import forms_of
from ..codegen.machine import AnyRegister, Immediate, LabelReference, Memory, Register, VirtualRegister
from .errors import AssemblyError, UnknownInstruction, author_location

z = "z"
"""Written after an opmask: lanes that are off become 0."""

_PREFIXES = {"vex": "{vex}"}
"""Prefixes of mnemonics that are spelled otherwise in a Python name."""
_SIZES = {"gpr": (8, 16, 32, 64), "vec": (128, 256, 512), "mask": (64,), "tile": (8192,)}


class Reg:
    """A register used at a size. kind: "gpr", "vec", "mask" or "tile". bits: the size. register: of machine IR.

    owner: for a pinned register the object that stands for the value held in it, else None. mask, zeroing: of `r[k]`.
    """

    __slots__ = ("bits", "kind", "mask", "owner", "register", "zeroing")

    def __init__(self, kind: str, bits: int, register: AnyRegister, owner: Any = None, mask: Reg | None = None,
                 zeroing: bool = False) -> None:
        self.kind = kind
        self.bits = bits
        self.register = register
        self.owner = owner
        self.mask = mask
        self.zeroing = zeroing

    def at(self, bits: int) -> Reg:
        """The same register at another size."""
        if bits not in _SIZES[self.kind]:
            raise AssemblyError("notation", f"a {self.kind} register has no {bits} bits", author_location(), str(bits),
                                ", ".join(map(str, _SIZES[self.kind])))
        return Reg(self.kind, bits, self.register, self.owner)

    @property
    def xmm(self) -> Reg:
        return self.at(128)

    @property
    def ymm(self) -> Reg:
        return self.at(256)

    @property
    def zmm(self) -> Reg:
        return self.at(512)

    @property
    def r32(self) -> Reg:
        return self.at(32)

    @property
    def r64(self) -> Reg:
        return self.at(64)

    def __getitem__(self, under: Any) -> Reg:
        """`r[k]`: only the lanes that the opmask k has on are written; `r[k, z]`: the others become 0."""
        mask, zeroing = _under(under)
        return Reg(self.kind, self.bits, self.register, self.owner, mask, zeroing)

    def __add__(self, other: Any) -> Address:
        return Address.of(self).plus(other)

    __radd__ = __add__

    def __sub__(self, other: int) -> Address:
        return Address.of(self).plus(-other)

    def __mul__(self, scale: int) -> Address:
        return Address(None, self, scale)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        inner = self.register
        name = f"{inner.kind}{inner.number}"
        return f"{'%' if isinstance(inner, VirtualRegister) else ''}{name}:{self.bits}"


def _under(under: Any) -> tuple[Reg, bool]:
    """The opmask and whether it zeroes, of `k` or `k, z`."""
    mask, zeroing = under if isinstance(under, tuple) and len(under) == 2 else (under, None)
    if not isinstance(mask, Reg) or mask.kind != "mask" or zeroing not in (None, z):
        raise AssemblyError("notation", "an operand is put under an opmask", author_location(), repr(under),
                            "an opmask register, or an opmask register and z", "write r[k] or r[k, z]")
    if mask.register == Register("mask", 0):
        raise AssemblyError("notation", "an operand is put under an opmask", author_location(), "k0", "k1 to k7",
                            "encodings take k0 for no opmask")
    return mask, zeroing == z


class Address:
    """base + index * scale + disp, of registers; or a label + disp."""

    __slots__ = ("base", "disp", "index", "label", "scale")

    def __init__(self, base: Reg | None = None, index: Reg | None = None, scale: int = 1, disp: int = 0,
                 label: str | None = None) -> None:
        if scale not in (1, 2, 4, 8):
            raise AssemblyError("notation", "an index is scaled", author_location(), str(scale), "1, 2, 4 or 8",
                                "multiply into a register first")
        self.base = base
        self.index = index
        self.scale = scale
        self.disp = disp
        self.label = label

    @staticmethod
    def of(value: Any) -> Address:
        """An address from a register, an integer or an address."""
        if isinstance(value, Address):
            return value
        if isinstance(value, Reg):
            return Address(None, value, 1) if value.kind == "vec" else Address(value)
        if isinstance(value, int):
            return Address(disp=value)
        raise AssemblyError("notation", "an address", author_location(), type(value).__name__,
                            "registers and integers: base + index * scale + disp")

    def __add__(self, other: Any) -> Address:
        return self.plus(other)

    def plus(self, value: Any) -> Address:
        """The sum with a register, an integer or another address."""
        other = Address.of(value)
        terms = [(self.base, 1, False), (self.index, self.scale, True), (other.base, 1, False),
                 (other.index, other.scale, True)]
        registers = [(r, s, i) for r, s, i in terms if r is not None]
        # A register without a scale may be base or index; the one that is scaled, or a vector, must be the index. Of
        # two without, the first is the base; for rows of tiles it matters, as the index is how far they lie apart.
        registers.sort(key=lambda term: (term[1] != 1, term[0].kind == "vec", term[2]))
        label = self.label or other.label
        scaled = [term for term in registers if term[1] != 1 or term[0].kind == "vec"]
        if len(registers) > 2 or len(scaled) > 1 or (label and registers):
            raise AssemblyError("notation", "an address with too many parts", author_location(), "",
                                "one base and one index at most, and none beside a label", "add registers first (lea)")
        # One that was written with a scale stays the index, as GNU as has it; others that are alone are the base.
        alone = len(registers) == 1 and registers[0][2]
        base = registers[0][0] if len(registers) > len(scaled) and not alone else None
        rest = registers if base is None else registers[1:]
        index, scale, _ = rest[0] if rest else (None, 1, True)
        return Address(base, index, scale, self.disp + other.disp, label)

    __radd__ = __add__

    def __sub__(self, other: int) -> Address:
        return self + -other


ANY = -1


class Mem:
    """A memory operand. bits: its size, 0 where the instruction says it. spread: over how many lanes one element is
    broadcast, 0 for none, ANY where the instruction says it.

    mask, zeroing: as of a register; a store touches only the lanes that are on.
    """

    __slots__ = ("address", "bits", "mask", "spread", "zeroing")

    def __init__(self, address: Address, bits: int = 0, spread: int = 0, mask: Reg | None = None,
                 zeroing: bool = False) -> None:
        self.address = address
        self.bits = bits
        self.spread = spread
        self.mask = mask
        self.zeroing = zeroing

    def __getitem__(self, under: Any) -> Mem:
        """`ptr[...][k]`: a store under an opmask."""
        return Mem(self.address, self.bits, self.spread, *_under(under))

    def __repr__(self) -> str:
        return f"memory:{self.bits or '?'}{' broadcast' if self.spread else ''}"


class _Pointer:
    """`ptr[...]` and its kin."""

    __slots__ = ("bits", "spread")

    def __init__(self, bits: int = 0, spread: int = 0) -> None:
        self.bits = bits
        self.spread = spread

    def to(self, lanes: int) -> _Pointer:
        """`broadcast.to(4)[...]`: to so many lanes, where the instruction does not say it."""
        return _Pointer(self.bits, lanes)

    def __getitem__(self, address: Any) -> Mem:
        return Mem(Address.of(address), self.bits, self.spread)


ptr = _Pointer()
broadcast = _Pointer(spread=ANY)


class LabelName:
    """A place in the code. Made by `Assembly.label`."""

    __slots__ = ("location", "name", "placed")

    def __init__(self, name: str) -> None:
        self.name = name
        self.placed = False
        self.location = author_location()


Given = Union[Reg, Mem, int, LabelName]


def fits(spec: Any, given: Given) -> bool:
    """Whether what was written may stand where the row has this operand."""
    if isinstance(given, Reg):
        if spec.kind != given.kind or (spec.kind != "mask" and spec.bits != given.bits):
            return False
        if spec.fixed is None:
            return True
        return isinstance(given.register, Register) and given.register.number == spec.fixed
    if isinstance(given, Mem):
        if given.spread:
            return (spec.broadcast_bits > 0 and given.bits in (0, spec.broadcast_bits)
                    and given.spread in (ANY, spec.memory_bits // spec.broadcast_bits))
        index = given.address.index
        vector_index = index.bits if index is not None and index.kind == "vec" else 0
        if not spec.memory_bits or vector_index != spec.index_bits:
            return False
        return given.bits in (0, spec.memory_bits) or spec.role == "a"
    if isinstance(given, LabelName):
        return bool(spec.kind == "label")
    bits = spec.bits if spec.kind == "imm" else spec.immediate_bits
    if spec.unsigned_byte:
        return 0 <= given < 256
    # A shorter immediate is sign-extended to the operand's size; one as long as the operand may be read without a sign.
    most = 1 << (bits if bits == spec.bits else bits - 1) if bits else 0
    return bool(bits > 0 and -(1 << bits - 1) <= given < most)


def choose(table: Any, mnemonic: str, operands: Sequence[Given]) -> Any:
    """The row meant by a mnemonic and operands. Raises AssemblyError: unknown-instruction, operands."""
    rows = table.rows_of(mnemonic)
    if not rows:
        raise unknown(table, mnemonic)
    alone = [row for row in rows if len(row.operands) == len(operands)
             and all(fits(spec, given) for spec, given in zip(row.operands, operands, strict=True))]
    kinds = tuple(_OF_MACHINE[type(given)] for given in operands)
    found = [row for row in alone if kinds in forms_of(row)]
    if alone and not found:
        raise AssemblyError(
            "operands", f"{mnemonic} takes no such operands together", author_location(),
            ", ".join(map(repr, operands)),
            " | ".join(dict.fromkeys(describe(row, form) for row in alone for form in forms_of(row))))
    if not found:
        raise AssemblyError(
            "operands", f"{mnemonic} takes no such operands", author_location(), ", ".join(map(repr, operands)),
            " | ".join(dict.fromkeys(describe(row) for row in rows)),
        )
    sizes = {tuple(_memory_size(spec, given) for spec, given in zip(row.operands, operands, strict=True))
             for row in found}
    if len(sizes) > 1:
        raise AssemblyError("operands", f"{mnemonic} does not say how large the memory is", author_location(),
                            "ptr[...]", " or ".join(row.name for row in found),
                            "write the size: dword[...], xmmword[...], or broadcast.to(4)[...]")
    return found[0]


def _memory_size(spec: Any, given: Given) -> int:
    if not isinstance(given, Mem) or spec.role == "a":
        return 0
    return int(spec.memory_bits)


_OF_MACHINE: dict[type, type] = {Reg: Register, Mem: Memory, int: Immediate, LabelName: LabelReference}


def describe(row: Any, form: Sequence[type] = ()) -> str:
    """A row's operands in the notation of the table; or one of its forms, by the class of each operand."""
    names = {"gpr": "r", "vec": "v", "mask": "k", "tile": "t", "imm": "i", "mem": "m", "label": "label"}
    parts: list[str] = []
    for spec in row.operands:
        name = "u" if spec.kind == "imm" and spec.unsigned_byte else names[spec.kind]
        text = name + (str(spec.bits) if spec.kind in ("gpr", "vec", "imm") else "")
        if spec.memory_bits and spec.kind != "mem":
            text += f"/m{spec.memory_bits}"
        if spec.kind == "mem":
            text = "sibmem" if spec.sibmem else f"m{spec.memory_bits}"
        if spec.broadcast_bits:
            text += f"/b{spec.broadcast_bits}"
        if spec.immediate_bits and spec.kind != "imm":
            text += f"/{'u' if spec.unsigned_byte else 'i'}{spec.immediate_bits}"
        if form and "/" in text:
            first = {Memory: "m", Immediate: "ui"}.get(form[len(parts)], "")
            text = next(part for part in text.split("/") if not first or part[0] in first)
        parts.append(text)
    return f"{row.name} {' '.join(parts)}".strip()


@lru_cache(256)
def _near(table: Any, mnemonic: str) -> list[str]:
    """Mnemonics much like this one. Who reads AT&T text asks again and again, of names with the suffix of a size."""
    from difflib import get_close_matches

    return get_close_matches(mnemonic, table.mnemonics(), 5, 0.6)


def unknown(table: Any, mnemonic: str) -> AssemblyError:
    """The error for a mnemonic that no row has: the nearest ones, and where a row is added."""
    def nearest() -> str:
        near = _near(table, mnemonic)
        return f"one of the {len(table.mnemonics())} mnemonics of {table.FAMILY}" + (
            f"; near: {', '.join(near)}" if near else "")

    return UnknownInstruction(f"no row of the table is called {mnemonic}", mnemonic, nearest)


class Mnemonic:
    """An instruction of a target as a callable; `table` is the target's module of facts for assembly by hand.

    Called while an assembly is built it adds an instruction. In a tile kernel it is named in `asm`.
    """

    __slots__ = ("__name__", "family", "name", "table")

    def __init__(self, table: Any, name: str) -> None:
        self.table = table
        self.family: str = table.FAMILY
        self.name = name
        self.__name__ = name

    # What `asm` asks of a piece (lang/by_hand.py).

    implements = ""
    module = __name__
    features: frozenset[str] = frozenset()
    """Its author declares none: those of its row count."""

    @property
    def key(self) -> str:
        return f"{self.family}:{self.name}"

    def usable(self, family: str, features: frozenset[str], lanes: int, inputs: tuple[Any, ...], result: Any) -> bool:
        return bool(self._piece().usable(family, features, lanes, inputs, result))

    def misfit(self, tiles: int, immediates: int) -> str:
        """The forms of the instruction, where none computes a vector register from so many others and immediates."""
        rows = self.table.rows_of(self.name)
        for row in rows:
            others = row.operands if row.operands and row.operands[0].role == "rw" else row.operands[1:]
            numbers = others[tiles:]
            if (row.operands and row.operands[0].writes and len(others) == tiles + immediates
                    and all(spec.kind == "vec" for spec in (row.operands[0], *others[:tiles]))
                    and all(spec.kind == "imm" or spec.immediate_bits for spec in numbers)
                    and (Register,) * (len(row.operands) - immediates) + (Immediate,) * immediates in forms_of(row)):
                return ""
        return " | ".join(dict.fromkeys(describe(row) for row in rows))

    def digest(self) -> str:
        return self.key

    def run(self, rows: list[Any], immediates: list[int]) -> Any:
        return self._piece().run(rows, immediates)

    def select(self, selector: Any, op: Any) -> None:
        self._piece().select(selector, op)

    def check_op(self, op: Any, target: Any) -> None:
        self._piece().check_op(op, target)

    def check_kept(self, machine: Any, target: Any) -> None:
        """An instruction asks for nothing."""

    def _piece(self) -> Any:
        from .block import instruction_piece

        return instruction_piece(self.table, self.name)

    def __call__(self, *operands: Any, comment: str = "") -> None:
        from .build import current

        current().emit(self.name, operands, comment)

    def __repr__(self) -> str:
        return f"<{self.family} {self.name}>"


def names_of(table: Any) -> dict[str, Any]:
    """Register names and sized pointers of a target; its mnemonics are made when they are asked for."""
    found: dict[str, Any] = {name: Reg(kind, bits, Register(kind, number))
                             for name, (kind, number, bits) in table.REGISTERS.items()}
    found |= {name: _Pointer(bits) for name, bits in table.MEMORY_BITS.items()}
    return found


def mnemonic_named(table: Any, name: str) -> Mnemonic | None:
    """The mnemonic of a Python name: `and_` is and, `lock_add` is lock add, `vex_vpdpbusd` is {vex} vpdpbusd."""
    prefix, _, stem = name.removesuffix("_").rpartition("_")
    plain = f"{_PREFIXES.get(prefix, prefix)} {stem}".strip()
    return Mnemonic(table, plain) if table.rows_of(plain) else None
