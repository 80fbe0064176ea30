"""The check of a kernel at every station: a right kernel passes, and a planted fault is found where it was planted."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, each, f32, i32, span, tiles, whole
from sapper.codegen import allocate as allocate_module
from sapper.codegen import peephole as peephole_module
from sapper.codegen import schedule as schedule_module
from sapper.codegen.machine import Instruction, Memory, Register
from sapper.kernels import find
from sapper.lane import math, rows, simplify
from sapper.runtime import check as check_module
from sapper.runtime.cases import (
    IntegerUse,
    arguments_of_shape,
    cases,
    copies_of,
    copy_of,
    integer_uses,
    pairs_of_dims,
)
from sapper.runtime.check import STATIONS, check_kernel
from sapper.runtime.errors import ArgumentError
from sapper.runtime.packed import pack_array
from sapper.targets import target
from sapper.targets.x86_64 import select as rules
from sapper.targets.x86_64.instructions import ROWS
from sapper.tile import canonical
from sapper.tile.interpret import interpret

D, M, N, K, T = sp.dims("D M N K T")


@sp.kernel
def clipped(x: Tensor[f32, M, N], low: Tensor[f32, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = sp.maximum(x[m, n] - low[n], sp.exp(low[n]))


@sp.kernel
def picked(indices: Tensor[i32, M], table: Tensor[bf16, K, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = table[indices[m], n].to(f32)


@sp.kernel
def part(x: Tensor[f32, N], start: i32, count: i32, y: Tensor[f32, N]):
    for n in tiles(span(0, count)):
        y[n] = x[n + start]


@sp.kernel
def divided(a: Tensor[i32, N], b: Tensor[i32, N], rounds: i32, y: Tensor[i32, N]):
    for n in tiles(N):
        total = a[n]
        for _ in range(rounds):
            total = total + a[n] // b[n]
        y[n] = total


@sp.kernel
def beyond(x: Tensor[f32, 3], start: i32, y: Tensor[f32, 2]):
    for n in tiles(2):
        y[n] = x[n + start + 4]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kernel", [clipped, picked, part, divided], ids=lambda k: k.name)
def test_right_kernels_pass(kernel: Any) -> None:
    report = check_kernel(kernel)
    assert report.ok, report
    assert report.cases + report.refused == 12
    assert set(report.passed) >= {"front end", "tile sizes", "parallel loops", "canonical", "lower", "simplify"}
    assert report.to_json()["ok"] is True


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["softmax", "matvec_bf16", "attention_decode_f32", "top_k"])
def test_library_kernels_pass(name: str) -> None:
    entry = find(name)
    report = check_kernel(entry.kernel, make_arguments=entry.make_arguments, shapes=entry.check_shapes, runs=6)
    assert report.ok, report


def found_at(kernel: Any = clipped) -> tuple[str, str]:
    report = check_kernel(kernel)
    assert report.finding is not None
    assert not report.ok
    assert report.finding.station in STATIONS
    assert report.finding.case
    return report.finding.station, report.finding.message


def test_a_fault_of_the_canonical_form(monkeypatch: pytest.MonkeyPatch) -> None:
    right = canonical.canonicalize

    def wrong(function: Any) -> int:
        for op in function.walk():
            if op.name == "sub":
                op.name = "add"
        return right(function)

    monkeypatch.setattr(canonical, "canonicalize", wrong)
    station, message = found_at()
    assert station == "canonical"
    assert "y[" in message and "expected" in message


def test_a_fault_of_a_lowering_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows._SAME, "max", "min")
    assert found_at()[0] == "lower"


def test_a_fault_of_an_expansion(monkeypatch: pytest.MonkeyPatch) -> None:
    right = math._EXPANSIONS["exp"]
    monkeypatch.setitem(math._EXPANSIONS, "exp", lambda emitter, x: right(emitter, right(emitter, x)))
    assert found_at()[0] == "expand"


def test_a_fault_of_simplification(monkeypatch: pytest.MonkeyPatch) -> None:
    right = simplify.simplify

    def wrong(function: Any) -> int:
        done = right(function)
        for op in function.walk():
            if op.name == "load" and op.attributes.get("indexed"):
                op.attributes["disp"] = op.attributes.get("disp", 0) + 4
        return done

    monkeypatch.setattr(simplify, "simplify", wrong)
    assert found_at()[0] == "simplify"


def test_a_fault_of_a_selection_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.RULES, "sub", rules.RULES["add"])
    station, message = found_at()
    assert station == "select"
    assert "y[" in message


def subtract_row(function: Any) -> Instruction:
    return next(i for i in function.body if isinstance(i, Instruction) and i.row.mnemonic == "vsubps")


def test_a_fault_of_scheduling(monkeypatch: pytest.MonkeyPatch) -> None:
    right = schedule_module.schedule

    def wrong(function: Any, registers: Any) -> Any:
        done = right(function, registers)
        at = subtract_row(function)
        at.row = ROWS[at.row.name.replace("vsubps", "vaddps")]
        return done

    monkeypatch.setattr(schedule_module, "schedule", wrong)
    assert found_at()[0] == "schedule"


def test_a_fault_of_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    right = allocate_module.allocate

    def wrong(function: Any, registers: Any) -> Any:
        done = right(function, registers)
        operands = subtract_row(done.function).operands
        operands[1] = Register("vec", (operands[1].number + 1) % 16)
        return done

    monkeypatch.setattr(allocate_module, "allocate", wrong)
    assert found_at()[0] == "allocate"


def peephole_that(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    right = peephole_module.peephole

    def wrong(function: Any, registers: Any) -> Any:
        done = right(function, registers)
        change(function)
        return done

    monkeypatch.setattr(peephole_module, "peephole", wrong)


def test_a_crash_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def store_beyond(function: Any) -> None:
        for item in function.body:
            if not isinstance(item, Instruction) or item.row.mnemonic != "vmovups" or item.comment == "spill":
                continue
            if isinstance(item.operands[0], Memory):
                item.operands[0].disp += 1 << 16

    peephole_that(store_beyond, monkeypatch)
    station, message = found_at()
    assert station == "peephole"
    assert message.startswith("crash: SIGSEGV") and "write" in message and "past the end of `y`" in message


def test_a_fault_of_the_language(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile IR that says something else than the source."""
    right = clipped.tile_ir

    def wrong(static: Any = None) -> Any:
        function = right(static)
        for op in function.walk():
            if op.name == "sub":
                op.name = "add"
        return function

    monkeypatch.setattr(clipped, "tile_ir", wrong)
    assert found_at()[0] == "front end"


@sp.kernel
def totals(x: Tensor[i32, M, N], y: Tensor[i32, M]):
    for m in tiles(M):
        total = sp.zeros(m, dtype=i32)
        for n in tiles(N):
            total += sp.sum(x[m, n], over=n)
        y[m] = total


def test_a_result_that_depends_on_the_tile_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that forgets what it carries: right as long as one piece covers all of the axis."""
    right = totals.tile_ir

    def wrong(static: Any = None) -> Any:
        function = right(static)
        (loop,) = [op for op in function.walk() if op.blocks and op.results]
        (carried,), initial = loop.blocks[0].arguments, loop.operands[-1]
        for op in loop.blocks[0].ops:
            op.operands[:] = [initial if v is carried else v for v in op.operands]
        return function

    assert check_kernel(totals, runs=3).ok
    monkeypatch.setattr(totals, "tile_ir", wrong)
    station, message = found_at(totals)
    assert station == "tile sizes"
    assert "y[0]" in message and "(tiles of 1)" in message


@sp.kernel
def histogram(index: Tensor[i32, M], y: Tensor[i32, K]):
    for m in each(M):
        y[index[m]] += 1


def test_a_loop_that_is_parallel_by_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any one order of its iterations gives the right counts; two cores would not."""
    right = histogram.tile_ir

    def wrong(static: Any = None) -> Any:
        function = right(static)
        (loop,) = [op for op in function.walk() if op.blocks]
        assert not loop.attributes["parallel"]
        loop.attributes |= {"parallel": True, "ordered": False}
        return function

    assert check_kernel(histogram, runs=3).ok
    monkeypatch.setattr(histogram, "tile_ir", wrong)
    station, message = found_at(histogram)
    assert station == "parallel loops", message
    assert "`y`" in message or "y[" in message


def test_arguments_that_never_fit_are_no_success() -> None:
    report = check_kernel(beyond)
    assert report.cases == 0 and report.refused == 12 and report.finding is None
    assert not report.ok


def test_an_index_outside_in_a_loop_that_is_empty_is_no_fault() -> None:
    """With extents compiled in the front end finds that it never fits; without them nothing is read."""
    @sp.kernel
    def shifted(x: Tensor[f32, N], y: Tensor[f32, K, M]):
        for k in each(K):
            for m in tiles(M):
                y[k, m] = x[m + 4]

    report = check_kernel(shifted, seed=0, runs=12, shapes=({"K": 0, "M": 5, "N": 3}, {"K": 2, "M": 5, "N": 9}))
    assert report.ok and report.refused and report.cases, report


def test_a_call_that_is_refused_of_a_loop_that_is_empty_is_no_fault() -> None:
    """A launch asks of extents what indices in that loop need; a wrong demand of a loop that is walked is a fault."""
    from sapper.emulate import run

    @sp.kernel
    def eighth(x: Tensor[f32, M, N], y: Tensor[f32, M]):
        for m in each(M):
            y[m] = x[m, 7]

    def refuse(*arguments: Any, **options: Any) -> None:
        raise ArgumentError("shape", "eighth", "x", "extent 9", "at least 10", "pass a larger tensor")

    shapes = ({"M": 0, "N": 2}, {"M": 3, "N": 9})
    report = check_kernel(eighth, target("sm_80"), runs=2, shapes=shapes, emulate=run)
    assert report.ok and report.passed["emulator"] < report.cases, report
    report = check_kernel(eighth, target("sm_80"), runs=2, shapes=shapes, emulate=refuse)
    assert report.finding is not None and report.finding.station == "emulator"


def test_a_target_that_this_cpu_lacks_is_checked_as_far_as_it_goes() -> None:
    foreign = target("v3")._replace(features=target("v3").features | {"feature_of_the_future"})
    report = check_kernel(clipped, foreign, runs=3)
    assert report.ok
    assert "feature_of_the_future" in report.skipped["native"]
    assert "native" not in report.passed and report.passed["simplify"] == 3


def test_what_integers_are_used_for() -> None:
    assert integer_uses(picked.tile_ir()) == {"indices": IntegerUse(["K"])}
    uses = integer_uses(part.tile_ir())
    assert uses["start"] == IntegerUse(["N"])
    assert uses["count"] == IntegerUse(["N"], bound=True)
    uses = integer_uses(divided.tile_ir())
    assert uses["a"] == IntegerUse([])
    assert uses["b"] == IntegerUse([], divisor=True)
    assert uses["rounds"] == IntegerUse([], bound=True)


@sp.kernel
def moved(x: Tensor[f32, M, N], first: i32, last: i32, y: Tensor[f32, N], divisor: i32):
    for n in tiles(N):
        total = sp.zeros(n, dtype=f32)
        for m in tiles(span(first, last)):
            total += sp.sum(x[m, n], over=m)
        y[n] = total * (n // divisor).to(f32)


@pytest.mark.parametrize(("kernel", "shape", "scalars", "expected"), [
    ("attention_f32", {"T": 32, "H": 2, "G": 1, "D": 8, "P": 100}, {}, {"position": 68}),
    ("attention_f32", {"T": 100, "H": 2, "G": 1, "D": 8, "P": 100}, {}, {"position": 0}),
    ("attention_f32", {"T": 32, "H": 2, "G": 1, "D": 8, "P": 100}, {"position": 5}, {"position": 5}),
    ("attention_decode_bf16", {"H": 3, "G": 300, "D": 64, "P": 100}, {}, {"position": 99}),
    ("rope_half_split", {"T": 64, "H": 4, "R": 16, "P": 64}, {}, {"position": 0}),
    ("compress_f32", {"T": 16, "H": 16, "R": 32, "C": 512, "P": 32}, {}, {"position": 16}),
    (moved, {"M": 90, "N": 70}, {"first": 7}, {"first": 7, "last": 90}),
])
def test_integers_of_a_call_that_is_timed_are_the_largest_that_fit(kernel: Any, shape: dict[str, int],
                                                                   scalars: dict[str, int],
                                                                   expected: dict[str, int]) -> None:
    kernel = find(kernel).kernel if isinstance(kernel, str) else kernel
    made = arguments_of_shape(kernel, kernel.tile_ir(), shape, scalars=scalars)
    assert {name: made[name] for name in expected} == expected
    assert made.get("divisor", 1) in range(1, 8)
    interpret(kernel.tile_ir(), made)  # raises OutOfBounds where an index does not fit


def test_cases_are_the_same_for_the_same_seed_and_have_all_kinds() -> None:
    function = clipped.tile_ir()
    first, again = list(cases(clipped, function, 3, 12)), list(cases(clipped, function, 3, 12))
    assert [c.label for c in first] == [c.label for c in again]
    for a, b in zip(first, again, strict=True):
        for name in a.arguments:
            np.testing.assert_array_equal(a.arguments[name], b.arguments[name])
            assert a.arguments[name].strides == b.arguments[name].strides
    assert any(0 in c.arguments["x"].shape for c in first)
    assert any(np.isnan(c.arguments["x"]).any() and np.isinf(c.arguments["x"]).any() for c in first)
    assert any(c.arguments["x"].strides[0] < 0 for c in first)
    assert any(c.static for c in first) and any(not c.small for c in first)
    assert all(np.isnan(c.arguments["y"]).all() for c in first)
    assert [c.label for c in cases(clipped, function, 4, 12)] != [c.label for c in first]


@sp.kernel
def heads_of_one_cache(q: Tensor[f32, T, M, D], k: Tensor[f32, N, D], y: Tensor[f32, T, M, D]):
    for t, m in tiles(T, M):
        d = sp.whole(D)
        acc = sp.zeros(t, m, d, dtype=f32)
        for n in tiles(N):
            acc += sp.exp(q[t, m, d] @ k[n, d]) @ k[n, d]
        y[t, m, d] = acc


@pytest.mark.parametrize("seed", range(5))
def test_any_two_axes_of_a_nest_are_long_together(seed: int) -> None:
    """Whatever the others are cut to: which of them lies across the lanes shows only so. Those of the outermost loop
    are twice as long as any register has lanes, and more."""
    function = heads_of_one_cache.tile_ir()
    assert pairs_of_dims(function, ["T", "M", "D", "N"]) == [("T", "M"), ("T", "N"), ("M", "N")]
    assert pairs_of_dims(part.tile_ir(), ["N"]) == []
    shapes = [{"T": q.shape[0], "M": q.shape[1], "N": k.shape[0]} for q, k in (
        (case.arguments["q"], case.arguments["k"]) for case in cases(heads_of_one_cache, function, seed, 12))]
    for a, b in ("TM", "TN", "MN"):
        assert any(shape[a] >= 15 and shape[b] >= 15 for shape in shapes)
    assert any(min(shape["T"], shape["M"]) >= 65 for shape in shapes)


@pytest.mark.parametrize("view", [
    np.arange(24, dtype=np.float32).reshape(4, 6), np.arange(24, dtype=np.float32).reshape(4, 6)[::-1, ::-2],
    np.arange(24, dtype=np.float32).reshape(4, 6).T, np.zeros((0, 3), np.float32), np.zeros((), np.float32),
    np.asarray(np.arange(6, dtype=np.int16))[1::2],
])
def test_copies_keep_values_and_strides(view: np.ndarray) -> None:
    copy = copy_of(view)
    np.testing.assert_array_equal(copy, view)
    assert copy.strides == view.strides or not view.size
    assert not np.shares_memory(copy, view)


@sp.kernel
def fourth_row(x: Tensor[f32, K, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = x[3, n]


def test_dimensions_grow_until_the_indices_fit() -> None:
    """K is drawn too small at times, and no element is accessed where N is 0, so then any K will do."""
    report = check_kernel(fourth_row)
    assert report.ok and report.refused == 0, report


def test_rows_asserted_to_be_disjoint_get_places_of_their_own() -> None:
    @sp.kernel
    def scatter(x: Tensor[f32, M, N], place: Tensor[i32, M], out: Tensor[f32, K, N]):
        for m in each(M, disjoint=True):
            for n in tiles(N):
                out[place[m], n] = x[m, n]

    assert integer_uses(scatter.tile_ir())["place"] == IntegerUse(["K"], distinct=True)
    for case in cases(scatter, scatter.tile_ir(), 0, 12):
        places = case.arguments["place"]
        assert len(set(places.tolist())) == len(places) <= len(case.arguments["out"])
    assert check_kernel(scatter, target("v3"), runs=3).ok


@sp.kernel
def product(a: Tensor[f32, M, K], b: Tensor[f32, K, N], out: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        out[m, n] = a[m, k] @ b[k, n]


def test_matrices_are_packed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    report = check_kernel(product)
    assert report.ok, report
    assert report.passed["simplify"] > report.passed["canonical"]       # once more where something was packed
    monkeypatch.setattr(check_module, "pack_array", lambda array, *layout: pack_array(array + 1, *layout))
    found = check_kernel(product).finding
    assert found is not None
    assert found.station == "lower" and "packed)" in found.message
    assert "packed" not in str(check_kernel(clipped).skipped)


@pytest.mark.parametrize("in_place", [(), (("out", "x"),)])
def test_what_may_be_one_array_is_one_in_some_cases(in_place: tuple[tuple[str, str], ...]) -> None:
    """Each row less the first of its elements, which is 0 in what is stored."""
    @sp.kernel(in_place=in_place)
    def less(x: Tensor[f32, M, N], out: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            out[m, n] = x[m, n] - x[m, 0]

    drawn = list(cases(less, less.tile_ir(), 0, 12))
    assert any(case.arguments["x"] is case.arguments["out"] for case in drawn) == bool(in_place)
    for case in drawn:
        if case.arguments["x"] is case.arguments["out"]:
            assert not np.isnan(case.arguments["x"]).any() or "hostile" in case.label       # what is read is there
            assert "out is x" in case.label
            made = copies_of(case.arguments)
            assert made["x"] is made["out"] and made["x"] is not case.arguments["x"]
    found = check_kernel(less).finding
    assert (found is not None) == bool(in_place)
    if found is not None:
        assert "out is x" in found.case


def test_time_that_others_use_is_not_counted() -> None:
    with check_module._time_limit(0.1):
        time.sleep(0.3)
    with pytest.raises(check_module._OutOfTime), check_module._time_limit(0.1):
        while True:
            pass
