"""Products of a warp's fragments by hand: equal to the contraction, chosen by a schedule, refused with a reason."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sapper import Schedule, bf16, f32, i8, ptx
from sapper.assembly.errors import AssemblyError
from sapper.assembly.ptx import Fragments, WarpProduct
from sapper.assembly.warp_mutate import mutants
from sapper.cli.main import main
from sapper.codegen.pipeline import compile_kernel
from sapper.emulate import run
from sapper.ir.text import parse_function, print_function
from sapper.kernels.by_hand.fragments import serpentine_2x2, serpentine_2x2_f16
from sapper.lane.ops import LANE_OPS
from sapper.lang.by_hand import PRODUCTS
from sapper.runtime.check import check_kernel
from sapper.runtime.micro_kernel import product_of
from sapper.runtime.product import CASES, check_product
from sapper.targets import target
from sapper.targets.ptx.target import known_targets

SM80 = target("sm_80")
MMA = ptx.instruction("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")


def compiled(kernel: Any, name: str, *blocks: str) -> Any:
    return compile_kernel(kernel, {}, dict.fromkeys("abc", "contiguous"), dict.fromkeys("MNK", (1024, 64)),
                          target(name), Schedule(assembly=blocks) if blocks else None)


def piece(write: Any, rows: int = 1, columns: int = 1, **options: Any) -> WarpProduct:
    return WarpProduct(ptx.table, "mine", write, rows, columns, bf16, frozenset({"sm_80"}), **options)


@pytest.mark.parametrize("product", [serpentine_2x2, serpentine_2x2_f16], ids=["bf16", "f16"])
def test_it_is_the_contraction(product: WarpProduct) -> None:
    report = check_product(product, SM80)
    assert report.finding is None and report.passed == {"products": CASES}


def test_every_planted_error_is_found() -> None:
    planted = list(mutants(serpentine_2x2.assemble()))
    assert {m.kind for m in planted} == {"left out", "wrong register"} and len(planted) == 20
    alive = [str(m) for m in planted if check_product(serpentine_2x2.planted(m.assembly), SM80).finding is None]  # type: ignore[arg-type]
    assert alive == []


@pytest.mark.parametrize("name", known_targets())
def test_a_schedule_names_it(name: str) -> None:
    kernel = product_of(bf16)
    made, generated = compiled(kernel, name, "serpentine_2x2"), compiled(kernel, name)
    if "wgmma" in generated.text():
        assert made.pieces == () and "no contraction on matrix instructions of single warps" in made.refused[0][1]
        return
    assert made.pieces == ("ptx:serpentine_2x2",) and made.refused == ()
    assert made.text().count(" mma.sync") == generated.text().count(" mma.sync") > 0


def test_the_emulator_runs_it() -> None:
    random = np.random.default_rng(0)
    a, b = (random.integers(-4, 5, shape).astype(ml_dtypes.bfloat16) for shape in ((70, 72), (72, 96)))
    c = np.zeros((70, 96), np.float32)
    result = run(product_of(bf16), a, b, c, target="sm_80", schedule=Schedule(assembly=("serpentine_2x2",)))
    assert (c == a.astype(np.float32) @ b.astype(np.float32)).all()
    assert result.counters.instructions[MMA.name] > 0


def test_lane_ir_with_it_prints_and_parses() -> None:
    from sapper.codegen.pipeline import facts_of, to_lane
    from sapper.tile.schedule import DimClass, Specialization

    lane = to_lane(product_of(bf16).tile_ir(), Schedule(assembly=("serpentine_2x2",)), facts_of(SM80),
                   Specialization(dict.fromkeys("MNK", DimClass(1024, 64)), dict.fromkeys("abc", "contiguous")))
    assert print_function(parse_function(print_function(lane), {"lane": LANE_OPS})) == print_function(lane)
    assert any(op.name == "asm_multiply" for op in lane.walk())


@pytest.mark.parametrize(("kernel", "block", "reason"), [
    (product_of(bf16), "serpentine_2x2_f16", "the operands are of bf16; it takes f16"),
    (product_of(i8), "serpentine_2x2", "no contraction on matrix instructions of single warps"),
], ids=["bf16", "i8"])
def test_what_it_does_not_take(kernel: Any, block: str, reason: str) -> None:
    made = compiled(kernel, "sm_80", block)
    assert made.pieces == () and reason in dict(made.refused)[f"ptx:{block}"]


def test_it_serves_f32_that_is_split_into_parts_of_bf16() -> None:
    """A warp has one block of rows there."""
    def one_row(t: Fragments) -> None:
        for j in range(2):
            MMA(t.sums[0][j], t.left[0], t.right[j], t.sums[0][j])

    ptx.product("one_row", rows=1, columns=2, dtype="bf16", features="sm_80")(one_row)
    try:
        assert compiled(product_of(f32), "sm_80", "one_row").pieces == ("ptx:one_row",)
    finally:
        del PRODUCTS["ptx:one_row"]


def test_explain_and_port_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    named = ["matmul_nn_bf16_bf16", "--target", "sm_80", "--schedule", '{"assembly": ["serpentine_2x2"]}']
    for command in ("explain", "port"):
        assert main([command, *named]) == 0
        assert "by hand: serpentine_2x2 (sm_80)" in capsys.readouterr().out


def test_rows_that_do_not_divide_a_warps() -> None:
    ptx.product("three_rows", rows=3, columns=2, dtype="bf16", features="sm_80")(lambda t: None)
    try:
        made = compiled(product_of(bf16), "sm_80", "three_rows")
        assert "it takes 3 at a time" in dict(made.refused)["ptx:three_rows"]
    finally:
        del PRODUCTS["ptx:three_rows"]
    with pytest.raises(ValueError, match="expected bf16 or f16"):
        ptx.product("wrong", rows=1, columns=1, dtype="f32")
    with pytest.raises(ValueError, match="1 or 2"):
        ptx.product("wrong", rows=1, columns=3, dtype="bf16")


def test_a_wrong_one_is_found_by_check() -> None:
    def transposed(t: Fragments) -> None:
        for i in range(2):
            for j in range(2):
                MMA(t.sums[i][j], t.left[j], t.right[i], t.sums[i][j])

    ptx.product("transposed", rows=2, columns=2, dtype="bf16", features="sm_80")(transposed)
    try:
        def arguments(random: Any, shape: dict[str, int]) -> dict[str, Any]:
            a, b = (random.standard_normal((shape[x], shape[y])).astype(ml_dtypes.bfloat16) for x, y in ("MK", "KN"))
            return {"a": a, "b": b, "c": np.zeros((shape["M"], shape["N"]), np.float32)}

        kernel, shape = product_of(bf16), {"M": 64, "N": 64, "K": 32}
        for block, wrong in (("transposed", True), ("serpentine_2x2", False)):
            found = check_kernel(kernel, SM80, runs=1, schedule=Schedule(assembly=(block,)), make_arguments=arguments,
                                 shapes=(shape,)).finding
            assert (found is not None) == wrong
        alone = check_product(PRODUCTS["ptx:transposed"], SM80).finding
        assert alone is not None and "sums[0][1][" in alone.message
    finally:
        del PRODUCTS["ptx:transposed"]


def test_static_checks_and_registers() -> None:
    def overwrites(t: Fragments) -> None:
        ptx.mov_b32(t.left[0][0], t.left[0][1])

    with pytest.raises(AssemblyError, match="overwrites one of its operands"):
        piece(overwrites).assemble()

    def unset(t: Fragments) -> None:
        spare = tuple(t.b32() for _ in range(4))
        MMA(t.sums[0][0], spare, t.right[0], t.sums[0][0])

    with pytest.raises(AssemblyError, match="reads a register that may hold nothing"):
        piece(unset).check(SM80)

    def plain(t: Fragments) -> None:
        MMA(t.sums[0][0], t.left[0], t.right[0], t.sums[0][0])

    piece(plain, budget={"registers": 10}).check(SM80)
    with pytest.raises(AssemblyError, match="the registers do not suffice") as caught:
        piece(plain, budget={"registers": 9}).check(SM80)
    assert caught.value.found == "10 registers of 32 bits are wanted at once"
