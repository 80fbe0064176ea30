"""Rows of several forms as one matrix: each form's are what they are alone; what they meet is quantised once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import gguf
import numpy as np
import pytest

from sapper.models.gguf_file import TensorEntry
from sapper.models.k_matrix import KMatrix
from sapper.models.linear import Blocks, Dense
from sapper.models.stack import Stack
from sapper.models.weights import Loader, Use
from sapper.models.workspace import Workspace
from sapper.runtime.program import Program, Rows, Variable

from .test_k_matrix import COLUMNS, SIZES, random_bytes, run

Kind = gguf.GGMLQuantizationType
ROWS = {"a": 48, "b": 16, "c": 32, "d": 16}
KINDS = {"a": "Q4_K", "b": "Q4_K", "c": "Q6_K", "d": "Q5_0"}


def entry(name: str, kind: str) -> TensorEntry:
    rows = ROWS[name]
    if kind in SIZES:
        raw: np.ndarray = random_bytes(kind, rows, seed=ord(name))
    else:
        raw = gguf.quants.quantize(np.random.default_rng(rows).standard_normal((rows, COLUMNS), np.float32), Kind[kind])
    return TensorEntry(name, (rows, COLUMNS), Kind[kind], memoryview(raw.tobytes()))


def loader(kinds: dict[str, str], form: str = "file") -> Loader:
    return Loader("file", {name: entry(name, kind) for name, kind in kinds.items()}, {name: name for name in kinds},
                  form)


def uses(kinds: dict[str, str]) -> list[Use]:
    return [Use(name, ROWS[name], (lambda rows: rows[::-1]) if name == "b" else None) for name in kinds]


def made(kinds: dict[str, str]) -> tuple[Stack, list[Any]]:
    """All rows together, and each use's alone."""
    stack, alone = loader(kinds).joined(uses(kinds), COLUMNS), loader(kinds)
    assert isinstance(stack, Stack)
    return stack, [alone.joined([use], COLUMNS) for use in uses(kinds)]


def test_neighbours_of_one_form_are_one_matrix() -> None:
    stack, alone = made(KINDS)
    assert [one.shape[0] for one in stack.matrices] == [64, 32, 16]
    assert [type(one) for one in stack.matrices] == [KMatrix, KMatrix, Blocks]
    assert stack.nbytes == sum(one.nbytes for one in alone) and stack.size == 112 * COLUMNS


def test_each_row_gives_what_it_gives_alone() -> None:
    """Of one vector, and of several rows; a number that is added, too."""
    (stack, alone), work = made(KINDS), Workspace(COLUMNS)
    random = np.random.default_rng(2)
    x, gain = random.standard_normal((2, COLUMNS), np.float32)
    residual = random.standard_normal(112, np.float32)
    y, wanted = np.empty(112, np.float32), np.empty(112, np.float32)
    places = np.cumsum([0, *ROWS.values()])
    parts = [slice(first, last) for first, last in pairwise(places)]
    steps = stack.apply_residual(x, residual, y, work)
    assert [kernel.name for kernel, _ in steps] == [
        "quantize_super", "matmul_residual_q4k", "matmul_residual_q6k", "quantize_groups_32_32",
        "matmul_residual_q8_by32"]
    run(steps)
    for one, part in zip(alone, parts, strict=True):
        run(one.apply_residual(x, residual[part], wanted[part], work))
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    run(stack.apply_norm(x, gain, 1e-5, y, work))
    for one, part in zip(alone, parts, strict=True):
        run(one.apply_norm(x, gain, 1e-5, wanted[part], work))
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    rows, count = random.standard_normal((9, COLUMNS), np.float32), Variable("m", 9)
    found = np.full((9, 112), np.nan, np.float32)
    steps = stack.apply_rows("matmul_nt", Rows(rows, count), [], [Rows(found, count)], work)
    assert sum(kernel.name.startswith("quantize") for kernel, _ in steps) == 2
    Program(steps)(m=7)
    assert np.isnan(found[7:]).all()
    for m in range(7):
        for one, part in zip(alone, parts, strict=True):
            run(one.apply(rows[m], wanted[part], work))
        np.testing.assert_allclose(found[m], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(("kinds", "form"), [(KINDS, "file-f32"), (KINDS | {"d": "F16"}, "file"), (KINDS, "bf16")])
def test_other_rows_are_made_wide(kinds: dict[str, str], form: str) -> None:
    """Where what they meet stays f32, where some are no blocks, and where nothing is to be."""
    assert isinstance(loader(kinds, form).joined(uses(kinds), COLUMNS), Dense)
