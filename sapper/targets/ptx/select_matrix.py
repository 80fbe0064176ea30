"""Selection rules of PTX: matrix instructions of single warps, and asynchronous copies of what these read.

See select.py. Source: PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions" and "cp.async".
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op
from .select_common import Rule, row
from .select_memory import near_address


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


def load_matrix(s: Any, op: Op) -> None:
    base, offsets = op.operands
    memory = near_address(s, base, offsets, op.attributes.get("disp", 0), op.attributes.get("flip", 0))
    transposed = ".trans" if op.attributes["transposed"] else ""
    s.emit(f"ldmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16", tuple(s.define(v) for v in op.results), memory)


def pack2(s: Any, op: Op) -> None:
    low, high = (row(s, v) for v in op.operands)
    s.emit(f"cvt.rn.{op.attributes['dtype'].name}x2.f32", s.define(op.results[0]), high, low)


ONES, ZEROS = 0x3F803F80, 0x80008000
"""Pairs of bf16: 1, -0."""


def _of_pairs(name: str) -> Rule:
    """bf16 has multiply-adds alone before sm_90."""
    def rule(s: Any, op: Op) -> None:
        a, b = (s.vector(v) for v in op.operands)
        made = s.define(op.results[0])
        if op.attributes["dtype"].name == "f16":
            s.emit(f"{name}.rn.f16x2", made, a, b)
        elif name == "mul":
            s.emit("fma.rn.bf16x2", made, a, b, ZEROS)
        else:
            s.emit("fma.rn.bf16x2", made, b, ONES if name == "add" else ONES | ZEROS, a)
    return rule


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


RULES: dict[str, Rule] = {
    "async_copy": async_copy, "async_commit": async_commit, "async_wait": async_wait, "load_matrix": load_matrix,
    "pack2": pack2, "matrix_multiply": matrix_multiply,
    **{f"{name}2": _of_pairs(name) for name in ("add", "sub", "mul")},
}
