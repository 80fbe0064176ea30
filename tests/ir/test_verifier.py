"""The verifier: good functions pass, and each rule has a function that breaks it."""

from __future__ import annotations

import pytest

from sapper.ir.lane_rules import LANE_RULES
from sapper.ir.nodes import Builder, Function, Location
from sapper.ir.text import parse_function
from sapper.ir.tile_rules import TILE_RULES
from sapper.ir.types import ROW_F32, S64, TileType, f32, index
from sapper.ir.verifier import VerificationError, verify
from sapper.lane.ops import LANE_OPS
from sapper.tile.ops import TILE_OPS

from .test_text import LANE, MATMUL, TABLES

ATTENTION = """\
tile func @softmax(%x: tensor<bf16, M, N>, %t: tensor<i32, M>, %y: tensor<f32, M, N>, %s: f32) {dims = ["M", "N"]} {
  %zero: index = const {value = 0}
  %M: index = dim {name = "M"}
  %N: index = dim {name = "N"}
  whole %zero, %N {axis = "n"}
  %in: index[n] = index {axis = "n"}
  tiles %zero, %M {axes = ["m"], parallel = true} {
    %im: index[m] = index {axis = "m"}
    %ti: i32[m] = load %t, %im
    %far: index[m] = add %ti, %im
    %v: bf16[m, n] = load %x, %ti, %in
    %w: f32[m, n] = cast %v
    %scaled: f32[m, n] = mul %w, %s
    %top: f32[m] = reduce %scaled {kind = "max", over = ["n"]}
    %at: index[m] = reduce %scaled {kind = "argmax", over = ["n"]}
    %d: f32[m, n] = sub %scaled, %top
    %e: f32[m, n] = exp %d
    %c: bool[n, m] = lt %in, %far
    store %y, %e, %im, %in
  }
  %one: index = const {value = 1}
  %r: index, %q: f32 = each %zero, %M, %one, %s {step = 2, count = 1, parallel = false} (%i: index, %a: index, %b: f32)
  {
    %cond: bool = lt %i, %a
    %z: f32 = if %cond {
      yield %b
    } {
      %n: f32 = neg %b
      yield %n
    }
    yield %i, %z
  }
}
"""


def parse(text: str) -> Function:
    return parse_function(text, TABLES)


def check(text: str) -> None:
    function = parse(text)
    verify(function, TABLES[function.stage])


@pytest.mark.parametrize("text", [MATMUL, LANE, ATTENTION])
def test_good_functions_pass(text: str) -> None:
    check(text)


def test_every_op_of_the_tables_has_a_rule() -> None:
    assert set(TILE_RULES) == set(TILE_OPS.rows)
    assert set(LANE_RULES) == set(LANE_OPS.rows)


TILE_FAULTS = [
    # (line in the body, found, expected)
    ("%r: f32[m] = add %x", "1 operands", "2"),
    ("add %x, %x", "0 results", "1"),
    ("%r: f32[m] = add %x, %x {fast = true}", "attribute fast", "only none"),
    ('%r: f32[m] = reduce %x {over = ["m"]}', "no attribute kind", "kind, over"),
    ("%r: f32[m, n] = add %x, %y", None, None),
    ("%r: f32[n, m] = add %x, %y", "f32[n, m]", "f32[m, n]"),
    ("%r: f32[m] = add %x, %h", "f32 and bf16", "equal dtypes"),
    ("%r: index[m] = add %im, %j", None, None),
    ("%r: i32[m] = add %im, %j", "i32[m]", "index[m]"),
    ("%r: i32[m] = exp %j", "dtype i32", "a float"),
    ("%r: f32[m] = mod %x, %x", "dtype f32", "an integer"),
    ("%r: f32[m] = and %x, %x", "dtype f32", "an integer or bool"),
    ("%r: bool[m] = add %p, %p", "dtype bool", "a number"),
    ("%r: bool[m] = and %p, %p", None, None),
    ("%r: bool[m] = not %p", None, None),
    ("%r: f32[m] = lt %x, %x", "f32[m]", "bool[m]"),
    ("%r: f8e4m3[m] = cast %x", None, None),
    ("%r: f8e4m3[m] = cast %x\n%s: f8e4m3[m] = neg %r", "dtype f8e4m3", "computed with"),
    ("%r: f32[m] = select %x, %x, %x", "condition of f32", "bool"),
    ("%r: f32[m] = select %p, %x, %h", "f32 and bf16", "equal"),
    ("%r: f32[n] = select %p, %x, %x", "f32[n]", "f32[m]"),
    ("%r: i32[m] = bitcast %x", None, None),
    ("%r: i64[m] = bitcast %x", "f32 to i64", "one width"),
    ("%r: f32 = cast %x", "(f32)", "f32[m]"),
    ("%r: f32[z] = full %one", "axis z", "in scope"),
    ("%r: f32[m, m] = full %one", "f32[m, m]", "each axis once"),
    ("%r: f32[m] = full %x", "f32[m]", "a scalar"),
    ("%r: f32[m] = const {value = 1.0}", "f32[m]", "a scalar"),
    ("%r: f32 = const {value = 1}", "value 1", "float"),
    ("%r: bool = const {value = 1}", "value 1", "bool"),
    ("%r: i8 = const {value = 128}", "value 128", "-128 to 127"),
    ("%r: u8 = const {value = -1}", "value -1", "0 to 255"),
    ('%r: index = dim {name = "Q"}', "dimension Q", "M, N"),
    ('%r: i32 = dim {name = "M"}', "i32", "index"),
    ('%r: index = dim {name = 1}', "attribute name = 1", "type str"),
    ('%r: index[q] = index {axis = "q"}', "axis q", "m, n"),
    ("%r: f32[m] = load %a, %im", "1 indices", "2, one for each"),
    ("%r: f32[m, n] = load %a, %x, %in", "index 0 of dtype f32", "an integer"),
    ("%r: f32[n, m] = load %a, %im, %in", "f32[n, m]", "f32[m, n]"),
    ("%r: f32[m, n] = load %x, %im, %in", "operand 0 of type f32[m]", "a tensor"),
    ("store %a, %h, %im, %in", "value of bf16", "f32"),
    ("store %a, %x, %in, %in", "axis m", "span all axes"),
    ("%r: f32[m] = add %x, %a", "tensor", "a tile"),
    ('%r: f32 = reduce %x {kind = "sum", over = ["n"]}', "over = ['n']", "axes of the operand"),
    ('%r: f32 = reduce %x {kind = "mean", over = ["m"]}', "'mean'", "sum, max"),
    ('%r: f32 = reduce %x {kind = "sum", over = []}', "[]", "at least one axis"),
    ('%r: f32 = reduce %x {kind = "sum", over = "m"}', "'m'", "a list of axis names"),
    ('%r: f32[m] = reduce %x {kind = "sum", over = ["m"]}', "f32[m]", "(f32)"),
    ('%r: f32 = reduce %x {kind = "argmax", over = ["m"]}', "(f32)", "(index)"),
    ('%r: index = reduce %xy {kind = "argmax", over = ["m", "n"]}', "argmax over", "one axis"),
    ('%r: f32 = contract %x, %h {over = ["m"]}', None, None),
    ('%r: bf16 = contract %h, %h {over = ["m"]}', "(bf16)", "(f32)"),
    ('%r: f32 = contract %x, %j {over = ["m"]}', "f32 and i32", "f64 twice"),
    ('%r: f32 = contract %x, %y {over = ["m"]}', "over = ['m']", "axes of both"),
    ("tiles %zero, %M {axes = [\"m\"], parallel = true} {\n}", "axis m brought", "unique"),
    ("tiles %zero, %M {axes = [\"q\", \"z\"], parallel = true} {\n}", "2 operands", "at least 4"),
    ("tiles %zero, %one {axes = [\"q\"], parallel = true} {\n}", "bound 1 of type f32", "index"),
    ("%r: f32[m] = tiles %zero, %M, %x {axes = [\"q\"], parallel = true} (%c: f32[m]) {\nyield %c\n}",
     "parallel loop that carries", "parallel = false"),
    ("tiles %zero, %M {axes = [\"q\"], parallel = true, ordered = true} {\n}", "ordered and parallel", "one of"),
    ("tiles %zero, %M {axes = [\"q\"], parallel = 1} {\n}", "parallel = 1", "bool"),
    ("%r: f32[m] = tiles %zero, %M, %x {axes = [\"q\"], parallel = false} (%c: f32[m]) {\n}",
     "without yield", "a yield of (f32[m])"),
    ("%r: f32[m] = tiles %zero, %M, %x {axes = [\"q\"], parallel = false} (%c: f32[m]) {\nyield %one\n}",
     "a yield of (f32)", "(f32[m])"),
    ("%r: f32[m] = tiles %zero, %M, %x {axes = [\"q\"], parallel = false} {\nyield %x\n}",
     "block arguments ()", "(f32[m])"),
    ("%r: f32 = tiles %zero, %M, %x {axes = [\"q\"], parallel = false} (%c: f32) {\nyield %c\n}",
     "results (f32)", "(f32[m])"),
    ("tiles %zero, %M {axes = [\"q\"], parallel = true} {\n%iq: index[q] = index {axis = \"q\"}\n}\n"
     "%r: index[q] = index {axis = \"q\"}", "axis q out of scope", "in scope"),
    ("tiles %zero, %M {axes = [\"q\"], parallel = true} {\n%iq: index[q] = index {axis = \"q\"}\n}\n"
     "%r: index[q] = neg %iq", "operand 0 (%iq: index[q])", "defined above"),
    ("each %zero, %M {count = 0, parallel = true} {\n}", "count = 0", "at least 1"),
    ("each %zero, %M {count = 1, parallel = true, step = 0} (%i: index) {\n}", "step = 0", "positive"),
    ("each %zero, %M {count = 1, parallel = true} (%i: i32) {\n}", "(i32)", "(index)"),
    ("if %one {\n} {\n}", "type f32", "bool"),
    ("if %t {\n}", "1 blocks", "2"),
    ("if %t {\nyield %one\n} {\n}", "a yield of (f32)", "()"),
    ("yield", "yield in the function's own block", "nested block"),
    ("if %t {\nyield\n%k: f32 = neg %one\n} {\n}", "yield in the middle", "last op"),
    ('whole %zero, %one {axis = "q"}', "(index, f32)", "(index, index)"),
]

TILE_FRAME = """\
tile func @f(%a: tensor<f32, M, N>, %one: f32, %t: bool) {{dims = ["M", "N"]}} {{
  %zero: index = const {{value = 0}}
  %M: index = dim {{name = "M"}}
  whole %zero, %M {{axis = "m"}}
  whole %zero, %M {{axis = "n"}}
  %im: index[m] = index {{axis = "m"}}
  %in: index[n] = index {{axis = "n"}}
  %x: f32[m] = cast %im
  %h: bf16[m] = cast %im
  %j: i32[m] = cast %im
  %p: bool[m] = cast %im
  %y: f32[n] = cast %in
  %xy: f32[m, n] = add %x, %y
  {}
}}
"""


@pytest.mark.parametrize(("body", "found", "expected"), TILE_FAULTS)
def test_tile_rules(body: str, found: str | None, expected: str | None) -> None:
    faulty(TILE_FRAME.format(body), found, expected)


def faulty(text: str, found: str | None, expected: str | None) -> None:
    if found is None or expected is None:
        check(text)
        return
    with pytest.raises(VerificationError) as caught:
        check(text)
    assert found in caught.value.found, str(caught.value)
    assert expected in caught.value.expected, str(caught.value)


LANE_FRAME = """\
lane func @f() {{lanes = 8, slots = ["a.data"]}} {{
  %s: s64 = arg {{slot = 3}}
  %f: row<f32> = splat_const {{value = 1.0}}
  %i: row<i32> = iota
  %d: row<f64> = splat_const {{value = 1.0}}
  %l: row<i64> = splat %s
  %b: row<b32> = splat %s
  %m: mask = mask_first %s
  {}
}}
"""

LANE_FAULTS = [
    ("%r: s64 = arg {slot = 4}", "slot = 4", "0 to 3"),
    ("%r: s64 = s_const {value = 1.0}", "value = 1.0", "int"),
    ("%r: s64 = s_const {value = 18446744073709551616}", "1844", "64 bits"),
    ("%r: s64 = s_add %s, %i", "(s64, row<i32>)", "(s64, s64)"),
    ('%r: s64 = s_cmp %s, %s {cond = "ult"}', "'ult'", "eq, ne"),
    ("%r: row<f32> = splat %s", "row<f32>", "row<i32>"),
    ("%r: row<f32> = splat_const {value = 1}", "value = 1", "float"),
    ("%r: row<i32> = splat_const {value = 4294967296}", "4294967296", "32 bits"),
    ("%places: row<i32> = iota\n%r: row<f32> = lookup %places {table = [1.0, 2.0]}", "table", "16 floats"),
    ("%r: s64 = lane0 %f", "row<f32>", "row<i32>"),
    ("%r: row<f32> = add %f, %i", "(row<f32>, row<i32>)", "(row<f32>, row<f32>)"),
    ("%r: row<f64> = add %f, %f", "(row<f64>)", "(row<f32>)"),
    ("%r: row<b32> = add %b, %b", "row<b32>", "row<f32>"),
    ("%r: row<i32> = div %i, %i", "row<i32>", "row<f64>"),
    ("%r: row<f32> = fma %f, %f, %f", None, None),
    ("%r: row<i32> = exp %i", "row<i32>", "row<f32>"),
    ("%r: row<f32> = and %f, %f", "row<f32>", "row<b32>"),
    ("%r: row<i32> = shl %i {amount = 32}", "amount = 32", "0 to 31"),
    ("%r: row<i32> = shl %i", "1 operands", "amount"),
    ("%r: row<i32> = shl %i, %i {amount = 1}", "2 operands", "either"),
    ("%r: row<i64> = sar %l, %l", None, None),
    ("%r: row<f32> = idiv %f, %f", "row<f32>", "row<i32>"),
    ('%r: row<i32> = cmp %i, %i {cond = "lt"}', "(row<i32>)", "(mask)"),
    ("%r: row<f32> = select %s, %f, %f", "(s64", "(mask"),
    ("%r: row<f32> = select %m, %f, %f", None, None),
    ("%r: mask = mask_and %m, %s", "(mask, s64)", "(mask, mask)"),
    ("%r: row<f32> = cvt %f", "row<f32> to row<f32>", "different"),
    ("%r: row<i64> = cvt %f {nearest = true}", "row<f32> to row<i64>, nearest", "row<f32> to row<i32>"),
    ("%r: row<f64> = bitcast %f", "row<f32> to row<f64>", "one width"),
    ("%r: row<f32> = round_to %f {dtype = :f32}", "f32", "f16"),
    ("%r: row<f32> = shuffle_xor %f {distance = 8}", "distance = 8", "1 to 7"),
    ("%r: row<f32> = broadcast_lane %f {lane = -1}", "lane = -1", "0 to 7"),
    ("%r: row<f32>, %q: row<f32> = exchange %f, %f {distance = 3}", "distance = 3", "a power of 2"),
    ("%r: row<f32>, %q: row<f32> = exchange %f, %f {distance = 4}", None, None),
    ("%r: row<f64> = load %s {dtype = :f32}", "(row<f64>)", "(row<f32>)"),
    ("%r: row<f32> = load %s {dtype = :i4}", "i4", "bf16"),
    ("%r: row<f32> = load %s {dtype = :f32, scale = 3}", "scale = 3", "1, 2, 4, 8"),
    ("%r: row<f32> = load %s {dtype = :f32, disp = 2147483648}", "disp = 2147483648", "32 bits"),
    ("%r: row<f32> = load %s {dtype = :f32, indexed = true}", "(s64)", "(s64, s64)"),
    ("%r: row<f32> = load %s, %m {dtype = :f32}", "(s64, mask)", "(s64)"),
    ("%r: row<f32> = load %s, %s, %m {dtype = :f32, indexed = true, masked = true, scale = 4}", None, None),
    ("%r: row<f32> = load %s {dtype = :f32, masked = 1}", "masked = 1", "bool"),
    ("%r: row<f32> = load %s {dtype = :bf16, beside = -1}", None, None),
    ("%r: row<f32> = load %s {dtype = :bf16, beside = 2}", "beside = 2", "1 or -1"),
    ("%r: row<f32> = load %s, %m {dtype = :bf16, beside = 1, masked = true}", "masked = True", "no mask"),
    ("%r: row<f32> = gather %s, %l {dtype = :f32}", "row<i64>", "row<i32>"),
    ("%r: row<f32> = gather %s, %i {dtype = :f32, scale = 4}", None, None),
    ("%r: row<f32>, %t: row<f32>, %u: row<f32> = load_run %s {dtype = :f32}", "a run of 3 f32", "a power of 2"),
    ("store_run %s, %f, %f, %f, %f, %f, %f, %f, %f {dtype = :f32}", "a run of 8 f32", "16 bytes at most"),
    ("%r: row<f32>, %t: row<i32> = load_run %s {dtype = :f32}", "(row<f32>, row<i32>) for f32", "row<f32>"),
    ("store_run %f, %f, %f {dtype = :f32}", "an address (row<f32>)", "(s64) without an index"),
    ("store_run %s, %i, %i, %f {dtype = :f32, gathered = true}", "(row<i32>, row<f32>) for f32", "row<f32>"),
    ("%r: row<f32>, %t: row<f32> = load_run %s, %i, %m {dtype = :f32, gathered = true, masked = true}", None, None),
    ("%r: row<f32>, %t: row<f32> = load_run %s, %m {dtype = :f32, masked = true}", "a mask without offsets", "both"),
    ("%r: row<f32>, %t: row<f32> = load_run %s {dtype = :bf16}\nstore_run %s, %t, %r {dtype = :bf16}", None, None),
    ("store %i, %s {dtype = :f32}", "row<i32> for f32", "row<f32>"),
    ("store %f, %s, %m {dtype = :bf16, masked = true}", None, None),
    ("scatter %f, %s, %i {dtype = :f32}", None, None),
    ("scatter %f, %s, %s {dtype = :f32}", "(s64, s64)", "(s64, row<i32>)"),
    ("%r: s64 = s_load %s {dtype = :f32}", "f32", "i8"),
    ("s_store %f, %s {dtype = :i32}", "row<f32>", "s64"),
    ("prefetch %s {level = 4}", "level = 4", "1, 2, 3"),
    ("prefetch %s {write = 1}", "write", "bool"),
    ("%r: row<f32> = dot2_bf16 %f, %b, %f", "row<f32>)", "row<b32>)"),
    ("%r: row<b32> = widen_bytes %b {dtype = :i16, odd = true}", "i16", "i8, u8"),
    ("%r: row<i32> = dot2_i16 %f, %b, %b", "row<f32>", "row<i32>"),
    ("%r: row<b32> = pairs_u8i8 %b, %i", "row<i32>", "row<b32>"),
    ("signal_start %s {arrivals = 0}", "arrivals = 0", "1 or more"),
    ("signal_expect %s {bytes = 16}\nsignal_arrive %s\nsignal_wait %s, %s\nsignal_fence", None, None),
    ("signal_wait %s, %i", "(s64, row<i32>)", "(s64, s64)"),
    ("tensor_copy %s, %s, %s {map = 0}", "map = 0", "one of the 0 maps"),
    ("register_budget {registers = 44, more = true}", "registers = 44", "a multiple of 8 from 24 to 256"),
    ("%r: row<f32> = group_wait %f {pending = 0}", None, None),
    ("%r: row<f32> = group_wait %f {pending = -1}", "pending = -1", "from 0"),
    ("%r: row<f32>, %t: row<f32>, %u: row<f32>, %v: row<f32> = group_multiply %s, %s, %f, %f, %f, %f {dtype = :bf16, "
     "left_rows = true, right_rows = false}", "right_panel_bytes = None", "int"),
    ("%r: row<f32>, %t: row<f32>, %u: row<f32>, %v: row<f32> = group_multiply %s, %s, %f, %f, %f, %f {dtype = :f32, "
     "left_rows = true, right_rows = true}", "f32", "bf16, f16"),
    ("loop %s, %s {step = 0} (%k: s64) {\n}", "step = 0", "positive"),
    ("loop %s, %s {step = 1} {\n}", "block arguments ()", "(s64)"),
    ("%r: row<f32> = loop %s, %s, %f {step = 1} (%k: s64, %c: row<f32>) {\nyield %i\n}", "(row<i32>)", "(row<f32>)"),
    ("%r: row<f32> = loop %s, %s, %f {step = 1} (%k: s64, %c: row<f32>) {\nyield %c\n}", None, None),
    ("if %m {\n} {\n}", "type mask", "s64"),
    ("tasks %s {counter = 8} (%k: s64) {\n}", "counter = 8", "0 to 7"),
    ("tasks %s {counter = 0} (%k: s64) {\nbarrier\n}", "a barrier inside tasks", "outside"),
    ("barrier {reset = 8}", "reset = 8", "0 to 7"),
    ("tasks %s {counter = 0} (%k: s64) {\ntasks %k {counter = 1} (%j: s64) {\n}\n}", "tasks inside", "no other"),
]


@pytest.mark.parametrize(("body", "found", "expected"), LANE_FAULTS)
def test_lane_rules(body: str, found: str | None, expected: str | None) -> None:
    faulty(LANE_FRAME.format(body), found, expected)


@pytest.mark.parametrize(
    ("text", "found", "expected"),
    [
        ("lane func @f() {}", "lanes = None", "power of 2"),
        ("lane func @f() {lanes = 3} {}", "lanes = 3", "power of 2"),
        ("lane func @f(%a: s64) {lanes = 4} {}", "1 arguments", "none"),
        ("lane func @f() {lanes = 4, slots = [1]} {}", "slots", "list of strings"),
        ("lane func @f() {lanes = 4, scratch_bytes = -1} {}", "scratch_bytes", "size in bytes"),
        ("tile func @f(%a: f32[m]) {}", "argument %a", "a tensor or a scalar"),
        ("tile func @f(%a: row<f32>) {}", "argument %a", "a tensor or a scalar"),
    ],
)
def test_function_rules(text: str, found: str, expected: str) -> None:
    faulty(text, found, expected)


def test_wrong_stage() -> None:
    with pytest.raises(VerificationError, match="found stage tile; expected lane"):
        verify(parse(MATMUL), LANE_OPS)


def test_structural_damage_is_found() -> None:
    """What text cannot say: a value used before its definition, one op in two places, a foreign owner."""
    f = Function("f", "tile")
    x = f.add_argument("x", TileType(f32))
    build = Builder(f.body, Location("k.py", 7, 3))
    a = build.value("neg", [x], TileType(f32))
    build.value("neg", [a], TileType(f32))
    verify(f, TILE_OPS)
    f.body.ops.reverse()
    with pytest.raises(VerificationError, match="not defined here") as caught:
        verify(f, TILE_OPS)
    assert "at k.py:7:3" in str(caught.value) and "neg" in str(caught.value)
    f.body.ops.reverse()
    f.body.ops.append(f.body.ops[0])
    with pytest.raises(VerificationError, match="defined twice"):
        verify(f, TILE_OPS)
    f.body.ops.pop()
    f.body.ops[0].results[0].owner = None
    with pytest.raises(VerificationError, match="owned by None"):
        verify(f, TILE_OPS)


def test_unknown_op_and_unprintable_attribute() -> None:
    f = Function("f", "lane")
    f.attributes = {"lanes": 4}
    build = Builder(f.body)
    build.value("twist", [], S64)
    with pytest.raises(VerificationError, match="found op twist; expected an op of the lane IR"):
        verify(f, LANE_OPS)
    f.body.ops.clear()
    build.value("splat_const", [], ROW_F32, value={})
    with pytest.raises(VerificationError, match=r"found attribute value = \{\}; expected a value of type float"):
        verify(f, LANE_OPS)
    f.body.ops.clear()
    build.value("splat_const", [], TileType(index), value=0)
    with pytest.raises(VerificationError, match="found a result of type index; expected one of row<f32>"):
        verify(f, LANE_OPS)
