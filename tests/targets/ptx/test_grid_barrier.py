"""The barrier of all workers between two parts of a kernel: weakened, it is a race where a part reads what another
worker wrote in the one before.

It stands between any two parts. Where these touch no memory that either writes, nothing is handed over, and a weak
barrier is as good: such a mutant is no fault, but for one whose arrivals are atomic to their own block alone. The
lowering can't leave it out: whether two tensors of one type are the
same memory (`in_place`) is said of calls, not of programs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, emulate, f32, targets, tiles
from sapper.codegen.pipeline import compile_kernel
from sapper.kernels import find

M, N = sp.dims("M N")


@sp.kernel
def handed_over(a: Tensor[f32, M, N], b: Tensor[f32, M, N], c: Tensor[f32, N, M]):
    for m, n in tiles(M, N):
        b[m, n] = a[m, n] * 2.0
    for n, m in tiles(N, M):
        c[n, m] = b[m, n] + 1.0


OF_A_BLOCK = "of a block's scope"
MUTANTS: dict[str, Callable[[str], str]] = {
    OF_A_BLOCK: lambda text: re.sub(r"(\.acq_rel|\.release|\.acquire)\.gpu", r"\1.cta", text),
    "relaxed, without fences": lambda text: re.sub(
        r"\.(acq_rel|release|acquire)\.gpu\.global", ".relaxed.gpu.global", text.replace(" fence.acq_rel.gpu;", "")),
    "nobody waits": lambda text: re.sub(r"@!?%p\d+ bra\.uni \$barrier_spin\d+;", "", text),
}


def wrong(kernel: Any, arguments: dict[str, Any], change: Callable[[str], str]) -> bool:
    """Whether the emulator finds a fault."""
    tensors = [name for name, value in arguments.items() if isinstance(value, np.ndarray)]
    dims = kernel.tile_ir().attributes["dims"]
    code = compile_kernel(kernel, {}, dict.fromkeys(tensors, "contiguous"), dict.fromkeys(dims, (8192, 1)),
                          targets.target("sm_80"), None)
    text = change(code.text())
    assert "barrier_spin" in code.text()
    try:
        emulate.run(kernel, *arguments.values(), target="sm_80", workers=8, options=emulate.Options(step_limit=100_000),
                    code=dataclasses.replace(code, text=lambda: text))
    except emulate.EmulationError:
        return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_weak_barrier_is_a_race(mutant: str) -> None:
    a = np.random.default_rng(0).standard_normal((70, 90), np.float32)
    arguments = {"a": a, "b": np.zeros_like(a), "c": np.zeros((90, 70), np.float32)}
    assert not wrong(handed_over, arguments, lambda text: text)
    np.testing.assert_array_equal(arguments["c"], a.T * 2 + 1)
    assert MUTANTS[mutant]("") == "" and wrong(handed_over, arguments, MUTANTS[mutant])


@pytest.mark.parametrize("mutant", MUTANTS)
def test_where_nothing_is_handed_over_it_is_as_good(mutant: str) -> None:
    """rotate_and_cache: queries first, then keys and values."""
    entry = find("rotate_and_cache_bf16")
    parts = [{(op.name, op.operands[0].name) for op in loop.blocks[0].ops if op.name in ("load", "store")}
             for loop in entry.kernel.tile_ir().body.ops if loop.blocks]
    first, second = ({name for _, name in part} for part in parts)
    assert not any((op == "store") and name in first & second for part in parts for op, name in part)
    arguments = {name: np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value for name, value in
                 entry.make_arguments(np.random.default_rng(3), entry.check_shapes[-1]).items()}
    expected = entry.reference(arguments)
    if mutant == OF_A_BLOCK:
        assert wrong(entry.kernel, arguments, MUTANTS[mutant])
        return
    assert not wrong(entry.kernel, arguments, MUTANTS[mutant])
    assert entry.compare(arguments, expected) is None
