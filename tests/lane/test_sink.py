"""Sinking into the parts that warps play: what several parts read is made in each, as near its readers as in one."""

from __future__ import annotations

import numpy as np
import pytest

from sapper.ir.nodes import Function, Op
from sapper.ir.text import parse_function
from sapper.ir.verifier import verify
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.ops import LANE_OPS
from sapper.lane.sink import sink

PART = """
loop %c0, %n {step = 1} (%iNUMBER: s64) {
loop %c0, %n {step = 1} (%jNUMBER: s64) {
s_store %jNUMBER, %x {dtype = :i64, disp = NUMBER}
}
s_store %far, %x {dtype = :i64, disp = NUMBER}
}
"""
TWO_PARTS = """lane func @f() {lanes = 8, few_registers = true, slots = ["x.data", "scalar.n"]} {
%x: s64 = arg {slot = 3}
%n: s64 = arg {slot = 4}
%c0: s64 = s_const {value = 0}
%near: s64 = s_add %n, %n
%far: s64 = s_mul %near, %n
if %n {
""" + PART.replace("NUMBER", "8") + "} {\n" + PART.replace("NUMBER", "16") + "}\n}"


def parse() -> Function:
    return parse_function(TWO_PARTS, {"lane": LANE_OPS})


def stored(function: Function, n: int) -> list[int]:
    x = np.full(4, -1, np.int64)
    run(function, *bind_arguments(function, {"x": x}, {"n": np.int64(n)}))
    return x.tolist()


@pytest.mark.parametrize("n", [0, 1, 3])
def test_what_two_parts_read_goes_into_a_loop_of_each(n: int) -> None:
    plain, sunk = parse(), parse()
    sink(sunk)
    verify(sunk, LANE_OPS)
    assert stored(sunk, n) == stored(plain, n)
    (choice,) = (op for op in sunk.body.ops if op.name == "if")
    for part in choice.blocks:
        outer: Op = next(op for op in part.ops if op.name == "loop")
        names = [op.name for op in outer.blocks[0].ops]
        assert names.index("loop") < names.index("s_add") < names.index("s_mul") < names.index("s_store")
