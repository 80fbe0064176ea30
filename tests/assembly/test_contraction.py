"""Micro-kernels by hand in generated loops: chosen by a schedule, refused with a reason, checked by themselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sapper as sp
from sapper import Schedule, Tensor, bf16, f32, i8, tiles, x86, zeros
from sapper.assembly.contraction import Contraction, Tile
from sapper.assembly.errors import AssemblyError
from sapper.assembly.mutate import mutants
from sapper.cli.explain import gather
from sapper.cli.port import run_port
from sapper.codegen.pipeline import compile_kernel, facts_of
from sapper.ir.text import parse_function, print_function
from sapper.kernels.by_hand.contraction import (
    bf16_2x14x16,
    bf16_14x32,
    f32_2x14x16,
    f32_6x16,
    f32_14x32,
    f32_14x32_blocks,
    f32_14x32_columns,
    i8_14x32_blocks,
    u8i8_14x32,
)
from sapper.kernels.matmul import make_matmul_nn, make_matmul_nt
from sapper.lane.ops import LANE_OPS
from sapper.lang.by_hand import CONTRACTIONS
from sapper.runtime import by_hand
from sapper.runtime.by_hand import key_of
from sapper.runtime.check import check_kernel
from sapper.runtime.errors import SapperWarning
from sapper.runtime.micro_kernel import check_micro_kernel, product, product_of, whole_of
from sapper.targets import host_target
from sapper.targets.x86_64.target import target
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import ScheduleError
from tests.codegen.test_encode import assemble, needs_as
from tests.lane.run_lane import run_lane, specialize
from tests.strategies.amount import FUZZ

V3, ZEN4 = target("v3"), target("zen4")
M, N, K = sp.dims("M N K")
PIECES = [(f32_14x32, ZEN4), (f32_6x16, V3), (f32_14x32_blocks, ZEN4), (bf16_14x32, ZEN4), (f32_2x14x16, ZEN4),
          (bf16_2x14x16, ZEN4), (f32_14x32_columns, ZEN4), (u8i8_14x32, ZEN4), (i8_14x32_blocks, ZEN4)]
IDS = ["avx512", "avx2", "blocks", "bf16", "two f32", "two bf16", "columns", "u8 by i8", "i8"]


def runs_on(piece: Contraction) -> bool:
    return bool(piece.features <= host_target().features)


def compiled(kernel: Any, chip: Any, schedule: Schedule | None, extent: int = 1024, **options: Any) -> Any:
    names = [name for name, _ in kernel.parameters]
    return compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"), dict.fromkeys("MNK", (extent, 64)), chip,
                          schedule, **options)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("piece", "chip"), PIECES, ids=IDS)
def test_it_is_the_loop_where_the_schedule_names_it(piece: Contraction, chip: Any) -> None:
    whole, schedule = whole_of(piece), Schedule(assembly=(piece.name,))
    made = compiled(whole, chip, schedule)
    assert made.pieces == (piece.key,) and made.refused == ()
    assert f".L.{piece.name}" in made.text()
    assert compiled(whole, chip, None).pieces == ()
    assert compiled(whole, chip, schedule, by_hand=False).pieces == ()


def test_the_order_of_its_instructions_stays() -> None:
    tile = f32_14x32.assemble((14, 2))
    written = [item.row.name for item in tile.body if hasattr(item, "row")]
    machine = compiled(product, ZEN4, Schedule(assembly=("f32_14x32",))).made.machine
    found = [item.row.name for item in machine.body if getattr(item, "comment", "") == "f32_14x32"]
    assert found == written
    assert machine.body and not any("spill" in getattr(item, "comment", "") for item in inside(machine.body))


def inside(body: list[Any]) -> list[Any]:
    """From the first to the last instruction of the piece."""
    places = [place for place, item in enumerate(body) if getattr(item, "comment", "") == "f32_14x32"]
    return body[places[0]:places[-1] + 1]


@needs_as
@pytest.mark.parametrize(("piece", "chip"), PIECES, ids=IDS)
def test_as_makes_the_same_bytes_of_its_text(piece: Contraction, chip: Any, tmp_path: Path) -> None:
    made = compiled(whole_of(piece), chip, Schedule(assembly=(piece.name,)))
    assert assemble(made.text(), tmp_path) == made.code


def test_its_instructions_are_part_of_the_cache_key() -> None:
    written = small(plain)
    with registered(written):
        before = key_of(product, ("small",))
    with registered(small(wrong_lane)):
        assert key_of(product, ("small",)) != before
    assert key_of(product, ("f32_6x16",)) == [f32_6x16.digest()]


def test_port_and_explain_name_it() -> None:
    schedule = '{"assembly": ["f32_14x32"]}'
    rows = {row["target"]: row for row in run_port("matmul_nn_f32", None, None, schedule, ["v3", "zen4"])}
    assert [piece["name"] for piece in rows["zen4"]["pieces"]] == ["f32_14x32"]
    assert rows["zen4"]["pieces"][0]["kind"] == "loop"
    assert rows["v3"]["how"] == "generated" and "no avx512f" in rows["v3"]["not_by_hand"]["f32_14x32"]
    facts = gather("matmul_nn_f32", "zen4", None, None, schedule, run=False)
    loop = next(loop for loop in facts["loops"] if loop["label"].startswith(".f32_14x32"))
    assert loop["operations"] == 14 * 32 * 4 * 2 and loop["bound"].startswith("ports")


@pytest.mark.parametrize(("kernel", "chip", "schedule", "reason"), [
    (make_matmul_nn(f32), V3, Schedule(), "has no avx512f"),
    (make_matmul_nt(f32), ZEN4, Schedule(lane="k"), "two axes in its result"),
    (product_of(f32, 2), ZEN4, Schedule(), "not one contraction by itself"),
    (make_matmul_nn(bf16), ZEN4, Schedule(), "b is of bf16; it takes f32"),
    (make_matmul_nn(f32), ZEN4, Schedule(registers={"m": 12}), "holds 12 of axis m"),
], ids=["features", "lane", "two", "dtype", "registers"])
def test_where_it_does_not_fit_generated_code_runs_and_the_reason_is_told(
    kernel: Any, chip: Any, schedule: Schedule, reason: str
) -> None:
    named = Schedule.from_json(schedule.to_json() | {"assembly": ["f32_14x32"]})
    made = compiled(kernel, chip, named)
    assert made.pieces == ()
    assert reason in dict(made.refused)["x86_64:f32_14x32"]
    assert made.code == compiled(kernel, chip, schedule).code


@pytest.mark.parametrize(("name", "kernel", "schedule", "reason"), [
    ("f32_14x32_blocks", product, Schedule(stage=("b",)), "it takes copies of a, b"),
    ("f32_14x32", product, Schedule(stage=("a", "b")), "it takes copies of b, and a where it lies"),
    ("f32_2x14x16", product, Schedule(), "not 2 contractions by itself"),
    ("bf16_14x32", product, Schedule(), "is of f32; it takes bf16"),
])
def test_what_a_piece_reads_must_lie_as_it_says(name: str, kernel: Any, schedule: Schedule, reason: str) -> None:
    named = Schedule.from_json(schedule.to_json() | {"assembly": [name]})
    made = compiled(kernel, ZEN4, named)
    assert made.pieces == () and reason in dict(made.refused)[f"x86_64:{name}"]


def test_contractions_with_left_operands_of_their_own() -> None:
    @sp.kernel
    def two(a: Tensor[f32, M, K], a1: Tensor[f32, M, K], b: Tensor[f32, K, N], b1: Tensor[f32, K, N],
            c: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            total, other = zeros(m, n, dtype=f32), zeros(m, n, dtype=f32)
            for k in tiles(K):
                total += a[m, k] @ b[k, n]
                other += a1[m, k] @ b1[k, n]
            c[m, n] = total * other

    made = compiled(two, ZEN4, Schedule(assembly=("f32_2x14x16",)))
    assert "no left operand in common" in dict(made.refused)["x86_64:f32_2x14x16"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_both_products_of_swiglu(dtype: Any) -> None:
    @sp.kernel
    def swiglu(x: Tensor[dtype, M, K], gate: Tensor[dtype, K, N], up: Tensor[dtype, K, N], y: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            one, other = zeros(m, n, dtype=f32), zeros(m, n, dtype=f32)
            for k in tiles(K):
                row = x[m, k]
                one += row @ gate[k, n]
                other += row @ up[k, n]
            y[m, n] = one * sp.sigmoid(one) * other

    schedule = Schedule(assembly=(f"{dtype.name}_2x14x16",))
    assert compiled(swiglu, ZEN4, schedule).pieces == (f"x86_64:{dtype.name}_2x14x16",)
    report = check_kernel(swiglu, ZEN4, runs=5 if FUZZ else 2, schedule=schedule)
    assert report.finding is None, report.finding


@pytest.mark.skipif(not bf16_14x32.features <= host_target().features, reason="no AVX512_BF16")
def test_weights_that_were_packed_before() -> None:
    """Panels as `sapper.pack` lays them are those of a micro-kernel: nothing is copied."""
    kernel = product_of(bf16, 1)
    random = np.random.default_rng(0)
    a = random.integers(-4, 5, (30, 70)).astype(ml_dtypes.bfloat16)
    b = random.integers(-4, 5, (70, 64)).astype(ml_dtypes.bfloat16)
    c = np.zeros((30, 64), np.float32)
    packed = sp.pack(kernel, "b", b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel(a, packed, c, schedule=Schedule(assembly=("bf16_14x32",)))
    assert (c == a.astype(np.float32) @ b.astype(np.float32)).all()
    strides = {"a": "contiguous", "c": "contiguous", "b": packed.panels}
    made = compile_kernel(kernel, {}, strides, dict.fromkeys("MNK", (1024, 2)), host_target(),
                          Schedule(assembly=("bf16_14x32",)))
    assert made.pieces == ("x86_64:bf16_14x32",)


@pytest.mark.parametrize(("m", "n"), [(28, 31), (31, 32)])
def test_at_the_edges_no_step_of_the_depth_crosses_two_blocks(m: int, n: int) -> None:
    """Of a depth of 18, which generated code takes by threes where rows lie in place."""
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((m, 18), (18, n)))
    c = np.zeros((m, n), np.float32)
    arguments = {"a": a, "b": b, "c": c}
    function = reduce_loops(product.tile_ir({"K": 18}))
    run_lane(function, arguments, facts=facts_of(ZEN4), schedule=Schedule(assembly=("f32_14x32_blocks",)),
             specialization=specialize(function, arguments))
    most = 18 * 2.0**-23 * np.abs(a).max() * np.abs(b).max()  # a rounding for each of as many terms
    np.testing.assert_allclose(c, a.astype(np.float64) @ b, rtol=0, atol=most)


@pytest.mark.skipif(not runs_on(i8_14x32_blocks), reason="no AVX-512 VNNI")
def test_signed_weights_that_were_packed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of their columns, with which the products of inverted bytes begin, lie behind the panels."""
    monkeypatch.setattr(by_hand, "trusted", lambda *call: True)  # the trial has a test of its own
    kernel = product_of(i8)
    random = np.random.default_rng(0)
    a, b = (random.integers(-128, 128, shape).astype(np.int8) for shape in ((30, 75), (75, 64)))
    c = np.zeros((30, 64), np.int32)
    packed = sp.pack(kernel, "b", b)
    strides = {"a": "contiguous", "c": "contiguous", "b": packed.panels}
    made = compile_kernel(kernel, {}, strides, dict.fromkeys("MNK", (1024, 1)), host_target(),
                          Schedule(assembly=("i8_14x32_blocks",)))
    assert made.pieces == ("x86_64:i8_14x32_blocks",)
    kernel(a, packed, c, schedule=Schedule(assembly=("i8_14x32_blocks",)))
    assert (c == a.astype(np.int32) @ b.astype(np.int32)).all()


@pytest.mark.skipif(not runs_on(i8_14x32_blocks), reason="no AVX-512 VNNI")
def test_signed_rows_that_are_too_few_to_be_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a matrix is read in blocks for them, it is the matrix that is turned: the piece turns rows."""
    monkeypatch.setattr(by_hand, "trusted", lambda *call: True)
    kernel = product_of(i8)
    random = np.random.default_rng(0)
    a, b = (random.integers(-128, 128, shape).astype(np.int8) for shape in ((16, 256), (256, 512)))
    c = np.zeros((16, 512), np.int32)
    schedule = Schedule(assembly=("i8_14x32_blocks",))
    classes = {"M": (16, 16), "N": (512, 64), "K": (256, 64)}
    made = compile_kernel(kernel, {}, dict.fromkeys("abc", "contiguous"), classes, ZEN4, schedule)
    assert made.pieces == () and "it is the other operand" in dict(made.refused)["x86_64:i8_14x32_blocks"]
    kernel(a, b, c, schedule=schedule)
    assert (c == a.astype(np.int32) @ b.astype(np.int32)).all()


@pytest.mark.parametrize(("piece", "kernel", "reason"), [
    (f32_14x32_columns, product_of(f32), "a is not contiguous along m"),
    (f32_14x32, product_of(f32, columns=True), "a is not contiguous along k"),
    (u8i8_14x32, product_of(i8), "a is of i8; it takes u8"),
    (i8_14x32_blocks, product_of(f32), "its sums are i32, the contraction's f32"),
], ids=["columns", "rows", "signs", "sums"])
def test_operands_of_another_kind(piece: Contraction, kernel: Any, reason: str) -> None:
    made = compiled(kernel, ZEN4, Schedule(assembly=(piece.name,)))
    assert made.pieces == () and reason in dict(made.refused)[piece.key]


def test_extents_below_a_tile() -> None:
    facts: dict[str, Any] = {"unit_strides": dict.fromkeys("abc", "contiguous"), "target": ZEN4, "dim_classes": {}}
    made = compile_kernel(product, {"M": 13, "N": 64, "K": 64}, schedule=Schedule(assembly=("f32_14x32",)), **facts)
    assert "axis m has 13 elements at most; a tile is 14" in dict(made.refused)["x86_64:f32_14x32"]


def test_a_kernel_without_a_contraction() -> None:
    @sp.kernel
    def add(a: Tensor[f32, N], b: Tensor[f32, N]):
        for n in tiles(N):
            b[n] = a[n] + 1.0

    assert "no contraction" in dict(compiled(add, ZEN4, Schedule(assembly=("f32_14x32",))).refused)["x86_64:f32_14x32"]


def test_a_schedule_that_names_none() -> None:
    with pytest.raises(ScheduleError, match="no block 'f32_1x1'"):
        compiled(product, ZEN4, Schedule(assembly=("f32_1x1",)))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("piece", "chip"), PIECES, ids=IDS)
def test_by_itself_it_is_right_at_every_station(piece: Contraction, chip: Any) -> None:
    report = check_micro_kernel(piece, host_target() if runs_on(piece) and chip is ZEN4 else chip)
    assert report.finding is None and report.cases == 10
    assert report.passed["simplify"] == 10 and report.passed.get("native", 10) == 10


def test_what_follows_the_contraction_and_scalars_stay_generated() -> None:
    @sp.kernel
    def dense(a: Tensor[f32, M, K], b: Tensor[f32, K, N], bias: Tensor[f32, N], c: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            total = zeros(m, n, dtype=f32)
            for k in tiles(K):
                total += a[m, k] @ b[k, n]
            t = total + bias[n]
            c[m, n] = t * sp.sigmoid(t)

    schedule = Schedule(assembly=("f32_6x16",))
    assert compiled(dense, V3, schedule).pieces == ("x86_64:f32_6x16",)
    report = check_kernel(dense, V3, runs=5, schedule=schedule)
    assert report.finding is None, report.finding
    assert report.passed["micro-kernels"] == 10


def test_the_lane_op_prints_parses_and_is_verified() -> None:
    from sapper.codegen.pipeline import facts_of, to_lane
    from sapper.ir.verifier import VerificationError, verify
    from sapper.tile.schedule import DimClass, Specialization

    dims = Specialization({d: DimClass(1024, 64) for d in "MNK"})
    lane = to_lane(product.tile_ir(), Schedule(assembly=("f32_6x16",)), facts_of(V3), dims)
    text = print_function(lane)
    assert "asm_contract" in text
    again = parse_function(text, {"lane": LANE_OPS})
    assert print_function(again) == text
    verify(again, LANE_OPS)
    op = next(op for op in again.walk() if op.name == "asm_contract")
    op.attributes["rows"] = 5
    with pytest.raises(VerificationError, match="as many sums as rights times rows times vectors"):
        verify(again, LANE_OPS)


# --- Pieces that are wrong ------------------------------------------------------------------------------------------

@contextmanager
def registered(piece: Contraction) -> Iterator[Contraction]:
    CONTRACTIONS[piece.key] = piece
    try:
        yield piece
    finally:
        del CONTRACTIONS[piece.key]


def small(write: Any, rows: tuple[int, ...] = (2,), vectors: tuple[int, ...] = (1,), step: int = 2) -> Contraction:
    return Contraction(x86.table, "small", write, 256, rows, vectors, step, features=frozenset({"avx2", "fma"}))


def plain(t: Any) -> None:
    """Two rows by a vector, two steps to a round."""
    with t.loop(0, t.depth, 2):
        for step in range(2):
            for number, row in enumerate(t.sums):
                element, address = t.vector(), t.left + 4 * step
                x86.vbroadcastss(element, x86.dword[address + t.left_stride if number else address])
                x86.vfmadd231ps(row[0], element, x86.ptr[t.right + 32 * step])
        x86.add(t.left, 8)
        x86.add(t.right, 64)


def test_every_planted_error_is_found() -> None:
    sound = small(plain)
    with registered(sound):
        assert check_micro_kernel(sound, V3).finding is None
    alive = []
    for mutant in mutants(sound.assemble((2, 1))):
        assert isinstance(mutant.assembly, Tile)
        piece = sound.planted(mutant.assembly)
        with registered(piece):
            if check_micro_kernel(piece, V3).finding is None:
                alive.append(str(mutant))
    assert alive == []


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("sound", "chip", "every"), [(f32_6x16, V3, 90), (f32_14x32_columns, ZEN4, 150),
                                                      (i8_14x32_blocks, ZEN4, 250)], ids=["rows", "columns", "bytes"])
def test_an_error_in_one_of_many_rows_is_found(sound: Contraction, chip: Any, every: int) -> None:
    for mutant in islice(mutants(sound.assemble((sound.rows[0], 2))), 60, None, every):
        assert isinstance(mutant.assembly, Tile)
        piece = sound.planted(mutant.assembly)
        with registered(piece):
            assert check_micro_kernel(piece, chip).finding is not None, str(mutant)


def wrong_lane(t: Any) -> None:
    with t.loop(0, t.depth, 2):
        x86.vaddps(t.sums[0][0], t.sums[0][0], x86.ptr[t.right])


@pytest.mark.skipif(not V3.features <= host_target().features, reason="no AVX2")
def test_a_wrong_piece_is_never_used_and_one_warning_says_why() -> None:
    with registered(small(wrong_lane)):
        a, b = np.ones((8, 8), np.float32), np.ones((8, 16), np.float32)
        c = np.zeros((8, 16), np.float32)
        options: dict[str, Any] = {"target": "v3", "schedule": Schedule(assembly=("small",))}
        with pytest.warns(SapperWarning, match="pieces by hand are not used") as caught:
            make_matmul_nn(f32)(a, b, c, **options)
        assert len(caught) == 1
        assert (c == 8).all()


@pytest.mark.parametrize(("write", "kind"), [
    (lambda t: x86.vmovups(x86.ptr[t.right], t.sums[0][0]), "read-only"),
    (lambda t: x86.vaddps(t.sums[0][0], t.sums[0][0], t.vector()), "undefined"),
    (lambda t: x86.vmovaps(t.zmm(), x86.zmmword[t.right]), "feature"),
], ids=["stores", "undefined", "features"])
def test_static_checks(write: Any, kind: str) -> None:
    with pytest.raises(AssemblyError) as caught:
        small(write).check(V3)
    assert caught.value.kind == kind


@pytest.mark.parametrize(("options", "part"), [
    ({"vector": "r64"}, "expected a vector register"),
    ({"rows": (1, 2)}, "the largest first"),
    ({"vectors": ()}, "positive counts"),
    ({"step": 0}, "at least 1"),
    ({"rights": 0}, "at least 1"),
    ({"dtype": "f64"}, "expected f32, bf16, or each of i8 or u8"),
    ({"dtype": "u8", "right_dtype": "bf16"}, "expected f32, bf16, or each of i8 or u8"),
    ({"left": "panels"}, "expected 'rows', 'columns' or 'blocks'"),
    ({"left": "columns", "dtype": "bf16"}, "expected f32"),
    ({"dtype": "i8"}, "expected 'blocks'"),
    ({"left": "blocks", "step": 4}, "a multiple of 8"),
    ({"left": "blocks", "step": 8, "rows": (2, 1)}, "one count of rows"),
    ({"name": "vaddps"}, "name of an instruction"),
    ({"name": "f32_6x16"}, "another block"),
])
def test_micro_kernels_that_cannot_be_registered(options: dict[str, Any], part: str) -> None:
    given: dict[str, Any] = {"name": "new_one", "vector": "ymm", "rows": (2,), "vectors": (1,)} | options
    with pytest.raises(ValueError, match=part):
        x86.micro_kernel(given.pop("name"), **given)
