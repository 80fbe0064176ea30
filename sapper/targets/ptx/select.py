"""Selection rules of PTX: one small function for each lane op, and what the neutral driver asks of a target.

Enters: a lane op and the driver (`s`, sapper/codegen/select.py: Selector), which knows where values are. Leaves:
instructions, through `s.emit`. Holds: a warp plays the part of a worker and a thread that of a lane, so
  a scalar is a 64-bit register with the same number in every thread ("gpr"), a row a 32-bit register ("vec") or, for
      8-byte elements, a 64-bit one ("wide"), a mask a predicate ("pred"); registers are without number, since ptxas
      allocates, and without type;
  control depends on scalars only: the threads of a warp go the same way and meet in every shuffle and vote;
  the rounding is written out (add.rn), since ptxas may fuse a product and a sum that have none.
Source: PTX ISA, section 9.7 (instructions), 8 (memory model), 5.2 (registers).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ...ir.nodes import Block, Op, Value
from ...ir.types import DType, MaskType, RowType, ScalarType
from ...lane.fragments import GROUP_DEPTH_BYTES
from ...lane.ops import FIRST_WORDS
from ...lane.ranges import Ranges
from ...lane.synchronise import bytes_of_lane
from ...lang.by_hand import piece_of
from .rows import form
from .select_workers import RULES as WORKER_RULES
from .select_workers import arrive_everywhere, cluster_mask
from .text import NEAR, NOBODY, SPECIAL, Symbol, TensorPlace, map_name

FAMILY = "ptx"

Key = tuple[Any, ...]
Rule = Callable[[Any, Op], None]

ALL_LANES = 0xFFFFFFFF
"""The threads that take part in a shuffle or a vote: all of the warp."""


class _Forms(dict[str, Any]):
    """Instruction forms by mnemonic, looked up once each."""

    def __missing__(self, mnemonic: str) -> Any:
        found = self[mnemonic] = form(mnemonic)
        return found


ROWS = _Forms()

FOLDED_DTYPES: frozenset[str] = frozenset()
"""No operand but that of a load or a store is memory."""
ABSORBS_SIGN: frozenset[str] = frozenset()
"""ptxas folds a negation into its user; PTX has no place to write it."""
TIED: dict[str, tuple[int, ...]] = {"group_multiply": (-1,), "group_multiply_rows": (-1,)}
"""Sums are made in place. Others have operands of their own."""
OWN_CONSTANTS: dict[str, Callable[[Any, Op], tuple[Key, ...]]] = {}
"""Constants stand in the instruction."""


class Facts:
    """What selection knows of one target, and what it notes for one function.

    warps: of a worker. lane, warp, worker, workers, first: registers that `begin` fills where the function needs them.
    lane_bytes: by element size, the offset of a thread in a row. addresses: where a thread's own address was computed,
    in which block. never_nan: what was found out about values. ranges: between which bounds scalars lie. maps:
    registers with the addresses of tensor maps.
    """

    def __init__(self, s: Any, target: Any) -> None:
        self.level: str = target.name
        self.mask_kind = "pred"
        self.wide_kind = "wide"
        self.indexed_addresses = False
        self.loop_align_bytes = 1
        self.most_folded_splats = 0
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
        self.ranges = Ranges(s.function)
        self.maps: list[Any] = []


def facts_of(s: Any, target: Any) -> Facts:
    return Facts(s, target)


def legal_ops(target: Any) -> frozenset[str]:
    """Lane ops with instructions of their own here, among those that not every target has."""
    del target
    return frozenset({"round", "floor", "ceil", "trunc", "dot4_u8i8", "exp2.f32"})


def folds(s: Any) -> dict[str, frozenset[int]]:
    del s
    return {}


# --- Types and operands ----------------------------------------------------------------------------------------------


def dtype_of(value: Value) -> DType:
    assert isinstance(value.type, RowType)
    return value.type.dtype


def bits_of(value: Value) -> int:
    return dtype_of(value).bits


def arithmetic_type(value: Value) -> str:
    """The type by which an instruction computes with a row: f32, f64, s32, s64."""
    dtype = dtype_of(value)
    return dtype.name if dtype.is_float else f"s{dtype.bits}"


def constant_key(s: Any, value: Value) -> Key:
    """(bits of the register, its content) of a splat_const."""
    del s
    op = value.op
    assert op is not None
    dtype = dtype_of(value)
    number = op.attributes["value"]
    if dtype.name == "f32":
        return 32, float32_bits(float(number))
    if dtype.name == "f64":
        return 64, struct.unpack("<Q", struct.pack("<d", float(number)))[0]
    return dtype.bits, int(number) & ((1 << dtype.bits) - 1)


def float32_bits(number: float) -> int:
    """The bits of the f32 nearest to a Python float."""
    try:
        return int(struct.unpack("<I", struct.pack("<f", number))[0])
    except OverflowError:
        return 0x7F800000 if number > 0 else 0xFF800000


def is_cheap(key: Key) -> bool:
    del key
    return True


def constant_kind(key: Key) -> str:
    return "vec" if key[0] == 32 else "wide"


def make_constant(s: Any, key: Key, register: Any) -> None:
    s.emit(f"mov.b{key[0]}", register, key[1])


def constant_room(s: Any, live_rows: int, hoisted: list[Key]) -> dict[str, int]:
    """None: instructions hold their constants."""
    del s, live_rows, hoisted
    return {}


def row(s: Any, value: Value) -> Any:
    """A row as a source: its register, or its bits where it is a constant."""
    op = value.op
    if op is not None and op.name == "splat_const" and value not in s.registers:
        return constant_key(s, value)[1]
    return s.vector(value)


def scalar(s: Any, value: Value) -> Any:
    """A scalar as a source: its register, or the number."""
    number = s.constant_of(value)
    return s.scalar(value) if number is None else number


def predicate(s: Any, value: Value) -> Any:
    """A predicate that is on where a scalar is not 0."""
    made = s.new("pred")
    op = value.op
    if value in s.deferred and op is not None:
        if op.name == "s_cmp":
            s.emit(f"setp.{op.attributes['cond']}.s64", made, *(scalar(s, v) for v in op.operands))
        else:
            vote(s, made, op)
    else:
        s.emit("setp.ne.s64", made, scalar(s, value), 0)
    return made


def vote(s: Any, made: Any, op: Op) -> None:
    s.emit(f"vote.sync.{op.name.removeprefix('mask_')}.pred", made, s.vector(op.operands[0]), ALL_LANES)


def settle(s: Any, value: Value, made: Any) -> None:
    """`value` is in the fresh register `made`, and goes to the register it was meant for, if there is one."""
    wanted = s.target.get(value)
    if wanted is None:
        s.registers[value] = made
    else:
        move(s, s.define(value), made, value.type)


# --- What the driver asks --------------------------------------------------------------------------------------------

def begin(s: Any) -> None:
    """Who this thread is: its lane, and the worker that its warp plays."""
    needed = {op.name for op in s.function.walk()}
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
    if needed & {"warp", "hand_over", "take_over"}:
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


def move(s: Any, destination: Any, source: Any, type_: Any) -> None:
    if isinstance(type_, MaskType):
        s.emit("mov.pred", destination, source)
    elif isinstance(type_, ScalarType) or type_.dtype.bits == 64:
        s.emit("mov.b64", destination, source)
    else:
        s.emit("mov.b32", destination, source)


def load_immediate(s: Any, register: Any, number: int) -> None:
    s.emit("mov.b64", register, number)


def add_immediate(s: Any, register: Any, number: int) -> None:
    s.emit("add.s64", register, register, number)


def add_register(s: Any, register: Any, other: Any) -> None:
    s.emit("add.s64", register, register, other)


def subtract_register(s: Any, register: Any, other: Any) -> None:
    s.emit("sub.s64", register, register, other)


def subtract_branch(s: Any, register: Any, number: int, label: str) -> None:
    """Take a number off; jump if what remains is above 0."""
    s.emit("sub.s64", register, register, number)
    compare_branch(s, "gt", register, 0, label)


def jump(s: Any, label: str) -> None:
    s.branch("bra.uni", label)


def compare_branch(s: Any, condition: str, a: Any, b: Any, label: str) -> None:
    made = s.new("pred")
    s.emit(f"setp.{condition}.s64", made, a, b)
    branch_if(s, made, True, label)


def branch_if(s: Any, made: Any, wanted: bool, label: str) -> None:
    """Jump if the predicate is on, or off. All threads go the same way."""
    if not wanted:
        turned = s.new("pred")
        s.emit("not.pred", turned, made)
        made = turned
    s.branch("bra.uni", label)
    s.body[-1].mask = made


def branch_unless(s: Any, value: Value, label: str) -> None:
    """Jump if the condition is 0."""
    number = s.constant_of(value)
    if number is None:
        branch_if(s, predicate(s, value), False, label)
    elif not number:
        jump(s, label)


def before_tasks(s: Any, number: Any) -> None:
    """The first task of a worker has its own number."""
    del number
    s.facts.task = s.new("gpr")
    s.emit("mov.b64", s.facts.task, s.facts.worker)


def next_task(s: Any, number: Any) -> None:
    s.emit("mov.b64", number, s.facts.task)


def after_task(s: Any, counter: int, number: Any) -> None:
    """Tasks are dealt out in turn: no counter is needed."""
    del counter, number
    s.emit("add.s64", s.facts.task, s.facts.task, s.facts.workers)


# --- Scalars ---------------------------------------------------------------------------------------------------------

def arg(s: Any, op: Op) -> None:
    load_word(s, s.define(op.results[0]), op.attributes["slot"])


def load_word(s: Any, register: Any, word: int) -> None:
    """A word of the argument block: every one is a parameter."""
    names = (*FIRST_WORDS, *s.function.attributes["slots"])
    s.emit("ld.param.b64", register, s.memory(None, label=names[word]))


def worker(s: Any, op: Op) -> None:
    s.emit("mov.b64", s.define(op.results[0]), s.facts.worker)


def workers(s: Any, op: Op) -> None:
    s.emit("mov.b64", s.define(op.results[0]), s.facts.workers)


def _scalar_binary(mnemonic: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        a, b = (scalar(s, v) for v in op.operands)
        s.emit(mnemonic, s.define(op.results[0]), a, b)
    return rule


def _scalar_shift(mnemonic: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        a, b = scalar(s, op.operands[0]), low_half(s, op.operands[1])
        s.emit(mnemonic, s.define(op.results[0]), a, b)
    return rule


def floor_division(s: Any, a: Any, b: Any, type_: str, kind: str, modulo: bool) -> Any:
    """Quotient or remainder rounded towards minus infinity, in a new register: the instruction rounds towards 0."""
    bits = type_[1:]
    quotient, product, rest, signs = (s.new(kind) for _ in range(4))
    inexact, below = s.new("pred"), s.new("pred")
    s.emit(f"div.{type_}", quotient, a, b)
    s.emit(f"mul.lo.{type_}", product, quotient, b)
    s.emit(f"sub.{type_}", rest, a, product)
    s.emit(f"setp.ne.{type_}", inexact, rest, 0)
    s.emit(f"xor.b{bits}", signs, rest, b)
    s.emit(f"setp.lt.and.{type_}", below, signs, 0, inexact)
    if modulo:
        s.emit_masked(f"add.{type_}", below, False, rest, rest, b)
        return rest
    s.emit_masked(f"sub.{type_}", below, False, quotient, quotient, 1)
    return quotient


def _scalar_division(modulo: bool) -> Rule:
    """In 32 bits where the operands are known to fit: 64 bits take a subroutine, and a stack frame for registers."""
    def rule(s: Any, op: Op) -> None:
        result = op.results[0]
        ranges = [s.facts.ranges.of(v) for v in op.operands]
        if all(low >= 0 and high < 2**32 for low, high in ranges):
            a, b = (low_half(s, v) for v in op.operands)
            made = s.new("vec")
            s.emit("rem.u32" if modulo else "div.u32", made, a, b)
            s.emit("cvt.u64.u32", s.define(result), made)
        elif all(low >= -(2**31) and high < 2**31 for low, high in ranges):
            a, b = (low_half(s, v) for v in op.operands)
            s.emit("cvt.s64.s32", s.define(result), floor_division(s, a, b, "s32", "vec", modulo))
        else:
            a, b = (scalar(s, v) for v in op.operands)
            settle(s, result, floor_division(s, a, b, "s64", "gpr", modulo))
    return rule


def low_half(s: Any, value: Value) -> Any:
    """The low 32 bits of a scalar as a source."""
    number = s.constant_of(value)
    if number is not None:
        return number
    made = s.new("vec")
    s.emit("cvt.u32.u64", made, s.scalar(value))
    return made


def s_cmp(s: Any, op: Op) -> None:
    made = s.new("pred")
    s.emit(f"setp.{op.attributes['cond']}.s64", made, *(scalar(s, v) for v in op.operands))
    s.emit("selp.b64", s.define(op.results[0]), 1, 0, made)


def s_select(s: Any, op: Op) -> None:
    condition, a, b = op.operands
    made = predicate(s, condition)
    first, second = scalar(s, a), scalar(s, b)
    s.emit("selp.b64", s.define(op.results[0]), first, second, made)


def memory_type(dtype: DType) -> str:
    """The type by which a load extends an element to a register, and a store takes its low bits."""
    if dtype.name == "bool":
        return "u8"
    if dtype.bits >= 32 or dtype.is_float:
        return f"b{dtype.bits}"
    return f"{'s' if dtype.kind == 'i' else 'u'}{dtype.bits}"


def s_load(s: Any, op: Op) -> None:
    memory = uniform_address(s, op, 0)
    dtype = op.attributes["dtype"]
    name = "u8" if dtype.name == "bool" else f"{'u' if dtype.kind == 'u' else 's'}{dtype.bits}"
    s.emit(f"ld.{space_of(op)}.{name}", s.define(op.results[0]), memory)


def s_store(s: Any, op: Op) -> None:
    value = scalar(s, op.operands[0])
    if isinstance(value, int):
        made = s.new("gpr")
        load_immediate(s, made, value)
        value = made
    memory = uniform_address(s, op, 1)
    dtype = op.attributes["dtype"]
    name = "u8" if dtype.name == "bool" else f"u{dtype.bits}"
    s.emit_masked(f"st.{space_of(op)}.{name}", s.facts.first, False, memory, value)


# --- Rows from scalars, and back -------------------------------------------------------------------------------------

def splat(s: Any, op: Op) -> None:
    value = scalar(s, op.operands[0])
    result = op.results[0]
    if bits_of(result) == 64:
        s.emit("mov.b64", s.define(result), value)
    elif isinstance(value, int):
        s.emit("mov.b32", s.define(result), value & 0xFFFFFFFF)
    else:
        s.emit("cvt.u32.u64", s.define(result), value)


def iota(s: Any, op: Op) -> None:
    s.emit("mov.b32", s.define(op.results[0]), s.facts.lane)


def lane0(s: Any, op: Op) -> None:
    value = op.operands[0]
    wide = bits_of(value) == 64
    made = s.new("wide" if wide else "vec")
    shuffle(s, made, s.vector(value), "idx", 0, wide)
    s.emit("mov.b64" if wide else "cvt.s64.s32", s.define(op.results[0]), made)


# --- Arithmetic ------------------------------------------------------------------------------------------------------

def _arithmetic(mnemonic: str, integers: str = "") -> Rule:
    """integers: a modifier that the integer form has."""
    def rule(s: Any, op: Op) -> None:
        result = op.results[0]
        sources = [row(s, v) for v in op.operands]
        more = ".rn" if dtype_of(result).is_float else integers
        s.emit(f"{mnemonic}{more}.{arithmetic_type(result)}", s.define(result), *sources)
    return rule


def _plain(mnemonic: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        sources = [row(s, v) for v in op.operands]
        s.emit(f"{mnemonic}.{arithmetic_type(op.results[0])}", s.define(op.results[0]), *sources)
    return rule


def _extreme(name: str, condition: str) -> Rule:
    """min or max: `a if a < b else b`. The instruction gives the operand that is a number, hence the same unless b may
    be NaN. (Which of two zeros it takes is free.)"""
    def rule(s: Any, op: Op) -> None:
        a, b = op.operands
        result = op.results[0]
        first, second = row(s, a), row(s, b)
        if not dtype_of(result).is_float or never_nan(s, b):
            s.emit(f"{name}.{arithmetic_type(result)}", s.define(result), first, second)
            return
        takes = s.new("pred")
        s.emit(f"setp.{condition}.{arithmetic_type(result)}", takes, first, second)
        s.emit(f"selp.b{bits_of(result)}", s.define(result), first, second, takes)
    return rule


def never_nan(s: Any, value: Value) -> bool:
    """Whether a float row is known to hold numbers only: a constant, or an extreme of one with anything, also through
    shuffles and loops. A value that a loop carries is taken to be one while its new value is looked at."""
    known: dict[Value, bool] = s.facts.never_nan
    if value in known:
        return known[value]
    op = value.op
    sources: list[Value] | None = None
    if op is None:
        block = value.owner
        assert isinstance(block, Block)
        loop = s.bounds.get(block.arguments[0])       # operands: start, stop, then what the arguments start with
        if loop is not None:
            number = block.arguments.index(value)
            sources = [loop.operands[number + 1], block.ops[-1].operands[number - 1]]
    elif op.name == "splat_const":
        number_held = op.attributes["value"]
        known[value] = number_held == number_held
        return known[value]
    elif op.name in ("min", "max"):
        sources = [op.operands[1]]
    elif op.name in ("shuffle_xor", "broadcast_lane"):
        sources = [op.operands[0]]
    elif op.name == "select":
        sources = list(op.operands[1:])
    elif op.name == "loop":
        sources = [op.blocks[0].arguments[op.results.index(value) + 1]]
    known[value] = True
    known[value] = sources is not None and all(never_nan(s, v) for v in sources)
    return known[value]


def fma(s: Any, op: Op) -> None:
    sources = [row(s, v) for v in op.operands]
    s.emit(f"fma.rn.{dtype_of(op.results[0]).name}", s.define(op.results[0]), *sources)


def exp2(s: Any, op: Op) -> None:
    """2 ulp at most; what is below 2**-126 is 0 (PTX ISA, ex2). Without ftz it takes four instructions."""
    source = row(s, op.operands[0])
    s.emit("ex2.approx.ftz.f32", s.define(op.results[0]), source)


def _rounding(mode: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        name = dtype_of(op.results[0]).name
        source = row(s, op.operands[0])
        s.emit(f"cvt.{mode}.{name}.{name}", s.define(op.results[0]), source)
    return rule


def _bitwise(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        sources = [row(s, v) for v in op.operands]
        s.emit(f"{name}.b{bits_of(op.results[0])}", s.define(op.results[0]), *sources)
    return rule


def _shift(name: str, letter: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        result = op.results[0]
        source = row(s, op.operands[0])
        by: Any
        if len(op.operands) == 1:
            by = int(op.attributes["amount"])
        else:
            by = row(s, op.operands[1])
            if bits_of(op.operands[1]) == 64 and not isinstance(by, int):
                narrow = s.new("vec")
                s.emit("cvt.u32.u64", narrow, by)
                by = narrow
        s.emit(f"{name}.{letter}{bits_of(result)}", s.define(result), source, by)
    return rule


def _division(modulo: bool) -> Rule:
    def rule(s: Any, op: Op) -> None:
        result = op.results[0]
        a, b = (row(s, v) for v in op.operands)
        settle(s, result, floor_division(s, a, b, arithmetic_type(result), s.kind(result.type), modulo))
    return rule


# --- Masks -----------------------------------------------------------------------------------------------------------

def compare(s: Any, op: Op) -> None:
    condition = op.attributes["cond"]
    type_ = arithmetic_type(op.operands[0])
    if condition == "ne" and type_[0] == "f":
        condition = "neu"        # unordered is true
    sources = [row(s, v) for v in op.operands]
    s.emit(f"setp.{condition}.{type_}", s.define(op.results[0]), *sources)


def select(s: Any, op: Op) -> None:
    mask, a, b = op.operands
    result = op.results[0]
    on, first, second = s.vector(mask), row(s, a), row(s, b)
    s.emit(f"selp.b{bits_of(result)}", s.define(result), first, second, on)


def mask_first(s: Any, op: Op) -> None:
    count = scalar(s, op.operands[0])
    s.emit("setp.lt.s64", s.define(op.results[0]), s.facts.wide_lane, count)


def _mask_op(mnemonic: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        sources = [s.vector(v) for v in op.operands]
        s.emit(mnemonic, s.define(op.results[0]), *sources)
    return rule


def mask_test(s: Any, op: Op) -> None:
    made = s.new("pred")
    vote(s, made, op)
    s.emit("selp.b64", s.define(op.results[0]), 1, 0, made)


def mask_to_row(s: Any, op: Op) -> None:
    on = s.vector(op.operands[0])
    s.emit("selp.b32", s.define(op.results[0]), 1, 0, on)


# --- Conversions -----------------------------------------------------------------------------------------------------

def convert(s: Any, op: Op) -> None:
    source, result = op.operands[0], op.results[0]
    old, new = arithmetic_type(source), arithmetic_type(result)
    value = row(s, source)
    if old == new:
        move(s, s.define(result), value, result.type)
        return
    if new[0] == "s" and old[0] == "s":
        old, new = (old, new) if new == "s64" else ("u64", "u32")     # narrower wraps
        mode = ""
    elif new[0] == "s":
        mode = ".rzi"
    else:
        mode = "" if (old, new) == ("f32", "f64") else ".rn"
    s.emit(f"cvt{mode}.{new}.{old}", s.define(result), value)


def bitcast(s: Any, op: Op) -> None:
    """Only of a constant: others are the same register."""
    value = row(s, op.operands[0])
    move(s, s.define(op.results[0]), value, op.results[0].type)


def round_to(s: Any, op: Op) -> None:
    value = row(s, op.operands[0])
    result = op.results[0]
    if op.attributes["dtype"].name == "bf16":
        # The pair with 0 in its low half has the bits of the rounded f32.
        s.emit("cvt.rn.bf16x2.f32", s.define(result), value, 0)
        return
    half = s.new("half")
    s.emit("cvt.rn.f16.f32", half, value)
    s.emit("cvt.f32.f16", s.define(result), half)


# --- Between lanes ---------------------------------------------------------------------------------------------------

def shuffle(s: Any, made: Any, source: Any, mode: str, lane: int, wide: bool) -> None:
    """A shuffle moves 32 bits."""
    if not wide:
        s.emit(f"shfl.sync.{mode}.b32", made, source, lane, 31, ALL_LANES)
        return
    low, high, new_low, new_high = (s.new("vec") for _ in range(4))
    s.emit("mov.b64", (low, high), source)
    s.emit(f"shfl.sync.{mode}.b32", new_low, low, lane, 31, ALL_LANES)
    s.emit(f"shfl.sync.{mode}.b32", new_high, high, lane, 31, ALL_LANES)
    s.emit("mov.b64", made, (new_low, new_high))


def _shuffle(mode: str, attribute: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        source = s.vector(op.operands[0])
        shuffle(s, s.define(op.results[0]), source, mode, op.attributes[attribute], bits_of(op.results[0]) == 64)
    return rule


def exchange(s: Any, op: Op) -> None:
    """Each lane gives away one row and keeps the other: those with the bit set give a, the others b."""
    a, b = op.operands
    wide = bits_of(a) == 64
    kind, bits = ("wide", 64) if wide else ("vec", 32)
    distance = op.attributes["distance"]
    bit, upper = s.new("vec"), s.new("pred")
    s.emit("and.b32", bit, s.facts.lane, distance)
    s.emit("setp.ne.s32", upper, bit, 0)
    first, second = s.vector(a), s.vector(b)
    given, taken, low, high = (s.new(kind) for _ in range(4))
    s.emit(f"selp.b{bits}", given, first, second, upper)
    shuffle(s, taken, given, "bfly", distance, wide)
    s.emit(f"selp.b{bits}", low, taken, first, upper)
    s.emit(f"selp.b{bits}", high, second, taken, upper)
    settle(s, op.results[0], low)
    settle(s, op.results[1], high)


# --- Memory ----------------------------------------------------------------------------------------------------------

def address(s: Any, op: Op, at: int, element_bytes: int) -> Any:
    """The address of a thread's own element, or of the one element for all (element_bytes 0), base and index added up
    once for all accesses in sight that share them."""
    base, index, scale, disp = s.address_parts(op, at)
    key = (base, index, scale, element_bytes)
    register, block = s.facts.addresses.get(key, (None, None))
    if register is None or block not in s.scope:
        register = s.scalar(base)
        terms = []
        if index is not None:
            scaled = s.scalar(index)
            if scale != 1:
                scaled = s.new("gpr")
                s.emit("shl.b64", scaled, s.scalar(index), scale.bit_length() - 1)
            terms.append(scaled)
        if element_bytes:
            terms.append(s.facts.lane_bytes[element_bytes])
        for term in terms:
            total = s.new("gpr")
            s.emit("add.s64", total, register, term)
            register = total
        if terms:
            s.facts.addresses[key] = register, s.scope[-1]
    if not -(2**31) <= disp < 2**31:
        far = s.new("gpr")
        s.emit("add.s64", far, register, disp)
        register, disp = far, 0
    return s.memory(register, disp=disp)


def uniform_address(s: Any, op: Op, at: int) -> Any:
    return address(s, op, at, 0)


def lanes_own_address(s: Any, base: Value, offsets: Value, op: Op) -> Any:
    """base + offset * scale + disp of every lane, base and offset added up once."""
    scale = op.attributes.get("scale", 1)
    key = (base, offsets, "gather", scale)
    made, block = s.facts.addresses.get(key, (None, None))
    if made is None or block not in s.scope:
        offset = row(s, offsets)
        start = s.scalar(base)
        made = s.new("gpr")
        if isinstance(offset, int):
            s.emit("add.s64", made, start, ((offset + 2**31) % 2**32 - 2**31) * scale)
        else:
            s.emit("mad.wide.s32", made, offset, scale, start)
        s.facts.addresses[key] = made, s.scope[-1]
    return s.memory(made, disp=op.attributes.get("disp", 0))


def space_of(op: Op) -> str:
    return "shared" if op.attributes.get("near") else "global"


def read(s: Any, op: Op, memory: Any, mask: Any) -> None:
    """An element from memory as the row holds it; 0 in lanes that are off."""
    result, dtype = op.results[0], op.attributes["dtype"]
    type_ = f"{space_of(op)}.{memory_type(dtype)}"

    def fetch(register: Any, bits: int) -> None:
        if mask is not None:
            s.emit(f"mov.b{bits}", register, 0)
            s.emit_masked(f"ld.{type_}", mask, False, register, memory)
        else:
            s.emit(f"ld.{type_}", register, memory)

    if dtype.name == "bf16":
        raw = s.new("vec")
        fetch(raw, 32)
        s.emit("shl.b32", s.define(result), raw, 16)
    elif dtype.name == "f16":
        half = s.new("half")
        fetch(half, 16)
        s.emit("cvt.f32.f16", s.define(result), half)
    elif mask is not None:
        # The address and the mask are read after the zero is there: it goes to a register of its own.
        made = s.new(s.kind(result.type))
        fetch(made, bits_of(result))
        settle(s, result, made)
    else:
        fetch(s.define(result), bits_of(result))


def write(s: Any, op: Op, memory: Any, mask: Any) -> None:
    """The low bits, or the rounded number, of every lane that is on."""
    source, dtype = s.vector(op.operands[0]), op.attributes["dtype"]
    if dtype.name in ("bf16", "f16"):
        half = s.new("half")
        s.emit(f"cvt.rn.{dtype.name}.f32", half, source)
        source = half
    hint = ".cs" if op.attributes.get("streaming") else ""
    mnemonic = f"st.{space_of(op)}{hint}.b{8 if dtype.name == 'bool' else dtype.bits}"
    if mask is None:
        s.emit(mnemonic, memory, source)
    else:
        s.emit_masked(mnemonic, mask, False, memory, source)


def mask_of(s: Any, op: Op) -> Any:
    return s.vector(op.operands[-1]) if op.attributes.get("masked") else None


def load(s: Any, op: Op) -> None:
    read(s, op, address(s, op, 0, op.attributes["dtype"].size_bytes), mask_of(s, op))


def load_splat(s: Any, op: Op) -> None:
    read(s, op, uniform_address(s, op, 0), None)


def gather(s: Any, op: Op) -> None:
    base, offsets = op.operands[:2]
    read(s, op, lanes_own_address(s, base, offsets, op), mask_of(s, op))


def store(s: Any, op: Op) -> None:
    write(s, op, address(s, op, 1, op.attributes["dtype"].size_bytes), mask_of(s, op))


def store_lane0(s: Any, op: Op) -> None:
    write(s, op, uniform_address(s, op, 1), s.facts.first)


def scatter(s: Any, op: Op) -> None:
    base, offsets = op.operands[1:3]
    write(s, op, lanes_own_address(s, base, offsets, op), mask_of(s, op))


WORD_BYTES = 4


def type_of_run(op: Op) -> str:
    """Of the one instruction by which a lane takes a run: words side by side, or a part of one."""
    size_bytes = bytes_of_lane(op)
    words = size_bytes // WORD_BYTES
    return f"v{words}.b32" if words > 1 else f"b{8 * size_bytes}"


def address_of_run(s: Any, op: Op) -> Any:
    if not op.attributes.get("gathered"):
        return address(s, op, 0, bytes_of_lane(op))
    base, offsets = op.operands[:2]
    if op.attributes.get("near"):
        return near_address(s, base, offsets, op.attributes.get("disp", 0))
    return lanes_own_address(s, base, offsets, op)


def load_run(s: Any, op: Op) -> None:
    dtype, results, mask = op.attributes["dtype"], op.results, mask_of(s, op)
    memory = address_of_run(s, op)
    each = WORD_BYTES // dtype.size_bytes
    plain = each == 1 and mask is None
    words = [s.define(v) if plain else s.new("vec") for v in results[::each]]
    mnemonic, target = f"ld.{space_of(op)}.{type_of_run(op)}", tuple(words) if len(words) > 1 else words[0]
    if mask is None:
        s.emit(mnemonic, target, memory)
    else:
        for word in words:
            s.emit("mov.b32", word, 0)
        s.emit_masked(mnemonic, mask, False, target, memory)
    for number, value in enumerate(() if plain else results):
        if each == 1:
            settle(s, value, words[number])
        else:
            unpack(s, dtype, words[number // each], number % each, value)


def unpack(s: Any, dtype: DType, word: Any, place: int, value: Value) -> None:
    """The element at a place of a word as a row holds it."""
    if dtype.name == "bf16":
        if place:
            s.emit("and.b32", s.define(value), word, 0xFFFF0000)
        else:
            s.emit("shl.b32", s.define(value), word, 16)
    elif dtype.name == "f16":
        halves = s.new("half"), s.new("half")
        s.emit("mov.b32", halves, word)
        s.emit("cvt.f32.f16", s.define(value), halves[place])
    else:
        s.emit(f"bfe.{'s' if dtype.kind == 'i' else 'u'}32", s.define(value), word, dtype.bits * place, dtype.bits)


def store_run(s: Any, op: Op) -> None:
    dtype = op.attributes["dtype"]
    rows = [s.vector(v) for v in op.operands[2 if op.attributes.get("gathered") else 1:]]
    each = WORD_BYTES // dtype.size_bytes
    words = [pack(s, dtype, rows[first:first + each]) for first in range(0, len(rows), each)]
    memory = address_of_run(s, op)
    hint = ".cs" if op.attributes.get("streaming") else ""
    s.emit(f"st.{space_of(op)}{hint}.{type_of_run(op)}", memory, tuple(words) if len(words) > 1 else words[0])


def pack(s: Any, dtype: DType, rows: list[Any]) -> Any:
    """Elements side by side in a word, the first in its low bits; fewer where a run is shorter than a word."""
    if dtype.bits == 32:
        return rows[0]
    made = s.new("vec")
    if dtype.bits == 16:
        s.emit(f"cvt.rn.{dtype.name}x2.f32", made, rows[1], rows[0])
        return made
    s.emit("prmt.b32", made, rows[0], rows[1], 0x0040)
    if len(rows) == 2:
        return made
    high, whole = s.new("vec"), s.new("vec")
    s.emit("prmt.b32", high, rows[2], rows[3], 0x0040)
    s.emit("prmt.b32", whole, made, high, 0x5410)
    return whole


def prefetch(s: Any, op: Op) -> None:
    s.emit(f"prefetch.global.L{min(2, op.attributes.get('level', 1))}", uniform_address(s, op, 0))


# --- Packed dot products ---------------------------------------------------------------------------------------------

def dot4_u8i8(s: Any, op: Op) -> None:
    accumulator, a, b = (row(s, v) for v in op.operands)
    s.emit("dp4a.u32.s32", s.define(op.results[0]), a, b, accumulator)


# --- Several warps, near memory, matrix instructions -----------------------------------------------------------------

def warp(s: Any, op: Op) -> None:
    s.emit("mov.b64", s.define(op.results[0]), s.facts.warp)


def near_memory(s: Any, op: Op) -> None:
    s.emit("mov.u64", s.define(op.results[0]), Symbol(NEAR))


def near_address(s: Any, base: Value, offsets: Value, disp: int, flip: int = 0) -> Any:
    """((base + offset) ^ flip) + disp of every lane; all but disp is computed once. Shared addresses have 32 bits."""
    key = (base, offsets, flip)
    made, block = s.facts.addresses.get(key, (None, None))
    if made is None or block not in s.scope:
        made = s.new("vec")
        if flip:
            s.emit("xor.b32", made, near_address(s, base, offsets, 0).base, flip)
        else:
            s.emit("add.s32", made, low_half(s, base), row(s, offsets))
        s.facts.addresses[key] = made, s.scope[-1]
    return s.memory(made, disp=disp)


def async_copy(s: Any, op: Op) -> None:
    near, near_offsets, base, offsets = op.operands[:4]
    target = near_address(s, near, near_offsets, op.attributes.get("disp", 0))
    source = s.new("gpr")
    s.emit("mad.wide.s32", source, row(s, offsets), 1, s.scalar(base))
    memory = s.memory(source, disp=op.attributes.get("source_disp", 0))
    if not op.attributes.get("masked"):
        s.emit("cp.async.cg.shared.global", target, memory, 16)
        return
    key = (op.operands[4], "bytes")
    size_bytes, block = s.facts.addresses.get(key, (None, None))
    if size_bytes is None or block not in s.scope:
        size_bytes = s.new("vec")
        s.emit("selp.b32", size_bytes, 16, 0, s.vector(op.operands[4]))
        s.facts.addresses[key] = size_bytes, s.scope[-1]
    s.emit("cp.async.cg.shared.global", target, memory, 16, size_bytes)


def async_commit(s: Any, op: Op) -> None:
    del op
    s.emit("cp.async.commit_group")


def async_wait(s: Any, op: Op) -> None:
    s.emit("cp.async.wait_group", op.attributes["pending"])


def sync_warps(s: Any, op: Op) -> None:
    del op
    s.emit("bar.sync", 0)


def load_matrix(s: Any, op: Op) -> None:
    base, offsets = op.operands
    memory = near_address(s, base, offsets, op.attributes.get("disp", 0), op.attributes.get("flip", 0))
    transposed = ".trans" if op.attributes["transposed"] else ""
    s.emit(f"ldmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16", tuple(s.define(v) for v in op.results), memory)


def pack2(s: Any, op: Op) -> None:
    low, high = (row(s, v) for v in op.operands)
    s.emit(f"cvt.rn.{op.attributes['dtype'].name}x2.f32", s.define(op.results[0]), high, low)


def matrix_multiply(s: Any, op: Op) -> None:
    dtype = op.attributes["dtype"]
    a, b, c = (tuple(s.vector(v) for v in op.operands[first:last]) for first, last in ((0, 4), (4, 6), (6, 10)))
    made = tuple(s.define(v) for v in op.results)
    if dtype.is_integer:
        left, right = (f"{'s' if d.kind == 'i' else 'u'}8" for d in (dtype, op.attributes["right_dtype"]))
        s.emit(f"mma.sync.aligned.m16n8k32.row.col.s32.{left}.{right}.s32", made, a, b, c)
        return
    if dtype.bits == 8:
        name = dtype.name.removeprefix("f8")
        s.emit(f"mma.sync.aligned.m16n8k32.row.col.f32.{name}.{name}.f32", made, a, b, c)
        return
    s.emit(f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype.name}.{dtype.name}.f32", made, a, b, c)


# --- Signals, copies of boxes, matrix instructions of a group of warps ---------------------------------------------

DESCRIPTOR_UNIT, DESCRIPTOR_BITS = 4, 14
"""Bits of an address that a matrix descriptor leaves out, and that it has."""
SWIZZLE_128_BYTES = 1 << 62
ROWS_OF_8_BYTES = 1024
"""Eight swizzled rows: the pattern of 128-byte swizzling repeats (PTX ISA, "Matrix Descriptor Format")."""


def near_scalar(s: Any, base: Value, disp: int = 0) -> Any:
    """base + disp in near memory; the base has 32 bits there."""
    key = (base, "near")
    made, block = s.facts.addresses.get(key, (None, None))
    if made is None or block not in s.scope:
        made = low_half(s, base)
        if isinstance(made, int):
            number, made = made, s.new("vec")
            s.emit("mov.b32", made, number)
        s.facts.addresses[key] = made, s.scope[-1]
    return s.memory(made, disp=disp)


def _once(mnemonic: str, attribute: str = "", result: bool = False) -> Rule:
    """One lane acts on a signal. attribute: what is counted; result: the instruction has one, which is not wanted."""
    def rule(s: Any, op: Op) -> None:
        signal = near_scalar(s, op.operands[0], op.attributes.get("disp", 0))
        operands = [signal, *([op.attributes[attribute]] if attribute else [])]
        s.emit_masked(mnemonic, s.facts.first, False, *([NOBODY] if result else []), *operands)
    return rule


_arrive_here = _once("mbarrier.arrive.shared::cta.b64", result=True)


def signal_arrive(s: Any, op: Op) -> None:
    if "workers" not in op.attributes:
        _arrive_here(s, op)
        return
    signal = near_scalar(s, op.operands[0], op.attributes.get("disp", 0))
    arrive_everywhere(s, signal, op.attributes["workers"])


def signal_fence(s: Any, op: Op) -> None:
    del op
    s.emit("fence.mbarrier_init.release.cluster")


def signal_wait(s: Any, op: Op) -> None:
    """The instruction itself waits for a while."""
    signal = near_scalar(s, op.operands[0], op.attributes.get("disp", 0))
    parity = low_half(s, op.operands[1])
    scope = ".acquire.cluster" if op.attributes.get("workers") else ""
    over, label = s.new("pred"), s.new_label("signal")
    waits = s.new("pred")
    s.label(label)
    s.emit(f"mbarrier.try_wait.parity{scope}.shared::cta.b64", over, signal, parity)
    s.emit("not.pred", waits, over)
    s.branch("bra", label)
    s.body[-1].mask = waits


def elected(s: Any) -> Any:
    """A predicate that is on in one lane: in one that ptxas knows to be one, so that it makes no loop over lanes."""
    made, block = s.facts.addresses.get(("elected",), (None, None))
    if made is None or block not in s.scope:
        made = s.new("pred")
        s.emit("elect.sync", s.new("vec"), made, ALL_LANES)
        s.facts.addresses["elected",] = made, s.scope[-1]
    return made


def tensor_copy(s: Any, op: Op) -> None:
    near, signal, *coordinates = op.operands
    target = near_scalar(s, near, op.attributes.get("disp", 0))
    report = near_scalar(s, signal, op.attributes.get("signal_disp", 0))
    where = tuple(low_half(s, v) for v in reversed(coordinates))          # the innermost dimension first
    place = TensorPlace(s.facts.maps[op.attributes["map"]], where)
    mnemonic = f"cp.async.bulk.tensor.{len(where)}d.shared::cluster.global.mbarrier::complete_tx::bytes"
    if "workers" in op.attributes:
        s.emit_masked(f"{mnemonic}.multicast::cluster", elected(s), False, target, place, report, cluster_mask(s, op))
    else:
        s.emit_masked(mnemonic, elected(s), False, target, place, report)


def store_matrix(s: Any, op: Op) -> None:
    base, offsets, *held = op.operands
    memory = near_address(s, base, offsets, op.attributes.get("disp", 0), op.attributes.get("flip", 0))
    s.emit("stmatrix.sync.aligned.m8n8.x4.shared.b16", memory, tuple(s.vector(v) for v in held))


def store_fence(s: Any, op: Op) -> None:
    """Each lane makes its own stores visible to the asynchronous proxy; then the lane that starts the copies knows."""
    s.emit("fence.proxy.async.shared::cta")
    sync_lanes(s, op)


def tensor_store(s: Any, op: Op) -> None:
    near, *coordinates = op.operands
    where = tuple(low_half(s, v) for v in reversed(coordinates))
    s.emit_masked(f"cp.async.bulk.tensor.{len(where)}d.global.shared::cta.bulk_group", elected(s), False,
                  TensorPlace(s.facts.maps[op.attributes["map"]], where),
                  near_scalar(s, near, op.attributes.get("disp", 0)))


def store_wait(s: Any, op: Op) -> None:
    """The lane that started the copies waits until they have read."""
    s.emit_masked("cp.async.bulk.commit_group", elected(s), False)
    s.emit_masked("cp.async.bulk.wait_group.read", elected(s), False, op.attributes["pending"])
    sync_lanes(s, op)


def group_fence(s: Any, op: Op) -> None:
    del op
    s.emit("wgmma.fence.sync.aligned")


def group_commit(s: Any, op: Op) -> None:
    del op
    s.emit("wgmma.commit_group.sync.aligned")


def group_wait(s: Any, op: Op) -> None:
    """The sums stay where they are."""
    s.emit("wgmma.wait_group.sync.aligned", op.attributes["pending"])
    for value, result in zip(op.operands, op.results, strict=True):
        in_place(s, value, result)


def in_place(s: Any, value: Value, result: Value) -> Any:
    """The register in which `result` is to be made of `value`, which is there."""
    register, place = s.tie(result, (value,))
    if place < 0:
        move(s, register, s.vector(value), result.type)
    return register


def descriptor(s: Any, op: Op, side: str, base: Value) -> Any:
    """Where an operand starts in near memory and how its rows lie: 14 bits each of address, bytes between panels and
    bytes between groups of eight rows, by 16 bytes; and the swizzle."""
    rows = op.attributes[f"{side}_rows"]
    panel_bytes = 16 if rows else op.attributes[f"{side}_panel_bytes"]      # rows along the depth have no panels: 1
    key = (base, "descriptor")
    start, block = s.facts.addresses.get(key, (None, None))
    if start is None or block not in s.scope:
        start = s.new("vec")
        address = near_scalar(s, base).base
        if s.function.attributes.get("cluster", 1) > 1:     # above its 18 bits an address has the rank of the worker
            s.emit("bfe.u32", start, address, DESCRIPTOR_UNIT, DESCRIPTOR_BITS)
        else:
            s.emit("shr.u32", start, address, DESCRIPTOR_UNIT)
        s.facts.addresses[key] = start, s.scope[-1]
    low, high, made = s.new("vec"), s.new("vec"), s.new("gpr")
    disp = op.attributes.get(f"{side}_disp", 0)
    s.emit("add.s32", low, start, (disp >> DESCRIPTOR_UNIT) | (panel_bytes >> DESCRIPTOR_UNIT) << 16)
    s.emit("mov.b32", high, SWIZZLE_128_BYTES >> 32 | ROWS_OF_8_BYTES >> DESCRIPTOR_UNIT)
    s.emit("mov.b64", made, (low, high))
    return made


def group_multiply(s: Any, op: Op) -> None:
    """a in near memory or, as `group_multiply_rows`, in registers."""
    dtype = op.attributes["dtype"]
    name = dtype.name.removeprefix("f8") if dtype.bits == 8 else dtype.name
    fresh = op.attributes.get("fresh", False)
    if op.name == "group_multiply_rows":
        right, *rest = op.operands
        a: Any = tuple(s.vector(v) for v in rest[:4])
        sums, sides = rest[4:], ["right"]
    else:
        left, right, *sums = op.operands
        a, sides = descriptor(s, op, "left", left), ["left", "right"]
    b = descriptor(s, op, "right", right)
    made = tuple(s.define(result) if fresh else in_place(s, value, result)
                 for value, result in zip(sums, op.results, strict=True))
    adds = s.new("pred")
    s.emit("setp.ne.s32" if fresh else "setp.eq.s32", adds, s.facts.lane, s.facts.lane)
    transposed = () if dtype.bits == 8 else (int(not op.attributes[f"{side}_rows"]) for side in sides)
    shape = f"m64n{2 * len(sums)}k{GROUP_DEPTH_BYTES // dtype.size_bytes}"
    s.emit(f"wgmma.mma_async.sync.aligned.{shape}.f32.{name}.{name}", made, a, b, adds, 1, 1, *transposed)


def register_budget(s: Any, op: Op) -> None:
    s.emit(f"setmaxnreg.{'inc' if op.attributes['more'] else 'dec'}.sync.aligned.u32", op.attributes["registers"])


# --- Between workers and lanes ---------------------------------------------------------------------------------------

_ARRIVED, _GENERATION = 512, 516
"""Bytes from the sync block: how many workers have arrived (u32), and how often all have (u32)."""


def barrier(s: Any, op: Op) -> None:
    """The last warp to arrive resets the count and raises the generation, which the others watch.

    Every warp of the launch must be resident at once (a cooperative launch). Lane 0 speaks for its warp; what it reads
    goes to all lanes by a shuffle, so that the loop stays uniform. The fences on both sides, with the meeting of the
    lanes, make all that any lane wrote before visible to every lane after (PTX ISA 8.9, causality order).
    """
    del op
    facts = s.facts
    sync, total = s.new("gpr"), s.new("vec")
    generation, arrived, now = s.new("vec"), s.new("vec"), s.new("vec")
    last, spin, after = s.new_label("barrier_last"), s.new_label("barrier_spin"), s.new_label("barrier")
    at_generation = s.memory(sync, disp=_GENERATION)
    sync_lanes(s, None)
    s.emit("fence.acq_rel.gpu")
    load_word(s, sync, 2)
    # The generation is read before arriving: afterwards the last one may raise it at any moment.
    s.emit("mov.b32", generation, 0)
    s.emit("mov.b32", arrived, 0)
    s.emit_masked("ld.acquire.gpu.global.u32", facts.first, False, generation, at_generation)
    s.emit_masked("atom.acq_rel.gpu.global.add.u32", facts.first, False, arrived, s.memory(sync, disp=_ARRIVED), 1)
    for register in (generation, arrived):
        shuffle(s, register, register, "idx", 0, False)
    s.emit("cvt.u32.u64", total, facts.workers)
    s.emit("sub.s32", total, total, 1)
    complete, waits = s.new("pred"), s.new("pred")
    s.emit("setp.eq.s32", complete, arrived, total)
    branch_if(s, complete, True, last)
    s.label(spin)
    s.emit("mov.b32", now, 0)
    s.emit_masked("ld.acquire.gpu.global.u32", facts.first, False, now, at_generation)
    shuffle(s, now, now, "idx", 0, False)
    s.emit("setp.eq.s32", waits, now, generation)
    branch_if(s, waits, True, spin)
    jump(s, after)
    s.label(last)
    zero = s.new("vec")
    s.emit("mov.b32", zero, 0)
    s.emit_masked("st.relaxed.gpu.global.u32", facts.first, False, s.memory(sync, disp=_ARRIVED), zero)
    s.emit_masked("red.release.gpu.global.add.u32", facts.first, False, at_generation, 1)
    s.label(after)
    s.emit("fence.acq_rel.gpu")
    sync_lanes(s, None)


def sync_lanes(s: Any, op: Op | None) -> None:
    """What a lane wrote before is seen by the other lanes after."""
    del op
    s.emit("bar.warp.sync", ALL_LANES)


def fence_streaming(s: Any, op: Op) -> None:
    """Nothing: these stores are ordered like any other."""
    del s, op


# --- Tables ----------------------------------------------------------------------------------------------------------

def asm(s: Any, op: Op) -> None:
    """A piece by hand writes its own instructions."""
    piece_of(op.attributes["by"]).select(s, op)


RULES: dict[str, Rule] = {
    "asm": asm, "asm_multiply": asm,
    "arg": arg, "worker": worker, "workers": workers,
    "s_add": _scalar_binary("add.s64"), "s_sub": _scalar_binary("sub.s64"), "s_mul": _scalar_binary("mul.lo.s64"),
    "s_min": _scalar_binary("min.s64"), "s_max": _scalar_binary("max.s64"), "s_and": _scalar_binary("and.b64"),
    "s_or": _scalar_binary("or.b64"), "s_xor": _scalar_binary("xor.b64"), "s_shl": _scalar_shift("shl.b64"),
    "s_shr": _scalar_shift("shr.u64"), "s_sar": _scalar_shift("shr.s64"), "s_floordiv": _scalar_division(False),
    "s_mod": _scalar_division(True), "s_cmp": s_cmp, "s_select": s_select, "s_load": s_load, "s_store": s_store,
    "splat": splat, "iota": iota, "lane0": lane0,
    "add": _arithmetic("add"), "sub": _arithmetic("sub"), "mul": _arithmetic("mul", ".lo"), "div": _arithmetic("div"),
    "min": _extreme("min", "lt"), "max": _extreme("max", "gt"), "fma": fma, "neg": _plain("neg"),
    "abs": _plain("abs"), "sqrt": _arithmetic("sqrt"), "floor": _rounding("rmi"), "ceil": _rounding("rpi"),
    "exp2": exp2, "round": _rounding("rni"), "trunc": _rounding("rzi"),
    "and": _bitwise("and"), "or": _bitwise("or"), "xor": _bitwise("xor"), "not": _bitwise("not"),
    "shl": _shift("shl", "b"), "shr": _shift("shr", "u"), "sar": _shift("shr", "s"),
    "idiv": _division(False), "imod": _division(True),
    "cmp": compare, "select": select, "mask_first": mask_first, "mask_and": _mask_op("and.pred"),
    "mask_or": _mask_op("or.pred"), "mask_xor": _mask_op("xor.pred"), "mask_not": _mask_op("not.pred"),
    "mask_any": mask_test, "mask_all": mask_test, "mask_to_row": mask_to_row,
    "cvt": convert, "bitcast": bitcast, "round_to": round_to,
    "shuffle_xor": _shuffle("bfly", "distance"), "broadcast_lane": _shuffle("idx", "lane"), "exchange": exchange,
    "load": load, "load_splat": load_splat, "gather": gather, "store": store, "store_lane0": store_lane0,
    "scatter": scatter, "load_run": load_run, "store_run": store_run, "prefetch": prefetch, "dot4_u8i8": dot4_u8i8,
    "warp": warp, "near_memory": near_memory, "sync_warps": sync_warps, "async_copy": async_copy,
    "async_commit": async_commit, "async_wait": async_wait, "load_matrix": load_matrix,
    "matrix_multiply": matrix_multiply, "pack2": pack2,
    "signal_start": _once("mbarrier.init.shared::cta.b64", "arrivals"), "signal_fence": signal_fence,
    "signal_arrive": signal_arrive,
    "signal_expect": _once("mbarrier.arrive.expect_tx.shared::cta.b64", "bytes", result=True),
    "signal_wait": signal_wait, "tensor_copy": tensor_copy, "store_matrix": store_matrix,
    "store_fence": store_fence, "tensor_store": tensor_store, "store_wait": store_wait, "group_fence": group_fence,
    "group_multiply": group_multiply, "group_multiply_rows": group_multiply,
    "group_commit": group_commit, "group_wait": group_wait,
    "register_budget": register_budget, "barrier": barrier, "sync_lanes": sync_lanes,
    "fence_streaming": fence_streaming, **WORKER_RULES,
}
