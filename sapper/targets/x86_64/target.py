"""Facts of x86-64 processors: the levels and the named CPUs, one row each.

Leaves: `Target` rows by name. Holds: facts only; nothing here runs on the CPU that it describes. Generated code may use
exactly the features of its target.
Sources: x86-64 psABI (levels); AMD publications 56665 (Zen 3), 57647 (Zen 4), 58455 (Zen 5); Intel Optimization
Reference Manual 248966 (Haswell, Skylake-SP, Cascade Lake, Ice Lake-SP, Alder Lake, Sapphire Rapids, Granite Rapids);
cache sizes of typical members, replaced by the host's own in detect.py.
"""

# Without `from __future__ import annotations`, which has NamedTuple compile each field's type from text: this module is
# part of every process's first call.
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from ..plain import PlainTarget, by_name

if TYPE_CHECKING:
    from ...tile.requests import Requests
    from ...tile.schedule import TileUnit

V3_FEATURES = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "popcnt"})
"""x86-64-v3, as far as generated code uses it."""
V4_FEATURES = V3_FEATURES | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
"""x86-64-v4, as far as generated code uses it."""
TILE_FEATURES = frozenset({"amx_tile", "amx_bf16", "amx_int8"})
V3_OPTIONAL_FEATURES = frozenset({"avx_vnni"})
"""Features that generated code uses where a target of x86-64-v3 has them."""
V4_OPTIONAL_FEATURES = frozenset({"avx512_bf16", "avx512_vnni", "avx512_vbmi"}) | TILE_FEATURES
"""The same of x86-64-v4."""


class _Row(NamedTuple):
    """What is said of each processor.

    name: how it is asked for. family: the folder of its instructions. features: what generated code may use.
    vector_bits: width of the vectors used. vector_registers: how many there are.
    mask_kind: "opmask" (k registers) or "vector" (all bits of a lane).
    l1_bytes, l2_bytes: data caches of one core; l3_bytes: the share that one core sees. cache_line_bytes.
    fma_per_cycle: of vectors of `vector_bits`, sustained. fma_latency: cycles.
    core: the named CPU whose costs of instructions bound its code (costs.py, zen3_costs.py, zen5_costs.py,
    intel_costs.py).
    asks: fields of `requests` that are not as usual (measured). rounded_at_once: vectors of a piece that much
    arithmetic makes and an instruction rounds to bf16, not row after row (measured; lane/register_factors.py).
    interleaves: bytes of four rows are better joined to slots by unpacking than widened one by one (measured).
    fuses_indexed: a multiply-add whose operand in memory has an index is one operation up to the pipes (measured).
    slow_underflow: an instruction whose result is below the normal numbers takes a hundred cycles or more (measured);
    of a level: on some of its processors.
    folded_loads: so many loads for each multiply-add, operands among them, a loop may have so that elements that two of
    these meet are spread by both, not once by an instruction of its own; 0: loads are what is short (measured).
    slow_products: one of 32-bit integers is two operations (vpmulld; lane/scaled_sums.py).
    quick_denormals: as operands of a product they take some cycles more at most (measured).
    sums_apart: instructions that add or compare vectors have pipes of their own beside those that multiply (measured).
    """

    name: str
    family: str
    features: frozenset[str]
    vector_bits: int
    vector_registers: int
    mask_kind: str
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    cache_line_bytes: int
    fma_per_cycle: float
    fma_latency: int
    core: str
    asks: tuple[tuple[str, int], ...]
    rounded_at_once: int
    interleaves: bool
    fuses_indexed: bool
    slow_underflow: bool
    folded_loads: float
    slow_products: bool
    quick_denormals: bool
    sums_apart: bool


class Target(_Row, PlainTarget):
    """What the compiler knows of a processor: its row, what follows from it, and what holds of the family.

    picks: VPERMD, of AVX2 among eight lanes, of AVX-512 among sixteen. Joins there are none: an instruction with LOCK
    takes some twenty cycles.
    """

    __slots__ = ()
    indexed_addresses = memory_operands = software_prefetch = picks = True
    code_by_hand = True

    @property
    def fault(self) -> str:
        from ...tile.requests import Requests
        from .costs import model_of
        from .detect import FEATURE_BITS

        level = V4_FEATURES if any(feature.startswith("avx512") for feature in self.features) else V3_FEATURES
        if lacks := level - self.features:
            return f"found features without {', '.join(sorted(lacks))}; expected all of the level"
        if unknown := self.features - FEATURE_BITS.keys():
            return f"found the features {', '.join(sorted(unknown))}; expected those of FEATURE_BITS in detect.py"
        if strange := {name for name, _ in self.asks} - set(Requests._fields):
            return f"found asks {', '.join(sorted(strange))}; expected fields of sapper/tile/requests.py"
        try:
            model_of(self)
        except KeyError as error:
            return str(error.args[0])
        return super().fault

    @property
    def requests(self) -> "Requests":
        """How memory is best asked for before it is read."""
        from ...tile.requests import Requests

        asks: dict[str, Any] = dict(self.asks)
        return Requests(**asks)

    @property
    def lanes(self) -> int:
        """f32 lanes in one vector register."""
        return self.vector_bits // 32

    @property
    def wide_lanes(self) -> int:
        """Lanes of a row of 8-byte elements."""
        return self.lanes // 2

    @property
    def dots(self) -> frozenset[str]:
        """Packed dot products; without an instruction for them, by several (lane/split_dots.py)."""
        bf16 = {"avx512f", "avx512vl", "avx512_bf16"} <= self.features
        return frozenset({"dot2_bf16" if bf16 else "fma2_bf16", "dot4_u8i8"})

    @property
    def flushes_as_it_rounds(self) -> bool:
        """VCVTNEPS2BF16 (SDM volume 2)."""
        return "dot2_bf16" in self.dots

    @property
    def shared_pipes(self) -> bool:
        """Of 512 bits Intel's cores compute on ports 0 and 5, which both multiply (Skylake-SP to Ice Lake-SP); those
        that came later have instructions for bf16, and so do others that have AVX-512."""
        return self.vector_bits == 512 and not self.has("avx512_bf16")

    @property
    def tiles(self) -> Optional["TileUnit"]:
        """AMX, as palette 1 has it: eight tiles of 16 rows of 64 bytes."""
        from ...tile.schedule import TileUnit
        from .tiles import CONFIGURATION_BYTES, ROWS

        products = {("bf16", "bf16")} if "amx_bf16" in self.features else set()
        if "amx_int8" in self.features:
            products |= {(left, right) for left in ("i8", "u8") for right in ("i8", "u8")}
        return TileUnit(ROWS, frozenset(products), CONFIGURATION_BYTES) if products else None

    @property
    def float8_rows(self) -> int:
        """A whole register of fp8 is widened at once, by tables of bytes, where there are any, or by words, where those
        of 256 bits take the same two pipes: 5.5 and 3.9 cycles for 16 numbers of e4m3 that meet one, on a Cascade
        Lake. Without AVX-512 half a register of e4m3, by way of denormals, where these are quick as operands."""
        if {"avx512vl", "avx512_vbmi"} <= self.features or self.shared_pipes:
            return 4
        return 2 if self.quick_denormals and self.vector_bits == 256 else 1

    def has(self, feature: str) -> bool:
        return feature in self.features


KIB, MIB = 1024, 1024 * 1024


def cpu(name: str, features: frozenset[str], l1: int, l2: int, l3: int, fma: float, fma_latency: int, core: str = "",
        asks: dict[str, int] | None = None, rounded_at_once: int = 4, interleaves: bool = False,
        fuses_indexed: bool = True, slow_underflow: bool = False, folded_loads: float = 0,
        slow_products: bool = False, quick_denormals: bool = False, sums_apart: bool = False) -> Target:
    """A row of `TARGETS`: caches in bytes, FMAs in a cycle, latency in cycles; see `Target`.

    Width, registers and the kind of masks follow from the features. core: the CPU's own name if left out.
    """
    wide = "avx512f" in features
    return Target(name, "x86_64", features, 512 if wide else 256, 32 if wide else 16, "opmask" if wide else "vector",
                  l1, l2, l3, 64, fma, fma_latency, core or name,
                  tuple((asks or {}).items()), rounded_at_once, interleaves, fuses_indexed, slow_underflow,
                  folded_loads, slow_products, quick_denormals, sums_apart)


_SKYLAKE_SP_ASKS = {"long_row_ahead_bytes": 1 * KIB, "row_streams": 8, "short_row_streams": 8, "again": False,
                    "places_ahead_bytes": 1 * KIB, "reread_ahead_bytes": 1 * KIB, "few_at_once": 8, "depth_block": 512,
                    "rows_in_blocks": 16, "rows_end_to_end": 16,
                    "block_ahead_bytes": 8 * KIB, "block_rows_ahead_bytes": 32 * KIB, "block_level": 1,
                    "next_rows": True, "rows_together": 16, "part_bytes": 8 * KIB,
                    "store_ahead_bytes": 1 * KIB, "late_stores": 1}
"""Measured on a Cascade Lake, which is a Skylake-SP with VNNI. One thread reads 64 MiB at 11.3 GB/s as one stream, 11.9
as two, 12.1 to 12.3 as three to eight, 12.5 as eight with a request for each line; five requests take a fifth away."""
_V4_ML = V4_FEATURES | {"avx512_bf16", "avx512_vnni", "avx512_vbmi"}

TARGETS: dict[str, Target] = by_name((
    # Levels: figures that are safe on any member, costs of the first core that had them.
    cpu("v3", V3_FEATURES, 32 * KIB, 256 * KIB, 2 * MIB, 2, 5, "haswell"),
    cpu("v4", V4_FEATURES, 32 * KIB, 1 * MIB, 2 * MIB, 1, 4, "skylake-avx512", slow_underflow=True),
    # Pipes of 256 bits: two FMA, two add, two loads, one store.
    cpu("zen3", V3_FEATURES, 32 * KIB, 512 * KIB, 32 * MIB, 2, 4, interleaves=True,
        asks={"panel_ahead_bytes": 1 * KIB, "long_row_ahead_bytes": 1 * KIB, "row_streams": 4,
              "short_row_streams": 4, "block_places": 4, "again": False, "rows_end_to_end": 8,
              "blocks_written_out": True, "last_whole": True, "pairs_in_caches": True}, quick_denormals=True,
        sums_apart=True),
    # The same pipes: 512-bit operations run on them as two halves.
    cpu("zen4", _V4_ML, 32 * KIB, 1 * MIB, 32 * MIB, 1, 4, rounded_at_once=8, interleaves=True,
        asks={"scales_ahead_bytes": 512, "row_streams": 4, "late_stores": 1}),
    # Pipes of 512 bits: two FMA, two add, two loads, one store.
    cpu("zen5", _V4_ML, 48 * KIB, 1 * MIB, 32 * MIB, 2, 4,
        asks={"stream_ahead_bytes": 16 * KIB, "stream_level": 1, "panel_ahead_bytes": 4 * KIB,
              "block_ahead_bytes": 8 * KIB, "block_rows_ahead_bytes": 12 * KIB, "row_requests": 2,
              "stream_requests": 1, "request_level": 1, "late_stores": 2}, rounded_at_once=8),
    # One stream of requests gets 12 GB/s from memory, several 16 to 17.
    cpu("graniterapids", _V4_ML | TILE_FEATURES, 48 * KIB, 2 * MIB, 504 * MIB, 2, 4,
        asks={"stream_ahead_bytes": 3 * KIB, "line_by_line": True, "long_row_ahead_bytes": 1 * KIB,
              "row_streams": 8, "short_row_streams": 8, "panel_streams": 4, "panel_parts": 5, "again": False,
              "places_ahead_bytes": 512, "rows_in_blocks": 16, "rows_end_to_end": 32, "block_places": 8,
              "block_ahead_bytes": 3 * KIB, "block_rows_ahead_bytes": 32 * KIB, "widened_ahead_bytes": 8 * KIB},
        interleaves=True, slow_underflow=True),
    cpu("sapphirerapids", _V4_ML | TILE_FEATURES, 48 * KIB, 2 * MIB, 105 * MIB, 2, 4, slow_underflow=True),
    cpu("icelake-server", V4_FEATURES | {"avx512_vnni", "avx512_vbmi"}, 48 * KIB, 1280 * KIB, 48 * MIB, 2, 4,
        slow_underflow=True),
    cpu("cascadelake", V4_FEATURES | {"avx512_vnni", "prfchw"}, 32 * KIB, 1 * MIB, 35 * MIB, 2, 4,
        "skylake-avx512", _SKYLAKE_SP_ASKS, interleaves=True, fuses_indexed=False, slow_underflow=True,
        folded_loads=.8, slow_products=True),
    cpu("skylake-avx512", V4_FEATURES | {"prfchw"}, 32 * KIB, 1 * MIB, 22 * MIB, 2, 4,
        asks=_SKYLAKE_SP_ASKS, interleaves=True, fuses_indexed=False, slow_underflow=True, folded_loads=.8,
        slow_products=True),
    # Golden Cove as in clients, which have AVX-512 fused off, and their successors' row too.
    cpu("alderlake", V3_FEATURES | V3_OPTIONAL_FEATURES, 48 * KIB, 1280 * KIB, 30 * MIB, 2, 4,
        "sapphirerapids"),
    cpu("haswell", V3_FEATURES, 32 * KIB, 256 * KIB, 8 * MIB, 2, 5),
))


def target(name: str) -> Target:
    """The target called `name`. Raises KeyError that lists the known ones."""
    found = TARGETS.get(name)
    if found is None:
        raise KeyError(f"target: found {name!r}; expected one of {', '.join(TARGETS)}")
    return found


def known_targets() -> tuple[str, ...]:
    """Names of all targets, levels first."""
    return tuple(TARGETS)
