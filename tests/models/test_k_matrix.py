"""GGUF's Q4_K and Q6_K: dequantised as the gguf package does it, bit for bit, and applied as matrices."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest

from sapper.models.gguf_file import TensorEntry
from sapper.models.k_matrix import KMatrix, RawK
from sapper.models.linear import Workspace
from sapper.models.weights import Loader, Use
from sapper.runtime.buffers import Arena
from sapper.runtime.program import Program, Rows, Variable

SIZES = {"Q4_K": 144, "Q6_K": 210}
PLACES_OF_D = {"Q4_K": (0, 2), "Q6_K": (208,)}
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
    """Rows of several tensors of one format lie together; of two formats they are made wide."""
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
    assert RawK.parse(memoryview(raw.tobytes()), (8, COLUMNS), "Q5_K") is None
