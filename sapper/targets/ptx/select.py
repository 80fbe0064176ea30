"""Selection rules of PTX: one small function for each lane op, and what the neutral driver asks of a target.

Enters: a lane op and the driver (`s`, sapper/codegen/select.py: Selector), which knows where values are. Leaves:
instructions, through `s.emit`. The rules stand by concern in the modules select_*.py, each with its own table. Holds:
a warp plays the part of a worker and a thread that of a lane, so
  a scalar is a 64-bit register with the same number in every thread ("gpr"), a row a 32-bit register ("vec") or, for
      8-byte elements, a 64-bit one ("wide"), a mask a predicate ("pred"); registers are without number, since ptxas
      allocates, and without type;
  control depends on scalars only: the threads of a warp go the same way and meet in every shuffle and vote.
Source: PTX ISA, section 9.7 (instructions), 8 (memory model), 5.2 (registers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.nodes import Block, Op, Value
from ...lane.ranges import Ranges
from ...lane.synchronise import bytes_of_lane
from ...lang.by_hand import piece_of
from ..rule_tables import joined
from . import (
    select_arithmetic,
    select_groups,
    select_lanes,
    select_matrix,
    select_memory,
    select_scalars,
    select_workers,
)
from .levels import number_of
from .rows import form
from .select_common import Key, Rule
from .select_common import constant_key as constant_key
from .select_common import constant_kind as constant_kind
from .select_common import constant_room as constant_room
from .select_common import is_cheap as is_cheap
from .select_common import load_immediate as load_immediate
from .select_common import make_constant as make_constant
from .select_common import move as move
from .select_control import add_immediate as add_immediate
from .select_control import add_register as add_register
from .select_control import after_task as after_task
from .select_control import before_tasks as before_tasks
from .select_control import branch_unless as branch_unless
from .select_control import compare_branch as compare_branch
from .select_control import jump as jump
from .select_control import next_task as next_task
from .select_control import subtract_branch as subtract_branch
from .select_control import subtract_register as subtract_register
from .text import SPECIAL, Symbol, map_name

FAMILY = "ptx"
NARROW_FLOATS_FROM = 89
"""The level that converts fp8 (PTX ISA, cvt)."""


class _Forms(dict[str, Any]):
    """Instruction forms by mnemonic, looked up once each."""

    def __missing__(self, mnemonic: str) -> Any:
        found = self[mnemonic] = form(mnemonic)
        return found


ROWS = _Forms()

FOLDED_DTYPES: frozenset[str] = frozenset()
"""No operand but that of a load or a store is memory."""
SUMS_IN_MEMORY: frozenset[int] = frozenset()
"""Bits of the integers that an instruction adds to in memory."""

ABSORBS_SIGN: frozenset[str] = frozenset()
"""ptxas folds a negation into its user; PTX has no place to write it."""
TAKES_LANE: dict[str, tuple[int, ...]] = {}
"""A lane is a thread."""
TIED: dict[str, tuple[int, ...]] = {"group_multiply": (-1,), "group_multiply_rows": (-1,)}
"""Sums are made in place. Others have operands of their own."""
OWN_CONSTANTS: dict[str, Callable[[Any, Op], tuple[Key, ...]]] = {}
"""Constants stand in the instruction."""


class Facts:
    """What selection knows of one target, and what it notes for one function.

    warps: of a worker. lane, warp, worker, workers, first: registers that `begin` fills where the function needs them.
    lane_bytes: by element size, the offset of a thread in a row. addresses: where a thread's own address was computed,
    in which block. never_nan: what was found out about values. parts: of values that came in words, the element type,
    the word and the place in it. ranges: between which bounds scalars lie. maps:
    registers with the addresses of tensor maps.
    """

    def __init__(self, s: Any, target: Any) -> None:
        self.level: str = target.name
        self.mask_kind = "pred"
        self.wide_kind = "wide"
        self.indexed_addresses = False
        self.loop_align_bytes = 1
        self.most_folded_splats = 0
        self.folded_loads = 0.0
        if s.lanes != target.lanes:
            raise ValueError(f"lanes of function {s.function.name}: found {s.lanes}; expected {target.lanes}, the "
                             "threads of a warp; mend: lower with the facts of this target")
        self.warps: int = s.function.attributes.get("warps", 1)
        self.warp: Any = None
        self.lane: Any = None
        self.wide_lane: Any = None
        self.first: Any = None
        self.worker: Any = None
        self.workers: Any = None
        self.task: Any = None
        self.lane_bytes: dict[int, Any] = {}
        self.addresses: dict[tuple[Any, ...], tuple[Any, Block]] = {}
        self.never_nan: dict[Value, bool] = {}
        self.parts: dict[Value, tuple[Any, Any, int]] = {}
        self.ranges = Ranges(s.function)
        self.maps: list[Any] = []


def facts_of(s: Any, target: Any) -> Facts:
    return Facts(s, target)


def legal_ops(target: Any) -> frozenset[str]:
    """Lane ops with instructions of their own here, among those that not every target has."""
    narrow = {"unpack.float8"} if number_of(target.name) >= NARROW_FLOATS_FROM else set()
    return frozenset({
        "round", "floor", "ceil", "trunc", "dot4_u8i8", "exp2.f32", "reciprocal", "rsqrt.f32", "mul2", *narrow})


def folds(s: Any) -> dict[str, frozenset[int]]:
    del s
    return {}


def begin(s: Any) -> None:
    """Who this thread is: its lane, and the worker that its warp plays."""
    needed = s.names
    facts = s.facts
    thread = s.new("vec")
    s.emit("mov.u32", thread, SPECIAL["%tid.x"])
    facts.lane = s.new("vec")
    s.emit("and.b32", facts.lane, thread, 31)
    facts.first = s.new("pred")
    s.emit("setp.eq.s32", facts.first, facts.lane, 0)
    facts.wide_lane = s.new("gpr")
    s.emit("cvt.u64.u32", facts.wide_lane, facts.lane)
    sizes = {bytes_of_lane(op) for op in s.function.walk() if op.name in ("load", "store", "load_run", "store_run")
             and not op.attributes.get("gathered")}
    for size in sorted(sizes):
        if size == 1:
            facts.lane_bytes[size] = facts.wide_lane
            continue
        facts.lane_bytes[size] = s.new("gpr")
        s.emit("mul.wide.u32", facts.lane_bytes[size], facts.lane, size)
    if needed & {"worker", "tasks", "workers", "barrier", "hand_over", "take_over"}:
        number, total = s.new("vec"), s.new("vec")
        s.emit("mov.u32", number, SPECIAL["%ctaid.x"])
        s.emit("mov.u32", total, SPECIAL["%nctaid.x"])
        if facts.warps == 1:         # every warp of a block is a worker
            threads, warps, own = (s.new("vec") for _ in range(3))
            s.emit("mov.u32", threads, SPECIAL["%ntid.x"])
            s.emit("shr.u32", warps, threads, 5)
            s.emit("shr.u32", own, thread, 5)
            s.emit("mad.lo.s32", number, number, warps, own)
            s.emit("mul.lo.s32", total, total, warps)
        facts.worker, facts.workers = s.new("gpr"), s.new("gpr")
        s.emit("cvt.u64.u32", facts.worker, number)
        s.emit("cvt.u64.u32", facts.workers, total)
    if needed & {"warp", "hand_over", "take_over"} or ("barrier" in needed and facts.warps > 1):
        own = s.new("vec")
        s.emit("shr.u32", own, thread, 5)
        facts.warp = s.new("gpr")
        s.emit("cvt.u64.u32", facts.warp, own)
    for number, _ in enumerate(s.function.attributes.get("tensor_maps", [])):
        parameter, generic = s.new("gpr"), s.new("gpr")
        s.emit("mov.b64", parameter, Symbol(map_name(number)))
        s.emit("cvta.param.u64", generic, parameter)
        facts.maps.append(generic)


def finish(s: Any) -> None:
    s.location = None
    s.emit("ret")


# --- Tables ----------------------------------------------------------------------------------------------------------

def asm(s: Any, op: Op) -> None:
    """A piece by hand writes its own instructions."""
    piece_of(op.attributes["by"]).select(s, op)


RULES: dict[str, Rule] = joined(FAMILY, ({"asm": asm, "asm_multiply": asm}, *(module.RULES for module in (
    select_arithmetic, select_groups, select_lanes, select_matrix, select_memory, select_scalars, select_workers))))
