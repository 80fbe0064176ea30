"""PTX that nvcc made (tools/ptx_nvcc_kernels.cu) runs right on the emulator, with all checks on."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sapper import emulate
from sapper.emulate import Options, RaceError, Uninitialised

DATA = Path(__file__).parent / "data"
MASK = 0xFFFFFFFF


def text_of(name: str) -> str:
    return (DATA / f"nvcc_{name}.ptx").read_text(encoding="utf-8")


def run(name: str, kernel: str, grid: int, block: int, arguments: list[Any], lazy: bool = False,
        cooperative: bool = False) -> emulate.Result:
    return emulate.load(text_of(name)).launch(kernel, grid=(grid,), block=(block,), arguments=arguments,
                                              cooperative=cooperative, options=Options(lazy=lazy))


def test_reduction_by_shuffles() -> None:
    x, total = np.random.default_rng(0).standard_normal(1000).astype(np.float32), np.zeros(1, np.float32)
    run("reduce_sm_80", "reduce", 3, 96, [x, total, len(x)])
    np.testing.assert_allclose(total[0], x.sum(dtype=np.float64), atol=1e-4)


def test_histogram_in_shared_memory() -> None:
    x, bins = np.random.default_rng(0).integers(0, 20, 700, dtype=np.uint8), np.zeros(256, np.uint32)
    run("reduce_sm_80", "histogram", 2, 128, [x, bins, len(x)])
    assert bins.tolist() == np.bincount(x, minlength=256).tolist()


def test_compaction_by_ballots() -> None:
    x = np.random.default_rng(0).integers(-9, 9, 300, dtype=np.int32)
    out, count = np.zeros(300, np.int32), np.zeros(1, np.int32)
    run("reduce_sm_80", "compact", 3, 128, [x, Uninitialised(out), count, len(x)])
    assert count[0] == (x > 0).sum() and out[:count[0]].tolist() == x[x > 0].tolist()


def test_threads_that_go_different_ways() -> None:
    x, steps = np.arange(1, 101, dtype=np.uint32), np.zeros(100, np.uint32)

    def collatz(value: int) -> int:
        count = 0
        while value != 1:
            value = 3 * value + 1 if value % 2 else value // 2
            count += 1
            if count > 200:
                break
        return [count + 1000, count * 3, count ^ 0x55, count][count % 4]

    run("reduce_sm_80", "collatz", 1, 128, [x, Uninitialised(steps), len(x)])
    assert steps.tolist() == [collatz(int(value)) for value in x]


def test_functions_of_floats() -> None:
    x = np.concatenate([np.random.default_rng(0).standard_normal(60) * 3, [1e-5, 40.0, -7.0, 0.5]]).astype(np.float32)
    y = np.zeros((len(x), 14), np.float32)
    run("math_sm_80", "functions", 1, 64, [x, Uninitialised(y), len(x)])
    a = x.astype(np.float64)
    erf = np.vectorize(math.erf)
    expected = [np.exp(a), np.log(abs(a)), np.sin(a), np.cos((x * np.float32(1e6)).astype(np.float64)), np.tanh(a),
                erf(a), abs(a)**1.7, a / (a * a + 0.3), np.sqrt(abs(a)), 1 / np.sqrt(abs(a)), a * a - 1,
                np.rint(x * np.float32(10)), np.exp(a),
                np.fmod((x * np.float32(100)).astype(np.float64), np.float64(np.float32(0.7)))]
    for column, exact in enumerate(expected):
        np.testing.assert_allclose(y[:, column], exact, rtol=4e-6, atol=1e-6, err_msg=f"function {column}")


def test_functions_of_doubles() -> None:
    x = np.random.default_rng(0).standard_normal(40)
    y = np.zeros((len(x), 5))
    run("math_sm_80", "doubles", 1, 64, [x, Uninitialised(y), len(x)])
    exact = np.stack([np.exp(x), np.log(abs(x)), np.sin(x * 1e12), np.sqrt(abs(x)) / (x * x + 0.1), x * x - 1], axis=1)
    np.testing.assert_allclose(y, exact, rtol=1e-14, atol=1e-15)


def signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def integers(a: int, b: int) -> list[int]:
    """What the kernel of the same name computes, in Python's integers."""
    bytes_a, bytes_b = a.to_bytes(4, "little"), b.to_bytes(4, "little")
    both = bytes_a + bytes_b
    funnel = b << 32 | a
    sa, sb = signed(a), signed(b)
    remainder = abs(sa) % abs(signed(b | 1)) * (1 if sa >= 0 else -1)
    clamp = min(b & 63, 32)
    half = np.uint32(b & 0x7FFFFFFF).view(np.float32) * np.float32(0.5)
    whole = 0 if np.isnan(half) else int(min(float(half), 2.0**31 - 1))
    return [value & MASK for value in (
        a.bit_count(), 32 - a.bit_length(), int(f"{a:032b}"[::-1], 2), (a & -a).bit_length(),
        int.from_bytes(bytes(both[nibble] for nibble in (0, 4, 1, 5)), "little"), (funnel << (b & 31)) >> 32,
        funnel >> clamp, a * b >> 32, sa * sb >> 32,
        sum(signed(x, 8) * signed(y, 8) for x, y in zip(bytes_a, bytes_b, strict=True)) + 7,
        sum(x * y for x, y in zip(bytes_a, bytes_b, strict=True)) + 7, a // (b | 1), remainder, abs(a - b) + 3,
        sa * sb >> 13, (a << 32 | b) // 1000003, (a & b) ^ (~a | 0x1234), max(sa, min(sb, 100)), sa >> (b & 31),
        int.from_bytes(bytes((x + y) & 255 for x, y in zip(bytes_a, bytes_b, strict=True)), "little"),
        int(np.float32(a).view(np.uint32)), whole, (a << 32 | b).bit_count(), signed(a >> 8, 8) + (b & 0xFFFF))]


def test_operations_on_integers() -> None:
    x = np.random.default_rng(0).integers(0, 1 << 32, (60, 2), dtype=np.uint32)
    x[:4] = [[0, 0], [MASK, MASK], [1 << 31, 1], [5, 1 << 31]]
    y = np.zeros((60, 24), np.uint32)
    run("integers_sm_80", "integers", 1, 64, [x, Uninitialised(y), len(x)])
    for (a, b), found in zip(x.tolist(), y.tolist(), strict=True):
        assert found == integers(a, b), (a, b)


def test_operations_on_halves() -> None:
    x = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
    y = np.zeros((50, 14), np.float32)
    run("halves_sm_90", "halves", 1, 64, [x, Uninitialised(y), len(x)])
    a, b = x[:, 0], x[:, 1]
    h, g = a.astype(np.float16), b.astype(np.float16)
    bf16 = ml_dtypes.bfloat16
    p, q = a.astype(bf16), b.astype(bf16)

    def square(value: Any) -> Any:
        return (value.astype(np.float64)**2 + 0.5).astype(np.float32).astype(value.dtype)

    toward_zero = a.astype(np.float16)
    over = abs(toward_zero.astype(np.float64)) > abs(a)
    toward_zero = np.where(over, np.nextafter(toward_zero, np.float16(0)), toward_zero)
    down = (np.floor(a.astype(np.float64) / 2.0**(np.frexp(a)[1] - 8)) * 2.0**(np.frexp(a)[1] - 8)).astype(np.float32)
    product = (p.astype(np.float32) * q.astype(np.float32)).astype(bf16)
    expected = [square(h), square(g), square(p), square(q), h + g, product,
                np.maximum(h, g), np.exp2(h.astype(np.float64)).astype(np.float16), a.astype(ml_dtypes.float8_e4m3fn),
                b.astype(ml_dtypes.float8_e5m2), toward_zero, down, h > g, np.rint((a * 10).astype(np.float16))]
    for column, exact in enumerate(expected):
        wanted = np.asarray(exact).astype(np.float32)
        tolerance = 1e-3 if column == 7 else 0
        assert np.abs(y[:, column] - wanted).max() <= tolerance, column


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_pipeline_of_copies(lazy: bool) -> None:
    x = np.random.default_rng(0).standard_normal((5, 512)).astype(np.float32)
    y = np.zeros_like(x)
    run("pipeline_sm_80", "pipeline", 1, 128, [x, Uninitialised(y), 5], lazy)
    np.testing.assert_allclose(y, x * 2 + 1, rtol=1e-6)


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_mbarriers_of_the_standard_library(lazy: bool) -> None:
    x = np.arange(128, dtype=np.int32)
    y, value = np.zeros(128, np.int32), x.copy()
    run("pipeline_sm_80", "barriers", 1, 128, [x, Uninitialised(y), 3], lazy)
    for _ in range(3):
        value = value + np.roll(value, -1)
    assert y.tolist() == value.tolist()


def test_cluster_with_distributed_shared_memory() -> None:
    x = np.random.default_rng(0).integers(-99, 99, 8 * 64, dtype=np.int32)
    y = np.zeros(8, np.int32)
    run("cluster_sm_90", "cluster_sum", 8, 64, [x, Uninitialised(y)])
    assert y.tolist() == np.repeat(x.reshape(2, -1).sum(axis=1), 4).tolist()


def test_a_block_that_leaves_its_cluster_too_early_is_found() -> None:
    """The last barrier keeps the shared memory of each block alive; without the first, sums are not complete."""
    text = text_of("cluster_sm_90")
    first = text.index("barrier.cluster.wait")
    mutated = text[:first] + text[text.index(";", first) + 1:]
    start = mutated.index("barrier.cluster.arrive")
    mutated = mutated[:start] + mutated[mutated.index(";", start) + 1:]
    x, y = np.ones(8 * 64, np.int32), np.zeros(8, np.int32)
    with pytest.raises(RaceError, match="race on shared memory"):
        emulate.load(mutated).launch("cluster_sum", grid=(8,), block=(64,), arguments=[x, Uninitialised(y)])


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_bulk_copies(lazy: bool) -> None:
    x = np.random.default_rng(0).integers(-99, 99, (4, 256), dtype=np.int32)
    y = np.zeros_like(x)
    run("bulk_sm_90", "bulk", 1, 64, [x, Uninitialised(y), 4], lazy)
    assert (y == x * 3 + np.arange(4)[:, None]).all()


def test_barrier_of_the_grid() -> None:
    x = np.arange(4 * 64, dtype=np.int32)
    middle, y, arrived = np.zeros_like(x), np.zeros_like(x), np.zeros(1, np.uint32)
    run("grid_sm_80", "grid_barrier", 4, 64, [x, Uninitialised(middle), Uninitialised(y), arrived], cooperative=True)
    assert (y == np.roll(x, -64) * 2 + 1).all()


def test_a_barrier_of_the_grid_without_its_fences_is_a_race() -> None:
    text = re.sub(r"(membar\.gl|fence\.\w+\.gpu);", "", text_of("grid_sm_80"))
    assert text != text_of("grid_sm_80")
    x = np.arange(4 * 64, dtype=np.int32)
    middle, y, arrived = np.zeros_like(x), np.zeros_like(x), np.zeros(1, np.uint32)
    with pytest.raises(RaceError, match="race on argument 1"):
        emulate.load(text).launch("grid_barrier", grid=(4,), block=(64,), cooperative=True,
                                  arguments=[x, Uninitialised(middle), Uninitialised(y), arrived])
