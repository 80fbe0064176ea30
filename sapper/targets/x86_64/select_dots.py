"""Selection rules of x86-64: packed dot products, and what they are made of where no instruction is one of bytes.

See select.py. VNNI has an instruction for four bytes, or two words, and its sum, in two encodings of which a processor
has either or both: EVEX (AVX512-VNNI) and VEX (AVX-VNNI). AVX2 and AVX-512BW multiply pairs (vpmaddwd, vpmaddubsw); the
sum takes an addition more. Source: Intel SDM volume 2.
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op, Value
from .select_common import Key, OwnConstants, Rule
from .select_lanes import bring
from .select_masks import is_zero

_EVEN_BYTES: Key = ("s", 4, 0x00FF00FF)


def vnni(features: frozenset[str], opmask: bool) -> str | None:
    """What the names of VNNI's rows end in before their size, or None where these features lack it."""
    if opmask:
        return "" if "avx512_vnni" in features else None
    return ".vex" if "avx_vnni" in features else None


def _accumulate(s: Any, op: Op, name: str, commutative: bool) -> None:
    """One instruction that adds to its destination; its last operand may be memory."""
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


def _lacks(s: Any, op: Op, feature: str) -> ValueError:
    return ValueError(f"{op.location or s.function.name}: lane op {op.name}: found a target without {feature}; "
                      "expected one that has it; mend: ask legal_ops(target) before lowering to it")


def dot_bf16(s: Any, op: Op) -> None:
    if not s.facts.opmask or "avx512_bf16" not in s.facts.features:
        raise _lacks(s, op, "avx512_bf16")
    _accumulate(s, op, "vdpbf16ps", True)


def dot_bytes(s: Any, op: Op) -> None:
    form = vnni(s.facts.features, s.facts.opmask)
    if form is None:
        raise _lacks(s, op, "avx512_vnni" if s.facts.opmask else "avx_vnni")
    _accumulate(s, op, f"vpdpbusd{form}", False)


def _whole(s: Any, value: Value) -> Any:
    """The last operand of an instruction that spreads no element of memory over its lanes."""
    spread = s.facts.opmask and s.is_memory(value) and value.op is not None and value.op.name != "load"
    return s.vector(value) if spread else s.operand(value)


def dot_words(s: Any, op: Op) -> None:
    form = vnni(s.facts.features, s.facts.opmask)
    if form is not None:
        _accumulate(s, op, f"vpdpwssd{form}", True)
        return
    total, a, b = op.operands
    bits = s.facts.bits4
    if s.is_memory(a) and not s.is_memory(b):
        a, b = b, a
    last, first = _whole(s, b), s.vector(a)
    if is_zero(s, total):
        s.emit(f"vpmaddwd.{bits}", s.define(op.results[0]), first, last)
        return
    products = s.new("vec")
    s.emit(f"vpmaddwd.{bits}", products, first, last)
    added = s.vector(total)
    s.emit(f"vpaddd.{bits}", s.define(op.results[0]), added, products)


def _pairs(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        last, first = _whole(s, op.operands[1]), s.vector(op.operands[0])
        s.emit(f"{name}.{s.facts.bits4}", s.define(op.results[0]), first, last)
    return rule


def widen_bytes(s: Any, op: Op) -> None:
    """The upper bytes of words by one shift; the lower ones by a mask, or shifted up first, for their sign."""
    bits, signed = s.facts.bits4, op.attributes["dtype"].name == "i8"
    row = s.vector(op.operands[0])
    if not op.attributes["odd"]:
        if not signed:
            mask = s.constant_operand(_EVEN_BYTES)
            s.emit(f"vpand{'d' if s.facts.opmask else ''}.{bits}", s.define(op.results[0]), row, mask)
            return
        raised = s.new("vec")
        s.emit(f"vpsllw.imm.{bits}", raised, row, 8)
        row = raised
    s.emit(f"vps{'ra' if signed else 'rl'}w.imm.{bits}", s.define(op.results[0]), row, 8)


def _mask_of_bytes(s: Any, op: Op) -> tuple[Key, ...]:
    return () if op.attributes["odd"] or op.attributes["dtype"].name == "i8" else (_EVEN_BYTES,)


RULES: dict[str, Rule] = {
    "dot2_bf16": dot_bf16, "dot4_u8i8": dot_bytes, "dot2_i16": dot_words, "pairs_u8i8": _pairs("vpmaddubsw"),
    "add_i16": _pairs("vpaddw"), "max_u8": _pairs("vpmaxub"), "widen_bytes": widen_bytes,
}

OWN_CONSTANTS: dict[str, OwnConstants] = {"widen_bytes": _mask_of_bytes}
