"""Bounds of loops against what can be said of them by hand, and registers over time against the text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.codegen.explain import explain, hottest_loop, share_out
from sapper.codegen.listing import Listing, at
from sapper.codegen.machine import Immediate, MachineFunction, Memory, Register
from sapper.codegen.pipeline import compile_kernel
from sapper.ir.types import TensorType
from sapper.targets import known_targets, target
from sapper.targets.x86_64.costs import operations_of, uses_of
from sapper.targets.x86_64.instructions import ROWS
from tests.strategies.amount import examples

from . import library_kernels as source

RAX, RCX, RDX, RSI, RDI = 0, 1, 2, 6, 7
PORTS = ("a", "b", "c", "d")
LARGE = (2**31 - 1, 1)


def vec(number: int) -> Register:
    return Register("vec", number)


def loop_of(fill, target_name: str = "zen4"):
    """The explanation of a loop of rdi passes whose body `fill` writes."""
    emit = Listing()
    for number in range(4):
        emit("vxorps.512", vec(number), vec(number), vec(number))
    emit.label("again")
    fill(emit)
    emit("sub.64", RDI, Immediate(1))
    emit("jne", "again")
    for number in range(4):
        emit("vmovups.512", at(RSI, 64 * number), vec(number))
    emit("ret")
    made = explain(MachineFunction("f", emit.body, {}), target(target_name))
    (loop,) = made.loops
    return made, loop


def test_a_chain_of_multiply_adds_is_bound_by_its_latency() -> None:
    def fill(emit: Listing) -> None:
        emit("vfmadd231ps.512", vec(0), vec(1), vec(2))
        emit("vfmadd231ps.512", vec(0), vec(1), vec(2))

    made, loop = loop_of(fill)
    assert loop.latency_cycles == 8 and loop.bound == "latency" and loop.cycles == 8
    assert loop.port_cycles == 2  # two of 512 bits, and two pipes that take two cycles for each
    assert loop.operations == 2 * 2 * 16 and loop.loaded_bytes == loop.stored_bytes == 0
    texts = {row.place: row.text for row in made.rows}
    assert [texts[place] for place in loop.chain] == ["vfmadd231ps zmm0, zmm1, zmm2"] * 2


def test_a_chain_through_two_registers_takes_two_passes() -> None:
    """zmm0 of one pass makes zmm1, which makes zmm0 of the next: half of both latencies a pass."""
    def fill(emit: Listing) -> None:
        emit("vaddps.512", vec(2), vec(0), vec(3))
        emit("vmovaps.512", vec(0), vec(1))
        emit("vmovaps.512", vec(1), vec(2))

    _, loop = loop_of(fill)
    assert loop.latency_cycles == 1.5  # 3 cycles every other pass; moves take none


def test_loads_and_stores_have_their_units() -> None:
    def fill(emit: Listing) -> None:
        for number in range(3):
            emit("vmovups.512", vec(number), at(RSI, 64 * number))
        emit("vmovups.512", at(RDX), vec(0))

    _, loop = loop_of(fill)
    assert loop.ports["load"] == 3 and loop.ports["store"] == 2 and loop.port_cycles == 3
    assert (loop.loaded_bytes, loop.stored_bytes) == (192, 64)
    assert loop.uops == 5  # the subtraction and the jump are one


def test_a_load_in_the_chain_counts_its_latency() -> None:
    def fill(emit: Listing) -> None:
        emit("mov.64", RSI, at(RSI))

    _, loop = loop_of(fill)
    assert loop.latency_cycles == 4 and loop.bound == "latency"


def test_the_address_of_an_operand_is_no_part_of_the_sum() -> None:
    """The chain through the accumulator is the addition's, not the load's."""
    def fill(emit: Listing) -> None:
        emit("vaddps.512", vec(0), vec(0), at(RSI))
        emit("add.64", RSI, Immediate(64))

    _, loop = loop_of(fill)
    assert loop.latency_cycles == 3


def test_many_small_instructions_are_bound_by_the_front_end() -> None:
    def fill(emit: Listing) -> None:
        for number in range(4):
            emit("mov.64", RAX, RCX)
            emit("mov.64", RDX, RCX)
            emit("vmovaps.512", vec(number), vec(number))

    _, loop = loop_of(fill)
    assert loop.bound == "front end" and loop.front_end_cycles == pytest.approx(13 / 6)


@pytest.mark.parametrize(("name", "wide", "cycles"), [
    ("cascadelake", True, 4.5), ("cascadelake", False, 2.0), ("haswell", False, 3.0), ("zen4", True, 3.0)])
def test_ports_that_are_shut_beside_512_bits(name: str, wide: bool, cycles: float) -> None:
    """Six operations of 256 bits, and three of 512, which take two of three ports; on others as many as there are."""
    def fill(emit: Listing) -> None:
        for number in range(6):
            emit("vpaddd.256", vec(number), vec(8), vec(9))
        for number in range(3 if wide else 0):
            emit("vpaddd.512", vec(10 + number), vec(13), vec(14))

    made = loop_of(fill, name)[1]
    assert max(made.ports.values()) == pytest.approx(cycles)


@pytest.mark.parametrize(("name", "entering"), [("cascadelake", 10), ("zen4", 6)])
def test_operands_with_an_index_enter_by_themselves(name: str, entering: int) -> None:
    """Four multiply-adds with such an operand are two operations each on the first, moves one on both."""
    def fill(emit: Listing) -> None:
        for number in range(4):
            emit("vfmadd231ps.512", vec(number), vec(8), Memory(Register("gpr", RSI), Register("gpr", RAX)))
        emit("vmovups.512", vec(9), Memory(Register("gpr", RSI), Register("gpr", RAX)))

    assert loop_of(fill, name)[1].uops == entering


@pytest.mark.parametrize("name", ["cascadelake", "sapphirerapids", "zen4"])
def test_a_prefetch_takes_a_load(name: str) -> None:
    def cycles(prefetches: int) -> float:
        def fill(emit: Listing) -> None:
            for number in range(9):
                emit("vmovups.256", vec(4 + number), at(RSI, 32 * number))
            for number in range(prefetches):
                emit("prefetcht0", at(RSI, 4096 + 64 * number))

        return max(loop_of(fill, name)[1].ports.values())

    assert cycles(9) == pytest.approx(2 * cycles(0))


def test_a_broadcast_and_a_gather_read_what_they_read() -> None:
    def fill(emit: Listing) -> None:
        emit("vaddps.512", vec(0), vec(1), Memory(Register("gpr", RSI), broadcast=True))

    _, loop = loop_of(fill)
    assert loop.loaded_bytes == 4
    gather = ROWS["vgatherdps.512"]
    assert uses_of(gather, 512, 0) == [(gather.ports, gather.throughput)]


def test_operations_of_rows() -> None:
    for name, count in (("vfmadd231ps.512", 32), ("vfmadd213pd.256", 8), ("vaddss", 1), ("vmulsd", 1),
                        ("vdpbf16ps.512", 64), ("vpdpbusd.256", 64), ("vmovups.512", 0), ("vpaddd.512", 0),
                        ("add.64", 0), ("vsqrtpd.128", 2)):
        assert operations_of(ROWS[name]) == count, name


@settings(max_examples=examples(200), deadline=None)
@given(st.dictionaries(st.sets(st.sampled_from(PORTS), min_size=1).map(lambda s: tuple(sorted(s))),
                       st.integers(1, 20).map(float), max_size=6))
def test_work_is_shared_out_evenly_and_whole(work: dict[tuple[str, ...], float]) -> None:
    busy = share_out(work)
    assert sum(busy.values()) == pytest.approx(sum(work.values()))
    worst = 0.0
    for choice in range(1, 16):
        union = {port for bit, port in enumerate(PORTS) if choice >> bit & 1}
        inside = sum(cycles for group, cycles in work.items() if set(group) <= union)
        worst = max(worst, inside / len(union))
        # No set of ports does more than what may reach it, nor less than what only it can do.
        reach = sum(cycles for group, cycles in work.items() if set(group) & union)
        done = sum(busy.get(port, 0.0) for port in union)
        assert inside - 1e-9 <= done <= reach + 1e-9
    assert max(busy.values(), default=0.0) == pytest.approx(worst)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [name for name in known_targets() if not target(name).assembler_allocates])
@pytest.mark.parametrize("kernel", [source.scale, source.matmul, source.pairs], ids=lambda k: k.name)
def test_registers_over_time_agree_with_the_text(kernel, name: str) -> None:
    """What the text names is read or written there, and what is read was live before."""
    tensors = {n: "contiguous" for n, type in kernel.parameters if isinstance(type, TensorType)}
    compiled = compile_kernel(kernel, {}, tensors, dict.fromkeys(kernel.tile_ir().attributes["dims"], LARGE),
                              target(name), None).made
    made = explain(compiled.machine, target(name))
    assert len({*made.registers}) == len(made.registers)
    assert [row.offset for row in made.rows] == sorted(row.offset for row in made.rows)
    for row in made.rows:
        named = set(re.findall(r"(?<!\.)\b(?:[xyz]mm\d+|k[1-7]|[vqdshb]\d+(?=\.|\b))\b", row.text))
        touched = {re.sub("^([xyz]m|[vqdshb])", "", made.registers[c]) for c, letter in enumerate(row.registers)
                   if letter in "rwx"}
        assert {re.sub("^([xyz]m|[vqdshb])", "", n) for n in named} <= touched, row.text
        assert len(row.registers) == len(made.registers)
    for kind, count in made.pressure.items():
        assert count <= made.available.get(kind, 0)
    for before, after in zip(made.rows, made.rows[1:], strict=False):
        if before.block == after.block:
            for column in range(len(made.registers)):
                if after.registers[column] in "r|x":
                    assert before.registers[column] != ".", (made.registers[column], after.text)
    assert all(loop.cycles > 0 and loop.first <= loop.last for loop in made.loops)
    assert made.hottest() is not None and made.call_cycles() is None
    assert hottest_loop(compiled.machine, target(name)) == (made.hottest(), made.model)


def test_counts_weigh_the_blocks() -> None:
    compiled = compile_kernel(source.matmul, {}, dict.fromkeys("abc", "contiguous"), dict.fromkeys("MNK", LARGE),
                              target("zen4"), None)
    plain = explain(compiled.made.machine, target("zen4"))
    blocks = len(plain.block_cycles)
    same = explain(compiled.made.machine, target("zen4"), block_counts=[7] * blocks)
    assert [loop.cycles for loop in same.loops] == [loop.cycles for loop in plain.loops]
    assert same.hottest() is not None and same.hottest().passes == 7
    never = explain(compiled.made.machine, target("zen4"), block_counts=[0] * blocks)
    assert never.call_cycles() == 0
