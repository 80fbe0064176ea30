"""Ops of several warps in the lane interpreter: signals, copies of boxes, matrix instructions of a group."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sapper.ir.text import parse_function
from sapper.ir.verifier import verify
from sapper.lane import fragments
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.memory import LaneError
from sapper.lane.ops import LANE_OPS

BF16 = ml_dtypes.bfloat16


def run_text(body: str, arrays: dict[str, np.ndarray], dims: dict[str, int], warps: int = 1, near_bytes: int = 1 << 15,
             maps: str = "") -> None:
    slots = [*(f"{name}.data" for name in arrays), *(f"dim.{name}" for name in dims)]
    names = ", ".join(f'"{s}"' for s in slots)
    text = f"lane func @f() {{lanes = 32, slots = [{names}], warps = {warps}, near_bytes = {near_bytes}, " \
           f"tensor_maps = [{maps}]}} {{\n"
    text += "".join(f"%{s.replace('.', '_')}: s64 = arg {{slot = {n + 3}}}\n" for n, s in enumerate(slots))
    text += "%near: s64 = near_memory\n%zero: s64 = s_const {value = 0}\n%one: s64 = s_const {value = 1}\n"
    function = parse_function(text + body + "\n}", {"lane": LANE_OPS})
    verify(function, LANE_OPS)
    words, memory = bind_arguments(function, arrays, dims=dims)
    run(function, words, memory)


def test_a_wait_passes_when_a_phase_is_over() -> None:
    """Warp 1 writes a number before it arrives; warp 0 reads it after the wait. The phase before 0 has parity 1."""
    out = np.zeros(2, np.int64)
    run_text("""
        %warp: s64 = warp
        %first: s64 = s_cmp %warp, %zero {cond = "eq"}
        if %first {
            signal_start %near {arrivals = 2}
            yield
        } {
            yield
        }
        sync_warps
        signal_wait %near, %one
        if %first {
            signal_arrive %near
            signal_wait %near, %zero
            %n: s64 = s_load %out_data {dtype = :i64}
            s_store %n, %out_data {dtype = :i64, disp = 8}
            yield
        } {
            %seven: s64 = s_const {value = 7}
            s_store %seven, %out_data {dtype = :i64}
            signal_arrive %near
            yield
        }
    """, {"out": out}, {}, warps=2)
    assert out.tolist() == [7, 7]


def test_errors_of_signals() -> None:
    with pytest.raises(LaneError, match=r"signal_arrive .*: found no signal at .*; expected one that signal_start"):
        run_text("signal_arrive %near {disp = 8}", {"out": np.zeros(1)}, {})
    with pytest.raises(LaneError, match="found nobody who can go on; expected 1 arrivals and 0 bytes in phase 0"):
        run_text("signal_start %near {arrivals = 1}\nsignal_wait %near, %zero", {"out": np.zeros(1)}, {})


COPY = """
    signal_start %near {arrivals = 1, disp = 32760}
    signal_expect %near {bytes = 2048, disp = 32760}
    tensor_copy %near, %near, %zero, %row, %column {map = 0, disp = 1024, signal_disp = 32760}
    signal_wait %near, %zero {disp = 32760}
"""
"""A box of 16 x 64 at (row, column) of the first matrix of x, to byte 1024 of near memory."""


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 40), (15, 90), (40, 0), (-2, -8)])
def test_boxes_are_swizzled_and_zero_outside(row: int, column: int) -> None:
    x = np.random.default_rng(0).integers(1, 1 << 15, (2, 20, 96)).astype(np.uint16)
    copied = np.zeros((16, 64), np.uint16)
    body = f"%row: s64 = s_const {{value = {row}}}\n%column: s64 = s_const {{value = {column}}}\n" + COPY
    body += "".join(f"""
        %v{n}: row<i32> = load %near {{dtype = :i32, disp = {1024 + 128 * n}, near = true}}
        store %v{n}, %copied_data {{dtype = :i32, disp = {128 * n}}}
    """ for n in range(16))
    run_text(body, {"x": x.view(BF16), "copied": copied}, {"M": 20},
             maps='["x", "bf16", [2, "M", 96], [1, 16, 64]]')
    padded = np.zeros((100, 200), np.uint16)
    padded[32:52, 32:128] = x[0]
    for r in range(16):
        for chunk in range(8):
            start = 32 + column + 8 * chunk
            np.testing.assert_array_equal(copied[r].reshape(8, 8)[chunk ^ (r % 8)],
                                          padded[32 + row + r, start:start + 8])


@pytest.mark.parametrize("left_rows", [True, False])
@pytest.mark.parametrize("right_rows", [True, False])
def test_products_of_a_group(left_rows: bool, right_rows: bool) -> None:
    """64 x 16 @ 16 x 16 by four warps, each operand along the depth, or in panels along the other axis."""
    random = np.random.default_rng(1)
    a, b = (random.standard_normal(shape).astype(BF16) for shape in ((64, 16), (16, 16)))
    near = np.zeros(1 << 15, np.uint8)
    for at, operand, rows in ((0, a, left_rows), (16384, b, right_rows)):
        outer, depth = np.arange(operand.shape[0])[:, None], np.arange(16)[None, :]
        places = at + fragments.swizzled(fragments.near_offsets(outer, depth, rows, 8192))
        near.view(BF16)[places // 2] = operand
    out = np.zeros((4, 8, 32), np.float32)
    sums = ", ".join(["%start"] * 8)
    results = ", ".join(f"%r{n}: row<f32>" for n in range(8))
    flags = f"left_rows = {str(left_rows).lower()}, right_rows = {str(right_rows).lower()}"
    body = "".join(f"%v{n}: row<i32> = load %near_in_data {{dtype = :i32, disp = {128 * n}}}\n"
                   f"store %v{n}, %near {{dtype = :i32, disp = {128 * n}, near = true}}\n" for n in range(256))
    body += f"""
        %warp: s64 = warp
        sync_warps
        %start: row<f32> = splat_const {{value = 1.0}}
        {results} = group_multiply %near, %near, {sums} {{dtype = :bf16, {flags}, right_disp = 16384,
            left_panel_bytes = 8192, right_panel_bytes = 8192}}
        group_commit
        {', '.join(f'%s{n}: row<f32>' for n in range(8))} = group_wait {', '.join(f'%r{n}' for n in range(8))} {{
            pending = 0}}
        %bytes: s64 = s_const {{value = 1024}}
        %offset: s64 = s_mul %warp, %bytes
        %place: s64 = s_add %out_data, %offset
    """ + "".join(f"store %s{n}, %place {{dtype = :f32, disp = {128 * n}}}\n" for n in range(8))
    run_text(body, {"near_in": near, "out": out}, {}, warps=4)
    wanted = 1 + a.astype(np.float64) @ b.astype(np.float64).T
    rows, columns = fragments.C
    for warp in range(4):
        for register in range(8):
            expected = wanted[16 * warp + rows[register % 4], register // 4 * 8 + columns[register % 4]]
            np.testing.assert_allclose(out[warp, register], expected, rtol=1e-6)
