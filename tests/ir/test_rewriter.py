"""The rewriter: rules fire in order, on what earlier rules made, and overlaps are errors; dead code goes."""

from __future__ import annotations

import pytest

from sapper.ir.nodes import Function, Op
from sapper.ir.rewriter import Replacement, RewriteError, Rewriter, Rule, RuleSet, count_fires, eliminate_dead, rewrite
from sapper.ir.text import parse_function, print_function
from sapper.ir.types import S64
from sapper.ir.verifier import verify
from sapper.lane.ops import LANE_OPS

TABLES = {"lane": LANE_OPS}


def parse(body: str) -> Function:
    return parse_function("lane func @f() {lanes = 4} {\n" + body + "\n}", TABLES)


def lines(function: Function) -> list[str]:
    verify(function, LANE_OPS)
    return [line.strip() for line in print_function(function).splitlines()[1:-1]]


def _mul_to_shift(op: Op, build: Rewriter) -> Replacement:
    before = op.operands[1].op
    if before is None or before.name != "s_const" or before.attributes["value"] != 4:
        return None
    return [build.build("s_shl", [op.operands[0], build.build("s_const", [], S64, value=2)], S64)]


def _shift_to_sum(op: Op, build: Rewriter) -> Replacement:
    return [build.build("s_add", [op.operands[0], op.operands[1]], S64)]


def test_what_a_rule_builds_is_rewritten_in_turn() -> None:
    f = parse("%w: s64 = worker\n%four: s64 = s_const {value = 4}\n%x: s64 = s_mul %w, %four\n"
              "loop %w, %x {step = 1} (%i: s64) {\n%y: s64 = s_sub %x, %i\n}")
    counts: dict[str, int] = {}
    rules = RuleSet([Rule("a", ("s_mul",), _mul_to_shift), Rule("b", ("s_shl",), _shift_to_sum)])
    assert rewrite(f, rules, count_fires(counts)) == 2 and counts == {"a": 1, "b": 1}
    assert lines(f) == [
        "%w: s64 = worker", "%four: s64 = s_const {value = 4}", "%1: s64 = s_const {value = 2}",
        "%x: s64 = s_add %w, %1", "loop %w, %x {step = 1} (%i: s64) {", "%y: s64 = s_sub %x, %i", "}",
    ]


def test_priority_decides() -> None:
    rules = RuleSet([
        Rule("low", ("s_mul",), lambda op, build: [op.operands[0]]),
        Rule("high", ("s_mul",), lambda op, build: [op.operands[1]], priority=1),
    ])
    f = parse("%w: s64 = worker\n%n: s64 = workers\n%x: s64 = s_mul %w, %n\n%y: s64 = s_add %x, %x")
    rewrite(f, rules)
    assert lines(f)[-1] == "%y: s64 = s_add %n, %n"


def test_overlap_and_equal_names_are_errors() -> None:
    rule = Rule("a", ("s_add", "s_mul"), _shift_to_sum)
    with pytest.raises(RewriteError, match="found rules a and b on op s_mul with equal priority 0"):
        RuleSet([rule, Rule("b", ("s_mul",), _shift_to_sum)])
    with pytest.raises(RewriteError, match="two rules named a"):
        RuleSet([rule, Rule("a", ("s_sub",), _shift_to_sum)])


def test_rules_that_go_on_for_ever_are_caught() -> None:
    f = parse("%w: s64 = worker\n%x: s64 = s_add %w, %w")
    rules = RuleSet([Rule("swap", ("s_add", "s_sub"), lambda op, build: [
        build.build("s_sub" if op.name == "s_add" else "s_add", list(op.operands), S64)])])
    with pytest.raises(RewriteError, match="the last by rule swap; expected them to end"):
        rewrite(f, rules)


def test_inline_binds_arguments() -> None:
    def once(op: Op, build: Rewriter) -> Replacement:
        return build.inline(op.blocks[0], [op.operands[0], *op.operands[2:]])

    f = parse("%w: s64 = worker\n%n: s64 = workers\n%r: s64 = loop %w, %n, %n {step = 1} (%i: s64, %c: s64) {\n"
              "%t: s64 = s_add %i, %c\nyield %t\n}\n%y: s64 = s_add %r, %r")
    assert rewrite(f, RuleSet([Rule("once", ("loop",), once)])) == 1
    assert lines(f)[2:] == ["%t: s64 = s_add %w, %n", "%y: s64 = s_add %t, %t"]


def test_dead_code() -> None:
    f = parse("""
    %w: s64 = worker
    %a: s64 = s_add %w, %w
    %b: s64 = s_add %a, %w
    %l: row<f32> = load %w {dtype = :f32}
    %m: row<f32> = load %w {dtype = :f32}
    %q: row<f32> = neg %m
    store %q, %w {dtype = :f32}
    %r: s64 = loop %w, %w, %w {step = 1} (%i: s64, %c: s64) {
      %d: s64 = s_add %c, %i
      yield %d
    }
    loop %w, %w {step = 1} (%i2: s64) {
      %e: s64 = s_add %w, %i2
    }
    if %w {
      barrier
      %g: s64 = s_add %w, %w
    } {
    }
    """)
    assert eliminate_dead(f, LANE_OPS, frozenset({"load"})) == 6
    assert lines(f) == [
        "%w: s64 = worker", "%m: row<f32> = load %w {dtype = :f32}", "%q: row<f32> = neg %m",
        "store %q, %w {dtype = :f32}", "if %w {", "barrier", "} {", "}",
    ]


def test_values_that_a_loop_carries_for_itself_alone_go() -> None:
    """%c and %e feed each other and nothing else; %s is read inside; %t, by way of %c2 in a loop inside, not at all."""
    f = parse("""
    %w: s64 = worker
    %a: s64, %b: s64, %c: s64, %d: s64, %t: s64 = loop %w, %w, %w, %w, %w, %w, %w {step = 1} (
        %i: s64, %p: s64, %q: s64, %r: s64, %s: s64, %u: s64) {
      %x: row<f32> = load %s {dtype = :f32}
      store %x, %p {dtype = :f32}
      %e: s64 = s_add %q, %r
      %g: s64 = s_add %s, %i
      %h: s64 = s_add %p, %w
      %k: s64, %l: s64 = if %i {
        %m: s64 = s_add %u, %w
        yield %h, %m
      } {
        yield %p, %u
      }
      %c2: s64 = loop %w, %w, %l {step = 1} (%j: s64, %v: s64) {
        barrier
        %n: s64 = s_add %v, %j
        yield %n
      }
      yield %k, %e, %q, %g, %c2
    }
    %z: row<f32> = load %a {dtype = :f32}
    store %z, %a {dtype = :f32}
    """)
    assert eliminate_dead(f, LANE_OPS, frozenset({"load"})) > 0
    assert lines(f) == [
        "%w: s64 = worker",
        "%a: s64, %d: s64 = loop %w, %w, %w, %w {step = 1} (%i: s64, %p: s64, %s: s64) {",
        "%x: row<f32> = load %s {dtype = :f32}", "store %x, %p {dtype = :f32}", "%g: s64 = s_add %s, %i",
        "%h: s64 = s_add %p, %w", "%k: s64 = if %i {", "yield %h", "} {", "yield %p", "}",
        "loop %w, %w {step = 1} (%j: s64) {", "barrier", "yield", "}", "yield %k, %g", "}",
        "%z: row<f32> = load %a {dtype = :f32}", "store %z, %a {dtype = :f32}",
    ]
