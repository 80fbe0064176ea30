"""PTX that NVRTC made (tools/ptx_nvrtc_kernels.cu) runs right on the emulator, with all checks on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper import emulate
from sapper.emulate import Options, Uninitialised

DATA = Path(__file__).parent / "data"
MODES = pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])


def text_of(name: str) -> str:
    return (DATA / f"nvrtc_{name}.ptx").read_text(encoding="utf-8")


def run(text: str, kernel: str, block: int, arguments: list[Any], lazy: bool = False, grid: int = 1) -> None:
    emulate.load(text).launch(kernel, grid=(grid,), block=(block,), arguments=arguments, options=Options(lazy=lazy))


def test_parts_of_a_warp_have_masks_of_their_own() -> None:
    count = 64
    x = np.random.default_rng(0).integers(-99, 99, count, dtype=np.int32)
    y = np.zeros((8, count), np.int32)
    run(text_of("groups_sm_80"), "groups", count, [x, Uninitialised(y), count])
    for i, value in enumerate(x.tolist()):
        half, warp, lane = x[i // 16 * 16:][:16], x[i // 32 * 32:][:32], i % 32
        side, odd = np.flatnonzero((warp > 0) == (value > 0)).tolist(), np.flatnonzero(warp & 1).tolist()
        assert y[:, i].tolist() == [
            half.sum(), warp[:lane + 1].sum(), np.bitwise_xor.reduce(half[:i % 16]), warp[warp & 3 == value & 3].max(),
            len(side) * 100 + side.index(lane), (half > 90).any() + 2 * (half > -95).all(),
            sum(1 << number for number, other in enumerate(half & 7) if other == value & 7),
            len(odd) + 1000 * odd.index(lane) + warp[odd[0]] if value & 1 else -1], i


def test_fragments_whose_layout_is_left_open() -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((rows, 48)).astype(np.float16) for rows in (32, 8))
    c = np.zeros((32, 8), np.float32)
    run(text_of("fragments_sm_80"), "fragments", 32, [a, b, Uninitialised(c), 48])
    np.testing.assert_allclose(c, 2 * a.astype(np.float32) @ b.astype(np.float32).T, rtol=1e-5, atol=1e-5)
    left, right = (random.integers(-128, 128, (16, 16), dtype=np.int8) for _ in range(2))
    sums, made = random.integers(-1000, 1000, (16, 16), dtype=np.int32), np.zeros((16, 16), np.int32)
    run(text_of("fragments_sm_80"), "fragments_of_bytes", 32, [left, right, sums, Uninitialised(made)])
    assert made.tolist() == (left.T.astype(int) @ right.astype(int) + sums.T).tolist()


def test_numbers_of_128_bits() -> None:
    x = np.random.default_rng(0).integers(0, 1 << 64, 64, dtype=np.uint64)
    x[:4] = [0, 0, 2**64 - 1, 2**64 - 1]
    y = np.zeros((64, 3), np.uint64)
    run(text_of("wide_sm_80"), "wide", 64, [x, Uninitialised(y)])
    for i, found in enumerate(y.tolist()):
        value = (int(x[i]) * int(x[i ^ 1]) + (int(x[i]) | 1)) % (1 << 128)
        assert found == [value >> 64, value % (1 << 64), value % 1000003], i


def test_differences_of_bytes_and_halves() -> None:
    x = np.random.default_rng(0).integers(0, 1 << 32, 64, dtype=np.uint32)
    y = np.zeros((64, 4), np.uint32)
    run(text_of("wide_sm_80"), "bytes", 64, [x, Uninitialised(y)])
    pairs = x, x[np.arange(64) ^ 1]
    of_bytes = abs(np.subtract(*(p.view(np.uint8).reshape(64, 4).astype(int) for p in pairs)))
    signed = abs(np.subtract(*(p.view(np.int8).reshape(64, 4).astype(int) for p in pairs)))
    of_halves = abs(np.subtract(*(p.view(np.int16).reshape(64, 2).astype(int) for p in pairs)))
    expected = [of_bytes.sum(1), of_bytes.astype(np.uint8).view(np.uint32)[:, 0],
                of_halves.astype(np.uint16).view(np.uint32)[:, 0], signed.sum(1)]
    assert y.T.tolist() == [column.tolist() for column in expected]


def test_pairs_of_f16() -> None:
    x, y = np.random.default_rng(0).standard_normal((32, 2)).astype(np.float16), np.zeros((32, 3, 2), np.float16)
    run(text_of("halves_sm_80"), "halves", 32, [x, Uninitialised(y)])
    a = x.astype(np.float64)
    b = a[np.arange(32) ^ 1]
    np.testing.assert_allclose(y.astype(np.float64), np.stack([a / (abs(b) + 1), np.exp(a), a > b], axis=1), rtol=2e-3,
                               atol=1e-3)


@MODES
def test_stages_of_a_pipeline(lazy: bool) -> None:
    x, y = np.random.default_rng(0).standard_normal((7, 128)).astype(np.float32), np.zeros(128, np.float32)
    run(text_of("stages_sm_80"), "stages", 128, [x, Uninitialised(y), 7], lazy)
    np.testing.assert_allclose(y, np.roll(x, -1, axis=1).sum(0), rtol=1e-5, atol=1e-5)


@MODES
def test_words_are_handed_to_the_other_block(lazy: bool) -> None:
    x, y = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    run(text_of("handed_sm_90"), "handed", 64, [x, Uninitialised(y)], lazy, grid=2)
    assert y.tolist() == [*range(127, 63, -1), *range(63, -1, -1)]


@pytest.mark.parametrize(("file", "change"), [
    ("handed_sm_90", ("acquire.cluster", "acquire.cta")), ("handed_sm_90", ("acquire.cluster", "relaxed.cluster")),
    ("stages_sm_80", ("mbarrier.arrive.shared.b64", "mbarrier.arrive.noComplete.shared.b64")),
])
def test_a_planted_fault_is_caught(file: str, change: tuple[str, str]) -> None:
    text = text_of(file).replace(*change)
    assert text != text_of(file)
    with pytest.raises(emulate.EmulationError):
        if file.startswith("handed"):
            run(text, "handed", 64, [np.arange(128, dtype=np.int32), np.zeros(128, np.int32)], grid=2)
        else:
            run(text, "stages", 128, [np.zeros((7, 128), np.float32), np.zeros(128, np.float32), 7])
