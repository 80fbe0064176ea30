"""Loops over memory in blocks are split, and addresses carried: the same stores, and fewer scalar ops in the loop."""

from __future__ import annotations

import numpy as np
import pytest

from sapper.ir.nodes import Function, Op
from sapper.ir.rewriter import eliminate_dead
from sapper.ir.text import parse_function
from sapper.ir.verifier import verify
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.ops import LANE_OPS
from sapper.lane.simplify import simplify
from sapper.lane.strength import (
    MOST_CARRIED,
    MOST_POINTED,
    point_at_operands,
    reduce_strength,
    split_blocks,
)

HEAD = 'lane func @f() {lanes = 8, slots = ["x.data", "scalar.n"]} {\n' \
       "%x: s64 = arg {slot = 3}\n%n: s64 = arg {slot = 4}\n" \
       + "".join(f"%c{n}: s64 = s_const {{value = {n}}}\n" for n in (-16, 0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 24, 40))


def parse(body: str) -> Function:
    function = parse_function(HEAD.replace("%c-16", "%blocks") + body + "\n}", {"lane": LANE_OPS})
    verify(function, LANE_OPS)
    return function


def stored(function: Function, n: int) -> list[int]:
    x = np.full(512, -1, np.int64)
    run(function, *bind_arguments(function, {"x": x}, {"n": np.int64(n)}))
    return x.tolist()


def innermost(function: Function) -> list[Op]:
    """The ops of the one loop without a loop inside."""
    (loop,) = (op for op in function.walk() if op.name == "loop" and not any(o.blocks for o in op.blocks[0].ops))
    return loop.blocks[0].ops


BLOCKED = """
%r: s64 = loop START, %n, %c0 {step = 4, label = "k"} (%k: s64, %s: s64) {
%b: s64 = s_and %k, %blocks
%o: s64 = s_and %k, %c15
%p: s64 = s_mul %b, %c3
%q: s64 = s_mul %o, %c8
%a: s64 = s_add %p, %q
%t: s64 = s_add %s, %k
s_store %t, %x, %a {dtype = :i64, scale = 1, disp = 0, indexed = true}
yield %t
}
s_store %r, %x {dtype = :i64, disp = 8}
"""


@pytest.mark.parametrize("n", [0, 1, 4, 15, 16, 17, 20, 31, 32, 48, 61])
@pytest.mark.parametrize("start", [0, 16])
def test_a_loop_over_blocks_is_split_and_its_pointer_carried(n: int, start: int) -> None:
    plain, split = (parse(BLOCKED.replace("START", f"%c{start}")) for _ in range(2))
    assert split_blocks(split) == 1
    verify(split, LANE_OPS)
    assert stored(split, n) == stored(plain, n)
    simplify(split)
    assert reduce_strength(split) == 1
    eliminate_dead(split, LANE_OPS)
    verify(split, LANE_OPS)
    assert stored(split, n) == stored(plain, n)
    # What is left: the sum of the counters, the store at the pointer, and the pointer's step.
    assert [op.name for op in innermost(split)] == ["s_add", "s_store", "s_add", "yield"]
    (store,) = (op for op in innermost(split) if op.name == "s_store")
    assert not store.attributes["indexed"]


@pytest.mark.parametrize(("old", "new"), [
    ("START", "%c4"),  # a block may have begun already
    ("START", "%n"),  # nothing is known of it
    ("{step = 4", "{step = 3"),  # no whole number of steps in a block
    ("{step = 4", "{step = 16"),  # one step in a block
    ("s_and %k, %c15", "s_and %k, %c7"),  # not the rest of those blocks
])
def test_what_is_no_loop_over_blocks_stays(old: str, new: str) -> None:
    function = parse(BLOCKED.replace(old, new).replace("START", "%c0"))
    assert split_blocks(function) == 0


@pytest.mark.parametrize("n", [0, 1, 16, 17, 33, 64])
@pytest.mark.parametrize("step", [16, 32])
def test_steps_of_whole_blocks_begin_at_them(n: int, step: int) -> None:
    """The counter is the block's, and nothing of a block is behind it: what is left is a pointer."""
    text = BLOCKED.replace("{step = 4", f"{{step = {step}").replace("START", "%c16")
    plain, whole = parse(text), parse(text)
    split_blocks(whole)
    verify(whole, LANE_OPS)
    simplify(whole)
    assert reduce_strength(whole) == 1
    eliminate_dead(whole, LANE_OPS)
    verify(whole, LANE_OPS)
    assert stored(whole, n) == stored(plain, n)
    assert [op.name for op in innermost(whole)] == ["s_add", "s_store", "s_add", "yield"]


LINEAR = """
loop %c1, %n {step = 2} (%k: s64) {
%p: s64 = s_mul %k, %c24
%q: s64 = s_shl %k, %c4
%w: s64 = s_add %q, %n
%z: s64 = s_sub %w, %x
%y: s64 = s_add %z, %x
s_store %y, %x, %p {dtype = :i64, scale = 1, disp = 16, indexed = true}
s_store %w, %x, %q {dtype = :i64, scale = 1, disp = 0, indexed = true}
}
"""


@pytest.mark.parametrize("n", [0, 1, 2, 3, 9, 20])
def test_products_are_carried(n: int) -> None:
    plain, carried = parse(LINEAR), parse(LINEAR)
    assert reduce_strength(carried) == 4
    eliminate_dead(carried, LANE_OPS)
    verify(carried, LANE_OPS)
    assert stored(carried, n) == stored(plain, n)
    assert not any(op.name in ("s_mul", "s_shl") for op in innermost(carried))


def test_an_index_of_two_bases_stays_an_index() -> None:
    body = """
    %e: s64 = s_add %x, %c8
    loop %c0, %n {step = 1} (%k: s64) {
    %p: s64 = s_mul %k, %c24
    s_store %k, %x, %p {dtype = :i64, scale = 1, disp = 0, indexed = true}
    s_store %k, %e, %p {dtype = :i64, scale = 1, disp = 0, indexed = true}
    }
    """
    plain, carried = parse(body), parse(body)
    assert reduce_strength(carried) == 1
    verify(carried, LANE_OPS)
    assert stored(carried, 7) == stored(plain, 7)
    assert all(op.attributes["indexed"] for op in innermost(carried) if op.name == "s_store")


@pytest.mark.parametrize(("disps", "least"), [((4160, 4232), 0), ((4232, 4168), 8), ((4088, 4096), 4088)])
def test_a_pointer_to_what_is_far_begins_there(disps: tuple[int, int], least: int) -> None:
    stores = [f"s_store %k, %y, %p {{dtype = :i64, scale = 1, disp = {disp}, indexed = true}}" for disp in disps]
    body = ("%far: s64 = s_const {value = -4080}\n%y: s64 = s_add %x, %far\nloop %c0, %n {step = 1} (%k: s64) {\n"
            "%p: s64 = s_mul %k, %c24\n" + "\n".join(stores) + "\n}")
    plain, carried = parse(body), parse(body)
    assert reduce_strength(carried) == 1
    verify(carried, LANE_OPS)
    assert stored(carried, 7) == stored(plain, 7)
    assert min(op.attributes["disp"] for op in innermost(carried) if op.name == "s_store") == least


def test_no_more_is_carried_than_registers_allow() -> None:
    lines = [f"%p{i}: s64 = s_mul %k, %c{c}\n"
             f"s_store %p{i}, %x, %p{i} {{dtype = :i64, scale = 1, disp = 0, indexed = true}}"
             for i, c in enumerate((3, 7, 9, 24, 40))]
    body = "loop %c0, %n {step = 1} (%k: s64) {\n" + "\n".join(lines) + "\n}"
    assert len(lines) > MOST_CARRIED and reduce_strength(parse(body)) == 0


def test_what_only_scales_an_index_is_left_to_the_address() -> None:
    body = ("loop %c0, %n {step = 1} (%k: s64) {\n%p: s64 = s_add %k, %c3\n"
            "s_store %k, %x, %p {dtype = :i64, scale = 8, disp = 0, indexed = true}\n}")
    assert reduce_strength(parse(body)) == 0


@pytest.mark.parametrize("n", [0, 1, 7])
def test_what_counts_from_the_base_of_a_pointer_reads_by_it(n: int) -> None:
    """The first of eight rows at one address (sapper/lane/state.py) was read by base and counter beside the pointer."""
    body = """
    %s: s64 = s_mul %n, %c8
    loop %c0, %n {step = 1} (%k: s64) {
    %p: s64 = s_mul %k, %c8
    %a: s64 = s_add %x, %p
    s_store %c7, %a, %s {dtype = :i64, scale = 2, disp = 0, indexed = true}
    s_store %c9, %x, %k {dtype = :i64, scale = 8, disp = 16, indexed = true}
    s_store %c3, %x, %k {dtype = :i64, scale = 4, disp = 1024, indexed = true}
    }
    """
    plain, carried = parse(body), parse(body)
    assert reduce_strength(carried) == 1
    eliminate_dead(carried, LANE_OPS)
    verify(carried, LANE_OPS)
    assert stored(carried, n) == stored(plain, n)
    by_pointer, by_base, other = (op for op in innermost(carried) if op.name == "s_store")
    assert by_base.operands[1:] == by_pointer.operands[1:2] and not by_base.attributes["indexed"]
    assert other.attributes["indexed"]      # it grows by 4, the pointer by 8


@pytest.mark.parametrize("start", ["%c0", "%c2"])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 9, 20])
def test_an_operand_of_a_multiply_add_is_read_by_a_pointer(n: int, start: str) -> None:
    """And so is what else counts from its base by as much; what is read for something else, or twice, is left."""
    body = """
    %z: row<f32> = splat_const {value = 0.0}
    %two: row<f32> = splat_const {value = 2.0}
    %t: row<f32> = loop START, %n, %z {step = 2} (%k: s64, %s: row<f32>) {
    prefetch %x, %k {level = 1, scale = 4, disp = 128, indexed = true}
    %a: row<f32> = load_splat %x, %k {dtype = :f32, scale = 4, disp = 0, indexed = true}
    %b: row<f32> = load_splat %x, %k {dtype = :f32, scale = 4, disp = 4, indexed = true}
    %c: row<f32> = load_splat %x, %k {dtype = :f32, scale = 8, disp = 0, indexed = true}
    %u: row<f32> = fma %a, %two, %s
    %v: row<f32> = fma %b, %b, %u
    %w: row<f32> = add %c, %v
    yield %w
    }
    store %t, %x {dtype = :f32, masked = false, streaming = false, disp = 0}
    """
    results = []
    for pointed in (False, True):
        function = parse(body.replace("START", start))
        if pointed:
            assert point_at_operands(function) == 1
            eliminate_dead(function, LANE_OPS)
            verify(function, LANE_OPS)
            ops = innermost(function)
            assert [op.attributes["indexed"] for op in ops if "indexed" in op.attributes] == [False] * 3 + [True]
        x = np.arange(256, dtype=np.float32)
        run(function, *bind_arguments(function, {"x": x}, {"n": np.int64(n)}))
        results.append(x.tolist())
    assert results[0] == results[1]


@pytest.mark.parametrize("uses", [1, 2])
def test_pointers_for_elements_of_two_multiply_adds(uses: int) -> None:
    function = parse("""
    %z: row<f32> = splat_const {value = 0.0}
    %t: row<f32>, %r: row<f32> = loop %c0, %n, %z, %z {step = 1} (%k: s64, %s: row<f32>, %q: row<f32>) {
    %a: row<f32> = load_splat %x, %k {dtype = :f32, scale = 4, disp = 0, indexed = true}
    %u: row<f32> = fma %a, %z, %s
    %v: row<f32> = fma %a, %s, %q
    yield %u, %v
    }
    store %t, %x {dtype = :f32, masked = false, streaming = false, disp = 0}
    store %r, %x {dtype = :f32, masked = false, streaming = false, disp = 0}
    """)
    assert point_at_operands(function, uses) == uses - 1


@pytest.mark.parametrize(("start", "n"), [("%c0", 9), ("%c8", 20)])
def test_pointers_in_place_of_a_base_and_what_grows_with_the_counter(start: str, n: int) -> None:
    body = """
    %z: row<f32> = splat_const {value = 0.0}
    %t: row<f32>, %e: s64 = loop %c0, %n, %z, START {step = 1} (%k: s64, %s: row<f32>, %i: s64) {
    %a: row<f32> = load_splat %x, %i {dtype = :f32, scale = 1, disp = 4, indexed = true}
    %u: row<f32> = fma %a, %a, %s
    %g: s64 = s_add %i, %c16
    yield %u, %g
    }
    store %t, %x {dtype = :f32, masked = false, streaming = false, disp = 0}
    """
    results = []
    for pointed in (False, True):
        function = parse(body.replace("START", start))
        if pointed:
            assert point_at_operands(function, 2) == 1
            verify(function, LANE_OPS)
            assert not any(op.attributes.get("indexed") for op in innermost(function))
        x = np.arange(256, dtype=np.float32)
        run(function, *bind_arguments(function, {"x": x}, {"n": np.int64(n)}))
        results.append(x.tolist())
    assert results[0] == results[1]


def test_no_more_pointers_are_carried_than_registers_allow() -> None:
    bases = range(MOST_POINTED + 1)
    body = ("%z: row<f32> = splat_const {value = 0.0}\n"
            + "".join(f"%x{i}: s64 = s_add %x, %c{c}\n" for i, c in zip(bases, (8, 16, 24, 40), strict=False))
            + "%t: row<f32> = loop %c0, %n, %z {step = 1} (%k: s64, %s0: row<f32>) {\n"
            + "".join(f"%a{i}: row<f32> = load_splat %x{i}, %k {{dtype = :f32, scale = 4, disp = 0, indexed = true}}\n"
                      f"%s{i + 1}: row<f32> = fma %a{i}, %z, %s{i}\n" for i in bases)
            + f"yield %s{len(bases)}\n}}\n"
            + "store %t, %x {dtype = :f32, masked = false, streaming = false, disp = 0}\n")
    assert point_at_operands(parse(body)) == 0
