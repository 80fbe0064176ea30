"""Loops that add up products of fp8 quickly, and once more where that was not right: bit for bit what they would be
without."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, each, f8e4m3, f32, minimum, span, tiles, whole, zeros
from sapper.codegen import pipeline
from sapper.codegen.pipeline import facts_of, finish_lane
from sapper.ir.nodes import Function
from sapper.targets.x86_64.target import TARGETS
from tests.codegen.run_native import RUNNABLE, run_native
from tests.codegen.test_float8 import assert_same

from .run_lane import run_lane

CORE = TARGETS["zen3"]
FP8 = ml_dtypes.float8_e4m3fn
K, M, P = sp.dims("K M P")
LARGE, TOO_LARGE = 2.0**7, 2.0**9
"""Elements that can be multiplied by 2**120, or can't."""


@sp.kernel
def by_vector(w: Tensor[f8e4m3, P, K, 16], x: Tensor[f32, K], y: Tensor[f32, P, 16]):
    for p in each(P):
        l = whole(16)
        acc = zeros(l, dtype=f32)
        for k in tiles(K):
            acc += w[p, k, l].to(f32) @ x[k]
        y[p, l] = acc


@sp.kernel
def by_rows(w: Tensor[f8e4m3, P, K, 16], x: Tensor[f32, M, K], y: Tensor[f32, M, P, 16]):
    for p in each(P):
        for m in tiles(M):
            l = whole(16)
            acc = zeros(m, l, dtype=f32)
            for b in each((K + 31) // 32):
                part = zeros(m, l, dtype=f32)
                for k in tiles(span(b * 32, minimum(b * 32 + 32, K))):
                    part += x[m, k] @ w[p, k, l].to(f32)
                acc += part * 0.5
            y[m, p, l] = acc


def arguments(name: str, k: int) -> dict[str, np.ndarray]:
    """Weights of all sizes, and elements so many that each panel's sums begin and end anywhere."""
    random = np.random.default_rng(k)
    codes = random.integers(0, 256, (3, k, 16)).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x80
    x = random.standard_normal((k,) if name == "by_vector" else (4, k)).astype(np.float32)
    y = np.full((3, 16) if name == "by_vector" else (4, 3, 16), 7, np.float32)
    return {"w": codes.view(FP8), "x": x, "y": y}


def both_ways(name: str, given: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> tuple[Function, np.ndarray]:
    """The lane function, and the result, which is the same as without, also of machine code."""
    results, made = [], None

    def as_lanes(copies: dict[str, np.ndarray]) -> Function:
        return run_lane(kernel(name).tile_ir(), copies, facts=facts_of(CORE),
                        passes=lambda lane: finish_lane(lane, CORE))

    def as_code(copies: dict[str, np.ndarray]) -> None:
        run_native(kernel(name).tile_ir(), copies, CORE)

    for quickly in (False, True):
        with monkeypatch.context() as patch:
            if not quickly:
                patch.setattr("sapper.lane.float8_sums.add_up_quickly", lambda function: False)
            for run in (as_lanes, as_code) if CORE.name in RUNNABLE else (as_lanes,):
                copies = {key: array.copy() for key, array in given.items()}
                with np.errstate(all="ignore"):
                    made = run(copies) or made
                results.append(copies["y"])
    assert made is not None
    half = len(results) // 2
    for before, now in zip(results[:half], results[half:], strict=True):
        assert_same(now, before)
    return made, results[0]


def kernel(name: str) -> Any:
    return {"by_vector": by_vector, "by_rows": by_rows}[name]


@pytest.mark.parametrize("k", [1, 2, 7, 8, 33, 71])
@pytest.mark.parametrize("name", ["by_vector", "by_rows"])
def test_sums_are_as_they_were(name: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(name, k)
    lane, found = both_ways(name, given, monkeypatch)
    w, x = given["w"].astype(np.float64), given["x"].astype(np.float64)
    wanted = np.einsum("pkl,k->pl", w, x) if name == "by_vector" else 0.5 * np.einsum("pkl,mk->mpl", w, x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * 448 * k)
    widened = [op for op in lane.walk() if op.name == "widen_float8"]
    assert {bool(op.attributes.get("scaled")) for op in widened} == {False, True}
    assert any(op.name == "max_u8" for op in lane.walk())


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("name", ["by_vector", "by_rows"])
def test_a_nan_is_one_in_its_sums_alone(name: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each lane of a panel, and in each of the steps that a loop makes at once."""
    for k in (33, 71):
        given = arguments(name, k)
        places = [(1, step % k, lane) for step, lane in ((0, 0), (9, 15), (18, 8), (k - 1, 3))]
        for place in places:
            given["w"].view(np.uint8)[place] = code
        _, found = both_ways(name, given, monkeypatch)
        wanted = np.zeros((3, 16), bool)
        for p, _, lane in places:
            wanted[p, lane] = True
        np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(wanted, found.shape))


@pytest.mark.parametrize("value", [LARGE, TOO_LARGE, -TOO_LARGE, 3e38, np.inf, -np.inf, np.nan, 1e-40, 0.0, -0.0])
@pytest.mark.parametrize("name", ["by_vector", "by_rows"])
def test_elements_of_any_size(name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as overflow where they are made larger, and meet numbers that are 0, too."""
    given = arguments(name, 41)
    given["x"][..., [4, 40]] = value
    given["w"].view(np.uint8)[:, 4, ::3] = 0
    both_ways(name, given, monkeypatch)
    given["x"][...] = value
    both_ways(name, given, monkeypatch)


def test_only_where_numbers_are_widened_by_twos(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, quickly in (("zen3", True), ("v3", False), ("zen4", False)):
        target, seen = TARGETS[machine], []
        given = arguments("by_vector", 71)
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "_trace", lambda function, after, *rest, seen=seen: seen.append(after))
            run_lane(by_vector.tile_ir(), given, facts=facts_of(target),
                     passes=lambda lane, target=target: finish_lane(lane, target))
        assert ("add_up_quickly" in seen) is quickly
