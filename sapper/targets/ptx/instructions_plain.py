"""Rows on the registers of one lane, plain loads and stores, and branches.

Source: PTX ISA, sections "Integer Arithmetic Instructions", "Floating Point Instructions", "Half Precision ...",
"Comparison and Selection", "Logic and Shift", "Data Movement and Conversion", "Control Flow".
"""

from __future__ import annotations

from typing import Any

from . import meaning as m
from .meaning import RowMeaning
from .rows import Row, make_row

ROWS: list[Row] = []


def row(name: str, syntax: str, operands: str, meaning: RowMeaning | None, **more: Any) -> None:
    ROWS.append(make_row(name, syntax, operands, meaning, **more))


_INTEGERS = "u16 u32 u64 s16 s32 s64"
_SIGNED = "s16 s32 s64"
_BITS = "b16 b32 b64"
_ROUND = "rn rz rm rp"
Pairs = tuple[tuple[str, RowMeaning], ...]
_HALF = "f16 f16x2 bf16 bf16x2"
_BF16_ARITHMETIC = {"bf16": "7.8 sm_90", "bf16x2": "7.8 sm_90"}
_BF16_INSTEAD = {"bf16": "fma.rn with a factor of 1.0, or cvt to f32", "bf16x2": "fma.rn.bf16x2 with a factor of 1.0"}
_PACKED16 = {"u16x2": "8.0 sm_90", "s16x2": "8.0 sm_90"}


def _integers() -> None:
    section = "Integer Arithmetic Instructions"
    sums: Pairs = (("add", m.add), ("sub", m.sub))
    extremes: Pairs = (("min", m.minimum), ("max", m.maximum))
    for name, meaning in sums:
        row(name, f"{name}.type", "w:type r:type r:type", meaning, type=_INTEGERS, section=section)
        row(f"{name}.sat", f"{name}.sat.s32", "w:s32 r:s32 r:s32", meaning, section=section)
    row("add.packed", "add.type", "w:type r:type r:type", m.add, type="u16x2 s16x2", needs=_PACKED16, section=section,
        instead="prmt and two additions")
    row("mul", "mul.part.type", "w:type r:type r:type", m.mul, part="lo hi", type=_INTEGERS, section=section)
    row("mul.wide", "mul.wide.type", "w:type+ r:type r:type", m.mul, type="u16 u32 s16 s32", section=section)
    row("mad", "mad.part.type", "w:type r:type r:type r:type", m.mad, part="lo hi", type=_INTEGERS, section=section)
    row("mad.wide", "mad.wide.type", "w:type+ r:type r:type r:type+", m.mad, type="u16 u32 s16 s32", section=section)
    row("mad.sat", "mad.hi.sat.s32", "w:s32 r:s32 r:s32 r:s32", m.mad, section=section)
    row("mul24", "mul24.part.type", "w:type r:type r:type", m.mul24, part="lo hi", type="u32 s32", section=section)
    row("mad24", "mad24.part.type", "w:type r:type r:type r:type", m.mad24, part="lo hi", type="u32 s32",
        section=section)
    row("div", "div.type", "w:type r:type r:type", m.div, type=_INTEGERS, section=section)
    row("rem", "rem.type", "w:type r:type r:type", m.rem, type=_INTEGERS, section=section)
    row("abs", "abs.type", "w:type r:type", m.absolute, type=_SIGNED, section=section)
    row("neg", "neg.type", "w:type r:type", m.negate, type=_SIGNED, section=section)
    for name, meaning in extremes:
        row(name, f"{name}.type", "w:type r:type r:type", meaning, type=_INTEGERS, section=section)
        row(f"{name}.packed", f"{name}.type", "w:type r:type r:type", meaning, type="u16x2 s16x2", needs=_PACKED16,
            instead="two operations on halves", section=section)
        row(f"{name}.packed.relu", f"{name}.relu.s16x2", "w:s16x2 r:s16x2 r:s16x2", meaning, needs="8.0 sm_90",
            instead="two operations on halves", section=section)
        row(f"{name}.relu", f"{name}.relu.s32", "w:s32 r:s32 r:s32", meaning, needs="8.0 sm_90", section=section,
            instead="max with 0")
    row("sad", "sad.type", "w:type r:type r:type r:type", m.sad, type=_INTEGERS, section=section)
    row("popc", "popc.type", "w:u32 r:type", m.popc, type="b32 b64", section=section)
    row("clz", "clz.type", "w:u32 r:type", m.clz, type="b32 b64", section=section)
    row("bfind", "bfind{.shiftamt}.type", "w:u32 r:type", m.bfind, type="u32 u64 s32 s64", section=section)
    row("fns", "fns.b32", "w:b32 r:b32 r:b32 r:s32", m.fns, section=section)
    row("brev", "brev.type", "w:type r:type", m.brev, type="b32 b64", section=section)
    row("bfe", "bfe.type", "w:type r:type r:u32 r:u32", m.bfe, type="u32 u64 s32 s64", section=section)
    row("bfi", "bfi.type", "w:type r:type r:type r:u32 r:u32", m.bfi, type="b32 b64", section=section)
    row("szext", "szext.mode.type", "w:type r:type r:u32", m.szext, mode="clamp wrap", type="u32 s32",
        needs="7.6 sm_80", section=section)
    row("bmsk", "bmsk.mode.b32", "w:b32 r:u32 r:u32", m.bmsk, mode="clamp wrap", needs="7.6 sm_80", section=section)
    for count in (2, 4):
        row(f"vabsdiff{count}", f"vabsdiff{count}.dtype.atype.btype{{.add}}", "w:dtype r:atype r:btype r:dtype",
            m.vabsdiff, dtype="u32 s32", atype="u32 s32", btype="u32 s32", section="Video Instructions")
    row("dp4a", "dp4a.atype.btype", "w:b32 r:b32 r:b32 r:b32", m.dp4a, atype="u32 s32", btype="u32 s32",
        section=section)
    row("dp2a", "dp2a.part.atype.btype", "w:b32 r:b32 r:b32 r:b32", m.dp2a, part="lo hi", atype="u32 s32",
        btype="u32 s32", section=section)


def _carries() -> None:
    """Rows that pass a carry in the condition code, which each thread has one of."""
    common: dict[str, Any] = {"type": "u32 s32 u64 s64", "unit": "carry",
                              "section": "Extended-Precision Integer Arithmetic Instructions"}
    for name in ("add", "sub"):
        row(f"{name}.cc", f"{name}.cc.type", "w:type r:type r:type", None, **common)
        row(f"{name}c", f"{name}c{{.cc}}.type", "w:type r:type r:type", None, **common)
    row("mad.cc", "mad.part.cc.type", "w:type r:type r:type r:type", None, part="lo hi", **common)
    row("madc", "madc.part{.cc}.type", "w:type r:type r:type r:type", None, part="lo hi", **common)


def _floats() -> None:
    section = "Floating Point Instructions"
    binary: Pairs = (("add", m.float_add), ("sub", m.float_sub), ("mul", m.float_mul))
    unary: Pairs = (("abs", m.float_abs), ("neg", m.float_neg))
    extremes: Pairs = (("min", m.minimum), ("max", m.maximum))
    for name, meaning in binary:
        row(f"{name}.f32", f"{name}{{.rnd}}{{.ftz}}{{.sat}}.f32", "w:f32 r:f32 r:f32", meaning, rnd=_ROUND,
            section=section)
        row(f"{name}.f64", f"{name}{{.rnd}}.f64", "w:f64 r:f64 r:f64", meaning, rnd=_ROUND, section=section)
        row(f"{name}.f32x2", f"{name}{{.rnd}}{{.ftz}}.f32x2", "w:f32x2 r:f32x2 r:f32x2", meaning, rnd=_ROUND,
            needs="8.6 sm_100", instead="two operations on f32", section=section)
        row(f"{name}.half", f"{name}{{.rnd}}{{.ftz}}{{.sat}}.type", "w:type r:type r:type", meaning, rnd="rn",
            type="f16 f16x2", section=section)
        row(f"{name}.bf16", f"{name}{{.rnd}}.type", "w:type r:type r:type", meaning, rnd="rn", type="bf16 bf16x2",
            needs=_BF16_ARITHMETIC, instead=_BF16_INSTEAD, section=section)
    row("fma.f32", "fma.rnd{.ftz}{.sat}.f32", "w:f32 r:f32 r:f32 r:f32", m.float_fma, rnd=_ROUND, section=section)
    row("mad.f32", "mad.rnd{.ftz}{.sat}.f32", "w:f32 r:f32 r:f32 r:f32", m.float_fma, rnd=_ROUND, section=section)
    row("fma.f64", "fma.rnd.f64", "w:f64 r:f64 r:f64 r:f64", m.float_fma, rnd=_ROUND, section=section)
    row("fma.f32x2", "fma.rnd{.ftz}.f32x2", "w:f32x2 r:f32x2 r:f32x2 r:f32x2", m.float_fma, rnd=_ROUND,
        needs="8.6 sm_100", instead="two fma.f32", section=section)
    row("fma.half", "fma.rn{.ftz}{.sat}.type", "w:type r:type r:type r:type", m.float_fma, type="f16 f16x2",
        section=section)
    row("fma.relu", "fma.rn{.ftz}.relu.type", "w:type r:type r:type r:type", m.float_fma, type="f16 f16x2",
        section=section)
    row("fma.bf16", "fma.rn{.relu}.type", "w:type r:type r:type r:type", m.float_fma, type="bf16 bf16x2",
        section=section)
    row("div.f32", "div.rnd{.ftz}.f32", "w:f32 r:f32 r:f32", m.float_div, rnd=_ROUND, section=section)
    row("div.approx", "div.kind{.ftz}.f32", "w:f32 r:f32 r:f32", m.float_div, kind="approx full", section=section)
    row("div.f64", "div.rn.f64", "w:f64 r:f64 r:f64", m.float_div, section=section)
    row("rcp.f32", "rcp.rnd{.ftz}.f32", "w:f32 r:f32", m.float_rcp, rnd=_ROUND, section=section)
    row("rcp.approx", "rcp.approx{.ftz}.f32", "w:f32 r:f32", m.float_rcp, section=section)
    row("rcp.f64", "rcp.rn.f64", "w:f64 r:f64", m.float_rcp, section=section)
    row("rcp.approx.f64", "rcp.approx.ftz.f64", "w:f64 r:f64", m.rcp_upper, section=section)
    row("sqrt.f32", "sqrt.rnd{.ftz}.f32", "w:f32 r:f32", m.float_sqrt, rnd=_ROUND, section=section)
    row("sqrt.approx", "sqrt.approx{.ftz}.f32", "w:f32 r:f32", m.float_sqrt, section=section)
    row("sqrt.f64", "sqrt.rn.f64", "w:f64 r:f64", m.float_sqrt, section=section)
    for name, meaning in (("ex2", m.ex2), ("lg2", m.lg2), ("sin", m.sin), ("cos", m.cos), ("rsqrt", m.rsqrt)):
        row(f"{name}.f32", f"{name}.approx{{.ftz}}.f32", "w:f32 r:f32", meaning, section=section)
    row("rsqrt.f64", "rsqrt.approx.f64", "w:f64 r:f64", m.rsqrt, section=section)
    row("rsqrt.ftz.f64", "rsqrt.approx.ftz.f64", "w:f64 r:f64", m.rsqrt_upper, section=section)
    row("ex2.half", "ex2.approx.type", "w:type r:type", m.ex2, type="f16 f16x2", section=section)
    row("ex2.bf16", "ex2.approx.ftz.type", "w:type r:type", m.ex2, type="bf16 bf16x2", needs="7.8 sm_90",
        instead="ex2.approx.ftz.f32 and cvt", section=section)
    row("tanh", "tanh.approx.type", "w:type r:type", m.tanh, type="f32 f16 f16x2 bf16 bf16x2",
        needs=_BF16_ARITHMETIC, instead="tanh.approx.f32 and cvt", section=section)
    for name, meaning in unary:
        row(f"{name}.f32", f"{name}{{.ftz}}.f32", "w:f32 r:f32", meaning, section=section)
        row(f"{name}.f64", f"{name}.f64", "w:f64 r:f64", meaning, section=section)
        row(f"{name}.half", f"{name}{{.ftz}}.type", "w:type r:type", meaning, type="f16 f16x2", section=section)
        row(f"{name}.bf16", f"{name}.type", "w:type r:type", meaning, type="bf16 bf16x2", section=section)
    for name, meaning in extremes:  # of three operands from PTX 8.8 and sm_100 on
        row(f"{name}.f32", f"{name}{{.ftz}}{{.NaN}}{{.xorsign.abs}}.f32", "w:f32 r:f32 r:f32 r:f32?", meaning,
            needs={"xorsign": "7.2 sm_86"}, instead={"xorsign": f"{name} of abs, then copysign"}, section=section)
        row(f"{name}.f64", f"{name}.f64", "w:f64 r:f64 r:f64", meaning, section=section)
        row(f"{name}.half", f"{name}{{.ftz}}{{.NaN}}.type", "w:type r:type r:type", meaning, type="f16 f16x2",
            section=section)
        row(f"{name}.bf16", f"{name}{{.NaN}}.type", "w:type r:type r:type", meaning, type="bf16 bf16x2",
            section=section)
    row("copysign", "copysign.type", "w:type r:type r:type", m.copysign, type="f32 f64", section=section)
    row("testp", "testp.op.type", "w:pred r:type", m.test_class, type="f32 f64", section=section,
        op="finite infinite number notanumber normal subnormal")


def _bits() -> None:
    section = "Logic and Shift Instructions"
    for name, meaning in (("and", m.bit_and), ("or", m.bit_or), ("xor", m.bit_xor)):
        row(name, f"{name}.type", "w:type r:type r:type", meaning, type="pred b16 b32 b64", section=section)
    row("not", "not.type", "w:type r:type", m.bit_not, type="pred b16 b32 b64", section=section)
    row("cnot", "cnot.type", "w:type r:type", m.cnot, type=_BITS, section=section)
    row("shl", "shl.type", "w:type r:type r:u32", m.shl, type=_BITS, section=section)
    row("shr", "shr.type", "w:type r:type r:u32", m.shr, type=f"{_BITS} {_INTEGERS}", section=section)
    row("shf", "shf.direction.mode.b32", "w:b32 r:b32 r:b32 r:u32", m.shf, direction="l r", mode="clamp wrap",
        section=section)
    row("lop3", "lop3.b32", "w:b32 r:b32 r:b32 r:b32 i:u32", m.lop3, section=section)
    row("prmt", "prmt.b32{.mode}", "w:b32 r:b32 r:b32 r:b32", m.prmt, mode="f4e b4e rc8 ecl ecr rc16",
        section="Data Movement and Conversion Instructions")


def _choices() -> None:
    section = "Comparison and Selection Instructions"
    same, order = "eq ne", "eq ne lt le gt ge"
    ordered = f"{order} equ neu ltu leu gtu geu num nan"
    plain = (("bits", _BITS, same), ("signed", _SIGNED, order), ("unsigned", "u16 u32 u64", f"{order} lo ls hi hs"))
    for suffix, types, compare in (*plain, ("float", "f32 f64", ordered)):
        ftz = "{.ftz}" if suffix == "float" else ""
        row(f"setp.{suffix}", f"setp.cmp{ftz}.type", "w:pred |w:pred r:type r:type", m.setp, cmp=compare, type=types,
            section=section)
        row(f"setp.{suffix}.bool", f"setp.cmp.bool{ftz}.type", "w:pred |w:pred r:type r:type r:pred", m.setp,
            cmp=compare, bool="and or xor", type=types, section=section)
        row(f"set.{suffix}", f"set.cmp{ftz}.dtype.stype", "w:dtype r:stype r:stype", m.set_value, cmp=compare,
            dtype="u32 s32 f32", stype=types, section=section)
        row(f"set.{suffix}.bool", f"set.cmp.bool{ftz}.dtype.stype", "w:dtype r:stype r:stype r:pred", m.set_value,
            cmp=compare, bool="and or xor", dtype="u32 s32 f32", stype=types, section=section)
    for type in _HALF.split():
        ftz = "{.ftz}" if type.startswith("f") else ""
        needs = _BF16_ARITHMETIC if type.startswith("bf") else {}
        row(f"setp.{type}", f"setp.cmp{ftz}.type", "w:pred |w:pred r:type r:type", m.setp, cmp=ordered, type=type,
            needs=needs, instead="cvt to f32 and setp.f32" if needs else "", section=section)
        row(f"setp.{type}.bool", f"setp.cmp.bool{ftz}.type", "w:pred |w:pred r:type r:type r:pred", m.setp, cmp=ordered,
            bool="and or xor", type=type, needs=needs, instead="cvt to f32 and setp.f32" if needs else "",
            section=section)
        packed = type.endswith("x2")
        for suffix, operands in (("", "w:dtype r:stype r:stype"), (".bool", "w:dtype r:stype r:stype r:pred")):
            row(f"set.{type}{suffix}", f"set.cmp{suffix}{ftz}.dtype.stype", operands, m.set_value, cmp=ordered,
                bool="and or xor", dtype=type if packed else f"{type} u16 s16 u32 s32", stype=type, needs=needs,
                instead="cvt to f32 and setp.f32" if needs else "", section=section)
    row("selp", "selp.type", "w:type r:type r:type r:pred", m.selp, type=f"{_BITS} {_INTEGERS} f32 f64",
        section=section)
    row("slct", "slct.type.s32", "w:type r:type r:type r:s32", m.slct, type=f"{_BITS} {_INTEGERS} f32 f64",
        section=section)
    row("slct.float", "slct{.ftz}.type.f32", "w:type r:type r:type r:f32", m.slct,
        type=f"{_BITS} {_INTEGERS} f32 f64", section=section)


def _moves() -> None:
    section = "Data Movement and Conversion Instructions"
    types = f"pred {_BITS} {_INTEGERS} f32 f64"
    row("mov", "mov.type", "w:type r:type", m.mov, type=types, section=section)
    shared = "global shared shared::cta shared::cluster"
    memory = f"b8 u8 s8 {_BITS} {_INTEGERS} f32 f64"
    for name, spaces, operands in (
            ("ld", "const global local shared shared::cta shared::cluster param param::entry",
             "w:type*vec m: r:b64?"),
            ("st", "global local shared shared::cta shared::cluster param", "m: r:type*vec r:b64?")):
        caches = "ca cg cs lu cv" if name == "ld" else "wb cg cs wt"
        evict = ("L1::evict_normal L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate")
        common: dict[str, Any] = {
            "space": spaces, "evict": evict, "vec": "v2 v4", "type": memory, "unit": "memory",
            "needs": {"shared::cluster": "7.8 sm_90"}, "section": section,
            "instead": {"shared::cluster": "global memory", "cluster": "gpu"}}
        prefetch = "{.prefetch}" if name == "ld" else ""
        if name == "ld":
            common["prefetch"] = "L2::64B L2::128B L2::256B"
        row(name, f"{name}{{.weak}}{{.space}}{{.cache}}{{.evict}}{{.L2::cache_hint}}{prefetch}{{.vec}}.type", operands,
            None, cache=caches, **common)
        row(f"{name}.volatile", f"{name}.volatile{{.space}}{{.vec}}.type", operands.replace(" r:b64?", ""), None,
            space=shared, vec="v2 v4", type=memory, unit="memory", section=section, needs=common["needs"],
            instead=common["instead"])
        row(f"{name}.v8", f"{name}{{.weak}}.global{{.evict}}{{.L2::cache_hint}}.v8.type", operands.replace("vec", "8"),
            None,
            evict=evict, type="b32 u32 s32 f32", unit="memory", needs="8.8 sm_100", instead="two .v4", section=section)
        row(f"{name}.ordered", f"{name}.order.scope{{.space}}{{.evict}}{{.L2::cache_hint}}{prefetch}{{.vec}}.type",
            operands, None, order="relaxed acquire" if name == "ld" else "relaxed release", scope="cta cluster gpu sys",
            **{**common, "space": shared, "needs": {**common["needs"], "cluster": "7.8 sm_90"}})
    row("ld.nc", "ld.global{.cop}.nc{.evict}{.L2::cache_hint}{.prefetch}{.vec}.type", "w:type*vec m: r:b64?", None,
        cop="ca cg cs", evict=evict, prefetch="L2::64B L2::128B L2::256B", vec="v2 v4", type=memory, unit="memory",
        section=section)
    row("cvta", "cvta{.to}.space.size", "w:size r:size", None, space="const global local shared shared::cta "
        "shared::cluster param", size="u64", unit="address", section=section,
        needs={"param": "7.7 sm_80", "shared::cluster": "7.8 sm_90"},
        instead={"shared::cluster": "shared"})
    row("isspacep", "isspacep.space", "w:pred r:u64", None, space="const global local shared shared::cta "
        "shared::cluster param", unit="address", section=section,
        needs={"param": "7.7 sm_80", "shared::cluster": "7.8 sm_90"},
        instead={"shared::cluster": "shared"})


def _control() -> None:
    section = "Control Flow Instructions"
    row("bra", "bra{.uni}", "l:", None, unit="control", section=section)
    row("brx", "brx.idx{.uni}", "r:u32 l:", None, unit="control", section=section)
    row("ret", "ret{.uni}", "", None, unit="control", section=section)
    row("exit", "exit", "", None, unit="control", section=section)
    row("call", "call{.uni}", "s:? l:? s:? l:?", None, unit="call", section=section)
    row("trap", "trap", "", None, unit="control", section=section)
    row("brkpt", "brkpt", "", None, unit="control", section=section)


_integers()
_carries()
_floats()
_bits()
_choices()
_moves()
_control()
