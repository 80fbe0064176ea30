"""Facts of 64-bit RISC-V processors with vectors: a profile and named cores, one row each.

Leaves: `Target` rows by name. Holds: facts only; registers have a known length, VLEN, which code is made for.
Sources: RVA23 Profile (its mandatory extensions; V promises a VLEN of 128); SpacemiT K1 datasheet (X60: RVA22 with V,
VLEN 256, 32 KiB of data cache, 512 KiB that four cores share); LLVM's RISCVSchedSpacemitX60.td (in order, two
instructions a cycle, data path of 128 bits) and the latencies there.
"""

from __future__ import annotations

from typing import NamedTuple

from ..plain import PlainTarget, by_name

KIB, MIB = 1024, 1024 * 1024

RVA22_V = frozenset({"v", "zbb", "zfhmin", "zicbop", "zvfhmin"})
"""RVA22 with V and Zvfhmin, as far as generated code uses it: all of it is mandatory in RVA23."""


class _Row(NamedTuple):
    """What differs from processor to processor.

    name: how it is asked for. vector_bits: VLEN. features: what generated code may use. l1_bytes, l2_bytes: data caches
    of one core, or its share; l3_bytes: the share that one core sees. fma_per_cycle: multiply-adds of whole registers
    that begin in a cycle. fma_latency: cycles.
    """

    name: str
    vector_bits: int
    features: frozenset[str]
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    fma_per_cycle: float
    fma_latency: int = 5
    family: str = "riscv64"
    vector_registers: int = 31


class Target(_Row, PlainTarget):
    """What the compiler knows of a processor; of what it does not say, see PlainTarget. v0 is for masks, which leaves
    31 registers."""

    __slots__ = ()

    # An address is of a register and 12 bits, of vectors a register alone. How memory is best asked for was not
    # measured.
    word_bytes = 4
    vector_state = True

    @property
    def lanes(self) -> int:
        """f32 lanes in one vector register."""
        return self.vector_bits // 32

    @property
    def wide_lanes(self) -> int:
        """Lanes of a row of 8-byte elements."""
        return self.lanes // 2

    def has(self, feature: str) -> bool:
        return feature in self.features


TARGETS: dict[str, Target] = by_name((
    # The profile: the least that it promises, and figures that are safe on any member.
    Target("rva23u64", 128, RVA22_V, 32 * KIB, 256 * KIB, 1 * MIB, 1),
    Target("spacemit-x60", 256, RVA22_V, 32 * KIB, 256 * KIB, 512 * KIB, 0.5),
))
