"""PTX by hand at its three grades: instructions, blocks, kernels; run by the emulator, refused at their line."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Schedule, Tensor, f32, i32, ptx, tiles
from sapper.assembly.build import current
from sapper.assembly.errors import AssemblyError
from sapper.assembly.override import Override, compile_by_hand
from sapper.assembly.warp import WarpAssembly
from sapper.assembly.warp import compile_kernel as compile_warp
from sapper.assembly.warp_block import WarpBlock
from sapper.assembly.warp_checks import check_warp
from sapper.assembly.warp_mutate import mutants
from sapper.cli.main import main
from sapper.codegen.pipeline import compile_kernel
from sapper.emulate import run
from sapper.emulate.by_hand import verify
from sapper.emulate.machine import Options
from sapper.lang.by_hand import PIECES
from sapper.runtime.check import check_kernel
from sapper.runtime.errors import SapperWarning
from sapper.runtime.launch import compile_for_call
from sapper.targets import target
from sapper.targets.ptx.target import known_targets

N, = sp.dims("N"),
SM80, SM90A = target("sm_80"), target("sm_90a")


def compiled(kernel: Any, name: str, schedule: Any = None) -> Any:
    strides: dict[str, Any] = {parameter: "contiguous" for parameter, _ in kernel.parameters}
    return compile_kernel(kernel, {}, strides, {"N": (1024, 16)}, target(name), schedule)


def checked(kernel: Any, chip: Any, schedule: Any = None, runs: int = 5) -> Any:
    return check_kernel(kernel, chip, runs=runs, schedule=schedule, emulate=run,
                        verify_by_hand=lambda k, made, t, seed, count: verify(k, made, t, run, seed, count))


# --- One instruction ------------------------------------------------------------------------------------------------

@sp.kernel
def reciprocal(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = sp.asm(ptx.rcp_approx_f32, x[n], meaning=lambda t: 1.0 / t, tolerance=2.0**-22)


@sp.kernel
def too_sure(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = sp.asm(ptx.rcp_approx_f32, x[n], meaning=lambda t: 1.0 / t)


@sp.kernel
def turned(x: Tensor[i32, N], y: Tensor[i32, N]):
    for n in tiles(N):
        y[n] = sp.asm(ptx.shf_l_wrap_b32, x[n], x[n], 7, meaning=lambda a, b: a << 7 | (a >> 25 & 127))


@sp.kernel
def saturated(x: Tensor[i32, N], y: Tensor[i32, N]):
    for n in tiles(N):
        y[n] = sp.asm(ptx.max_relu_s32, x[n], x[n], meaning=lambda a, b: sp.maximum(a, 0))


@pytest.mark.parametrize("name", known_targets())
def test_an_instruction_where_the_level_has_it(name: str) -> None:
    made = compiled(reciprocal, name)
    assert made.pieces == ("ptx:rcp.approx.f32",) and "rcp.approx.f32" in made.text()
    assert compiled(saturated, name).pieces == (() if name < "sm_90" and len(name) == 5 else ("ptx:max.relu.s32",))
    assert compiled(reciprocal, "zen4").pieces == ()


def test_an_instruction_is_run_by_the_emulator_and_its_meaning_elsewhere() -> None:
    x, y = np.arange(1, 101, dtype=np.float32), np.zeros(100, np.float32)
    run(reciprocal, x, y, target="sm_80")
    assert np.abs(x * y - 1).max() < 2.0**-22
    reciprocal(x, y)
    assert (y == 1 / x).all()
    w, z = np.random.default_rng(0).integers(-2**31, 2**31, 100).astype(np.int32), np.zeros(100, np.int32)
    run(turned, w, z, target="sm_80")
    u = w.view(np.uint32)
    assert (z.view(np.uint32) == (u << 7 | u >> 25)).all()


def test_check_compares_it_with_its_meaning() -> None:
    assert checked(turned, SM80).finding is None
    report = checked(reciprocal, SM80)
    assert report.finding is None and report.passed["emulator"] == report.passed["simplify"] == 5
    assert checked(too_sure, SM80).finding.station == "lower"


def test_an_instruction_that_no_row_has() -> None:
    with pytest.raises(AttributeError, match=r"near: .*fma\.rm\.f32"):
        ptx.fma_rm_f33  # noqa: B018
    with pytest.raises(AssemblyError, match="no row of the table has a form"):
        ptx.instruction("mma.sync.everything")


# --- A block ----------------------------------------------------------------------------------------------------------

@ptx.block("exp_by_ex2", inputs="f32", result="f32", implements="exp")
def exp_by_ex2(out: Any, x: Any) -> None:
    """2^n 2^f with x = (n + f) ln 2, n whole, by half of n at a time, as 2^n alone may be too large."""
    a = current()
    n, half, f, within = a.b32(), a.b32(), a.b32(), a.b32()
    ptx.max_NaN_f32(within, x, -104.0)
    ptx.min_NaN_f32(within, within, 89.0)
    ptx.mul_rn_f32(n, within, 1.44269502)
    ptx.cvt_rni_f32_f32(n, n)
    ptx.fma_rn_f32(f, n, -0.693359375, within)   # ln 2 in two parts, the first of few bits
    ptx.fma_rn_f32(f, n, 2.12194440e-4, f)
    ptx.mul_rn_f32(f, f, 1.44269502)
    ptx.ex2_approx_f32(f, f)
    ptx.mul_rn_f32(half, n, 0.5)
    ptx.ex2_approx_f32(half, half)
    ptx.mul_rn_f32(f, f, half)
    ptx.mul_rn_f32(out, f, half)


@sp.kernel
def exponential(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = sp.exp(x[n])


def test_a_block_that_a_schedule_names() -> None:
    schedule = Schedule(assembly=("exp_by_ex2",))
    assert compiled(exponential, "sm_80", schedule).pieces == ("ptx:exp_by_ex2",)
    assert compiled(exponential, "sm_80").pieces == ()
    assert compiled(exponential, "zen4", schedule).pieces == ()
    x, y = np.linspace(-3, 3, 77, dtype=np.float32), np.zeros(77, np.float32)
    run(exponential, x, y, target="sm_80", schedule=schedule)
    assert np.allclose(y, np.exp(x), rtol=1e-6)
    PIECES["ptx:exp_by_ex2"].check(SM80, (32, 32), [])  # type: ignore[attr-defined]


def test_a_block_that_leaves_nothing() -> None:
    piece = WarpBlock(ptx.table, "nothing", lambda out, x: ptx.mov_b32(current().b32(), x))
    with pytest.raises(AssemblyError, match="without a value"):
        piece.check(SM80, (32, 32), [])


# --- A kernel -------------------------------------------------------------------------------------------------------

def make_scale() -> Any:
    @sp.kernel
    def scale(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = x[n] * 2.0 + 1.0

    return scale


def write_scale(a: Any, factor: float = 2.0, condition: str = "lt", into: str = "y") -> None:
    """Each warp takes 32 elements at a time."""
    x, y, n = a.data("x"), a.data(into), a.extent("N")
    worker, workers = a.worker()
    lane, start, step, value = a.b64(), a.b64(), a.b64(), a.b32()
    ptx.cvt_u64_u32(lane, a.lane())
    ptx.shl_b64(start, worker, 5)
    ptx.shl_b64(step, workers, 5)
    with a.loop(start, n, step) as at:
        inside, here, source = a.pred(), a.b64(), a.b64()
        ptx.add_s64(here, at, lane)
        ptx.instruction(f"setp.{condition}.s64")(inside, here, n)
        ptx.shl_b64(here, here, 2)
        ptx.add_s64(source, x, here)
        ptx.add_s64(here, y, here)
        ptx.ld_global_f32(value, ptx.ptr[source], when=inside)
        ptx.fma_rn_f32(value, value, factor, 1.0, when=inside)
        ptx.st_global_f32(ptx.ptr[here], value, when=inside)
    ptx.ret()


def with_piece(write: Callable[..., None], **options: Any) -> Any:
    scale = make_scale()
    scale.assembly(family="ptx", features="sm_80", contiguous="x y", **options)(write)
    return scale


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", known_targets())
def test_a_kernel_by_hand_is_right_and_is_taken(name: str) -> None:
    scale = with_piece(write_scale)
    made = compile_by_hand(scale, scale.by_hand[0], target(name))
    assert verify(scale, made, target(name), run) >= 6
    for extent in (0, 1, 31, 33, 257):
        x, y = np.arange(extent, dtype=np.float32), np.full(extent, np.nan, np.float32)
        result = run(scale, x, y, target=name)
        assert (y == x * 2 + 1).all()
        assert ("fma.rn.f32" in result.counters.instructions) == (extent > 0)
        assert "mul.rn.f32" not in result.counters.instructions  # which the generated code has
    scale(x, y)
    assert (y == x * 2 + 1).all()


def test_ptxas_takes_it() -> None:
    from sapper.codegen.outline import assembled

    scale = with_piece(write_scale)
    made = compile_by_hand(scale, scale.by_hand[0], SM80)
    found = assembled(made.compiled.text(), SM80)
    if "missing" in found:
        pytest.skip(found["missing"])
    assert found["spilled_bytes"] == 0


def test_port_explain_and_check_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = inspect.getsource(write_scale)
    path = tmp_path / "user_ptx.py"
    path.write_text(f'''from typing import Any
import sapper as sp
from sapper import Tensor, f32, ptx, tiles

N, = sp.dims("N"),


@sp.kernel
def scale(x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        y[n] = x[n] * 2.0 + 1.0


{source}

scale.assembly(family="ptx", features="sm_80", contiguous="x y")(write_scale)
''')
    assert main(["port", f"{path}:scale", "--json"]) == 0
    rows = {row["target"]: row for row in json.loads(capsys.readouterr().out)}
    for name, row in rows.items():
        by_hand = name in known_targets()
        assert row["how"] == ("hand-written" if by_hand else "generated")
        assert bool(row["pieces"]) == by_hand and (by_hand or "not a ptx" in row["not_by_hand"]["write_scale"])
    assert main(["explain", f"{path}:scale", "--target", "sm_80", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert any("fma.rn.f32" in str(row) for row in facts["rows"])
    assert main(["check", f"{path}:scale", "--target", "sm_80", "--runs", "4"]) == 0
    assert "by hand, interpreted" in capsys.readouterr().out


# --- What is wrong --------------------------------------------------------------------------------------------------

def test_a_wrong_kernel_is_never_used_and_one_warning_says_why() -> None:
    scale = with_piece(lambda a: write_scale(a, 3.0))
    x, y = np.arange(40, dtype=np.float32), np.zeros(40, np.float32)
    with pytest.warns(SapperWarning, match="does not compute what scale does") as caught:
        run(scale, x, y, target="sm_80")
    assert len(caught) == 1 and (y == x * 2 + 1).all()
    report = checked(scale, SM80)
    assert report.finding is not None and report.finding.station == "by hand, interpreted"


def past_the_end(a: Any) -> None:
    write_scale(a, condition="le")


def without_a_predicate(a: Any) -> None:
    y, n, on = a.data("y"), a.extent("N"), a.pred()
    value, place = a.b32(), a.b64()
    ptx.mov_b32(value, 0)
    ptx.mad_wide_s32(place, a.lane(), 4, y)
    ptx.setp_eq_s64(on, n, 0)
    ptx.st_global_b32(ptx.ptr[place], value)  # here
    ptx.ret()


def both_write(a: Any) -> None:
    """Every warp writes all of y."""
    x, y, n = a.data("x"), a.data("y"), a.extent("N")
    value, at, to = a.b32(), a.b64(), a.b64()
    lane = a.b64()
    ptx.cvt_u64_u32(lane, a.lane())
    inside = a.pred()
    with a.loop(0, n, 32) as first:
        ptx.add_s64(at, first, lane)
        ptx.setp_lt_s64(inside, at, n)
        ptx.shl_b64(at, at, 2)
        ptx.add_s64(to, y, at)
        ptx.add_s64(at, x, at)
        ptx.ld_global_f32(value, ptx.ptr[at], when=inside)
        ptx.fma_rn_f32(value, value, 2.0, 1.0, when=inside)
        ptx.st_global_f32(ptx.ptr[to], value, when=inside)  # here
    ptx.ret()


@pytest.mark.parametrize(("write", "kind"), [
    (past_the_end, "footprint"), (without_a_predicate, "footprint"), (both_write, "result"),
])
def test_what_the_emulator_finds(write: Any, kind: str) -> None:
    scale = with_piece(write)
    made = compile_by_hand(scale, scale.by_hand[0], SM80)
    with pytest.raises(AssemblyError) as caught:
        verify(scale, made, SM80, run)
    error = caught.value
    assert error.kind == kind and error.location is not None and error.location.file == __file__
    lines, first = inspect.getsourcelines(write)
    marked = [first + i for i, line in enumerate(lines) if line.rstrip().endswith("# here")]
    assert not marked or error.location.line == marked[0]


def unwritten(a: WarpAssembly) -> None:
    v = a.b32()
    ptx.add_rn_f32(v, v, v)  # here
    ptx.ret()


def under_a_predicate(a: WarpAssembly) -> None:
    v, on = a.b32(), a.pred()
    ptx.setp_lt_s32(on, a.lane(), 3)
    ptx.mov_b32(v, 0, when=on)
    ptx.add_s32(v, v, 1)  # here
    ptx.ret()


def under_a_predicate_that_changed(a: WarpAssembly) -> None:
    v, on = a.b32(), a.pred()
    ptx.setp_lt_s32(on, a.lane(), 3)
    ptx.mov_b32(v, 0, when=on)
    ptx.setp_lt_s32(on, a.lane(), 5)
    ptx.add_s32(v, v, 1, when=on)  # here
    ptx.ret()


def compared_with_nothing(a: WarpAssembly) -> None:
    on = a.pred()
    ptx.setp_lt_s32(on, a.b32(), 3)  # here
    ptx.ret()


def on_one_path(a: WarpAssembly) -> None:
    v, on, end = a.b32(), a.pred(), a.label()
    ptx.setp_eq_s64(on, a.extent("N"), 0)
    ptx.bra(end, when=on)
    ptx.mov_b32(v, 1)
    a.place(end)
    ptx.add_s32(v, v, 1)  # here
    ptx.ret()


def store_to_an_input(a: WarpAssembly) -> None:
    x, v, at = a.data("x"), a.b32(), a.b64()
    ptx.mov_b32(v, 0)
    ptx.mad_wide_s32(at, a.lane(), 4, x)
    ptx.st_global_b32(ptx.ptr[at], v)  # here
    ptx.ret()


def add_to_an_input(a: WarpAssembly) -> None:
    v = a.b32()
    ptx.mov_b32(v, 0)
    ptx.red_global_add_f32(ptx.ptr[a.data("x")], v)  # here
    ptx.ret()


def number_as_an_address(a: WarpAssembly) -> None:
    ptx.ld_global_b32(a.b32(), ptx.ptr[a.extent("N")])  # here
    ptx.ret()


def too_new(a: WarpAssembly) -> None:
    v = a.b32()
    ptx.mov_b32(v, 0)
    ptx.max_relu_s32(v, v, v)  # here
    ptx.ret()


def never_reached(a: WarpAssembly) -> None:
    ptx.ret()
    ptx.mov_b32(a.b32(), 1)  # here
    ptx.ret()


def no_return(a: WarpAssembly) -> None:
    ptx.mov_b32(a.b32(), 1)  # here


def endless(a: WarpAssembly) -> None:
    v = a.b32()
    ptx.mov_b32(v, 1)
    head = a.here()
    ptx.add_s32(v, v, 1)
    ptx.bra(head)  # here


def predicate_that_stands_still(a: WarpAssembly) -> None:
    on = a.pred()
    ptx.setp_lt_s32(on, a.lane(), 3)
    head = a.here()
    ptx.mov_b32(a.b32(), 1)
    ptx.bra(head, when=on)  # here
    ptx.ret()


def wrong_size(a: WarpAssembly) -> None:
    ptx.add_rn_f32(a.b64(), a.b32(), a.b32())  # here


def index_in_an_address(a: WarpAssembly) -> None:
    ptx.ld_global_f32(a.b32(), ptx.ptr[a.data("x") + a.b64()])  # here


def float_for_an_integer(a: WarpAssembly) -> None:
    ptx.add_s32(a.b32(), a.lane(), 1.5)  # here


def no_predicate(a: WarpAssembly) -> None:
    ptx.mov_b32(a.b32(), 1, when=a.b32())  # here


def vector_of_three(a: WarpAssembly) -> None:
    ptx.ld_global_v4_f32((a.b32(), a.b32(), a.b32()), ptx.ptr[a.data("x")])  # here


def label_without_a_place(a: WarpAssembly) -> None:
    end = a.label("end")  # here
    ptx.bra(end)


def no_such_tensor(a: WarpAssembly) -> None:
    a.data("z")  # here


@pytest.mark.parametrize(("write", "kind"), [
    (unwritten, "undefined"), (under_a_predicate, "undefined"), (under_a_predicate_that_changed, "undefined"),
    (on_one_path, "undefined"), (compared_with_nothing, "undefined"),
    (store_to_an_input, "read-only"), (add_to_an_input, "read-only"),
    (number_as_an_address, "footprint"), (too_new, "feature"), (never_reached, "unreachable"),
    (no_return, "running-off"), (endless, "loop"), (predicate_that_stands_still, "loop"), (wrong_size, "operands"),
    (index_in_an_address, "operands"), (float_for_an_integer, "operands"), (no_predicate, "operands"),
    (vector_of_three, "operands"), (label_without_a_place, "notation"), (no_such_tensor, "notation"),
])
def test_static_checks(write: Any, kind: str) -> None:
    scale = with_piece(write)
    with pytest.raises(AssemblyError) as caught:
        compile_by_hand(scale, scale.by_hand[0], SM80)
    error = caught.value
    lines, first = inspect.getsourcelines(write)
    here = first + next(i for i, line in enumerate(lines) if line.rstrip().endswith("# here"))
    assert error.kind == kind and error.mend, error
    assert error.location is not None and (error.location.file, error.location.line) == (__file__, here), error


def test_the_notation_of_another_family() -> None:
    from sapper.assembly import x86
    from sapper.assembly.build import function

    with pytest.raises(AssemblyError, match="another family"):
        function(x86.table, "piece", lambda a: ptx.ret())


@sp.kernel
def difference(x: Tensor[i32, N], z: Tensor[i32, N], y: Tensor[i32, N]):
    for n in tiles(N):
        y[n] = x[n] - z[n] * 3


def write_difference(a: Any) -> None:
    """Whole warps, so that no thread has nothing to do."""
    x, z, y, n = a.data("x"), a.data("z"), a.data("y"), a.extent("N")
    worker, workers = a.worker()
    lane, start, step, one, two = a.b64(), a.b64(), a.b64(), a.b32(), a.b32()
    ptx.cvt_u64_u32(lane, a.lane())
    ptx.shl_b64(start, worker, 5)
    ptx.shl_b64(step, workers, 5)
    with a.loop(start, n, step) as at:
        here, from_x, from_z = a.b64(), a.b64(), a.b64()
        ptx.add_s64(here, at, lane)
        ptx.shl_b64(here, here, 2)
        ptx.add_s64(from_x, x, here)
        ptx.add_s64(from_z, z, here)
        ptx.add_s64(here, y, here)
        ptx.ld_global_s32(one, ptx.ptr[from_x])
        ptx.ld_global_s32(two, ptx.ptr[from_z])
        ptx.mul_lo_s32(two, two, 3)
        ptx.sub_s32(one, one, two)
        ptx.st_global_s32(ptx.ptr[here], one)
    ptx.ret()


def survivors(kernel: Any, made: Any, planted: list[Any]) -> list[str]:
    alive = []
    for mutant in planted:
        try:
            check_warp(mutant.assembly, SM80)
            code = compile_warp(kernel, mutant.assembly, SM80)
            verify(kernel, Override(made.piece, mutant.assembly, mutant.assembly.machine(), None, code), SM80, brief)
        except AssemblyError:
            continue
        alive.append(str(mutant))
    return alive


def test_planted_errors_are_found() -> None:
    """All slips that can be made in one place of a kernel: by the static checks, or by the emulator."""
    difference.by_hand.clear()
    difference.assembly(family="ptx", features="sm_80", contiguous="x z y", divisible={"N": 64})(write_difference)
    made = compile_by_hand(difference, difference.by_hand[0], SM80)
    planted = list(mutants(made.assembly))
    assert len(planted) > 60 and {m.kind for m in planted} >= {
        "left out", "off by one", "wrong number", "wrong element", "swapped operands", "clobber"}
    assert survivors(difference, made, planted) == []


def test_predicates_left_off_are_found() -> None:
    scale = with_piece(write_scale)
    made = compile_by_hand(scale, scale.by_hand[0], SM80)
    planted = [m for m in mutants(made.assembly) if m.kind == "predicate left off"]
    # That of the arithmetic between the load and the store changes nothing that is stored.
    planted = [m for m in planted if m.item.row.row.opcode != "fma"]
    assert len(planted) == 2 and survivors(scale, made, planted) == []


def brief(*arguments: Any, **options: Any) -> Any:
    """emulate.run for what may never end."""
    return run(*arguments, **options, options=Options(step_limit=20_000))


def test_a_call_takes_what_passed_its_trial_on_the_emulator() -> None:
    """As a launch on a GPU asks for its code."""
    facts: dict[str, Any] = {"static_dims": {}, "unit_strides": dict.fromkeys("xy", "contiguous"),
                             "dim_classes": {"N": (1024, 1)}, "target": SM80, "schedule": None}
    def three_times(a: Any) -> None:
        write_scale(a, factor=3.0)

    right, wrong = with_piece(write_scale), with_piece(three_times)
    assert f"{__file__}:{write_scale.__code__.co_firstlineno + 2}" in compile_for_call(right, **facts).text()
    with pytest.warns(SapperWarning, match="generated code is: .* does not compute what scale does"):
        generated = compile_for_call(wrong, **facts)
    assert generated.text() == compile_kernel(wrong, **facts).text()


def test_a_wrong_block_is_not_used_and_one_warning_says_why() -> None:
    ptx.block("twice_exp", inputs="f32", result="f32", implements="exp")(
        lambda out, x: ptx.add_rn_f32(out, x, x))
    try:
        x, y = np.linspace(-3, 3, 40, dtype=np.float32), np.zeros(40, np.float32)
        with pytest.warns(SapperWarning, match="its pieces by hand are not used") as caught:
            run(exponential, x, y, target="sm_80", schedule=Schedule(assembly=("twice_exp",)))
        assert len(caught) == 1 and np.allclose(y, np.exp(x), rtol=1e-6)
    finally:
        del PIECES["ptx:twice_exp"]


# --- Registers --------------------------------------------------------------------------------------------------------

def write_many(a: Any, count: int = 40) -> None:
    """So many values alive at once in each thread, in an order that no assembler may change: each is read, then all are
    stored."""
    x, y = a.data("x"), a.data("y")
    held = [a.b32() for _ in range(count)]
    for i, value in enumerate(held):
        ptx.ld_volatile_global_b32(value, ptx.ptr[x + 4 * i])
    for i, value in enumerate(held):
        ptx.st_volatile_global_b32(ptx.ptr[y + 4 * i], value)  # here
    ptx.ret()


def ptxas_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from sapper.targets.ptx import assembler

    monkeypatch.setattr(assembler, "find_tool", lambda name: None)


@pytest.mark.parametrize("with_assembler", [True, False])
def test_a_budget_that_does_not_hold(monkeypatch: pytest.MonkeyPatch, with_assembler: bool) -> None:
    from sapper.targets.ptx.assembler import find_tool

    if not with_assembler:
        ptxas_is_missing(monkeypatch)
    elif find_tool("ptxas") is None:
        pytest.skip("ptxas is not at hand")

    def made(count: int, **options: Any) -> Any:
        scale = with_piece(lambda a: write_many(a, count), **options)
        return compile_by_hand(scale, scale.by_hand[0], SM80)

    assert ".maxnreg 64\n" in made(40, no_spill=True, budget={"registers": 64}).compiled.text()
    with pytest.raises(AssemblyError, match="the registers do not suffice") as caught:
        made(40, no_spill=True, budget={"registers": 32})
    assert caught.value.kind == "registers" and caught.value.location is not None
    assert ("bytes spilled, by ptxas" if with_assembler else "43 registers of 32 bits") in caught.value.found
    assert ".maxnreg 32\n" in made(40, budget={"registers": 32}).compiled.text()  # what is over is spilled
    with pytest.raises(AssemblyError, match="the registers do not suffice"):
        made(270, no_spill=True)
    assert ".minnctapersm 1\n" in made(270).compiled.text()
    with pytest.raises(AssemblyError, match="registers of kind vec"):
        made(2, budget={"vec": 3})


def test_a_block_over_its_budget_is_refused() -> None:
    def write(out: Any, x: Any) -> None:
        a = current()
        held = [a.b32() for _ in range(5)]
        for i, value in enumerate(held):
            ptx.mul_rn_f32(value, x, float(i))
        ptx.mov_b32(out, x)
        for value in held:
            ptx.add_rn_f32(out, out, value)

    def block(most: int) -> WarpBlock:
        return WarpBlock(ptx.table, "five", write, budget={"registers": most})

    block(6).check(SM80, (32, 32), [])
    with pytest.raises(AssemblyError, match="five: the registers do not suffice") as caught:
        block(5).check(SM80, (32, 32), [])
    assert caught.value.found == "6 registers of 32 bits are wanted at once"
