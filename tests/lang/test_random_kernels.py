"""Random kernels: the tile IR that the front end builds means what the kernel's own Python means."""

from __future__ import annotations

import itertools
import linecache
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper
from sapper.ir.verifier import verify
from sapper.tile import eager
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from tests.strategies import KernelCase, examples
from tests.strategies.nests import nests

HEAD = """\
def helper(x, y, factor=0.5):
    z = x * factor
    return z + y, z - y

@kernel
def k(a: Tensor[f32, M, N], b: Tensor[f32, M], c: Tensor[f32, N], s: f32, count: i32, out: Tensor[f32, M, N]):
"""
NUMBER = itertools.count()

leaves = st.sampled_from(["a[m, n]", "b[m]", "c[n]", "s", "0.5", "2", "t", "u", "m.to(f32)", "(n - m).to(f32)",
                          "-1.25"])


def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    two = st.tuples(inner, inner)
    return st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        two.map(lambda p: f"maximum({p[0]}, {p[1]})"),
        two.map(lambda p: f"({p[0]} / (abs({p[1]}) + 1.0))"),
        st.tuples(st.sampled_from(["abs", "tanh", "sigmoid", "cos"]), inner).map(lambda p: f"{p[0]}({p[1]})"),
        inner.map(lambda x: f"sum({x} + 0.0 * a[m, n], over=n)"),
        inner.map(lambda x: f"c[argmax({x} + a[m, n], over=n)]"),
        st.tuples(inner, inner, inner).map(lambda p: f"where({p[0]} < {p[1]}, {p[2]}, t)"),
        st.tuples(inner, inner).map(lambda p: f"where((m <= n) & ({p[0]} != {p[1]}), u, t)"),
        two.map(lambda p: f"helper({p[0]}, {p[1]})[1]"),
        inner.map(lambda x: f"(-{x})"),
        inner.map(lambda x: f"({x} if count > 2 else t)"),
        inner.map(lambda x: f"(s + {x}).to(bf16).to(f32)"),
    )


expressions = st.recursive(leaves, grow, max_leaves=6)
FULL = "({} + 0.0 * a[m, n])"

statements = st.one_of(
    expressions.map(lambda x: [f"t = {FULL.format(x)}"]),
    expressions.map(lambda x: [f"u = {FULL.format(x)}"]),
    expressions.map(lambda x: [f"t, u = u, {FULL.format(x)}"]),
    expressions.map(lambda x: [f"t, u = helper(t, {FULL.format(x)}, factor=0.25)"]),
    expressions.map(lambda x: ["for i in range(count):", f"    t = t * 0.5 + {FULL.format(x)}", "    u += i.to(f32)"]),
    expressions.map(lambda x: ["total = 0", "for i in range(3):", "    total += i", f"    t += {FULL.format(x)} * s",
                               "u += total.to(f32)"]),
    expressions.map(lambda x: ["if count > 1 and s < 0.5:", f"    t = {FULL.format(x)}", "else:", "    u = t + u"]),
    expressions.map(lambda x: [f"out[m, n] = {x}", "t += out[m, n]"]),
)


def kernel_of(source: str) -> Any:
    """The kernel k that a source defines."""
    file = f"<random kernel {next(NUMBER)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    world: dict[str, Any] = {name: getattr(sapper, name) for name in sapper.__all__}
    world["M"], world["N"] = sapper.dims("M N")
    exec(compile(source, file, "exec"), world)
    return world["k"]


def compiled(body: list[str], outer: str) -> Any:
    lines = [f"    {outer}", *([] if "n in" in outer else ["        n = whole(N)"]),
             "        t = a[m, n]", "        u = b[m] * c[n]", *(f"        {line}" for line in body),
             "        out[m, n] = t + u"]
    source = HEAD + "\n".join(lines) + "\n"
    return kernel_of(source), source


@settings(max_examples=examples(60))
@given(
    st.lists(statements, min_size=1, max_size=4),
    st.sampled_from(["for m in tiles(M):", "for m in each(M):"]),
    st.integers(0, 4),
    st.sampled_from([0.25, 1.5]),
    st.integers(0, 2**32 - 1),
)
def test_meaning(parts: list[list[str]], outer: str, count: int, s: float, seed: int) -> None:
    k, source = compiled([line for part in parts for line in part], outer)
    function = k.tile_ir()
    verify(function, TILE_OPS)
    random = np.random.default_rng(seed)
    arguments = {
        "a": random.standard_normal((3, 4)).astype(np.float32), "b": random.standard_normal(3).astype(np.float32),
        "c": random.standard_normal(4).astype(np.float32), "s": s, "count": count,
    }
    results = []
    for size in (None, 2, "eager"):
        out = np.zeros((3, 4), np.float32)
        if size == "eager":
            eager.run(k, {**arguments, "out": out})
        else:
            interpret(function, {**arguments, "out": out}, size, check_races=True)
        results.append(out)
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-5, atol=1e-5, err_msg=source)


@settings(max_examples=examples(60))
@given(case=nests(), fixed=st.sets(st.integers(0, 20)))
def test_what_is_accepted_is_so_with_extents_fixed(case: KernelCase, fixed: set[int]) -> None:
    """fixed: which dimensions are left, in the order of their names, or all are fixed."""
    kernel = case.load()
    sizes = {dim: size for dim, size in case.extents if dim in kernel.tile_ir().attributes["dims"]}
    kernel.tile_ir({dim: size for number, (dim, size) in enumerate(sizes.items()) if number not in fixed})
