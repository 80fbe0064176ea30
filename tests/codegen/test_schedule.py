"""List scheduling: the same result, better order, no more registers."""

from __future__ import annotations

import time
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper.codegen.schedule as scheduling
from sapper.codegen.allocate import allocate
from sapper.codegen.check import check
from sapper.codegen.machine import Immediate, Instruction, LabelReference, MachineFunction, Memory
from sapper.codegen.schedule import schedule
from sapper.targets.x86_64.allocation import RegisterFile, register_file
from tests.strategies import examples

from .test_allocate import RDI, RSI, Code, Generator, register_accumulations, simulate, small_file


def outcome(function: MachineFunction, abi: RegisterFile) -> tuple[list[object], dict[object, list[object]]]:
    """The branches taken, in order, and what was stored at each address, in order."""
    trace, _ = simulate(function, abi)
    stored: dict[object, list[object]] = {}
    for event in trace:
        if isinstance(event, tuple):
            stored.setdefault(event[0], []).append(event[1])
    return [event for event in trace if isinstance(event, bool)], stored


def rows_of(function: MachineFunction) -> list[str]:
    return [item.row.name for item in function.body if isinstance(item, Instruction)]


@settings(max_examples=examples(100))
@given(st.integers(0, 1 << 32), st.integers(3, 90))
def test_random_programs_do_the_same(seed: int, statements: int) -> None:
    abi = small_file(8, 6, 3)
    function = Generator(seed, statements).code.function()
    before = outcome(function, abi)
    names = sorted(rows_of(function))
    # Random code is short, so no order gains much: take every order that the scheduler finds.
    with patch.object(scheduling, "_flows_well", return_value=False), patch.object(scheduling, "GAIN", 100.0):
        schedule(function, abi)
    assert sorted(rows_of(function)) == names
    assert outcome(function, abi) == before
    allocation = allocate(function, abi)
    check(function, allocation.function, allocation.origin, abi, framed=False)
    assert outcome(allocation.function, abi) == before


def two_chains() -> Code:
    """Two chains of dependent operations, one after the other: side by side they take half the time."""
    code = Code()
    base = code.new("gpr")
    code.put("mov.64", base, RDI)
    for chain in range(2):
        value = code.new("vec")
        code.put("vmovups.512", value, Memory(base, disp=64 * chain))
        for _ in range(60):
            following = code.new("vec")
            code.put("vmulps.512", following, value, value)
            value = following
        code.put("vmovups.512", Memory(base, disp=64 * chain), value)
    code.put("ret")
    return code


def test_chains_are_interleaved() -> None:
    function = two_chains().function()
    assert schedule(function, register_file()) == 1
    loads = [p for p, n in enumerate(rows_of(function)) if n == "vmovups.512"]
    assert loads[1] < 50, "the second chain begins before the first ends"


def test_same_input_same_order() -> None:
    orders = []
    for _ in range(2):
        function = Generator(11, 60).code.function()
        schedule(function, register_file())
        orders.append([repr(i.operands) for i in function.body if isinstance(i, Instruction)])
    assert orders[0] == orders[1]


@pytest.mark.parametrize(
    ("stored", "loaded", "may_pass"),
    [(0, 0, False), (0, 32, False), (0, 63, False), (0, 64, True), (64, 0, True), (63, 0, False)],
)
def test_load_passes_a_store_only_where_bytes_differ(stored: int, loaded: int, may_pass: bool) -> None:
    code = Code()
    base, first, second = code.new("gpr"), code.new("vec"), code.new("vec")
    code.put("mov.64", base, RDI)
    code.put("vmovups.512", first, Memory(base, disp=1024))
    for _ in range(60):
        code.put("vmulps.512", first, first, first)
    store = code.put("vmovups.512", Memory(base, disp=stored), first)
    load = code.put("vmovups.512", second, Memory(base, disp=loaded))
    for _ in range(60):
        code.put("vmulps.512", second, second, second)
    code.put("vmovups.512", Memory(base, disp=2048), second)
    code.put("ret")
    function = code.function()
    schedule(function, register_file())
    assert (function.body.index(load) < function.body.index(store)) is may_pass


def test_load_does_not_pass_a_store_through_another_register() -> None:
    code = Code()
    base, other, first, second = code.new("gpr"), code.new("gpr"), code.new("vec"), code.new("vec")
    code.put("mov.64", base, RDI)
    code.put("mov.64", other, RSI)
    code.put("vmovups.512", first, Memory(base))
    for _ in range(60):
        code.put("vmulps.512", first, first, first)
    store = code.put("vmovups.512", Memory(base), first)
    load = code.put("vmovups.512", second, Memory(other, disp=4096))
    for _ in range(60):
        code.put("vmulps.512", second, second, second)
    code.put("vmovups.512", Memory(other), second)
    code.put("ret")
    function = code.function()
    schedule(function, register_file())
    assert function.body.index(store) < function.body.index(load)


def test_compare_stays_before_its_jump_and_flags_are_kept() -> None:
    code = Code()
    base, count = code.new("gpr"), code.new("gpr")
    code.put("mov.64", base, RDI)
    code.put("mov.64", count, Immediate(8))
    code.label("loop")
    compare = code.put("sub.64", count, Immediate(1))
    flag = code.new("gpr")
    code.put("cmovb.64", count, base)
    value = code.new("vec")
    code.put("vmovups.512", value, Memory(base))
    for _ in range(4):
        code.put("vmulps.512", value, value, value)
    code.put("vmovups.512", Memory(base), value)
    code.put("lea.64", flag, Memory(base, disp=8))
    code.put("mov.64", Memory(base, disp=512), flag)
    test = code.put("cmp.64", count, Immediate(0))
    jump = code.put("jne", LabelReference("loop"))
    code.put("ret")
    function = code.function()
    schedule(function, register_file())
    places = {id(item): place for place, item in enumerate(function.body)}
    assert places[id(jump)] == places[id(test)] + 1
    between = rows_of(function)
    assert between.index("sub.64") < between.index("cmovb.64") < between.index("cmp.64")
    assert compare in function.body


def test_full_registers_stay_full() -> None:
    """28 sums, two loads and a broadcast: 31 of 32 registers. No order may cost a spill or a copy."""
    abi = register_file()
    function = register_accumulations(28, 4)
    schedule(function, abi)
    allocation = allocate(function, abi, no_spill=True)
    check(function, allocation.function, allocation.origin, abi, framed=False)
    assert allocation.spills == allocation.reloads == 0
    assert not [n for n in rows_of(allocation.function) if n == "vmovaps.512"]


def test_scheduling_is_fast() -> None:
    abi = register_file()
    best = 1.0
    for _ in range(5):
        function = register_accumulations(24, 12, copies=False)
        assert len(function.body) > 500
        start = time.thread_time()
        schedule(function, abi)
        best = min(best, time.thread_time() - start)
    assert best < 0.030, f"{best * 1000:.1f} ms for {len(function.body)} instructions; expected a few"
