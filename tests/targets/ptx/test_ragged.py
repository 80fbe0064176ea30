"""Products of ragged groups of rows (a mixture of experts) on matrix instructions: groups begin and end anywhere."""

from __future__ import annotations

import numpy as np
import pytest

from sapper import emulate, targets
from sapper.codegen.pipeline import compile_kernel
from sapper.kernels import find

NAMES = ("grouped_matmul_bf16_bf16", "grouped_matmul_swiglu_bf16_bf16", "grouped_matmul_f32", "grouped_matmul_bf16",
         "grouped_matmul_swiglu_bf16", "grouped_matmul_i8", "grouped_matmul_swiglu_f32")


def run(name: str, level: str, aligned: bool, lazy: bool = False) -> dict[str, int]:
    """An empty group, one of a single row, one of more than a tile. Leaves counts of opcodes."""
    entry = find(name)
    shape = {"E": 3, "B": 1, "L": 72, "F": 80, "I": 80, "J": 140}
    arguments = entry.make_arguments(np.random.default_rng(7), {d: shape[d] for d in entry.check_shapes[0]})
    arguments["start"][:] = 0, 0, 1
    arguments["stop"][:] = 0, 1, 140
    names = [parameter for parameter, _ in entry.kernel.parameters] if aligned else []
    expected = entry.reference(arguments)
    counters = emulate.run(entry.kernel, *arguments.values(), target=level, workers=1, aligned=names,
                           options=emulate.Options(lazy=lazy)).counters
    wrong = entry.compare(arguments, expected)
    assert wrong is None, wrong
    return dict(counters.instructions)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NAMES)
def test_on_the_emulator(name: str) -> None:
    assert any(opcode.startswith("mma.sync") for opcode in run(name, "sm_80", True))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("level", "aligned", "lazy"), [("sm_80", True, True), ("sm_80", False, False),
                                                        ("sm_90a", True, False), ("sm_90a", True, True),
                                                        ("sm_90a", False, False)])
def test_levels_and_modes(level: str, aligned: bool, lazy: bool) -> None:
    """Groups of warps copy boxes of rows that may belong to the next group, and store only their own."""
    opcodes = run("grouped_matmul_bf16_bf16", level, aligned, lazy)
    product = "wgmma.mma_async" if level == "sm_90a" and aligned else "mma.sync"
    assert any(opcode.startswith(product) for opcode in opcodes)


def test_groups_run_in_order_in_each_task() -> None:
    """Blocks of columns are tasks; warps of a worker take each group's tiles together."""
    entry = find("grouped_matmul_bf16_bf16")
    names = [parameter for parameter, _ in entry.kernel.parameters]
    made = compile_kernel(entry.kernel, {}, dict.fromkeys(names, "contiguous"),
                          dict.fromkeys("EBLFJ", (2**31 - 1, 64)), targets.target("sm_80"), None, frozenset(names))
    assert made.warps == 4 and made.tasks == (((1, ("B",), 1),),)
