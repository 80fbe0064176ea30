"""Matrices in fp8 blocks of 128 x 128 whose rows and columns are no multiples of 128, as DeepSeek's are: 576 of the
latent vector and its key, 10944 of V2-Lite's dense layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper.models.scaled_matrix import FP8, RawScaled, ScaledMatrix
from sapper.models.workspace import Workspace
from sapper.runtime.buffers import Arena, empty
from sapper.runtime.program import Program, Rows, Variable

BLOCK = 128


def piece(random: np.random.Generator, rows: int, columns: int) -> tuple[RawScaled, np.ndarray]:
    """Rows as a file has them, and what they are, f64."""
    codes = random.standard_normal((rows, columns)).astype(FP8)
    scale = random.uniform(0.2, 5.0, (-(-rows // BLOCK), -(-columns // BLOCK))).astype(np.float32)
    wide = codes.astype(np.float64) * np.kron(scale, np.ones((BLOCK, BLOCK)))[:rows, :columns]
    raw = RawScaled.parse(codes.view(np.uint8), scale)
    assert raw is not None
    return raw, wide


def together(rows: tuple[int, ...], columns: int, exact: bool = True, seed: int = 1) -> tuple[ScaledMatrix, np.ndarray]:
    random = np.random.default_rng(seed)
    raw, wide = zip(*(piece(random, count, columns) for count in rows), strict=True)
    return RawScaled.together(raw, Arena(1 << 24), exact), np.concatenate(wide)


def filled(shape: tuple[int, ...]) -> np.ndarray:
    x = empty(shape)
    x[...] = np.random.default_rng(7).standard_normal(shape)
    return x


def run(steps: Any) -> None:
    for kernel, arguments in steps:
        kernel(*arguments)


SHAPES = [((192, 576), 256), ((144,), 10944), ((10944,), 144)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_one_token_meets_every_block_by_its_scale(rows: tuple[int, ...], columns: int) -> None:
    matrix, wide = together(rows, columns)
    x, y = filled((columns,)), empty((sum(rows),))
    run(matrix.apply(x, y, Workspace(columns)))
    wanted = wide @ x
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * np.abs(wide).max() * columns**0.5)


@pytest.mark.parametrize(("tokens", "exact", "by_blocks"), [
    (20, True, False), (20, False, False), (5, False, False), (20, False, True), (5, True, True), (140, False, True)])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_several_tokens_do_too(
    rows: tuple[int, ...], columns: int, tokens: int, exact: bool, by_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exact, few, or by weights that are widened a block at a time: in f32; else the tokens are rounded to bf16, and
    only they."""
    monkeypatch.setattr(Workspace, "widens_blocks", lambda work: by_blocks)
    matrix, wide = together(rows, columns, exact)
    x, y, work = filled((tokens, columns)), empty((tokens, sum(rows))), Workspace(columns)
    y[:] = 7
    count = Variable("count", tokens)
    steps = matrix.apply_rows("matmul_nt", Rows(x, count), [], [Rows(y, count)], work)
    assert any("blocks" in kernel.name for kernel, _ in steps) is by_blocks
    Program(steps)(count=tokens - 1)
    wanted = x[:-1].astype(np.float64) @ wide.T
    off = np.abs(y[:-1] - wanted).max() / (np.abs(wide).max() * columns**0.5)
    assert off < (1e-5 if matrix.in_f32(tokens, work) else 1e-2)
    assert bool(off > 1e-5) is not matrix.in_f32(tokens, work)
    assert (y[-1] == 7).all()


@pytest.mark.parametrize("tokens", [3, 6])
@pytest.mark.parametrize("task", ["swiglu", "nt_residual"])
def test_few_tokens_meet_two_matrices_or_are_added_to(
    task: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workspace, "widens_blocks", lambda work: True)
    (matrix, wide), (other, more) = together((144,), 200), together((144,), 200, seed=2)
    x, y, residual = filled((tokens, 200)), empty((tokens, 144)), filled((tokens, 144))
    count = Variable("count", tokens)
    others, rest = ([other], [y]) if task == "swiglu" else ([], [residual, y])
    steps = matrix.apply_rows(f"matmul_{task}", Rows(x, count), others, [Rows(one, count) for one in rest],
                              Workspace(200))
    Program(steps)(count=tokens)
    gate = x @ wide.T
    wanted = gate / (1 + np.exp(-gate)) * (x @ more.T) if others else residual + gate
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_tokens_of_experts_meet_them_alone(gated: bool, by_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts with many rows, with few and with none, some tokens or none of those that there is room for, on two
    threads; rows that lie apart, scales that end within the columns."""
    monkeypatch.setattr(Workspace, "widens_blocks", lambda work: by_blocks)
    random, rows, columns = np.random.default_rng(4), 96, 200
    pieces = [tuple(zip(*(piece(random, rows, columns) for _ in range(4)), strict=True)) for _ in range(1 + gated)]
    experts, *others = (RawScaled.experts(raw, 4, Arena(1 << 20)) for raw, _ in pieces)
    assert experts is not None
    x, y = filled((40, columns + 16))[:, :columns], empty((40, rows + 16))[:, :rows]
    first, last, count = np.zeros(4, np.int32), np.zeros(4, np.int32), Variable("count", 40)
    steps = experts.apply_groups(others, Rows(x, count), (first, last), Rows(y, count), Workspace(columns, 2))
    program = Program(steps, threads=2)
    for ends in ((0, 33, 36, 40), (5, 5, 6, 9), (0, 0, 0, 0)):
        y[:], last[:], first[1:] = 7, ends, ends[:-1]
        program(count=ends[-1])
        for e, (start, stop) in enumerate(zip(first, last, strict=True)):
            gate, *up = (x[start:stop] @ wide[e].T for _, wide in pieces)
            wanted = gate / (1 + np.exp(-gate)) * up[0] if up else gate
            np.testing.assert_allclose(y[start:stop], wanted, rtol=1e-4, atol=1e-4 * columns)
        assert (y[ends[-1] :] == 7).all()


def test_one_token_of_experts_whose_rows_lie_apart() -> None:
    random = np.random.default_rng(4)
    raw, wide = zip(*(piece(random, 96, 96) for _ in range(3)), strict=True)
    experts, work = RawScaled.experts(raw, 3, Arena(1 << 20)), Workspace(96)
    assert experts is not None
    chosen, shares = np.array([2, 0], np.int32), np.array([0.5, 2.0], np.float32)
    x, hidden, y = filled((96,)), empty((2, 112))[:, :96], empty((96,))
    Program([*experts.apply_swiglu(experts, chosen, x, hidden, work),
             *experts.apply_weighted(chosen, shares, hidden, x, y, work)])()
    gate = np.stack([wide[e] @ x for e in chosen])
    wanted = gate / (1 + np.exp(-gate)) * gate
    np.testing.assert_allclose(hidden, wanted, rtol=1e-4, atol=1e-3)
    wanted = x + sum(share * (wide[e] @ one) for share, e, one in zip(shares, chosen, wanted, strict=True))
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_panels_without_a_second_one_are_no_experts() -> None:
    random = np.random.default_rng(4)
    raw = [piece(random, 48, 128)[0] for _ in range(2)]
    assert RawScaled.experts(raw, 2, Arena(1 << 20)) is None
