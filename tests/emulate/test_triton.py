"""PTX that Triton made (tools/make_ptx_data.py) runs right on the emulator, eager and lazy, with all checks on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sapper import emulate
from sapper.emulate import Options, TensorMap, Uninitialised

DATA = Path(__file__).parent / "data"
BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def text_of(name: str) -> str:
    return (DATA / f"triton_{name}.ptx").read_text(encoding="utf-8")


def with_early_waits(text: str) -> str:
    """Each tcgen05.wait::ld directly after its tcgen05.ld: LLVM moved uses of the registers before it."""
    wait = "tcgen05.wait::ld.sync.aligned;"
    return re.sub(r"(tcgen05\.ld\.[^;]*;)", rf"\1 {wait}", text.replace(wait, ""))


def run(name: str, grid: tuple[int, ...], arguments: list[Any], shared_bytes: int, lazy: bool,
        cooperative: bool = False, races: bool = True, text: str | None = None,
        tensor_fences: bool = False, uninitialised: bool = True) -> emulate.Result:
    """Launch the kernel of a file; Triton adds two scratch pointers at the end, which stay unused, and no
    tcgen05.fence. text: in place of the file's."""
    module = emulate.load(with_early_waits(text_of(name)) if text is None else text)
    scratch = [np.int64(0), np.int64(0)]
    return module.launch(grid=grid, arguments=[*arguments, *scratch], shared_bytes=shared_bytes,
                         cooperative=cooperative,
                         options=Options(lazy=lazy, races=races, tensor_fences=tensor_fences,
                                         uninitialised=uninitialised))


def random(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype) == np.int8:
        return rng.integers(-128, 128, shape, dtype=np.int8)
    return rng.standard_normal(shape).astype(dtype)


def descriptor(array: Any, box: tuple[int, ...]) -> list[Any]:
    """A tensor descriptor as Triton passes it: the map, the shape, the strides in elements."""
    strides = [np.int64(stride // array.itemsize) for stride in array.strides]
    return [TensorMap(array, box, swizzle=128), *(np.int32(extent) for extent in array.shape), *strides]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(("name", "dtype", "result", "block", "shared_bytes", "transposed"), [
    ("matmul_bf16_sm80", BF16, np.float32, 128, 49152, False),
    ("matmul_bf16_sm90", BF16, np.float32, 128, 65536, False),
    ("matmul_f16_sm80", np.float16, np.float16, 64, 12288, False),
    ("matmul_f16_sm90", np.float16, np.float16, 64, 16384, False),
    ("matmul_tf32_sm80", np.float32, np.float32, 64, 32768, False),
    ("matmul_tf32_sm90", np.float32, np.float32, 64, 49152, False),
    ("matmul_i8_sm80", np.int8, np.int32, 64, 16384, True), ("matmul_i8_sm90", np.int8, np.int32, 64, 24576, True),
    ("matmul_e4m3_sm89", E4M3, np.float32, 64, 16384, True), ("matmul_e4m3_sm90", E4M3, np.float32, 64, 24576, True),
    ("matmul_e5m2_sm90", E5M2, np.float32, 64, 24576, True),
    ("matmul_bf16_sm100", BF16, np.float32, 128, 81936, False),
    ("matmul_f16_sm100", np.float16, np.float16, 64, 20496, False),
    ("matmul_tf32_sm100", np.float32, np.float32, 64, 49168, False),
    ("matmul_i8_sm100", np.int8, np.int32, 64, 24592, True), ("matmul_e4m3_sm100", E4M3, np.float32, 64, 24592, True),
    ("matmul_e5m2_sm100", E5M2, np.float32, 64, 24592, True),
])
def test_matmul(name: str, dtype: Any, result: Any, block: int, shared_bytes: int, transposed: bool,
                lazy: bool) -> None:
    m, n, k = (80, 144, 208)
    a, b = random((m, k), dtype), random((n, k) if transposed else (k, n), dtype, 1)
    c = np.zeros((m, n), result)
    grid = (-(-m // block), -(-n // block))
    run(name, grid, [a, b, Uninitialised(c), m, n, k, k, b.shape[1], n], shared_bytes, lazy)
    wide = np.int64 if dtype == np.int8 else np.float64
    x, y = a.astype(wide), b.astype(wide)
    exact = x @ (y.T if transposed else y)
    tolerance = {np.int32: 0.0, np.float16: 0.04}.get(result, 0.05 if "tf32" in name else 1e-4)
    assert np.abs(c.astype(wide) - exact).max() <= tolerance


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(("name", "shared_bytes"), [
    ("matmul_tma_sm90", 73752), ("matmul_specialised_sm90", 106656), ("matmul_tma_sm100", 73776),
    ("matmul_specialised_sm100", 73948)])
def test_matmul_with_tensor_copies(name: str, shared_bytes: int, lazy: bool) -> None:
    m, n, k = 104, 136, 328
    a, b, c = random((m, k), BF16), random((k, n), BF16, 1), np.zeros((m, n), BF16)
    arguments = [*descriptor(a, (64, 64)), *descriptor(b, (64, 64)), *descriptor(c, (64, 64)), k]
    if name == "matmul_specialised_sm90":  # both of its groups of consumers store the whole tile: a race, if benign
        with pytest.raises(emulate.RaceError, match="race on argument 2"):
            run(name, (2, 2), arguments, shared_bytes, lazy)
    run(name, (2, 2), arguments, shared_bytes, lazy, races=name != "matmul_specialised_sm90")
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert np.abs(c.astype(np.float64) - exact).max() <= np.abs(exact).max() * 2.0**-8


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(("name", "shared_bytes"), [
    ("attention_sm80", 40960), ("attention_sm90", 57344), ("attention_sm100", 57376)])
def test_causal_attention(name: str, shared_bytes: int, lazy: bool) -> None:
    length, width = 100, 64
    q, k, v = (random((length, width), BF16, seed) for seed in range(3))
    out = np.zeros((length, width), BF16)
    run(name, (2,), [q, k, v, Uninitialised(out), length, np.float32(0.125 * np.log2(np.e))], shared_bytes, lazy)
    scores = q.astype(np.float64) @ k.astype(np.float64).T * 0.125
    scores[np.triu_indices(length, 1)] = -np.inf
    share = np.exp(scores - scores.max(axis=1, keepdims=True))
    exact = share @ v.astype(np.float64) / share.sum(axis=1, keepdims=True)
    assert np.abs(out.astype(np.float64) - exact).max() < 0.02


def test_registers_of_tensor_memory_that_are_read_too_early_are_told() -> None:
    """LLVM knows of no order between the two pieces of inline assembly, tcgen05.ld and tcgen05.wait::ld."""
    c = np.zeros((64, 64), np.float16)
    a = b = random((64, 64), np.float16)
    with pytest.raises(emulate.EmulationError, match=r"in flight; expected tcgen05\.wait::ld before"):
        run("matmul_f16_sm100", (1, 1), [a, b, Uninitialised(c), 64, 64, 64, 64, 64, 64], 20496, lazy=False,
            text=text_of("matmul_f16_sm100"))


def test_without_fences_of_tensor_memory_barriers_order_nothing_there() -> None:
    c = np.zeros((128, 128), np.float32)
    a = b = random((128, 128), BF16)
    with pytest.raises(emulate.RaceError, match=r"tcgen05\.fence::before_thread_sync"):
        run("matmul_bf16_sm100", (1, 1), [a, b, Uninitialised(c), 128, 128, 128, 128, 128, 128], 81936, lazy=False,
            tensor_fences=True)


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(("shape", "block"), [("16x64b", 64), ("16x128b", 64), ("16x256b", 64), ("32x32b_f16", 128)])
def test_sums_come_out_of_tensor_memory_in_every_shape(shape: str, block: int, lazy: bool) -> None:
    """Triton says by itself which element each register has."""
    sums = np.float16 if "f16" in shape else np.float32
    a, b, c = random((block, 16), np.float16), random((16, 16), np.float16, 1), np.zeros((block, 16), sums)
    run(f"tensor_{shape}_sm100", (1,), [a, b, Uninitialised(c)], 10256, lazy)
    exact = a.astype(np.float32) @ b.astype(np.float32)
    np.testing.assert_allclose(c.astype(np.float32), exact, atol=1e-5, rtol=2.0**-10 if sums is np.float16 else 1e-5)


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_products_with_scales_of_blocks(lazy: bool) -> None:
    """LLVM's text reads registers that have no value, for bytes that it then leaves out."""
    k = 256
    a, b, c = random((128, k), E4M3), random((64, k), E5M2, 1), np.zeros((128, 64), np.float32)
    rng = np.random.default_rng(2)
    scale_a, scale_b = (rng.integers(120, 134, (extent, k // 32), dtype=np.uint8) for extent in (128, 64))
    run("matmul_scaled_sm100", (1,), [a, b, c, scale_a, scale_b, k], 25088, lazy, uninitialised=False)
    wide_a, wide_b = (matrix.astype(np.float64) * np.repeat(2.0 ** (scale.astype(int) - 127), 32, axis=1)
                      for matrix, scale in ((a, scale_a), (b, scale_b)))
    exact = wide_a @ wide_b.T
    assert np.abs(c - exact).max() <= 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_a_copy_to_tensor_memory(lazy: bool) -> None:
    a, c = random((128, 16), np.float32), np.zeros((128, 16), np.float32)
    run("tensor_copy_sm100", (1,), [a, Uninitialised(c)], 8200, lazy)
    np.testing.assert_array_equal(c, a)


def test_softmax() -> None:
    x, y = random((3, 700), np.float32), np.zeros((3, 700), np.float32)
    run("softmax_sm80", (3,), [x, Uninitialised(y), 700], 16, lazy=False)
    share = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    np.testing.assert_allclose(y, share / share.sum(axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("name", ["layer_norm_sm80", "layer_norm_sm90"])
def test_layer_norm(name: str) -> None:
    width = 768
    x, y = random((2, width), BF16), np.zeros((2, width), BF16)
    weight, bias = random((width,), np.float32, 1), random((width,), np.float32, 2)
    run(name, (2,), [x, weight, bias, Uninitialised(y), width, np.float32(1e-5)], 16, lazy=False)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    exact = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * weight + bias
    assert np.abs(y.astype(np.float64) - exact).max() < 0.04


def test_atomics() -> None:
    x = np.random.default_rng(0).integers(0, 100, 700, dtype=np.int32)
    bins, total, largest = np.zeros(8, np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32)
    run("atomics_sm80", (3,), [x, bins, total, largest, len(x)], 2048, lazy=False)
    assert bins.tolist() == np.bincount(x & 7, minlength=8).tolist()
    assert total[0] == x.sum() and largest[0] == x.max()


def test_split_k_waits_for_its_turn() -> None:
    m = n = 32
    k = 96
    a, b = random((m, k), BF16), random((k, n), BF16, 1)
    c, locks = np.zeros((m, n), np.float32), np.zeros(1, np.int32)
    run("split_k_sm80", (1, 2), [a, b, c, locks, m, n, k], 8192, lazy=False, cooperative=True)
    np.testing.assert_allclose(c, a.astype(np.float32) @ b.astype(np.float32), atol=1e-4)
    assert locks[0] == 2


def test_scan() -> None:
    x, y = random((500,), np.float32), np.zeros(500, np.float32)
    run("scan_sm80", (1,), [x, Uninitialised(y), 500], 64, lazy=False)
    np.testing.assert_allclose(y, np.cumsum(x.astype(np.float64)), atol=1e-4)


def test_highest() -> None:
    x, y = random((128,), np.float32), np.zeros(8, np.float32)
    run("highest_sm80", (1,), [x, Uninitialised(y)], 4096, lazy=False)
    assert y.tolist() == np.sort(x)[::-1][:8].tolist()


def test_histogram() -> None:
    x, y = np.random.default_rng(0).integers(0, 16, 256, dtype=np.int32), np.zeros(16, np.int32)
    run("histogram_sm80", (1,), [x, Uninitialised(y)], 4096, lazy=False)
    assert y.tolist() == np.bincount(x, minlength=16).tolist()


def test_dropout() -> None:
    """About half are left, by Philox's numbers; with another seed others."""
    x = random((700,), np.float32)
    kept = []
    for seed in (7, 7, 8):
        y = np.zeros_like(x)
        run("dropout_sm80", (3,), [x, Uninitialised(y), 700, np.float32(0.5), seed], 16, lazy=False)
        kept.append(y != 0)
        np.testing.assert_array_equal(y[kept[-1]], 2 * x[kept[-1]])
    assert 300 < kept[0].sum() < 400 and (kept[0] == kept[1]).all() and (kept[0] != kept[2]).any()


def test_cross_entropy() -> None:
    x, y = random((4, 400), BF16), np.zeros(4, np.float32)
    target = np.random.default_rng(1).integers(0, 400, 4)
    run("cross_entropy_sm80", (4,), [x, target, Uninitialised(y), 400], 256, lazy=False)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(y, np.log(np.exp(wide).sum(1)) - wide[np.arange(4), target], rtol=1e-5)


def test_products_of_f64() -> None:
    a, b, c = random((32, 32), np.float64), random((32, 32), np.float64, 1), np.zeros((32, 32))
    run("square_f64_sm80", (1,), [a, b, Uninitialised(c)], 32768, lazy=False)
    np.testing.assert_allclose(c, a @ b, rtol=1e-12, atol=1e-12)
