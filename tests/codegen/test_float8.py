"""fp8 and i4 at every station: all 256 codes, all roundings, against ml_dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, each, emulate, f8e4m3, f8e5m2, f32, f64, i4, i8, i32, i64, tiles, whole, zeros
from sapper.codegen.pipeline import facts_of, finish_lane, to_lane
from sapper.lane.rows import rounded_constant
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.schedule import Schedule
from tests.lane.run_lane import run_lane, specialize

from .run_native import RUNNABLE, run_native

MACHINES = [name for name in ("v3", "zen3", "v4", "zen4") if name in RUNNABLE]
FORMATS = {"f8e4m3": ml_dtypes.float8_e4m3fn, "f8e5m2": ml_dtypes.float8_e5m2}
N, K, P = sp.dims("N K P")


@sp.kernel
def unpack_f8e4m3(x: Tensor[f8e4m3, N], y: Tensor[f32, N], backwards: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = x[n].to(f32)
        backwards[n] = x[N - 1 - n].to(f32)


@sp.kernel
def unpack_f8e5m2(x: Tensor[f8e5m2, N], y: Tensor[f32, N], backwards: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = x[n].to(f32)
        backwards[n] = x[N - 1 - n].to(f32)


@sp.kernel
def pack_f8e4m3(x: Tensor[f32, N], y: Tensor[f8e4m3, N], rounded: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = x[n].to(f8e4m3)
        rounded[n] = x[n].to(f8e4m3).to(f32)


@sp.kernel
def pack_f8e5m2(x: Tensor[f32, N], y: Tensor[f8e5m2, N], rounded: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = x[n].to(f8e5m2)
        rounded[n] = x[n].to(f8e5m2).to(f32)


@sp.kernel
def from_f64(x: Tensor[f64, N], y: Tensor[f8e4m3, N], z: Tensor[f64, N]):
    for n in tiles(N):
        y[n] = x[n].to(f8e4m3)
        z[n] = x[n].to(f8e5m2).to(f64)


@sp.kernel
def to_wide(x: Tensor[f8e4m3, N], y: Tensor[f64, N], z: Tensor[f8e5m2, N], w: Tensor[i64, N]):
    for n in tiles(N):
        y[n] = x[n].to(f64)
        w[n] = z[n].to(f64).to(i64)


@sp.kernel
def nibbles(x: Tensor[i4, N], y: Tensor[i4, N], wide: Tensor[i32, N], cut: Tensor[i8, N]):
    for n in tiles(N):
        value = x[n].to(i32) * 3
        wide[n] = value
        y[n] = value.to(i4)
        cut[n] = value.to(i4).to(i8)


@sp.kernel
def gathered(at: Tensor[i32, N], x: Tensor[f8e4m3, N], y: Tensor[f8e5m2, N]):
    for n in tiles(N):
        y[at[n]] = x[at[n]].to(f32).to(f8e5m2)


@sp.kernel
def products(a: Tensor[f8e4m3, N, K], x: Tensor[f32, K], y: Tensor[f32, N]):
    for n in tiles(N):
        acc = zeros(n, dtype=f32)
        for k in tiles(K):
            acc += a[n, k].to(f32) @ x[k]
        y[n] = acc


@sp.kernel
def scaled_panels(x: Tensor[f8e4m3, P, K, 16], y: Tensor[f32, P, K, 16]):
    for p in each(P):
        l = whole(16)
        for k in tiles(K):
            y[p, k, l] = x[p, k, l].to(f32) * 3.0


def hostile(name: str) -> np.ndarray:
    """Every number of a format, what lies halfway to the next, both neighbours of these, and random bits."""
    codes = np.arange(256, dtype=np.uint8).view(FORMATS[name]).astype(np.float32)
    numbers = np.unique(np.abs(codes[np.isfinite(codes)]))
    special = [464, 480, 61440, 65536, np.inf, np.nan, 1e-45, 3.4e38, 2.0**107, 2.0**108, 2.0**120]
    points = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2, special]).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    random = np.random.default_rng(1)
    spread = random.standard_normal(3000) * 2.0 ** random.integers(-20, 18, 3000)
    bits = random.integers(0, 2**32, 3000, np.uint32).view(np.float32)
    return np.concatenate([points, -points, spread.astype(np.float32), bits])


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Bit for bit, but for which NaN."""
    nan = np.isnan(wanted.astype(np.float32))
    assert np.isnan(found.astype(np.float32))[nan].all()
    np.testing.assert_array_equal(found.view(np.uint8 if found.itemsize == 1 else np.uint32)[~nan],
                                  wanted.view(np.uint8 if wanted.itemsize == 1 else np.uint32)[~nan])


def run_everywhere(kernel: Any, arguments: dict[str, np.ndarray], check: Any) -> None:
    """As lane IR, with the ops of targets that have none for fp8, and as machine code."""
    for machine in MACHINES:
        copies = {name: array.copy() for name, array in arguments.items()}
        run_native(kernel.tile_ir(), copies, TARGETS[machine])
        check(copies)
    copies = {name: array.copy() for name, array in arguments.items()}
    run_lane(kernel.tile_ir(), copies)
    check(copies)
    copies = {name: array.copy() for name, array in arguments.items()}
    emulate.run(kernel, *copies.values(), target="sm_80", workers=4)
    check(copies)


@pytest.mark.parametrize("name", FORMATS)
def test_all_codes(name: str) -> None:
    codes = np.arange(256, dtype=np.uint8).view(FORMATS[name])
    wanted = codes.astype(np.float32)

    def check(done: dict[str, np.ndarray]) -> None:
        assert_same(done["y"], wanted)
        assert_same(done["backwards"], wanted[::-1])

    blank = np.full(256, 7, np.float32)
    run_everywhere(globals()[f"unpack_{name}"], {"x": codes, "y": blank, "backwards": blank.copy()}, check)


@pytest.mark.parametrize("name", FORMATS)
def test_all_roundings(name: str) -> None:
    x = hostile(name)
    with np.errstate(all="ignore"):
        wanted = x.astype(FORMATS[name])

    def check(done: dict[str, np.ndarray]) -> None:
        assert_same(done["y"], wanted)
        assert_same(done["rounded"], wanted.astype(np.float32))

    arguments = {"x": x, "y": np.zeros(len(x), FORMATS[name]), "rounded": np.zeros_like(x)}
    run_everywhere(globals()[f"pack_{name}"], arguments, check)


def test_f64_is_rounded_by_f32() -> None:
    """4 lanes on AVX2: the bytes of a row are fewer than a widening reads."""
    x = hostile("f8e4m3")[:1237].astype(np.float64)
    with np.errstate(all="ignore"):
        y, z = x.astype(np.float32).astype(ml_dtypes.float8_e4m3fn), x.astype(np.float32).astype(ml_dtypes.float8_e5m2)

    def check(done: dict[str, np.ndarray]) -> None:
        assert_same(done["y"], y)
        np.testing.assert_array_equal(done["z"], z.astype(np.float64))

    run_everywhere(from_f64, {"x": x, "y": np.zeros(len(x), y.dtype), "z": np.zeros(len(x))}, check)


def test_codes_that_meet_rows_of_8_bytes() -> None:
    """Half as many lanes: four rows of codes are no whole register."""
    random = np.random.default_rng(2)
    x, z = (random.permutation(np.arange(5 * 256, dtype=np.uint16).astype(np.uint8))[:1237].view(FORMATS[name])
            for name in ("f8e4m3", "f8e5m2"))
    z = np.where(np.isfinite(z.astype(np.float32)), z, z.dtype.type(1.5))
    wanted = x.astype(np.float64)

    def check(done: dict[str, np.ndarray]) -> None:
        np.testing.assert_array_equal(done["y"], wanted)
        np.testing.assert_array_equal(done["w"], z.astype(np.float64).astype(np.int64))

    run_everywhere(to_wide, {"x": x, "y": np.zeros(len(x)), "z": z, "w": np.zeros(len(x), np.int64)}, check)


def test_i4() -> None:
    x = np.random.default_rng(0).integers(-8, 8, 61).astype(ml_dtypes.int4)
    wide = x.astype(np.int32) * 3

    def check(done: dict[str, np.ndarray]) -> None:
        np.testing.assert_array_equal(done["wide"], wide)
        np.testing.assert_array_equal(done["y"].astype(np.int32), wide.astype(ml_dtypes.int4).astype(np.int32))
        np.testing.assert_array_equal(done["cut"], wide.astype(ml_dtypes.int4).astype(np.int8))

    run_everywhere(nibbles, {"x": x, "y": np.zeros(61, ml_dtypes.int4), "wide": np.zeros(61, np.int32),
                             "cut": np.zeros(61, np.int8)}, check)


def test_gather_and_scatter() -> None:
    random = np.random.default_rng(2)
    at, x = random.permutation(77).astype(np.int32), random.standard_normal(77).astype(ml_dtypes.float8_e4m3fn)
    run_everywhere(gathered, {"at": at, "x": x, "y": np.zeros(77, ml_dtypes.float8_e5m2)},
                   lambda done: assert_same(done["y"], x.astype(np.float32).astype(ml_dtypes.float8_e5m2)))


def test_products() -> None:
    random = np.random.default_rng(3)
    a, x = random.standard_normal((37, 67)).astype(ml_dtypes.float8_e4m3fn), random.standard_normal(67)
    wanted = a.astype(np.float64) @ x.astype(np.float32)

    def check(done: dict[str, np.ndarray]) -> None:
        # 67 products of magnitudes near 1, each rounded to f32
        np.testing.assert_allclose(done["y"], wanted, rtol=0, atol=67 * 2.0**-22)

    run_everywhere(products, {"a": a, "x": x.astype(np.float32), "y": np.zeros(37, np.float32)}, check)


@pytest.mark.parametrize(("name", "machine"), [
    (name, machine) for name in FORMATS for machine in ("zen4", "v4")] + [("f8e4m3", "zen3")])
def test_a_register_at_once(name: str, machine: str) -> None:
    """Where a target widens a register of codes, by tables of bytes or by words, four loads are one, or two that fill
    half a register; the lane interpreter says what that means."""
    codes = np.arange(256, dtype=np.uint8).view(FORMATS[name])
    kernel = globals()[f"unpack_{name}"]
    arguments = {"x": codes, "y": np.zeros(256, np.float32), "backwards": np.zeros(256, np.float32)}
    target = TARGETS[machine]
    lane = run_lane(kernel.tile_ir(), arguments, passes=lambda lane: finish_lane(lane, target),
                    facts=facts_of(target) if machine == "zen3" else None)
    assert [op for op in lane.walk() if op.name == "widen_float8"]
    assert_same(arguments["y"], codes.astype(np.float32))
    assert_same(arguments["backwards"], codes.astype(np.float32)[::-1])


def test_rows_behind_one_another_are_widened_at_once() -> None:
    """Rows as long as a vector, as panels have them; three of seven are left."""
    codes = np.random.default_rng(5).permutation(np.arange(7 * 256, dtype=np.uint16).astype(np.uint8))
    x = codes.reshape(16, 7, 16).view(FORMATS["f8e4m3"])
    arguments, wanted = {"x": x, "y": np.zeros(x.shape, np.float32)}, x.astype(np.float32) * np.float32(3)
    run_everywhere(scaled_panels, arguments, lambda done: assert_same(done["y"], wanted))
    for machine, at_once in (("zen4", True), ("v4", True), ("zen3", True), ("v3", False)):
        function, target = scaled_panels.tile_ir(), TARGETS[machine]
        lane = finish_lane(to_lane(function, Schedule(), facts_of(target), specialize(function, arguments)), target)
        assert any(op.name == "widen_float8" for op in lane.walk()) is at_once


@pytest.mark.parametrize("name", FORMATS)
def test_constants(name: str) -> None:
    for value in hostile(name)[:400]:
        if np.isfinite(value):
            with np.errstate(all="ignore"):
                wanted = value.astype(FORMATS[name]).astype(np.float32)
            found = rounded_constant(float(value), {"f8e4m3": f8e4m3, "f8e5m2": f8e5m2}[name])
            np.testing.assert_array_equal(np.float32(found), wanted)
