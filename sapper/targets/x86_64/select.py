"""Selection rules of x86-64: one small function for each lane op, and what the neutral driver asks of a target.

Enters: a lane op and the driver (`s`, sapper/codegen/select.py: Selector), which knows where values are. Leaves:
instructions, through `s.emit`. Holds: two machines are served, told apart by one fact, `opmask`:
  with AVX-512 (F, BW, DQ, VL): up to 512 bits, 32 vector registers, a mask is an opmask register whose bits from
      `lanes` on are 0, and memory operands may broadcast one element;
  with AVX2 and FMA: up to 256 bits, 16 vector registers, a mask is a vector register of 32-bit lanes, all ones or 0.
A constant is named by a key: ("s", element bytes, bits) in every lane, ("d", bytes) a whole register,
("k", bits) an opmask.
Source: Intel SDM volume 2; the manual's operand order throughout.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ...ir.nodes import Op, Value
from ...ir.types import DType, MaskType, RowType, ScalarType
from ...ir.types import i32 as I32
from ...lang.by_hand import PIECES
from .instructions import ROWS as ROWS

FAMILY = "x86_64"

Key = tuple[Any, ...]
Rule = Callable[[Any, Op], None]

_FLOAT = {"f32": "ps", "f64": "pd"}
_INTEGER = {"i32": "d", "i64": "q", "b32": "d"}
_MIRRORED = {"eq": "eq", "ne": "ne", "lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}
_NEGATED = {"eq": "ne", "ne": "eq", "lt": "ge", "gt": "le", "le": "gt", "ge": "lt"}
_CODES = {"eq": "e", "ne": "ne", "lt": "l", "le": "le", "gt": "g", "ge": "ge"}
_INVERTED_CODES = {"e": "ne", "ne": "e", "l": "ge", "ge": "l", "g": "le", "le": "g", "b": "ae", "ae": "b"}
_FLOAT_PREDICATES = {"eq": 0, "lt": 17, "le": 18, "ne": 4, "ge": 29, "gt": 30}
"""Quiet comparisons: false if unordered, except ne (SDM volume 2, CMPPS, table 3-1)."""
_INTEGER_PREDICATES = {"eq": 0, "lt": 1, "le": 2, "ne": 4, "ge": 5, "gt": 6}
_ZERO4: Key = ("s", 4, 0)
_ONES: Key = ("s", 4, 0xFFFFFFFF)

FOLDED_DTYPES = frozenset(["f32", "f64", "i32", "i64", "b32"])
"""Memory dtypes whose loads may become memory operands: those that are the row's own."""

_BINARY_BOTH = frozenset([0, 1])
_BINARY_SECOND = frozenset([1])
_FOLDS = {"add": _BINARY_BOTH, "mul": _BINARY_BOTH, "and": _BINARY_BOTH, "or": _BINARY_BOTH, "xor": _BINARY_BOTH,
          "sub": _BINARY_SECOND, "div": _BINARY_SECOND, "min": _BINARY_SECOND, "max": _BINARY_SECOND,
          "cmp": _BINARY_BOTH, "fma": frozenset([0, 1, 2]), "dot2_bf16": frozenset([1, 2]),
          "dot4_u8i8": frozenset([2]), "sqrt": frozenset([0]), "floor": frozenset([0]), "ceil": frozenset([0]),
          "trunc": frozenset([0]), "round": frozenset([0])}

ABSORBS_SIGN = frozenset(["fma"])
"""Ops that take the negation of any operand for nothing (vfnmadd, vfmsub, vfnmsub)."""

TIED = {"fma": (2, 0, 1), "dot2_bf16": (0,), "dot4_u8i8": (0,), "s_add": (0, 1), "s_sub": (0,), "s_mul": (0, 1),
        "s_and": (0, 1), "s_or": (0, 1), "s_xor": (0, 1), "s_shl": (0,), "s_shr": (0,), "s_sar": (0,),
        "s_min": (0, 1), "s_max": (0, 1)}
"""Operands that an instruction may overwrite with its result."""


_OPMASK_FEATURES = frozenset(["avx512f", "avx512bw", "avx512dq", "avx512vl"])


class Facts:
    """What selection needs to know of one target, and what it notes for one function.

    opmask: AVX-512. bits4, bits8: register bits of a row of 4- and 8-byte elements. most_folded_splats: how many
    broadcast operands cost no more than one broadcast load into a register: each takes a load slot of its own, but
    the register's load is one more instruction and holds a register meanwhile. Where two multiply-adds go in a cycle,
    loads are what is short: Ice Lake runs 1.1 in a cycle with a broadcast operand each, 2.0 with one load for two.
    """

    def __init__(self, s: Any, target: Any) -> None:
        self.features: frozenset[str] = frozenset(target.features)
        self.opmask = self.features >= _OPMASK_FEATURES
        self.vector_bits = 512 if self.opmask else 256
        self.vector_registers = 32 if self.opmask else 16
        self.mask_kind = "mask" if self.opmask else "vec"
        self.wide_kind = "vec"
        self.indexed_addresses = True
        self.loop_align_bytes = 32
        self.most_folded_splats = (2 if target.fma_per_cycle <= 1 else 1) if self.opmask else 0
        lanes: int = s.lanes
        self.bits4, self.bits8 = 32 * lanes, 64 * lanes
        if lanes & (lanes - 1) or not 128 <= self.bits4 <= self.vector_bits:
            raise ValueError(f"lanes of function {s.function.name}: found {lanes}; expected a power of two from 4 to "
                             f"{self.vector_bits // 32} on this target; mend: lower for that many lanes")
        self.keys: dict[Value, Key] = {}
        self.wide_masks: dict[Value, Any] = {}
        self.arguments: Any = None
        self.worker: Any = None
        self.workers: Any = None


def facts_of(s: Any, target: Any) -> Facts:
    return Facts(s, target)


def legal_ops(target: Any) -> frozenset[str]:
    """Lane ops with instructions of their own here, among those that not every target has."""
    features = frozenset(target.features)
    legal = {"scale_exponent", "round", "floor", "ceil", "trunc"}
    if features >= _OPMASK_FEATURES:
        legal.add("lookup")
    return frozenset(legal | target.dots)


def register_file(target: Any) -> Any:
    """The registers that allocation may use on this target."""
    from .allocation import register_file as registers

    opmask = frozenset(target.features) >= _OPMASK_FEATURES
    return registers(512 if opmask else 256, opmask)


def folds(s: Any) -> dict[str, frozenset[int]]:
    return _FOLDS


# --- Types and constants ---------------------------------------------------------------------------------------------

def dtype_of(value: Value) -> DType:
    type_ = value.type
    return type_.dtype if isinstance(type_, RowType) else I32


def bits_of(s: Any, dtype: DType) -> int:
    """Register bits of a row."""
    facts = s.facts
    if dtype.bits == 32:
        return int(facts.bits4)
    if facts.bits8 > facts.vector_bits:
        raise ValueError(f"{s.location or s.function.name}: found {s.lanes} lanes of {dtype.name}; expected at most "
                         f"{facts.vector_bits // 64} on this target; mend: lower functions with 64-bit rows for "
                         "fewer lanes")
    return int(facts.bits8)


def constant_key(s: Any, value: Value) -> Key:
    """The key of a splat_const."""
    key: Key | None = s.facts.keys.get(value)
    if key is None:
        op = value.op
        assert op is not None
        dtype = dtype_of(value)
        number = op.attributes["value"]
        if dtype.name == "f32":
            bits = float32_bits(float(number))
        elif dtype.name == "f64":
            bits = struct.unpack("<Q", struct.pack("<d", float(number)))[0]
        else:
            bits = int(number) & ((1 << dtype.bits) - 1)
        if bits == 0:
            key = _ZERO4
        elif bits == (1 << dtype.bits) - 1:
            key = _ONES
        else:
            key = ("s", dtype.bits // 8, bits)
        s.facts.keys[value] = key
    return key


def float32_bits(number: float) -> int:
    """The bits of the f32 nearest to a Python float."""
    try:
        return int(struct.unpack("<I", struct.pack("<f", number))[0])
    except OverflowError:
        return 0x7F800000 if number > 0 else 0xFF800000


def is_cheap(key: Key) -> bool:
    """Made by one instruction without a load."""
    return key in (_ZERO4, _ONES)


def constant_kind(key: Key) -> str:
    return "mask" if key[0] == "k" else "vec"


def constant_memory(s: Any, key: Key) -> Any:
    facts = s.facts
    if key[0] == "d":
        return s.memory(None, label=s.constant_label(len(key[1]), key[1]))
    size = key[1]
    data = key[2].to_bytes(size, "little")
    if facts.opmask:
        return s.memory(None, broadcast=True, label=s.constant_label(size, data))
    data *= (facts.bits4 if size == 4 else facts.bits8) // 8 // size
    return s.memory(None, label=s.constant_label(len(data), data))


def make_constant(s: Any, key: Key, register: Any) -> None:
    facts = s.facts
    if key[0] == "k":
        number = s.new("gpr")
        load_immediate(s, number, key[1])
        s.emit("kmovw.to_mask", register, number)
    elif key == _ZERO4:
        s.emit("vxorps.128", register, register, register)
    elif key == _ONES:
        if facts.opmask:
            s.emit(f"vpternlogd.{facts.vector_bits}", register, register, register, 0xFF)
        else:
            s.emit(f"vpcmpeqd.{facts.vector_bits}", register, register, register)
    elif key[0] == "d":
        s.emit(f"vmovups.{len(key[1]) * 8}", register, constant_memory(s, key))
    else:
        size = key[1]
        label = s.constant_label(size, key[2].to_bytes(size, "little"))
        if size == 4:
            s.emit(f"vbroadcastss.{facts.bits4}", register, s.memory(None, label=label))
        else:
            s.emit(f"vbroadcastsd.{facts.bits8}", register, s.memory(None, label=label))


def constant_room(s: Any, live_rows: int, hoisted: list[Key]) -> dict[str, int]:
    """How many more constants may live in registers through a loop that needs `live_rows` rows at once."""
    masks = sum(1 for key in hoisted if key[0] == "k")
    return {"vec": s.facts.vector_registers - live_rows - (len(hoisted) - masks) - 3, "mask": 4 - masks}


def iota_key(s: Any) -> Key:
    return ("d", struct.pack(f"<{s.lanes}i", *range(s.lanes)))


def index_key(s: Any, indices: list[int], size: int) -> Key:
    return ("d", struct.pack(f"<{len(indices)}{'i' if size == 4 else 'q'}", *indices))


# --- What the driver asks --------------------------------------------------------------------------------------------

_RAX, _RCX, _RDX, _RSI, _RDI, _R10 = 0, 1, 2, 6, 7, 10


def begin(s: Any) -> None:
    """Take over the arguments (System V: rdi args block, rsi worker, rdx workers), those that are needed."""
    needed = {op.name for op in s.function.walk()}
    facts = s.facts
    if needed & {"arg", "tasks", "barrier"}:
        facts.arguments = s.new("gpr")
        s.emit("mov.64", facts.arguments, s.physical("gpr", _RDI))
    if "worker" in needed:
        facts.worker = s.new("gpr")
        s.emit("mov.64", facts.worker, s.physical("gpr", _RSI))
    if needed & {"workers", "barrier"}:
        facts.workers = s.new("gpr")
        s.emit("mov.64", facts.workers, s.physical("gpr", _RDX))


def finish(s: Any) -> None:
    s.location = None
    s.emit("ret")


def move(s: Any, destination: Any, source: Any, type_: Any) -> None:
    if isinstance(type_, ScalarType):
        s.emit("mov.64", destination, source)
    elif isinstance(type_, MaskType):
        if s.facts.opmask:
            s.emit("kmovq", destination, source)
        else:
            s.emit(f"vmovaps.{s.facts.bits4}", destination, source)
    else:
        s.emit(f"vmovaps.{bits_of(s, type_.dtype)}", destination, source)


def load_immediate(s: Any, register: Any, number: int) -> None:
    number = (number + 2**63) % 2**64 - 2**63
    if number == 0:
        s.emit("xor.32", register, register)
    elif 0 < number < 2**32:
        s.emit("mov.32", register, number)
    else:
        s.emit("mov.64", register, number)


def add_immediate(s: Any, register: Any, number: int) -> None:
    s.emit("add.64", register, number)


def add_register(s: Any, register: Any, other: Any) -> None:
    s.emit("add.64", register, other)


def subtract_branch(s: Any, register: Any, number: int, label: str) -> None:
    """Take a number off; jump if what remains is above 0."""
    s.emit("sub.64", register, number)
    s.branch("jg", label)


def subtract_register(s: Any, register: Any, other: Any) -> None:
    s.emit("sub.64", register, other)


def jump(s: Any, label: str) -> None:
    s.branch("jmp", label)


def compare_branch(s: Any, condition: str, a: Any, b: Any, label: str) -> None:
    s.emit("cmp.64", a, b)
    s.branch("j" + _CODES[condition], label)


def branch_unless(s: Any, value: Value, label: str) -> None:
    """Jump if the condition is 0."""
    number = s.constant_of(value)
    if number is not None:
        if not number:
            s.branch("jmp", label)
        return
    s.branch("j" + _INVERTED_CODES[test_condition(s, value)], label)


def test_condition(s: Any, value: Value) -> str:
    """Set the flags by a scalar; the condition code under which it is not 0."""
    if value in s.deferred:
        op = value.op
        assert op is not None
        return compare_scalars(s, op) if op.name == "s_cmp" else test_mask(s, op)
    register = s.scalar(value)
    s.emit("test.64", register, register)
    return "ne"


def compare_scalars(s: Any, op: Op) -> str:
    """Set the flags by an s_cmp; its condition code."""
    a, b = op.operands
    condition = op.attributes["cond"]
    if s.small_constant(a) is not None and s.small_constant(b) is None:
        a, b, condition = b, a, _MIRRORED[condition]
    number = s.small_constant(b)
    left = s.scalar(a)
    if number == 0:
        s.emit("test.64", left, left)
    else:
        s.emit("cmp.64", left, number if number is not None else s.scalar(b))
    return _CODES[condition]


def test_mask(s: Any, op: Op) -> str:
    """Set the flags by mask_any or mask_all; the condition code under which it holds."""
    mask = s.vector(op.operands[0])
    every = op.name == "mask_all"
    lanes = s.lanes
    if s.facts.opmask:
        if not every:
            s.emit("kortestw", mask, mask)
            return "ne"
        if lanes in (8, 16):
            s.emit("kortestw" if lanes == 16 else "kortestb", mask, mask)
            return "b"
        bits = s.new("gpr")
        s.emit("kmovw.from_mask", bits, mask)
    else:
        bits = s.new("gpr")
        s.emit(f"vmovmskps.{s.facts.bits4}", bits, mask)
        if not every:
            s.emit("test.32", bits, bits)
            return "ne"
    s.emit("cmp.32", bits, (1 << lanes) - 1)
    return "e"


def before_tasks(s: Any) -> None:
    """Nothing: the counter says which task is first."""


def after_task(s: Any) -> None:
    """Nothing: the counter says which task is next."""


def next_task(s: Any, counter: int, number: Any) -> None:
    """number = the counter's value; the counter goes up by one, atomically. Counters lie 64 bytes apart."""
    sync = s.new("gpr")
    s.emit("mov.64", sync, s.memory(s.facts.arguments, disp=16))
    s.emit("mov.32", number, 1)
    s.emit("lock.xadd.64", s.memory(sync, disp=64 * counter), number)


# --- Scalars ---------------------------------------------------------------------------------------------------------

def arg(s: Any, op: Op) -> None:
    s.emit("mov.64", s.define(op.results[0]), s.memory(s.facts.arguments, disp=8 * op.attributes["slot"]))


def worker(s: Any, op: Op) -> None:
    s.emit("mov.64", s.define(op.results[0]), s.facts.worker)


def workers(s: Any, op: Op) -> None:
    s.emit("mov.64", s.define(op.results[0]), s.facts.workers)


def s_add(s: Any, op: Op) -> None:
    a, b = op.operands
    result = op.results[0]
    if s.constant_of(a) is not None:
        a, b = b, a
    number = s.small_constant(b)
    left = s.scalar(a)
    if number is not None:
        register, place = s.tie(result, (a,))
        if place == 0:
            s.emit("add.64", register, number)
        else:
            s.emit("lea.64", register, s.memory(left, disp=number))
        return
    right = s.scalar(b)
    register, place = s.tie(result, (a, b))
    if place >= 0:
        s.emit("add.64", register, right if place == 0 else left)
    else:
        s.emit("lea.64", register, s.memory(left, right))


def s_sub(s: Any, op: Op) -> None:
    a, b = op.operands
    result = op.results[0]
    number = s.small_constant(b)
    if number is not None and -number < 2**31:
        left = s.scalar(a)
        register, place = s.tie(result, (a,))
        if place == 0:
            s.emit("sub.64", register, number)
        else:
            s.emit("lea.64", register, s.memory(left, disp=-number))
        return
    _two_address(s, "sub.64", op, False)


def _two_address(s: Any, name: str, op: Op, commutative: bool) -> None:
    """result = a op b where the instruction overwrites a; b may be an immediate."""
    a, b = op.operands
    if commutative and s.constant_of(a) is not None:
        a, b = b, a
    number = s.small_constant(b)
    left = s.scalar(a)
    right = number if number is not None else s.scalar(b)
    register, place = s.tie(op.results[0], (a, b) if commutative and number is None else (a,))
    if place == 0:
        s.emit(name, register, right)
    elif place == 1:
        s.emit(name, register, left)
    elif register is right and register is not left:
        spare = s.new("gpr")
        s.emit("mov.64", spare, left)
        s.emit(name, spare, right)
        s.emit("mov.64", register, spare)
    else:
        if register is not left:
            s.emit("mov.64", register, left)
        s.emit(name, register, right)


def s_mul(s: Any, op: Op) -> None:
    a, b = op.operands
    result = op.results[0]
    if s.constant_of(a) is not None:
        a, b = b, a
    number = s.small_constant(b)
    if number is None:
        _two_address(s, "imul.64", op, True)
        return
    left = s.scalar(a)
    if number > 0 and number & (number - 1) == 0:
        _shift_by(s, "shl", result, a, number.bit_length() - 1)
    elif number in (3, 5, 9):
        s.emit("lea.64", s.define(result), s.memory(left, left, number - 1))
    else:
        s.emit("imul.imm.64", s.define(result), left, number)


def _shift_by(s: Any, name: str, result: Value, a: Value, amount: int) -> None:
    left = s.scalar(a)
    register, place = s.tie(result, (a,))
    if place < 0:
        if name == "shl" and 0 < amount <= 3:
            s.emit("lea.64", register, s.memory(None, left, 1 << amount) if amount > 1 else s.memory(left, left))
            return
        if register is not left:
            s.emit("mov.64", register, left)
    if amount:
        s.emit(f"{name}.imm.64", register, amount)


def _scalar_shift(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        a, b = op.operands
        number = s.constant_of(b)
        if number is not None:
            _shift_by(s, name, op.results[0], a, number & 63)
        else:
            left, right = s.scalar(a), s.scalar(b)
            s.emit(f"{name}x.64", s.define(op.results[0]), left, right)
    return rule


def _scalar_bits(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        _two_address(s, f"{name}.64", op, True)
    return rule


def _scalar_choice(code: str) -> Rule:
    """s_min, s_max: the operand for which `other code kept` moves over the kept one."""
    def rule(s: Any, op: Op) -> None:
        a, b = op.operands
        if s.constant_of(a) is not None:
            a, b = b, a
        left, right = s.scalar(a), s.scalar(b)
        register, place = s.tie(op.results[0], (a, b))
        if place == 1:
            left, right = right, left
        if place < 0:
            s.emit("mov.64", register, left)
        s.emit("cmp.64", right, register)
        s.emit(f"cmov{code}.64", register, right)
    return rule


def divide_scalars(s: Any, a: Any, b: Any, number: int | None) -> tuple[Any, Any]:
    """Floor division of general registers: fresh registers of quotient and remainder.

    idiv truncates; where there is a remainder whose sign is not the divisor's, the quotient is one less and the
    remainder one divisor more. number: the divisor, if it is a constant.
    """
    rax, rdx = s.physical("gpr", _RAX), s.physical("gpr", _RDX)
    quotient, remainder, fix = s.new("gpr"), s.new("gpr"), s.new("gpr")
    s.emit("mov.64", rax, a)
    s.emit("cqo")
    s.emit("idiv.64", b)
    s.emit("mov.64", quotient, rax)
    s.emit("mov.64", remainder, rdx)
    s.emit("mov.64", fix, remainder)
    if number is None:
        s.emit("xor.64", fix, b)
        s.emit("sar.imm.64", fix, 63)
        s.emit("test.64", remainder, remainder)
        s.emit("cmove.64", fix, remainder)
    else:
        if number < 0:
            s.emit("neg.64", fix)
        s.emit("sar.imm.64", fix, 63)
    s.emit("add.64", quotient, fix)
    s.emit("and.64", fix, b)
    s.emit("add.64", remainder, fix)
    return quotient, remainder


def s_floordiv(s: Any, op: Op) -> None:
    a, b = op.operands
    number = s.constant_of(b)
    if number is not None and number > 0 and number & (number - 1) == 0:
        _shift_by(s, "sar", op.results[0], a, number.bit_length() - 1)
        return
    quotient, _ = divide_scalars(s, s.scalar(a), s.scalar(b), number)
    s.emit("mov.64", s.define(op.results[0]), quotient)


def s_mod(s: Any, op: Op) -> None:
    a, b = op.operands
    number = s.constant_of(b)
    if number is not None and 0 < number <= 2**31 and number & (number - 1) == 0:
        left = s.scalar(a)
        register, place = s.tie(op.results[0], (a,))
        if place < 0 and register is not left:
            s.emit("mov.64", register, left)
        s.emit("and.64", register, number - 1)
        return
    _, remainder = divide_scalars(s, s.scalar(a), s.scalar(b), number)
    s.emit("mov.64", s.define(op.results[0]), remainder)


def _set_by(s: Any, op: Op, code: str) -> None:
    low = s.new("gpr")
    s.emit(f"set{code}", low)
    s.emit("movzx.8.32", s.define(op.results[0]), low)


def s_cmp(s: Any, op: Op) -> None:
    _set_by(s, op, compare_scalars(s, op))


def _mask_test(s: Any, op: Op) -> None:
    _set_by(s, op, test_mask(s, op))


def s_select(s: Any, op: Op) -> None:
    condition, a, b = op.operands
    number = s.constant_of(condition)
    if number is not None:
        s.emit("mov.64", s.define(op.results[0]), s.scalar(a if number else b))
        return
    left, right = s.scalar(a), s.scalar(b)
    code = test_condition(s, condition)
    # Moves leave the flags alone, so the result's register may even be one that was compared.
    register, place = s.tie(op.results[0], (b, a))
    if place == 0:
        s.emit(f"cmov{code}.64", register, left)
    elif place == 1:
        s.emit(f"cmov{_INVERTED_CODES[code]}.64", register, right)
    else:
        s.emit("mov.64", register, right)
        s.emit(f"cmov{code}.64", register, left)


_SCALAR_LOADS = {"i64": "mov.64", "f64": "mov.64", "i32": "movsxd", "f32": "mov.32", "i16": "movsx.16.64",
                 "f16": "movzx.16.32", "bf16": "movzx.16.32", "i8": "movsx.8.64", "u8": "movzx.8.32",
                 "bool": "movzx.8.32", "b32": "mov.32"}


def s_load(s: Any, op: Op) -> None:
    memory = s.address(op, 0)
    s.emit(_SCALAR_LOADS[op.attributes["dtype"].name], s.define(op.results[0]), memory)


def s_store(s: Any, op: Op) -> None:
    value = op.operands[0]
    bits = op.attributes["dtype"].bits
    memory = s.address(op, 1)
    number = s.constant_of(value)
    if number is not None:
        low = (number + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
        if bits < 64 or -2**31 <= low < 2**31:
            s.emit(f"mov.{bits}", memory, low)
            return
    s.emit(f"mov.{bits}", memory, s.scalar(value))


# --- Rows from scalars, and back -------------------------------------------------------------------------------------

def splat(s: Any, op: Op) -> None:
    result = op.results[0]
    dtype = dtype_of(result)
    bits = bits_of(s, dtype)
    number = s.constant_of(op.operands[0])
    if number is not None:
        number &= (1 << dtype.bits) - 1
        key = _ZERO4 if number == 0 else ("s", dtype.bits // 8, number)
        make_constant(s, key, s.define(result))
        return
    splat_register(s, s.scalar(op.operands[0]), s.define(result), dtype.bits // 8, bits)


def splat_register(s: Any, source: Any, register: Any, size: int, bits: int) -> None:
    """A general register's low bytes into every lane."""
    letter = "d" if size == 4 else "q"
    if s.facts.opmask:
        s.emit(f"vpbroadcast{letter}.general.{bits}", register, source)
    else:
        low = s.new("vec")
        s.emit(f"vmov{letter}.to_vec", low, source)
        s.emit(f"vpbroadcast{letter}.{bits}", register, low)


def iota(s: Any, op: Op) -> None:
    _copy_constant(s, op.results[0], iota_key(s))


def _copy_constant(s: Any, result: Value, key: Key) -> None:
    register = s.define(result)
    hoisted = s.hoisted.get(key)
    if hoisted is not None:
        s.emit(f"vmovaps.{bits_of(s, dtype_of(result))}", register, hoisted)
    else:
        make_constant(s, key, register)


def _table_key(op: Op) -> Key:
    return ("d", struct.pack("<16f", *op.attributes["table"]))


def lookup(s: Any, op: Op) -> None:
    """VPERMPS takes the low 4 bits of each index. 512 bits, as the table has; lanes beyond the row's mean nothing."""
    s.emit("vpermps.512", s.define(op.results[0]), s.vector(op.operands[0]), s.constant_operand(_table_key(op)))


def lane0(s: Any, op: Op) -> None:
    value = op.operands[0]
    row = s.vector(value)
    register = s.define(op.results[0])
    if dtype_of(value).bits == 64:
        s.emit("vmovq.from_vec", register, row)
    else:
        s.emit("vmovd.from_vec", register, row)
        s.emit("movsxd", register, register)


# --- Arithmetic ------------------------------------------------------------------------------------------------------

def binary(s: Any, op: Op, name: str, commutative: bool) -> None:
    """One instruction of three operands; the last may be memory."""
    a, b = op.operands
    if commutative and s.is_memory(a) and not s.is_memory(b):
        a, b = b, a
    second = s.operand(b)
    first = s.vector(a)
    s.emit(name, s.define(op.results[0]), first, second)


def _arithmetic(float_name: str, integer_name: str, commutative: bool) -> Rule:
    def rule(s: Any, op: Op) -> None:
        dtype = dtype_of(op.results[0])
        bits = bits_of(s, dtype)
        if dtype.name in _FLOAT:
            binary(s, op, f"v{float_name}{_FLOAT[dtype.name]}.{bits}", commutative)
        elif dtype.bits == 64 and not s.facts.opmask and integer_name in ("mull", "mins", "maxs"):
            _wide_integer(s, op, integer_name, bits)
        else:
            binary(s, op, f"vp{integer_name}{_INTEGER[dtype.name]}.{bits}", commutative or integer_name in
                   ("mins", "maxs"))
    return rule


def _wide_integer(s: Any, op: Op, name: str, bits: int) -> None:
    """i64 multiplication, minimum and maximum without AVX-512."""
    a, b = s.vector(op.operands[0]), s.vector(op.operands[1])
    if name == "mull":
        # a * b = low(a) low(b) + ((high(a) low(b) + low(a) high(b)) << 32)
        high, cross, low = s.new("vec"), s.new("vec"), s.new("vec")
        s.emit(f"vpsrlq.imm.{bits}", high, a, 32)
        s.emit(f"vpmuludq.{bits}", high, high, b)
        s.emit(f"vpsrlq.imm.{bits}", cross, b, 32)
        s.emit(f"vpmuludq.{bits}", cross, cross, a)
        s.emit(f"vpaddq.{bits}", high, high, cross)
        s.emit(f"vpsllq.imm.{bits}", high, high, 32)
        s.emit(f"vpmuludq.{bits}", low, a, b)
        s.emit(f"vpaddq.{bits}", s.define(op.results[0]), low, high)
        return
    greater = s.new("vec")
    s.emit(f"vpcmpgtq.{bits}", greater, a, b)
    if name == "maxs":
        a, b = b, a
    s.emit(f"vblendvpd.{bits}", s.define(op.results[0]), a, b, greater)


def div(s: Any, op: Op) -> None:
    dtype = dtype_of(op.results[0])
    binary(s, op, f"vdiv{_FLOAT[dtype.name]}.{bits_of(s, dtype)}", False)


def _unnegated(s: Any, value: Value) -> tuple[Value, bool]:
    negated = False
    while value in s.deferred and value.op.name == "neg":  # type: ignore[union-attr]
        value, negated = value.op.operands[0], not negated  # type: ignore[union-attr]
    return value, negated


def fma(s: Any, op: Op) -> None:
    """231 where c dies (accumulators), else 213 or 132 where a factor dies, else 231 on a copy of c."""
    result = op.results[0]
    dtype = dtype_of(result)
    bits = bits_of(s, dtype)
    a, negative_a = _unnegated(s, op.operands[0])
    b, negative_b = _unnegated(s, op.operands[1])
    c, negative_c = _unnegated(s, op.operands[2])
    stem = "vf" + ("n" if negative_a != negative_b else "") + ("msub" if negative_c else "madd")
    tail = f"{_FLOAT[dtype.name]}.{bits}"
    register, place = s.tie(result, (c, a, b))
    if place < 0:
        # One operand has to be brought into the result's register: best one that is loaded anyway.
        if s.is_memory(c) or not (s.is_memory(a) or s.is_memory(b)):
            place = 0
            bring(s, c, register, bits)
        else:
            place = 1 if s.is_memory(a) else 2
            bring(s, a if place == 1 else b, register, bits)
    if place == 0:
        if s.is_memory(a) and not s.is_memory(b):
            a, b = b, a
        last = s.operand(b)
        s.emit(f"{stem}231{tail}", register, s.vector(a), last)
        return
    factor = b if place == 1 else a
    if s.is_memory(factor) and not s.is_memory(c):
        last = s.operand(factor)
        s.emit(f"{stem}132{tail}", register, s.vector(c), last)
    else:
        last = s.operand(c)
        s.emit(f"{stem}213{tail}", register, s.vector(factor), last)


def bring(s: Any, value: Value, register: Any, bits: int) -> None:
    """Copy, load or make a row in a given register."""
    known = s.registers.get(value)
    if known is not None:
        s.emit(f"vmovaps.{bits}", register, known)
        return
    op = value.op
    assert op is not None
    if op.name == "splat_const":
        key = constant_key(s, value)
        hoisted = s.hoisted.get(key)
        if hoisted is not None:
            s.emit(f"vmovaps.{bits}", register, hoisted)
        else:
            make_constant(s, key, register)
    elif op.name == "load":
        s.emit(f"vmovups.{bits}", register, s.address(op, 0))
    elif op.name == "load_splat":
        load_splat_into(s, op.attributes["dtype"].name, s.address(op, 0), register)
    else:
        s.emit(f"vmovaps.{bits}", register, s.vector(value))


def _sign_key(dtype: DType) -> Key:
    return ("s", dtype.bits // 8, 1 << (dtype.bits - 1))


def neg(s: Any, op: Op) -> None:
    value = op.operands[0]
    dtype = dtype_of(value)
    bits = bits_of(s, dtype)
    if dtype.name in _FLOAT:
        row, sign = s.vector(value), s.constant_operand(_sign_key(dtype))
        s.emit(f"vxor{_FLOAT[dtype.name]}.{bits}", s.define(op.results[0]), row, sign)
    else:
        row, zero = s.vector(value), s.constant(_ZERO4)
        s.emit(f"vpsub{_INTEGER[dtype.name]}.{bits}", s.define(op.results[0]), zero, row)


def absolute(s: Any, op: Op) -> None:
    value = op.operands[0]
    dtype = dtype_of(value)
    bits = bits_of(s, dtype)
    row = s.vector(value)
    if dtype.name in _FLOAT:
        keep = s.constant_operand(_magnitude_key(dtype))
        s.emit(f"vand{_FLOAT[dtype.name]}.{bits}", s.define(op.results[0]), row, keep)
    elif dtype.bits == 32 or s.facts.opmask:
        s.emit(f"vpabs{_INTEGER[dtype.name]}.{bits}", s.define(op.results[0]), row)
    else:
        negative, flipped = s.new("vec"), s.new("vec")
        s.emit(f"vpcmpgtq.{bits}", negative, s.constant(_ZERO4), row)
        s.emit(f"vpxor.{bits}", flipped, row, negative)
        s.emit(f"vpsubq.{bits}", s.define(op.results[0]), flipped, negative)


def _magnitude_key(dtype: DType) -> Key:
    return ("s", dtype.bits // 8, (1 << (dtype.bits - 1)) - 1)


def sqrt(s: Any, op: Op) -> None:
    dtype = dtype_of(op.operands[0])
    source = s.operand(op.operands[0])
    s.emit(f"vsqrt{_FLOAT[dtype.name]}.{bits_of(s, dtype)}", s.define(op.results[0]), source)


def _rounding(mode: int) -> Rule:
    """Immediate of vroundps and vrndscaleps: 8 nearest even, 9 down, 10 up, 11 towards 0; without inexact."""
    def rule(s: Any, op: Op) -> None:
        value = op.operands[0]
        dtype = dtype_of(value)
        if dtype.name not in _FLOAT:
            row = s.vector(value)
            s.emit(f"vmovaps.{bits_of(s, dtype)}", s.define(op.results[0]), row)
            return
        source = s.operand(value)
        name = "vrndscale" if s.facts.opmask else "vround"
        s.emit(f"{name}{_FLOAT[dtype.name]}.{bits_of(s, dtype)}", s.define(op.results[0]), source, mode)
    return rule


def scale_exponent(s: Any, op: Op) -> None:
    """VSCALEF, which is the op but for a NaN times an infinite power (SDM volume 2: infinity or 0)."""
    a, n = op.operands
    dtype = dtype_of(a)
    bits = bits_of(s, dtype)
    if s.facts.opmask:
        last = s.operand(n)
        s.emit(f"vscalef{_FLOAT[dtype.name]}.{bits}", s.define(op.results[0]), s.vector(a), last)
        return
    # 2**n is multiplied in as three powers that are normal numbers, the largest last: if an earlier product is
    # inexact, it is so small (large) that the result is 0 (infinity) whatever its rounding. n beyond `limit` can't be
    # told from `limit`.
    single = dtype.name == "f32"
    suffix = _FLOAT[dtype.name]
    low, high, limit, fraction = (-126.0, 127.0, 300.0, 23) if single else (-1022.0, 1023.0, 2200.0, 52)
    row, power = s.vector(a), s.vector(n)

    def constant(number: float) -> Any:
        return s.constant_operand(_float_key(dtype, number))

    whole, rest, part = s.new("vec"), s.new("vec"), s.new("vec")
    s.emit(f"vround{suffix}.{bits}", whole, power, 9)
    s.emit(f"vmax{suffix}.{bits}", whole, whole, constant(-limit))
    s.emit(f"vmin{suffix}.{bits}", whole, whole, constant(limit))
    parts = []
    for _ in range(2):
        part = s.new("vec")
        s.emit(f"vmax{suffix}.{bits}", part, whole, constant(low))
        s.emit(f"vmin{suffix}.{bits}", part, part, constant(high))
        rest = s.new("vec")
        s.emit(f"vsub{suffix}.{bits}", rest, whole, part)
        parts.append(part)
        whole = rest
    parts.append(whole)
    # The power as bits: n + magic puts n + bias into the low mantissa bits, from where it is shifted to the exponent.
    magic = float(2**23 + 127) if single else float(2**52 + 1023)
    letter = "d" if single else "q"
    product = s.new("vec")
    for number, part in enumerate(reversed(parts)):
        factor = s.new("vec")
        s.emit(f"vadd{suffix}.{bits}", factor, part, constant(magic))
        s.emit(f"vpsll{letter}.imm.{bits}", factor, factor, fraction)
        s.emit(f"vmul{suffix}.{bits}", product, row if number == 0 else product, factor)
    # Where n is infinite or NaN: a * max(0, n), that is a times infinity, 0 or NaN.
    special, infinite = s.new("vec"), s.new("vec")
    s.emit(f"vsub{suffix}.{bits}", infinite, power, power)
    s.emit(f"vcmp{suffix}.{bits}", infinite, infinite, infinite, 3)
    s.emit(f"vmax{suffix}.{bits}", special, s.constant(_ZERO4), power)
    s.emit(f"vmul{suffix}.{bits}", special, special, row)
    s.emit(f"vblendv{suffix}.{bits}", s.define(op.results[0]), product, special, infinite)


def _float_key(dtype: DType, number: float) -> Key:
    if dtype.name == "f32":
        return ("s", 4, float32_bits(number))
    return ("s", 8, struct.unpack("<Q", struct.pack("<d", number))[0])


def _bitwise(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        dtype = dtype_of(op.results[0])
        letter = _INTEGER[dtype.name] if s.facts.opmask else ""
        binary(s, op, f"vp{name}{letter}.{bits_of(s, dtype)}", True)
    return rule


def bit_not(s: Any, op: Op) -> None:
    dtype = dtype_of(op.results[0])
    row, ones = s.vector(op.operands[0]), s.constant(_ONES)
    s.emit(f"vpxor{_INTEGER[dtype.name] if s.facts.opmask else ''}.{bits_of(s, dtype)}", s.define(op.results[0]), row,
           ones)


def _row_constant(value: Value) -> int | None:
    op = value.op
    if op is not None and op.name == "splat_const":
        return int(op.attributes["value"])
    return None


def _shift(name: str) -> Rule:
    """name: sll, srl, sra."""
    def rule(s: Any, op: Op) -> None:
        value = op.operands[0]
        dtype = dtype_of(value)
        bits = bits_of(s, dtype)
        letter = _INTEGER[dtype.name]
        amount = op.attributes.get("amount")
        if len(op.operands) == 2:
            amount = _row_constant(op.operands[1])
        row = s.vector(value)
        if name == "sra" and letter == "q" and not s.facts.opmask:
            shift_right_signed(s, op, row, amount, bits)
        elif amount is not None:
            s.emit(f"vp{name}{letter}.imm.{bits}", s.define(op.results[0]), row, amount)
        else:
            by = s.vector(op.operands[1])
            s.emit(f"vp{name}v{letter}.{bits}", s.define(op.results[0]), row, by)
    return rule


def shift_right_signed(s: Any, op: Op, row: Any, amount: int | None, bits: int) -> None:
    """i64 without AVX-512: shift logically, the sign bit too, then extend it: (x ^ m) - m."""
    sign, shifted = s.new("vec"), s.new("vec")
    source = s.constant(("s", 8, 1 << 63))
    if amount is not None:
        s.emit(f"vpsrlq.imm.{bits}", sign, source, amount)
        s.emit(f"vpsrlq.imm.{bits}", shifted, row, amount)
    else:
        by = s.vector(op.operands[1])
        s.emit(f"vpsrlvq.{bits}", sign, source, by)
        s.emit(f"vpsrlvq.{bits}", shifted, row, by)
    s.emit(f"vpxor.{bits}", shifted, shifted, sign)
    s.emit(f"vpsubq.{bits}", s.define(op.results[0]), shifted, sign)


def _division(remainder: bool) -> Rule:
    def rule(s: Any, op: Op) -> None:
        a, b = op.operands
        result = op.results[0]
        dtype = dtype_of(result)
        bits = bits_of(s, dtype)
        letter = _INTEGER[dtype.name]
        number = _row_constant(b)
        dividend = s.vector(a)
        if number is not None and number > 0 and number & (number - 1) == 0:
            if remainder:
                last = s.constant_operand(("s", dtype.bits // 8, number - 1) if number > 1 else _ZERO4)
                s.emit(f"vpand{letter if s.facts.opmask else ''}.{bits}", s.define(result), dividend, last)
            elif letter == "q" and not s.facts.opmask:
                shift_right_signed(s, op, dividend, number.bit_length() - 1, bits)
            else:
                s.emit(f"vpsra{letter}.imm.{bits}", s.define(result), dividend, number.bit_length() - 1)
            return
        divisor = s.vector(b)
        if dtype.bits == 64:
            _divide_lanes(s, result, dividend, divisor, bits, remainder)
            return
        quotient = s.new("vec") if remainder else None
        made = divide_rows(s, dividend, divisor, quotient if remainder else s.define(result))
        if remainder:
            product = s.new("vec")
            s.emit(f"vpmulld.{bits}", product, made, divisor)
            s.emit(f"vpsubd.{bits}", s.define(result), dividend, product)
    return rule


def divide_rows(s: Any, dividend: Any, divisor: Any, register: Any) -> Any:
    """i32 floor division by f64 division, which is exact: two 32-bit integers that do not divide differ in their
    quotient from any integer by at least 2**-31, and the rounded quotient errs by less than 2**-22 of that."""
    bits = s.facts.bits4
    wide = min(2 * bits, s.facts.vector_bits)
    floor = "vrndscalepd" if s.facts.opmask else "vroundpd"

    def half(a: Any, b: Any, into: Any) -> None:
        x, y = s.new("vec"), s.new("vec")
        s.emit(f"vcvtdq2pd.{wide}", x, a)
        s.emit(f"vcvtdq2pd.{wide}", y, b)
        s.emit(f"vdivpd.{wide}", x, x, y)
        s.emit(f"{floor}.{wide}", x, x, 9)
        s.emit(f"vcvttpd2dq.{wide}", into, x)

    if wide == 2 * bits:
        half(dividend, divisor, register)
        return register
    high_a, high_b, low, high = s.new("vec"), s.new("vec"), s.new("vec"), s.new("vec")
    extract_half(s, high_a, dividend, bits)
    extract_half(s, high_b, divisor, bits)
    half(dividend, divisor, low)
    half(high_a, high_b, high)
    insert_half(s, register, low, high, bits)
    return register


def extract_half(s: Any, register: Any, row: Any, bits: int) -> None:
    """The upper half of a register of 256 or 512 bits."""
    if bits == 512:
        s.emit("vextracti64x4.512", register, row, 1)
    elif s.facts.opmask:
        s.emit("vextracti32x4.256", register, row, 1)
    else:
        s.emit("vextracti128.256", register, row, 1)


def insert_half(s: Any, register: Any, low: Any, high: Any, bits: int) -> None:
    """A register of 256 or 512 bits from its halves."""
    if bits == 512:
        s.emit("vinserti64x4.512", register, low, high, 1)
    elif s.facts.opmask:
        s.emit("vinserti32x4.256", register, low, high, 1)
    else:
        s.emit("vinserti128.256", register, low, high, 1)


def quarters(s: Any, row: Any, bits: int) -> list[Any]:
    """The 128-bit parts of a register."""
    if bits == 128:
        return [row]
    if bits == 256:
        high = s.new("vec")
        extract_half(s, high, row, 256)
        return [row, high]
    parts = [row]
    for number in (1, 2, 3):
        part = s.new("vec")
        s.emit("vextracti32x4.512", part, row, number)
        parts.append(part)
    return parts


def join(s: Any, parts: list[Any], register: Any) -> None:
    """A register from its 128-bit parts."""
    if len(parts) == 2:
        insert_half(s, register, parts[0], parts[1], 256)
    elif len(parts) == 4:
        low, high = s.new("vec"), s.new("vec")
        insert_half(s, low, parts[0], parts[1], 256)
        insert_half(s, high, parts[2], parts[3], 256)
        insert_half(s, register, low, high, 512)
    else:
        s.emit("vmovaps.128", register, parts[0])


def lanes_out(s: Any, row: Any, size: int) -> list[Any]:
    """Every lane of a row in a general register of its own, zero-extended."""
    found = []
    per = 16 // size
    for part in quarters(s, row, size * 8 * s.lanes):
        for number in range(per):
            register = s.new("gpr")
            letter = "d" if size == 4 else "q"
            if number == 0:
                s.emit(f"vmov{letter}.from_vec", register, part)
            else:
                s.emit(f"vpextr{letter}", register, part, number)
            found.append(register)
    return found


def lanes_in(s: Any, registers: list[Any], size: int, into: Any) -> None:
    """A row from one general register for each lane."""
    per = 16 // size
    letter = "d" if size == 4 else "q"
    parts = []
    for first in range(0, len(registers), per):
        part = s.new("vec")
        s.emit(f"vmov{letter}.to_vec", part, registers[first])
        for number in range(1, per):
            s.emit(f"vpinsr{letter}", part, part, registers[first + number], number)
        parts.append(part)
    join(s, parts, into)


def _divide_lanes(s: Any, result: Value, dividend: Any, divisor: Any, bits: int, remainder: bool) -> None:
    """i64: no float is wide enough, so one lane after the other.

    idiv traps for a divisor 0, which a lane that nobody will look at may have, and for -2**63 / -1: both divisors are
    replaced by 1, and a quotient by -1 negated."""
    parts = []
    per = 2
    for row_a, row_b in zip(quarters(s, dividend, bits), quarters(s, divisor, bits), strict=True):
        part = s.new("vec")
        for number in range(per):
            a, b, above, safe = s.new("gpr"), s.new("gpr"), s.new("gpr"), s.new("gpr")
            if number == 0:
                s.emit("vmovq.from_vec", a, row_a)
                s.emit("vmovq.from_vec", b, row_b)
            else:
                s.emit("vpextrq", a, row_a, number)
                s.emit("vpextrq", b, row_b, number)
            s.emit("lea.64", above, s.memory(b, disp=1))
            s.emit("mov.32", safe, 1)
            s.emit("cmp.64", above, 1)
            s.emit("cmova.64", safe, b)
            made = divide_scalars(s, a, safe, None)[int(remainder)]
            if not remainder:
                negated = s.new("gpr")
                s.emit("mov.64", negated, made)
                s.emit("neg.64", negated)
                s.emit("cmp.64", b, -1)
                s.emit("cmove.64", made, negated)
            if number == 0:
                s.emit("vmovq.to_vec", part, made)
            else:
                s.emit("vpinsrq", part, part, made, number)
        parts.append(part)
    join(s, parts, s.define(result))


# --- Masks -----------------------------------------------------------------------------------------------------------

def compare(s: Any, op: Op) -> None:
    a, b = op.operands
    condition = op.attributes["cond"]
    dtype = dtype_of(a)
    bits = bits_of(s, dtype)
    if s.is_memory(a) and not s.is_memory(b):
        a, b, condition = b, a, _MIRRORED[condition]
    result = op.results[0]
    if dtype.name in _FLOAT:
        last = s.operand(b)
        first = s.vector(a)
        register = _mask_made(s, result, dtype)
        s.emit(f"vcmp{_FLOAT[dtype.name]}.{'k.' if s.facts.opmask else ''}{bits}", register, first, last,
               _FLOAT_PREDICATES[condition])
    elif s.facts.opmask:
        last = s.operand(b)
        first = s.vector(a)
        s.emit(f"vpcmp{_INTEGER[dtype.name]}.{bits}", s.define(result), first, last, _INTEGER_PREDICATES[condition])
        return
    else:
        letter = _INTEGER[dtype.name]
        if condition in ("lt", "ge"):
            a, b, condition = b, a, _MIRRORED[condition]
        last = s.operand(b)
        first = s.vector(a)
        register = _mask_made(s, result, dtype)
        name = f"vpcmp{'gt' if condition in ('gt', 'le') else 'eq'}{letter}.{bits}"
        if condition in ("gt", "eq"):
            s.emit(name, register, first, last)
        else:
            made = s.new("vec")
            s.emit(name, made, first, last)
            s.emit(f"vpxor.{bits}", register, made, s.constant(_ONES))
    if not s.facts.opmask and dtype.bits == 64:
        narrow_mask(s, register, s.define(result))


def _mask_made(s: Any, result: Value, dtype: DType) -> Any:
    """Where a comparison writes: the mask's register, or one that is narrowed after (64-bit lanes, no opmasks)."""
    if s.facts.opmask or dtype.bits == 32:
        return s.define(result)
    register = s.facts.wide_masks[result] = s.new("vec")
    return register


def narrow_mask(s: Any, wide: Any, register: Any) -> None:
    """Four 64-bit lanes of ones or zeros to 32-bit lanes."""
    high = s.new("vec")
    extract_half(s, high, wide, 256)
    s.emit("vshufps.128", register, wide, high, 0x88)


def wide_mask(s: Any, value: Value) -> Any:
    """A mask as 64-bit lanes of ones or zeros (without opmasks)."""
    wide = s.facts.wide_masks.get(value)
    if wide is None:
        wide = s.new("vec")
        s.emit("vpmovsxdq.256", wide, s.vector(value))
    return wide


def select(s: Any, op: Op) -> None:
    mask, a, b = op.operands
    result = op.results[0]
    dtype = dtype_of(result)
    bits = bits_of(s, dtype)
    suffix = "ps" if dtype.bits == 32 else "pd"
    if not s.facts.opmask:
        on = s.vector(mask) if dtype.bits == 32 else wide_mask(s, mask)
        if _is_zero(s, b):
            row = s.vector(a)
            s.emit(f"vand{suffix}.{bits}", s.define(result), on, row)
        elif _is_zero(s, a):
            row = s.vector(b)
            s.emit(f"vandn{suffix}.{bits}", s.define(result), on, row)
        else:
            first, second = s.vector(b), s.vector(a)
            s.emit(f"vblendv{suffix}.{bits}", s.define(result), first, second, on)
        return
    on = s.vector(mask)
    if _is_zero(s, b):
        row = s.vector(a)
        s.emit_masked(f"vmova{suffix}.{bits}", on, True, s.define(result), row)
        return
    row, other = s.vector(a), s.vector(b)
    register, place = s.tie(result, (b,))
    if place == 0:
        s.emit_masked(f"vmova{suffix}.{bits}", on, False, register, row)
    else:
        s.emit_masked(f"vblendm{suffix}.{bits}", on, False, register, other, row)


def _is_zero(s: Any, value: Value) -> bool:
    op = value.op
    return op is not None and op.name == "splat_const" and bool(constant_key(s, value) == _ZERO4)


def clamped_count(s: Any, count: Value) -> Any:
    """A count cut to 0 .. lanes, in a fresh general register."""
    source = s.scalar(count)
    cut, zero = s.new("gpr"), s.new("gpr")
    s.emit("mov.32", cut, s.lanes)
    s.emit("cmp.64", source, cut)
    s.emit("cmovl.64", cut, source)
    s.emit("xor.32", zero, zero)
    s.emit("test.64", cut, cut)
    s.emit("cmovs.64", cut, zero)
    return cut


def mask_first(s: Any, op: Op) -> None:
    result = op.results[0]
    number = s.constant_of(op.operands[0])
    lanes = s.lanes
    if s.facts.opmask:
        register = s.define(result)
        bits = s.new("gpr")
        if number is not None:
            load_immediate(s, bits, (1 << max(0, min(number, lanes))) - 1)
        else:
            ones = s.new("gpr")
            cut = clamped_count(s, op.operands[0])
            s.emit("mov.32", ones, (1 << lanes) - 1)
            s.emit("bzhi.32", bits, ones, cut)
        s.emit("kmovw.to_mask", register, bits)
        return
    if number is not None:
        on = max(0, min(number, lanes))
        make_constant(s, index_key(s, [-1] * on + [0] * (lanes - on), 4), s.define(result))
        return
    count = s.new("vec")
    cut = clamped_count(s, op.operands[0])
    splat_register(s, cut, count, 4, s.facts.bits4)
    last = s.constant_operand(iota_key(s))
    s.emit(f"vpcmpgtd.{s.facts.bits4}", s.define(result), count, last)


def _mask_binary(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        a, b = s.vector(op.operands[0]), s.vector(op.operands[1])
        if s.facts.opmask:
            s.emit(f"k{name}w", s.define(op.results[0]), a, b)
        else:
            s.emit(f"vp{name}.{s.facts.bits4}", s.define(op.results[0]), a, b)
    return rule


def mask_not(s: Any, op: Op) -> None:
    mask = s.vector(op.operands[0])
    if not s.facts.opmask:
        ones = s.constant(_ONES)
        s.emit(f"vpxor.{s.facts.bits4}", s.define(op.results[0]), mask, ones)
    elif s.lanes == 4:
        ones = s.constant(("k", 15))
        s.emit("kxorw", s.define(op.results[0]), mask, ones)
    else:
        s.emit("knotw" if s.lanes == 16 else "knotb", s.define(op.results[0]), mask)


def mask_to_row(s: Any, op: Op) -> None:
    mask = s.vector(op.operands[0])
    bits = s.facts.bits4
    if s.facts.opmask:
        one = s.constant(("s", 4, 1))
        s.emit_masked(f"vmovaps.{bits}", mask, True, s.define(op.results[0]), one)
    else:
        s.emit(f"vpsrld.imm.{bits}", s.define(op.results[0]), mask, 31)


# --- Conversions -----------------------------------------------------------------------------------------------------

def _alias(s: Any, op: Op) -> None:
    """The same register under another name; a constant gets one of its own."""
    value = op.operands[0]
    if value.op is not None and value.op.name == "splat_const":
        register = s.define(op.results[0])
        bring(s, value, register, bits_of(s, dtype_of(value)))
    else:
        s.registers[op.results[0]] = s.vector(value)


_CONVERSIONS = {
    ("f32", "f64"): "vcvtps2pd", ("f64", "f32"): "vcvtpd2ps", ("f32", "i32"): "vcvttps2dq",
    ("i32", "f32"): "vcvtdq2ps", ("f64", "i32"): "vcvttpd2dq", ("i32", "f64"): "vcvtdq2pd",
    ("f32", "i64"): "vcvttps2qq", ("i64", "f32"): "vcvtqq2ps", ("f64", "i64"): "vcvttpd2qq",
    ("i64", "f64"): "vcvtqq2pd", ("i32", "i64"): "vpmovsxdq", ("i64", "i32"): "vpmovqd"}
"""Each name takes the length of the wider side."""


def convert(s: Any, op: Op) -> None:
    value, result = op.operands[0], op.results[0]
    source, destination = dtype_of(value), dtype_of(result)
    if source.name == destination.name:
        _alias(s, op)
        return
    bits = max(bits_of(s, source), bits_of(s, destination))
    pair = (source.name, destination.name)
    row = s.vector(value)
    if s.facts.opmask or "i64" not in pair or pair == ("i32", "i64"):
        s.emit(f"{_CONVERSIONS[pair]}.{bits}", s.define(result), row)
    elif pair == ("i64", "i32"):
        narrow_mask(s, row, s.define(result))
    elif source.name == "i64":
        # One lane after the other: the instruction of all lanes came with AVX-512.
        _scalar_floats(s, lanes_out(s, row, 8), destination, s.define(result))
    else:
        if source.name == "f32":
            wide = s.new("vec")
            s.emit(f"vcvtps2pd.{bits}", wide, row)  # exact
            row = wide
        integers = []
        for part in quarters(s, row, bits):
            for number in range(2):
                if number:
                    upper = s.new("vec")
                    s.emit("vunpckhpd.128", upper, part, part)
                    part = upper
                register = s.new("gpr")
                s.emit("vcvttsd2si.64", register, part)
                integers.append(register)
        lanes_in(s, integers, 8, s.define(result))


def _scalar_floats(s: Any, integers: list[Any], dtype: DType, into: Any) -> None:
    """64-bit integers in general registers to a row of floats, each rounded once."""
    name = "vcvtsi2sd.64" if dtype.bits == 64 else "vcvtsi2ss.64"
    made = []
    for integer in integers:
        register = s.new("vec")
        s.emit("vxorps.128", register, register, register)
        s.emit(name, register, register, integer)
        made.append(register)
    if dtype.bits == 64:
        low, high = s.new("vec"), s.new("vec")
        s.emit("vunpcklpd.128", low, made[0], made[1])
        s.emit("vunpcklpd.128", high, made[2], made[3])
        insert_half(s, into, low, high, 256)
    else:
        low, high = s.new("vec"), s.new("vec")
        s.emit("vunpcklps.128", low, made[0], made[1])
        s.emit("vunpcklps.128", high, made[2], made[3])
        s.emit("vunpcklpd.128", into, low, high)


_BF16_KEYS: tuple[Key, ...] = (("s", 4, 1), ("s", 4, 0x7FFF), ("s", 4, 0x7FC00000))
_BF16_MASK: Key = ("s", 4, 0xFFFF0000)


def round_bfloat16(s: Any, row: Any) -> Any:
    """f32 row -> a fresh register whose upper halves are the bf16 nearest, ties to even; the lower halves are waste.

    vcvtneps2bf16 is not used: it takes denormals for 0 (SDM volume 2), which bf16 has. Adding 0x7fff and the last bit
    that is kept carries into it exactly where rounding up is due. NaN becomes the quiet NaN of its sign.
    """
    bits = s.facts.bits4
    letter = "d" if s.facts.opmask else ""
    odd, rounded = s.new("vec"), s.new("vec")
    s.emit(f"vpsrld.imm.{bits}", odd, row, 16)
    s.emit(f"vpand{letter}.{bits}", odd, odd, s.constant_operand(_BF16_KEYS[0]))
    s.emit(f"vpaddd.{bits}", odd, odd, s.constant_operand(_BF16_KEYS[1]))
    s.emit(f"vpaddd.{bits}", rounded, row, odd)
    # A NaN must not be carried to infinity: its own bits with the quiet bit set stand instead.
    quiet = s.new("vec")
    s.emit(f"vpor{letter}.{bits}", quiet, row, s.constant_operand(_BF16_KEYS[2]))
    if s.facts.opmask:
        nan = s.new("mask")
        s.emit(f"vcmpps.k.{bits}", nan, row, row, 3)
        s.emit_masked(f"vmovaps.{bits}", nan, False, rounded, quiet)
        return rounded
    nan, chosen = s.new("vec"), s.new("vec")
    s.emit(f"vcmpps.{bits}", nan, row, row, 3)
    s.emit(f"vblendvps.{bits}", chosen, rounded, quiet, nan)
    return chosen


def round_to(s: Any, op: Op) -> None:
    row = s.vector(op.operands[0])
    bits = s.facts.bits4
    if op.attributes["dtype"].name == "f16":
        half = s.new("vec")
        s.emit(f"vcvtps2ph.{bits}", half, row, 0)
        s.emit(f"vcvtph2ps.{bits}", s.define(op.results[0]), half)
        return
    rounded = round_bfloat16(s, row)
    s.emit(f"vpand{'d' if s.facts.opmask else ''}.{bits}", s.define(op.results[0]), rounded,
           s.constant_operand(_BF16_MASK))


# --- Between lanes ---------------------------------------------------------------------------------------------------

def shuffle_xor(s: Any, op: Op) -> None:
    value = op.operands[0]
    dtype = dtype_of(value)
    bits = bits_of(s, dtype)
    distance: int = op.attributes["distance"]
    per = 16 // (dtype.bits // 8)
    near, far = distance % per, distance // per
    row = s.vector(value)
    steps: list[tuple[str, tuple[int, ...]]] = []
    if near:
        # Within 128 bits, in units of 32.
        unit = near if dtype.bits == 32 else 2
        steps.append((f"vpshufd.{bits}", (sum(((i ^ unit) << (2 * i)) for i in range(4)),)))
    if far and bits == 256:
        steps.append((f"vpermq.imm.{bits}", (0x4E,)))
    elif far:
        steps.append((f"vshufi64x2.{bits}", (sum(((i ^ far) << (2 * i)) for i in range(4)),)))
    for number, (name, immediate) in enumerate(steps):
        register = s.define(op.results[0]) if number == len(steps) - 1 else s.new("vec")
        if name[:6] == "vshufi":
            s.emit(name, register, row, row, *immediate)
        else:
            s.emit(name, register, row, *immediate)
        row = register
    if not steps:
        s.emit(f"vmovaps.{bits}", s.define(op.results[0]), row)


def broadcast_lane(s: Any, op: Op) -> None:
    value = op.operands[0]
    dtype = dtype_of(value)
    bits = bits_of(s, dtype)
    lane: int = op.attributes["lane"]
    row = s.vector(value)
    register = s.define(op.results[0])
    single = dtype.bits == 32
    if lane == 0:
        s.emit(f"vbroadcast{'ss' if single else 'sd'}.{bits}", register, row)
    elif single and bits == 128:
        s.emit("vpshufd.128", register, row, lane * 0x55)
    elif not single and bits == 256:
        s.emit("vpermq.imm.256", register, row, lane * 0x55)
    else:
        # Permutes take the indices first and the row last.
        index = s.constant(index_key(s, [lane] * s.lanes, dtype.bits // 8))
        s.emit(f"vperm{'d' if single else 'q'}.{bits}", register, index, row)


def exchange(s: Any, op: Op) -> None:
    """One stage of a transposition. Where two registers shuffle into each half there is one instruction for each
    result, else each result is one of the operands with the other's lanes put in under a mask."""
    a, b = op.operands
    first, second = op.results
    dtype = dtype_of(a)
    bits = bits_of(s, dtype)
    distance_bytes = op.attributes["distance"] * dtype.bits // 8
    x, y = s.vector(a), s.vector(b)
    low, high = s.define(first), s.define(second)
    if low is x or low is y:  # the second result still needs it
        low = s.new("vec")
    opmask = s.facts.opmask
    if distance_bytes == 8:
        s.emit(f"vunpcklpd.{bits}", low, x, y)
        s.emit(f"vunpckhpd.{bits}", high, x, y)
    elif distance_bytes == 32 and bits == 512:
        s.emit("vinsertf64x4.512", low, x, y, 1)
        s.emit("vshuff64x2.512", high, x, y, 0xEE)
    elif distance_bytes == 16 and bits == 256:
        if opmask:
            s.emit("vinsertf32x4.256", low, x, y, 1)
            s.emit("vshuff64x2.256", high, x, y, 3)
        else:
            s.emit("vperm2f128.256", low, x, y, 0x20)
            s.emit("vperm2f128.256", high, x, y, 0x31)
    elif distance_bytes == 16:
        # 128-bit quarters: a0 b0 a2 b2, a1 b1 a3 b3.
        copy = s.new("vec") if high is x else high
        s.emit("vmovaps.512", low, x)
        s.emit_masked("vshuff64x2.512", s.constant(("k", 0xCC)), False, low, y, y, 0xA0)
        s.emit("vmovaps.512", copy, y)
        s.emit_masked("vshuff64x2.512", s.constant(("k", 0x33)), False, copy, x, x, 0xF5)
        if copy is not high:
            s.emit("vmovaps.512", high, copy)
    elif opmask:
        copy = s.new("vec") if high is x else high
        s.emit(f"vmovaps.{bits}", low, x)
        s.emit_masked(f"vmovsldup.{bits}", s.constant(("k", 0xAAAA)), False, low, y)
        s.emit(f"vmovaps.{bits}", copy, y)
        s.emit_masked(f"vmovshdup.{bits}", s.constant(("k", 0x5555)), False, copy, x)
        if copy is not high:
            s.emit(f"vmovaps.{bits}", high, copy)
    else:
        even, odd = s.new("vec"), s.new("vec")
        s.emit(f"vmovsldup.{bits}", even, y)
        s.emit(f"vmovshdup.{bits}", odd, x)
        s.emit(f"vblendps.{bits}", low, x, even, 0xAA)
        s.emit(f"vblendps.{bits}", high, odd, y, 0xAA)
    if low is not s.registers[first]:
        s.emit(f"vmovaps.{bits}", s.registers[first], low)


# --- Memory ----------------------------------------------------------------------------------------------------------

_WIDENING = {"i8": "vpmovsxbd", "u8": "vpmovzxbd", "bool": "vpmovzxbd", "i16": "vpmovsxwd", "bf16": "vpmovzxwd",
             "f16": "vcvtph2ps"}


def load(s: Any, op: Op) -> None:
    dtype = op.attributes["dtype"]
    name = dtype.name
    memory = s.address(op, 0)
    mask = op.operands[-1] if op.attributes.get("masked") else None
    result = op.results[0]
    facts = s.facts
    if name in FOLDED_DTYPES:
        bits = bits_of(s, dtype)
        if mask is None:
            s.emit(f"vmovups.{bits}", s.define(result), memory)
        elif facts.opmask:
            on = s.vector(mask)
            s.emit_masked(f"vmovups.{bits}" if dtype.bits == 32 else f"vmovupd.{bits}", on, True, s.define(result),
                          memory)
        elif dtype.bits == 32:
            on = s.vector(mask)
            s.emit(f"vmaskmovps.load.{bits}", s.define(result), on, memory)
        else:
            on = wide_mask(s, mask)
            s.emit(f"vmaskmovpd.load.{bits}", s.define(result), on, memory)
        return
    if name not in _WIDENING:
        raise ValueError(f"{s.location or s.function.name}: load of {name}: found no row for it; expected one of "
                         f"{sorted([*FOLDED_DTYPES, *_WIDENING])}; mend: load bytes and take them apart")
    bits = facts.bits4
    source = memory
    on = None
    if mask is not None:
        if facts.opmask:
            on = s.vector(mask)
        else:
            source = _load_narrow_lanes(s, dtype.size_bytes, memory, mask)
    widen(s, name, s.define(result), source, on)


def widen(s: Any, name: str, register: Any, source: Any, on: Any = None) -> None:
    """Narrow elements in memory or in a register to a row; under an opmask the others become 0."""
    bits = s.facts.bits4
    made = s.new("vec") if name == "bf16" else register
    if on is not None:
        s.emit_masked(f"{_WIDENING[name]}.{bits}", on, True, made, source)
    else:
        s.emit(f"{_WIDENING[name]}.{bits}", made, source)
    if name == "bf16":
        s.emit(f"vpslld.imm.{bits}", register, made, 16)


def moved(s: Any, memory: Any, bytes_: int) -> Any:
    """The same memory operand so many bytes further."""
    return s.memory(memory.base, memory.index, memory.scale, memory.disp + bytes_)


def for_each_lane(s: Any, mask: Value | None, body: Callable[[int], None]) -> None:
    """Code for lane 0, 1, ..., each jumped over if its lane is off. Without opmasks, or for what they can't do."""
    bits = None
    if mask is not None:
        on = s.vector(mask)
        bits = s.new("gpr")
        if s.facts.opmask:
            s.emit("kmovw.from_mask", bits, on)
        else:
            s.emit(f"vmovmskps.{s.facts.bits4}", bits, on)
    for lane in range(s.lanes):
        if bits is None:
            body(lane)
            continue
        after = s.new_label("lane")
        s.emit("test.32", bits, 1 << lane)
        s.branch("je", after)
        body(lane)
        s.label(after)


def _load_narrow_lanes(s: Any, size: int, memory: Any, mask: Value) -> Any:
    """Elements of 1 or 2 bytes at consecutive places, only those that are on; the others are 0."""
    register = s.new("vec")
    s.emit("vxorps.128", register, register, register)
    letter = "b" if size == 1 else "w"
    for_each_lane(s, mask, lambda lane: s.emit(f"vpinsr{letter}", register, register, moved(s, memory, lane * size),
                                               lane))
    return register


def load_splat(s: Any, op: Op) -> None:
    load_splat_into(s, op.attributes["dtype"].name, s.address(op, 0), s.define(op.results[0]))


def load_splat_into(s: Any, name: str, memory: Any, register: Any) -> None:
    bits = s.facts.bits4
    if name in ("f32", "i32", "b32"):
        s.emit(f"vbroadcastss.{bits}", register, memory)
    elif name in ("f64", "i64"):
        bits_of(s, _DTYPE64)
        s.emit(f"vbroadcastsd.{s.facts.bits8}", register, memory)
    elif name == "bf16":
        both = s.new("vec")
        s.emit(f"vpbroadcastw.{bits}", both, memory)
        s.emit(f"vpslld.imm.{bits}", register, both, 16)
    elif name == "f16":
        half = s.new("vec")
        s.emit(f"vpbroadcastw.{max(128, bits // 2)}", half, memory)
        s.emit(f"vcvtph2ps.{bits}", register, half)
    else:
        number = s.new("gpr")
        s.emit(_SCALAR_LOADS[name], number, memory)
        splat_register(s, number, register, 4, bits)


_DTYPE64 = DType("i64", "i", 64)


def narrow(s: Any, name: str, row: Any) -> Any:
    """A row of 32-bit lanes to packed elements of 1 or 2 bytes in the low part of a fresh register."""
    bits = s.facts.bits4
    made = s.new("vec")
    if name == "f16":
        s.emit(f"vcvtps2ph.{bits}", made, row, 0)
        return made
    if name == "bf16":
        rounded = round_bfloat16(s, row)
        row = s.new("vec")
        s.emit(f"vpsrld.imm.{bits}", row, rounded, 16)
    words = name in ("bf16", "i16")
    if s.facts.opmask:
        s.emit(f"vpmovd{'w' if words else 'b'}.{bits}", made, row)
        return made
    # The wanted bytes of each 128-bit part to its low end, then the parts side by side.
    packed = s.new("vec")
    order = [0, 1, 4, 5, 8, 9, 12, 13] if words else [0, 4, 8, 12]
    order += [0x80] * (16 - len(order))
    s.emit(f"vpshufb.{bits}", packed, row, s.constant_operand(("d", bytes(order) * (bits // 128))))
    if bits == 128:
        return packed
    if words:
        s.emit("vpermq.imm.256", made, packed, 0x08)
    else:
        high = s.new("vec")
        extract_half(s, high, packed, 256)
        s.emit("vpunpckldq.128", made, packed, high)
    return made


def store(s: Any, op: Op) -> None:
    value = op.operands[0]
    dtype = op.attributes["dtype"]
    name = dtype.name
    memory = s.address(op, 1)
    mask = op.operands[-1] if op.attributes.get("masked") else None
    streaming = bool(op.attributes.get("streaming")) and mask is None
    row = s.vector(value)
    facts = s.facts
    if name in FOLDED_DTYPES:
        bits = bits_of(s, dtype)
        if mask is None:
            s.emit(f"vmovntps.{bits}" if streaming else f"vmovups.{bits}", memory, row)
        elif facts.opmask:
            s.emit_masked(f"vmovups.{bits}" if dtype.bits == 32 else f"vmovupd.{bits}", s.vector(mask), False, memory,
                          row)
        elif dtype.bits == 32:
            s.emit(f"vmaskmovps.store.{bits}", memory, s.vector(mask), row)
        else:
            s.emit(f"vmaskmovpd.store.{bits}", memory, wide_mask(s, mask), row)
        return
    bits = facts.bits4
    size_bits = dtype.bits * s.lanes
    if facts.opmask and not (streaming and size_bits >= 128):
        if name == "bf16":
            rounded = round_bfloat16(s, row)
            row = s.new("vec")
            s.emit(f"vpsrld.imm.{bits}", row, rounded, 16)
        if name == "f16":
            instruction, more = f"vcvtps2ph.{bits}", (0,)
        else:
            instruction, more = f"vpmovd{'w' if dtype.bits == 16 else 'b'}.{bits}", ()  # type: ignore[assignment]
        if mask is None:
            s.emit(instruction, memory, row, *more)
        else:
            s.emit_masked(instruction, s.vector(mask), False, memory, row, *more)
        return
    made = narrow(s, name, row)
    if mask is not None:
        letter = "b" if dtype.bits == 8 else "w"
        for_each_lane(s, mask, lambda lane: s.emit(f"vpextr{letter}", moved(s, memory, lane * dtype.size_bytes), made,
                                                   lane))
    elif size_bits >= 128:
        s.emit(f"vmovntps.{size_bits}" if streaming else f"vmovups.{size_bits}", memory, made)
    else:
        s.emit("vmovq" if size_bits == 64 else "vmovd.from_vec", memory, made)


def store_lane0(s: Any, op: Op) -> None:
    value = op.operands[0]
    dtype = op.attributes["dtype"]
    memory = s.address(op, 1)
    row = s.vector(value)
    if dtype.name in FOLDED_DTYPES:
        s.emit("vmovd.from_vec" if dtype.bits == 32 else "vmovq", memory, row)
    elif dtype.name in ("bf16", "f16"):
        s.emit("vpextrw", memory, narrow(s, dtype.name, row), 0)
    else:
        s.emit("vpextrb" if dtype.bits == 8 else "vpextrw", memory, row, 0)


def gather(s: Any, op: Op) -> None:
    base, offsets = op.operands[:2]
    mask = op.operands[2] if op.attributes.get("masked") else None
    dtype = op.attributes["dtype"]
    name = dtype.name
    scale, disp = op.attributes.get("scale", 1), op.attributes.get("disp", 0)
    start, index = s.scalar(base), s.vector(offsets)
    result = op.results[0]
    facts = s.facts
    if name not in FOLDED_DTYPES:
        # Elements are narrower than any gather reads, and reading past them could fault: one lane after the other.
        registers = lanes_out(s, index, 4)
        letter, per = ("b", 16) if dtype.bits == 8 else ("w", 8)
        parts = []
        for _ in range(0, s.lanes, per):
            part = s.new("vec")
            s.emit("vxorps.128", part, part, part)
            parts.append(part)

        def one(lane: int) -> None:
            offset = s.new("gpr")
            s.emit("movsxd", offset, registers[lane])
            part = parts[lane // per]
            s.emit(f"vpinsr{letter}", part, part, s.memory(start, offset, scale, disp), lane % per)

        for_each_lane(s, mask, one)
        packed = parts[0]
        if len(parts) > 1:
            packed = s.new("vec")
            join(s, parts, packed)
        widen(s, name, s.define(result), packed)
        return
    bits = bits_of(s, dtype)
    suffix = "ps" if dtype.bits == 32 else "pd"
    # The destination is read (lanes that are off keep it), so it is zeroed: that also keeps it apart from the index,
    # which the instruction demands. The mask is used up.
    register = s.new("vec")
    s.emit("vxorps.128", register, register, register)
    memory = s.memory(start, index, scale, disp)
    if facts.opmask:
        on = s.new("mask")
        if mask is None:
            s.emit("kxnorw", on, on, on)
        else:
            s.emit("kmovq", on, s.vector(mask))
        s.emit_masked(f"vgatherd{suffix}.{bits}", on, False, register, memory)
    else:
        on = s.new("vec")
        if mask is None:
            s.emit(f"vpcmpeqd.{bits}", on, on, on)
        else:
            s.emit(f"vmovaps.{bits}", on, s.vector(mask) if dtype.bits == 32 else wide_mask(s, mask))
        s.emit(f"vgatherd{suffix}.vex.{bits}", register, memory, on)
    wanted = s.target.get(result)
    if wanted is None:
        s.registers[result] = register
    else:
        s.emit(f"vmovaps.{bits}", s.define(result), register)


def scatter(s: Any, op: Op) -> None:
    value, base, offsets = op.operands[:3]
    mask = op.operands[3] if op.attributes.get("masked") else None
    dtype = op.attributes["dtype"]
    scale, disp = op.attributes.get("scale", 1), op.attributes.get("disp", 0)
    start, index, row = s.scalar(base), s.vector(offsets), s.vector(value)
    facts = s.facts
    if facts.opmask and dtype.name in FOLDED_DTYPES:
        on = s.new("mask")
        if mask is None:
            s.emit("kxnorw", on, on, on)
        else:
            s.emit("kmovq", on, s.vector(mask))
        suffix = "ps" if dtype.bits == 32 else "pd"
        s.emit_masked(f"vscatterd{suffix}.{bits_of(s, dtype)}", on, False, s.memory(start, index, scale, disp), row)
        return
    registers = lanes_out(s, index, 4)
    size = dtype.size_bytes
    letter = {1: "b", 2: "w", 4: "d", 8: "q"}[size]
    if dtype.name in FOLDED_DTYPES:
        parts = quarters(s, row, bits_of(s, dtype))
    else:
        parts = quarters(s, narrow(s, dtype.name, row), max(128, dtype.bits * s.lanes))
    per = 16 // size

    def one(lane: int) -> None:
        offset = s.new("gpr")
        s.emit("movsxd", offset, registers[lane])
        s.emit(f"vpextr{letter}", s.memory(start, offset, scale, disp), parts[lane // per], lane % per)

    for_each_lane(s, mask, one)


def prefetch(s: Any, op: Op) -> None:
    s.emit(f"prefetcht{op.attributes.get('level', 1) - 1}", s.address(op, 0))


# --- Packed dot products ---------------------------------------------------------------------------------------------

def _dot(name: str, feature: str, commutative: bool) -> Rule:
    def rule(s: Any, op: Op) -> None:
        if not s.facts.opmask or feature not in s.facts.features:
            raise ValueError(f"{op.location or s.function.name}: lane op {op.name}: found a target without {feature}; "
                             "expected one that has it; mend: ask legal_ops(target) before lowering to it")
        accumulator, a, b = op.operands
        bits = s.facts.bits4
        if commutative and s.is_memory(a) and not s.is_memory(b):
            a, b = b, a
        last = s.operand(b)
        first = s.vector(a)
        register, place = s.tie(op.results[0], (accumulator,))
        if place < 0:
            if register is first or register is last:
                made = s.new("vec")
                bring(s, accumulator, made, bits)
                s.emit(f"{name}.{bits}", made, first, last)
                s.emit(f"vmovaps.{bits}", register, made)
                return
            bring(s, accumulator, register, bits)
        s.emit(f"{name}.{bits}", register, first, last)
    return rule


def asm(s: Any, op: Op) -> None:
    """A piece by hand writes its own instructions."""
    PIECES[op.attributes["by"]].select(s, op)


# --- Control ---------------------------------------------------------------------------------------------------------

_FUTEX, _FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 202, 128, 129
_ARRIVED, _GENERATION = 512, 516
"""Bytes from the sync block: how many workers have arrived (i32), and how often all have (i32)."""
_SPINS = 2000


def barrier(s: Any, op: Op) -> None:
    """The last to arrive resets the count, raises the generation and wakes the others; these watch the generation for
    some 2000 rounds, then sleep on it (futex). Alone there is nobody to wait for."""
    del op
    facts = s.facts
    after, last, spin = s.new_label("barrier"), s.new_label("barrier_last"), s.new_label("barrier_spin")
    sleep = s.new_label("barrier_sleep")
    sync, generation, arrived, spins = s.new("gpr"), s.new("gpr"), s.new("gpr"), s.new("gpr")
    s.emit("cmp.64", facts.workers, 1)
    s.branch("jle", after)
    s.emit("mov.64", sync, s.memory(facts.arguments, disp=16))
    # The generation is read before arriving: afterwards the last one may raise it at any moment.
    s.emit("mov.32", generation, s.memory(sync, disp=_GENERATION))
    s.emit("mov.32", arrived, 1)
    s.emit("lock.xadd.32", s.memory(sync, disp=_ARRIVED), arrived)
    s.emit("add.32", arrived, 1)
    s.emit("cmp.32", arrived, facts.workers)
    s.branch("je", last)
    s.emit("mov.32", spins, _SPINS)
    s.label(spin)
    s.emit("cmp.32", generation, s.memory(sync, disp=_GENERATION))
    s.branch("jne", after)
    s.emit("pause")
    s.emit("sub.32", spins, 1)
    s.branch("jne", spin)
    s.label(sleep)
    _futex(s, sync, _FUTEX_WAIT_PRIVATE, generation)
    s.emit("cmp.32", generation, s.memory(sync, disp=_GENERATION))
    s.branch("je", sleep)
    s.branch("jmp", after)
    s.label(last)
    s.emit("mov.32", s.memory(sync, disp=_ARRIVED), 0)
    s.emit("lock.add.32", s.memory(sync, disp=_GENERATION), 1)
    _futex(s, sync, _FUTEX_WAKE_PRIVATE, None)
    s.label(after)


def _futex(s: Any, sync: Any, operation: int, expected: Any) -> None:
    """futex(generation's address, operation, expected or INT_MAX, no timeout): the kernel keeps all registers but
    rax, rcx and r11."""
    s.emit("lea.64", s.physical("gpr", _RDI), s.memory(sync, disp=_GENERATION))
    s.emit("mov.32", s.physical("gpr", _RSI), operation)
    s.emit("mov.32", s.physical("gpr", _RDX), 0x7FFFFFFF if expected is None else expected)
    s.emit("mov.32", s.physical("gpr", _R10), 0)
    s.emit("mov.32", s.physical("gpr", _RAX), _FUTEX)
    s.emit("syscall")


def fence_streaming(s: Any, op: Op) -> None:
    del op
    s.emit("sfence")


def sync_lanes(s: Any, op: Op) -> None:
    """Nothing: a register is stored whole."""
    del s, op


# --- Tables ----------------------------------------------------------------------------------------------------------

RULES: dict[str, Rule] = {
    "arg": arg, "worker": worker, "workers": workers,
    "s_add": s_add, "s_sub": s_sub, "s_mul": s_mul, "s_min": _scalar_choice("l"), "s_max": _scalar_choice("g"),
    "s_and": _scalar_bits("and"), "s_or": _scalar_bits("or"), "s_xor": _scalar_bits("xor"),
    "s_shl": _scalar_shift("shl"), "s_shr": _scalar_shift("shr"), "s_sar": _scalar_shift("sar"),
    "s_floordiv": s_floordiv, "s_mod": s_mod, "s_cmp": s_cmp, "s_select": s_select, "s_load": s_load,
    "s_store": s_store,
    "splat": splat, "iota": iota, "lookup": lookup, "lane0": lane0,
    "add": _arithmetic("add", "add", True), "sub": _arithmetic("sub", "sub", False),
    "mul": _arithmetic("mul", "mull", True), "min": _arithmetic("min", "mins", False),
    "max": _arithmetic("max", "maxs", False), "div": div, "fma": fma, "neg": neg, "abs": absolute, "sqrt": sqrt,
    "floor": _rounding(9), "ceil": _rounding(10), "round": _rounding(8), "trunc": _rounding(11),
    "scale_exponent": scale_exponent, "asm": asm, "and": _bitwise("and"), "or": _bitwise("or"), "xor": _bitwise("xor"),
    "not": bit_not, "shl": _shift("sll"), "shr": _shift("srl"), "sar": _shift("sra"),
    "idiv": _division(False), "imod": _division(True),
    "cmp": compare, "select": select, "mask_first": mask_first, "mask_and": _mask_binary("and"),
    "mask_or": _mask_binary("or"), "mask_xor": _mask_binary("xor"), "mask_not": mask_not, "mask_any": _mask_test,
    "mask_all": _mask_test, "mask_to_row": mask_to_row,
    "cvt": convert, "bitcast": _alias, "round_to": round_to,
    "shuffle_xor": shuffle_xor, "broadcast_lane": broadcast_lane, "exchange": exchange,
    "load": load, "load_splat": load_splat, "gather": gather, "store": store, "store_lane0": store_lane0,
    "scatter": scatter, "prefetch": prefetch,
    "dot2_bf16": _dot("vdpbf16ps", "avx512_bf16", True), "dot4_u8i8": _dot("vpdpbusd", "avx512_vnni", False),
    "barrier": barrier, "fence_streaming": fence_streaming, "sync_lanes": sync_lanes,
}


def _exchange_constants(s: Any, op: Op) -> tuple[Key, ...]:
    if not s.facts.opmask:
        return ()
    dtype = dtype_of(op.operands[0])
    distance_bytes = op.attributes["distance"] * dtype.bits // 8
    if distance_bytes == 4:
        return (("k", 0xAAAA), ("k", 0x5555))
    if distance_bytes == 16 and bits_of(s, dtype) == 512:
        return (("k", 0xCC), ("k", 0x33))
    return ()


def _rounding_constants(s: Any, op: Op) -> tuple[Key, ...]:
    if op.attributes["dtype"].name != "bf16":
        return ()
    return (*_BF16_KEYS, _BF16_MASK) if op.name == "round_to" else _BF16_KEYS


def _sign_constants(s: Any, op: Op) -> tuple[Key, ...]:
    dtype = dtype_of(op.operands[0])
    if dtype.name not in _FLOAT:
        return (_ZERO4,)
    return (_sign_key(dtype) if op.name == "neg" else _magnitude_key(dtype),)


OWN_CONSTANTS: dict[str, Callable[[Any, Op], tuple[Key, ...]]] = {
    "lookup": lambda s, op: (_table_key(op),),
    "exchange": _exchange_constants, "round_to": _rounding_constants, "store": _rounding_constants,
    "neg": _sign_constants, "abs": _sign_constants, "not": lambda s, op: (_ONES,),
    "mask_to_row": lambda s, op: (("s", 4, 1),) if s.facts.opmask else (),
}
"""Constants that the rules of these ops use: they are worth a register in a loop."""
