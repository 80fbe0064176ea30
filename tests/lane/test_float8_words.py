"""Numbers of fp8 in words (sapper/lane/float8.py): every code, with quick denormals and without."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sapper.ir.verifier import verify
from sapper.lane.float8 import expand_float8
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.ops import LANE_OPS

from .test_interpret import program

LANES = 64
NUMPY = {"f8e4m3": ml_dtypes.float8_e4m3fn, "f8e5m2": ml_dtypes.float8_e5m2}


@pytest.mark.parametrize("quick", [False, True, None], ids=["integers", "products", "as they are"])
@pytest.mark.parametrize("name", NUMPY)
def test_every_code(name: str, quick: bool | None) -> None:
    body = "%w: row<b32> = load %w_data {dtype = :b32}\n" + "".join(
        f"%v{place}: row<f32> = unpack %w {{dtype = :{name}, place = {place}}}\n"
        f"store %v{place}, %y_data {{dtype = :f32, disp = {4 * LANES * place}}}\n" for place in range(4))
    function = program(body, LANES, ("w.data", "y.data"))
    expand_float8(function, frozenset(["unpack.float8"] if quick is None else []), bool(quick))
    verify(function, LANE_OPS)
    assert any(op.attributes.get("dtype") is not None and op.attributes["dtype"].name == name
               for op in function.walk()) == (quick is None)
    codes = np.arange(256, dtype=np.uint8)
    arrays = {"w": codes.view(np.uint32), "y": np.zeros(256, np.float32)}
    run(function, *bind_arguments(function, arrays))
    wanted = codes.view(NUMPY[name]).astype(np.float32).reshape(LANES, 4).T.reshape(-1)
    np.testing.assert_array_equal(arrays["y"], wanted)
    np.testing.assert_array_equal(np.signbit(arrays["y"])[~np.isnan(wanted)], np.signbit(wanted)[~np.isnan(wanted)])
