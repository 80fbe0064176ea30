"""Selection rules of x86-64: one small function for each lane op, and what the neutral driver asks of a target.

Enters: a lane op and the driver (`s`, sapper/codegen/select.py: Selector), which knows where values are. Leaves:
instructions, through `s.emit`. The rules stand by concern in the modules select_*.py, each with its own table. Holds:
two machines are served, told apart by one fact, `opmask`:
  with AVX-512 (F, BW, DQ, VL): up to 512 bits, 32 vector registers, a mask is an opmask register whose bits from
      `lanes` on are 0, and memory operands may broadcast one element;
  with AVX2 and FMA: up to 256 bits, 16 vector registers, a mask is a vector register of 32-bit lanes, all ones or 0.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

from ...ir.nodes import Value
from ...lane.nans import short_nans
from ..rule_tables import joined
from . import (
    select_arithmetic,
    select_control,
    select_conversions,
    select_dots,
    select_lanes,
    select_masks,
    select_memory,
    select_scalars,
    select_tiles,
)
from .instructions import ROWS as ROWS
from .registers import RDI, RDX, RSI
from .select_common import FOLDED_DTYPES as FOLDED_DTYPES
from .select_common import Key, OwnConstants, Rule, dtype_of
from .select_common import constant_key as constant_key
from .select_common import constant_kind as constant_kind
from .select_common import constant_memory as constant_memory
from .select_common import constant_room as constant_room
from .select_common import is_cheap as is_cheap
from .select_common import load_immediate as load_immediate
from .select_common import make_constant as make_constant
from .select_common import move as move
from .select_control import after_task as after_task
from .select_control import before_tasks as before_tasks
from .select_control import next_task as next_task
from .select_scalars import add_immediate as add_immediate
from .select_scalars import add_register as add_register
from .select_scalars import branch_unless as branch_unless
from .select_scalars import compare_branch as compare_branch
from .select_scalars import jump as jump
from .select_scalars import subtract_branch as subtract_branch
from .select_scalars import subtract_register as subtract_register

FAMILY = "x86_64"

_BINARY_BOTH = frozenset([0, 1])
_BINARY_SECOND = frozenset([1])
_FOLDS = {"add": _BINARY_BOTH, "mul": _BINARY_BOTH, "and": _BINARY_BOTH, "or": _BINARY_BOTH, "xor": _BINARY_BOTH,
          "sub": _BINARY_SECOND, "div": _BINARY_SECOND, "min": _BINARY_SECOND, "max": _BINARY_SECOND,
          "cmp": _BINARY_BOTH, "fma": frozenset([0, 1, 2]), "dot2_bf16": frozenset([1, 2]),
          "dot4_u8i8": frozenset([2]), "dot2_i16": frozenset([1, 2]), "pairs_u8i8": _BINARY_SECOND,
          "add_i16": _BINARY_SECOND, "max_u8": _BINARY_SECOND, "widen_float8": frozenset([0]), "sqrt": frozenset([0]),
          "floor": frozenset([0]), "ceil": frozenset([0]),
          "trunc": frozenset([0]), "round": frozenset([0]), "fraction": frozenset([0])}

SUMS_IN_MEMORY = frozenset([32, 64])
"""Bits of the integers that an instruction adds to in memory."""

ABSORBS_SIGN = frozenset(["fma"])
"""Ops that take the negation of any operand for nothing (vfnmadd, vfmsub, vfnmsub)."""

TAKES_LANE: dict[str, tuple[int, ...]] = {}
"""Operands that may be one lane of a register."""

TIED = {"fma": (2, 0, 1), "dot2_bf16": (0,), "dot4_u8i8": (0,), "dot2_i16": (0,), "tile_multiply": (0,),
        "copy_sign": (0,), "s_add": (0, 1), "s_sub": (0,), "s_mul": (0, 1), "s_and": (0, 1), "s_or": (0, 1),
        "s_xor": (0, 1), "s_shl": (0,), "s_shr": (0,), "s_sar": (0,), "s_min": (0, 1), "s_max": (0, 1)}
"""Operands that an instruction may overwrite with its result."""


_OPMASK_FEATURES = frozenset(["avx512f", "avx512bw", "avx512dq", "avx512vl"])


class Facts:
    """What selection needs to know of one target, and what it notes for one function.

    opmask: AVX-512. bits4, bits8: register bits of a row of 4- and 8-byte elements. most_folded_splats: how many
    broadcast operands cost no more than one broadcast load into a register: each takes a load slot of its own, but
    the register's load is one more instruction and holds a register meanwhile. Where two multiply-adds go in a cycle,
    loads are what is short: Ice Lake runs 1.1 in a cycle with a broadcast operand each, 2.0 with one load for two.
    folded_loads: see `Target`. opposite: masks that are off where what they were made of holds, and choose so.
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
        self.folded_loads: float = target.folded_loads if self.opmask else 0
        lanes: int = s.lanes
        self.bits4, self.bits8 = 32 * lanes, 64 * lanes
        if lanes & (lanes - 1) or not 128 <= self.bits4 <= self.vector_bits:
            raise ValueError(f"lanes of function {s.function.name}: found {lanes}; expected a power of two from 4 to "
                             f"{self.vector_bits // 32} on this target; mend: lower for that many lanes")
        self.function = s.function
        self.keys: dict[Value, Key] = {}
        self.wide_masks: dict[Value, Any] = {}
        self.opposite: set[Value] = set()
        self.arguments: Any = None
        self.worker: Any = None
        self.workers: Any = None

    @cached_property
    def short_nans(self) -> bool:
        """Whether rounding to bf16 needs no care of NaN. Where an instruction rounds, other ways are rare, and always
        take care."""
        return "avx512_bf16" not in self.features and short_nans(self.function)

    def is_choice(self, mask: Value, uses: int) -> bool:
        """Whether all that is made of a mask are choices between two rows of 32-bit lanes."""
        return self._choices[mask] == uses > 0

    @cached_property
    def _choices(self) -> Counter[Value]:
        return Counter(op.operands[0] for op in self.function.walk()
                       if op.name == "select" and dtype_of(op.result).bits == 32)


def facts_of(s: Any, target: Any) -> Facts:
    return Facts(s, target)


def legal_ops(target: Any) -> frozenset[str]:
    """Lane ops with instructions of their own here, among those that not every target has."""
    features = frozenset(target.features)
    legal = {"round", "floor", "ceil", "trunc", "float8", "dot2_i16", "pairs_u8i8", "add_i16", "widen_bytes",
             "interleave"}
    if features >= _OPMASK_FEATURES:
        legal |= {"scale_exponent", "lookup", "fraction", "copy_sign"}
    else:
        legal.add("lookup_by_halves")
    if "avx512_bf16" not in features:
        legal.add("pack2")
    if target.float8_rows > 1:
        legal.add("widen_float8")
    if target.float8_rows == 2:
        legal.add("max_u8")
    if target.tiles is not None:
        legal |= {"tile_configure", "tile_release", "tile_zero", "tile_load", "tile_store", "tile_multiply",
                  "tile_wake"}
    if "dot2_bf16" in target.dots:
        legal |= {"dot2_bf16", "pack_bf16", "concat_bf16", "is_denormal", "any_zero_bf16"}
    if select_dots.vnni(features, features >= _OPMASK_FEATURES) is not None:
        legal.add("dot4_u8i8")
    return frozenset(legal)


def register_file(target: Any) -> Any:
    """The registers that allocation may use on this target."""
    from .allocation import register_file as registers

    opmask = frozenset(target.features) >= _OPMASK_FEATURES
    return registers(512 if opmask else 256, opmask, "amx_tile" in target.features)


def folds(s: Any) -> dict[str, frozenset[int]]:
    return _FOLDS

def begin(s: Any) -> None:
    """Take over the arguments (System V: rdi args block, rsi worker, rdx workers), those that are needed."""
    needed = s.names
    facts = s.facts
    if needed & {"arg", "tasks", "barrier"}:
        facts.arguments = s.new("gpr")
        s.emit("mov.64", facts.arguments, s.physical("gpr", RDI))
    if needed & {"worker", "tasks"}:
        facts.worker = s.new("gpr")
        s.emit("mov.64", facts.worker, s.physical("gpr", RSI))
    if needed & {"workers", "tasks", "barrier"}:
        facts.workers = s.new("gpr")
        s.emit("mov.64", facts.workers, s.physical("gpr", RDX))


def finish(s: Any) -> None:
    s.location = None
    s.emit("ret")

# --- Tables ----------------------------------------------------------------------------------------------------------

RULES: dict[str, Rule] = joined(FAMILY, (module.RULES for module in (
    select_arithmetic, select_control, select_conversions, select_dots, select_lanes, select_masks, select_memory,
    select_scalars, select_tiles)))

OWN_CONSTANTS: dict[str, OwnConstants] = joined(FAMILY, (module.OWN_CONSTANTS for module in (
    select_arithmetic, select_conversions, select_dots, select_lanes, select_masks, select_memory, select_scalars)))
"""Constants that the rules of these ops use: they are worth a register in a loop."""
