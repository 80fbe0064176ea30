"""Counting and timing a call."""

from __future__ import annotations

import platform

import numpy as np
import pytest

from sapper.codegen.explain import explain
from sapper.codegen.liveness import blocks_of
from sapper.runtime.errors import ArgumentError
from sapper.targets import target
from sapper.targets.x86_64.allocation import register_file
from sapper.tune import profile as module
from sapper.tune.profile import NotProfiled, counting, cycles_per_second, profile
from tests.codegen import library_kernels as source
from tests.codegen.run_native import RUNNABLE

MACHINES = [name for name in ("v3", "v4") if name in RUNNABLE]
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64" or not MACHINES, reason="runs x86-64 code")


@pytest.mark.parametrize("machine", MACHINES)
def test_blocks_are_counted_and_results_stay(machine: str) -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((70, 64), np.float32), random.standard_normal((64, 96), np.float32)
    c = np.full((70, 96), np.nan, np.float32)
    made = profile(source.matmul, {"a": a, "b": b, "c": c}, target(machine))
    np.testing.assert_allclose(c, a @ b, rtol=1e-4, atol=1e-4)
    facts = explain(made.compiled.made.machine, target(machine), block_counts=made.block_counts)
    assert made.block_counts[0] == 1 and made.dims == {"M": 70, "K": 64, "N": 96}
    # Every multiply-add of the product is in a loop that was counted: 2 * M * N * K operations, no more and no less.
    operations = sum(loop.operations * (loop.passes or 0) for loop in facts.loops if loop.innermost)
    assert operations == 2 * 70 * 96 * 64
    assert 0 < made.call_s < made.timing.median_s and facts.call_cycles() > 0


def test_static_dims_are_compiled_in() -> None:
    x = np.ones((8, 16), np.float32)
    made = profile(source.scale, {"x": x, "factor": 3.0, "out": np.zeros_like(x)}, target(MACHINES[0]), {"N": 16})
    assert made.static == {"N": 16} and "dim.N" not in made.compiled.slots


def test_counting_changes_neither_registers_nor_flags() -> None:
    """Between two instructions of the code there is only what saves and restores what it uses."""
    from sapper.codegen.library import c_kernel

    function = c_kernel(source.scale, target("v3")).variants[0].machine
    made, blocks = counting(function, register_file(256, False))
    assert blocks == len(blocks_of(function.body, register_file(256, False))[0]) - 1
    assert len(made.body) == len(function.body) + 5 * blocks
    added = [item for item in made.body if item not in function.body]
    assert {item.row.name for item in added} == {"push", "mov.64", "lea.64", "pop"}
    assert not any(item.row.flags_written for item in added)


def test_a_call_that_crashes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.ones((8, 16), np.float32)
    compile_for_call = module.compile_for_call

    def compile_trap(*arguments, **options):
        import dataclasses

        made = compile_for_call(*arguments, **options)
        return dataclasses.replace(made, code=b"\xcc" + made.code[1:])

    monkeypatch.setattr(module, "compile_for_call", compile_trap)
    with pytest.raises(NotProfiled, match="between guard pages"):
        profile(source.scale, {"x": x, "factor": 3.0, "out": np.zeros_like(x)}, target(MACHINES[0]))


def test_arguments_are_checked() -> None:
    with pytest.raises(ArgumentError, match="at least 8"):
        profile(source.pairs, {"x": np.ones((2, 7), np.float32), "out": np.ones((2, 4), np.float32)},
                target(MACHINES[0]))


def test_the_clock_is_that_of_a_processor() -> None:
    assert 2e8 < cycles_per_second() < 1e10
