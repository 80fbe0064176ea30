"""Products of small matrices in place of dot products: the same sums, and only where instructions are saved."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sapper.codegen.pipeline import facts_of, finish_lane
from sapper.ir.nodes import Function
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.two_by_two import PRODUCTS, multiply_two_by_two
from sapper.targets import target
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Schedule
from tests.strategies import examples
from tests.strategies.schedule import as_far_as_followed

from . import test_packed
from .run_lane import run_lane, specialize
from .test_interpret import program, rows, same
from .test_packed import ORDERS, PAIRS, arguments_of, expected_of

TARGET = target("neoverse-v2")
SLOTS = 4       # of a row that one load has
BYTES = {"i8": np.int8, "u8": np.uint8}


@pytest.mark.parametrize(("first", "second"), [("i8", "i8"), ("u8", "u8"), ("u8", "i8")])
def test_matrices_of_bytes(first: str, second: str) -> None:
    random = np.random.default_rng(1)
    a, b = (random.integers(0, 256, (2, 2, 8)).astype(np.uint8) for _ in range(2))
    sums = random.integers(-2**31, 2**31, (2, 2, 2)).astype(np.int32)
    wide = [x.view(BYTES[kind]).astype(np.int32) for x, kind in ((a, first), (b, second))]
    found = rows(f"two_by_two_{first}{second}", ["i32", "b32", "b32"], "i32",
                 [sums.ravel().tolist(), a.view(np.uint32).ravel().tolist(), b.view(np.uint32).ravel().tolist()])
    same(found, (sums + wide[0] @ wide[1].transpose(0, 2, 1)).ravel().tolist())


def test_matrices_of_bfloat16_add_slots_in_order() -> None:
    """2**24 + 1 is 2**24: what slots 0 add is rounded before slots 1 add theirs."""
    a = np.array([[1, 0, 2.0**24, 0], [2, 1, 0, 1]], ml_dtypes.bfloat16)
    b = np.array([[1, 0, 1, 0], [2.0**24, 1, -(2.0**24), 1]], ml_dtypes.bfloat16)
    bits = [x.view(np.uint32).ravel().tolist() for x in (a, b)]
    same(rows("two_by_two_bf16", ["f32", "b32", "b32"], "f32", [[0, 0, 0, 0], *bits]),
         [2.0**24, 2.0**24 - 2.0**48, 2, 2.0**25 + 2])


# --- The pass -------------------------------------------------------------------------------------------------------

def loop_of(name: str, count: int, vectors: int, together: bool, rows_first: bool = False, zipped: bool = False,
            also: str = "") -> Function:
    """A loop over blocks of four slots, of `count` rows by vectors of columns. together: slots of two rows are side by
    side in memory. zipped: those of a column are. also: what the loop does besides."""
    kind = "f32" if name == "dot2_bf16" else "i32"
    sums = [f"s{m}_{c}" for m in range(count) for c in range(vectors)]
    body = ["%zero: s64 = s_const {value = 0}", "%two: s64 = s_const {value = 2}"]
    body += [f"%i{n}: row<{kind}> = load %c_data {{dtype = :{kind}, disp = {16 * n}}}" for n in range(len(sums))]
    results = ", ".join(f"%r{n}: row<{kind}>" for n in range(len(sums)))
    carried = ", ".join(f"%{s}: row<{kind}>" for s in sums)
    starts = ", ".join(f"%i{n}" for n in range(len(sums)))
    body += [f"{results} = loop %zero, %two, {starts} {{step = 1}} (%at: s64, {carried}) {{",
             f"%stepa: s64 = s_const {{value = {16 * count}}}", f"%stepb: s64 = s_const {{value = {64 * vectors}}}",
             "%pa: s64 = s_mul %at, %stepa", "%ba: s64 = s_add %a_data, %pa",
             "%pb: s64 = s_mul %at, %stepb", "%bb: s64 = s_add %b_data, %pb"]
    body += [f"%q{m}: row<b32> = load %ba {{dtype = :b32, disp = {16 * m}}}" for m in range(count)]
    for k in range(SLOTS):
        for c in range(vectors):
            body.append(f"%{'w' if zipped else 'v'}{k}_{c}: row<b32> = load %bb {{dtype = :b32, "
                        f"disp = {16 * (k * vectors + c)}}}")
            if zipped and k % 2:
                body.append(f"%v{k - 1}_{c}: row<b32>, %v{k}_{c}: row<b32> = unzip %w{k - 1}_{c}, %w{k}_{c}")
    total = dict(zip(sums, sums, strict=True))
    for k in range(SLOTS):
        for m in range(count):
            row, lane = (m // 2 * 2 + k // 2, m % 2 * 2 + k % 2) if together else (m, k)
            body.append(f"%e{k}_{m}: row<b32> = broadcast_lane %q{row} {{lane = {lane}}}")
            for c in range(vectors):
                factors = (f"%e{k}_{m}", f"%v{k}_{c}") if rows_first else (f"%v{k}_{c}", f"%e{k}_{m}")
                before = total[f"s{m}_{c}"]
                total[f"s{m}_{c}"] = f"t{k}_{m}_{c}"
                body.append(f"%t{k}_{m}_{c}: row<{kind}> = {name} %{before}, {', '.join(factors)}")
    body += [also, "yield " + ", ".join(f"%{value}" for value in total.values()), "}"]
    body += [f"store %r{n}, %y_data {{dtype = :{kind}, disp = {16 * n}}}" for n in range(len(sums))]
    return program("\n".join(body), 4, ("a.data", "b.data", "c.data", "y.data", "z.data"))


def run_of(function: Function, name: str, count: int, vectors: int) -> np.ndarray:
    random = np.random.default_rng(3)
    kind: Any = np.float32 if name == "dot2_bf16" else np.int32

    def some(extent: int) -> np.ndarray:
        if name == "dot2_bf16":
            return random.standard_normal(2 * extent).astype(ml_dtypes.bfloat16).view(np.uint32)
        return random.integers(0, 2**32, extent).astype(np.uint32)

    results = count * vectors
    arrays = {"a": some(8 * count), "b": some(32 * vectors), "c": random.integers(-99, 99, 4 * results).astype(kind),
              "y": np.zeros(4 * results, kind), "z": np.zeros(64, kind)}
    run(function, *bind_arguments(function, arrays))
    return np.concatenate([arrays["y"], arrays["z"]])


def named(function: Function, *names: str) -> int:
    return sum(op.name in names for op in function.walk())


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize(("count", "vectors", "together", "zipped"), [
    (4, 2, False, False), (4, 2, True, False), (2, 1, True, True), (5, 3, False, True), (6, 2, True, True)])
def test_sums_are_the_same(name: str, rows_first: bool, count: int, vectors: int, together: bool,
                           zipped: bool) -> None:
    function, expected = (loop_of(name, count, vectors, together, rows_first, zipped) for _ in range(2))
    assert multiply_two_by_two(function) == 1
    pairs = count // 2 * vectors
    assert named(function, PRODUCTS[name]) == SLOTS * pairs
    assert named(function, name) == SLOTS * (count % 2) * vectors      # of an odd row
    loop = next(op for op in function.walk() if op.name == "loop")
    moves = [op.name for op in loop.walk() if op.name in ("zip", "unzip", "exchange")]
    expected_moves = ["exchange"] * (0 if together else count // 2) + ["zip"] * (0 if zipped else 2 * vectors)
    assert sorted(moves) == sorted(expected_moves + ["unzip"] * (2 * vectors if zipped and count % 2 else 0))
    first, second = (run_of(f, name, count, vectors) for f in (function, expected))
    assert first.tobytes() == second.tobytes()


def test_not_where_no_instruction_is_saved() -> None:
    """Two rows by one vector: eight dot products, or four products, four zips and two exchanges."""
    function = loop_of("dot4_i8i8", 2, 1, False)
    assert multiply_two_by_two(function) == 0 and named(function, "dot4_i8i8") == 8


@pytest.mark.parametrize("also", [
    "store %t2_2_0, %z_data {dtype = :i32}", "store %s3_1, %z_data {dtype = :i32}"])
def test_sums_that_something_else_reads_stay(also: str) -> None:
    """On the way, or at the start of a round: theirs and those of the row beside, which have no other to go with."""
    function, expected = (loop_of("dot4_u8i8", 4, 2, True, also=also) for _ in range(2))
    assert multiply_two_by_two(function) == 1
    assert named(function, "dot4_u8i8") == 8 and named(function, "two_by_two_u8i8") == 12
    first, second = (run_of(f, "dot4_u8i8", 4, 2) for f in (function, expected))
    assert first.tobytes() == second.tobytes()


def test_products_of_two_kinds_stay() -> None:
    """Of one sum; the others are of one kind."""
    function, expected = (loop_of("dot4_u8i8", 4, 2, True) for _ in range(2))
    for one in (function, expected):
        first = next(op for op in one.walk() if op.name == "dot4_u8i8")
        first.name = "dot4_i8i8"
    assert multiply_two_by_two(function) == 1
    assert named(function, "dot4_i8i8") == 1 and named(function, "two_by_two_u8i8") == 12
    first, second = (run_of(f, "dot4_u8i8", 4, 2) for f in (function, expected))
    assert first.tobytes() == second.tobytes()


def test_only_of_four_lanes() -> None:
    function = loop_of("dot4_i8i8", 4, 2, True)
    function.attributes["lanes"] = 8
    assert multiply_two_by_two(function) == 0


def test_loads_stand_before_what_reads_them() -> None:
    """Two slots of all vectors, and of two rows, are held at once."""
    function = loop_of("dot2_bf16", 6, 2, True, zipped=True)
    multiply_two_by_two(function)
    body = next(op for op in function.walk() if op.name == "loop").blocks[0]
    order = "".join("L" if op.name == "load" else "M" for op in body.ops if op.name in ("load", "two_by_two_bf16"))
    assert order == ("LLMLMLMLM" + 2 * "LMMMM") * 2


# --- What lies two by two -------------------------------------------------------------------------------------------

@settings(max_examples=examples(60))
@example(9, 5, 8, "nn", PAIRS[0], None, None, 0, None)      # single slots meet few rows
@given(m=st.integers(0, 40), n=st.integers(0, 40), k=st.integers(0, 70), order=st.sampled_from(ORDERS),
       types=st.sampled_from(PAIRS), rows=st.sampled_from([None, 1, 2, 3, 4, 6, 8]),
       stage=st.sampled_from([None, None, (), ("a", "b"), ("b",)]), seed=st.integers(0, 99),
       hint=st.sampled_from([None, 40, 500, 4000]))
def test_any_extents(m: int, n: int, k: int, order: str, types: Any, rows: int | None, stage: Any, seed: int,
                     hint: int | None) -> None:
    """Panels and rows as they are copied, and read again: whole, and what is left of rows, columns and the depth."""
    function = reduce_loops(test_packed.PRODUCTS[order, types].tile_ir())
    arguments = arguments_of(order, types, m, n, k, seed)
    hints = None if hint is None else dict.fromkeys("MNK", hint)
    registers = {} if rows is None else {"m": rows}
    as_far_as_followed(Schedule(registers=registers, stage=stage), lambda schedule: run_lane(
        function, arguments, schedule, facts_of(TARGET), specialize(function, arguments, hints),
        workers=1 + seed % 2, passes=lambda lane: finish_lane(lane, TARGET)))
    np.testing.assert_array_equal(arguments["c"], expected_of(order, arguments))


@pytest.mark.parametrize("types", PAIRS, ids=lambda t: f"{t[0].name}-{t[1].name}")
def test_the_main_loop_is_of_matrices_alone(types: Any) -> None:
    """12 rows by 8 columns: 24 sums, and no exchange between registers."""
    function = reduce_loops(test_packed.PRODUCTS["nt", types].tile_ir())
    arguments = arguments_of("nt", types, 25, 19, 37)
    lane = run_lane(function, arguments, None, facts_of(TARGET),
                    specialize(function, arguments, dict.fromkeys("MNK", 1024)),
                    passes=lambda lane: finish_lane(lane, TARGET))
    np.testing.assert_array_equal(arguments["c"], expected_of("nt", arguments))
    loops = [[op.name for op in loop.blocks[0].ops] for loop in lane.walk() if loop.name == "loop"]
    counts = [(sum(name in PRODUCTS.values() for name in names), names.count("load")) for names in loops]
    assert max(counts) == (48, 20)
    names = loops[counts.index(max(counts))]
    assert not {"zip", "unzip", "exchange", "broadcast_lane", *PRODUCTS} & set(names)
