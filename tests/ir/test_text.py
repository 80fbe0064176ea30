"""The text form of the IRs: exact round trips, and errors for everything else."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ir.nodes import Block, Builder, Function, Location, Op
from sapper.ir.text import TextError, parse_function, print_function, print_op
from sapper.ir.types import DTYPES, MASK, ROW_F32, ROW_I32, S64, TensorType, TileType, b32, bf16, f32, index
from sapper.lane.ops import LANE_OPS
from sapper.tile.ops import TILE_OPS
from tests.strategies import examples
from tests.strategies.malformed import mutations, refusals

TABLES = {"tile": TILE_OPS, "lane": LANE_OPS}

MATMUL = """\
tile func @matmul(%a: tensor<bf16, M, K>, %b: tensor<bf16, K, 64>, %c: tensor<f32, M, 64>) {dims = ["M", "K"]} {
  %zero: index = const {value = 0}
  %M: index = dim {name = "M"}
  %K: index = dim {name = "K"}
  %N: index = const {value = 64}
  tiles %zero, %M, %zero, %N {axes = ["m", "n"], parallel = true} {
    %f: f32 = const {value = 0.0}
    %acc: f32[m, n] = full %f
    %im: index[m] = index {axis = "m"}
    %in: index[n] = index {axis = "n"}
    %sum: f32[m, n] = tiles %zero, %K, %acc {axes = ["k"], parallel = false} (%1: f32[m, n]) {
      %ik: index[k] = index {axis = "k"}
      %x: bf16[m, k] = load %a, %im, %ik
      %y: bf16[k, n] = load %b, %ik, %in
      %p: f32[m, n] = contract %x, %y {over = ["k"]}
      %2: f32[m, n] = add %1, %p
      yield %2
    }
    store %c, %sum, %im, %in
  }
}
"""

LANE = """\
lane func @copy() {lanes = 8, slots = ["a.data", "b.data", "dim.N"], scratch_bytes = 0} {
  %a: s64 = arg {slot = 3}
  %b: s64 = arg {slot = 4}
  %n: s64 = arg {slot = 5}
  %zero: s64 = s_const {value = 0}
  barrier
  %k: row<f32> = splat_const {value = -0.0}
  %r: row<f32>, %last: s64 = loop %zero, %n, %k, %zero {step = 8} (%i: s64, %s: row<f32>, %c: s64) {
    %left: s64 = s_sub %n, %i
    %m: mask = mask_first %left
    %x: row<f32> = load %a, %i, %m {dtype = :bf16, scale = 2, disp = 0, indexed = true, masked = true}
    store %x, %b, %i, %m {dtype = :f32, scale = 4, indexed = true, masked = true}
    %t: row<f32> = add %s, %x
    yield %t, %i
  }
  if %n {
    fence_streaming
  } {
    barrier
  }
}
"""


def round_trip(function: Function, locations: bool = True) -> str:
    text = print_function(function, locations)
    again = print_function(parse_function(text, TABLES), locations)
    assert again == text
    return text


@pytest.mark.parametrize("text", [MATMUL, LANE])
def test_text_prints_as_it_was_written(text: str) -> None:
    assert print_function(parse_function(text, TABLES)) == text


def test_parsed_structure() -> None:
    f = parse_function(LANE, TABLES)
    assert f.stage == "lane" and f.name == "copy" and f.attributes["lanes"] == 8
    assert f.attributes["slots"] == ["a.data", "b.data", "dim.N"]
    loop = next(op for op in f.walk() if op.name == "loop")
    assert [v.type for v in loop.results] == [ROW_F32, S64]
    assert [v.name for v in loop.blocks[0].arguments] == ["i", "s", "c"]
    load = next(op for op in f.walk() if op.name == "load")
    assert load.attributes["dtype"] is bf16 and load.operands[2].type == MASK
    assert load.operands[0] is f.body.ops[0].result
    constant = next(op for op in f.walk() if op.name == "splat_const")
    assert math.copysign(1, constant.attributes["value"]) == -1
    assert loop.blocks[0].terminator is loop.blocks[0].ops[-1]


def test_names_are_made_unique_in_order() -> None:
    f = Function("f", "tile")
    x = f.add_argument("x", TileType(f32))
    b = Builder(f.body)
    second = b.value("neg", [x], TileType(f32))
    second.name = "x"
    third = b.value("neg", [second], TileType(f32))
    third.name = "x_1"
    fourth = b.value("neg", [third], TileType(f32))
    fifth = b.value("neg", [fourth], TileType(f32))
    fifth.name = "not a name"
    text = round_trip(f)
    assert "%x_1: f32 = neg %x\n" in text
    assert "%x_1_1: f32 = neg %x_1\n" in text
    assert "%1: f32 = neg %x_1_1\n" in text
    assert "%2: f32 = neg %1\n" in text


def test_locations() -> None:
    f = Function("f", "lane", Location('C:\\a "b".py', 1))
    b = Builder(f.body, Location("k.py", 3, 5, 9))
    b.add("if", [b.value("worker", [], S64)], blocks=[Block(), Block()])
    b.location = Location("k.py", 4, 2)
    b.add("barrier", [])
    text = round_trip(f)
    assert 'worker loc("k.py":3:5-9)' in text and 'barrier loc("k.py":4:2)' in text
    parsed = parse_function(text, TABLES)
    assert parsed.location == f.location and parsed.body.ops[0].location == Location("k.py", 3, 5, 9)
    assert "loc(" not in print_function(f)


VALUES = st.recursive(
    st.one_of(
        st.text(max_size=8),
        st.integers(),
        st.floats(),
        st.booleans(),
        st.sampled_from([*DTYPES.values(), b32]),
    ),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=8,
)


def same(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True), VALUES, max_size=4))
@settings(max_examples=examples(200))
def test_attributes_are_exact(attributes: dict[str, object]) -> None:
    f = Function("f", "lane")
    f.attributes = attributes
    f.body.ops.append(Op("barrier", [], attributes=dict(attributes)))
    parsed = parse_function(round_trip(f), TABLES)
    for found in (parsed.attributes, parsed.body.ops[0].attributes):
        assert list(found) == list(attributes)
        assert all(same(attributes[k], found[k]) for k in attributes)


def test_special_floats_and_tuples() -> None:
    f = Function("kernel.m16", "lane")
    f.attributes = {"v": (math.inf, -math.inf, math.nan, -math.nan, -0.0, 1e16, 5e-324, 1e300), "w": ((1, 2), ())}
    text = round_trip(f)
    assert "[inf, -inf, nan, -nan, -0.0, 1e+16, 5e-324, 1e+300]" in text and "[[1, 2], []]" in text
    parsed = parse_function(text, TABLES)
    assert parsed.name == "kernel.m16" and same(f.attributes["v"], parsed.attributes["v"])


def test_odd_function_name_and_types() -> None:
    f = Function("<lambda>", "lane")
    f.add_argument("t", TensorType(f32, ()))
    f.add_argument("u", TensorType(bf16, ("M", 4, "N_1")))
    f.add_argument("c", TensorType(bf16, (("floordiv", "K", 2), ("sub", 0, ("floordiv", ("sub", 0, "K"), 32)),
                                          ("add", ("mul", 2, "H"), -3), ("mod", -1, "K"))))
    f.add_argument("i", TileType(index, ("m", "k_1")))
    f.add_argument("r", ROW_I32)
    parsed = parse_function(round_trip(f), TABLES)
    assert parsed.name == "<lambda>"
    assert [a.type for a in parsed.arguments] == [a.type for a in f.arguments]


def test_what_text_cannot_hold_is_refused() -> None:
    f = Function("f", "lane")
    f.attributes = {"v": {"a": 1}}
    with pytest.raises(TypeError, match="found an attribute value of type dict"):
        print_function(f)


def test_print_op_names_hints() -> None:
    f = parse_function(MATMUL, TABLES)
    contract = next(op for op in f.walk() if op.name == "contract")
    assert print_op(contract) == '%p: f32[m, n] = contract %x, %y {over = ["k"]}'


@pytest.mark.parametrize(
    ("text", "line", "column", "found", "expected"),
    [
        ("", 1, 1, "the end", "a stage"),
        ("warp func @f() {}", 1, 1, "`warp`", "a stage (tile or lane)"),
        ("tile func @f() {\n  frobnicate\n}", 2, 3, "`frobnicate`", "an op of the tile IR"),
        ("tile func @f() {\n  %a: f32 = neg %b\n}", 2, 17, "`%b`", "defined above"),
        ("tile func @f(%a: f32, %a: f32) {}", 1, 23, "`%a`", "not taken"),
        ("tile func @f(%a: f33) {}", 1, 18, "`f33`", "a type"),
        ("tile func @f(%a: f32[]) {}", 1, 22, "`]`", "an axis name"),
        ("tile func @f(%a: tensor<f32, M) {}", 1, 31, "`)`", "`>`"),
        ("tile func @f(%a: tensor<f32, -1>) {}", 1, 30, "`-`", "a dimension"),
        ("tile func @f(%a: tensor<f32, K // >) {}", 1, 35, "`>`", "a dimension"),
        ("tile func @f(%a: tensor<f32, " + "(" * 100, 1, 94, "`(`", "nesting"),
        ("lane func @f() {x = $}", 1, 21, "'$'", "a token"),
        ("lane func @f() {x = 1, x = 2} {}", 1, 24, "`x`", "once"),
        ("lane func @f() {x = 0x} {}", 1, 21, "`0x`", "a number"),
        ("lane func @f() {x = nan(0x1)} {}", 1, 25, "`0x1`", "the bits of a NaN"),
        ('lane func @f() {x = "\\q"} {}', 1, 21, '`"\\q"`', "JSON"),
        ("lane func @f() {x = :f12} {}", 1, 22, "`f12`", "a dtype"),
        ("lane func @f() {x = foo} {}", 1, 21, "`foo`", "an attribute value"),
        ("lane func @f() {x = 1", 1, 22, "the end", "`}`"),
        ("lane func @f() {\n  barrier", 2, 10, "the end", "an op"),
        ("lane func @f() {} {}", 1, 19, "`{`", "the end of the text"),
        ("lane func @f() {x = " + "[" * 100, 1, 86, "`[`", "nesting"),
        ("lane func @f() {x = " + "9" * 2000 + "} {}", 1, 21, "`9999", "at most 1000 digits"),
        ('lane func @f() loc("a":1) {}', 1, 25, "`)`", "`:`"),
        ("lane func @f() {\n  %1: s64 = worker\n  %2: s64 = s_add %1,\n}", 4, 1, "`}`", "an operand"),
    ],
)
def test_errors(text: str, line: int, column: int, found: str, expected: str) -> None:
    with pytest.raises(TextError) as caught:
        parse_function(text, TABLES)
    error = caught.value
    assert (error.line, error.column) == (line, column), str(error)
    assert found in error.found and expected in error.expected, str(error)
    assert f"{line}:{column}: found " in str(error)


def test_deep_blocks_are_refused() -> None:
    text = "lane func @f() {\n  %c: s64 = worker\n" + "  if %c {\n" * 5000
    with pytest.raises(TextError, match="nesting of at most"):
        parse_function(text, TABLES)


def test_a_thousand_malformed_texts() -> None:
    """Each parses, to what prints and parses back, or is refused at a place in the text."""
    def parse(text: str) -> None:
        round_trip(parse_function(text, TABLES))

    found = refusals(mutations([LANE, MATMUL], ("loc(", "tensor", "row")), parse, TextError)
    assert 800 < len(found) < 1000
    assert all(isinstance(e, TextError) and e.line >= 1 and e.column >= 1 and e.found and e.expected for e in found)
