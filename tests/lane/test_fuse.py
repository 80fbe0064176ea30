"""Products become part of the sums that alone read them; nothing else does."""

from __future__ import annotations

import numpy as np
import pytest

from sapper.ir.nodes import Function
from sapper.ir.text import parse_function
from sapper.ir.verifier import verify
from sapper.lane.fuse import fuse
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.ops import LANE_OPS

LANES = 8


def parse(body: str, dtype: str) -> Function:
    loads = "".join(f"%{name}: row<{dtype}> = load %{name}p {{dtype = :{dtype}}}\n" for name in "abc")
    slots = "".join(f"%{name}p: s64 = arg {{slot = {3 + n}}}\n" for n, name in enumerate("abcy"))
    function = parse_function('lane func @f() {lanes = 8, slots = ["a.data", "b.data", "c.data", "y.data"]} {\n'
                              + slots + loads + body.replace("T", dtype) + "\n}", {"lane": LANE_OPS})
    verify(function, LANE_OPS)
    return function


def stored(function: Function, dtype: str) -> np.ndarray:
    random, kind = np.random.default_rng(3), np.dtype({"i32": "int32", "f32": "float32", "f64": "float64"}[dtype])
    rows = {name: (random.standard_normal(LANES) * 100).astype(kind) for name in "abc"}
    rows["c"][:4] = -(rows["a"] * rows["b"])[:4]        # what is left is the rounding of the product
    y = np.zeros(4 * LANES, kind)
    run(function, *bind_arguments(function, {**rows, "y": y}, {}))
    return y


def names(function: Function) -> list[str]:
    return [op.name for op in function.walk() if op.name in ("add", "sub", "mul", "neg", "fma")]


STORE = "store %s, %yp {dtype = :T}"


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize(("total", "signs", "left"), [
    ("add %p, %c", (1, 1), ["fma"]), ("add %c, %p", (1, 1), ["fma"]),
    ("sub %p, %c", (1, -1), ["neg", "fma"]), ("sub %c, %p", (-1, 1), ["neg", "fma"]),
])
def test_each_form_is_rounded_once(dtype: str, total: str, signs: tuple[int, int], left: list[str]) -> None:
    function = parse(f"%p: row<T> = mul %a, %b\n%s: row<T> = {total}\n{STORE}", dtype)
    by_hand = parse("%m: row<T> = neg %a\n%n: row<T> = neg %c\n%s: row<T> = fma "
                    f"{'%a' if signs[0] > 0 else '%m'}, %b, {'%c' if signs[1] > 0 else '%n'}\n{STORE}", dtype)
    apart = stored(function, dtype)
    assert fuse(function) == 1 and names(function) == left
    verify(function, LANE_OPS)
    assert stored(function, dtype).tobytes() == stored(by_hand, dtype).tobytes() != apart.tobytes()


def test_of_two_products_the_second_is_fused() -> None:
    function = parse(f"%p: row<T> = mul %a, %b\n%q: row<T> = mul %b, %c\n%s: row<T> = add %p, %q\n{STORE}", "f32")
    assert fuse(function) == 1 and names(function) == ["mul", "fma"]
    assert [op.operands[0].name for op in function.walk() if op.name in ("mul", "fma")] == ["a", "b"]
    verify(function, LANE_OPS)


@pytest.mark.parametrize(("body", "fused"), [
    ("%p: row<T> = mul %a, %b\n%s: row<T> = add %p, %c", False),
    ("%p: row<T> = mul %a, %b\n%s: row<T> = sub %c, %p", False),
    ("%n: row<T> = neg %c\n%p: row<T> = mul %a, %b\n%s: row<T> = add %p, %n", True),
    ("%m: row<T> = neg %a\n%n: row<T> = neg %b\n%p: row<T> = mul %m, %n\n%s: row<T> = add %p, %c", True),
    ("%p: row<T> = mul %a, %b\n%s: row<T> = add %p, %c\nstore %c, %yp {dtype = :T, disp = 32}", True),
    ("%w: row<T> = load %cp {dtype = :bf16}\n%p: row<T> = mul %a, %b\n%s: row<T> = add %p, %w", True),
], ids=["sum", "difference", "only a factor", "only the other", "a load that others need too", "a widened one"])
def test_two_operands_from_memory_stay_two_instructions(body: str, fused: bool) -> None:
    function = parse(f"{body}\n{STORE}", "f32")
    assert fuse(function, memory_operands=True) == fused
    assert fuse(parse(f"{body}\n{STORE}", "f32")) == 1


@pytest.mark.parametrize(("dtype", "body"), [
    ("i32", "%p: row<T> = mul %a, %b\n%s: row<T> = add %p, %c"),
    ("f32", "%p: row<T> = mul %a, %b\n%s: row<T> = add %p, %p"),
    ("f32", "%p: row<T> = mul %a, %b\n%s: row<T> = add %p, %c\nstore %p, %yp {dtype = :T, disp = 32}"),
    ("f32", "%p: row<T> = mul %a, %b\n%o: row<T> = round_to %p {dtype = :bf16}\n%s: row<T> = add %o, %c"),
    ("f32", "%p: row<T> = mul %a, %b\n%z: s64 = s_const {value = 0}\n%n: s64 = s_const {value = 3}\n"
            "%s: row<T> = loop %z, %n, %c {step = 1} (%i: s64, %t: row<T>) {\n%u: row<T> = add %t, %p\nyield %u\n}"),
], ids=["integers", "used twice by one sum", "used elsewhere", "rounded first", "made outside of the loop"])
def test_what_stays(dtype: str, body: str) -> None:
    function = parse(f"{body}\n{STORE}", dtype)
    before = names(function)
    assert fuse(function) == 0 and names(function) == before
