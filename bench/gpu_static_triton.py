"""Triton's side of gpu_static.py: `python bench/gpu_static_triton.py JSON` prints a kernel's PTX, and the seconds.

JSON: level, tile, warps, stages, runs, element and result (Triton's names of dtypes), transposed, boxes (whether
tensors are read by tensor maps), attention (instead of a product; the tile is rows, keys, head); weights (int4, int8 or
fp8, with scales), loads (one for each of 4 bits) and vector (instead of rows; the tile is rows, depth). Needs Triton
only.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PTX_VERSION = 87
"""That any ptxas since CUDA 12.8 reads; Triton's own choice is newer than its ptxas."""


@triton.jit
def product(a, b, c, M, N, K, stride_a, stride_b, stride_c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
            TRANSPOSED: tl.constexpr):
    """Rows past the end are read from the begin, so that loads need no masks; K is a multiple of BK."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    x_at = a + (rows % M)[:, None] * stride_a + depth[None, :]
    if TRANSPOSED:
        y_at = b + (columns % N)[None, :] * stride_b + depth[:, None]
    else:
        y_at = b + depth[:, None] * stride_b + (columns % N)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K, BK):
        total = tl.dot(tl.load(x_at), tl.load(y_at), total)
        x_at += BK
        y_at += BK if TRANSPOSED else BK * stride_b
    tl.store(c + rows[:, None] * stride_c + columns[None, :], total.to(c.dtype.element_ty),
             mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def product_of_weights(a, b, s, c, M, N, K, stride_a, stride_b, stride_s, stride_c, BM: tl.constexpr, BN: tl.constexpr,
                       BK: tl.constexpr, BITS: tl.constexpr, LOADS: tl.constexpr):
    """Weights (N, K) of 4 or 8 bits with f32 scales of 128 of the depth. Two numbers of 4 bits are a byte, which is
    read once, its halves interleaved, or (LOADS) once for each."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    x_at = a + (rows % M)[:, None] * stride_a + depth[None, :]
    s_at = s + (columns % N) * stride_s
    y_at = b + (columns % N)[:, None] * stride_b + (tl.arange(0, BK // 2) if BITS == 4 and not LOADS else
                                                    depth // 2 if BITS == 4 else depth)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        w = tl.load(y_at)
        if BITS == 4:
            if LOADS:
                w = w >> (depth % 2 * 4)[None, :].to(tl.uint8) & 15
            else:
                w = tl.interleave(w & 15, w >> 4)
            w = w.to(tl.int8) - 8
        y = (w.to(tl.float32) * tl.load(s_at + k // 128)[:, None]).to(x_at.dtype.element_ty)
        total = tl.dot(tl.load(x_at), y.T, total)
        x_at += BK
        y_at += BK * BITS // 8
    tl.store(c + rows[:, None] * stride_c + columns[None, :], total.to(c.dtype.element_ty),
             mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def vector_by_weights(a, b, s, c, N, K, stride_b, stride_s, BM: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr,
                      LOADS: tl.constexpr):
    """Such weights by a vector, BM rows and BN of the depth at once."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    depth = tl.arange(0, BN)
    y_at = b + (rows % N)[:, None] * stride_b + (tl.arange(0, BN // 2) if BITS == 4 and not LOADS else
                                                 depth // 2 if BITS == 4 else depth)[None, :]
    s_at = s + (rows % N) * stride_s
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BN):
        w = tl.load(y_at)
        if BITS == 4:
            if LOADS:
                w = w >> (depth % 2 * 4)[None, :].to(tl.uint8) & 15
            else:
                w = tl.interleave(w & 15, w >> 4)
            w = w.to(tl.int8) - 8
        y = (w.to(tl.float32) * tl.load(s_at + k // 128)[:, None]).to(a.dtype.element_ty)
        total += tl.load(a + k + depth).to(tl.float32)[None, :] * y.to(tl.float32)
        y_at += BN * BITS // 8
    tl.store(c + rows, tl.sum(total, 1).to(c.dtype.element_ty), mask=rows < N)


@triton.jit
def product_of_boxes(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr):
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        if TRANSPOSED:
            y = b.load([column, k]).T
        else:
            y = b.load([k, column])
        total = tl.dot(a.load([row, k]), y, total)
    c.store([row, column], total.to(c.dtype))


@triton.jit
def scores(query, key, rows, at, scale, MASKED: tl.constexpr):
    score = tl.dot(query, key) * scale
    if MASKED:
        score = tl.where(rows[:, None] >= at[None, :], score, float("-inf"))
    return score


@triton.jit
def step(query, key, value, rows, at, scale, highest, weight, total, MASKED: tl.constexpr):
    score = scores(query, key, rows, at, scale, MASKED)
    higher = tl.maximum(highest, tl.max(score, 1))
    share = tl.exp2(score - higher[:, None])
    shrink = tl.exp2(highest - higher)
    total = tl.dot(share.to(value.dtype), value, total * shrink[:, None])
    return higher, weight * shrink + tl.sum(share, 1), total


@triton.jit
def attention(q, k, v, out, T, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Causal, a head in each row of the grid, one after another in memory; T is a multiple of BM; scale holds log2(e).
    The mask is computed in the second loop only."""
    block, head = tl.program_id(0), tl.program_id(1) * T * D
    q, k, v, out = q + head, k + head, v + head, out + head
    rows, keys, lanes = block * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    query = tl.load(q + rows[:, None] * D + lanes[None, :])
    highest = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, D), tl.float32)
    for start in range(0, block * BM, BN):
        at = start + keys
        key = tl.load(k + at[None, :] * D + lanes[:, None])
        value = tl.load(v + at[:, None] * D + lanes[None, :])
        highest, weight, total = step(query, key, value, rows, at, scale, highest, weight, total, False)
    for start in range(block * BM, (block + 1) * BM, BN):
        at = start + keys
        key = tl.load(k + at[None, :] * D + lanes[:, None])
        value = tl.load(v + at[:, None] * D + lanes[None, :])
        highest, weight, total = step(query, key, value, rows, at, scale, highest, weight, total, True)
    tl.store(out + rows[:, None] * D + lanes[None, :], (total / weight[:, None]).to(out.dtype.element_ty))


@triton.jit
def attention_of_boxes(q, k, v, out, T, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    block = tl.program_id(0)
    rows, keys = block * BM + tl.arange(0, BM), tl.arange(0, BN)
    query = q.load([block * BM, 0])
    highest = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, D), tl.float32)
    for start in range(0, block * BM, BN):
        key, value = k.load([start, 0]).T, v.load([start, 0])
        highest, weight, total = step(query, key, value, rows, start + keys, scale, highest, weight, total, False)
    for start in range(block * BM, (block + 1) * BM, BN):
        key, value = k.load([start, 0]).T, v.load([start, 0])
        highest, weight, total = step(query, key, value, rows, start + keys, scale, highest, weight, total, True)
    out.store([block * BM, 0], (total / weight[:, None]).to(out.dtype))


def attention_arguments(wanted: dict[str, Any]) -> dict[str, str]:
    rows, columns, depth = wanted["tile"]
    names = ("q", "k", "v", "out")
    if not wanted["boxes"]:
        return dict.fromkeys(names, f"*{wanted['element']}") | {"T": "i32", "scale": "fp32"}
    made = {name: f"tensordesc<{wanted['element']}[{shape},{depth}]>"
            for name, shape in zip(names, (rows, columns, columns, rows), strict=True)}
    return made | {"T": "i32", "scale": "fp32"}


def boxes(wanted: dict[str, Any]) -> dict[str, str]:
    """Arguments of product_of_boxes."""
    rows, columns, depth = wanted["tile"]
    right = [columns, depth] if wanted["transposed"] else [depth, columns]

    def tensor(element: str, shape: list[int]) -> str:
        return f"tensordesc<{element}[{','.join(map(str, shape))}]>"

    return {"a": tensor(wanted["element"], [rows, depth]), "b": tensor(wanted["element"], right),
            "c": tensor(wanted["result"], [rows, columns]), "K": "i32"}


def weights(wanted: dict[str, Any]) -> dict[str, str]:
    """Arguments of product_of_weights."""
    narrow = {"int4": "u8", "int8": "i8", "fp8": "fp8e4nv"}[wanted["weights"]]
    return {"a": f"*{wanted['element']}", "b": f"*{narrow}", "s": "*fp32", "c": f"*{wanted['result']}",
            **dict.fromkeys(("M", "N", "K", "stride_a", "stride_b", "stride_s", "stride_c"), "i32")}


def vector(wanted: dict[str, Any]) -> dict[str, str]:
    """Arguments of vector_by_weights."""
    return {name: type for name, type in weights(wanted).items() if name not in ("M", "stride_a", "stride_c")}


def pointers(wanted: dict[str, Any]) -> dict[str, str]:
    """Arguments of product."""
    return {"a": f"*{wanted['element']}", "b": f"*{wanted['element']}", "c": f"*{wanted['result']}",
            **dict.fromkeys(("M", "N", "K", "stride_a", "stride_b", "stride_c"), "i32")}


def main() -> None:
    wanted = json.loads(sys.argv[1])
    attends, narrow = wanted["attention"], wanted.get("weights")
    if wanted.get("vector"):
        kernel, arguments = vector_by_weights, vector(wanted)
    elif narrow:
        kernel, arguments = product_of_weights, weights(wanted)
    elif attends:
        kernel, arguments = attention_of_boxes if wanted["boxes"] else attention, attention_arguments(wanted)
    else:
        kernel, arguments = (product_of_boxes, boxes(wanted)) if wanted["boxes"] else (product, pointers(wanted))
    divisible: dict[Any, Any] = {(number,): [["tt.divisibility", 16]] for number, type in enumerate(arguments.values())
                                 if not type.startswith("tensordesc") and type != "fp32"}
    names = ("BM", "BN", "D" if attends else "BK")
    constants = dict(zip(names, wanted["tile"], strict=not wanted.get("vector")))
    if narrow:
        constants |= {"BITS": 4 if narrow == "int4" else 8, "LOADS": wanted["loads"]}
    elif not attends:
        constants["TRANSPOSED"] = wanted["transposed"]
    seconds: list[float] = []
    text = ""

    def listen(*, times: Any, cache_hit: bool, **_: Any) -> None:
        assert not cache_hit
        before_ptxas = sum(microseconds for stage, microseconds in times.lowering_stages if stage != "cubin")
        seconds.append(1e-6 * (times.ir_initialization + before_ptxas))

    triton.knobs.compilation.listener = listen
    for _ in range(wanted["runs"]):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TRITON_CACHE_DIR"] = folder
            text = triton.compile(
                ASTSource(fn=kernel, signature=arguments | dict.fromkeys(constants, "constexpr"),
                          constexprs=constants, attrs=divisible),
                target=GPUTarget("cuda", int(wanted["level"].removeprefix("sm_").rstrip("a")), 32),
                options={"num_warps": wanted["warps"], "num_stages": wanted["stages"],
                         "ptx_version": PTX_VERSION}).asm["ptx"]
    print(json.dumps([text, seconds]))


if __name__ == "__main__":
    main()
