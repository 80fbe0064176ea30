"""Packed dot products end to end: machine code where this processor has them, elsewhere the meanings of the rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import Tensor, bf16, dims, each, f32, i8, i32, kernel, tiles, u8, whole, zeros
from sapper.assembly.emulate import Emulator
from sapper.codegen.compile import compile_lane
from sapper.codegen.machine import Register
from sapper.codegen.pipeline import facts_of, finish_lane, panels_of_kernel, to_lane
from sapper.ir.scratch import scratch_bytes
from sapper.lane.memory import Memory
from sapper.runtime.packed import pack_array
from sapper.targets.x86_64 import assembly
from sapper.targets.x86_64.target import TARGETS
from sapper.targets.x86_64.tiles import configuration
from sapper.tile.schedule import Schedule
from tests.lane.run_lane import argument_words, dims_of, specialize
from tests.lane.test_interpret import program
from tests.lane.test_packed import ORDERS, PRODUCTS, arguments_of, expected_of
from tests.strategies import examples

from .run_native import RUNNABLE, run_native

BYTES = [name for name in ("v3", "alderlake", "v4", "icelake-server", "zen4") if name in RUNNABLE]
"""Of each way to multiply bytes: words (AVX2), VEX and EVEX forms of one instruction, words of 512 bits."""
BF16 = [name for name in RUNNABLE if "dot2_bf16" in TARGETS[name].dots]


def mnemonics_of(function, arguments, target, packed=None):
    specialization = specialize(function, arguments)
    specialization.strides.update({name: held.panels for name, held in (packed or {}).items()})
    lane = finish_lane(to_lane(function, Schedule(), facts_of(target), specialization), target)
    made = compile_lane(lane, target, checked=True)
    return lane, made, {item.row.mnemonic for item in made.machine.body if hasattr(item, "row")}


def run_rows(function, arguments, target, packed=None):
    """Compile for any target and run what comes out by the meanings of its rows, on memory that starts dirty.

    packed: what stands for some of the arguments.
    """
    lane, made, mnemonics = mnemonics_of(function, arguments, target, packed)
    held = {**arguments, **{name: one.data for name, one in (packed or {}).items()}}
    memory = Memory()
    each = max(64, scratch_bytes(lane.attributes["scratch"], dims_of(function, arguments)))
    scratch = memory.allocate("scratch", each)
    memory.find(scratch, each, True)[:] = 0xFF
    slots = argument_words(function, lane.attributes["slots"], arguments,
                           lambda name: memory.add_array(name, held[name]))
    sync = memory.allocate("sync", 1024)
    words = memory.add_array("words", np.array([scratch, each, sync, *slots], np.int64))
    registers = {Register("gpr", number): 0 for number in range(16)}    # those that the code saves hold something
    registers |= {Register(*assembly.ARGUMENTS[i]): value for i, value in enumerate((words, 0, 1))}
    tiles, before = Register("tilecfg", 0), np.frombuffer(configuration([(3, 20)]), np.uint8)
    emulator = Emulator(assembly, memory, registers | {tiles: before})
    emulator.run(made.machine)
    np.testing.assert_array_equal(emulator.registers[tiles], before)  # what a caller configured stays
    return mnemonics


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("order", "m", "n", "k"), [("nt", 2, 5, 70), ("nn", 3, 20, 9), ("nt", 29, 98, 6),
                                                    ("tn", 29, 98, 5)])
@pytest.mark.parametrize(("types", "mnemonic"), [((bf16, bf16, f32), "vdpbf16ps"), ((i8, i8, i32), "vpdpbusd")])
def test_rows(order, m, n, k, types, mnemonic) -> None:
    """On a processor that this need not be."""
    function = PRODUCTS[order, types].tile_ir()
    arguments = arguments_of(order, types, m, n, k)
    assert mnemonic in run_rows(function, arguments, TARGETS["zen4"])
    np.testing.assert_array_equal(arguments["c"], expected_of(order, arguments))


@pytest.mark.parametrize(("target", "mnemonic"), [("alderlake", "{vex} vpdpbusd"), ("haswell", "vpmaddwd")])
def test_rows_of_avx2(target, mnemonic) -> None:
    """Of whole vectors, as the meaning of a masked load reads lanes that are off too."""
    types = (i8, i8, i32)
    arguments = arguments_of("nn", types, 5, 16, 8)
    assert mnemonic in run_rows(PRODUCTS["nn", types].tile_ir(), arguments, TARGETS[target])
    np.testing.assert_array_equal(arguments["c"], expected_of("nn", arguments))


@pytest.mark.parametrize("start", [0, 1])
def test_what_is_added_to_nothing_is_no_addition(start: int) -> None:
    text = (f"%t: row<i32> = splat_const {{value = {start}}}\n%a: row<b32> = load %a_data {{dtype = :b32}}\n"
            "%d: row<i32> = dot2_i16 %t, %a, %a\nstore %d, %a_data {dtype = :i32}")
    code = compile_lane(program(text, 8, ("a.data",)), TARGETS["v3"])
    assert ("vpaddd" in {item.row.mnemonic for item in code.machine.body if hasattr(item, "row")}) == bool(start)


@pytest.mark.parametrize(("m", "n", "k"), [(2, 37, 11), (29, 98, 6)])
@pytest.mark.parametrize("types", [(bf16, bf16, f32), (i8, i8, i32)], ids=lambda t: t[0].name)
def test_rows_on_packed_weights(m, n, k, types) -> None:
    target = TARGETS["zen4"]
    function = PRODUCTS["nt", types].tile_ir()
    arguments = arguments_of("nt", types, m, n, k)
    panels = panels_of_kernel(PRODUCTS["nt", types], "b", target)
    assert panels == (0, 1, 32, 2 if types[0] is bf16 else 4)
    packed = {"b": pack_array(arguments["b"], types[1], panels)}
    assert run_rows(function, arguments, target, packed) & {"vdpbf16ps", "vpdpbusd"}
    np.testing.assert_array_equal(arguments["c"], expected_of("nt", arguments))


@pytest.mark.skipif(not BYTES, reason="this processor has no AVX2")
@settings(max_examples=examples(15))
@given(m=st.integers(1, 40), n=st.integers(1, 100), k=st.integers(0, 70), order=st.sampled_from(ORDERS),
       types=st.sampled_from([(i8, i8, i32), (u8, i8, i32), (i8, u8, i32), (u8, u8, i32)]), seed=st.integers(0, 99),
       target=st.sampled_from(BYTES or ["v3"]))
def test_machine_code_is_exact(m, n, k, order, types, seed, target) -> None:
    arguments = arguments_of(order, types, m, n, k, seed)
    run_native(PRODUCTS[order, types].tile_ir(), arguments, TARGETS[target], threads=1 + seed % 2)
    np.testing.assert_array_equal(arguments["c"], expected_of(order, arguments))


@pytest.mark.skipif(not BF16, reason="no vdpbf16ps here")
@pytest.mark.parametrize("order", ["nn", "nt", "tn"])
def test_bf16_in_machine_code(order) -> None:
    target = TARGETS[BF16[0]]
    arguments = arguments_of(order, (bf16, bf16, f32), 33, 50, 70)
    run_native(PRODUCTS[order, (bf16, bf16, f32)].tile_ir(), arguments, target)
    np.testing.assert_array_equal(arguments["c"], expected_of(order, arguments))


def test_targets_say_which_they_have() -> None:
    assert TARGETS["zen4"].dots == {"dot2_bf16", "dot4_u8i8"}
    others = ("icelake-server", "v4", "haswell", "alderlake")
    assert all(TARGETS[name].dots == {"fma2_bf16", "dot4_u8i8"} for name in others)
    types = (i8, i8, i32)
    arguments = arguments_of("nt", types, 2, 5, 70)
    _, _, mnemonics = mnemonics_of(PRODUCTS["nt", types].tile_ir(), arguments, TARGETS["skylake-avx512"])
    assert "vpdpbusd" not in mnemonics and "vpmaddwd" in mnemonics


@pytest.mark.parametrize("target", [name for name in ("v3", "v4") if name in RUNNABLE])
@pytest.mark.parametrize("bits", [4, 6, 7, 8])
def test_few_bits_are_multiplied_by_pairs(bits: int, target: str) -> None:
    """What masks leave of an operand says whether words hold the sums of its products; they are exact for all."""
    P, B, M = dims("P B M")

    @kernel
    def product(w: Tensor[u8, P, B, 9, 8, 4], x: Tensor[i8, B, M, 9, 4], y: Tensor[i32, M, P, 8]):
        for p, m in tiles(P, M):
            l = whole(8)
            acc = zeros(m, p, l, dtype=i32)
            for b in each(B):
                d, s = whole(9), whole(4)
                acc += (w[p, b, d, l, s] & (1 << bits) - 1) @ x[b, m, d, s]
            y[m, p, l] = acc

    random = np.random.default_rng(bits)
    arguments = {"w": random.choice([0, 1, 127, 128, 255], (3, 2, 9, 8, 4)).astype(np.uint8),
                 "x": random.choice([-128, -127, 0, 127], (2, 5, 9, 4)).astype(np.int8),
                 "y": np.zeros((5, 3, 8), np.int32)}
    expected = np.einsum("pbdls,bmds->mpl", arguments["w"].astype(int) & (1 << bits) - 1, arguments["x"].astype(int))
    _, made, mnemonics = mnemonics_of(product.tile_ir(), arguments, TARGETS[target])
    assert ("vpmaddubsw" in mnemonics) == (bits < 8), made.text
    run_native(product.tile_ir(), arguments, TARGETS[target])
    np.testing.assert_array_equal(arguments["y"], expected)
