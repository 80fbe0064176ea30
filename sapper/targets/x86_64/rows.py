"""What a row of the x86-64 instruction table is: operands, encodings in the manual's notation, meaning.

Enters: short strings from instructions.py. Leaves: `Row`, `Operand`, `Encoding` objects; everything that costs time
(parsing operands and encodings) happens when it is first asked for, so that the table is quick to import.
Holds: a row is constant after it was made, and is compared by identity.

Operand notation (one token for each operand, separated by blanks; `role:alternatives.dtype`):
  role   r read, w written, rw both, a address only (lea, prefetch: no memory is touched)
  v      vector register of the row's length; h, q, e: a half, a quarter, an eighth of it (a register has at least
         128 bits, memory has the exact size); x, y, z: 128, 256, 512 bits
  t      tile register; sibmem memory of a tile's rows: each lies the index (scaled) behind the one before
  k      opmask register; r8 r16 r32 r64 general register; al/ax/eax/rax, cl, dx: this register and no other
  m      memory of the register's exact size; m32: of so many bits; b32: one 32-bit element broadcast
  vm32v  one 32-bit element for each lane of the index register (class v, h, x, ...), for gathers and scatters
  i8 i32 immediate of so many bits (i32 sign-extended to the operand's size); rel a label
Encoding notation: `features OPERANDS manual-text`, where OPERANDS has one letter for each operand, as the manual's
Op/En column:  R ModRM.reg · M ModRM.rm, register or memory · m the same, memory only · U the same, register only ·
  V VEX.vvvv · I immediate · L imm8[7:4] · O low bits of the opcode · D distance to a label · A register 0, implied ·
  C the fixed register of the operand, implied · 1 the immediate 1, implied.
A /r or /digit whose ModRM.rm no operand stands for has register 0 there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from re import fullmatch
from typing import Any

from .tiles import ROW_BYTES, ROWS

_NAMED_REGISTERS = {
    "al": (8, 0), "ax": (16, 0), "eax": (32, 0), "rax": (64, 0), "cl": (8, 1), "ecx": (32, 1), "dx": (16, 2),
    "edx": (32, 2), "rdx": (64, 2),
}
_FIXED_VECTORS = {"x": 128, "y": 256, "z": 512}
_PARTS = {"v": 1, "h": 2, "q": 4, "e": 8}
_DTYPES = frozenset({"", "f16", "bf16", "f32", "f64",
                      *(f"{sign}{bits}" for sign in "iu" for bits in (8, 16, 32, 64))})
_SIZES = frozenset({8, 16, 32, 64, 128, 256, 512})
TILE_BITS = 8 * ROWS * ROW_BYTES


@dataclass(frozen=True, slots=True)
class Operand:
    """One explicit operand of a row.

    role: "r", "w", "rw", or "a" (only the address is used).
    kind: "gpr", "vec", "mask", "tile", "imm", "mem" or "label": what it is when it is not one of the alternatives
        below.
    bits: size of the register, of the memory operand (kind "mem"), or of the immediate (kind "imm").
    memory_bits: 0, or the bits of memory that may stand here instead of the register.
    broadcast_bits: 0, or the bits of one memory element that may be spread over all lanes.
    immediate_bits: 0, or the bits of an immediate that may stand here instead of the register.
    fixed: the only register number allowed (shift counts: 1, cl), or None.
    index_bits: size of the vector register that must be the index of the memory operand (gather, scatter), or 0;
        memory_bits is then the size of one element.
    sibmem: rows of memory, of which each lies the index (scaled) behind the one before: of a tile; memory_bits are
        those of the largest tile.
    dtype: how `meaning` sees it: f32 f64 f16 bf16 i8 .. u64 for vectors, empty for integers of `bits` bits.
    """

    role: str
    kind: str
    bits: int
    memory_bits: int = 0
    broadcast_bits: int = 0
    immediate_bits: int = 0
    fixed: int | None = None
    index_bits: int = 0
    dtype: str = ""
    sibmem: bool = False

    @property
    def memory(self) -> bool:
        """True if memory may stand here."""
        return self.memory_bits > 0

    @property
    def unsigned_byte(self) -> bool:
        """True if an immediate here is a count or a control word, 0 to 255: none that is extended by its sign."""
        bits = self.bits if self.kind == "imm" else self.immediate_bits
        return bits == 8 and (self.kind == "imm" or self.bits > 8)

    @property
    def reads(self) -> bool:
        return "r" in self.role

    @property
    def writes(self) -> bool:
        return "w" in self.role


def _part_bits(letter: str, length: int) -> int:
    if letter in _FIXED_VECTORS:
        return _FIXED_VECTORS[letter]
    return length // _PARTS[letter]


@cache
def parse_operands(text: str, length: int, dtype: str) -> tuple[Operand, ...]:
    """The operands that `text` (see the head of the file) stands for in a row of `length` bits."""
    operands = []
    for token in text.split():
        role, _, rest = token.partition(":")
        rest, _, own_dtype = rest.partition(".")
        if role not in ("r", "w", "rw", "a") or not {dtype, own_dtype} <= _DTYPES:
            raise ValueError(f"operand notation: found {token!r} in {text!r}, lanes of {own_dtype or dtype!r}; "
                             f"expected r, w, rw or a before the colon, and lanes of {' '.join(sorted(_DTYPES))}")
        kind, bits, memory, broadcast, immediate, index = "", 0, 0, 0, 0, 0
        fixed: int | None = None
        exact, rows_apart = 0, False
        for part in rest.split("/"):
            if part in _NAMED_REGISTERS:
                kind = "gpr"
                bits, fixed = _NAMED_REGISTERS[part]
            elif part in _PARTS or part in _FIXED_VECTORS:
                kind, exact = "vec", _part_bits(part, length)
                bits = max(128, exact)
            elif part == "k":
                kind, bits = "mask", 64
            elif part == "t":
                kind, bits = "tile", TILE_BITS
            elif part == "sibmem":
                memory, rows_apart = TILE_BITS, True
            elif part == "rel":
                kind, bits = "label", 32
            elif part == "m":
                memory = exact
            elif part[:2] == "vm":
                kind, memory, index = "mem", int(part[2:-1]), max(128, _part_bits(part[-1], length))
                bits = memory
            else:
                letter, size = part[:1], int(part[1:]) if part[1:].isdigit() else 0
                if size not in _SIZES:
                    raise ValueError(f"operand notation: found {part!r} in {text!r}; expected a class and its bits, "
                                     "as at the head of rows.py")
                if letter == "r":
                    kind, bits = "gpr", size
                elif letter == "m":
                    memory = size
                elif letter == "b":
                    broadcast = size
                elif letter == "i":
                    immediate = size
                else:
                    raise ValueError(f"operand notation: found {part!r} in {text!r}")
        if not kind:
            kind, bits = ("mem", memory) if memory else ("imm", immediate)
        operands.append(Operand(role, kind, bits, memory, broadcast, immediate, fixed, index,
                                own_dtype or (dtype if kind in ("vec", "mem") else ""), rows_apart))
    return tuple(operands)


@dataclass(frozen=True, slots=True)
class Encoding:
    """One encoding of a row.

    text: the manual's notation ("VEX.128.0F.WIG 58 /r", "REX.W + 83 /0 ib").
    letters: where each operand goes (see the head of the file).
    features: CPU features that it needs; avx512vl is added to AVX-512 vectors below 512 bits.
    space: "legacy", "vex" or "evex". prefix: 0, 0x66, 0xF3 or 0xF2. opcode_map: 0 one-byte, 1 0F, 2 0F38, 3 0F3A.
    w: operand-size bit, REX.W in legacy encodings (WIG is 0). length_code: VEX.L or EVEX.L'L. digit: ModRM.reg opcode
    extension or -1. modrm: True if a ModRM byte follows. immediate_bytes: 0, 1, 2, 4, 8. code_bytes: 1 or 4 for a
    branch distance.
    lock: an F0 prefix.
    """

    text: str
    letters: str
    features: frozenset[str]
    space: str
    prefix: int
    opcode_map: int
    w: int
    length_code: int
    opcode: bytes
    digit: int
    modrm: bool
    immediate_bytes: int
    code_bytes: int
    lock: bool = False


_MAPS = {"0F": 1, "0F38": 2, "0F3A": 3}
_PREFIXES = {"NP": 0, "66": 0x66, "F3": 0xF3, "F2": 0xF2}
_LENGTH_CODES = {"128": 0, "L0": 0, "LZ": 0, "LIG": 0, "256": 1, "L1": 1, "512": 2}


def _check_places(text: str, letters: str, modrm: bool, immediate_bytes: int, code_bytes: int) -> None:
    """Raises ValueError where operands are put where the manual's text has no place, or a place has no operand."""
    places = set(letters)
    for wanted, there, what in (("RMmU", modrm, "/r or a digit"), ("IL", immediate_bytes > 0, "ib, iw, id, io or /is4"),
                                ("D", code_bytes > 0, "cb or cd")):
        operands = places & set(wanted)
        if (operands and not there) or (there and not operands and wanted != "RMmU"):
            raise ValueError(f"encoding notation: found {'no ' * (not there)}{what} in {text!r}, and operands at "
                             f"{letters}; expected both or neither")
    if strange := places - set("-RMmUVILODAC1"):
        raise ValueError(f"encoding notation: found {', '.join(sorted(strange))} among the places {letters} in "
                         f"{text!r}; expected those at the head of rows.py")


@cache
def parse_encoding(text: str) -> Encoding:
    """`features LETTERS manual-text` taken apart."""
    if text.count(" ") < 2:
        raise ValueError(f"encoding notation: found {text!r}; expected features, operands' places, the manual's text")
    feature_text, letters, rest = text.split(" ", 2)
    features = set() if feature_text == "base" else set(feature_text.split("+"))
    tokens = rest.replace("+ ", "").split()
    space, prefix, opcode_map, w, length_code, lock = "legacy", 0, 0, 0, 0, False
    head = tokens[0].split(".")
    opcode = bytearray()
    digit, modrm, immediate_bytes, code_bytes = -1, False, 0, 0
    if head[0] in ("VEX", "EVEX"):
        space = head[0].lower()
        for field in head[1:]:
            if field in _LENGTH_CODES:
                length_code = _LENGTH_CODES[field]
            elif field in _PREFIXES:
                prefix = _PREFIXES[field]
            elif field in _MAPS:
                opcode_map = _MAPS[field]
            elif field in ("W0", "W1", "WIG"):
                w = int(field == "W1")
            else:
                raise ValueError(f"encoding notation: found {field!r} in {text!r}")
        if space == "evex" and length_code < 2 and "LIG" not in head and "L0" not in head:
            features.add("avx512vl")
        tokens = tokens[1:]
    for token in tokens:
        if token == "REX.W":
            w = 1
        elif token == "LOCK":
            lock = True
        elif token[0] == "/":
            modrm = True
            if token[1:].isdigit():
                digit = int(token[1:])
            elif token == "/is4":
                immediate_bytes = 1
        elif token in ("ib", "iw", "id", "io"):
            immediate_bytes = {"ib": 1, "iw": 2, "id": 4, "io": 8}[token]
        elif token in ("cb", "cd"):
            code_bytes = {"cb": 1, "cd": 4}[token]
        elif token in _PREFIXES and not opcode and space == "legacy" and token != "NP" and len(tokens) > 1:
            prefix = _PREFIXES[token]
        elif fullmatch("[0-9A-F]{2}([+]rd)?", token):
            opcode.append(int(token[:2], 16))
        else:
            raise ValueError(f"encoding notation: found {token!r} in {text!r}")
    _check_places(text, letters, modrm, immediate_bytes, code_bytes)
    return Encoding(text, letters, frozenset(features), space, prefix, opcode_map, w, length_code, bytes(opcode), digit,
                    modrm, immediate_bytes, code_bytes, lock)


class Row:
    """One instruction form. See the head of the file for the notations.

    name: unique and stable: the mnemonic, then `.128/.256/.512` where the instruction has several vector lengths,
        `.8/.16/.32/.64` where it has several general-register sizes, or a word where two forms share a mnemonic.
    mnemonic: the manual's. length: vector bits, or 0.
    masking: "" none; "k" an opmask is allowed; "kz" zeroing too; "required" an opmask is needed, and cleared.
    meaning: f(*reads) -> written value, or a tuple of them in operand order. Reads are the operands whose role has
        "r" in order, immediates included, then `flags` (a dict) if flags are read, then the implicit reads. Vectors
        are NumPy arrays of the operand's dtype, general registers and masks are unsigned Python ints, a memory
        operand is an array too (broadcast already applied) or an int; gathered memory is one element for each lane; a
        tile, and its memory, is an array of bytes [rows][bytes of a row], and what is written is given its shape.
        Merging and zeroing by the opmask is done by `meaning.execute`, not here. None: no value (fences, jumps).
    flags_read, flags_written: letters of "oszapc"; written includes those left undefined.
    implicit_reads, implicit_writes: (kind, number) of registers that are not operands.
    control: "" falls through; "jump", "branch" (conditional), "call", "return", "trap".
    side_effects: must not be removed or duplicated though no operand says so (fences, system calls, prefetches).
    tolerance: 0, or the relative error that the manual allows (approximations).
    disp8_bits: unit of an EVEX 8-bit displacement where it is not the memory operand (or broadcast element) itself.
    scalar: only lane 0 is computed and masked; the others come from the first source.
    blend: lanes that the opmask leaves off come from the first source, not from the destination.
    packing: "compress" or "expand": the opmask chooses lanes, which lie side by side in the destination or source.
    """

    __slots__ = (
        "_dtype",
        "_encoding_texts",
        "_encodings",
        "_operand_text",
        "_operands",
        "blend",
        "control",
        "cost",
        "disp8_bits",
        "flags_read",
        "flags_written",
        "implicit_reads",
        "implicit_writes",
        "length",
        "masking",
        "meaning",
        "mnemonic",
        "name",
        "packing",
        "plans",
        "scalar",
        "side_effects",
        "tolerance",
    )

    def __init__(
        self,
        name: str,
        mnemonic: str,
        operands: str,
        encodings: str,
        meaning: Callable[..., Any] | None,
        length: int = 0,
        dtype: str = "",
        masking: str = "",
        control: str = "",
        flags_read: str = "",
        flags_written: str = "",
        implicit_reads: tuple[tuple[str, int], ...] = (),
        implicit_writes: tuple[tuple[str, int], ...] = (),
        side_effects: bool = False,
        tolerance: float = 0.0,
        disp8_bits: int = 0,
        scalar: bool = False,
        blend: bool = False,
        packing: str = "",
    ) -> None:
        self.name = name
        self.mnemonic = mnemonic
        self.length = length
        self.masking = masking
        self.meaning = meaning
        self.control = control
        self.flags_read = flags_read
        self.flags_written = flags_written
        self.implicit_reads = implicit_reads
        self.implicit_writes = implicit_writes
        self.side_effects = side_effects
        self.tolerance = tolerance
        self.disp8_bits = disp8_bits
        self.scalar = scalar
        self.blend = blend
        self.packing = packing
        self._operand_text = operands
        self._encoding_texts = encodings
        self._dtype = dtype
        self._operands: tuple[Operand, ...] | None = None
        self._encodings: tuple[Encoding, ...] | None = None
        self.plans: Any = None
        """The encoder's own precomputed form of this row; None until it is first encoded."""
        self.cost: Any = None

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The explicit operands in the vendor's (Intel) order."""
        found = self._operands
        if found is None:
            found = self._operands = parse_operands(self._operand_text, self.length, self._dtype)
        return found

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """All encodings in order of preference; VEX is dropped where the length is 512."""
        found = self._encodings
        if found is None:
            texts = self._encoding_texts.replace(".L.", f".{self.length}.").split(" | ")
            found = self._encodings = tuple(
                parse_encoding(t) for t in texts if not (self.length == 512 and " VEX." in t))
        return found

    @property
    def features(self) -> frozenset[str]:
        """The features that the row needs at least: those of its first encoding."""
        return self.encodings[0].features

    @property
    def evex_features(self) -> frozenset[str] | None:
        """The features that masks, broadcasts and registers 16 to 31 need; None if the row has no EVEX encoding."""
        for encoding in self.encodings:
            if encoding.space == "evex":
                return encoding.features
        return None

    def roles(self, masked: bool = False, zeroing: bool = False) -> tuple[str, ...]:
        """The roles of the operands; a written vector is read too where an opmask merges into it."""
        roles = tuple(o.role for o in self.operands)
        if masked and not zeroing and roles and roles[0] == "w" and self.operands[0].kind == "vec":
            return ("rw", *roles[1:])
        return roles

    @property
    def mask_role(self) -> str:
        """How the opmask is used: "" (no mask), "r", or "rw" (gathers and scatters clear it)."""
        return {"": "", "k": "r", "kz": "r", "required": "rw"}[self.masking]

    def _figures(self) -> Any:
        found = self.cost
        if found is None:
            from .costs import cost_of

            found = self.cost = cost_of(self)
        return found

    @property
    def latency(self) -> int:
        """Cycles from the register inputs to the result on Zen 4 (memory operands add the load's); see costs.py."""
        return int(self._figures().latency)

    @property
    def throughput(self) -> float:
        """Cycles for each instruction in a long independent run on Zen 4 (reciprocal throughput)."""
        return float(self._figures().throughput)

    @property
    def ports(self) -> tuple[str, ...]:
        """The Zen 4 pipes that can execute it: fp0 .. fp3, alu0 .. alu3, load, store, branch."""
        return tuple(self._figures().ports)

    def __repr__(self) -> str:
        return f"<row {self.name}>"
