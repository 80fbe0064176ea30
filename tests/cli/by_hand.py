"""A user's file with a kernel by hand, one by hand that is wrong, one with a block in it, and one whose schedule may
name a block."""

from __future__ import annotations

from pathlib import Path

SOURCE = '''
import sapper as sp
import sapper.kernels.by_hand.rows  # the block exp_by_table
from sapper import Tensor, f32, i32, tiles, x86

M, N = sp.dims("M N")


@sp.kernel
def doubled(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = 2.0 * x[m, n]


@doubled.assembly(features="avx2", contiguous="x y", divisible={"N": 16})
def by_ymm(a):
    x, y, count = a.data("x"), a.data("y"), a.r64()
    x86.mov(count, a.extent("M"))
    x86.imul(count, a.extent("N"))
    with a.loop(0, count, 8) as at:
        row = a.ymm()
        x86.vmovups(row, x86.ptr[x + at * 4])
        x86.vaddps(row, row, row)
        x86.vmovups(x86.ptr[y + at * 4], row)
    x86.ret()


@sp.kernel
def tripled(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = 3.0 * x[n]


@tripled.assembly(features="avx2", contiguous="x y", divisible={"N": 16})
def twice_only(a):
    x, y = a.data("x"), a.data("y")
    with a.loop(0, a.extent("N"), 8) as at:
        row = a.ymm()
        x86.vmovups(row, x86.ptr[x + at * 4])
        x86.vaddps(row, row, row)
        x86.vmovups(x86.ptr[y + at * 4], row)
    x86.ret()


@x86.block("last_byte", inputs="i32", result="i32", features="avx512f")
def last_byte(out, x):
    x86.vpslld(out, x, 24)
    x86.vpsrld(out, out, 24)


@sp.kernel
def bytes_of(x: Tensor[i32, N], y: Tensor[i32, N]):
    for n in tiles(N):
        y[n] = sp.asm(last_byte, x[n], meaning=lambda v: v & 255)


@sp.kernel
def exponential(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = sp.exp(x[n])
'''


def write(directory: Path) -> str:
    path = directory / "user_by_hand.py"
    path.write_text(SOURCE, encoding="utf-8")
    return str(path)


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(SOURCE.splitlines(), 1) if text in line)
