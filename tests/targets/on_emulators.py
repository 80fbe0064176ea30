"""Kernels as machine code of processors that tests have an emulator for (sapper/emulate)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest

from sapper.codegen.compile import CompiledCode, compile_lane
from sapper.codegen.machine import Instruction
from sapper.codegen.pipeline import facts_of, finish_lane, to_lane
from sapper.emulate import CODE_RUNNERS
from sapper.emulate.errors import EmulationError
from sapper.ir.nodes import Function
from sapper.ir.scratch import scratch_bytes
from sapper.targets import target
from sapper.tile.schedule import Schedule
from tests.lane.run_lane import argument_words, dims_of, specialize
from tests.lang.test_random_kernels import kernel_of

TARGETS = {"aarch64": ("neoverse-n1", "neoverse-v2"), "riscv64": ("rva23u64", "spacemit-x60")}
"""Family -> two of its targets."""


def is_there(family: str) -> bool:
    """Whether the family's emulator is installed."""
    return CODE_RUNNERS[family].is_there()


def needs_emulator(family: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not is_there(family), reason=f"mend: {CODE_RUNNERS[family].mend}")


def compile_for(function: Function, arguments: dict[str, Any], name: str,
                hints: dict[str, int] | None = None) -> tuple[CompiledCode, Function]:
    """Machine code for these arguments, its allocation proved by the independent checker; and its lane IR."""
    facts, assumed = target(name), specialize(function, arguments, hints)
    lane = finish_lane(to_lane(function, Schedule(), facts_of(facts), assumed), facts)
    return compile_lane(lane, facts, checked=True), lane


def run_emulated(function: Function, arguments: dict[str, Any], name: str, workers: int = 1,
                 hints: dict[str, int] | None = None, at_end: bool = True) -> CompiledCode:
    """Compile for these arguments (the function is changed) and run; arrays take what was written.

    AssertionError, with the text, where the code reaches beyond its buffers, does not end or does not leave registers
    as it found them.
    """
    made, lane = compile_for(function, arguments, name, hints)
    facts = target(name)
    runner = CODE_RUNNERS[facts.family]
    run_code = import_module(f"sapper.emulate.{runner.module}").run_code
    try:
        run_code(made.bytes, lambda buffers: argument_words(function, lane.attributes["slots"], arguments,
                                                            lambda name: buffers.add_array(arguments[name])),
                 scratch_bytes(lane.attributes["scratch"], dims_of(function, arguments)), workers, at_end,
                 **{fact: getattr(facts, fact) for fact in runner.facts})
    except EmulationError as error:
        raise AssertionError(f"{error}\n{made.text}") from None
    return made


def run_crowded(name: str, count: int) -> tuple[CompiledCode, set[str]]:
    """Run a kernel with so many rows that are all wanted at the end, and compare what it gives. Its code, and the names
    of the rows in that."""
    rows = "\n".join(f"        v{i} = x[{i}, n] * x[{(i + 1) % count}, n]" for i in range(count))
    total = " + ".join(f"v{i} * v{count - 1 - i}" for i in range(count))
    kernel = kernel_of(f"@kernel\ndef k(x: Tensor[f32, {count}, N], y: Tensor[f32, N]):\n"
                       f"    for n in tiles(N):\n{rows}\n        y[n] = {total}\n")
    x = np.random.default_rng(0).standard_normal((count, 37), np.float32)
    arguments = {"x": x, "y": np.zeros(37, np.float32)}
    made = run_emulated(kernel.tile_ir(), arguments, name)
    products = x.astype(np.float64) * np.roll(x, -1, 0)
    np.testing.assert_allclose(arguments["y"], (products * products[::-1]).sum(0), rtol=1e-4, atol=1e-4)
    return made, {item.row.name for item in made.machine.body if isinstance(item, Instruction)}
