"""What assembly by hand must know of PTX beside the rows: kinds of registers, special registers, what is approximate.

Leaves: tables. Holds: as of the other families, `sapper/assembly` asks all that differs of this module.
Source: PTX ISA, section 10 (special registers), "Floating Point Instructions" (largest errors of approximations).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from .levels import LEVELS, number_of
from .rows import BITS as BITS
from .rows import form
from .target import FILE_REGISTERS, REGISTER_GRANULE, WARP_LANES
from .text import KINDS, SpecialRegister, block_warps
from .text import NOBODY as NOBODY
from .tokens import TokenError as TokenError
from .tokens import number as number
from .tokens import tokens as tokens

FAMILY = "ptx"
ASSEMBLER_ALLOCATES = True

VIRTUAL = {"b32": ("vec", 32), "b64": ("gpr", 64), "b16": ("half", 16), "pred": ("pred", 1)}
"""Names under which a new register is asked for: kind and bits. Registers have no type: instructions do."""

NAME_OF_BITS = {bits: name for name, (_, bits) in VIRTUAL.items()}

READS_SPECIAL = frozenset({"mov"})
"""Opcodes that special registers may be sources of (PTX ISA 10)."""
RESULT_FOR_NOBODY = frozenset({"setp", "atom", "mbarrier", "match", "elect"})
"""Opcodes whose result may be `_`: others have ptxas refuse it."""
SPECIAL = {name.replace(".", "_"): SpecialRegister(f"%{name}") for name in (
    "tid.x", "tid.y", "tid.z", "ntid.x", "ntid.y", "ntid.z", "ctaid.x", "ctaid.y", "ctaid.z", "nctaid.x", "nctaid.y",
    "nctaid.z", "laneid", "warpid", "clock64", "globaltimer")}

ARRAYS: dict[str, Any] = {
    "pred": np.bool_, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "bf16": ml_dtypes.bfloat16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "f16x2": (np.float16, 2), "bf16x2": (ml_dtypes.bfloat16, 2), "u16x2": (np.uint16, 2), "s16x2": (np.int16, 2),
    "f32x2": (np.float32, 2), "tf32": np.uint32, "e4m3x2": (np.uint8, 2), "e5m2x2": (np.uint8, 2),
}
"""How a register is seen by the meaning of an operand's type: a dtype, or a dtype and how many of it."""

_APPROXIMATE = {"rcp": 2.0**-23, "sqrt": 2.0**-23, "rsqrt": 2.0**-22.9, "ex2": 2.0**-22, "lg2": 2.0**-22,
                "sin": 2.0**-20.5, "cos": 2.0**-20.5, "tanh": 2.0**-11, "div": 2.0**-22}
"""Opcode -> the largest relative error of its .approx form (of lg2, sin and cos the manual gives an absolute one)."""

FRAGMENTS = {"left": ("b32", 4), "right": ("b32", 2), "sums": ("b32", 4)}
"""Registers of a fragment of each operand of mma.m16n8k16: kind and how many."""

BRANCHES = frozenset({"bra", "brx"})
ENDS = frozenset({"ret", "exit", "trap"})
STORES = frozenset({"st", "red", "atom"})
"""Opcodes that write memory by the address that they are given."""

MEMBERS = frozenset({"shfl", "vote", "match", "redux", "elect"})
"""Opcodes whose last operand says which lanes take part."""

_NAMED_STATES = {"shared", "local", "param", "const"}


def forms_of(mnemonic: str) -> tuple[Any, ...]:
    """The form that a mnemonic names; none if it is not in the table."""
    return _forms(mnemonic)


@cache
def _forms(mnemonic: str) -> tuple[Any, ...]:
    try:
        return (form(mnemonic),)
    except KeyError:
        return ()


@cache
def mnemonics() -> tuple[str, ...]:
    """Some forms of each row, for messages."""
    from .instructions import TABLE

    return tuple(sorted({text for row in TABLE.rows.values() for text in row.mnemonics(64)}))


def register_bits(kind: str) -> int:
    """Of a register of a kind; 0 of predicates, which have registers of their own."""
    bits: int = BITS[KINDS[kind][1].removeprefix(".")]
    return bits if bits > 1 else 0


def most_registers(machine: Any, target: Any) -> int:
    """Registers that a thread has at most when a function begins: one block must fit an SM."""
    threads = WARP_LANES * block_warps(machine)
    most: int = min(target.registers, FILE_REGISTERS // threads // REGISTER_GRANULE * REGISTER_GRANULE)
    return min(most, machine.most_registers or most)


def register_limit(item: Any) -> int:
    """Registers that each thread has from this instruction on; 0 where it leaves that as it is."""
    return int(item.operands[0].value) if item.row.row.opcode == "setmaxnreg" else 0


def polls(item: Any) -> bool:
    """Whether an instruction asks whether a phase of an mbarrier is over, and goes on in any case."""
    return item.row.row.opcode == "mbarrier" and bool({"try_wait", "test_wait"} & set(item.row.mnemonic.split(".")))


def announced_bytes(item: Any) -> int:
    """Bytes that an instruction tells an mbarrier to expect: as many are copied without the threads' addresses."""
    announces = item.row.row.opcode == "mbarrier" and "expect_tx" in item.row.mnemonic
    return next((int(o.value) for o in item.operands if hasattr(o, "value")), 0) if announces else 0


def operands_of(found: Any, count: int) -> list[Any]:
    """What a form says of each of so many operands: fewer than it has are those without what `|` joins."""
    short = count < len(found.operands)
    return [spec for spec in found.operands if not (short and spec.joined)]


def known_features() -> frozenset[str]:
    """All that a piece may ask for: levels."""
    return frozenset(LEVELS)


def level_of(features: frozenset[str]) -> str:
    """The level of a target, of whose features it is the newest."""
    return max(features, key=number_of)


def tolerance(found: Any) -> float:
    """The relative error that the manual allows a form."""
    return _APPROXIMATE.get(found.row.opcode, 0.0) if found.mnemonic.split(".")[1:2] in (["approx"], ["full"]) else 0.0


def is_arithmetic_on_floats(found: Any) -> bool:
    """Whether a form computes with floats, so that it is no matter of single bits. A conversion of integers that rounds
    to the nearest f32 is the language's own."""
    types = [o.type for o in found.operands if o.type]
    floats = [t for t in types if t[0] in "fe" or t.startswith(("bf", "tf"))]
    if found.row.opcode == "cvt":
        return bool(floats) and not (found.mnemonic.startswith("cvt.rn.f32.") and len(floats) == 1)
    if found.row.opcode in ("abs", "neg", "copysign") and types[0] in ("f32", "f64") and "ftz" not in found:
        return False
    return bool(found.row.section == "Floating Point Instructions")


def is_symmetric(item: Any, first: int, second: int) -> bool:
    """Whether two neighbouring operands of lop3 may change places: its table is the same for both."""
    if item.row.row.opcode != "lop3":
        return False
    number = int(item.operands[4].value)
    bits = 3 - first, 3 - second

    def exchanged(index: int) -> int:
        same = index >> bits[0] & 1 == index >> bits[1] & 1
        return index if same else index ^ (1 << bits[0] | 1 << bits[1])

    return all(number >> index & 1 == number >> exchanged(index) & 1 for index in range(8))


def reaches_global(found: Any) -> bool:
    """Whether a form's address is one of global memory, or of any."""
    return not any(word.partition("::")[0] in _NAMED_STATES for word in found.mnemonic.split("."))


def bits_of(type_: str) -> int:
    return BITS[type_] if type_ else 64
