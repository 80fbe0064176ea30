"""Lane simplification: each rule at work, and random programs that mean the same afterwards."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ir.nodes import Block, Builder, Function, Value
from sapper.ir.rewriter import count_fires
from sapper.ir.text import parse_function, print_function
from sapper.ir.types import MASK, ROW_F32, ROW_I32, S64, Type
from sapper.ir.types import f16 as F16
from sapper.ir.types import f32 as F32
from sapper.ir.types import i32 as I32
from sapper.ir.verifier import verify
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.ops import LANE_OPS
from sapper.lane.simplify import ADDRESS, FOLD, eliminate_common, hoist, simplify
from sapper.lane.strength import reduce_strength, split_blocks
from tests.strategies import examples

TABLES = {"lane": LANE_OPS}


def parse(body: str) -> Function:
    function = parse_function('lane func @f() {lanes = 8, slots = ["x.data", "n"]} {\n' + body + "\n}", TABLES)
    verify(function, LANE_OPS)
    return function


def simplified(body: str) -> tuple[list[str], dict[str, int]]:
    function = parse(body)
    counts: dict[str, int] = {}
    simplify(function, count_fires(counts))
    verify(function, LANE_OPS)
    return [line.strip() for line in print_function(function).splitlines()[1:-1]], counts


HEAD = "%x: s64 = arg {slot = 3}\n%n: s64 = arg {slot = 4}\n"
C = "".join([f"%c{n}: s64 = s_const {{value = {n}}}\n" for n in (0, 1, 2, 3, 4, 8, 16)])


@pytest.mark.parametrize(
    ("rule", "body", "left"),
    [
        ("scalar-constants", "%r: s64 = s_mul %c3, %c4\ns_store %r, %x {dtype = :i64}",
         "%r: s64 = s_const {value = 12}"),
        ("scalar-constants", '%r: s64 = s_cmp %c3, %c4 {cond = "lt"}\ns_store %r, %x {dtype = :i64}',
         "%c1: s64 = s_const {value = 1}"),
        ("scalar-neutral", "%r: s64 = s_mul %c1, %n\ns_store %r, %x {dtype = :i64}", "s_store %n, %x {dtype = :i64}"),
        ("scalar-neutral", "%r: s64 = s_mul %n, %c0\ns_store %r, %x {dtype = :i64}", "s_store %c0, %x {dtype = :i64}"),
        ("add-constants-outward", "%a: s64 = s_add %c3, %n\n%b: s64 = s_add %a, %c4\ns_store %b, %x {dtype = :i64}",
         "%b: s64 = s_add %n, %1"),
        ("subtract-constant", "%a: s64 = s_sub %n, %c3\ns_store %a, %x {dtype = :i64}", "%a: s64 = s_add %n, %1"),
        ("subtract-constant", "%a: s64 = s_sub %n, %n\ns_store %a, %x {dtype = :i64}",
         "s_store %c0, %x {dtype = :i64}"),
        ("scale-sum", "%a: s64 = s_add %n, %c3\n%b: s64 = s_mul %a, %c8\n%p: s64 = s_add %x, %b\n"
         "s_store %n, %p {dtype = :i64}", "s_store %n, %x, %n {dtype = :i64, disp = 24, indexed = true, scale = 8}"),
        ("scale-sum", "%a: s64 = s_mul %n, %c3\n%b: s64 = s_shl %a, %c2\ns_store %b, %x {dtype = :i64}",
         "%b: s64 = s_mul %n, %1"),
        ("scalar-select-known", "%a: s64 = s_select %c0, %x, %n\ns_store %a, %x {dtype = :i64}",
         "s_store %n, %x {dtype = :i64}"),
        ("splat-constant", "%a: row<i32> = splat %c3\nstore %a, %x {dtype = :i32}",
         "%a: row<i32> = splat_const {value = 3}"),
        ("if-known", "%a: s64 = if %c1 {\nyield %n\n} {\nyield %x\n}\ns_store %a, %x {dtype = :i64}",
         "s_store %n, %x {dtype = :i64}"),
        ("loop-known", "%a: s64 = loop %c4, %c4, %n {step = 1} (%i: s64, %c: s64) {\nyield %i\n}\n"
         "s_store %a, %x {dtype = :i64}", "s_store %n, %x {dtype = :i64}"),
        ("loop-known", "%a: s64 = loop %c4, %c8, %n {step = 4} (%i: s64, %c: s64) {\nyield %i\n}\n"
         "s_store %a, %x {dtype = :i64}", "s_store %c4, %x {dtype = :i64}"),
        ("row-neutral", "%a: row<f32> = load %x {dtype = :f32}\n%o: row<f32> = splat_const {value = 1.0}\n"
         "%b: row<f32> = mul %o, %a\nstore %b, %x {dtype = :f32}", "store %a, %x {dtype = :f32}"),
        *[("row-constants", f"%a: row<i32> = splat_const {{value = {a}}}\n%b: row<i32> = splat_const {{value = {b}}}\n"
           f"%r: row<i32> = {name} %a, %b\nstore %r, %x {{dtype = :i32}}",
           f"%r: row<i32> = splat_const {{value = {c}}}")
          for name, a, b, c in (("add", 2147483647, 5, -2147483644), ("sub", 3, 8, -5), ("mul", 65535, 65537, -1))],
        *[("shift-by-constant", "%a: row<i32> = load %x {dtype = :i32}\n%b: row<i32> = splat_const {value = 12}\n"
           f"%r: row<i32> = {name} %a, %b\nstore %r, %x {{dtype = :i32}}", f"%r: row<i32> = {name} %a {{amount = 12}}")
          for name in ("shl", "shr", "sar")],
        ("shift-by-constant", "%a: row<i32> = load %x {dtype = :i32}\n%b: row<i32> = splat_const {value = 0}\n"
         "%r: row<i32> = sar %a, %b\nstore %r, %x {dtype = :i32}", "store %a, %x {dtype = :i32}"),
        ("row-select-same", "%a: row<f32> = load %x {dtype = :f32}\n%m: mask = mask_first %n\n"
         "%b: row<f32> = select %m, %a, %a\nstore %b, %x {dtype = :f32}", "store %a, %x {dtype = :f32}"),
        ("mask-full", "%m: mask = mask_first %n\n%l: mask = mask_first %c16\n%k: mask = mask_and %l, %m\n"
         "%a: row<i32> = mask_to_row %k\nstore %a, %x {dtype = :i32}", "%a: row<i32> = mask_to_row %m"),
        ("drop-full-mask", "%m: mask = mask_first %c8\n%a: row<f32> = load %x, %m {dtype = :f32, masked = true}\n"
         "store %a, %x {dtype = :f32}", "%a: row<f32> = load %x {dtype = :f32, masked = false}"),
        ("store-rounds", "%a: row<f32> = load %x {dtype = :f32}\n%b: row<f32> = round_to %a {dtype = :bf16}\n"
         "store %b, %x {dtype = :bf16}", "store %a, %x {dtype = :bf16}"),
        ("store-wraps", "%a: row<i32> = load %x {dtype = :i32}\n%b: row<i32> = shl %a {amount = 24}\n"
         "%d: row<i32> = sar %b {amount = 24}\nstore %d, %x {dtype = :i8}", "store %a, %x {dtype = :i8}"),
        ("store-wraps", "%a: row<i32> = load %x {dtype = :i32}\n%b: row<i32> = splat_const {value = 255}\n"
         "%d: row<i32> = and %a, %b\nstore_lane0 %d, %x {dtype = :u8}", "store_lane0 %a, %x {dtype = :u8}"),
        ("store-scalar", "%a: row<i32> = splat %n\nstore_lane0 %a, %x {dtype = :i16}", "s_store %n, %x {dtype = :i16}"),
        ("store-scalar-wraps", "%h: s64 = s_const {value = 32}\n%a: s64 = s_shl %n, %h\n%b: s64 = s_sar %a, %h\n"
         "s_store %b, %x {dtype = :i32}", "s_store %n, %x {dtype = :i32}"),
        ("convert-rounded", "%a: row<f32> = load %x {dtype = :f32}\n%b: row<f32> = round %a\n"
         "%d: row<i32> = cvt %b\nstore %d, %x {dtype = :i32}", "%d: row<i32> = cvt %a {nearest = true}"),
        ("displacement", "%p: s64 = s_add %x, %c16\n%a: row<f32> = load %p {dtype = :f32, disp = 4}\n"
         "store %a, %x {dtype = :f32}", "%a: row<f32> = load %x {dtype = :f32, disp = 20}"),
        ("displacement", "%i: s64 = s_add %n, %c3\ns_store %n, %x, %i {dtype = :i64, scale = 8, indexed = true}",
         "s_store %n, %x, %n {dtype = :i64, scale = 8, indexed = true, disp = 24}"),
        ("displacement", "s_store %n, %x, %c3 {dtype = :i64, scale = 8, indexed = true}",
         "s_store %n, %x {dtype = :i64, scale = 1, indexed = false, disp = 24}"),
        ("displacement", "%i: row<i32> = iota\n%p: s64 = s_add %x, %c16\n%a: row<f32> = gather %p, %i {dtype = :f32}\n"
         "store %a, %x {dtype = :f32}", "%a: row<f32> = gather %x, %i {dtype = :f32, disp = 16}"),
        ("scale", "%i: s64 = s_shl %n, %c2\n%p: s64 = s_add %i, %x\ns_store %n, %p {dtype = :i32}",
         "s_store %n, %x, %n {dtype = :i32, indexed = true, scale = 4}"),
        ("scale", "%i: s64 = s_mul %n, %c4\ns_store %n, %x, %i {dtype = :i64, scale = 2, indexed = true}",
         "s_store %n, %x, %n {dtype = :i64, scale = 8, indexed = true}"),
    ],
)
def test_rules(rule: str, body: str, left: str) -> None:
    lines, counts = simplified(HEAD + C + body)
    assert counts.get(rule, 0) > 0, counts
    assert left in lines, "\n".join(lines)


def test_every_rule_is_tested() -> None:
    tested = {mark.args[1][n][0] for mark in test_rules.pytestmark for n in range(len(mark.args[1]))}
    assert tested == {r.name for rules in (FOLD, ADDRESS) for there in rules.by_op.values() for r in there}


def test_what_does_not_fit_stays() -> None:
    lines, _ = simplified(HEAD + "%b: s64 = s_const {value = 2147483647}\n%p: s64 = s_add %x, %b\n"
                          "s_store %n, %p {dtype = :i64, disp = 8}")
    assert lines[-1] == "s_store %n, %p {dtype = :i64, disp = 8}"
    lines, _ = simplified(HEAD + C + "%p: s64 = s_mul %n, %c16\n%q: s64 = s_add %x, %p\ns_store %n, %q {dtype = :i64}")
    assert lines[-1] == "s_store %n, %q {dtype = :i64}"
    lines, _ = simplified(HEAD + C + "%p: s64 = s_floordiv %n, %c0\ns_store %p, %x {dtype = :i64}")
    assert "%p: s64 = s_floordiv %n, %c0" in lines
    cut = ("%a: row<i32> = load %x {dtype = :i32}\n%b: row<i32> = shl %a {amount = 24}\n"
           "%d: row<i32> = sar %b {amount = 24}\n")
    for dtype in ("i16", "i32"):
        lines, _ = simplified(HEAD + cut + f"store %d, %x {{dtype = :{dtype}}}")
        assert lines[-1] == f"store %d, %x {{dtype = :{dtype}}}"
    lines, _ = simplified(HEAD + "%h: s64 = s_const {value = 32}\n%a: s64 = s_shl %n, %h\n%b: s64 = s_sar %a, %h\n"
                          "s_store %b, %x {dtype = :i64}")
    assert lines[-1] == "s_store %b, %x {dtype = :i64}"
    lines, _ = simplified(HEAD + "%a: row<f64> = load %x {dtype = :f64}\n%b: row<f64> = round %a\n"
                          "%d: row<i32> = cvt %b\nstore %d, %x {dtype = :i32}")
    assert "%d: row<i32> = cvt %b" in lines


def test_float_zero_is_not_neutral_and_not_minus_zero() -> None:
    lines, counts = simplified(HEAD + "%a: row<f32> = load %x {dtype = :f32}\n"
                               "%z: row<f32> = splat_const {value = 0.0}\n%m: row<f32> = splat_const {value = -0.0}\n"
                               "%b: row<f32> = add %a, %z\n%c: row<f32> = mul %b, %m\nstore %c, %x {dtype = :f32}")
    assert counts == {} and len(lines) == 7


def test_common_subexpressions_respect_scopes() -> None:
    function = parse(HEAD + """
    %a: s64 = s_add %x, %n
    if %n {
      %b: s64 = s_add %n, %x
      %c: s64 = s_mul %b, %n
      s_store %c, %x {dtype = :i64}
    } {
      %d: s64 = s_mul %a, %n
      s_store %d, %x {dtype = :i64}
    }
    %e: s64 = s_mul %a, %n
    s_store %e, %x {dtype = :i64}
    """)
    assert eliminate_common(function) == 1
    verify(function, LANE_OPS)
    names = [op.name for op in function.walk()]
    assert names.count("s_add") == 1 and names.count("s_mul") == 3


def test_loads_are_not_merged() -> None:
    lines, _ = simplified(HEAD + "%a: row<f32> = load %x {dtype = :f32}\n%b: row<f32> = add %a, %a\n"
                          "store %b, %x {dtype = :f32}\n%c: row<f32> = load %x {dtype = :f32}\n"
                          "store %c, %x {dtype = :f32, disp = 32}\n%dead: row<f32> = load %x {dtype = :f32}")
    assert sum("load" in line for line in lines) == 2


def test_hoisting() -> None:
    function = parse(HEAD + """
    loop %x, %n {step = 1} (%i: s64) {
      loop %x, %n {step = 1} (%j: s64) {
        %a: s64 = s_add %x, %n
        %b: s64 = s_add %a, %i
        %c: s64 = s_add %b, %j
        %q: s64 = s_floordiv %a, %n
        %k: row<f32> = splat_const {value = 2.0}
        store %k, %c {dtype = :f32}
        s_store %q, %c {dtype = :i64}
      }
    }
    """)
    assert hoist(function) == 5
    verify(function, LANE_OPS)
    top = [op.name for op in function.body.ops]
    outer = function.body.ops[-1].blocks[0]
    inner = outer.ops[-1].blocks[0]
    assert top == ["arg", "arg", "s_add", "splat_const", "loop"]
    assert [op.name for op in outer.ops] == ["s_add", "loop"]
    assert [op.name for op in inner.ops] == ["s_add", "s_floordiv", "store", "s_store"]


def steady(stop: str, dtype: str = "f16") -> Function:
    """A loop that reads twice what it does not store to, and what it does."""
    function = parse_function('lane func @f() {lanes = 8, slots = ["x.data", "n", "y.data"], steady = ["x.data"]} {'
                              + HEAD + f"""
    %y: s64 = arg {{slot = 5}}
    %c0: s64 = s_const {{value = 0}}
    %c4: s64 = s_const {{value = 4}}
    %a: s64 = s_add %x, %n
    loop %c0, {stop} {{step = 1}} (%i: s64) {{
      %p: row<f32> = load %a {{dtype = :{dtype}}}
      %q: row<f32> = load %a {{dtype = :{dtype}}}
      %r: row<f32> = load %y {{dtype = :f32}}
      %s: row<f32> = fma %p, %q, %r
      store %s, %y {{dtype = :f32}}
    }}
    }}""", TABLES)
    verify(function, LANE_OPS)
    return function


@pytest.mark.parametrize(("stop", "dtype", "outside", "inside"), [
    ("%c4", "f16", 1, 1),   # and what is stored to stays
    ("%n", "f16", 0, 2),    # which may not run at all
    ("%c4", "f32", 0, 3),   # of which products take one from memory
])
def test_what_is_never_stored_to_is_read_once(stop: str, dtype: str, outside: int, inside: int) -> None:
    function = steady(stop, dtype)
    simplify(function)
    verify(function, LANE_OPS)
    names = [[op.name for op in ops] for ops in (function.body.ops, function.body.ops[-1].blocks[0].ops)]
    assert [found.count("load") for found in names] == [outside, inside]


def test_an_invariant_address_stays_out_of_the_operand() -> None:
    lines, _ = simplified(HEAD + C + """
    loop %c0, %n {step = 1} (%i: s64) {
      %p: s64 = s_mul %n, %c4
      %q: s64 = s_add %x, %p
      s_store %i, %q {dtype = :i32}
    }""")
    assert "s_store %i, %q {dtype = :i32}" in lines and lines.index("%q: s64 = s_add %x, %p") < len(lines) - 3


def test_unrolled_addresses_share_their_variable_part() -> None:
    body = HEAD + C + "loop %c0, %n {step = 4} (%i: s64) {\n"
    for k in range(4):
        body += (f"%k{k}: s64 = s_const {{value = {k}}}\n%i{k}: s64 = s_add %i, %k{k}\n%m{k}: s64 = s_mul %i{k}, %c16\n"
                 f"%p{k}: s64 = s_add %x, %m{k}\ns_store %i, %p{k} {{dtype = :i64}}\n")
    lines, _ = simplified(body + "}")
    inside = lines[next(n for n, line in enumerate(lines) if line.startswith("loop")) + 1 : -1]
    assert [line.split(" = ")[1].split()[0] for line in inside[:2]] == ["s_mul", "s_add"]
    stores = [f"s_store %i, %1 {{dtype = :i64{f', disp = {16 * k}' if k else ''}}}" for k in range(4)]
    assert [line.replace(inside[1].split(":")[0], "%1") for line in inside[2:]] == stores


# Random programs.


class Generator:
    """Random lane programs that store to two buffers, inside their bounds, and only read numbers of f16 in a third."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.function = Function("f", "lane")
        self.function.attributes = {"lanes": 4, "slots": ["x.data", "y.data", "scalar.n", "w.data"],
                                    "steady": ["w.data"]}
        build = Builder(self.function.body)
        self.x, self.y, n, self.w = (build.value("arg", [], S64, slot=3 + k) for k in range(4))
        self.block(build, [n, build.value("s_const", [], S64, value=3)], [build.value("iota", [], ROW_I32)],
                   [build.value("splat_const", [], ROW_F32, value=1.0)], [build.value("mask_first", [n], MASK)], 0)

    def pick(self, values: list[Value]) -> Value:
        return values[self.draw(st.integers(0, len(values) - 1))]

    def address(self, build: Builder, scalars: list[Value]) -> tuple[Value, list[Value], dict[str, object]]:
        """Within 8 rows of 16 bytes: base + (s & 7) * 16 written in one of several ways."""
        seven = build.value("s_const", [], S64, value=7)
        small = build.value("s_and", [self.pick(scalars), seven], S64)
        way = self.draw(st.integers(0, 3))
        if way == 0:
            amount = build.value("s_const", [], S64, value=4)
            return build.value("s_add", [self.x, build.value("s_shl", [small, amount], S64)], S64), [], {}
        if way == 1:
            two = build.value("s_const", [], S64, value=2)
            return self.x, [build.value("s_mul", [small, two], S64)], {"indexed": True, "scale": 8}
        if way == 2:
            three = build.value("s_const", [], S64, value=3)
            part = build.value("s_and", [small, three], S64)
            one = build.value("s_const", [], S64, value=1)
            sixteen = build.value("s_const", [], S64, value=16)
            scaled = build.value("s_mul", [build.value("s_add", [part, one], S64), sixteen], S64)
            return build.value("s_add", [scaled, self.x], S64), [], {"disp": 16}
        four = build.value("s_const", [], S64, value=4)
        return build.value("s_add", [build.value("s_mul", [small, four], S64), self.x], S64), [], {"disp": 64}

    def block(self, build: Builder, scalars: list[Value], ints: list[Value], floats: list[Value], masks: list[Value],
              depth: int) -> None:
        scalars, ints, floats, masks = list(scalars), list(ints), list(floats), list(masks)
        draw = self.draw
        for _ in range(draw(st.integers(2, 10 if depth == 0 else 5))):
            kind = draw(st.integers(0, 14))
            if kind <= 1:
                scalars.append(build.value("s_const", [], S64, value=draw(st.integers(-3, 9))))
            elif kind <= 3:
                name = draw(st.sampled_from(["s_add", "s_sub", "s_mul", "s_min", "s_max", "s_and", "s_or", "s_xor"]))
                scalars.append(build.value(name, [self.pick(scalars), self.pick(scalars)], S64))
            elif kind == 4:
                amount = build.value("s_const", [], S64, value=draw(st.integers(0, 5)))
                name = draw(st.sampled_from(["s_shl", "s_shr", "s_sar"]))
                scalars.append(build.value(name, [self.pick(scalars), amount], S64))
            elif kind == 5:
                cond = draw(st.sampled_from(["eq", "ne", "lt", "le", "gt", "ge"]))
                flag = build.value("s_cmp", [self.pick(scalars), self.pick(scalars)], S64, cond=cond)
                scalars.append(build.value("s_select", [flag, self.pick(scalars), self.pick(scalars)], S64))
            elif kind == 6:
                ints.append(build.value("splat", [self.pick(scalars)], ROW_I32))
                ints.append(build.value(draw(st.sampled_from(["add", "mul", "xor"])),
                                        [self.pick(ints), self.pick(ints)], ROW_I32))
            elif kind == 7:
                floats.append(build.value("cvt", [self.pick(ints)], ROW_F32))
                constant = draw(st.sampled_from([0.0, -0.0, 1.0, 2.5]))
                floats.append(build.value("splat_const", [], ROW_F32, value=constant))
                floats.append(build.value(draw(st.sampled_from(["add", "mul", "sub", "max"])),
                                          [self.pick(floats), self.pick(floats)], ROW_F32))
            elif kind == 8:
                masks.append(build.value("mask_first", [self.pick(scalars)], MASK))
                masks.append(build.value(draw(st.sampled_from(["mask_and", "mask_or", "mask_xor"])),
                                         [self.pick(masks), self.pick(masks)], MASK))
                floats.append(build.value("select", [self.pick(masks), self.pick(floats), self.pick(floats)], ROW_F32))
            elif kind == 9:
                base, index, attributes = self.address(build, scalars)
                mask = [self.pick(masks)] if draw(st.booleans()) else []
                floats.append(build.value("load", [base, *index, *mask], ROW_F32, dtype=F32, masked=bool(mask),
                                          **attributes))
            elif kind == 10:
                base, index, attributes = self.address(build, scalars)
                mask = [self.pick(masks)] if draw(st.booleans()) else []
                value, dtype = (self.pick(floats), F32) if draw(st.booleans()) else (self.pick(ints), I32)
                build.add("store", [value, base, *index, *mask], dtype=dtype, masked=bool(mask), **attributes)
            elif kind == 11:
                seven = build.value("s_const", [], S64, value=7)
                place = build.value("s_and", [self.pick(scalars), seven], S64)
                address = build.value("s_add", draw(st.permutations([self.w, place])), S64)
                floats.append(build.value(draw(st.sampled_from(["load", "load_splat"])), [address], ROW_F32,
                                          dtype=F16, disp=draw(st.integers(0, 1))))
            elif depth < 2 and kind <= 13:
                self.loop(build, scalars, ints, floats, masks, depth)
            elif depth < 2:
                self.branch(build, scalars, ints, floats, masks, depth)
        for row, dtype in ((self.pick(floats), F32), (self.pick(ints), I32)):
            where = 16 * draw(st.integers(0, 7))
            build.add("store", [row, self.y], dtype=dtype, disp=where)
        if depth == 0:
            build.add("s_store", [self.pick(scalars), self.y], dtype=I32, disp=128)
            build.add("store_lane0", [self.pick(ints), self.y], dtype=I32, disp=132)
        self.left = (self.pick(scalars), self.pick(floats))

    def loop(self, build: Builder, scalars: list[Value], ints: list[Value], floats: list[Value], masks: list[Value],
             depth: int) -> None:
        start = build.value("s_const", [], S64, value=self.draw(st.integers(0, 4)))
        stop = build.value("s_const", [], S64, value=self.draw(st.integers(0, 6)))
        if self.draw(st.booleans()):
            three = build.value("s_const", [], S64, value=3)
            stop = build.value("s_and", [self.pick(scalars), three], S64)
        carried = [self.pick(scalars), self.pick(floats)]
        types: list[Type] = [S64, ROW_F32]
        body = Block([S64, *types])
        inner = Builder(body)
        counter, number, row = body.arguments
        self.block(inner, [*scalars, counter, number], ints, [*floats, row], masks, depth + 1)
        inner.add("yield", list(self.left))
        op = build.add("loop", [start, stop, *carried], types, [body], step=self.draw(st.integers(1, 3)))
        scalars.append(op.results[0])
        floats.append(op.results[1])

    def branch(self, build: Builder, scalars: list[Value], ints: list[Value], floats: list[Value],
               masks: list[Value], depth: int) -> None:
        blocks = [Block(), Block()]
        for block in blocks:
            inner = Builder(block)
            self.block(inner, scalars, ints, floats, masks, depth + 1)
            inner.add("yield", list(self.left))
        op = build.add("if", [self.pick(scalars)], [S64, ROW_F32], blocks)
        scalars.append(op.results[0])
        floats.append(op.results[1])


def outcome(function: Function, n: int) -> tuple[bytes, bytes]:
    x = np.linspace(-3, 5, 32, dtype=np.float32)
    y = np.zeros(34, np.int32)
    w = np.arange(12, dtype=np.float16)
    run(function, *bind_arguments(function, {"x": x, "y": y, "w": w}, {"n": n}))
    return x.tobytes(), y.tobytes()


@st.composite
def programs(draw: st.DrawFn) -> Function:
    return Generator(draw).function


@given(programs(), st.integers(-2, 9))
@settings(max_examples=examples(150))
def test_random_programs_mean_the_same(function: Function, n: int) -> None:
    verify(function, LANE_OPS)
    before = outcome(function, n)
    split_blocks(function)
    simplify(function)
    verify(function, LANE_OPS)
    assert outcome(function, n) == before
    reduce_strength(function)
    verify(function, LANE_OPS)
    assert outcome(function, n) == before
    text = print_function(function)
    assert print_function(parse_function(text, TABLES)) == text


def test_a_thousand_ops_take_milliseconds() -> None:
    """The target is 10 ms; the bound leaves room for a busy machine."""
    best = 1.0
    for _ in range(5):
        function = large(1000)
        start = time.process_time()
        simplify(function)
        best = min(best, time.process_time() - start)
    verify(function, LANE_OPS)
    assert best < 0.05


def large(count: int) -> Function:
    """An unrolled matmul-like loop of about so many ops."""
    function = Function("f", "lane")
    function.attributes = {"lanes": 8, "slots": ["x.data", "n"]}
    build = Builder(function.body)
    x, n = build.value("arg", [], S64, slot=3), build.value("arg", [], S64, slot=4)
    zero = build.value("splat_const", [], ROW_F32, value=0.0)
    rows = 14
    body = Block([S64, *[ROW_F32] * rows])
    inner = Builder(body)
    counter, *accumulators = body.arguments
    made = 0
    while made < count:
        for r in range(rows):
            k = inner.value("s_const", [], S64, value=made)
            stride = inner.value("s_const", [], S64, value=4)
            at = inner.value("s_mul", [inner.value("s_add", [counter, k], S64), stride], S64)
            left = inner.value("load_splat", [inner.value("s_add", [x, at], S64)], ROW_F32, dtype=F32)
            right = inner.value("load", [x, at], ROW_F32, dtype=F32, indexed=True)
            accumulators[r] = inner.value("fma", [left, right, accumulators[r]], ROW_F32)
            made += 8
    inner.add("yield", accumulators)
    loop = build.add("loop", [n, n, *[zero] * rows], [ROW_F32] * rows, [body], step=1)
    for r, value in enumerate(loop.results):
        build.add("store", [value, x], dtype=F32, disp=32 * r)
    return function
