"""What a row of the AArch64 instruction table is: operands, words in the manual's notation, meaning.

Enters: short strings from instructions.py. Leaves: `Row` and `Operand` objects, made when they are first asked for.
Holds: a row is constant after it was made, and is compared by identity.

Syntax: what GNU as takes, with operands in angle brackets, as the manual has them: a letter for what it is, then the
letter of its field in the word.
  <Xd> <Wd>      general register of 64 or 32 bits, or zero; <Pd> one of 64 bits, or the stack pointer
  <Vd> <Ed>      vector register of the row's length, or of 128 bits (its elements are spelled behind it); <Qd> <Dd>
                 <Sd> <Hd> <Bd> the same register as a scalar of 128 to 8 bits
  <#i> <:i>      immediate, with # before it or without; <#i*4> a multiple, which the word counts by it; <#64-i>,
                 <#32+i> one that the word has so, <#64-i,63-j> twice; <#b> with the field "b" a bit mask (C3.4.2,
                 "bitmask immediate")
  <mem>          memory; its bits stand with the row, and its ways to be reached with the word
  <label>        where a jump goes, or an address
A register in field d is written, others are read; behind the letter `=` says that it is written, `+` that it is read
and written. Of memory `=` and `+` say the same, and `&` that only its address counts.
Words: 32 characters of 0, 1 and fields' letters, the most significant first; letters of one field make its number in
that order, of `e`, an element, the least significant first, and a capital repeats it. Blanks mean nothing. Of <mem> a
word has `n` for the base and one way to reach it:
  scaled   `i`, a multiple of the size of what is moved      near   `i`, nine bits, signed
  index    `m` for the index, `s` where it is multiplied by that size       literal   `l`, a distance in words
  plain    nothing but the base
Of an immediate `i` a word says `high` where it counts by 4096.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .registers import COUNTS, SP, ZERO

NOP = (0xD503201F).to_bytes(4, "little")
"""What pads code."""
DISTANCE_BYTES = 4
"""By what jumps count."""
_SCALARS = {"X": ("gpr", 64), "W": ("gpr", 32), "P": ("gpr", 64), "Q": ("vec", 128), "D": ("vec", 64),
            "S": ("vec", 32), "H": ("vec", 16), "B": ("vec", 8)}
_OPERAND = re.compile(r"<([^>]+)>")
_CODE = re.compile(r"(\d*)([-+]?)([a-z])\*?(\d*)")


@dataclass(frozen=True, slots=True)
class Operand:
    """One explicit operand of a row.

    role: "r", "w", "rw", or "a" (only the address is used). kind: "gpr", "vec", "imm", "mem" or "label". bits: of the
    register, or of memory. field: its letter in the word. stack: number 31 is the stack pointer, not zero. vector:
    spelled as v0, its elements follow. codes: of an immediate, for each of its fields (letter, sign, number, multiple):
    the word holds number + sign * value / multiple. mark: what stands before it. memory_bits: of memory. index_bits,
    broadcast_bits: no address is of a vector, no operand a spread element.
    """

    role: str
    kind: str
    bits: int
    field: str = ""
    stack: bool = False
    vector: bool = False
    codes: tuple[tuple[str, int, int, int], ...] = ()
    mark: str = ""
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
        if register.kind != self.kind or not 0 <= number < COUNTS[self.kind]:
            return None
        if self.kind == "gpr" and number >= SP:
            return SP if (number == SP) == self.stack else None
        return number

    def immediate_codes(self, value: int) -> dict[str, int] | None:
        """What the word has for an immediate, by field; None for one that it can't hold."""
        if self.field == "b":
            code = bit_mask_code(value)
            return None if code is None else {"b": code}
        _, sign, number, _ = self.codes[0]
        if number:      # shifts: the number tells the size of elements too, so it may not run over
            low, high = (0, number - 1) if sign > 0 or len(self.codes) > 1 else (1, number // 2)
            if not low <= value <= high:
                return None
        found = {}
        for letter, sign, number, multiple in self.codes:
            if value % multiple:
                return None
            code = number + sign * (value // multiple)
            found[letter] = code % number if len(self.codes) > 1 and code == number else code
        return found


def bit_mask_code(value: int) -> int | None:
    """N, immr and imms of a mask of 64 bits that is one run of ones, turned round; None if it is none
    (DecodeBitMasks)."""
    mask = (1 << 64) - 1
    value &= mask
    for turned in range(64):
        run = (value << turned | value >> (64 - turned)) & mask
        if run and run & (run + 1) == 0 and run != mask:
            return 1 << 12 | turned << 6 | run.bit_length() - 1
    return None


@dataclass(frozen=True, slots=True)
class Word:
    """One way to write a row. reach: how its memory is reached, "" without any. fixed: bits that are always the same.
    fields: the places of each field's bits, the most significant first."""

    reach: str
    fixed: int
    fields: dict[str, tuple[int, ...]]

    def reaches(self, memory: Any, size_bytes: int) -> dict[str, int] | None:
        """What the word has for memory, by field; None if it is not reached so. A label is for who knows distances."""
        if (memory.label is not None) != (self.reach == "literal"):
            return None
        if self.reach == "literal":
            return {}
        base = memory.base
        if base.kind != "gpr" or base.number > SP or memory.broadcast:
            return None
        found = {"n": base.number}
        if memory.index is not None:
            if self.reach != "index" or memory.disp or memory.scale not in (1, size_bytes) \
                    or memory.index.kind != "gpr" or memory.index.number in (SP, ZERO):
                return None
            return found | {"m": memory.index.number, "s": int(memory.scale > 1)}
        disp: int = memory.disp
        if self.reach == "scaled":
            return None if disp % size_bytes or not 0 <= disp // size_bytes < 1 << 12 else found | {
                "i": disp // size_bytes}
        if self.reach == "near":
            return found | {"i": disp & 0x1FF} if -256 <= disp < 256 else None
        return found if self.reach == "plain" and not disp else None

    def with_codes(self, codes: dict[str, int]) -> int | None:
        """The word, with these numbers in its fields; None if one is too large."""
        word = self.fixed
        if self.reach == "high":
            high, low = divmod(codes["i"], 1 << 12)
            if low:
                return None
            codes = codes | {"i": high}
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

    name: unique and stable: the mnemonic, then what tells forms apart. length: bits of a vector, or 0. words: "reach
    pattern" each, in order of preference. meaning: f(*reads) -> written value, or a tuple in the order of operands;
    reads are operands whose role has "r", immediates included, then `flags` (a dict of n, z, c, v) if flags are read.
    General registers are unsigned Python ints; vectors are NumPy arrays of `dtypes`, scalars of vector registers of
    bytes; memory is what it holds. None: no value (jumps, fences, prefetches).
    control, flags_read, flags_written, implicit_*, side_effects: see x86-64's rows, which have the same.
    cost: the class of its costs (costs.py). stores: a register goes to memory.
    """

    __slots__ = ("_operands", "_pattern", "_words", "control", "cost", "dtypes", "features", "flags_read",
                 "flags_written", "implicit_reads", "implicit_writes", "length", "meaning", "memory_bits", "mnemonic",
                 "name", "side_effects", "stores", "syntax")

    blend = False
    masking = mask_role = ""
    """No instruction takes a mask."""

    def __init__(self, name: str, syntax: str, words: str | tuple[str, ...], meaning: Callable[..., Any] | None,
                 cost: str, dtypes: str = "", length: int = 0, memory_bits: int = 0, control: str = "",
                 flags_read: str = "", flags_written: str = "", implicit_reads: tuple[tuple[str, int], ...] = (),
                 implicit_writes: tuple[tuple[str, int], ...] = (), side_effects: bool = False,
                 features: frozenset[str] = frozenset()) -> None:
        self.name = name
        self.syntax = syntax
        self.mnemonic = syntax.partition(" ")[0]
        self.meaning = meaning
        self.cost = cost
        self.dtypes = dtypes
        self.length = length
        self.memory_bits = memory_bits
        self.control = control
        self.flags_read = flags_read
        self.flags_written = flags_written
        self.implicit_reads = implicit_reads
        self.implicit_writes = implicit_writes
        self.side_effects = side_effects
        self.features = features
        self.stores = syntax.startswith("st") and syntax.endswith("<mem=>")
        self._pattern = (words,) if isinstance(words, str) else words
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
        found = self._words
        if found is None:
            found = self._words = tuple(_word(self.name, text) for text in self._pattern)
        return found

    def _operand(self, text: str) -> Operand:
        if text == "label":
            return Operand("r", "label", 64, "l")
        if text[:3] == "mem":
            role = {"=": "w", "+": "rw", "&": "a"}.get(text[3:], "r")
            return Operand(role, "mem", self.memory_bits, "n", memory_bits=self.memory_bits)
        if text[0] in "#:":
            codes = []
            for part in text[1:].split(","):
                number, sign, letter, multiple = _CODE.fullmatch(part).groups()  # type: ignore[union-attr]
                codes.append((letter, -1 if sign == "-" else 1, int(number or 0), int(multiple or 1)))
            return Operand("r", "imm", 64, codes[0][0], codes=tuple(codes), mark=text[0].replace(":", ""))
        letter, field, mark = text[0], text[1], text[2:]
        role = {"=": "w", "+": "rw", "": "w" if field == "d" else "r"}[mark]
        if letter in "VE":
            return Operand(role, "vec", self.length if letter == "V" else 128, field, vector=True)
        kind, bits = _SCALARS[letter]
        return Operand(role, kind, bits, field, stack=letter == "P")

    @property
    def _core(self) -> Any:
        from .costs import CORES

        return CORES["neoverse-n1"]

    @property
    def latency(self) -> int:
        """Cycles from the registers read, or the address, to the result on a Neoverse N1; see costs.py."""
        core = self._core
        own: int = core.cost_of(self).latency
        return own or int(core.LOAD_LATENCY["vec" if self.cost == "load vector" else "gpr"])

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


def _word(name: str, text: str) -> Word:
    reach, _, pattern = text.rpartition(":")
    pattern = pattern.replace(" ", "")
    if len(pattern) != 32:
        raise ValueError(f"row {name}: found {len(pattern)} bits in {text!r}; expected 32")
    fields: dict[str, list[int]] = {}
    for place, letter in enumerate(pattern):
        if letter not in "01":
            places = fields.setdefault(letter, [])
            places.insert(0 if letter == "e" else len(places), 31 - place)
    fixed = int("".join(c if c in "01" else "0" for c in pattern), 2)
    return Word(reach, fixed, {letter: tuple(places) for letter, places in fields.items()})
