"""What instructions of PTX cost an SM at best: which of its units they occupy, and for how many cycles a warp.

Leaves: `cost_of(form, level)`, `cost_of_item(instruction, level)`. Holds: figures are throughputs, so that a sum of
them is a lower bound: registers may conflict, memory may miss, the assembler may add instructions, and latency needs
other warps to hide it.
Sources: CUDA C++ Programming Guide 12, "Throughput of Native Arithmetic Instructions" (results a cycle of an SM by
compute capability), "Multiprocessor" of each capability (four schedulers, one instruction of a warp a cycle each);
architecture whitepapers of A100, GA102, Ada, H100, Blackwell (multiply-adds of tensor cores a cycle of an SM; 128 bytes
a cycle of L1 and shared memory). Where none has a figure for a level, the largest of the others stands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from .rows import BITS
from .target import WARP_LANES

MODEL = "throughputs of the CUDA C++ Programming Guide"
SCHEDULERS = 4
"""Of an SM; each issues one instruction of a warp a cycle."""
MEMORY_LANES, MEMORY_BYTES = 32, 128
"""Addresses, and bytes of the first-level cache or shared memory, a cycle of an SM."""

_LEVELS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
_UNITS: dict[str, tuple[int, ...]] = {  # results a cycle of an SM, in the order of _LEVELS
    "fp32": (64, 128, 128, 128, 128, 128),
    "fp16": (128, 64, 64, 128, 128, 128),       # registers of two elements
    "fp64": (32, 2, 2, 64, 64, 2),
    "integer": (64, 64, 64, 64, 128, 128),
    "special": (16, 16, 16, 16, 16, 16),        # 1/x, 2^x, log2, sine, tanh; counts of bits
    "convert": (16, 16, 16, 64, 64, 64),
    "convert64": (16, 2, 2, 16, 16, 2),
    "exchange": (32, 32, 32, 32, 32, 32),
    "memory": (MEMORY_LANES,) * 6,
    "tensor": (1024, 512, 512, 2048, 4096, 512),  # multiply-adds of 16-bit elements
}
_SPECIAL = frozenset({"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div", "popc", "clz", "bfind", "brev",
                      "fns", "redux"})
_MEMORY = frozenset({"ld", "st", "atom", "red", "ldmatrix", "stmatrix", "cp"})
_ARITHMETIC = frozenset({"add", "sub", "mul", "fma", "min", "max", "abs", "neg", "copysign"})
_INTEGER = frozenset({"and", "or", "xor", "not", "cnot", "lop3", "shl", "shr", "shf", "prmt", "bfe", "bfi", "bmsk",
                      "szext", "mad", "mad24", "mul24", "madc", "addc", "subc", "dp2a", "dp4a", "sad", "selp", "slct",
                      "set", "setp"})


@dataclass(frozen=True, slots=True)
class Cost:
    """unit: that it occupies, "" for none but the scheduler. cycles: of the unit, for a warp. issues: instructions that
    a scheduler issues. operations: on floats. loaded_bytes, stored_bytes: of global memory, by a warp."""

    unit: str = ""
    cycles: float = 0.0
    issues: int = 1
    operations: int = 0
    loaded_bytes: int = 0
    stored_bytes: int = 0


@cache
def cost_of(form: Any, level: str) -> Cost:
    """Of one instruction."""
    opcode, types = form.row.opcode, [word for word in form.mnemonic.split(".") if word in BITS]
    type_ = types[0] if types else ""
    if opcode in ("mma", "wgmma"):
        return _product(form, level)
    if opcode in _MEMORY:
        return _memory(form, type_)
    wide = 2 if BITS.get(type_, 32) == 64 else 1
    if opcode == "cvt":
        return _conversion(types, level)
    if opcode in _SPECIAL:
        return _of("special", level, operations=WARP_LANES * type_.startswith("f"))
    if opcode in ("shfl", "vote", "match", "elect", "movmatrix"):
        return _of("exchange", level)
    if opcode in _ARITHMETIC and (type_.startswith("f") or type_.startswith("bf")):
        unit = "fp64" if type_ == "f64" else "fp32" if type_ in ("f32", "f32x2") else "fp16"
        pairs = 2 if type_.endswith("x2") else 1
        each = pairs * (2 if opcode == "fma" else 1)
        return _of(unit, level, times=pairs if unit == "fp32" else 1, operations=each * WARP_LANES)
    if opcode in _ARITHMETIC or opcode in _INTEGER:
        return _of("integer", level, times=3 if wide == 2 and opcode in ("mul", "mad") else wide)
    return Cost()


def cost_of_item(item: Any, level: str) -> Cost:
    """Of an instruction of machine IR. How large a product of tcgen05 is, its descriptor says, the number among its
    operands (PTX ISA, "Instruction descriptor": bits 17 to 22 are N / 8, 24 to 28 M / 16); it is 32 bytes deep."""
    if item.row.row.opcode != "tcgen05" or "mma" not in item.row.mnemonic:
        return cost_of(item.row, level)
    described = next((o.value for o in item.operands if hasattr(o, "value")), 0)
    sums = (described >> 17 & 0x3F) * 8 * (described >> 24 & 0x1F) * 16
    depth = 32 if "f8f6f4" in item.row.mnemonic or "kind::i8" in item.row.mnemonic else 16
    return Cost("tensor", sums * 16 / rate("tensor", level), 1, 2 * sums * depth) if sums else Cost()


def _of(unit: str, level: str, times: int = 1, operations: int = 0) -> Cost:
    """An instruction of 32 results, or so many of them."""
    return Cost(unit, times * WARP_LANES / rate(unit, level), times, operations)


def rate(unit: str, level: str) -> int:
    """Results a cycle of an SM."""
    return _UNITS[unit][_LEVELS.index(level)]


def _conversion(types: list[str], level: str) -> Cost:
    """Between integers of 32 and 64 bits it is a move; else by the widest type."""
    if all(t[0] in "su" and BITS[t] >= 32 for t in types):
        return _of("integer", level)
    return _of("convert64" if any(BITS[t] == 64 for t in types) else "convert", level)


def _memory(form: Any, type_: str) -> Cost:
    """A warp's addresses take a cycle, and its bytes as many as there are lines of them."""
    opcode, words = form.row.opcode, form.mnemonic.split(".")
    if opcode == "cp" and not ({"ca", "cg"} & set(words)):
        return Cost()  # groups, waits and bulk copies: the addresses are not the threads'
    if "param" in words or "const" in words:
        return Cost()
    if opcode in ("ldmatrix", "stmatrix"):
        bytes_ = 128 * int(form.get("num", "x1")[1:])
        return Cost("memory", bytes_ / MEMORY_BYTES)
    elements = next((int(w[1:]) for w in words if re.fullmatch(r"v[248]", w)), 1)
    bytes_ = WARP_LANES * (16 if opcode == "cp" else elements * BITS[type_] // 8)
    reached = bytes_ * (not any(w.partition("::")[0] in ("shared", "local") for w in words) or opcode == "cp")
    stores = opcode in ("st", "red")
    return Cost("memory", max(WARP_LANES / MEMORY_LANES, bytes_ / MEMORY_BYTES), 1, 0,
                0 if stores else reached, reached if stores or opcode == "atom" else 0)


def _product(form: Any, level: str) -> Cost:
    """A matrix instruction, of a warp or as a warp's part of a group's."""
    found = re.search(r"m(\d+)n(\d+)k(\d+)", form.mnemonic)
    if found is None:
        return Cost()  # fences and waits
    adds = prod(int(n) for n in found.groups()) / (4 if form.row.opcode == "wgmma" else 1)
    element = next(w for w in reversed(form.mnemonic.split(".")[:-1]) if w in BITS or w in ("e4m3", "e5m2"))
    bits = {"tf32": 32, "e4m3": 8, "e5m2": 8}.get(element, BITS.get(element, 16))
    return Cost("tensor", adds * bits / 16 / rate("tensor", level), 1, int(2 * adds))
