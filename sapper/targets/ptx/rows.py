"""What a row of the PTX instruction table is: syntax with modifiers, operands, legality, meaning.

Enters: short strings from the instructions_*.py modules. Leaves: `Row`, and `Form`: a row with its modifiers chosen.
Holds: rows and forms are constant; a text such as "mad.lo.s32" names at most one form.

How selection uses the table: `form("ld.global.v4.b32")` parses a mnemonic as PTX writes it and gives its `Form`,
cached. A form is what stands as `row` in a machine instruction; its `operands` say the role, type and count of each
operand in PTX's order, `write_line(form, texts)` prints the line, `form.needs` is what it demands of level and PTX
version, and `form.illegal_on(level)` gives the message where a level lacks it. The emulator runs the same forms: it
parses the line, and calls `form.row.meaning` (see below) with NumPy arrays.

Syntax notation, as in the PTX ISA's syntax boxes: `add{.rnd}{.ftz}{.sat}.f32`. A part in braces may be left out,
several parts in one pair of braces only together. A part that is a key of the row's choices stands for one of them; any
other part stands for itself.

Operand notation, one token each, separated by blanks: `role:type[*count][^other][?]`
  role   w written, r read (a register, an immediate, a special register or the address of a symbol), rw both;
         m an address in brackets; i an immediate; l a label or function; s a list of operands in parentheses (call)
  type   f32, b64, pred ..., or a key of the choices (`type`), whose choice it then is; widened by a suffix: `type+`
         is the type of twice the bits; empty for addresses, but for those of tensor memory, which are b32
  count  a vector in braces of so many registers: a number, a key of the choices (`v4` means 4), a number times one
         (`2*num`), or `n/2`: the N of the matrix shape, divided
  ^      what may stand there instead, such as `^b32*4`
  |      before the role: joined to the operand before it by `|`, and may be left out
  ?      may be left out, at the end of the list, or a vector anywhere

Meaning: `meaning(form, *sources)` takes one array for each operand read, in order, and returns the array written, or a
tuple of them. Arrays have one element for each lane that takes part, in the operand's type: f32 float32, b32 and u32
uint32, s32 int32, f16 float16, bf16 ml_dtypes.bfloat16, pred bool; packed types (f16x2, u16x2, ...) have a second axis
of the packed elements, low half first; a vector has a leading axis of its registers. Rows whose effect goes beyond the
registers of their own lane have a `unit`: "warp", whose meaning takes `(form, active, *sources)` with arrays of shape
(warps, 32) and which lanes take part (see warp.py); or the name of the part of the emulator that carries them out
("memory", "barrier", "control", ...), and no meaning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from .levels import Needs, combine, lacking

Meaning = Callable[..., Any]

BITS: dict[str, int] = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32,
    "s32": 32, "f32": 32, "tf32": 32, "f16x2": 32, "bf16x2": 32, "u16x2": 32, "s16x2": 32, "e4m3x2": 16, "e5m2x2": 16,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64, "f32x2": 64, "b128": 128,
}
"""Bits of a register of each type. Packed types lie in a register of untyped bits of their size (b16, b32, b64)."""
_WIDER = {"s8": "s16", "u8": "u16", "s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of a form.

    role: "w", "r", "rw", "m" (address), "i" (immediate), "l" (label), "s" (list). type: as in PTX, "" for addresses
    but those of tensor memory.
    count: registers in braces, or 0 where the operand stands alone. joined: by `|` to the one before, optional.
    optional: may be left out. other: what may stand there instead, in the notation.
    """

    role: str
    type: str
    count: int = 0
    joined: bool = False
    optional: bool = False
    other: str = ""

    @property
    def reads(self) -> bool:
        return self.role in ("r", "rw")

    @property
    def writes(self) -> bool:
        return self.role in ("w", "rw")

    @property
    def bits(self) -> int:
        """Bits of one register of it."""
        return BITS[self.type]


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table.

    name: stable and unique. syntax, operand_text: see the head of this file. choices: for each key of the syntax, the
    modifiers it stands for, without the leading dot. needs: level and version; the key "" holds always, any other key
    when that modifier is chosen. instead: what to write where a level lacks it. unit: see Meaning.
    """

    name: str
    syntax: str
    operand_text: str
    meaning: Meaning | None
    choices: Mapping[str, tuple[str, ...]]
    needs: Mapping[str, Needs]
    instead: Mapping[str, str]
    unit: str = ""
    section: str = ""

    @cached_property
    def parts(self) -> tuple[tuple[tuple[str, ...], bool], ...]:
        """(parts that stand together, optional) of the syntax after the opcode."""
        found = re.findall(r"\{((?:\.[\w:]+)+)\}|\.([\w:]+)", self.syntax)
        return tuple((tuple((optional or fixed).strip(".").split(".")), bool(optional)) for optional, fixed in found)

    @property
    def opcode(self) -> str:
        return re.split(r"[.{]", self.syntax, maxsplit=1)[0]

    def words(self, part: str) -> tuple[str, ...]:
        """What a part of the syntax stands for."""
        return self.choices.get(part, (part,))

    def match(self, modifiers: tuple[str, ...]) -> dict[str, str] | None:
        """The modifiers by key, or None where they are no form of this row."""
        return self._match(0, 0, modifiers)

    @cached_property
    def _steps(self) -> tuple[tuple[tuple[str, ...], bool, tuple[frozenset[str], ...], int, int], ...]:
        """Of each of `parts` what its words may be, too, and how many modifiers it and the parts behind it take, at
        least and at most."""
        steps, fewest, most = [], 0, 0
        for together, optional in reversed(self.parts):
            fewest, most = fewest + (0 if optional else len(together)), most + len(together)
            steps.append((together, optional, tuple(frozenset(self.words(part)) for part in together), fewest, most))
        return tuple(reversed(steps))

    def _match(self, at: int, place: int, modifiers: tuple[str, ...]) -> dict[str, str] | None:
        """By the parts from `at` on those from `place` on."""
        if at == len(self._steps):
            return {} if place == len(modifiers) else None
        together, optional, words, fewest, most = self._steps[at]
        if not fewest <= len(modifiers) - place <= most:
            return None
        end = place + len(together)
        for known, word in zip(words, modifiers[place:], strict=False):
            if word not in known:
                break
        else:
            found = self._match(at + 1, end, modifiers) if end <= len(modifiers) else None
            if found is not None:
                return {**dict(zip(together, modifiers[place:end], strict=True)), **found}
        return self._match(at + 1, place, modifiers) if optional else None

    def match_any_order(self, modifiers: tuple[str, ...]) -> dict[str, str] | None:
        """The same where the modifiers stand in another order than the manual's, which assemblers let pass."""
        chosen: dict[str, str] = {}
        places = [(part, optional) for together, optional in self.parts for part in together]  # some twice: f32.f32
        for modifier in modifiers:
            place = next((place for place in places if modifier in self.words(place[0])), None)
            if place is None:
                return None
            places.remove(place)
            chosen[place[0]] = modifier
        return chosen if all(optional for _, optional in places) else None

    def mnemonics(self, limit: int = 4096) -> list[str]:
        """Texts of the forms of this row: all combinations of modifiers, at most `limit`."""
        texts = [self.opcode]
        for together, optional in self.parts:
            longer = texts
            for part in together:
                longer = [f"{text}.{word}" for text in longer for word in self.words(part)]
            texts = (texts + longer if optional else longer)[:limit]
        return texts


@dataclass(frozen=True, eq=False)
class Form:
    """A row with its modifiers chosen: what one PTX instruction is, but for its operands.

    mnemonic: as PTX writes it. modifiers: by the key of the syntax (`{"rnd": "rn", "ftz": "ftz"}`); written: those.
    """

    row: Row
    mnemonic: str
    modifiers: Mapping[str, str]
    operands: tuple[Operand, ...] = field(init=False)
    written: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        parsed = tuple(_operand(token, self.modifiers) for token in self.row.operand_text.split())
        object.__setattr__(self, "operands", parsed)
        object.__setattr__(self, "written", frozenset(self.modifiers.values()))

    def __repr__(self) -> str:
        return f"form({self.mnemonic!r})"

    def __contains__(self, modifier: str) -> bool:
        """True where the modifier was written: `"ftz" in form`."""
        return modifier in self.written

    def get(self, key: str, default: str = "") -> str:
        """The modifier chosen for a key of the syntax."""
        return self.modifiers.get(key, default)

    @cached_property
    def needs(self) -> Needs:
        """What this form demands: the row's needs and those of its modifiers."""
        needs = self.row.needs
        return combine([needs.get("", Needs()), *(needs[word] for word in self._words() if word in needs)])

    def illegal_on(self, level: str) -> str | None:
        """None where `level` ("sm_90a") has this form; else what it lacks and what to write instead."""
        for key in ("", *self._words()):
            problem = lacking(self.row.needs.get(key, Needs()), level)
            if problem is not None:
                what = self.mnemonic if not key else f"{self.mnemonic}: modifier .{key}"
                instead = self.row.instead.get(key) or self.row.instead.get("")
                return f"{what} {problem}" + (f"; instead: {instead}" if instead else "")
        return None

    def _words(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.modifiers.values()))

    @cached_property
    def sources(self) -> tuple[Operand, ...]:
        return tuple(operand for operand in self.operands if operand.reads)

    @cached_property
    def results(self) -> tuple[Operand, ...]:
        return tuple(operand for operand in self.operands if operand.writes)


def _operand(token: str, modifiers: Mapping[str, str]) -> Operand:
    joined, optional = token.startswith("|"), token.endswith("?")
    role, _, rest = token.strip("|?").partition(":")
    rest, _, other = rest.partition("^")
    kind, _, count_text = rest.partition("*")
    wider = kind.endswith("+")
    kind = modifiers.get(kind.rstrip("+"), kind.rstrip("+"))
    return Operand(role, _WIDER[kind] if wider else kind, _count(count_text, modifiers), joined, optional or joined,
                   other)


def _count(text: str, modifiers: Mapping[str, str]) -> int:
    if text.startswith("n/"):
        found = re.search(r"n(\d+)k", modifiers["shape"])
        assert found is not None
        return int(found.group(1)) // int(text[2:])
    if "*" in text:
        times, _, rest = text.partition("*")
        return int(times) * _count(rest, modifiers)
    digits = modifiers.get(text, text).lstrip("vx")
    return int(digits) if digits.isdigit() else 0


class Table:
    """Rows by name, and forms by text."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self._by_opcode: dict[str, list[Row]] = {}

    def add(self, row: Row) -> None:
        if row.name in self.rows:
            raise ValueError(f"row {row.name!r} stands twice in the table")
        self.rows[row.name] = row
        self._by_opcode.setdefault(row.opcode, []).append(row)

    def opcodes(self) -> list[str]:
        return sorted(self._by_opcode)

    def rows_of(self, opcode: str) -> list[Row]:
        return self._by_opcode.get(opcode, [])

    def form(self, text: str) -> Form:
        """The form that a mnemonic names. Raises KeyError that says which forms the opcode has."""
        opcode, *modifiers = text.split(".")
        rows = self.rows_of(opcode)
        for match in (Row.match, Row.match_any_order):
            for row in rows:
                chosen = match(row, tuple(modifiers))
                if chosen is not None:
                    return Form(row, text, chosen)
        known = ", ".join(dict.fromkeys(row.syntax for row in rows)) if rows else "no form of this opcode"
        raise KeyError(f"the table has no {text}; it has: {known}")


_EVICTION = ("normal", "unchanged", "first", "last")
COMMON_NEEDS: dict[str, str] = {
    "shared::cta": "7.8 sm_80", "param::entry": "8.3 sm_80", "L1::no_allocate": "7.4 sm_80",
    "L2::cache_hint": "7.4 sm_80",
    **{f"L1::evict_{word}": "7.4 sm_80" for word in _EVICTION}, **{f"L2::{n}B": "7.4 sm_80" for n in (64, 128, 256)},
}
"""What these modifiers need wherever they stand, unless a row says otherwise."""


def make_row(name: str, syntax: str, operands: str, meaning: Meaning | None, *, needs: str | Mapping[str, str] = "",
             instead: str | Mapping[str, str] = "", unit: str = "", section: str = "", **choices: str) -> Row:
    """A row from the notation of this file; the choices of a key are separated by blanks."""
    needs_of = {**COMMON_NEEDS, **({"": needs} if isinstance(needs, str) else needs)}
    instead_of = {"": instead} if isinstance(instead, str) else instead
    words = {key: tuple(text.split()) for key, text in choices.items()}
    used = {"", *re.findall(r"[\w:]+", syntax), *(word for some in words.values() for word in some)}
    return Row(name, syntax, operands, meaning, words,
               {key: Needs.parse(text) for key, text in needs_of.items() if text and key in used}, dict(instead_of),
               unit, section)



@cache
def form(text: str) -> Form:
    """The form of the PTX table that `text` names, such as "mad.lo.s32". Raises KeyError naming the known forms."""
    from . import instructions

    return instructions.TABLE.form(text)


def write_line(form: Form, operands: Iterable[str | None], predicate: str = "") -> str:
    """One line of PTX. operands: a text for each of the form's operands in order (a vector as "{%r1, %r2}", an address
    as "[%rd1+16]"), None for one left out. predicate: "@%p1 ", "@!%p1 " or nothing."""
    pieces: list[str] = []
    for operand, text in zip(form.operands, operands, strict=False):
        if text is None:
            continue
        if operand.joined and pieces:
            pieces[-1] += f"|{text}"
        else:
            pieces.append(text)
    return f"{predicate}{form.mnemonic}{' ' if pieces else ''}{', '.join(pieces)};"
