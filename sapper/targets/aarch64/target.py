"""Facts of 64-bit Arm processors: the levels and the named CPUs, one row each.

Leaves: `Target` rows by name. Holds: facts only. Generated code uses Advanced SIMD: 32 vector registers of 128 bits.
Sources: Arm Architecture Reference Manual DDI 0487 (what a version of the architecture has); Arm Software Optimization
Guides of Cortex-A72 (UAN0016) and Neoverse N1 (PJDOC-466751330-9707), V1 (PJDOC-466751330-9685), N2
(PJDOC-466751330-18256) and V2 (PJDOC-466751330-593177): pipes and latencies; cache sizes of typical members
(Graviton 2 and 3, Cobalt 100, Grace).
"""

from __future__ import annotations

from typing import NamedTuple

from ..plain import PlainTarget, by_name

KIB, MIB = 1024, 1024 * 1024
VECTOR_BITS = 128

V8_1_FEATURES = frozenset({"neon", "lse"})
"""Armv8.1-A, as far as generated code uses it: Advanced SIMD, and atomic additions in one instruction."""
V8_2_FEATURES = V8_1_FEATURES | {"dotprod"}
"""The same of Armv8.2-A with FEAT_DotProd, which is optional there."""
V8_6_FEATURES = V8_2_FEATURES | {"i8mm", "bf16"}
"""With FEAT_I8MM and FEAT_BF16: of Armv8.6-A, optional before."""


class _Row(NamedTuple):
    """What differs from processor to processor.

    name: how it is asked for. features: what generated code may use. l1_bytes, l2_bytes: data caches of one core;
    l3_bytes: the share that one core sees. fma_per_cycle: multiply-adds of 128 bits that begin in a cycle.
    fma_latency: cycles, by way of the factors; a sum that is passed on takes half of that. interleaves: of those that
    lack products of two signs it was not looked at what the model makes of ZIP1 and ZIP2.
    """

    name: str
    features: frozenset[str]
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    fma_per_cycle: float
    fma_latency: int = 4
    family: str = "aarch64"
    vector_registers: int = 32
    interleaves: bool = False


class Target(_Row, PlainTarget):
    """What the compiler knows of a processor; of what it does not say, see PlainTarget."""

    __slots__ = ()

    # An address is of a register and a number, or of two registers, never of all three. How memory is best asked for
    # was not measured.
    word_bytes = 4
    software_prefetch = True
    lane_factors = True
    """FMLA (by element)."""

    @property
    def lanes(self) -> int:
        """f32 lanes in one vector register."""
        return VECTOR_BITS // 32

    @property
    def wide_lanes(self) -> int:
        """Lanes of a row of 8-byte elements."""
        return self.lanes // 2

    @property
    def dots(self) -> frozenset[str]:
        """Products of four bytes: SDOT and UDOT, of one sign; of two signs USDOT, or several of the first
        (lane/split_dots.py). BFDOT: of two bf16."""
        bytes_ = ("dot4_u8i8", "dot4_i8i8", "dot4_u8u8") if self.has("dotprod") else ()
        return frozenset((*bytes_, "dot2_bf16") if self.has("bf16") else bytes_)

    def has(self, feature: str) -> bool:
        return feature in self.features


TARGETS: dict[str, Target] = by_name((
    # A level: figures that are safe on any member.
    Target("armv8.1-a", V8_1_FEATURES, 32 * KIB, 512 * KIB, 1 * MIB, 2),
    Target("neoverse-n1", V8_2_FEATURES, 64 * KIB, 1 * MIB, 1 * MIB, 2),
    Target("neoverse-v1", V8_6_FEATURES, 64 * KIB, 1 * MIB, 1 * MIB, 4, interleaves=True),
    Target("neoverse-n2", V8_6_FEATURES, 64 * KIB, 1 * MIB, 1 * MIB, 2, interleaves=True),
    Target("neoverse-v2", V8_6_FEATURES, 64 * KIB, 1 * MIB, 1 * MIB, 4, interleaves=True),
))
