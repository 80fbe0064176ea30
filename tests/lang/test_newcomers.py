"""What people try who come from NumPy, PyTorch or Triton: refused where it stands, with how it is said here."""

from __future__ import annotations

import copy
import linecache
import pickle
import re
from typing import Any

import numpy as np
import pytest

import sapper
from sapper import CallError, KernelError, Tensor, dims, f32, kernel, tiles

N, K = dims("N K")

HEAD = """
import functools, math
import numpy as np
import sapper as sp
from sapper import *

M, N, K = dims("M N K")
W = (0.5, 0.25)

def logged(function):
    @functools.wraps(function)
    def call(*arguments):
        return function(*arguments)
    return call

def double(x: Tensor[f32, K], y: Tensor[f32, K]):
    for k in tiles(K):
        y[k] = 2.0 * x[k]
"""
FRAME = """
@kernel
def f(x: Tensor[f32, M, N], b: Tensor[f32, 1, N], v: Tensor[f32, N], s: Tensor[f32], y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
"""
BODIES = {
    "y[m, n] = sp.clip(x[m, n], 0.0, 1.0)": "write minimum(maximum(x, low), high)",
    "y[m, n] = clip(x[m, n], 0.0, 1.0)": "write minimum(maximum(x, low), high)",
    "y[m, n] = where(np.isnan(x[m, n]), 0.0, x[m, n])": "write x != x",
    "y[m, n] = math.expm1(x[m, n])": "write exp(x) - 1.0",
    "y[m, 0] = x[m, n].mean()": "write sum(x, over=n) / N.to(f32)",
    "y[m, 0] = x[m, n].sum(over=n)": "write sum(x[m, n], over=n)",
    "y[m, n] = where(any(x[m, n] > 0.0), 1.0, 0.0)": "write max(x.to(i32), over=n) != 0",
    "for i, t in enumerate(x): y[m, n] = t": "walk an extent, for n in tiles(N)",
    "y[m, n] = x[m, n][:, None]": "leave it out: axes have names",
    "y[m, n] = v[n, None]": "leave None out: axes have names",
    "y[m, n] = f64(x[m, n])": "write x[m, n].to(f64)",
    "y[m, n] = x[m, n] + b[m, n]": "write 0 for m: an extent of 1 is not stretched",
    "s[...] = sum(x[m, n], over=n)": "write s[()]",
    "for i in range(2): y[m, n] = W[i] * x[m, n]": "walk the tuple, for x in W",
    "for i in range(2): y[m, n] = W[i] + x[m, n]": "for k in [k for k in range(4)]",
    "y[m, n] = x[m, n].half().float()": "write x[m, n].to(f16)",
    "y[m, n] = x[m, n].to(f16).float()": "write x[m, n].to(f16).to(f32)",
    "y[m, v[n].to(i32)] += x[m, n]": "sums, as `y[...] += x`, may meet in one over tiles(...)",
    "y[m, k] = 0.0": "bring the axis: k = whole(K), or a loop over tiles(K)",
    "c = x[m, n].to(i32) @ v[n].to(i64)": "write sum(a * b, over=n), of equal dtypes",
    "c = x[m, n].to(i8).to(i32) @ v[n].to(i8).to(i32)": "leave .to(...) out: products of i8 and u8 are summed in i32",
    "y[m, n] = where(x[m, n].to(i32) > 0, x[m, n].to(i32), float('-inf')).to(f32)": "write -2147483648",
    "c = []": "write a tuple, (a, b), or [... for i in range(3)]",
    "c = (x[m, n], v[n]); c[0] = v[n]": "make a new tuple: [new if k == 0 else v[k] for k in range(4)]",
    "k = sp.dims('K')": "write it above the kernel",
    "double(v, v)": "dimensions of a kernel go by name in what it calls",
}
WHOLE = {
    """
@kernel
def f(x: Tensor[f32, K], y: Tensor[f32, 1]):
    total = 0.0
    for k in tiles(K):
        total += x[k]
    y[0] = total
""": "to add up over k, reduce what is added: sum(..., over=k)",
    """
class Scale:
    @kernel
    def f(self, x: Tensor[f32, K]):
        x[0] = 1.0
""": "leave self out",
    """
class Scale:
    @kernel
    @staticmethod
    def f(x: Tensor[f32, K]):
        x[0] = 1.0
""": "put @staticmethod above @kernel",
    "f = kernel(kernel(double))": "leave one @kernel out",
    "f = kernel(logged(double))": "put @kernel below the other decorators",
    """
@kernel
def f(x: Tensor[f32, K], mode: str):
    x[0] = 1.0
""": "a function that makes the kernel has it as a parameter",
}


def names_of(text: str, name: str) -> dict[str, Any]:
    """The names of a text that is run as a notebook runs a cell: its lines are where `linecache` looks."""
    file = f"<cell {name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    found: dict[str, Any] = {"__name__": "cell"}
    exec(compile(text, file, "exec"), found)
    return found


@pytest.mark.parametrize("text", [*BODIES, *WHOLE], ids=lambda text: " ".join(text.split())[:40])
def test_the_mend(text: str) -> None:
    written = HEAD + (f"{FRAME}        {text}\n" if text in BODIES else text)
    with pytest.raises(KernelError, match=re.escape((BODIES | WHOLE)[text])):
        names_of(written, text)["f"].tile_ir()


def test_names_that_hide_those_of_python() -> None:
    with pytest.raises(RuntimeError, match=r"^max\(\) was called outside a kernel.*mend: .*`from builtins import max`"):
        sapper.max(1, 2)
    with pytest.raises(RuntimeError, match=r"in one that such a function calls$"):
        sapper.exp(1.0)


def test_dtypes_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'u32'; found a dtype .* expected f64, f32, .*; mend: "):
        _ = sapper.u32
    with pytest.raises(AttributeError, match=r"no attribute 'fused'$"):
        _ = sapper.fused


@kernel
def at_the_top(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = x[n]


def test_kernels_are_copied_and_pickled_as_functions_are() -> None:
    @kernel
    def within(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = x[n]

    for made in (at_the_top, within):
        made(np.zeros(3, np.float32), np.zeros(3, np.float32))
        assert copy.copy(made) is made and copy.deepcopy({"kernel": made})["kernel"] is made
    assert pickle.loads(pickle.dumps(at_the_top)) is at_the_top
    with pytest.raises(pickle.PicklingError, match=r"kernel within can't be pickled.* mend: define it at the top"):
        pickle.dumps(within)


def test_source_that_nobody_kept() -> None:
    found: dict[str, Any] = {}
    exec(HEAD + "f = kernel(double)", found)
    with pytest.raises(KernelError, match="in a file that is imported or run, or in a notebook's cell"):
        found["f"].tile_ir()


def test_calls() -> None:
    @kernel
    def f(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = x[n]

    x = np.zeros(4, np.float32)
    with pytest.raises(CallError, match=r"write @kernel\(in_place=\[\('y', 'x'\)\]\)"):
        f(x, x)
    frozen = x.copy()
    frozen.flags.writeable = False
    with pytest.raises(CallError, match=r"y = y.copy\(\), and pass that"):
        f(x, frozen)
    with pytest.raises(CallError, match=r"x.astype\(numpy.float32\); of PyTorch x.to\(torch.float32\)"):
        f(np.zeros(4), x)
