"""What the first run on a device is to show: every kernel of the library, each form of a launch, facts of the machine.

Where no device is, the same tests run on the emulated driver, with few kernels and small extents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import sapper as sp
from sapper.kernels import find, library
from sapper.kernels.record import LibraryKernel
from sapper.runtime import cuda
from sapper.runtime.dtypes import numpy_dtype
from sapper.targets.ptx.text import NEAR_ALIGN_BYTES

from .conftest import REAL
from .test_launch import product

if TYPE_CHECKING:
    from .emulated_driver import EmulatedDriver

M, N, K = sp.dims("M N K")
BF16 = numpy_dtype("bf16")
ENTRIES = library() if REAL else [find(name) for name in ("vector_add", "softmax_bf16", "matmul_nn_f32", "top_k")]
EXTENT = 1024 if REAL else 128


def run(entry: LibraryKernel, shape: dict[str, int]) -> None:
    given = entry.make_arguments(np.random.default_rng(0), shape)
    on_device = {name: cuda.array(value) if isinstance(value, np.ndarray) else value for name, value in given.items()}
    entry.kernel(*on_device.values())
    made = {name: value.numpy() if isinstance(value, cuda.DeviceArray) else value for name, value in on_device.items()}
    with np.errstate(all="ignore"):
        wrong = entry.compare(made, entry.reference(given))
    assert wrong is None, wrong


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_kernel_of_the_library(any_device: EmulatedDriver | None, entry: LibraryKernel) -> None:
    shapes = sorted(entry.check_shapes, key=lambda shape: int(np.prod(list(shape.values()))))
    for shape in shapes if REAL else shapes[len(shapes) // 2:][:1]:
        run(entry, shape)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("ragged", [0, 8, 40] if REAL else [0])
@pytest.mark.parametrize("schedule", [
    None, {"split": {"k": 1}}, {"split": {"k": 3}}, {"cluster": {"m": 2}}, {"cluster": {"n": 2}},
    {"cluster": {"m": 2}, "split": {"k": 3}}], ids=str)
def test_a_product(any_device: EmulatedDriver | None, schedule: dict[str, Any] | None, ragged: int) -> None:
    """Specialised warps and register budgets; launches that are cooperative, in clusters, and both."""
    height, width, depth = EXTENT + ragged, EXTENT + ragged, 2 * EXTENT + ragged
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((rows, depth), np.float32).astype(BF16) for rows in (height, width))
    out = cuda.empty((height, width))
    call = sp.prepare(product, cuda.array(a), cuda.array(b), out, **({"schedule": schedule} if schedule else {}))
    for _ in range(2):      # flags and counters are as they were
        call()
        np.testing.assert_allclose(out.numpy(), a.astype(np.float32) @ b.astype(np.float32).T, rtol=1e-4, atol=1e-2)
    if any_device is not None and schedule:
        facts = next(facts for name, facts in any_device.log if name == "launch")
        assert bool(facts["cluster"]) == ("cluster" in schedule)
        assert facts["cooperative"] == (schedule.get("split", {}).get("k", 1) > 1)


def test_shared_memory_starts_as_it_is_declared(any_device: EmulatedDriver | None) -> None:
    text = f""".version 7.0
.target sm_80
.address_size 64
.extern .shared .align {NEAR_ALIGN_BYTES} .b8 near[];
.visible .entry start(.param .b64 out)
{{
    .reg .b32 %r<2>; .reg .b64 %rd<2>;
    ld.param.b64 %rd1, [out];
    mov.b32 %r1, near;
    st.shared.b32 [%r1], %r1;
    st.global.b32 [%rd1], %r1;
    ret;
}}
"""
    out = cuda.empty(1, "i32")
    cuda.load(text)["start"]((1,), (1,), [out], shared_bytes=160 << 10)
    assert out.numpy()[0] % NEAR_ALIGN_BYTES == 0
