"""Contractions on matrix instructions: at the lane station, and as PTX on the emulator."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, emulate, f32, targets, tiles, whole, zeros
from sapper.codegen.pipeline import Compiled, compile_kernel, facts_of, finish_lane, to_lane
from sapper.ir.nodes import Function
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import verify
from sapper.kernels import find
from sapper.lane.interpret import run
from sapper.lane.memory import Memory
from sapper.lane.ops import LANE_OPS
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import DimClass, Schedule, Specialization

from .kernels import KERNELS, bf16_nn, bf16_nt, turned_bf16
from .left_out import replaced

NUMPY = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "i8": np.int8, "i32": np.int32}
SHAPES = [{"M": 128, "N": 128, "K": 64}, {"M": 160, "N": 96, "K": 96}, {"M": 64, "N": 224, "K": 160}]


def arguments_of(kernel: Any, extents: dict[str, int]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    made = {name: random.standard_normal([extents[d] for d in type.dims]).astype(NUMPY[type.dtype.name])
            for name, type in kernel.parameters}
    made[list(made)[-1]][...] = np.nan
    return made


def specialization(kernel: Any, divisor: int = 16, aligned: bool = True) -> Specialization:
    names = [name for name, _ in kernel.parameters]
    return Specialization({d: DimClass(4096, divisor) for d in "MNK"}, dict.fromkeys(names, "contiguous"),
                          frozenset(names[:-1] if aligned else []))


def lowered(kernel: Any, known: Specialization, schedule: Schedule | None = None) -> Function:
    target = targets.target("sm_80")
    return to_lane(kernel.tile_ir(), schedule or Schedule(), facts_of(target), known)


def expected(kernel: Any, arguments: dict[str, np.ndarray]) -> np.ndarray:
    copies = {name: array.copy() for name, array in arguments.items()}
    interpret(kernel.tile_ir(), copies)
    return copies[list(copies)[-1]].astype(np.float64)


def assert_near(found: np.ndarray, wanted: np.ndarray) -> None:
    """The sums are in another order: a few hundred products of numbers near 1."""
    tolerance = 2e-2 if found.dtype == ml_dtypes.bfloat16 else 1e-4
    np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_lane_ir(kernel: Any) -> None:
    extents = SHAPES[1]
    arguments = arguments_of(kernel, extents)
    lane = lowered(kernel, specialization(kernel))
    assert lane.attributes["warps"] == 4
    verify(lane, LANE_OPS)
    text = print_function(lane)
    assert print_function(parse_function(text, {"tile": TILE_OPS, "lane": LANE_OPS})) == text
    lane = finish_lane(lane, targets.target("sm_80"))
    memory = Memory()
    words = [0, 0, memory.allocate("sync", 1024)]
    for slot in lane.attributes["slots"]:
        name, _, kind = slot.partition(".")
        words.append(memory.add_array(name, arguments[name]) if kind == "data" else extents[kind])
    wanted = expected(kernel, arguments)
    run(lane, np.array(words), memory, workers=2)
    assert_near(arguments[list(arguments)[-1]], wanted)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_on_the_emulator(kernel: Any, lazy: bool) -> None:
    """Races, uninitialised reads and accesses out of bounds raise; lazy: a copy lands only when it is waited for."""
    names = [name for name, _ in kernel.parameters]
    large = Schedule(tile={"m": 128, "n": 64 if kernel.name == "gated" else 128})
    for extents, schedule in [(SHAPES[1], large)] if lazy else zip(SHAPES, (None, large, None), strict=True):
        arguments = arguments_of(kernel, extents)
        wanted = expected(kernel, arguments)
        result = emulate.run(kernel, *arguments.values(), target="sm_80", workers=2, aligned=names, schedule=schedule,
                             options=emulate.Options(lazy=lazy))
        assert_near(arguments[names[-1]], wanted)
        assert any(name.startswith("mma.sync") for name in result.counters.instructions)


BYTES = {"matmul_nt_i8": "m16n8k32.row.col.s32.s8.s8.s32", "matmul_nt_u8": "m16n8k32.row.col.s32.u8.s8.s32",
         "matmul_nt_i8_scaled": "m16n8k32.row.col.s32.s8.s8.s32"}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("name", BYTES)
def test_integers_of_8_bits_are_exact(name: str, level: str) -> None:
    entry = find(name)
    for shape, lazy in (({"M": 96, "N": 160, "K": 336}, True), ({"M": 200, "N": 130, "K": 80}, False)):
        arguments = entry.make_arguments(np.random.default_rng(5), shape)
        wanted = entry.reference(arguments)
        counters = emulate.run(entry.kernel, *arguments.values(), target=level, workers=2, aligned="ab",
                               options=emulate.Options(lazy=lazy)).counters
        assert entry.compare(arguments, wanted) is None, entry.compare(arguments, wanted)
        assert counters.instructions[f"mma.sync.aligned.{BYTES[name]}"]


def test_lane_ir_of_integers() -> None:
    entry = find("matmul_nt_u8")
    known = Specialization({d: DimClass(4096, 16) for d in "MNK"}, dict.fromkeys("abc", "contiguous"), frozenset("ab"))
    lane = lowered(entry.kernel, known)
    verify(lane, LANE_OPS)
    lane = finish_lane(lane, targets.target("sm_80"))
    shape = {"M": 128, "N": 144, "K": 160}
    arguments = entry.make_arguments(np.random.default_rng(5), shape)
    wanted = entry.reference(arguments)
    memory = Memory()
    words = [0, 0, memory.allocate("sync", 1024)]
    for slot in lane.attributes["slots"]:
        tensor, _, kind = slot.partition(".")
        words.append(memory.add_array(tensor, arguments[tensor]) if kind == "data" else shape[kind])
    run(lane, np.array(words), memory, workers=1)
    assert entry.compare(arguments, wanted) is None
    assert any(op.name == "matrix_multiply" for op in lane.walk())


def test_loads_of_pieces_have_no_bank_conflicts() -> None:
    """All conflicts are the sums' on their way out: with a longer depth there are no more of them."""
    conflicts = []
    for depth in (64, 256):
        arguments = arguments_of(bf16_nn, {"M": 128, "N": 128, "K": depth})
        counters = emulate.run(bf16_nn, *arguments.values(), target="sm_80", workers=1, aligned="ab").counters
        conflicts.append(counters.shared_cycles - counters.shared_ideal)
    assert conflicts[0] == conflicts[1]


def without(text: str, part: str, number: int | None) -> str:
    """Without the line of that number among those with `part`, or without any of them."""
    lines = text.splitlines()
    found = [i for i, line in enumerate(lines) if part in line]
    gone = found if number is None else [found[number]]
    return "\n".join(line for i, line in enumerate(lines) if i not in gone)


@pytest.mark.parametrize(("part", "number"), [("bar.sync", 0), ("bar.sync", 1), ("bar.sync", 2),
                                              ("cp.async.wait_group", 0), ("bar.warp.sync", None)])
def test_no_meeting_can_be_left_out(part: str, number: int | None) -> None:
    """The same program without one of them is caught, or wrong."""
    assert is_caught(lambda text: without(text, part, number))


FAULTS = {
    "copies are swizzled otherwise": (r"and\.b32 (%r\d+), (%r\d+), 7;", r"and.b32 \1, \2, 3;", 1),
    "left fragments are": (r"and\.b32 (%r\d+), (%r\d+), 7;", r"and.b32 \1, \2, 3;", 3),
    "right fragments are": (r"and\.b32 (%r\d+), (%r\d+), 7;", r"and.b32 \1, \2, 3;", 4),
    "stages end one too early": (r"(add\.s64 %rd\d+, %rd\d+), 98304;", r"\1, 65536;", 0),
    "stages end one too late": (r"(add\.s64 %rd\d+, %rd\d+), 98304;", r"\1, 131072;", 0),
    "a stage begins in the one before": (r"(add\.s64 %rd\d+, %rd\d+), 32768;", r"\1, 16384;", 0),
    "halves of the right fragment": (r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}, \{)(%r\d+), (%r\d+)\}", r"\1\3, \2}", 5),
    "rows of the left fragment": (r"(mma\.sync\S+ \{[^}]*\}, \{)(%r\d+), (%r\d+),", r"\1\3, \2,", 7),
    "sums of another column": (r"(mma\.sync\S+ \{)(%r\d+), (%r\d+),", r"\1\3, \2,", 3),
    "what lies past the depth": (r"selp\.b32 (%r\d+), 16, 0, (%p\d+);", r"mov.b32 \1, 16;", None),
    "a row of another matrix": (r"(ldmatrix\.\S+ \{[^}]*\}, \[%r\d+)\+2048\]", r"\1+1920]", 0),
    "the first stage is not committed": (r"cp\.async\.commit_group;", "", 0),
    "those of the loop are not": (r"cp\.async\.commit_group;", "", 2),
    "one copy too few is waited for": (r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;", 0),
    "a neighbour's sums": (r"(st\.shared\S* \[%r\d+)\+32\]", r"\1+64]", 0),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str) -> None:
    assert is_caught(lambda text: replaced(text, *FAULTS[fault]))


@cache
def compiled_for_warps() -> Compiled:
    known = specialization(bf16_nt, 64)
    return compile_kernel(bf16_nt, {}, known.strides, dict.fromkeys("MNK", (4096, 64)), targets.target("sm_80"), None,
                          known.aligned)


def is_caught(change: Callable[[str], str]) -> bool:
    """On the emulator: an error, or a wrong result."""
    compiled = compiled_for_warps()
    extents = {"M": 256, "N": 128, "K": 320}
    arguments = arguments_of(bf16_nt, extents)
    wanted = expected(bf16_nt, arguments)
    words = [arguments[s.split(".")[0]] if s.endswith("data") else extents[s.split(".")[1]] for s in compiled.slots]
    faulty = emulate.load(change(compiled.text()))
    try:
        faulty.launch(grid=(1,), block=(128,), arguments=[np.zeros(64), 64, np.zeros(1024, np.uint8), *words],
                      shared_bytes=compiled.near_bytes, options=emulate.Options(lazy=True))
        assert_near(arguments["c"], wanted)
    except (emulate.EmulationError, AssertionError):
        return True
    return False


def test_without_a_fault_nothing_is_caught() -> None:
    assert not is_caught(lambda text: text)


M, N, K = sp.dims("M N K")


@sp.kernel
def by_rows(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], c: Tensor[bf16, N, M]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += b[n, k] @ a[m, k]
        c[n, m] = acc.to(bf16)


@sp.kernel
def f32_by_rows(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, N, M]):
    for m in tiles(M):
        n, k = whole(N), whole(K)
        c[n, m] = abs(b[k, n] @ a[m, k])


@sp.kernel
def f32_by_columns(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, N, M]):
    for m in tiles(M):
        n, k = whole(N), whole(K)
        c[n, m] = abs(a[m, k] @ b[k, n])


@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("way", "other"), [(by_rows, turned_bf16), (f32_by_rows, f32_by_columns)],
                         ids=lambda k: k.name)
def test_a_product_has_its_operands_as_its_sums_are_stored(way: Any, other: Any, level: str) -> None:
    """Whichever comes first in the source: it is the same program, but for the order of ops."""
    target, known = targets.target(level), specialization(way)
    ways = [to_lane(kernel.tile_ir(), Schedule(), facts_of(target), known) for kernel in (way, other)]
    assert ways[0].attributes == ways[1].attributes
    assert len({tuple(sorted(str(op.attributes) + op.name for op in lane.walk())) for lane in ways}) == 1
    arguments = arguments_of(other, {"M": 80, "N": 48, "K": 64})
    wanted = expected(other, arguments)
    emulate.run(other, *arguments.values(), target=level, workers=2, aligned="abc")
    assert_near(arguments["c"], wanted)


def test_what_the_matrix_instructions_do_not_take() -> None:
    assert "warps" in lowered(bf16_nn, specialization(bf16_nn)).attributes
    small = Specialization({**specialization(bf16_nn).dims, "M": DimClass(8, 1)}, specialization(bf16_nn).strides,
                           frozenset("ab"))
    assert "warps" not in lowered(bf16_nn, small).attributes
    assert "warps" not in lowered(bf16_nn, specialization(bf16_nn), Schedule(registers={"m": 4})).attributes


M, N, K = sp.dims("M N K")


@sp.kernel
def beside_rows(a: Tensor[bf16, M, K], b: Tensor[bf16, K, N], row: Tensor[bf16, K], halves: Tensor[f32, M],
                out: Tensor[f32, M, N]):
    """A loop inside multiplies, the one around it has something of its own for each row."""
    for m in tiles(M):
        k = whole(K)
        for n in tiles(N):
            out[m, n] = a[m, k] @ b[k, n]
        halves[m] = a[m, k] @ row[k]


@sp.kernel
def beside_sums(a: Tensor[bf16, M, K], b: Tensor[bf16, K, N], row: Tensor[f32, K], halves: Tensor[f32, M],
                out: Tensor[f32, M, N]):
    for m in tiles(M):
        k = whole(K)
        for n in tiles(N):
            out[m, n] = a[m, k] @ b[k, n]
        halves[m] = sp.max(a[m, k].to(f32) * row[k] + sp.sum(row[k], over=k), over=k)


@pytest.mark.parametrize("kernel", [beside_rows, beside_sums], ids=lambda k: k.name)
def test_a_loop_around_may_do_other_work_beside_a_product(kernel: Any) -> None:
    random = np.random.default_rng(0)
    extents = {"M": 19, "N": 33, "K": 24}
    arguments = {name: random.integers(-3, 4, [extents[d] for d in type.dims]).astype(
        ml_dtypes.bfloat16 if type.dtype is bf16 else np.float32) for name, type in kernel.parameters}
    wanted = expected(kernel, arguments)
    emulate.run(kernel, *arguments.values(), target="sm_90a", workers=2)
    np.testing.assert_array_equal(arguments["out"], wanted)
    a, row = arguments["a"].astype(np.float32), arguments["row"].astype(np.float32)
    halves = a @ row if kernel is beside_rows else (a * row + row.sum()).max(axis=1)
    np.testing.assert_array_equal(arguments["halves"], halves)


@pytest.mark.parametrize(("extents", "tile"), [
    ((4096, 4096), (128, 128)), ((1024, 2048), (128, 128)), ((1024, 1024), (128, 128)), ((1024, 512), (128, 64)),
    ((512, 512), (64, 64)), ((64, 64), (64, 64))])
def test_tiles_take_least_time_by_the_model(extents: tuple[int, int], tile: tuple[int, int]) -> None:
    """108 on sm_80, where no tile is shared. A stage holds 64 of the depth of both, and each warp has a quarter."""
    known = specialization(bf16_nn)
    dims = {**known.dims, "M": DimClass(extents[0], 16), "N": DimClass(extents[1], 16)}
    lane = lowered(bf16_nn, Specialization(dims, known.strides, known.aligned), Schedule(split={"k": 1}))
    products = sum(op.name == "matrix_multiply" for op in lane.walk())
    assert products == tile[0] * tile[1] * 64 // 4 // (16 * 8 * 16)
    assert lane.attributes["near_bytes"] >= 3 * sum(tile) * 64 * 2


def test_a_schedule_says_the_tile() -> None:
    found = [lowered(bf16_nn, specialization(bf16_nn), Schedule(tile={"m": 64, "n": size})) for size in (64, 128)]
    assert [sum(op.name == "matrix_multiply" for op in lane.walk()) for lane in found] == [32, 64]


def test_what_copies_do_not_take_comes_through_registers() -> None:
    for known in (specialization(bf16_nn, aligned=False), specialization(bf16_nn, divisor=1)):
        names = {op.name for op in lowered(bf16_nn, known).walk()}
        assert "matrix_multiply" in names and "async_copy" not in names
