"""The canonical form of tile IR: each rule where it applies, and where it must not."""

from __future__ import annotations

import pytest

from sapper.ir.nodes import Function
from sapper.ir.rewriter import count_fires
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import verify
from sapper.tile.canonical import CANONICAL, canonicalize
from sapper.tile.ops import TILE_OPS
from sapper.tile.reduce_loops import reduce_loops

FRAME = """\
tile func @f(%a: tensor<bf16, M, K>, %b: tensor<bf16, K, N>, %g: tensor<f32, M, K>, %q: tensor<i8, M, K>,
             %o: tensor<f32, M, N>, %v: tensor<f32, M, K>, %p: i32, %t: bool) {
  %zero: index = const {value = 0}
  %M: index = dim {name = "M"}
  whole %zero, %M {axis = "m"}
  whole %zero, %M {axis = "n"}
  whole %zero, %M {axis = "k"}
  %im: index[m] = index {axis = "m"}
  %in: index[n] = index {axis = "n"}
  %ik: index[k] = index {axis = "k"}
  %x: bf16[m, k] = load %a, %im, %ik
  %y: bf16[k, n] = load %b, %ik, %in
  %z: f32[m, k] = load %g, %im, %ik
  %c: i8[m, k] = load %q, %im, %ik
"""


def canonical(body: str) -> tuple[list[str], dict[str, int]]:
    function: Function = parse_function(FRAME + body + "\n}", {"tile": TILE_OPS})
    verify(function, TILE_OPS)
    counts: dict[str, int] = {}
    fires = canonicalize(function, count_fires(counts))
    verify(function, TILE_OPS)
    assert fires == sum(counts.values())
    return [line.strip() for line in print_function(function).splitlines()[1:-1]], counts


STORE_MN, STORE_MK = "\nstore %o, %r, %im, %in", "\nstore %v, %r, %im, %ik"
WIDE = "%wx: f32[m, k] = cast %x\n%wy: f32[k, n] = cast %y\n"
ONE = "%f: f32 = const {value = 1.0}\n"


@pytest.mark.parametrize(
    ("rule", "body", "left"),
    [
        ("sum-of-product", WIDE + "%d: f32[m, k, n] = mul %wx, %wy\n%r: f32[m, n] = reduce %d {kind = \"sum\", "
         'over = ["k"]}' + STORE_MN, '%r: f32[m, n] = contract %x, %y {over = ["k"]}'),
        ("contract-narrow", WIDE + '%r: f32[m, n] = contract %wx, %wy {over = ["k"]}' + STORE_MN,
         '%r: f32[m, n] = contract %x, %y {over = ["k"]}'),
        ("contract-narrow", WIDE + '%r: f32[m, n] = contract %z, %wy {over = ["k"]}' + STORE_MN,
         '%r: f32[m, n] = contract %z, %y {over = ["k"]}'),
        ("sum-of-product", "%w: i32[m, k] = cast %c\n%d: i32[m, k] = mul %w, %w\n%s: i32[m] = reduce %d {kind = "
         '"sum", over = ["k"]}\n%r: f32[m] = cast %s' + STORE_MN, '%s: i32[m] = contract %c, %c {over = ["k"]}'),
        ("cast-of-cast", "%w: f32[m, k] = cast %x\n%n: bf16[m, k] = cast %w\n%r: f32[m, k] = cast %n" + STORE_MK,
         "%r: f32[m, k] = cast %x"),
        ("cast-of-cast", "%w: f64[m, k] = cast %x\n%r: f32[m, k] = cast %w" + STORE_MK, "%r: f32[m, k] = cast %x"),
        ("cast-of-cast", "%w: i32[m, k] = cast %c\n%r: f32[m, k] = cast %w" + STORE_MK, "%r: f32[m, k] = cast %c"),
        ("cast-of-cast", "%r: f32[m, k] = cast %z" + STORE_MK, "store %v, %z, %im, %ik"),
        ("neutral-operand", ONE + "%r: f32[m, k] = mul %f, %z" + STORE_MK, "store %v, %z, %im, %ik"),
        ("neutral-operand", ONE + "%u: f32[m, k] = full %f\n%r: f32[m, k] = div %z, %u" + STORE_MK,
         "store %v, %z, %im, %ik"),
        ("neutral-operand", "%f: f32 = const {value = -0.0}\n%r: f32[m, k] = add %z, %f" + STORE_MK,
         "store %v, %z, %im, %ik"),
        ("neutral-operand", "%f: f32 = const {value = 0.0}\n%r: f32[m, k] = sub %z, %f" + STORE_MK,
         "store %v, %z, %im, %ik"),
        ("neutral-operand", "%i: index[m] = add %im, %zero\nstore %v, %z, %i, %ik", "store %v, %z, %im, %ik"),
        ("fold-constants", "%i: index = const {value = 7}\n%j: index = const {value = -2}\n"
         "%h: index = floordiv %i, %j\n%l: index[m] = add %im, %h\nstore %v, %z, %l, %ik",
         "%h: index = const {value = -4}"),
        ("fold-constants", "%i: i8 = const {value = 127}\n%j: i8 = add %i, %i\n%w: f32 = cast %j\n"
         "%r: f32[m, k] = mul %z, %w" + STORE_MK, "%j: i8 = const {value = -2}"),
        ("fold-constants", "%i: index = const {value = 7}\n%h: bool = lt %i, %zero\n%s: f32 = cast %h\n"
         "%r: f32[m, k] = mul %z, %s" + STORE_MK,
         "%h: bool = const {value = false}"),
        ("select-known", "%h: bool = const {value = true}\n%w: f32[m, k] = neg %z\n%r: f32[m, k] = select %h, %w, %z"
         + STORE_MK, "store %v, %w, %im, %ik"),
        ("select-known", "%r: f32[m, k] = select %t, %z, %z" + STORE_MK, "store %v, %z, %im, %ik"),
        ("if-known", "%h: bool = const {value = false}\n%r: f32[m, k] = if %h {\nyield %z\n} {\n"
         "%w: f32[m, k] = exp %z\nyield %w\n}" + STORE_MK, "store %v, %w, %im, %ik"),
        ("twice", "%w: f32[m, k] = neg %z\n%r: f32[m, k] = neg %w" + STORE_MK, "store %v, %z, %im, %ik"),
    ],
)
def test_rules(rule: str, body: str, left: str) -> None:
    lines, counts = canonical(body)
    assert counts.get(rule, 0) > 0, counts
    assert left in lines, "\n".join(lines)


def test_every_rule_is_tested() -> None:
    tested = {case[0] for case in test_rules.pytestmark[0].args[1]}
    assert tested == {r.name for there in CANONICAL.by_op.values() for r in there}


@pytest.mark.parametrize(
    "body",
    [
        # bf16 products are rounded to bf16 before the sum
        '%d: bf16[m, k, n] = mul %x, %y\n%s: bf16[m, n] = reduce %d {kind = "sum", over = ["k"]}\n'
        "%r: f32[m, n] = cast %s" + STORE_MN,
        # k is in one factor only
        '%s: f32[m] = reduce %z {kind = "sum", over = ["k"]}\n%w: f32[n] = cast %in\n%d: f32[m, k, n] = mul %z, %w\n'
        '%r: f32[m, n] = reduce %d {kind = "sum", over = ["k"]}' + STORE_MN,
        '%d: f32[m, k] = mul %z, %z\n%s: f32[m] = reduce %d {kind = "max", over = ["k"]}\nstore %v, %s, %im, %ik',
        # casts that lose something, or round twice where one would not
        "%w: bf16[m, k] = cast %z\n%r: f32[m, k] = cast %w" + STORE_MK,
        "%w: i32[m, k] = cast %z\n%r: f32[m, k] = cast %w" + STORE_MK,
        "%w: f64 = cast %p\n%h: bf16 = cast %w\n%s: f32 = cast %h\n%r: f32[m, k] = mul %z, %s" + STORE_MK,
        # -0.0 + 0.0 is 0.0
        "%f: f32 = const {value = 0.0}\n%r: f32[m, k] = add %z, %f" + STORE_MK,
        "%f: f32 = const {value = -0.0}\n%r: f32[m, k] = sub %z, %f" + STORE_MK,
        # 0 - x is not x, 1 / x is not x
        "%f: f32 = const {value = 1.0}\n%r: f32[m, k] = div %f, %z" + STORE_MK,
        # the neutral operand brings an axis along
        "%f: f32 = const {value = 1.0}\n%u: f32[k] = full %f\n%w: f32[m] = cast %im\n%r: f32[m, k] = mul %w, %u"
        + STORE_MK,
        # a division by 0 stays undefined where it stands
        "%i: index = const {value = 7}\n%h: index = mod %i, %zero\n%l: index[m] = add %im, %h\nstore %v, %z, %l, %ik",
    ],
)
def test_what_stays(body: str) -> None:
    lines, counts = canonical(body)
    assert counts == {}, "\n".join(lines)


def test_dead_ops_go() -> None:
    lines, _ = canonical("store %v, %z, %im, %ik")
    assert [(line.split(" = ")[1] if line.startswith("%") else line).split(" ")[0] for line in lines] == [
        "const", "dim", "whole", "whole", "whole", "index", "index", "load", "store"]


def test_a_reduction_keeps_the_order_of_its_axes() -> None:
    """A sum that starts at zero is its part alone only where the axes stand in the same order."""
    function = parse_function(FRAME + """\
  %f: f32 = const {value = 0.0}
  %start: f32[k, m] = full %f
  %total: f32[k, m] = tiles %zero, %M, %start {axes = ["j"], parallel = false} (%acc: f32[k, m]) {
    %ij: index[j] = index {axis = "j"}
    %l: f32[m, j] = load %g, %im, %ij
    %w: f32[m, j, k] = add %l, %z
    %s: f32[m, k] = reduce %w {kind = "sum", over = ["j"]}
    %next: f32[k, m] = add %acc, %s
    yield %next
  }
  %d: f32[k, m] = neg %total
  store %v, %d, %im, %ik
}""", {"tile": TILE_OPS})
    verify(function, TILE_OPS)
    reduce_loops(function)
    verify(function, TILE_OPS)
    assert "tiles" not in print_function(function)
