"""Arithmetic of 16 bits on two elements at once (sapper/lane/packed_pairs.py)."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sapper.ir.nodes import Function
from sapper.ir.verifier import verify
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.ops import LANE_OPS
from sapper.lane.packed_pairs import compute_pairs

from .test_interpret import program

LANES = 64
NUMPY = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}


def results(function: Function, name: str) -> np.ndarray:
    random = np.random.default_rng(7)
    rows = random.standard_normal(8 * LANES) * np.exp2(random.integers(-12, 8, 8 * LANES))
    rows[:4] = 0, -0.0, np.inf, np.nan
    arrays = {"x": rows.astype(NUMPY[name]), "y": np.zeros(LANES, np.uint32)}
    with np.errstate(all="ignore"):
        run(function, *bind_arguments(function, arrays))
    return arrays["y"]


def made(name: str, body: str) -> Function:
    loads = "".join(f"%x{n}: row<f32> = load %x_data {{dtype = :{name}, disp = {2 * LANES * n}}}\n" for n in range(8))
    packed = f"%p: row<b32> = pack2 %a, %b {{dtype = :{name}}}\nstore %p, %y_data {{dtype = :b32}}"
    function = program(loads + body + packed, LANES, ("x.data", "y.data"))
    verify(function, LANE_OPS)
    return function


def both(name: str, body: str) -> tuple[Function, np.ndarray, np.ndarray]:
    plain, paired = made(name, body), made(name, body)
    compute_pairs(paired)
    verify(paired, LANE_OPS)
    return paired, results(plain, name), results(paired, name)


@pytest.mark.parametrize("op", ["add", "sub", "mul"])
@pytest.mark.parametrize("name", NUMPY)
def test_operations(name: str, op: str) -> None:
    paired, plain, found = both(name, f"%a: row<f32> = {op} %x0, %x1\n%b: row<f32> = {op} %x2, %x3\n")
    assert [o.name for o in paired.body.ops[-4:]] == ["pack2", "pack2", f"{op}2", "store"]
    np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("name", NUMPY)
def test_in_turn(name: str) -> None:
    """What is rounded is a pair again; what both halves share is packed once."""
    body = "".join(f"%d{h}: row<f32> = sub %x{h}, %x2\n%r{h}: row<f32> = round_to %d{h} {{dtype = :{name}}}\n"
                   f"%{h}: row<f32> = mul %r{h}, %x3\n".replace(f"%{h}:", f"%{'ab'[h]}:") for h in range(2))
    paired, plain, found = both(name, body)
    names = [op.name for op in paired.body.ops]
    assert (names.count("sub2"), names.count("mul2"), names.count("pack2")) == (1, 1, 3)
    np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("body", [
    "%a: row<f32> = mul %x0, %x1\n%b: row<f32> = add %x2, %x3\n",
    "%s: row<f32> = add %x0, %x1\n%a: row<f32> = mul %s, %x2\n%b: row<f32> = mul %s, %x3\n",
    "%a: row<f32> = div %x0, %x1\n%b: row<f32> = div %x2, %x3\n"], ids=["two ops", "not rounded", "none of pairs"])
def test_what_stays(body: str) -> None:
    assert compute_pairs(made("f16", body)) == 0
