"""What a row of the RISC-V instruction table is: operands, words in the manual's bits, meaning.

Enters: short strings from instructions.py. Leaves: `Row` and `Operand` objects, made when they are first asked for.
Holds: a row is constant after it was made, and is compared by identity.

Syntax: what GNU as takes, with operands in angle brackets: a letter for what it is, then the letter of its field in
the word.
  <Xd> <Fd> <Vd>   general, float or vector register
  <#i> <#u>        immediate, signed or unsigned
  <mem>            memory; its bits stand with the row. Scalars are at a register and 12 bits, vectors at a register;
                   an index is how far lanes lie apart, or where each lies
  <label>          where a jump goes
A register in field d is written, others are read; behind the letter `=` says that it is written, `-` that it is read,
`+` that it is read and written. Of memory `=` and `+` say the same, and `&` that only its address counts.
Words: 32 characters of 0, 1 and fields' letters, the most significant first; letters of one field make its number in
that order, but those of a distance, `b` of branches and `j` of jumps, as the manual has them (2.3); a capital repeats
a field. Blanks mean nothing. Fields d, s and t are the manual's rd (vd), rs1 (vs1) and rs2 (vs2); `m` are the 12 bits
of an address, `x` and `w` a general or vector register as its index.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .registers import COUNTS, MASK

NOP = (0x00000013).to_bytes(4, "little")
"""What pads code."""
DISTANCE_BYTES = 2
"""By what jumps count."""
ANY = -1
"""As `element` of a row: whatever elements there are, the number of them counts."""
_KINDS = {"X": "gpr", "F": "fpr", "V": "vec"}
_OPERAND = re.compile(r"<([^>]+)>")
_SCATTERED = {"b": (31, 7, *range(30, 24, -1), *range(11, 7, -1)),
              "j": (31, *range(19, 11, -1), 20, *range(30, 20, -1))}
"""Places of the bits of distances, the most significant first."""


@dataclass(frozen=True, slots=True)
class Operand:
    """One explicit operand of a row.

    role: "r", "w", "rw", or "a" (only the address is used). kind: "gpr", "fpr", "vec", "imm", "mem" or "label". bits:
    of the register, or of memory. field: its letter in the word. signed: of an immediate. count: bits of its field.
    memory_bits: of memory. index_bits, broadcast_bits: no address is of a vector, no operand a spread element.
    """

    role: str
    kind: str
    bits: int
    field: str = ""
    signed: bool = False
    count: int = 0
    memory_bits: int = 0
    index_bits: int = 0
    broadcast_bits: int = 0

    @property
    def reads(self) -> bool:
        return "r" in self.role

    @property
    def writes(self) -> bool:
        return "w" in self.role

    def register_code(self, register: Any) -> int | None:
        """What the word has for a register; None for one that may not stand here."""
        number: int = register.number
        return number if register.kind == self.kind and 0 <= number < COUNTS[self.kind] else None

    def immediate_codes(self, value: int) -> dict[str, int] | None:
        """What the word has for an immediate, by field; None for one that it can't hold."""
        low = -(1 << self.count - 1) if self.signed else 0
        return {self.field: value % (1 << self.count)} if low <= value < low + (1 << self.count) else None


@dataclass(frozen=True, slots=True)
class Word:
    """How a row is written. fixed: bits that are always the same. fields: the places of each field's bits, the most
    significant first; that of a distance is called `l`."""

    fixed: int
    fields: dict[str, tuple[int, ...]]

    def reaches(self, memory: Any, size_bytes: int) -> dict[str, int] | None:
        """What the word has for memory, by field; None if it is not reached so."""
        del size_bytes
        base, index = memory.base, memory.index
        if memory.label is not None or memory.broadcast or base.kind != "gpr" \
                or not 0 <= base.number < COUNTS["gpr"]:
            return None
        found = {"s": base.number}
        letter = "" if index is None else {"gpr": "x", "vec": "w"}.get(index.kind, "")
        if (index is None) != self.fields.keys().isdisjoint("xw") or (letter and letter not in self.fields) \
                or memory.scale != 1:
            return None
        if index is not None:
            found[letter] = index.number
        places = self.fields.get("m")
        if places is None:
            return None if memory.disp else found
        # Hints about memory count by 32 bytes.
        unit = 1 << 12 - len(places)
        if memory.disp % unit or not -(1 << 11) <= memory.disp < 1 << 11:
            return None
        return found | {"m": memory.disp // unit % (1 << len(places))}

    def with_codes(self, codes: dict[str, int]) -> int | None:
        """The word, with these numbers in its fields; None if one is too large."""
        word = self.fixed
        for letter, places in self.fields.items():
            number = codes[letter.lower()]
            if not 0 <= number < 1 << len(places):
                return None
            for place in reversed(places):
                word |= (number & 1) << place
                number >>= 1
        return word


class Row:
    """One instruction form.

    name: unique and stable: the mnemonic, then what tells forms apart. word: its bits; "" of what settle.py puts
    several instructions in the place of. meaning: f(*reads) -> written value, or a tuple in the order of operands;
    reads are operands whose role has "r", immediates included, then v0 if `masked`. General and float registers are
    unsigned Python ints of 64 bits; vectors are NumPy arrays with an element for each lane, of `dtypes`: those of the
    vectors among the operands, in order; memory is what it holds. None: no value (jumps, fences).
    element: bits of the elements that the processor has to be set to; 0: it asks nothing of that, ANY: see there.
    vector_bits: of a vector register. masked: takes v0. control, implicit_*, side_effects: see x86-64's rows, which
    have the same. cost: the class of its costs (costs.py). stores: a register goes to memory.
    """

    __slots__ = ("_operands", "_words", "control", "cost", "dtypes", "element", "features", "implicit_reads",
                 "implicit_writes", "masked", "meaning", "memory_bits", "mnemonic", "name", "pattern", "side_effects",
                 "stores", "syntax", "vector_bits")

    blend = False
    masking = mask_role = ""
    """A mask is an operand that is not named: v0."""
    flags_read = flags_written = ""
    """There are none."""

    def __init__(self, name: str, syntax: str, word: str, meaning: Callable[..., Any] | None, cost: str,
                 dtypes: str = "", element: int = 0, vector_bits: int = 0, masked: bool = False, memory_bits: int = 0,
                 control: str = "", implicit_reads: tuple[tuple[str, int], ...] = (),
                 implicit_writes: tuple[tuple[str, int], ...] = (), side_effects: bool = False,
                 features: frozenset[str] = frozenset()) -> None:
        self.name = name
        self.syntax = syntax
        self.mnemonic = syntax.partition(" ")[0]
        self.pattern = word.replace(" ", "")
        self.meaning = meaning
        self.cost = cost
        self.dtypes = tuple(dtypes.split())
        self.element = element
        self.vector_bits = vector_bits
        self.masked = masked
        self.memory_bits = memory_bits
        self.control = control
        self.implicit_reads = (*implicit_reads, *((("vec", MASK),) if masked else ()))
        self.implicit_writes = implicit_writes
        self.side_effects = side_effects
        self.features = features
        self.stores = cost.startswith(("store", "scatter"))
        self._operands: tuple[Operand, ...] | None = None
        self._words: tuple[Word, ...] | None = None

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The explicit operands in the manual's order; of a store memory comes first, as what is written does
        elsewhere."""
        found = self._operands
        if found is None:
            found = self._operands = tuple(self._operand(text) for text in _OPERAND.findall(self.syntax))
            if self.stores:
                found = self._operands = found[::-1]
        return found

    @property
    def words(self) -> tuple[Word, ...]:
        """One, or none."""
        found = self._words
        if found is None:
            found = self._words = (_word(self.name, self.pattern),) if self.pattern else ()
        return found

    def _operand(self, text: str) -> Operand:
        if text == "label":
            return Operand("r", "label", 64, "l")
        if text[:3] == "mem":
            role = {"=": "w", "+": "rw", "&": "a"}.get(text[3:], "r")
            return Operand(role, "mem", self.memory_bits, "s", memory_bits=self.memory_bits)
        if text[0] == "#":
            return Operand("r", "imm", 64, text[1], signed=text[1] == "i", count=self.pattern.count(text[1]) or 64)
        letter, field, mark = text[0], text[1], text[2:]
        role = {"=": "w", "+": "rw", "-": "r", "": "w" if field == "d" else "r"}[mark]
        return Operand(role, _KINDS[letter], self.vector_bits if letter == "V" else 64, field)

    @property
    def _core(self) -> Any:
        from .costs import CORES

        return CORES["spacemit-x60"]

    @property
    def latency(self) -> int:
        """Cycles from the registers read to the result on a SpacemiT X60, 0 of a load; see costs.py."""
        return int(self._core.cost_of(self).latency)

    @property
    def throughput(self) -> float:
        """Cycles for each instruction in a long independent run (reciprocal throughput)."""
        return float(self._core.cost_of(self).throughput)

    @property
    def ports(self) -> tuple[str, ...]:
        """The pipes that can execute it."""
        return tuple(self._core.cost_of(self).ports)

    def __repr__(self) -> str:
        return f"<row {self.name}>"


def _word(name: str, pattern: str) -> Word:
    if len(pattern) != 32:
        raise ValueError(f"row {name}: found {len(pattern)} bits in {pattern!r}; expected 32")
    fields: dict[str, tuple[int, ...]] = {}
    for place, letter in enumerate(pattern):
        if letter in _SCATTERED:
            fields["l"] = _SCATTERED[letter]
        elif letter not in "01":
            fields[letter] = (*fields.get(letter, ()), 31 - place)
    fixed = int("".join(c if c in "01" else "0" for c in pattern), 2)
    return Word(fixed, fields)
