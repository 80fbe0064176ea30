"""GGUF's Q3_K, Q4_K and Q6_K: dequantised as the gguf package does it, bit for bit, and applied as matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from sapper.models.gguf_file import TensorEntry
from sapper.models.k_matrix import KMatrix, RawK
from sapper.models.weights import Loader, Use
from sapper.models.workspace import Workspace
from sapper.runtime.buffers import Arena
from sapper.runtime.program import Program, Rows, Variable
from sapper.targets import host_target

from .test_linear import rounded_groups

SIZES = {"Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
PLACES_OF_D = {"Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
ROWS, COLUMNS = 48, 512


def random_bytes(kind: str, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> np.ndarray:
    """Blocks whose every byte is random, but for the f16 factors, which are finite."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (rows, columns // 256, SIZES[kind]), dtype=np.uint8)
    for at in PLACES_OF_D[kind]:
        d = (random.standard_normal(raw.shape[:2]) * 1e-3).astype("<f2")
        raw[:, :, at : at + 2] = d.view(np.uint8).reshape(*raw.shape[:2], 2)
    return raw


def dequantised(raw: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.dequantize(raw.reshape(len(raw), -1), gguf.GGMLQuantizationType[kind])


def made(kind: str, seed: int = 0, exact: bool = True) -> tuple[KMatrix, np.ndarray]:
    raw = random_bytes(kind, seed=seed)
    found = RawK.parse(memoryview(raw.tobytes()), (ROWS, COLUMNS), kind)
    assert found is not None
    return RawK.together([found], Arena(), exact), dequantised(raw, kind)


def run(steps: Any) -> None:
    for kernel, arguments in steps:
        kernel(*arguments)


@pytest.mark.parametrize("kind", SIZES)
def test_widened_bit_for_bit(kind: str) -> None:
    matrix, wanted = made(kind)
    assert matrix.shape == wanted.shape and matrix.size == wanted.size
    wide, dtype, steps = matrix.widened(Workspace(COLUMNS))
    run(steps)
    assert dtype == "f32"
    np.testing.assert_array_equal(wide, wanted)
    tokens, rows = np.array([0, 17, 47, 17], np.int32), np.empty((4, COLUMNS), np.float32)
    run(matrix.look_up(tokens, rows))
    np.testing.assert_array_equal(rows, wanted[tokens])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", SIZES)
def test_applied(kind: str, exact: bool) -> None:
    (matrix, w), (up, other) = made(kind, exact=exact), made(kind, 1, exact)
    random, work = np.random.default_rng(2), Workspace(COLUMNS)
    x, gain = (random.standard_normal(COLUMNS).astype(np.float32) for _ in range(2))
    residual, y = random.standard_normal(ROWS).astype(np.float32), np.empty(ROWS, np.float32)
    wide = x.astype(np.float64)
    normed = wide / np.sqrt(np.square(wide).mean() + 1e-5) * gain

    def near(wanted: np.ndarray, vector: np.ndarray, times: float = 1.0) -> None:
        """Sums of 512 products that partly cancel; quantised activations are off by max|x| / 254 at most each. times:
        what such a sum is multiplied with."""
        off = 0.0 if exact else np.abs(vector).max() / 254 * COLUMNS**0.5 * 3
        np.testing.assert_allclose(y, wanted, rtol=0, atol=times * np.abs(w).max() * (2e-5 * COLUMNS**0.5 + off))

    run(matrix.apply_residual(x, residual, y, work))
    near(residual + w @ wide, wide)
    run(matrix.apply(x, y, work))
    near(w @ wide, wide)
    run(matrix.apply_norm(x, gain, 1e-5, y, work))
    near(w @ normed, normed)
    run(matrix.apply_norm_swiglu(up, x, gain, 1e-5, y, work))
    gate = w @ normed
    near(gate / (1 + np.exp(-gate)) * (other @ normed), normed, 1.0 if exact else 2 * np.abs(other @ normed).max())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", SIZES)
def test_applied_to_rows(kind: str, exact: bool) -> None:
    """As many as are given; several rows give what each gives."""
    (matrix, _), work = made(kind, exact=exact), Workspace(COLUMNS)
    rows = np.random.default_rng(3).standard_normal((9, COLUMNS)).astype(np.float32)
    residual = np.random.default_rng(4).standard_normal((9, ROWS)).astype(np.float32)
    found, one = np.full((9, ROWS), np.nan, np.float32), np.empty(ROWS, np.float32)
    count = Variable("m", 9)
    operands = [Rows(residual, count), Rows(found, count)]
    Program(matrix.apply_rows("matmul_nt_residual", Rows(rows, count), [], operands, work))(m=7)
    assert np.isnan(found[7:]).all()
    for m in range(7):
        run(matrix.apply_residual(rows[m], residual[m], one, work))
        np.testing.assert_allclose(found[m], one, rtol=0, atol=1e-5 * np.abs(one).max())  # another order of sums


def test_the_loader_keeps_them() -> None:
    """Rows of several tensors of one format lie together; of two formats they are several matrices."""
    def entry(kind: str, seed: int) -> TensorEntry:
        raw = random_bytes(kind, seed=seed)
        return TensorEntry(f"{kind}{seed}", (ROWS, COLUMNS), gguf.GGMLQuantizationType[kind], memoryview(raw.tobytes()))

    tensors = {"a": entry("Q4_K", 0), "b": entry("Q4_K", 1), "c": entry("Q6_K", 2)}
    loader = Loader("file", tensors, {name: name for name in tensors}, "file")
    joined = loader.joined([Use("a", ROWS), Use("b", ROWS, lambda rows: rows[::-1])], COLUMNS)
    assert isinstance(joined, KMatrix)
    wide, _, steps = joined.widened(Workspace(COLUMNS))
    run(steps)
    np.testing.assert_array_equal(wide, np.concatenate([tensors["a"].read(), tensors["b"].read()[::-1]]))
    assert isinstance(loader.joined([Use("c", ROWS)], COLUMNS), KMatrix)
    assert not isinstance(loader.joined([Use("a", ROWS), Use("c", ROWS)], COLUMNS), KMatrix)


def test_what_makes_no_panels() -> None:
    raw = random_bytes("Q4_K", rows=8)
    assert RawK.parse(memoryview(raw.tobytes()), (8, COLUMNS), "Q4_K") is None
    assert RawK.parse(memoryview(raw.tobytes()), (8, COLUMNS), "Q2_K") is None


@pytest.mark.parametrize("kind", SIZES)
def test_experts(kind: str) -> None:
    """Three of them, each a matrix; what they are multiplied by is quantised, so that sums are as near as those of a
    matrix alone, which `test_applied` compares with the weights."""
    raw = [random_bytes(kind, seed=seed) for seed in range(6)]
    pieces = [RawK.parse(memoryview(one.tobytes()), (ROWS, COLUMNS), kind) for one in raw]
    alone = [RawK.together([piece], Arena()) for piece in pieces]
    gates, ups = RawK.experts(pieces[:3], 3, Arena()), RawK.experts(pieces[3:], 3, Arena())
    assert gates is not None and ups is not None and RawK.experts(pieces, 6, Arena(), exact=True) is None
    assert gates.size == ROWS * COLUMNS and gates.nbytes == alone[0].nbytes
    random, work = np.random.default_rng(5), Workspace(COLUMNS)
    chosen, weights = np.array([2, 0], np.int32), np.array([0.75, -2.0], np.float32)
    x, gain = (random.standard_normal(COLUMNS).astype(np.float32) for _ in range(2))
    y, one = np.empty((2, ROWS), np.float32), np.empty(ROWS, np.float32)

    def near(found: np.ndarray, wanted: np.ndarray) -> None:
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())  # another order of sums

    steps, normed = work.norm(x, gain, 1e-5)
    run(steps + gates.apply_swiglu(ups, chosen, normed, y, work))
    for k, e in enumerate(chosen):
        run(alone[e].apply_norm_swiglu(alone[3 + e], x, gain, 1e-5, one, work))
        near(y[k], one)
    rows = random.standard_normal((2, COLUMNS)).astype(np.float32)
    total, sums = random.standard_normal(ROWS).astype(np.float32), np.empty(ROWS, np.float32)
    run(gates.apply_weighted(chosen, weights, rows, total, sums, work))
    wanted = total.astype(np.float64)
    for k, e in enumerate(chosen):
        run(alone[e].apply_residual(rows[k], np.zeros(ROWS, np.float32), one, work))
        wanted += weights[k].astype(np.float64) * one
    near(sums, wanted)
    many, count = random.standard_normal((7, COLUMNS)).astype(np.float32), Variable("m", 7)
    ranges, found = (np.array([0, 4, 4], np.int32), np.array([4, 4, 7], np.int32)), np.empty((7, ROWS), np.float32)
    Program(gates.apply_groups([ups], Rows(many, count), ranges, Rows(found, count), work))()
    for m in range(7):
        e = 0 if m < 4 else 2
        run(alone[e].apply_residual(many[m], np.zeros(ROWS, np.float32), one, work))
        gate = one.astype(np.float64)
        run(alone[3 + e].apply_residual(many[m], np.zeros(ROWS, np.float32), one, work))
        near(found[m], gate / (1 + np.exp(-gate)) * one)


@pytest.mark.skipif(not host_target().has("avx512_bf16"), reason="this processor multiplies no pairs of bf16")
@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("kind", SIZES)
def test_many_rows_and_their_weights_may_be_rounded_to_bf16(
        kind: str, near: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of what both are rounded to, some rows of the weights at a time; few rows are quantised."""
    monkeypatch.setattr("sapper.models.rounded.PACKED_BYTES", 2 * COLUMNS * 64)
    monkeypatch.setattr("sapper.models.rounded.NEAR_BYTES", 2 * 70 * COLUMNS - (not near))
    raw = random_bytes(kind, 96)
    parsed = RawK.parse(memoryview(raw.tobytes()), (96, COLUMNS), kind)
    assert parsed is not None
    matrix = replace(RawK.together([parsed], Arena()), rounded=True)
    wide = dequantised(raw, kind).astype(ml_dtypes.bfloat16).astype(np.float64)
    x = np.random.default_rng(5).standard_normal((70, COLUMNS), np.float32)
    y, count = np.zeros((70, 96), np.float32), Variable("count", 70)
    steps = matrix.apply_rows("matmul_nt", Rows(x, count), [], [Rows(y, count)], Workspace(COLUMNS))
    assert [kernel.name for kernel, _ in steps][1:] == (
        [f"matmul_near_{matrix.form}"] if near else [f"widen_pairs_{matrix.form}", "matmul_nt_bf16_bf16"] * 2)
    Program(steps, threads=2)(count=70)
    wanted = x.astype(ml_dtypes.bfloat16).astype(np.float64) @ wide.T
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    few = matrix.apply_rows("matmul_nt", Rows(x[:8], count), [], [Rows(y[:8], count)], Workspace(COLUMNS))
    assert [kernel.name for kernel, _ in few] == ["quantize_super", f"matmul_{matrix.form}"]


@pytest.mark.parametrize("kind", SIZES)
def test_many_rows_of_experts_and_their_weights_may_be_rounded_to_bf16(kind: str) -> None:
    """The product of what both are rounded to; an expert without rows is between them."""
    raw = [random_bytes(kind, 96, seed=seed) for seed in range(2)]
    pieces = [RawK.parse(memoryview(one.tobytes()), (96, COLUMNS), kind) for one in raw]
    gates, ups = (RawK.experts([piece], 3, Arena()) for piece in pieces)
    gates, ups = (replace(one, together=replace(one.together, rounded=True)) for one in (gates, ups))
    wide = [dequantised(one, kind).reshape(3, 32, COLUMNS) for one in raw]
    x = np.random.default_rng(5).standard_normal((100, COLUMNS)).astype(ml_dtypes.bfloat16)
    count = Variable("count", 100)
    ranges = np.array([0, 61, 61], np.int32), np.array([61, 61, 100], np.int32)
    for others, dtype, relative in (([], np.float32, 1e-5), ([ups], ml_dtypes.bfloat16, 2.0**-8)):
        y = np.zeros((100, 32), dtype)
        steps = gates.apply_groups(others, Rows(x, count), ranges, Rows(y, count), Workspace(COLUMNS))
        task = "grouped_swiglu_rounded" if others else "grouped_rounded"
        assert [kernel.name for kernel, _ in steps] == [f"{task}_{gates.together.form}"]
        Program(steps, threads=2)()
        wanted = rounded_groups(wide[0], x, ranges, wide[1] if others else None)
        np.testing.assert_allclose(y.astype(np.float64), wanted, rtol=relative, atol=1e-5 * np.abs(wanted).max())


def test_a_loader_rounds_them_where_the_form_says_so() -> None:
    raw = random_bytes("Q4_K", 32).tobytes()
    entry = TensorEntry("w", (32, COLUMNS), 12, memoryview(raw))
    for form, rounded in (("file", False), ("file-rounded", True)):
        matrix = Loader("here", {"w": entry}, {"w": "w"}, form).joined([Use("w", 32)], COLUMNS)
        assert isinstance(matrix, KMatrix) and matrix.rounded == rounded
