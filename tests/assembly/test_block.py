"""One instruction and blocks on rows: in a tile kernel beside a meaning, and chosen by a schedule for an op."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import KernelError, Tensor, bf16, f32, i32, tiles, x86
from sapper.assembly.block import Block
from sapper.assembly.errors import AssemblyError
from sapper.codegen.pipeline import compile_kernel
from sapper.ir.text import parse_function, print_function
from sapper.ir.types import f32 as F32
from sapper.kernels.by_hand import rows as rows
from sapper.lang.by_hand import PIECES
from sapper.runtime.check import check_kernel
from sapper.runtime.errors import SapperWarning
from sapper.targets import host_target
from sapper.targets.x86_64.target import target
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import Schedule, ScheduleError

M, N = sp.dims("M N")
V3, ZEN4 = target("v3"), target("zen4")


@sp.kernel
def reciprocal(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = sp.asm(x86.vrcp14ps, x[n], meaning=lambda t: 1.0 / t, tolerance=2.0**-13)


@sp.kernel
def fused(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        t = x[n]
        y[n] = sp.asm(x86.vfmadd213ps, t, t, t, meaning=lambda a, b, c: a * b + c)


@sp.kernel
def rotated(x: Tensor[i32, N], y: Tensor[i32, N]):
    for n in tiles(N):
        y[n] = sp.asm(x86.vprold, x[n], 7, meaning=lambda t: t << 7 | t >> 25 & 127)


def text_of(kernel: Any, chip: Any, **options: Any) -> str:
    made = compile_kernel(kernel, {}, dict.fromkeys(("x", "y"), "contiguous"), {"N": (1024, 16)}, chip,
                          options.pop("schedule", None), **options)
    return str(made.text())


def test_the_instruction_stands_in_the_code_where_the_target_has_it() -> None:
    assert "vrcp14ps zmm" in text_of(reciprocal, ZEN4)
    assert "vrcp14ps" not in text_of(reciprocal, V3) and "vdivps" in text_of(reciprocal, V3)
    assert "vrcp14ps" not in text_of(reciprocal, ZEN4, by_hand=False)


def test_its_meaning_is_what_the_tile_ir_says() -> None:
    function = reciprocal.tile_ir()
    (op,) = [op for op in function.walk() if op.name == "asm"]
    assert op.operands[0].op is not None and op.operands[0].op.name == "div"
    assert op.attributes["by"] == "x86_64:vrcp14ps"
    text = print_function(function)
    assert print_function(parse_function(text, {"tile": TILE_OPS})) == text


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kernel", [reciprocal, fused, rotated])
@pytest.mark.parametrize("chip", [host_target(), V3], ids=["host", "v3"])
def test_every_station_agrees(kernel: Any, chip: Any) -> None:
    report = check_kernel(kernel, chip)
    assert report.ok, report.finding


@pytest.mark.skipif("avx512f" not in host_target().features, reason="no AVX-512")
def test_a_changed_operand_is_copied_first() -> None:
    x, y = np.arange(40, dtype=np.float32), np.zeros(40, np.float32)
    fused(x, y)
    assert np.array_equal(y, x * x + x)
    bits = np.arange(-20, 20, dtype=np.int32) * 77777777
    turned = np.zeros(40, np.int32)
    rotated(bits, turned)
    unsigned = bits.view(np.uint32)
    assert np.array_equal(turned.view(np.uint32), unsigned << 7 | unsigned >> 25)


def test_a_wrong_meaning_is_found_and_the_piece_not_used() -> None:
    @sp.kernel
    def wrong(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = sp.asm(x86.vrcp14ps, x[n], meaning=lambda t: 1.0 / t)  # no tolerance

    report = check_kernel(wrong, ZEN4)
    assert report.finding is not None and report.finding.station == "lower"
    if "avx512f" in host_target().features:
        x, y = np.arange(1, 41, dtype=np.float32), np.zeros(40, np.float32)
        with pytest.warns(SapperWarning, match="pieces by hand are not used"):
            wrong(x, y)
        assert np.array_equal(y, 1 / x)


@pytest.mark.parametrize("body, part", [
    (lambda t: sp.asm(3, t, meaning=lambda a: a), "names an instruction"),
    (lambda t: sp.asm(x86.vrcp14ps, t, meaning=2), "needs a meaning"),
    (lambda t: sp.asm(x86.vrcp14ps, 2, meaning=lambda a: a), "takes tiles"),
    (lambda t: sp.asm(x86.vrcp14ps, t, meaning=lambda a: 3), "no tile"),
    (lambda t: sp.asm(x86.vaddps, t, meaning=lambda a: a), r"vaddps computes no tile[\s\S]*v512 v512 v512/m512"),
    (lambda t: sp.asm(x86.vmovntps, t, meaning=lambda a: a), "vmovntps computes no tile"),
    (lambda t: sp.asm(x86.add, t, 1, meaning=lambda a: a), "add computes no tile"),
    (lambda t: sp.asm(exp_of_six_terms, t, t, meaning=lambda a, b: a), r"no tile[\s\S]*tiles: 2.*\s+expected: f32"),
])
def test_refusals(body: Any, part: str) -> None:
    @sp.kernel
    def kernel(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = body(x[n])

    with pytest.raises(KernelError, match=part):
        kernel.tile_ir()


def test_a_meaning_that_is_not_elementwise() -> None:
    @sp.kernel
    def kernel(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = sp.asm(x86.vrcp14ps, x[n], meaning=lambda t: t * y[0])

    with pytest.raises(KernelError, match="not elementwise"):
        kernel.tile_ir()


LOG2_E, LN2_HIGH, LN2_LOW = 1 / math.log(2), 0.693359375, -2.12194440e-4


def spread(value: float) -> Any:
    return x86.broadcast[x86.current().constant(np.float32(value))]


@x86.block("exp_of_six_terms", inputs="f32", result="f32", features="avx512f", implements="exp")
def exp_of_six_terms(out: Any, x: Any) -> None:
    """e^x = 2^n e^r, n the nearest integer to x log2(e), |r| <= ln(2)/2; six terms of e^r."""
    a = x86.current()
    n, r = a.zmm(), a.zmm()
    x86.vmulps(n, x, spread(LOG2_E))
    x86.vrndscaleps(n, n, 8)
    x86.vmovaps(r, x)
    x86.vfnmadd231ps(r, n, spread(LN2_HIGH))
    x86.vfnmadd231ps(r, n, spread(LN2_LOW))
    x86.vbroadcastss(out, x86.ptr[a.constant(np.float32(1 / 5040))])
    for k in (720, 120, 24, 6, 2, 1, 1):
        x86.vfmadd213ps(out, r, spread(1 / k))
    x86.vscalefps(out, out, n)


@sp.kernel
def exponential(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = sp.exp(x[n])


def test_a_schedule_chooses_a_block() -> None:
    schedule = Schedule(assembly=("exp_of_six_terms",))
    assert Schedule.from_json(schedule.to_json()) == schedule
    text = text_of(exponential, ZEN4, schedule=schedule)
    assert "exp_of_six_terms" in text and "vscalefps" in text
    assert "exp_of_six_terms" not in text_of(exponential, V3, schedule=schedule)
    assert "exp_of_six_terms" not in text_of(exponential, ZEN4)


@pytest.mark.parametrize("chip", [host_target(), V3], ids=["host", "v3"])
def test_the_block_computes_the_op(chip: Any) -> None:
    report = check_kernel(exponential, chip, schedule=Schedule(assembly=("exp_of_six_terms",)))
    assert report.ok, report.finding


def test_a_schedule_that_names_no_block() -> None:
    with pytest.raises(ScheduleError, match=r"no block 'exp_of_none'; .* mend: import the module"):
        text_of(exponential, ZEN4, schedule=Schedule(assembly=("exp_of_none",)))


def test_a_block_leaves_its_inputs_alone() -> None:
    def write(out: Any, x: Any) -> None:
        x86.vaddps(x, x, x)
        x86.vmovaps(out, x)

    with pytest.raises(AssemblyError, match="overwrites one of its inputs"):
        Block(x86.table, "greedy", write, (F32,), F32).assemble((512, 512), [])


def test_a_block_gives_its_result_and_does_not_return() -> None:
    def check(write: Any) -> AssemblyError:
        with pytest.raises(AssemblyError) as caught:
            Block(x86.table, "odd", write, (F32,), F32, frozenset({"avx"})).check(V3, (256, 256), [])
        assert caught.value.location is not None and caught.value.location.file == __file__
        return caught.value

    def forgets(out: Any, x: Any) -> None:
        x86.vaddps(x86.current().ymm(), x, x)

    def returns(out: Any, x: Any) -> None:
        x86.vaddps(out, x, x)
        x86.ret()

    assert check(forgets).headline == "odd may end without a result"
    assert check(returns).headline == "odd returns"


def test_estimates_flush_what_is_denormal() -> None:
    """As the manual has it: results, too."""
    large = np.array([5e37, 3e38, -3e38, 1e-40, -1e-40, np.nan, 2, np.inf], np.float32)
    found = x86.vrcpps.run([large], [])
    assert np.allclose(found[[0, 6]], [2e-38, 0.5], rtol=2**-11, atol=0) and np.isnan(found[5])
    assert (found[[1, 2, 3, 4, 7]] == [0, 0, np.inf, -np.inf, 0]).all() and np.signbit(found[2])


def test_a_block_alone_passes_the_static_checks() -> None:
    exp_of_six_terms.check(ZEN4, (512, 512), [])
    with pytest.raises(AssemblyError) as caught:
        exp_of_six_terms.check(V3, (512, 512), [])
    assert caught.value.kind == "feature"


@pytest.mark.parametrize("options, part", [
    ({"inputs": "bf16", "result": "f32"}, "found dtype"),
    ({"inputs": "f32", "result": "f32", "name": "vaddps"}, "name"),
])
def test_blocks_that_cannot_be_registered(options: dict[str, Any], part: str) -> None:
    before = dict(PIECES)
    with pytest.raises(ValueError, match=part):
        x86.block(options.pop("name", "a_block"), **options)(lambda out, x: None)
    assert before == PIECES


# --- Casts and reductions in generated kernels ----------------------------------------------------------------------

@sp.kernel
def to_bf16(x: Tensor[f32, N], y: Tensor[bf16, N]):
    for n in tiles(N):
        y[n] = x[n].to(bf16)


@sp.kernel
def bf16_arithmetic(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        t = x[n].to(bf16)
        y[n] = (t * t).to(f32)


@sp.kernel
def shares(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = sp.whole(N)
        row = x[m, n]
        y[m, n] = row / sp.sum(row, over=n)


@sp.kernel
def row_sums(x: Tensor[f32, M, N], y: Tensor[f32, M]):
    for m in tiles(M):
        n = sp.whole(N)
        y[m] = sp.sum(x[m, n], over=n)


PLACES = [
    (to_bf16, "round_to_bf16", {}), (bf16_arithmetic, "round_to_bf16", {}), (shares, "sum_of_lanes", {}),
    (row_sums, "sum_of_each_row", {"registers": {"m": 16}}),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kernel", "name", "more"), PLACES, ids=lambda value: getattr(value, "name", None))
def test_a_cast_or_a_reduction_by_a_block(kernel: Any, name: str, more: dict[str, Any]) -> None:
    schedule = Schedule.from_json({"assembly": [name], **more})
    facts: dict[str, Any] = {"unit_strides": dict.fromkeys("xy", "contiguous"), "dim_classes": {
        "M": (1024, 64), "N": (1024, 64)}, "static_dims": {}}
    made = compile_kernel(kernel, target=ZEN4, schedule=schedule, **facts)
    assert made.pieces == (f"x86_64:{name}",)
    assert compile_kernel(kernel, target=V3, schedule=schedule, **facts).pieces == ()
    chip = host_target() if "avx512f" in host_target().features else ZEN4
    report = check_kernel(kernel, chip, runs=9, schedule=schedule)
    assert report.finding is None, report.finding


def test_a_cast_that_rounds_wrongly_is_found_without_hardware() -> None:
    def truncates(out: Any, row: Any) -> None:
        a = x86.current()
        x86.vpandd(out, row, x86.broadcast[a.constant(np.uint32(0xFFFF0000))])

    def leaves_the_rest(out: Any, row: Any) -> None:
        x86.vmovaps(out, row)

    for number, write in enumerate((truncates, leaves_the_rest)):
        piece = x86.block(f"wrong_cast_{number}", inputs="f32", result="f32", features="avx512f",
                          implements="to_bf16")(write)
        try:
            report = check_kernel(to_bf16, ZEN4, runs=4, schedule=Schedule(assembly=(piece.name,)))
        finally:
            del PIECES[piece.key]
        assert report.finding is not None and report.finding.station == "lower"


# --- Registers that a block asks for ----------------------------------------------------------------------------------

def sum_of_copies(count: int) -> Any:
    """A block that holds so many values beside its input: x, 2 x, ..., whose sum it gives."""
    def write(out: Any, x: Any) -> None:
        a = x86.current()
        held = [a.zmm() for _ in range(count)]
        before = x
        for value in held:
            x86.vaddps(value, before, x)
            before = value
        x86.vmovaps(out, x)
        for value in held:
            x86.vaddps(out, out, value)

    return write


def test_a_budget_of_a_block() -> None:
    def block(count: int, **options: Any) -> Block:
        return Block(x86.table, "copies", sum_of_copies(count), **options)

    block(6, budget={"vec": 8}).check(ZEN4, (512, 512), [])
    with pytest.raises(AssemblyError, match="the registers do not suffice") as caught:
        block(8, budget={"vec": 8}).check(ZEN4, (512, 512), [])
    assert caught.value.kind == "registers" and "at most 15 gpr, 8 vec" in caught.value.expected
    block(40).check(ZEN4, (512, 512), [])
    with pytest.raises(AssemblyError, match="the registers do not suffice"):
        block(40, no_spill=True).check(ZEN4, (512, 512), [])
    with pytest.raises(AssemblyError, match="a budget for registers of kind zmm"):
        block(4, budget={"zmm": 8}).check(ZEN4, (512, 512), [])


def kernel_with(piece: Any, factor: float) -> Any:
    @sp.kernel(name="with_copies")
    def kernel(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = sp.asm(piece, x[n], meaning=lambda t: factor * t, tolerance=1e-5)

    return kernel


def test_a_block_that_may_not_spill_is_refused_where_it_would() -> None:
    pieces = {}
    for name, count, options in [("spilling", 40, {}), ("kept", 20, {"no_spill": True}),
                                 ("crowded", 40, {"no_spill": True})]:
        pieces[name] = x86.block(name, inputs="f32", result="f32", features="avx512f", **options)(sum_of_copies(count))
    try:
        factor = 1.0 + sum(range(2, 42))
        assert "spill" in text_of(kernel_with(pieces["spilling"], factor), ZEN4)
        assert "spill" not in text_of(kernel_with(pieces["kept"], 1.0 + sum(range(2, 22))), ZEN4)
        kernel = kernel_with(pieces["crowded"], factor)
        with pytest.raises(AssemblyError, match="crowded: the registers do not suffice in with_copies") as caught:
            text_of(kernel, ZEN4)
        assert caught.value.location is not None
        assert caught.value.location.file == __file__
        assert check_kernel(kernel, ZEN4, runs=2).finding.station == "by hand, static"
        if not ZEN4.features <= host_target().features:
            return
        x = np.arange(-50, 50, dtype=np.float32)
        y = np.zeros_like(x)
        with pytest.warns(SapperWarning, match="its pieces by hand are not used, generated code is"):
            kernel(x, y)
        assert np.allclose(y, factor * x, rtol=1e-5)
    finally:
        for name in pieces:
            del PIECES[f"x86_64:{name}"]
