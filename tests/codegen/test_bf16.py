"""bf16 in machine code: every number widened and rounded, NaN of every kind, rows in order and by even and odd."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sapper.cli.code import generated_code
from sapper.codegen.machine import Instruction, Label, Memory
from sapper.ir.types import bf16, f32
from sapper.kernels import find
from sapper.lang.builtins import tiles
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.schedule import Schedule

from .run_native import RUNNABLE, run_native

MACHINES = [name for name in ("v3", "v4", "zen4") if name in RUNNABLE]
N = dims("N")


@kernel
def scaled(x: Tensor[bf16, N], y: Tensor[bf16, N]):
    for n in tiles(N):
        y[n] = (x[n].to(f32) * 1.01).to(bf16)


@kernel
def narrowed(x: Tensor[f32, N], y: Tensor[bf16, N]):
    for n in tiles(N):
        y[n] = (x[n] * 1.0).to(bf16)


@kernel
def widened(x: Tensor[bf16, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = x[n].to(f32)


@kernel
def raised(x: Tensor[bf16, N], s: f32, y: Tensor[bf16, N]):
    for n in tiles(N):
        y[n] = (x[n].to(f32) + s).to(bf16)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """NaN for NaN of the same sign, and all else to the bit."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))
    assert found[~nan].tobytes() == expected[~nan].tobytes()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFFC00000, 0x7F800000, 0x3F8CCCCD])
@pytest.mark.parametrize("machine", MACHINES)
def test_a_scalar_that_may_be_any_nan(machine: str, bits: int) -> None:
    """Rounding looks at no NaN here: of one that is passed the lower bits are cut off."""
    x = np.array([0.0, 1.5, -2.0, 3e38] * 9, ml_dtypes.bfloat16)
    y, scalar = np.zeros_like(x), np.uint32(bits).view(np.float32)
    run_native(raised.tile_ir(), {"x": x, "s": scalar, "y": y}, TARGETS[machine])
    with np.errstate(all="ignore"):
        assert_same(y, (x.astype(np.float32) + scalar).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("vectors", [1, 4])
@pytest.mark.parametrize("machine", MACHINES)
def test_every_number(machine: str, vectors: int) -> None:
    """Of bf16 no NaN has bits that rounding could carry out of it."""
    x = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    y, wide = np.zeros_like(x), np.zeros(x.shape, np.float32)
    schedule = Schedule(registers={"n": vectors})
    run_native(scaled.tile_ir(), {"x": x, "y": y}, TARGETS[machine], schedule=schedule)
    with np.errstate(all="ignore"):
        assert_same(y, (x.astype(np.float32) * np.float32(1.01)).astype(ml_dtypes.bfloat16))
    run_native(widened.tile_ir(), {"x": x, "y": wide}, TARGETS[machine], schedule=schedule)
    assert_same(wide, x.astype(np.float32))


@pytest.mark.parametrize("machine", MACHINES)
def test_nan_of_f32_stays_one(machine: str) -> None:
    """Its lower bits may be set, and all above them."""
    random = np.random.default_rng(1)
    bits = random.integers(0, 1 << 32, 4000, dtype=np.uint32)
    bits[:1000] |= np.uint32(0x7F800001)
    bits[1000:1004] = 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF8000, 0x7F800001
    x, y = bits.view(np.float32), np.zeros(4000, ml_dtypes.bfloat16)
    run_native(narrowed.tile_ir(), {"x": x, "y": y}, TARGETS[machine])
    with np.errstate(all="ignore"):
        assert_same(y, x.astype(ml_dtypes.bfloat16))


def test_what_widens_stays_in_a_register_through_loops_of_sums() -> None:
    """Else it is a load more for each vector, where two start in a cycle: two heads by four vectors of the values."""
    code = generated_code(find("attention_decode_bf16").kernel, TARGETS["zen3"], None, {"G": 4, "D": 64}, {})
    loops: list[list[Instruction]] = []
    label, rows = "", []
    for item in code.compiled.made.machine.body:
        if isinstance(item, Label):
            label, rows = item.name, []
            continue
        rows.append(item)
        if any(getattr(operand, "name", "") == label for operand in item.operands):
            loops.append(rows)
    values = next(loop for loop in loops if sum("vfmadd" in str(row.row) for row in loop) == 32)
    widened = [row for row in values if "vpshufb" in str(row.row)]
    assert len(widened) == 8
    assert not any(isinstance(operand, Memory) for row in widened for operand in row.operands)
