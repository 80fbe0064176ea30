"""Rows of the warp: shuffles, votes, matrices in registers, the tensor cores.

Source: PTX ISA, sections "shfl.sync", "Parallel Synchronization and Communication Instructions", "Warp-Level
Matrix Instructions", "Asynchronous Warpgroup-Level Matrix Instructions".
"""

from __future__ import annotations

from typing import Any

from . import warp as w
from .rows import Row, make_row

ROWS: list[Row] = []
_SHARED = "shared shared::cta"


def row(name: str, syntax: str, operands: str, meaning: Any, **more: Any) -> None:
    ROWS.append(make_row(name, syntax, operands, meaning, **more))


def _lanes() -> None:
    section = "Parallel Synchronization and Communication Instructions"
    common: dict[str, Any] = {"unit": "warp", "section": section}
    row("shfl", "shfl.sync.mode.b32", "w:b32 |w:pred r:b32 r:b32 r:b32 r:b32", w.shuffle, mode="up down bfly idx",
        unit="warp", section="Data Movement and Conversion Instructions")
    row("vote", "vote.sync.mode.pred", "w:pred r:pred r:b32", w.vote, mode="all any uni", **common)
    row("vote.ballot", "vote.sync.ballot.b32", "w:b32 r:pred r:b32", w.ballot, **common)
    row("match.any", "match.any.sync.type", "w:b32 r:type r:b32", w.match_any, type="b32 b64", **common)
    row("match.all", "match.all.sync.type", "w:b32 |w:pred r:type r:b32", w.match_all, type="b32 b64", **common)
    row("redux", "redux.sync.op.type", "w:type r:type r:b32", w.reduce, op="add min max", type="u32 s32", **common)
    row("redux.bits", "redux.sync.op.b32", "w:b32 r:b32 r:b32", w.reduce, op="and or xor", **common)
    row("redux.f32", "redux.sync.op{.abs}{.NaN}.f32", "w:f32 r:f32 r:b32", w.reduce, op="min max",
        needs="8.6 sm_100a", instead="shfl.sync.bfly and min or max", **common)
    row("elect", "elect.sync", "w:b32 |w:pred r:b32", w.elect, needs="8.0 sm_90",
        instead="the lowest lane of activemask", **common)
    row("activemask", "activemask.b32", "w:b32", None, unit="activemask", section=section)
    row("bar.warp.sync", "bar.warp.sync", "r:b32", None, unit="warp_barrier", section=section)


def _matrices() -> None:
    section = "Warp-Level Matrix Instructions"
    row("ldmatrix", "ldmatrix.sync.aligned.m8n8.num{.trans}{.space}.b16", "w:b32*num m:", None, num="x1 x2 x4",
        space=_SHARED, unit="matrix_memory", section=section)
    row("stmatrix", "stmatrix.sync.aligned.m8n8.num{.trans}{.space}.b16", "m: r:b32*num", None, num="x1 x2 x4",
        space=_SHARED, unit="matrix_memory", needs="7.8 sm_90", instead="st.shared of each register", section=section)
    row("movmatrix", "movmatrix.sync.aligned.m8n8.trans.b16", "w:b32 r:b32", w.transpose, needs="7.8 sm_80",
        unit="warp", section=section)
    mma = "mma.sync.aligned"
    for shape, a, b in (("m16n8k8", 2, 1), ("m16n8k16", 4, 2)):
        row(f"mma.f16.{shape}", f"{mma}.{shape}.row.col.f16.f16.f16.f16", f"w:b32*2 r:b32*{a} r:b32*{b} r:b32*2",
            w.matrix_multiply, unit="warp", section=section)
        row(f"mma.f32.f16.{shape}", f"{mma}.{shape}.row.col.f32.f16.f16.f32", f"w:f32*4 r:b32*{a} r:b32*{b} r:f32*4",
            w.matrix_multiply, unit="warp", section=section)
        row(f"mma.bf16.{shape}", f"{mma}.{shape}.row.col.f32.bf16.bf16.f32", f"w:f32*4 r:b32*{a} r:b32*{b} r:f32*4",
            w.matrix_multiply, unit="warp", section=section)
    for shape, a, b in (("m16n8k4", 2, 1), ("m16n8k8", 4, 2)):
        row(f"mma.tf32.{shape}", f"{mma}.{shape}.row.col.f32.tf32.tf32.f32", f"w:f32*4 r:b32*{a} r:b32*{b} r:f32*4",
            w.matrix_multiply, unit="warp", section=section)
    for shape, a, b in (("m16n8k16", 2, 1), ("m16n8k32", 4, 2)):
        row(f"mma.i8.{shape}", f"{mma}.{shape}.row.col{{.satfinite}}.s32.atype.btype.s32",
            f"w:s32*4 r:b32*{a} r:b32*{b} r:s32*4", w.matrix_multiply, atype="u8 s8", btype="u8 s8", unit="warp",
            section=section)
    row("mma.fp8", f"{mma}.m16n8k32.row.col.f32.atype.btype.f32", "w:f32*4 r:b32*4 r:b32*2 r:f32*4",
        w.matrix_multiply, atype="e4m3 e5m2", btype="e4m3 e5m2", needs="8.4 sm_89", unit="warp", section=section,
        instead="cvt to f16 and mma.m16n8k16.f32.f16")
    row("mma.f64", f"{mma}.m8n8k4.row.col.f64.f64.f64.f64", "w:f64*2 r:f64*1 r:f64*1 r:f64*2", w.matrix_multiply,
        unit="warp", section=section)


def _opaque() -> None:
    """wmma, whose fragments are the implementation's own (warp.py)."""
    common: dict[str, Any] = {"section": "Warp-Level Matrix Instructions"}
    memory: dict[str, Any] = {**common, "unit": "wmma", "layout": "row col", "space": f"global {_SHARED}"}
    shapes = {"m16n16k16": (16, 16, 16), "m8n32k16": (8, 32, 16), "m32n8k16": (32, 8, 16), "m16n16k8": (16, 16, 8)}
    head, layouts = "sync.aligned", {"alayout": "row col", "blayout": "row col"}
    sums = {"f16": "b32*4", "f32": "f32*8", "s32": "s32*8"}
    for shape, (rows, columns, depth) in shapes.items():
        tf32 = shape.endswith("k8")
        for types, to, slots in (("tf32", ("f32",), 1),) if tf32 else (
                ("f16", ("f16", "f32"), 2), ("bf16", ("f32",), 2), ("s8", ("s32",), 4), ("u8", ("s32",), 4)):
            counts = [8 if types == "f16" else extent * depth // 32 // slots for extent in (rows, columns)]
            for side, count in zip("ab", counts, strict=True):
                row(f"wmma.load.{side}.{types}.{shape}", f"wmma.load.{side}.{head}.layout.{shape}{{.space}}.{types}",
                    f"w:b32*{count} m: r:u32?", None, **memory)
            for made in to:
                for given in to:
                    named = f"{made}.{given}" if types == "f16" else f"{made}.{types}.{types}.{given}"
                    limited = "{.satfinite}" if made == "s32" else ""
                    row(f"wmma.mma.{types}.{made}.{given}.{shape}",
                        f"wmma.mma.{head}.alayout.blayout.{shape}.{named}{limited}",
                        f"w:{sums[made]} r:b32*{counts[0]} r:b32*{counts[1]} r:{sums[given]}", w.opaque_multiply,
                        unit="warp", **layouts, **common)
        for type in ("f32",) if tf32 else sums:
            row(f"wmma.load.c.{type}.{shape}", f"wmma.load.c.{head}.layout.{shape}{{.space}}.{type}",
                f"w:{sums[type]} m: r:u32?", None, **memory)
            row(f"wmma.store.{type}.{shape}", f"wmma.store.d.{head}.layout.{shape}{{.space}}.{type}",
                f"m: r:{sums[type]} r:u32?", None, **memory)


def _warpgroup() -> None:
    section = "Asynchronous Warpgroup Level Matrix Instructions"
    common: dict[str, Any] = {"unit": "wgmma", "needs": "8.0 sm_90a", "section": section}
    sizes = [8 * n for n in range(1, 33)]

    def shapes(k: int) -> str:
        return " ".join(f"m64n{n}k{k}" for n in sizes)

    head = "wgmma.mma_async.sync.aligned.shape"
    scales = "r:pred i: i:"
    for name in ("f16", "bf16"):
        row(f"wgmma.{name}", f"{head}.f32.{name}.{name}", f"rw:f32*n/2 r:b64^b32*4 r:b64 {scales} i: i:?", None,
            shape=shapes(16), instead="mma.sync.m16n8k16", **common)
    row("wgmma.f16.f16", f"{head}.f16.f16.f16", f"rw:b32*n/4 r:b64^b32*4 r:b64 {scales} i: i:?", None, shape=shapes(16),
        instead="mma.sync.m16n8k16", **common)
    row("wgmma.tf32", f"{head}.f32.tf32.tf32", f"rw:f32*n/2 r:b64^b32*4 r:b64 {scales}", None, shape=shapes(8),
        instead="mma.sync.m16n8k8", **common)
    row("wgmma.fp8", f"{head}.f32.atype.btype", f"rw:f32*n/2 r:b64^b32*4 r:b64 {scales}", None, shape=shapes(32),
        atype="e4m3 e5m2", btype="e4m3 e5m2", instead="mma.sync.m16n8k32", **common)
    integers = {**common, "shape": " ".join(f"m64n{n}k32" for n in (8, 16, 24, *range(32, 257, 16)))}
    for type_a in ("s8", "u8"):
        for type_b in ("s8", "u8"):
            row(f"wgmma.{type_a}.{type_b}", f"{head}{{.satfinite}}.s32.{type_a}.{type_b}",
                "rw:s32*n/2 r:b64^b32*4 r:b64 r:pred", None, instead="mma.sync.m16n8k32",
                **{**integers, "needs": "8.0 sm_90a" if type_a == type_b else "8.4 sm_90a"})
    for name, operands in (("fence", ""), ("commit_group", ""), ("wait_group", "i:")):
        row(f"wgmma.{name}", f"wgmma.{name}.sync.aligned", operands, None, instead="nothing: mma.sync needs none",
            **common)
    row("setmaxnreg", "setmaxnreg.action.sync.aligned.u32", "i:", None, action="inc dec", unit="setmaxnreg",
        needs="8.0 sm_90a sm_100a sm_120a", instead="leave it out", section="Miscellaneous Instructions")


_lanes()
_matrices()
_opaque()
_warpgroup()
