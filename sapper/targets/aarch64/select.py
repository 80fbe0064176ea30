"""Selection rules of AArch64: one small function for each lane op, and what the neutral driver asks of a target.

Enters: a lane op and the driver (`s`, sapper/codegen/select.py: Selector), which knows where values are. Leaves:
instructions, through `s.emit`. The rules stand by concern in the modules select_*.py, each with its own table.
Holds: arithmetic is on registers, an address is a register and a number, and a mask is a vector of 32-bit lanes, all
ones or 0.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from ...ir.nodes import Value
from ...lane.nans import short_nans
from ..rule_tables import joined
from . import select_arithmetic, select_control, select_memory, select_scalars
from .abi import ARGUMENTS
from .instructions import ROWS as ROWS
from .select_arithmetic import MATRICES
from .select_common import Key, OwnConstants, Rule
from .select_common import constant_key as constant_key
from .select_common import constant_kind as constant_kind
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

FAMILY = "aarch64"

FOLDED_DTYPES: frozenset[str] = frozenset()
"""No load becomes an operand of arithmetic."""

SUMS_IN_MEMORY: frozenset[int] = frozenset()
"""Bits of the integers that an instruction adds to in memory."""

ABSORBS_SIGN = frozenset(["fma"])
"""Ops that take the negation of a factor for nothing (fmls)."""

_DOTS = ("dot4_i8i8", "dot4_u8u8", "dot4_u8i8", "dot2_bf16")
TAKES_LANE = {"fma": (0, 1), **dict.fromkeys(_DOTS, (1, 2))}
"""Operands of which one may be a lane of a register, for nothing (fmla and sdot by element)."""

TIED = {"fma": (2,), **dict.fromkeys((*_DOTS, *MATRICES), (0,)), "copy_sign": (0,),
        "select": (1, 2), "min": (0, 1), "max": (0, 1)}
"""Operands that an instruction may overwrite with its result."""


class Facts:
    """What selection needs to know of one target, and what it notes for one function.

    narrow: the arrangement of rows of 32-bit elements. has_bfloat16: an instruction rounds to bf16.
    """

    def __init__(self, s: Any, target: Any) -> None:
        self.features: frozenset[str] = target.features
        self.has_bfloat16 = "bf16" in self.features
        self.vector_registers: int = target.vector_registers
        self.mask_kind = self.wide_kind = "vec"
        self.indexed_addresses: bool = target.indexed_addresses
        self.loop_align_bytes = 16
        self.most_folded_splats = 0
        self.folded_loads = 0
        if s.lanes not in (2, 4):
            raise ValueError(f"lanes of function {s.function.name}: found {s.lanes}; expected 4, or 2 of 64-bit "
                             "elements; mend: lower for that many lanes")
        self.narrow = "4s" if s.lanes == 4 else "2s"
        self.function = s.function
        self.keys: dict[Value, Key] = {}
        self.arguments: Any = None
        self.worker: Any = None
        self.workers: Any = None

    @cached_property
    def short_nans(self) -> bool:
        """Whether rounding to bf16 needs no care of NaN."""
        return short_nans(self.function)


def facts_of(s: Any, target: Any) -> Facts:
    return Facts(s, target)


def legal_ops(target: Any) -> frozenset[str]:
    """Lane ops with instructions of their own here, among those that not every target has."""
    legal = {"round", "floor", "ceil", "trunc", "copy_sign"}
    if target.has("dotprod"):
        legal |= {"dot4_i8i8", "dot4_u8u8"}
    if target.has("i8mm"):
        legal |= {"dot4_u8i8", "interleave"}
    if target.has("bf16"):
        legal |= {"dot2_bf16", "interleave", "pack_bf16"}
    if legal >= {"dot4_u8i8", "dot2_bf16"}:
        legal |= set(MATRICES)
    return frozenset(legal)


def register_file(target: Any) -> Any:
    """The registers that allocation may use on this target."""
    from .allocation import register_file as registers

    del target
    return registers()


def folds(s: Any) -> dict[str, frozenset[int]]:
    """No operand stands in memory."""
    del s
    return {}


def begin(s: Any) -> None:
    """Take over the arguments (x0 args block, x1 worker, x2 workers), those that are needed."""
    needed, facts = s.names, s.facts
    for number, name, ops in zip(ARGUMENTS, ("arguments", "worker", "workers"), (
            {"arg", "tasks", "barrier"}, {"worker", "tasks"}, {"workers", "tasks", "barrier"}), strict=False):
        if needed & ops:
            register = s.new("gpr")
            setattr(facts, name, register)
            s.emit("mov.64", register, s.physical("gpr", number))


def finish(s: Any) -> None:
    s.location = None
    s.emit("ret")


_MODULES = (select_arithmetic, select_control, select_memory, select_scalars)
RULES: dict[str, Rule] = joined(FAMILY, (module.RULES for module in _MODULES))

OWN_CONSTANTS: dict[str, OwnConstants] = joined(FAMILY, (
    module.OWN_CONSTANTS for module in (select_arithmetic, select_memory)))
"""Constants that the rules of these ops use: they are worth a register in a loop."""
