"""Matrices in blocks, read some rows at a time: the numbers of the file, in panels or widened, and little memory."""

from functools import partial

import gguf
import ml_dtypes
import numpy as np
import pytest

from sapper.kernels.quantized import matrix
from sapper.models import block_rows
from sapper.models.block_rows import BlockRows, alike, in_panels, widen_into
from sapper.models.gguf_file import TensorEntry
from sapper.models.weights import half_split_rows
from sapper.models.workspace import packed_in
from sapper.runtime.buffers import Arena, empty

Kind = gguf.GGMLQuantizationType
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
DTYPES = {"bf16": ml_dtypes.bfloat16, "f32": np.float32}


def stored(kind: str, rows: int, columns: int = 96) -> tuple[TensorEntry, np.ndarray]:
    """A tensor, and what gguf widens it to."""
    values = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    raw = gguf.quants.quantize(values, Kind[kind])
    entry = TensorEntry("w", (rows, columns), Kind[kind].value, memoryview(raw.tobytes()))
    return entry, gguf.quants.dequantize(raw, Kind[kind])


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_rows, "ROWS_AT_ONCE", 64)


@pytest.mark.parametrize("kind", KINDS)
def test_panels_hold_the_rows_of_all_tensors(kind: str) -> None:
    (first, wide), (second, other) = stored(kind, 208), stored(kind, 64)
    order = partial(half_split_rows, heads=2)
    parts = alike([BlockRows.of(first, None), BlockRows.of(second, order)])
    assert parts is not None and [part.rows for part in parts] == [208, 64]
    made = in_panels(parts, Arena(), exact=True)
    assert made.exact and made.shape == (272, 96)
    expected = np.concatenate([wide, order(other)])
    np.testing.assert_allclose(matrix(made.form, *made.parts), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_widened_they_are_what_gguf_makes_of_them(kind: str, dtype: str) -> None:
    packed = packed_in(Arena(), 320, 96, dtype)
    width = packed.panels.width
    assert 192 % width == 0, "what follows fills whole panels"
    (first, wide), (second, other) = stored(kind, 192), stored(kind, 128)
    order = partial(half_split_rows, heads=4)
    parts = alike([BlockRows.of(first, None), BlockRows.of(second, order)])
    assert parts is not None and widen_into(packed, parts, dtype)
    plain = empty((320, 96), DTYPES[dtype])
    assert widen_into(plain, parts, dtype)
    expected = np.concatenate([wide, order(other)])
    # Where a product and a sum are rounded once, bf16 may be a step off.
    rounding = 2.0**-8 if dtype == "bf16" else 1e-6
    for found in (packed.unpack(), plain):
        np.testing.assert_allclose(found.astype(np.float32), expected, rtol=rounding, atol=1e-6)
        assert (found == expected.astype(DTYPES[dtype])).mean() > 0.999
    assert packed.unpack().tobytes() == plain.tobytes()


def test_rows_that_fill_no_panels_are_left_to_others() -> None:
    packed = packed_in(Arena(), 48, 96, "bf16")
    part = BlockRows.of(stored("Q4_0", 48)[0], None)
    assert part is not None
    assert widen_into(packed, [part], "bf16") == (48 % packed.panels.width == 0)
    assert BlockRows.of(stored("Q4_0", 24)[0], None) is None, "24 rows are no panels of 16"
    entry = TensorEntry("w", (16, 32), Kind.F16.value, memoryview(bytes(1024)))
    assert BlockRows.of(entry, None) is None and alike([part, None]) is None
    assert alike([part, BlockRows.of(stored("Q8_0", 16)[0], None)]) is None


def test_few_rows_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    entry, _ = stored("Q8_0", 208)
    sizes = []
    rows = TensorEntry.rows
    monkeypatch.setattr(TensorEntry, "rows", lambda *a: sizes.append(a[2] - a[1]) or rows(*a))
    part = BlockRows.of(entry, None)
    assert part is not None
    in_panels([part], Arena(), exact=False)
    assert sizes == [64, 64, 64, 16]
    sizes.clear()
    assert [len(piece.parts[1]) for piece in part.pieces(48)] == [48, 48, 48, 48, 16]
