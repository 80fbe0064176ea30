"""A kernel by hand: used where its conditions hold, refused with one warning where it is wrong, checked both ways."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, f32, i32, tiles, x86
from sapper.assembly.errors import AssemblyError
from sapper.assembly.mutate import mutants
from sapper.assembly.override import compile_by_hand
from sapper.runtime import by_hand
from sapper.runtime.check import check_kernel
from sapper.runtime.errors import SapperWarning
from sapper.targets import host_target
from sapper.targets.x86_64.target import target

N, M = sp.dims("N M")
ZEN4 = target("zen4")
FEATURES = "avx512f bmi2"


def tail_mask(a: Any, count: Any) -> Any:
    """An opmask with the first `count` of 16 lanes on."""
    ones, mask = a.r64(), a.mask()
    x86.mov(ones, -1)
    x86.bzhi(ones, ones, count)
    x86.kmovw(mask, ones.r32)
    return mask


def make_scale() -> Any:
    @sp.kernel
    def scale(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = x[n] * 2.0 + 1.0

    return scale


def write_scale(a: Any, factor: float = 2.0) -> None:
    x, y, n = a.data("x"), a.data("y"), a.extent("N")
    two, one, v = a.zmm(), a.zmm(), a.zmm()
    x86.vbroadcastss(two, x86.ptr[a.constant(np.float32(factor))])
    x86.vbroadcastss(one, x86.ptr[a.constant(np.float32(1))])
    with a.loop(0, n, 16) as i:
        x86.vmovups(v, x86.ptr[x + i * 4])
        x86.vfmadd213ps(v, two, one)
        x86.vmovups(x86.ptr[y + i * 4], v)
    x86.sub(n, i)
    mask = tail_mask(a, n)
    x86.vmovups(v[mask, x86.z], x86.ptr[x + i * 4])
    x86.vfmadd213ps(v, two, one)
    x86.vmovups(x86.ptr[y + i * 4][mask], v)
    x86.ret()


def runs_by_hand(kernel: Any, *arguments: Any) -> bool:
    """Whether a call takes the assembly: its code has the piece's bytes."""
    made = compile_by_hand(kernel, kernel.by_hand[0], host_target())
    call = sp.prepare(kernel, *arguments)
    return bool(call.entry.compiled.code == made.compiled.code)


needs_avx512 = pytest.mark.skipif(not set(FEATURES.split()) <= host_target().features, reason="no AVX-512")


@needs_avx512
def test_it_runs_where_its_conditions_hold() -> None:
    scale = make_scale()
    scale.assembly(features=FEATURES, contiguous="x y", no_spill=True)(write_scale)
    for extent in (0, 1, 15, 16, 33, 100):
        x, y = np.arange(extent, dtype=np.float32), np.full(extent, np.nan, np.float32)
        scale(x, y)
        assert np.array_equal(y, x * 2 + 1)
        assert runs_by_hand(scale, x, y)


@needs_avx512
def test_generated_code_runs_elsewhere() -> None:
    scale = make_scale()
    scale.assembly(features=FEATURES, contiguous="x y", divisible={"N": 16})(write_scale)
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    assert runs_by_hand(scale, x, y)
    assert not runs_by_hand(scale, x[::2], y[::2])
    assert not runs_by_hand(scale, x[:33], y[:33])
    call = sp.prepare(scale, x, y, schedule=sp.Schedule())
    made = compile_by_hand(scale, scale.by_hand[0], host_target())
    assert call.entry.compiled.code != made.compiled.code
    scale(x[::2], y[::2])
    assert np.array_equal(y[::2], x[::2] * 2 + 1)


def test_refusals_say_why() -> None:
    scale = make_scale()
    scale.assembly(features=FEATURES, contiguous="x", divisible={"N": 16})(write_scale)
    piece = scale.by_hand[0]
    whole = {"x": "contiguous", "y": (True,)}
    assert piece.refusal(ZEN4, {}, whole, {"N": (128, 16)}) == ""
    assert piece.refusal(ZEN4, {"N": 48}, whole, {}) == ""
    assert "multiple of 16" in piece.refusal(ZEN4, {"N": 40}, whole, {})
    assert "multiple of 16" in piece.refusal(ZEN4, {}, whole, {"N": (1, 1)})
    assert "contiguous" in piece.refusal(ZEN4, {}, {"x": (False,)}, {"N": (128, 16)})
    assert "avx512f" in piece.refusal(target("v3"), {}, whole, {"N": (128, 16)})


def test_conditions_name_what_the_kernel_has() -> None:
    scale = make_scale()
    with pytest.raises(ValueError, match="no tensor 'z'"):
        scale.assembly(contiguous="x z")
    with pytest.raises(ValueError, match="no dim 'K'"):
        scale.assembly(divisible={"K": 4})
    with pytest.raises(ValueError, match=r"assembly of scale: found the feature 'avx512'; .* near: .*avx512f"):
        scale.assembly(features="avx512")
    with pytest.raises(ValueError, match=r"found the feature 'sm_81'; .* near: .*sm_80"):
        scale.assembly(family="ptx", features="sm_81")
    with pytest.raises(ValueError, match=r"found family='aarch64'; expected one .* by hand: x86_64, ptx"):
        scale.assembly(family="aarch64")
    with pytest.raises(ValueError, match="block nothing: found the feature 'avx3'"):
        x86.block("nothing", inputs="f32", result="f32", features="avx3")(lambda out, x: None)


@needs_avx512
def test_a_wrong_piece_is_never_used_and_one_warning_says_why() -> None:
    scale = make_scale()

    def wrong_scale(a: Any) -> None:
        write_scale(a, 3.0)

    scale.assembly(features=FEATURES, contiguous="x y")(wrong_scale)
    x, y = np.arange(40, dtype=np.float32), np.zeros(40, np.float32)
    with pytest.warns(SapperWarning) as caught:
        scale(x, y)
    assert np.array_equal(y, x * 2 + 1)
    (warning,) = caught
    assert "wrong_scale is not used" in str(warning.message) and "[result]" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale(x[:20], y[:20])


def test_a_piece_that_asks_for_aligned_tensors_is_never_used() -> None:
    """Calls bring tensors at any multiple of an element's size; extents that are multiples of a vector, with memory
    that ends with its page, would only be aligned ones."""
    scale = make_scale()

    def aligned(a: Any) -> None:
        x, y, n = a.data("x"), a.data("y"), a.extent("N")
        two, one, v = a.ymm(), a.ymm(), a.ymm()
        x86.vbroadcastss(two, x86.ptr[a.constant(np.float32(2))])
        x86.vbroadcastss(one, x86.ptr[a.constant(np.float32(1))])
        with a.loop(0, n, 8) as i:
            x86.vmovaps(v, x86.ptr[x + i * 4])
            x86.vfmadd213ps(v, two, one)
            x86.vmovups(x86.ptr[y + i * 4], v)
        x86.ret()

    scale.assembly(features="avx2 fma", contiguous="x y", divisible={"N": 8})(aligned)
    x, y = np.zeros(65, np.float32)[1:], np.zeros(64, np.float32)
    with pytest.warns(SapperWarning, match=r"vmovaps needs memory aligned to 32 bytes .*\n.*\n.*vmovaps\(v, .*"):
        scale(x, y)
    assert np.array_equal(y, np.ones(64))
    made = compile_by_hand(scale, scale.by_hand[0], ZEN4)
    with pytest.raises(AssemblyError, match="vmovaps needs memory aligned"):
        by_hand.verify(scale, made, interpreted=True)


def test_an_unknown_mnemonic_is_an_error_of_its_piece() -> None:
    scale = make_scale()

    @scale.assembly(features="avx2", contiguous="x y")
    def misspelt(a: Any) -> None:
        x86.vadps(a.ymm(), a.ymm(), a.ymm())

    x, y = np.arange(40, dtype=np.float32), np.zeros(40, np.float32)
    with pytest.warns(SapperWarning, match=r"called vadps \[unknown[\s\S]*x86\.vadps\(a[\s\S]*near: .*vaddps"):
        scale(x, y)
    assert np.array_equal(y, x * 2 + 1)


@needs_avx512
def test_a_piece_that_leaves_its_tensors_is_never_used() -> None:
    scale = make_scale()

    def beyond(a: Any) -> None:
        x, y, n = a.data("x"), a.data("y"), a.extent("N")
        v = a.zmm()
        with a.loop(0, n) as i:
            x86.vmovups(v, x86.ptr[x + i * 4])  # sixteen elements where there is one
            x86.vaddps(v, v, v)
            x86.vaddps(v, v, x86.broadcast[a.constant(np.float32(1))])
            x86.vmovss(x86.ptr[y + i * 4], v.xmm)
        x86.ret()

    scale.assembly(features=FEATURES, contiguous="x y")(beyond)
    x, y = np.arange(40, dtype=np.float32), np.zeros(40, np.float32)
    with pytest.warns(SapperWarning, match=r"vmovups reaches outside x [\s\S]* bytes 0 to 63 where N = 1"):
        scale(x, y)
    assert np.array_equal(y, x * 2 + 1)


@needs_avx512
def test_addresses_that_depend_on_data_are_judged_by_running() -> None:
    """What is read says where to write: the static check can't tell, the guard pages and the interpreter of rows do."""
    @sp.kernel
    def turned(ids: Tensor[i32, N], y: Tensor[i32, N]):
        for n in tiles(N):
            y[n] = ids[n] * 0

    def astray(a: Any) -> None:
        ids, y, n = a.data("ids"), a.data("y"), a.extent("N")
        at, zero = a.r64(), a.r64()
        x86.xor(zero.r32, zero.r32)
        with a.loop(0, n) as i:
            x86.movsxd(at, x86.dword[ids + i * 4])
            x86.mov(x86.dword[y + at * 4], zero.r32)
        x86.ret()

    turned.assembly(contiguous="ids y")(astray)
    ids, y = np.arange(40, dtype=np.int32), np.ones(40, np.int32)
    with pytest.warns(SapperWarning, match="memory that it may not|crashes|does not compute"):
        turned(ids, y)
    assert not y.any()
    made = compile_by_hand(turned, turned.by_hand[0], ZEN4)
    with pytest.raises(AssemblyError, match="memory that it may not"):
        by_hand.verify(turned, made, interpreted=True)


def test_check_interprets_and_runs_it() -> None:
    scale = make_scale()
    scale.assembly(features=FEATURES, contiguous="x y")(write_scale)
    report = check_kernel(scale, ZEN4 if ZEN4.features <= host_target().features else host_target(), runs=8)
    assert report.ok, report.finding
    if ZEN4.features <= host_target().features:
        assert min(report.passed["by hand, interpreted"], report.passed["by hand, native"]) >= 8


def test_check_finds_a_wrong_piece() -> None:
    scale = make_scale()

    def wrong(a: Any) -> None:
        write_scale(a, 2.5)

    scale.assembly(features=FEATURES, contiguous="x y")(wrong)
    report = check_kernel(scale, ZEN4, runs=4)
    assert report.finding is not None and report.finding.station == "by hand, interpreted"


def test_parts_that_the_kernel_lacks() -> None:
    scale = make_scale()
    for ask, part in ((lambda a: a.data("z"), "no tensor z"), (lambda a: a.extent("K"), "no dimension K"),
                      (lambda a: a.scalar("x"), "no scalar x"), (lambda a: a.stride("x", 1), "no dimension 1")):
        scale.by_hand.clear()
        scale.assembly()(ask)
        with pytest.raises(AssemblyError, match=part):
            compile_by_hand(scale, scale.by_hand[0], ZEN4)


def test_workers_strides_scalars_and_scratch() -> None:
    @sp.kernel
    def shift(x: Tensor[f32, M, N], by: f32, y: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            y[m, n] = x[m, n] + by

    @shift.assembly(features=FEATURES, contiguous="y")
    def rows_of_a_worker(a: Any) -> None:
        x, y, rows, columns = a.data("x"), a.data("y"), a.extent("M"), a.extent("N")
        row_stride, column_stride, worker, workers = a.stride("x", 0), a.stride("x", 1), a.worker(), a.workers()
        space = a.scratch(4, (1, ("N",), 16))
        by, v, at, to = a.xmm(), a.xmm(), a.r64(), a.r64()
        x86.vmovd(by, a.scalar("by").r32)
        head, end = a.label(), a.label()
        x86.mov(at, worker)
        x86.imul(at, row_stride)
        x86.lea(x, x86.ptr[x + at * 4])
        x86.mov(at, worker)
        x86.imul(at, columns)
        x86.lea(y, x86.ptr[y + at * 4])
        x86.imul(row_stride, workers)
        x86.mov(to, columns)
        x86.imul(to, workers)
        x86.sub(rows, worker)
        x86.jle(end)
        a.place(head)
        x86.mov(at, x)
        with a.loop(0, columns) as n:
            x86.vaddss(v, by, x86.ptr[at])
            x86.vmovss(x86.ptr[space + n * 4], v)
            x86.lea(at, x86.ptr[at + column_stride * 4])
        with a.loop(0, columns) as n:
            x86.vmovss(v, x86.ptr[space + n * 4])
            x86.vmovss(x86.ptr[y + n * 4], v)
        x86.lea(x, x86.ptr[x + row_stride * 4])
        x86.lea(y, x86.ptr[y + to * 4])
        x86.sub(rows, workers)
        x86.jg(head)
        a.place(end)
        x86.ret()

    made = compile_by_hand(shift, shift.by_hand[0], ZEN4)
    assert by_hand.verify(shift, made, interpreted=True) > 0
    if ZEN4.features <= host_target().features:
        assert by_hand.verify(shift, made) > 0


def killed(kernel: Any, piece: Any, mutant: Any) -> str:
    """How the checks find a mutant; "" where they do not."""
    from sapper.assembly import override
    from sapper.assembly.static import check_static

    try:
        check_static(mutant.assembly, ZEN4)
        good = compile_by_hand(kernel, piece, ZEN4)
        made = override.Override(piece, mutant.assembly, mutant.assembly.machine(), good.finished, good.compiled)
        by_hand.verify(kernel, made, runs=12, interpreted=True)
    except AssemblyError as error:
        return error.kind
    return ""


def test_every_planted_error_is_found() -> None:
    scale = make_scale()
    scale.assembly(features=FEATURES, contiguous="x y")(write_scale)
    piece = scale.by_hand[0]
    assembly = compile_by_hand(scale, piece, ZEN4).assembly
    found = [(str(m), killed(scale, piece, m)) for m in mutants(assembly)]
    assert {m.kind for m in mutants(assembly)} >= {"left out", "wrong lane", "dropped iteration", "one iteration more",
                                                   "swapped operands", "wrong rounding", "clobber", "mask left off"}
    alive = [name for name, kind in found if not kind]
    assert not alive, f"{len(alive)} of {len(found)} live: {alive}"
