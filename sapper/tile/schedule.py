"""Schedules: where and in what pieces a kernel is computed. They cannot change what is computed.

A `Schedule` is data. Every part that is left out is chosen by the analytic model (sapper/lane/model.py) from the
`Facts` of the target and the `Specialization` of the call. All keys are axis names as the tile IR prints them
(`m`, `n`, a second `k` is `k_1`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..ir.extents import evaluate_nested, names_in
from ..ir.nodes import Op
from ..ir.types import Dim, DType
from .requests import USUAL, Requests

TASKS_PER_WORKER = 2
"""Into how many tasks for each worker a parallel range is split, where there is enough of it."""


FEWEST_LANES = 4
"""Of a row: 128 bits."""

ELSEWHERE = {
    "unroll": "registers says how many rows, or vectors, a loop holds at once",
    "vectorize": "lane says which axis lies across the lanes, lanes how many there are",
    "parallel": "chunks says into how many tasks an axis is split; threads= of a call, how many workers there are",
    "prefetch": "requests says how far ahead memory is asked for, as in {\"stream_ahead_bytes\": 1024}",
    "reorder": "order says which loops stand outside",
    "pack": "stage says which tensors are copied in the order of reading",
    "block": "tile says how much of an axis a piece takes, registers how much a loop holds",
    "num_warps": "which warps there are follows from tile",
    "num_stages": "how many stages there are follows from tile",
}
"""How what other languages have is said here."""


class ScheduleError(ValueError):
    """A schedule that this kernel, or this target, cannot follow."""


class UnfollowedError(ScheduleError):
    """An entry that nothing in the kernel follows: `registers`, say, and the axis or tensor that it names."""

    def __init__(self, message: str, entry: str, name: str) -> None:
        super().__init__(message)
        self.entry, self.name = entry, name


class LoweringError(ValueError):
    """A kernel, or a schedule for it, that the lowering can't follow; says where and why."""

    def __init__(self, message: str, op: Op | None = None) -> None:
        where = f"{op.location}: " if op is not None and op.location is not None else ""
        super().__init__(where + message)


@dataclass(frozen=True, slots=True)
class MatrixUnit:
    """How contractions run on matrix instructions of 16 x 8 elements, 32 bytes deep.

    dtypes: of the elements. byte_dtypes: of those of 8 bits, which the instruction takes 32 deep, where both operands
    lie along the depth. shapes: rows and columns that a worker computes at once, the largest first. depth: of 16-bit
    elements. warps: along rows and columns. block_warps: likewise, where sums of blocks are scaled before they are
    added up: two for each scheduler, of which one multiplies while the other scales. few_shapes: of these, where rows
    are few: warps stand side by side, so that each weight is unpacked once for all rows. narrow_shapes: where all warps
    have the same columns, as there are few. stages: how many pieces of the
    operands are in near memory, one being used while the others arrive. chain_rows, chain_step, chain_stages: rows,
    columns of a piece, and stages where contractions are chained in registers (attention). chain_registers: most of a
    thread that their sums and left operands may take. near_bytes: of a worker at most. products: of 16-bit elements
    that a worker makes in a cycle. cache_bytes: that it gets from the last cache in a cycle, about, where all read;
    port_bytes: most that it takes.
    """

    dtypes: tuple[str, ...] = ("bf16", "f16")
    byte_dtypes: tuple[str, ...] = ("i8", "u8")
    shapes: tuple[tuple[int, int], ...] = ((128, 128), (128, 64), (64, 128), (64, 64))
    depth: int = 64
    warps: tuple[int, int] = (2, 2)
    block_warps: tuple[int, int] = (4, 2)
    few_shapes: tuple[tuple[int, int], ...] = ((32, 128), (32, 64))
    narrow_shapes: tuple[tuple[int, int], ...] = ((128, 32), (64, 32))
    stages: int = 3
    chain_rows: int = 128
    chain_step: int = 64
    chain_stages: int = 2
    chain_registers: int = 160
    workers: int = 108
    near_bytes: int = 99 << 10
    products: int = 1024
    cache_bytes: int = 32
    port_bytes: int = 64

    def warps_of_blocks(self, high: int, wide: int) -> tuple[int, int]:
        """Along rows and columns of a tile of sums that are scaled."""
        down, across = self.block_warps
        if (high, wide) in self.few_shapes:
            across = min(down * across, wide // 16)
            return down * self.block_warps[1] // across, across
        return down, across


@dataclass(frozen=True, slots=True)
class MatrixGroup:
    """How contractions run on matrix instructions of 64 x N elements, 32 bytes deep, that a group of warps issues
    together and that read both operands in near memory, where other warps have boxes of them copied, some stages ahead.

    dtypes: of the elements. byte_dtypes: of integers of 8 bits, along the depth, with sums of 32. narrow_dtypes: of
    floats of 8 bits, whose sums are added up in f32 after each stage, times scales of blocks of the depth,
    narrow_columns at once, as both sums need registers. group_warps, group_rows: of a group. shapes: (groups, columns)
    of a worker's tile, the largest first. depth_bytes: of a stage. stages: how many there are, a power of two: their
    number is some bits of a counter. copy_warps: those beside the groups. copy_registers: of each of their threads,
    where several groups need what is left of `registers`. near_bytes: of a worker at most. products, cache_bytes,
    port_bytes: as of MatrixUnit. chain_registers: likewise, of a thread where there are two groups; rows that take more
    are shared by both. turns: of two groups with rows of their own, one computes what stands between products while the
    other's products are made (chained_groups.py). clusters: of how many workers a copy may go to all, and signals reach
    all. sums_columns: of a memory for sums, of which each column has an f32 for each of group_rows rows: there one warp
    starts the products, of group_rows x N elements, and the groups of warps store (sums_memory.py); 0: sums are in
    registers.
    """

    dtypes: tuple[str, ...] = ("bf16", "f16")
    byte_dtypes: tuple[str, ...] = ()
    narrow_dtypes: tuple[str, ...] = ("f8e4m3",)
    narrow_columns: int = 128
    group_warps: int = 4
    group_rows: int = 64
    shapes: tuple[tuple[int, int], ...] = ((2, 256), (2, 128), (1, 128), (1, 64))
    depth_bytes: int = 128
    stages: int = 4
    copy_warps: int = 4
    copy_registers: int = 24
    registers: int = 65536
    chain_registers: int = 200
    near_bytes: int = 227 << 10
    workers: int = 132
    products: int = 2048
    cache_bytes: int = 32
    port_bytes: int = 64
    clusters: tuple[int, ...] = (2, 4)
    turns: bool = True
    sums_columns: int = 0


@dataclass(frozen=True, slots=True)
class TileUnit:
    """How contractions run on tile registers, which memory alone fills and empties.

    size: rows of a tile, and 32-bit slots of a row. products: names of the element types, left and right, that are
    multiplied. kept_bytes: of memory that keeps a configuration.
    """

    size: int
    products: frozenset[tuple[str, str]]
    kept_bytes: int


@dataclass(frozen=True, slots=True)
class Moves:
    """What it takes to bring elements to other lanes, where lanes are threads. shuffle, select, join: instructions that
    a warp issues for a shuffle of a row, a select, and what joins two rows. issued: that all warps of a worker start in
    a cycle. sector_bytes: of memory, the least that is written at once. port_bytes: that a processor sends to the last
    cache in a cycle."""

    shuffle: int
    select: int
    join: int
    issued: int
    sector_bytes: int
    port_bytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What the model knows of a target.

    lanes: 32-bit lanes of a vector register. vector_registers: how many. l1/l2/l3_bytes: data cache sizes, per core
    and shared. fma_latency: cycles. fma_per_cycle: multiply-adds of whole registers that can start in a cycle.
    gather_cost: cycles for each lane of a gather, about. wide_lanes: lanes of a row of 8-byte elements (None: half as
    many, as where a register is a vector of fixed size). indexed_addresses: a memory operand may have an index.
    software_prefetch: asking early for what will be read gains time; requests: how it is done best.
    rounded_at_once: vectors of a piece that much arithmetic makes and an instruction rounds to bf16, not row after row.
    transposes_by_scatter: a scatter is one instruction, so that a transposition needs no exchanges between lanes.
    run_bytes: of neighbours in memory that a lane may read or write together; 0: each has its own element of a row.
    many_workers: thousands of workers take tasks in turn, at no cost: a task is then a few rows, however many workers
    there are, and stages nothing for itself alone; code for what is left of many rows is not worth its place.
    matrix: the matrix instructions, if there are any. matrix_group: those of groups of warps. tiles: the tile
    registers. dots: lane ops of packed
    dot products that the target has and that the model may choose (sapper/lane/packed.py). split_dots: those of them
    that take several instructions (sapper/lane/split_dots.py). float8_rows: rows of fp8
    that are best read from memory at once. family, features: which
    pieces by hand (lang/by_hand.py) the target takes; a family of "" takes none. picks: a lane may take any other of
    the same register by an index, in one instruction, so that small tables stay in registers. interleaves: bytes of
    four rows become slots of four in few instructions. shared_pipes: whatever computes with vectors takes the pipes of
    multiply-adds. moves: what it takes to bring elements to other lanes, where
    lanes are threads. joins: what is joined with an element of memory in one step, whichever worker comes first, as the
    op and the element type. slow_division: a quotient of f32 takes a dozen instructions and more. lane_factors: a
    multiply-add takes one lane of a register as a factor, so that elements side by side are loaded together and spread
    by no instruction. flushes_as_it_rounds: an instruction rounds to bf16, and takes denormals for 0. two_by_two:
    packed dot products of two rows and two columns, of two slots each, are one instruction (sapper/lane/two_by_two.py).
    sums_apart: instructions that add or compare vectors have pipes of their own beside those that multiply.
    """

    lanes: int = 16
    vector_registers: int = 32
    l1_bytes: int = 32 << 10
    l2_bytes: int = 1 << 20
    l3_bytes: int = 16 << 20
    fma_latency: int = 4
    fma_per_cycle: float = 1.0
    gather_cost: int = 2
    wide_lanes: int | None = None
    indexed_addresses: bool = True
    software_prefetch: bool = True
    requests: Requests = USUAL
    rounded_at_once: int = 4
    transposes_by_scatter: bool = False
    run_bytes: int = 0
    many_workers: bool = False
    matrix: MatrixUnit | None = None
    dots: frozenset[str] = frozenset()
    split_dots: frozenset[str] = frozenset()
    float8_rows: int = 1
    matrix_group: MatrixGroup | None = None
    tiles: TileUnit | None = None
    family: str = ""
    features: frozenset[str] = frozenset()
    picks: bool = False
    interleaves: bool = False
    shared_pipes: bool = False
    moves: Moves | None = None
    joins: frozenset[tuple[str, DType]] = frozenset()
    slow_division: bool = False
    lane_factors: bool = False
    flushes_as_it_rounds: bool = False
    two_by_two: bool = False
    sums_apart: bool = False

    @property
    def lanes_of_wide_rows(self) -> int:
        return self.lanes // 2 if self.wide_lanes is None else self.wide_lanes


@dataclass(frozen=True, slots=True)
class DimClass:
    """What a compiled kernel may assume of a run-time dimension.

    hint: a typical size, for the model only. divisor: the size is a multiple of it (1, 16 or 64).
    """

    hint: int = 1024
    divisor: int = 1


class Panels(NamedTuple):
    """How a matrix lies that was packed once for the contractions that read it (sapper/runtime/packed.py).

    columns, depth: which of its two dimensions is walked across the lanes, and which is contracted. width: columns of
    a panel. elements: neighbours along the depth that lie beside each other, as the slots of a register hold them.
    Column c at depth d is element (d // elements, c % width, d % elements) of panel c // width; what is left of the
    last panel and the last slots is 0. After the panels of 8-bit integers follows an i32 for each column: what a sum of
    products that turns the other operand starts with (sapper/lane/packed.py).
    """

    columns: int
    depth: int
    width: int
    elements: int = 1


StrideClass = str | tuple[bool, ...] | Panels
"""Of a tensor: "contiguous" (C order), or for each dimension whether its stride is 1, or its panels."""


@dataclass(frozen=True, slots=True)
class Specialization:
    """What one compilation assumes of a call.

    dims: class of each run-time dimension. strides: of each tensor. aligned: tensors too large for the caches whose
    data and rows start at multiples of 64 bytes.
    """

    dims: dict[str, DimClass] = field(default_factory=dict)
    strides: dict[str, StrideClass] = field(default_factory=dict)
    aligned: frozenset[str] = frozenset()

    def typical(self, extent: Dim) -> int:
        """Of a tensor's dimension."""
        return max(0, evaluate_nested(extent, {n: self.dims.get(n, DimClass()).hint for n in names_in(extent)}))


@dataclass(frozen=True)
class Schedule:
    """The author's or the search's choices; None or a missing key leaves the choice to the model.

    lane: the axis that lies across lanes wherever it is walked.
    tile: axis -> how many coordinates one iteration of its `tiles` loop takes (a lane axis: a multiple of the lanes).
    registers: axis -> register factor: how many rows, or vectors for the lane axis, a walk holds of it.
    order: axes from the outermost walk loop to the innermost; axes left out follow.
    stage: tensors that are copied (packed) to scratch memory in the order in which they are read. None: the model's.
    streaming: tensors stored past the caches. None: the model's.
    chunks: axis -> into how many tasks a parallel axis is split.
    assembly: blocks by hand, each of which stands for its op wherever the target has it.
    matrix: whether contractions run on matrix instructions; true is an error where they can't. None: where the model
    has them do so.
    split: contracted axis -> among how many workers a tile's depth is split, as far as there are workers; 1: tiles are
    whole. stream: the contracted axis that all workers part evenly, whatever tiles that cuts (lane/depth_shares.py).
    Both empty: the model's.
    cluster: axis -> how many workers with neighbouring tiles along it copy what all of them read once for all
    (lane/clusters.py).
    requests: field of `Requests` -> what this kernel has in place of the target's.
    lanes: of 32 bits, of a row; fewer than a vector register has, where it has parts. None: all of them.
    """

    lane: str | None = None
    tile: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    stage: tuple[str, ...] | None = None
    streaming: tuple[str, ...] | None = None
    chunks: dict[str, int] = field(default_factory=dict)
    assembly: tuple[str, ...] = ()
    matrix: bool | None = None
    split: dict[str, int] = field(default_factory=dict)
    stream: str | None = None
    cluster: dict[str, int] = field(default_factory=dict)
    requests: dict[str, int] = field(default_factory=dict)
    lanes: int | None = None

    def __post_init__(self) -> None:
        """Raises ScheduleError for what is no schedule of any kernel."""
        for entry in ("lane", "stream"):
            axis = getattr(self, entry)
            if axis is not None and not isinstance(axis, str):
                raise ScheduleError(f"schedule entry {entry}: found {axis!r}; expected the name of an axis")
        for entry in ("tile", "registers", "chunks", "split", "cluster"):
            sizes = getattr(self, entry)
            if not isinstance(sizes, dict):
                raise ScheduleError(f"schedule entry {entry}: found {sizes!r}; expected axes with a size for each")
            for axis, size in sizes.items():
                number = isinstance(size, int) and not isinstance(size, bool)
                if not isinstance(axis, str) or not number or not 1 <= size < 1 << 31:
                    raise ScheduleError(f"schedule entry {entry} of axis {axis}: found {size!r}; expected an integer "
                                        "of 1 to 2147483647")
        for entry in ("order", "stage", "streaming", "assembly"):
            names = getattr(self, entry)
            if names is None and entry in ("stage", "streaming"):
                continue
            if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
                raise ScheduleError(f"schedule entry {entry}: found {names!r}; expected a list of names")
        usual = USUAL._asdict()
        if not isinstance(self.requests, dict):
            raise ScheduleError(f"schedule entry requests: found {self.requests!r}; expected fields with a value for "
                                "each")
        for name, value in self.requests.items():
            if name not in usual:
                raise ScheduleError(f"schedule entry requests: found {name!r}; expected some of {', '.join(usual)}")
            most = 2 if name.endswith("_level") else 2**31 - 1
            if type(value) is not type(usual[name]) or not 0 <= value <= most:
                expected = "true or false" if isinstance(usual[name], bool) else f"an integer of 0 to {most}"
                raise ScheduleError(f"schedule entry requests, {name}: found {value!r}; expected {expected}")
        if self.split and self.stream is not None:
            raise ScheduleError(f"schedule entries split and stream: found both, of {', '.join(self.split)} and "
                                f"{self.stream}; expected one: a tile is split, or workers part all of them evenly")

    def steered(self, facts: Facts) -> Facts:
        """The facts as this schedule has them. Raises ScheduleError for lanes that rows can't have."""
        if self.requests:
            asked: dict[str, Any] = self.requests
            facts = replace(facts, requests=facts.requests._replace(**asked))
        if self.lanes is None or self.lanes == facts.lanes:
            return facts
        if facts.many_workers or type(self.lanes) is not int or not FEWEST_LANES <= self.lanes < facts.lanes or (
                self.lanes & (self.lanes - 1)):
            raise UnfollowedError(f"schedule entry lanes: found {self.lanes!r}; expected {_lanes_of(facts)}", "lanes",
                                  "")
        # Matrix instructions take whole registers.
        return replace(facts, lanes=self.lanes, wide_lanes=max(FEWEST_LANES, self.lanes // 2), tiles=None)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with only what is set; `Schedule.from_json` reads it back."""
        data: dict[str, Any] = {}
        for name in ("lane", "stream", "lanes"):
            if getattr(self, name) is not None:
                data[name] = getattr(self, name)
        for name in ("tile", "registers", "chunks", "split", "cluster", "requests"):
            if getattr(self, name):
                data[name] = dict(sorted(getattr(self, name).items()))
        for name in ("order", "assembly"):
            if getattr(self, name):
                data[name] = list(getattr(self, name))
        for name in ("stage", "streaming"):
            if getattr(self, name) is not None:
                data[name] = list(getattr(self, name))
        if self.matrix is not None:
            data["matrix"] = self.matrix
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> Schedule:
        """Raises ScheduleError for an object that is no schedule."""
        known = set(Schedule.__dataclass_fields__)
        if not isinstance(data, dict):
            raise ScheduleError(f"schedule: found {data!r}; expected an object with some of {', '.join(sorted(known))}")
        for key in data:
            if key not in known:
                mend = f"; mend: {ELSEWHERE[key]}" if key in ELSEWHERE else ""
                raise ScheduleError(f"unknown schedule entry {key!r}; expected one of {', '.join(sorted(known))}{mend}")
        values = dict(data)
        for key in ("order", "stage", "streaming", "assembly"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        return Schedule(**values)


def _lanes_of(facts: Facts) -> str:
    """For messages: the lanes that rows may have."""
    if facts.many_workers:
        return f"{facts.lanes}, as lanes are threads"
    return f"a power of two from {FEWEST_LANES} to {facts.lanes}"
