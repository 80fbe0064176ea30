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


def test_one_warp_has_nobody_to_wait_for() -> None:
    function = Function("empty", "lane")
    function.attributes = {"lanes": 32, "slots": []}
    check(function)
