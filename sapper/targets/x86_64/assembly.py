"""What assembly by hand must know of x86-64 beside the rows: names, sizes of memory, the calling convention, synonyms.

Leaves: tables, and what the rows without a meaning do (stack, upper halves, MXCSR). Holds: `sapper/assembly` names no
target; all that it asks of one is in a module of this name in the target's folder.
Source: Intel SDM volume 1, 3.4.1.1 and 10.2.3 (MXCSR), volume 2, appendix B.1.4.7 (synonyms of condition codes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from . import abi, meaning, meaning_values, tiles
from .allocation import IDIOMS as IDIOMS
from .detect import FEATURE_BITS
from .instructions import CONDITION_CODES, ROWS, Operand, Row
from .registers import GPR_NAMES, MASK_NAMES, RSP, TILE_NAMES, VEC_NAMES
from .rows import TILE_BITS
from .target import V3_FEATURES

FAMILY = "x86_64"
ASSEMBLER_ALLOCATES = False

REGISTERS: dict[str, tuple[str, int, int]] = {
    **{name: ("gpr", number, bits) for bits, names in GPR_NAMES.items() for number, name in enumerate(names)},
    **{name: ("vec", number, bits) for bits, names in VEC_NAMES.items() for number, name in enumerate(names)},
    **{name: ("mask", number, 64) for number, name in enumerate(MASK_NAMES)},
    **{name: ("tile", number, TILE_BITS) for number, name in enumerate(TILE_NAMES)},
    "tilecfg": (*tiles.CONFIGURATION, 512),
}
"""name -> (kind, number, bits) of every register."""

MEMORY_BITS = {"byte": 8, "word": 16, "dword": 32, "qword": 64, "xmmword": 128, "ymmword": 256, "zmmword": 512}
"""The words before `ptr`, and what they say."""

VIRTUAL = {"r64": ("gpr", 64), "r32": ("gpr", 32), "xmm": ("vec", 128), "ymm": ("vec", 256), "zmm": ("vec", 512),
           "k": ("mask", 64), "tmm": ("tile", TILE_BITS)}
"""Names under which a new register is asked for: kind and bits."""

RETURN = "ret"
ARGUMENTS = tuple(("gpr", number) for number in abi.ARGUMENTS)
CALLEE_SAVED = tuple(("gpr", number) for number in abi.CALLEE_SAVED)
STACK_POINTER = ("gpr", abi.STACK_POINTER)
RESULT = ("gpr", abi.RESULT)
STACK_ALIGN_BYTES = abi.STACK_ALIGN_BYTES
RED_ZONE_BYTES = 128
"""Below the stack pointer, which signals leave alone (System V ABI AMD64 3.2.2)."""
COMPARISONS = frozenset({"cmp", "test", "bt", "vptest", "vtestps", "vtestpd", "kortestb", "kortestw", "kortestd",
                         "kortestq", "ktestb", "ktestw", "ktestd", "ktestq", "vucomiss", "vucomisd", "vcomiss",
                         "vcomisd"})
"""Mnemonics that only set flags: one whose flags nobody reads is a mistake."""

MOVES = frozenset({"mov"})
STEPS = frozenset({"add", "sub", "inc", "dec"})
"""Mnemonics that move an address on, and set flags by where it then lies."""
ALIGNED = frozenset({"vmovaps", "vmovapd", "vmovdqa", "vmovdqa32", "vmovdqa64", "vmovntps", "vmovntpd", "vmovntdq",
                     "vmovntdqa"})
"""Mnemonics whose memory must be aligned to its size (SDM volume 1, 14.9)."""

_CONDITION_SYNONYMS = {"c": "b", "nae": "b", "nc": "ae", "nb": "ae", "z": "e", "nz": "ne", "na": "be", "nbe": "a",
                       "pe": "p", "po": "np", "nge": "l", "nl": "ge", "ng": "le", "nle": "g"}
SYNONYMS = {**{f"{stem}{other}": f"{stem}{name}" for stem in ("j", "set", "cmov")
               for other, name in _CONDITION_SYNONYMS.items()}, "sal": "shl"}
"""Mnemonics of the manual that mean another one of it."""

SYNONYMS |= {"pushf": "pushfq", "popf": "popfq"}

_FLOAT_PREDICATES = (
    "eq", "lt", "le", "unord", "neq", "nlt", "nle", "ord", "eq_uq", "nge", "ngt", "false", "neq_oq", "ge", "gt", "true",
    "eq_os", "lt_oq", "le_oq", "unord_s", "neq_us", "nlt_uq", "nle_uq", "ord_s", "eq_us", "nge_uq", "ngt_uq",
    "false_os", "neq_os", "ge_oq", "gt_oq", "true_us")
_INTEGER_PREDICATES = {"eq": 0, "lt": 1, "le": 2, "neq": 4, "nlt": 5, "nle": 6}
PREDICATES = {
    **{f"vcmp{name}{kind}": (f"vcmp{kind}", number) for number, name in enumerate(_FLOAT_PREDICATES)
       for kind in ("ps", "pd", "ss", "sd")},
    **{f"vpcmp{name}{kind}": (f"vpcmp{kind}", number) for name, number in _INTEGER_PREDICATES.items()
       for kind in ("b", "w", "d", "q", "ub", "uw", "ud", "uq")},
}
"""Names of comparisons with their predicate in them -> mnemonic and immediate (SDM volume 2, VCMPPS and VPCMPD)."""

assert set(_CONDITION_SYNONYMS.values()) <= set(CONDITION_CODES)


@cache
def _index() -> dict[str, tuple[Row, ...]]:
    found: dict[str, list[Row]] = {}
    for row in ROWS.values():
        found.setdefault(row.mnemonic, []).append(row)
    return {mnemonic: tuple(rows) for mnemonic, rows in found.items()}


def rows_of(mnemonic: str) -> tuple[Row, ...]:
    """All rows of a mnemonic (or of its synonym) in the order of the table; none if it is not in the table."""
    return _index().get(SYNONYMS.get(mnemonic, mnemonic), ())


def mnemonics() -> tuple[str, ...]:
    """All mnemonics of the table, sorted."""
    return tuple(sorted(_index()))


def row_named(name: str) -> Row | None:
    """The row of this name; a prefix as in `lock add` is part of the mnemonic."""
    return ROWS.get(name)


MOVE = "vmovaps"
"""A move between vector registers; its rows are named after the registers' bits."""
LOADS = {"vec": "vmovups", "gpr": "mov", "mask": "kmovq"}
"""A load into a register of each kind."""


def register_file(target: Any) -> Any:
    from .select import register_file as file_of

    return file_of(target)


def legal_encodings(row: Row, features: frozenset[str], evex: bool) -> bool:
    """Whether the features suffice for some encoding of the row. evex: only EVEX will do (mask, broadcast, zmm)."""
    return any(e.features <= features for e in row.encodings if e.space == "evex" or not evex)


@cache
def known_features() -> frozenset[str]:
    """All that a piece may ask for."""
    return frozenset(FEATURE_BITS) | {f for row in ROWS.values() for e in row.encodings for f in e.features}


def with_implied(features: frozenset[str]) -> frozenset[str]:
    """Features with those that every CPU has which has these (SDM volume 1, 14.3 and 15.2)."""
    found = set(features)
    if any(name.startswith("avx512") for name in features):
        found |= V3_FEATURES | {"avx512f"}
    if found & {"avx2", "fma", "f16c"}:
        found.add("avx")
    return frozenset(found)


# --- Tiles ------------------------------------------------------------------------------------------------------------

CONFIGURATION = tiles.CONFIGURATION
"""The register that holds the tiles' configuration; no operand names it."""
TILE_RELEASE = "tilerelease"
tile_configuration = tiles.configuration
tile_shapes = tiles.shapes_of
PRODUCT_SHAPES = tiles.PRODUCT_SHAPES


def tile_shape(number: int | None, shapes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """(rows, bytes of a row) of a tile under the shapes of a configuration.

    number: None for a register that is still to be allocated; it has a shape, not None, only where all have the same,
    so that it does not matter which it becomes."""
    if number is not None:
        return shapes[number]
    return shapes[0] if len(set(shapes)) == 1 else None


def shape_fault(shapes: Sequence[tuple[int, int]]) -> str:
    """Why an instruction traps on tiles of these shapes, or nothing."""
    if not all(rows for rows, _ in shapes):
        return "a tile that the configuration leaves without rows"
    return tiles.product_fault(*shapes) if len(shapes) == 3 else ""


execute = meaning.execute
padded = meaning_values.padded

# --- Rows without a meaning: they act on state that operands do not show. `s` is an emulator's state. -----------------

DEFAULT_MXCSR = 0x1F80
"""All exceptions masked, round to nearest, denormals kept: what a function finds at entry."""


def _push(s: Any, value: int) -> None:
    s.stack_pointer -= 8
    s.write(s.stack_pointer, np.frombuffer(value.to_bytes(8, "little"), np.uint8))


def _pop(s: Any) -> int:
    value = int.from_bytes(s.read(s.stack_pointer, 8).tobytes(), "little")
    s.stack_pointer += 8
    return value


def _vzeroupper(s: Any, operands: list[Any]) -> None:
    for number in range(16):
        s.clear_above("vec", number, 16)


def _load_mxcsr(s: Any, operands: list[Any]) -> None:
    s.mxcsr = int.from_bytes(operands[0].tobytes(), "little")
    if s.mxcsr & 0xFFC0 != DEFAULT_MXCSR:
        raise NotImplementedError("arithmetic under another rounding mode or with denormals as zero is not interpreted")


def _store_mxcsr(s: Any, operands: list[Any]) -> None:
    operands[0][:] = np.frombuffer(s.mxcsr.to_bytes(4, "little"), np.uint8)


def _push_operand(s: Any, operands: list[Any]) -> None:
    _push(s, operands[0])


def _pop_operand(s: Any, operands: list[Any]) -> None:
    operands[0] = _pop(s)


def _nothing(s: Any, operands: list[Any]) -> None:
    """A hint or a fence: nothing that one core sees."""


ACTIONS: dict[str, Callable[[Any, list[Any]], None]] = {
    "push": _push_operand, "pop": _pop_operand, "vzeroupper": _vzeroupper, "vldmxcsr": _load_mxcsr,
    "vstmxcsr": _store_mxcsr,
    **dict.fromkeys(("nop", "pause", "mfence", "lfence", "sfence", "endbr64", "nop.memory", "prefetchnta", "prefetcht0",
                     "prefetcht1", "prefetcht2", "prefetchw", "clflushopt"), _nothing),
}
"""Row name -> what it does to the state and its operands (changed in place), for rows whose meaning is None."""

STACK = {"push": 8, "pop": -8, "pushfq": 8, "popfq": -8}
"""Bytes by which a row moves the stack down."""

assert STACK_POINTER == ("gpr", RSP)

@cache
def flags_defined(row: Row) -> str:
    """The flags that have a value after a row, as its meaning tells: of those that it writes, the manual leaves some
    undefined."""
    if row.meaning is None:
        return row.flags_written
    if row.operands and row.operands[-1].fixed is not None and row.mnemonic in ("rol", "ror", "shl", "shr", "sar"):
        return ""  # a count of 0 leaves them as they were
    operands = [np.zeros(spec.bits // 8, np.uint8) if spec.kind in ("vec", "mem") else 3 for spec in row.operands]
    flags = dict.fromkeys(row.flags_written + row.flags_read, 0)
    implicit = (1, 0)[:len(row.implicit_reads)]
    in_memory = tuple(spec.kind == "mem" for spec in row.operands)
    try:
        _, _, written, _ = meaning.execute(row, operands, in_memory, None, False, flags, implicit)
    except OverflowError:
        return ""
    return "".join(written)


READS_AT_LEAST = {"syscall": (("gpr", abi.RESULT),)}
"""Row name -> registers that it reads in any case: how many arguments a system call has depends on its number."""

# --- For addresses (sapper/assembly/footprint.py) -----------------------------------------------------------------

ARITHMETIC = {
    "mov": "move", "lea": "address", "add": "add", "sub": "subtract", "inc": "increment", "dec": "decrement",
    "imul": "multiply", "shl": "left", "shr": "right", "and": "and", "xor": "exclusive", "cmp": "compare",
    "test": "test", "bzhi": "low bits", "cmovg": "greatest", "cmovge": "greatest", "cmovl": "least", "cmovle": "least",
    **{f"kmov{size}": "mask" for size in "bwdq"},
}
"""Mnemonics by what they do to general registers; "greatest" takes its second operand where the first that was compared
is the greater, "least" where it is the smaller."""

DIVISIONS = frozenset({"div.64"})
"""Rows that leave numbers without a sign."""

CONDITIONS = {"je": "=", "jne": "!=", "jl": "<", "jle": "<=", "jg": ">", "jge": ">=", "js": "<", "jns": ">=",
              "jb": "u<", "jbe": "u<=", "ja": "u>", "jae": "u>="}
"""What a branch finds of the two numbers that were compared; u: as numbers without a sign."""

OPPOSITE = {"jo": "jno", "jb": "jae", "je": "jne", "jbe": "ja", "js": "jns", "jp": "jnp", "jl": "jge", "jle": "jg"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}

# --- For planted errors (sapper/assembly/mutate.py) ---------------------------------------------------------------

NEIGHBOURS = {"jl": "jle", "jle": "jl", "jg": "jge", "jge": "jg", "jb": "jbe", "jbe": "jb", "ja": "jae", "jae": "ja",
              "je": "jne", "jne": "je"}
"""Conditions that differ in one case, or in all."""

OTHER_ROUNDING = {
    "tdpbssd": ("tdpbsud", "tdpbusd"), "tdpbsud": ("tdpbssd", "tdpbuud"), "tdpbusd": ("tdpbuud", "tdpbssd"),
    "tdpbuud": ("tdpbusd", "tdpbsud"),
    "vcvtps2dq": ("vcvttps2dq",), "vcvttps2dq": ("vcvtps2dq",), "vfmadd231ps": ("vfnmadd231ps",),
    "vfmadd213ps": ("vfnmadd213ps",), "vfmadd132ps": ("vfnmadd132ps",), "vrcp14ps": ("vrsqrt14ps",),
}
"""Instructions that round otherwise, or to another sign."""

_COMMUTES = frozenset({"vaddps", "vaddpd", "vmulps", "vmulpd", "vpaddd", "vpaddq", "vpmulld", "vandps", "vpandd",
                       "vpand", "vorps", "vpord", "vpor", "vxorps", "vpxord", "vpxor", "vmaxps", "vminps",
                       "vfmadd231ps", "vfmadd231pd", "vfnmadd231ps", "vpaddb", "vpaddw", "kandw", "korw",
                       "test", "vptest", "vfmadd231ss", "vdpbf16ps", "vaddss", "vmulss", "imul"})


def commutes(row: Row) -> bool:
    """Whether the two operands that the row only reads may change places (but for the payload of a NaN)."""
    return row.mnemonic in _COMMUTES


def is_hint(row: Row) -> bool:
    """Whether leaving the row out changes no value."""
    return ACTIONS.get(row.name) is _nothing or row.name == "vzeroupper"


def zero_row(operand: Operand) -> Row | None:
    """A row that makes a register of this kind and size zero, touching no flags; its operands are all the register."""
    if operand.kind == "vec":
        return ROWS[f"vpxord.{operand.bits}"] if operand.bits == 512 else ROWS[f"vpxor.{operand.bits}"]
    return {"mask": ROWS["kxorw"], "tile": ROWS["tilezero"]}.get(operand.kind)
