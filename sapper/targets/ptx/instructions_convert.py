"""Rows of conversions.

Source: PTX ISA, section "Data Movement and Conversion Instructions: cvt, cvt.pack".
"""

from __future__ import annotations

from typing import Any

from . import conversion as c
from .rows import Row, make_row

ROWS: list[Row] = []
_INTEGERS = "u8 u16 u32 u64 s8 s16 s32 s64"
_FP8 = "8.1 sm_89"


def row(name: str, syntax: str, operands: str, meaning: Any, **more: Any) -> None:
    ROWS.append(make_row(name, syntax, operands, meaning, section="Data Movement and Conversion Instructions", **more))


row("cvt.int", "cvt.dtype.atype", "w:dtype r:atype", c.integer_to_integer, dtype=_INTEGERS, atype=_INTEGERS)
row("cvt.int.sat", "cvt.sat.dtype.atype", "w:dtype r:atype", c.integer_to_integer, dtype="u8 s8 u16 s16",
    atype="u32 s32 u64 s64")
row("cvt.int.sat.sign", "cvt.sat.dtype.atype", "w:dtype r:atype", c.integer_to_integer, dtype="u32 u64",
    atype="s32 s64")
row("cvt.int_to_float", "cvt.rnd{.sat}.dtype.atype", "w:dtype r:atype", c.integer_to_float, rnd="rn rz rm rp",
    dtype="f16 f32 f64", atype=_INTEGERS)
row("cvt.int_to_bf16", "cvt.rnd.bf16.atype", "w:bf16 r:atype", c.integer_to_float, rnd="rn rz rm rp",
    atype="u16 u32 u64 s16 s32 s64", needs="7.8 sm_90", instead="cvt to f32, then cvt.rn.bf16.f32")
row("cvt.float_to_int", "cvt.rnd{.sat}.dtype.atype", "w:dtype r:atype", c.float_to_integer, rnd="rni rzi rmi rpi",
    dtype=_INTEGERS, atype="f16 f32 f64")
row("cvt.float_to_int.ftz", "cvt.rnd.ftz{.sat}.dtype.f32", "w:dtype r:f32", c.float_to_integer, rnd="rni rzi rmi rpi",
    dtype=_INTEGERS)
row("cvt.bf16_to_int", "cvt.rnd.dtype.bf16", "w:dtype r:bf16", c.float_to_integer, rnd="rni rzi rmi rpi",
    dtype="u16 u32 u64 s16 s32 s64", needs="7.8 sm_90", instead="widen to f32 by a shift, then cvt")
row("cvt.f32.f16", "cvt{.ftz}{.sat}.f32.f16", "w:f32 r:f16", c.float_to_float)
row("cvt.f64.f16", "cvt{.sat}.f64.f16", "w:f64 r:f16", c.float_to_float)
row("cvt.f64.f32", "cvt{.ftz}{.sat}.f64.f32", "w:f64 r:f32", c.float_to_float)
row("cvt.f32.bf16", "cvt.f32.bf16", "w:f32 r:bf16", c.float_to_float, needs="7.1 sm_80")
row("cvt.f32.bf16.ftz", "cvt.ftz.f32.bf16", "w:f32 r:bf16", c.float_to_float, needs="7.8 sm_90", instead="cvt.f32.bf16")
row("cvt.round.f32", "cvt.rnd{.ftz}{.sat}.f32.f32", "w:f32 r:f32", c.float_to_integral, rnd="rni rzi rmi rpi")
for _type in ("f16", "f64"):
    row(f"cvt.round.{_type}", f"cvt.rnd{{.sat}}.{_type}.{_type}", f"w:{_type} r:{_type}", c.float_to_integral,
        rnd="rni rzi rmi rpi")
row("cvt.f16", "cvt.rnd{.ftz}{.sat}.f16.atype", "w:f16 r:atype", c.float_to_float, rnd="rn rz rm rp", atype="f32 f64")
row("cvt.f32.f64", "cvt.rnd{.ftz}{.sat}.f32.f64", "w:f32 r:f64", c.float_to_float, rnd="rn rz rm rp")
row("cvt.f32.f32", "cvt{.ftz}{.sat}.f32.f32", "w:f32 r:f32", c.float_to_float)
row("cvt.f16.relu", "cvt.rnd.relu.f16.f32", "w:f16 r:f32", c.float_to_float, rnd="rn rz")
row("cvt.bf16", "cvt.rnd{.relu}.bf16.f32", "w:bf16 r:f32", c.float_to_float, rnd="rn rz")
row("cvt.bf16.directed", "cvt.rnd.bf16.f32", "w:bf16 r:f32", c.float_to_float, rnd="rm rp", needs="7.8 sm_80")
row("cvt.tf32", "cvt.rna.tf32.f32", "w:tf32 r:f32", c.float_to_tf32)
row("cvt.tf32.rn", "cvt.rnd{.relu}.tf32.f32", "w:tf32 r:f32", c.float_to_tf32, rnd="rn rz", needs="7.8 sm_90",
    instead="cvt.rna.tf32.f32")
row("cvt.f16x2", "cvt.rnd{.relu}.f16x2.f32", "w:f16x2 r:f32 r:f32", c.pack_floats, rnd="rn rz")
row("cvt.bf16x2", "cvt.rnd{.relu}.bf16x2.f32", "w:bf16x2 r:f32 r:f32", c.pack_floats, rnd="rn rz")
row("cvt.fp8", "cvt.rn.satfinite{.relu}.dtype.f32", "w:dtype r:f32 r:f32", c.pack_floats, dtype="e4m3x2 e5m2x2",
    needs=_FP8, instead="integer arithmetic on the bits, or a level with fp8")
row("cvt.fp8.f16x2", "cvt.rn.satfinite{.relu}.dtype.f16x2", "w:dtype r:f16x2", c.narrow_packed, dtype="e4m3x2 e5m2x2",
    needs=_FP8, instead="integer arithmetic on the bits, or a level with fp8")
row("cvt.f16x2.fp8", "cvt.rn{.relu}.f16x2.atype", "w:f16x2 r:atype", c.widen_packed, atype="e4m3x2 e5m2x2", needs=_FP8,
    instead="shifts and a multiplication by a power of two")
row("cvt.pack", "cvt.pack.sat.dtype.s32", "w:b32 r:s32 r:s32", c.pack_integers, dtype="u16 s16")
row("cvt.pack.8", "cvt.pack.sat.dtype.s32.b32", "w:b32 r:s32 r:s32 r:b32", c.pack_integers, dtype="u8 s8")
