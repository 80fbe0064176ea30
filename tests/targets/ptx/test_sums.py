"""Sums at elements that are met again: `red` adds in one step, from any thread of any block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, emulate, f32, tiles, zeros
from sapper.codegen.pipeline import compile_kernel
from sapper.targets import target
from sapper.targets.ptx import assembler
from sapper.tile.rounding import expect
from tests.lang.test_random_kernels import kernel_of
from tests.lang.test_sums import histogram, rows_at_tokens, windows
from tests.strategies import assert_expected, examples
from tests.strategies.sums import arguments_of_sums, sums

M, N, K, V = sp.dims("M N K V")
needs_ptxas = pytest.mark.skipif(assembler.find_tool("ptxas") is None, reason="ptxas is not installed")


def text_of(kernel: Any, level: str) -> str:
    dims = kernel.tile_ir().attributes["dims"]
    names = [name for name, type in kernel.parameters]
    return compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"), dict.fromkeys(dims, (2**31 - 1, 1)),
                          target(level), None).text()


@sp.kernel
def experts_added(x: Tensor[f32, M, K], w: Tensor[f32, K, N], token: Tensor[sp.i32, M], out: Tensor[f32, V, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += x[m, k] @ w[k, n]
        out[token[m], n] += acc


def run(kernel: Any, arguments: dict[str, np.ndarray], level: str, lazy: bool = False, workers: int = 3) -> set[str]:
    """The mnemonics; races, reads of what nobody wrote, and bounds are checked."""
    expected = expect(kernel.tile_ir(), arguments, runs=2, tile_sizes=(None, 3))
    counters = emulate.run(kernel, *arguments.values(), target=level, workers=workers,
                           options=emulate.Options(lazy=lazy)).counters
    assert_expected(arguments, expected)
    return set(counters.instructions)


@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
def test_threads_add_in_one_step(level: str) -> None:
    random = np.random.default_rng(0)
    token = random.integers(0, 4, 33).astype(np.int32)
    rows = {"g": random.standard_normal((33, 70)).astype(np.float32), "token": token,
            "out": np.zeros((4, 70), np.float32)}
    assert "red.relaxed.gpu.global.add.f32" in run(rows_at_tokens, rows, level)
    assert "red.relaxed.gpu.global.add.u32" in run(histogram, {"x": token, "count": np.zeros(4, np.int32)}, level)
    assert "red.relaxed.gpu.global.add.f32" in run(windows, {
        "x": random.standard_normal((2, 5, 40)).astype(np.float32), "image": np.zeros((2, 44), np.float32)}, level)


@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
def test_sums_of_products_are_added_once(level: str) -> None:
    random = np.random.default_rng(0)
    x, w = random.standard_normal((70, 24)).astype(np.float32), random.standard_normal((24, 70)).astype(np.float32)
    run(experts_added, {"x": x, "w": w, "token": random.integers(0, 4, 70).astype(np.int32),
                        "out": np.zeros((4, 70), np.float32)}, level)


@pytest.mark.parametrize(("dtype", "level", "mnemonic"), [
    ("f16", "sm_80", "red.relaxed.gpu.global.add.noftz.f16"),
    ("bf16", "sm_90a", "red.relaxed.gpu.global.add.noftz.bf16"),
    ("f64", "sm_80", "red.relaxed.gpu.global.add.f64"), ("i64", "sm_80", "red.relaxed.gpu.global.add.u64"),
    ("bf16", "sm_80", None), ("i8", "sm_90a", None)])
def test_what_red_has(dtype: str, level: str, mnemonic: str | None) -> None:
    """What it has not one warp adds in turn."""
    kernel = kernel_of(f"@kernel\ndef k(x: Tensor[{dtype}, M, N], t: Tensor[i32, M], out: Tensor[{dtype}, 9, N]):\n"
                       "    for m, n in tiles(M, N):\n        out[t[m], n] += x[m, n]\n")
    arguments = arguments_of_sums(dtype, 12, 40, 5, 0)
    given_ = {"x": arguments["x"], "t": arguments["t"], "out": arguments["out"][:9, :40].copy()}
    found = {name for name in run(kernel, given_, level) if name.startswith(("red", "atom"))}
    assert found == ({mnemonic} if mnemonic else set())


@settings(max_examples=examples(25))
@given(sums(), st.integers(0, 20), st.integers(1, 40), st.integers(1, 30), st.integers(0, 99),
       st.sampled_from(["sm_80", "sm_90a"]), st.booleans())
def test_random_sums(drawn: tuple[str, str], rows: int, columns: int, spread: int, seed: int, level: str, lazy: bool
                     ) -> None:
    source, dtype = drawn
    run(kernel_of(source), arguments_of_sums(dtype, rows, columns, spread, seed), level, lazy)


@needs_ptxas
@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("kernel", [rows_at_tokens, histogram, windows, experts_added], ids=lambda k: k.name)
def test_ptxas_takes_it(kernel: Any, level: str) -> None:
    (made,) = assembler.assemble([text_of(kernel, level)], level).values()
    assert not made.spilled_bytes
