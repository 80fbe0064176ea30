"""Rows of tcgen05: tensor memory, and products whose sums, and perhaps one operand, lie in it.

An address of tensor memory is a register of 32 bits in brackets, `m:b32`: the lane in its upper half, the column in its
lower one. Source: PTX ISA, section "TensorCore 5th Generation Family Instructions".
"""

from __future__ import annotations

from typing import Any

from .rows import Row, make_row

ROWS: list[Row] = []
_COMMON: dict[str, Any] = {"needs": "8.6 sm_100a", "section": "TensorCore 5th Generation Family Instructions"}
_IN_REGISTERS = "nothing: sums of mma.sync lie in registers"
_GROUP = "cta_group::1"
SHAPES = {"32x32b": (1, 128), "16x64b": (1, 128), "16x128b": (2, 64), "16x256b": (4, 32), "16x32bx2": (1, 128)}
"""Of tcgen05.ld and st: registers of .x1, and the largest .num."""


def row(name: str, syntax: str, operands: str, unit: str, **more: Any) -> None:
    ROWS.append(make_row(name, syntax, operands, None, unit=unit, **{**_COMMON, "instead": _IN_REGISTERS, **more}))


def _allocation() -> None:
    row("tcgen05.alloc", "tcgen05.alloc.group.sync.aligned{.shared::cta}.b32", "m: r:u32", "tensor_allocation",
        group=_GROUP)
    row("tcgen05.dealloc", "tcgen05.dealloc.group.sync.aligned.b32", "r:b32 r:u32", "tensor_allocation", group=_GROUP)
    row("tcgen05.relinquish_alloc_permit", "tcgen05.relinquish_alloc_permit.group.sync.aligned", "",
        "tensor_allocation", group=_GROUP)


def _moves() -> None:
    for shape, (registers, most) in SHAPES.items():
        numbers = " ".join(f"x{1 << power}" for power in range(most.bit_length()))
        count, split = f"{registers}*num", "i: " if shape == "16x32bx2" else ""
        row(f"tcgen05.ld.{shape}", f"tcgen05.ld.sync.aligned.{shape}.num{{.pack::16b}}.b32",
            f"w:b32*{count} m:b32 {split}", "tensor_move", num=numbers)
        row(f"tcgen05.st.{shape}", f"tcgen05.st.sync.aligned.{shape}.num{{.unpack::16b}}.b32",
            f"m:b32 {split}r:b32*{count}", "tensor_move", num=numbers)
    row("tcgen05.wait", "tcgen05.kind.sync.aligned", "", "tensor_wait", kind="wait::ld wait::st")
    row("tcgen05.fence", "tcgen05.kind", "", "tensor_fence",
        kind="fence::before_thread_sync fence::after_thread_sync")


def _products() -> None:
    collector = " ".join(f"collector::a::{word}" for word in ("fill", "use", "lastuse", "discard"))
    operands = "m:b32 r:b64^m:b32 r:b64 r:b32 r:b32*4? r:pred"
    for kind, scale, shape in (("f16", " i:?", "m16n8k16.row.col.f32.f16.f16.f32"),
                               ("tf32", " i:?", "m16n8k8.row.col.f32.tf32.tf32.f32"),
                               ("f8f6f4", "", "m16n8k16.row.col.f32.f16.f16.f32"),
                               ("i8", "", "m16n8k32.row.col.s32.s8.s8.s32")):
        row(f"tcgen05.mma.{kind}", f"tcgen05.mma.group.kind::{kind}{{.collector}}", operands + scale, "tensor_product",
            group=_GROUP, collector=collector, instead=f"mma.sync.aligned.{shape}")
    row("tcgen05.mma.mxf8f6f4", "tcgen05.mma.group.kind::mxf8f6f4.block_scale.vector{.collector}",
        "m:b32 r:b64^m:b32 r:b64 r:b32 m:b32 m:b32 r:pred", "tensor_product", group=_GROUP, collector=collector,
        vector="scale_vec::1X block32", needs={"": "8.6 sm_100a", "block32": "8.8 sm_100a"},
        instead="mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
    for shape in ("128x256b", "128x128b", "64x128b.warpx2::02_13", "64x128b.warpx2::01_23", "32x128b.warpx4"):
        row(f"tcgen05.cp.{shape}", f"tcgen05.cp.group.{shape}", "m:b32 r:b64", "tensor_copy", group=_GROUP)
    arrive = "tcgen05.commit.group.mbarrier::arrive::one{.shared::cluster}"
    row("tcgen05.commit", f"{arrive}.b64", "m:", "tensor_commit", group=_GROUP)
    row("tcgen05.commit.multicast", f"{arrive}.multicast::cluster.b64", "m: r:u16", "tensor_commit", group=_GROUP)


_allocation()
_moves()
_products()
