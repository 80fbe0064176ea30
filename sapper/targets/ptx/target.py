"""Facts of NVIDIA GPUs: one row for each level that PTX is written for.

Leaves: `Target` rows by name. Holds: facts only. A warp plays the part of a worker, a thread that of a lane.
Sources: CUDA C++ Programming Guide, "Technical specifications per compute capability" (registers, shared memory,
warps); sizes of the second-level cache and SM counts of a typical member: A100, A10, L40S, H100 SXM, B200, RTX 5090.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.types import DType, bf16, f16, f32, f64, i32, i64
from ...tile.requests import Requests
from ...tile.schedule import MatrixGroup, MatrixUnit, Moves
from ..plain import PlainTarget, by_name
from .levels import number_of

KIB, MIB = 1024, 1024 * 1024
WARP_LANES = 32
KEEP_COST = 32
"""Instructions for an element; two exps, or a gather and an erf."""
BLOCK_LOADS = 32
"""Words of activations; ptxas 13.0 has all of a block's loaded before its products, and spills where there are 64."""
FILE_REGISTERS, REGISTER_GRANULE = 64 * 1024, 8
"""Registers of 32 bits of an SM, and the multiple that ptxas gives a thread."""

MOVES = Moves(shuffle=1, select=1, join=1, issued=4, sector_bytes=32, port_bytes=64)
"""shfl, selp, and an addition or the like: of rows of 32 bits one instruction each, of wider ones two or more. An SM
has four schedulers (CUDA C++ Programming Guide, "Multiprocessor Level"); a line of the second-level cache has four
sectors of 32 bytes (Nsight Compute, "Memory Tables"), of which an SM writes two a clock."""


@dataclass(frozen=True, slots=True)
class Target(PlainTarget):
    """What the compiler knows of a GPU.

    name: as in `.target`; what the level has is said by each instruction's row. processors: SMs. warps: most resident
    on an SM. registers: most of a thread. accumulators: rows that the model gives to sums and operands of plain
    arithmetic: as many again go to addresses of 64 bits, and ptxas then spills none. shared_bytes: most that a block
    may have. l1_bytes: data cache of an SM; l2_bytes: of the chip. byte_dtypes: of elements of 8 bits that mma.sync
    takes; `matrix` has its tiles, whose sums fit the registers and whose stages fit shared memory. chain_registers: see
    MatrixUnit; with more ptxas spills on some levels. matrix_group: wgmma or tcgen05, where there is one, likewise.
    """

    name: str
    processors: int
    warps: int
    shared_bytes: int
    l1_bytes: int
    l2_bytes: int
    registers: int = 255
    accumulators: int = 24
    byte_dtypes: tuple[str, ...] = ("i8", "u8")
    chain_registers: int = 144
    matrix_group: MatrixGroup | None = None
    moves: Moves = MOVES
    family: str = "ptx"

    # Of dots there are none that the model may choose, as a slot in memory would have to be aligned. Nothing picks: a
    # shuffle needs all lanes, and is as slow as a read of shared memory. Conversions have pipes of their own.
    assembler_allocates = True
    """ptxas gives registers, frame and encoding: the compiler stops at text."""
    lanes_are_threads = True
    """Lanes see each other's stores only after they met."""
    run_bytes = 16
    """Most that a thread reads or writes at once (PTX ISA, ld and st: .v4 of 32 bits)."""
    slow_division = True
    """div.rn.f32 is an estimate, its correction, and a call where that may fail: 16 to 18 instructions of machine
    code."""
    slow_conversions = True
    """16 of integers to floats start in a cycle, 64 from sm_90 on, of others 64 to 128 (CUDA C++ Programming Guide,
    "Throughput of Native Arithmetic Instructions")."""
    flushes_functions = True
    """As `ex2.approx.ftz` and `rcp.approx.ftz` do."""
    quick_denormals = True
    """They are multiplied as other numbers are (CUDA C++ Programming Guide, "Floating-Point Standard")."""

    @property
    def features(self) -> frozenset[str]:
        """This level and those whose instructions it has; what a level has is said by each row."""
        return frozenset({self.name, *(name for name in TARGETS if name[-1] != "a"
                                       and number_of(name) <= number_of(self.name))})

    @property
    def matrix(self) -> MatrixUnit:
        return MatrixUnit(byte_dtypes=self.byte_dtypes, workers=self.processors, near_bytes=self.shared_bytes,
                          chain_registers=self.chain_registers)

    @property
    def joins(self) -> frozenset[tuple[str, DType]]:
        """What `red` has (PTX ISA, section 9.7.13 "red")."""
        sums = (i32, i64, f32, f64, f16, *((bf16,) if number_of(self.name) >= 90 else ()))
        others = ((kind, dtype) for kind in ("max", "min", "and", "or", "xor") for dtype in (i32, i64))
        return frozenset({*(("add", dtype) for dtype in sums), *others})

    @property
    def lanes(self) -> int:
        return WARP_LANES

    @property
    def wide_lanes(self) -> int:
        """A row of 8-byte elements takes two registers of every thread."""
        return WARP_LANES

    @property
    def vector_registers(self) -> int:
        return self.accumulators

    @property
    def l3_bytes(self) -> int:
        return self.l2_bytes

    @property
    def requests(self) -> Requests:
        """Nothing is asked for early. What thousands of warps keep lies beyond the caches: while 8 bytes of an element
        go and come, an A100 does some hundred instructions for it (1.5 TB/s, and 108 x 4 x 32 in a cycle)."""
        return Requests(stream_ahead_bytes=0, row_requests=1, stream_requests=1, block_loads=BLOCK_LOADS,
                        keep_cost=KEEP_COST)


TENSOR_MEMORY = MatrixGroup(
    byte_dtypes=("i8", "u8"), group_rows=128, shapes=((1, 256), (2, 128), (1, 128), (1, 64)), workers=148,
    products=4096, sums_columns=512)
"""tcgen05: 128 x 256 x 16 elements in 128 cycles, sums in tensor memory of 128 lanes x 512 columns (PTX ISA, "Tensor
Memory"). What an SM gets from the second-level cache is taken to be as on sm_90a."""

_WITH_FP8 = ("i8", "u8", "f8e4m3")
TARGETS: dict[str, Target] = by_name((
    Target("sm_80", 108, 64, 163 * KIB, 192 * KIB, 40 * MIB, chain_registers=160),
    Target("sm_86", 72, 48, 99 * KIB, 128 * KIB, 6 * MIB),
    Target("sm_89", 142, 48, 99 * KIB, 128 * KIB, 96 * MIB, byte_dtypes=_WITH_FP8),
    Target("sm_90a", 132, 64, 227 * KIB, 256 * KIB, 50 * MIB, matrix_group=MatrixGroup(workers=132),
           chain_registers=160),
    Target("sm_100a", 148, 64, 227 * KIB, 256 * KIB, 126 * MIB, byte_dtypes=_WITH_FP8, chain_registers=160,
           matrix_group=TENSOR_MEMORY),
    Target("sm_120a", 170, 48, 99 * KIB, 128 * KIB, 96 * MIB, byte_dtypes=_WITH_FP8),
))


def target(name: str) -> Target:
    """The target called `name`. Raises KeyError that lists the known ones."""
    found = TARGETS.get(name)
    if found is None:
        raise KeyError(f"target: found {name!r}; expected one of {', '.join(TARGETS)}")
    return found


def known_targets() -> tuple[str, ...]:
    """Names of all targets, oldest first."""
    return tuple(TARGETS)


def runs_on(target: Target, capability: tuple[int, int]) -> bool:
    """Whether a device of a compute capability runs what is made for a target: a later one does, but for what is made
    for one architecture alone (CUDA C++ Programming Guide, "Compute capabilities")."""
    level = divmod(number_of(target.name), 10)
    return level == capability if target.name.endswith("a") else level <= capability


def target_for(capability: tuple[int, int]) -> Target | None:
    """The target whose code a device runs best: its own, or else the latest before it. None: it is too old."""
    fitting = [found for found in TARGETS.values() if runs_on(found, capability)]
    return max(fitting, key=lambda found: number_of(found.name), default=None)
