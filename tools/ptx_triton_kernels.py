"""Kernels in Triton whose PTX the emulator must run: a foreign compiler's, known to work on hardware."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fence_async_shared,
    mbarrier,
    tcgen05_commit,
    tcgen05_copy,
    tcgen05_mma,
)


@triton.jit
def matmul(a, b, c, M, N, K, stride_a, stride_b, stride_c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
           SUM: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    total = tl.zeros((BM, BN), SUM)
    for k in range(0, K, BK):
        inside = (k + depth) < K
        x = tl.load(a + rows[:, None] * stride_a + (k + depth)[None, :], mask=(rows < M)[:, None] & inside[None, :],
                    other=0.0)
        y = tl.load(b + (k + depth)[:, None] * stride_b + columns[None, :],
                    mask=(columns < N)[None, :] & inside[:, None],
                    other=0.0)
        total = tl.dot(x, y, total, out_dtype=SUM)
    tl.store(c + rows[:, None] * stride_c + columns[None, :], total.to(c.dtype.element_ty),
             mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def matmul_nt(a, b, c, M, N, K, stride_a, stride_b, stride_c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
              SUM: tl.constexpr):
    """b is (N, K)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    total = tl.zeros((BM, BN), SUM)
    for k in range(0, K, BK):
        inside = (k + depth) < K
        x = tl.load(a + rows[:, None] * stride_a + (k + depth)[None, :], mask=(rows < M)[:, None] & inside[None, :],
                    other=0.0)
        y = tl.load(b + columns[None, :] * stride_b + (k + depth)[:, None],
                    mask=(columns < N)[None, :] & inside[:, None],
                    other=0.0)
        total = tl.dot(x, y, total, out_dtype=SUM)
    tl.store(c + rows[:, None] * stride_c + columns[None, :], total.to(c.dtype.element_ty),
             mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def matmul_tma(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        total = tl.dot(a.load([row, k]), b.load([k, column]), total)
    c.store([row, column], total.to(tl.bfloat16))


@triton.jit
def matmul_specialised(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, warp_specialize=True):
        total = tl.dot(a.load([row, k]), b.load([k, column]), total)
    c.store([row, column], total.to(tl.bfloat16))


@triton.jit
def attention(q, k, v, out, T, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Causal, one head; scale holds log2(e)."""
    block = tl.program_id(0)
    rows, keys, lanes = block * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    query = tl.load(q + rows[:, None] * D + lanes[None, :], mask=(rows < T)[:, None], other=0.0)
    highest = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, D), tl.float32)
    for start in range(0, (block + 1) * BM, BN):
        at = start + keys
        key = tl.load(k + at[None, :] * D + lanes[:, None], mask=(at < T)[None, :], other=0.0)
        score = tl.where(rows[:, None] >= at[None, :], tl.dot(query, key) * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        share = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(highest - higher)
        value = tl.load(v + at[:, None] * D + lanes[None, :], mask=(at < T)[:, None], other=0.0)
        weight = weight * shrink + tl.sum(share, 1)
        total = total * shrink[:, None] + tl.dot(share.to(tl.bfloat16), value)
        highest = higher
    tl.store(out + rows[:, None] * D + lanes[None, :], (total / weight[:, None]).to(tl.bfloat16),
             mask=(rows < T)[:, None])


@triton.jit
def softmax(x, y, N, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * N + at, mask=at < N, other=float("-inf"))
    share = tl.exp(value - tl.max(value, 0))
    tl.store(y + row * N + at, share / tl.sum(share, 0), mask=at < N)


@triton.jit
def layer_norm(x, weight, bias, y, N, epsilon, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * N + at, mask=at < N, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / N
    centred = tl.where(at < N, value - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / N + epsilon)
    result = centred * scale * tl.load(weight + at, mask=at < N) + tl.load(bias + at, mask=at < N)
    tl.store(y + row * N + at, result.to(y.dtype.element_ty), mask=at < N)


@triton.jit
def atomics(x, bins, total, largest, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < N, other=0.0)
    tl.atomic_add(bins + (value & 7), 1, mask=at < N)
    tl.atomic_add(total, tl.sum(value.to(tl.float32), 0))
    tl.atomic_max(largest, tl.max(value, 0))


@triton.jit
def split_k(a, b, c, locks, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr):
    """Parts of K add to one tile in order: each waits for its turn."""
    part = tl.program_id(1)
    rows, columns, depth = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(part * BK, K, BK * SPLIT):
        x = tl.load(a + rows[:, None] * K + (k + depth)[None, :])
        y = tl.load(b + (k + depth)[:, None] * N + columns[None, :])
        total = tl.dot(x, y, total)
    lock = locks + tl.program_id(0)
    while tl.atomic_cas(lock, part, part) != part:
        pass
    place = c + rows[:, None] * N + columns[None, :]
    if part > 0:
        total += tl.load(place)
    tl.store(place, total)
    tl.debug_barrier()
    tl.atomic_xchg(lock, part + 1)


@triton.jit
def scan(x, y, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.cumsum(tl.load(x + at, mask=at < N, other=0.0), 0), mask=at < N)


@triton.jit
def highest(x, y, BLOCK: tl.constexpr, K: tl.constexpr):
    tl.store(y + tl.arange(0, K), tl.topk(tl.load(x + tl.arange(0, BLOCK)), K))


@triton.jit
def histogram(x, y, BLOCK: tl.constexpr, BINS: tl.constexpr):
    tl.store(y + tl.arange(0, BINS), tl.histogram(tl.load(x + tl.arange(0, BLOCK)), BINS))


@triton.jit
def dropout(x, y, N, part, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < N)
    tl.store(y + at, tl.where(tl.rand(seed, at) > part, value / (1 - part), 0.0), mask=at < N)


@triton.jit
def cross_entropy(x, target, y, N, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * N + at, mask=at < N, other=-float("inf")).to(tl.float32)
    largest = tl.max(value, 0)
    total = largest + tl.log(tl.sum(tl.exp(value - largest), 0))
    tl.store(y + row, total - tl.load(x + row * N + tl.load(target + row)).to(tl.float32))


@triton.jit
def square_f64(a, b, c, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None] * N, tl.arange(0, N)[None, :]
    tl.store(c + rows + columns, tl.dot(tl.load(a + rows + columns), tl.load(b + rows + columns)))


@gluon.jit
def tensor_shape(a, b, c, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, SUM: gl.constexpr, STRIDE: gl.constexpr,
                 SHAPE: gl.constexpr):
    """One tile, whose sums come out of tensor memory in a shape of tcgen05.ld."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])
    rows = gl.arange(0, M, gl.SliceLayout(1, layout))[:, None]
    columns = gl.arange(0, N, gl.SliceLayout(0, layout))[None, :]
    depth = gl.arange(0, K, gl.SliceLayout(0, layout))[None, :]
    depth_rows = gl.arange(0, K, gl.SliceLayout(1, layout))[:, None]
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    x = gl.allocate_shared_memory(gl.float16, [M, K], shared, gl.load(a + rows * K + depth))
    y = gl.allocate_shared_memory(gl.float16, [K, N], shared, gl.load(b + depth_rows * N + columns))
    fence_async_shared()
    made = mbarrier.allocate_mbarrier()
    mbarrier.init(made, count=1)
    sums = allocate_tensor_memory(SUM, [M, N], TensorMemoryLayout([M, N], col_stride=STRIDE))
    tcgen05_mma(x, y, sums, use_acc=False)
    tcgen05_commit(made)
    mbarrier.wait(made, 0)
    mbarrier.invalidate(made)
    registers: gl.constexpr = sums.get_reg_layout(instr_variant=SHAPE)
    out_rows = gl.arange(0, M, gl.SliceLayout(1, registers))[:, None]
    out_columns = gl.arange(0, N, gl.SliceLayout(0, registers))[None, :]
    gl.store(c + out_rows * N + out_columns, sums.load(registers))


@gluon.jit
def tensor_copy(a, c, M: gl.constexpr, N: gl.constexpr):
    """From shared to tensor memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    rows = gl.arange(0, M, gl.SliceLayout(1, layout))[:, None]
    columns = gl.arange(0, N, gl.SliceLayout(0, layout))[None, :]
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=32, rank=2)
    x = gl.allocate_shared_memory(gl.float32, [M, N], shared, gl.load(a + rows * N + columns))
    fence_async_shared()
    made = mbarrier.allocate_mbarrier()
    mbarrier.init(made, count=1)
    copied = allocate_tensor_memory(gl.float32, [M, N], TensorMemoryLayout([M, N], col_stride=1))
    tcgen05_copy(x, copied)
    tcgen05_commit(made)
    mbarrier.wait(made, 0)
    mbarrier.invalidate(made)
    registers: gl.constexpr = copied.get_reg_layout()
    out_rows = gl.arange(0, M, gl.SliceLayout(1, registers))[:, None]
    out_columns = gl.arange(0, N, gl.SliceLayout(0, registers))[None, :]
    gl.store(c + out_rows * N + out_columns, copied.load(registers))


@triton.jit
def matmul_scaled(a, b, c, scale_a, scale_b, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    """b is (N, K); a scale for each 32 of K."""
    rows, columns, depth, parts = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK), tl.arange(0, BK // 32)
    total = tl.zeros((M, N), tl.float32)
    for k in range(0, K, BK):
        x = tl.load(a + rows[:, None] * K + k + depth[None, :])
        y = tl.load(b + columns[None, :] * K + k + depth[:, None])
        of_x = tl.load(scale_a + rows[:, None] * (K // 32) + k // 32 + parts[None, :])
        of_y = tl.load(scale_b + columns[:, None] * (K // 32) + k // 32 + parts[None, :])
        total = tl.dot_scaled(x, of_x, "e4m3", y, of_y, "e5m2", total)
    tl.store(c + rows[:, None] * N + columns[None, :], total)


@dataclass
class Case:
    """levels: of the GPU target. divisible: arguments that are multiples of 16. gluon: a kernel in Gluon."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    levels: tuple[int, ...]
    divisible: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    gluon: bool = False


def _matmul(dtype: str, result: str, levels: tuple[int, ...], sum: Any, name: str, kernel: Any = matmul,
            block: int = 64,
            depth: int = 32) -> Case:
    pointers = ("a", "b", "c")
    signature = {"a": f"*{dtype}", "b": f"*{dtype}", "c": f"*{result}", **dict.fromkeys(
        ("M", "N", "K", "stride_a", "stride_b", "stride_c"), "i32")}
    return Case(name, kernel, signature, {"BM": block, "BN": block, "BK": depth, "SUM": sum}, levels,
                (*pointers, "K", "stride_a", "stride_b", "stride_c"))


_TMA = {"a": "tensordesc<bf16[64,64]>", "b": "tensordesc<bf16[64,128]>", "c": "tensordesc<bf16[64,128]>", "K": "i32"}

def _tensor_shape(shape: str, block: int = 64, sums: Any = gl.float32) -> Case:
    halves = sums is gl.float16
    return Case(f"tensor_{shape}{'_f16' if halves else ''}", tensor_shape,
                {"a": "*fp16", "b": "*fp16", "c": "*fp16" if halves else "*fp32"},
                {"M": block, "N": 16, "K": 16, "SUM": sums, "STRIDE": 2 if halves else 1, "SHAPE": shape}, (100,),
                ("a", "b", "c"), gluon=True)


CASES = [
    *(_tensor_shape(shape) for shape in ("16x64b", "16x128b", "16x256b")), _tensor_shape("32x32b", 128, gl.float16),
    Case("tensor_copy", tensor_copy, {"a": "*fp32", "c": "*fp32"}, {"M": 128, "N": 16}, (100,), ("a", "c"), gluon=True),
    Case("matmul_scaled", matmul_scaled, {"a": "*fp8e4nv", "b": "*fp8e5", "c": "*fp32", "scale_a": "*u8",
                                          "scale_b": "*u8", "K": "i32"}, {"M": 128, "N": 64, "BK": 128}, (100,),
         ("a", "b", "c", "scale_a", "scale_b", "K"), stages=2),
    _matmul("bf16", "fp32", (80, 90, 100), tl.float32, "matmul_bf16", block=128, depth=64),
    _matmul("fp16", "fp16", (80, 90, 100), tl.float32, "matmul_f16"),
    _matmul("fp32", "fp32", (80, 90, 100), tl.float32, "matmul_tf32"),
    _matmul("i8", "i32", (80, 90, 100), tl.int32, "matmul_i8", matmul_nt, depth=64),
    _matmul("fp8e4nv", "fp32", (89, 90, 100), tl.float32, "matmul_e4m3", matmul_nt, depth=64),
    _matmul("fp8e5", "fp32", (90, 100), tl.float32, "matmul_e5m2", matmul_nt, depth=64),
    Case("matmul_tma", matmul_tma, _TMA, {"BM": 64, "BN": 128, "BK": 64}, (90, 100)),
    Case("matmul_specialised", matmul_specialised, _TMA, {"BM": 64, "BN": 128, "BK": 64}, (90, 100)),
    Case("attention", attention, {"q": "*bf16", "k": "*bf16", "v": "*bf16", "out": "*bf16", "T": "i32",
                                  "scale": "fp32"},
         {"D": 64, "BM": 64, "BN": 64}, (80, 90, 100), ("q", "k", "v", "out")),
    Case("softmax", softmax, {"x": "*fp32", "y": "*fp32", "N": "i32"}, {"BLOCK": 1024}, (80,), ("x", "y")),
    Case("layer_norm", layer_norm, {"x": "*bf16", "weight": "*fp32", "bias": "*fp32", "y": "*bf16", "N": "i32",
                                    "epsilon": "fp32"}, {"BLOCK": 1024}, (80, 90), ("x", "weight", "bias", "y", "N")),
    Case("atomics", atomics, {"x": "*i32", "bins": "*i32", "total": "*fp32", "largest": "*i32", "N": "i32"},
         {"BLOCK": 256}, (80,), ("x",)),
    Case("split_k", split_k, {"a": "*bf16", "b": "*bf16", "c": "*fp32", "locks": "*i32", "M": "i32", "N": "i32",
                              "K": "i32"}, {"BM": 32, "BN": 32, "BK": 32, "SPLIT": 2}, (80,),
         ("a", "b", "c", "N", "K")),
    Case("scan", scan, {"x": "*fp32", "y": "*fp32", "N": "i32"}, {"BLOCK": 512}, (80,)),
    Case("highest", highest, {"x": "*fp32", "y": "*fp32"}, {"BLOCK": 128, "K": 8}, (80,), ("x", "y")),
    Case("histogram", histogram, {"x": "*i32", "y": "*i32"}, {"BLOCK": 256, "BINS": 16}, (80,), ("x", "y")),
    Case("dropout", dropout, {"x": "*fp32", "y": "*fp32", "N": "i32", "part": "fp32", "seed": "i32"}, {"BLOCK": 256},
         (80,), ("x", "y")),
    Case("cross_entropy", cross_entropy, {"x": "*bf16", "target": "*i64", "y": "*fp32", "N": "i32"}, {"BLOCK": 512},
         (80,), ("x", "target", "y")),
    Case("square_f64", square_f64, {"a": "*fp64", "b": "*fp64", "c": "*fp64"}, {"N": 32}, (80,), ("a", "b", "c")),
]
