"""Loops that add up products of fp8 quickly, and once more where that was not right: bit for bit what they would be
without."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, each, f8e4m3, f32, i32, minimum, span, tiles, whole, zeros
from sapper.codegen import pipeline
from sapper.codegen.pipeline import facts_of, finish_lane, to_lane
from sapper.ir.kept import Kept
from sapper.ir.nodes import Function, Op
from sapper.runtime.compiled import CompiledKernel
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.schedule import Schedule, Specialization
from tests.codegen.run_native import RUNNABLE, compile_checked, run_compiled
from tests.codegen.test_float8 import assert_same

from .run_lane import dims_of, lowered, run_lane, run_lowered, specialize

CORE = TARGETS["zen3"]
FP8 = ml_dtypes.float8_e4m3fn
A, K, M, P = sp.dims("A K M P")
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


@sp.kernel
def by_places(w: Tensor[f8e4m3, P, K, 16], place: Tensor[i32, P], x: Tensor[f32, A, K], y: Tensor[f32, P, 16]):
    for p in each(P):
        a = place[p]
        l = whole(16)
        acc = zeros(l, dtype=f32)
        for k in tiles(K):
            acc += w[p, k, l].to(f32) @ x[a, k]
        y[p, l] = acc


@sp.kernel
def by_what_it_made(w: Tensor[f8e4m3, P, K, 16], x: Tensor[f32, A, K], z: Tensor[f32, K], y: Tensor[f32, A, P, 16]):
    for a in range(A):
        for k in tiles(K):
            z[k] = x[a, k] + 1.0
        for p in each(P):
            l = whole(16)
            acc = zeros(l, dtype=f32)
            for k in tiles(K):
                acc += w[p, k, l].to(f32) @ z[k]
            y[a, p, l] = acc


def arguments(name: str, k: int) -> dict[str, np.ndarray]:
    """Weights of all sizes, and elements so many that each panel's sums begin and end anywhere."""
    random = np.random.default_rng(k)
    codes = random.integers(0, 256, (3, k, 16)).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x80
    x = random.standard_normal((k,) if name == "by_vector" else (4, k)).astype(np.float32)
    y = np.full((3, 16) if name == "by_vector" else (4, 3, 16), 7, np.float32)
    return {"w": codes.view(FP8), "x": x, "y": y}


def both_ways(name: str, given: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch,
              known: bool = False) -> tuple[Function, np.ndarray]:
    """The lane function, and the result, which is the same as without, also of machine code. known: so are the
    extents, and so elements are copied."""
    function = kernel(name).tile_ir()
    if known:
        function = kernel(name).tile_ir(dims_of(function, given))
    results = []
    for quickly in (False, True):
        lane, code, text = made_of(name, function, given, quickly, monkeypatch)
        for station in ("lanes", "code") if code is not None else ("lanes",):
            copies = {key: array.copy() for key, array in given.items()}
            with np.errstate(all="ignore"):
                if station == "lanes":
                    run_lowered(function, lane, copies)
                else:
                    run_compiled(function, code, copies, text=text)
            results.append(copies["y"])
    half = len(results) // 2
    for before, now in zip(results[:half], results[half:], strict=True):
        assert_same(now, before)
    return lane, results[0]


_made: dict[tuple[str, str, str, bool], tuple[Function, CompiledKernel | None, str]] = {}


def made_of(name: str, function: Function, given: dict[str, np.ndarray], quickly: bool,
            monkeypatch: pytest.MonkeyPatch) -> tuple[Function, CompiledKernel | None, str]:
    """The lane function, and machine code where it runs with its text, made once for all values of the arguments."""
    specialization = specialize(function, given)
    key = name, str([value.type for value in function.arguments]), repr(specialization), quickly
    if key not in _made:
        with monkeypatch.context() as patch:
            if not quickly:
                patch.setattr("sapper.lane.float8_sums.add_up_quickly", lambda function: False)
            lane = lowered(Kept(function).made(), None, facts_of(CORE), specialization,
                           lambda lane: finish_lane(lane, CORE))
            code, text = None, ""
            if CORE.name in RUNNABLE:
                made, code = compile_checked(Kept(function).made(), specialization, CORE)
                text = made.text
        _made[key] = lane, code, text
    return _made[key]


def kernel(name: str) -> Any:
    return {"by_vector": by_vector, "by_rows": by_rows, "by_places": by_places,
            "by_what_it_made": by_what_it_made}[name]


def copies_in(lane: Function) -> list[Op]:
    return [op for op in lane.walk() if op.attributes.get("label") == "raise"]


@pytest.mark.parametrize(("k", "known"), [*((k, False) for k in (1, 2, 7, 8, 33, 71)),
                                          *((k, True) for k in (33, 41, 71, 128))])
@pytest.mark.parametrize("name", ["by_vector", "by_rows"])
def test_sums_are_as_they_were(name: str, k: int, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(name, k)
    lane, found = both_ways(name, given, monkeypatch, known)
    assert copies_in(lane) or not known or k % 8
    w, x = given["w"].astype(np.float64), given["x"].astype(np.float64)
    wanted = np.einsum("pkl,k->pl", w, x) if name == "by_vector" else 0.5 * np.einsum("pkl,mk->mpl", w, x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * 448 * k)
    widened = [op for op in lane.walk() if op.name == "widen_float8"]
    assert {bool(op.attributes.get("scaled")) for op in widened} == {False, True}
    assert any(op.name == "max_u8" for op in lane.walk())


@pytest.mark.parametrize("known", [False, True])
def test_all_codes_are_the_numbers_they_are(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.zeros((16, 128, 16), np.uint8)
    x, y = np.zeros(128, np.float32), np.zeros((16, 16), np.float32)
    for step in (0, 33, 127):
        codes[:, :] = 0
        codes[:, step] = np.arange(256, dtype=np.uint8).reshape(16, 16)
        x[:] = 0
        x[step] = 1
        _, found = both_ways("by_vector", {"w": codes.view(FP8), "x": x, "y": y}, monkeypatch, known)
        assert_same(found + 0.0, codes[:, step].view(FP8).astype(np.float32) + 0.0)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("name", ["by_vector", "by_rows"])
def test_a_nan_is_one_in_its_sums_alone(name: str, code: int, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each lane of a panel, and in each of the steps that a loop makes at once."""
    for k in (33, 71):
        given = arguments(name, k)
        places = [(1, step % k, lane) for step, lane in ((0, 0), (9, 15), (18, 8), (k - 1, 3))]
        for place in places:
            given["w"].view(np.uint8)[place] = code
        _, found = both_ways(name, given, monkeypatch, known)
        wanted = np.zeros((3, 16), bool)
        for p, _, lane in places:
            wanted[p, lane] = True
        np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(wanted, found.shape))


@pytest.mark.parametrize("value", [LARGE, TOO_LARGE, -TOO_LARGE, 3e38, np.inf, -np.inf, np.nan, 1e-40, 0.0, -0.0])
@pytest.mark.parametrize("name", ["by_vector", "by_rows"])
def test_elements_of_any_size(name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as overflow where they are made larger, and meet numbers that are 0, too."""
    for known in (False, True):
        given = arguments(name, 41)
        given["x"][..., [4, 40]] = value
        given["w"].view(np.uint8)[:, 4, ::3] = 0
        both_ways(name, given, monkeypatch, known)
        given["x"][...] = value
        both_ways(name, given, monkeypatch, known)


def test_elements_are_copied_once_for_panels_that_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are copied as they are met, and those that the kernel writes each time."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 0x7F, (6, 64, 16)).astype(np.uint8)
    x = random.standard_normal((3, 64)).astype(np.float32)
    w, wide = codes.view(FP8), codes.view(FP8).astype(np.float64)
    place = np.array([1, 1, 0, 2, 2, 1], np.int32)
    lane, found = both_ways("by_places", {"w": w, "place": place, "x": x, "y": np.zeros((6, 16), np.float32)},
                            monkeypatch, True)
    np.testing.assert_allclose(found, np.einsum("pkl,pk->pl", wide, x[place]), rtol=0, atol=1e-6 * 448 * 64)
    (copy,) = copies_in(lane)
    assert copy.operands[1].op is not None and copy.operands[1].op.name == "s_select"
    lane, found = both_ways("by_what_it_made", {"w": w, "x": x, "z": np.zeros(64, np.float32),
                                                "y": np.zeros((3, 6, 16), np.float32)}, monkeypatch, True)
    np.testing.assert_allclose(found, np.einsum("pkl,ak->apl", wide, x + 1.0), rtol=0, atol=1e-6 * 448 * 64)
    (copy,) = copies_in(lane)
    assert copy.operands[1].op is not None and copy.operands[1].op.name == "s_const"


def of_many_panels(name: str, k: int) -> tuple[Function, Specialization]:
    given = arguments(name, k)
    function = kernel(name).tile_ir({"K": k, "M": 4} if name == "by_rows" else {"K": k})
    return function, specialize(function, given, {"P": 256})


def test_each_block_of_the_depth_keeps_its_own() -> None:
    function, specialization = of_many_panels("by_rows", 160)
    lane = finish_lane(to_lane(function, Schedule(), facts_of(CORE), specialization), CORE)
    (copy,) = copies_in(lane)
    assert lane.attributes["scratch"] == [[1, [[5 * (64 + 4 * 32 * 4), [], 1]]]]
    assert copy.attributes["step"] == lane.attributes["lanes"]


def test_the_quick_loop_has_its_constants_in_registers() -> None:
    for name, k in (("by_vector", 4096), ("by_rows", 160)):
        text = compile_checked(*of_many_panels(name, k), CORE)[0].text
        lines = text.splitlines()
        first = next(n for n, line in enumerate(lines) if "vpmaxub" in line)
        start = max(n for n in range(first) if lines[n].startswith(".L"))
        stop = next(n for n in range(first, len(lines)) if lines[n].startswith("    j"))
        loop = lines[start + 1:stop]
        assert sum("vpmaddubsw" in line for line in loop) >= 4
        assert not any("rip" in line or "rsp" in line or "vmulps" in line for line in loop), "\n".join(loop)


def test_only_where_numbers_are_widened_by_twos(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, quickly in (("zen3", True), ("v3", False), ("zen4", False)):
        target, seen = TARGETS[machine], []
        given = arguments("by_vector", 71)
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "_trace", lambda function, after, *rest, seen=seen: seen.append(after))
            run_lane(by_vector.tile_ir(), given, facts=facts_of(target),
                     passes=lambda lane, target=target: finish_lane(lane, target))
        assert ("add_up_quickly" in seen) is quickly
