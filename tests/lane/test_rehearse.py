"""What warps, copies and matrix instructions wait for, proved; and planted faults, of which none gets through."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from sapper import targets
from sapper.codegen.pipeline import facts_of, finish_lane, to_lane
from sapper.ir.nodes import Function, Op
from sapper.ir.text import parse_function, print_function
from sapper.lane.ops import LANE_OPS
from sapper.lane.rehearse import AsyncError, check, rehearse
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import Schedule
from tests.targets.ptx.kernels import KERNELS, bf16_nt
from tests.targets.ptx.test_matrix import specialization


@cache
def text_of(level: str, kernel: Any, m: int = 0) -> str:
    target = targets.target(level)
    # A tile that is told is no cluster's: how these start signals is in test_clusters.py.
    schedule = Schedule(tile={"m": m, "n": m}, cluster={"m": 1}) if m else Schedule()
    return print_function(finish_lane(to_lane(kernel.tile_ir(), schedule, facts_of(target),
                                              specialization(kernel, 64)), target))


def lane_function(level: str, m: int = 0, kernel: Any = bf16_nt) -> Function:
    return parse_function(text_of(level, kernel, m), {"tile": TILE_OPS, "lane": LANE_OPS})


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize(("level", "m"), [("sm_80", 0), ("sm_90a", 0), ("sm_90a", 64)])
def test_what_lowering_makes_is_right(level: str, m: int, kernel: Any) -> None:
    assert rehearse(lane_function(level, m, kernel)) == []


def dropped(name: str, number: int = 0) -> Callable[[Function], None]:
    """Without op `number` of that name, in the order of the text."""
    def change(function: Function) -> None:
        op = [op for op in function.walk() if op.name == name][number]
        block = next(b for b in (function.body, *(b for o in function.walk() for b in o.blocks)) if op in b.ops)
        block.ops.remove(op)

    return change


def changed(name: str, number: int = 0, **attributes: Any) -> Callable[[Function], None]:
    def change(function: Function) -> None:
        op = [op for op in function.walk() if op.name == name][number]
        assert all(op.attributes.get(key) != value for key, value in attributes.items())
        op.attributes.update(attributes)

    return change


def constant_parity(number: int) -> Callable[[Function], None]:
    """A wait that always asks for the same phase."""
    def change(function: Function) -> None:
        wait = [op for op in function.walk() if op.name == "signal_wait"][number]
        zero = next(op for op in function.walk() if op.name == "s_const" and op.attributes["value"] == 0)
        wait.operands[1] = zero.results[0]

    return change


def turned_parity(number: int) -> Callable[[Function], None]:
    def change(function: Function) -> None:
        wait = [op for op in function.walk() if op.name == "signal_wait"][number]
        one = next(op for op in function.walk() if op.name == "s_const" and op.attributes["value"] == 1)
        block = next(b for op in function.walk() for b in op.blocks if wait in b.ops)
        made = Op("s_xor", [wait.operands[1], one.results[0]], [wait.operands[1].type], {}, None, wait.location)
        block.ops.insert(block.ops.index(wait), made)
        wait.operands[1] = made.results[0]

    return change


def other_mask(value: int) -> Callable[[Function], None]:
    """Stages taken by other bits of the counter."""
    def change(function: Function) -> None:
        op = next(op for op in function.walk() if op.name == "s_const" and op.attributes["value"] == 3)
        op.attributes["value"] = value

    return change


GROUPS = {
    "full is not waited for": (dropped("signal_wait", 0), "group_multiply: found bytes that nobody wrote"),
    "free is not waited for": (dropped("signal_wait", 1), "tensor_copy: found a write over a write"),
    "phase of full": (turned_parity(0), "group_multiply: found bytes that nobody wrote"),
    "phase of free": (turned_parity(1), "signal_wait: found a wait for what nobody does"),
    "always phase 0 of full": (constant_parity(0), "group_multiply: found what was not waited for"),
    "no arrival": (dropped("signal_arrive"), "signal_wait: found a wait for what nobody does"),
    "nothing announced": (dropped("signal_expect"), "signal_wait: found a wait for what nobody does"),
    "fewer bytes announced": (changed("signal_expect", bytes=8192), "signal_wait: found a wait for what nobody does"),
    "one arrival is enough": (changed("signal_start", 1, arrivals=1), "tensor_copy: found a write over what may still"),
    "signals not seen by copies": (dropped("signal_fence"), "tensor_copy: found a signal that copies may not see yet"),
    "signals not started": (dropped("sync_warps"), "found a signal that may not have started"),
    "given back a batch too early": (changed("group_wait", 0, pending=2), "found a write over what may still be read"),
    "sums in flight": (changed("group_wait", 1, pending=1), "group_wait: found sums that a matrix instruction"),
    "no batch": (dropped("group_commit"), "sums of matrix instructions in no batch"),
    "no fence": (dropped("group_fence"), "group_multiply: found a batch without group_fence before it"),
    "half the stages": (other_mask(1), "found"),
    "operands over each other": (changed("tensor_copy", 1, disp=4096), "tensor_copy: found a write over a write"),
    "copied to the next stage": (changed("tensor_copy", 1, disp=65536), "found"),
    "sums stored in a stage": (changed("store_run", 0, disp=512), "store_run: found a write over"),
    "outside near memory": (changed("tensor_copy", 1, disp=1 << 20), "of near memory"),
}


@pytest.mark.parametrize("fault", GROUPS)
def test_planted_faults_with_signals(fault: str) -> None:
    plant, message = GROUPS[fault]
    function = lane_function("sm_90a", 64)
    plant(function)
    assert any(re.search(re.escape(message), str(found)) for found in rehearse(function)), rehearse(function)
    with pytest.raises(AsyncError, match=r"bf16_nt: .*; expected a wait between"):
        check(function)


LANES = {
    "copies are not waited for": (dropped("async_wait", 0), "load_matrix: found what was not waited for"),
    "one group too few": (changed("async_wait", 0, pending=2), "load_matrix: found what was not waited for"),
    "other warps' copies": (dropped("sync_warps", 1), "load_matrix: found bytes that nobody wrote"),
    "sums over operands": (dropped("sync_warps", 2), "store_run: found a write over"),
    "next tile over sums": (dropped("sync_warps", 0), "async_copy: found a write over"),
    "no group": (dropped("async_commit", 2), "load_matrix: found what was not waited for"),
    "copied too far": (changed("async_copy", 20, disp=1 << 20), "of near memory"),
}


@pytest.mark.parametrize("fault", LANES)
def test_planted_faults_with_groups_of_copies(fault: str) -> None:
    plant, message = LANES[fault]
    function = lane_function("sm_80")
    plant(function)
    assert any(re.search(re.escape(message), str(found)) for found in rehearse(function)), rehearse(function)


COLUMN = """lane func @column() {lanes = 32, slots = [], warps = 2, near_bytes = 4096} {
  %warp: s64 = warp
  %near: s64 = near_memory
  %each: s64 = s_const {value = 1024}
  %before: s64 = s_mul %warp, %each
  %own: s64 = s_add %near, %before
  %zeros: row<f32> = splat_const {value = 0.0}
  STORES
  %iota: row<i32> = iota
  %offsets: row<i32> = shl %iota {amount = 6}
  %first: s64 = s_const {value = 0}
  %rows: s64 = s_const {value = ROWS}
  %starts: row<i32> = splat_const {value = START}
  loop %first, %rows {step = 32, label = "m"} (%row: s64) {
    %left: s64 = s_sub %rows, %row
    %before_end: mask = mask_first %left
    %from_start: mask = cmp %iota, %starts {cond = "ge"}
    %inside: mask = mask_and %before_end, %from_start
    ACCESS
    yield
  }
}
"""
"""Each of two warps stores 16 rows of 64 bytes, and then has a column of rows START to ROWS, or such elements of its
last row."""
GATHER = "%values: row<f32> = gather %own, %offsets, %inside {dtype = :f32, disp = 60, masked = true, near = true}"
SCATTER = "scatter %zeros, %own, %offsets, %inside {dtype = :f32, disp = 60, masked = true, near = true}"
LOAD = "%values: row<f32> = load %own, %inside {dtype = :f32, disp = 960, masked = true, near = true}"
STORE = "store %zeros, %own, %inside {dtype = :f32, disp = 960, masked = true, near = true}"


def column(rows: int, start: int, access: str, stored_bytes: int = 1024, warps: int = 2) -> list[str]:
    stores = [f"store %zeros, %own {{dtype = :f32, disp = {at}, near = true}}" for at in range(0, stored_bytes, 128)]
    text = COLUMN.replace("STORES", "\n  ".join(stores)).replace("ACCESS", access).replace("START", str(start))
    function = parse_function(text.replace("ROWS", str(rows)), {"lane": LANE_OPS})
    function.attributes["warps"] = warps
    return [str(fault) for fault in rehearse(function)]


@pytest.mark.parametrize(("rows", "start"), [(16, 0), (5, 0), (16, 15)])
@pytest.mark.parametrize("access", [GATHER, SCATTER, LOAD, STORE])
def test_lanes_that_are_off_touch_nothing(rows: int, start: int, access: str) -> None:
    assert column(rows, start, access) == []


@pytest.mark.parametrize(("rows", "start"), [(17, 0), (17, 16), (32, 0), (32, 31)])
def test_one_lane_too_many(rows: int, start: int) -> None:
    for access, name in ((GATHER, "gather"), (LOAD, "load")):
        assert f"store: found a write over what may still be read ({name})" in column(rows, start, access)
    for access in (SCATTER, STORE):
        assert any("found a write over a write" in fault for fault in column(rows, start, access))


def test_a_mask_that_is_off_everywhere_may_be_on_with_other_extents() -> None:
    assert "store: found a write over what may still be read (gather)" in column(16, 16, GATHER)


def test_lanes_beyond_near_memory() -> None:
    """Of four warps the last one's 17th row."""
    assert "gather: found bytes 3132 to 4160 of 4096 of near memory" in column(17, 0, GATHER, warps=4)
    assert column(16, 0, GATHER, warps=4) == []


def test_lanes_read_what_was_written() -> None:
    """Four rows, of which the last access before the end reads five."""
    assert column(4, 0, GATHER, 256) == []
    assert column(5, 4, GATHER, 256) == ["gather: found bytes that nobody wrote"]


def test_one_warp_has_nobody_to_wait_for() -> None:
    function = Function("empty", "lane")
    function.attributes = {"lanes": 32, "slots": []}
    check(function)
