"""Selection rules of PTX: 64-bit scalars, what a launch and a worker are told, integers divided.

See select.py. Floor division of rows is that of scalars.
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op
from ...lane.ops import FIRST_WORDS
from .select_common import Rule, low_half, scalar, settle
from .select_control import predicate


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


def s_cmp(s: Any, op: Op) -> None:
    made = s.new("pred")
    s.emit(f"setp.{op.attributes['cond']}.s64", made, *(scalar(s, v) for v in op.operands))
    s.emit("selp.b64", s.define(op.results[0]), 1, 0, made)


def s_select(s: Any, op: Op) -> None:
    condition, a, b = op.operands
    made = predicate(s, condition)
    first, second = scalar(s, a), scalar(s, b)
    s.emit("selp.b64", s.define(op.results[0]), first, second, made)


RULES: dict[str, Rule] = {
    "arg": arg, "worker": worker, "workers": workers,
    "s_add": _scalar_binary("add.s64"), "s_sub": _scalar_binary("sub.s64"), "s_mul": _scalar_binary("mul.lo.s64"),
    "s_min": _scalar_binary("min.s64"), "s_max": _scalar_binary("max.s64"), "s_and": _scalar_binary("and.b64"),
    "s_or": _scalar_binary("or.b64"), "s_xor": _scalar_binary("xor.b64"), "s_shl": _scalar_shift("shl.b64"),
    "s_shr": _scalar_shift("shr.u64"), "s_sar": _scalar_shift("shr.s64"), "s_floordiv": _scalar_division(False),
    "s_mod": _scalar_division(True), "s_cmp": s_cmp, "s_select": s_select,
}
