"""Neighbours that a lane takes together: which walks have them, and that nothing else changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, bf16, emulate, f16, f32, i8, i32, max, sum, targets, tiles, u8, whole, zeros
from sapper.codegen.pipeline import compile_kernel, facts_of, finish_lane, to_lane
from sapper.ir.text import parse_function, print_function
from sapper.kernels import find
from sapper.lane.ops import LANE_OPS
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import DimClass, Schedule, Specialization
from tests.strategies.amount import examples

M, N = sp.dims("M N")
BF16 = ml_dtypes.bfloat16
VECTORS = ("v2.b32", "v4.b32")


@sp.kernel
def mixed(a: Tensor[bf16, M, N], b: Tensor[f16, M, N], c: Tensor[i8, M, N], d: Tensor[u8, M, N], e: Tensor[i32, M, N],
          f: Tensor[f32, N], y: Tensor[f32, M, N], narrow: Tensor[bf16, M, N], half: Tensor[f16, M, N],
          byte: Tensor[i8, M, N]):
    """Every type, coordinates as numbers, and what is one for a row."""
    for m, n in tiles(M, N):
        place = (m * 3 + n).to(f32)
        value = a[m, n].to(f32) + b[m, n].to(f32) * 0.5 + c[m, n].to(f32) - d[m, n].to(f32) + f[n]
        y[m, n] = value + place + e[m, n].to(f32)
        narrow[m, n] = value.to(bf16)
        half[m, n] = value.to(f16)
        byte[m, n] = c[m, n] - e[m, n].to(i8)


@sp.kernel
def bytes_only(c: Tensor[i8, M, N], d: Tensor[u8, M, N], y: Tensor[u8, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = (c[m, n].to(i32) + d[m, n].to(i32)).to(u8)


@sp.kernel
def centred(x: Tensor[bf16, M, N], y: Tensor[f32, M, N], most: Tensor[f32, M]):
    """Reductions, a value that is kept between two walks, and a result for each row."""
    for m in tiles(M):
        n = whole(N)
        mean = sum(x[m, n].to(f32), over=n) / N.to(f32)
        off = x[m, n].to(f32) - mean
        most[m] = max(off * off, over=n)
        y[m, n] = off / (1.0 + sum(off * off, over=n))


@sp.kernel
def in_place(x: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        x[m, n] = x[m, n] * 2.0 + 1.0


@sp.kernel
def rows_of(table: Tensor[bf16, M, N], place: Tensor[i32, M], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = table[place[m], n].to(f32)


@sp.kernel
def copied(table: Tensor[bf16, M, N], place: Tensor[i32, M], y: Tensor[bf16, M, N]):
    """Words pass as they are."""
    for m, n in tiles(M, N):
        y[m, n] = table[place[m], n]


@sp.kernel
def picked(x: Tensor[f32, M, N], place: Tensor[i32, M, N], y: Tensor[f32, M, N]):
    """Elements from anywhere, whose places and results are neighbours."""
    for m, n in tiles(M, N):
        y[m, n] = x[m, place[m, n]]


@sp.kernel
def products(w: Tensor[bf16, M, N], x: Tensor[f32, N], y: Tensor[f32, M]):
    for m in tiles(M):
        acc = zeros(m, dtype=f32)
        for n in tiles(N):
            acc += w[m, n] @ x[n]
        y[m] = acc


@sp.kernel
def shifted(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    """Neighbours begin at odd places."""
    for m, n in tiles(M, sp.span(0, N - 1)):
        y[m, n] = x[m, n + 1]


@sp.kernel
def turned(x: Tensor[f32, N, M], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[n, m]


@sp.kernel
def summed(x: Tensor[f32, M, N], y: Tensor[f32, N]):
    """The lane axis stays: sums of columns."""
    for n in tiles(N):
        m = whole(M)
        y[n] = sum(x[m, n], over=m)


KERNELS = {k.name: k for k in (
    mixed, bytes_only, centred, in_place, rows_of, copied, picked, products, shifted, turned, summed)}
DTYPES = {"bf16": BF16, "f16": np.float16, "f32": np.float32, "i32": np.int32, "i8": np.int8, "u8": np.uint8}


def arguments_of(kernel: Any, extents: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    made = {}
    for name, type in kernel.parameters:
        shape = [extents[str(d)] for d in type.dims]
        kind = np.dtype(DTYPES[type.dtype.name])
        numbers = random.integers(0, extents["M"] if name == "place" else 100, shape)
        made[name] = (numbers if kind.kind in "iu" else random.standard_normal(shape)).astype(kind)
    return made


def agree(kernel: Any, extents: dict[str, int], lazy: bool = False, seed: int = 0) -> Counter[str]:
    """The emulator's results are the interpreter's, up to the rounding of sums; gives its instructions."""
    given, expected = arguments_of(kernel, extents, seed), arguments_of(kernel, extents, seed)
    with np.errstate(all="ignore"):
        kernel(*expected.values(), interpret=True)
    counters = emulate.run(kernel, *given.values(), target="sm_80", workers=2, aligned=given,
                           options=emulate.Options(lazy=lazy)).counters
    for name, array in given.items():
        exact = array.dtype.kind in "iu"
        np.testing.assert_allclose(array.astype(np.float64), expected[name].astype(np.float64), err_msg=name,
                                   rtol=0 if exact else 2.0**-7 if array.dtype == BF16 else 2.0**-9,
                                   atol=0 if exact else 1e-4)
    return Counter(counters.instructions)


def taken_together(instructions: Counter[str]) -> set[str]:
    return {name.split(".")[0] for name in instructions if name.endswith(VECTORS)}


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(("name", "runs"), [
    ("mixed", {"ld", "st"}), ("bytes_only", {"ld", "st"}), ("centred", {"ld", "st"}), ("in_place", {"ld", "st"}),
    ("rows_of", {"ld", "st"}), ("copied", {"ld", "st"}), ("picked", {"ld", "st"}), ("products", {"ld"}),
    ("shifted", set()), ("turned", set()), ("summed", {"ld", "st"})])
def test_same_results(name: str, runs: set[str], lazy: bool) -> None:
    found = agree(KERNELS[name], {"M": 3, "N": 512 + 192}, lazy)
    assert taken_together(found) == runs


@settings(max_examples=examples(12), deadline=None, derandomize=True)
@given(st.sampled_from(sorted(KERNELS)), st.integers(1, 5), st.integers(1, 17), st.integers(0, 9))
def test_ragged_rows(name: str, rows: int, columns: int, seed: int) -> None:
    """Rows of any number of 64 bytes, at most of the widest type."""
    agree(KERNELS[name], {"M": rows, "N": 64 * columns}, seed=seed)


def lane_ops(kernel: Any, aligned: bool = True, schedule: Schedule | None = None, level: str = "sm_80") -> Counter[str]:
    names = [name for name, _ in kernel.parameters]
    known = Specialization({d: DimClass(4096, 64) for d in "MN"}, dict.fromkeys(names, "contiguous"),
                           frozenset(names if aligned else ()))
    target = targets.target(level)
    lane = finish_lane(to_lane(kernel.tile_ir(), schedule or Schedule(), facts_of(target), known), target)
    text = print_function(lane)
    assert print_function(parse_function(text, {"tile": TILE_OPS, "lane": LANE_OPS})) == text
    return Counter(op.name for op in lane.walk())


def test_which_walks_have_runs() -> None:
    """Two at once, where registers hold them."""
    assert lane_ops(in_place)["load_run"] == lane_ops(in_place)["store_run"] == 2
    assert lane_ops(mixed)["load_run"] == 6
    assert lane_ops(products)["load_run"] > 1
    for found in (lane_ops(in_place, aligned=False), lane_ops(in_place, level="zen4"), lane_ops(shifted),
                  lane_ops(turned), lane_ops(find("argmax_rows").kernel)):
        assert not found["load_run"] and not found["store_run"]


def test_what_can_be_made_again_is_not_kept() -> None:
    """Softmax makes its powers twice: what all warps keep is more than the caches have room for."""
    entry = find("softmax").kernel
    names = [name for name, _ in entry.parameters]
    scratch = {level: compile_kernel(entry, {}, dict.fromkeys(names, "contiguous"), dict.fromkeys("MN", (8192, 64)),
                                     targets.target(level), None).scratch for level in ("sm_80", "zen4")}
    assert not scratch["sm_80"] and scratch["zen4"]


def test_a_schedule_says_how_many_registers() -> None:
    """A run is no longer than the register factor that the schedule asks for."""
    found = lane_ops(in_place, schedule=Schedule(lane="n", registers={"n": 1}))
    assert not found["load_run"]
    assert lane_ops(in_place, schedule=Schedule(lane="n", registers={"n": 8}))["load_run"] == 2


def test_lanes_wait_where_they_touch_what_others_wrote() -> None:
    """Runs meet lane by lane: nothing waits within the loop over them. But before the loop over what is left."""
    target = targets.target("sm_80")
    known = Specialization({d: DimClass(4096, 64) for d in "MN"}, {"x": "contiguous"}, frozenset("x"))
    lane = finish_lane(to_lane(in_place.tile_ir(), Schedule(), facts_of(target), known), target)
    loops = [(block, op) for parent in lane.walk() for block in parent.blocks for op in block.ops if op.name == "loop"]
    names = [[op.name for op in loop.blocks[0].ops] for _, loop in loops]
    (main,) = [number for number, found in enumerate(names) if "load_run" in found]
    (rest,) = [number for number, found in enumerate(names) if "load" in found]
    assert "sync_lanes" not in names[main] + names[rest]
    block, loop = loops[rest]
    assert block.ops[block.ops.index(loop) - 1].name == "sync_lanes"
